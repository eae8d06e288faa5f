"""Runs steps within a limit of time and leaves a record that is complete at any moment.

Whatever happens to a step, or to the suite, the folder holds what is known until then: it is
written anew after every step, every few seconds while one runs, and when the suite is stopped. A
later call in the same folder goes on where this one ended.
"""

import contextlib
import datetime
import importlib.machinery
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks.gpu_suite import junit

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
TIMED_OUT, STOPPED, NOT_RUN, RUNNING = "timed out", "stopped", "not run", "running"

SKIP = 77  # the exit status of a step that finds nothing to do; its last line says why

LOG_LIMIT = 12 << 20  # bytes of the log, all steps and calls together
LOG_LIMIT_OF_STEP = 1 << 20
TAIL = 30  # lines of each step that the results hold, too
SAVE_EVERY = 3.0  # seconds, while a step runs


# So that all that a process starts can be ended with it.
OWN_GROUP: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
)


@dataclass(frozen=True)
class Step:
    """One process, and what it needs.

    Args:
        about: what it shows, for a reader of the results.
        command: of the process. ``{work}`` stands for the folder of this call's files.
        seconds: how long it may take.
        least: with less time left it is not begun.
        needs: steps that must have passed.
        packages: modules that must be importable.
        tools: programs that must be on PATH.
        beside: it may run beside the steps next to it that say so, too; else alone, so that it can
            be timed.
        has_figures: it leaves a file of them, and its last line says little.
        is_setup: what a former call did of it is gone with the machine: it is done in each.
        grace: seconds to end by itself once it is interrupted.
    """

    name: str
    about: str
    command: Sequence[str]
    seconds: float
    least: float = 10
    needs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    beside: bool = False
    has_figures: bool = False
    is_setup: bool = False
    grace: float = 12


