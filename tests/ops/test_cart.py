"""`cart_weights` against the sum over all pairs of positions."""

import pytest
import torch
from torch import Tensor

from nar_kernels import cart_weights, varlen_arguments
from tests.helpers.pretend_gpu import DEVICE, pretend_gpu

pytestmark = pytest.mark.usefixtures("one_thread")

PS = [1e-4, 0.01, 0.3, 0.8, 0.999, 1.0]


def by_pairs(masked: Tensor, p: float, same: Tensor | None = None) -> Tensor:
    """float64 `[B, L]`, from the matrix of all pairs, and which of them are of one document."""
    position = torch.arange(masked.shape[-1])
    distance = (position[:, None] - position).abs()
    pair = torch.where(distance > 0, p * (1 - p) ** (distance - 1.0).double(), 0.0)
    pair = pair if same is None else pair * same
    return (pair @ (~masked).double()[..., None])[..., 0] / 2 * masked


def draw(*shape: int, share: float = 0.6, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("shape", [(3, 700), (2, 1), (4, 2), (5, 128), (129,)])
def test_equals_all_pairs(shape, p):
    masked = draw(*shape)
    expected = by_pairs(masked, p)
    ours = cart_weights(masked, p, dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-300)
    single = cart_weights(masked, p)
    assert single.dtype == torch.float32 and single.shape == masked.shape
    torch.testing.assert_close(single.double(), expected, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.716, 0.8])  # 0.284**64 is 1e-35
def test_far_context(p):
    """One token is not masked: weights fall to what float32 no longer holds, and no term is lost
    before."""
    masked = torch.ones(1, 1500, dtype=torch.bool)
    masked[0, 700] = False
    expected = by_pairs(masked, p)
    assert ((expected > 1e-37) & (expected < 1e-30)).any() or p == 0.01
    ours = cart_weights(masked, p)
    torch.testing.assert_close(ours.double(), expected, rtol=4e-6, atol=2e-37)
    assert ours[0, 700] == 0 and ours[0, 699] == ours[0, 701] == pytest.approx(p / 2)


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_documents_are_apart(dtype, seed, p):
    rows, length = 3, 200
    masked = draw(rows, length, seed=seed)
    # Some begin where rows do not; some are empty.
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, rows * length + 1, (30,), generator=generator)
    ends = torch.tensor([0, 7, 7, 8, rows * length])
    cu_seqlens = torch.cat((ends, cuts)).sort().values
    document = torch.bucketize(torch.arange(rows * length), cu_seqlens, right=True)
    document = document.view(rows, length)
    same = document[:, :, None] == document[:, None, :]
    expected = by_pairs(masked, p, same)
    ours = cart_weights(masked, p, cu_seqlens=cu_seqlens.to(dtype), dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-300)
    # The same documents, each alone.
    flat = cart_weights(masked.flatten(), p, cu_seqlens=cu_seqlens.to(dtype), dtype=torch.float64)
    for begin, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        alone = cart_weights(masked.flatten()[begin:end], p, dtype=torch.float64)
        assert torch.equal(flat[begin:end], alone)


def test_padding_is_no_context():
    masked = torch.tensor([True, False, True, False, False])
    cu_seqlens, lengths = torch.tensor([0, 5]), torch.tensor([3])
    with_padding = cart_weights(masked, 0.5, cu_seqlens=cu_seqlens)
    assert with_padding.tolist() == [0.25 + 0.0625 + 0.03125, 0, 0.25 + 0.25 + 0.125, 0, 0]
    bounds = varlen_arguments(cu_seqlens, lengths, shape=(5,))["cu_seqlens_q"]
    assert cart_weights(masked, 0.5, cu_seqlens=bounds).tolist() == [0.25, 0, 0.25, 0, 0]


def test_default_is_that_of_dream():
    masked = draw(2, 50)
    assert torch.equal(cart_weights(masked), cart_weights(masked, 0.8))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_empty(shape):
    assert cart_weights(torch.zeros(shape, dtype=torch.bool)).shape == shape


def test_all_or_nothing_masked():
    for masked in (torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)):
        assert not cart_weights(masked, 0.3).any()


def test_memory_is_left_alone_and_may_be_strided():
    masked = draw(40, 30).T
    before = masked.clone()
    ours = cart_weights(masked, 0.3)
    assert torch.equal(masked, before)
    assert torch.equal(ours, cart_weights(masked.contiguous(), 0.3))


def test_a_gpu_is_not_waited_for():
    masked, cu_seqlens = draw(4, 64), torch.tensor([0, 5, 70, 256], dtype=torch.int32)
    with pretend_gpu() as gpu:
        of_gpu, bounds = masked.to(DEVICE), cu_seqlens.to(DEVICE)
        gpu.waits.clear()
        ours = cart_weights(of_gpu, 0.3, cu_seqlens=bounds)
        assert gpu.waits == [] and ours.device == DEVICE
    assert torch.equal(ours.inner, cart_weights(masked, 0.3, cu_seqlens=cu_seqlens))


@pytest.mark.seconds
def test_compiles_in_one_graph():
    masked, cu_seqlens = draw(4, 64), torch.tensor([0, 5, 70, 256], dtype=torch.int32)
    compiled = torch.compile(cart_weights, fullgraph=True, backend="eager")
    expected = cart_weights(masked, 0.3, cu_seqlens=cu_seqlens)
    assert torch.equal(compiled(masked, 0.3, cu_seqlens=cu_seqlens), expected)


MASKED = torch.zeros(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((MASKED.long(),), {}, TypeError, "masked_indices is torch.int64: it must be a bool"),
        (([True],), {}, TypeError, "masked_indices is list"),
        ((MASKED[None],), {}, ValueError, r"masked_indices is \[1, 2, 4\]"),
        ((MASKED, 0.0), {}, ValueError, r"p is 0.0: it must be in \(0, 1\]"),
        ((MASKED, 1.5), {}, ValueError, "p is 1.5"),
        ((MASKED, float("nan")), {}, ValueError, "p is nan"),
        ((MASKED, "x"), {}, TypeError, "p is 'x': it must be a number"),
        ((MASKED,), {"dtype": torch.bfloat16}, ValueError, "dtype is torch.bfloat16"),
        ((MASKED,), {"cu_seqlens": torch.tensor([0, 4])}, ValueError, "from 0 to 4: it must go"),
        ((MASKED,), {"cu_seqlens": torch.tensor([0, 5, 4, 8])}, ValueError, r"\[2\] is 4, after 5"),
        ((MASKED,), {"cu_seqlens": torch.tensor([0.0, 8])}, TypeError, "is torch.float32"),
        ((MASKED,), {"cu_seqlens": torch.tensor([8])}, ValueError, "no document"),
        (
            (MASKED,),
            {"cu_seqlens": torch.tensor([0, 8], device="meta")},
            ValueError,
            "cu_seqlens is on meta, but masked_indices on cpu",
        ),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        cart_weights(*arguments, **options)
