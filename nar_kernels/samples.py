"""Samples as pictures, text or ids.

Shapes: N samples, L sequence length, S steps of the decoder, H height and W width of an image.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar_kernels.choice import Strategy
from nar_kernels.decode import DecodeState
from nar_kernels.pictures import images
from nar_kernels.sources import SequenceSpec
from nar_kernels.wrapper import NonAutoregressiveWrapper

_SHADES = " .:-=+*#%@"
_GRID_COLUMNS = 8


def states(
    model: NonAutoregressiveWrapper,
    num_samples: int | None,
    *,
    seed: int,
    temperature: float = 1.0,
    filter_thres: float = 0.0,
    strategy: Strategy = "random",
    **options: Any,
) -> Iterator[DecodeState]:
    """What :meth:`NonAutoregressiveWrapper.generate_steps` yields, with its other ``options``.

    Its defaults are those of x-transformers. Here they are for samples that are as varied as the
    data: any token may be drawn, in random order. Confidence fills the background of an image
    first, which leaves little choice for the rest.
    """
    return model.generate_steps(
        num_samples, temperature, filter_thres, seed=seed, strategy=strategy, **options
    )


def draw(model: NonAutoregressiveWrapper, num_samples: int, **options: Any) -> Tensor:
    """Samples ``[N, L]``, on the CPU; ``options`` as for :func:`states`."""
    for state in states(model, num_samples, **options):  # noqa: B007
        pass
    return state.ids.cpu()


def frames(model: NonAutoregressiveWrapper, num_samples: int, *, seed: int) -> Tensor:
    """Samples while they appear, int64 ``[N, S + 1, L]``: all masked, then after each step."""
    return torch.stack([state.ids.cpu() for state in states(model, num_samples, seed=seed)], 1)


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
    return "\n".join("".join(shade(id_, levels) for id_ in row) for row in image.tolist())


def shade(id_: int, levels: int) -> str:
    """A pixel, two characters because one is about twice as high as wide."""
    return _SHADES[id_ * (len(_SHADES) - 1) // (levels - 1)] * 2


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
