"""Iterative unmasking: from masks to token ids, most confident positions first.

Ghazvininejad et al. 2019 (Mask-Predict, arXiv:1904.09324), Chang et al. 2022 (MaskGIT,
arXiv:2202.04200). Shapes: B batch, L sequence length, V vocabulary, R candidate positions, given
as "rows": indices into the flat ``[B * L]``.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nar_kernels.ops.unmask import LOGIT_DTYPES, unmask
from nar_kernels.sampling.config import REMASKING
from nar_kernels.sampling.ends import Ends
from nar_kernels.sampling.nans import DeferredNanCheck, is_nan_row, nan_mask
from nar_kernels.sampling.plan import Block, Plan
from nar_kernels.sampling.strategies import (
    Candidates,
    Counts,
    StepNoise,
    UnmaskingPolicy,
)

# Maps ids [B, L] and rows [R] to logits [R, V], in chunks of rows.
Predict = Callable[[Tensor, Tensor], Iterable[Tensor]]

# So many steps of a block are done between two looks at whether all answers have ended.
_STEPS_BETWEEN_LOOKS = 8


class DecodeState(NamedTuple):
    """Snapshot of the batch, yielded by :func:`decode` before the first step and after each. Later
    steps do not modify it.

    Attributes:
        step: number of steps done.
        num_steps: number of steps in all, at most.
        ids: int64 ``[B, L]``, with ``mask_id`` at masked positions.
        masked: bool ``[B, L]``.
        log_prob: float32 ``[B, L]``: log-probability of each id when it was sampled, as in
            ``Unmasked``; 0 for ids of the prompt and padding, NaN where masked.
    """

    step: int
    num_steps: int
    ids: Tensor
    masked: Tensor
    log_prob: Tensor


def decode(
    predict: Predict,
    prompt: Tensor,
    plan: Plan,
    policy: UnmaskingPolicy,
    *,
    mask_id: int,
    seed: int,
    temperature: float = 1.0,
    anneal: bool = True,
    top_k: int | None = None,
    top_p: float = 1.0,
    forbidden_ids: Sequence[int] = (),
    remask: bool = False,
    editing_threshold: float | None = None,
    share_first_step: bool = False,
    sequences: range | None = None,
    noise_length: int | None = None,
    ends: Ends | None = None,
    enter: Callable[[Tensor, slice], None] | None = None,
    narrow: Callable[[np.ndarray], None] | None = None,
    backend: str = "auto",
) -> Iterator[DecodeState]:
    """Fills the masked positions of a batch step by step.

    Each step samples ids for all masked positions of a block, keeps those that ``policy`` ranks
    first, and masks the others again. The result for a sequence is a function of its logits, its
    sequence number and the seed. All counts are known on the host, so nothing synchronises with the
    device before the last step, except for adaptive strategies, with ``editing_threshold`` once a
    block is filled, and with ``ends`` after each block and every few steps.

    Args:
        predict: calls the net; see :data:`Predict`.
        prompt: int64 ``[B, L]`` on the net's device; ``mask_id`` at the positions to fill.
        plan: from :func:`nar_kernels.sampling.plan.make_plan` for the masks in ``prompt``.
        policy: the unmasking order.
        temperature: sampling temperature.
        anneal: whether it falls linearly to 0 at the last step of a block.
        top_k, top_p, forbidden_ids, backend: as in :func:`nar_kernels.unmask`.
        remask: whether a filled position of the block may be masked again because its id has become
            improbable. Positions of the prompt never are.
        editing_threshold: in [0, 1]: filled positions of the block get the id that is now the most
            probable one, if its probability is higher than this (LLaDA 2.1). In the steps of a
            block that are left when it is filled, too, until nothing changes: the plan has every
            step. Positions of the prompt stay. Only for a policy that goes by confidence, and
            without ``remask``.
        share_first_step: the first step runs ``predict`` on one sequence and uses its logits for
            all. Correct only if all prompts are equal and ``predict`` is independent of the batch.
        sequences: the number of each sequence, which selects its noise. Default: 0, 1, ...
        noise_length: at least L: ids are drawn at noise slot ``(sequence * steps + step) *
            noise_length + position``. Default: L.
        ends: where answers end. What is behind the end of an answer is cut in the last state, and
            not decoded after the block in which the answer ends; decoding ends when all have.
            Where ids may change, by ``remask``, ``editing_threshold`` or a plan that masks
            positions again, an answer ends no sooner than its block, since its end may go again.
        enter: called before the first step of each block, with the ids ``[B, L]`` and where the
            block is: from now on ``predict`` gets rows of this block, and those before are final.
        narrow: called with bool ``[B]`` when there are fewer sequences that ``predict`` gets rows
            of from now on.

    Raises:
        InvalidLogitsError: the logits of a row, or a critic's score, are NaN: at once on the CPU;
            on other devices after the last state, when the next one is requested.
    """
    (batch, length), device = prompt.shape, prompt.device
    sequences = range(batch) if sequences is None else sequences
    noise_length = length if noise_length is None else noise_length
    num_steps = sum(len(block.steps) for block in plan.blocks)
    buffer, nans = _TokenBuffer(prompt, mask_id), DeferredNanCheck(num_steps, length)
    first_slots = _noise_slots(sequences, length, noise_length * plan.num_steps, device)
    blocks = [_on_device(block, device) for block in plan.blocks]
    nothing, editing = prompt.new_empty(0), editing_threshold is not None
    may_change = remask or editing or policy.strategy in REMASKING
    done, is_last, going = 0, False, np.ones(batch, bool)
    yield buffer.state(done, num_steps)
    for block, (candidates, steps) in zip(plan.blocks, blocks, strict=True):
        if not going.all():
            rest = block.only(going, length, every_step=plan.every_step)
            candidates, steps = _on_device(rest, device)
        if enter is not None:
            enter(buffer.ids, block.part)
        planned, filled = candidates.counts.of_sequence, nothing
        for step in steps:
            number, annealing, left, again = step
            noise = StepNoise(seed, plan.num_steps, number, length, sequences)
            selected, remaining = candidates.rows, nothing
            stay = left if again is None else again.stay
            if policy.order_is_fixed and stay.total > 0:  # sample only the positions that are kept
                selected, remaining = policy.choose(
                    candidates, stay, None, annealing, noise, backend
                )
            kept, was_filled = selected, candidates.counts.total == 0
            sampled, newest = _sample_rows(
                predict,
                buffer,
                selected,
                first_slots.index_select(0, selected) + number * noise_length,
                filled if editing else nothing,
                again=remask,
                share=share_first_step and done == 0,
                same_rows=not policy.order_is_fixed,
                mask_id=mask_id,
                seed=seed,
                temperature=temperature * annealing if anneal else temperature,
                top_k=top_k,
                top_p=top_p,
                forbidden_ids=forbidden_ids,
                confidence=policy.confidence,
                backend=backend,
            )
            nans.record("logits", sampled.is_nan, selected, done)
            buffer.fill(selected, sampled)
            if ends is not None:
                confidence = ends.confidence(sampled.tokens, sampled.confidence)
                sampled = sampled._replace(confidence=confidence)
            before, planned = planned, left.of_sequence
            if policy.is_adaptive:
                left = policy.num_left(left, before, candidates.counts, sampled.confidence)
            if left.total > 0 and not policy.order_is_fixed:
                score = policy.score(buffer.ids, candidates.rows, sampled.confidence)
                if policy.strategy == "critic":
                    nans.record("critic's scores", nan_mask(score), candidates.rows, done)
                kept, remaining = policy.choose(candidates, left, score, annealing, noise, backend)
            if left.total > 0 and (remask or not policy.order_is_fixed):  # else they are masked
                buffer.mask(remaining)
            is_filled = left.total == 0
            if editing_threshold is not None:
                changed = None
                if newest is not None:
                    nans.record("logits", newest.is_nan, filled, done)
                    changed = buffer.edit(filled, newest, editing_threshold, ends)
                if is_filled and step is not steps[-1]:
                    is_filled = was_filled and (changed is None or not changed.any().item())
                filled = torch.cat([filled, kept])
            if again is not None and left.total > 0:
                if again.masked.total > 0:
                    filled, masked = policy.choose(
                        Candidates(filled, again.filled), again.masked, None, 0.0, noise, backend
                    )
                    buffer.mask(masked)
                    remaining = torch.cat([remaining, masked]).sort().values
                filled = torch.cat([filled, kept]).sort().values
            if not remask:
                candidates = Candidates(remaining, left)
            done += 1
            is_last = is_filled and block is plan.blocks[-1]
            looks = is_filled or (not may_change and done % _STEPS_BETWEEN_LOOKS == 0)
            if ends is not None and looks and not is_last:
                unfinished = ends.unfinished(buffer.ids)
                is_last = not unfinished.any()
                if is_filled and not is_last and (unfinished != going).any():
                    going = unfinished
                    if narrow is not None:
                        narrow(going)
            if ends is not None and is_last:
                buffer.cut(ends)
            yield buffer.state(done, num_steps)
            if is_filled or is_last:
                break
        if is_last:
            break
    nans.check()


class _Again(NamedTuple):
    """What a step masks again.

    Attributes:
        stay: how many of the candidates stay masked.
        filled: how many positions are filled before the step.
        masked: how many of those are masked again.
    """

    stay: Counts
    filled: Counts
    masked: Counts


class _Step(NamedTuple):
    """A step of the plan, on the device.

    Attributes:
        left: how many positions stay masked, at most.
    """

    number: int
    annealing: float
    left: Counts
    again: _Again | None


def _on_device(block: Block, device: torch.device) -> tuple[Candidates, list[_Step]]:
    """The first candidates of a block, and its steps."""
    masked = np.stack([block.counts.numpy(), *(step.left.numpy() for step in block.steps)])
    counts, *left = Counts.of(masked, device)
    again: list[_Again | None] = [None] * len(left)
    numbers = [step.again.numpy() for step in block.steps if step.again is not None]
    if numbers:
        parts = masked[1:] - numbers, masked[0] - masked[:-1], np.stack(numbers)
        again = list(map(_Again, *(Counts.of(part, device) for part in parts)))
    steps = [
        _Step(step.number, step.annealing, n, of_step)
        for step, n, of_step in zip(block.steps, left, again, strict=True)
    ]
    return Candidates(block.rows.to(device, non_blocking=True), counts), steps


class _TokenBuffer:
    """Ids and log-probabilities of a batch, updated in place as masks are filled.

    Attributes:
        ids: int64 ``[B, L]``.
    """

    def __init__(self, prompt: Tensor, mask_id: int) -> None:
        self.ids, self._mask_id = prompt.clone(memory_format=torch.contiguous_format), mask_id
        self._log_prob = torch.where(self.ids == mask_id, math.nan, 0.0).float()
        self._flat_ids, self._flat_log_prob = self.ids.view(-1), self._log_prob.view(-1)

    def state(self, step: int, num_steps: int) -> DecodeState:
        masked = self.ids == self._mask_id
        return DecodeState(step, num_steps, self.ids.clone(), masked, self._log_prob.clone())

    def given(self, rows: Tensor) -> Tensor:
        """int64 ``[R]``: current ids of the rows, -1 where masked."""
        ids = self._flat_ids.index_select(0, rows)
        return ids.masked_fill_(ids == self._mask_id, -1)

    def fill(self, rows: Tensor, sampled: "SampledTokens") -> None:
        self._flat_ids.index_copy_(0, rows, sampled.tokens)
        self._flat_log_prob.index_copy_(0, rows, sampled.log_prob)

    def edit(
        self, rows: Tensor, sampled: "SampledTokens", threshold: float, ends: Ends | None
    ) -> Tensor:
        """Replaces the ids of filled rows where another has a probability above the threshold:
        bool ``[R]``."""
        ids, log_prob = self._flat_ids.index_select(0, rows), sampled.log_prob
        sure = log_prob if ends is None else ends.confidence(sampled.tokens, log_prob)
        is_sure = sure > (math.log(threshold) if threshold > 0 else -math.inf)
        changed = is_sure.logical_and_(sampled.tokens != ids)
        old = self._flat_log_prob.index_select(0, rows)
        self._flat_ids.index_copy_(0, rows, sampled.tokens.where(changed, ids))
        self._flat_log_prob.index_copy_(0, rows, log_prob.where(changed, old))
        return changed

    def cut(self, ends: Ends) -> None:
        behind = ends.behind(self.ids)
        self.ids.masked_fill_(behind, ends.padding)
        self._log_prob.masked_fill_(behind, 0.0)

    def mask(self, rows: Tensor) -> None:
        self._flat_ids.index_fill_(0, rows, self._mask_id)
        self._flat_log_prob.index_fill_(0, rows, math.nan)


def _noise_slots(sequences: range, length: int, stride: int, device: torch.device) -> Tensor:
    """int64 ``[B * L]``: noise slots of step 0, ``stride`` apart from sequence to sequence."""
    places = torch.arange(len(sequences) * length, device=device)
    numbers = places // length * sequences.step + sequences.start
    return places % length + numbers * stride


def _sample_rows(
    predict: Predict,
    buffer: _TokenBuffer,
    rows: Tensor,
    slots: Tensor,
    filled: Tensor,
    *,
    again: bool,
    share: bool,
    same_rows: bool,
    **options: Any,
) -> "tuple[SampledTokens, SampledTokens | None]":
    """Samples ids for ``rows``, and the most probable ids for ``filled`` ones, None without any.

    Args:
        slots: int64 ``[R]``, noise slots.
        filled: int64 ``[F]``; none in the first step.
        again: filled rows keep their ids and get their current probability.
        share: all sequences are equal: run the net on one of them.
        same_rows: the rows are the same positions of each sequence.
        options: of :func:`sample_tokens`.
    """
    ids, given = buffer.ids, buffer.given(rows) if again else None
    batch, length = ids.shape
    if share and batch > 1:
        ids, rows, given = ids[:1], rows % length, None  # the first step has only masked rows
        if same_rows:
            rows, slots = rows[: len(rows) // batch], slots.view(batch, -1)
    if len(filled) == 0:
        return sample_tokens(predict(ids, rows), slots, given, **options), None
    of_rows, of_filled = _split(predict(ids, torch.cat([rows, filled])), len(rows))
    sampled = sample_tokens(of_rows, slots, given, **options)
    options |= {"temperature": 0.0, "confidence": "probability"}
    return sampled, sample_tokens(of_filled, filled, **options)


def _split(chunks: Iterable[Tensor], number: int) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
    """Chunks of the first rows and of the others, which are read in this order: a chunk is valid
    until the next."""
    chunks, rest = iter(chunks), []

    def first() -> Iterator[Tensor]:
        left = number
        while left > 0:
            chunk = next(chunks)
            if len(chunk) > left:
                rest.append(chunk[left:])
            yield chunk[:left]
            left -= len(chunk)

    return first(), chain(rest, chunks)


class SampledTokens(NamedTuple):
    """Result of :func:`sample_tokens`: the fields of ``Unmasked``, and ``is_nan``, bool ``[R]``:
    rows without a valid id because of NaN logits. None if there are none, as the CPU can tell.
    """

    tokens: Tensor
    log_prob: Tensor
    confidence: Tensor
    is_nan: Tensor | None


def _part(rows: Tensor, part: slice) -> Tensor:
    """A view; the tensor itself where there is only one part."""
    return rows if part == slice(0, len(rows)) else rows[part]


def sample_tokens(
    chunks: Iterable[Tensor], noise_slots: Tensor, given: Tensor | None = None, **options: Any
) -> SampledTokens:
    """:func:`nar_kernels.unmask` over chunks of logits, so that ``[R, V]`` is never materialised.

    Args:
        chunks: logits ``[C, V]`` each, ``[R, V]`` together.
        noise_slots: int64 ``[R]``, or ``[N, R]`` for N samples of each row.
        given: int64 ``[R]``; only with one sample per row.

    Returns:
        Tensors ``[R]`` or ``[N * R]``.
    """
    draws = [noise_slots] if noise_slots.dim() == 1 else list(noise_slots)
    parts: list[list[SampledTokens]] = [[] for _ in draws]
    first = 0
    for chunk in chunks:
        logits = chunk if chunk.dtype in LOGIT_DTYPES else chunk.float()
        part = slice(first, first := first + logits.shape[0])
        for slots, own_parts in zip(draws, parts, strict=True):
            own_given = None if given is None else _part(given, part)
            unmasked = unmask(logits, noise_slots=_part(slots, part), given=own_given, **options)
            is_nan = is_nan_row(logits, unmasked.log_prob, own_given)
            own_parts.append(SampledTokens(*unmasked, is_nan))
    if first == 0:
        empty = noise_slots.new_empty(0, dtype=torch.float32)
        return SampledTokens(noise_slots.flatten(), empty, empty, None)
    if len(draws) == len(parts[0]) == 1:
        return parts[0][0]
    return _concatenated(list(chain(*parts)))


def _concatenated(parts: list[SampledTokens]) -> SampledTokens:
    tokens, log_prob, confidence = map(torch.cat, zip(*(p[:3] for p in parts), strict=True))
    if all(part.is_nan is None for part in parts):
        return SampledTokens(tokens, log_prob, confidence, None)
    masks = (part.log_prob.isnan() if part.is_nan is None else part.is_nan for part in parts)
    return SampledTokens(tokens, log_prob, confidence, torch.cat(list(masks)))
