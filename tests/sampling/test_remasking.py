"""ReMDM: positions that are masked again at random."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nar_kernels.sampling.config import REMASKING
from nar_kernels.sampling.plan import make_plan
from nar_kernels.sampling.remasking import num_again, with_remasking
from nar_kernels.spec.philox import Stream, words
from nar_kernels.spec.schedules import cosine, linear
from tests.helpers.goodness_of_fit import assert_mean, assert_uniform
from tests.helpers.neighbours import LENGTH, MASK_ID, NUM_TOKENS, neighbours
from tests.helpers.stepwise import PROMPTS, Distinct

pytestmark = pytest.mark.usefixtures("one_thread")

M = MASK_ID


def sigma(strategy: str, eta: float, alpha_t: float, alpha_s: float) -> float:
    """The paper's, of a step from t to s."""
    most = 1.0 if alpha_t == 0 else min(1.0, (1 - alpha_s) / alpha_t)
    return min(eta, most) if strategy == "remdm_cap" else eta * most


def word(stream: Stream, slot: int, position: int, seed: int) -> int:
    return int(words(seed, stream, torch.tensor(slot), torch.tensor(position)))


def by_hand(
    net: Distinct,
    strategy: str,
    eta: float,
    prompt: list[int],
    blocks: list[range],
    steps: int,
    seed: int,
    sequence: int,
) -> list[list[int]]:
    """The ids before the first step and after each, at temperature 0 with the linear schedule."""
    ids = torch.tensor(prompt + [M] * (blocks[-1].stop - len(prompt)))
    rows = [ids.tolist()]
    for number, block in enumerate(blocks):
        places = [i for i in block if ids[i] == M]
        for i in range(steps):
            slot = (sequence * len(blocks) + number) * steps + i
            filled = [place for place in places if ids[place] != M]
            masked = [place for place in places if ids[place] == M]
            num_left = math.floor((1 - (i + 1) / steps) * len(places) + 1e-6)
            n = len(places)
            mean = sigma(strategy, eta, len(filled) / n, 1 - num_left / n) * len(filled)
            whole = math.floor(mean + 1e-9)
            coin = word(Stream.REMASK_COUNT, slot, 0, seed)
            num_masked_again = whole + (coin < (mean - whole) * 2**32)
            num_filled = len(masked) - num_left + num_masked_again

            def noise(place: int, slot: int = slot) -> int:
                return word(Stream.CRITIC_NOISE, slot, place, seed)

            logits = net(ids[None])[0].index_fill(1, torch.tensor([M]), -torch.inf)
            ids[sorted(filled, key=noise)[:num_masked_again]] = M
            for place in sorted(masked, key=noise, reverse=True)[:num_filled]:
                ids[place] = logits[place].argmax()
            rows.append(ids.tolist())
            if num_left == 0:
                break
    return rows


def changes(rows: list[list[int]]) -> list[list[int]]:
    return [row for row, last in zip(rows, [None, *rows], strict=False) if row != last]


