"""Logits for decoding: the net with guidance, self-conditioning and a user's logits processor.

Shapes: B batch, L sequence length, V vocabulary, R candidate positions, C rows of a chunk.
"""

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nar_kernels.nets.adapter import batch_independent, is_compiled
from nar_kernels.nets.prediction import Prediction, TrunkAndHead, describe
from nar_kernels.ops.linear import LogitsMemory
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.sampling.blocks import BlockCalls
from nar_kernels.sampling.config import SamplingConfig
from nar_kernels.sampling.members import Members

# Maps logits [C, V] and their rows [C], indices into the flat [B * L], to new logits [C, V].
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


class Guidance(NamedTuple):
    """Classifier-free guidance (Ho, Salimans 2022, arXiv:2207.12598): logits are ``unconditional +
    scale * (conditional - unconditional)``.

    Attributes:
        scale: 1 for none.
        unconditional: keyword arguments of the net for the unconditional call, which replace those
            of the same names; None to mask the prompt instead (LLaDA, arXiv:2502.09992).
        prompt_masked: int64 ``[B, L]``: ``mask_id`` at the positions of the prompt, -1 elsewhere;
            L is the longest of the batch.
    """

    scale: float
    unconditional: dict[str, Any] | None
    prompt_masked: Tensor


def make_guidance(
    config: SamplingConfig,
    unconditional: dict[str, Any] | None,
    masked: Tensor,
    mask_id: int,
    device: torch.device,
) -> Guidance | None:
    """The guidance of a config; None if ``guidance_scale`` is 1.

    Args:
        unconditional: as in :class:`Guidance`.
        masked: bool ``[B, L]`` on the CPU, positions that are not in the prompt.
        device: of the net.

    Raises:
        ValueError: there is no condition: neither a prompt nor ``unconditional``.
    """
    scale = config.guidance_scale
    if scale == 1:
        return None
    if unconditional is None and masked.all():
        raise ValueError(
            f"guidance_scale is {scale}, but there is nothing to be guided by: give a prompt, or "
            "the net's arguments without the condition as unconditional"
        )
    return Guidance(scale, unconditional, torch.where(masked, -1, mask_id).to(device))


