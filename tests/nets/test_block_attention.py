"""Attention of block diffusion: the masks of its definition, in three forms."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
    create_mask,
    flex_attention,
)

from nar_kernels import block_mask, block_varlen_arguments, dense_block_mask
from nar_kernels.nets.block_attention import _kept_tiles_of_one
from tests.helpers.pretend_gpu import DEVICE, pretend_gpu

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

LISTS = (
    *("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
    *("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"),
)


def pairs_by_definition(documents: Tensor, blocks: Tensor, noisy: bool) -> Tensor:
    """`[B, 2 L, 2 L]`, given the document of each position and its block there, `[B, L]`."""
    if not noisy:
        doc_q, doc_k = documents[:, :, None], documents[:, None]
        return (doc_q == doc_k) & (blocks[:, :, None] >= blocks[:, None])
    doc, block = documents.repeat(1, 2), blocks.repeat(1, 2)
    is_noisy = torch.arange(doc.shape[1]) < blocks.shape[1]
    n_q, n_k = is_noisy[:, None], is_noisy
    block_q, block_k = block[:, :, None], block[:, None]
    return (doc[:, :, None] == doc[:, None]) & (
        ((block_q == block_k) & (n_q == n_k))
        | ((block_q > block_k) & n_q & ~n_k)
        | ((block_q >= block_k) & ~n_q & ~n_k)
    )


def assert_is_mask_of(ours: BlockMask, pairs: Tensor, block_size: int) -> None:
    """That it is what `create_block_mask` makes of `[B, n, n]`, to the last entry of its lists."""
    rows, length, _ = pairs.shape
    expected = create_block_mask(
        lambda b, h, q, k: pairs[b, q, k],
        *(rows, None, length, length),
        device="cpu",
        BLOCK_SIZE=block_size,
    )
    assert_same(ours, expected)
    own_pairs = create_mask(ours.mask_mod, rows, None, length, length, device="cpu")
    assert torch.equal(own_pairs[:, 0], pairs)


def assert_same(ours: BlockMask, expected: BlockMask) -> None:
    assert ours.shape == expected.shape and ours.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in LISTS:  # also what comes after the counts, which nobody reads
        got, wanted = getattr(ours, name), getattr(expected, name)
        assert got.dtype == wanted.dtype and torch.equal(got, wanted), name
        assert got.is_contiguous()
    assert torch.equal(ours.to_dense(), expected.to_dense())


def block_lengths(seq_len: int) -> list[int]:
    wanted = (1, 2, 3, 4, 7, 8, 16, seq_len // 2, seq_len - 1, seq_len)
    return sorted({n for n in wanted if 1 <= n <= seq_len})


@pytest.mark.parametrize("block_size", [4, 8, 16])
@pytest.mark.parametrize("seq_len", range(1, 41))
def test_rows_of_one_document(seq_len, block_size):
    documents = torch.zeros(1, seq_len, dtype=torch.int64)
    every = block_lengths(seq_len)
    for block_length in every if seq_len < 10 else every[seq_len % 3 :: 3]:
        blocks = torch.arange(seq_len)[None] // block_length
        pairs = pairs_by_definition(documents, blocks, noisy=True)
        ours = block_mask(seq_len, block_length, block_size=block_size)
        assert_is_mask_of(ours, pairs, block_size)
        assert torch.equal(dense_block_mask(seq_len, block_length)[0], pairs)


@pytest.mark.parametrize("seq_len", [1, 8, 13, 37])
def test_equal_to_the_mask_of_attention_gym(seq_len):
    masks = pytest.importorskip("attn_gym.masks")
    for block_length in block_lengths(seq_len):
        theirs = masks.generate_block_diffusion_mask(seq_len, block_length)
        size = 2 * seq_len
        expected = create_block_mask(theirs, None, None, size, size, device="cpu", BLOCK_SIZE=8)
        assert_same(block_mask(seq_len, block_length, block_size=8), expected)
        pairs = create_mask(theirs, None, None, size, size, device="cpu")
        assert torch.equal(dense_block_mask(seq_len, block_length), pairs)


@pytest.mark.parametrize("seq_len", [1, 8, 13, 40])
def test_clean_tokens_alone(seq_len):
    for block_length, block_size in itertools.product(block_lengths(seq_len), (4, 16)):
        blocks = torch.arange(seq_len)[None] // block_length
        pairs = pairs_by_definition(torch.zeros_like(blocks), blocks, noisy=False)
        ours = block_mask(seq_len, block_length, noisy=False, block_size=block_size)
        assert_is_mask_of(ours, pairs, block_size)
        assert torch.equal(dense_block_mask(seq_len, block_length, noisy=False)[0], pairs)


class Packing:
    """Random documents: empty ones, of one block, many blocks and parts of one; every third packing
    has no gaps."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.rows, self.seq_len = rng.randint(1, 3), rng.randint(1, 40)
        self.block_length = rng.randint(1, rng.choice((min(4, self.seq_len), self.seq_len)))
        self.block_size = rng.choice((1, 4, 8, 16))
        extents = [extent for _ in range(self.rows) for extent in self.row_of_extents(rng)]
        lengths = [rng.choice((0, e, rng.randint(0, e))) for e in extents]
        self.cu_seqlens = torch.tensor([0, *extents]).cumsum(0).to(torch.int32)
        self.lengths = None if seed % 3 == 0 else torch.tensor(lengths)
        held = extents if seed % 3 == 0 else lengths
        segments = [n for e, h in zip(extents, held, strict=True) for n in (h, e - h)]
        ids = [i for i, n in enumerate(segments) for _ in range(n)]
        blocks = [place // self.block_length for n in segments for place in range(n)]
        self.segments, self.blocks = (
            torch.tensor(x).view(self.rows, self.seq_len) for x in (ids, blocks)
        )

    def row_of_extents(self, rng: random.Random) -> list[int]:
        extents, left = [], self.seq_len
        while left:
            block = self.block_length
            extents.append(min(rng.choice((0, 1, block, 2 * block, rng.randint(1, 20))), left))
            left -= extents[-1]
        return extents

    def pairs(self, noisy: bool = True) -> Tensor:
        return pairs_by_definition(self.segments, self.blocks, noisy)

    @property
    def arguments(self) -> tuple[int, int, Tensor, Tensor | None]:
        return self.seq_len, self.block_length, self.cu_seqlens, self.lengths


@pytest.mark.parametrize("seed", range(120))
def test_documents(seed):
    packing = Packing(seed)
    noisy = seed % 5 > 0
    pairs = packing.pairs(noisy)
    options = {"rows": packing.rows, "noisy": noisy}
    ours = block_mask(*packing.arguments, **options, block_size=packing.block_size)
    assert_is_mask_of(ours, pairs, packing.block_size)
    assert torch.equal(dense_block_mask(*packing.arguments, **options)[:, 0], pairs)


def test_one_document_a_row_is_no_document():
    cu_seqlens = torch.tensor([0, 13, 26])
    ours = block_mask(13, 3, cu_seqlens, rows=2, block_size=4)
    alone = block_mask(13, 3, rows=2, block_size=4)
    assert ours.shape == (2, 1, 26, 26) and alone.shape == (1, 1, 26, 26)
    for name in LISTS:
        assert torch.equal(getattr(ours, name), getattr(alone, name).repeat_interleave(2, 0))


def of_heads(rows: int, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 2, length, 8, dtype=dtype, generator=generator) for _ in range(3)]


