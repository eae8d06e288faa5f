"""`mask_tokens`: backends against each other, against `corrupt`, and its law."""

import pytest
import torch

from nar_kernels import MaskingConfig, corrupt, mask_tokens
from nar_kernels.spec.philox import Stream, of_view
from tests.helpers.devices import device_of

COMPILED = [
    pytest.param("cpp", marks=pytest.mark.cpp),
    pytest.param("triton", marks=pytest.mark.triton),
]
MASK_ID = 99
SLOTS = torch.tensor([3, 0, (1 << 62) + 5, 1 << 32])


def ids_of(batch: int, length: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    draw = torch.Generator().manual_seed(batch)
    return torch.randint(0, MASK_ID, (batch, length), generator=draw).to(dtype)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("length", [1, 5, 128, 1030])
@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.int64, torch.float32),
        (torch.int32, torch.float64),
        (torch.uint8, torch.bfloat16),
    ],
)
def test_equals_the_reference(backend, length, per_position, dtype, kind):
    tokens = ids_of(4, length, dtype)
    draw = torch.Generator().manual_seed(length)
    shape = (4, length) if per_position else (4,)
    ratios = torch.rand(shape, generator=draw, dtype=torch.float64).to(kind)
    ratios[0], ratios[1] = 0, 1
    options = {"seed": -7, "view": 3}
    expected = mask_tokens(
        tokens, MASK_ID, ratios, sample_ids=SLOTS, backend="reference", **options
    )
    device, kept = device_of(backend), ratios.clone()
    ids, mask = mask_tokens(
        tokens.to(device), MASK_ID, ratios.to(device), sample_ids=SLOTS.to(device),
        backend=backend, **options,
    )  # fmt: skip
    assert ids.dtype == dtype and mask.dtype == torch.bool
    assert torch.equal(ids.cpu(), expected[0]) and torch.equal(mask.cpu(), expected[1])
    assert not mask[0].any() and mask[1].all()
    assert torch.equal(ratios, kept)
    assert torch.equal(ids.cpu().long(), torch.where(mask.cpu(), MASK_ID, tokens.long()))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("batch", [1, 9, 40_001])
def test_rows_of_one_position(batch, dtype, simd_level):
    """Whose words the C++ makes many at once; the last row ends its block."""
    tokens, draw = ids_of(batch, 1, dtype), torch.Generator().manual_seed(batch)
    ratios = torch.rand(batch, generator=draw, dtype=torch.float64)
    ratios[::7] = 1
    slots = torch.randint(0, 2**62, (batch,), generator=draw)
    results = [
        mask_tokens(tokens, MASK_ID, ratios, seed=5, sample_ids=slots, backend=backend)
        for backend in ("reference", "cpp")
    ]
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("view", [0, 2])
def test_masks_are_those_of_corrupt_at_the_same_ratios(view):
    masking = MaskingConfig(MASK_ID + 1, MASK_ID, draw="bernoulli", times="uniform")
    tokens, slots = ids_of(6, 77), torch.tensor([9, 4, 4000, 1, 2, 3])
    batch = corrupt(tokens, masking, seed=11, sample_ids=slots, views=range(view, view + 1))
    # In units of 2**-32, as kernels have them: the float32 of p_mask is rounded.
    table = (masking.table.ratio.long() & 0xFFFFFFFF).double() / 2**32
    ratios = table[batch.quantised_times]
    ids, mask = mask_tokens(tokens, MASK_ID, ratios, seed=11, sample_ids=slots, view=view)
    assert torch.equal(mask, batch.masked_indices) and torch.equal(ids, batch.input_ids)


def test_its_rate():
    ratios, n = torch.tensor([0.03, 0.5, 0.977], dtype=torch.float64), 400_000
    rate = mask_tokens(ids_of(3, n), MASK_ID, ratios, seed=5)[1].double().mean(1)
    assert ((rate - ratios).abs() < 4 * (ratios * (1 - ratios) / n).sqrt()).all()


