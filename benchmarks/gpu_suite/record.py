"""The results folder: results.json and junit.xml."""

import contextlib
import datetime
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite import outcomes
from benchmarks.gpu_suite.step import FINISHED, NOT_RUN, RUNNING, SKIPPED, Step


class Record:
    """Results of all calls with the same folder, including this one.

    Args:
        out: the results folder.
        work: where steps leave their files: figures ``NAME.json``, test outcomes ``NAME.jsonl``,
            JUnit XML ``NAME.xml``.
        minutes: time budget of this call.
        sources: digest of the code under test.
        summary: makes the lines of the summary from the results.
    """

    def __init__(
        self,
        out: Path,
        work: Path,
        minutes: float,
        sources: str,
        summary: Callable[[dict], list[str]],
    ) -> None:
        self._out, self._work, self._sources, self._summary = out, work, sources, summary
        self._lock = threading.RLock()
        self.path = out / "results.json"
        self.results: dict[str, Any] = {
            "steps": {},
            "figures": {},
            "tests": {},
            "attempts": [],
            "calls": [],
        }
        if self.path.exists():
            try:
                self.results |= json.loads(self.path.read_text(encoding="utf-8"))
            except (ValueError, TypeError) as error:
                raise SystemExit(
                    f"{self.path} is not what this suite writes ({error}): move it away"
                ) from error
        self.results["environment"] = None  # of this call's machine
        self.call: dict[str, Any] = {
            "began": now(),
            "minutes": minutes,
            "sources": sources,
            "states": {},
        }
        self.results["calls"].append(self.call)

    def save(self) -> None:
        """Collects the files that steps have left, and writes the results."""
        with self._lock:
            for path in sorted(self._work.glob("*.json")):
                with contextlib.suppress(ValueError):  # still being written
                    found = json.loads(path.read_text(encoding="utf-8"))
                    if path.stem == "environment":
                        self.results["environment"] = self.call["environment"] = found
                    else:
                        self.results["figures"][path.stem] = found
            for path in sorted(self._work.glob("*.jsonl")):
                tests = outcomes.read(path, **self.made_with())
                self.results["tests"].setdefault(path.stem, {}).update(tests)
            try:
                self.results["table"] = self._summary(self.results)
            except Exception as error:  # unexpected figures: keep them, without a table
                self.results["table"] = [f"no table: {type(error).__name__}: {error}"]
            try:
                write(self.path, json.dumps(self.results, indent=1) + "\n")
                outcomes.merge_junit(self._out / "junit.xml", sorted(self._work.glob("*.xml")))
            except OSError as error:  # e.g. a full disk: go on, for what is printed
                say(f"the results could not be written: {error}")

    def put(self, step: Step, status: str, reason: str = "", **more: Any) -> None:
        """Records a step's status. A finished attempt is kept until another one starts, and then
        moved to ``attempts``."""
        with self._lock:
            self.call["states"][step.name] = status
            before = self.results["steps"].get(step.name)
            if before is not None and before["status"] in FINISHED:
                if status == RUNNING:
                    self._keep_attempt(step, before)
                elif status in (NOT_RUN, SKIPPED):
                    say(f"{step.name:<20} {status:<10}           {reason[:110]}")
                    self.save()
                    return
            self.results["steps"][step.name] = {
                "about": step.about,
                "status": status,
                "reason": reason,
                "date": now(),
                **self.made_with(),
                **more,
            }
            self.save()
            if status != RUNNING:
                seconds = more.get("seconds", 0.0)
                say(f"{step.name:<20} {status:<10} {seconds:6.1f} s  {reason[:110]}")

    def made_with(self) -> dict[str, str | None]:
        """What produced a result: GPU and sources."""
        gpu = (self.results["environment"] or {}).get("gpu")
        return {"gpu": gpu, "sources": self._sources}

    def _keep_attempt(self, step: Step, record: dict) -> None:
        if not step.is_setup:
            figures = self.results["figures"].pop(step.name, None)
            attempt = {"step": step.name, **record, "figures": figures}
            self.results["attempts"].append(attempt)


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # broken pipe
        print(text, flush=True)


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def write(path: Path, text: str) -> None:
    """Writes a file atomically."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
