"""The functions of NeMo Automodel, against its own where it is installed, and its formulas."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nar_kernels import InvalidTokenError
from nar_kernels.integrations import nemo
from tests.helpers.goodness_of_fit import assert_same_law, assert_uniform, same_law_p

pytestmark = pytest.mark.usefixtures("one_thread")

MASK_ID = 50
CORRUPTION, COLLATE, LOSS = "datasets.dllm.corruption", "datasets.dllm.collate", "loss.dllm_loss"


def of_nemo(module: str, name: str) -> Any:
    return getattr(pytest.importorskip(f"nemo_automodel.components.{module}"), name)


def ids_of(batch: int, length: int) -> Tensor:
    noise = torch.Generator().manual_seed(batch)
    return torch.randint(0, MASK_ID, (batch, length), generator=noise)


def loss_mask_of(batch: int, length: int) -> Tensor:
    """float, as of the collator: prompts of different lengths."""
    return (torch.arange(length) >= torch.arange(batch)[:, None] % length).float()


@pytest.mark.parametrize("name", ["corrupt_uniform", "corrupt_blockwise", "corrupt_all_masked"])
def test_arguments_and_outputs_are_those_of_nemo(name):
    ours, theirs = getattr(nemo, name), of_nemo(CORRUPTION, name)
    expected = inspect.signature(theirs).parameters
    found = inspect.signature(ours).parameters
    of_both = [found[n] for n in found if n not in ("seed", "sample_ids")]
    assert [(p.name, p.default) for p in of_both] == [
        (p.name, p.default) for p in expected.values()
    ]
    for dtype in (torch.int64, torch.int32):
        ids, loss_mask = ids_of(3, 10).to(dtype), loss_mask_of(3, 10)
        for mine, their in zip(
            ours(ids, loss_mask, MASK_ID), theirs(ids, loss_mask, MASK_ID), strict=True
        ):
            assert (mine.dtype, mine.shape) == (their.dtype, their.shape)
    if name == "corrupt_all_masked":
        for mine, their in zip(
            ours(ids, loss_mask, MASK_ID), theirs(ids, loss_mask, MASK_ID), strict=True
        ):
            assert torch.equal(mine, their)


@pytest.mark.parametrize(
    "corrupt", [nemo.corrupt_uniform, nemo.corrupt_blockwise], ids=["uniform", "blockwise"]
)
def test_masks_follow_from_seed_and_sample_alone(corrupt):
    options = {"block_size": 4} if corrupt is nemo.corrupt_blockwise else {}
    ids, loss_mask = ids_of(6, 21), loss_mask_of(6, 21)
    slots = torch.tensor([70, 71, 9, 1 << 40, 5, 4])

    def call(rows: list[int], seed: int = 3) -> tuple[Tensor, ...]:
        at = slots[rows]
        return corrupt(ids[rows], loss_mask[rows], MASK_ID, seed=seed, sample_ids=at, **options)

    whole = call([*range(6)])
    noisy, noise_mask, _ = whole
    assert torch.equal(noisy, torch.where(noise_mask, MASK_ID, ids))
    assert not noise_mask[loss_mask == 0].any() and noise_mask.any()
    for rows in ([4, 0, 1], [2], []):
        for part, all_rows in zip(call(rows), whole, strict=True):
            assert torch.equal(part, all_rows[rows])
    assert not torch.equal(call([*range(6)], seed=4)[1], noise_mask)


def test_blocks_do_not_depend_on_padding_and_share_no_noise():
    def call(num_blocks: int, slot: int) -> tuple[Tensor, Tensor]:
        ids, slots = ids_of(1, 64 * num_blocks), torch.tensor([slot])
        _, masked, p = nemo.corrupt_blockwise(
            ids, None, MASK_ID, 64, half_life_ratio=1e9, seed=3, sample_ids=slots
        )
        return masked.view(-1, 64), p.view(-1, 64)[:, 0]

    masked, p = call(3, 2)
    for few in (1, 2):
        assert torch.equal(call(few, 2)[0], masked[:few]) and torch.equal(call(few, 2)[1], p[:few])
    all_p = torch.cat([call(num_blocks, slot)[1] for num_blocks, slot in ((3, 2), (2, 3), (6, 1))])
    of_samples = nemo.corrupt_uniform(ids_of(64, 4), torch.ones(64, 4), MASK_ID, seed=3)[2][:, 0]
    assert len(torch.cat([all_p, of_samples]).unique()) == len(all_p) + 64


@pytest.mark.parametrize("corrupt", [nemo.corrupt_uniform, nemo.corrupt_blockwise])
def test_loss_masks_of_any_dtype_and_shape(corrupt):
    ids, loss_mask = ids_of(3, 12), (torch.arange(12) > 4).expand(3, 12)
    expected = corrupt(ids, loss_mask, MASK_ID, seed=1)[1]
    assert not expected[:, :5].any() and expected.any()
    for given in (loss_mask.short(), loss_mask.bfloat16(), 2 * loss_mask.byte(), loss_mask[0]):
        assert torch.equal(corrupt(ids, given, MASK_ID, seed=1)[1], expected)
    with pytest.raises(TypeError, match="loss_mask is a list"):
        corrupt(ids, loss_mask.tolist(), MASK_ID)
    with pytest.raises(ValueError, match=r"loss_mask is \[3, 11\] beside ids \[3, 12\]"):
        corrupt(ids, loss_mask[:, 1:], MASK_ID)


def test_a_generator_or_the_global_one_gives_the_seed():
    ids, loss_mask = ids_of(4, 30), torch.ones(4, 30)
    for corrupt in (nemo.corrupt_uniform, nemo.corrupt_blockwise):
        draws = []
        for _ in range(2):
            generator = torch.Generator().manual_seed(5)
            draws.append(corrupt(ids, loss_mask, MASK_ID, generator=generator)[1])
            torch.manual_seed(6)
            draws.append(corrupt(ids, loss_mask, MASK_ID)[1])
        assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3])
        assert not torch.equal(draws[0], draws[1])


def uniform_formula(ids: Tensor, loss_mask: Tensor, mask_id: int, eps: float = 1e-3) -> Any:
    p = (torch.rand(len(ids), 1) * (1 - eps) + eps).expand(ids.shape)
    return None, (torch.rand(ids.shape) < p) & loss_mask.bool(), p


def blockwise_formula(
    ids: Tensor,
    loss_mask: Tensor,
    mask_id: int,
    block_size: int | None = None,
    eps: float = 1e-3,
    half_life_ratio: float = 0.25,
) -> Any:
    """Drawn one after the other, without replacement, rather than by Gumbel noise."""
    batch, length = ids.shape
    size = length if block_size is None else block_size
    masks, ratios = [], []
    for begin in range(0, length, size):
        n = min(size, length - begin)
        m = eps + (1 - eps) * torch.rand(batch)
        k = (m * n).round().long().clamp(min=int(block_size is None))
        slope = math.log(2) / (half_life_ratio * size) * (1 - m)
        weight = (slope[:, None] * torch.arange(n)).exp()
        rank = weight.multinomial(n).argsort(1)
        masks.append(rank < k[:, None])
        ratios.append(m[:, None].expand(-1, n))
    return None, torch.cat(masks, 1) & loss_mask.bool(), torch.cat(ratios, 1)


FORMULAS = {"corrupt_uniform": uniform_formula, "corrupt_blockwise": blockwise_formula}
BATCH, LENGTH = 20000, 14


def cells(function: Callable, **options: Any) -> dict[str, Tensor]:
    """How often a sample has so many masked; is masked at a position, and at two that follow one
    another, by its p; has a p in each of twenty parts. One position of each sample, as others of it
    depend on that."""
    sample = torch.arange(BATCH)
    loss_mask = (torch.arange(LENGTH) != 3).float().expand(BATCH, LENGTH)
    _, masked, p = function(torch.zeros(BATCH, LENGTH).long(), loss_mask, MASK_ID, **options)
    at = sample % (LENGTH - 1)
    both = masked[sample, at] + 2 * masked[sample, at + 1]
    level = (p[sample, at] * 4).long().clamp(max=3)
    return {
        "counts": torch.bincount(masked.sum(1), minlength=LENGTH + 1),
        "positions": torch.bincount((level * LENGTH + at) * 4 + both, minlength=16 * LENGTH),
        "p": torch.histc(p[:, -1], 20, 0, 1),
    }


LAWS = [
    ("corrupt_uniform", {}),
    ("corrupt_uniform", {"eps": 0.3}),
    ("corrupt_blockwise", {}),
    ("corrupt_blockwise", {"block_size": 4}),
    ("corrupt_blockwise", {"block_size": 7, "eps": 0.2, "half_life_ratio": 0.1}),
]


@pytest.mark.parametrize("against", ["formula", "nemo"])
@pytest.mark.parametrize(("name", "options"), LAWS)
def test_the_law(name, options, against):
    theirs = FORMULAS[name] if against == "formula" else of_nemo(CORRUPTION, name)
    torch.manual_seed(0)
    expected = cells(theirs, **options)
    for what, counts in cells(getattr(nemo, name), seed=1, **options).items():
        assert_same_law(counts, expected[what], num_tests=6 * len(LAWS))


def test_another_law_is_seen():
    torch.manual_seed(0)
    ours = cells(nemo.corrupt_blockwise, seed=1, block_size=7)
    flat = cells(blockwise_formula, block_size=7, half_life_ratio=100.0)
    assert same_law_p(ours["positions"], flat["positions"]) < 1e-9
    assert same_law_p(ours["counts"], cells(uniform_formula)["counts"]) < 1e-9


def test_blockwise_counts_are_exact():
    ids = ids_of(200, 22)
    for size in (None, 1, 8, 22, 40):
        _, masked, p = nemo.corrupt_blockwise(ids, None, MASK_ID, size, seed=2)
        for begin in range(0, 22, size or 22):
            part = masked[:, begin : begin + (size or 22)]
            m = p[:, begin]
            assert (p[:, begin : begin + (size or 22)] == m[:, None]).all()
            k = (m * part.shape[1]).round().clamp(min=int(size is None))
            assert torch.equal(part.sum(1).float(), k)


def test_blocks_are_uniform_among_subsets_without_a_slope():
    _, masked, _ = nemo.corrupt_blockwise(
        ids_of(20000, 4), None, MASK_ID, half_life_ratio=1e9, seed=0
    )
    of_two = masked[masked.sum(1) == 2]
    assert_uniform((of_two * 2 ** torch.arange(4)).sum(1).bincount()[[3, 5, 6, 9, 10, 12]], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_tokens", [None, 0, 37])
def test_the_loss(dtype, num_tokens):
    noise = torch.Generator().manual_seed(0)
    ids, loss_mask = ids_of(4, 9), loss_mask_of(4, 9)
    logits = torch.randn(4, 9, MASK_ID + 1, generator=noise).to(dtype).requires_grad_()
    _, masked, p = nemo.corrupt_uniform(ids, torch.ones(4, 9), MASK_ID, seed=1)
    result = nemo.MDLMCrossEntropyLoss()(
        logits, ids, masked, p, loss_mask, num_diffusion_tokens=num_tokens
    )
    wide = logits.detach().double().requires_grad_()
    nll = F.cross_entropy(wide.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    expected = (nll * (masked & loss_mask.bool()) / p).sum()
    if num_tokens is not None:
        expected = expected / max(num_tokens, 1)
    assert torch.allclose(result.total_loss.double(), expected, rtol=1e-5)
    assert torch.equal(result.dllm_loss, result.total_loss) and not result.dllm_loss.requires_grad
    (2 * result.total_loss).backward(retain_graph=True)
    (2 * expected).backward()
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4}
    assert logits.grad.dtype == dtype and torch.allclose(logits.grad.double(), wide.grad, **close)
    once = logits.grad.clone()
    (2 * result.total_loss).backward()
    assert torch.equal(logits.grad, 2 * once)


def test_the_loss_of_nothing_is_0():
    ids, logits = ids_of(2, 3), torch.randn(2, 3, MASK_ID + 1, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    loss = nemo.MDLMCrossEntropyLoss()(logits, ids, nothing, torch.ones(2, 3), torch.ones(2, 3))
    loss.total_loss.backward()
    assert loss.total_loss == 0 and not logits.grad.any()


def test_the_loss_is_that_of_nemo():
    theirs = of_nemo(LOSS, "MDLMCrossEntropyLoss")
    ids, loss_mask = ids_of(3, 11), loss_mask_of(3, 11)
    logits = torch.randn(3, 11, MASK_ID + 1)
    _, masked, p = nemo.corrupt_uniform(ids, loss_mask, MASK_ID, seed=1)
    for count in (None, 12):
        given = {"num_diffusion_tokens": count, "noisy_input_ids": ids}
        mine, their = (
            cls(fp32_upcast=False)(logits, ids, masked, p, loss_mask, **given)
            for cls in (nemo.MDLMCrossEntropyLoss, theirs)
        )
        assert mine._fields == their._fields
        assert torch.allclose(mine.total_loss, their.total_loss, rtol=1e-6)
        assert mine.total_loss.dtype == their.total_loss.dtype and mine[2:] == their[2:]


def test_the_loss_takes_what_that_of_nemo_does():
    """Ids of -100, a p_mask and a loss mask that broadcast, flat tensors."""
    theirs = of_nemo(LOSS, "MDLMCrossEntropyLoss")
    ids, logits = ids_of(3, 11), torch.randn(3, 11, MASK_ID + 1)
    masked = torch.arange(33).view(3, 11) % 4 == 1
    p, ones = torch.tensor([[0.2], [0.5], [0.9]]), torch.ones(3, 11)
    ignored = ids.masked_fill(torch.arange(11) < 3, -100)
    for given in (
        (logits, ignored, masked, p.expand(3, 11), ones),
        (logits, ids, masked, p, ones[0]),
        tuple(x.flatten(0, 1) for x in (logits, ids, masked, p.expand(3, 11), ones)),
    ):
        mine, their = (cls()(*given).total_loss for cls in (nemo.MDLMCrossEntropyLoss, theirs))
        assert torch.allclose(mine, their, rtol=1e-6)


def samples_of(lengths: list[int]) -> list[dict[str, list[int]]]:
    """Each with a prompt of a third, and an id that is not supervised at the end."""
    return [
        {
            "input_ids": list(range(5, 5 + n)),
            "loss_mask": [int(n // 3 <= i < n - 1) for i in range(n)],
            "attention_mask": [1] * n,
            "___PAD_TOKEN_IDS___": {"input_ids": 0},
        }
        for n in lengths
    ]


COLLATORS = [
    {},
    {"pad_token_id": 3, "supervise_padding": True},
    {"block_size": 4, "eos_token_id": 2, "pad_token_id": 1},
    {"block_size": 4, "pad_token_id": 1},
    {"block_size": 4, "eos_token_id": 2, "pad_seq_len_divisible": 6, "supervise_padding": True},
    {"block_size": 4, "eos_token_id": 2, "pad_seq_len_divisible": 6, "max_seq_len": 10},
    {"block_size": 8, "eos_token_id": 2, "max_seq_len": 7},
    {"block_size": 4, "eos_token_id": 2, "response_window": True},
    {"block_size": 5, "eos_token_id": 2, "response_window": True, "max_seq_len": 11},
    {"block_size": 1, "pad_seq_len_divisible": 8},
    {"block_size": 4, "pad_seq_len_divisible": 1, "response_window": True},
    {"block_size": 4, "pad_seq_len_divisible": 0, "max_seq_len": 9},
]


@pytest.mark.parametrize("options", COLLATORS, ids=str)
def test_the_collator_is_that_of_nemo(options):
    theirs = of_nemo(COLLATE, "DLLMCollator")
    for lengths in ([5, 13, 8, 1], [4], [0, 3], [12, 12]):
        expected = theirs(**options)(samples_of(lengths))
        found = nemo.DLLMCollator(**options)(samples_of(lengths))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name]), name


def test_the_layout_of_the_collator():
    collate = nemo.DLLMCollator(9, 8, block_size=4, pad_seq_len_divisible=8)
    samples = samples_of([5, 2])
    batch = collate(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 8, 8, 8], [5, 6, 8, 8, 9, 9, 9, 9]]
    assert batch["loss_mask"].tolist() == [[0, 1, 1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 0, 0, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == batch["input_lengths"].tolist() == [5, 2]
    assert "___PAD_TOKEN_IDS___" not in samples[0]
    window = nemo.DLLMCollator(9, 8, block_size=4, response_window=True)
    batch = window(samples_of([6]))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]  # the answer has four
    assert window(samples_of([7]))["attention_mask"].tolist() == [[1] * 10]
    assert collate([])["input_ids"].shape == (0, 1)


def test_clear_errors():
    ids, loss_mask = ids_of(2, 4), torch.ones(2, 4)
    with pytest.raises(InvalidTokenError, match="id 50"):
        nemo.corrupt_uniform(torch.full((1, 4), MASK_ID), loss_mask[:1], MASK_ID)
    with pytest.raises(ValueError, match="block_size is 0"):
        nemo.corrupt_blockwise(ids, loss_mask, MASK_ID, 0)
    with pytest.raises(ValueError, match=r"half_life_ratio is 0\.0"):
        nemo.corrupt_blockwise(ids, loss_mask, MASK_ID, half_life_ratio=0)
    with pytest.raises(TypeError, match="input_ids is a list"):
        nemo.corrupt_all_masked([[1]], loss_mask, MASK_ID)
    with pytest.raises(ValueError, match=r"eps is 1\.0: it must be in \[0, 1\)"):
        nemo.corrupt_blockwise(ids, loss_mask, MASK_ID, eps=1)
    for slots, match in (([1], r"must be int64 \[2\]"), ([-1, 0], "from -1"), ([0, 1 << 43], "43")):
        with pytest.raises(ValueError, match=match):
            nemo.corrupt_blockwise(ids, loss_mask, MASK_ID, sample_ids=torch.tensor(slots))
    logits, masked = torch.randn(2, 4, 20), torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(IndexError, match="target_ids have 20 at a masked position"):
        nemo.MDLMCrossEntropyLoss()(logits, torch.full((2, 4), 20), masked, loss_mask, loss_mask)
    bad = samples_of([4])
    bad[0]["loss_mask"].pop()
    with pytest.raises(ValueError, match="sample 0 has 4 input_ids but 3 values of loss_mask"):
        nemo.DLLMCollator()(bad)
    turns = samples_of([4, 5])
    turns[1]["loss_mask"] = [1, 0, 1, 0, 1]
    with pytest.raises(ValueError, match="tokens of sample 1 are in 3 runs"):
        nemo.DLLMCollator(response_window=True)(turns)
