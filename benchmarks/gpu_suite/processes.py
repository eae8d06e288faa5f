"""Child processes that can be stopped reliably, with all their descendants."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_suite.step import FAILED, PASSED, SKIP, SKIPPED

# A process group of its own, so that descendants can be killed with it.
OWN_GROUP: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
)


def with_the_suite() -> list[str]:
    """Command prefix that makes a child die with the suite, even if that is killed; empty if this
    machine does not support it."""
    prefix = ["setpriv", "--pdeathsig", "KILL", "--"]
    can = shutil.which("setpriv") and subprocess.run([*prefix, "true"]).returncode == 0
    return prefix if can else []


WITH_THE_SUITE = with_the_suite()


def start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen:
    """Starts a process with stdout and stderr merged in one text pipe."""
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
    """Status and reason of a process that exited by itself."""
    last = tail[-1].strip() if tail else ""
    if returncode == 0:
        return PASSED, last
    if returncode == SKIP:
        return SKIPPED, last
    if returncode < 0:
        return FAILED, f"killed by {signal.Signals(-returncode).name}; {last}"
    return FAILED, last or f"exit status {returncode}"


def end(process: subprocess.Popen, grace: float) -> None:
    """Sends SIGINT, waits ``grace`` seconds for a clean exit, then kills the process group."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    kill_group(process)
    process.wait()


def kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
