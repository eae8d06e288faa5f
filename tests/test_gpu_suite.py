"""`benchmarks.gpu_suite`: its machinery, with steps that pass, fail, hang and are killed; a walk
through all of its real steps without a GPU; and the table at the end."""

import copy
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_suite import (
    hardware,
    log,
    outcomes,
    predictions,
    processes,
    report,
    runner,
    wheels,
)
from benchmarks.gpu_suite.__main__ import chosen, digest_of_sources
from benchmarks.gpu_suite.runner import Suite
from benchmarks.gpu_suite.sanitize import verdict
from benchmarks.gpu_suite.step import SKIP, Step
from benchmarks.gpu_suite.steps import TESTS, all_steps
from nar_kernels.ops.backends import cpp
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.seconds


def python(name: str, code: str, timeout: float = 40, **more) -> Step:
    more = {"min_seconds": 0, "grace": 1, **more}
    return Step(name, f"about {name}", [sys.executable, "-c", code], timeout, **more)


PASSES = python("passes", "print('fine')")
FAILS = python("fails", "print('one'); print('wrong: 3'); raise SystemExit(3)")
SKIPS = python("skips", f"print('no peer here'); raise SystemExit({SKIP})")
HANGS = python("hangs", "import time; print('begun'); time.sleep(600)", 3, grace=0.5)
IGNORES = python(
    "ignores",
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)",
    3,
    grace=0.3,
)
DIES = python("dies", "import os, signal; print('soon'); os.kill(os.getpid(), signal.SIGKILL)")
# Its child holds on to the output.
LEAVES = python(
    "leaves",
    "import subprocess, sys\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])",
)


def run(steps, tmp_path, minutes=1.0, call=1, **more) -> tuple[int, dict]:
    """The exit status and the results of a call in the folder ``out``."""
    suite = Suite(steps, tmp_path / "out", tmp_path / f"work{call}", minutes=minutes, **more)
    status = suite.run()
    return status, json.loads((tmp_path / "out/results.json").read_text())


def states(results: dict) -> dict[str, tuple[str, str]]:
    return {name: (step["status"], step["reason"]) for name, step in results["steps"].items()}


# ---- one call


def test_what_becomes_of_a_step(tmp_path):
    start = time.monotonic()
    steps = [PASSES, FAILS, SKIPS, HANGS, IGNORES, DIES, LEAVES]
    status, results = run(steps, tmp_path)
    assert time.monotonic() - start < 60
    assert status == 1
    assert states(results) == {
        "passes": ("passed", "fine"),
        "fails": ("failed", "wrong: 3"),
        "skips": ("skipped", "no peer here"),
        "hangs": ("timed out", "after 3 s"),
        "ignores": ("timed out", "after 3 s"),
        "dies": ("failed", "killed by SIGKILL; soon"),
        "leaves": ("passed", ""),
    }
    assert results["steps"]["fails"]["exit"] == 3
    assert results["steps"]["fails"]["tail"] == ["one", "wrong: 3"]
    lines = (tmp_path / "out/suite.log").read_text().splitlines()
    assert {"passes| fine", "fails| one", "hangs| begun", "dies| soon"} <= {*lines}


def test_all_that_passes_or_skips_is_success(tmp_path):
    assert run([PASSES, SKIPS], tmp_path)[0] == 0


def test_what_is_missing_is_skipped_and_said(tmp_path):
    steps = [
        FAILS,
        python("needs", "", needs=("fails",)),
        python("package", "", packages=("json", "no_such_module")),
        python("tool", "", tools=("no-such-tool",)),
        python("brought", "import brought", packages=("brought",)),
        python("never", "", needs=("unknown",)),
    ]
    (tmp_path / "work1/site").mkdir(parents=True)
    (tmp_path / "work1/site/brought.py").touch()
    _, results = run(steps, tmp_path)
    assert states(results) == {
        "fails": ("failed", "wrong: 3"),
        "needs": ("not run", "it needs fails: failed"),
        "package": ("skipped", "no_such_module is not installed"),
        "tool": ("skipped", "no-such-tool is not on PATH"),
        "brought": ("passed", ""),
        "never": ("not run", "it needs unknown: not run"),
    }


def test_a_call_ends_with_its_minutes(tmp_path, monkeypatch):
    """A step is cut down to what is left, and what comes later is not begun."""
    monkeypatch.setattr(runner, "READER_GRACE", 1)
    long = python("long", "import time; time.sleep(600)", 100)
    late = python("late", "", min_seconds=8)
    start = time.monotonic()
    status, results = run([long, late], tmp_path, minutes=8 / 60)
    assert 5 < time.monotonic() - start < 12
    assert status == 1
    (state, reason), late_state = states(results).values()
    assert state == "timed out" and reason in ("after 5 s", "after 6 s")
    assert late_state == ("not run", "0 s were left, and it needs 8")


