"""``corrupt``: windows, validation, masks, labels and loss weights in one kernel.

Shapes: B batch, L sequence length (``seq_len``), V vocabulary (``num_tokens``), T corpus tokens, n
documents, N their positions.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nar_kernels.checks import as_int
from nar_kernels.ops.arguments import CorruptArgs, WindowOrder
from nar_kernels.ops.backends import resolve_backend
from nar_kernels.ops.corrupt_launch import PlannedCorrupt, memory_of, run_corrupt
from nar_kernels.ops.corrupted import OUTPUTS, Corrupted, Output
from nar_kernels.ops.dispatch import needs_dispatcher, outside_graphs
from nar_kernels.ops.documents import Documents, check_documents
from nar_kernels.ops.host_counts import count_on_host, num_strata
from nar_kernels.ops.maskable import EVERY_POSITION, Maskable, check_labels, check_maskable
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.ops.samples import (
    Spans,
    check_beside,
    check_max_length,
    check_seq_len,
    check_stored,
    divide,
    samples_of_documents,
    samples_of_windows,
    spans_of,
)
from nar_kernels.ops.tokens import check_token_dtype
from nar_kernels.ops.views import ONE_VIEW, Views, ViewsLike, check_views, view_tables
from nar_kernels.spec.philox import signed_seed


def _check_scalar(name: str, scalar: Tensor, device: torch.device) -> Tensor:
    if scalar.dtype != torch.int64 or scalar.numel() != 1:
        raise ValueError(
            f"{name} as a tensor must be int64 with one element; got {scalar.dtype} "
            f"{list(scalar.shape)}"
        )
    if scalar.device != device:
        raise ValueError(f"{name} is on {scalar.device}, but the kernel runs on {device}")
    return scalar


# Places of labels, masked_indices and the row buffer among the outputs, and in Wanted.
_OPTIONAL = {1: 1, 2: 2, 7: 3}

_COLLECTIONS = tuple, list, set, frozenset


class Wanted(NamedTuple):
    """What a batch is made of: the last fields of :class:`CorruptArgs`."""

    narrow: bool = False
    labels: bool = True
    masked_indices: bool = True
    masked_rows: bool = True

    @classmethod
    def of(cls, outputs: Collection[Output], ids_dtype: torch.dtype) -> "Wanted":
        """
        Raises:
            ValueError: an unknown output, or another dtype than int64 and int32.
            TypeError: ``outputs`` is no collection of names.
        """
        if outputs is OUTPUTS and ids_dtype is torch.int64:  # saves 2 us
            return EVERYTHING
        is_known = isinstance(outputs, _COLLECTIONS)
        if not is_known or not all(name in OUTPUTS for name in outputs):
            names = ", ".join(map(repr, OUTPUTS))
            error = ValueError if is_known else TypeError
            raise error(f"outputs is {outputs!r}: it must be a tuple of any of {names}")
        if ids_dtype not in (torch.int64, torch.int32):
            raise ValueError(f"ids_dtype is {ids_dtype}: it must be torch.int64 or torch.int32")
        return cls(ids_dtype == torch.int32, *(name in outputs for name in OUTPUTS))


EVERYTHING = Wanted()


def corrupt(
    tokens: Tensor,
    masking: MaskingConfig,
    *,
    seed: int | Tensor,
    starts: Tensor | None = None,
    seq_len: int | None = None,
    sample_ids: Tensor | range | None = None,
    global_batch: int | None = None,
    maskable: Tensor | None = None,
    labels: Tensor | None = None,
    loss_mask: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    lengths: Tensor | None = None,
    eos_lengths: Tensor | None = None,
    eos_id: int | None = None,
    places: Tensor | None = None,
    num_rows: int | None = None,
    pad_id: int | None = None,
    max_length: int | None = None,
    views: ViewsLike = 1,
    outputs: Collection[Output] = OUTPUTS,
    ids_dtype: torch.dtype = torch.int64,
    out: Corrupted | None = None,
    source: str = "tokens",
    backend: str = "auto",
) -> Corrupted:
    """Extracts windows, validates ids, draws a mask at each sample's ratio and makes the labels, in
    one kernel.

    A pure function of its arguments: the same sample slot and seed give the same mask whatever the
    batch, the device, the backend or the number of threads.

    Args:
        tokens: clean ids, ``[B, L]``; or a flat corpus ``[T]`` with ``starts`` and ``seq_len``.
            Any of uint8, int8, uint16, int16, uint32, int32, int64. A flat corpus may also lie in
            pinned memory of the host, with ``starts`` on a CUDA device, whose kernels then read it
            over the bus.
        masking: how to mask.
        seed: 64-bit integer key of all randomness; or an int64 tensor of one element on the device
            of the kernel, which reads it there: a captured CUDA graph then replays with whatever it
            holds.
        starts: int64 ``[B]``, first token of each window of a flat corpus, in [0, T - L].
        seq_len: L, for a flat corpus.
        sample_ids: int64 ``[B]``, global sample slots, at least 0: ``step * global_batch + j``; of
            documents on the CPU.
            Default: ``0 .. B - 1``. The slot picks the noise, so do not reuse slots under one seed.
            A range of them, with a positive step, lets the host count what a GPU masks.
        global_batch: how many consecutive slots share one stratification of times. Default: B.
        maskable: bool ``[B, L]``, positions that may be masked. Default: all.
        labels: int64 or int32 ``[B, L]``, in place of ``maskable``: those that are -100, as
            Hugging Face has it, are given and may not be masked. The others are the ids themselves,
            not those of the next position: on the CPU the first 4,096 positions are compared.
        loss_mask: ``[B, L]`` of 0 and 1, in place of ``maskable``: bool or integers. Or, with
            ``starts``, bool or uint8 ``[T]``, beside the corpus and where it is, and beside any of
            the others; of documents always this.
        prompt_lengths: int64 or int32 ``[B]`` in [0, L], beside any of these or alone: positions
            before it may not be masked. (A GPU takes a length outside of that as 0 or L.)
        lengths: int64 ``[n]`` on the CPU, with ``starts`` ``[n]``: a ragged batch of documents, of
            so many ids each; B is n. The batch is flat, ``[N]``, one document after the other; or,
            with ``seq_len``, ``[n, L]``, each padded to L, or as ``places`` say. Time, count and
            noise of a document follow from its ``sample_ids`` entry and its own positions: they are
            the same in any batch. Pass its number in the corpus, plus the number of documents for
            each epoch, which is also the ``global_batch`` of stratified times. ``maskable`` and
            ``labels`` have the shape of the batch.
        eos_lengths: int64 ``[n]`` on the CPU: so many ``eos_id`` follow each document. They belong
            to it, and may be masked (but by ``maskable`` and ``labels``).
        eos_id: id of the end of a sequence, for ``eos_lengths``.
        places: int64 ``[n]`` on the CPU, with ``lengths``, ``seq_len`` and ``num_rows``: where
            each document begins in the flat batch ``[num_rows * L]``, ascending. Each row must
            begin with one, of length 0 if it is empty; none reaches over the end of its row.
        num_rows: of the batch ``[num_rows, L]`` that ``places`` describe.
        pad_id: id of positions behind a document. Default: ``eos_id``, or else 0 (1 if the mask
            is 0). A batch of documents has less than 2**31 positions, and is checked on the host,
            which ``torch.compile`` leaves outside of its graphs.
        max_length: of documents, where ``masking`` has a ``block_length``: the most positions that
            any of them has, here or in another batch, since the slots of their blocks are counted
            by it. Default: ``seq_len``; a flat batch needs it.
        views: how many masks of each sample: the batch is ``[n * B, L]``, all samples in the first
            view, then all in the next (of a flat batch, ``[n * N]``).

            * n: independent ones, or those of a range of numbers. View v of a sample follows from
              the seed, its ``sample_ids`` entry and v alone; view 0 is what ``views=1`` gives.
            * ``"complement"``: the mask, then all other maskable positions, so that each is
              predicted once (Fast-dLLM v2, arXiv:2509.26328). Weights are those of ratios m and
              1 - m: the pair gives the bound on the likelihood, too.
            * ``"coupled"``: every maskable position, then a pair, with the weights 1, 1 / m,
              1 / (1 - m) (DiffuCoder, arXiv:2506.20639).
        outputs: what to write beside ``input_ids`` and one number a sample, which is most of the
            time of a batch: any of ``"labels"``, ``"masked_indices"`` and ``"masked_rows"``. What
            is left out is None. :func:`masked_nll` needs the first and the last.
        ids_dtype: of ``input_ids``, ``labels`` and ``masked_rows``. int32 halves what is written;
            embeddings and indices may be int32, targets of ``F.cross_entropy`` may not.
        out: a batch of the same shape, dtype and outputs, whose memory the result takes over: it
            and its parts then show the new values. ``backward`` of what was computed from it must
            be done: it raises afterwards, as after any change in place. Not of documents.
        source: what errors call the flat corpus, such as its path.
        backend: ``"auto"``, or one of :func:`nar_kernels.backends`.

    Returns:
        A :class:`Corrupted`.

    Raises:
        InvalidTokenError: an id outside [0, V), or equal to ``mask_id``.
        IndexError: a window or a document reaches outside the corpus.
        TypeError, ValueError: wrong dtypes, shapes or devices, a negative sample slot, labels that
            are other ids.

    Values are checked on the device. On the CPU errors are raised at once; on other devices, where
    that would be a sync, by ``raise_if_invalid()`` of the result.
    """
    check_token_dtype(tokens.dtype)
    seq_len = None if seq_len is None else check_seq_len(seq_len)
    if lengths is None:
        given = (eos_lengths, eos_id, places, num_rows, pad_id, max_length)
        if any(option is not None for option in given):
            raise ValueError(
                "eos_lengths, eos_id, places, num_rows, pad_id and max_length are for documents: "
                "give their lengths, and starts"
            )
        samples = samples_of_windows(tokens, starts, seq_len, sample_ids)
    else:
        documents = outside_graphs(check_documents)(
            lengths,
            eos_lengths=eos_lengths,
            places=places,
            num_rows=num_rows,
            seq_len=seq_len,
            sample_ids=sample_ids,
        )
        samples = samples_of_documents(documents, tokens, starts)
    starts, device = samples.starts, samples.device
    global_batch = samples.batch if global_batch is None else as_int("global_batch", global_batch)
    if global_batch == samples.batch == 0:
        global_batch = 1
    if not 1 <= global_batch < 1 << 32:
        raise ValueError(f"global_batch is {global_batch}: it must be in [1, 2**32)")
    beside_corpus = None
    is_flat = isinstance(loss_mask, Tensor) and loss_mask.dim() == 1
    if loss_mask is not None and starts is not None and (is_flat or samples.documents):
        beside_corpus, loss_mask = check_beside(loss_mask, tokens, starts.device), None
    supervised = check_maskable(
        samples.shape,
        device,
        documents=samples.documents,
        maskable=maskable,
        labels=labels,
        loss_mask=loss_mask,
        prompt_lengths=prompt_lengths,
    )
    wanted = Wanted.of(outputs, ids_dtype)
    kind = check_views(views, masking)
    spans, slot_ids = None, samples.sample_ids
    if samples.documents is not None:
        if out is not None:
            raise ValueError("out is given with lengths: the memory of documents is not reused")
        spans = spans_of(samples.documents, masking, eos_id, pad_id, device)
        slot_ids = spans.ids
        max_length = check_max_length(samples.documents, masking, max_length)
    arguments = _arguments(
        masking,
        seed,
        device,
        wanted,
        kind,
        tokens=tokens.contiguous(),
        starts=starts,
        batch=samples.batch,
        seq_len=samples.seq_len,
        shape=samples.shape,
        max_length=max_length,
        sample_ids=slot_ids,
        first_sample=samples.slots.start if samples.slots else 0,
        maskable=supervised,
        loss_mask=beside_corpus,
        spans=spans,
        global_batch=global_batch,
    )
    backend = _resolve(backend, tokens, device)
    memory = None if out is None else memory_of(out, arguments, device)
    tensors = run_corrupt(arguments, backend, memory)
    corrupted = _batch(tensors, arguments, masking, wanted, kind, samples.slots, samples.documents)
    if device.type == "cpu" and not torch.compiler.is_compiling():
        corrupted.raise_if_invalid(None if starts is None else source)
        if labels is not None and wanted.labels and wanted.masked_indices:
            check_labels(labels, corrupted)
    return corrupted


def corrupt_documents(
    documents: Documents,
    tokens: Tensor,
    starts: Tensor,
    masking: MaskingConfig,
    *,
    seed: int,
    global_batch: int,
    runs: Tensor | None = None,
    loss_mask: Tensor | None = None,
    loss_mask_runs: Tensor | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    max_length: int | None = None,
    views: Views = ONE_VIEW,
    wanted: Wanted = EVERYTHING,
    backend: str = "auto",
) -> Corrupted:
    """``corrupt`` of documents whose arguments have been checked, also of a corpus in runs.

    Args:
        starts: int64 ``[n]`` on the device of the kernel.
        runs, loss_mask_runs: as in :class:`CorruptArgs`, on the CPU.

    The other arguments are those of :func:`corrupt`. Raises nothing for invalid data: the result
    records it.
    """
    device = starts.device
    check_stored(documents, len(tokens) if runs is None else int(runs[0, -1]))
    spans = spans_of(documents, masking, eos_id, pad_id, device)
    arguments = _arguments(
        masking,
        seed,
        device,
        wanted,
        views,
        tokens=tokens,
        runs=runs,
        starts=starts,
        batch=len(documents),
        seq_len=documents.extent.longest,
        shape=documents.shape,
        max_length=check_max_length(documents, masking, max_length),
        sample_ids=spans.ids,
        loss_mask=loss_mask,
        loss_mask_runs=loss_mask_runs,
        spans=spans,
        global_batch=global_batch,
    )
    tensors = run_corrupt(arguments, _resolve(backend, tokens, device))
    return _batch(tensors, arguments, masking, wanted, views, None, documents)


class CorruptStep:
    """``corrupt`` for one rank's part of any step: what does not depend on the step is checked and
    resolved once, and the kernel finds slots and windows itself.

    Args:
        tokens: contiguous, on ``device`` or in pinned memory: the corpus ``[T]``.
        loss_mask: uint8 ``[T]`` likewise, or None.
        order: which windows the slots hold; None: each call says.
        batch_size, rank, global_batch: slots are ``step * global_batch + rank * batch_size + j``
            for j in [0, ``batch_size``).
        runs, loss_mask_runs: as in :class:`CorruptArgs`, on the CPU.
        device: of the batches, and of the kernel.

    The other arguments are those of :func:`corrupt`.
    """

    def __init__(
        self,
        tokens: Tensor,
        masking: MaskingConfig,
        order: WindowOrder | None,
        *,
        batch_size: int,
        rank: int,
        global_batch: int,
        seq_len: int,
        seed: int | Tensor,
        device: torch.device,
        runs: Tensor | None = None,
        loss_mask: Tensor | None = None,
        loss_mask_runs: Tensor | None = None,
        views: Views = ONE_VIEW,
        wanted: Wanted = EVERYTHING,
        backend: str = "auto",
    ) -> None:
        self._masking, self._wanted, self._device = masking, wanted, device
        self._views = views
        self._backend = _resolve(backend, tokens, device)
        self._arguments = _arguments(
            masking,
            seed,
            device,
            wanted,
            views,
            tokens=tokens,
            runs=runs,
            loss_mask=loss_mask,
            loss_mask_runs=loss_mask_runs,
            batch=batch_size,
            seq_len=seq_len,
            first_sample=rank * batch_size,
            global_batch=global_batch,
            **({} if order is None else order._asdict()),
        )
        self._run_here = None
        if self._backend == "cpp":
            self._run_here = PlannedCorrupt(self._arguments)

    def __call__(
        self,
        step: int | Tensor,
        *,
        starts: Tensor | None = None,
        windows: Tensor | None = None,
        maskable: Tensor | None = None,
    ) -> Corrupted:
        """
        Args:
            step: at least 0; or an int64 tensor of one element on ``device``, which the kernel
                reads.
            starts: int64 ``[B]``, where the windows begin, if there is no order.
            windows: ``[B, L]`` on ``device``, instead of the corpus.
            maskable: uint8 ``[B, L]`` there, of them.

        Raises nothing for invalid data: the result records it.
        """
        a, masking = self._arguments, self._masking
        first_sample = a.first_sample
        is_planned = self._run_here is not None and windows is None
        if isinstance(step, Tensor):
            is_planned = False
            a = a._replace(step=_check_scalar("step", step, self._device))
        else:
            first_sample += step * a.global_batch
        slots = range(first_sample, first_sample + a.batch)
        if is_planned and not needs_dispatcher(a.tokens):
            assert self._run_here is not None
            tensors = self._run_here(first_sample, starts)
        else:
            a = a._replace(first_sample=first_sample, starts=starts)
            if windows is not None:
                a = a._replace(tokens=windows, runs=None, num_windows=0)
            if maskable is not None:
                a = a._replace(maskable=maskable, maskable_bytes=1)
            tensors = run_corrupt(a, self._backend)
        return _batch(tensors, a, masking, self._wanted, self._views, slots)


def _resolve(backend: str, tokens: Tensor, device: torch.device) -> str:
    backend = resolve_backend(backend, device)
    if backend == "reference" and tokens.device != device:
        raise ValueError(f"backend 'reference' reads only tokens on {device}, not pinned ones")
    return backend


def _arguments(
    masking: MaskingConfig,
    seed: int | Tensor,
    device: torch.device,
    wanted: Wanted,
    views: Views,
    *,
    tokens: Tensor,
    batch: int,
    seq_len: int,
    global_batch: int,
    shape: Sequence[int] | None = None,
    max_length: int | None = None,
    runs: Tensor | None = None,
    starts: Tensor | None = None,
    sample_ids: Tensor | None = None,
    first_sample: int = 0,
    step: Tensor | None = None,
    num_windows: int = 0,
    phase: int = 0,
    stride: int = 0,
    shuffle: bool = False,
    maskable: Maskable = EVERY_POSITION,
    loss_mask: Tensor | None = None,
    loss_mask_runs: Tensor | None = None,
    spans: Spans | None = None,
) -> CorruptArgs:
    seed_tensor = None
    if isinstance(seed, Tensor):
        seed_tensor = _check_scalar("seed", seed, device)
        seed = 0
    if spans is None:
        filler = int(masking.mask_id == 0)
        spans = Spans(None, filler, filler)
    division = divide(masking, views, shape or (batch, seq_len), batch, seq_len, max_length)
    if division.blocks_per_slot > 1 and global_batch * division.blocks_per_slot >= 1 << 32:
        raise ValueError(
            f"global_batch is {global_batch} with {division.blocks_per_slot} blocks a sample: "
            "together there must be less than 2**32"
        )
    if (num_draws := math.prod(division.of_samples)) >= 1 << 31:
        raise ValueError(
            f"a batch of {batch} samples has {num_draws} blocks in {views.num} views: it must have "
            "less than 2**31"
        )
    if wanted.narrow and (num_positions := math.prod(division.shape)) >= 1 << 31:
        raise ValueError(
            f"ids_dtype is torch.int32, but a batch of {num_positions} positions has indices "
            "that do not fit: use torch.int64"
        )
    tables = view_tables(masking, views, device)
    return CorruptArgs(
        tokens,
        runs,
        starts,
        batch,
        seq_len,
        *division,
        *spans,
        masking.num_tokens,
        masking.mask_id,
        sample_ids,
        first_sample,
        step,
        num_windows,
        phase,
        stride,
        shuffle,
        maskable.positions,
        maskable.positions_bytes,
        loss_mask,
        loss_mask_runs,
        maskable.prompt_lengths,
        tables.ratio,
        tables.weight,
        tables.by_view,
        tables.times,
        masking.tables(device)[2],
        signed_seed(seed),
        seed_tensor,
        global_batch,
        masking.exact,
        masking.weighs_counts,
        masking.stratified,
        masking.time_low,
        masking.time_span,
        *masking.shares,
        *wanted,
    )


def _batch(
    tensors: tuple[Tensor, ...],
    a: CorruptArgs,
    masking: MaskingConfig,
    wanted: Wanted,
    views: Views,
    slots: range | None,
    documents: Documents | None = None,
) -> Corrupted:
    outputs: Sequence[Tensor | None] = tensors
    if wanted is not EVERYTHING:
        outputs = [*outputs]
        for i, is_wanted in _OPTIONAL.items():
            if not wanted[is_wanted]:
                outputs[i] = None
    counts = None
    if wanted.masked_rows and outputs[0].device.type == "cuda":  # type: ignore[union-attr]
        counts = count_on_host(a, masking, slots, documents)
    strata = num_strata(masking, slots, a.global_batch)
    spans = a.spans
    if documents is not None and views.num > 1:
        documents = Documents.cat([documents] * views.num)
        spans = documents.spans(a.ratio_table.device)
    return Corrupted(*outputs, masking, counts, strata, documents, spans, views)  # type: ignore[call-arg, arg-type]
