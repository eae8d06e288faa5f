"""The unmasking loop, on nets that are plain functions."""

import math

import pytest
import torch
from torch import Tensor
from x_transformers import nonautoregressive_wrapper as original

from nar_kernels import decode as module
from nar_kernels.decode import (
    decode,
    exclude_mask_id,
    filter_top_k,
    gumbel,
    noise_generator,
    num_masked_after,
    sample,
)
from nar_kernels.philox import Stream
from nar_kernels.schedules import SCHEDULES, cosine, linear

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return noise_generator(seed, Stream.DECODE_NOISE)


# Noise


def test_gumbel_is_finite_at_both_ends_and_reaches_far():
    ends = gumbel(torch.tensor([0, 2**31 - 1], dtype=torch.int32))
    assert ends.dtype == torch.float32
    assert ends.isfinite().all()
    # P(G > 18) = 1.5e-8: out of reach for 24-bit uniforms, which stop below 17.
    assert ends[0] > 20 and ends[1] < -2.5


def test_gumbel_quantiles():
    bits = torch.arange(2**10, 2**31, 2**11, dtype=torch.int32)
    noise = gumbel(bits).sort().values.double()
    for quantile in (0.001, 0.1, 0.5, 0.9, 0.999):
        expected = -math.log(-math.log(quantile))
        assert noise[int(quantile * len(noise))].item() == pytest.approx(expected, abs=2e-3)


def test_noise_generators_differ_by_seed_stream_and_slot():
    draws = [
        torch.rand(4, generator=noise_generator(seed, stream, slot=slot)).tolist()
        for seed in (0, 1, 1 << 32, -1)  # PyTorch's own seeding ignores the high 32 bits
        for stream in (Stream.DECODE_NOISE, Stream.CRITIC_NOISE)
        for slot in (0, 1)
    ]
    assert len(set(map(tuple, draws))) == 16
    again = torch.rand(4, generator=noise_generator(0, Stream.DECODE_NOISE))
    assert draws[0] == again.tolist()


# Sampling


@pytest.mark.parametrize("mask_id", [0, 2, 4])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax_without_mask_id(mask_id, temperature):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0])
    n = 50_000
    rows = exclude_mask_id(logits.expand(n, -1), mask_id)
    counts = sample(rows, temperature, mask_id, generator()).bincount(minlength=5)
    probs = logits.double() / temperature
    probs[mask_id] = -torch.inf
    probs = probs.softmax(-1)
    assert counts[mask_id] == 0
    kept = probs > 0

    def chi_square(probs: Tensor) -> float:
        expected = n * probs[kept]
        return ((counts[kept] - expected) ** 2 / expected).sum().item()

    assert chi_square(probs) < 21  # 3 degrees of freedom: exceeded with probability 1e-4
    slightly_off = (probs[kept] ** 1.1) / (probs[kept] ** 1.1).sum()
    assert chi_square(probs.masked_scatter(kept, slightly_off)) > 21


@pytest.mark.parametrize("mask_id", [0, 1, 3])
def test_a_row_of_nothing_but_mask_id_gives_another_id(mask_id):
    logits = torch.full((3, 4), -torch.inf)
    logits[:, mask_id] = 0
    ids = sample(exclude_mask_id(logits, mask_id), 1.0, mask_id, generator())
    assert (ids != mask_id).all()


def test_filter_keeps_exactly_k_even_of_equal_logits():
    logits = torch.randn(5, 20, generator=generator())
    kept = filter_top_k(logits, 7)
    assert (kept.isfinite().sum(-1) == 7).all()
    assert torch.equal(kept[kept.isfinite()].view(5, 7), logits[kept.isfinite()].view(5, 7))
    assert (kept.max(-1).values == logits.max(-1).values).all()
    assert filter_top_k(torch.zeros(2, 9), 3).isfinite().sum() == 6


# How many stay masked


