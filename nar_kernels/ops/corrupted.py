"""Corrupted batches: :class:`Corrupted`.

Shapes: B batch, L sequence length, nb blocks of a sample, R masked rows of a batch; n documents
(:class:`Documents`).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from nar_kernels.checks import as_int, check_device
from nar_kernels.errors import InvalidTokenError
from nar_kernels.ops.documents import Documents
from nar_kernels.ops.host_counts import HostCounts
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.ops.views import ONE_VIEW, Views
from nar_kernels.spec.schedules import NUM_TIMES


def check_record(
    record: Tensor, batch_size: int, masking: MaskingConfig, where: Callable[[int], str]
) -> None:
    """Raises the error in a ``Corrupted.invalid`` record, if any; ``where`` describes an offset."""
    count, offset, token_id, bad_windows, bad_slots = record.tolist()
    if bad_windows:
        raise IndexError(
            f"{bad_windows} of {batch_size} windows reach outside the corpus: starts must be in "
            "[0, T - L], of documents with L the length of each"
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


def place_in_batch(seq_len: int, offset: int) -> str:
    """Row and column of an offset in a flat batch."""
    row, column = divmod(offset, seq_len)
    return f"tokens[{row}, {column}]"


# What may be left out of a batch.
Output = Literal["labels", "masked_indices", "masked_rows"]
OUTPUTS: tuple[Output, ...] = get_args(Output)
_FIELD_OF = {"labels": "labels", "masked_indices": "masked_indices", "masked_rows": "row_buffer"}


# Fields with one entry per position, and per sample.
_PER_POSITION = "input_ids", "labels", "masked_indices"
_PER_SAMPLE = "times", "loss_weight", "num_masked", "num_maskable", "class_ids"


def _unless_none(function: Callable[[Tensor], Tensor], x: Tensor | None) -> Any:
    return None if x is None else function(x)


def _sample_indices(index: Any, size: int) -> Tensor:
    """int64 ``[B']`` on the CPU: the samples that ``index`` selects from a batch of ``size``."""
    is_listed = isinstance(index, list | np.ndarray | Tensor)
    samples = torch.as_tensor(index if is_listed else 0, device="cpu")
    if samples.dtype == torch.bool and samples.shape == (size,):
        samples = samples.nonzero().flatten()
    if samples.numel() == 0:  # an empty list becomes float32
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
    return samples.remainder(max(size, 1))


def _as_wide(parts: list[Tensor]) -> list[Tensor]:
    """``[B, nb]`` with the same number of blocks, of which those that are added are empty."""
    if parts[0].dim() == 1:
        return parts
    most = max(part.shape[1] for part in parts)
    return [torch.nn.functional.pad(part, (0, most - part.shape[1])) for part in parts]


def _compact(value: Any) -> Any:
    """Clones a view, with which the whole storage would be pickled; else returns ``value``."""
    if not isinstance(value, Tensor) or value.untyped_storage().nbytes() == value.nbytes:
        return value
    return value.clone()


@dataclass(eq=False, repr=False)  # not frozen, which would cost 3 us per batch
class Corrupted:
    """A corrupted batch: everything a masked-prediction step needs.

    ``batch[2:4]`` and ``batch[[5, 0]]`` select samples, :meth:`cat` concatenates batches. (Of
    documents in rows ``[B, L]`` these are rows, of a flat batch ``[N]`` documents.) A
    ``DataLoader`` over batches takes ``batch_size=None`` or ``collate_fn=Corrupted.cat``, and any
    number of workers.

    Of several views B is their number times that of the samples. With blocks
    (``MaskingConfig(block_length=)``), what is ``[B]`` here is ``[B, nb]``: each is drawn as a
    sample of its own would be. (A document that is shorter than others has empty blocks at its end,
    with counts of 0.)

    Attributes:
        input_ids: int64 or int32 ``[B, L]``, the input of the net.
        labels: of the same dtype, ``[B, L]``, the clean id at masked positions, -100 elsewhere.
            This and the next may be missing: None where ``outputs`` of ``corrupt`` left them out.
        masked_indices: bool ``[B, L]``, the positions to predict. Their input is ``mask_id``, the
            token itself or a random one, depending on ``masking``.
        times: float32 ``[B]`` in (0, 1).
        loss_weight: float32 ``[B]``, w(t) of the likelihood bound: ``sum(w * NLL) / num_maskable``
            over the masked positions of a sample is in nats per token.
        num_masked: int64 ``[B]``, number of masked positions per sample.
        num_maskable: int64 ``[B]``, number of positions per sample that could have been masked.
        row_buffer: of the dtype of ``input_ids``, ``[B * L]``; the first R entries are
            ``masked_rows``, the rest is undefined: the operator's shapes do not depend on data.
            Parts of a batch have fewer entries, but those. None where ``masked_rows`` is left out.
        invalid: int64 ``[5]``: number of bad ids, lowest offset of one, its value; number of
            windows outside the corpus; number of negative sample slots. Bad ids are replaced by a
            valid one, so that embedding lookups stay in bounds, bad windows by the first of the
            corpus. Parts of a batch keep the record of the whole; :meth:`cat` sums the counts, and
            keeps the lowest offset, which is relative to its own batch.
        masking: the configuration of this batch.
        counts_on_host: counts ``num_masked`` on the host, which avoids a sync, or None where the
            device must be asked.
        num_strata: of the times, if each sample is known to have a stratum of its own; else 0.
            Bounds R by ``row_capacity``: set it to 0 if you change ``masked_indices``.
        documents: of a ragged or packed batch, where its documents lie; else None. A sample is a
            document then: shapes ``[B]`` are ``[n]``, and ``[B, L]`` is ``documents.shape``, which
            may be flat, ``[N]``.
        spans: int64 ``[4, n + 1]`` on the device, what ``documents`` has on the host; else None.
        views: which views the whole batch has; a part of it has a count of 1.
        class_ids: int64 ``[B]`` (also with blocks): the class of each sample, for nets that take
            one; the number of classes stands for none, where it was dropped. Or None.
        num_classes: that number, where classes may be dropped; None: not known.
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
    counts_on_host: HostCounts | None = None
    num_strata: int = 0
    documents: Documents | None = None
    spans: Tensor | None = None
    views: Views = ONE_VIEW
    class_ids: Tensor | None = None
    num_classes: int | None = None

    def __len__(self) -> int:
        is_flat = self.documents is not None and self.documents.row_length is None
        return len(self.times) if is_flat else self.input_ids.shape[0]

    def need(self, *outputs: Output) -> None:
        """Raises ValueError where one of these outputs is missing."""
        for name in outputs:
            if getattr(self, _FIELD_OF[name]) is None:
                raise ValueError(
                    f"the batch has no {name}, which this needs: make it with outputs=... that "
                    f"include {name!r}"
                )

    @property
    def host_counts(self) -> Tensor | None:
        """int64 ``[B]`` on the CPU: ``num_masked``, if the host can know it without a sync."""
        return None if self.counts_on_host is None else self.counts_on_host()

    @property
    def quantised_times(self) -> Tensor:
        """int64 ``[B]``: which of the 65536 times of the schedule's tables each sample has."""
        since_low = self.times - self.masking.time_low
        return since_low.mul_(NUM_TIMES / self.masking.time_span).long().clamp_(0, NUM_TIMES - 1)

    @property
    def p_mask(self) -> Tensor:
        """float32 ``[B, L]``: m(t), the probability with which a maskable position of the sample is
        masked, in a complement with 1 - m(t). Exact draws mask ``clamp(ceil(m(t) n), 1, n)`` of n.
        Of stride 0 along L where there are neither documents nor blocks."""
        shares = self.masking.shares_of_times(self.times.device)
        share = shares[self.quantised_times]
        if self.documents is None and not self.has_blocks:
            return share.unsqueeze(1).expand_as(self.input_ids)
        return share.flatten().index_select(0, self._draw_indices).view(self.input_ids.shape)

    @property
    def has_blocks(self) -> bool:
        """Whether shapes ``[B]`` are ``[B, nb]``."""
        return self.masking.block_length is not None

    def samples_of(self, rows: Tensor) -> Tensor:
        """``[R']``: the sample that each of these indices into the flat batch is in."""
        if self.documents is None:
            return rows // self.input_ids.shape[1]
        return torch.searchsorted(self.cu_seqlens[1:], rows.to(torch.int32), right=True)

    def draws_of(self, rows: Tensor) -> Tensor:
        """``[R']``: the sample, or with blocks the place in the flattened ``[B, nb]``, that each of
        these indices into the flat batch is drawn in."""
        samples = self.samples_of(rows)
        if self.masking.block_length is None:
            return samples
        if self.documents is None:
            place = rows % self.input_ids.shape[1]
        else:
            place = rows - self.cu_seqlens.index_select(0, samples)
        num_blocks = self.times.shape[1]
        block = (place // self.masking.block_length).clamp(max=num_blocks - 1)
        return samples * num_blocks + block

    def sum_by_draw(self, values: Tensor) -> Tensor:
        """int64 ``[B]``: sums of integers or bools ``[B, L]`` over the positions of each sample, or
        block."""
        if self.documents is None and not self.has_blocks:
            return values.sum(1)
        sums = torch.zeros_like(self.num_masked).flatten()
        added = values.flatten().to(torch.int64)
        return sums.index_add_(0, self._draw_indices, added).view_as(self.num_masked)

    def sum_over_samples(self, values: Tensor) -> Tensor:
        """``[B]``: for each block, the sum of ``[B, nb]`` over its sample; without blocks
        ``values``."""
        return values.sum(1, keepdim=True).expand_as(values) if self.has_blocks else values

    def sum_over_rows(self, values: Tensor) -> Tensor:
        """``[n]``: for each sample, the sum of integers ``[n]`` over the samples of its row. (Rows
        of a flat batch, and of one without documents, have one.)"""
        of_samples = self.sum_over_samples(values)
        if self.documents is None or self.documents.row_length is None:
            return of_samples
        row = self.cu_seqlens[:-1].to(torch.int64) // self.documents.row_length
        once = of_samples[:, 0] if self.has_blocks else of_samples
        sums = values.new_zeros(self.input_ids.shape[0]).index_add_(0, row, once)
        there = sums.index_select(0, row)
        return there[:, None].expand_as(values) if self.has_blocks else there

    @property
    def _positions(self) -> Tensor:
        """int64 ``[B * L]``: all indices into the flat batch."""
        return torch.arange(self.input_ids.numel(), device=self.input_ids.device)

    @property
    def _draw_indices(self) -> Tensor:
        """int64 ``[B * L]``: where each position is drawn, padding where what is before it is."""
        return self.draws_of(self._positions)

    @property
    def sample_indices(self) -> Tensor:
        """int64 ``[B, L]``: the sample that each position is in, padding in that before it."""
        return self.samples_of(self._positions).view(self.input_ids.shape)

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 ``[n + 1]``: where each document begins in the flat batch, last its length, as
        attention of variable length has it (:func:`nar_kernels.varlen_arguments`, which keeps the
        padding of rows apart); without documents, multiples of L."""
        if self.spans is not None:
            return self.spans[0].to(torch.int32)
        batch, length = self.input_ids.shape
        return torch.arange(batch + 1, dtype=torch.int32, device=self.input_ids.device) * length

    @property
    def max_seqlen(self) -> int:
        """The largest difference of ``cu_seqlens``."""
        return self.input_ids.shape[1] if self.documents is None else self.documents.extent.longest

    @property
    def lengths(self) -> Tensor:
        """int64 ``[n]``: how many positions each document has; the others of its space are
        padding."""
        if self.spans is not None:
            return self.spans[2, :-1].clone()
        batch, length = self.input_ids.shape
        return torch.full((batch,), length, dtype=torch.int64, device=self.input_ids.device)

    @property
    def position_ids(self) -> Tensor:
        """int64 ``[B, L]``: places in the document, from 0 on; they go on through padding."""
        places = self._positions.view(self.input_ids.shape)
        return places - self._of_positions(self.cu_seqlens[:-1].to(torch.int64))

    @property
    def attention_mask(self) -> Tensor:
        """bool ``[B, L]``: where there is a document, not padding."""
        return self.position_ids < self._of_positions(self.lengths)

    @property
    def document_ids(self) -> Tensor:
        """int64 ``[B, L]``: the sample slot of the document at each position; -1 at padding.

        Raises:
            ValueError: the batch is not one of documents.
        """
        if self.spans is None:
            raise ValueError("the batch has no documents: make it with lengths=... of `corrupt`")
        return self._of_positions(self.spans[3, :-1]).masked_fill(~self.attention_mask, -1)

    def _of_positions(self, of_samples: Tensor) -> Tensor:
        """``[B, L]``: what each position's sample has."""
        there = of_samples.index_select(0, self.sample_indices.flatten())
        return there.view(self.input_ids.shape)

    @property
    def masked_rows(self) -> Tensor:
        """``[R]``: the masked positions as ascending indices into the flat ``[B * L]``, of the
        dtype of ``input_ids``.

        Synchronises with the device, unless R is known on the host: with the C++ extension, for
        batches with nothing excluded whose seed, slots and step are numbers.
        """
        self.need("masked_rows")
        counts = self.num_masked if self.host_counts is None else self.host_counts
        return self.row_buffer[: int(counts.sum())]

    @property
    def row_capacity(self) -> int:
        """C, the most rows that a batch like this can have, whatever its step, seed and ids:
        :meth:`MaskingConfig.row_capacity`."""
        size, count = self.input_ids.numel(), self.views.num
        if self.views.is_paired:  # whole ones of each pair mask L positions
            return size * min(count - 1, 2) // count if count > 1 else size
        if self.documents is not None:
            return size
        rows, length = self.input_ids.shape
        of_view = self.masking.row_capacity(rows // count, length, num_strata=self.num_strata)
        return count * of_view

    def padded_rows(self) -> tuple[Tensor, Tensor]:
        """``masked_rows`` and padding, ``[C]``, and which are padding, bool ``[C]``, with C
        the ``row_capacity``: shapes that do not depend on data, so this never synchronises.

        Padding repeats the masked rows in turn (in a batch without any, it is 0): a gather of them
        reads, and its gradient writes, what is needed anyway, and none of them often.

        Raises:
            ValueError: more rows are masked than that, so the batch has been changed. A GPU, whose
                counts are not read, leaves the last ones out.
        """
        self.need("masked_rows")
        num_masked, capacity = self.num_masked.sum(), self.row_capacity
        if num_masked.is_cpu and not torch.compiler.is_compiling() and int(num_masked) > capacity:
            raise ValueError(
                f"the batch has {int(num_masked)} masked rows, but what its masking draws has at "
                f"most {capacity}: if you changed its masks, set num_strata to 0 and masking to "
                "what describes them"
            )
        place = torch.arange(capacity, device=num_masked.device)
        rows = self._buffered(place % num_masked.clamp(min=1))
        return rows.masked_fill(num_masked == 0, 0), place >= num_masked

    @property
    def clean_ids(self) -> Tensor:
        """``[B, L]``: the windows before corruption, or -100 where a label was set to it."""
        self.need("labels", "masked_indices")
        return torch.where(self.masked_indices, self.labels, self.input_ids)

    def raise_if_invalid(self, source: str | None = None) -> None:
        """Raises :class:`InvalidTokenError` for a bad id, IndexError for a window outside the
        corpus, ValueError for a negative sample slot.

        ``source`` names the corpus; without it, errors give a row and a column of the batch, or of
        documents an offset in the tokens.
        Synchronises with the device.
        """

        if not any(self.invalid.tolist()):
            return

        def where(offset: int) -> str:
            if source is not None:
                return f"offset {offset} of {source}"
            if self.documents is not None:
                return f"offset {offset} of the tokens"
            return place_in_batch(self.input_ids.shape[1], offset)

        check_record(self.invalid, len(self.times), self.masking, where)

    def __repr__(self) -> str:
        device = self.input_ids.device
        counts = self.num_masked if device.type == "cpu" else self.host_counts
        num_masked = "on the device" if counts is None else int(counts.sum())
        return (
            f"Corrupted(shape={list(self.input_ids.shape)}, device={str(device)!r}, "
            f"num_masked={num_masked})"
        )

    def __getitem__(self, index: slice | list[int] | np.ndarray | Tensor) -> "Corrupted":
        """The samples of a slice, of a list, array or tensor of indices, or of a bool tensor
        ``[B]``.

        Synchronises with the device, except for slices of step 1 of a batch of windows.

        Raises:
            IndexError: an index is outside [-B, B).
            TypeError: any other index, such as a single integer.
        """
        if self.documents is not None:
            return self._rows_of_documents(index)
        size, length = self.input_ids.shape
        if isinstance(index, slice):
            samples = range(size)[index]
            if samples.step == 1:
                start, stop = samples.start, samples.start + len(samples)
                part = self._select(slice(start, stop))
                if part.row_buffer is None:
                    return part
                if not self._host_can_count():
                    part.row_buffer = self._rows_from(start, part.row_capacity)
                    return part
                counts = self.num_masked if self.host_counts is None else self.host_counts
                first, last = int(counts[:start].sum()), int(counts[:stop].sum())
                part.row_buffer = self.row_buffer[first:last] - start * length
                return part
            index = list(samples)
        part = self._select(_sample_indices(index, size))
        part.num_strata = 0  # samples may repeat
        if part.row_buffer is not None:
            part.need("masked_indices")
            rows = part.masked_indices.flatten().nonzero().flatten()
            part.row_buffer = rows.to(part.row_buffer.dtype)
        return part

    def _rows_of_documents(self, index: slice | list[int] | np.ndarray | Tensor) -> "Corrupted":
        assert self.documents is not None
        size, device = len(self), self.input_ids.device
        rows = _sample_indices(
            list(range(size)[index]) if isinstance(index, slice) else index, size
        ).tolist()
        documents, chosen, positions = self.documents.of_rows(rows)
        positions, chosen_there = positions.to(device), chosen.to(device)
        tensors: dict[str, Any] = {}
        for name in _PER_POSITION:
            of_all = getattr(self, name)
            if of_all is not None:
                of_all = of_all.flatten().index_select(0, positions).view(documents.shape)
            tensors[name] = of_all
        for name in _PER_SAMPLE:
            of_all = getattr(self, name)
            tensors[name] = _unless_none(lambda x: x.index_select(0, chosen_there), of_all)
        if self.row_buffer is not None:
            is_masked = torch.zeros(self.input_ids.numel(), dtype=torch.bool, device=device)
            is_masked[self.masked_rows.to(torch.int64)] = True
            masked = is_masked.index_select(0, positions).nonzero().flatten()
            tensors["row_buffer"] = masked.to(self.row_buffer.dtype)
        counts = None if self.counts_on_host is None else self.counts_on_host[chosen]
        spans = documents.spans(device)
        views = self.views._replace(num=1)
        return replace(
            self, **tensors, counts_on_host=counts, documents=documents, spans=spans, views=views
        )

    def _host_can_count(self) -> bool:
        """Whether the host knows how many rows each sample has, without a sync or a graph break."""
        on_host = self.num_masked.is_cpu and not torch.compiler.is_compiling()
        return self.counts_on_host is not None or on_host

    def _rows_from(self, start: int, capacity: int) -> Tensor:
        """``[capacity]``: the ``row_buffer`` of the samples from ``start`` on, at most ``capacity``
        rows; without a sync."""
        device, length = self.row_buffer.device, self.input_ids.shape[1]
        place = self.num_masked[:start].sum() + torch.arange(capacity, device=device)
        return self._buffered(place) - start * length

    def _buffered(self, place: Tensor) -> Tensor:
        """Of ``row_buffer``, the last one behind its end: it may be short, or empty."""
        last = len(self.row_buffer) - 1
        if last < 0:
            return self.row_buffer.new_zeros(len(place))
        return self.row_buffer.index_select(0, place.clamp(max=last))

    def _select(self, index: slice | Tensor) -> "Corrupted":
        """Selects samples; ``row_buffer`` is still that of the whole batch."""
        counts = None if self.counts_on_host is None else self.counts_on_host[index]
        names = *_PER_POSITION, *_PER_SAMPLE
        tensors = {name: _unless_none(lambda x: x[index], getattr(self, name)) for name in names}
        strata = self.num_strata if self.views.num == 1 else 0  # each view has all of them
        views = self.views._replace(num=1)
        return replace(self, **tensors, counts_on_host=counts, num_strata=strata, views=views)

    @classmethod
    def cat(cls, batches: Iterable["Corrupted"]) -> "Corrupted":
        """Concatenates batches along the samples.

        Synchronises with the device if ``masked_rows`` of one of them does.

        Raises:
            ValueError: no batches, or they differ in L, device, dtype, outputs or masking, or some
                have classes and some none.
        """
        batches = list(batches)
        other = next((b for b in batches if not batches[0]._is_compatible(b)), None)
        if other is not None or not batches:
            kinds = [(b, b.masking) for b in (*batches[:1], other) if b is not None]
            what = " and ".join(map(str, kinds)) or "no batches"
            raise ValueError(
                f"cat got {what}: it takes at least one, all of the same seq_len, device, dtype, "
                "outputs and masking, with classes or without"
            )
        tensors: dict[str, Any] = {
            name: None if getattr(batches[0], name) is None else torch.cat(parts)
            for name in _PER_POSITION
            if (parts := [getattr(b, name) for b in batches])
        }
        for name in _PER_SAMPLE:
            parts = [getattr(b, name) for b in batches]
            tensors[name] = None if parts[0] is None else torch.cat(_as_wide(parts))
        rows, num_rows = [], 0
        for batch in batches if batches[0].row_buffer is not None else ():
            rows.append(batch.masked_rows + num_rows)
            num_rows += batch.input_ids.numel()
        records = torch.stack([batch.invalid for batch in batches])
        offsets = records[:, 1].where(records[:, 0] > 0, torch.iinfo(torch.int64).max)
        invalid = records.sum(0)
        invalid[1:3] = records[offsets.argmin(), 1:3]
        counts = [b.counts_on_host for b in batches if b.counts_on_host is not None]
        whole = HostCounts(lambda: torch.cat([count() for count in counts]))
        parts_of = [batch.documents for batch in batches if batch.documents is not None]
        documents = Documents.cat(parts_of) if parts_of else None
        device = batches[0].input_ids.device
        return replace(
            batches[0],
            **tensors,
            documents=documents,
            spans=None if documents is None else documents.spans(device),
            row_buffer=torch.cat(rows) if rows else None,  # type: ignore[arg-type]
            invalid=invalid,
            num_strata=0,  # two samples may have the same
            views=batches[0].views._replace(num=1),
            counts_on_host=whole if len(counts) == len(batches) else None,
        )

    def _is_compatible(self, other: "Corrupted") -> bool:
        kinds = [
            (b.views.pairing, b._row_shape(), b.input_ids.device, b.input_ids.dtype, b._missing())
            for b in (self, other)
        ]
        return kinds[0] == kinds[1] and self.masking.masks_like(other.masking)

    def _row_shape(self) -> tuple[bool, torch.Size]:
        return self.documents is None, self.input_ids.shape[1:]

    def _missing(self) -> list[str]:
        names = *_FIELD_OF.values(), "class_ids"
        return [name for name in names if getattr(self, name) is None]

    def microbatches(self, size: int) -> Iterator["Corrupted"]:
        """Consecutive microbatches of at most ``size`` samples, for gradient accumulation.

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
            ValueError: a CUDA device that is not available.
        """
        if torch.device(device).type == "cuda":
            device = check_device(device)
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Corrupted":
        """This batch in pinned host memory, for asynchronous copies to a GPU. Called by a
        ``DataLoader`` with ``pin_memory=True``."""
        return self._map_tensors(Tensor.pin_memory)

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Corrupted":
        """Applies ``function`` to all tensors on the device."""
        others = "masking", "counts_on_host", "num_strata", "documents", "views", "num_classes"
        names = (f.name for f in fields(self) if f.name not in others)
        tensors = {name: _unless_none(function, getattr(self, name)) for name in names}
        return replace(self, **tensors)

    def __getstate__(self) -> dict[str, Any]:
        # Entries after the masked rows are undefined.
        rows = None if self.row_buffer is None else self.masked_rows
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        state["row_buffer"] = rows
        return {name: _compact(value) for name, value in state.items()}

    def __copy__(self) -> "Corrupted":
        return replace(self)
