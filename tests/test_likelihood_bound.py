"""The weighted loss is the likelihood bound: with a net that knows the exact conditionals of a
joint distribution, its expectation is the entropy, whatever the schedule and the draw."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.spec.schedules import NUM_TIMES, SCHEDULES
from nar_kernels.wrapper import NonAutoregressiveWrapper

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH, CLEAN_IDS = 4, 3
MASK_ID = 1  # in the middle, so that ids on both sides of it are in use
NUM_TOKENS = CLEAN_IDS + 1
IDS = [i for i in range(NUM_TOKENS) if i != MASK_ID]

SEQUENCES = torch.tensor(list(itertools.product(IDS, repeat=LENGTH)))  # [81, L]
PROBS = torch.rand(len(SEQUENCES), generator=torch.Generator().manual_seed(0)).double() ** 3
PROBS /= PROBS.sum()
ENTROPY = -(PROBS * PROBS.log()).sum().item() / LENGTH  # nats per token


def power(t: Tensor) -> Tensor:
    """A schedule of no name, steep at both ends."""
    return (1 - t**0.7) ** 1.5


ALL_SCHEDULES = [*SCHEDULES, power]


class Oracle(nn.Module):
    """log p(x_i | what is not masked), from a table over all masked sequences."""

    num_tokens, max_seq_len, output_is_log_prob = NUM_TOKENS, LENGTH, True

    def __init__(self) -> None:
        super().__init__()
        inputs = torch.tensor(list(itertools.product(range(NUM_TOKENS), repeat=LENGTH)))
        agrees = (inputs[:, None] == SEQUENCES) | (inputs[:, None] == MASK_ID)
        weight = agrees.all(-1).double() * PROBS  # [256, 81]
        one_hot = nn.functional.one_hot(SEQUENCES, NUM_TOKENS).double()  # [81, L, V]
        joint = torch.einsum("is,slv->ilv", weight, one_hot)
        self.register_buffer("table", (joint / joint.sum(-1, keepdim=True)).log())
        self.register_buffer("place", NUM_TOKENS ** torch.arange(LENGTH - 1, -1, -1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[(ids * self.place).sum(-1)]


ORACLE = Oracle()


def mean_loss(
    masking: MaskingConfig, weight: Callable[[Corrupted], Tensor] | None = None
) -> tuple[float, float]:
    """The mean loss of some batches and its standard error; ``weight`` replaces the right one."""
    model = NonAutoregressiveWrapper(
        ORACLE,
        mask_id=MASK_ID,
        schedule=masking.schedule,
        draw=masking.draw,
        times=masking.times,
        no_replace_prob=0,
        random_token_prob=0,
    )
    generator = torch.Generator().manual_seed(1)
    losses = []
    for seed in range(16):
        picked = torch.multinomial(PROBS, 1024, replacement=True, generator=generator)
        batch: Tensor | Corrupted = SEQUENCES[picked]
        if weight is not None:
            corrupted = corrupt(batch, model.masking, seed=seed)
            batch = replace(corrupted, loss_weight=weight(corrupted))
        losses.append(model(batch, seed=seed).loss)
    sample = torch.stack(losses).double()
    return sample.mean().item(), sample.std().item() / math.sqrt(len(sample))


def is_entropy(mean: float, standard_error: float) -> bool:
    """Also demands a precise mean: a weight with infinite variance is wrong too."""
    # With 16 batches, chance goes beyond 5 standard errors once in some 6000 runs.
    return standard_error < 0.05 * ENTROPY and abs(mean - ENTROPY) < 5 * standard_error


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
@pytest.mark.parametrize("times", ["uniform", "stratified"])
def test_mean_loss_is_the_entropy(schedule, draw, times):
    masking = MaskingConfig(NUM_TOKENS, MASK_ID, schedule=schedule, draw=draw, times=times)
    assert is_entropy(*mean_loss(masking))


def of_x_transformers(corrupted: Corrupted) -> Tensor:
    return -1 / corrupted.times


def inverted_in_time(corrupted: Corrupted) -> Tensor:
    return 1 / corrupted.times


def none_at_all(corrupted: Corrupted) -> Tensor:
    return torch.ones_like(corrupted.times)


def of_the_ratio_instead_of_the_count(corrupted: Corrupted) -> Tensor:
    return 1 / (1 - corrupted.times)


@pytest.mark.parametrize(
    "weight",
    [of_x_transformers, inverted_in_time, none_at_all, of_the_ratio_instead_of_the_count],
)
def test_a_wrong_weight_is_noticed(weight):
    assert not is_entropy(*mean_loss(MaskingConfig(NUM_TOKENS, MASK_ID), weight))


def test_the_weight_of_another_schedule_is_noticed():
    linear = of_the_ratio_instead_of_the_count  # right for bernoulli draws and the linear schedule
    for schedule, right in (("linear", True), ("cosine", False)):
        masking = MaskingConfig(NUM_TOKENS, MASK_ID, schedule=schedule, draw="bernoulli")
        assert is_entropy(*mean_loss(masking, linear)) == right


def nll_by_count() -> list[float]:
    """E_k: the expected sum of the oracle's NLL when a random k of the positions are masked."""
    nll = [0.0]
    for k in range(1, LENGTH + 1):
        subsets = list(itertools.combinations(range(LENGTH), k))
        total = 0.0
        for subset in map(list, subsets):
            inputs = SEQUENCES.clone()
            inputs[:, subset] = MASK_ID
            at_labels = ORACLE(inputs).gather(-1, SEQUENCES[..., None]).squeeze(-1)
            total -= (PROBS * at_labels[:, subset].sum(1)).sum().item()
        nll.append(total / len(subsets))
    return nll


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
def test_expectation_over_all_times_is_the_entropy(schedule, draw):
    """No sampling: the sum over all 65536 times and all counts."""
    masking = MaskingConfig(NUM_TOKENS, MASK_ID, schedule=schedule, draw=draw)
    nll = torch.tensor(nll_by_count(), dtype=torch.float64)
    ratio = (masking.table.ratio.to(torch.int64) & 0xFFFFFFFF).double() / 2**32
    if draw == "exact":
        k = (ratio * LENGTH).ceil().clamp(min=1).long()
        per_time = masking.weight_table * LENGTH / k * nll[k]
    else:
        chance = [
            math.comb(LENGTH, k) * ratio**k * (1 - ratio) ** (LENGTH - k) for k in range(LENGTH + 1)
        ]
        per_time = masking.weight_table * (torch.stack(chance, 1) @ nll)
    assert per_time.sum().item() / NUM_TIMES / LENGTH == pytest.approx(ENTROPY, rel=1e-3)
