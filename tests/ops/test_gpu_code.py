"""GPU kernels, compiled without a GPU: the table of `benchmarks.gpu_code`, warnings, and that a
launch that cannot be made says why."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from typing import get_type_hints

import pytest
import torch

from nar_kernels.ops.arguments import CorruptArgs
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.seconds
LIBRARY = next(iter(ROOT.glob("nar_kernels/_cuda.*.so")), None)
COUNTS = ROOT / "benchmarks/gpu_code/sm90.json"
KERNELS = ["corrupt", "nll", "unmask", "choose"]
needs_library = pytest.mark.skipif(
    LIBRARY is None, reason="nar_kernels._cuda is not built: no nvcc"
)


# Beside the installed one: that of PyTorch 2.11, which `make test-all` puts there.
OTHER_TRITON = ROOT / ".venv/triton-3.6.0"


def environment_with(triton):
    """Of a process that imports this Triton, or a reason to skip."""
    if triton == "installed":
        pytest.importorskip("triton", minversion="3.3")  # whose compiler the tool knows
        return os.environ.copy()
    if not OTHER_TRITON.exists():
        pytest.skip(f"Triton {triton} is not in {OTHER_TRITON.relative_to(ROOT)}: `make test-all`")
    paths = [os.fspath(OTHER_TRITON), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


SLOW = pytest.mark.slow


@pytest.mark.minutes
@pytest.mark.parametrize(
    ("triton", "architecture"),
    [
        pytest.param("installed", 90, id="sm_90"),
        pytest.param("installed", 80, id="sm_80", marks=SLOW),
        pytest.param("installed", 100, id="sm_100", marks=SLOW),
        pytest.param("3.6.0", 90, id="sm_90-triton-3.6.0", marks=SLOW),
    ],
)
def test_table(triton, architecture, tmp_path):
    """One test for all of a table, which takes two minutes to make."""
    languages = ["triton"]
    if triton == "installed" and shutil.which("nvcc"):
        # Triton's kernels for sm_80 and, by two versions of it, sm_90: each takes two minutes.
        languages = ["cuda"] if architecture > 90 else ["triton", "cuda"]
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.gpu_code", "--json", out]
    command += ["--architectures", str(architecture), "--languages", *languages]
    environment = environment_with(triton)
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=ROOT)
    rows = json.loads(out.read_text())

    assert {row["sm"] for row in rows} == {architecture}
    assert {row["kernel"].partition(":")[0].lower() for row in rows} == {*languages}
    is_of_constraints = triton == "installed" and importlib.metadata.version("triton")[:3] == "3.9"
    check_next_to_nothing_spills(rows, 0 if is_of_constraints else 32)
    check_blocks_fit_into_the_register_file(rows)
    check_no_two_threads_read_what_another_block_publishes(rows)
    check_main_loads_and_stores_move_16_bytes(rows)
    if is_of_constraints and architecture == 90:
        check_instructions_are_those_of_the_committed_table(rows)


def check_next_to_nothing_spills(rows, most):
    """Of Triton's at most so many bytes: with other versions some words of two variants.

    CUDA's rare functions save registers to memory; what counts there is how often that runs. With
    few tiles a warp, an H200 gains more from twice as many warps than it loses by what spills
    (corrupt_variants_gpu_h200_2026-11-27.json: a4 and a4m1).
    """
    triton_rows = [row for row in rows if row["kernel"].startswith("Triton")]
    assert [row for row in triton_rows if row["spill"] > most] == []
    counted = [row for row in rows if row["unit"]]
    has_few = re.compile(r"CUDA: corrupt, .* (1|4) tiles a warp")
    for row in counted:
        share = row["spilled per unit"] / row["per unit"]
        assert share < (0.05 if has_few.fullmatch(row["kernel"]) else 0.03), row


def check_blocks_fit_into_the_register_file(rows):
    """The largest block that may be launched; registers are given out eight at a time."""
    for row in rows:
        assert -(-row["registers"] // 8) * 8 * row["threads"] <= 65536, row
    threads = [row["threads"] for row in rows if row["kernel"].startswith("CUDA: corrupt")]
    assert not threads or {*threads} >= {544}  # 16 warps that work, and the one that leads


def check_instructions_are_those_of_the_committed_table(rows):
    """A change that costs or saves instructions shows: `python -m benchmarks.gpu_code
    --architectures 90 --json benchmarks/gpu_code/sm90.json`."""
    committed = {row["kernel"]: row for row in json.loads(COUNTS.read_text())}
    counted = {row["kernel"]: row for row in rows if row["unit"]}
    for kernel, row in counted.items():
        assert row["per unit"] == pytest.approx(committed[kernel]["per unit"], rel=0.03), kernel
    cuda_is_there = any(kernel.startswith("CUDA") for kernel in counted)
    assert {*committed} == {row["kernel"] for row in rows} or not cuda_is_there


def check_no_two_threads_read_what_another_block_publishes(rows):
    """They could see different values of one word."""
    assert [row for row in rows if row["torn reads"] != 0] == []


def check_main_loads_and_stores_move_16_bytes(rows):
    for row in rows:
        narrow = any(
            name in row["kernel"]
            for name in ("step", "windows", "documents", "at any address", "choose", "mask_tokens")
        )
        assert row["16-byte loads"] > 0 or narrow, row
        # Documents begin anywhere, so their outputs are not aligned; nor are CUDA's blocks.
        little = (
            "no gradient",
            "unmask",
            "choose",
            "mask_tokens",
            "documents",
            "CUDA: corrupt, windows, blocks",
        )
        stores_little = any(name in row["kernel"] for name in little)
        assert row["16-byte stores"] > 0 or stores_little, row


LAUNCH = """
from typing import get_type_hints
from nar_kernels import _cuda
from nar_kernels.ops.arguments import CorruptArgs
print(_cuda.architectures)
numbers = (int, bool, float)
nothing = tuple(0 if hint in numbers else None for hint in get_type_hints(CorruptArgs).values())
for arguments in (nothing, nothing[1:], ("text", *nothing[1:])):
    try:
        _cuda.corrupt(arguments, (None,) * 9, 0, 0, 0, 0)
    except Exception as error:
        print(type(error).__name__, error)
