"""MaskGIT in PyTorch: Halton-MaskGIT (arXiv:2503.17076) and muse-maskgit-pytorch; and dropping the
class of a sample, for classifier-free guidance.

Shapes: b images of h x w tokens.
"""

from typing import Any

import torch
from torch import Tensor

from nar_kernels.checks import as_float, as_int
from nar_kernels.integrations.draws import (
    ANY_VOCABULARY,
    MASKED,
    check_fits,
    check_ids,
    masking_of,
    noisy_ids,
    rounded_cosine,
    seed_of,
)
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.mask_tokens import drop_classes, mask_tokens
from nar_kernels.spec.schedules import SCHEDULES

# Names of Halton-MaskGIT, and ours.
_MODES = {mode: mode for mode in ("linear", "square", "cosine", "arccos")} | {"root": "sqrt"}


def get_mask_code(
    code: Tensor,
    r: Tensor | None = None,
    mode: str = "arccos",
    value: int | None = None,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Halton-MaskGIT's masks: each token with probability m(r), r of an image uniform in (0, 1).

    Args:
        code: clean ids ``[b, h, w]``.
        r: float ``[b]`` in [0, 1], of each image. Default: drawn.
        mode: m: ``"arccos"``, ``"root"``, ``"linear"``, ``"square"`` or ``"cosine"``.
        value: the mask token. If it is not above 0, the ids stay as they are.
        generator: which the seed is drawn from.
        seed, sample_ids: see :mod:`nar_kernels.integrations.draws`.
        kwargs: have no effect, such as ``codebook_size``.

    Returns:
        ``masked_code`` (ids), ``mask`` and ``loss_mask`` (bool; true everywhere), each
        ``[b, h, w]``.

    Raises:
        InvalidTokenError: on the CPU and without r, an id is negative, or is ``value``.
    """
    check_ids("code", code, 3)
    if mode not in _MODES:
        raise ValueError(f"mode is {mode!r}: it must be one of {', '.join(_MODES)}")
    if value is None:
        raise TypeError("value is missing: pass the id of the mask token, such as codebook_size")
    value, schedule = as_int("value", value), _MODES[mode]
    ids, seed = code.flatten(1), seed_of(seed, generator)
    if r is None:
        masking = masking_of(
            value if value > 0 else ANY_VOCABULARY - 1,
            schedule=schedule,
            draw="bernoulli",
            times="uniform",
            weighting="unit",
        )
        batch = corrupt(ids, masking, seed=seed, sample_ids=sample_ids, outputs=MASKED)
        assert batch.masked_indices is not None
        mask = batch.masked_indices
        noisy = noisy_ids(batch, ids) if value > 0 else ids
    else:
        ratio = SCHEDULES[schedule](r).to(code.device).clamp(0, 1)
        noisy, mask = mask_tokens(ids, max(value, 0), ratio, seed=seed, sample_ids=sample_ids)
    masked_code = noisy.view_as(code) if value > 0 else code.detach().clone()
    return masked_code, mask.view_as(code), torch.ones_like(code, dtype=torch.bool)


def muse_mask(
    ids: Tensor,
    mask_id: int,
    ignore_index: int = -1,
    *,
    no_mask_token_prob: float = 0.0,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The masks of muse-maskgit-pytorch's ``MaskGit.forward`` with its default schedule:
    ``round(L cos(pi t / 2))`` of the L tokens of each image, at least 1, t uniform in (0, 1).

    Args:
        ids: clean ids ``[B, L]``.
        mask_id: the mask token.
        ignore_index: the label where nothing is masked.
        no_mask_token_prob: the share of the masked tokens that keep their id, on average exactly;
            there it is rounded up in each image.
        generator: which the seed is drawn from.
        seed, sample_ids: see :mod:`nar_kernels.integrations.draws`.

    Returns:
        ``x`` (ids) and ``labels``, each ``[B, L]``.

    Raises:
        InvalidTokenError: on the CPU, an id is negative, or is ``mask_id``.
    """
    check_ids("ids", ids, 2)
    check_fits("ignore_index", ignore_index, ids.dtype)
    masking = rounded_cosine(mask_id, ids.shape[1], no_replace_prob=no_mask_token_prob)
    batch = corrupt(
        ids, masking, seed=seed_of(seed, generator), sample_ids=sample_ids, outputs=MASKED
    )
    assert batch.masked_indices is not None
    return noisy_ids(batch, ids), torch.where(batch.masked_indices, ids, ignore_index)


def drop_labels(
    y: Tensor,
    p: float,
    null_label: int,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """Classes, some of which are dropped, for classifier-free guidance (arXiv:2207.12598).

    Args:
        y: integer classes ``[B]``.
        p: with which probability each is dropped, in [0, 1].
        null_label: what stands for no class, such as the number of classes.
        generator: which the seed is drawn from.
        seed, sample_ids: see :mod:`nar_kernels.integrations.draws`.

    Returns:
        ``[B]`` of the dtype of ``y``. Where no class is ``null_label``, ``drop_labels(...) ==
        null_label`` is the ``drop_label`` of Halton-MaskGIT's transformer.
    """
    check_ids("y", y, 1)
    p = as_float("p", p)
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}: it must be in [0, 1]")
    null_label, seed = as_int("null_label", null_label), seed_of(seed, generator)
    check_fits("null_label", null_label, y.dtype)
    dropped = drop_classes(y.long(), null_label, p, seed=seed, sample_ids=sample_ids)
    return dropped.to(y.dtype)
