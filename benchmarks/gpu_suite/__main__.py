"""GPU validation suite: builds, tests, sanitizers, benchmarks, and a summary table.

    python -m benchmarks.gpu_suite [--out FOLDER] [--minutes 7] [--wheels FOLDER] [--only STEP,...]

Needs a Python with torch, triton and pytest, a C++ compiler and nvcc. Everything else can come from
wheels (`python -m benchmarks.gpu_suite.wheels fill FOLDER`); steps whose requirements are missing
are reported as skipped. results.json, suite.log and junit.xml in the folder are up to date at any
moment. A second call with the same folder runs the steps that have not passed. The exit status is 0
if every step passed or was skipped.
"""

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_suite.report import summary
from benchmarks.gpu_suite.runner import Suite
from benchmarks.gpu_suite.steps import all_steps

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ("csrc/**/*", "nar_kernels/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "setup.py")


def digest_of_sources() -> str:
    """Digest of the code under test, which tells results of different versions apart."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern)}):
        if path.is_file():
            digest.update(str(path.relative_to(ROOT)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def chosen(steps: list, only: str | None) -> list:
    """Selects steps by name, or by a prefix before an underscore; setup steps are included."""
    if only is None:
        return steps
    wanted = [name.strip() for name in only.split(",")]
    for name in wanted:
        if not any(is_called(step, name) for step in steps):
            names = ", ".join(step.name for step in steps)
            raise SystemExit(f"--only {name}: there is no such step; there are {names}")
    return [step for step in steps if step.is_setup or any(is_called(step, n) for n in wanted)]


def is_called(step, name: str) -> bool:
    return step.name == name or step.name.startswith(f"{name}_")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Path(os.environ.get("OUT") or "gpu_suite_out")
    parser.add_argument("--out", type=Path, default=default, help="folder ($OUT, gpu_suite_out)")
    parser.add_argument("--minutes", type=float, default=9.5, help="that this call may take (9.5)")
    parser.add_argument(
        "--only", metavar="STEP,...", help="and what those need; bench: all of those"
    )
    parser.add_argument("--again", action="store_true", help="also what has passed before")
    parser.add_argument("--wheels", type=Path, help="folder of packages to install for the suite")
    parser.add_argument(
        "--prebuilt", action="store_true", help="use extensions in the checkout if they load"
    )
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument("--dry-run", action="store_true", help="walk through all without a GPU")
    arguments = parser.parse_args()
    if arguments.wheels is not None and not arguments.wheels.is_dir():
        parser.error(f"--wheels {arguments.wheels}: there is no such folder")
    wheels = arguments.wheels and arguments.wheels.resolve()
    steps = chosen(all_steps(wheels, arguments.dry_run, arguments.prebuilt), arguments.only)
    if arguments.list:
        print("\n".join(f"{step.name:<20} {step.timeout:4.0f} s  {step.about}" for step in steps))
        return
    out = arguments.out.resolve()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="gpu_suite_") as work:
        suite = Suite(
            steps,
            out,
            Path(work),
            minutes=arguments.minutes,
            max_parallel=os.cpu_count() or 1 if arguments.dry_run else 0,
            again=arguments.again,
            sources=digest_of_sources(),
            summary=summary,
        )
        status = suite.run()
    sys.exit(status)


if __name__ == "__main__":
    main()
