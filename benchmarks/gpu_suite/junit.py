"""What pytest's XML files say."""

import os
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

LONGEST = 4000  # characters of a failure that the results hold


def counts(path: Path) -> dict[str, Any]:
    """How many tests passed, skipped and failed, and how those that failed did.

    Raises:
        ValueError: it is no complete XML.
    """
    try:
        found = list(ET.parse(path).iter("testcase"))
    except ET.ParseError as error:
        raise ValueError(f"{path}: {error}") from error
    cases = [case for case in found if case.get("name")]  # others had begun when pytest was stopped
    failures = [case for case in cases if {e.tag for e in case} & {"failure", "error"}]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failures) - len(skipped),
        "skipped": len(skipped),
        "failed": len(failures),
        "unfinished": len(found) - len(cases),
        "failures": {
            f"{case.get('classname')}::{case.get('name')}": "\n".join(
                f"{e.get('message') or ''}\n{e.text or ''}".strip()[-LONGEST:]
                for e in case
                if e.tag in ("failure", "error")
            )
            for case in failures
        },
    }


def merge(target: Path, paths: list[Path]) -> None:
    """Adds the suites of ``paths`` to those in ``target``, by the names of the files."""
    suites: dict[str, ET.Element] = {}
    if target.exists():
        suites = {suite.get("name", ""): suite for suite in ET.parse(target).getroot()}
    for path in paths:
        try:
            (suite,) = ET.parse(path).getroot().iter("testsuite")
        except (ET.ParseError, ValueError):
            continue  # half written
        suite.set("name", path.stem)
        suites[path.stem] = suite
    if not suites:
        return
    root = ET.Element("testsuites")
    root.extend(suites.values())
    beside = target.with_name(target.name + ".tmp")
    ET.ElementTree(root).write(beside, encoding="utf-8", xml_declaration=True)
    os.replace(beside, target)
