"""A plugin of pytest: a worker of pytest-xdist that lost its GPU ends, and another takes its place.

After an illegal access every later call to CUDA fails in that process, and so every later test.

    python -m pytest -n 16 -p tests.helpers.lost_device
"""

import os
import sys

import pytest

failed = [False]


def device_is_lost() -> bool:
    torch = sys.modules.get("torch")  # a test that used a device has imported it
    if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_runtest_logreport(report):
    failed[0] |= report.failed


@pytest.hookimpl(trylast=True)  # after xdist has sent what became of the test
def pytest_runtest_logfinish(nodeid):
    if failed[0] and "PYTEST_XDIST_WORKER" in os.environ and device_is_lost():
        os._exit(1)
    failed[0] = False