def test_steps_beside_each_other(tmp_path):
    """Those next to each other that say so overlap; no other step does."""
    code = "import time; print(time.time()); time.sleep(3); print(time.time())"
    steps = [
        python("first", code),
        *(python(f"beside{i}", code, parallel=True) for i in range(3)),
        python("last", code),
    ]
    _, results = run(steps, tmp_path)
    times = {name: [*map(float, step["tail"])] for name, step in results["steps"].items()}
    begin = max(times[f"beside{i}"][0] for i in range(3))
    end = min(times[f"beside{i}"][1] for i in range(3))
    assert begin < end
    assert times["first"][1] < min(times[f"beside{i}"][0] for i in range(3))
    assert max(times[f"beside{i}"][1] for i in range(3)) < times["last"][0]


def test_few_small_files_whatever_is_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "LIMIT", 30_000)
    monkeypatch.setattr(log, "LIMIT_OF_STEP", 10_000)
    chatty = "print(100_000 * 'x'); [print(i, 100 * 'x') for i in range(2000)]; print('the end')"
    _, results = run([python(name, chatty) for name in "abcdef"], tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "results.json",
        "suite.log",
    ]
    assert (tmp_path / "out/suite.log").stat().st_size <= 30_000
    assert "a| (and more, which is left out)" in (tmp_path / "out/suite.log").read_text()
    assert results["steps"]["f"]["reason"] == "the end"
    assert len(json.dumps(results)) < 100_000


def test_figures_are_part_of_the_results_and_half_written_ones_are_not(tmp_path):
    code = (
        "from pathlib import Path; Path(r'{work}/%s.json').write_text('%s'); raise SystemExit(%d)"
    )
    steps = [
        python("bench_a", code % ("bench_a", '{"speed": 3}', 1)),
        python("bench_b", code % ("bench_b", '{"spe', 0)),
        python("environment", code % ("environment", '{"gpu": "H999"}', 0)),
        PASSES,
    ]
    _, results = run(steps, tmp_path)
    assert results["figures"] == {"bench_a": {"speed": 3}}
    assert results["environment"] == {"gpu": "H999"}
    assert results["steps"]["passes"]["gpu"] == "H999"


def test_a_table_that_fails_takes_nothing_with_it(tmp_path):
    def summary(results):
        return [results["figures"]["bench"]["rows"]]

    status, results = run([PASSES], tmp_path, summary=summary)
    assert status == 0 and states(results) == {"passes": ("passed", "fine")}
    assert results["table"] == ["no table: KeyError: 'bench'"]


# ---- the next call


def test_a_second_call_does_what_the_first_did_not_pass(tmp_path):
    """Also where the first one's results were brought to another machine: nothing else is kept."""
    counting = "open(r'{out}/{name}', 'a').write('x')"

    def counted(name, then="", **more):
        return python(name, counting.format(out=tmp_path, name=name) + then, **more)

    steps = [
        counted("sets_up", is_setup=True),
        counted("works"),
        counted("fails", "; raise SystemExit(1)"),
    ]
    assert run(steps, tmp_path, sources="abc")[0] == 1
    steps[2] = counted("fails")
    status, results = run(steps, tmp_path, call=2, sources="abd")
    assert status == 0
    times = {step.name: len((tmp_path / step.name).read_text()) for step in steps}
    assert times == {"sets_up": 2, "works": 1, "fails": 2}
    sources = {name: step["sources"] for name, step in results["steps"].items()}
    assert sources == {"sets_up": "abd", "works": "abc", "fails": "abd"}
    assert [call["sources"] for call in results["calls"]] == ["abc", "abd"]
    run(steps, tmp_path, call=3, again=True)
    assert len((tmp_path / "works").read_text()) == 2


WRITES = "open(r'{work}/bench.json', 'w').write('{\"rows\": %d}'); raise SystemExit(%d)"


def test_no_attempt_is_lost(tmp_path):
    """Neither to another attempt nor to a call that does not come to it."""
    run([python("bench", WRITES % (1, 1))], tmp_path)
    status, results = run([python("bench", "", min_seconds=1e6)], tmp_path, call=2)
    assert status == 1 and states(results) == {"bench": ("failed", "exit status 1")}
    assert results["calls"][-1]["states"] == {"bench": "not run"}
    _, results = run([python("bench", "", packages=("no_such_module",))], tmp_path, call=3)
    assert states(results) == {"bench": ("failed", "exit status 1")}
    assert results["figures"] == {"bench": {"rows": 1}} and results["attempts"] == []
    _, results = run([python("bench", "raise SystemExit(2)")], tmp_path, call=4)
    assert states(results) == {"bench": ("failed", "exit status 2")}
    (attempt,) = results["attempts"]
    assert (attempt["step"], attempt["exit"], attempt["figures"]) == ("bench", 1, {"rows": 1})


