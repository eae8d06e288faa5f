"""`benchmarks/gpu_suite.sh --dry-run` walks through every step without a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS = [
    "environment",
    "build",
    "tests",
    "memcheck",
    "racecheck",
    "initcheck",
    "synccheck",
    "bench_corrupt",
    "bench_masked_nll",
    "bench_train_step",
    "bench_generate",
]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_dry_run(tmp_path):
    pytest.importorskip("triton")
    result = subprocess.run(
        ["benchmarks/gpu_suite.sh", "--dry-run", tmp_path],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert sorted(results["steps"]) == sorted(STEPS)
    assert all(step["exit"] == 0 for step in results["steps"].values())
    assert {row["backend"] for row in results["bench_corrupt"]["rows"]} == {"cuda", "triton"}
    assert all(len(results[bench]["settings"]) > 0 for bench in STEPS[-3:])
    for step in ("tests", "memcheck"):  # something was selected
        assert "tests collected" in results["steps"][step]["last_lines"][-1]
