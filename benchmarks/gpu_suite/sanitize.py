"""compute-sanitizer over some tests, looking at one of our kernels.

initcheck looks at all kernels: where it does not see PyTorch write, what ours read looks unwritten.
(And not at nll: it reads the gaps between rows, which nobody writes, and uses nothing of them.)
"""

import argparse
import shlex
import subprocess
import sys

from benchmarks.gpu_suite.runner import SKIP

FOUND = 99  # the exit status where it finds something


def sanitizer(tool: str, kernel: str) -> list[str]:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
    # PyTorch tries calls that may fail, and copes.
    command += ["--report-api-errors", "no"]
    if tool != "initcheck":
        command += ["--kernel-name", f"kernel_substring={kernel}_kernel"]
    return command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool")
    parser.add_argument("kernel")
    parser.add_argument("--dry-run", action="store_true", help="only collect the tests")
    parser.add_argument("tests", nargs="+")
    arguments = parser.parse_args()
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    pytest += ["-p", "benchmarks.gpu_suite.nothing_ran", *arguments.tests]
    if arguments.dry_run:
        if arguments.tool != "memcheck":
            print("looks at the same tests as memcheck")
            return
        print(shlex.join(sanitizer(arguments.tool, arguments.kernel)), flush=True)
        sys.exit(subprocess.run([*pytest, "--collect-only"]).returncode)
    command = [*sanitizer(arguments.tool, arguments.kernel), *pytest]
    output = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            output.append(line)
    if any("Device not supported" in line for line in output):
        print("compute-sanitizer does not work on this machine: Device not supported")
        sys.exit(SKIP)
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
