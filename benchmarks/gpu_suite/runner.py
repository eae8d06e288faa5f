"""Runs steps within a time budget and keeps the results complete at any moment.

Whatever happens to a step or to the suite, no results are lost: they are written after every step,
every few seconds while one runs, and when the suite is stopped. A later call with the same folder
continues where this one ended, and keeps its results.
"""

import importlib.machinery
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.gpu_suite import outcomes
from benchmarks.gpu_suite.log import Log
from benchmarks.gpu_suite.processes import end, kill_group, outcome, start
from benchmarks.gpu_suite.record import Record, now, say, write
from benchmarks.gpu_suite.step import (
    FAILED,
    NOT_RUN,
    PASSED,
    RUNNING,
    SKIPPED,
    STOPPED,
    TIMED_OUT,
    Step,
)

TAIL = 30  # last lines of each step that are kept in the results
SAVE_EVERY = 3.0  # seconds, while a step runs
READER_GRACE = 5.0  # seconds to read the last lines of a process


class Suite:
    """Runs steps in order.

    Args:
        out: the results folder.
        work: folder for files that steps share; its ``site`` is on their ``PYTHONPATH``.
        minutes: time budget of this call.
        max_parallel: run all steps but setup in parallel, at most this many at a time; 0 for as
            they declare.
        again: also run steps that have passed before.
        sources: digest of the code under test.
        summary: makes the lines of the summary from the results.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        out: Path,
        work: Path,
        *,
        minutes: float,
        max_parallel: int = 0,
        again: bool = False,
        sources: str = "",
        summary: Callable[[dict], list[str]] = lambda results: [],
    ) -> None:
        self.work = work
        self._deadline = time.monotonic() + 60 * minutes
        self._again = again
        self._max_parallel = max_parallel
        self._slots = threading.Semaphore(max_parallel or len(steps) or 1)
        self._lock = threading.RLock()
        self._processes: set[subprocess.Popen] = set()
        self._stopped_by: str | None = None
        out.mkdir(parents=True, exist_ok=True)
        (work / "site/bin").mkdir(parents=True, exist_ok=True)
        self._record = Record(out, work, minutes, sources, summary)
        # Steps that failed before, and would likely fail again, come last.
        self.steps = sorted(steps, key=self._failed_before)
        self._log = Log(out / "suite.log")

    def _failed_before(self, step: Step) -> bool:
        before = self._record.results["steps"].get(step.name, {})
        is_same = before.get("sources") == self._record.made_with()["sources"]
        return is_same and not step.is_setup and before.get("status") in (FAILED, TIMED_OUT)

    def run(self) -> int:
        """Runs all steps. Exit status: 0 if each passed, now or before, or was skipped."""
        handled = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            for group in self._groups():
                threads = [threading.Thread(target=self._run, args=(step,)) for step in group]
                for thread in threads:
                    thread.start()
                while any(thread.is_alive() for thread in threads):
                    for thread in threads:
                        thread.join(SAVE_EVERY / len(threads))
                    self._record.save()
        finally:
            for number, before in handled.items():
                signal.signal(number, before)
        self._record.call["ended"] = now()
        self._record.save()
        self._log.close()
        say("\n".join(["", *self._record.results["table"], "", f"results: {self._record.path}"]))
        if self._stopped_by is not None:
            return 128 + getattr(signal, self._stopped_by)
        return int(
            any(state not in (PASSED, SKIPPED) for state in self._record.call["states"].values())
        )

    def _groups(self) -> Iterator[list[Step]]:
        """Groups of steps that run in parallel."""

        def is_parallel(step: Step) -> bool:
            return step.parallel or (self._max_parallel > 0 and not step.is_setup)

        for parallel, steps in itertools.groupby(self.steps, is_parallel):
            if parallel:
                yield list(steps)
            else:
                yield from ([step] for step in steps)

    def _run(self, step: Step) -> None:
        with self._slots:
            try:
                self._run_or_skip(step)
            except Exception as error:  # a bug of the suite: go on with the other steps
                self._record.put(step, FAILED, f"{type(error).__name__}: {error}")

    def _run_or_skip(self, step: Step) -> None:
        before = self._record.results["steps"].get(step.name, {})
        if before.get("status") == PASSED and not (step.is_setup or self._again):
            self._record.call["states"][step.name] = PASSED
            say(f"{step.name:<20} passed before, {before['date']}")
            return
        for need in step.needs:
            state = self._record.call["states"].get(need, NOT_RUN)
            if state != PASSED:
                self._record.put(step, NOT_RUN, f"it needs {need}: {state}")
                return
        reason = self._missing(step)
        if reason:
            self._record.put(step, SKIPPED, reason)
            return
        left = self._deadline - time.monotonic() - step.grace - READER_GRACE
        if self._stopped_by is not None or left < step.min_seconds:
            reason = f"{max(left, 0):.0f} s were left, and it needs {step.min_seconds:.0f}"
            self._record.put(step, NOT_RUN, self._stopped_by or reason)
            return
        self._record.put(step, RUNNING)
        self._run_process(step, min(step.timeout, left))

    def _missing(self, step: Step) -> str:
        paths = [os.fspath(self.work / "site"), *sys.path]
        for package in step.packages:
            if importlib.machinery.PathFinder.find_spec(package, paths) is None:
                return f"{package} is not installed"
        for tool in step.tools:
            if shutil.which(tool, path=self._environment(step)["PATH"]) is None:
                return f"{tool} is not on PATH"
        return ""

    def _environment(self, step: Step) -> dict[str, str]:
        """Environment variables of a step: installed wheels first in the paths, and CUDA's bin."""
        # The package may not be installed: import it from the checkout.
        modules = [os.fspath(self.work / "site"), os.getcwd(), os.environ.get("PYTHONPATH")]
        home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
        programs = [os.fspath(self.work / "site/bin"), os.environ.get("PATH"), f"{home}/bin"]
        return {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, modules)),
            "PATH": os.pathsep.join(filter(None, programs)),
            **step.env,
        }

    def _run_process(self, step: Step, timeout: float) -> None:
        began = time.monotonic()
        if step.name in self._record.results["tests"] and not self._again:
            # Skip tests that passed before with the same sources on the same GPU.
            passed = outcomes.passed(
                self._record.results["tests"][step.name], **self._record.made_with()
            )
            write(self.work / f"{step.name}.passed", "\n".join(passed))
        command = [part.replace("{work}", os.fspath(self.work)) for part in step.command]
        self._log.write(step.name, f"$ {' '.join(command)}")
        process = start(command, self._environment(step))
        with self._lock:
            self._processes.add(process)
        if self._stopped_by is not None:  # a signal arrived since the check
            end(process, 0)
        tail: deque[str] = deque(maxlen=TAIL)
        reader = threading.Thread(target=self._read, args=(step, process, tail), daemon=True)
        reader.start()
        is_late = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            is_late = True
            end(process, step.grace)
        # Leftover descendants would disturb the next step.
        kill_group(process)
        reader.join(READER_GRACE)
        with self._lock:
            self._processes.discard(process)
        status, reason = outcome(process.returncode, tail)
        if status == PASSED and step.is_benchmark:
            reason = ""
        if self._stopped_by is not None and status != PASSED:
            status, reason = STOPPED, self._stopped_by
        elif is_late:
            status, reason = TIMED_OUT, f"after {timeout:.0f} s"
        self._record.put(
            step,
            status,
            reason,
            exit=process.returncode,
            seconds=round(time.monotonic() - began, 1),
            tail=list(tail),
        )

    def _read(self, step: Step, process: subprocess.Popen, tail: deque[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                line = line.rstrip("\n")
                self._log.write(step.name, line)
                if line.strip():
                    tail.append(line[:500])

    def _on_signal(self, number: int, frame: object) -> None:
        """Stops the running processes; :meth:`run`, which waits for them, does the rest."""
        if self._stopped_by is None:
            self._stopped_by = signal.Signals(number).name
            for process in list(self._processes):
                threading.Thread(target=end, args=(process, 3), daemon=True).start()
