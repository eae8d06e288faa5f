"""What to mask, and what comes out: :class:`MaskingConfig` and :class:`Corrupted`.

Shapes: B batch, L sequence length, V vocabulary (``num_tokens``), R masked rows of a batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from nar_kernels.checks import as_int
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
            object.__setattr__(self, name, float(getattr(self, name)))
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be in [0, 1]")
        if self.no_replace_prob + self.random_token_prob > 1:
            raise ValueError(
                f"no_replace_prob + random_token_prob is "
                f"{self.no_replace_prob + self.random_token_prob}: shares of one whole, at most 1"
            )
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
            raise ValueError(
                f"the mask ratio goes from {first:g} at t = 0 to {last:g} at t = 1, but the bound "
                "on the likelihood is an integral from 1 to 0: use such a schedule, or the mean "
                "over masked tokens (masked_nll: reduction='mean', NonAutoregressiveWrapper: "
                "use_simple_mdlm_loss_weight=False)"
            )

    @property
    def exact(self) -> bool:
        return self.draw == "exact"

    @property
    def stratified(self) -> bool:
        return self.times == "stratified"


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


@dataclass(eq=False)  # not frozen: that takes 3 us of a batch
class Corrupted:
    """A corrupted batch: everything a masked-prediction step needs.

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
            undefined. (So that the operator's shapes do not depend on data.)
        invalid: int64 ``[5]``: how many ids were bad, the lowest offset of one, its value; how many
            windows reached outside the corpus; how many sample slots were negative. Bad ids are
            replaced by a valid one, so that no embedding lookup is out of bounds, bad windows by
            the first of the corpus.
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
        """int64 ``[B, L]``: the windows before corruption."""
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

    def microbatches(self, size: int) -> Iterator["Corrupted"]:
        """Consecutive parts of at most ``size`` samples, for gradient accumulation."""
        length = self.input_ids.shape[1]
        first_row = 0
        for start in range(0, len(self), size):
            part = {
                f.name: getattr(self, f.name)[start : start + size]
                for f in fields(self)
                if f.name not in ("row_buffer", "invalid", "masking", "host_counts")
            }
            counts = None if self.host_counts is None else self.host_counts[start : start + size]
            num_rows = int((part["num_masked"] if counts is None else counts).sum())
            rows = self.row_buffer[first_row : first_row + num_rows] - start * length
            first_row += num_rows
            yield Corrupted(
                **part,
                row_buffer=rows,
                invalid=self.invalid,
                masking=self.masking,
                host_counts=counts,
            )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Corrupted":
        """This batch on another device."""
        tensors = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in fields(self)
            if f.name not in ("masking", "host_counts")
        }
        return Corrupted(**tensors, masking=self.masking, host_counts=self.host_counts)
