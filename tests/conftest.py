"""Fixtures of several test files."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """For files whose tensors are tiny: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
