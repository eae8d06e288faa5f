"""Runs pytest with xdist workers and a timeout per test, as far as these plugins are installed.

A worker that hangs, crashes, or loses the GPU is replaced, and the others go on.
"""

import argparse
import importlib.util
import os
import sys

LIMIT = 90  # seconds per test, including compilation
# Warnings are errors in this project, but a new one on another machine is not a kernel's fault.
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default"]
PYTEST += ["-p", "benchmarks.gpu_suite.plugin"]


def options_of(workers: int, results: str) -> list[str]:
    options = ["--tb=short", "-v", "--durations=10", "--junitxml", f"{results}.xml"]
    options += ["--outcomes", f"{results}.jsonl", "--passed-before", f"{results}.passed"]
    # Dump the stack of a test that hangs.
    options += ["-o", f"faulthandler_timeout={LIMIT - 10}"]
    if importlib.util.find_spec("xdist"):
        options += [
            "-n",
            str(workers),
            "--max-worker-restart",
            "20",
            "-p",
            "tests.helpers.lost_device",
        ]
    else:
        print("pytest-xdist is not installed: one process, which ends with the first crash")
    if importlib.util.find_spec("pytest_timeout"):
        # Thread method: Python cannot handle a signal while it waits for a kernel.
        options += ["--timeout", str(LIMIT), "--timeout-method", "thread"]
    else:
        print("pytest-timeout is not installed: a test that hangs takes the rest with it")
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--results", required=True, help="path of the results, without its suffix")
    parser.add_argument("--dry-run", action="store_true", help="only collect")
    parser.add_argument("tests", nargs="+", help="arguments of pytest")
    arguments = parser.parse_args()
    if arguments.dry_run:
        options = ["-q", "--collect-only", "--without-gpu"]
    else:
        options = options_of(arguments.workers, arguments.results)
    # Each worker also computes on the CPU: avoid oversubscription.
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    sys.stdout.flush()
    command = [*PYTEST, *options, *arguments.tests]
    os.execv(sys.executable, command)  # signals go to pytest itself


if __name__ == "__main__":
    main()
