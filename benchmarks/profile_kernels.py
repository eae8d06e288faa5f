"""What Nsight Compute counts in each GPU kernel, beside what `benchmarks.gpu_code` predicts:
instructions executed, the share of the issue slots that they fill, bytes of device memory, and what
warps wait for.

    python benchmarks/profile_kernels.py [--only REGEX] [--json FILE] [--csv FILE] [--dry-run]

Needs a GPU and `ncu`, which runs this script again with `--launch`; clocks are left as they are.
`--dry-run` launches on the CPU, without `ncu`.
"""

import argparse
import csv
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_corrupt_gpu as of_corrupt
import bench_nll
import bench_unmask
import torch
from measure import environment, print_table, show, write_json

from benchmarks.gpu_suite.predictions import kernel_of
from nar_kernels import backends, corrupt
from nar_kernels.ops.backends import resolve_backend
from nar_kernels.ops.nll import NLL_DTYPES, run_nll

KERNELS = "regex:(corrupt|nll|unmask)"
METRICS = {
    "instructions": "smsp__inst_executed.sum",
    "ns": "gpu__time_duration.sum",
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "issue %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1, "us": 1e3, "ms": 1e6}
# Average number of warps that wait for this, for each instruction that is issued.
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    *("barrier", "drain", "lg_throttle", "long_scoreboard", "math_pipe_throttle", "mio_throttle"),
    *("no_instruction", "not_selected", "short_scoreboard", "sleeping", "wait"),
)
# In percent of what each can do.
PIPE = "sm__inst_executed_pipe_{}.avg.pct_of_peak_sustained_active"
PIPES = ("alu", "fma", "lsu", "xu")


def launches(device: str) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """The figures of the suite that a prediction is for: name, tokens or logits, launch."""
    names = ["auto"] if device == "cpu" else ["cuda", "triton"]
    available = [name for name in names if backends().get(name, "available") == "available"]
    size = of_corrupt.LARGE
    corpus = of_corrupt.corpus_of(2 * size).to(device)
    for backend in available:
        for length in of_corrupt.LENGTHS:
            starts = torch.randint(0, len(corpus) - length + 1, (size // length,), device=device)
            for draws, masking in of_corrupt.MASKINGS.items():
                options = dict(seed=1, starts=starts, seq_len=length, backend=backend)
                call = partial(corrupt, corpus, masking, **options)
                yield f"corrupt, {backend}: {size} tokens, L {length}, {draws}", size, call
    for setting in bench_nll.TINY if device == "cpu" else bench_nll.CUDA:
        a = bench_nll.make_args(setting, device)
        backend = resolve_backend("auto", a.logits.device, tuple(NLL_DTYPES))
        yield f"nll: {setting}", a.logits.numel(), partial(run_nll, a, backend)
    for num_tokens, num_rows in bench_unmask.TINY if device == "cpu" else bench_unmask.CUDA:
        for case, call in bench_unmask.draws(num_tokens, num_rows, device, [1], []).items():
            dtype = str(case.dtype).removeprefix("torch.")
            name = f"unmask, {case.backend}: V {num_tokens}, {dtype}, filter {case.filter}"
            yield name, num_tokens * num_rows, call


def launch(device: str, only: str) -> None:
    """Each once to compile, and once between the profiler's marks; says which comes next."""
    for name, units, call in launches(device):
        if device == "cuda" and not (kernel_of(name) and re.search(only, name)):
            continue
        call()
        print(f"case: {units} {name}", flush=True)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            torch.cuda.empty_cache()


def profile(report: Path, only: str) -> list[tuple[str, int]]:
    """Runs :func:`launch` under ncu: the case of each kernel that it profiled, in order."""
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--kernel-name", KERNELS, "--force-overwrite", "--export", str(report)]
    of_stalls, of_pipes = map(STALL.format, STALLS), map(PIPE.format, PIPES)
    command += ["--metrics", ",".join([*METRICS.values(), *of_stalls, *of_pipes])]
    command += [sys.executable, __file__, "--launch", "--only", only]
    kernels, case = [], ("", 0)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.match(r"case: (\d+) (.*)", line):
                case = found[2], int(found[1])
            elif "==PROF== Profiling" in line:
                kernels.append(case)
    if not kernels:
        raise SystemExit("ncu profiled nothing")
    return kernels


def read(report: Path, kept: Path | None) -> list[dict[str, tuple[str, str]]]:
    """The metrics of each kernel of a report, with their units."""
    command = ["ncu", "--import", str(report), "--page", "raw", "--csv"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if kept is not None:
        kept.write_text(text)
    rows = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    head, units, *kernels = rows
    return [
        {name: (value, unit) for name, unit, value in zip(head, units, row, strict=True)}
        for row in kernels
    ]


def number(metric: tuple[str, str]) -> float:
    value, unit = metric
    return float(value.replace(",", "")) * UNITS.get(unit, 1)


def largest(metric: str, names: Sequence[str], kernel: dict) -> dict[str, float]:
    """A metric for each of the names, the largest first."""
    found = {name: kernel.get(metric.format(name), ("", "")) for name in names}
    values = {name: number(value) for name, value in found.items() if value[0]}
    return dict(sorted(values.items(), key=lambda item: -item[1]))


def row_of(name: str, units: int, kernel: dict[str, tuple[str, str]]) -> dict:
    values = {short: number(kernel[metric]) for short, metric in METRICS.items()}
    predicted = kernel_of(name) or {}
    return {
        "what": name,
        "kernel": kernel["Kernel Name"][0].partition("(")[0],
        "us": values["ns"] / 1e3,
        "per unit": 32 * values["instructions"] / units,
        "predicted": predicted.get("per unit"),
        "bytes per unit": (values["read"] + values["written"]) / units,
        "issue %": values["issue %"],
        "warps %": values["warps %"],
        "registers": int(values["registers"]),
        "stalls": largest(STALL, STALLS, kernel),
        "pipes": largest(PIPE, PIPES, kernel),
    }


def brief(values: dict[str, float], most: int = 4) -> str:
    return ", ".join(f"{name} {show(value)}" for name, value in [*values.items()][:most])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="REGEX", default="", help="kernels whose name has this")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--csv", type=Path, help="write everything that ncu counted here")
    parser.add_argument("--dry-run", action="store_true", help="launch on the CPU, without ncu")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.launch or arguments.dry_run:
        launch("cpu" if arguments.dry_run else "cuda", arguments.only)
        write_json(arguments.json, {"rows": []})
        return
    if not shutil.which("ncu"):
        parser.exit(1, "ncu is not on PATH\n")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "kernels.ncu-rep")
        cases = profile(report, arguments.only)
        kernels = read(report, arguments.csv)
    rows = [row_of(*case, kernel) for case, kernel in zip(cases, kernels, strict=True)]
    record = environment("cuda", rows=rows)
    write_json(arguments.json, record)
    print_table([row | {name: brief(row[name]) for name in ("stalls", "pipes")} for row in rows])


if __name__ == "__main__":
    main()
