"""What losses are compared with: the cross entropy of all logits, in float64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import nar_kernels
from nar_kernels import MaskingConfig, masked_nll
from nar_kernels.ops.nll import NLL_DTYPES

MARKS = {"reference": (), "cpp": pytest.mark.cpp, "triton": pytest.mark.triton}

BACKENDS = [pytest.param(name, marks=marks) for name, marks in MARKS.items()]

BACKENDS_AND_DTYPES = [
    pytest.param(name, dtype, marks=marks, id=f"{name}-{dtype}".replace("torch.", ""))
    for name, marks in MARKS.items()
    for dtype in NLL_DTYPES[name]
]

REDUCTIONS = ["nelbo", "mean", "sequence", "batch", "none"]

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
    sample = rows // corrupted.labels.shape[1]
    if reduction in ("sequence", "batch"):
        ignored = (corrupted.masked_indices & (corrupted.labels == -100)).sum(1)
        lengths = (corrupted.num_maskable - ignored).tolist()
        total = nll.sum() * 0
        for b, length in enumerate(lengths):
            of_sample = corrupted.loss_weight[b].to(nll) * nll[sample == b].sum()
            total = total + of_sample / (max(length, 1) if reduction == "sequence" else 1)
        return total / (max(len(lengths), 1) if normalizer is None else normalizer)
    counts = corrupted.num_masked if reduction == "mean" else corrupted.num_maskable
    normalizer = max(int(counts.sum()), 1) if normalizer is None else normalizer
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
