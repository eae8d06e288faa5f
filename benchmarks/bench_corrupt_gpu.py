"""GPU benchmark of `corrupt`: memory and bus bandwidth, host overhead, and x-transformers' masking
on the same GPU, in the same process.

* large batches: bytes moved (read: 2 of corpus per token; written: 8 of input_ids, 8 of labels, 1
  of mask, and 8 of row index per masked token) over time, as a fraction of copy bandwidth;
* a small batch (64 x 1024): GPU time in a replayed CUDA graph, and host time per call;
* a corpus in pinned memory: bytes read over the bus, as a fraction of host-to-device copy
  bandwidth.

    python benchmarks/bench_corrupt_gpu.py [--backend cuda triton] [--json FILE] [--dry-run]

`--dry-run` needs no GPU: tiny batches, Triton's interpreter, an emulation of CUDA, and the host's
clock. Its figures are meaningless.
"""
# ruff: noqa: E402

import argparse
import datetime
import importlib.util
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DRY_RUN = "--dry-run" in sys.argv
if DRY_RUN:  # before Triton and nar_kernels are imported
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ["TRITON_INTERPRET"] = "1"
    from tests import cuda_on_cpu

    emulated = cuda_on_cpu.load()
    if emulated is not None:
        sys.modules["nar_kernels._cuda"] = emulated

import torch
from torch import Tensor

from nar_kernels import Corrupted, MaskedLoader, MaskingConfig, TokenDataset, backends, corrupt

DEVICE = "cpu" if DRY_RUN else "cuda"
NUM_TOKENS, MASK_ID = 8193, 8192
LARGE = 1 << 7 if DRY_RUN else 1 << 26  # tokens a batch
LENGTHS = (64,) if DRY_RUN else (256, 1024, 4096, 16384, 32768)
SMALL = (1, 32) if DRY_RUN else (64, 1024)
COPY_BYTES = 1 << 20 if DRY_RUN else 1 << 32
REPEATS = 1 if DRY_RUN else 20
HOST_CALLS = 1 if DRY_RUN else 200  # too few to fill the launch queue
GRAPH_CALLS = 1 if DRY_RUN else 20
LARGE_CALLS = 1 if DRY_RUN else 4  # the host is done with the next before the GPU is with the last

MASKINGS = {
    "exact": MaskingConfig(NUM_TOKENS, MASK_ID),
    "exact, keep + random": MaskingConfig(
        NUM_TOKENS, MASK_ID, no_replace_prob=0.1, random_token_prob=0.1
    ),
    "bernoulli": MaskingConfig(NUM_TOKENS, MASK_ID, draw="bernoulli"),
}


def synchronize() -> None:
    if not DRY_RUN:
        torch.cuda.synchronize()


def median_us(fn: Callable[[], object], calls: int = 1, repeats: int = REPEATS) -> float:
    """Median microseconds per call over runs of ``calls`` calls, by CUDA events."""
    fn()
    times = []
    for _ in range(repeats):
        synchronize()
        if DRY_RUN:
            start = time.perf_counter()
            for _ in range(calls):
                fn()
            times.append((time.perf_counter() - start) * 1e6 / calls)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            fn()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def host_us(fn: Callable[[], object]) -> float:
    """Host overhead: microseconds until a call returns."""
    times = []
    for _ in range(REPEATS):
        synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            fn()
        times.append((time.perf_counter() - start) * 1e6 / HOST_CALLS)
    return statistics.median(times)


def graph_us(fn: Callable[[], object]) -> float:
    """Microseconds per call in a CUDA graph: GPU time without host overhead."""
    fn()
    if DRY_RUN:
        return median_us(fn)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            fn()
    return median_us(graph.replay) / GRAPH_CALLS


