"""`cart_weights`, whose work is proportional to the number of positions, against the matrix of all
pairs of positions of a row, as other codes have it.

    python benchmarks/bench_cart.py [--device cuda] [--threads 2] [--json FILE] [--dry-run]

"matrix, made" makes the `[L, L]` matrix at each call, as dllm does; "matrix, kept" makes it once,
as Dream does, and only multiplies. "with documents": sums begin anew at each, which a matrix for
all rows cannot do. Half of all positions are masked. Weights that differ are an error.

`--dry-run` is tiny and on the CPU. Its figures are meaningless.
"""

from collections.abc import Callable
from functools import partial

import torch
from measure import begin, make_parser, median_ns, print_table, write_json
from torch import Tensor

from nar_kernels import cart_weights

SHAPES, TINY = [(64, 1024), (16, 4096), (8, 8192)], [(2, 40)]  # [B, L]
PS = (0.8, 0.3)
OURS, DOCUMENTS = "cart_weights", "cart_weights, with documents"
MADE, KEPT = "matrix, made", "matrix, kept"


def pairs(length: int, p: float, device: str) -> Tensor:
    position = torch.arange(length, device=device)
    distance = (position[:, None] - position).abs().float()
    return (p / 2 * (1 - p) ** (distance - 1)).fill_diagonal_(0)


def from_matrix(masked: Tensor, matrix: Callable[[], Tensor]) -> Tensor:
    return ((~masked).float() @ matrix()) * masked


def calls(masked: Tensor, p: float, device: str) -> dict[str, Callable[[], Tensor]]:
    kept = pairs(masked.shape[1], p, device)
    middles = masked.shape[1] // 2
    bounds = torch.arange(0, masked.numel() + 1, middles, dtype=torch.int32, device=device)
    return {
        OURS: partial(cart_weights, masked, p),
        DOCUMENTS: partial(cart_weights, masked, p, cu_seqlens=bounds),
        KEPT: partial(from_matrix, masked, lambda: kept),
        MADE: partial(from_matrix, masked, partial(pairs, masked.shape[1], p, device)),
    }


def compare(shape: tuple[int, int], p: float, device: str, repeats: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    masked = (torch.rand(shape, generator=generator) < 0.5).to(device)
    all_calls = calls(masked, p, device)
    difference = (all_calls[OURS]() - all_calls[KEPT]()).abs().max().item()
    if not difference < 1e-6:
        raise SystemExit(f"weights differ by {difference}")
    ns = median_ns(all_calls, repeats, device=device)
    rows = [
        {"weights": name, "ms": ns[name] / 1e6, "times ours": ns[name] / ns[OURS]}
        for name in all_calls
    ]
    return {"shape": shape, "p": p, "greatest_difference": difference, "rows": rows}


def main() -> None:
    parser = make_parser(__doc__, repeats=7)
    args = parser.parse_args()
    device, repeats, record = begin(parser, args)
    record["settings"] = []
    for shape in TINY if args.dry_run else SHAPES:
        for p in PS:
            result = compare(shape, p, device, repeats)
            record["settings"].append(result)
            print(f"{list(shape)}, p = {p}\n")
            print_table(result["rows"])
            write_json(args.json, record)


if __name__ == "__main__":
    main()
