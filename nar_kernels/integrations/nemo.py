"""NeMo Automodel (``nemo_automodel.components``): masks, loss and collator of diffusion LMs.

Shapes: B batch, L sequence length, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nar_kernels.checks import as_float, as_int
from nar_kernels.integrations.draws import check_ids, masking_of, seed_of
from nar_kernels.integrations.llada import forward_process_simple_masking
from nar_kernels.ops.arguments import ChooseArgs, NllArgs
from nar_kernels.ops.backends import resolve_backend
from nar_kernels.ops.choose import CHOOSE_BACKENDS, run_choose
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.nll import NLL_DTYPES, run_nll
from nar_kernels.spec.philox import signed_seed


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
    """Masks every supervised token; returns what :func:`corrupt_uniform` does, of ``p_mask`` 1."""
    check_ids("input_ids", input_ids, 2)
    noise_mask = loss_mask.bool()
    noisy = torch.where(noise_mask, mask_token_id, input_ids)
    return noisy, noise_mask, torch.ones_like(input_ids, dtype=torch.float32)


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
        sample_ids: see there; best on the CPU.

    Returns:
        ``noisy_input_ids``, ``noise_mask`` (bool) and ``p_mask`` (float32, the m of the block),
        each ``[B, L]``.
    """
    check_ids("input_ids", input_ids, 2)
    batch, length = input_ids.shape
    size = length if block_size is None else as_int("block_size", block_size)
    half_life_ratio = as_float("half_life_ratio", half_life_ratio)
    for name, value in (("block_size", size), ("half_life_ratio", half_life_ratio)):
        if not value > 0:
            raise ValueError(f"{name} is {value}: it must be above 0")
    seed, device = seed_of(seed, generator), input_ids.device
    slots = torch.arange(batch, device="cpu") if sample_ids is None else sample_ids.cpu()
    blocks = _Blocks(length, size, slots, seed, device)
    ratio = blocks.ratios(eps)
    counts = (ratio * blocks.lengths).round().long()
    if block_size is None:
        counts.clamp_(min=1)
    noise_mask = blocks.draw(ratio, counts, math.log(2) / (half_life_ratio * size))
    if loss_mask is not None:
        noise_mask &= loss_mask != 0
    noisy = torch.where(noise_mask, mask_token_id, input_ids)
    return noisy, noise_mask, blocks.spread(ratio)


class _Blocks:
    """The blocks of B sequences of L positions. Block j of sample slot g has the noise of slot
    ``g * nb + j``, with nb blocks a sequence.

    Attributes:
        lengths: int64 ``[nb]``.
    """

    def __init__(
        self, length: int, size: int, slots: Tensor, seed: int, device: torch.device
    ) -> None:
        self._length, self._size, self._slots = length, size, slots
        self._seed, self._device = seed, device
        self._num = -(-length // size)
        self.lengths = torch.full((self._num,), size, dtype=torch.int64, device="cpu")
        self.lengths[-1:] = length - (self._num - 1) * size

    def ratios(self, eps: float) -> Tensor:
        """float32 ``[B, nb]`` on the CPU, uniform in (eps, 1): the times of :func:`corrupt`."""
        ids = torch.zeros(len(self._slots), self._num, dtype=torch.uint8, device="cpu")
        masking = masking_of(1, times="uniform", time_range=(0.0, 1.0 - eps), block_length=1)
        return corrupt(ids, masking, seed=self._seed, sample_ids=self._slots, outputs=()).p_mask

    def spread(self, values: Tensor) -> Tensor:
        """``[B, L]`` on the device: of each block, at its positions."""
        wide = values.to(self._device).unsqueeze(2).expand(-1, -1, self._size)
        return wide.flatten(1)[:, : self._length]

    def draw(self, ratio: Tensor, counts: Tensor, slope: float) -> Tensor:
        """bool ``[B, L]``: ``counts`` positions of each block, those of the highest
        ``slope * (1 - ratio) * i`` plus Gumbel noise."""
        batch, device = len(ratio), self._device
        place = torch.arange(self._size, dtype=torch.float32, device=device)
        at_block = (slope * (1 - ratio)).to(device).unsqueeze(2)
        score = (at_block * place).flatten(1)[:, : self._length]
        padded = self._num * self._size
        rows = torch.arange(batch * padded, device=device).view(batch, padded)
        left = _bounds(self.lengths - counts)
        slots = self._slots[:, None] * self._num + torch.arange(self._num, device="cpu")
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
            seed=signed_seed(~self._seed),  # the stream of the noise is that of decoding
            first_slot=0,
            slot_stride=0,
            slots=slots.flatten().to(device),
        )
        kept, _ = run_choose(arguments, resolve_backend("auto", device, CHOOSE_BACKENDS))
        chosen = torch.zeros(batch * padded, dtype=torch.bool, device=device)
        return chosen.index_fill_(0, kept, True).view(batch, padded)[:, : self._length]


