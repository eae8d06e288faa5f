"""Writes samples as images, text or ids.

Shapes: N samples, L sequence length.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.files import atomic_write
from nar_kernels.show.pictures import images
from nar_kernels.show.pieces import pieces_of

_SUFFIXES = (".npy", ".png", ".txt", "")
_SHADES = " .:-=+*#%@"
_GRID_COLUMNS = 8


def text(ids: Tensor, spec: SequenceSpec, *, padding: Sequence[int] | None = None) -> str:
    """Samples ``[N, L]`` as text, one below the other; images as ASCII art. Of text, ids of
    ``padding`` at the end of a sample are left out."""
    if spec.image_shape is not None:
        pages = [_ascii_image(sample.view(spec.image_shape), spec.mask_id) for sample in ids]
        return "\n\n".join(pages) + "\n"
    if spec.render in ("bytes", "text"):
        of_sample = pieces_of(spec).text if spec.render == "text" else _text_of_bytes
        shown = [_without_end(sample, padding or ()) for sample in ids.tolist()]
        return f"\n{'-' * 72}\n".join(map(of_sample, shown)) + "\n"
    return "".join(" ".join(map(str, sample)) + "\n" for sample in ids.tolist())


def _without_end(sample: list[int], padding: Sequence[int]) -> list[int]:
    length = len(sample)
    while length > 0 and sample[length - 1] in padding:
        length -= 1
    return sample[:length]


def _text_of_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def _ascii_image(image: Tensor, levels: int) -> str:
    return "\n".join("".join(shade(id_, levels) for id_ in row) for row in image.tolist())


def shade(id_: int, levels: int) -> str:
    """A pixel as ASCII art: two characters, since one is about twice as high as wide."""
    return _SHADES[id_ * (len(_SHADES) - 1) // (levels - 1)] * 2


def check_suffix(path: Path, spec: SequenceSpec) -> None:
    """Raises ValueError for an unsupported suffix, and for ``.png`` if samples are not images."""
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"{path} ends in {path.suffix}: write .npy (ids), .png (images), or .txt or nothing "
            "(text)"
        )
    if path.suffix == ".png" and spec.image_shape is None:
        raise ValueError(f"{path}: the model makes {spec.render}, not images; write .txt or .npy")


def write(
    path: Path,
    ids: Tensor,
    spec: SequenceSpec,
    *,
    padding: Sequence[int] | None = None,
    num_rows: int = 1,
) -> None:
    """Writes samples ``[N, L]``: ``.npy`` as int64, ``.png`` (images only), else as text, of which
    :func:`text` leaves out the ``padding``. More than one ``num_rows``, which must divide N, are
    those of the picture.

    Raises:
        ValueError: as :func:`check_suffix` says.
        OSError: the file cannot be written.
    """
    check_suffix(path, spec)
    if path.suffix == ".npy":
        buffer = io.BytesIO()  # np.save to a file hides the reason of a failed write
        np.save(buffer, ids.numpy())
        with atomic_write(path) as file:
            file.write(buffer.getbuffer())
    elif path.suffix == ".png" and spec.image_shape is not None:
        columns = len(ids) // num_rows if num_rows > 1 else min(len(ids), _GRID_COLUMNS)
        blank = ids.new_zeros(-len(ids) % columns, ids.shape[1])
        table = torch.cat([ids, blank]).view(-1, columns, *spec.image_shape)
        images(path, table, mask_id=spec.mask_id)
    else:
        write_text(path, text(ids, spec, padding=padding))


def write_text(path: Path, content: str) -> None:
    """Writes a file atomically, as UTF-8."""
    with atomic_write(path) as file:
        file.write(content.encode())