def bandwidths() -> dict[str, float]:
    """GB/s of copies: on the device (bytes read and written), and host to device (bytes read)."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    host = torch.empty(COPY_BYTES // 4, dtype=torch.uint8, pin_memory=not DRY_RUN)
    bus = target[: host.numel()]
    return {
        "copy": 2 * COPY_BYTES / median_us(lambda: target.copy_(source)) / 1e3,
        "bus": host.numel() / median_us(lambda: bus.copy_(host, non_blocking=True)) / 1e3,
    }


def bytes_moved(batch: Corrupted) -> int:
    return batch.input_ids.numel() * (2 + 8 + 8 + 1) + 8 * int(batch.num_masked.sum())


def corpus_of(tokens: int) -> Tensor:
    return torch.randint(0, MASK_ID, (tokens,)).to(torch.uint16)


def large_batches(backend: str, speeds: dict[str, float]) -> Iterator[dict]:
    corpus = corpus_of(2 * LARGE).to(DEVICE)
    for length in LENGTHS:
        starts = torch.randint(0, len(corpus) - length + 1, (LARGE // length,), device=DEVICE)
        for name, masking in MASKINGS.items():

            def run(masking: MaskingConfig = masking, length: int = length, starts=starts):
                return corrupt(
                    corpus, masking, seed=1, starts=starts, seq_len=length, backend=backend
                )

            us = median_us(run, LARGE_CALLS)
            rate = bytes_moved(run()) / us / 1e3
            yield {
                "what": f"{LARGE} tokens, L {length}, {name}",
                "us": us,
                "ns_per_token": us * 1e3 / LARGE,
                "gigabytes_per_second": rate,
                "share_of_copy": rate / speeds["copy"],
            }


def small_batch(backend: str, speeds: dict[str, float]) -> Iterator[dict]:
    batch, length = SMALL
    corpus = corpus_of(1 << 20).to(DEVICE)
    starts = torch.randint(0, len(corpus) - length + 1, (batch,), device=DEVICE)
    dataset = TokenDataset(corpus.cpu(), length, num_tokens=NUM_TOKENS, mask_id=MASK_ID)
    for name, masking in MASKINGS.items():
        loader = MaskedLoader(dataset, masking, batch, device=DEVICE, backend=backend)
        ops = {
            "corrupt": lambda masking=masking: corrupt(
                corpus, masking, seed=1, starts=starts, seq_len=length, backend=backend
            ),
            "MaskedLoader": lambda loader=loader: loader.batch(1),
        }
        for op, run in ops.items():
            row = {"what": f"{op}, {batch} x {length}, {name}", "host_us": host_us(run)}
            if op == "corrupt":  # the loader's check on the host cannot be captured in a graph
                row["gpu_us"] = graph_us(run)
            yield row


def pinned(backend: str, speeds: dict[str, float]) -> Iterator[dict]:
    corpus = corpus_of(LARGE)
    if not DRY_RUN:
        corpus = corpus.pin_memory()
    for length in LENGTHS:
        starts = torch.arange(0, LARGE, length, device=DEVICE)
        us = median_us(
            lambda length=length, starts=starts: corrupt(
                corpus, MASKINGS["exact"], seed=1, starts=starts, seq_len=length, backend=backend
            ),
            LARGE_CALLS,
        )
        rate = corpus.nbytes / us / 1e3
        yield {
            "what": f"pinned corpus, {LARGE} tokens, L {length}, exact",
            "us": us,
            "gigabytes_per_second": rate,
            "share_of_bus": rate / speeds["bus"],
        }


def peer_us(batch: int, length: int, calls: int) -> float:
    from peers import x_transformers_masking

    windows = torch.randint(0, MASK_ID, (batch, length), device=DEVICE)
    peer = x_transformers_masking(length, NUM_TOKENS, MASK_ID, DEVICE)
    return median_us(lambda: peer(windows), calls, repeats=min(REPEATS, 5))


def compared(backend: str, speeds: dict[str, float]) -> Iterator[dict]:
    """The same work as x-transformers at its defaults, each through its public API."""
    masking = MaskingConfig(
        NUM_TOKENS, MASK_ID, no_replace_prob=0.15, random_token_prob=0.1, corruption_prob=0.5
    )
    for batch, length in (SMALL, (-(-LARGE // (16 * 1024)), 1024)):
        windows = torch.randint(0, MASK_ID, (batch, length), device=DEVICE)
        ours = median_us(
            lambda windows=windows: corrupt(windows, masking, seed=1, backend=backend), GRAPH_CALLS
        )
        theirs = peer_us(batch, length, calls=5)
        yield {
            "what": f"against x-transformers, {batch} x {length}",
            "us": ours,
            "x_transformers_us": theirs,
            "times_x_transformers": theirs / ours,
        }


def show(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backend", nargs="+", choices=("cuda", "triton"), default=["cuda", "triton"]
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--dry-run", action="store_true", help="tiny batches on the CPU")
    arguments = parser.parse_args()
    if not DRY_RUN and not torch.cuda.is_available():
        parser.exit(1, "PyTorch sees no CUDA device; --dry-run needs none\n")

    speeds = bandwidths()
    has_peer = importlib.util.find_spec("x_transformers") is not None
    record = {
        "date": datetime.date.today().isoformat(),
        "dry_run": DRY_RUN,
        "device": "none" if DRY_RUN else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gigabytes_per_second": speeds,
        "rows": [],
    }
    print(f"{record['device']}, torch {torch.__version__}")
    print(", ".join(f"{name} {show(speed)} GB/s" for name, speed in speeds.items()))
    if not has_peer:
        print("x-transformers is not installed: no comparison with it")
    for backend in arguments.backend:
        if backends()[backend] != "available":
            parser.exit(1, f"{backend}: {backends()[backend]}\n")
        parts = [small_batch, large_batches, pinned] + ([compared] if has_peer else [])
        for row in itertools.chain.from_iterable(part(backend, speeds) for part in parts):
            print(backend, "|", " | ".join(f"{key} {show(value)}" for key, value in row.items()))
            record["rows"].append({"backend": backend, **row})
            if arguments.json:  # after each row: the next may crash or hang
                arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
