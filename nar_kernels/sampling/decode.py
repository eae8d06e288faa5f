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

from nar_kernels.errors import InvalidLogitsError
from nar_kernels.ops.unmask import LOGIT_DTYPES, unmask
from nar_kernels.sampling.plan import Plan
from nar_kernels.sampling.strategies import Choice, Noise, Ranking

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
        plan: what :func:`nar_kernels.sampling.plan.make_plan` says for the masks in ``prompt``.
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
    (batch, length), device = prompt.shape, prompt.device
    sequences = range(batch) if sequences is None else sequences
    num_steps = sum(len(block.steps) for block in plan.blocks)
    canvas, nans = _Canvas(prompt, mask_id), NanRecord(num_steps, length)
    first_slots = _noise_slots(sequences, length, plan.num_steps, device)
    done = 0
    yield canvas.state(done, num_steps)
    for block in plan.blocks:
        rows, counts = block.rows.to(device, non_blocking=True), block.counts
        for number, annealing, left in block.steps:
            noise = Noise(seed, plan.num_steps, number, length, sequences)
            now, ranking = rows, None
            if choice.order_is_fixed:  # only what will stay is drawn
                ranking = Ranking(choice.fixed_score(rows, noise), rows, counts)
                now = ranking.first(left)
            drawn = _draw(
                predict,
                canvas,
                now,
                first_slots.index_select(0, now) + number * length,
                again=remask,
                share=share_first_step and done == 0,
                same_rows=not choice.order_is_fixed,
                mask_id=mask_id,
                seed=seed,
                temperature=temperature * annealing,
                top_k=top_k,
                forbidden_ids=forbidden_ids,
                confidence=choice.confidence,
                backend=backend,
            )
            nans.note("logits", drawn.is_nan, now, done)
            canvas.fill(now, drawn)
            if choice.strategy == "threshold":
                is_sure = drawn.log_prob.exp() >= choice.threshold
                left = _num_unsure(left, counts, is_sure, rows // length)
            any_left = bool(left.any())
            if any_left:
                if ranking is None:
                    score = choice.score(canvas.ids, rows, drawn.confidence, annealing, noise)
                    if choice.strategy == "critic":
                        nans.note("critic's scores", score.isnan(), rows, done)
                    ranking = Ranking(score, rows, counts)
                waiting = ranking.last(left)
                canvas.mask(waiting)
                if not remask:
                    rows, counts = waiting, left
            done += 1
            yield canvas.state(done, num_steps)
            if not any_left:
                break
    nans.check()


class _Canvas:
    """A batch while its masks are filled. Rows are indices into the flat ``[B * L]``.

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
        """int64 ``[R]``: the ids there, -1 where masked."""
        ids = self._flat_ids.index_select(0, rows)
        return ids.where(ids != self._mask_id, -1)

    def fill(self, rows: Tensor, drawn: "Drawn") -> None:
        self._flat_ids.index_copy_(0, rows, drawn.tokens)
        self._flat_log_prob.index_copy_(0, rows, drawn.log_prob)

    def mask(self, rows: Tensor) -> None:
        self._flat_ids.index_fill_(0, rows, self._mask_id)
        self._flat_log_prob.index_fill_(0, rows, math.nan)


def _noise_slots(sequences: range, length: int, num_steps: int, device: torch.device) -> Tensor:
    """int64 ``[B * L]``: those of the first step. Each step takes ``length`` more."""
    places = torch.arange(len(sequences) * length, device=device)
    numbers = places // length * sequences.step + sequences.start
    return places % length + numbers * (length * num_steps)


def _draw(
    predict: Predict,
    canvas: _Canvas,
    rows: Tensor,
    slots: Tensor,
    *,
    again: bool,
    share: bool,
    same_rows: bool,
    **options: Any,
) -> "Drawn":
    """Ids for the rows.

    Args:
        slots: int64 ``[R]``, of the noise.
        again: rows that are filled keep their ids, and get the probability that they have now.
        share: all sequences are equal, so one stands for them.
        same_rows: the rows are the same places of each sequence.
        options: of :func:`draw_tokens`.
    """
    ids, given = canvas.ids, canvas.given(rows) if again else None
    batch, length = ids.shape
    if share and batch > 1:
        ids, rows, given = ids[:1], rows % length, None  # nothing but masks is drawn at first
        if same_rows:
            rows, slots = rows[: len(rows) // batch], slots.view(batch, -1)
    return draw_tokens(predict(ids, rows), slots, given, **options)


def _num_unsure(left: Tensor, counts: Tensor, is_sure: Tensor, sequence: Tensor) -> Tensor:
    """int64 ``[B]`` on the CPU: how many stay masked where all that are sure are kept, but at least
    one, and as many as the plan says. Waits for the device."""
    sure = torch.zeros(len(left), dtype=torch.int64, device=is_sure.device)
    sure.index_add_(0, sequence, is_sure.long())
    return left.minimum(counts - sure.cpu().clamp(min=1)).clamp(min=0)


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
