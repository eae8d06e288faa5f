"""What to mask, and what comes out: :class:`MaskingConfig` and :class:`Corrupted`.

Shapes: B batch, L sequence length, V vocabulary (``num_tokens``), R masked rows of a batch.
"""

import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nar_kernels.checks import as_float, as_int, check_device
from nar_kernels.errors import InvalidTokenError
from nar_kernels.schedules import Schedule, ScheduleTable, resolve, tabulate

IGNORE_INDEX = -100

# Probabilities enter the kernels as integers; this one stands for 1.
PROBABILITY_ONE = 1 << 31

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
        num_tokens: V, the number of rows of the embedding, ``mask_id`` included. Valid clean ids
            are [0, V) without ``mask_id``.
        mask_id: the id of the mask token, in [0, V).
        schedule: mask ratio m(t), falling from 1 at t = 0 to 0 at t = 1: ``"linear"``,
            ``"cosine"``, ``"square"``, ``"cubic"``, ``"sqrt"``, ``"arccos"``, ``"sigmoid"``, or a
            callable from times to ratios, which is tabulated here and not asked again. One that
            spans less, such as BERT's ``lambda t: 0.15``, gives no bound on the likelihood: train
            the mean with it.
        draw: ``"exact"`` masks exactly ``clamp(ceil(m(t) n), 1, n)`` of n maskable positions,
            uniformly among all such subsets (MaskGIT, arXiv:2202.04200). ``"bernoulli"`` masks each
            with probability m(t) (MDLM, arXiv:2406.07524).
        times: ``"stratified"`` spreads the times of a global batch evenly over [0, 1), with a
            jitter per sample; ``"uniform"`` draws them independently. Either way, each sample's
            time is uniform.
        no_replace_prob: share of the masked positions that keep their own token (BERT, 0.1).
        random_token_prob: share of the masked positions that get a random token (BERT, 0.1),
            uniform over the vocabulary without ``mask_id``.
        corruption_prob: probability, per sample and for either share alone, that it is applied at
            all: 1 as in BERT, 0.5 as in x-transformers.
        never_mask_ids: ids whose positions are never masked: BOS, padding, separators.

    Raises:
        TypeError, ValueError: a value is of the wrong type, or out of its range.
    """

    num_tokens: int
    mask_id: int
    _: KW_ONLY
    schedule: str | Schedule = "linear"
    draw: Literal["exact", "bernoulli"] = "exact"
    times: Literal["stratified", "uniform"] = "stratified"
    no_replace_prob: float = 0.0
    random_token_prob: float = 0.0
    corruption_prob: float = 1.0
    never_mask_ids: Sequence[int] = ()

    # The schedule over the 65536 times, on the CPU.
    table: ScheduleTable = field(init=False, repr=False, compare=False)
    # float32 [65536]: |m'| for exact draws (n / k comes later), |m'| / m for bernoulli ones.
    weight_table: Tensor = field(init=False, repr=False, compare=False)
    # bool [V], true at never_mask_ids; None when there are none.
    never_mask_table: Tensor | None = field(init=False, repr=False, compare=False)
    # The three tables on other devices.
    _copies: dict[torch.device, tuple[Tensor, Tensor, Tensor | None]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    # no_replace_prob, random_token_prob and corruption_prob in units of 1 / PROBABILITY_ONE.
    shares: tuple[int, int, int] = field(init=False, repr=False, compare=False)

    # Whether loss_weight is that of a bound on the likelihood.
    is_bound: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("num_tokens", "mask_id"):
            object.__setattr__(self, name, as_int(name, getattr(self, name)))
        check_vocabulary(self.num_tokens, self.mask_id)
        for name, valid in (("draw", ("exact", "bernoulli")), ("times", ("stratified", "uniform"))):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be one of {valid}")
        for name in ("no_replace_prob", "random_token_prob", "corruption_prob"):
            object.__setattr__(self, name, as_float(name, getattr(self, name)))
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be in [0, 1]")
        if self.no_replace_prob + self.random_token_prob > 1:
            raise ValueError(
                f"no_replace_prob + random_token_prob is "
                f"{self.no_replace_prob + self.random_token_prob}: shares of one whole, at most 1"
            )
        if not isinstance(self.never_mask_ids, Iterable):
            raise TypeError(f"never_mask_ids is {self.never_mask_ids!r}: it must be some ids")
        never_mask_ids = tuple(as_int("never_mask_ids", i) for i in self.never_mask_ids)
        object.__setattr__(self, "never_mask_ids", never_mask_ids)
        for i in self.never_mask_ids:
            if not 0 <= i < self.num_tokens:
                raise ValueError(f"never_mask_ids holds {i}, outside [0, {self.num_tokens})")
        # Derived once and held as plain attributes, which torch.compile can trace through.
        object.__setattr__(self, "table", tabulate(self.schedule))
        weight = self.table.exact_weight if self.exact else self.table.bernoulli_weight
        object.__setattr__(self, "weight_table", weight)
        object.__setattr__(self, "never_mask_table", self._never_mask_table())
        object.__setattr__(self, "shares", self._shares())
        object.__setattr__(self, "is_bound", self.table.is_bound)

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
        """The ratio, weight and never-mask tables on a device; copied there once."""
        tables = self.table.ratio, self.weight_table, self.never_mask_table
        if device.type == "cpu":
            return tables
        if device not in self._copies:
            ratio, weight, never_mask = (None if t is None else t.to(device) for t in tables)
            assert ratio is not None and weight is not None
            self._copies[device] = ratio, weight, never_mask
        return self._copies[device]

    def ratio_at(self, t: Tensor) -> Tensor:
        """m(t) at times in [0, 1]; of a callable, what was tabulated."""
        if isinstance(self.schedule, str):
            return resolve(self.schedule)(t)
        return self.table.at(t.double())

    def check_bound(self) -> None:
        """Raises ValueError if the schedule gives no bound on the likelihood."""
        if not self.is_bound:
            first, last = self.table.edges[0].item(), self.table.edges[-1].item()
            jumps = self.table.share_in_jumps
            how = f", {jumps:.0%} of it in jumps" if jumps > 0.01 else ""
            raise ValueError(
                f"the mask ratio goes from {first:g} at t = 0 to {last:g} at t = 1{how}, but the "
                "bound on the likelihood is an integral from 1 to 0 over its slope: use a smooth "
                "schedule in float32 or float64 that spans this, or the mean over masked tokens "
                "(masked_nll: reduction='mean', NonAutoregressiveWrapper: "
                "use_simple_mdlm_loss_weight=False)"
            )

    @property
    def exact(self) -> bool:
        return self.draw == "exact"

    @property
    def stratified(self) -> bool:
        return self.times == "stratified"

    @cached_property
    def schedule_digest(self) -> str:
        """A fingerprint of the schedule, as it was tabulated."""
        return self.table.digest()

    def masks_like(self, other: "MaskingConfig") -> bool:
        """Whether both draw the same masks, though a callable schedule be another object."""
        ours, theirs = (
            [getattr(m, f.name) for f in fields(m) if f.init and f.name != "schedule"]
            for m in (self, other)
        )
        return ours == theirs and self.schedule_digest == other.schedule_digest

    def __reduce__(self) -> tuple[Any, ...]:
        # Its arguments alone: to make the tables again is cheaper than to send them.
        name = getattr(self.schedule, "__qualname__", "")
        if "<lambda>" in name or "<locals>" in name:
            raise pickle.PicklingError(
                f"the schedule of this MaskingConfig is {name}, which no other process can find: "
                "pass the name of one, or a function of a module"
            )
        arguments = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        digest = None if isinstance(self.schedule, str) else self.schedule_digest
        return _make_again, (type(self), arguments, digest)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MaskingConfig":
        return self  # it is frozen


def _make_again(
    cls: type[MaskingConfig], arguments: dict[str, Any], schedule_digest: str | None
) -> MaskingConfig:
    masking = cls(**arguments)
    if schedule_digest not in (None, masking.schedule_digest):
        raise ValueError(
            f"the schedule {masking.schedule!r} gives other ratios than when it was tabulated for "
            "the MaskingConfig that was pickled: make another one after a change to it"
        )
    return masking


def check_record(
    record: Tensor, batch_size: int, masking: MaskingConfig, where: Callable[[int], str]
) -> None:
    """Raises what ``Corrupted.invalid`` says is wrong; ``where`` names the place of an offset."""
    count, offset, token_id, bad_windows, bad_slots = record.tolist()
    if bad_windows:
        raise IndexError(
            f"{bad_windows} of {batch_size} windows reach outside the corpus: starts must be in "
            "[0, T - L]"
        )
    if bad_slots:
        raise ValueError(f"{bad_slots} sample ids are negative: slots count from 0")
    if count:
        raise InvalidTokenError.at(
            where(offset),
            token_id=token_id,
            offset=offset,
            count=count,
            num_tokens=masking.num_tokens,
            mask_id=masking.mask_id,
        )


# The tensors of a batch that have an entry for each sample.
_PER_SAMPLE = (
    "input_ids",
    "labels",
    "masked_indices",
    "times",
    "loss_weight",
    "num_masked",
    "num_maskable",
)


def _sample_indices(index: Any, size: int) -> Tensor:
    """int64 ``[B']`` on the CPU: which of ``size`` samples an index of a batch names."""
    is_listed = isinstance(index, list | np.ndarray | Tensor)
    samples = torch.as_tensor(index if is_listed else 0, device="cpu")
    if samples.dtype == torch.bool and samples.shape == (size,):
        samples = samples.nonzero().flatten()
    if samples.numel() == 0:  # an empty list has no type
        samples = samples.to(torch.int64)
    if samples.dim() != 1 or samples.is_floating_point() or samples.dtype == torch.bool:
        raise TypeError(
            f"the index of a batch is {index!r}: it must be a slice, a list or tensor of integers, "
            "or a bool tensor [B]; sample i alone is batch[i : i + 1]"
        )
    samples = samples.to(torch.int64)
    outside = (samples < -size) | (samples >= size)
    if outside.any():
        raise IndexError(f"sample {samples[outside][0].item()} is outside [-{size}, {size})")
    return samples


def _without_the_rest(value: Any) -> Any:
    """A tensor without the memory around it, which a pickle would hold; anything else as it is."""
    if not isinstance(value, Tensor) or value.untyped_storage().nbytes() == value.nbytes:
        return value
    return value.clone()


@dataclass(eq=False, repr=False)  # not frozen: that takes 3 us of a batch
class Corrupted:
    """A corrupted batch: everything a masked-prediction step needs.

    ``batch[2:4]`` and ``batch[[5, 0]]`` are batches of some of its samples, and :meth:`cat` puts
    several batches together. A ``DataLoader`` whose samples are batches takes ``batch_size=None``
    or ``collate_fn=Corrupted.cat``, and any number of workers.

    Attributes:
        input_ids: int64 ``[B, L]``, what the network sees.
        labels: int64 ``[B, L]``, the clean id at masked positions, -100 elsewhere.
        masked_indices: bool ``[B, L]``, the positions to predict. Their input is ``mask_id``, the
            token itself or a random one, as the configuration says.
        times: float32 ``[B]`` in (0, 1).
        loss_weight: float32 ``[B]``, w(t) of the likelihood bound: ``sum(w * NLL) / num_maskable``
            over the masked positions of a sample is in nats per token.
        num_masked: int64 ``[B]``, masked positions of each sample.
        num_maskable: int64 ``[B]``, positions that could have been masked.
        row_buffer: int64 ``[B * L]``; its first R entries are ``masked_rows``, the rest is
            undefined. (So that the operator's shapes do not depend on data.) Parts of a batch have
            the R entries alone.
        invalid: int64 ``[5]``: how many ids were bad, the lowest offset of one, its value; how many
            windows reached outside the corpus; how many sample slots were negative. Bad ids are
            replaced by a valid one, so that no embedding lookup is out of bounds, bad windows by
            the first of the corpus. Parts of a batch have the record of the whole; :meth:`cat` adds
            counts up, and keeps the lowest offset as the batch that it comes from counted it.
        masking: the configuration that made this batch.
        host_counts: int64 ``[B]`` on the CPU, ``num_masked`` where the device need not be asked for
            it; None where it must.
    """

    input_ids: Tensor
    labels: Tensor
    masked_indices: Tensor
    times: Tensor
    loss_weight: Tensor
    num_masked: Tensor
    num_maskable: Tensor
    row_buffer: Tensor
    invalid: Tensor
    masking: MaskingConfig
    host_counts: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def masked_rows(self) -> Tensor:
        """int64 ``[R]``: the masked positions as ascending indices into the flat ``[B * L]``.

        Waits for the device, except for batches with nothing excluded whose seed, slots and step
        are numbers: then the host knows R.
        """
        counts = self.num_masked if self.host_counts is None else self.host_counts
        return self.row_buffer[: int(counts.sum())]

    @property
    def clean_ids(self) -> Tensor:
        """int64 ``[B, L]``: the windows before corruption, but -100 where a label was set to it."""
        return torch.where(self.masked_indices, self.labels, self.input_ids)

    def raise_if_invalid(self, source: str | None = None) -> None:
        """Raises what is wrong with the data: :class:`InvalidTokenError` for a bad id, IndexError
        for a window outside the corpus, ValueError for a negative sample slot.

        ``source`` names the corpus; without it the place is a row and a column of the batch.
        Reading the record waits for the device; call it when it is convenient.
        """

        if not any(self.invalid.tolist()):
            return

        def where(offset: int) -> str:
            if source is not None:
                return f"offset {offset} of {source}"
            row, column = divmod(offset, self.input_ids.shape[1])
            return f"tokens[{row}, {column}]"

        check_record(self.invalid, len(self), self.masking, where)

    def __repr__(self) -> str:
        device = self.input_ids.device
        counts = self.num_masked if device.type == "cpu" else self.host_counts
        num_masked = "on the device" if counts is None else int(counts.sum())
        return (
            f"Corrupted(shape={list(self.input_ids.shape)}, device={str(device)!r}, "
            f"num_masked={num_masked})"
        )

    def __getitem__(self, index: slice | list[int] | np.ndarray | Tensor) -> "Corrupted":
        """The samples of a slice; of a list, array or tensor of their indices; or those where a
        bool tensor ``[B]`` is true.

        Waits for the device, except for slices of step 1 where ``masked_rows`` does not.

        Raises:
            IndexError: an index is outside [-B, B).
            TypeError: it is something else, such as a single integer.
        """
        size, length = self.input_ids.shape
        if isinstance(index, slice):
            samples = range(size)[index]
            if samples.step == 1:
                start, stop = samples.start, samples.start + len(samples)
                counts = self.num_masked if self.host_counts is None else self.host_counts
                first, last = int(counts[:start].sum()), int(counts[:stop].sum())
                part = self._samples(slice(start, stop))
                part.row_buffer = self.row_buffer[first:last] - start * length
                return part
            index = list(samples)
        part = self._samples(_sample_indices(index, size))
        part.row_buffer = part.masked_indices.flatten().nonzero().flatten()
        return part

    def _samples(self, index: slice | Tensor) -> "Corrupted":
        """Some samples, still with the ``row_buffer`` of all."""
        counts = None if self.host_counts is None else self.host_counts[index]
        tensors: dict[str, Any] = {name: getattr(self, name)[index] for name in _PER_SAMPLE}
        return replace(self, **tensors, host_counts=counts)

    @classmethod
    def cat(cls, batches: Iterable["Corrupted"]) -> "Corrupted":
        """One batch of the samples of several, in their order.

        Waits for the device where ``masked_rows`` of one of them does.

        Raises:
            ValueError: there are none, or they differ in L, device or masking.
        """
        batches = list(batches)
        other = next((b for b in batches if not batches[0]._is_like(b)), None)
        if other is not None or not batches:
            kinds = [(b, b.masking) for b in (*batches[:1], other) if b is not None]
            what = " and ".join(map(str, kinds)) or "no batches"
            raise ValueError(
                f"cat got {what}: it takes at least one, all of the same seq_len, device and "
                "masking"
            )
        tensors: dict[str, Any] = {
            name: torch.cat([getattr(b, name) for b in batches]) for name in _PER_SAMPLE
        }
        rows, num_rows = [], 0
        for batch in batches:
            rows.append(batch.masked_rows + num_rows)
            num_rows += batch.input_ids.numel()
        records = torch.stack([batch.invalid for batch in batches])
        offsets = records[:, 1].where(records[:, 0] > 0, torch.iinfo(torch.int64).max)
        invalid = records.sum(0)
        invalid[1:3] = records[offsets.argmin(), 1:3]
        counts = [b.host_counts for b in batches if b.host_counts is not None]
        return replace(
            batches[0],
            **tensors,
            row_buffer=torch.cat(rows),
            invalid=invalid,
            host_counts=torch.cat(counts) if len(counts) == len(batches) else None,
        )

    def _is_like(self, other: "Corrupted") -> bool:
        places = [(b.input_ids.shape[1], b.input_ids.device) for b in (self, other)]
        return places[0] == places[1] and self.masking.masks_like(other.masking)

    def microbatches(self, size: int) -> Iterator["Corrupted"]:
        """Consecutive parts of at most ``size`` samples, for gradient accumulation.

        Raises:
            ValueError: ``size`` is below 1.
        """
        size = as_int("size", size)
        if size < 1:
            raise ValueError(f"size is {size}: it must be at least 1")
        return (self[start : start + size] for start in range(0, len(self), size))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Corrupted":
        """This batch on another device.

        Raises:
            ValueError: it is a CUDA device that is not there.
        """
        if torch.device(device).type == "cuda":
            device = check_device(device)
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Corrupted":
        """This batch in pinned memory of the host, whose copy to a GPU need not be waited for. A
        ``DataLoader`` with ``pin_memory=True`` calls it."""
        return self._each(Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Corrupted":
        """``function`` of all tensors that are on the device."""
        names = (f.name for f in fields(self) if f.name not in ("masking", "host_counts"))
        tensors: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return replace(self, **tensors)

    def __getstate__(self) -> dict[str, Any]:
        # What lies behind the masked rows is undefined.
        state = vars(self) | {"row_buffer": self.masked_rows}
        return {name: _without_the_rest(value) for name, value in state.items()}

    def __copy__(self) -> "Corrupted":
        return replace(self)
