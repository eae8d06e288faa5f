"""Samples as pictures, text or ids.

Shapes: N samples, L sequence length, S steps of the decoder, H height and W width of an image.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nar_kernels.pictures import images
from nar_kernels.sources import SequenceSpec
from nar_kernels.wrapper import NonAutoregressiveWrapper

_SHADES = " .:-=+*#%@"
_GRID_COLUMNS = 8


def frames(
    model: NonAutoregressiveWrapper, num_samples: int, *, seed: int
) -> tuple[list[int], Tensor]:
    """Samples while they appear.

    Returns:
        The numbers of the steps shown, 0 for before the first, and int64 ``[N, S + 1, L]``.
    """
    shape = (num_samples, model.max_seq_len)
    states = [torch.full(shape, model.mask_id)]
    model.generate(
        num_samples, seed=seed, on_step=lambda step, ids, masked: states.append(ids.cpu().clone())
    )
    return list(range(len(states))), torch.stack(states, 1)


def text(ids: Tensor, spec: SequenceSpec) -> str:
    """Samples ``[N, L]`` for a terminal or a text file, one below the other."""
    if spec.image_shape is not None:
        pages = [_ascii_image(sample.view(spec.image_shape), spec.mask_id) for sample in ids]
        return "\n\n".join(pages) + "\n"
    if spec.render == "bytes":
        pages = [bytes(sample.tolist()).decode(errors="replace") for sample in ids]
        return f"\n{'-' * 72}\n".join(pages) + "\n"
    return "".join(" ".join(map(str, sample)) + "\n" for sample in ids.tolist())


def _ascii_image(image: Tensor, levels: int) -> str:
    shades = image * (len(_SHADES) - 1) // (levels - 1)
    # Twice as wide, because a character is about twice as high as wide.
    return "\n".join("".join(_SHADES[s] * 2 for s in row) for row in shades.tolist())


def check_suffix(path: Path, spec: SequenceSpec) -> None:
    """Raises ValueError for a picture of something that is no image."""
    if path.suffix == ".png" and spec.image_shape is None:
        raise ValueError(f"{path}: the model makes {spec.render}, not images; write .txt or .npy")


def write(path: Path, ids: Tensor, spec: SequenceSpec) -> None:
    """Writes samples ``[N, L]``: ``.npy`` as int64, ``.png`` (images only), else as text."""
    check_suffix(path, spec)
    if path.suffix == ".npy":
        np.save(path, ids.numpy())
    elif path.suffix == ".png" and spec.image_shape is not None:
        columns = min(len(ids), _GRID_COLUMNS)
        blank = torch.zeros(-len(ids) % columns, ids.shape[1], dtype=ids.dtype)
        table = torch.cat([ids, blank]).view(-1, columns, *spec.image_shape)
        images(path, table, mask_id=spec.mask_id)
    else:
        path.write_text(text(ids, spec), "utf-8")
