"""CPU benchmark of masked batches from a disk: none of the file is in the page cache.

A loop takes a batch and then multiplies matrices for `--net-ms`, as a net on these cores would;
timed is what it waits for the batch. (A loop that sleeps instead would measure how PyTorch's
threads wake: milliseconds on machines of few cores, unless OMP_WAIT_POLICY is passive.) The
page cache is emptied of the file before each turn (Linux), so windows of 2 KB, in random order,
come from the disk. `--folder` must be on one.

* MaskedLoader: which notices that it waits for a disk, and asks for the pages of the next batch.
* without read-ahead: the same, with that switched off.
* nanoGPT: its `get_batch` and a mask.

    python benchmarks/bench_cold.py [--net-ms 20] [--json FILE]
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from bench_loader import BATCH, LENGTH, MASK_ID, MASKING, NUM_TOKENS, nano_gpt, write_corpus
from measure import begin, make_parser, print_table, write_json

from nar_kernels import MaskedLoader, TokenDataset

_ROUNDS = 3


def empty_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loader(path: Path, reads_ahead: bool) -> Callable[[], object]:
    dataset = TokenDataset(path, LENGTH, num_tokens=NUM_TOKENS, mask_id=MASK_ID, dtype="uint16")
    batches = MaskedLoader(dataset, MASKING, BATCH, outputs=("labels", "masked_rows"))
    if not reads_ahead:
        batches._residency.read_ahead = lambda starts, seq_len: None  # type: ignore[method-assign]
    return lambda: next(batches)


def waits_ms(next_batch: Callable[[], object], steps: int, net_ms: float) -> list[float]:
    """Of each step, how long it waits for its batch."""
    waits, weight = [], torch.randn(512, 512)
    for _ in range(steps):
        start = time.perf_counter()
        next_batch()
        waits.append((time.perf_counter() - start) * 1e3)
        end = time.perf_counter() + net_ms / 1e3
        while time.perf_counter() < end:
            weight @ weight
    return waits


def main() -> None:
    parser = make_parser(__doc__, repeats=100)
    parser.add_argument(
        "--folder", type=Path, help="of the file of 4 GB (default: a temporary one)"
    )
    parser.add_argument("--net-ms", type=float, default=20.0, help="a step beside its batch")
    args = parser.parse_args()
    _, steps, record = begin(parser, args, on_cpu=True)
    tokens = 2_000_000 if args.dry_run else 2_000_000_000
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        (path,) = write_corpus(Path(folder), tokens, 1)
        makes = {
            "MaskedLoader": lambda: loader(path, reads_ahead=True),
            "without read-ahead": lambda: loader(path, reads_ahead=False),
            "nanoGPT": lambda: nano_gpt(path, with_targets=True),
        }
        waits: dict[str, list[float]] = {name: [] for name in makes}
        for turn in range(_ROUNDS):
            torch.manual_seed(turn)
            for name, make in makes.items():
                next_batch = make()
                empty_cache(path)
                waits_ms(next_batch, min(steps, 16), args.net_ms)  # until the loader has noticed
                waits[name] += waits_ms(next_batch, steps, args.net_ms)
    rows = [
        {"batches of": name, "median ms": median(found), "mean ms": sum(found) / len(found)}
        for name, found in waits.items()
    ]
    print_table(rows)
    write_json(args.json, record | {"net_ms": args.net_ms, "rows": rows})


if __name__ == "__main__":
    main()