class Log:
    """One file for all steps: ``name| line``."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8", errors="replace")
        self._size = path.stat().st_size
        self._sizes: Counter[str] = Counter()
        self._lock = threading.Lock()

    def write(self, name: str, line: str) -> None:
        text = f"{name}| {line[:2000]}\n"
        size = len(text.encode("utf-8", "replace"))
        with self._lock:
            is_full = self._size + size > LOG_LIMIT or self._sizes[name] > LOG_LIMIT_OF_STEP
            if is_full or self._file.closed:  # by a reader that outlived its step
                return
            if self._sizes[name] + size > LOG_LIMIT_OF_STEP:
                text = f"{name}| (and more, which is left out)\n"
            self._size += size
            self._sizes[name] += size
            self._file.write(text)
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class Suite:
    """Steps in their order, in a folder.

    Args:
        out: the folder of the results.
        work: for files that steps share; ``site`` in it is on the path of their Python.
        minutes: that this call may take.
        together: all steps may run beside each other, so many at a time; 0 for as they say.
        sources: a digest of the code that is tried.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        out: Path,
        work: Path,
        *,
        minutes: float,
        together: int = 0,
        again: bool = False,
        sources: str = "",
        summary: Callable[[dict], list[str]] = lambda results: [],
    ) -> None:
        self.steps, self.out, self.work = list(steps), out, work
        self._deadline = time.monotonic() + 60 * minutes
        self._again, self._sources, self._summary = again, sources, summary
        self._together = together
        self._slots = threading.Semaphore(together or len(self.steps) or 1)
        self._lock = threading.RLock()
        self._processes: set[subprocess.Popen] = set()
        self._stopped_by: str | None = None
        out.mkdir(parents=True, exist_ok=True)
        (work / "site").mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Any] = {"steps": {}, "figures": {}, "tests": {}, "calls": []}
        self._earlier = out / "results.json"
        if self._earlier.exists():
            try:
                self.results |= json.loads(self._earlier.read_text(encoding="utf-8"))
            except (ValueError, TypeError) as error:
                raise SystemExit(
                    f"{self._earlier} is not what this suite writes ({error}): move it away"
                ) from error
        self._log = Log(out / "suite.log")
        self.results["calls"].append({"began": now(), "minutes": minutes, "sources": sources})

    # What the folder holds.

    def save(self) -> None:
        """Collects what steps have left, and writes it."""
        with self._lock:
            for path in sorted(self.work.glob("*.json")):
                with contextlib.suppress(ValueError):  # half written
                    self.results["figures"][path.stem] = json.loads(path.read_text())
            environment = self.results["figures"].pop("environment", None)
            self.results["environment"] = environment or self.results.get("environment")
            for path in sorted(self.work.glob("*.xml")):
                with contextlib.suppress(ValueError):
                    self.results["tests"][path.stem] = junit.counts(path)
            write(self._earlier, json.dumps(self.results, indent=1) + "\n")
            junit.merge(self.out / "junit.xml", sorted(self.work.glob("*.xml")))

    def _record(self, step: Step, status: str, reason: str = "", **more: Any) -> None:
        with self._lock:
            self.results["steps"][step.name] = {
                "about": step.about,
                "status": status,
                "reason": reason,
                "date": now(),
                "gpu": (self.results.get("environment") or {}).get("gpu"),
                "sources": self._sources,
                **more,
            }
            if status != RUNNING:
                seconds = more.get("seconds", 0.0)
                print(f"{step.name:<20} {status:<10} {seconds:6.1f} s  {reason[:110]}", flush=True)
            self.save()

    # Running.

    def run(self) -> int:
        """All steps; the exit status: 0 if each passed, now or before, or was skipped."""
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
                    self.save()
        finally:
            for number, before in handled.items():
                signal.signal(number, before)
        self.results["calls"][-1]["ended"] = now()
        self.results["table"] = self._summary(self.results)
        self.save()
        self._log.close()
        print("\n".join(["", *self.results["table"], "", f"results: {self._earlier}"]), flush=True)
        states = [self.results["steps"][step.name]["status"] for step in self.steps]
        if self._stopped_by is not None:
            return 128 + getattr(signal, self._stopped_by)
        return int(any(state not in (PASSED, SKIPPED) for state in states))

    def _groups(self) -> Iterator[list[Step]]:
        """Those that run beside each other."""

        def runs_beside(step: Step) -> bool:
            return step.beside or (self._together > 0 and not step.is_setup)

        for beside, steps in itertools.groupby(self.steps, runs_beside):
            if beside:
                yield list(steps)
            else:
                yield from ([step] for step in steps)

    def _run(self, step: Step) -> None:
        with self._slots:
            try:
                self._run_or_skip(step)
            except Exception as error:  # of the suite itself: the other steps are worth having
                self._record(step, FAILED, f"{type(error).__name__}: {error}")

    def _run_or_skip(self, step: Step) -> None:
        before = self.results["steps"].get(step.name, {})
        if before.get("status") == PASSED and not (step.is_setup or self._again):
            print(f"{step.name:<20} passed before, {before['date']}", flush=True)
            return
        reason = self._missing(step)
        if reason:
            self._record(step, SKIPPED, reason)
            return
        left = self._deadline - time.monotonic()
        if self._stopped_by is not None or left < step.least:
            reason = f"{max(left, 0):.0f} s were left, and it needs {step.least:.0f} at least"
            self._record(step, NOT_RUN, self._stopped_by or reason)
            return
        self._record(step, RUNNING)
        self._run_process(step, min(step.seconds, left))

    def _missing(self, step: Step) -> str:
        for need in step.needs:
            state = self.results["steps"].get(need, {}).get("status", NOT_RUN)
            if state not in (PASSED, SKIPPED):
                return f"{need}: {state}"
        paths = [os.fspath(self.work / "site"), *sys.path]
        for package in step.packages:
            if importlib.machinery.PathFinder.find_spec(package, paths) is None:
                return f"{package} is not installed"
        for tool in step.tools:
            if shutil.which(tool) is None:
                return f"{tool} is not on PATH"
        return ""

    def _run_process(self, step: Step, seconds: float) -> None:
        start = time.monotonic()
        command = [part.replace("{work}", os.fspath(self.work)) for part in step.command]
        self._log.write(step.name, f"$ {' '.join(command)}")
        # The package may not be installed here: it is imported from the checkout.
        paths = [os.fspath(self.work / "site"), os.getcwd(), os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            **OWN_GROUP,
            env=os.environ
            | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
            | step.env,
        )
        with self._lock:
            self._processes.add(process)
        tail: deque[str] = deque(maxlen=TAIL)
        reader = threading.Thread(target=self._read, args=(step, process, tail), daemon=True)
        reader.start()
        is_late = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            is_late = True
            end(process, step.grace)
        # What it leaves behind would disturb the next step.
        kill_group(process)
        reader.join(5)
        with self._lock:
            self._processes.discard(process)
        status, reason = outcome(process.returncode, tail)
        if status == PASSED and step.has_figures:
            reason = ""
        if self._stopped_by is not None and status != PASSED:
            status, reason = STOPPED, self._stopped_by
        elif is_late:
            status, reason = TIMED_OUT, f"after {seconds:.0f} s"
        self._record(
            step,
            status,
            reason,
            exit=process.returncode,
            seconds=round(time.monotonic() - start, 1),
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
        if self._stopped_by is not None:
            return
        self._stopped_by = signal.Signals(number).name
        for process in list(self._processes):
            threading.Thread(target=end, args=(process, 3), daemon=True).start()
        self.save()


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


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
