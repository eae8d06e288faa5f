"""Steps of the suite, and their statuses."""

from collections.abc import Sequence
from dataclasses import dataclass, field

PASSED, FAILED, TIMED_OUT, STOPPED = "passed", "failed", "timed out", "stopped"
FINISHED = (PASSED, FAILED, TIMED_OUT, STOPPED)
SKIPPED, NOT_RUN, RUNNING = "skipped", "not run", "running"

SKIP = 77  # exit status of a step that skips itself; its last line of output is the reason


@dataclass(frozen=True)
class Step:
    """One process, and its requirements.

    Args:
        about: what the step shows, for the report.
        command: command line; ``{work}`` is replaced by the folder of this call's files.
        timeout: seconds.
        min_seconds: the step is not started with less time left.
        needs: steps that must have passed in this call.
        packages: modules that must be importable.
        tools: programs that must be on PATH.
        env: additional environment variables.
        parallel: may run in parallel with adjacent steps that also set it; otherwise it runs alone,
            for accurate timing.
        is_benchmark: the last line of output is not reported, since the figures say more.
        is_setup: runs in every call, since its results are lost with the machine.
        grace: seconds to exit cleanly after an interrupt.
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
