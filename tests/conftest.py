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


def pytest_collection_modifyitems(items):
    """Tests are marked with what they need; where it is missing they skip, and say why."""
    from nar_kernels import backends

    missing = {name: reason for name, reason in backends().items() if reason != "available"}
    if not torch.cuda.is_available():
        missing["gpu"] = "PyTorch sees no CUDA device"
    for item in items:
        for name, reason in missing.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=[0, 1, 2], ids=["generic", "avx2", "avx512"])
def simd_level(request):
    """For tests that must hold with each instruction set of the C++ extension."""
    from nar_kernels.ops.backends import cpp

    if cpp is None:
        pytest.skip("the C++ extension is not built")
    best = cpp.simd_level()
    if request.param > best:
        pytest.skip(f"this CPU has SIMD level {best}")
    cpp.limit_simd(request.param)
    assert cpp.simd_level() == request.param
    yield request.param
    cpp.limit_simd(best)


@pytest.fixture(scope="module")
def one_thread():
    """For files whose tensors are tiny: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
