"""Attention within documents: one description, three forms, the same result at every position."""

import inspect
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from nar_kernels import dense_mask, flex_block_mask, varlen_arguments
from tests.helpers.pretend_gpu import DEVICE, pretend_gpu

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

BLOCKS = (
    *("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
    *("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"),
)


def row_of_documents(rng: random.Random, length: int, block_size: int) -> list[int]:
    """Extents of documents that fill a row: empty ones, of one token, longer than a tile, and up to
    the end of a tile."""
    extents, left = [], length
    while left:
        to_edge = block_size - (length - left) % block_size
        choices = (0, 1, 2, to_edge, to_edge + block_size, rng.randint(1, 3 * block_size), left)
        extents.append(min(rng.choice(choices), left))
        left -= extents[-1]
    return extents


def packing(seed: int, block_size: int = 8) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
    """cu_seqlens, lengths and shape: every third without padding, every other one flat."""
    rng = random.Random(seed)
    rows, length = rng.randint(1, 4), rng.randint(1, 6 * block_size)
    extents = [e for _ in range(rows) for e in row_of_documents(rng, length, block_size)]
    cu_seqlens = torch.tensor([0, *extents]).cumsum(0).to(torch.int32)
    lengths = torch.tensor([rng.choice((0, e, rng.randint(0, e))) for e in extents])
    shape = (rows * length,) if seed % 2 else (rows, length)
    return cu_seqlens, None if seed % 3 == 0 else lengths, shape


def segment_of(cu_seqlens: Tensor, lengths: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """`[B, L]`: which segment each position is in, one after the other."""
    extents = cu_seqlens.diff().tolist()
    held = extents if lengths is None else lengths.tolist()
    ids = []
    for document, (extent, length) in enumerate(zip(extents, held, strict=True)):
        ids += [2 * document] * length + [2 * document + 1] * (extent - length)
    return torch.tensor(ids).view(-1, shape[-1])


@pytest.mark.parametrize("block_size", [1, 8])
@pytest.mark.parametrize("seed", range(60))
def test_block_mask_is_that_of_create_block_mask(seed, block_size):
    cu_seqlens, lengths, shape = packing(seed, block_size)
    ids = segment_of(cu_seqlens, lengths, shape)
    rows, length = ids.shape

    def by_pairs(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ids[b, q] == ids[b, k]

    expected = create_block_mask(
        by_pairs, rows, None, length, length, device="cpu", BLOCK_SIZE=block_size
    )
    ours = flex_block_mask(cu_seqlens, lengths, shape=shape, block_size=block_size)
    assert ours.shape == expected.shape and ours.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in BLOCKS:  # also what comes after the counts, which nobody reads
        got, wanted = getattr(ours, name), getattr(expected, name)
        assert got.dtype == wanted.dtype and torch.equal(got, wanted), name
        assert got.is_contiguous()
    assert torch.equal(ours.to_dense(), expected.to_dense())
    pairs = create_mask(ours.mask_mod, rows, None, length, length, device="cpu")
    assert torch.equal(pairs, create_mask(by_pairs, rows, None, length, length, device="cpu"))
    assert torch.equal(dense_mask(cu_seqlens, lengths, shape=shape).view_as(pairs), pairs)


def test_packings_have_tiles_of_every_kind():
    """Else the test above would say less than it seems to."""
    masks = [flex_block_mask(*packing(s)[:2], shape=packing(s)[2], block_size=8) for s in range(60)]
    assert sum(int(m.full_kv_num_blocks.sum()) for m in masks) > 100
    assert sum(int(m.kv_num_blocks.sum()) for m in masks) > 100
    assert any((m.full_kv_num_blocks > 1).any() for m in masks)  # documents longer than a tile
    assert any((1 - m.to_dense()).any() for m in masks)
    assert any(m.shape[-1] % 8 for m in masks) and any(m.shape[-1] % 8 == 0 for m in masks)


def attend_by_segment(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int
) -> Tensor:
    """What `flash_attn_varlen_func` does where queries and keys are the same: `[T, heads, D]`."""
    out = torch.full_like(query, torch.nan)
    for begin, end in itertools.pairwise(bounds.tolist()):
        segment = slice(begin, min(end, begin + longest))
        q, k, v = (x[segment].transpose(0, 1) for x in (query, key, value))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        out[segment] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out


def of_heads(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, length = (1, *shape)[-2:]
    return [torch.randn(rows, 2, length, 16, dtype=dtype, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("seed", range(12))
def test_three_forms_are_equal(seed):
    """In float64. Uncompiled, flex_attention reads the mask function alone, not the tiles."""
    cu_seqlens, lengths, shape = packing(seed)
    query, key, value = of_heads(shape, torch.float64)
    dense = F.scaled_dot_product_attention(
        query, key, value, attn_mask=dense_mask(cu_seqlens, lengths, shape=shape)
    )
    block_mask = flex_block_mask(cu_seqlens, lengths, shape=shape, block_size=8)
    flex = flex_attention(query, key, value, block_mask=block_mask)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    arguments = varlen_arguments(cu_seqlens, lengths, shape=shape)
    assert list(arguments) == ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    bounds, longest = arguments["cu_seqlens_q"], arguments["max_seqlen_q"]
    assert bounds.dtype == torch.int32 and torch.equal(arguments["cu_seqlens_k"], bounds)
    by_segment = attend_by_segment(*flat, bounds, longest)
    torch.testing.assert_close(flex, dense, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        by_segment.view_as(query.transpose(1, 2)), dense.transpose(1, 2), rtol=0, atol=1e-14
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(300,), (2, 150)])
def test_compiled_flex_attention_reads_the_tiles(shape):
    """It skips what the tiles leave out. On the CPU it has float32, and no gradients."""
    cu_seqlens = torch.tensor([0, 1, 128, 150, 150, 160, 300], dtype=torch.int32)
    lengths = torch.tensor([1, 100, 22, 0, 10, 139])
    query, key, value = of_heads(shape, torch.float32)
    block_mask = flex_block_mask(cu_seqlens, lengths, shape=shape, block_size=16)
    assert block_mask.full_kv_num_blocks.sum() > 0 and not block_mask.to_dense().all()
    with torch.no_grad():
        flex = torch.compile(flex_attention)(query, key, value, block_mask=block_mask)
    dense = F.scaled_dot_product_attention(
        query, key, value, attn_mask=dense_mask(cu_seqlens, lengths, shape=shape)
    )
    torch.testing.assert_close(flex, dense)


def test_varlen_attn_takes_the_arguments_in_order():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    names = list(inspect.signature(varlen.varlen_attn).parameters)
    assert names[3:7] == ["cu_seq_q", "cu_seq_k", "max_q", "max_k"]


def test_max_seqlen():
    cu_seqlens = torch.tensor([0, 6, 6, 10])
    lengths = torch.tensor([1, 0, 4], dtype=torch.int32)

    def longest(lengths=None, **options):
        arguments = varlen_arguments(cu_seqlens, lengths, **options)
        assert arguments["max_seqlen_q"] == arguments["max_seqlen_k"]
        return arguments["max_seqlen_q"]

    assert longest(shape=(10,)) == 10
    assert longest(shape=(10,), max_seqlen=6) == 6
    assert longest(lengths, shape=(10,), max_seqlen=5) == 5
    with pytest.raises(ValueError, match="max_seqlen is 5, but a segment has 6 positions"):
        longest(shape=(10,), max_seqlen=5)
    with pytest.raises(ValueError, match="max_seqlen is 4, but a segment has 5 positions"):
        longest(lengths, shape=(10,), max_seqlen=4)  # the gap
    with pytest.raises(ValueError, match=r"max_seqlen is 11: it must be in \[1, 10\]"):
        longest(shape=(10,), max_seqlen=11)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_a_gpu_is_not_waited_for(seed):
    cu_seqlens, lengths, shape = packing(seed)
    with pretend_gpu() as gpu:
        cu = cu_seqlens.to(DEVICE)
        of_gpu = None if lengths is None else lengths.to(DEVICE)
        gpu.waits.clear()
        block_mask = flex_block_mask(cu, of_gpu, shape=shape, block_size=8)
        dense = dense_mask(cu, of_gpu, shape=shape)
        arguments = varlen_arguments(cu, of_gpu, shape=shape)
        assert gpu.waits == []
        assert block_mask.kv_indices.device == dense.device == DEVICE
    expected = flex_block_mask(cu_seqlens, lengths, shape=shape, block_size=8)
    for name in BLOCKS:
        assert torch.equal(getattr(block_mask, name).inner, getattr(expected, name))
    assert torch.equal(dense.inner, dense_mask(cu_seqlens, lengths, shape=shape))
    bounds = varlen_arguments(cu_seqlens, lengths, shape=shape)["cu_seqlens_q"]
    assert torch.equal(arguments["cu_seqlens_q"].inner, bounds)


@pytest.mark.seconds
def test_compiles_in_one_graph():
    cu_seqlens, lengths, shape = packing(1)
    compiled = torch.compile(flex_block_mask, fullgraph=True, backend="eager")
    ours = compiled(cu_seqlens, lengths, shape=shape, block_size=8)
    expected = flex_block_mask(cu_seqlens, lengths, shape=shape, block_size=8)
    assert all(torch.equal(getattr(ours, name), getattr(expected, name)) for name in BLOCKS)


@pytest.mark.parametrize("form", [flex_block_mask, varlen_arguments, dense_mask])
@pytest.mark.parametrize(
    ("cu_seqlens", "lengths", "shape", "error", "message"),
    [
        ([0, 4, 3, 8], None, (8,), ValueError, r"cu_seqlens\[2\] is 3, after 4: documents must"),
        ([0, 4, 7], None, (8,), ValueError, "goes from 0 to 7: it must go from 0 to 8"),
        ([1, 4, 8], None, (8,), ValueError, "goes from 1 to 8"),
        ([0, 5, 8], None, (2, 4), ValueError, "document 0, from 0 to 5, crosses .* row 0 at 4"),
        ([0, 4, 4, 9, 12], None, (3, 4), ValueError, "document 2, from 4 to 9, crosses .* row 1"),
        ([0, 4, 8], [4, 5], (8,), ValueError, r"lengths\[1\] is 5: it must be in \[0, 4\]"),
        ([0, 4, 8], [-1, 4], (8,), ValueError, r"lengths\[0\] is -1"),
        ([0, 4, 8], [4], (8,), ValueError, r"lengths is \[1\]: it must be \[2\]"),
        ([0, 4, 8], [1.0, 2.0], (8,), TypeError, "lengths is torch.float32: it must be"),
        ([0.0, 8.0], None, (8,), TypeError, "cu_seqlens is torch.float32: it must be"),
        ([[0, 8]], None, (8,), ValueError, r"cu_seqlens is \[1, 2\]: it must be \[n \+ 1\]"),
        ([0], None, (8,), ValueError, "cu_seqlens has no document"),
        ([0, 8], None, (2, 2, 2), ValueError, r"shape is \(2, 2, 2\): it must be \(T,\) or"),
        ([0, 8], None, (0,), ValueError, "of positive sizes"),
        ([0, 8], None, (1 << 16, 1 << 15), ValueError, r"less than 2\*\*31"),
        ([0, 8], None, (8.0,), TypeError, "shape is 8.0"),
    ],
)
def test_bad_documents(form, cu_seqlens, lengths, shape, error, message):
    with pytest.raises(error, match=message):
        lengths = None if lengths is None else torch.tensor(lengths)
        form(torch.tensor(cu_seqlens), lengths, shape=shape)


def test_bad_arguments():
    with pytest.raises(TypeError, match="cu_seqlens is list"):
        dense_mask([0, 8], shape=(8,))
    with pytest.raises(TypeError, match="shape is 8: it must be"):
        dense_mask(torch.tensor([0, 8]), shape=8)
    with pytest.raises(ValueError, match="block_size is 0"):
        flex_block_mask(torch.tensor([0, 8]), shape=(8,), block_size=0)
    lengths = torch.tensor([8], device="meta")
    with pytest.raises(ValueError, match="lengths is on meta, but cu_seqlens on cpu"):
        dense_mask(torch.tensor([0, 8]), lengths, shape=(8,))
