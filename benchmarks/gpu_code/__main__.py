"""Static analysis of the compiled GPU kernels: registers, instructions, and how many of those a
token or logit costs. Needs no GPU.

    python -m benchmarks.gpu_code [--architectures 90] [--languages triton] [--json FILE]

Triton kernels are compiled here for each architecture, CUDA kernels where there is nvcc.

`per unit` is the number of instructions that are issued for a token or logit, times the lanes of
their warps: from the machine code, each basic block weighted by how often its lines of the source
are expected to run (`sass.py`; the weights are in `cases`, trips that depend on the data from
simulations). `spilled per unit` of them access local memory.

`H100`, `H200`: how fast the kernel can be, as a share of the speed of a copy of as many bytes, if
instructions are issued at 55 % of the peak rate, or at all of it. A prediction, not a measurement:
it leaves out latencies and caches.

`16-byte loads` and `stores` are vectorised instructions (16 bytes per lane); `torn reads` are
volatile loads of values that other programs write, in a layout where several threads load the same
element and may see different values.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: compile, do not interpret
# What Triton has in its cache may name the lines of another checkout.
os.environ["TRITON_ALWAYS_COMPILE"] = "1"

from benchmarks.gpu_code.cases import cuda_cases, triton_cases  # noqa: E402
from benchmarks.gpu_code.compile import cuda_row, triton_row  # noqa: E402

ARCHITECTURES = [80, 90, 100]
LANGUAGES = ["triton", "cuda"]

# 132 processors of 128 lanes at 1.755 GHz.
INSTRUCTIONS_PER_SECOND = 29.6e12
COPIED_PER_SECOND = {"H100": 3.0e12, "H200": 4.3e12}  # bytes read plus bytes written
ISSUE_RATES = (0.55, 1.0)


def shares_of_copy(row: dict) -> dict[str, str]:
    """In percent, at both issue rates."""
    shares = {}
    for gpu, copied in COPIED_PER_SECOND.items():
        if not row["unit"]:
            shares[gpu] = ""
            continue
        copy = row["bytes per unit"] / copied
        low, high = (share_of_copy(row, copy, rate) for rate in ISSUE_RATES)
        shares[gpu] = f"{100 * low:.0f}-{100 * high:.0f} %" if low < 1 else "100 %"
    return shares


def share_of_copy(row: dict, copy: float, rate: float) -> float:
    issue = row["per unit"] / (INSTRUCTIONS_PER_SECOND * rate)
    return copy / (max(copy, issue) if row["overlaps"] else copy + issue)


def table(architectures: list[int], languages: list[str]) -> list[dict]:
    rows = []
    if "triton" in languages:
        rows += [triton_row(case, sm) for case in triton_cases() for sm in architectures]
    if "cuda" in languages:
        cases = cuda_cases()
        rows += [cuda_row(case, sm, cases) for case in cases for sm in architectures]
    return [row | shares_of_copy(row) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_code",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--architectures", type=int, nargs="+", default=ARCHITECTURES, help="80, 90, ..."
    )
    parser.add_argument("--languages", choices=LANGUAGES, nargs="+", default=LANGUAGES)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    languages = arguments.languages
    if "cuda" in languages and not shutil.which("nvcc"):
        print("nvcc is not on PATH: no CUDA kernels below")
        languages = ["triton"]
    rows = table(arguments.architectures, languages)
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(str(row[column]) for column in columns) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
