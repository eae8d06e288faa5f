"""Schedules: the shapes, the table, the weights against autograd, the errors."""

import dataclasses
import math

import pytest
import torch

from nar_kernels import MaskingConfig, corrupt, masked_nll
from nar_kernels.sampling.plan import make_plan
from nar_kernels.spec.schedules import NUM_TIMES, SCHEDULES, tabulate

NAMES = list(SCHEDULES)
T = (torch.arange(NUM_TIMES, dtype=torch.float64) + 0.5) / NUM_TIMES


def ratio_of(table):
    return (table.ratio.to(torch.int64) & 0xFFFFFFFF).to(torch.float64) / 2**32


@pytest.mark.parametrize("name", NAMES)
def test_falls_from_one_to_zero(name):
    ends = SCHEDULES[name](torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([1, 0], abs=1e-12)
    ratio = ratio_of(tabulate(name))
    assert (ratio[1:] <= ratio[:-1]).all() and ratio[0] > 0.99 and ratio[-1] < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_table_is_the_function_rounded_down(name):
    error = SCHEDULES[name](T) - ratio_of(tabulate(name))
    assert (error > -1e-15).all() and (error <= 2**-32 + 1e-15).all()


@pytest.mark.parametrize("name", NAMES)
def test_weights_against_autograd(name):
    """|m'| and |m'| / m, away from the ends where sqrt and arccos have infinite slopes."""
    t = T.clone().requires_grad_()
    value = SCHEDULES[name](t)
    (slope,) = torch.autograd.grad(value.sum(), t)
    table, inside = tabulate(name), (T > 0.01) & (T < 0.99)
    torch.testing.assert_close(
        table.exact_weight[inside].double(), -slope[inside], rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        table.bernoulli_weight[inside].double(),
        (-slope / value)[inside].detach(),
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_table_of_a_part_of_time(name):
    """Has the ratios and slopes of the whole one at the same times."""
    low, high = 0.25, 0.5
    part, whole = tabulate(name, (low, high)), tabulate(name)
    times = low + (high - low) * (torch.arange(NUM_TIMES, dtype=torch.float64) + 0.5) / NUM_TIMES
    ratio = ratio_of(part)
    assert (ratio - whole.at(times)).abs().max() < 1e-9
    assert part.edges[0] == whole.edges[NUM_TIMES // 4]
    assert part.edges[-1] == whole.edges[NUM_TIMES // 2]
    of_whole = whole.exact_weight[NUM_TIMES // 4 : NUM_TIMES // 2].repeat_interleave(4)
    assert torch.allclose(part.exact_weight, of_whole, rtol=1e-4, atol=1e-5)
    assert not part.is_bound


def test_closed_forms_of_the_weights():
    linear, cosine = tabulate("linear").bernoulli_weight, tabulate("cosine").bernoulli_weight
    inside = T < 0.999
    torch.testing.assert_close(linear.double()[inside], (1 / (1 - T))[inside], rtol=1e-5, atol=0)
    expected = math.pi / 2 * torch.tan(math.pi / 2 * T)
    inside = inside & (T > 1e-3)
    torch.testing.assert_close(cosine.double()[inside], expected[inside], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_slopes_integrate_to_one(name):
    """Exactly, also where the derivative is infinite: the weights are mean slopes over a bin."""
    assert tabulate(name).exact_weight.double().mean().item() == pytest.approx(1, abs=1e-6)
    assert torch.isfinite(tabulate(name).bernoulli_weight).all()


@pytest.mark.parametrize(
    "schedule",
    [
        lambda t: 1 - t,  # tensors
        lambda t: 1.0 - float(t),  # one float at a time
        lambda t: math.cos(t * math.pi / 2),  # refuses a tensor of many
        lambda t: (1 - t).float(),
    ],
)
def test_any_callable(schedule):
    name = "cosine" if abs(float(schedule(torch.tensor(0.5))) - 0.5) > 0.1 else "linear"
    torch.testing.assert_close(
        ratio_of(tabulate(schedule)), ratio_of(tabulate(name)), rtol=0, atol=1e-6
    )


def test_ratio_one_fits_and_ratio_zero_has_no_weight():
    table = tabulate(lambda t: (t < 0.5).double())
    assert ratio_of(table)[0] == 1 - 2**-32 and ratio_of(table)[-1] == 0
    assert table.bernoulli_weight[-1] == 0


@pytest.mark.parametrize(
    "schedule, message",
    [
        ("cosin", "unknown schedule 'cosin'.*cosine"),
        (lambda t: t, "increases at t = .*lambda t: schedule"),
        (lambda t: 2 - t, "mask ratio must be"),
        (lambda t: -t, "mask ratio must be"),
        (lambda t: t / 0 if False else t * float("nan"), "nan at t = 0.0"),
    ],
)
def test_errors(schedule, message):
    with pytest.raises(ValueError, match=message):
        tabulate(schedule)


# What the likelihood bound needs


@pytest.mark.parametrize(
    ("schedule", "is_bound"),
    [
        *((name, True) for name in NAMES),
        (lambda t: 1 - (1 - 1e-3) * t, True),  # LLaDA's eps
        (lambda t: 0.999 - 0.998 * t, True),
        (lambda t: 0.15, False),  # BERT
        (lambda t: 0 * t + 1, False),
        (lambda t: 0.8 - 0.5 * t, False),
        (lambda t: 1 - 0.99 * t, False),
        (lambda t: torch.ceil((1 - t) * 10) / 10, False),  # in jumps
        (lambda t: (t < 0.5).double(), False),
        (lambda t: (1 - t).bfloat16(), False),
        (lambda t: (1 - t).half(), False),
        (lambda t: (1 - t).float(), True),
        (lambda t: torch.cos(t.float() * math.pi / 2), True),
        (lambda t: (1 - t) ** 50, True),
        (lambda t: max(0.0, 1 - t), True),
        (lambda t: 1 - t if t < 1 else 0.0, True),
    ],
)
def test_only_what_falls_from_one_to_zero_gives_a_bound(schedule, is_bound):
    assert tabulate(schedule).is_bound == is_bound
    masking = MaskingConfig(37, 36, schedule=schedule)
    batch = corrupt(torch.arange(36).repeat(4, 2), masking, seed=0)
    hidden, head = torch.ones(4, 72, 3), torch.eye(37, 3)
    if is_bound:
        assert masked_nll(hidden, head, batch) > 0
        return
    with pytest.raises(ValueError, match=r"an integral from 1 to 0 .* reduction='mean'"):
        masked_nll(hidden, head, batch)
    assert masked_nll(hidden, head, batch, reduction="mean") > 1
    own = dataclasses.replace(batch, loss_weight=torch.ones(4))
    assert masked_nll(hidden, head, own) > 0.01


class Power:
    """A schedule whose parameter changes, and that has no hash."""

    def __init__(self, power: float) -> None:
        self.power = power

    def __call__(self, t):
        return 1 - t**self.power

    def __eq__(self, other):
        return self.power == other.power

    __hash__ = None  # type: ignore[assignment]


def test_a_callable_is_tabulated_each_time_it_is_given():
    ids, schedule = torch.zeros(512, 100, dtype=torch.int64), Power(1.0)
    before = MaskingConfig(37, 36, schedule=schedule)
    schedule.power = 8.0
    after = MaskingConfig(37, 36, schedule=schedule)
    for masking, ratio in ((before, 1 / 2), (after, 8 / 9)):
        masked = corrupt(ids, masking, seed=0).num_masked.float().mean().item()
        assert masked == pytest.approx(100 * ratio, abs=0.6)  # ceil adds a half
        # generate keeps to the same table
        plan = make_plan(torch.ones(1, 1000, dtype=torch.bool), masking.ratio_at, 2)
        left = plan.blocks[0].steps[0].left.item()
        assert left == pytest.approx(1000 * (1 - 0.5 ** (1.0 if masking is before else 8.0)), abs=1)


@pytest.mark.parametrize("name", NAMES)
def test_a_table_between_its_edges(name):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    inside = (t > 0.001) & (t < 0.999)
    error = (tabulate(name).at(t) - SCHEDULES[name](t)).abs()
    assert error[inside].max() < 1e-6 and error.max() < 1e-2
    assert tabulate(name).at(torch.tensor([0.0, 1.0]).double()).tolist() == pytest.approx([1, 0])
