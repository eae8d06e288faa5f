"""``manifest.json`` of a prepared corpus: :class:`Manifest`."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nar_kernels.data.formats.base import malformed
from nar_kernels.data.shown import shown
from nar_kernels.files import atomic_write

FILE = "manifest.json"
FORMAT, VERSION = "nar_kernels corpus", 1
DTYPES = ("uint8", "uint16", "uint32")


@dataclass(frozen=True)
class TokenizerFile:
    """The tokenizer of a corpus: its name, and the file in the folder of the corpus that holds it,
    for :func:`nar_kernels.data.tokenizer.tokenizer_from_json`."""

    name: str
    file: str


@dataclass(frozen=True)
class Shard:
    """Files of some whole documents.

    Attributes:
        tokens: ``.npy`` ``[num_tokens]``, of the manifest's dtype.
        documents: ``.npy``, int64 ``[num_documents]``: how many tokens of this shard precede the
            end of each document.
        loss_mask: ``.npy``, uint8 ``[num_tokens]``, 1 where a token counts in a loss; or None.
        num_tokens, num_documents: at least 1.
        min_id, max_id: the least and the greatest id.
        sha256: hex, of each of these files.
    """

    tokens: str
    documents: str
    loss_mask: str | None
    num_tokens: int
    num_documents: int
    min_id: int
    max_id: int
    sha256: dict[str, str]

    @property
    def files(self) -> list[str]:
        names = (self.tokens, self.documents, self.loss_mask)
        return [name for name in names if name is not None]


@dataclass(frozen=True)
class Manifest:
    """What a prepared corpus is.

    Attributes:
        dtype: of the ids: uint8, uint16 or uint32.
        vocab_size: of the tokenizer; ids are in [0, vocab_size).
        mask_id: the tokenizer's own mask token, which no text has; else ``vocab_size``.
        num_tokens: V, rows of an embedding: ``max(vocab_size, mask_id + 1)``.
        eos_id: the id that the tokenizer ends documents with, or None.
        tokenizer: None for ids that were no text.
        total_tokens, total_documents: of all shards.
        min_id, max_id: the least and the greatest id.
        shards: in order.
        image_shape: (height, width) if each document is an image of ids, row by row; else None.
        labels: ``.npy``, int64 ``[total_documents]``, the class of each image; or None.
        folder: where it was read; of one that was not, empty.
    """

    dtype: str
    vocab_size: int
    mask_id: int
    num_tokens: int
    eos_id: int | None
    tokenizer: TokenizerFile | None
    total_tokens: int
    total_documents: int
    min_id: int
    max_id: int
    shards: tuple[Shard, ...]
    image_shape: tuple[int, int] | None = None
    labels: str | None = None
    folder: str = field(default="", compare=False)

    def tokenizer_json(self) -> str | None:
        """What the file of the tokenizer holds, for
        :func:`nar_kernels.data.tokenizer.tokenizer_from_json`.

        Raises:
            CorpusFormatError: it is not JSON.
            FileNotFoundError: there is none.
        """
        if self.tokenizer is None:
            return None
        path = Path(self.folder, self.tokenizer.file)
        try:
            text = path.read_text(encoding="utf-8")
            json.loads(text)
        except ValueError as error:
            raise malformed(path, "the content", f"no JSON ({error})", "a tokenizer") from error
        return text

    @classmethod
    def of_shards(cls, shards: list[Shard], vocabulary: "Vocabulary", **more: Any) -> "Manifest":
        """The manifest of these shards, at least one."""
        return cls(
            dtype=vocabulary.dtype,
            vocab_size=vocabulary.vocab_size,
            mask_id=vocabulary.mask_id,
            num_tokens=vocabulary.num_tokens,
            total_tokens=sum(shard.num_tokens for shard in shards),
            total_documents=sum(shard.num_documents for shard in shards),
            min_id=min(shard.min_id for shard in shards),
            max_id=max(shard.max_id for shard in shards),
            shards=tuple(shards),
            **more,
        )

    def write(self, folder: Path) -> None:
        """Writes ``manifest.json``, atomically."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        del content["folder"]
        with atomic_write(folder / FILE) as file:
            file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


