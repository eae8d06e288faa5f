"""`head_nll`, the loss of any head, and what it is made of."""

import pytest
import torch
import torch.nn.functional as F

from nar_kernels.ops import masked_nll as loss
from tests.helpers.losses import (
    REDUCTIONS,
    TOLERANCE,
    assert_near,
    corrupted_batch,
    cross_entropy,
    random_inputs,
    results,
)

pytestmark = pytest.mark.usefixtures("one_thread", "any_cpu")


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
        nll = cross_entropy(*args, reduction="none")
        return loss.reduce_nll(nll, corrupted.masked_rows, corrupted, **kwargs)

    tensors = random_inputs(corrupted)[:2]
    got = results(reduced, tensors, corrupted, **args)
    for x, y in zip(got, results(cross_entropy, tensors, corrupted, **args), strict=True):
        assert_near(x, y, TOLERANCE[torch.float64])


H, W = torch.zeros(3, 7, 5), torch.zeros(11, 5)


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
