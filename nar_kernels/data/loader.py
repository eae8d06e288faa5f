"""Batches of corrupted windows: :class:`MaskedLoader`.

Shapes: B batch, L sequence length (``seq_len``), N windows of the dataset.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nar_kernels import distributed
from nar_kernels.checks import as_int, check_device, check_seed
from nar_kernels.data.classes import Classes, state_of
from nar_kernels.data.loader_state import VERSION, check_continues, masking_state
from nar_kernels.data.placement import PlacedCorpus
from nar_kernels.data.random_lengths import check_probability, random_lengths
from nar_kernels.data.residency import Residency
from nar_kernels.data.staging import CorpusMemory, DeferredCheck, Stager
from nar_kernels.data.windows.dataset import TokenDataset
from nar_kernels.data.windows.documents import document_ids
from nar_kernels.data.windows.mixture import Mixture
from nar_kernels.data.windows.order import order_of
from nar_kernels.ops.backends import resolve_backend
from nar_kernels.ops.corrupt import CorruptStep, Wanted, corrupt_documents
from nar_kernels.ops.corrupted import OUTPUTS, Corrupted, Output, check_record
from nar_kernels.ops.documents import check_documents
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.ops.views import ViewsLike, check_views

_MOST_SLOTS = (1 << 63) - 1

_NOT_COPIED = "_place", "_step", "_stager", "_mask_stager", "_deferred_check", "_residency"


def resolve_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """``rank`` and ``world_size`` as given, or those of the process group."""
    if (rank is None) != (world_size is None):
        raise ValueError(
            f"rank is {rank} and world_size is {world_size}: give both, or neither to take those "
            "of the process group"
        )
    if rank is not None:
        return as_int("rank", rank), as_int("world_size", world_size)
    if distributed.is_launched() and not distributed.has_group():
        warnings.warn(
            "torchrun started this process, but there is no process group yet: each process gets "
            "the same batches. Make the loader after torch.distributed.init_process_group, or pass "
            "rank and world_size",
            stacklevel=3,
        )
    return distributed.rank(), distributed.world_size()


class MaskedLoader:
    """An infinite stream of corrupted batches, with random access by step.

    With a global batch of ``G = batch_size * world_size``, step s of rank r holds the global sample
    slots ``g = s * G + r * batch_size + j`` for j in [0, ``batch_size``). Slot g is position
    ``g % N`` of epoch ``g // N``. Each epoch visits every window once, in an order of its own; a
    batch may straddle epochs. All noise is a function of ``(seed, g)`` and of G. So windows and
    masks depend neither on ``world_size`` (for equal G), nor on where a run was resumed.

    Of a :class:`~nar_kernels.data.windows.mixture.Mixture`, slot g holds the next window of its
    source.

    Iteration starts at ``loader.step`` and never ends; ``zip(range(n), loader)`` takes n batches
    (``range`` first, or ``zip`` takes one more batch and drops it). For frameworks that need it,
    ``len(loader)`` is the number of steps in an epoch; iterating again continues with the next one.

    Where the corpus has a loss mask, only tokens that count in the loss are masked: prompts are
    given, answers are learned. A window in which none counts adds nothing to a loss.

    Ids are always checked, whatever ``dataset.validate`` says: validation is fused into
    ``corrupt``. On the CPU an error is raised with the batch; on a GPU, to avoid a sync, with the
    next one (or by :meth:`raise_if_invalid`): the host is never more than a step ahead of the
    device.

    Copies, also by ``pickle``, continue independently from the same step. A corpus file is pickled
    as its path; copies in one process share the corpus. Device state is recreated in the copy.

    On a CUDA device a batch is one kernel launch. With ``"device"`` and ``"pinned"`` the kernel
    also computes the windows, from a few scalars. The corpus keeps its dtype, and is stored

    * ``"device"``: in GPU memory;
    * ``"pinned"``: in pinned host memory, which the kernel reads over the bus: a copy, of the
      corpus's own bytes to the page, that is unpinned when the loader and all views are gone;
    * ``"mapped"``: where it is, such as in a file. A thread fetches the windows of the next batch
      and copies them to the GPU while it computes.

    ``"auto"`` takes the first that fits: an eighth of the free GPU memory, or a quarter of the free
    host memory divided by ``world_size``. (Where the system refuses to pin it, it warns, and the
    corpus stays mapped.) With the first two, ``batch`` also takes the step as a tensor on the
    device, so that a training step can be captured in a CUDA graph, batch and all; the loss then
    needs ``static_shapes``.

    Args:
        dataset: the windows, a ``TokenDataset``; or a ``Mixture`` of several.
        masking: how to mask; ``num_tokens`` and ``mask_id`` must match the dataset.
        batch_size: B, sequences per optimiser step on this rank. For gradient accumulation, split
            batches with :meth:`Corrupted.microbatches`.
        seed: 64-bit key of the window order and the masks.
        device: of the batches. Those for CUDA devices are made there, others on the CPU.
        rank, world_size: this process among those that share the global batch; both or neither.
            Default: of the ``torch.distributed`` process group if initialised by now, else 0, 1.
        shuffle: if false, slot g is window ``g % N``.
        shift_epochs: the windows of each epoch begin up to ``stride - 1`` tokens later, so that
            they are not always cut at the same places. N is one less then.
        random_length_prob: the share of windows that are cut to a random length in [1, L], by their
            slots (LLaDA, before fine-tuning: 0.01). A batch then has ``documents``, and
            ``attention_mask`` says what is padding.
        views: as in :func:`nar_kernels.corrupt`: how many masks of each of the B sequences.
        classes: integers ``[N]``, the class of each window, for nets that take one. Batches then
            have ``class_ids``. Of one dataset, without ``shift_epochs``; and ``batch`` takes no
            step as a tensor then.
        num_classes: C. Default: one more than the greatest of ``classes``.
        class_dropout_prob: the share of samples whose class is C instead, which stands for none,
            for classifier-free guidance (arXiv:2207.12598); by their slots.
        backend: as in :func:`nar_kernels.corrupt`.
        corpus_memory: where a CUDA device reads the corpus: ``"auto"`` or one of the above.
        outputs, ids_dtype: as in :func:`nar_kernels.corrupt`.

    Attributes:
        step: the step that iteration yields next.
        corpus_memory: where the corpus is stored; ``"mapped"`` if the device is the CPU.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or dataset and masking disagree.
        BackendUnavailableError: the backend was requested by name and cannot run here.
        PinnedMemoryError: ``"pinned"`` was requested, and the corpus cannot be pinned.
    """

    def __init__(
        self,
        dataset: TokenDataset | Mixture,
        masking: MaskingConfig,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int | None = None,
        world_size: int | None = None,
        shuffle: bool = True,
        shift_epochs: bool = False,
        random_length_prob: float = 0.0,
        views: ViewsLike = 1,
        classes: Tensor | np.ndarray | Sequence[int] | None = None,
        num_classes: int | None = None,
        class_dropout_prob: float = 0.1,
        backend: str = "auto",
        corpus_memory: CorpusMemory | Literal["auto"] = "auto",
        outputs: Collection[Output] = OUTPUTS,
        ids_dtype: torch.dtype = torch.int64,
    ) -> None:
        if not isinstance(dataset, TokenDataset | Mixture):
            raise TypeError(
                f"dataset is a {type(dataset).__name__}: it must be a TokenDataset, such as "
                "TokenDataset(source, seq_len), or a Mixture"
            )
        batch_size = as_int("batch_size", batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        rank, world_size = resolve_rank(rank, world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}: it must be in [0, world_size) = [0, {world_size})")
        for name in ("num_tokens", "mask_id"):
            ours, theirs = getattr(masking, name), getattr(dataset, name)
            if ours != theirs:
                raise ValueError(
                    f"masking has {name} {ours} but the dataset has {theirs}: they must be equal"
                )
        self.dataset, self.masking = dataset, masking
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.shuffle = as_int("seed", seed), bool(shuffle)
        check_seed(self.seed)
        self.device = check_device(device)
        self._compute_device = self.device if self.device.type == "cuda" else torch.device("cpu")
        self.backend = resolve_backend(backend, self._compute_device)
        self._wanted, self._views = Wanted.of(outputs, ids_dtype), check_views(views, masking)
        self.step = 0
        self.random_length_prob = check_probability("random_length_prob", random_length_prob)
        self._order = order_of(dataset, self.seed, self.shuffle, bool(shift_epochs))
        self._classes: Classes | None = None
        if classes is not None:
            self._check_has_classes(bool(shift_epochs))
            self._classes = Classes(
                classes, num_classes, class_dropout_prob, num_windows=len(dataset)
            )
        elif num_classes is not None:
            raise ValueError(f"num_classes is {num_classes}, but there are no classes: give them")
        self._deferred_check = DeferredCheck()
        self._place_corpus(corpus_memory)

    def _check_has_classes(self, shift_epochs: bool) -> None:
        if isinstance(self.dataset, Mixture):
            raise ValueError(
                "classes are of the windows of one dataset, and this is a mixture: make one corpus "
                "of them, or leave classes out"
            )
        if shift_epochs:
            raise ValueError(
                "shift_epochs moves the windows that classes belong to: leave one of them out"
            )

    def _place_corpus(self, memory: CorpusMemory | Literal["auto"]) -> None:
        corpus, device = self.dataset.corpus, self._compute_device
        self._place = PlacedCorpus(corpus, device, memory, self.backend, self.world_size)
        self.corpus_memory: CorpusMemory = self._place.memory
        self._step: CorruptStep | None = None  # made when it is needed, with tables on the device
        self._residency = Residency(corpus.stream, corpus.loss_mask)
        self._stager = self._mask_stager = None
        if device.type != "cpu" and self.corpus_memory == "mapped":
            shape = self.batch_size, self.dataset.seq_len
            self._stager = Stager(corpus.stream, self._window_starts, *shape, device)
            if corpus.loss_mask is not None:
                self._mask_stager = Stager(corpus.loss_mask, self._window_starts, *shape, device)

    def _make_step(self) -> CorruptStep:
        place = self._place
        tokens, loss_mask, runs = place.tokens, place.loss_mask, place.runs
        if self._stager is not None:  # which gives each call its windows
            tokens = torch.empty(0, dtype=tokens.dtype, device=self._compute_device)
            loss_mask = runs = None
        return CorruptStep(
            tokens,
            self.masking,
            self._order.in_kernel,
            batch_size=self.batch_size,
            rank=self.rank,
            global_batch=self.global_batch,
            seq_len=self.dataset.seq_len,
            seed=self.seed,
            device=self._compute_device,
            runs=runs,
            loss_mask=loss_mask,
            loss_mask_runs=None if self._stager is not None else place.loss_mask_runs,
            views=self._views,
            wanted=self._wanted,
            backend=self.backend,
        )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        # Device memory, threads and events are recreated in the copy. A pending check stays with
        # this loader.
        for name in _NOT_COPIED:
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        check_device(self.device)
        self._deferred_check = DeferredCheck()
        self._place_corpus(self.corpus_memory)

    def __len__(self) -> int:
        """Whole steps in an epoch, ``max(N // G, 1)``. Iteration does not stop there."""
        return max(self._order.num_windows // self.global_batch, 1)

    @property
    def global_batch(self) -> int:
        """G, sequences per optimiser step over all ranks."""
        return self.batch_size * self.world_size

    def _check_step(self, step: int) -> int:
        step, most = as_int("step", step), _MOST_SLOTS // self.global_batch
        if not 0 <= step < most:
            raise ValueError(f"step is {step}: it must be in [0, {most}), for slots below 2**63")
        return step

    def sample_ids(self, step: int) -> Tensor:
        """int64 ``[B]``: the global sample slots of ``step`` on this rank."""
        first = self._check_step(step) * self.global_batch + self.rank * self.batch_size
        return torch.arange(first, first + self.batch_size, device="cpu")

    def window_indices(self, step: int) -> Tensor:
        """int64 ``[B]``: dataset indices of the windows in ``step`` on this rank; of a mixture,
        each of the dataset that it comes from."""
        return self._order.indices(self.sample_ids(step))

    def document_ids(self, step: int) -> Tensor:
        """int64 ``[B, L]``, on the CPU: which document of the corpus each token of the batch of
        ``step`` is in, counted from 0; such as for attention that does not cross documents.

        Raises:
            ValueError: the corpus does not say where documents end.
        """
        return document_ids(self.dataset.corpus, self._window_starts(step), self.dataset.seq_len)

    def _window_starts(self, step: int) -> Tensor:
        """int64 ``[B]``: corpus offsets of the windows of a step."""
        return self._order.starts(self.sample_ids(step))

    def batch(self, step: int | Tensor) -> Corrupted:
        """The batch of any step: a function of ``(seed, step)``; neither reads nor advances
        ``self.step``.

        Args:
            step: at least 0. Or a one-element int64 tensor on the CUDA device: the batch is then
                not checked by the loader, which would be a sync: see ``raise_if_invalid``.

        Raises:
            InvalidTokenError: a window holds a bad id: in this batch on the CPU, in the one before
                on a CUDA device. The message names corpus and offset.
            CorpusChangedError: a file was changed since it was opened (looked at now and then).
            ValueError: ``step`` is negative, or a tensor while the kernel cannot read the corpus.
        """
        self._deferred_check.run()
        starts = windows = maskable = None
        if isinstance(step, Tensor):
            in_kernel = self._order.in_kernel is not None
            is_cut = self.random_length_prob > 0
            on_cpu = self._compute_device.type == "cpu"
            if self._classes is not None:
                raise ValueError(
                    "step is a tensor, but classes are looked up on the host: pass an int"
                )
            if on_cpu or self._stager is not None or not in_kernel or is_cut:
                raise ValueError(
                    "step is a tensor: only with a CUDA device and corpus_memory 'device' or "
                    "'pinned', and whole windows at equal distances of one dataset, does the "
                    f"kernel find the windows (random_length_prob cuts some); here it is "
                    f"{self.device} and {self.corpus_memory!r}, so pass an int"
                )
        else:
            step = self._check_step(step)
            if self.corpus_memory == "mapped":
                place = step * self.global_batch % self._order.num_windows
                self._residency.before(begins_epoch=place < self.global_batch)
            if self._stager is not None:
                windows = self._stager.windows(step)
                if self._mask_stager is not None:
                    maskable = self._mask_stager.windows(step)
            elif self._order.in_kernel is None or self.random_length_prob:
                starts = self._window_starts(step).to(self._compute_device)
        if self.random_length_prob:
            assert isinstance(step, int)
            corrupted = self._corrupt_cut(step, starts, windows, maskable)
        else:
            if self._step is None:
                self._step = self._make_step()
            corrupted = self._step(step, starts=starts, windows=windows, maskable=maskable)
        if self._classes is not None:
            assert isinstance(step, int)
            corrupted.class_ids = self._class_ids(step)
            if self._classes.dropout_prob:
                corrupted.num_classes = self._classes.num_classes
        if not isinstance(step, Tensor):
            if self._compute_device.type == "cuda":
                self._deferred_check.defer(corrupted, partial(self._check, step))
            else:
                self._check(step, corrupted.invalid)
        return corrupted if self._compute_device == self.device else corrupted.to(self.device)

    def _class_ids(self, step: int) -> Tensor:
        """int64 ``[B]``, in each view the same."""
        assert self._classes is not None
        slots = self.sample_ids(step)
        of_samples = self._classes.of(self._order.indices(slots), slots, self.seed)
        of_views = of_samples.repeat(self._views.num)
        return of_views.to(self._compute_device, non_blocking=True)

    def _corrupt_cut(
        self, step: int, starts: Tensor | None, windows: Tensor | None, maskable: Tensor | None
    ) -> Corrupted:
        """Windows of random lengths, padded: documents that are their slots."""
        place, length = self._place, self.dataset.seq_len
        slots = self.sample_ids(step)
        lengths = random_lengths(
            torch.full_like(slots, length), slots, self.random_length_prob, self.seed
        )
        tokens, runs = place.tokens, place.runs
        loss_mask, loss_mask_runs = place.loss_mask, place.loss_mask_runs
        if windows is not None:  # instead of the corpus
            tokens = windows.flatten()
            starts = torch.arange(len(slots), device=tokens.device) * length
            loss_mask = None if maskable is None else maskable.flatten()
            runs = loss_mask_runs = None
        assert starts is not None
        return corrupt_documents(
            check_documents(lengths, seq_len=length, sample_ids=slots),
            tokens,
            starts,
            self.masking,
            seed=self.seed,
            global_batch=self.global_batch,
            runs=runs,
            loss_mask=loss_mask,
            loss_mask_runs=loss_mask_runs,
            max_length=length,
            views=self._views,
            wanted=self._wanted,
            backend=self.backend,
        )

    def _check(self, step: int, record: Tensor) -> None:
        """Raises the error in the ``invalid`` record of the batch of ``step``, if any."""

        def where(offset: int) -> str:
            if self._stager is not None:  # an offset in the batch, not in the corpus
                row, column = divmod(offset, self.dataset.seq_len)
                offset = int(self._window_starts(step)[row]) + column
            return self.dataset.corpus.where(offset)

        check_record(record, self.batch_size, self.masking, where)

    def raise_if_invalid(self, record: Tensor | None = None) -> None:
        """Synchronises with the last batch and raises its error, if it has not been raised yet.

        Args:
            record: instead, ``invalid`` of a batch whose step was a tensor.
        """
        if record is None:
            self._deferred_check.run()
        else:
            self._check(self.step, record)  # offsets into the corpus: the step is not needed

    def __getitem__(self, step: int) -> Corrupted:
        """``batch(step)``: the loader is a map-style dataset of batches, by which workers make them
        ahead: ``DataLoader(loader, batch_size=None, sampler=range(1000), num_workers=2)``. Name the
        steps by ``sampler``: without, every epoch is steps 0 to ``len(loader)``, the same batches.
        """
        return self.batch(step)

    def __iter__(self) -> Iterator[Corrupted]:
        return self

    def __next__(self) -> Corrupted:
        batch = self.batch(self.step)
        self.step += 1
        if self._stager is not None:
            self._stager.prefetch(self.step)
            if self._mask_stager is not None:
                self._mask_stager.prefetch(self.step)
        elif self._residency.is_cold:
            starts = self._window_starts(self.step)
            self._residency.read_ahead(starts, self.dataset.seq_len)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from: the next step, and everything that must not change until then.

        Follows the protocol of torchdata's ``StatefulDataLoader``. Equal on all ranks. After
        iteration has yielded batch s, ``"step"`` is s + 1.
        """
        return {
            "version": VERSION,
            "step": self._check_step(self.step),
            "seed": self.seed,
            "global_batch": self.global_batch,
            "shuffle": self.shuffle,
            "random_length_prob": self.random_length_prob,
            **self._order.state(),
            "views": self._views.state(),
            **state_of(self._classes),
            **masking_state(self.masking),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes where :meth:`state_dict` was taken.

        ``world_size`` may have changed, if ``batch_size * world_size`` has not.

        Raises:
            ValueError: the state has another seed, corpus, shuffle, window layout, global batch or
                masking, so that this loader would not continue the same sequence of batches.
        """
        if not isinstance(state_dict, Mapping) or "step" not in state_dict:
            raise ValueError("the state has no 'step': it is not one of a MaskedLoader")
        check_continues(self.state_dict(), state_dict, self.masking, self._order.corpus_names())
        self.step = self._check_step(state_dict["step"])
