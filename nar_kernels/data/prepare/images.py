"""From integer codes of images to a corpus: :func:`prepare_images`."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from nar_kernels.data.formats.manifest import Manifest, Vocabulary
from nar_kernels.data.prepare.batches import START, Position
from nar_kernels.data.prepare.config import PrepareConfig
from nar_kernels.data.prepare.encode import Encoded
from nar_kernels.data.prepare.inputs import Input, bytes_before, digest, find_inputs
from nar_kernels.data.prepare.progress import Progress
from nar_kernels.data.prepare.shards import NpyWriter
from nar_kernels.data.prepare.staging import Staging
from nar_kernels.data.prepare.write import Result, write_shards
from nar_kernels.errors import CorpusFormatError

_LABELS_FILE = "labels.npy"
_MOST_CODES = (1 << 32) - 1
_OF_TEXT = (
    "tokenizer",
    "train_bpe",
    "text_column",
    "document_separator",
    "chat_template",
    "parse_special_tokens",
    "append_eos",
)


class Codes(NamedTuple):
    """What the header of a ``.npy`` file says: ``[N, h, w]`` integers."""

    shape: tuple[int, ...]
    dtype: np.dtype


def prepare_images(
    inputs: list[Input], out: Path, config: PrepareConfig, progress: Progress
) -> Manifest:
    """See :func:`nar_kernels.data.prepare.pipeline.prepare`."""
    config.check_unset(_OF_TEXT, "is for text, and the inputs are image codes")
    headers = [_header(input) for input in inputs]
    for input, codes in zip(inputs, headers, strict=True):
        if codes.shape[1:] != headers[0].shape[1:]:
            raise CorpusFormatError(
                f"{input.name} has images of {codes.shape[1:]}, and {inputs[0].name} of "
                f"{headers[0].shape[1:]}: the images of a corpus have one size"
            )
    height, width = headers[0].shape[1:]
    total = sum(codes.shape[0] for codes in headers)
    labels = None if config.labels is None else _labels(config.labels, total)
    vocab_size = config.vocab_size
    if vocab_size is None:
        blocks = _blocks(inputs, headers, config.batch_bytes)
        vocab_size = max(_greatest(inputs[at.source], block) for at, _, block in blocks) + 1
    vocabulary = Vocabulary(vocab_size)
    record = {
        "inputs": digest(inputs),
        "labels": None if labels is None else hashlib.sha256(labels.tobytes()).hexdigest(),
        "vocab_size": vocab_size,
        "shard_tokens": config.shard_tokens,
        "batch_bytes": config.batch_bytes,
    }
    with Staging(out, record, config.overwrite) as staging:
        progress.begin(bytes_before(inputs)[-1], 0)
        blocks = _blocks(inputs, headers, config.batch_bytes, staging.done.at)
        results = _results(inputs, blocks, vocabulary)
        write_shards(results, staging, vocabulary.dtype, config.shard_tokens, progress)
        if labels is not None:
            writer = NpyWriter(staging.folder / _LABELS_FILE, "int64")
            writer.write(labels)
            writer.close()
        manifest = Manifest.of_shards(
            staging.done.shards,
            vocabulary,
            eos_id=None,
            tokenizer=None,
            image_shape=(height, width),
            labels=None if labels is None else _LABELS_FILE,
        )
        staging.finish(manifest)
        progress.say(f"this run: {progress.end()}")
    return manifest


def _greatest(input: Input, block: np.ndarray) -> int:
    greatest = int(block.max())
    if greatest >= _MOST_CODES:
        raise CorpusFormatError(
            f"{input.name} holds the code {greatest}: codes must be below {_MOST_CODES}, so that "
            "32 bits hold them and a mask"
        )
    return greatest


def _results(
    inputs: list[Input], blocks: Iterator[tuple[Position, int, np.ndarray]], vocabulary: Vocabulary
) -> Iterator[Result]:
    before = bytes_before(inputs)
    for at, read, block in blocks:
        if int(block.max()) >= vocabulary.vocab_size:
            raise CorpusFormatError(
                f"{inputs[at.source].name} holds the code {block.max()}, outside "
                f"[0, {vocabulary.vocab_size}): give a larger vocab_size, or leave it out"
            )
        images, size = len(block), block[0].size
        ends = np.arange(1, images + 1, dtype=np.int64) * size
        encoded = Encoded(block.reshape(-1).astype(vocabulary.dtype), ends, None)
        yield Result(at, before[at.source] + read, encoded)


def _blocks(
    inputs: list[Input],
    headers: list[Codes],
    batch_bytes: int,
    start: Position = START,
) -> Iterator[tuple[Position, int, np.ndarray]]:
    """Images ``[n, h, w]`` of all files, where they begin, and the bytes read of their file."""
    for i in range(start.source, len(inputs)):
        (count, *shape), dtype = headers[i]
        row_bytes = int(np.prod(shape)) * dtype.itemsize
        rows = max(1, batch_bytes // row_bytes)
        row = start.offset if i == start.source else 0
        with inputs[i].open() as (content, _):
            _read_header(content)
            content.seek(row * row_bytes, 1)
            while row < count:
                n = min(rows, count - row)
                block = np.frombuffer(_exactly(content, n * row_bytes, inputs[i]), dtype)
                if int(block.min()) < 0:
                    raise CorpusFormatError(
                        f"{inputs[i].name} holds the code {block.min()}: codes are from 0 on"
                    )
                yield Position(i, row, 0), content.tell(), block.reshape(n, *shape)
                row += n


def _exactly(content: BinaryIO, size: int, input: Input) -> bytes:
    data = content.read(size)
    if len(data) != size:
        raise CorpusFormatError(f"{input.name} is truncated: write it again")
    return data


def _header(input: Input) -> Codes:
    with input.open() as (content, _):
        try:
            shape, fortran_order, dtype = _read_header(content)
        except Exception as error:  # numpy lets TokenError and others through
            raise CorpusFormatError(f"{input.name} has no .npy header ({error})") from error
    if dtype.kind not in "iu" or len(shape) != 3 or fortran_order or 0 in shape:
        order = " in Fortran order" if fortran_order else ""
        raise CorpusFormatError(
            f"{input.name} holds {dtype} {list(shape)}{order}: image codes are integers [N, h, w], "
            "in C order"
        )
    return Codes(shape, dtype)


def _read_header(content: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version_1 = npy.read_magic(content) == (1, 0)
    return (npy.read_array_header_1_0 if version_1 else npy.read_array_header_2_0)(content)


def _labels(name: str | os.PathLike[str], num_images: int) -> np.ndarray:
    """int64 ``[N]``."""
    inputs = find_inputs(name)
    if len(inputs) != 1:
        raise ValueError(f"labels is {os.fspath(name)!r}, which are {len(inputs)} files: name one")
    (input,) = inputs
    with input.open() as (content, _):
        try:
            given = npy.read_array(content, allow_pickle=False)
        except Exception as error:  # numpy lets TokenError and others through
            raise CorpusFormatError(f"{input.name} is no .npy file ({error})") from error
    is_valid = given.dtype.kind in "iu" and given.shape == (num_images,)
    labels = given.astype(np.int64) if is_valid else given  # beyond int64, they are negative
    if not is_valid or labels.min() < 0:
        raise CorpusFormatError(
            f"{input.name} holds {given.dtype} {list(given.shape)}: labels are integers from 0 "
            f"on, [{num_images}], one for each image"
        )
    return labels
