"""A run on two processes that is killed (-9) again and again, at any moment, and resumed each time:
its log of losses is that of a run that nobody stopped, bit for bit."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nar_kernels.training import checkpoint
from tests.helpers.paths import ROOT

pytest.importorskip("x_transformers")
psutil = pytest.importorskip("psutil")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available() or os.name != "posix",
        reason="needs the gloo backend",
    ),
]

KILLS = int(os.environ.get("NAR_KERNELS_KILLS", "3"))
STEPS = 100 * KILLS


def launch(folder: Path, name: str, *options: str) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "nar_kernels.cli", "train", "--data", str(folder / "mix.json")),
        *("--out", str(folder / name), "--seq-len", "16", "--num-tokens", "300"),
        *("--dim", "16", "--depth", "1", "--heads", "1", "--threads", "1", "--dropout", "0.1"),
        *("--steps", str(STEPS), "--batch-size", "8", "--held-out", "8", "--eval-draws", "2"),
        *("--eval-every", "40", "--save-every", "7", "--ema", "0.9", "--quiet", *options),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Torchrun and its workers, which are no children of this process."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.communicate()


def finish(process: subprocess.Popen[bytes]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()


def steps_done(folder: Path) -> int:
    return int(checkpoint.read(folder / "last.pt")["loader"]["step"])


@pytest.mark.minutes
@pytest.mark.timeout(1200)
def test_the_log_of_a_run_that_was_killed(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 298, 40_000).astype("uint16")
    np.save(tmp_path / "a.npy", ids[:30_000])
    np.save(tmp_path / "b.npy", ids[30_000:])
    sources = [{"data": "a.npy", "weight": 0.7}, {"data": "b.npy", "weight": 0.3}]
    (tmp_path / "mix.json").write_text(json.dumps({"mixture": sources}))
    finish(launch(tmp_path, "whole"))

    choose, moments = random.Random(0), []
    options: list[str] = []
    for _ in range(KILLS):
        process = launch(tmp_path, "killed", *options)
        running = tmp_path / "killed" / "last.pt"
        before = running.stat().st_mtime_ns if running.exists() else 0
        # Once it has saved something new; from then on, at any moment.
        while process.poll() is None and (
            not running.exists() or running.stat().st_mtime_ns == before
        ):
            time.sleep(0.01)
        time.sleep(choose.uniform(0, 0.5))
        kill(process)
        moments.append(steps_done(tmp_path / "killed"))
        options = ["--resume"]
    finish(launch(tmp_path, "killed", "--resume"))
    print("killed after the checkpoints of steps", moments)

    whole, killed = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "killed"))
    assert moments[0] < moments[-1] <= STEPS or KILLS < 2
    assert whole["loader"]["step"] == STEPS
    assert torch.equal(whole["log"]["losses"], killed["log"]["losses"])
    assert whole["log"]["curve"] == killed["log"]["curve"]
    for name, weight in whole["model"].items():
        assert torch.equal(weight, killed["model"][name]), name