@dataclass(frozen=True)
class Vocabulary:
    """Numbers that follow from a vocabulary: those of the same names in :class:`Manifest`."""

    vocab_size: int
    own_mask_id: int | None = None

    @property
    def mask_id(self) -> int:
        return self.vocab_size if self.own_mask_id is None else self.own_mask_id

    @property
    def num_tokens(self) -> int:
        return max(self.vocab_size, self.mask_id + 1)

    @property
    def dtype(self) -> str:
        """The smallest that holds each of ``num_tokens`` ids.

        Raises:
            ValueError: none does.
        """
        for name in DTYPES:
            if self.num_tokens - 1 <= np.iinfo(name).max:
                return name
        raise ValueError(
            f"vocab_size is {self.vocab_size}: with a mask token, it must be below 2**32"
        )


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a prepared corpus.

    Raises:
        CorpusFormatError: it is malformed; the message names the field, what it is and must be.
        FileNotFoundError: there is none.
    """
    path = Path(folder) / FILE
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise malformed(path, "the content", f"no JSON ({error})", "a JSON object") from error
    read = _Fields(path, content)
    read("format", repr(FORMAT), lambda x: x == FORMAT)
    read("version", f"{VERSION}: update nar_kernels", lambda x: x == VERSION)
    shape = read("image_shape", "[height, width] or null", _is_shape)
    given = read("tokenizer", "an object or null", lambda x: x is None or isinstance(x, dict))
    tokenizer = _Fields(path, given, "tokenizer.")
    shards = read("shards", "a list of objects", lambda x: isinstance(x, list) and len(x) > 0)
    manifest = Manifest(
        dtype=read("dtype", f"one of {', '.join(DTYPES)}", lambda x: x in DTYPES),
        vocab_size=read("vocab_size", *_POSITIVE),
        mask_id=read("mask_id", *_COUNT),
        num_tokens=read("num_tokens", *_POSITIVE),
        eos_id=read("eos_id", "an integer from 0 on, or null", lambda x: x is None or _is_count(x)),
        tokenizer=None
        if given is None
        else TokenizerFile(
            tokenizer("name", "a string", lambda x: isinstance(x, str)),
            tokenizer("file", *_FILE_NAME),
        ),
        total_tokens=read("total_tokens", *_POSITIVE),
        total_documents=read("total_documents", *_POSITIVE),
        min_id=read("min_id", *_COUNT),
        max_id=read("max_id", *_COUNT),
        shards=tuple(_shard(_Fields(path, x, f"shards[{i}].")) for i, x in enumerate(shards)),
        image_shape=None if shape is None else (shape[0], shape[1]),
        labels=read("labels", "a file name or null", lambda x: x is None or _is_file_name(x)),
        folder=str(path.parent.absolute()),
    )
    _check_sums(path, manifest)
    return manifest


def sha256_of(path: Path) -> str:
    """Hex, of the content of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _Fields:
    """Reads fields of a JSON object."""

    def __init__(self, path: Path, content: Any, prefix: str = "") -> None:
        self._path, self._content, self._prefix = path, content, prefix

    def __call__(self, name: str, expected: str, is_valid: Callable[[Any], bool]) -> Any:
        label = self._prefix + name
        if not isinstance(self._content, dict):
            what = self._prefix.rstrip(".") or "the content"
            raise malformed(self._path, what, shown(self._content), "a JSON object")
        if name not in self._content:
            raise malformed(self._path, label, "missing", expected)
        value = self._content[name]
        if not is_valid(value):
            raise malformed(self._path, label, shown(value), expected)
        return value

    def within(self, name: str) -> "_Fields":
        """Of the object that is this field."""
        return _Fields(self._path, self._content[name], f"{self._prefix}{name}.")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & {*"/\\\0"}


def _is_shape(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, list) and len(value) == 2 and all(_is_count(x) and x for x in value)


_COUNT = ("an integer from 0 on", _is_count)
_POSITIVE = ("an integer from 1 on", lambda x: _is_count(x) and x > 0)
_FILE_NAME = ("the name of a file in this folder", _is_file_name)


def _shard(read: _Fields) -> Shard:
    shard = Shard(
        tokens=read("tokens", *_FILE_NAME),
        documents=read("documents", *_FILE_NAME),
        loss_mask=read("loss_mask", "a file name or null", lambda x: x is None or _is_file_name(x)),
        num_tokens=read("num_tokens", *_POSITIVE),
        num_documents=read("num_documents", *_POSITIVE),
        min_id=read("min_id", *_COUNT),
        max_id=read("max_id", *_COUNT),
        sha256=read("sha256", "an object", lambda x: isinstance(x, dict)),
    )
    digests = read.within("sha256")
    for file in shard.files:
        digests(file, "64 hex digits", lambda x: isinstance(x, str) and len(x) == 64)
    return shard


def _check_sums(path: Path, manifest: Manifest) -> None:
    """Raises CorpusFormatError unless the numbers agree."""
    shards = manifest.shards
    most = np.iinfo(manifest.dtype).max
    expected = {
        "num_tokens": max(manifest.vocab_size, manifest.mask_id + 1),
        "total_tokens": sum(shard.num_tokens for shard in shards),
        "total_documents": sum(shard.num_documents for shard in shards),
        "min_id": min(shard.min_id for shard in shards),
        "max_id": max(shard.max_id for shard in shards),
    }
    for name, value in expected.items():
        if getattr(manifest, name) != value:
            what = f"{value}, by the other fields"
            raise malformed(path, name, getattr(manifest, name), what)
    if manifest.num_tokens - 1 > most:
        what = f"at most {most + 1}, the ids of {manifest.dtype}"
        raise malformed(path, "num_tokens", manifest.num_tokens, what)
    if not manifest.min_id <= manifest.max_id < manifest.vocab_size:
        what = f"from min_id, {manifest.min_id}, to vocab_size, {manifest.vocab_size}"
        raise malformed(path, "max_id", manifest.max_id, what)
    if manifest.image_shape is not None:
        size = manifest.image_shape[0] * manifest.image_shape[1]
        if manifest.total_tokens != size * manifest.total_documents:
            what = f"{size} for each of {manifest.total_documents} images"
            raise malformed(path, "total_tokens", manifest.total_tokens, what)
