"""A step of the suite, and what becomes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

PASSED, FAILED, TIMED_OUT, STOPPED = "passed", "failed", "timed out", "stopped"
FINISHED = (PASSED, FAILED, TIMED_OUT, STOPPED)
SKIPPED, NOT_RUN, RUNNING = "skipped", "not run", "running"

SKIP = 77  # the exit status of a step that finds nothing to do; its last line says why


@dataclass(frozen=True)
class Step:
    """One process, and what it needs.

    Args:
        about: what it shows, for a reader of the results.
        command: of the process. ``{work}`` stands for the folder of this call's files.
        timeout: seconds that it may take.
        min_seconds: with less time left it is not begun.
        needs: steps that must have passed in this call.
        packages: modules that must be importable.
        tools: programs that must be on PATH.
        parallel: it may run beside the steps next to it that say so, too; else alone, so that it
            can be timed.
        is_benchmark: its figures say more than its last line.
        is_setup: what a former call did of it is gone with the machine: it is done in each.
        grace: seconds to end by itself once it is interrupted.
    """

    name: str
    about: str
    command: Sequence[str]
    timeout: float
    min_seconds: float = 10
    needs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    parallel: bool = False
    is_benchmark: bool = False
    is_setup: bool = False
    grace: float = 12
