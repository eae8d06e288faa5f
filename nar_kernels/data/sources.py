"""Data for ``--data``: built-in data sets, which need no download, and files.

Shapes: L sequence length (``seq_len``), V vocabulary (``num_tokens``).
"""

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nar_kernels.checks import as_int
from nar_kernels.data.corpus import Source
from nar_kernels.data.dataset import TokenDataset
from nar_kernels.data.formats.detect import SUFFIXES
from nar_kernels.distributed import on_first_rank
from nar_kernels.extras import import_extra

BUILT_IN = ("digits", "text")

_NUM_BYTES = 256
_DEFAULT_SEQ_LEN = 256
_MAX_HELD_OUT = 256
_MAX_VALIDATED = 2_000_000_000  # tokens; takes some seconds

# scikit-learn's digits: 1797 images of 8 x 8 pixels in 0 .. 16.
_DIGITS_SHAPE, _DIGITS_LEVELS, _DIGITS_HELD_OUT = (8, 8), 17, 180

Render = Literal["image", "bytes", "ids"]


class SequenceSpec(NamedTuple):
    """What a net and the rendering of samples need to know of the data.

    Attributes:
        num_tokens: V, the mask token included, whose id is the last.
        seq_len: L.
        render: what a sequence is: an image of ``image_shape``, bytes of text, or plain ids.
        image_shape: (height, width) of an image, whose ids rise from background to ink; else None.
    """

    num_tokens: int
    seq_len: int
    render: Render
    image_shape: tuple[int, int] | None

    @property
    def mask_id(self) -> int:
        return self.num_tokens - 1


class Data(NamedTuple):
    """Windows to train on, and windows held out.

    Attributes:
        name: as the user gave it.
        spec: what a window is.
        train: the training windows; they may overlap each other.
        held_out: windows at the end, which share no token with ``train``.
        held_out_windows: int64, indices of windows in ``held_out`` that do not overlap.
    """

    name: str
    spec: SequenceSpec
    train: TokenDataset
    held_out: TokenDataset
    held_out_windows: Tensor

    def validate(self) -> None:
        """Checks all ids up front, so that a bad one does not stop a run midway. Skipped above 2
        billion tokens, where windows are checked when fetched. All ranks must call this.

        Raises:
            InvalidTokenError: an id is outside [0, V), or is ``mask_id``.
        """
        if len(self.train.corpus) <= _MAX_VALIDATED:
            for dataset in (self.train, self.held_out):
                on_first_rank(dataset.validate_all)


class _Opened(NamedTuple):
    """A source before it is cut into windows; ``fixed`` holds the options that it determines."""

    source: Source
    render: Render
    fixed: dict[str, int | str]
    dtype: str | None = None
    num_held_out: int | None = None
    image_shape: tuple[int, int] | None = None


def open_data(
    name: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    num_tokens: int | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    num_held_out: int | None = None,
    folder: Path | None = None,
) -> Data:
    """Opens a built-in data set or a file, and splits off its last windows for evaluation.

    Args:
        name: ``"digits"``, ``"text"``, or a path: folders and files that end in ``.npy``, ``.bin``
            or like another format of docs/data.md hold token ids, any other file is read as bytes.
            (``./digits`` is a file with that name.)
        dtype: dtype of the ids in a raw file, such as ``"uint16"``. Any file is token ids then.
        num_tokens: V, for token ids: the vocabulary of the data plus one for the mask token, which
            gets the last id. Fixed for all other data.
        seq_len: L. Default: 64 for ``digits``, else 256.
        stride: tokens from one training window to the next; divides L. Default: L.
        num_held_out: non-overlapping windows held out at the end. Default: 180 for ``digits``, else
            a tenth of all, at most 256.
        folder: where else to look for a relative path.

    Raises:
        TypeError, ValueError, CorpusFormatError, FileNotFoundError: an option or the file is wrong.
        ImportError: ``digits`` without scikit-learn.
    """
    name = os.fspath(name)
    options: dict[str, Any] = {"num_tokens": num_tokens, "seq_len": seq_len, "stride": stride}
    for option, value in options.items():
        options[option] = None if value is None else as_int(option, value)
    options["dtype"] = dtype
    built_in = {"digits": _open_digits, "text": _open_text}.get(name)
    opened = _open_file(_find_file(name, folder), dtype) if built_in is None else built_in()
    for option, value in opened.fixed.items():
        if options[option] not in (None, value):
            raise ValueError(
                f"{option} is {options[option]}, but that of {name} is always {value}: leave it out"
            )
        options[option] = value
    if options["num_tokens"] is None:
        raise ValueError(
            f"{name} holds token ids of an unknown vocabulary: give num_tokens, the vocabulary of "
            "its tokenizer plus one for the mask token (GPT-2: --num-tokens 50258)"
        )
    seq_len = _DEFAULT_SEQ_LEN if options["seq_len"] is None else options["seq_len"]
    num_held_out = None if num_held_out is None else as_int("num_held_out", num_held_out)
    return _split(name, opened, options["num_tokens"], seq_len, options["stride"], num_held_out)