def test_a_mask_depends_on_its_slot_alone():
    tokens, ratios, slots = ids_of(8, 21), torch.rand(8), torch.arange(8) * 5
    whole = mask_tokens(tokens, MASK_ID, ratios, seed=2, sample_ids=slots)[1]
    order = torch.randperm(8)
    ids, mask = mask_tokens(tokens[order], MASK_ID, ratios[order], seed=2, sample_ids=slots[order])
    assert torch.equal(mask, whole[order])
    for other in ({"seed": 3}, {"seed": 2, "view": 1}):
        again = mask_tokens(tokens, MASK_ID, ratios, sample_ids=slots, **other)[1]
        assert not torch.equal(whole, again)


def test_one_ratio_a_sequence_is_the_same_at_each_position():
    tokens, ratios = ids_of(2, 9), torch.tensor([0.2, 0.7])
    expected = mask_tokens(tokens, MASK_ID, ratios, seed=0)[1]
    for same in (ratios[:, None], ratios[:, None].expand(2, 9)):
        assert torch.equal(mask_tokens(tokens, MASK_ID, same, seed=0)[1], expected)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
@pytest.mark.parametrize("backend", ["reference", *COMPILED])
def test_nothing_to_mask(shape, backend):
    tokens = torch.zeros(shape, dtype=torch.int64, device=device_of(backend))
    ratios = torch.ones(shape[0], device=tokens.device)
    ids, mask = mask_tokens(tokens, MASK_ID, ratios, seed=0, backend=backend)
    assert ids.shape == mask.shape == shape


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"tokens": [[1]]}, TypeError, "tokens is a list"),
        ({"tokens": torch.rand(2, 4)}, ValueError, "tokens is torch.float32"),
        ({"tokens": torch.zeros(4, dtype=torch.int64)}, ValueError, r"must hold integer ids"),
        ({"ratios": torch.tensor([1, 1])}, TypeError, "ratios is torch.int64"),
        ({"ratios": 0.5}, TypeError, "ratios is float"),
        ({"ratios": torch.rand(2, 3)}, ValueError, r"ratios is \[2, 3\] and tokens \[2, 4\]"),
        ({"ratios": torch.tensor([1.5, 0])}, ValueError, "from 0 to 1.5"),
        ({"ratios": torch.tensor([float("nan"), 0])}, ValueError, "from nan"),
        ({"mask_id": 1 << 40, "tokens": ids_of(2, 4, torch.int32)}, ValueError, "mask_id is"),
        ({"view": -1}, ValueError, "view is -1"),
        ({"seed": 1 << 64}, ValueError, "64 bits"),
        ({"sample_ids": torch.zeros(2)}, ValueError, "must be int64"),
        ({"backend": "cuda"}, ValueError, "unknown backend"),
    ],
)
def test_clear_errors(given, error, match):
    arguments = {"tokens": ids_of(2, 4), "mask_id": MASK_ID, "ratios": torch.rand(2), "seed": 0}
    with pytest.raises(error, match=match):
        mask_tokens(**{**arguments, **given})


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=pytest.mark.cpp)])
def test_the_operator(backend):
    args = ids_of(2, 9), MASK_ID, torch.full((2, 1), 1 << 31), torch.arange(2), 3
    args = *args, of_view(Stream.MASK_KEY, 1), backend
    torch.library.opcheck(torch.ops.nar_kernels.mask_tokens.default, args)
    compiled = torch.compile(mask_tokens, fullgraph=True, backend="eager")
    tokens, ratios = ids_of(2, 9), torch.tensor([0.3, 0.6])
    results = compiled(tokens, MASK_ID, ratios, seed=3, backend=backend)
    for one, two in zip(results, mask_tokens(tokens, MASK_ID, ratios, seed=3), strict=True):
        assert torch.equal(one, two)
