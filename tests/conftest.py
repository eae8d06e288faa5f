"""Fixtures of several test files, and where kernels of a GPU run."""

import importlib.util
import os
import sys

import pytest
import torch

from tests import cuda_on_cpu
from tests.helpers import interpreter

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores, and so do the processes that their tests start.
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

if not torch.cuda.is_available():
    # Before anything imports Triton or nar_kernels: kernels of a GPU run on CPU tensors, those of
    # Triton in its interpreter and those of CUDA in an emulation.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    emulated = cuda_on_cpu.load()
    if emulated is not None:
        sys.modules["nar_kernels._cuda"] = emulated
TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET")

if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "repeatable",
        derandomize=True,  # the same examples everywhere: what fails in CI fails here
        deadline=None,  # a busy machine is no fault
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items):
    """Tests are marked with what they need; where it is missing they skip, and say why."""
    # One that takes minutes would else begin when nothing is left for the other workers.
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)
    # A test file that imports what changes this would make tests of Triton skip.
    assert os.environ.get("TRITON_INTERPRET") == TRITON_INTERPRET
    from nar_kernels import backends

    missing = {name: reason for name, reason in backends().items() if reason != "available"}
    if not torch.cuda.is_available():
        missing["gpu"] = "PyTorch sees no CUDA device"
    for item in items:
        for name, reason in missing.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))
    if "triton" not in missing and not torch.cuda.is_available():
        interpreter.patch_language_once()
        for item in items:
            if item.get_closest_marker("triton") and item.get_closest_marker("slow_interpreted"):
                item.add_marker(pytest.mark.slow)


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


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tests leave nothing in the user's, and find nothing there."""
    os.environ["NAR_KERNELS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def one_thread():
    """For files whose tensors are tiny: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sentences(tmp_path_factory):
    """A file of text that a small net learns within seconds."""
    from tests.helpers.runs import SENTENCE

    path = tmp_path_factory.mktemp("data") / "fox.txt"
    path.write_bytes(SENTENCE * 100)
    return path


@pytest.fixture(scope="session")
def learnt(sentences, tmp_path_factory):
    """The report and the folder of a run that has learnt them."""
    from nar_kernels.training.train import train
    from tests.helpers.runs import small

    out = tmp_path_factory.mktemp("learnt")
    report = train(small(sentences, out, dropout=0.0, steps=300, eval_every=50, dim=64, lr=6e-3))
    return report, out


@pytest.fixture
def any_cpu(monkeypatch):
    """Products are in the type of the tensors, whatever this CPU multiplies in."""
    from nar_kernels.ops import linear

    monkeypatch.setattr(linear, "multiplies_in", lambda dtype: True)


@pytest.fixture
def rows_of_a_chunk(monkeypatch):
    """Sets how many rows of logits may exist at a time."""
    from nar_kernels.ops import linear

    def limit(rows, vocabulary):
        for table in (linear.NLL_LIMITS, linear.TRAINING_LIMITS):
            for device, limits in table.items():
                limits = limits._replace(logits=rows * vocabulary)
                monkeypatch.setitem(table, device, limits)

    return limit
