"""`bernoulli_mask`: backends against each other, against `corrupt`, and its law."""

import pytest
import torch

from nar_kernels import MaskingConfig, bernoulli_mask, corrupt
from nar_kernels.ops.bernoulli import BERNOULLI_BACKENDS
from nar_kernels.spec.philox import Stream, of_view
from tests.helpers.devices import device_of

COMPILED = [
    pytest.param("cpp", marks=pytest.mark.cpp),
    pytest.param("triton", marks=pytest.mark.triton),
]
SLOTS = torch.tensor([3, 0, (1 << 62) + 5, 1 << 32])


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("length", [1, 5, 128, 1030])
@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_the_reference(backend, length, per_position, dtype):
    draw = torch.Generator().manual_seed(length)
    shape = (4, length) if per_position else (4, 1)
    ratios = torch.rand(shape, generator=draw, dtype=torch.float64).to(dtype)
    ratios[0], ratios[1, 0] = 0, 1
    seq_len = None if ratios.shape[1] > 1 else length
    options = {"seed": -7, "view": 3}
    expected = bernoulli_mask(ratios, seq_len, sample_ids=SLOTS, backend="reference", **options)
    device = device_of(backend)
    mask = bernoulli_mask(
        ratios.to(device), seq_len, sample_ids=SLOTS.to(device), backend=backend, **options
    )
    assert mask.dtype == torch.bool and mask.shape == (4, length)
    assert torch.equal(mask.cpu(), expected)
    assert not mask[0].any() and mask[1, 0]


@pytest.mark.parametrize("views", [1, range(2, 3)])
def test_masks_are_those_of_corrupt_at_the_same_ratios(views):
    masking = MaskingConfig(50, 49, draw="bernoulli", times="uniform")
    ids = torch.randint(0, 49, (6, 77), generator=torch.Generator().manual_seed(1))
    slots = torch.tensor([9, 4, 4000, 1, 2, 3])
    batch = corrupt(ids, masking, seed=11, sample_ids=slots, views=views)
    # In units of 2**-32, as kernels have them: a float32 of p_mask is rounded.
    ratios = (masking.table.ratio.long() & 0xFFFFFFFF).double() / 2**32
    mask = bernoulli_mask(
        ratios[batch.quantised_times], 77, seed=11, sample_ids=slots,
        view=0 if views == 1 else views[0],
    )  # fmt: skip
    assert torch.equal(mask, batch.masked_indices)


def test_its_rate():
    ratios = torch.tensor([0.03, 0.5, 0.977], dtype=torch.float64)
    n = 400_000
    rate = bernoulli_mask(ratios, n, seed=5).double().mean(1)
    assert ((rate - ratios).abs() < 4 * (ratios * (1 - ratios) / n).sqrt()).all()


def test_a_mask_depends_on_its_slot_alone():
    ratios, slots = torch.rand(8, 21), torch.arange(8) * 5
    whole = bernoulli_mask(ratios, seed=2, sample_ids=slots)
    order = torch.randperm(8)
    shuffled = bernoulli_mask(ratios[order], seed=2, sample_ids=slots[order])
    assert torch.equal(shuffled, whole[order])
    assert not torch.equal(whole, bernoulli_mask(ratios, seed=3, sample_ids=slots))
    assert not torch.equal(whole, bernoulli_mask(ratios, seed=2, sample_ids=slots, view=1))


def test_a_ratio_of_one_column_is_one_a_sequence():
    ratios = torch.tensor([0.2, 0.7])
    assert torch.equal(
        bernoulli_mask(ratios, 9, seed=0), bernoulli_mask(ratios[:, None], 9, seed=0)
    )
    by_position = bernoulli_mask(ratios[:, None].expand(2, 9), seed=0)
    assert torch.equal(bernoulli_mask(ratios, 9, seed=0), by_position)


@pytest.mark.parametrize("shape", [(0,), (3,)])
def test_nothing_to_mask(shape):
    for backend in BERNOULLI_BACKENDS[:2]:
        mask = bernoulli_mask(torch.rand(shape), 0, seed=0, backend=backend)
        assert mask.shape == (*shape, 0)


@pytest.mark.parametrize(
    ("ratios", "options", "error", "match"),
    [
        (torch.tensor([1]), {}, TypeError, "ratios is torch.int64"),
        ([0.5], {}, TypeError, "ratios is list"),
        (
            torch.tensor([0.5]),
            {"seq_len": None},
            ValueError,
            r"ratios is \[1, 1\] and seq_len None",
        ),
        (torch.rand(2, 4), {}, ValueError, r"ratios is \[2, 4\] and seq_len 4"),
        (torch.tensor([1.5]), {}, ValueError, "from 1.5 to 1.5"),
        (torch.tensor([float("nan")]), {}, ValueError, "from nan"),
        (torch.tensor([0.5]), {"view": -1}, ValueError, "view is -1"),
        (torch.tensor([0.5]), {"seed": 1 << 64}, ValueError, "64 bits"),
        (torch.tensor([0.5]), {"sample_ids": torch.zeros(2)}, ValueError, "must be int64"),
    ],
)
def test_clear_errors(ratios, options, error, match):
    with pytest.raises(error, match=match):
        bernoulli_mask(ratios, **{"seq_len": 4, "seed": 0, **options})


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=pytest.mark.cpp)])
def test_the_operator(backend):
    args = torch.full((2, 1), 1 << 31), torch.arange(2), 9, 3, of_view(Stream.MASK_KEY, 1)
    torch.library.opcheck(torch.ops.nar_kernels.bernoulli_mask.default, (*args, backend))
    compiled = torch.compile(bernoulli_mask, fullgraph=True, backend="eager")
    ratios = torch.tensor([0.3, 0.6])
    result = compiled(ratios, 9, seed=3, backend=backend)
    assert torch.equal(result, bernoulli_mask(ratios, 9, seed=3))
