"""Block masks of packed documents: `flex_block_mask`, from where documents begin, against
`create_block_mask`, which looks at all pairs of positions, given the document of each.

    python benchmarks/bench_block_mask.py [--device cuda] [--threads 2] [--json FILE] [--dry-run]

Milliseconds from `cu_seqlens` to a `BlockMask` with tiles of 128, as once a training step. Eager
`create_block_mask` needs more than a byte for each pair; from 2**30 pairs on it is left out.
Compiled, it needs none: `torch.compile(create_block_mask, dynamic=False)`, compiled before the
first turn. Masks that differ are an error. Lengths of documents are exponential, with a mean of
700.

`--dry-run` is tiny and on the CPU. Its figures are meaningless.
"""

from collections.abc import Callable
from functools import partial

import torch
from measure import begin, make_parser, median_ns, peers_may_fail, print_table, write_json
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from nar_kernels import flex_block_mask

# A batch as rows [B, L], or flat [T].
SHAPES = [(64, 1024), (16, 4096), (4, 16384), (16384,), (65536,)]
TINY = [(2, 300), (600,)]
OURS, EAGER, COMPILED = "flex_block_mask", "create_block_mask", "create_block_mask, compiled"
MEAN_LENGTH = 700
EAGER_PAIRS = 1 << 30

MakeMask = Callable[[], BlockMask]


def documents(shape: tuple[int, ...], device: str) -> Tensor:
    """cu_seqlens of a batch without padding."""
    total = shape[0] * shape[-1] if len(shape) == 2 else shape[0]
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(4 * total // MEAN_LENGTH + 4, generator=generator)
    ends = (-MEAN_LENGTH * uniform.log()).ceil().cumsum(0).long()
    begins = torch.cat((torch.arange(0, total + 1, shape[-1]), ends[ends < total])).unique()
    return begins.to(device, torch.int32)


def by_pairs(create: MakeMask, cu_seqlens: Tensor, shape: tuple[int, ...]) -> BlockMask:
    rows, length = (1, *shape)[-2:]
    positions = torch.arange(rows * length, dtype=torch.int32, device=cu_seqlens.device)
    ids = torch.searchsorted(cu_seqlens, positions, right=True, out_int32=True).view(rows, length)

    def same_document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ids[b, q] == ids[b, k]

    return create(same_document, rows, None, length, length, device=cu_seqlens.device)


def makers(cu_seqlens: Tensor, shape: tuple[int, ...]) -> dict[str, MakeMask]:
    compiled = torch.compile(create_block_mask, dynamic=False)
    found = {
        OURS: partial(flex_block_mask, cu_seqlens, shape=shape),
        EAGER: partial(by_pairs, create_block_mask, cu_seqlens, shape),
        COMPILED: partial(by_pairs, compiled, cu_seqlens, shape),
    }
    rows, length = (1, *shape)[-2:]
    if rows * length**2 >= EAGER_PAIRS:
        del found[EAGER]
    return peers_may_fail(found, {EAGER, COMPILED})


def check(masks: dict[str, BlockMask]) -> None:
    for name in ("kv_num_blocks", "full_kv_num_blocks", "kv_indices", "full_kv_indices"):
        ours, *others = (getattr(mask, name) for mask in masks.values())
        if not all(torch.equal(ours, other) for other in others):
            raise SystemExit(f"masks differ in {name}")


def figures(calls: dict[str, MakeMask], device: str, repeats: int, **setting: object) -> dict:
    """Figures of masks that are equal, of which the first is ours, and of their tiles."""
    made = {name: make() for name, make in calls.items()}
    check(made)
    ns = median_ns(calls, repeats, device=device)
    ours, mask = next(iter(made.items()))
    rows = [
        {"mask": name, "ms": ns[name] / 1e6, "times ours": ns[name] / ns[ours]} for name in calls
    ]
    return {
        **setting,
        "tiles": mask.to_dense().numel(),
        "partial": int(mask.kv_num_blocks.sum()),
        "full": int(mask.full_kv_num_blocks.sum()),
        "rows": rows,
    }


def show(result: dict, what: str) -> None:
    print(
        f"{list(result['shape'])}, {what}; of {result['tiles']} tiles {result['full']} are full, "
        f"{result['partial']} partial\n"
    )
    print_table(result["rows"])


def compare(shape: tuple[int, ...], device: str, repeats: int) -> dict:
    torch.compiler.reset()
    cu_seqlens = documents(shape, device)
    calls = makers(cu_seqlens, shape)
    return figures(calls, device, repeats, shape=shape, documents=len(cu_seqlens) - 1)


def main() -> None:
    parser = make_parser(__doc__, repeats=7)
    args = parser.parse_args()
    device, repeats, record = begin(parser, args)
    record["settings"] = []
    for shape in TINY if args.dry_run else SHAPES:
        result = compare(shape, device, repeats)
        record["settings"].append(result)
        show(result, f"{result['documents']} documents")
        write_json(args.json, record)


if __name__ == "__main__":
    main()
