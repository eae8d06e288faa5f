"""Logits of a linear head that are only looked at: against PyTorch's product, and row by row."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nar_kernels.ops import linear
from nar_kernels.ops.arguments import LinearArgs, LinearNllArgs
from nar_kernels.ops.backends import cpp
from nar_kernels.ops.linear import (
    ChunkLimits,
    LogitsMemory,
    add_product,
    chunk_size,
    inferred_logits,
    run_linear,
)
from nar_kernels.ops.linear_nll import losses, weighted_sum

CPU = torch.device("cpu")
needs_kernel = pytest.mark.skipif(
    cpp is None or not cpp.has_linear(), reason="this CPU has no fused multiply-add, or no C++"
)
# Around a vector, a panel and a tile of every instruction set.
ROWS = [0, 1, 3, 4, 7, 8, 9, 16, 23, 24, 25, 47, 48, 49, 75, 200]


def product(hidden, weight, bias=None):
    """``run_linear`` into memory with gaps behind the rows, which must not change."""
    width = weight.shape[0] + 5
    memory = torch.full((len(hidden) + 1, width), 7.0, dtype=hidden.dtype)
    logits = memory[:-1, :-5]
    run_linear(LinearArgs(logits, hidden, weight, bias))
    assert (memory[:, -5:] == 7).all() and (memory[-1] == 7).all()
    return logits.clone()


def assert_near_product(hidden, weight, bias=None):
    bias_or_zero = torch.zeros(len(weight)) if bias is None else bias
    exact = F.linear(hidden.double(), weight.double(), bias_or_zero.double())
    sizes = F.linear(hidden.double().abs(), weight.double().abs(), bias_or_zero.double().abs())
    # Each of D + 1 sums is rounded.
    error = (hidden.shape[1] + 1) * 2**-24 * sizes
    assert ((product(hidden, weight, bias) - exact).abs() <= error).all()


@pytest.mark.parametrize("rows", ROWS)
def test_equals_the_product(rows, simd_level):
    for vocabulary, depth in ((1, 1), (3, 5), (4, 16), (17, 33), (64, 64), (257, 20), (1003, 300)):
        hidden, weight = torch.randn(rows, depth), torch.randn(vocabulary, depth)
        assert_near_product(hidden, weight)
        assert_near_product(hidden, weight, torch.randn(vocabulary))


def test_any_strides(simd_level):
    hidden, weight, bias = torch.randn(9, 14), torch.randn(21, 14), torch.randn(42)
    assert_near_product(hidden[::2, 3:], weight[1::3, 3:], bias[::6])
    assert_near_product(hidden.t().contiguous().t(), weight.t().contiguous().t())
    assert_near_product(hidden[:, ::2], weight[:, ::2], bias[::2])


def test_values_that_are_not_finite(simd_level):
    hidden, weight = torch.ones(5, 3), torch.ones(6, 3)
    hidden[1, 0], hidden[2, 1], weight[4, 2] = torch.inf, torch.nan, -torch.inf
    torch.testing.assert_close(product(hidden, weight), hidden @ weight.t(), equal_nan=True)


@needs_kernel
def test_a_row_depends_on_itself_alone():
    """Bit for bit, whatever comes with it, on any number of threads and with any vectors."""
    hidden, weight, bias = torch.randn(75, 67), torch.randn(1003, 67), torch.randn(1003)
    expected = product(hidden, weight, bias)
    before, best = torch.get_num_threads(), cpp.simd_level()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for level in range(1, best + 1):
                cpp.limit_simd(level)
                for rows in (slice(0, 1), slice(3, 40), slice(20, 75), slice(None)):
                    assert torch.equal(product(hidden[rows], weight, bias), expected[rows])
    finally:
        torch.set_num_threads(before)
        cpp.limit_simd(best)


@needs_kernel
def test_each_logit_is_one_chain_of_fused_multiply_adds():
    """The small term survives only if the product is not rounded before it is added."""
    tiny = 2.0**-12
    hidden, weight = torch.tensor([[1.0, 1 + tiny]]), torch.tensor([[-1.0, 1 - tiny]])
    assert product(hidden, weight).item() == -(tiny**2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_pytorchs(dtype):
    hidden, weight = torch.randn(6, 8, dtype=dtype), torch.randn(20, 8, dtype=dtype)
    assert torch.equal(product(hidden, weight), hidden @ weight.t())


def test_shapes_that_do_not_fit():
    """Nothing is read that is not there; PyTorch says what is wrong."""
    hidden, weight = torch.randn(6, 8), torch.randn(20, 8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        next(inferred_logits(hidden[:, :7], weight, None, LogitsMemory()))
    with pytest.raises(RuntimeError, match="size"):
        next(inferred_logits(hidden, weight, torch.randn(19), LogitsMemory()))
    assert product(hidden, weight[:0]).shape == (6, 0)


@pytest.mark.parametrize("bias", [None, torch.randn(20)])
def test_opcheck(bias):
    args = (torch.empty(6, 20), torch.randn(6, 8), torch.randn(20, 8), bias)
    torch.library.opcheck(torch.ops.nar_kernels.linear_.default, args)


def test_a_weight_that_is_no_plain_tensor():
    """Of a quantised head, say, which has no memory of its own to read."""

    class Doubled(torch.Tensor):
        @staticmethod
        def __new__(cls, half):
            return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)

        def __init__(self, half):
            self.half = half

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            args = [2 * a.half if isinstance(a, cls) else a for a in args]
            return function(*args, **(kwargs or {}))

    hidden, weight = torch.randn(3, 8), torch.randn(20, 8)
    (logits,) = inferred_logits(hidden, Doubled(weight), None, LogitsMemory())
    torch.testing.assert_close(logits, 2 * hidden @ weight.t())


# ---- chunks


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 30])
def test_inferred_logits(rows, monkeypatch):
    monkeypatch.setattr(linear, "_ENOUGH_LOGITS", 1)
    for limits in (linear.INFERENCE_LIMITS, linear.TRAINING_LIMITS):
        monkeypatch.setitem(limits, "cpu", ChunkLimits(7 * 50, 100))
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight, bias = torch.randn(50, 8, requires_grad=True), torch.randn(50)
    memory, got = LogitsMemory(), []
    for logits in inferred_logits(hidden, weight, bias, memory):
        assert 1 <= len(logits) <= 7 and not logits.requires_grad
        got.append(logits.clone())
    assert len(got) == -(-rows // 7)
    if got:
        torch.testing.assert_close(torch.cat(got), F.linear(hidden, weight, bias))


def test_chunks_are_in_the_same_memory():
    memory, hidden, weight = LogitsMemory(), torch.randn(600, 4), torch.randn(70_000, 4)
    starts = [logits.data_ptr() for logits in inferred_logits(hidden, weight, None, memory)]
    assert len(starts) > 1 and len(set(starts)) == 1
    assert starts[0] == next(inferred_logits(hidden[:9], weight, None, memory)).data_ptr()


@needs_kernel
def test_few_logits_exist_at_a_time():
    """No more than make the product fast."""
    limits = linear.INFERENCE_LIMITS
    for vocabulary in (50_257, 8192, 257):
        size = chunk_size(10_000, vocabulary, CPU, limits)
        assert size * vocabulary <= 1 << 24 and size >= 200


def test_autocast_and_types(monkeypatch):
    hidden, weight, bias = torch.randn(3, 4), torch.randn(9, 4), torch.randn(9)
    with torch.autocast("cpu", torch.bfloat16):
        (logits,) = inferred_logits(hidden, weight, bias, LogitsMemory())
    assert logits.dtype == linear.product_dtype(hidden.bfloat16(), weight.bfloat16())
    torch.testing.assert_close(logits.float(), F.linear(hidden, weight, bias), atol=0.05, rtol=0.05)
    with pytest.raises(TypeError, match=r"hidden is torch.float64 but weight is torch.float32"):
        next(inferred_logits(hidden.double(), weight, bias, LogitsMemory()))


def test_a_chunk_fits_into_a_gpu(monkeypatch):
    gpu = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for vocabulary in (257, 65_536):
        assert chunk_size(1 << 16, vocabulary, gpu, linear.NLL_LIMITS) == 16_384
    small = types.SimpleNamespace(total_memory=8 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {gpu: small}.__getitem__)
    assert chunk_size(1 << 16, 65_536, gpu, linear.NLL_LIMITS) == 2048


# ---- sums of products


class Cublas(TorchDispatchMode):
    """Computes on the CPU what PyTorch has for GPUs alone, and keeps the names of products."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.name():
            self.products.append(function.name())
        if function.name() == "aten::mm.dtype_out":
            a, b, dtype = args
            return kwargs["out"].copy_(a.to(dtype) @ b.to(dtype))
        if function.name() == "aten::addmm.dtype_out":
            total, a, b, dtype = args
            assert total is kwargs["out"]
            return total.add_(a.to(dtype) @ b.to(dtype))
        return function(*args, **kwargs or {})


