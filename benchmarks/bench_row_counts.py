"""The loss of batches that mask different numbers of positions, in bfloat16 on a CPU: time, and
memory that stays.

    python benchmarks/bench_row_counts.py [--threads 2] [--batches 600] [--json FILE] [--dry-run]

Forward and backward of `masked_nll`, and of `F.cross_entropy` on the logits of the masked rows, on
the same batches, each in a process of its own. Their hidden states are float32, under autocast. The
first 100 batches are left out of the times. oneDNN compiles and keeps code for each shape of a
product, so with many shapes both grow.

`--dry-run` is tiny; its figures are meaningless.
"""

import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import (
    begin,
    in_fresh_process,
    in_this_process,
    make_parser,
    print_table,
    write_json,
)
from torch import Tensor

from nar_kernels import Corrupted, MaskingConfig, corrupt, masked_nll

B, L, D, V = 16, 256, 384, 1024
OURS, NAIVE = "masked_nll", "F.cross_entropy, masked rows"


def naive(hidden: Tensor, weight: Tensor, batch: Corrupted) -> Tensor:
    rows = batch.masked_rows
    logits = F.linear(hidden.flatten(0, 1).index_select(0, rows), weight).float()
    labels = batch.labels.flatten().index_select(0, rows)
    nll = F.cross_entropy(logits, labels, reduction="none")
    weights = batch.loss_weight.index_select(0, rows // L)
    return (weights * nll).sum() / batch.num_maskable.sum()


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def run(who: str, num_batches: int, left_out: int, threads: int) -> dict[str, float | str]:
    torch.set_num_threads(threads)
    loss = masked_nll if who == OURS else naive
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(V, D, generator=generator) / 50).requires_grad_()
    ids = torch.randint(0, V - 1, (B, L), generator=generator)
    masking = MaskingConfig(V, V - 1, times="uniform")
    us_per_row = []
    for step in range(num_batches):
        batch = corrupt(ids, masking, seed=1, sample_ids=range(B * step, B * (step + 1)))
        hidden = torch.randn(B, L, D, generator=generator, requires_grad=True)
        if step == 3:
            before = resident_bytes()
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(hidden, weight, batch)
        value.backward()
        us_per_row.append((time.perf_counter() - start) * 1e6 / len(batch.masked_rows))
    us = statistics.median(us_per_row[left_out:])
    return {"loss": who, "us_per_row": us, "grown_mb": (resident_bytes() - before) / 1e6}


def main() -> None:
    parser = make_parser(__doc__, repeats=1)
    parser.add_argument("--batches", type=int, default=600)
    args = parser.parse_args()
    _, _, record = begin(parser, args, on_cpu=True)
    num_batches, left_out = (8, 4) if args.dry_run else (args.batches, 100)
    apart = in_this_process if args.dry_run else in_fresh_process
    rows = [apart(run, who, num_batches, left_out, record["threads"]) for who in (OURS, NAIVE)]
    print_table(rows)
    write_json(args.json, {**record, "batches": num_batches, "rows": rows})


if __name__ == "__main__":
    main()
