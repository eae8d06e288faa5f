"""Small training runs, for tests of several modules, and what to look at afterwards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nar_kernels.data.loader import MaskedLoader
from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.data.windows.dataset import TokenDataset
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.training import checkpoint
from nar_kernels.training.config import TrainConfig
from nar_kernels.training.train import Run

SPEC = SequenceSpec(num_tokens=257, seq_len=16, render="bytes", image_shape=None)

SENTENCE = b"the quick brown fox jumps over the lazy dog. "


def small(data: Path, out: Path, **options: Any) -> TrainConfig:
    settings = {
        **{"data": str(data), "out": str(out), "seq_len": 16, "held_out": 8, "eval_draws": 2},
        **{"dim": 32, "depth": 1, "heads": 1, "dropout": 0.1, "batch_size": 8, "lr": 3e-3},
        **{"steps": 40, "warmup": 5, "eval_every": 20, "save_every": 10, "threads": 1},
        **{"quiet": True, "device": "cpu", "precision": "fp32"},
    }
    return TrainConfig(**{**settings, **options})


class Killed(Exception):
    pass


def killed_in_step(number: int, config: TrainConfig, device: torch.device) -> None:
    """Leaves what a run leaves that is killed in a step: its last checkpoint."""
    run = Run(config, device)
    run.begin()
    step = run.step

    def killed(batch: Corrupted | None, here: int) -> None:
        if here == number:
            raise Killed
        step(batch, here)

    run.step = killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run.fit()
    run.release()


def same(a: Any, b: Any) -> bool:
    """Bit for bit, through containers."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def uneven_batch(sentences: Path) -> Corrupted:
    """Windows of very different counts of masked tokens."""
    dataset = TokenDataset(sentences, 16, num_tokens=257, mask_id=256, dtype="uint8")
    return MaskedLoader(dataset, MaskingConfig(257, 256, draw="bernoulli"), 8).batch(0)


def step_of(path: Path) -> int:
    return checkpoint.load(path)["loader"]["step"] if path.exists() else -1


def rgb(path: Path) -> np.ndarray:
    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(path).convert("RGB")).astype(int)
