"""Shared by benchmarks: timing, peak memory, machine info, tables, bar charts."""

import argparse
import ctypes
import datetime
import gc
import json
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from nar_kernels.ops.backends import cpp
from nar_kernels.show import pictures

# Of bench_unmask, and of what `benchmarks.gpu_code` predicts for it.
LOGIT_STD, TEMPERATURE = 2.0, 0.5


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.exists() and re.search(r"model name\s*: (.+)", cpuinfo.read_text())
    return found[1] if found else platform.processor() or platform.machine()


SIMD_LEVELS = {2: "AVX-512", 1: "AVX2", 0: "plain C++"}


def instruction_set() -> str | None:
    """The SIMD level that the C++ extension uses on this processor; None without the extension."""
    return None if cpp is None else SIMD_LEVELS[cpp.simd_level()]


def environment(device: str, **more: Any) -> dict[str, Any]:
    """The header of a results file."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({} if device == "cuda" else {"simd": instruction_set()}),
        **more,
    }


def make_parser(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """An argument parser with the options shared by all comparisons."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=repeats, help="turns of each")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    return parser


def begin(
    parser: argparse.ArgumentParser, args: argparse.Namespace, on_cpu: bool = False
) -> tuple[str, int, dict[str, Any]]:
    """Sets the number of threads; returns the device, the number of turns, and the results header,
    which is printed.

    The device is the CPU in a dry run and with ``on_cpu``.
    """
    device = "cpu" if args.dry_run or on_cpu else args.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "PyTorch sees no CUDA device; --dry-run needs none\n")
    threads, repeats = (1, 1) if args.dry_run else (args.threads, args.repeats)
    torch.set_num_threads(threads)
    record = environment(device, threads=threads, repeats=repeats, dry_run=args.dry_run)
    print(f"{record['device']}, torch {torch.__version__}, {threads} threads, {repeats} turns\n")
    return device, repeats, record


def write_json(path: Path | None, record: dict[str, Any]) -> None:
    """Writes the results; no-op if ``path`` is None."""
    if path is not None:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def turns_ns(
    fns: dict[Any, Callable[[], object]],
    repeats: int,
    *,
    warm_up: int = 1,
    timed: int = 1,
    device: str = "cpu",
) -> dict[Any, list[int]]:
    """Nanoseconds of every timed call of each function, in order.

    Functions take turns, so that all see the same machine conditions. Each turn starts with
    ``warm_up`` untimed calls, since the previous function left its own data in the caches.
    """
    times: dict[Any, list[int]] = {name: [] for name in fns}
    for _ in range(repeats):
        for name, fn in fns.items():
            for _ in range(warm_up):
                fn()
            for _ in range(timed):
                times[name].append(call_ns(fn, device))
    return times


def call_ns(fn: Callable[[], object], device: str = "cpu") -> int:
    """Nanoseconds of a call; on a GPU by CUDA events, starting from an idle device."""
    if device != "cuda":
        start = time.perf_counter_ns()
        fn()
        return time.perf_counter_ns() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    fn()
    end.record()
    end.synchronize()
    return round(begin.elapsed_time(end) * 1e6)


COPIED = {"cpu": 1 << 26, "cuda": 1 << 31}  # bytes: several times the caches


def copy_bytes_per_second(device: str) -> float:
    """Copy bandwidth of a device's memory: bytes read plus bytes written."""
    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ns = median_ns({"copy": lambda: target.copy_(source)}, 10, device=device)["copy"]
    return 2 * source.nbytes / ns * 1e9


def median_ns(fns: dict[Any, Callable[[], object]], repeats: int, **how: Any) -> dict[Any, float]:
    """Median nanoseconds per call of each function, from :func:`turns_ns`."""
    return {name: statistics.median(t) for name, t in turns_ns(fns, repeats, **how).items()}


def peers_may_fail(
    calls: dict[Any, Callable[[], object]], peers: set[Any]
) -> dict[Any, Callable[[], object]]:
    """Tries each call once; drops calls of peers that fail, by OOM or a bug, with a message."""
    able = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            if name not in peers:
                raise
            print(f"{name} failed: {type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            able[name] = call
    return able


def _high_water_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) << 10


def peak_bytes(fn: Callable[[], object], device: str = "cpu") -> int:
    """Peak memory during a call, above what is in use before it.

    On the CPU: resident memory (RSS) of this process, including the allocator's cached blocks, so
    call it in a fresh process. On a GPU: memory of tensors.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current RSS
    before = _high_water_bytes()
    fn()
    return _high_water_bytes() - before


def in_fresh_process(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)`` in a fresh process, forked from a server with imports preloaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "nar_kernels", "x_transformers"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(fn, *args).result()


def in_this_process(fn: Callable[..., Any], *args: Any) -> Any:
    """Replaces :func:`in_fresh_process` where figures do not matter: saves seconds."""
    return fn(*args)


def show(value: object, digits: int = 3) -> str:
    """Formats a float to ``digits`` significant digits; None as an empty string."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 10**digits - 0.5 else f"{value:#.{digits}g}".rstrip(".")


def print_table(rows: Sequence[dict[str, object]]) -> None:
    """Prints a Markdown table with the columns of the first row."""
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(show(row.get(column)) for column in columns) + " |")
    print(flush=True)


def draw_bars(
    path: Path,
    bars: dict[str, dict[str, float]],
    colours: dict[str, str],
    title: str,
    unit: str,
) -> None:
    """Stacked horizontal bar chart, one bar per entry of ``bars``, in the style of a run's plots.

    Args:
        bars: segment lengths by label, for each bar.
        colours: colour of each segment, in order.
    """
    ink, grid = pictures._INK, pictures._TABLE
    figure = pictures._figure(9, 3.2)
    axes = figure.add_axes((0.135, 0.32, 0.845, 0.52))
    longest = max(sum(bar.values()) for bar in bars.values())
    for y, bar in enumerate(bars.values()):
        left = 0.0
        for label, colour in colours.items():
            axes.barh(y, bar[label], 0.62, left, color=colour, label="" if y else label)
            if bar[label] > 0.04 * longest:
                dark = sum(pictures._rgb(colour)) < 400
                axes.text(
                    left + bar[label] / 2,
                    y,
                    show(bar[label], 2),
                    ha="center",
                    va="center",
                    color=pictures._PAPER if dark else ink,
                )
            left += bar[label]
        total = f"{show(left)} {unit}"
        axes.text(left + 0.01 * longest, y, total, va="center", color=ink, weight="bold")
    axes.set_yticks(range(len(bars)), bars, color=ink)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * longest)
    axes.tick_params(axis="x", colors=ink)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.text(0.02, 0.91, title, color=ink, fontsize=12)
    figure.legend(
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0.01, 0),
        ncol=4,
        labelcolor=ink,
        fontsize=9,
    )
    figure.savefig(path)
