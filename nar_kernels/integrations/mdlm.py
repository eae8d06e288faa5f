"""MDLM (arXiv:2406.07524) and BD3LM (arXiv:2503.09573): times, noise and x_t.

What are methods and options of ``diffusion.Diffusion`` there are functions and arguments here.
Shapes: B batch, L sequence length.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nar_kernels.checks import as_int
from nar_kernels.integrations.draws import check_ids, masking_of, seed_of
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.mask_tokens import check_slots, mask_tokens

# Rounds of resampling: a block that is still outside has a ratio that the range all but excludes.
_MAX_ROUNDS = 10_000


def sample_t(
    n: int,
    device: torch.device | str = "cpu",
    *,
    sampling_eps: float = 1e-3,
    antithetic_sampling: bool = True,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    global_batch: int | None = None,
) -> Tensor:
    """Times of MDLM, uniform in (``sampling_eps``, 1).

    Args:
        n: B.
        antithetic_sampling: one time in each of ``global_batch`` equal strata. (In MDLM stratum i
            is that of sequence i; here a permutation says whose it is.)
        seed, sample_ids: see :mod:`nar_kernels.integrations.draws`.
        global_batch: of the strata: sequences of a step over all ranks, whose ``sample_ids`` are
            consecutive. Default: n.

    Returns:
        float32 ``[B]``.
    """
    n = as_int("n", n)
    slots = None if sample_ids is None else check_slots(sample_ids, n)
    return _times(n, device, sampling_eps, 1.0, antithetic_sampling, seed, slots, global_batch)


def sample_block_t(
    batch_dims: tuple[int, int],
    device: torch.device | str = "cpu",
    *,
    sampling_eps_min: float = 1e-3,
    sampling_eps_max: float = 1.0,
    block_size: int,
    antithetic_sampling: bool = True,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    global_batch: int | None = None,
) -> Tensor:
    """Times of BD3LM: one a block, uniform in (``sampling_eps_min``, ``sampling_eps_max``).

    Args:
        batch_dims: (B, L); ``block_size`` divides L. Blocks are numbered by how many L has, so it
            should be the same in all calls of a seed.
        antithetic_sampling: one time in each of as many equal strata as blocks in the
            ``global_batch``; a permutation says whose it is.

    The others are those of :func:`sample_t`.

    Returns:
        float32 ``[B, L]``: at each position the time of its block; all 1 if both bounds are.
    """
    batch, length = (as_int("batch_dims", size) for size in batch_dims)
    block_size = as_int("block_size", block_size)
    if block_size < 1 or length % block_size:
        raise ValueError(f"block_size is {block_size}: it must divide the length, {length}")
    if min(sampling_eps_min, sampling_eps_max) >= 1:
        return torch.ones(batch, length, dtype=torch.float32, device=device)
    blocks = length // block_size
    slots = check_slots(sample_ids, batch)
    of_blocks = slots[:, None] * blocks + torch.arange(blocks, device=slots.device)
    t = _times(
        batch * blocks, device, sampling_eps_min, sampling_eps_max, antithetic_sampling, seed,
        of_blocks.flatten(), (batch if global_batch is None else global_batch) * blocks,
    )  # fmt: skip
    return t.view(batch, blocks).repeat_interleave(block_size, dim=1)


def _times(
    n: int,
    device: torch.device | str,
    low: float,
    high: float,
    antithetic: bool,
    seed: int | None,
    slots: Tensor | None,
    global_batch: int | None,
) -> Tensor:
    if not 0 <= low < high <= 1:
        raise ValueError(f"times are from {low} to {high}: they must be 0 <= low < high <= 1")
    # Of sequences of one token each.
    masking = masking_of(1, num_tokens=2, times="stratified" if antithetic else "uniform")
    share = corrupt(
        torch.zeros(n, 1, dtype=torch.int64, device=device),
        masking,
        seed=seed_of(seed),
        sample_ids=None if slots is None else slots.to(device),
        global_batch=global_batch,
        outputs=(),
    ).times
    return low + (high - low) * share


def q_xt(
    x: Tensor,
    p: Tensor,
    mask_index: int,
    block_size: int | None = None,
    sampling_eps_min: float | None = None,
    sampling_eps_max: float | None = None,
    *,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """The noisy sequence x_t: each token is masked with probability ``p``.

    Args:
        x: clean ids ``[B, L]``.
        p: ``move_chance``, float ``[B, 1]`` or ``[B, L]``, in [0, 1].
        mask_index: the mask token.
        block_size: of BD3LM with clipped times: the share of a block that is masked is in
            [``sampling_eps_min``, ``sampling_eps_max``]; others are drawn again. As there, a
            minimum of 1e-3 and a maximum of 1 bound nothing, and blocks of 1 with a minimum of 1
            are all masked.
        seed, sample_ids: see :mod:`nar_kernels.integrations.draws`.

    Returns:
        ``[B, L]``, of the dtype of ``x``.

    Raises:
        ValueError: no share of a block is within the bounds; or 10,000 draws found none, since
            ``p`` is far outside.
    """
    check_ids("x", x, 2)
    seed = seed_of(seed)
    x_t, mask = mask_tokens(x, mask_index, p, seed=seed, sample_ids=sample_ids)
    bounds = sampling_eps_min, sampling_eps_max
    if block_size is None or None in bounds or bounds == (1e-3, 1.0):
        return x_t
    assert sampling_eps_min is not None and sampling_eps_max is not None
    if block_size == 1 and sampling_eps_min == 1:
        return torch.full_like(x, mask_index)
    is_outside = _outside(x, block_size, sampling_eps_min, sampling_eps_max)
    again = is_outside(mask)
    for view in range(1, _MAX_ROUNDS):
        if not again.any():
            return x.masked_fill(mask, mask_index)
        # A view of each sample a round: what a block gets does not depend on other blocks.
        rows = again.any(1).nonzero()[:, 0]
        slots = rows if sample_ids is None else sample_ids[rows]
        _, other = mask_tokens(x[rows], mask_index, p[rows], seed=seed, sample_ids=slots, view=view)
        chosen = again[rows].repeat_interleave(block_size, dim=1)
        mask[rows] = torch.where(chosen, other, mask[rows])
        again = is_outside(mask)
    raise ValueError(
        f"after {_MAX_ROUNDS} draws {int(again.sum())} blocks are masked outside of "
        f"[{sampling_eps_min}, {sampling_eps_max}]: draw times (sample_block_t) within these bounds"
    )


def _outside(x: Tensor, block_size: int, low: float, high: float) -> Callable[[Tensor], Tensor]:
    """From a mask ``[B, L]`` to bool ``[B, blocks]``: which blocks have too few or too many."""
    length = x.shape[1]
    if length % block_size:
        raise ValueError(f"block_size is {block_size}: it must divide the length, {length}")
    # Of a bound at its end of (1e-3, 1) there is none.
    least = 0 if low == 1e-3 else math.ceil(low * block_size - 1e-6)
    most = block_size if high == 1 else math.floor(high * block_size + 1e-6)
    if least > most:
        raise ValueError(
            f"no share of {block_size} tokens is in [{low}, {high}]: use longer blocks or wider "
            "bounds"
        )

    def outside(mask: Tensor) -> Tensor:
        count = mask.view(len(mask), -1, block_size).sum(2)
        return (count < least) | (count > most)

    return outside


def noise(t: Tensor, noise_type: str = "loglinear", eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """``loss_scaling`` (negative, of the log-probability) and ``move_chance`` at times in (0, 1],
    as of BD3LM's noise schedules; of MDLM's log-linear one, ``p = (1 - eps) t``, with
    ``"mdlm"``.

    Args:
        noise_type: ``"loglinear"``, ``"square"``, ``"square_root"``, ``"log"``, ``"cosine"`` or
            ``"mdlm"``.
        eps: the least chance of ``"square"`` and ``"square_root"``; of ``"cosine"`` and ``"mdlm"``
            what the chance misses of 1, of ``"cosine"`` also added to the chance that the scaling
            is divided by.
    """
    if noise_type not in _NOISES:
        names = ", ".join(map(repr, _NOISES))
        raise ValueError(f"noise_type is {noise_type!r}: it must be one of {names}")
    return _NOISES[noise_type](t, eps)


def _loglinear(t: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return -1 / t, t


def _power(exponent: float) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
    def noise(t: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        chance = (t**exponent).clamp(min=eps)
        return -exponent * t ** (exponent - 1) / chance, chance

    return noise


def _logarithmic(t: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return -1 / (torch.log1p(t) * (1 + t)), torch.log1p(t) / math.log(2)


def _cosine(t: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    angle = t * (math.pi / 2)
    chance = 1 - (1 - eps) * torch.cos(angle)
    return -(1 - eps) * torch.sin(angle) / (chance + eps) * (math.pi / 2), chance


def _mdlm(t: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dsigma / expm1(sigma), of sigma = -log(1 - (1 - eps) t), is 1 / t."""
    return -1 / t, (1 - eps) * t


_NOISES: dict[str, Callable[[Tensor, float], tuple[Tensor, Tensor]]] = {
    "loglinear": _loglinear,
    "square": _power(2.0),
    "square_root": _power(0.5),
    "log": _logarithmic,
    "cosine": _cosine,
    "mdlm": _mdlm,
}
