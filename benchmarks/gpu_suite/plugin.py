"""Pytest plugin: tests require a GPU, each outcome is recorded at once, and tests that passed
before are deselected."""

from pathlib import Path

import pytest

from benchmarks.gpu_suite import outcomes
from benchmarks.gpu_suite.step import SKIP


def pytest_addoption(parser):
    group = parser.getgroup("the GPU suite")
    group.addoption("--outcomes", type=Path, metavar="FILE", help="a line of JSON for each test")
    group.addoption("--passed-before", type=Path, metavar="FILE", help="tests to leave out")
    group.addoption("--without-gpu", action="store_true", help="tests may run on the CPU")


def pytest_configure(config):
    if not config.option.without_gpu:
        import torch

        if not torch.cuda.is_available():
            # Kernels would run in the interpreter and the emulation, and prove nothing.
            pytest.exit("PyTorch sees no CUDA device", returncode=1)
    if not hasattr(config, "workerinput"):  # xdist workers report to the main process
        config.pluginmanager.register(Recorder(config))


def passed_before(config) -> set[str]:
    path = config.option.passed_before
    return {*path.read_text(encoding="utf-8").splitlines()} if path and path.exists() else set()


def pytest_collection_modifyitems(config, items):
    before = passed_before(config)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in before])
    items[:] = [item for item in items if item.nodeid not in before]


class Recorder:
    def __init__(self, config):
        self.config, self.path = config, config.option.outcomes

    def write(self, *of_test: str) -> None:
        if self.path is not None:
            outcomes.append(self.path, *of_test)

    def pytest_runtest_logstart(self, nodeid, location):
        self.write(nodeid, "began")

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.write(report.nodeid, "failed", report.longreprtext)
        elif report.skipped or report.when == "call":
            self.write(report.nodeid, report.outcome)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        """If all tests were skipped, the step counts as skipped, too."""
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None or self.config.option.collectonly or exitstatus not in (0, 5):
            return
        has_passed = bool(reporter.stats.get("passed")) or bool(passed_before(self.config))
        session.exitstatus = 0 if has_passed else SKIP