@pytest.mark.parametrize("schedule", [linear, cosine])
@pytest.mark.parametrize("steps", [1, 2, 7, 18, 64])
@pytest.mark.parametrize("length", [1, 8, 18, 30, 257])
def test_counts_are_those_of_x_transformers(schedule, steps, length):
    theirs = getattr(original, f"{schedule.__name__}_schedule")
    expected = (theirs(torch.linspace(0.0, 1.0, steps + 1)[1:]) * length).long().tolist()
    assert num_masked_after(schedule, steps, length) == expected


@pytest.mark.parametrize(
    "schedule",
    [*SCHEDULES.values(), lambda t: math.cos(t * math.pi / 2), lambda t: 1 - t / 2],
)
def test_counts_never_rise_and_end_at_zero(schedule):
    counts = num_masked_after(schedule, 10, 37)
    assert len(counts) == 10 and counts[-1] == 0
    assert counts == sorted(counts, reverse=True)
    assert 0 <= min(counts) and max(counts) <= 37


# The loop

NUM_TOKENS, MASK_ID = 6, 3


def confident_from_the_left(ids: Tensor) -> Tensor:
    """Id 5 everywhere, with less confidence to the right."""
    logits = torch.zeros(*ids.shape, NUM_TOKENS)
    logits[..., 5] = 20 - torch.arange(ids.shape[1])
    return logits


def steps_of(predict, num_masked, shape=(2, 8), **kwargs):
    seen = []
    ids = decode(
        predict,
        shape,
        num_masked,
        mask_id=MASK_ID,
        generator=generator(),
        on_step=lambda step, ids, masked: seen.append((step, ids, masked)),
        **kwargs,
    )
    return ids, seen


def test_most_confident_positions_come_first():
    ids, seen = steps_of(confident_from_the_left, [6, 3, 0], temperature=0.0)
    assert (ids == 5).all()
    for (step, step_ids, masked), num_left in zip(seen, [6, 3, 0], strict=True):
        position = torch.arange(8).expand(2, 8)
        assert torch.equal(masked, position >= 8 - num_left), step
        assert torch.equal(masked, step_ids == MASK_ID)


def test_only_masked_positions_change():
    def predict(ids):
        return torch.randn(*ids.shape, NUM_TOKENS, generator=predict.noise)

    predict.noise = generator(1)
    _, seen = steps_of(predict, [9, 9, 4, 2, 0], shape=(3, 11))
    for (_, ids, masked), (_, next_ids, next_masked) in zip(seen, seen[1:], strict=False):
        assert torch.equal(ids[~masked], next_ids[~masked])
        assert not (next_masked & ~masked).any()
    assert [masked.sum(1).tolist() for _, _, masked in seen] == [[n] * 3 for n in (9, 9, 4, 2, 0)]


def test_remask_judges_the_id_in_place():
    """The first guess becomes improbable once its neighbours are there; it must be masked again."""

    def predict(ids):
        logits = torch.zeros(*ids.shape, NUM_TOKENS)
        if (ids == MASK_ID).all():
            logits[:, 0, 1] = 20.0  # position 0 first, with id 1
            logits[..., 2] += 3.0
        else:
            logits[:, 0, 2] = 20.0  # which was wrong
            logits[:, 1:, 2] = 10.0
        return logits

    ids, seen = steps_of(predict, [3, 1, 0], shape=(1, 4), temperature=0.0, remask=True)
    assert not seen[0][2][0, 0] and seen[0][1][0, 0] == 1
    assert seen[1][2][0].tolist() == [True, False, False, False]
    assert ids.tolist() == [[2, 2, 2, 2]]
    ids, _ = steps_of(predict, [3, 1, 0], shape=(1, 4), temperature=0.0)
    assert ids.tolist() == [[1, 2, 2, 2]]


