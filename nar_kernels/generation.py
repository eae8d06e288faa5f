"""What ``generate`` begins with, and what it asks the net.

Shapes: B batch, L sequence length, V vocabulary, R masked positions, C rows of a chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nar_kernels.checks import as_int
from nar_kernels.heads import Prediction, describe
from nar_kernels.linear import LogitsMemory
from nar_kernels.masking import MaskingConfig
from nar_kernels.nets import batch_independent
from nar_kernels.plan import halton_order

Prompt = (
    Tensor | np.ndarray | Sequence[int] | Sequence[Tensor | np.ndarray] | Sequence[Sequence[int]]
)
# From logits [C, V] and their rows [C], indices into the flat [B * L], to others.
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


def read_prompt(
    prompt: Prompt | None, batch_size: int | None, seq_len: int, masking: MaskingConfig
) -> Tensor:
    """int64 ``[B, L]`` on the CPU: the prompt, and ``mask_id`` where there is something to fill.

    Args:
        prompt: one sequence or several, of any lengths up to L; None for none.
        batch_size: how many samples of one sequence; None for one of each.

    Raises:
        TypeError, ValueError: wrong types, lengths or ids.
    """
    if batch_size is not None and (batch_size := as_int("batch_size", batch_size)) < 0:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 0")
    sequences = (
        [torch.empty(0, dtype=torch.int64, device="cpu")] if prompt is None else _sequences(prompt)
    )
    if batch_size is not None and len(sequences) == 1:
        sequences = sequences * batch_size
    if batch_size is not None and len(sequences) != batch_size:
        raise ValueError(
            f"batch_size is {batch_size}, but the prompt has {len(sequences)} sequences: leave "
            "batch_size out, or give one sequence"
        )
    ids = torch.full((len(sequences), seq_len), masking.mask_id, device="cpu")
    for row, sequence in zip(ids, sequences, strict=True):
        if len(sequence) > seq_len:
            raise ValueError(f"a prompt has {len(sequence)} ids: the net takes {seq_len} at most")
        row[: len(sequence)] = sequence
    bad = (ids < 0) | (ids >= masking.num_tokens)
    if bad.any():
        raise ValueError(
            f"the prompt holds id {int(ids[bad][0])}: ids must be in [0, {masking.num_tokens}), "
            f"with {masking.mask_id} where there is something to fill"
        )
    return ids


def is_one_sequence(prompt: Prompt | None) -> bool:
    """Whether it is no batch of sequences."""
    if prompt is None:
        return True
    if isinstance(prompt, Tensor | np.ndarray) and prompt.ndim > 0:
        return prompt.ndim == 1
    if isinstance(prompt, str | dict | Tensor | np.ndarray) or not hasattr(prompt, "__getitem__"):
        raise _no_prompt(f"is {prompt!r}")
    return len(prompt) > 0 and np.ndim(prompt[0]) == 0


def _sequences(prompt: Prompt) -> list[Tensor]:
    batch: Any = [prompt] if is_one_sequence(prompt) else prompt
    return [_ids(sequence) for sequence in batch]


def _ids(sequence: Any) -> Tensor:
    """int64 ``[n]`` on the CPU."""
    if isinstance(sequence, np.ndarray):
        # A tensor cannot share memory that is read-only, goes backwards or has foreign bytes.
        sequence = sequence.astype(sequence.dtype.newbyteorder("="))
    try:
        ids = torch.as_tensor(sequence, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise _no_prompt(f"holds {sequence!r}") from None
    if ids.dim() == 1 and len(ids) == 0:
        return ids.long()
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise _no_prompt(f"has dtype {ids.dtype} and shape {list(ids.shape)}")
    return ids.long()


def _no_prompt(what: str) -> TypeError:
    return TypeError(
        f"a prompt {what}: it must be integers [L] or [B, L], or a list of such sequences"
    )


def grid_order(grid: tuple[int, int] | None, seq_len: int) -> Tensor:
    """int64 ``[L]``: the ranks of :func:`halton_order`, by default of a square.

    Raises:
        ValueError: L is no square, or the grid has not L cells.
    """
    if grid is None:
        side = round(seq_len**0.5)
        grid = side, side
    height, width = (as_int("grid", size) for size in grid)
    if height * width != seq_len or height < 1:
        raise ValueError(
            f"grid is {height} x {width}: strategy 'halton' needs grid=(height, width) with "
            f"{seq_len} cells"
        )
    return halton_order(height, width)


class Guidance(NamedTuple):
    """Classifier-free guidance (Ho, Salimans 2022, arXiv:2207.12598): logits are ``without +
    scale * (with - without)`` the condition.

    Attributes:
        scale: 1 for none.
        unconditional: keyword arguments of the net that say so, in place of those of the same
            names; None to mask the prompt instead (LLaDA, arXiv:2502.09992).
        prompt_masked: int64 ``[B, L]``: ``mask_id`` at the positions of the prompt, -1 elsewhere.
    """

    scale: float
    unconditional: dict[str, Any] | None
    prompt_masked: Tensor


class Predictor:
    """A net as :func:`nar_kernels.decode.decode` calls it.

    Args:
        net: a :class:`nar_kernels.nets.TokenNet`.
        masking: what its logits must fit.
        kwargs: of each call.
        condition: with self-conditioning, from the embeddings of the call before to keyword
            arguments of the next.
        null_embed: with self-conditioning, what stands for those before the first call.
    """

    def __init__(
        self,
        net: nn.Module,
        masking: MaskingConfig,
        kwargs: dict[str, Any],
        *,
        condition: Callable[[Tensor], dict[str, Any]] | None = None,
        null_embed: Tensor | None = None,
        guidance: Guidance | None = None,
        logits_processor: LogitsProcessor | None = None,
    ) -> None:
        self._net, self._masking, self._kwargs = net, masking, kwargs
        self._condition, self._embeddings = condition, null_embed
        self._guidance, self._logits_processor = guidance, logits_processor
        self._memory = LogitsMemory(), LogitsMemory()

    @property
    def sees_ids_alone(self) -> bool:
        """Whether one sequence may stand for others with the same ids."""
        told_apart = self._kwargs or self._guidance or self._logits_processor
        return not told_apart and batch_independent(self._net)

    def __call__(self, ids: Tensor, rows: Tensor) -> Iterator[Tensor]:
        first = 0
        for logits in self._logits(ids, rows):
            if self._logits_processor is not None:
                logits = self._processed(logits, rows[first : first + len(logits)])
                first += len(logits)
            yield logits

    def _processed(self, logits: Tensor, rows: Tensor) -> Tensor:
        assert self._logits_processor is not None
        # Chunks share memory, and what the processor gets is its own.
        processed = self._logits_processor(logits.clone(), rows)
        if not isinstance(processed, Tensor) or processed.shape != logits.shape:
            raise TypeError(
                f"logits_processor returned {describe(processed)}: it must return logits of shape "
                f"{list(logits.shape)}"
            )
        return processed

    def _logits(self, ids: Tensor, rows: Tensor) -> Iterator[Tensor]:
        kwargs, guidance = self._kwargs, self._guidance
        if self._condition is not None and self._embeddings is not None:
            embeddings = self._embeddings
            if embeddings.dim() == 3:  # perhaps of one sequence that stood for all
                embeddings = embeddings.expand(len(ids), -1, -1)
            kwargs = {**kwargs, **self._condition(embeddings)}
        prediction = self._predict(ids, kwargs)
        if self._condition is not None:
            self._embeddings = prediction.embeddings
        if guidance is None:
            yield from prediction.logits_at(rows, self._memory[0])
            return
        if guidance.unconditional is None:
            ids = ids.where(guidance.prompt_masked < 0, guidance.prompt_masked)
        without = self._predict(ids, {**kwargs, **(guidance.unconditional or {})})
        with_condition = prediction.logits_at(rows, self._memory[0])
        without_it = without.logits_at(rows, self._memory[1])
        for conditional, unconditional in zip(with_condition, without_it, strict=True):
            yield unconditional + guidance.scale * (conditional - unconditional)

    def _predict(self, ids: Tensor, kwargs: dict[str, Any]) -> Prediction:
        with_embeddings = self._condition is not None
        prediction = Prediction(self._net, ids, kwargs, with_embeddings=with_embeddings)
        prediction.check(ids, self._masking)
        return prediction
