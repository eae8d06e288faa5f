"""What decoding asks the net: logits with guidance, self-conditioning and a user's own processing.

Shapes: B batch, L sequence length, V vocabulary, R masked positions, C rows of a chunk.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nar_kernels.nets.adapter import batch_independent
from nar_kernels.nets.prediction import Prediction, TrunkAndHead, describe
from nar_kernels.ops.linear import LogitsMemory
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.sampling.config import SamplingConfig

# From logits [C, V] and their rows [C], indices into the flat [B * L], to others.
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


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


def make_guidance(
    config: SamplingConfig, unconditional: dict[str, Any] | None, is_open: Tensor, mask_id: int
) -> Guidance | None:
    """The guidance of a config; None for none.

    Args:
        unconditional: as in :class:`Guidance`.
        is_open: bool ``[B, L]``, what the prompt leaves to fill.

    Raises:
        ValueError: there is nothing to be guided by.
    """
    scale = config.guidance_scale
    if scale == 1:
        return None
    if unconditional is None and is_open.all():
        raise ValueError(
            f"guidance_scale is {scale}, but there is nothing to be guided by: give a prompt, or "
            "the net's arguments without the condition as unconditional"
        )
    return Guidance(scale, unconditional, torch.where(is_open, -1, mask_id))


class Predictor:
    """A net as :func:`nar_kernels.sampling.decode.decode` calls it.

    Args:
        net: a :class:`nar_kernels.nets.adapter.TokenNet`.
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
        self._trunk_and_head = TrunkAndHead(net)
        self._condition, self._embeddings = condition, null_embed
        self._guidance, self._logits_processor = guidance, logits_processor
        self._memory = LogitsMemory(), LogitsMemory()

    @property
    def is_batch_independent(self) -> bool:
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
        prediction = self._trunk_and_head(ids, kwargs, with_embeddings=with_embeddings)
        prediction.check(ids, self._masking)
        return prediction