def test_what_never_ran_comes_before_what_failed(tmp_path):
    first, second = python("first", "raise SystemExit(1)"), python("second", "")
    run([first], tmp_path, sources="a")
    _, results = run([first, second], tmp_path, call=2, sources="a")
    assert [*results["calls"][-1]["states"]] == ["second", "first"]
    _, results = run([first, second], tmp_path, call=3, sources="mended")
    assert [*results["calls"][-1]["states"]] == ["first", "second"]


def test_the_environment_is_that_of_this_call(tmp_path):
    code = "open(r'{work}/environment.json', 'w').write('{\"gpu\": \"%s\"}'); raise SystemExit(%d)"
    for call, (gpu, fails) in enumerate([("H100", 0), ("H200", 0)], 1):
        environment = python("environment", code % (gpu, fails), is_setup=True)
        work = python(f"step{call}", "", needs=("environment",))
        _, results = run([environment, work], tmp_path, call=call)
        assert results["steps"][f"step{call}"]["gpu"] == results["environment"]["gpu"] == gpu
    environment = python("environment", "raise SystemExit('no GPU')", is_setup=True)
    status, results = run(
        [environment, python("step3", "", needs=("environment",))], tmp_path, 1, 3
    )
    assert status == 1 and results["environment"] is None
    assert states(results)["step3"] == ("not run", "it needs environment: failed")


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.json").write_text("[1")
    with pytest.raises(SystemExit, match="is not what this suite writes .*: move it away"):
        run([PASSES], tmp_path)


# ---- a call that is stopped

DRIVER = """
import sys
from pathlib import Path
from benchmarks.gpu_suite.runner import Step, Suite
code = '''
import os, time
with open(r"{{work}}/bench.json", "w") as file:
    file.write('{{"pid": %d}}' % os.getpid())
time.sleep(600)
'''
steps = [
    Step("first", "", [sys.executable, "-c", "print(1)"], 20),
    Step("second", "", [sys.executable, "-c", code], 600),
    Step("third", "", [sys.executable, "-c", ""], 20),
]
sys.exit(Suite(steps, Path(r"{out}"), Path(r"{work}"), minutes=5).run())
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_from_outside(number, tmp_path):
    """The results are there, figures of the step that ran included; also after a SIGKILL."""
    script = DRIVER.format(out=tmp_path / "out", work=tmp_path / "work")
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        results: dict = {}
        deadline = time.monotonic() + 60
        while "bench" not in results.get("figures", {}):
            assert time.monotonic() < deadline
            time.sleep(0.1)
            if (tmp_path / "out/results.json").exists():
                results = json.loads((tmp_path / "out/results.json").read_text())
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    results = json.loads((tmp_path / "out/results.json").read_text())
    pid = results["figures"]["bench"]["pid"]
    if number == signal.SIGKILL:
        assert process.returncode == -number
        assert states(results) == {"first": ("passed", "1"), "second": ("running", "")}
        if not processes.WITH_THE_SUITE:
            os.kill(pid, signal.SIGKILL)
    else:
        assert process.returncode == 128 + number
        assert states(results) == {
            "first": ("passed", "1"),
            "second": ("stopped", number.name),
            "third": ("not run", number.name),
        }
        assert "results:" in output
    while is_running(pid):
        assert time.monotonic() < deadline + 60
        time.sleep(0.1)


def test_signals_during_writing_lose_nothing(tmp_path):
    """Whenever it comes: while results are written, or between steps."""
    script = """
import os, signal, sys, threading
from pathlib import Path
from benchmarks.gpu_suite import record, runner
original, writes = record.write, []

def write(path, text):
    writes.append(path)
    if len(writes) == {at}:
        os.kill(os.getpid(), signal.SIGTERM)
    original(path, text)

record.write = write
step = runner.Step("step", "", [sys.executable, "-c", "print(1)"], 20)
sys.exit(runner.Suite([step], Path(r"{out}"), Path(r"{work}"), minutes=5).run())
"""
    for at in (1, 2, 3):
        paths = {"out": tmp_path / f"out{at}", "work": tmp_path / f"work{at}"}
        command = [sys.executable, "-c", script.format(at=at, **paths)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 128 + signal.SIGTERM and not result.stderr, result.stderr
        assert "step" in json.loads((paths["out"] / "results.json").read_text())["steps"]


def test_nobody_reads_the_output(tmp_path):
    script = DRIVER.format(out=tmp_path / "out", work=tmp_path / "work").replace("(600)", "(0)")
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE) as p:
        p.stdout.close()
        p.wait(60)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {state for state, _ in states(results).values()} == {"passed"}


# ---- tests of pytest

SOME_TESTS = """
import time
import pytest

@pytest.mark.parametrize("number", range(4))
def test_passes(number):
    pass

def test_fails():
    assert 1 == 2

@pytest.mark.skip(reason="no GPU")
def test_skips():
    pass
"""
HANGING = """

def test_hangs():
    time.sleep(600)
"""


def pytest_step(name: str, path: Path, timeout: float, **more) -> Step:
    command = [sys.executable, "-m", "benchmarks.gpu_suite.run_tests", "--workers", "2"]
    command += ["--results", f"{{work}}/{name}", "--", "--without-gpu"]
    command += [str(path), f"--rootdir={path.parent}"]
    return Step(name, "", command, timeout, min_seconds=0, **more)


def test_results_of_tests(tmp_path):
    """As they end; and a later call runs those alone that did not pass."""
    pytest.importorskip("xdist")
    some = tmp_path / "test_some.py"
    some.write_text(SOME_TESTS)
    status, results = run([pytest_step("some", some, 290)], tmp_path, minutes=5)
    assert status == 1 and results["steps"]["some"]["status"] == "failed"
    tests = results["tests"]["some"]
    assert outcomes.counts(tests) == "4 passed, 1 failed, 1 skipped, 0 unfinished"
    (failure,) = (of["text"] for of in tests.values() if of["outcome"] == "failed")
    assert "assert 1 == 2" in failure
    some.write_text(SOME_TESTS.replace("1 == 2", "1 == 1").replace("pass\n", "assert False\n"))
    status, results = run([pytest_step("some", some, 290)], tmp_path, minutes=5, call=2)
    assert status == 0  # what would fail now has passed before, with the same sources
    assert (
        outcomes.counts(results["tests"]["some"]) == "5 passed, 0 failed, 1 skipped, 0 unfinished"
    )
    assert results["attempts"][0]["status"] == "failed"
    (suite,) = ET.parse(tmp_path / "out/junit.xml").getroot()
    assert (suite.get("name"), suite.get("tests")) == ("some", "2")


def test_a_test_that_passed_with_other_code_or_on_another_gpu_is_run_again(tmp_path):
    path = tmp_path / "tests.jsonl"
    outcomes.append(path, "a", "passed")
    tests = outcomes.read(path, gpu="H100", sources="abc")
    assert outcomes.passed(tests, gpu="H100", sources="abc") == ["a"]
    assert outcomes.passed(tests, gpu="H100", sources="abd") == []
    assert outcomes.passed(tests, gpu="H200", sources="abc") == []
    some = tmp_path / "test_some.py"
    some.write_text(SOME_TESTS)
    run([pytest_step("some", some, 290)], tmp_path, minutes=5, sources="abc")
    _, results = run(
        [pytest_step("some", some, 290)], tmp_path, minutes=5, call=2, sources="mended"
    )
    assert {of["sources"] for of in results["tests"]["some"].values()} == {"mended"}


def test_tests_that_are_all_skipped_show_nothing(tmp_path):
    skips = "import pytest\n@pytest.mark.skip(reason='no GPU')\ndef test(): pass"
    (tmp_path / "test_none.py").write_text(skips)
    status, results = run(
        [pytest_step("none", tmp_path / "test_none.py", 290)], tmp_path, minutes=5
    )
    assert status == 0 and results["steps"]["none"]["status"] == "skipped"
    assert "1 skipped" in results["steps"]["none"]["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_tests_run_on_a_gpu_or_not_at_all(tmp_path):
    """They would pass in the interpreter and the emulation, and show nothing."""
    command = [sys.executable, "-m", "benchmarks.gpu_suite.run_tests"]
    command += ["--results", "{work}/some", "--", "tests/ops/test_corrupt.py", "-k", "frozen"]
    status, results = run([Step("some", "", command, 290, min_seconds=0)], tmp_path, minutes=5)
    assert status == 1
    assert states(results)["some"][0] == "failed"
    assert "PyTorch sees no CUDA device" in states(results)["some"][1]


def test_a_test_that_hangs_costs_itself_alone(tmp_path):
    for plugin in ("xdist", "pytest_timeout"):
        pytest.importorskip(plugin)
    (tmp_path / "test_hanging.py").write_text(SOME_TESTS + HANGING)
    script = "import benchmarks.gpu_suite.run_tests as r; r.LIMIT = 11; r.main()"
    command = [sys.executable, "-c", script, "--results", "{work}/hanging", "--", "--without-gpu"]
    command += [str(tmp_path / "test_hanging.py"), f"--rootdir={tmp_path}"]
    _, results = run([Step("hanging", "", command, 120, min_seconds=0)], tmp_path, minutes=3)
    assert results["steps"]["hanging"]["status"] == "failed"
    tests = results["tests"]["hanging"]
    assert outcomes.counts(tests) == "4 passed, 2 failed, 1 skipped, 0 unfinished"
    assert any("crashed while running" in of.get("text", "") for of in tests.values())
    assert "in test_hangs\n" in (tmp_path / "out/suite.log").read_text()  # where it hung


def test_tests_that_are_stopped_have_said_what_they_know(tmp_path):
    (tmp_path / "test_hanging.py").write_text(SOME_TESTS + HANGING)
    step = pytest_step("hanging", tmp_path / "test_hanging.py", 100)
    suite = Suite([step], tmp_path / "out", tmp_path / "work", minutes=3)
    finished = tmp_path / "work/hanging.jsonl"

    def stop_when_the_others_have_passed():
        while not finished.exists() or finished.read_text().count('"passed"') < 4:
            time.sleep(0.1)
        suite._on_signal(signal.SIGTERM, None)

    threading.Thread(target=stop_when_the_others_have_passed, daemon=True).start()
    assert suite.run() == 128 + signal.SIGTERM
    tests = json.loads((tmp_path / "out/results.json").read_text())["tests"]["hanging"]
    assert outcomes.counts(tests).startswith("4 passed")


def test_outcomes_of_tests(tmp_path):
    path = tmp_path / "tests.jsonl"
    outcomes.append(path, "a", "began")
    outcomes.append(path, "a", "passed")
    outcomes.append(path, "b", "failed", 10_000 * "x" + "the end")
    outcomes.append(path, "b", "passed")  # its clean-up
    outcomes.append(path, "c", "began")
    with path.open("a") as file:
        file.write('{"test": "d", "outc')
    tests = outcomes.read(path)
    assert {name: of["outcome"] for name, of in tests.items()} == {
        "a": "passed",
        "b": "failed",
        "c": "began",
    }
    assert tests["b"]["text"].endswith("the end") and len(tests["b"]["text"]) <= 4000
    assert outcomes.passed(tests) == ["a"]
    assert outcomes.counts(tests) == "1 passed, 1 failed, 0 skipped, 1 unfinished"


def test_half_an_xml_is_no_result(tmp_path):
    (tmp_path / "half.xml").write_text("<testsuites><testsuite")
    (tmp_path / "junit.xml").write_text("<testsui")
    outcomes.merge_junit(tmp_path / "junit.xml", [tmp_path / "half.xml"])
    assert (tmp_path / "junit.xml").read_text() == "<testsui"


# ---- the steps


def test_steps_are_chosen_by_name_or_kind():
    steps = all_steps(None, is_dry_run=False)
    names = [step.name for step in steps]
    assert len(names) == len({*names})
    set_up = ["wheels", "environment", "build_cpp", "build_cuda"]
    assert [step.name for step in chosen(steps, "smoke")] == [*set_up, "smoke"]
    some = [step.name for step in chosen(steps, "memcheck, bench_unmask")]
    memcheck = [f"memcheck_{kernel}" for kernel in ("corrupt", "nll", "unmask", "choose")]
    assert some == [*set_up, *memcheck, "bench_unmask"]
    with pytest.raises(SystemExit, match="--only tets: there is no such step; there are wheels"):
        chosen(steps, "tets")
    assert all({*step.needs} <= {*names} for step in steps)


@pytest.mark.parametrize(
    "status, output, expected",
    [
        (0, "========= ERROR SUMMARY: 0 errors", 0),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0),
        (0, "4 passed", 1),  # it did not look
        (99, "========= ERROR SUMMARY: 3 errors", 99),
        (1, "========= Error: Device not supported", SKIP),
    ],
)
def test_a_sanitizer_must_say_that_it_found_nothing(status, output, expected):
    assert verdict(status, f"some\n{output}\n")[0] == expected


def test_every_test_of_a_gpu_is_in_a_file_of_the_suite(request):
    marks = ("gpu", "cuda", "triton")
    options = request.config.option
    if request.config.args == ["tests"] and not (options.markexpr or options.keyword):
        # They have all been collected here, which takes half a minute.
        marked = [i for i in request.session.items if any(map(i.get_closest_marker, marks))]
        assert marked
        files = {item.path.relative_to(ROOT).as_posix() for item in marked}
        assert files <= {*TESTS}
        return
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", " or ".join(marks)]
    command += [f"--ignore={path}" for path in TESTS]
    result = subprocess.run([*command, "tests"], cwd=ROOT, capture_output=True, text=True)
    assert "no tests collected" in result.stdout.splitlines()[-1], result.stdout


def test_sources_are_told_apart(tmp_path, monkeypatch):
    from benchmarks.gpu_suite import __main__ as main

    assert digest_of_sources() == digest_of_sources()
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(main, "ROOT", tmp_path)
    empty = digest_of_sources()
    (tmp_path / "csrc/a.h").write_text("a")
    with_one = digest_of_sources()
    (tmp_path / "csrc/a.h").write_text("b")
    assert len({empty, with_one, digest_of_sources()}) == 3


def make_wheel(folder: Path, name: str, version: str) -> None:
    stem, info = f"{name}-{version}", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = '{version}'\n")
        wheel.writestr(f"{info}/METADATA", f"Name: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_wheels_are_installed_without_a_network(tmp_path):
    """The peers, and what is missing; not what is here already. Without all peers it says so."""
    folder, site = tmp_path / "wheels", tmp_path / "site"
    folder.mkdir()
    for name, version in (("attn_gym", "9.0"), ("no_such_package", "1.2"), ("numpy", "1.0")):
        make_wheel(folder, name, version)
    command = [sys.executable, "-m", "benchmarks.gpu_suite.wheels", "install", folder, site]
    result = subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PIP_NO_INDEX": "1"},
    )
    assert result.returncode == SKIP, result.stdout + result.stderr
    assert {path.name for path in site.glob("*.py")} == {"attn_gym.py", "no_such_package.py"}
    last = result.stdout.splitlines()[-1]
    assert last.startswith("peers that are not installed: ") and "liger-kernel" in last
    assert "attn-gym" not in last


def test_versions_that_are_too_old_are_replaced(monkeypatch):
    monkeypatch.setattr(wheels, "installed", lambda name: "68.2.2" if name == "setuptools" else "1")
    assert wheels.is_wanted(Path("setuptools-84.2.1-py3-none-any.whl"))
    assert not wheels.is_wanted(Path("pybind11-3.1.0-py3-none-any.whl"))
    assert wheels.requirement("setuptools") == "setuptools>=77"


# ---- the table at the end

FIGURES = {
    "bench_corrupt_cuda": {
        "gigabytes_per_second": {"copy": 3000.0, "bus": 50.0},
        "rows": [
            {"backend": "cuda", "what": "small", "host_us": 17.0, "gpu_us": 4.0},
            {
                "backend": "cuda",
                "what": "large",
                "gigabytes_per_second": 1500.0,
                "share_of_copy": 0.5,
            },
        ],
    },
    "bench_masked_nll": {
        "settings": [
            {
                "num_tokens": 9,
                "masked_rows": 5,
                "rows": [
                    {"loss": "masked_nll", "failed": None, "ms": 2.0, "peak_bytes": 1e6},
                    {"loss": "CCE, masked rows", "failed": "WRONG", "ms": 3.0, "peak_bytes": 2e6},
                    {"loss": "products alone", "failed": None, "ms": 1.0},
                ],
            }
        ]
    },
}


def test_each_figure_stands_beside_a_limit_or_a_peer():
    rows = [tuple(row) for row in report.rows(FIGURES)]
    assert ("corrupt, cuda: large", 1500.0, "GB/s", "copy", 3000.0, 0.5) in rows
    assert ("corrupt, cuda: small", 17.0, "us of the host", "", None, None) in rows
    nll = "masked_nll, V 9, 5 rows"
    assert (nll, 2.0, "ms", "CCE, masked rows (WRONG)", 3.0, 1.5) in rows
    assert (nll, 1.0, "MB", "CCE, masked rows (WRONG)", 2.0, 2.0) in rows
    assert (nll, 2.0, "ms", "products alone", 1.0, 0.5) in rows
    assert [*report.skipped_peers(FIGURES)] == [
        "bench_corrupt_cuda: skipped x-transformers: not installed, or it failed (see the log)",
        "bench_masked_nll: skipped Liger: not installed, or it failed (see the log)",
    ]


# ---- the page of hardware


def record_of(gpu: str | None, date: str, **steps: str) -> dict:
    return {
        "environment": {"gpu": gpu, "python": "3.12", "cuda": "13.0", "packages": PACKAGES},
        "calls": [{"began": f"{date}T10:00:00+00:00"}],
        "tests": {"smoke": {"a": {"outcome": "passed"}, "b": {"outcome": "failed"}}},
        "steps": {
            name: {"status": status, "gpu": gpu, "date": f"{date}T10:01:00+00:00"}
            for name, status in steps.items()
        },
    }


PACKAGES = {"torch": "2.11.0", "triton": "3.6.0"}


def test_the_page_of_hardware_is_up_to_date():
    """Else: `python -m benchmarks.gpu_suite.hardware`."""
    assert hardware.PAGE.read_text() == hardware.page()


def test_what_ran_where_and_what_did_not(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "RESULTS", tmp_path)
    assert "Nothing has run on a GPU yet" in hardware.page()
    for number, record in enumerate(
        [
            record_of("NVIDIA H100 80GB HBM3", "2027-01-01", smoke="failed", bench_unmask="passed"),
            record_of("NVIDIA H200", "2027-01-03", smoke="passed"),
            record_of("NVIDIA H100 80GB HBM3", "2027-01-02", smoke="passed"),
            record_of("NVIDIA H200", "2027-01-03", smoke="running", bench_unmask="not run"),
        ]
    ):
        folder = tmp_path / f"out{number}"
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(record))
        hardware.add(folder)
    page = hardware.page()
    assert "Nothing has run" not in page
    assert "| step | shows | NVIDIA H100 80GB HBM3 | NVIDIA H200 |" in page
    (smoke,) = (line for line in page.splitlines() if line.startswith("| smoke |"))
    assert smoke.endswith("| passed, 2027-01-02 | passed, 2027-01-03 |")
    (unmask,) = (line for line in page.splitlines() if line.startswith("| bench_unmask |"))
    assert unmask.endswith("| passed, 2027-01-01 |  |")
    assert "gpu_h200_2027-01-03_2.json" in page  # a second one of that day
    (row,) = (line for line in page.splitlines() if "gpu_h200_2027-01-03.json" in line)
    # A last call that saw no GPU takes nothing from those before it.
    record = record_of("NVIDIA B200", "2027-02-01", smoke="passed")
    seen = {**record["calls"][0], "environment": record["environment"]}
    record |= {"environment": None, "calls": [seen, {"began": "2027-02-02", "environment": None}]}
    (tmp_path / "out0/results.json").write_text(json.dumps(record))
    assert hardware.add(tmp_path / "out0").name == "gpu_b200_2027-02-02.json"
    assert "| NVIDIA B200 |" in hardware.page()
    assert "torch 2.11.0, Triton 3.6.0, CUDA 13.0" in row
    assert "1 of 1 steps; tests: 1 passed, 1 failed" in row


def test_the_page_has_the_newest_figures_of_each_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "RESULTS", tmp_path)
    of_loss = FIGURES["bench_masked_nll"]
    for number, (gpu, ms) in enumerate([("NVIDIA H200", 2.0), ("NVIDIA H200", 4.0)]):
        record = record_of(gpu, f"2027-01-0{number + 1}", bench_masked_nll="passed")
        figures = copy.deepcopy(of_loss) | {"device": gpu}
        figures["settings"][0]["rows"][0]["ms"] = ms
        record["figures"] = {"bench_masked_nll": figures}
        record["steps"]["bench_masked_nll"]["tail"] = ['File "/srv/me/x/benchmarks/a.py", line 3']
        folder = tmp_path / f"out{number}"
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(record))
        added = hardware.add(folder)
        assert "/srv" not in added.read_text() and 'File \\"a.py\\", line 3' in added.read_text()
    page = hardware.page()
    assert page.count("### Figures: NVIDIA H200") == 1
    assert "| masked_nll, V 9, 5 rows | 4 | ms | products alone | 1 | 0.25 |" in page
    assert "What Nsight Compute counted" not in page
    row = {"what": "nll: V 9", "us": 5.0, "per unit": 20.0, "predicted": 19.5, "issue %": 61.0}
    row |= {"bytes per unit": 4.0, "warps %": 98.0, "stalls": {"long_scoreboard": 3.0, "wait": 1.0}}
    profile = {"device": "NVIDIA H200", "date": "2027-01-02", "torch": "2.11.0", "rows": [row]}
    (tmp_path / "profile_gpu_h200.json").write_text(json.dumps(profile))
    counted = "| nll: V 9 | 5 | 20 | 19.5 | 4 | 61 | 98 | long scoreboard 3, wait 1 |"
    assert counted in hardware.page()


NCU = """#!{python}
import sys
if "--import" in sys.argv:
    names = '"ID","Kernel Name",' + ",".join(f'"{{name}}"' for name in {names!r})
    print(names, '"","",' + ",".join(f'"{{unit}}"' for unit in {units!r}), sep="\\n")
    print('"0","void nar::corrupt_kernel<8, 1>(int)",' + ",".join(f'"{{x}}"' for x in {values!r}))
else:
    assert "--launch" in sys.argv and sys.argv[sys.argv.index("--only") + 1] == "L 1024"
    print("case: 128 corrupt, cuda: 128 tokens, L 1024, exact")
    print('==PROF== Profiling "corrupt_kernel" - 0: 0%....50%....100% - 6 passes')
"""


def test_what_nsight_compute_says_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    profile = importlib.import_module("profile_kernels")
    metrics = {name: ("1,000", "inst") for name in profile.METRICS.values()}
    metrics["gpu__time_duration.sum"] = ("12.5", "us")
    metrics["dram__bytes_read.sum"] = ("2.5", "Kbyte")
    metrics["dram__bytes_write.sum"] = ("60", "byte")
    metrics |= {profile.STALL.format(name): ("0.5", "inst") for name in profile.STALLS}
    metrics[profile.STALL.format("wait")] = ("3.25", "inst")
    values, units = zip(*metrics.values(), strict=True)
    ncu = tmp_path / "ncu"
    ncu.write_text(NCU.format(python=sys.executable, names=[*metrics], units=units, values=values))
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (case,) = profile.profile(tmp_path / "report", "L 1024")
    (kernel,) = profile.read(tmp_path / "report", tmp_path / "all.csv")
    row = profile.row_of(*case, kernel)
    assert row["what"] == "corrupt, cuda: 128 tokens, L 1024, exact"
    assert row["kernel"] == "void nar::corrupt_kernel<8, 1>"
    assert row["us"] == 12.5 and row["per unit"] == 32 * 1000 / 128
    assert row["bytes per unit"] == 2560 / 128
    assert row["predicted"] == predictions.kernel_of(row["what"])["per unit"]
    assert [*row["stalls"].items()][0] == ("wait", 3.25) and row["pipes"] == {}
    assert "corrupt_kernel" in (tmp_path / "all.csv").read_text()


def test_a_prebuilt_extension_is_used_as_it_is(tmp_path):
    if cpp is None:
        pytest.skip("the C++ extension is not built")
    command = [sys.executable, "-m", "benchmarks.gpu_suite.build", "cpp", str(tmp_path)]
    run = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    assert run([*command, "--prebuilt"]).stdout.startswith("loaded")
    # Without it, it is built for the GPU that a step before has found.
    assert "environment.json" in run(command).stderr
    steps = {step.name: step.command for step in all_steps(None, is_prebuilt=True)}
    assert "--prebuilt" in steps["build_cuda"] and "--prebuilt" not in steps["smoke"]


def test_predictions_stand_beside_figures(monkeypatch):
    corrupt = "corrupt, cuda: 67108864 tokens, L 1024, exact"
    for gpu in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        assert predictions.prediction(corrupt, gpu).endswith(" %")
    assert predictions.prediction(corrupt, "NVIDIA B200") == ""
    assert predictions.prediction("unmask, cuda: V 50258, float32, filter 50", "NVIDIA H100") == ""
    for backend, filter_ in itertools.product(("cuda", "triton"), ("none", "0.3 V", "50")):
        unmask = f"unmask, {backend}: V 50304, float32, filter {filter_}"
        assert predictions.prediction(unmask, "NVIDIA H100").endswith(" %")
    assert {*predictions.KERNELS.values()} <= {*predictions.rows()}
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench_nll = importlib.import_module("bench_nll")
    for setting in bench_nll.CUDA:
        assert predictions.prediction(f"nll: {setting}", "NVIDIA H200").endswith(" %")
    row = {"backend": "cuda", "what": "67108864 tokens, L 1024, exact", "share_of_copy": 0.5}
    row["gigabytes_per_second"] = 1500.0
    record = record_of("NVIDIA H100 80GB HBM3", "2027-01-01", bench_corrupt_cuda="passed")
    record["steps"]["bench_corrupt_cuda"] |= {"reason": "", "sources": None}
    figures = {"gigabytes_per_second": {"copy": 3000.0, "bus": 50.0}, "rows": [row]}
    record |= {"figures": {"bench_corrupt_cuda": figures}, "tests": {}}
    (line,) = (line for line in report.summary(record) if line.startswith(f"| {corrupt} |"))
    assert line.endswith(f"| 0.5 | {predictions.prediction(corrupt, 'H100')} |")


def test_a_dry_run_is_no_result_of_a_gpu(tmp_path):
    with pytest.raises(SystemExit, match="results.json is not there: --add takes the folder"):
        hardware.add(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(record_of(None, "2027-01-01")))
    with pytest.raises(SystemExit, match="is of no GPU: a dry run, or nothing ran"):
        hardware.add(tmp_path)


# ---- all of it


@pytest.mark.slow
@pytest.mark.minutes
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_dry_run(tmp_path):
    for package in ("triton", "x_transformers"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--dry-run"]
    environment = os.environ | {"OUT": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    steps = all_steps(None, is_dry_run=True)
    assert {*results["steps"]} == {step.name for step in steps}
    assert {name for name, (state, _) in states(results).items() if state != "passed"} <= {"wheels"}
    assert {row["backend"] for row in results["figures"]["bench_corrupt_cuda"]["rows"]} == {"cuda"}
    assert {*results["figures"]} == {s.name for s in steps if s.is_benchmark}
    for step in ("smoke", "tests_cuda", "tests_triton", "tests_large", "memcheck_corrupt"):
        assert "collected" in results["steps"][step]["reason"]  # something was selected
    for line in (
        "| unmask, auto: V 33, float32, filter none |",
        "| nll: V 33, bfloat16, bias, no gradient |",
        "| choose, B 2, L 16, random |",
        "| train_step, V 33, ours: whole step |",
    ):
        assert line in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "suite.log"}


def test_help_and_mistakes():
    def suite(*options):
        command = [sys.executable, "-m", "benchmarks.gpu_suite", *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    listed = suite("--list", "--only", "racecheck")
    assert listed.returncode == 0 and "no shared-memory races" in listed.stdout
    wrong = suite("--wheels", "nowhere")
    assert wrong.returncode == 2 and "--wheels nowhere: there is no such folder" in wrong.stderr
