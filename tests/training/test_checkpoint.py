"""Checkpoints on disk: whole or not there, and never code."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nar_kernels.training import checkpoint

pytest.importorskip("x_transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"config": {"seed": 1}})

    def fail(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"config": {"seed": 2}})
    monkeypatch.undo()
    assert checkpoint.load(path) == {"config": {"seed": 1}}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save({"config": Path}, tmp_path / "code.pt")  # a class is code
    for name in ("text.pt", "other.pt", "code.pt"):
        with pytest.raises(ValueError, match="not a checkpoint"):
            checkpoint.load(tmp_path / name)
