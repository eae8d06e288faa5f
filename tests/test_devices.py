"""What the tests of GPU kernels lean on, without a GPU."""

import re
import subprocess
import sys
import warnings

import pytest
import torch

from tests.helpers.devices import no_waiting
from tests.helpers.paths import ROOT

WARNING = "Synchronization debug mode is a prototype feature and does not yet detect all"


def test_no_waiting_copes_with_the_warning_and_restores_the_mode(monkeypatch):
    """PyTorch warns once, and warnings are errors here."""
    modes = []

    def set_mode(mode):
        if not modes:
            warnings.warn(WARNING, UserWarning, stacklevel=2)
        modes.append(mode)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.raises(ZeroDivisionError), no_waiting():
        assert modes == ["error"]
        raise ZeroDivisionError
    assert modes == ["error", "default"]


LOST = """
import os
import torch
import pytest

broken = []

def synchronize():
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize

@pytest.mark.parametrize("number", range(6))
def test(number):
    if number == 2:
        broken.append(number)
    torch.cuda.synchronize()
    assert number != 4  # fails, and loses nothing
"""


@pytest.mark.seconds
def test_a_worker_that_lost_its_gpu_is_replaced(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_lost.py").write_text(LOST)
    command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "tests.helpers.lost_device", "-v"]
    command += ["--rootdir", str(tmp_path), "-p", "no:cacheprovider", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    for number in (0, 1, 3, 5):
        assert re.search(rf"PASSED \S*test_lost.py::test\[{number}\]", result.stdout)
    assert "RuntimeError: CUDA error: an illegal memory access" in result.stdout
    assert "crashed while running 'test_lost.py::test[2]'" in result.stdout
    assert re.search(r"3 failed, 4 passed", result.stdout)
