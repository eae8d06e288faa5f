"""Test outcomes as JSON lines, written as each test ends, so that they survive a crash of pytest;
and pytest's JUnit XML."""

import json
import os
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

LONGEST = 4000  # characters kept of a failure's text
MOST = 60  # failures kept with their text
XML_LIMIT = 8 << 20  # bytes


def append(path: Path, test: str, outcome: str, text: str = "") -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, "text": text[-LONGEST:]}) + "\n")


def read(path: Path, **made_with: str | None) -> dict[str, dict]:
    """Outcomes by test: the last line of each test counts, but a failure is never replaced.
    ``made_with``, such as the GPU, is added to each."""
    found: dict[str, dict] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            of_test = json.loads(line)
        except ValueError:  # truncated line
            continue
        name = of_test.pop("test")
        if found.get(name, {}).get("outcome") == "failed" != of_test["outcome"]:
            continue
        failures = sum(of["outcome"] == "failed" for of in found.values())
        if not of_test["text"] or failures >= MOST:
            del of_test["text"]
        found[name] = {**of_test, **made_with}
    return found


def passed(tests: dict[str, dict], **made_with: str | None) -> list[str]:
    """Names of tests that passed with the same ``made_with``."""
    wanted = {"outcome": "passed", **made_with}.items()
    return [name for name, of_test in tests.items() if wanted <= of_test.items()]


def counts(tests: dict[str, dict]) -> str:
    number = Counter(of_test["outcome"] for of_test in tests.values())
    kinds = ("passed", "failed", "skipped", "began")
    names = {"began": "unfinished"}
    return ", ".join(f"{number[kind]} {names.get(kind, kind)}" for kind in kinds)


def merge_junit(target: Path, paths: list[Path]) -> None:
    """Merges the test suites of ``paths`` into ``target``; suites are named by file."""
    suites: dict[str, ET.Element] = {}
    for path in [target, *paths]:
        try:
            root = ET.parse(path).getroot()
        except (OSError, ET.ParseError):  # missing or truncated
            continue
        for suite in root.iter("testsuite"):
            if path != target:
                suite.set("name", path.stem)
            suites[suite.get("name", "")] = suite
    if not suites:
        return
    root = ET.Element("testsuites")
    root.extend(suites.values())
    text = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    if len(text) <= XML_LIMIT:
        beside = target.with_name(target.name + ".tmp")
        beside.write_bytes(text)
        os.replace(beside, target)
