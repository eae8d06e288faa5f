"""Iterative unmasking: from masks to token ids, the surest positions first.

Ghazvininejad et al. 2019 (Mask-Predict, arXiv:1904.09324), Chang et al. 2022 (MaskGIT,
arXiv:2202.04200). Shapes: B batch, L sequence length, V vocabulary, R positions in question.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nar_kernels.choice import Choice, Noise, Ranking
from nar_kernels.errors import InvalidLogitsError
from nar_kernels.plan import Plan
from nar_kernels.unmasking import LOGIT_DTYPES, unmask

# From ids [B, L] and rows [R], indices into the flat [B * L], to logits: chunks that are together
# [R, V].
Predict = Callable[[Tensor, Tensor], Iterable[Tensor]]


class DecodeState(NamedTuple):
    """What :func:`decode` yields at first and after each step. Nobody changes it afterwards.

    Attributes:
        step: how many steps are done.
        num_steps: how many there are, at most.
        ids: int64 ``[B, L]``, with ``mask_id`` at masked positions.
        masked: bool ``[B, L]``.
        log_prob: float32 ``[B, L]``: that of each id when it was drawn, as in ``Unmasked``; 0
            for ids of the prompt, NaN where masked.
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
    choice: Choice,
    *,
    mask_id: int,
    seed: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    forbidden_ids: Sequence[int] = (),
    remask: bool = False,
    share_first_step: bool = False,
    sequences: range | None = None,
    backend: str = "auto",
) -> Iterator[DecodeState]:
    """Fills the masks of a batch step by step.

    Each step draws ids for all masked positions of a block, keeps those that ``choice`` puts first,
    and masks the others again. What a sequence gets is a function of its logits, its place in the
    batch and the seed. The host knows all counts, so it does not wait for the device before all is
    done, except for the strategy ``"threshold"``.

    Args:
        predict: the net.
        prompt: int64 ``[B, L]`` on the net's device; ``mask_id`` where there is something to fill.
        plan: what :func:`nar_kernels.plan.make_plan` says for the masks in ``prompt``.
        choice: which positions come first.
        temperature: of the ids drawn, falling from this to 0 at the last step of a block.
        top_k, forbidden_ids, backend: as in :func:`nar_kernels.unmask`.
        remask: whether a position of the block may be masked again once it was filled, because its
            id has become improbable. Those of the prompt never are.
        share_first_step: the first step runs ``predict`` on one sequence and uses its logits for
            all. Right only if all prompts are equal and ``predict`` is independent of the batch.
        sequences: the number of each sequence, by which its noise goes. Default: from 0 on.

    Raises:
        InvalidLogitsError: the logits of a row, or a critic's score, are NaN: at once on the CPU,
            elsewhere behind the last state, when another one is asked for.
    """
    device, (batch, length) = prompt.device, prompt.shape
    num_steps = sum(len(block.steps) for block in plan.blocks)
    places = torch.arange(batch * length, device=device)
    sequences = range(batch) if sequences is None else sequences
    numbers = places // length * sequences.step + sequences.start
    first_slots = places % length + numbers * (length * plan.num_steps)
    nans = NanRecord(num_steps, length)
    ids = prompt.flatten().clone()
    log_prob = torch.where(ids == mask_id, math.nan, 0.0).float()

    def state(done: int) -> DecodeState:
        tensors = ids.clone(), ids == mask_id, log_prob.clone()
        return DecodeState(done, num_steps, *(tensor.view(batch, length) for tensor in tensors))

    done = 0
    yield state(done)
    for block in plan.blocks:
        rows, counts = block.rows.to(device, non_blocking=True), block.counts
        for number, annealing, left in block.steps:
            noise = Noise(seed, plan.num_steps, number, length, sequences)
            now, ranking = rows, None
            if choice.order_is_fixed:
                ranking = Ranking(choice.fixed_score(rows, noise), rows, counts)
                now = ranking.first(left)
            slots = first_slots.index_select(0, now) + number * length
            given = None
            if remask:
                current = ids.index_select(0, now)
                given = current.where(current != mask_id, -1)
            asked, asked_rows = ids.view(batch, length), now
            if share_first_step and batch > 1 and done == 0:
                asked, asked_rows, given = asked[:1], now % length, None
                if not choice.order_is_fixed:  # the same places in each sequence
                    asked_rows, slots = asked_rows[: len(now) // batch], slots.view(batch, -1)
            drawn = draw_tokens(
                predict(asked, asked_rows),
                slots,
                given,
                mask_id=mask_id,
                seed=seed,
                temperature=temperature * annealing,
                top_k=top_k,
                forbidden_ids=forbidden_ids,
                confidence=choice.confidence,
                backend=backend,
            )
            nans.note("logits", drawn.is_nan, now, done)
            ids.index_copy_(0, now, drawn.tokens)
            log_prob.index_copy_(0, now, drawn.log_prob)
            if choice.strategy == "threshold":
                is_sure = (drawn.log_prob.exp() >= choice.threshold).long()
                sure = is_sure.new_zeros(batch).index_add_(0, rows // length, is_sure)
                left = left.minimum(counts - sure.cpu().clamp(min=1)).clamp(min=0)
            any_left = bool(left.any())
            if any_left:
                if ranking is None:
                    drawn_ids = ids.view(batch, length)
                    score = choice.score(drawn_ids, rows, drawn.confidence, annealing, noise)
                    if choice.strategy == "critic":
                        nans.note("critic's scores", score.isnan(), rows, done)
                    ranking = Ranking(score, rows, counts)
                waiting = ranking.last(left)
                ids.index_fill_(0, waiting, mask_id)
                log_prob.index_fill_(0, waiting, math.nan)
                if not remask:
                    rows, counts = waiting, left
            done += 1
            yield state(done)
            if not any_left:
                break
    nans.check()


class NanRecord:
    """Where NaN was met first: looked for on the device, which is not waited for if it is none of
    the CPU."""

    def __init__(self, num_steps: int, length: int) -> None:
        self._num_steps, self._length = num_steps, length
        self._first: dict[str, Tensor] = {}

    def note(self, what: str, is_nan: Tensor, rows: Tensor, step: int) -> None:
        """Takes note of the rows, indices into the flat ``[B * L]``, where ``is_nan``."""
        if len(rows) == 0 or (is_nan.is_cpu and not is_nan.any()):
            return
        places = step << 40 | rows // self._length  # by step, then by sequence
        first = places.where(is_nan, 1 << 62).amin(0, keepdim=True)
        self._first[what] = first.minimum(self._first.get(what, first))
        if is_nan.is_cpu:
            self.check()

    def check(self) -> None:
        """Raises InvalidLogitsError if there was any."""
        for what, first in self._first.items():
            step, sequence = divmod(int(first), 1 << 40)
            if step < 1 << 22:
                raise InvalidLogitsError(
                    f"the {what} are NaN in step {step + 1} of {self._num_steps}, sequence "
                    f"{sequence} of the batch: look for a NaN among the net's parameters (training "
                    "that diverged) and arguments"
                )
        self._first.clear()


class Drawn(NamedTuple):
    """What :func:`draw_tokens` returns: an ``Unmasked``, and where it was NaN, bool ``[R]``,
    that left no id to draw."""

    tokens: Tensor
    log_prob: Tensor
    confidence: Tensor
    is_nan: Tensor


def _left_nothing(logits: Tensor, log_prob: Tensor, given: Tensor | None) -> Tensor:
    """bool ``[C]``: where NaN left no id to draw. (Beside others it counts as -inf.)"""
    nothing = log_prob == -math.inf
    if logits.is_cpu and not nothing.any():  # elsewhere, to look would wait
        return nothing
    if given is not None:  # such an id may be improbable by itself
        nothing &= (given < 0) | ~(logits > -math.inf).any(1)
    return nothing & logits.amax(1).isnan()


def draw_tokens(
    chunks: Iterable[Tensor], noise_slots: Tensor, given: Tensor | None = None, **options: Any
) -> Drawn:
    """:func:`nar_kernels.unmask` of logits that come chunk by chunk, so that never all of them
    exist.

    Args:
        chunks: together ``[R, V]``.
        noise_slots: int64 ``[R]``, or ``[N, R]`` to draw N times from each row.
        given: int64 ``[R]``, for one draw.

    Returns:
        Tensors ``[R]`` or ``[N * R]``.
    """
    draws = [noise_slots] if noise_slots.dim() == 1 else list(noise_slots)
    parts: list[list[Drawn]] = [[] for _ in draws]
    first = 0
    for chunk in chunks:
        logits = chunk if chunk.dtype in LOGIT_DTYPES else chunk.float()
        part = slice(first, first := first + logits.shape[0])
        for slots, own_parts in zip(draws, parts, strict=True):
            own_given = None if given is None else given[part]
            unmasked = unmask(logits, noise_slots=slots[part], given=own_given, **options)
            is_nan = _left_nothing(logits, unmasked.log_prob, own_given)
            own_parts.append(Drawn(*unmasked, is_nan))
    if first == 0:
        nothing = noise_slots.new_empty(0, dtype=torch.float32)
        return Drawn(noise_slots.flatten(), nothing, nothing, nothing.bool())
    if len(draws) == len(parts[0]) == 1:
        return parts[0][0]
    return Drawn(*map(torch.cat, zip(*chain(*parts), strict=True)))
