"""Atomic checkpoints, with sharded tensors in torch.distributed.checkpoint (DCP) format.

A checkpoint is one file. Sharded tensors (DTensor) are in a DCP folder beside it: each rank writes
its own shard, and any number of ranks can load it.
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

_SHARDS = "shards"  # key of the state: name of the DCP folder


def save(path: StrPath, state: dict[str, Any]) -> None:
    """Writes ``state`` atomically: ``path`` holds the old or the new checkpoint at any moment, even
    after a power cut.

    Collective: all ranks must call it, with the same values and a shared folder.

    Raises:
        OSError: the disk is full, or the folder is not writable. It names the file. ``path`` is
            unchanged.
    """
    path = Path(path)
    sharded = {
        keystr(key): value
        for key, value in tree_flatten_with_path(state)[0]
        if parallel.is_dtensor(value)
    }
    if sharded:
        folder = f"{path.stem}.shards-{distributed.broadcast_object(uuid.uuid4().hex[:12])}"
        _write_shards(path.with_name(folder), sharded)
        # The file keeps their shapes and dtypes.
        state = tree_map_only(Tensor, _dtensor_to_meta, state) | {_SHARDS: folder}
    if distributed.rank() == 0:
        _write_file(path, state)
        remove_shards(path, keep=state.get(_SHARDS))


def remove_shards(path: Path, keep: str | None = None) -> None:
    """Removes the DCP folders of former and unfinished checkpoints at ``path``, except ``keep``."""
    for folder in _shard_folders(path):
        if folder.name != keep:
            shutil.rmtree(folder)


def remove_leftovers(path: Path) -> None:
    """Removes temporary files and folders of interrupted saves to ``path``. No other process may be
    saving to it."""
    files.remove_temporary_files(path)
    if _shard_folders(path):
        remove_shards(path, keep=read(path).get(_SHARDS) if path.exists() else None)


def _shard_folders(path: Path) -> list[Path]:
    return list(path.parent.glob(f"{glob.escape(path.stem)}.shards-*"))


def _dtensor_to_meta(tensor: Tensor) -> Tensor:
    if not parallel.is_dtensor(tensor):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    from torch.distributed import checkpoint as dcp

    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))
    except dcp.CheckpointException as error:  # raised on all ranks if one fails
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
    """The OSError behind ``error``, if any: torch may raise its own for a truncated file."""
    errors = (error, error.__context__)
    return next((e for e in errors if isinstance(e, OSError)), None)


def read(path: StrPath) -> dict[str, Any]:
    """Loads a checkpoint file onto the CPU; tensors that were sharded are on the ``meta`` device.
    Uses ``weights_only``, so it executes no code from the file.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: the file is not a checkpoint.
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


def load_shards(path: StrPath, state: dict[str, Any], *, alone: bool = False) -> None:
    """Loads the values of sharded tensors from the DCP folder into ``state``, in place.

    DCP's metadata is a pickle: load only from a trusted source.

    Args:
        path: the file that ``state`` was read from.
        state: from :func:`read`, with each ``meta`` tensor replaced by an allocated one, plain or
            DTensor with any placements; tensors still on ``meta`` are skipped.
        alone: only this process calls. Otherwise collective: all ranks must.

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
    sharded = reader.read_metadata().state_dict_metadata
    tensors = {
        keystr(key): value
        for key, value in tree_flatten_with_path(state)[0]
        if keystr(key) in sharded and not value.is_meta
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is .*single process", UserWarning)
        # PyTorch 2.6 lacks this option; with one rank it is not needed.
        options = {"no_dist": True} if alone and distributed.world_size() > 1 else {}
        dcp.load(tensors, storage_reader=reader, **options)


def load(path: StrPath) -> dict[str, Any]:
    """Loads a checkpoint with full (unsharded) tensors onto the CPU, in this process alone.

    Raises:
        FileNotFoundError, ValueError: as in :func:`read` and :func:`load_shards`.
    """

    def allocated(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor

    state = tree_map_only(Tensor, allocated, read(path))
    load_shards(path, state, alone=True)
    return state
