"""Fixtures of several test files, and where kernels of a GPU run."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels are interpreted, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def one_thread():
    """For files whose tensors are tiny: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