def _bounds(counts: Tensor) -> Tensor:
    """int64 ``[n + 1]``: 0, and the sums of the first counts."""
    return nn.functional.pad(counts.reshape(-1).cumsum(0), (1, 0))


class DLLMLossOutput(NamedTuple):
    """The fields of NeMo's tuple of this name; the last two are None."""

    total_loss: Tensor
    dllm_loss: Tensor
    draft_correct_per_pos: Tensor | None = None
    draft_count_per_pos: Tensor | None = None


class MDLMCrossEntropyLoss(nn.Module):
    """``sum(NLL / p_mask)`` over the masked supervised tokens, whose logits alone are read.

    The NLL is in float32, also of bfloat16 logits. The gradient of those logits is computed in the
    forward pass.

    Args:
        fp32_upcast: has no effect, as in NeMo.
    """

    def __init__(self, fp32_upcast: bool = True) -> None:
        super().__init__()
        self.fp32_upcast = fp32_upcast

    def forward(
        self,
        logits: Tensor,
        target_ids: Tensor,
        noise_mask: Tensor,
        p_mask: Tensor,
        loss_mask: Tensor,
        loss_mask_ar: Tensor | None = None,
        num_diffusion_tokens: int | None = None,
        num_ar_tokens: int | None = None,
        causal_logits: Tensor | None = None,
        noisy_input_ids: Tensor | None = None,
    ) -> DLLMLossOutput:
        """
        Args:
            logits: ``[B, L, V]``; a DTensor is gathered.
            target_ids: clean ids ``[B, L]``.
            noise_mask: bool ``[B, L]``, the masked positions.
            p_mask: ``[B, L]``, with which probability.
            loss_mask: ``[B, L]``, not 0 at supervised positions.
            num_diffusion_tokens: what the sum is divided by, at least 1: supervised tokens of all
                microbatches. Default: it is not divided.
            loss_mask_ar, num_ar_tokens, causal_logits, noisy_input_ids: have no effect.
        """
        if hasattr(logits, "full_tensor"):
            logits = logits.full_tensor()
        rows = (noise_mask & loss_mask.bool()).flatten().nonzero().flatten().to(logits.device)
        labels, ratio = (x.to(logits.device).flatten()[rows] for x in (target_ids, p_mask))
        weight = ratio.clamp(min=1e-8).reciprocal()
        loss = _WeightedNll.apply(logits.flatten(0, 1), rows, labels.long(), weight)
        if num_diffusion_tokens is not None:
            loss = loss / max(num_diffusion_tokens, 1)
        return DLLMLossOutput(loss, loss.detach().clone())


