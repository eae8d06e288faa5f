"""Folders of ``nar-kernels prepare``, described by their ``manifest.json``."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from nar_kernels.data.formats.base import (
    Layout,
    ReadOptions,
    check_dtype_is_not_given,
    malformed,
)
from nar_kernels.data.formats.manifest import (
    FILE,
    FORMAT,
    Manifest,
    Shard,
    read_manifest,
    sha256_of,
)
from nar_kernels.data.formats.npy import npy_layout
from nar_kernels.errors import CorpusFormatError

# What all folders of a corpus have in common.
_SHARED: dict[str, Callable[[Manifest], object]] = {
    "tokenizer": Manifest.tokenizer_json,
    "mask_id": lambda manifest: manifest.mask_id,
    "eos_id": lambda manifest: manifest.eos_id,
    "vocab_size": lambda manifest: manifest.vocab_size,
    "image_shape": lambda manifest: manifest.image_shape,
}

# Of what a run of `prepare` has done, in a folder that it has not finished.
PROGRESS_FILE = "progress.jsonl"
_PROGRESS_BEGINS = json.dumps({"format": FORMAT}).encode()[:-1]


def is_prepared(folder: Path) -> bool:
    """Whether ``nar-kernels prepare`` wrote this folder, finished or not."""
    manifest = folder / FILE
    if not manifest.is_file():
        return is_begun(folder)
    return FORMAT.encode() in manifest.read_bytes()


def is_begun(folder: Path) -> bool:
    """Whether there is a record of ``nar-kernels prepare``, which it removes when it finishes."""
    file = folder / PROGRESS_FILE
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(_PROGRESS_BEGINS)) == _PROGRESS_BEGINS


def prepared_layouts(folder: Path, options: ReadOptions) -> list[Layout]:
    """A layout for each shard.

    Raises:
        CorpusFormatError: the manifest is malformed, a file is not as it says, or the folder is
            not finished.
    """
    manifest = _read(folder)
    what = f"a prepared corpus, whose {FILE} says {manifest.dtype}"
    check_dtype_is_not_given(folder, options, what)
    return [_layout(folder, shard, manifest) for shard in manifest.shards]


def manifests_of(layouts: Sequence[Layout]) -> tuple[Manifest, ...]:
    """The manifests of the folders that these are shards of; none if any is not.

    Raises:
        CorpusFormatError: the folders differ in their vocabulary, or what a document is.
    """
    folders = list(dict.fromkeys(layout.prepared_in for layout in layouts))
    manifests = tuple(read_manifest(folder) for folder in folders if folder is not None)
    if len(manifests) < len(folders):
        return ()
    for other in manifests[1:]:
        for what, of in _SHARED.items():
            if of(other) != of(manifests[0]):
                raise CorpusFormatError(
                    f"{other.folder} and {manifests[0].folder} differ in their {what}: the folders "
                    "of one corpus are prepared with the same --tokenizer; prepare one of them "
                    "again, or read their shards as plain files"
                )
    return manifests


def is_prepared_text(folder: str | os.PathLike[str]) -> bool:
    """Whether this is a prepared folder of text, not of images."""
    folder = Path(folder)
    return folder.is_dir() and is_prepared(folder) and _read(folder).tokenizer is not None


def has_answers(folder: str | os.PathLike[str]) -> bool:
    """Whether this is a prepared folder of prompts and answers: of text with a loss mask."""
    return is_prepared_text(folder) and all(shard.loss_mask for shard in _read(Path(folder)).shards)


def has_labels(manifests: Sequence[Manifest]) -> bool:
    """Whether each of these folders says the class of its images."""
    return len(manifests) > 0 and all(manifest.labels for manifest in manifests)


def labels_of(manifests: Sequence[Manifest]) -> np.ndarray:
    """int64 ``[N]``: the class of each image of these folders, which have labels.

    Raises:
        CorpusFormatError: a file holds something else.
        FileNotFoundError: it is missing.
    """
    parts = []
    for manifest in manifests:
        path = Path(manifest.folder, manifest.labels or "")
        layout = _file(path, "int64", manifest.total_documents)
        parts.append(np.fromfile(path, np.int64, layout.num_tokens, offset=int(layout.offsets[0])))
    return np.concatenate(parts)


def check_files(folder: Path) -> None:
    """Reads all files of a prepared folder.

    Raises:
        CorpusFormatError: one is not what was written; a missing one is a FileNotFoundError.
    """
    for i, shard in enumerate(_read(folder).shards):
        for name in shard.files:
            found = sha256_of(folder / name)
            if found != shard.sha256[name]:
                field = f"shards[{i}].sha256.{name}"
                what = f"{found}, that of the file: the file is damaged; prepare the corpus again"
                raise malformed(folder / FILE, field, shard.sha256[name], what)


def _read(folder: Path) -> Manifest:
    if not (folder / FILE).exists():
        raise CorpusFormatError(
            f"{folder} is not finished: run the same `nar-kernels prepare` again, which goes on "
            "where it was stopped"
        )
    return read_manifest(folder)


def _layout(folder: Path, shard: Shard, manifest: Manifest) -> Layout:
    tokens = _file(folder / shard.tokens, manifest.dtype, shard.num_tokens)
    documents = folder / shard.documents
    mask = None
    if shard.loss_mask is not None:
        mask = _file(folder / shard.loss_mask, "uint8", shard.num_tokens)
    return replace(
        tokens,
        format="prepared",
        document_ends=partial(_document_ends, str(documents.absolute()), shard.num_documents),
        loss_mask=mask,
        beside=(str(documents.absolute()),),
        prepared_in=manifest.folder,
    )


def _file(path: Path, dtype: str, length: int) -> Layout:
    layout = npy_layout(path, ReadOptions())
    if layout.dtype != dtype or layout.num_tokens != length:
        raise CorpusFormatError(
            f"{path} holds {layout.num_tokens} {layout.dtype}, but {FILE} beside it says {length} "
            f"{dtype}: one of them is of another corpus; prepare it again"
        )
    return layout


def _document_ends(path: str, num_documents: int) -> np.ndarray:
    """int64 ``[num_documents]``, mapped."""
    layout = _file(Path(path), "int64", num_documents)
    return np.memmap(path, np.int64, "r", int(layout.offsets[0]), (num_documents,))