@pytest.mark.seconds
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("has_documents", [True, False])
def test_flex_attention_is_dense_attention(has_documents, noisy):
    """Uncompiled it reads the mask function alone, not the tiles."""
    packing = Packing(1)
    arguments = packing.arguments if has_documents else packing.arguments[:2]
    options = {"rows": packing.rows, "noisy": noisy}
    heads = of_heads(packing.rows, (1 + noisy) * packing.seq_len)
    mask = dense_block_mask(*arguments, **options)
    dense = F.scaled_dot_product_attention(*heads, attn_mask=mask)
    flex = flex_attention(*heads, block_mask=block_mask(*arguments, **options, block_size=8))
    torch.testing.assert_close(flex, dense, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [None, [0, 70, 75, 75, 150, 300]])
def test_compiled_flex_attention_reads_the_tiles(documents):
    """It skips what the tiles leave out. On the CPU it has float32, and no gradients."""
    cu_seqlens = None if documents is None else torch.tensor(documents)
    ours = block_mask(150, 20, cu_seqlens, rows=2, block_size=16)
    assert ours.full_kv_num_blocks.sum() > 0 and not ours.to_dense().all()
    heads = of_heads(2, 300, torch.float32)
    with torch.no_grad():
        # Of shapes that vary, PyTorch 2.13 writes C++ for the CPU that does not compile.
        flex = torch.compile(flex_attention, dynamic=False)(*heads, block_mask=ours)
    dense = dense_block_mask(150, 20, cu_seqlens, rows=2)
    expected = F.scaled_dot_product_attention(*heads, attn_mask=dense)
    torch.testing.assert_close(flex, expected)