@pytest.mark.parametrize("remask", [False, True])
def test_critic_chooses_what_to_mask_again(remask):
    def critic(ids):
        assert (ids != MASK_ID).all()  # it judges complete sequences
        return torch.arange(8.0).expand(2, 8)

    _, seen = steps_of(
        confident_from_the_left, [5, 2, 0], critic=critic, critic_noise=0.0, remask=remask
    )
    assert seen[0][2][0].nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    assert seen[1][2][0].nonzero().flatten().tolist() == [6, 7]


def test_critic_noise_shuffles():
    def masked_first(noise):
        _, seen = steps_of(
            confident_from_the_left,
            [4, 0],
            shape=(64, 8),
            critic=lambda ids: torch.arange(8.0).expand(64, 8) / 8,
            critic_noise=noise,
        )
        return seen[0][2].unique(dim=0)

    assert len(masked_first(0.0)) == 1
    assert len(masked_first(4.0)) > 30


def test_critic_noise_falls_to_zero():
    _, seen = steps_of(
        confident_from_the_left,
        [4] * 9 + [0],
        shape=(200, 8),
        critic=lambda ids: torch.arange(8.0).expand(200, 8),
        critic_noise=3.0,
        remask=True,
    )
    most_doubted = torch.arange(8) >= 4
    share = [(masked == most_doubted).all(1).float().mean().item() for _, _, masked in seen]
    assert share[0] < 0.3 and share[8] > 0.8


def test_stops_once_nothing_is_masked():
    calls = []

    def predict(ids):
        calls.append(ids)
        return confident_from_the_left(ids)

    _, seen = steps_of(predict, [3, 0, 0, 0])
    assert len(calls) == len(seen) == 2


def test_top_k_of_one_is_greedy_at_any_temperature():
    logits = torch.randn(2, 8, NUM_TOKENS, generator=generator(2))
    ids, _ = steps_of(lambda _: logits, [4, 0], temperature=50.0, top_k=1)
    best = exclude_mask_id(logits, MASK_ID).argmax(-1)
    assert torch.equal(ids, best)


def test_temperature_falls_to_zero():
    """The last step is greedy, the first is not."""
    logits = torch.randn(1, 1, NUM_TOKENS, generator=generator(3)).expand(200, 8, -1)
    greedy = exclude_mask_id(logits, MASK_ID).argmax(-1)
    ids, seen = steps_of(lambda _: logits, [4, 0], shape=(200, 8), temperature=4.0)
    last = seen[0][2]
    assert torch.equal(ids[last], greedy[last])
    assert (ids[~last] != greedy[~last]).float().mean() > 0.2


def test_bfloat16_logits_are_sampled_in_float32(monkeypatch):
    dtypes = []

    def spy(logits, *args):
        dtypes.append(logits.dtype)
        return sample(logits, *args)

    monkeypatch.setattr(module, "sample", spy)
    steps_of(lambda ids: confident_from_the_left(ids).bfloat16(), [0])
    assert dtypes == [torch.float32]


def test_chain_of_single_steps_samples_the_joint_distribution():
    """Two positions, always equal: once one is known, the other follows."""

    def predict(ids):
        logits = torch.zeros(*ids.shape, NUM_TOKENS)
        other = ids.flip(1)
        known = torch.full_like(logits, -20.0).scatter(2, other[..., None], 20.0)
        return torch.where((other == MASK_ID)[..., None], logits, known)

    ids, _ = steps_of(predict, [1, 0], shape=(500, 2), temperature=2.0)
    assert torch.equal(ids[:, 0], ids[:, 1])
    assert ids.unique().tolist() == [0, 1, 2, 4, 5]
    at_once, _ = steps_of(predict, [0], shape=(500, 2), temperature=2.0)
    assert not torch.equal(at_once[:, 0], at_once[:, 1])


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 1)])
def test_small_shapes(shape):
    ids, _ = steps_of(confident_from_the_left, [0], shape=shape)
    assert ids.shape == shape and (ids != MASK_ID).all()