class Predictor:
    """Wraps a net as the ``predict`` of :func:`nar_kernels.sampling.decode.decode`.

    Args:
        net: a :class:`nar_kernels.nets.adapter.TokenNet`.
        masking: the vocabulary that the logits must fit.
        kwargs: keyword arguments of every call of the net.
        condition: with self-conditioning, maps the embeddings of the previous call to keyword
            arguments of the next.
        null_embed: with self-conditioning, the embeddings for the first call.
        guidance: classifier-free guidance, which doubles the calls of the net.
        logits_processor: applied to each chunk of logits, after guidance.
        width: the processor is given rows as indices into the flat ``[B * width]``. Default: L.
        block_calls: makes those of a block-causal net, which is called for a block at a time: see
            :meth:`enter`. Not with self-conditioning.
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
        width: int | None = None,
        block_calls: Callable[[], BlockCalls] | None = None,
    ) -> None:
        self._net, self._masking, self._kwargs = net, masking, kwargs
        self.split_net()
        self._condition, self._embeddings = condition, null_embed
        self._guidance, self._logits_processor = guidance, logits_processor
        self._width, self._memory = width, (LogitsMemory(), LogitsMemory())
        self._members: Members | None = None
        self._own_kwargs, self._own_guidance = kwargs, guidance  # of the members
        self._make_block_calls = block_calls
        self._block_calls = self._new_block_calls()

    def split_net(self) -> None:
        """Splits the net into trunk and head, for all calls until the next time: hooks, modules and
        parameters must stay in between."""
        self._trunk_and_head = TrunkAndHead(self._net)

    def up_to(self, length: int) -> "Predictor":
        """A predictor for shorter sequences, with the same buffers."""
        other = copy(self)
        other._block_calls = self._new_block_calls()
        if self._guidance is not None:
            prompt_masked = self._guidance.prompt_masked[:, :length]
            other._guidance = self._guidance._replace(prompt_masked=prompt_masked)
            other._own_guidance = other._guidance
        return other

    def _new_block_calls(self) -> list[BlockCalls]:
        """Of a block-causal net: for the calls with the condition, and for those without, which
        have keys and values of their own."""
        if self._make_block_calls is None:
            return []
        return [self._make_block_calls() for _ in range(1 if self._guidance is None else 2)]

    @property
    def is_block_causal(self) -> bool:
        return self._make_block_calls is not None

    @property
    def is_cached(self) -> bool:
        """Whether a block-causal net is called with keys and values of the blocks before."""
        return any(calls.cached for calls in self._block_calls)

    def enter(self, ids: Tensor, block: slice) -> None:
        """Goes on to another block of a block-causal net: from now on rows are of this block. The
        ids ``[B, L]`` before it are final."""
        if self._members is not None:
            ids = self._members.of(ids)
        inputs = self._inputs(ids, self._own_kwargs)
        for calls, (own_ids, kwargs) in zip(self._block_calls, inputs, strict=True):
            calls.enter(own_ids, block, kwargs)

    @property
    def may_narrow(self) -> bool:
        """Whether the batch of the net may shrink on the way: not if it is compiled, which would
        recompile for another batch size."""
        return not any(map(is_compiled, self._net.modules()))

    def narrow(self, members: Members) -> None:
        """From now on calls the net for these sequences only: the others have no rows. Who is left
        out stays out."""
        before, embeddings = self._members, self._embeddings
        if embeddings is not None and embeddings.dim() == 3 and len(embeddings) > 1:
            self._embeddings = embeddings.index_select(0, members.among(before))
        for calls in self._block_calls:
            calls.narrow(members.among(before))
        self._members = members
        self._own_kwargs = members.kwargs(self._kwargs)
        if self._guidance is not None:
            scale, unconditional, prompt_masked = self._guidance
            unconditional = None if unconditional is None else members.kwargs(unconditional)
            self._own_guidance = Guidance(scale, unconditional, members.of(prompt_masked))

    @property
    def is_batch_independent(self) -> bool:
        """Whether sequences with the same ids are sure to get the same logits."""
        may_differ = self._kwargs or self._guidance or self._logits_processor
        # The keys and values that are kept are those of all sequences.
        return not (may_differ or self.is_block_causal) and batch_independent(self._net)

    def __call__(self, ids: Tensor, rows: Tensor) -> Iterator[Tensor]:
        first, places, length = 0, rows, ids.shape[1]
        if self._logits_processor is not None and self._width not in (None, length):
            places = rows + rows // length * (self._width - length)
        if self._members is not None:
            ids, rows = self._members.of(ids), self._members.rows(rows, length)
        if self._block_calls:
            rows = self._block_calls[0].rows(rows, length)
        for logits in self._logits(ids, rows):
            if self._logits_processor is not None:
                logits = self._apply_processor(logits, places[first : first + len(logits)])
                first += len(logits)
            yield logits

    def _apply_processor(self, logits: Tensor, rows: Tensor) -> Tensor:
        assert self._logits_processor is not None
        # Chunks share a buffer, and the processor may keep or modify its argument.
        processed = self._logits_processor(logits.clone(), rows)
        if not isinstance(processed, Tensor) or processed.shape != logits.shape:
            raise TypeError(
                f"logits_processor returned {describe(processed)}: it must return logits of shape "
                f"{list(logits.shape)}"
            )
        return processed

    def _logits(self, ids: Tensor, rows: Tensor) -> Iterator[Tensor]:
        kwargs, guidance = self._own_kwargs, self._own_guidance
        if self._condition is not None and self._embeddings is not None:
            embeddings = self._embeddings
            if embeddings.dim() == 3:  # B may be 1 after a shared first step
                embeddings = embeddings.expand(len(ids), -1, -1)
            kwargs = {**kwargs, **self._condition(embeddings)}
        inputs = self._inputs(ids, kwargs)
        if self._block_calls:
            inputs = [
                (calls.of(own_ids), {**own_kwargs, **calls.arguments})
                for calls, (own_ids, own_kwargs) in zip(self._block_calls, inputs, strict=True)
            ]
        prediction = self._predict(*inputs[0])
        chunks = prediction.logits_at(rows, self._memory[0])
        if self._condition is not None:
            self._embeddings = prediction.embeddings
            # Those of a CUDA graph do not outlive another call.
            if self._embeddings is not None and (guidance or self._members):
                self._embeddings = self._embeddings.clone()
        if guidance is None:
            yield from chunks
            return
        unguided = self._predict(*inputs[1])
        unguided_chunks = unguided.logits_at(rows, self._memory[1])
        for conditional, unconditional in zip(chunks, unguided_chunks, strict=True):
            yield unconditional + guidance.scale * (conditional - unconditional)

    def _inputs(self, ids: Tensor, kwargs: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
        """What the net is called with; with guidance a second time, without the condition."""
        guidance = self._own_guidance
        if guidance is None:
            return [(ids, kwargs)]
        without = ids
        if guidance.unconditional is None:
            without = ids.where(guidance.prompt_masked < 0, guidance.prompt_masked)
        return [(ids, kwargs), (without, {**kwargs, **(guidance.unconditional or {})})]

    def _predict(self, ids: Tensor, kwargs: dict[str, Any]) -> Prediction:
        with_embeddings = self._condition is not None
        prediction = self._trunk_and_head(ids, kwargs, with_embeddings=with_embeddings)
        prediction.check(ids, self._masking)
        return prediction
