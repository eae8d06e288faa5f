"""CPU benchmark of masking: `corrupt` against common implementations, in the same process.

Peers, each doing less than `corrupt`:

* x-transformers: the masking code of its wrapper at its default arguments (`peers.py`). No windows,
  no validation, no labels.
* bernoulli: `torch.rand(B, L) < t` only, as in masked diffusion code bases.

Columns named cold are of calls that take turns with x-transformers' masking, one at a time, as a
training loop calls: what a batch needs is then in no near cache. The others are of loops over one
function. `training` writes what `masked_nll` needs, in int32, into the memory of the batch before.

    python benchmarks/bench_corrupt.py [--tokens 65536] [--threads 1 2] [--json FILE]
"""

import argparse
import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch
from measure import SIMD_LEVELS, median_ns, processor
from peers import x_transformers_masking

from nar_kernels import Corrupted, MaskingConfig, backends, corrupt
from nar_kernels.ops.backends import cpp

NUM_TOKENS, MASK_ID = 8193, 8192
WARM_UP, TIMED = 5, 10  # calls per turn


def compare(length: int, tokens: int, repeats: int) -> dict[str, float]:
    """Median nanoseconds per token of each implementation."""
    batch = max(tokens // length, 1)
    corpus = torch.randint(0, MASK_ID, (batch * length * 4,)).to(torch.uint16)
    starts = torch.randint(0, len(corpus) - length + 1, (batch,))
    windows = torch.stack([corpus[s : s + length].to(torch.int64) for s in starts])
    plain = MaskingConfig(NUM_TOKENS, MASK_ID)
    same = MaskingConfig(
        NUM_TOKENS, MASK_ID, no_replace_prob=0.15, random_token_prob=0.1, corruption_prob=0.5
    )
    bernoulli = MaskingConfig(NUM_TOKENS, MASK_ID, draw="bernoulli")
    peer = x_transformers_masking(length, NUM_TOKENS, MASK_ID)
    ratio = torch.rand(batch, 1)
    last = None

    def ours(masking: MaskingConfig, **options: Any) -> Corrupted:
        return corrupt(corpus, masking, seed=1, starts=starts, seq_len=length, **options)

    def for_training() -> None:
        nonlocal last
        outputs = ("labels", "masked_rows")
        last = ours(same, outputs=outputs, ids_dtype=torch.int32, out=last)

    ns = median_ns(
        {
            "corrupt exact": lambda: ours(plain),
            "corrupt exact, keep + random": lambda: ours(same),
            "corrupt bernoulli": lambda: ours(bernoulli),
            "torch.rand < t": lambda: torch.rand(batch, length) < ratio,
            "x-transformers": lambda: peer(windows),
        },
        repeats,
        warm_up=WARM_UP,
        timed=TIMED,
    )
    cold = {"keep + random, cold": lambda: ours(same), "training, cold": for_training}
    for name, fn in cold.items():
        pair = {name: fn, f"x-transformers beside {name}": lambda: peer(windows)}
        ns |= median_ns(pair, repeats * TIMED, warm_up=0)
    return {name: of_call / (batch * length) for name, of_call in ns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536, help="tokens a batch")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15, help="turns of each")
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()

    assert cpp is not None, backends()["cpp"]
    # Memory traffic per token: reads 2 bytes of corpus; writes input_ids, labels, mask and half a
    # row index.
    bytes_per_token = 2 + 8 + 8 + 1 + 4
    rows = []
    best = cpp.simd_level()
    for level in range(best, -1, -1):
        cpp.limit_simd(level)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for length in args.lengths:
                ns = compare(length, args.tokens, args.repeats)
                ours = ns["corrupt exact, keep + random"]
                rows.append(
                    {
                        "simd": SIMD_LEVELS[level],
                        "threads": threads,
                        "length": length,
                        "ns_per_token": ns,
                        "gigabytes_per_second": bytes_per_token / ns["corrupt exact"],
                        "times_x_transformers": ns["x-transformers"] / ours,
                        "times_x_transformers_cold": {
                            name: ns[f"x-transformers beside {name}"] / ns[name]
                            for name in ("keep + random, cold", "training, cold")
                        },
                        "times_plain_bernoulli": ns["torch.rand < t"] / ns["corrupt exact"],
                    }
                )
    cpp.limit_simd(best)
    print(f"{processor()}, torch {torch.__version__}")
    print(f"{args.tokens} tokens a batch, medians of {TIMED * args.repeats} calls, ns a token\n")
    names = list(rows[0]["ns_per_token"])
    columns = ["GB/s", "vs x-transformers", "cold", "training, cold", "vs rand"]
    print("| SIMD | threads | L |", " | ".join([*names, *columns]), "|")
    print("|---" * (len(names) + len(columns) + 3) + "|")
    for row in rows:
        values = " | ".join(f"{row['ns_per_token'][name]:.2f}" for name in names)
        print(
            f"| {row['simd']} | {row['threads']} | {row['length']} | {values} "
            f"| {row['gigabytes_per_second']:.1f} | {row['times_x_transformers']:.0f} | "
            + " | ".join(f"{x:.0f}" for x in row["times_x_transformers_cold"].values())
            + f" | {row['times_plain_bernoulli']:.2f} |"
        )
    if args.json:
        record = {
            "date": datetime.date.today().isoformat(),
            "processor": processor(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tokens": args.tokens,
            "rows": rows,
        }
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
