"""Samples as pictures, text or ids.

Shapes: N samples, L sequence length, S steps of the decoder, H height and W width of an image.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nar_kernels.pictures import images
from nar_kernels.sources import SequenceSpec
from nar_kernels.wrapper import NonAutoregressiveWrapper

_SHADES = " .:-=+*#%@"
_GRID_COLUMNS = 8


class _NoOpinion(nn.Module):
    """A critic that scores all tokens alike: its noise alone decides which stay masked."""

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, 1, device=ids.device)


def draw(
    model: NonAutoregressiveWrapper,
    num_samples: int,
    *,
    seed: int,
    steps: int = 18,
    order: str = "random",
    temperature: float = 1.0,
    filter_thres: float = 0.0,
    on_step: Callable[[int, Tensor, Tensor], object] | None = None,
) -> Tensor:
    """Samples ``[N, L]``, on the CPU.

    Args:
        order: which positions are filled first: in ``"random"`` order, as masked diffusion does
            (arXiv:2406.07524), or those of highest ``"confidence"`` (MaskGIT, arXiv:2202.04200).
            Confidence fills the background of an image first, which leaves little choice for
            the rest; random order gives more varied samples.
        temperature: at the first step; falls to 0 at the last.
        filter_thres: share of the vocabulary that is never sampled: the least probable ids.
        on_step: as in :meth:`NonAutoregressiveWrapper.generate`.
    """
    sampler = NonAutoregressiveWrapper(
        model.net,
        mask_id=model.mask_id,
        schedule=model.masking.schedule,
        steps=steps,
        token_critic=_NoOpinion() if order == "random" else None,
    )
    return sampler.generate(
        num_samples, temperature, filter_thres, seed=seed, on_step=on_step
    ).cpu()


def frames(model: NonAutoregressiveWrapper, num_samples: int, *, seed: int) -> Tensor:
    """Samples while they appear, int64 ``[N, S + 1, L]``: all masked, then after each step."""
    states = [torch.full((num_samples, model.max_seq_len), model.mask_id)]

    def keep(step: int, ids: Tensor, masked: Tensor) -> None:
        states.append(ids.cpu().clone())

    draw(model, num_samples, seed=seed, on_step=keep)
    return torch.stack(states, 1)


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
