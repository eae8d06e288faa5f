"""The search of times whose losses vary least, against the variances of batches of each range."""

import math

import pytest
import torch
from torch import Tensor, nn

from nar_kernels import MaskingConfig, corrupt
from nar_kernels.data.corpus import Corpus
from nar_kernels.data.packing.document_range import DocumentRange
from nar_kernels.data.windows.dataset import TokenDataset
from nar_kernels.time_ranges import time_ranges

VOCABULARY, LENGTH, CPU = 5, 12, torch.device("cpu")


class Unigram(nn.Module):
    """The same prediction everywhere; takes what a net of block diffusion is given."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([*probabilities, 0.0]).log())

    def forward(self, ids: Tensor, pos: Tensor | None = None, attn_mask: object = None) -> Tensor:
        return self.logits.expand(*ids.shape, -1)


def held_out() -> TokenDataset:
    ids = torch.randint(0, 4, (300 * LENGTH,), generator=torch.Generator().manual_seed(0))
    return TokenDataset(ids, LENGTH, num_tokens=VOCABULARY, mask_id=VOCABULARY - 1)


SKEWED = Unigram([0.7, 0.1, 0.1, 0.1])
EVERY = torch.arange(300)


def test_ranges_are_those_of_the_grid_in_the_order_of_their_variance():
    found = time_ranges(SKEWED, held_out(), EVERY[:20], draws=8, device=CPU, grid=0.1)
    assert len(found) == len({r[:2] for r in found}) == 6 + 5 + 4 + 3 + 2 + 1
    assert min(r.high - r.low for r in found) == pytest.approx(0.5)
    assert [r.variance for r in found] == sorted(r.variance for r in found)
    whole = next(r for r in found if r[:2] == (0, 1))
    assert whole.num_draws == 20 * 8


def test_where_every_token_costs_the_same_there_is_no_variance():
    found = time_ranges(Unigram([0.25] * 4), held_out(), EVERY[:50], draws=4, device=CPU)
    for r in found:
        assert r.mean == pytest.approx(math.log(4), abs=1e-5)
        assert r.variance < 1e-9


@pytest.mark.parametrize("block_length", [None, 4])
def test_variances_are_those_of_batches_of_each_range(block_length):
    """One pass through the whole range, against corrupt and the loss of each range alone."""
    found = time_ranges(
        SKEWED, held_out(), EVERY, draws=16, device=CPU, block_length=block_length, grid=0.25
    )
    assert len(found) == 3 + 2 + 1
    nll = -SKEWED.logits.detach().log_softmax(0)
    tokens = held_out().windows(EVERY)
    for r in found:
        masking = MaskingConfig(
            VOCABULARY, VOCABULARY - 1, time_range=(r.low, r.high), block_length=block_length
        )
        losses = []
        for seed in range(16):
            batch = corrupt(tokens, masking, seed=seed)
            costs = (nll[tokens] * batch.masked_indices).unflatten(1, (-1, block_length or LENGTH))
            weight = batch.loss_weight.view(len(tokens), -1)
            losses.append(weight * costs.sum(2) / (block_length or LENGTH))
        expected = torch.cat(losses).var().item()
        assert abs(r.variance - expected) < 5 * math.sqrt(2) * r.standard_error
        assert abs(r.mean - torch.cat(losses).mean().item()) < 0.05
    # Few masked tokens are what varies: the most masked half of all times varies least.
    assert found[0][:2] == (0, 0.5) and found[-1][:2] == (0.5, 1)


def test_of_documents():
    ids = torch.randint(0, 3, (400,), generator=torch.Generator().manual_seed(1))
    ids[7::8] = 3  # which ends a document
    corpus = Corpus(ids, eos_id=3)
    documents = DocumentRange(corpus, 10, 50, 16, VOCABULARY, VOCABULARY - 1)
    found = time_ranges(Unigram([0.25] * 4), documents, draws=3, device=CPU, grid=0.5)
    assert {r[:2] for r in found} == {(0, 0.5), (0.5, 1), (0, 1)}
    assert next(r for r in found if r[:2] == (0, 1)).num_draws == 40 * 3
    assert found[0].mean == pytest.approx(math.log(4), abs=1e-5)


def test_mistakes():
    def search(**options):
        given = {"draws": 1, "device": CPU} | options
        return time_ranges(SKEWED, held_out(), EVERY[:3], **given)

    with pytest.raises(ValueError, match="draws is 0: it must be at least 1"):
        search(draws=0)
    with pytest.raises(ValueError, match=r"grid is 0.3: it must divide 1, as 0.05 does"):
        search(grid=0.3)
    with pytest.raises(ValueError, match=r"least_width is 1.5: it must be in \(0, 1\]"):
        search(least_width=1.5)
    with pytest.raises(ValueError, match=r"windows is None: it must say which"):
        time_ranges(SKEWED, held_out(), draws=1, device=CPU)
    with pytest.raises(ValueError, match=r"losses are not finite, such as inf: has it diverged"):
        time_ranges(Unigram([1.0, 0, 0, 0]), held_out(), EVERY[:3], draws=1, device=CPU)
    with pytest.raises(ValueError, match=r"draws have a time in .*: take more draws or windows"):
        search(least_width=0.05)
