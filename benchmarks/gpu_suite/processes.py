"""Processes that end when they are told to, with all that they have started."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_suite.step import FAILED, PASSED, SKIP, SKIPPED

# So that all that a process starts can be ended with it.
OWN_GROUP: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
)


def with_the_suite() -> list[str]:
    """What a command begins with so that it ends with the suite, even where that is killed;
    nothing where this machine cannot do that."""
    prefix = ["setpriv", "--pdeathsig", "KILL", "--"]
    can = shutil.which("setpriv") and subprocess.run([*prefix, "true"]).returncode == 0
    return prefix if can else []


WITH_THE_SUITE = with_the_suite()


def start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen:
    """With all that it prints in one pipe of text."""
    return subprocess.Popen(
        [*WITH_THE_SUITE, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=environment,
        **OWN_GROUP,
    )


def outcome(returncode: int, tail: Sequence[str]) -> tuple[str, str]:
    """Status and reason of a process that ended by itself."""
    last = tail[-1].strip() if tail else ""
    if returncode == 0:
        return PASSED, last
    if returncode == SKIP:
        return SKIPPED, last
    if returncode < 0:
        return FAILED, f"killed by {signal.Signals(-returncode).name}; {last}"
    return FAILED, last or f"exit status {returncode}"


def end(process: subprocess.Popen, grace: float) -> None:
    """Interrupts a process, so that it can say what it knows, and then kills all it started."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    kill_group(process)
    process.wait()


def kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
