"""NeMo Automodel's ``datasets.dllm.corruption``: masks.

Shapes: B batch, L sequence length, nb blocks of a sequence.
"""

import math

import torch
from torch import Tensor, nn

from nar_kernels.checks import as_float, as_int
from nar_kernels.integrations.draws import (
    check_ids,
    masking_of,
    seed_of,
    supervised,
    time_range_of,
)
from nar_kernels.integrations.llada import forward_process_simple_masking
from nar_kernels.ops.arguments import ChooseArgs
from nar_kernels.ops.backends import resolve_backend
from nar_kernels.ops.choose import CHOOSE_BACKENDS, run_choose
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.mask_tokens import check_slots
from nar_kernels.spec.philox import signed_seed

# Blocks have slots of their own, that many for each sample: a constant, so that those of a sample
# do not depend on how long a batch is padded, nor meet those of another.
_BLOCKS_A_SAMPLE = 1 << 20
_MAX_SAMPLE = 1 << 43


def corrupt_uniform(
    input_ids: Tensor,
    loss_mask: Tensor,
    mask_token_id: int,
    eps: float = 1e-3,
    generator: torch.Generator | None = None,
    *,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks each supervised token with a probability that is uniform in (eps, 1), one a sequence.

    Args:
        input_ids: clean ids ``[B, L]``.
        loss_mask: ``[B, L]``; where it is 0, nothing is masked.
        mask_token_id: the mask token.
        eps: the least probability, in [0, 1).
        generator: which the seed is drawn from.
        seed, sample_ids: see :mod:`nar_kernels.integrations.draws`.

    Returns:
        ``noisy_input_ids``, ``noise_mask`` (bool) and ``p_mask`` (float32), each ``[B, L]``; the
        last has the stride 0 along L.

    Raises:
        InvalidTokenError: on the CPU, an id is negative, or is ``mask_token_id``.
    """
    return forward_process_simple_masking(
        input_ids, mask_token_id, eps, loss_mask, generator, seed=seed, sample_ids=sample_ids
    )


def corrupt_all_masked(
    input_ids: Tensor, loss_mask: Tensor, mask_token_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks every supervised token; returns what :func:`corrupt_uniform` does, of ``p_mask`` 1,
    which has the stride 0 in both dimensions."""
    check_ids("input_ids", input_ids, 2)
    noise_mask = supervised(loss_mask, input_ids)
    p_mask = torch.ones((), dtype=torch.float32, device=input_ids.device).expand_as(input_ids)
    return torch.where(noise_mask, mask_token_id, input_ids), noise_mask, p_mask


def corrupt_blockwise(
    input_ids: Tensor,
    loss_mask: Tensor | None,
    mask_token_id: int,
    block_size: int | None = None,
    eps: float = 1e-3,
    half_life_ratio: float = 0.25,
    generator: torch.Generator | None = None,
    *,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks ``round(m n)`` of the n positions of each block, m uniform in (eps, 1), and later ones
    rather: a subset drawn with weights ``exp(lam (1 - m) i)`` of positions i, which double in
    ``half_life_ratio * block_size`` of them as m goes to 0.

    Counts are of all positions; those that ``loss_mask`` then leaves clean are among them.

    Args:
        input_ids: clean ids ``[B, L]``.
        loss_mask: ``[B, L]``; where it is 0, nothing is masked. None: 1 everywhere.
        mask_token_id: the mask token.
        block_size: positions of a block, of which the last may be shorter. Default: L, with at
            least one masked.
        eps: the least ratio, in [0, 1).
        half_life_ratio: above 0.
        generator: which the seed is drawn from.
        seed: see :mod:`nar_kernels.integrations.draws`.
        sample_ids: see there, below 2**43; best on the CPU. A block depends on its number in the
            sequence and its own positions, not on L.

    Returns:
        ``noisy_input_ids``, ``noise_mask`` (bool) and ``p_mask`` (float32, the m of the block),
        each ``[B, L]``.
    """
    check_ids("input_ids", input_ids, 2)
    batch, length = input_ids.shape
    size = max(length, 1) if block_size is None else as_int("block_size", block_size)
    half_life_ratio = as_float("half_life_ratio", half_life_ratio)
    for name, value in (("block_size", size), ("half_life_ratio", half_life_ratio)):
        if not value > 0:
            raise ValueError(f"{name} is {value}: it must be above 0")
    seed = seed_of(seed, generator)
    blocks = _Blocks(length, size, _block_slots(sample_ids, batch, -(-length // size)), seed)
    ratio = blocks.ratios(eps)
    counts = (ratio * blocks.lengths).round().long()
    if block_size is None:
        counts.clamp_(min=1)
    slope = math.log(2) / (half_life_ratio * size)
    noise_mask = blocks.draw(ratio, counts, slope, input_ids.device)
    if loss_mask is not None:
        noise_mask &= supervised(loss_mask, input_ids)
    noisy = torch.where(noise_mask, mask_token_id, input_ids)
    return noisy, noise_mask, blocks.spread(ratio.to(input_ids.device))


def _block_slots(sample_ids: Tensor | None, batch: int, num_blocks: int) -> Tensor:
    """int64 ``[B, nb]`` on the CPU: the slot of each block."""
    slots = check_slots(sample_ids, batch).cpu()
    if batch and not 0 <= slots.min() <= slots.max() < _MAX_SAMPLE:
        raise ValueError(
            f"sample_ids are from {int(slots.min())} to {int(slots.max())}: they must be in "
            "[0, 2**43)"
        )
    if num_blocks > _BLOCKS_A_SAMPLE:
        raise ValueError(
            f"a sequence has {num_blocks} blocks: there must be at most {_BLOCKS_A_SAMPLE}, of a "
            "larger block_size"
        )
    return slots[:, None] * _BLOCKS_A_SAMPLE + torch.arange(num_blocks, device="cpu")


class _Blocks:
    """The blocks of B sequences of L positions, of ``size`` each, but the last.

    Attributes:
        lengths: int64 ``[nb]`` on the CPU.
    """

    def __init__(self, length: int, size: int, slots: Tensor, seed: int) -> None:
        self._length, self._size, self._slots = length, size, slots
        # A key of their own: the streams are those of samples, and of decoding.
        self._seed = signed_seed(~seed)
        num = slots.shape[1]
        self.lengths = torch.full((num,), size, dtype=torch.int64, device="cpu")
        self.lengths[-1:] = length - (num - 1) * size

    def ratios(self, eps: float) -> Tensor:
        """float32 ``[B, nb]`` on the CPU, uniform in (eps, 1): the times of :func:`corrupt`."""
        slots = self._slots.flatten()
        ids = torch.zeros(len(slots), 1, dtype=torch.uint8, device="cpu")
        masking = masking_of(
            1, draw="bernoulli", times="uniform", time_range=time_range_of("eps", eps)
        )
        batch = corrupt(ids, masking, seed=self._seed, sample_ids=slots, outputs=())
        return batch.p_mask.view(self._slots.shape)

    def spread(self, values: Tensor) -> Tensor:
        """From ``[B, nb]`` to ``[B, L]``: of each block, at its positions."""
        wide = values.unsqueeze(2).expand(-1, -1, self._size)
        return wide.flatten(1)[:, : self._length]

    def draw(self, ratio: Tensor, counts: Tensor, slope: float, device: torch.device) -> Tensor:
        """bool ``[B, L]`` on the device: ``counts`` positions of each block, those of the highest
        ``slope * (1 - ratio) * i`` plus Gumbel noise."""
        batch, num = ratio.shape
        place = torch.arange(self._size, dtype=torch.float32, device=device)
        at_block = (slope * (1 - ratio)).to(device).unsqueeze(2)
        score = (at_block * place).flatten(1)[:, : self._length]
        padded = num * self._size
        rows = torch.arange(batch * padded, device=device).view(batch, padded)
        left = _bounds(self.lengths - counts)
        arguments = ChooseArgs(
            score.flatten(),
            by_position=False,
            lowest_first=False,
            noise_scale=1.0,
            rows=rows[:, : self._length].flatten(),
            bounds=_bounds(self.lengths.expand(batch, -1)).to(device),
            left_bounds=left.to(device),
            num_left=int(left[-1]),
            length=self._size,
            seed=self._seed,
            first_slot=0,
            slot_stride=0,
            slots=self._slots.flatten().to(device),
        )
        kept, _ = run_choose(arguments, resolve_backend("auto", device, CHOOSE_BACKENDS))
        chosen = torch.zeros(batch * padded, dtype=torch.bool, device=device)
        return chosen.index_fill_(0, kept, True).view(batch, padded)[:, : self._length]


def _bounds(counts: Tensor) -> Tensor:
    """int64 ``[n + 1]``: 0, and the sums of the first counts."""
    return nn.functional.pad(counts.reshape(-1).cumsum(0), (1, 0))