def _split(
    name: str,
    opened: _Opened,
    num_tokens: int,
    seq_len: int,
    stride: int | None,
    num_held_out: int | None,
) -> Data:
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}: it must be at least 1")
    stride = seq_len if stride is None else stride
    if stride < 1 or seq_len % stride:
        raise ValueError(f"stride is {stride}: it must divide seq_len, which is {seq_len}")
    windows = TokenDataset(
        opened.source,
        seq_len,
        num_tokens=num_tokens,
        mask_id=num_tokens - 1,
        stride=stride,
        dtype=opened.dtype,
    )
    # Training windows may overlap; held-out ones are this many apart, so that they do not.
    apart = seq_len // stride
    if num_held_out is None:
        a_tenth = max(len(windows) // apart // 10, 1)
        num_held_out = opened.num_held_out or min(a_tenth, _MAX_HELD_OUT)
    # At least one training window must remain.
    most = (len(windows) - 1) // apart
    if most < 1:
        raise ValueError(
            f"{name} has {len(windows.corpus)} tokens: too few for two windows of seq_len "
            f"{seq_len}, one to train on and one held out; give more data, or a shorter seq_len"
        )
    if not 1 <= num_held_out <= most:
        raise ValueError(
            f"num_held_out is {num_held_out}: it must be in [1, {most}], so that one window of "
            f"{name} that shares no token with them remains to train on"
        )
    train, held_out = windows.split((num_held_out - 1) * apart + 1)
    spec = SequenceSpec(num_tokens, seq_len, opened.render, opened.image_shape)
    return Data(name, spec, train, held_out, torch.arange(0, len(held_out), apart, device="cpu"))


def _open_digits() -> _Opened:
    images = import_extra("sklearn.datasets").load_digits().images.astype(np.uint8)
    assert images.shape[1:] == _DIGITS_SHAPE
    size = _DIGITS_SHAPE[0] * _DIGITS_SHAPE[1]
    return _Opened(
        images.reshape(-1),
        "image",
        {"dtype": "uint8", "num_tokens": _DIGITS_LEVELS + 1, "seq_len": size, "stride": size},
        num_held_out=_DIGITS_HELD_OUT,
        image_shape=_DIGITS_SHAPE,
    )


def _open_text() -> _Opened:
    """English prose in the standard library: the language reference that ``help()`` shows."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    fixed: dict[str, int | str] = {"dtype": "uint8", "num_tokens": _NUM_BYTES + 1}
    return _Opened(np.frombuffer(text.encode(), dtype=np.uint8), "bytes", fixed)


def _find_file(name: str, folder: Path | None) -> Path:
    """The path of a file in the current directory or in ``folder``."""
    places = [Path(name)]
    if folder is not None and not places[0].is_absolute():
        places.append(folder / name)
    for place in places:
        if place.exists():
            return place
    looked = f" (looked for {' and '.join(str(place.absolute()) for place in places)})"
    raise FileNotFoundError(
        f"there is no file {name}{looked}, and the built-in data sets are {' and '.join(BUILT_IN)}"
    )


def _open_file(path: Path, dtype: str | None) -> _Opened:
    if dtype is not None or path.is_dir() or path.suffix in SUFFIXES:
        return _Opened(path, "ids", {}, dtype=dtype)
    return _Opened(path, "bytes", {"num_tokens": _NUM_BYTES + 1}, dtype="uint8")
