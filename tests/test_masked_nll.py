"""`masked_nll` against the cross entropy of all its logits in float64, on every backend."""

import ctypes
import dataclasses
import itertools
import mmap
import multiprocessing

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nar_kernels
from nar_kernels import MaskingConfig, linear, loss, masked_nll
from nar_kernels.arguments import NllArgs
from nar_kernels.backends import cpp
from nar_kernels.launch import NLL_DTYPES, run_nll
from tests import devices
from tests.devices import device_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # In Triton's interpreter, of what a GPU computes in silence, as in the gaps between rows.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

MARKS = {"reference": (), "cpp": pytest.mark.cpp, "triton": pytest.mark.triton}
BACKENDS = [pytest.param(name, marks=marks) for name, marks in MARKS.items()]
BACKENDS_AND_DTYPES = [
    pytest.param(name, dtype, marks=marks, id=f"{name}-{dtype}".replace("torch.", ""))
    for name, marks in MARKS.items()
    for dtype in NLL_DTYPES[name]
]
REDUCTIONS = ["nelbo", "mean", "none"]

# The largest error, as a part of the largest value.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.bfloat16: 1.5e-2,
    torch.float16: 2e-3,
}


def corrupted_batch(num_tokens=12, mask_id=11, *, batch=3, length=7, seed=1, maskable=None, **how):
    """The clean ids go round the vocabulary, so that both its ends are there."""
    masking = MaskingConfig(num_tokens, mask_id, **how)
    ids = torch.arange(batch * length).view(batch, length) % (num_tokens - 1)
    return nar_kernels.corrupt(ids + (ids >= mask_id), masking, seed=seed, maskable=maskable)


def with_all_masked(num_tokens=12, mask_id=11, **how):
    """Every position is masked, with a weight for each sample."""
    everything = corrupted_batch(num_tokens, mask_id, schedule=lambda t: 0 * t + 1, **how)
    assert everything.masked_indices.all()
    weight = torch.linspace(0.5, 3, len(everything))
    return dataclasses.replace(everything, loss_weight=weight)


def random_inputs(corrupted, vocabulary=11, width=5, *, dtype=torch.float64, seed=0):
    """Hidden, weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (*corrupted.labels.shape, width), (vocabulary, width), (vocabulary,)
    device = corrupted.labels.device
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def cross_entropy(hidden, weight, corrupted, *, bias=None, reduction="nelbo", normalizer=None):
    """What `masked_nll` is, from its definition."""
    rows = corrupted.masked_indices.flatten().nonzero().flatten()
    logits = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows) @ weight.T
    logits = logits if bias is None else logits + bias
    nll = F.cross_entropy(logits, corrupted.labels.flatten()[rows], reduction="none")
    if reduction == "none":
        return nll
    counts = corrupted.num_masked if reduction == "mean" else corrupted.num_maskable
    normalizer = max(int(counts.sum()), 1) if normalizer is None else normalizer
    sample = rows // corrupted.labels.shape[1]
    w = torch.ones_like(nll) if reduction == "mean" else corrupted.loss_weight.to(nll)[sample]
    return (w * nll).sum() / normalizer


def results(function, tensors, corrupted, *, scale=1.0, **kwargs):
    """The value, and the gradients under a random upstream gradient: the same at every call."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    bias = dict(zip(["bias"], leaves[2:], strict=False))
    value = function(*leaves[:2], corrupted, **bias, **kwargs)
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(3)) * scale
    return value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value))


def assert_near(got, expected, tolerance, name=""):
    assert got.shape == expected.shape, name
    if got.numel():
        error, largest = (float(x.abs().max()) for x in (got.double() - expected, expected))
        assert error <= tolerance * largest, name


def check(tensors, corrupted, *, function=masked_nll, backend="auto", tolerance=None, **kwargs):
    """`function` gives the value and the gradients of `cross_entropy`, in the right dtypes."""
    dtype = tensors[0].dtype
    got = results(function, tensors, corrupted, backend=backend, **kwargs)
    expected = results(cross_entropy, [t.double() for t in tensors], corrupted, **kwargs)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for x, tensor in zip(got[1:], tensors, strict=True):
        assert x.dtype == tensor.dtype
    names = ["value", "hidden", "weight", "bias"]
    for name, x, y in zip(names, got, expected, strict=False):
        assert_near(x, y, tolerance or TOLERANCE[dtype], name)


@pytest.fixture(autouse=True)
def any_cpu(monkeypatch):
    """Products are in the type of the tensors, whatever this CPU multiplies in."""
    monkeypatch.setattr(linear, "multiplies_in", lambda dtype: True)


