"""`masked_nll` against the cross entropy of all its logits in float64, on every backend."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nar_kernels import masked_nll
from nar_kernels.ops import linear
from nar_kernels.ops import masked_nll as loss
from nar_kernels.ops.backends import cpp
from nar_kernels.ops.nll import NLL_DTYPES
from tests.helpers.devices import device_of
from tests.helpers.losses import (
    BACKENDS,
    BACKENDS_AND_DTYPES,
    REDUCTIONS,
    TOLERANCE,
    assert_near,
    check,
    corrupted_batch,
    cross_entropy,
    random_inputs,
    results,
    with_all_masked,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread", "any_cpu"),
    # In Triton's interpreter, of what a GPU computes in silence, as in the gaps between rows.
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),
]


@pytest.fixture(params=[0, 1 << 20], ids=["large head", "small head"])
def head_size(request, monkeypatch):
    """Whether logits are those of a kernel of ours, where there is one."""
    monkeypatch.setattr(linear, "_LARGE_HEAD", request.param)


# ---- value and gradients


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_equals_cross_entropy(backend, dtype, reduction, head_size):
    corrupted = corrupted_batch().to(device_of(backend))
    tensors = random_inputs(corrupted, dtype=dtype)
    check(tensors, corrupted, backend=backend, reduction=reduction)
    check(tensors[:2], corrupted, backend=backend, reduction=reduction)


def shared_row_weight(hidden, weight, corrupted, **kwargs):
    mean = corrupted.loss_weight.mean().expand(len(corrupted))
    return masked_nll(hidden, weight, dataclasses.replace(corrupted, loss_weight=mean), **kwargs)


def shared_upstream(*args, **kwargs):
    value = masked_nll(*args, **kwargs)
    return value.detach() + (value - value.detach()).mean()


class IgnoreUpstream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return torch.ones_like(upstream)


WEAKENED = {  # and a reduction that shows it
    "row weight": (shared_row_weight, "nelbo"),
    "upstream of a row": (shared_upstream, "none"),
    "upstream": (lambda *a, **k: IgnoreUpstream.apply(masked_nll(*a, **k)), "mean"),
    "rows": (lambda h, *a, **k: masked_nll(h.roll(1, dims=1), *a, **k), "none"),
    "reduction": (lambda *a, **k: masked_nll(*a, **k | {"reduction": "mean"}), "nelbo"),
    "bias": (lambda h, w, c, bias, **k: masked_nll(h, w, c, **k) + 0 * bias.sum(), "mean"),
    "no gradient": (lambda h, w, c, **k: masked_nll(h, w.detach() + 0 * w, c, **k), "mean"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", WEAKENED)
def test_check_sees_what_is_wrong(wrong, dtype):
    function, reduction = WEAKENED[wrong]
    corrupted = corrupted_batch()
    with pytest.raises(AssertionError):
        check(
            random_inputs(corrupted, dtype=dtype), corrupted, function=function, reduction=reduction
        )


@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction, rows, rows_of_a_chunk):
    rows_of_a_chunk(rows, 5)
    corrupted = corrupted_batch(6, 5, batch=2, length=4)
    leaves = [tensor.requires_grad_() for tensor in random_inputs(corrupted, 5, width=3)]

    def function(hidden, weight, bias=None):
        return masked_nll(hidden, weight, corrupted, bias=bias, reduction=reduction)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradcheck(function, leaves[:2])


@pytest.mark.parametrize("needed", [*itertools.product([True, False], repeat=3)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_some_gradients(reduction, needed):
    corrupted = corrupted_batch()
    tensors = random_inputs(corrupted)
    expected = results(cross_entropy, tensors, corrupted, reduction=reduction)[1:]
    leaves = [tensor.requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]
    value = masked_nll(*leaves[:2], corrupted, bias=leaves[2], reduction=reduction)
    assert value.requires_grad == any(needed)
    if any(needed):
        upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
        value.backward(upstream.to(value))
    for leaf, gradient, need in zip(leaves, expected, needed, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            assert_near(leaf.grad, gradient, TOLERANCE[torch.float64])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_no_grad_gives_the_same_value(backend, dtype, reduction):
    corrupted = corrupted_batch().to(device_of(backend))
    hidden, weight, bias = random_inputs(corrupted, dtype=dtype)
    args = dict(bias=bias, reduction=reduction, backend=backend)
    value = masked_nll(hidden.requires_grad_(), weight, corrupted, **args)
    with torch.no_grad():
        silent = masked_nll(hidden, weight, corrupted, **args)
    assert value.requires_grad and not silent.requires_grad
    assert torch.equal(value, silent)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_again_adds_the_same(reduction):
    """An optimiser's `zero_grad(set_to_none=False)` between them changes nothing that is kept."""
    corrupted = corrupted_batch()
    leaves = [tensor.requires_grad_() for tensor in random_inputs(corrupted)]
    value = masked_nll(*leaves[:2], corrupted, bias=leaves[2], reduction=reduction)
    upstream = torch.ones_like(value)
    value.backward(upstream, retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    value.backward(upstream, retain_graph=True)
    value.backward(0.5 * upstream, retain_graph=True)
    for leaf, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 2.5 * gradient, rtol=1e-14, atol=0)
        leaf.grad.zero_()
    value.backward(upstream)
    assert all(torch.equal(leaf.grad, g) for leaf, g in zip(leaves, once, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_losses_accumulate(reduction):
    first, second = corrupted_batch(seed=1), corrupted_batch(seed=2)
    assert not torch.equal(first.masked_rows, second.masked_rows)

    def both(function):
        def total(hidden, weight, _, **kwargs):
            return sum(function(hidden, weight, c, **kwargs).sum() for c in (first, second))

        return total

    tensors = random_inputs(first)
    got = results(both(masked_nll), tensors, None, reduction=reduction)
    expected = results(both(cross_entropy), tensors, None, reduction=reduction)
    for x, y in zip(got, expected, strict=True):
        assert_near(x, y, TOLERANCE[torch.float64])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_changed_before_backward(changed, reduction):
    """The gradient is that of before, or it is refused."""
    corrupted = corrupted_batch()
    tensors = random_inputs(corrupted)
    expected = results(cross_entropy, tensors, corrupted, reduction=reduction)[1:]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    value = masked_nll(*leaves[:2], corrupted, bias=leaves[2], reduction=reduction)
    with torch.no_grad():
        leaves[changed].mul_(2)
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(3)).to(value)
    try:
        got = torch.autograd.grad(value, leaves, upstream)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        for x, y in zip(got, expected, strict=True):
            assert_near(x, y, TOLERANCE[torch.float64])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend, reduction):
    corrupted = with_all_masked().to(device_of(backend))
    tensors = random_inputs(corrupted, dtype=torch.float32)
    parts = [x for x in vars(corrupted).values() if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in tensors + parts]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    value = masked_nll(*leaves[:2], corrupted, bias=leaves[2], reduction=reduction, backend=backend)
    upstream = torch.full_like(value, 3.0)
    copy = value.detach().clone()
    value.backward(upstream)
    assert (upstream == 3).all() and torch.equal(value, copy)
    for x, y in zip(tensors + parts, before, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivatives_are_refused(reduction):
    corrupted = corrupted_batch()
    hidden, weight, _ = random_inputs(corrupted)
    value = masked_nll(hidden.requires_grad_(), weight, corrupted, reduction=reduction)
    (gradient,) = torch.autograd.grad(value.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        torch.autograd.grad(gradient.sum(), hidden)


# ---- autocast and narrow types


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend, reduction, hidden_dtype):
    device = device_of(backend)
    corrupted = corrupted_batch().to(device)
    hidden, *others = random_inputs(corrupted, dtype=torch.float32)
    tensors = [hidden.to(hidden_dtype), *others]

    def narrow(*args, **kwargs):
        with torch.autocast(device, torch.bfloat16):
            return masked_nll(*args, **kwargs)

    args = dict(backend=backend, reduction=reduction)
    check(tensors, corrupted, function=narrow, tolerance=1.5e-2, **args)
    with pytest.raises(AssertionError):  # the products are in bfloat16
        check(tensors, corrupted, function=narrow, tolerance=2e-5, **args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_that_does_not_multiply_in_a_type_does_it_in_float32(dtype, monkeypatch):
    monkeypatch.setattr(linear, "multiplies_in", lambda dtype: dtype == torch.float32)
    corrupted = corrupted_batch()
    tensors = random_inputs(corrupted, dtype=dtype)
    value, *gradients = results(masked_nll, tensors, corrupted)
    expected = results(masked_nll, [tensor.float() for tensor in tensors], corrupted)
    assert value == expected[0]
    for got, of_float32 in zip(gradients, expected[1:], strict=True):
        assert torch.equal(got, of_float32.to(dtype))


def test_autocast_leaves_float64_alone():
    def narrow(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return masked_nll(*args, **kwargs)

    corrupted = corrupted_batch()
    check(random_inputs(corrupted), corrupted, function=narrow)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_sums_over_many_chunks(dtype, reduction, rows_of_a_chunk):
    """Sums are wide: hundreds of gradients of one sign do not get stuck at a power of two."""
    corrupted = with_all_masked(batch=8, length=60)
    hidden, weight, bias = random_inputs(corrupted, dtype=dtype)
    rows_of_a_chunk(1, 11)
    check([hidden.abs(), weight, bias], corrupted, reduction=reduction)


@pytest.mark.parametrize("reduction", ["nelbo", "mean"])
def test_loss_scaling_saves_float16(reduction):
    """What a GradScaler does: the gradient of a row would be below the smallest float16."""
    corrupted = with_all_masked()
    tensors = random_inputs(corrupted, dtype=torch.float32)
    normalizer = 2.0**24

    def narrow(*args, **kwargs):
        with torch.autocast("cpu", torch.float16):
            return masked_nll(*args, **kwargs)

    check(tensors, corrupted, function=narrow, reduction=reduction, tolerance=3e-3)
    args = dict(reduction=reduction, normalizer=normalizer, scale=normalizer, tolerance=3e-3)
    check(tensors, corrupted, function=narrow, **args)


class CountProducts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name in ("aten::mm", "aten::addmm_")
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_gradients_there_is_one_product(reduction):
    """Also if the inputs ask for gradients, as parameters do in evaluation."""
    corrupted = corrupted_batch()
    leaves = [tensor.requires_grad_() for tensor in random_inputs(corrupted)[:2]]
    with CountProducts() as products:
        expected = masked_nll(*leaves, corrupted, reduction=reduction)
        expected.sum().backward()
    assert products.count > 2
    with torch.no_grad(), CountProducts() as products:
        got = masked_nll(*leaves, corrupted, reduction=reduction)
    assert products.count == 1
    assert torch.equal(got, expected)


# ---- odd batches


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_masked(backend, reduction):
    device = device_of(backend)
    for batch in (0, 3):
        none = torch.zeros(batch, 7, dtype=torch.bool)
        corrupted = corrupted_batch(batch=batch, maskable=none).to(device)
        tensors = random_inputs(corrupted, dtype=torch.float32)
        value, *gradients = results(
            masked_nll, tensors, corrupted, reduction=reduction, backend=backend
        )
        assert value.tolist() == ([] if reduction == "none" else 0)
        for gradient, tensor in zip(gradients, tensors, strict=True):
            assert gradient.shape == tensor.shape and not gradient.any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row(backend, reduction):
    corrupted = corrupted_batch(batch=1, length=1).to(device_of(backend))
    assert len(corrupted.masked_rows) == 1
    tensors = random_inputs(corrupted, dtype=torch.float32)
    check(tensors, corrupted, backend=backend, reduction=reduction)


IDS = [(12, 0, 12), (12, 5, 12), (12, 11, 12), (12, 11, 11), (2, 0, 2), (2, 1, 2), (2, 1, 1)]


@pytest.mark.parametrize("num_tokens, mask_id, vocabulary", IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_label_is_masked(backend, num_tokens, mask_id, vocabulary):
    corrupted = with_all_masked(num_tokens, mask_id, length=8).to(device_of(backend))
    assert set(corrupted.labels.flatten().tolist()) == set(range(num_tokens)) - {mask_id}
    tensors = random_inputs(corrupted, vocabulary, dtype=torch.float32)
    check(tensors, corrupted, backend=backend, reduction="none")


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_weight_zero(backend):
    """A schedule that is level over half of the times."""
    corrupted = corrupted_batch(batch=6, schedule=lambda t: (2 - 2 * t).clamp(max=1))
    assert corrupted.loss_weight.bool().tolist().count(False) == 3
    corrupted = corrupted.to(device_of(backend))
    tensors = random_inputs(corrupted, dtype=torch.float32)
    check(tensors, corrupted, backend=backend)
    hidden = results(masked_nll, tensors, corrupted, backend=backend)[1]
    assert not hidden[corrupted.loss_weight == 0].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_strides(reduction):
    corrupted = with_all_masked()
    hidden, weight, bias = random_inputs(corrupted, dtype=torch.float32)
    wide = torch.randn(3, 7, 10)
    kinds = {
        "transposed": hidden.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": hidden.transpose(1, 2).contiguous().transpose(1, 2),
        "every other": wide[..., ::2],
        "part of a row": wide[..., 3:8],
        "expanded batch": hidden[:1].expand(3, -1, -1),
        "expanded length": hidden[:, :1].expand(-1, 7, -1),
    }
    for kind in kinds.values():
        assert not kind.is_contiguous()
        check([kind, weight, bias], corrupted, reduction=reduction)
    for strided in (weight.T.contiguous().T, torch.randn(22, 10)[::2, ::2]):
        check([hidden, strided, bias], corrupted, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_bias(backend, reduction):
    corrupted = corrupted_batch().to(device_of(backend))
    hidden, weight, bias = random_inputs(corrupted, dtype=torch.float32)
    for strided in (bias[:1].expand(11), bias.repeat_interleave(2)[::2]):
        check([hidden, weight, strided], corrupted, backend=backend, reduction=reduction)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_the_upstream_gradient(backend):
    corrupted = corrupted_batch().to(device_of(backend))
    tensors = random_inputs(corrupted, dtype=torch.float32)

    def columns(function):
        def call(*args, **kwargs):
            value = function(*args, reduction="none", **kwargs)
            return torch.stack((value, 2 * value), 1)

        return call

    def total(function):
        return lambda *args, **kwargs: function(*args, reduction="none", **kwargs).sum()

    for kind in (columns, total):
        got = results(kind(masked_nll), tensors, corrupted, backend=backend)
        expected = results(kind(cross_entropy), [t.double() for t in tensors], corrupted)
        for x, y in zip(got, expected, strict=True):
            assert_near(x, y, TOLERANCE[torch.float32])


def test_gradient_through_an_expanded_input():
    corrupted = with_all_masked()
    hidden, weight, _ = random_inputs(corrupted)
    leaf = hidden[:1].requires_grad_()
    value = masked_nll(leaf.expand(3, -1, -1), weight, corrupted)
    (got,) = torch.autograd.grad(value, leaf)
    value = cross_entropy(leaf.expand(3, -1, -1), weight, corrupted)
    assert_near(got, torch.autograd.grad(value, leaf)[0], TOLERANCE[torch.float64])


# ---- odd numbers


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_logits(backend):
    """Whole numbers, so that logits have no error of their own, up to 1e4 and with ties."""
    corrupted = with_all_masked(batch=5, length=8).to(device_of(backend))
    tensors = [(1.5 * x).round() for x in random_inputs(corrupted, dtype=torch.float32)]
    tensors[0] *= 1000
    assert (tensors[0] @ tensors[1].T).abs().max() > 1e4
    check(tensors, corrupted, backend=backend, reduction="none")


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_forbidden_ids(backend, dtype):
    """A bias of minus infinity: those ids have no probability and no gradient."""
    corrupted = with_all_masked(6, 5).to(device_of(backend))
    tensors = random_inputs(corrupted, 6, dtype=dtype)
    tensors[2][5] = -torch.inf
    check(tensors, corrupted, backend=backend, reduction="none")
    value, _, weight, bias = results(masked_nll, tensors, corrupted, backend=backend)
    assert value.isfinite() and not weight[5].any() and bias[5] == 0


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_nan_stays_in_its_row(backend, dtype):
    corrupted = corrupted_batch().to(device_of(backend))
    hidden, weight, bias = random_inputs(corrupted, dtype=dtype)
    args = dict(bias=bias, backend=backend)
    expected = masked_nll(hidden, weight, corrupted, reduction="none", **args)
    flat = hidden.view(-1, 5)
    flat[~corrupted.masked_indices.flatten()] = torch.nan  # of no consequence
    got = masked_nll(hidden, weight, corrupted, reduction="none", **args)
    assert torch.equal(got, expected)
    flat[corrupted.masked_rows[1], 2] = torch.nan
    got = masked_nll(hidden, weight, corrupted, reduction="none", **args)
    assert got.isnan().nonzero().tolist() == [[1]]
    assert torch.equal(got[2:], expected[2:]) and got[0] == expected[0]
    assert masked_nll(hidden, weight, corrupted, **args).isnan()


# ---- chunks


def chunk_of(rows, vocabulary):
    device = torch.device("cpu")
    return linear.chunk_size(rows, vocabulary, device, linear.NLL_LIMITS)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 10, 20, 21, 22])
def test_chunks_change_nothing(rows, reduction, rows_of_a_chunk):
    corrupted = with_all_masked()
    tensors = random_inputs(corrupted)
    rows_of_a_chunk(rows, 11)
    size = chunk_of(21, 11)
    assert size == {0: 1, 1: 1, 2: 2, 3: 3, 10: 7, 20: 11, 21: 21, 22: 21}[rows]
    check(tensors, corrupted, reduction=reduction)
    check([x.float() for x in tensors], corrupted, reduction=reduction)


@pytest.mark.parametrize("rows", [0, 1, 7, 100, 101])
def test_chunk_size(rows, rows_of_a_chunk):
    rows_of_a_chunk(7, 50)
    size = chunk_of(rows, 50)
    assert 1 <= size <= 7 and -(-rows // size) == -(-rows // 7)
    assert chunk_of(rows, 10**6) == 1


class PeakMemory(TorchDispatchMode):
    """The most bytes that were there at a time, of what operators made."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if is_tensor(x)}
        out = function(*args, **kwargs or {})
        for x in filter(is_tensor, tree_leaves(out)):
            memory = x.untyped_storage()
            if memory.data_ptr() not in given:
                self.alive[memory.data_ptr()] = StorageWeakRef(memory), memory.nbytes()
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def head_of(function):
    """A function of a head, called like `masked_nll`."""

    def call(hidden, weight, corrupted, *, bias=None, **kwargs):
        return function(hidden, lambda x: F.linear(x, weight, bias), corrupted, **kwargs)

    return call


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", [masked_nll, head_of(loss.head_nll), cross_entropy])
def test_memory(function, reduction, rows_of_a_chunk):
    """The logits `[B, L, V]` never exist, nor those of several chunks."""
    corrupted = with_all_masked(1001, 1000, batch=4, length=64)
    tensors = random_inputs(corrupted, 1000, width=2, dtype=torch.float32)
    rows_of_a_chunk(8, 1000)
    with PeakMemory() as memory:
        results(function, tensors, corrupted, reduction=reduction)
    small = memory.peak < 4 * 256 * 1000 / 4
    assert small == (function is not cross_entropy), memory.peak


# ---- parts of a batch


@pytest.mark.parametrize("reduction", ["nelbo", "mean", "sequence", "batch"])
@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(draw="bernoulli"),
        dict(never_mask_ids=(0, 3)),
        dict(draw="bernoulli", never_mask_ids=(2,), maskable=torch.arange(45).view(5, 9) > 20),
    ],
)
def test_parts_add_up(how, reduction):
    """Also where the first part has nothing to mask, and for every kind of number."""
    whole = corrupted_batch(batch=5, length=9, **how)
    tensors = random_inputs(whole)
    normalizer = loss.count(whole, reduction)
    expected = results(cross_entropy, tensors, whole, reduction=reduction)
    for divisor in (normalizer, int(normalizer), float(normalizer), normalizer.float()):

        def parts(hidden, weight, _, divisor=divisor, **kwargs):
            values = []
            for i, part in enumerate(whole.microbatches(2)):
                h = hidden[2 * i : 2 * i + 2]
                values.append(masked_nll(h, weight, part, normalizer=divisor, **kwargs))
            return sum(values)

        got = results(parts, tensors, None, reduction=reduction)
        for x, y in zip(got, expected, strict=True):
            assert_near(x, y, TOLERANCE[torch.float64])


def test_count():
    corrupted = corrupted_batch(batch=5, length=9, never_mask_ids=(0,), draw="bernoulli")
    for name, counts in ("nelbo", corrupted.num_maskable), ("mean", corrupted.num_masked):
        got = loss.count(corrupted, name)
        assert got.dtype == torch.int64 and got.shape == () and got == counts.sum()
    for name in ("sequence", "batch"):
        assert loss.count(corrupted, name) == 5
    nothing = corrupted_batch(maskable=torch.zeros(3, 7, dtype=torch.bool))
    assert loss.count(nothing, "nelbo") == loss.count(nothing, "mean") == 1


@pytest.mark.parametrize("normalizer", [7, 7.0, torch.tensor(7), torch.tensor(7.0).double()])
@pytest.mark.parametrize("reduction", ["nelbo", "mean"])
def test_normalizer(reduction, normalizer):
    corrupted = corrupted_batch()
    tensors = random_inputs(corrupted, dtype=torch.float32)
    check(tensors, corrupted, reduction=reduction, normalizer=normalizer)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_auto_is_the_fastest_that_can(dtype):
    corrupted = corrupted_batch()
    hidden, weight, bias = random_inputs(corrupted, dtype=dtype)
    can = cpp is not None and dtype in NLL_DTYPES["cpp"]
    auto = masked_nll(hidden, weight, corrupted, bias=bias)
    named = masked_nll(hidden, weight, corrupted, bias=bias, backend="cpp" if can else "reference")
    assert torch.equal(auto, named)


# ---- bad input


H, W, BIAS = torch.zeros(3, 7, 5), torch.zeros(11, 5), torch.zeros(11)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(reduction="sum"), ValueError, "reduction is 'sum'.*one of 'nelbo', 'mean', 'token'"),
        (dict(hidden=H.view(21, 5)), ValueError, r"hidden has shape \[21, 5\].*\[3, 7, D\]"),
        (dict(hidden=H[:2]), ValueError, r"hidden has shape \[2, 7, 5\].*\[3, 7, D\]"),
        (dict(hidden=H[:, :6]), ValueError, r"hidden has shape \[3, 6, 5\].*\[3, 7, D\]"),
        (dict(weight=W[:, :4]), ValueError, r"weight has shape \[11, 4\].*\[V, D\]"),
        (dict(weight=W[:10]), ValueError, r"weight has shape \[10, 5\].*\[V, D\]"),
        (dict(weight=torch.zeros(13, 5)), ValueError, r"weight has shape \[13, 5\].*\[V, D\]"),
        (dict(weight=W[0]), ValueError, r"weight has shape \[5\].*\[V, D\]"),
        (dict(bias=BIAS[:10]), ValueError, r"bias has shape \[10\].*\[11\]"),
        (dict(bias=BIAS[None]), ValueError, r"bias has shape \[1, 11\].*\[11\]"),
        (dict(hidden=H.long(), weight=W.long()), TypeError, "hidden is torch.int64.*bfloat16"),
        (dict(hidden=H.cfloat(), weight=W.cfloat()), TypeError, "hidden is torch.complex64"),
        (dict(weight=W.double()), TypeError, "float32 but weight is torch.float64.*autocast"),
        (dict(hidden=H.bfloat16()), TypeError, "bfloat16 but weight is torch.float32.*autocast"),
        (dict(weight=W.to("meta")), ValueError, "weight is on meta, but hidden is on cpu"),
        (dict(bias=BIAS.to("meta")), ValueError, "bias is on meta, but hidden is on cpu"),
        (dict(backend="cuda"), ValueError, "unknown backend 'cuda'.*'reference', 'cpp'"),
        (dict(backend="numpy"), ValueError, "unknown backend 'numpy'.*'reference', 'cpp'"),
    ],
)
def test_argument_errors(change, error, message):
    args = dict(hidden=H, weight=W, corrupted=corrupted_batch(), bias=BIAS) | change
    with pytest.raises(error, match=message):
        masked_nll(**args)


def test_mask_id_that_is_not_last_has_a_row():
    with pytest.raises(ValueError, match=r"weight has shape \[11, 5\].*\[12, 5\]"):
        masked_nll(H, W, corrupted_batch(12, 5))


@pytest.mark.parametrize(
    "backend, dtype",
    [
        pytest.param("cpp", torch.float64, marks=pytest.mark.cpp),
        pytest.param("cpp", torch.float16, marks=pytest.mark.cpp),
        pytest.param("triton", torch.float64, marks=pytest.mark.triton),
    ],
)
def test_backend_without_a_kernel_for_the_dtype(backend, dtype):
    corrupted = corrupted_batch().to(device_of(backend))
    hidden, weight, _ = random_inputs(corrupted, dtype=dtype)
    with pytest.raises(TypeError, match=f"'{backend}' has no kernel for {dtype}.*'reference'"):
        masked_nll(hidden, weight, corrupted, backend=backend)


# Labels that a user has set to -100


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_labels_do_not_count(backend, reduction):
    batch = corrupted_batch(length=9).to(device_of(backend))
    hidden, weight, bias = (x.float() for x in random_inputs(batch))
    edited = dataclasses.replace(batch, labels=batch.labels.clone())
    edited.labels[:, :4] = -100
    rows = batch.masked_rows
    ignored = batch.masked_indices.clone()
    ignored[:, 4:] = False
    assert 0 < ignored.sum() < len(rows)

    nll = cross_entropy(hidden, weight, batch, bias=bias, reduction="none")
    counts = ~ignored.flatten()[rows]
    if reduction == "none":
        wanted = nll * counts
    elif reduction == "mean":
        wanted = nll[counts].mean()
    else:
        weighted = nll * batch.loss_weight[rows // 9] * counts
        lengths = batch.num_maskable - ignored.sum(1)
        if reduction == "sequence":
            weighted = weighted / lengths[rows // 9]
        divisor = lengths.sum() if reduction == "nelbo" else len(batch)
        wanted = weighted.sum() / divisor
    tensors = hidden, weight, bias
    for tensor in tensors:
        tensor.requires_grad_()
    got = masked_nll(hidden, weight, edited, bias=bias, reduction=reduction, backend=backend)
    torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        again = masked_nll(hidden, weight, edited, bias=bias, reduction=reduction, backend=backend)
    torch.testing.assert_close(again, wanted)
    (of_hidden,) = torch.autograd.grad(got.sum(), hidden)
    assert of_hidden.isfinite().all() and (of_hidden[:, :4] == 0).all()
    assert (of_hidden[:, 4:] != 0).any()


@pytest.mark.parametrize("reduction", ["nelbo", "mean"])
def test_every_label_ignored(reduction):
    batch = corrupted_batch()
    batch.labels.fill_(-100)
    hidden, weight, _ = random_inputs(batch)
    hidden.requires_grad_()
    value = masked_nll(hidden, weight, batch, reduction=reduction)
    value.backward()
    assert value == 0 and (hidden.grad == 0).all()


@pytest.mark.parametrize("normalizer", [0, -1.0, float("nan"), float("inf"), torch.tensor(0)])
def test_a_normalizer_is_positive(normalizer):
    batch = corrupted_batch()
    with pytest.raises(ValueError, match=r"normalizer is .*: it must be positive"):
        masked_nll(*random_inputs(batch)[:2], batch, normalizer=normalizer)
    with pytest.raises(ValueError, match=r"normalizer is .*: it must be positive"):
        rows = batch.masked_rows
        loss.reduce_nll(torch.ones(len(rows)), rows, batch, "mean", normalizer)


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, "strides"])
def test_labels_of_other_integers(kind):
    batch = corrupted_batch()
    tensors = random_inputs(batch)
    wanted = masked_nll(*tensors[:2], batch)
    labels = batch.labels.t().contiguous().t() if kind == "strides" else batch.labels.to(kind)
    assert masked_nll(*tensors[:2], dataclasses.replace(batch, labels=labels)) == wanted


@pytest.mark.parametrize("labels", [torch.zeros(3, 7), torch.zeros(2, 7, dtype=torch.int64)])
def test_what_labels_are_not(labels):
    batch = dataclasses.replace(corrupted_batch(), labels=labels)
    with pytest.raises(ValueError, match=r"labels are .*: they must be integers \[3, 7\]"):
        masked_nll(*random_inputs(corrupted_batch())[:2], batch)