@pytest.mark.parametrize("strategy", REMASKING)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("block_length", "steps"), [(4, 5), (8, 6), (8, 20)])
def test_steps_are_those_of_the_paper(strategy, eta, block_length, steps):
    """With exact numbers of filled positions; alone and in a batch."""
    net = Distinct()
    model = neighbours(net, schedule="linear")
    options = {"strategy": strategy, "eta": eta, "seed": 5, "block_length": block_length}
    options |= {"start_temperature": 0.0, "filter_thres": None, "max_new_tokens": 8}
    options |= {"steps": steps * (8 // block_length)}
    together = list(model.generate_steps(prompt=PROMPTS, **options))
    lost = 0
    for b, prompt in enumerate(PROMPTS):
        end = len(prompt) + 8
        blocks = [range(a, a + block_length) for a in range(len(prompt), end, block_length)]
        expected = by_hand(net, strategy, eta, prompt, blocks, steps, 5, b)
        alone = model.generate_steps(prompt=[prompt], first_sequence=b, **options)
        assert [state.ids[0].tolist() for state in alone] == expected
        found = [state.ids[b, :end].tolist() for state in together]
        assert changes(found) == changes(expected)
        lost += sum(
            a != M and b == M
            for row, following in zip(expected, expected[1:], strict=False)
            for a, b in zip(row, following, strict=True)
        )
    assert (lost > 0) == (eta > 0)
    assert not together[-1].masked.any()


@given(
    st.sampled_from(REMASKING),
    st.floats(0, 1),
    st.integers(1, 1000),
    st.integers(0, 1000),
    st.integers(0, 1000),
)
def test_the_number_has_the_mean_of_the_paper(strategy, eta, n, filled, left):
    """Exactly, over all words; and there is room for it."""
    filled = min(filled, n)
    left = min(left, n - filled)
    mean = sigma(strategy, eta, filled / n, 1 - left / n) * filled
    few = torch.tensor([0, (1 << 32) - 1])
    both = (torch.full((2,), filled), torch.full((2,), left))
    most, least = num_again(*both, strategy, eta, few).tolist()
    assert 0 <= least <= most <= min(filled, left, least + 1)
    assert least - 1e-6 <= mean <= most + 1e-6
    if most > least:  # the share of words that give one more is what is missing
        at = round((mean - least) * 2**32)
        around = torch.tensor([at - (1 << 16), at + (1 << 16)]).clamp(0, (1 << 32) - 1)
        first, last = num_again(*both, strategy, eta, around).tolist()
        assert first == most or at < 1 << 16
        assert last == least or at >= (1 << 32) - (1 << 16)


def rates(strategy: str, eta: float, batch: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of each step the shares of filled positions that are masked again and of masked ones that
    are filled, ``[S]`` each; and how often each position is masked again."""
    model = neighbours(schedule="linear")
    states = list(
        model.generate_steps(
            batch, strategy=strategy, eta=eta, steps=8, seed=3, start_temperature=0.0
        )
    )
    again, new, places = [], [], []
    for state, following in zip(states, states[1:], strict=False):
        lost = ~state.masked & following.masked
        found = state.masked & ~following.masked
        again.append(lost.sum(1))
        new.append(found.sum(1))
        places.append(lost.sum(0))
    return torch.stack(again), torch.stack(new), places


@pytest.mark.parametrize("strategy", REMASKING)
def test_rates_are_those_of_the_paper(strategy):
    eta = 0.3
    again, new, places = rates(strategy, eta, 2000)
    for i in range(1, 8):
        alpha_t, alpha_s = i / 8, (i + 1) / 8
        rate = sigma(strategy, eta, alpha_t, alpha_s)
        if again[i].double().std() > 0:
            assert_mean(again[i], rate * alpha_t * LENGTH, 32)
            filled = (alpha_s - (1 - rate) * alpha_t) / (1 - alpha_t)
            assert_mean(new[i], filled * (1 - alpha_t) * LENGTH, 32)
        else:
            assert again[i, 0] == pytest.approx(rate * alpha_t * LENGTH)
        if rate > 0:
            assert_uniform(places[i], 32)
    assert (again[0] == 0).all() and (again[7] == 0).all()


@pytest.mark.parametrize("strategy", REMASKING)
def test_without_eta_it_is_random_order(strategy):
    model = neighbours()
    options = {"steps": 8, "seed": 2}
    expected = model.generate(5, strategy="random", **options)
    assert torch.equal(model.generate(5, strategy=strategy, eta=0.0, **options), expected)


def test_counts_do_not_depend_on_the_batch():
    masked = torch.rand(6, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.7
    for schedule in (linear, cosine):
        plan = make_plan(masked, schedule, 9, block_length=8, every_step=True)
        options = {"strategy": "remdm_rescale", "eta": 0.7, "seed": 4}
        together = with_remasking(plan, sequences=range(3, 15, 2), **options)
        own = make_plan(masked[2:3], schedule, 9, block_length=8, every_step=True)
        alone = with_remasking(own, sequences=range(7, 8), **options)
        for block, single in zip(together.blocks, alone.blocks, strict=True):
            for step, expected in zip(block.steps, single.steps, strict=True):
                assert step.again[2:3].tolist() == expected.again.tolist()
                assert (step.again <= step.left).all()


@pytest.mark.parametrize("strategy", REMASKING)
def test_what_is_given_stays(strategy):
    prompt = [1, M, 2, M, M, 3] + [M] * 10
    for state in neighbours().generate_steps(
        4, prompt=prompt, strategy=strategy, eta=1.0, steps=12, block_length=8, seed=0
    ):
        assert (state.ids[:, [0, 2, 5]] == torch.tensor([1, 2, 3])).all()
        assert torch.equal(state.masked, state.ids == M)
        assert torch.equal(state.log_prob.isnan(), state.masked)
    assert not state.masked.any() and (state.ids < NUM_TOKENS).all()