class _WeightedNll(torch.autograd.Function):
    """``sum(weight * NLL)`` of some rows of logits ``[N, V]``, differentiable in these."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        picked = logits.index_select(0, rows)
        weight = weight.to(torch.promote_types(picked.dtype, torch.float32))
        backend = resolve_backend("auto", picked.device, tuple(NLL_DTYPES))
        if picked.dtype not in NLL_DTYPES[backend]:
            backend = "reference"
        of_logits = ctx.needs_input_grad[0]
        nll = run_nll(NllArgs(picked, labels, None, weight, of_logits), backend)
        if of_logits:
            ctx.save_for_backward(picked, rows)  # now the gradient
            ctx.num_rows = len(logits)
        return (weight * nll).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, rows = ctx.saved_tensors
        of_logits = gradient.new_zeros(ctx.num_rows, gradient.shape[1])
        of_logits.index_copy_(0, rows, gradient * upstream)
        return of_logits, None, None, None


class DLLMCollator:
    """Pads samples to one length: ``[tokens][ends to the end of a block][padding]``.

    A sample has the lists ``input_ids``, ``loss_mask`` and ``attention_mask``, of equal length.

    Args:
        pad_token_id: of the padding, which has a loss mask of 0.
        eos_token_id: of the ends, which have one of 1. Default: ``pad_token_id``.
        block_size: tokens and ends together are a multiple of it. Default: no ends.
        pad_seq_len_divisible: the length is a multiple of it, and of ``block_size``.
        max_seq_len: longer samples are cut.
        supervise_padding: the loss mask of the padding is 1.
        response_window: blocks are counted from the first supervised token, and ends are attended
            to. The supervised tokens of a sample must be contiguous.
    """

    def __init__(
        self,
        pad_token_id: int = 0,
        eos_token_id: int | None = None,
        block_size: int | None = None,
        pad_seq_len_divisible: int | None = None,
        max_seq_len: int | None = None,
        supervise_padding: bool = False,
        response_window: bool = False,
    ) -> None:
        self.pad_token_id = pad_token_id
        self.eos_token_id = eos_token_id
        self.block_size = block_size
        self.pad_seq_len_divisible = pad_seq_len_divisible
        self.max_seq_len = max_seq_len
        self.block_pad_token_id = pad_token_id if eos_token_id is None else eos_token_id
        self.supervise_padding = supervise_padding
        self.response_window = response_window

    def __call__(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """
        Returns:
            ``input_ids`` and ``attention_mask`` (int64) and ``loss_mask`` (float32), ``[B, L]``;
            ``input_lengths`` (int64 ``[B]``), of tokens.

        Raises:
            ValueError: the lists of a sample differ in length; with ``response_window``, its
                supervised tokens are not contiguous.
        """
        for sample in batch:
            sample.pop("___PAD_TOKEN_IDS___", None)
        lengths = np.array([len(sample["input_ids"]) for sample in batch], np.int64)
        _check_lengths(batch, lengths)
        begins = np.zeros_like(lengths)
        if self.response_window:
            begins = _first_supervised([sample["loss_mask"] for sample in batch], lengths)
        ends = self._ends(lengths, begins)
        length = self._length(ends)
        place = np.arange(length)
        is_token = place < lengths[:, None]
        is_end = ~is_token & (place < ends[:, None])

        def padded(name: str, pad: int, end: int) -> Tensor:
            values = np.where(is_end, end, pad)
            values[is_token] = _joined([sample[name][:length] for sample in batch])
            return torch.from_numpy(values)

        return {
            "input_ids": padded("input_ids", self.pad_token_id, self.block_pad_token_id),
            "loss_mask": padded("loss_mask", int(self.supervise_padding), 1).float(),
            "attention_mask": padded("attention_mask", 0, int(self.response_window)),
            "input_lengths": torch.from_numpy(lengths),
        }

    def _ends(self, lengths: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """Where the last block of each sample ends, counted from ``begins``."""
        if self.max_seq_len is not None:
            lengths = lengths.clip(max=self.max_seq_len)
        size = self.block_size or 1
        begins = np.minimum(begins, lengths)
        return begins - (begins - lengths) // size * size

    def _length(self, ends: np.ndarray) -> int:
        length = int(ends.max(initial=0))
        if self.pad_seq_len_divisible is not None:
            multiple = math.lcm(self.block_size or 1, self.pad_seq_len_divisible)
            length = -(-length // multiple) * multiple
        if self.max_seq_len is not None:
            length = min(length, self.max_seq_len)
        return max(length, 1)


def _joined(lists: list[Sequence[int]]) -> np.ndarray:
    nothing = np.empty(0, np.int64)
    return np.concatenate([nothing, *(np.asarray(values, np.int64) for values in lists)])


def _check_lengths(batch: list[dict[str, Any]], lengths: np.ndarray) -> None:
    for name in ("loss_mask", "attention_mask"):
        for i, (sample, length) in enumerate(zip(batch, lengths, strict=True)):
            if len(sample[name]) != length:
                raise ValueError(
                    f"sample {i} has {length} input_ids but {len(sample[name])} values of {name}: "
                    "there must be one for each"
                )


def _first_supervised(loss_masks: list[Sequence[int]], lengths: np.ndarray) -> np.ndarray:
    """int64 ``[B]``: the first supervised token of each sample, or its length if there is none."""
    is_supervised = _joined(loss_masks) != 0
    starts = lengths.cumsum() - lengths
    sample = np.arange(len(lengths)).repeat(lengths)
    after = np.zeros_like(is_supervised)  # a supervised token of the same sample
    after[1:] = is_supervised[:-1] & (sample[1:] == sample[:-1])
    begins = np.flatnonzero(is_supervised & ~after)
    num_runs = np.bincount(sample[begins], minlength=len(lengths))
    if (num_runs > 1).any():
        i = int(num_runs.argmax())
        raise ValueError(
            f"the supervised tokens of sample {i} are in {num_runs[i]} runs, as of a conversation "
            "of several turns: response_window takes one; set mask_history=True on the dataset to "
            "supervise only the final turn"
        )
    first = lengths.copy()
    first[sample[begins]] = begins - starts[sample[begins]]
    return first
