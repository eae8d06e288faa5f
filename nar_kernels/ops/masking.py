"""How to mask: :class:`MaskingConfig`.

Shapes: V vocabulary (``num_tokens``).
"""

import math
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nar_kernels.checks import as_float, as_int
from nar_kernels.spec.schedules import WHOLE_RANGE, Schedule, ScheduleTable, resolve, tabulate

IGNORE_INDEX = -100

# Probabilities are fixed-point integers in the kernels; this is 1.
PROBABILITY_ONE = 1 << 31

# Parts of time that bound the mask ratio: few, since torch.compile unrolls the loop over them.
_NUM_PARTS = 256
_U32 = 0xFFFFFFFF

# Length of Corrupted.invalid.
NUM_INVALID = 5


def check_vocabulary(num_tokens: int, mask_id: int) -> None:
    """Raises ValueError unless num_tokens is in [2, 2**31) and mask_id in [0, num_tokens)."""
    if not 2 <= num_tokens < 1 << 31:
        raise ValueError(f"num_tokens is {num_tokens}: it must be in [2, 2**31)")
    if not 0 <= mask_id < num_tokens:
        raise ValueError(
            f"mask_id {mask_id} is not in [0, num_tokens) = [0, {num_tokens}): num_tokens counts "
            "all embedding rows, the mask token's included"
        )


