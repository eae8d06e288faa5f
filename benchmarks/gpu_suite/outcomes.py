"""What became of each test: a line of JSON each, written as they end, so that nothing depends on
how pytest itself ends; and pytest's own XML."""

import json
import os
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

LONGEST = 4000  # characters of a failure
MOST = 60  # failures that are kept with their text
XML_LIMIT = 8 << 20  # bytes


def append(path: Path, test: str, outcome: str, text: str = "") -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, "text": text[-LONGEST:]}) + "\n")


def read(path: Path, **made_with: str | None) -> dict[str, dict]:
    """By test; the last line of one counts, but for a failure, which stays. ``made_with``, such as
    the GPU, is added to each."""
    found: dict[str, dict] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            of_test = json.loads(line)
        except ValueError:  # half written
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
    """Those that did with the same."""
    wanted = {"outcome": "passed", **made_with}.items()
    return [name for name, of_test in tests.items() if wanted <= of_test.items()]


def counts(tests: dict[str, dict]) -> str:
    number = Counter(of_test["outcome"] for of_test in tests.values())
    kinds = ("passed", "failed", "skipped", "began")
    names = {"began": "unfinished"}
    return ", ".join(f"{number[kind]} {names.get(kind, kind)}" for kind in kinds)


def merge_junit(target: Path, paths: list[Path]) -> None:
    """Adds the suites of ``paths`` to those in ``target``, by the names of the files."""
    suites: dict[str, ET.Element] = {}
    for path in [target, *paths]:
        try:
            root = ET.parse(path).getroot()
        except (OSError, ET.ParseError):  # not there, or half written
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
