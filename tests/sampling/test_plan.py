"""How decoding divides positions over steps and blocks, before it begins."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from x_transformers import nonautoregressive_wrapper as original

from nar_kernels.sampling.halton import halton_order
from nar_kernels.sampling.plan import block_parts, make_plan, num_masked_after
from nar_kernels.sampling.remasking import with_remasking
from nar_kernels.spec.schedules import SCHEDULES, cosine, linear


@pytest.mark.parametrize("schedule", [linear, cosine])
@pytest.mark.parametrize("steps", [1, 2, 7, 18, 64])
def test_counts_are_those_of_x_transformers(schedule, steps):
    lengths = [1, 8, 18, 30, 257]
    theirs = getattr(original, f"{schedule.__name__}_schedule")
    counts = num_masked_after(schedule, steps, torch.tensor(lengths))
    for length, ours in zip(lengths, counts.T, strict=True):
        expected = (theirs(torch.linspace(0.0, 1.0, steps + 1)[1:]) * length).long()
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "schedule",
    [*SCHEDULES.values(), lambda t: math.cos(t * math.pi / 2), lambda t: 1 - t / 2],
)
def test_counts_never_rise_and_end_at_zero(schedule):
    counts = num_masked_after(schedule, 10, torch.tensor([37, 0]))
    assert counts.shape == (10, 2) and (counts[-1] == 0).all() and (counts[:, 1] == 0).all()
    assert (counts.diff(dim=0) <= 0).all() and counts.max() <= 37 and counts.min() >= 0


def test_a_sequence_does_not_depend_on_the_others():
    is_open = torch.rand(3, 40) < torch.tensor([[0.1], [0.5], [1.0]])
    together = make_plan(is_open, linear, 12)
    for b in range(3):
        (alone,) = make_plan(is_open[b : b + 1], linear, 12).blocks
        steps = {step.number: step for step in together.blocks[0].steps}
        assert {step.number for step in alone.steps} <= set(steps)
        left = alone.counts.item()
        for number in range(12):
            for step in alone.steps:
                left = step.left.item() if step.number == number else left
            if number in steps:
                assert steps[number].left[b] == left
    assert together.blocks[0].rows.tolist() == is_open.flatten().nonzero()[:, 0].tolist()


def test_steps_that_reveal_nothing_are_left_out():
    is_open = torch.ones(2, 3, dtype=torch.bool)
    (block,) = make_plan(is_open, linear, 10).blocks
    assert [step.left.tolist() for step in block.steps] == [[2, 2], [1, 1], [0, 0]]
    assert [step.number for step in block.steps] == [0, 3, 6]
    assert [step.annealing for step in block.steps] == pytest.approx([0.9, 0.6, 0.3])
    (block,) = make_plan(is_open, linear, 10, every_step=True).blocks
    assert [step.number for step in block.steps] == list(range(10))


def test_blocks():
    is_open = torch.ones(2, 10, dtype=torch.bool)
    is_open[:, 4:8] = False  # one block has nothing to fill
    is_open[1, :2] = False
    plan = make_plan(is_open, linear, 5, block_length=4)
    assert plan.num_steps == 5
    assert [block.counts.tolist() for block in plan.blocks] == [[4, 2], [2, 2]]
    assert [block.rows.tolist() for block in plan.blocks] == [
        [0, 1, 2, 3, 12, 13],
        [8, 9, 18, 19],
    ]
    assert [[s.number for s in block.steps] for block in plan.blocks] == [[0, 1, 2], [3, 4]]
    assert all(block.steps[-1].annealing == 0 for block in plan.blocks)
    (whole,) = make_plan(is_open, linear, 5, block_length=99).blocks
    assert whole.counts.tolist() == [6, 4]


RATIOS = st.one_of(
    st.sampled_from([*SCHEDULES.values()]),
    # Any numbers, which a schedule of a user's own may give.
    st.lists(st.floats(width=32), min_size=1, max_size=5).map(
        lambda values: lambda t: values[int(t * 1000) % len(values)]
    ),
)


@given(st.data(), RATIOS, st.integers(1, 40), st.none() | st.integers(1, 9), st.booleans())
def test_any_plan_fills_what_is_open(data, schedule, steps, block_length, every_step):
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 17))
    cells = st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)
    is_open = torch.tensor(data.draw(cells)).view(batch, length)
    options = dict(block_length=block_length, every_step=every_step)
    width = block_length or length
    starts = [s for s in range(0, length, width) if is_open[:, s : s + width].any()]
    if steps < len(starts):
        with pytest.raises(ValueError, match=f"steps is {steps}: it must be at least"):
            make_plan(is_open, schedule, steps, **options)
        return
    plan = make_plan(is_open, schedule, steps, **options)
    assert plan.num_steps == steps and len(plan.blocks) == len(starts)
    # Each open position is in one block, from left to right.
    filled = torch.cat([torch.empty(0, dtype=torch.int64), *(b.rows for b in plan.blocks)])
    assert filled.sort().values.tolist() == is_open.flatten().nonzero()[:, 0].tolist()
    for start, block in zip(starts, plan.blocks, strict=True):
        columns = block.rows % length
        assert ((columns >= start) & (columns < start + width)).all()
        assert block.rows.tolist() == sorted(block.rows.tolist())
        assert block.counts.tolist() == is_open[:, start : start + width].sum(1).tolist()
        # Counts fall, at every step that is kept, to zero at the last.
        left = torch.stack([block.counts, *(step.left for step in block.steps)])
        falls = -left.diff(dim=0)
        assert (falls >= 0).all() and (left[-1] == 0).all()
        assert every_step or (falls.sum(1) > 0).all()
        annealing = [step.annealing for step in block.steps]
        assert annealing == sorted(annealing, reverse=True) and annealing[-1] >= 0
    numbers = [step.number for block in plan.blocks for step in block.steps]
    assert numbers == sorted({*numbers}) and all(0 <= number < steps for number in numbers)
    if every_step and starts:
        assert numbers == [*range(steps)]


def test_nothing_to_fill():
    assert make_plan(torch.zeros(2, 5, dtype=torch.bool), linear, 3).blocks == []
    assert make_plan(torch.zeros(0, 5, dtype=torch.bool), linear, 3).blocks == []


def test_errors():
    is_open = torch.ones(1, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="block_length is 0"):
        make_plan(is_open, linear, 3, block_length=0)
    with pytest.raises(ValueError, match="steps is 3: it must be at least 4, one for each block"):
        make_plan(is_open, linear, 3, block_length=2)
    with pytest.raises(ValueError, match="steps is 0: it must be at least 1"):
        make_plan(is_open, linear, 0)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (4, 4), (8, 8), (5, 9), (32, 32)])
def test_halton_visits_each_cell_once(height, width):
    assert halton_order(height, width).sort().values.tolist() == list(range(height * width))


def test_halton_keeps_its_distance():
    """Any first few cells lie further apart than those of nine random orders in ten."""
    height = width = 16

    def nearest(order: torch.Tensor, number: int) -> float:
        cells = torch.stack([order.argsort() // width, order.argsort() % width], 1)[:number].float()
        return (torch.cdist(cells, cells) + 99 * torch.eye(number)).min().item()

    torch.manual_seed(0)
    for number in (8, 16, 32, 64):
        ours = nearest(halton_order(height, width), number)
        random = [nearest(torch.randperm(height * width), number) for _ in range(100)]
        assert ours >= torch.tensor(random).quantile(0.9)
    # The first cells by hand: (vdc2(n), vdc3(n)) * 16.
    first = halton_order(height, width).argsort()[:4].tolist()
    assert first == [0, 8 * 16 + 5, 4 * 16 + 10, 12 * 16 + 1]


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 40))
def test_blocks_from_any_position(length, block_length, first_block):
    """They cover each position once, and one begins there."""
    parts = block_parts(length, block_length, min(first_block, length))
    assert [i for part in parts for i in range(length)[part]] == list(range(length))
    assert all(part.start < part.stop for part in parts)
    if first_block < length:
        assert first_block in [part.start for part in parts]
    assert all(part.stop - part.start == block_length for part in parts[1:])


@pytest.mark.parametrize(("size", "steps"), [(4, 4), (7, 3), (8, 3), (8, 5), (5, 9), (32, 32)])
def test_quotas_divide_a_block_evenly(size, steps):
    """The first steps get the remainder, whatever of the block is given; a block that is cut off is
    done sooner."""
    is_open = torch.ones(2, 2 * size - 1, dtype=torch.bool)
    is_open[1, : size // 2] = False
    quotas = [size // steps + (i < size % steps) for i in range(steps)]
    plan = make_plan(is_open, None, 2 * steps, block_length=size, every_step=True)
    for block in plan.blocks:
        left = block.counts
        for quota, step in zip(quotas, block.steps, strict=True):
            assert step.left.tolist() == (left - quota).clamp(min=0).tolist()
            left = step.left
        assert left.tolist() == [0, 0]
    # No block is longer than a sequence.
    (whole,) = make_plan(is_open, None, 2, block_length=99 * size).blocks
    assert whole.steps[0].left[0] == 2 * size - 1 - size
    # Without blocks, of what there is to fill.
    (block,) = make_plan(is_open, None, steps, every_step=True).blocks
    for b, count in enumerate(block.counts.tolist()):
        left = torch.stack([block.counts, *(step.left for step in block.steps)])[:, b]
        expected = [count // steps + (i < count % steps) for i in range(steps)]
        assert (-left.diff()).tolist() == expected


@pytest.mark.parametrize("every_step", [False, True])
def test_a_block_without_some_of_its_sequences(every_step):
    is_open = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    plan = make_plan(is_open, linear, 30, block_length=20, every_step=every_step)
    if every_step:
        plan = with_remasking(plan, "remdm_rescale", 0.8, seed=1, sequences=range(3))
    which = np.array([True, False, True])
    rest = plan.blocks[1].only(which, 40, every_step=plan.every_step)
    alone = is_open & torch.from_numpy(which)[:, None]
    expected = make_plan(alone, linear, 30, block_length=20, every_step=every_step)
    if every_step:
        expected = with_remasking(expected, "remdm_rescale", 0.8, seed=1, sequences=range(3))
    expected = expected.blocks[1]
    assert rest.rows.tolist() == expected.rows.tolist()
    assert rest.counts.tolist() == expected.counts.tolist()
    assert [(*step[:2], step.left.tolist()) for step in rest.steps] == [
        (*step[:2], step.left.tolist()) for step in expected.steps
    ]
    for step, other in zip(rest.steps, expected.steps, strict=True):
        assert (step.again is None) == (not every_step)
        assert step.again is None or step.again.tolist() == other.again.tolist()
