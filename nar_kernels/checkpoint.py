"""Checkpoints that are never half written."""

import os
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` so that ``path`` is whole at any moment, even in a power cut: old or new.

    Raises:
        OSError: the disk is full, or the folder is not writable. ``path`` is then as it was.
    """
    # In the same folder, because a rename is atomic within one file system only.
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        # The rename itself is on the disk only when the folder is.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU. Executes no code from it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no checkpoint.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own
        raise ValueError(
            f"{path} is not a checkpoint, or damaged: {type(error).__name__}"
        ) from error
    if not isinstance(state, dict) or "config" not in state:
        raise ValueError(f"{path} is not a checkpoint of `nar-kernels train`")
    return state
