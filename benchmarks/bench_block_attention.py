"""Block masks of block diffusion: `block_mask` against `create_block_mask`, which looks at all
pairs of positions, given document and block of each.

    python benchmarks/bench_block_attention.py [--device cuda] [--threads 2] [--json FILE]
                                               [--dry-run]

Milliseconds to a `BlockMask` of L noisy and L clean tokens with tiles of 128, blocks of 32 tokens.
Rows of one document are alike, so that `block_mask` keeps the lists: "again" is a call that finds
them. Documents are others in each step; their lengths are exponential, with a mean of 700. Eager
`create_block_mask` needs more than a byte for each pair; from 2**30 pairs on it is left out.
Compiled, it needs none, and is compiled before the first turn. Masks that differ are an error.

`--dry-run` is tiny and on the CPU. Its figures are meaningless.
"""

from collections.abc import Callable
from functools import partial

import torch
from bench_block_mask import EAGER_PAIRS, MakeMask, documents, figures, show
from measure import begin, make_parser, peers_may_fail, write_json
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from nar_kernels import block_mask
from nar_kernels.nets.block_attention import _kept_tiles_of_one

BLOCK_LENGTH = 32
# [B, L] of documents; of rows of one, whose masks have no batch dimension, [1, L].
OF_ONE = [(1, 1024), (1, 4096), (1, 16384)]
OF_DOCUMENTS = [(16, 1024), (4, 4096), (1, 16384)]
TINY_OF_ONE, TINY_OF_DOCUMENTS = [(1, 300)], [(2, 150)]
OURS, AGAIN = "block_mask", "block_mask, again"
EAGER, COMPILED = "create_block_mask", "create_block_mask, compiled"

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def afresh(length: int, device: str) -> BlockMask:
    _kept_tiles_of_one.cache_clear()
    return block_mask(length, BLOCK_LENGTH, device=device)


def by_definition(cu_seqlens: Tensor, shape: tuple[int, int]) -> MaskMod:
    """Given document and block of each token."""
    rows, length = shape
    positions = torch.arange(rows * length, dtype=torch.int32, device=cu_seqlens.device)
    ids = torch.searchsorted(cu_seqlens, positions, right=True, out_int32=True) - 1
    blocks = (positions - cu_seqlens[ids]) // BLOCK_LENGTH
    document, block = (x.view(shape).repeat(1, 2) for x in (ids, blocks))

    def attends(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q_block, k_block = block[b, q], block[b, k]
        in_block = (q_block == k_block) & (q < length) & (k < length)
        before = (q_block > k_block) & (q < length) & (k >= length)
        of_clean = (q_block >= k_block) & (q >= length) & (k >= length)
        return (document[b, q] == document[b, k]) & (in_block | before | of_clean)

    return attends


def makers(shape: tuple[int, int], has_documents: bool, device: str) -> dict[str, MakeMask]:
    rows, length = shape
    if has_documents:
        cu_seqlens = documents(shape, device)
        ours = {OURS: partial(block_mask, length, BLOCK_LENGTH, cu_seqlens, rows=rows)}
    else:
        again = partial(block_mask, length, BLOCK_LENGTH, device=device)
        ours = {OURS: partial(afresh, length, device), AGAIN: again}
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=device)
    attends = by_definition(cu_seqlens, shape)
    sizes = (rows, None, 2 * length, 2 * length)
    compiled = torch.compile(create_block_mask, dynamic=False)
    peers = {
        EAGER: partial(create_block_mask, attends, *sizes, device=device),
        COMPILED: partial(compiled, attends, *sizes, device=device),
    }
    if rows * (2 * length) ** 2 >= EAGER_PAIRS:
        del peers[EAGER]
    return peers_may_fail(ours | peers, set(peers))


def compare(shape: tuple[int, int], has_documents: bool, device: str, repeats: int) -> dict:
    torch.compiler.reset()
    calls = makers(shape, has_documents, device)
    return figures(calls, device, repeats, shape=shape, documents=has_documents)


def main() -> None:
    parser = make_parser(__doc__, repeats=7)
    args = parser.parse_args()
    device, repeats, record = begin(parser, args)
    record["settings"] = []
    of_one = [(shape, False) for shape in (TINY_OF_ONE if args.dry_run else OF_ONE)]
    packed = [(shape, True) for shape in (TINY_OF_DOCUMENTS if args.dry_run else OF_DOCUMENTS)]
    for shape, has_documents in of_one + packed:
        result = compare(shape, has_documents, device, repeats)
        record["settings"].append(result)
        show(result, "documents" if has_documents else "rows of one document")
        write_json(args.json, record)


if __name__ == "__main__":
    main()
