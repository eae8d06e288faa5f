"""Fixtures of several test files, and where kernels of a GPU run."""

import os
import sys

import pytest
import torch

from tests import cuda_on_cpu

if not torch.cuda.is_available():
    # Before anything imports Triton or nar_kernels: kernels of a GPU run on CPU tensors, those of
    # Triton in its interpreter and those of CUDA in an emulation.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    emulated = cuda_on_cpu.load()
    if emulated is not None:
        sys.modules["nar_kernels._cuda"] = emulated


@pytest.fixture(scope="module")
def one_thread():
    """For files whose tensors are tiny: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
