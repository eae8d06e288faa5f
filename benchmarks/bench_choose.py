"""Which positions a decoding step keeps: `choose`, beside what it replaces, noise and sort in
PyTorch (the backend `reference`), and beside a bare stable sort of the scores.

    python benchmarks/bench_choose.py [--device cuda] [--json FILE] [--dry-run]

Ten Philox rounds a position, or a quarter of that where positions are dense, are the limit with
noise; without, reading and writing 8 bytes a position. `--dry-run` is tiny; its figures are
meaningless.
"""

import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from measure import begin, make_parser, print_table, turns_ns, write_json

from nar_kernels.sampling.strategies import Candidates, Counts, StepNoise, UnmaskingPolicy

SHAPES = [(4, 256), (64, 1024), (8, 65536)]  # B, L
TINY = [(2, 16)]
OURS, EAGER, SORT = "choose", "PyTorch", "sort alone"
POLICIES = {
    "random": UnmaskingPolicy("random"),
    "confidence": UnmaskingPolicy(),
    "confidence with noise": UnmaskingPolicy(temperature=4.5),
}


def calls(policy: UnmaskingPolicy, batch: int, length: int, device: str) -> dict[str, Callable]:
    """One step with half of all positions left, by who computes it."""
    counts = np.array([[length] * batch, [length // 2] * batch])
    of_all, left = Counts.of(counts, torch.device(device))
    candidates = Candidates(torch.arange(batch * length, device=device), of_all)
    score = torch.randn(batch * length, generator=torch.Generator().manual_seed(0)).to(device)
    noise = StepNoise(1, 18, 3, length, range(batch))
    given = None if policy.order_is_fixed else score
    choose = partial(policy.choose, candidates, left, given, 0.5, noise)
    return {
        OURS: partial(choose, "auto"),
        EAGER: partial(choose, "reference"),
        SORT: lambda: score.view(batch, length).argsort(dim=1, descending=True, stable=True),
    }


def compare(batch: int, length: int, device: str, repeats: int) -> list[dict]:
    rows = []
    for name, policy in POLICIES.items():
        turns = turns_ns(calls(policy, batch, length, device), repeats, warm_up=2, device=device)
        ns = {who: statistics.median(times) for who, times in turns.items()}
        for who in ns:
            ratio = statistics.median(a / b for a, b in zip(turns[EAGER], turns[who], strict=True))
            rows.append(
                {
                    "strategy": name,
                    "who": who,
                    "us": ns[who] / 1e3,
                    "ns_per_position": ns[who] / (batch * length),
                    "times_eager": ratio,
                }
            )
    return rows


def main() -> None:
    parser = make_parser(__doc__, repeats=15)
    args = parser.parse_args()
    device, repeats, record = begin(parser, args)
    record["settings"] = []
    for batch, length in TINY if args.dry_run else SHAPES:
        rows = compare(batch, length, device, repeats)
        record["settings"].append({"batch": batch, "length": length, "rows": rows})
        print(f"B {batch}, L {length}\n")
        print_table(rows)
        write_json(args.json, record)


if __name__ == "__main__":
    main()
