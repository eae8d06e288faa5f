"""Runs pytest, with what there is of its plugins: a worker a core, and a limit for each test.

A worker whose test hangs, or crashes, or loses the GPU is replaced, and the others go on.
"""

import argparse
import importlib.util
import os
import sys

LIMIT = 90  # seconds a test, its compilation included


def options_of(workers: str, junit: str, is_dry_run: bool) -> list[str]:
    options = ["-p", "no:cacheprovider", "-p", "benchmarks.gpu_suite.nothing_ran", "--tb=short"]
    if is_dry_run:
        return [*options, "-q", "--collect-only"]
    options += ["-v", "--durations=10", "--junitxml", junit]
    # What hangs says where, if nothing ends it.
    options += ["-o", f"faulthandler_timeout={LIMIT - 10}"]
    if importlib.util.find_spec("xdist"):
        number = os.cpu_count() if workers == "a core" else workers
        options += ["-n", str(number), "--max-worker-restart", "20", "-p", "tests.lost_device"]
    else:
        print("pytest-xdist is not installed: one process, which ends with the first crash")
    if importlib.util.find_spec("pytest_timeout"):
        # By a thread: a signal does not reach Python while it waits for a kernel.
        options += ["--timeout", str(LIMIT), "--timeout-method", "thread"]
    else:
        print("pytest-timeout is not installed: a test that hangs takes the rest with it")
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", default="1", help='a number, or "a core"')
    parser.add_argument("--junit", required=True)
    parser.add_argument("--dry-run", action="store_true", help="only collect")
    parser.add_argument("tests", nargs="+", help="arguments of pytest")
    arguments = parser.parse_args()
    options = options_of(arguments.workers, arguments.junit, arguments.dry_run)
    # Each worker compares with the CPU: threads of all at once would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    sys.stdout.flush()
    command = [sys.executable, "-m", "pytest", *options, *arguments.tests]
    os.execv(sys.executable, command)  # signals go to pytest itself


if __name__ == "__main__":
    main()
