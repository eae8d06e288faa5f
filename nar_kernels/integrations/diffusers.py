"""diffusers: the noise of ``BlockRefinementScheduler``, and the masks of aMUSEd's training.

Shapes: B batch, L sequence length.
"""

import torch
from torch import Tensor

from nar_kernels.checks import as_float, as_int
from nar_kernels.integrations.draws import (
    MASKED,
    check_fits,
    check_ids,
    masking_of,
    noisy_ids,
    rounded_cosine,
    seed_of,
)
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.masking import IGNORE_INDEX


def add_noise(
    original_samples: Tensor,
    attention_mask: Tensor,
    *,
    prompt_length: int,
    block_length: int,
    mask_token_id: int,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``BlockRefinementScheduler.add_noise``: masks each token of a block with a probability that
    is uniform in (0, 1), one a block; and, in a second view, all other tokens.

    Args:
        original_samples: clean ids ``[B, L]``.
        attention_mask: ``[B, L]``; where it is 0, nothing is masked.
        prompt_length: of the tokens that are not masked. Blocks begin behind them.
        block_length: positions of a block, of which the last may be shorter.
        mask_token_id: the mask token.
        generator: which the seed is drawn from.
        seed, sample_ids: see :mod:`nar_kernels.integrations.draws`.

    Returns:
        ``noisy`` and ``noisy_rev`` (ids), ``masked`` and ``masked_rev`` (bool), each ``[B, L]``.

    Raises:
        InvalidTokenError: on the CPU, an id behind the prompt is negative, or is ``mask_token_id``.
    """
    check_ids("original_samples", original_samples, 2)
    prompt_length = as_int("prompt_length", prompt_length)
    if prompt_length < 0:
        raise ValueError(f"prompt_length is {prompt_length}: it must be at least 0")
    prompt, answer = original_samples.tensor_split([prompt_length], dim=1)
    if not answer.shape[1]:
        nothing = torch.zeros_like(original_samples, dtype=torch.bool)
        return original_samples.clone(), original_samples.clone(), nothing, nothing.clone()
    masking = masking_of(
        mask_token_id, draw="bernoulli", times="uniform", block_length=block_length
    )
    batch = corrupt(
        answer,
        masking,
        seed=seed_of(seed, generator),
        sample_ids=sample_ids,
        maskable=attention_mask[:, prompt_length:] != 0,
        views="complement",
        outputs=MASKED,
    )
    assert batch.masked_indices is not None
    both = noisy_ids(batch, torch.cat([answer, answer]) if answer.is_cuda else answer)
    masked = batch.masked_indices
    if prompt_length:
        both = torch.cat([torch.cat([prompt, prompt]), both], 1)
        masked = torch.nn.functional.pad(masked, (prompt_length, 0))
    return *both.chunk(2), *masked.chunk(2)  # type: ignore[return-value]


def amused_mask(
    image_tokens: Tensor,
    mask_id: int,
    min_masking_rate: float = 0.0,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The masks of ``examples/amused/train_amused.py``: ``round(L * max(cos(pi t / 2), low))``
    tokens of each image, at least 1, t uniform in (0, 1).

    Args:
        image_tokens: clean ids ``[B, L]``.
        mask_id: the mask token.
        min_masking_rate: low, in [0, 1].
        generator: which the seed is drawn from.
        seed, sample_ids: see :mod:`nar_kernels.integrations.draws`.

    Returns:
        ``input_ids`` and ``labels``, which are -100 where nothing is masked, each ``[B, L]``.

    Raises:
        InvalidTokenError: on the CPU, an id is negative, or is ``mask_id``.
    """
    check_ids("image_tokens", image_tokens, 2)
    check_fits("the label of what is not masked", IGNORE_INDEX, image_tokens.dtype)
    low = as_float("min_masking_rate", min_masking_rate)
    if not 0 <= low <= 1:
        raise ValueError(f"min_masking_rate is {low}: it must be in [0, 1]")
    batch = corrupt(
        image_tokens,
        rounded_cosine(mask_id, image_tokens.shape[1], low),
        seed=seed_of(seed, generator),
        sample_ids=sample_ids,
        outputs=MASKED,
    )
    assert batch.masked_indices is not None
    labels = torch.where(batch.masked_indices, image_tokens, IGNORE_INDEX)
    return noisy_ids(batch, image_tokens), labels