@pytest.fixture(params=[0, 1 << 20], ids=["large head", "small head"])
def head_size(request, monkeypatch):
    """Whether logits are those of a kernel of ours, where there is one."""
    monkeypatch.setattr(linear, "_LARGE_HEAD", request.param)


@pytest.fixture
def rows_of_a_chunk(monkeypatch):
    """Sets how many rows of logits may exist at a time."""

    def limit(rows, vocabulary):
        for device, limits in linear.TRAINING_LIMITS.items():
            limits = limits._replace(logits=rows * vocabulary)
            monkeypatch.setitem(linear.TRAINING_LIMITS, device, limits)

    return limit


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
    return linear.chunk_size(rows, vocabulary, device, linear.TRAINING_LIMITS)


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


@pytest.mark.parametrize("reduction", ["nelbo", "mean"])
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
    nothing = corrupted_batch(maskable=torch.zeros(3, 7, dtype=torch.bool))
    assert loss.count(nothing, "nelbo") == loss.count(nothing, "mean") == 1


@pytest.mark.parametrize("normalizer", [7, 7.0, torch.tensor(7), torch.tensor(7.0).double()])
@pytest.mark.parametrize("reduction", ["nelbo", "mean"])
def test_normalizer(reduction, normalizer):
    corrupted = corrupted_batch()
    tensors = random_inputs(corrupted, dtype=torch.float32)
    check(tensors, corrupted, reduction=reduction, normalizer=normalizer)


# ---- any head


class Head(torch.nn.Module):
    def __init__(self, width, vocabulary, offset=0.0):
        super().__init__()
        self.first = torch.nn.Linear(width, 6)
        self.second = torch.nn.Linear(6, vocabulary)
        self.offset = offset

    def forward(self, x):
        return self.second(self.first(x).tanh()) - self.offset


def results_of_head(function, hidden, head, corrupted, **kwargs):
    leaves = [hidden.detach().requires_grad_(), *head.parameters()]
    value = function(leaves[0], head, corrupted, **kwargs)
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
    return value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value))


def head_cross_entropy(hidden, head, corrupted, **kwargs):
    logits = head(hidden)
    return cross_entropy(logits, torch.eye(logits.shape[-1]).to(logits), corrupted, **kwargs)


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_head(reduction, rows, rows_of_a_chunk):
    torch.manual_seed(0)
    corrupted = corrupted_batch()
    hidden = random_inputs(corrupted)[0].transpose(0, 1).contiguous().transpose(0, 1)
    rows_of_a_chunk(rows, 11)
    head = Head(5, 11).double()
    log_head = torch.nn.Sequential(head, torch.nn.LogSoftmax(-1))
    expected = results_of_head(head_cross_entropy, hidden, head, corrupted, reduction=reduction)
    for chosen in ({"head": head}, {"head": log_head, "is_log_prob": True}):
        got = results_of_head(
            loss.head_nll, hidden, corrupted=corrupted, reduction=reduction, **chosen
        )
        for x, y in zip(got, expected, strict=True):
            assert_near(x, y, TOLERANCE[torch.float64])


def test_head_gives_log_probabilities():
    """They are taken as they are, normalised or not."""
    corrupted = corrupted_batch()
    hidden = random_inputs(corrupted)[0]
    head = torch.nn.Sequential(torch.nn.LogSoftmax(-1), Head(5, 11)).double()
    rows = corrupted.masked_rows
    with torch.no_grad():
        got = loss.head_nll(hidden, head, corrupted, is_log_prob=True, reduction="none")
        chosen = head(hidden).flatten(0, 1)[rows, corrupted.labels.flatten()[rows]]
    assert_near(got, -chosen, TOLERANCE[torch.float64])


def test_head_with_dropout():
    """The logits that are computed again are the same."""
    corrupted = corrupted_batch()
    hidden = random_inputs(corrupted)[0]
    head = torch.nn.Sequential(torch.nn.Dropout(0.5), Head(5, 11)).double()

    def direct(hidden, head, corrupted):
        logits = head(hidden.flatten(0, 1)[corrupted.masked_rows])
        labels = corrupted.labels.flatten()[corrupted.masked_rows]
        return F.cross_entropy(logits, labels)

    torch.manual_seed(5)
    expected = results_of_head(direct, hidden, head, corrupted)
    torch.manual_seed(5)
    got = results_of_head(loss.head_nll, hidden, head, corrupted, reduction="mean")
    for x, y in zip(got, expected, strict=True):
        assert_near(x, y, TOLERANCE[torch.float64])


