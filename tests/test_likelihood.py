"""Evaluation: bits per token against entropies known by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from nar_kernels.data.windows.dataset import TokenDataset
from nar_kernels.likelihood import evaluate, evaluation_batch, evaluation_parts
from nar_kernels.training.baselines import baselines

pytest.importorskip("x_transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


class Constant(nn.Module):
    """The same logits everywhere."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits.expand(*ids.shape, -1)


def held_out(length: int = 7, vocabulary: int = 4) -> TokenDataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (40 * length,), generator=generator)
    return TokenDataset(ids, length, num_tokens=vocabulary + 1, mask_id=vocabulary)


def test_uniform_predictions_have_the_bits_of_the_vocabulary():
    dataset = held_out()
    net = Constant(torch.tensor([0.0, 0.0, 0.0, 0.0, -torch.inf]))
    cpu = torch.device("cpu")
    result = evaluate(net, dataset, torch.arange(len(dataset)), draws=3, device=cpu)
    assert result.bits_per_token == pytest.approx(2.0, abs=1e-5)
    assert result.standard_error < 1e-5
    assert net.training


def test_bits_per_token_are_those_of_a_code():
    """With the same prediction everywhere, the bound is the cross-entropy, whatever the noise."""
    dataset = held_out()
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0])
    every, cpu = torch.arange(len(dataset)), torch.device("cpu")
    bits, error = evaluate(Constant(probabilities.log()), dataset, every, draws=64, device=cpu)
    ids = torch.stack([dataset[i] for i in range(len(dataset))])
    expected = -probabilities[ids].log2().mean().item()
    assert 0 < error < 0.1
    assert bits == pytest.approx(expected, abs=0.02)


def test_noise_of_evaluation_depends_on_the_window_alone():
    """Neither on PyTorch's generator, nor on how windows are batched."""
    dataset = held_out(length=700)  # 2**14 tokens hold 7 windows of 3 draws
    torch.manual_seed(1)
    windows, parts = torch.arange(40), evaluation_parts(dataset, 40, 3)
    assert len(parts) == 6
    all_at_once = torch.cat(
        [evaluation_batch(dataset, windows, 3, part).masked_indices for part in parts]
    )
    torch.manual_seed(2)
    few = evaluation_batch(dataset, windows[:5], 3, slice(0, 15)).masked_indices
    assert len(all_at_once) == 120
    assert torch.equal(all_at_once[:15], few)
    ratio = all_at_once.float().mean(1).view(-1, 3).sort(1).values
    # The times of a window's draws are one in each third.
    assert (ratio[:, 0] < 0.34).all() and (ratio[:, 2] > 0.66).all()


def test_baselines_are_entropies():
    # Windows "00", "01", "01", "01" | "11": what stands first differs from what stands second.
    ids = torch.tensor([0, 0, 0, 1, 0, 1, 0, 1, 1, 1])
    train_part, rest = TokenDataset(ids, 2, num_tokens=3, mask_id=2).split(1)
    found = baselines(train_part, rest, torch.arange(1), per_position=True)
    bits = {name: baseline.bits_per_token for name, baseline in found.items()}

    def entropy(p: float) -> float:
        return -p * math.log2(p) - (1 - p) * math.log2(1 - p)

    assert bits["unigram_entropy"] == pytest.approx(entropy(3 / 8))
    assert bits["unigram_cross_entropy"] == pytest.approx(-math.log2((3 + 1) / (8 + 2)))
    assert bits["per_position_entropy"] == pytest.approx((0 + entropy(3 / 4)) / 2)
    expected = (-math.log2((0 + 1) / (4 + 2)) - math.log2((3 + 1) / (4 + 2))) / 2
    assert bits["per_position_cross_entropy"] == pytest.approx(expected)
    assert bits["per_position_entropy_held_out"] == 0


def test_baselines_of_more_windows_than_float32_counts(monkeypatch):
    monkeypatch.setattr("nar_kernels.training.baselines._TOKENS_COUNTED", 2)
    ids = torch.zeros((1 << 24) + 5, dtype=torch.uint8)
    ids[-2] = 1  # the last window to train on
    train_part, rest = TokenDataset(ids, 1, num_tokens=3, mask_id=2).split(1)
    found = baselines(train_part, rest, torch.arange(1), per_position=False)
    assert found["unigram_entropy"].bits_per_token == 1
