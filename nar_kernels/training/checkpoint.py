"""Checkpoints that are never half written.

A checkpoint is one file. Tensors that are divided over ranks lie in a folder beside it, written by
torch.distributed.checkpoint: each rank writes its own part, and any number of ranks reads it.
"""

import glob
import os
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only

from nar_kernels import distributed, files
from nar_kernels.training import parallel

StrPath = str | os.PathLike[str]

_SHARDS = "shards"  # in a state: the name of the folder


def save(path: StrPath, state: dict[str, Any]) -> None:
    """Writes ``state`` so that ``path`` is whole at any moment, even in a power cut: old or new.

    All ranks must call this, with the same values. Their folder must be the same.

    Raises:
        OSError: the disk is full, or the folder is not writable. It names the file. ``path`` is
            then as it was.
    """
    path = Path(path)
    divided = {
        keystr(key): value
        for key, value in tree_flatten_with_path(state)[0]
        if parallel.is_divided(value)
    }
    if divided:
        folder = f"{path.stem}.shards-{distributed.broadcast_object(uuid.uuid4().hex[:12])}"
        _write_shards(path.with_name(folder), divided)
        # Their shapes and types stay in the file.
        state = tree_map_only(Tensor, _without_divided_values, state) | {_SHARDS: folder}
    if distributed.rank() == 0:
        _write_file(path, state)
        remove_shards(path, but=state.get(_SHARDS))


def remove_shards(path: Path, but: str | None = None) -> None:
    """Removes the folders of checkpoints that were at ``path`` once, also unfinished ones."""
    for folder in _shards_of(path):
        if folder.name != but:
            shutil.rmtree(folder)


def remove_leftovers(path: Path) -> None:
    """Removes what died before it took the place of ``path``. Nobody else may be writing it."""
    files.remove_temporary_files(path)
    if _shards_of(path):
        remove_shards(path, but=read(path).get(_SHARDS) if path.exists() else None)


def _shards_of(path: Path) -> list[Path]:
    return list(path.parent.glob(f"{glob.escape(path.stem)}.shards-*"))


def _without_divided_values(tensor: Tensor) -> Tensor:
    if not parallel.is_divided(tensor):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    from torch.distributed import checkpoint as dcp

    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))
    except dcp.CheckpointException as error:  # on all ranks, if one fails
        if distributed.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        first = next(iter(error.failures.values()))[0]
        cause = _cause(first)
        if cause is not None:
            raise files.with_filename(cause, folder) from error
        raise OSError(f"could not write {folder}: {first}") from error


def _write_file(path: Path, state: dict[str, Any]) -> None:
    with files.atomic_write(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            cause = _cause(error)
            if cause is None:
                raise
            raise cause from None


def _cause(error: BaseException) -> OSError | None:
    """The system's error, also behind torch's own complaint about a file that came out short."""
    errors = (error, error.__context__)
    return next((e for e in errors if isinstance(e, OSError)), None)


def read(path: StrPath) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, but for tensors that were divided: those are on the device
    ``meta``, without values. Executes no code from the file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no checkpoint.
    """
    path = Path(path)
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


def fill(path: StrPath, state: dict[str, Any], *, alone: bool = False) -> None:
    """Gives the tensors of ``state`` that were divided their values, in place.

    The index of the folder is a pickle, so its reader must trust who wrote it.

    Args:
        path: where ``state`` was read.
        state: of :func:`read`, with memory for each such tensor, whole or divided anyhow, in place
            of the one on ``meta``; one that still is stays so.
        alone: only this process calls. Otherwise all ranks must.

    Raises:
        FileNotFoundError: the folder is missing.
    """
    if _SHARDS not in state:
        return
    from torch.distributed import checkpoint as dcp

    folder = Path(path).with_name(state[_SHARDS])
    if not (folder / ".metadata").exists():
        raise FileNotFoundError(f"{path} has its weights in {folder}, which is not there")
    reader = dcp.FileSystemReader(folder)
    divided = reader.read_metadata().state_dict_metadata
    tensors = {
        keystr(key): value
        for key, value in tree_flatten_with_path(state)[0]
        if keystr(key) in divided and not value.is_meta
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is .*single process", UserWarning)
        # PyTorch 2.6 has no such option, and without other ranks it needs none.
        options = {"no_dist": True} if alone and distributed.world_size() > 1 else {}
        dcp.load(tensors, storage_reader=reader, **options)


def load(path: StrPath) -> dict[str, Any]:
    """Reads a checkpoint with whole tensors onto the CPU, in this process alone.

    Raises:
        FileNotFoundError, ValueError: as in :func:`read` and :func:`fill`.
    """

    def with_memory(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor

    state = tree_map_only(Tensor, with_memory, read(path))
    fill(path, state, alone=True)
    return state