def test_head_with_autocast():
    torch.manual_seed(0)
    corrupted = corrupted_batch()
    hidden = random_inputs(corrupted, dtype=torch.float32)[0]
    head = Head(5, 11)

    def narrow(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return loss.head_nll(*args, **kwargs)

    got = results_of_head(narrow, hidden, head, corrupted)
    expected = results_of_head(head_cross_entropy, hidden.double(), head.double(), corrupted)
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == torch.float32
        assert_near(x, y, 3e-2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_head_with_nothing_masked(reduction):
    corrupted = corrupted_batch(maskable=torch.zeros(3, 7, dtype=torch.bool))
    hidden = random_inputs(corrupted)[0]
    head = Head(5, 11).double()
    value, *gradients = results_of_head(loss.head_nll, hidden, head, corrupted, reduction=reduction)
    assert value.tolist() == ([] if reduction == "none" else 0)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_logits_nll(dtype):
    logits = torch.randn(9, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.arange(9)
    wide = logits.double()
    cases = {False: F.cross_entropy(wide, labels, reduction="none"), True: -wide.diagonal()}
    for is_log_prob, expected in cases.items():
        got = loss.logits_nll(logits, labels, is_log_prob)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_near(got, expected, 1e-6 if dtype != torch.float64 else 1e-14)


@pytest.mark.parametrize("normalizer", [None, 5.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reduce_nll(reduction, normalizer):
    corrupted = corrupted_batch()
    args = dict(reduction=reduction, normalizer=normalizer)

    def reduced(*args, **kwargs):
        return loss.reduce_nll(cross_entropy(*args, reduction="none"), corrupted, **kwargs)

    tensors = random_inputs(corrupted)[:2]
    got = results(reduced, tensors, corrupted, **args)
    for x, y in zip(got, results(cross_entropy, tensors, corrupted, **args), strict=True):
        assert_near(x, y, TOLERANCE[torch.float64])


# ---- the kernel

GUARD = 64  # elements, and one more: rows at any alignment


class Guarded:
    """A copy of logits between memory that nobody may touch; huge where it is read."""

    def __init__(self, logits, gap=0):
        rows, vocabulary = logits.shape
        size, pitch = rows * (vocabulary + gap), vocabulary + gap
        self.memory = torch.empty(size + 2 * GUARD + 1, dtype=logits.dtype, device=logits.device)
        self.memory.view(torch.uint8).fill_(0x5A)
        self.guards = self.memory[: GUARD + 1], self.memory[GUARD + 1 + size :]
        self.logits = self.memory.as_strided((rows, vocabulary), (pitch, 1), GUARD + 1)
        self.memory[GUARD + 1 : GUARD + 1 + size] = torch.nan  # the gaps
        self.logits.copy_(logits)

    def check(self):
        assert all((guard.view(torch.uint8) == 0x5A).all() for guard in self.guards)


@pytest.fixture
def poisoned_memory():
    """What a kernel forgets to write is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def softmax_problem(rows, vocabulary, dtype, *, spread=2.0, seed=0):
    """Logits, labels, bias and weight; sums of logit and bias are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = spread * torch.randn(rows, vocabulary, generator=generator)
    logits = ((logits * 64).round() / 64).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[0], labels[-1] = 0, vocabulary - 1
    bias = (torch.randn(vocabulary, generator=generator) * 64).round().to(wide) / 64
    return logits, labels, bias, torch.randn(rows, generator=generator).to(wide)


# The largest error of a softmax, as a part of itself: of its own type's rounding, and before it.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
COMPUTING = {"reference": 4e-6, "cpp": 1e-6, "triton": 4e-6}


def softmax_error(backend, dtype):
    if dtype == torch.float64:
        return 1e-14
    cuts_off = devices.is_interpreted(backend)
    rounding = ROUNDING.get(dtype, 0) * (2 if cuts_off and dtype == torch.bfloat16 else 1)
    return rounding + COMPUTING[backend]


def check_kernel(logits, labels, bias, weight, backend, gap=0):
    """Of every element, on its own."""
    device = device_of(backend)
    wide = logits.double() if bias is None else logits.double() + bias.double()
    nll = F.cross_entropy(wide, labels, reduction="none")
    softmax, one_hot = wide.softmax(1), F.one_hot(labels, wide.shape[1])
    w = torch.ones(len(labels), 1) if weight is None else weight.double()[:, None]
    for gradient in (True, False):
        guarded = Guarded(logits.to(device), gap)
        tensors = [x if x is None else x.to(device) for x in (labels, bias, weight)]
        got = run_nll(NllArgs(guarded.logits, *tensors, gradient=gradient), backend).cpu()
        guarded.check()
        assert got.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
        assert_near(got, nll, 1e-14 if logits.dtype == torch.float64 else 1e-6)
        if gradient:
            off = (guarded.logits.cpu().double() - w * (softmax - one_hot)).abs()
            error = softmax_error(backend, logits.dtype)
            allowed = error * w.abs() * (softmax + one_hot)
            tiny = 2**-25 if logits.dtype == torch.float16 else 1e-37
            assert (off <= allowed + tiny).all(), ((off - tiny) / allowed).max()


VOCABULARIES = [*range(1, 34), 257, 4099, 70001]


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_kernel(backend, dtype, poisoned_memory):
    few = backend == "triton"  # which compiles most of these anew, or is slow in its interpreter
    for vocabulary in [1, 2, 31, 32, 33, 257, 4099] if few else VOCABULARIES:
        if few and dtype != torch.float32 and vocabulary not in (33, 4099):
            continue
        rows = 2 if vocabulary > 257 else 5
        logits, labels, bias, weight = softmax_problem(rows, vocabulary, dtype)
        check_kernel(logits, labels, bias, weight, backend)
        if not few or vocabulary == 33:
            check_kernel(logits, labels, None, weight, backend)
            check_kernel(logits, labels, bias, None, backend)
            check_kernel(logits, labels, None, None, backend)


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_kernel_with_gaps_behind_rows(backend, dtype, poisoned_memory):
    for vocabulary, gap in [(1, 1), (1, 63), (11, 5), (16, 16), (33, 1), (64, 3), (257, 255)]:
        check_kernel(*softmax_problem(3, vocabulary, dtype), backend, gap)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_where_memory_ends_with_the_last_row(backend):
    """Without a gap: PyTorch allocates no more than what is asked for, up to alignment."""
    device = device_of(backend)
    logits = torch.full((21,), 7.0, device=device).as_strided((3, 5), (8, 1))
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    nll = run_nll(NllArgs(logits, labels, None, None, gradient=True), backend)
    assert_near(nll, torch.full((3,), 5.0, device=device).log().double(), 1e-6)
    expected = torch.full((3, 5), 0.2, device=device)
    expected[:, 0] -= 1
    assert_near(logits, expected.double(), 1e-6)


def beside_forbidden_pages(tensor, at_end):
    """A copy that begins, or ends, where one byte further may not even be read."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    inner = -(-size // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for forbidden in (address, address + page + inner):
        assert protect(forbidden, page, 0) == 0
    offset = page + (inner - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)


def nll_beside_forbidden_pages(dtype):
    for vocabulary, at_end, gap in itertools.product(VOCABULARIES[:-1], [True, False], [0, 3]):
        tensors = softmax_problem(3, vocabulary, dtype)
        size = 3 * (vocabulary + gap) - gap
        memory, *others = (
            beside_forbidden_pages(x, at_end)
            for x in (torch.zeros(size, dtype=dtype), *tensors[1:])
        )
        logits = memory.as_strided((3, vocabulary), (vocabulary + gap, 1), memory.storage_offset())
        logits.copy_(tensors[0])
        run_nll(NllArgs(logits, *others, gradient=True), "cpp")


@pytest.mark.cpp
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("dtype", NLL_DTYPES["cpp"])
def test_kernel_reads_nothing_outside(simd_level, dtype):
    context = multiprocessing.get_context("fork")
    child = context.Process(target=nll_beside_forbidden_pages, args=(dtype,))
    child.start()
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_kernel_far_from_zero(backend, dtype):
    """A constant takes nothing from the accuracy, where logits hold it exactly."""
    shift = 2**13 if dtype in (torch.float64, torch.float32) else 2**8
    for vocabulary in (2, 50):
        logits, labels, _, weight = softmax_problem(5, vocabulary, dtype)
        for sign in (1, -1):
            check_kernel(logits + sign * shift, labels, None, weight, backend)


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", NLL_DTYPES["cpp"])
def test_every_instruction_set(simd_level, dtype):
    for vocabulary in VOCABULARIES[:-1]:
        logits, labels, bias, weight = softmax_problem(3, vocabulary, dtype)
        check_kernel(logits, labels, bias, weight, "cpp")
        check_kernel(logits, labels, None, None, "cpp")
        got, expected = logits.clone(), logits.clone()
        nll = run_nll(NllArgs(got, labels, bias, weight, gradient=True), "cpp")
        ref = run_nll(NllArgs(expected, labels, bias, weight, gradient=True), "reference")
        torch.testing.assert_close(nll, ref, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got, expected, rtol=2**-8, atol=1e-6)


@pytest.mark.cpp
def test_exp_is_accurate(simd_level):
    """Down to the smallest normal numbers; whole steps of 2^-10 are exact in float32."""
    steps = torch.arange(-85 * 1024, 1, 5) / 1024
    logits = steps[torch.randperm(len(steps), generator=torch.Generator().manual_seed(0))][None]
    for shift in (0, 1000, -1000):
        check_kernel(logits + shift, torch.tensor([7]), None, None, "cpp")


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_special_values(backend, poisoned_memory):
    """As cross entropy has them; a row does not change its neighbours."""
    inf, nan = torch.inf, torch.nan
    rows = [
        [1.0, 2.0, 3.0],
        [1.0, -inf, 3.0],  # a wrong id
        [-inf, 2.0, 3.0],  # the label
        [-inf, -inf, -inf],
        [1.0, inf, 3.0],
        [1.0, nan, 3.0],
        [nan, nan, nan],
        [3e38, -3e38, 3e38],
        [-3e38, -3e38, -3e38],
        [1.0, 2.0, 3.0],
    ]
    logits, labels = torch.tensor(rows), torch.zeros(len(rows), dtype=torch.int64)
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, labels, reduction="none")
    expected.backward(torch.ones_like(expected))
    device = device_of(backend)
    moved = logits.to(device)
    got = run_nll(NllArgs(moved, labels.to(device), None, None, gradient=True), backend)
    close = dict(rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(got.cpu().double(), expected.detach(), **close)
    torch.testing.assert_close(moved.cpu().double(), wide.grad, **close)


BAD_LABELS = [-1, 5, -100, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63), -(2**32)]


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_bad_labels(backend, dtype):
    """Give NaN, and touch neither other rows nor what is beside the logits."""
    device = device_of(backend)
    count = len(BAD_LABELS)
    logits, labels, bias, weight = softmax_problem(count + 2, 5, dtype)
    labels[1:-1] = torch.tensor(BAD_LABELS)
    moved = [x.to(device) for x in (labels, bias, weight)]
    good = [0, count + 1]
    for gradient in (True, False):
        guarded, alone = Guarded(logits.to(device)), logits[good].to(device)
        nll = run_nll(NllArgs(guarded.logits, *moved, gradient=gradient), backend)
        guarded.check()
        of_good = moved[0][good], moved[1], moved[2][good]
        expected = run_nll(NllArgs(alone, *of_good, gradient=gradient), backend)
        assert nll[1:-1].isnan().all() and torch.equal(nll[good], expected)
        assert not gradient or torch.equal(guarded.logits[good], alone)


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", NLL_DTYPES["cpp"])
def test_independent_of_threads(dtype):
    logits, labels, bias, weight = softmax_problem(301, 1031, dtype)
    outcomes = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        gradient = logits.clone()
        nll = run_nll(NllArgs(gradient, labels, bias, weight, gradient=True), "cpp")
        outcomes.append((nll, gradient))
    torch.set_num_threads(1)
    for nll, gradient in outcomes[1:]:
        assert torch.equal(nll, outcomes[0][0]) and torch.equal(gradient, outcomes[0][1])


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_opcheck(backend, dtype):
    tensors = [x.to(device_of(backend)) for x in softmax_problem(2, 5, dtype)]
    operator = torch.ops.nar_kernels.nll_.default
    torch.library.opcheck(operator, (*tensors, True, backend))
    # Without the gradient, logits are undefined, so that two calls cannot be compared.
    only = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, (*tensors[:2], None, None, False, backend), test_utils=only)


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
        (dict(reduction="sum"), ValueError, "reduction is 'sum'.*'nelbo', 'mean' or 'none'"),
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


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(reduction="sum"), "reduction is 'sum'"),
        (dict(hidden=H[:2]), r"hidden has shape \[2, 7, 5\]"),
        (dict(hidden=torch.zeros(4, 7, 5)), r"hidden has shape \[4, 7, 5\]"),
    ],
)
def test_argument_errors_of_a_head(change, message):
    args = dict(hidden=H, head=lambda x: x @ W.T, corrupted=corrupted_batch()) | change
    with pytest.raises(ValueError, match=message):
        loss.head_nll(**args)


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
        wanted = weighted.sum() / (batch.num_maskable.sum() - ignored.sum())
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
        loss.reduce_nll(torch.ones(len(batch.masked_rows)), batch, "mean", normalizer)


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