def sum_of_products(parts, start):
    total = start.clone()
    for i, (a, b) in enumerate(parts):
        add_product(total, a, b, first=i == 0)
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_add_product(dtype, monkeypatch):
    """Where a GEMM can, it adds to float32: no product is rounded to a narrower type."""
    parts = [(torch.randn(7, 9).to(dtype), torch.randn(9, 5).to(dtype)) for _ in range(3)]
    exact = sum(a.double() @ b.double() for a, b in parts)
    garbage = torch.full((7, 5), torch.nan, dtype=torch.promote_types(dtype, torch.float32))
    is_narrow = garbage.dtype != dtype
    has_overloads = hasattr(torch.ops.aten.addmm, "dtype_out")  # from PyTorch 2.8 on
    for adds in (False, True)[: 1 + has_overloads]:
        monkeypatch.setattr(linear, "_gemm_adds_in_float32", lambda device, adds=adds: adds)
        with Cublas() as cublas:
            got = sum_of_products(parts, garbage)
        error = float((got - exact).abs().max())
        assert got.dtype == garbage.dtype
        if is_narrow:
            assert (error < 1e-5) == adds and error < 0.1
            name = {
                False: ["aten::mm"] * 3,
                True: ["aten::mm.dtype_out"] + 2 * ["aten::addmm.dtype_out"],
            }
            assert cublas.products == name[adds]
        else:
            assert error < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_add_product_on_a_gpu(dtype):
    """Also to a matrix with gaps behind its rows, as logits have."""
    memory = torch.randn(3, 96, 320, device="cuda").to(dtype)
    parts = [(x[:, :300].t(), torch.randn(96, 64, device="cuda").to(dtype)) for x in memory]
    exact = sum(a.double() @ b.double() for a, b in parts)
    got = sum_of_products(parts, torch.full((300, 64), torch.nan, device="cuda"))
    error = float((got - exact).abs().max() / exact.abs().max())
    assert error < (1e-5 if linear._gemm_adds_in_float32(got.device) else 2e-2)