def flash_attn_varlen_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Tensor:
    """Sequence by sequence, `[T, heads, D]`; NaN where there is none."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert len(cu_seqlens_q) == len(cu_seqlens_k)
    assert int(cu_seqlens_q[-1]) == len(query) and int(cu_seqlens_k[-1]) == len(key)
    out = torch.full_like(query, torch.nan)
    for q_bounds, k_bounds in zip(
        itertools.pairwise(cu_seqlens_q.tolist()),
        itertools.pairwise(cu_seqlens_k.tolist()),
        strict=True,
    ):
        of_queries, of_keys = slice(*q_bounds), slice(*k_bounds)
        q, k, v = (x.transpose(0, 1) for x in (query[of_queries], key[of_keys], value[of_keys]))
        assert q.shape[1] <= max_seqlen_q and k.shape[1] <= max_seqlen_k
        scores = q @ k.mT / q.shape[-1] ** 0.5
        out[of_queries] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out


def attend_in_two_calls(heads: list[Tensor], *arguments, **options) -> Tensor:
    """As the docstring has it."""
    query, key, value = (x.transpose(1, 2) for x in heads)  # [B, 2 L, heads, D]
    length = arguments[0]
    key_indices, noisy, clean = block_varlen_arguments(*arguments, **options)
    assert key_indices.dtype == torch.int64
    keys, values = (x.flatten(0, 1)[key_indices] for x in (key, value))
    of_noisy, of_clean = (x.flatten(0, 1) for x in query.split(length, 1))
    halves = (
        flash_attn_varlen_func(of_noisy, keys, values, **noisy),
        flash_attn_varlen_func(of_clean, keys, values, **clean),
    )
    rows = len(query)
    return torch.cat([x.unflatten(0, (rows, length)) for x in halves], 1).transpose(1, 2)


@pytest.mark.parametrize("has_documents", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_varlen_is_dense_attention(seed, has_documents):
    packing = Packing(seed)
    arguments = packing.arguments if has_documents else packing.arguments[:2]
    heads = [x.requires_grad_() for x in of_heads(packing.rows, 2 * packing.seq_len)]
    mask = dense_block_mask(*arguments, rows=packing.rows)
    dense = F.scaled_dot_product_attention(*heads, attn_mask=mask)
    ours = attend_in_two_calls(heads, *arguments, rows=packing.rows)
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-12)
    wanted = torch.randn_like(dense)
    for got, expected in zip(
        torch.autograd.grad(ours, heads, wanted),
        torch.autograd.grad(dense, heads, wanted),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_number_of_gathered_keys():
    """Two of each token, and the blocks before each block."""
    key_indices, noisy, clean = block_varlen_arguments(512, 64, rows=3)
    assert len(key_indices) == 3 * (2 * 512 + 64 * (0 + 1 + 2 + 3 + 4 + 5 + 6 + 7))
    assert list(noisy) == ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    assert list(clean) == list(noisy)
    assert noisy["max_seqlen_q"] == 64 and noisy["max_seqlen_k"] == 512
    with pytest.raises(ValueError, match="blocks of 1 tokens have 2147581952 keys to gather: it"):
        block_varlen_arguments(1 << 16, 1)


def test_a_kept_mask_is_nobody_elses():
    def fresh() -> BlockMask:
        return block_mask(29, 5, block_size=8)

    expected = {name: getattr(fresh(), name).clone() for name in LISTS}
    before = _kept_tiles_of_one.cache_info().hits
    for name in LISTS:
        mask = fresh()
        getattr(mask, name).zero_()
        mask.mask_mod = mask.seq_lengths = None
        setattr(mask, name, None)
    again = fresh()
    assert _kept_tiles_of_one.cache_info().hits == before + len(LISTS) + 1
    assert again.seq_lengths == (58, 58) and callable(again.mask_mod)
    for name, wanted in expected.items():
        assert torch.equal(getattr(again, name), wanted)


def test_what_is_kept_has_values_and_gradients():
    """Also after a mask was asked for where tensors are of another kind."""
    _kept_tiles_of_one.cache_clear()
    with FakeTensorMode():
        assert block_mask(30, 5).shape == (1, 1, 60, 60)
    with torch.inference_mode():
        block_mask(30, 5)
    mask = block_mask(30, 5)
    assert type(mask.kv_indices) is Tensor and not mask.kv_indices.is_inference()
    with FakeTensorMode():
        assert type(block_mask(30, 5).kv_indices) is not Tensor


@pytest.mark.parametrize("seed", [1, 2, 3, None])
def test_a_gpu_is_not_waited_for(seed):
    """But by documents of FlashAttention, for how many keys there are."""
    packing = Packing(seed or 1)
    arguments = packing.arguments if seed else packing.arguments[:2]
    options = {"rows": packing.rows}
    with pretend_gpu() as gpu:
        of_gpu = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments]
        gpu.waits.clear()
        block = block_mask(*of_gpu, **options, device="cuda", block_size=8)
        dense = dense_block_mask(*of_gpu, **options, device="cuda")
        assert gpu.waits == []
        varlen = block_varlen_arguments(*of_gpu, **options, device="cuda")
        assert gpu.waits == (["Tensor.tolist"] if seed else [])
        assert block.kv_indices.device == dense.device == varlen.key_indices.device == DEVICE
    expected = block_mask(*arguments, **options, block_size=8)
    for name in LISTS:
        assert torch.equal(getattr(block, name).inner, getattr(expected, name))
    assert torch.equal(dense.inner, dense_block_mask(*arguments, **options))
    of_cpu = block_varlen_arguments(*arguments, **options)
    assert torch.equal(varlen.key_indices.inner, of_cpu.key_indices)
    for ours, wanted in ((varlen.noisy, of_cpu.noisy), (varlen.clean, of_cpu.clean)):
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            assert torch.equal(ours[name].inner, wanted[name])


@pytest.mark.seconds
@pytest.mark.parametrize("has_documents", [True, False])
def test_compiles_in_one_graph(has_documents):
    packing = Packing(1)
    arguments = packing.arguments if has_documents else packing.arguments[:2]
    compiled = torch.compile(block_mask, fullgraph=True, backend="eager")
    ours = compiled(*arguments, rows=packing.rows, block_size=8)
    expected = block_mask(*arguments, rows=packing.rows, block_size=8)
    assert all(torch.equal(getattr(ours, name), getattr(expected, name)) for name in LISTS)


@pytest.mark.parametrize("form", [block_mask, dense_block_mask, block_varlen_arguments])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((8, 0), {}, ValueError, r"block_length is 0: it must be in \[1, 8\], up to seq_len"),
        ((8, 9), {}, ValueError, r"block_length is 9: it must be in \[1, 8\], up to seq_len"),
        ((8, 2.0), {}, TypeError, "block_length is 2.0: it must be an int"),
        ((0, 1), {}, ValueError, "rows is 1 and seq_len is 0: both must be positive"),
        ((8, 2), {"rows": 0}, ValueError, "rows is 0 and seq_len is 8: both must be positive"),
        ((1 << 15, 2), {"rows": 1 << 15}, ValueError, r"less than 2\*\*31"),
        ((8, 2, None, torch.tensor([8])), {}, ValueError, "lengths are given without cu_seqlens"),
        ((8, 2, torch.tensor([0, 7])), {}, ValueError, "goes from 0 to 7: it must go from 0 to 8"),
        ((4, 2, torch.tensor([0, 5, 8])), {"rows": 2}, ValueError, "crosses the end of row 0"),
        ((8, 2, torch.tensor([0, 8]), torch.tensor([9])), {}, ValueError, r"lengths\[0\] is 9"),
        ((8, 2, [0, 8]), {}, TypeError, "cu_seqlens is list"),
        ((8, 2), {"device": "cuda:99"}, ValueError, "device is 'cuda:99', where no batch can go"),
        (
            (8, 2, torch.tensor([0, 8], device="meta")),
            {"device": "cpu"},
            ValueError,
            "device is cpu, but cu_seqlens is on meta: move it there",
        ),
    ],
)
def test_bad_arguments(form, arguments, options, error, message):
    with pytest.raises(error, match=message):
        form(*arguments, **options)


def test_bad_block_size():
    with pytest.raises(ValueError, match="block_size is 0: it must be positive"):
        block_mask(8, 2, block_size=0)
    with pytest.raises(TypeError, match="block_size is 1.5"):
        block_mask(8, 2, block_size=1.5)
