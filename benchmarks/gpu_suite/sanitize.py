"""Runs compute-sanitizer on some tests, restricted to one of our kernels.

initcheck instruments all kernels: if it did not see PyTorch's writes, our reads would look
uninitialised. (It is not run on nll, which reads the uninitialised padding between rows, and
discards it.)
"""

import argparse
import re
import shlex
import subprocess
import sys

from benchmarks.gpu_suite.run_tests import PYTEST
from benchmarks.gpu_suite.step import SKIP

FOUND = 99  # exit status if the sanitizer reports an error


def sanitizer(tool: str, kernel: str) -> list[str]:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
    # PyTorch makes API calls that may fail, and handles the errors.
    command += ["--report-api-errors", "no"]
    if tool != "initcheck":
        command += ["--kernel-name", f"kernel_substring={kernel}_kernel"]
    return command


def verdict(returncode: int, output: str) -> tuple[int, str]:
    """Exit status of the step, and the reason if it differs from that of the process."""
    if "Device not supported" in output:
        return SKIP, "compute-sanitizer does not work on this machine: Device not supported"
    if returncode == 0 and not re.search(r"SUMMARY: 0 (errors|hazards)", output):
        return 1, "compute-sanitizer did not say that it found nothing"
    return returncode, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool")
    parser.add_argument("kernel")
    parser.add_argument("--dry-run", action="store_true", help="only collect the tests")
    parser.add_argument("tests", nargs="+")
    arguments = parser.parse_args()
    command = sanitizer(arguments.tool, arguments.kernel)
    pytest = [*PYTEST, "-q", *arguments.tests]
    if arguments.dry_run:
        if arguments.tool != "memcheck":
            print("looks at the same tests as memcheck")
            return
        print(shlex.join(command), flush=True)
        sys.exit(subprocess.run([*pytest, "--collect-only", "--without-gpu"]).returncode)
    output = []
    with subprocess.Popen(
        [*command, *pytest],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            output.append(line)
    status, reason = verdict(process.returncode, "".join(output))
    if reason:
        print(reason)
    sys.exit(status)


if __name__ == "__main__":
    main()