"""


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_launch_that_fails_says_why():
    """In a process of its own: in this one the module is that of the emulation."""
    result = subprocess.run([sys.executable, "-c", LAUNCH], capture_output=True, text=True)
    architectures, launch, count, kind = result.stdout.splitlines()
    assert "sm_90" in architectures
    assert launch.startswith("RuntimeError cudaSetDevice failed: cudaError")
    assert "driver" in launch or "device" in launch
    takes = len(get_type_hints(CorruptArgs))
    assert count == f"ValueError there are {takes - 1} arguments, but this build takes {takes}"
    assert kind == "AttributeError 'str' object has no attribute 'data_ptr'"


@pytest.mark.parametrize("triton", ["installed", pytest.param("3.6.0", marks=SLOW)])
def test_launches_past_tritons_dispatch_are_those_that_it_would_make(triton):
    """In a process of its own, with a driver that launches nothing."""
    script = [sys.executable, "-m", "tests.helpers.without_a_driver"]
    environment = environment_with(triton)
    result = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == KERNELS


def test_variants_are_counted():
    """In a process of its own, where asserts are left out and nothing is launched."""
    pytest.importorskip("triton")
    command = [sys.executable, "-O", "-m", "pytest", "--assert=plain", "-W", "ignore", "-q"]
    command += ["-p", "tests.helpers.triton_variants", "-m", "triton", "-k", "frozen or bad_labels"]
    files = ["tests/ops/test_corrupt.py", "tests/ops/test_nll.py"]
    result = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    assert "   2 variants of corrupt_kernel\n" in result.stdout, result.stdout  # of two draws
    # Of three types and two strides, with a gradient or not.
    assert "  12 variants of nll_kernel\n" in result.stdout
