"""Writes docs/hardware.md: what has run on which hardware, when, with which versions; what has not.

    python -m benchmarks.gpu_suite.hardware [--add FOLDER]

All of it comes from benchmarks/results. `--add` puts the results of a folder of the suite there
first, under a name of its GPU and date.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_suite import outcomes
from benchmarks.gpu_suite.report import markdown
from benchmarks.gpu_suite.step import FINISHED, PASSED
from benchmarks.gpu_suite.steps import all_steps

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS, PAGE = ROOT / "benchmarks/results", ROOT / "docs/hardware.md"

NOTHING = """\
**Nothing has run on a GPU yet**, and no figure in this repository is of one. What is known of the
GPU kernels comes from tests without a GPU: Triton's run in its interpreter and those of CUDA in an
emulation of thread blocks, bit for bit equal to the reference; all are compiled for sm_80, sm_90
and sm_100, and launched as far as the driver."""

HEAD = """\
# Hardware

What has run on which hardware. Written by `python -m benchmarks.gpu_suite.hardware` from
`benchmarks/results`; not edited by hand.

## GPUs
"""

HOW = """
`python -m benchmarks.gpu_suite` runs what a GPU can prove, within minutes:

```
python -m benchmarks.gpu_suite.wheels fill wheels  # where there is a network; for Python 3.12
python -m benchmarks.gpu_suite --wheels wheels --minutes 7 --out gpu_suite_out
python -m benchmarks.gpu_suite.hardware --add gpu_suite_out
```

It needs PyTorch, Triton, pytest, nvcc and a C++ compiler, and no network; the wheels are peers and
plugins of pytest. `gpu_suite_out` holds `results.json` (every step, every figure, tests that
failed), `suite.log` and `junit.xml`, complete at any moment; a second call with the same folder
does what the first did not pass. `--only` chooses steps, `--list` names them, `--dry-run` walks
through them without a GPU.
"""


def gpu_records() -> list[tuple[Path, dict]]:
    """Results of the suite, oldest first."""
    records = [(path, json.loads(path.read_text())) for path in RESULTS.glob("gpu_*.json")]
    return sorted(records, key=lambda record: (record[1]["calls"][-1]["began"], record[0].name))


def environment_of(record: dict) -> dict:
    """That of its last call that saw a GPU."""
    found = [record.get("environment"), *(call.get("environment") for call in record["calls"])]
    return next((environment for environment in found[::-1] if (environment or {}).get("gpu")), {})


def versions(environment: dict) -> str:
    packages = environment["packages"]
    return (
        f"Python {environment['python']}, torch {packages['torch']}, Triton {packages['triton']},"
        f" CUDA {environment['cuda']}"
    )


def gpus(records: list[tuple[Path, dict]]) -> Iterator[str]:
    if not records:
        yield NOTHING
    else:
        lines = []
        for path, record in records:
            states = [step["status"] for step in record["steps"].values()]
            tests = {k: v for of_step in record["tests"].values() for k, v in of_step.items()}
            passed = f"{states.count(PASSED)} of {len(states)} steps; tests: "
            passed += outcomes.counts(tests)
            link = f"[{path.name}](../benchmarks/results/{path.name})"
            date = record["calls"][-1]["began"][:10]
            environment = environment_of(record)
            lines.append((environment["gpu"], date, versions(environment), passed, link))
        yield from markdown(("GPU", "date", "versions", "passed", "results"), lines)
    yield HOW
    yield "What the last run of each step said on each GPU; empty: it has not run there.\n"
    steps = [step for _, record in records for step in record["steps"].values()]
    names = sorted({step["gpu"] for step in steps if step["gpu"] is not None})
    rows = []
    for step in all_steps(None, is_dry_run=False):
        if not step.is_setup:
            states = [last_state(step.name, gpu, records) for gpu in names or [""]]
            rows.append((step.name, step.about, *states))
    yield from markdown(("step", "shows", *(names or ["any GPU"])), rows)


def last_state(step: str, gpu: str, records: list[tuple[Path, dict]]) -> str:
    """Of the newest record in which this step came to an end on this GPU."""
    state = ""
    for _, record in records:
        found = record["steps"].get(step, {})
        if found.get("status") in FINISHED and found["gpu"] == gpu:
            state = f"{found['status']}, {found['date'][:10]}"
    return state


def cpus() -> Iterator[str]:
    yield "\n## CPUs\n"
    yield "Figures in README.md are of these.\n"
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        if path.name.startswith("gpu_"):
            continue
        processor = record.get("device") or record["processor"]
        generation = re.search(r"zen\d", path.name)
        if generation is not None:
            processor += f" ({generation[0].capitalize().replace('Zen', 'Zen ')})"
        levels = sorted({row["simd"] for row in record.get("rows", []) if "simd" in row})
        levels = levels or [record.get("simd", "")]
        link = f"[{path.name}](../benchmarks/results/{path.name})"
        made_with = f"Python {record['python']}, torch {record['torch']}"
        rows.append((link, record["date"], processor, ", ".join(levels), made_with))
    head = ("results", "date", "processor", "instruction sets", "versions")
    yield from markdown(head, rows)


def page() -> str:
    return "\n".join([HEAD, *gpus(gpu_records()), *cpus(), ""])


def add(folder: Path) -> Path:
    """The results of a folder, under a name of their GPU and date."""
    path = folder / "results.json"
    if not path.exists():
        sys.exit(f"{path} is not there: --add takes the folder that the suite wrote")
    record = json.loads(path.read_text())
    gpu = environment_of(record).get("gpu")
    if gpu is None:
        sys.exit(f"{path} is of no GPU: a dry run, or nothing ran")
    short = re.sub(r"[^a-z0-9]+", "_", gpu.lower().replace("nvidia", "")).strip("_")
    text = json.dumps(record, indent=1) + "\n"
    for number in itertools.count(1):
        date = record["calls"][-1]["began"][:10] + (f"_{number}" if number > 1 else "")
        target = RESULTS / f"gpu_{short}_{date}.json"
        if not target.exists() or target.read_text(encoding="utf-8") == text:
            break
    target.write_text(text, encoding="utf-8")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--add", type=Path, metavar="FOLDER", help="that the suite has written")
    arguments = parser.parse_args()
    if arguments.add is not None:
        print(add(arguments.add))
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