@dataclass(frozen=True)
class MaskingConfig:
    """How clean windows are corrupted.

    Args:
        num_tokens: V, the number of embedding rows, ``mask_id`` included. Valid clean ids are
            [0, V) without ``mask_id``.
        mask_id: id of the mask token, in [0, V).
        schedule: mask ratio m(t), falling from 1 at t = 0 to 0 at t = 1: ``"linear"``,
            ``"cosine"``, ``"square"``, ``"cubic"``, ``"sqrt"``, ``"arccos"``, ``"sigmoid"``, or a
            callable from times to ratios, tabulated here once. One that spans less, such as BERT's
            ``lambda t: 0.15``, gives no bound on the likelihood: use the mean NLL as the loss.
        draw: ``"exact"`` masks exactly ``clamp(ceil(m(t) n), 1, n)`` of n maskable positions,
            uniformly among all such subsets (MaskGIT, arXiv:2202.04200). ``"bernoulli"`` masks each
            with probability m(t) (MDLM, arXiv:2406.07524).
        times: ``"stratified"`` spreads the times of a global batch evenly over [0, 1), with a
            jitter per sample; ``"uniform"`` draws them independently. Either way, each sample's
            time is uniform. ``"quadrature"`` draws none: view v of n (``views=n`` of
            :func:`nar_kernels.corrupt`) is at the v-th node of Gauss-Legendre quadrature, whose
            weights are in the loss weights (GDPO, arXiv:2510.08554).
        time_range: the times that are drawn from, ``(low, high)`` with 0 <= low < high <= 1. Other
            codes count time the other way, from 0 (clean) to 1: the ``eps`` of LLaDA is
            ``(0, 1 - eps)`` here, ``sampling_eps_min`` and ``sampling_eps_max`` of BD3LM are
            ``(1 - max, 1 - min)``, and so is the ``noise_range`` of dFactory. More than 0.001 off
            an end, it gives no bound on the likelihood.
        weighting: ``"elbo"``: the loss weights of the bound on the likelihood. ``"unit"``: 1, as
            block diffusion over clipped times has it (BD3LM, dFactory, Fast-dLLM v2).
        no_replace_prob: fraction of the masked positions that keep their token (BERT: 0.1).
        random_token_prob: fraction of the masked positions that get a random token (BERT: 0.1),
            uniform over the vocabulary without ``mask_id``.
        corruption_prob: probability, per sample and for each of the two fractions independently,
            that it is applied at all: 1 in BERT, 0.5 in x-transformers.
        never_mask_ids: ids whose positions are never masked: BOS, padding, separators.
        block_length: positions of a block, each of which is masked at a time of its own, as block
            diffusion has it (BD3LM, arXiv:2503.09573): block j of sample slot g as a window of slot
            ``g * blocks + j`` would be, of ``global_batch * blocks``, with ``blocks`` those of a
            sample. The last one may be shorter. Default: a sample is one block.

    Raises:
        TypeError, ValueError: an argument has the wrong type, or is out of range.
    """

    num_tokens: int
    mask_id: int
    _: KW_ONLY
    schedule: str | Schedule = "linear"
    draw: Literal["exact", "bernoulli"] = "exact"
    times: Literal["stratified", "uniform", "quadrature"] = "stratified"
    time_range: tuple[float, float] = WHOLE_RANGE
    weighting: Literal["elbo", "unit"] = "elbo"
    no_replace_prob: float = 0.0
    random_token_prob: float = 0.0
    corruption_prob: float = 1.0
    never_mask_ids: Sequence[int] = ()
    block_length: int | None = None

    # The schedule over the 65536 times, on the CPU.
    table: ScheduleTable = field(init=False, repr=False, compare=False)
    # float32 [65536]: |m'| for exact draws (n / k comes later), |m'| / m for bernoulli ones; 1 with
    # unit weights.
    weight_table: Tensor = field(init=False, repr=False, compare=False)
    # bool [V], true at never_mask_ids; None when there are none.
    never_mask_table: Tensor | None = field(init=False, repr=False, compare=False)
    # The three tables, cached per device.
    _copies: dict[torch.device, tuple[Tensor, Tensor, Tensor | None]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    # Those of nar_kernels.ops.views.
    tables_of_views: dict[Any, Any] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    # no_replace_prob, random_token_prob and corruption_prob in units of 1 / PROBABILITY_ONE.
    shares: tuple[int, int, int] = field(init=False, repr=False, compare=False)

    # time_range as its start and length, rounded to float32, in which kernels compute times.
    time_low: float = field(init=False, repr=False, compare=False)
    time_span: float = field(init=False, repr=False, compare=False)

    # Whether loss_weight gives a bound on the likelihood.
    is_bound: bool = field(init=False, repr=False, compare=False)

    # For each of _NUM_PARTS equal parts of time, the largest ratio from its start on, in units of
    # 2**-32.
    ratio_bounds: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _shares_of_times: dict[torch.device, Tensor] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    # Results of _stratified_capacity, which take 100 us.
    _capacities: dict[tuple[int, int, int], int] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        for name in ("num_tokens", "mask_id"):
            object.__setattr__(self, name, as_int(name, getattr(self, name)))
        check_vocabulary(self.num_tokens, self.mask_id)
        choices = {
            "draw": ("exact", "bernoulli"),
            "times": ("stratified", "uniform", "quadrature"),
            "weighting": ("elbo", "unit"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be one of {valid}")
        object.__setattr__(self, "time_range", _checked_range(self.time_range))
        for name in ("no_replace_prob", "random_token_prob", "corruption_prob"):
            object.__setattr__(self, name, as_float(name, getattr(self, name)))
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be in [0, 1]")
        if self.no_replace_prob + self.random_token_prob > 1:
            raise ValueError(
                f"no_replace_prob + random_token_prob is "
                f"{self.no_replace_prob + self.random_token_prob}: it must be at most 1"
            )
        if not isinstance(self.never_mask_ids, Iterable):
            raise TypeError(
                f"never_mask_ids is {self.never_mask_ids!r}: it must be a sequence of ids"
            )
        never_mask_ids = tuple(as_int("never_mask_ids", i) for i in self.never_mask_ids)
        object.__setattr__(self, "never_mask_ids", never_mask_ids)
        for i in self.never_mask_ids:
            if not 0 <= i < self.num_tokens:
                raise ValueError(f"never_mask_ids holds {i}, outside [0, {self.num_tokens})")
        if self.block_length is not None:
            object.__setattr__(self, "block_length", as_int("block_length", self.block_length))
            if not 1 <= self.block_length < 1 << 31:
                raise ValueError(
                    f"block_length is {self.block_length}: it must be in [1, 2**31), or None for "
                    "one block a sample"
                )
        # Precomputed as plain attributes, which torch.compile can trace.
        object.__setattr__(self, "table", tabulate(self.schedule, self.time_range))
        weight = self.table.exact_weight if self.exact else self.table.bernoulli_weight
        if self.weighting == "unit":
            weight = torch.ones_like(weight)
        object.__setattr__(self, "weight_table", weight)
        object.__setattr__(self, "never_mask_table", self._never_mask_table())
        low, high = self.time_range
        object.__setattr__(self, "time_low", float(np.float32(low)))
        object.__setattr__(self, "time_span", float(np.float32(high - low)))
        object.__setattr__(self, "shares", self._shares())
        object.__setattr__(self, "is_bound", self.table.is_bound and self.weighting == "elbo")
        object.__setattr__(self, "ratio_bounds", self.table.ratio_bounds(_NUM_PARTS))

    def _never_mask_table(self) -> Tensor | None:
        if not self.never_mask_ids:
            return None
        table = torch.zeros(self.num_tokens, dtype=torch.bool, device="cpu")
        table[list(self.never_mask_ids)] = True
        return table

    def _shares(self) -> tuple[int, int, int]:
        keep, random, coin = (
            math.floor(p * PROBABILITY_ONE + 0.5)
            for p in (self.no_replace_prob, self.random_token_prob, self.corruption_prob)
        )
        return keep, min(random, PROBABILITY_ONE - keep), coin

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """The ratio, weight and never-mask tables on a device; cached."""
        tables = self.table.ratio, self.weight_table, self.never_mask_table
        if device.type == "cpu":
            return tables
        if device not in self._copies:
            ratio, weight, never_mask = (None if t is None else t.to(device) for t in tables)
            assert ratio is not None and weight is not None
            self._copies[device] = ratio, weight, never_mask
        return self._copies[device]

    def shares_of_times(self, device: torch.device) -> Tensor:
        """float32 ``[65536]``: m at each of the times of the tables, on a device; cached."""
        if device not in self._shares_of_times:
            ratio = (self.table.ratio.long() & _U32).double() / (_U32 + 1)
            self._shares_of_times[device] = ratio.float().to(device)
        return self._shares_of_times[device]

    def row_capacity(self, batch_size: int, seq_len: int, *, num_strata: int = 0) -> int:
        """The most positions that ``batch_size`` samples can have masked. No draw exceeds it.

        Args:
            num_strata: if each sample has a stratum of time of its own, of so many; else 0. (Each
                of its blocks then has one of as many times more.)

        A sample, or block, of an exact draw has at most ``max(ceil(m L), 1)``, with m the largest
        ratio of its stratum; without strata that is the largest of all, mostly 1. A Bernoulli draw
        may mask everything.

        Raises:
            ValueError: fewer strata than samples.
        """
        if num_strata != 0 and num_strata < batch_size:
            raise ValueError(
                f"num_strata is {num_strata}: it must be at least the {batch_size} samples, which "
                "have one each, or 0"
            )
        most = batch_size * seq_len
        if not self.exact:
            return most
        num_blocks, seq_len = self.num_blocks(seq_len), self.block_length_of(seq_len)
        batch_size, num_strata = batch_size * num_blocks, num_strata * num_blocks
        if not num_strata:
            return min(batch_size * self._largest_count(0, seq_len), most)
        key = batch_size, seq_len, num_strata
        if torch.compiler.is_compiling():
            return min(self._stratified_capacity(*key), most)
        if key not in self._capacities:
            self._capacities[key] = self._stratified_capacity(*key)
        return min(self._capacities[key], most)

    def _stratified_capacity(self, batch_size: int, seq_len: int, num_strata: int) -> int:
        rows = first = 0  # strata, from that of the largest ratios
        while first < batch_size:
            part = first * _NUM_PARTS // num_strata
            last = min(-(-(part + 1) * num_strata // _NUM_PARTS), batch_size)  # that begin in it
            rows += (last - first) * self._largest_count(part, seq_len)
            first = last
        return rows

    def _largest_count(self, part: int, seq_len: int) -> int:
        return max((self.ratio_bounds[part] * seq_len + _U32) >> 32, 1)

    def ratio_at(self, t: Tensor) -> Tensor:
        """m(t) at times in [0, 1]; for a callable, from its table."""
        if isinstance(self.schedule, str):
            return resolve(self.schedule)(t)
        return self._whole_table.at(t.double())

    @cached_property
    def _whole_table(self) -> ScheduleTable:
        return self.table if self.time_range == WHOLE_RANGE else tabulate(self.schedule)

    def check_bound(self) -> None:
        """Raises ValueError if the loss weights give no bound on the likelihood."""
        if self.weighting == "unit":
            raise ValueError(
                "weighting is 'unit', which gives no bound on the likelihood: use another "
                "reduction of the loss, or weighting='elbo'"
            )
        if not self.is_bound:
            first, last = self.table.edges[0].item(), self.table.edges[-1].item()
            jumps = self.table.share_in_jumps
            how = f", {jumps:.0%} of it in jumps" if jumps > 0.01 else ""
            low, high = self.time_range
            raise ValueError(
                f"the mask ratio goes from {first:g} at t = {low:g} to {last:g} at t = {high:g}"
                f"{how}, but the "
                "bound on the likelihood is an integral from 1 to 0 over its slope: use a smooth "
                "schedule in float32 or float64 that spans this, or the mean over masked tokens "
                "(masked_nll: reduction='mean', NonAutoregressiveWrapper: "
                "use_simple_mdlm_loss_weight=False)"
            )

    @property
    def exact(self) -> bool:
        return self.draw == "exact"

    @property
    def weighs_counts(self) -> bool:
        """Whether the loss weight of a sample of n maskable positions, k of them masked, has a
        factor of n / k."""
        return self.exact and self.weighting == "elbo"

    @property
    def stratified(self) -> bool:
        return self.times == "stratified"

    @property
    def is_quadrature(self) -> bool:
        return self.times == "quadrature"

    def block_length_of(self, seq_len: int) -> int:
        """Positions of a block of a sample of L positions: L without blocks."""
        return seq_len if self.block_length is None else min(self.block_length, seq_len)

    def num_blocks(self, seq_len: int) -> int:
        """How many blocks a sample of L positions has."""
        return -(-seq_len // self.block_length_of(seq_len))

    @cached_property
    def schedule_digest(self) -> str:
        """Fingerprint of the tabulated schedule."""
        return self.table.digest()

    def masks_like(self, other: "MaskingConfig") -> bool:
        """Whether both draw the same masks; callable schedules are compared by their tables."""
        ours, theirs = (
            [getattr(m, f.name) for f in fields(m) if f.init and f.name != "schedule"]
            for m in (self, other)
        )
        return ours == theirs and self.schedule_digest == other.schedule_digest

    def __reduce__(self) -> tuple[Any, ...]:
        # Arguments only: rebuilding the tables is cheaper than sending them.
        name = getattr(self.schedule, "__qualname__", "")
        if "<lambda>" in name or "<locals>" in name:
            raise pickle.PicklingError(
                f"the schedule of this MaskingConfig is {name}, which cannot be pickled: pass the "
                "name of a schedule, or a module-level function"
            )
        arguments = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        digest = None if isinstance(self.schedule, str) else self.schedule_digest
        return _rebuild, (type(self), arguments, digest)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MaskingConfig":
        return self  # frozen


def _checked_range(value: Any) -> tuple[float, float]:
    try:
        low, high = value
    except (TypeError, ValueError):
        raise TypeError(f"time_range is {value!r}: it must be two times (low, high)") from None
    low, high = as_float("time_range", low), as_float("time_range", high)
    if not 0 <= low < high <= 1:
        raise ValueError(f"time_range is {(low, high)}: it must be 0 <= low < high <= 1")
    return low, high


def _rebuild(
    cls: type[MaskingConfig], arguments: dict[str, Any], schedule_digest: str | None
) -> MaskingConfig:
    masking = cls(**arguments)
    if schedule_digest not in (None, masking.schedule_digest):
        raise ValueError(
            f"the schedule {masking.schedule!r} gives other ratios than when it was tabulated for "
            "the MaskingConfig that was pickled: make a new one after changing it"
        )
    return masking