def test_which_gemm_adds_in_float32(monkeypatch):
    for has in (False, True):
        monkeypatch.setattr(linear, "_HAS_FLOAT32_SUMS", has)
        assert linear._gemm_adds_in_float32(torch.device("cuda")) == has
        assert not linear._gemm_adds_in_float32(CPU)


class Shapes(TorchDispatchMode):
    """Notes the sizes of all products."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.nar_kernels.linear_)
        if func.overloadpacket in products:
            self.sizes |= {size for x in args if x is not None for size in x.shape}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_rows", [0, 1, 7, 33, 64, 100, 1090])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_narrow_types_have_few_shapes(dtype, num_rows, monkeypatch):
    """oneDNN keeps some MB of code for each."""
    monkeypatch.setattr(linear, "multiplies_in", lambda dtype: True)
    vocabulary, width = 1030, 24
    generator = torch.Generator().manual_seed(num_rows)
    hidden = torch.randn(num_rows, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) / 5).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (num_rows,), generator=generator)
    row_weight = torch.rand(num_rows, generator=generator)
    inputs = (hidden, weight, bias, labels, row_weight)
    with Shapes() as shapes:
        weighted_sum(LinearNllArgs(*inputs), "reference", None).backward()
        with torch.no_grad():
            each = losses(LinearNllArgs(*inputs[:4]), "reference", None)
        chunks = inferred_logits(hidden, weight, bias, LogitsMemory())
        logits = [chunk.clone() for chunk in chunks]
    rows = {0: {0}, 1: {1}, 7: {8}, 100: {128}, 1090: {960, 192, 1152 - 960}}
    assert shapes.sizes <= {vocabulary, width, *rows.get(num_rows, {64})}
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = F.linear(*exact)
    nll = F.cross_entropy(expected, labels, reduction="none")
    (row_weight * nll).sum().backward()
    assert hidden.grad.shape == hidden.shape and each.shape == (num_rows,)
    for x, y in zip((hidden, weight, bias), exact, strict=True):
        assert (x.grad - y.grad).norm() <= 0.02 * y.grad.norm()
    assert (each - nll).norm() <= 0.01 * nll.norm()
    if num_rows:
        assert (torch.cat(logits) - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("vocabulary", [3, 1030, 50_258, 131_000, 300_000, 1 << 20, 1 << 25])
def test_chunks_of_few_shapes_are_within_the_limits(vocabulary):
    limits = linear.NLL_LIMITS["cpu"]
    size = chunk_size(999, vocabulary, CPU, linear.NLL_LIMITS, few_shapes=True)
    assert size == linear.round_up_rows(size) >= 1
    assert size == 1 or size * vocabulary <= limits.logits
    assert 2 * size > min(limits.logits // vocabulary, limits.rows)


def test_nothing_is_behind_a_row_of_logits() -> None:
    """Products of bfloat16 on CPUs with AMX read it, if V is odd, and multiply it by 0."""
    memory, like = LogitsMemory(), torch.empty(0, dtype=torch.bfloat16)
    for num_rows, vocabulary in ((64, 64), (64, 33), (8, 33), (9, 63), (70, 33), (3, 64)):
        logits = memory.rows(num_rows, vocabulary, like)
        logits.fill_(torch.nan)
        behind = logits.as_strided((num_rows, 64 - vocabulary), (64, 1), vocabulary)
        assert not behind.any()
        product = logits.fill_(1) @ torch.ones(vocabulary, 16, dtype=torch.bfloat16)
        assert (product == vocabulary).all()
