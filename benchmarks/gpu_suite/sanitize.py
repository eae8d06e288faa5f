"""compute-sanitizer over some tests, looking at one of our kernels.

initcheck looks at all kernels: where it does not see PyTorch write, what ours read looks unwritten.
(And not at nll: it reads the gaps between rows, which nobody writes, and uses nothing of them.)
"""

import argparse
import re
import shlex
import subprocess
import sys

from benchmarks.gpu_suite.run_tests import PYTEST
from benchmarks.gpu_suite.step import SKIP

FOUND = 99  # the exit status where it finds something


def sanitizer(tool: str, kernel: str) -> list[str]:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
    # PyTorch tries calls that may fail, and copes.
    command += ["--report-api-errors", "no"]
    if tool != "initcheck":
        command += ["--kernel-name", f"kernel_substring={kernel}_kernel"]
    return command


def verdict(returncode: int, output: str) -> tuple[int, str]:
    """The exit status of the step, and why if it is not that of the process."""
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
