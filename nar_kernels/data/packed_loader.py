"""Batches of whole documents: :class:`PackedLoader`.

Shapes: B rows, L row length (``seq_len``), n documents of a batch, N their positions, D documents.
"""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from nar_kernels.checks import as_int, check_device, check_seed
from nar_kernels.data.corpus import Corpus, Source
from nar_kernels.data.loader import resolve_rank
from nar_kernels.data.loader_state import masking_state
from nar_kernels.data.packing.pack import PackMethod
from nar_kernels.data.packing.plan import Overlong, PackingPlan
from nar_kernels.data.placement import PlacedCorpus
from nar_kernels.data.random_lengths import check_probability, random_lengths
from nar_kernels.data.residency import Residency
from nar_kernels.data.staging import CorpusMemory, DeferredCheck
from nar_kernels.ops.backends import resolve_backend
from nar_kernels.ops.corrupt import Wanted, corrupt_documents
from nar_kernels.ops.corrupted import OUTPUTS, Corrupted, Output, check_record
from nar_kernels.ops.documents import Documents, check_documents
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.ops.samples import check_id
from nar_kernels.ops.views import ViewsLike, check_views
from nar_kernels.ops.windows import gather_ragged

Layout = Literal["rows", "flat"]
EosFill = Literal["none", "fill_block", "fill_row"]

_VERSION = 1
_NOT_COPIED = "_place", "_residency", "_deferred_check"
_CHECK_ALL = 1024  # batches after which all files are looked at: an epoch has no fixed number


def check_vocabulary_of(corpus: Corpus, masking: MaskingConfig) -> None:
    """Raises ValueError if a prepared corpus says that it has another vocabulary."""
    for manifest in corpus.manifests[:1]:
        for name in ("num_tokens", "mask_id"):
            ours, theirs = getattr(masking, name), getattr(manifest, name)
            if ours != theirs:
                raise ValueError(
                    f"masking has {name} {ours} but {corpus.name} has {theirs}: they must be equal"
                )


class PackedLoader:
    """An infinite stream of corrupted batches of whole documents, with random access by step.

    A :class:`~nar_kernels.data.packing.plan.PackingPlan` puts the documents of each epoch into rows
    of at most ``seq_len`` tokens. With a global batch of ``G = batch_size * world_size`` rows, step
    s of rank r holds the rows ``s * G + r * batch_size + j`` of the plan. Each document has a time,
    a mask and a noise of its own, of ``(seed, epoch, its number)``: the same in any packing, order,
    batch or world size. Stratified times have their strata over the documents of an epoch.

    ``batch.documents`` says where they are; ``batch.cu_seqlens``, ``position_ids``,
    ``document_ids`` and ``attention_mask`` are what nets and attention kernels take
    (:mod:`nar_kernels.nets.attention`).

    Where the corpus has a loss mask, only tokens that count in the loss are masked.

    For batches of a number of tokens, such as DPLM's 6000, take ``layout="flat"``, ``seq_len=6000``
    and ``batch_size=1``.

    Iteration, checks and copies are as of :class:`~nar_kernels.data.loader.MaskedLoader`.

    Args:
        source: a ``Corpus`` that says where documents end, or what it takes.
        seq_len: L, the most tokens of a row.
        masking: how to mask.
        batch_size: B, rows per optimiser step on this rank.
        num_documents: use the first D documents only; such as to hold out the others. Default: all.
        seed: 64-bit key of order and masks.
        device, rank, world_size, backend, outputs, ids_dtype: as of ``MaskedLoader``.
        shuffle, method, window, overlong: as of ``PackingPlan``.
        layout: ``"rows"``: ``[B, L]``, padded; ``"flat"``: ``[N]``, one document after the other,
            without padding.
        alone: one document a row.
        eos_fill: what follows a document: ``"none"``; ``"fill_block"``: ``eos_id``, up to a
            multiple of ``block_size`` (NeMo); ``"fill_row"``: ``eos_id``, up to the end of its row,
            which has no other document (LLaDA). These count in the loss, and may be masked.
        eos_id: id of the end of a sequence.
        block_size: for ``"fill_block"``; divides ``seq_len``.
        pad_id: id of padding. Default: ``eos_id``, or else 0 (1 if the mask is 0).
        random_length_prob: the share of documents that are cut to a random length (LLaDA, before
            fine-tuning: 0.01), answers included; not with ``eos_fill``, which would put an end
            there.
        views: as in :func:`nar_kernels.corrupt`: how many masks of each document.
        corpus_memory: as of ``MaskedLoader``; from ``"mapped"`` the tokens of a batch are copied
            when it is made.

    Attributes:
        corpus, plan: the :class:`Corpus` and the ``PackingPlan``.
        step: the step that iteration yields next.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, the corpus does not say where documents end, or its
            vocabulary is another than that of ``masking``.
        CorpusFormatError, FileNotFoundError: the corpus cannot be read.
    """

    def __init__(
        self,
        source: Source | Corpus,
        seq_len: int,
        masking: MaskingConfig,
        batch_size: int,
        *,
        num_documents: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int | None = None,
        world_size: int | None = None,
        shuffle: bool = True,
        method: PackMethod = "first_fit_decreasing",
        window: int = 4096,
        overlong: Overlong = "split",
        layout: Layout = "rows",
        alone: bool = False,
        eos_fill: EosFill = "none",
        eos_id: int | None = None,
        block_size: int | None = None,
        pad_id: int | None = None,
        random_length_prob: float = 0.0,
        views: ViewsLike = 1,
        backend: str = "auto",
        corpus_memory: CorpusMemory | Literal["auto"] = "auto",
        outputs: Collection[Output] = OUTPUTS,
        ids_dtype: torch.dtype = torch.int64,
    ) -> None:
        if not isinstance(masking, MaskingConfig):
            raise TypeError(f"masking is a {type(masking).__name__}: it must be a MaskingConfig")
        self.corpus = source if isinstance(source, Corpus) else Corpus(source)
        check_vocabulary_of(self.corpus, masking)
        self.masking, self.seed = masking, as_int("seed", seed)
        check_seed(self.seed)
        self.batch_size = as_int("batch_size", batch_size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        self.rank, self.world_size = resolve_rank(rank, world_size)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank is {self.rank}: it must be in [0, world_size) = [0, {self.world_size})"
            )
        if layout not in get_args(Layout):
            raise ValueError(f"layout is {layout!r}: it must be 'rows' or 'flat'")
        self.layout, self.eos_fill = layout, eos_fill
        self._views = check_views(views, masking)
        self.random_length_prob = check_probability("random_length_prob", random_length_prob)
        self.eos_id = None if eos_id is None else check_id("eos_id", eos_id, masking)
        self.pad_id = None if pad_id is None else check_id("pad_id", pad_id, masking)
        self.block_size = self._check_fill(block_size, as_int("seq_len", seq_len))
        self.plan = PackingPlan(
            self._ends(num_documents),
            seq_len,
            seed=self.seed,
            shuffle=shuffle,
            method=method,
            window=window,
            overlong=overlong,
            round_to=self.block_size,
            alone=alone or eos_fill == "fill_row",
        )
        self.seq_len = self.plan.seq_len
        self.device = check_device(device)
        self._compute_device = self.device if self.device.type == "cuda" else torch.device("cpu")
        self.backend = resolve_backend(backend, self._compute_device)
        self._wanted = Wanted.of(outputs, ids_dtype)
        self.step = 0
        self._num_rows: int | None = None  # of the first epoch
        self._place_corpus(corpus_memory)

    def _check_fill(self, block_size: int | None, seq_len: int) -> int:
        """What the space of a document is a multiple of."""
        if self.eos_fill not in get_args(EosFill):
            raise ValueError(
                f"eos_fill is {self.eos_fill!r}: it must be 'none', 'fill_block' or 'fill_row'"
            )
        if self.eos_fill != "none" and self.eos_id is None:
            raise ValueError(f"eos_fill is {self.eos_fill!r}: give eos_id, the id to fill with")
        if (block_size is None) == (self.eos_fill == "fill_block"):
            raise ValueError(
                f"block_size is {block_size} and eos_fill {self.eos_fill!r}: a block size is for "
                "'fill_block', which needs one"
            )
        if self.eos_fill != "none" and self.random_length_prob:
            raise ValueError(
                f"random_length_prob is {self.random_length_prob} and eos_fill {self.eos_fill!r}: "
                "a document that is cut has no end to be learned; leave one of them out"
            )
        if block_size is None:
            return 1
        block_size = as_int("block_size", block_size)
        if block_size < 1 or seq_len % block_size:
            raise ValueError(
                f"block_size is {block_size}: it must divide seq_len, which is {seq_len}"
            )
        return block_size

    def _ends(self, num_documents: int | None) -> Any:
        ends = self.corpus.document_ends
        if ends is None:
            raise ValueError(
                f"{self.corpus.name} does not say where its documents end: open it with eos_id, "
                "the id that ends each: Corpus(source, eos_id=...)"
            )
        if num_documents is None:
            return ends
        num_documents = as_int("num_documents", num_documents)
        if not 1 <= num_documents <= len(ends):
            raise ValueError(
                f"num_documents is {num_documents}: it must be in [1, {len(ends)}], the documents "
                f"of {self.corpus.name}"
            )
        return ends[:num_documents]

    def _place_corpus(self, memory: CorpusMemory | Literal["auto"]) -> None:
        self._place = PlacedCorpus(
            self.corpus, self._compute_device, memory, self.backend, self.world_size
        )
        self.corpus_memory: CorpusMemory = self._place.memory
        self._residency = Residency(self.corpus.stream, self.corpus.loss_mask)
        self._deferred_check = DeferredCheck()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        check_device(self.device)
        self._place_corpus(self.corpus_memory)

    @property
    def global_batch(self) -> int:
        """G, rows per optimiser step over all ranks."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Whole steps in the first epoch, at least 1; packs it, once. Iteration does not stop
        there."""
        if self._num_rows is None:
            self._num_rows = self.plan.num_rows()
        return max(self._num_rows // self.global_batch, 1)

    def padding_share(self, epoch: int = 0) -> float:
        """As of ``PackingPlan``: of the layout ``"rows"``, ends of sequence included."""
        return self.plan.padding_share(epoch)

    def batch(self, step: int) -> Corrupted:
        """The batch of any step: a function of ``(seed, step)``; neither reads nor advances
        ``self.step``.

        A step far ahead takes as long as packing what lies between.

        Raises:
            InvalidTokenError: a document holds a bad id: in this batch on the CPU, in the one
                before on a CUDA device. The message names corpus and offset.
            CorpusChangedError: a file was changed since it was opened.
            ValueError: ``step`` is negative.
        """
        self._deferred_check.run()
        step = as_int("step", step)
        if step < 0:
            raise ValueError(f"step is {step}: it must be at least 0")
        if self.corpus_memory == "mapped":
            self._residency.before(begins_epoch=step % _CHECK_ALL == 0)
        documents, starts = self._documents(step)
        corrupted = self._corrupt(documents, starts)
        check = partial(
            check_record,
            batch_size=len(documents),
            masking=self.masking,
            where=partial(self._where, documents, starts),
        )
        if self._compute_device.type == "cuda":
            self._deferred_check.defer(corrupted, check)
        else:
            check(corrupted.invalid)
        return corrupted if self._compute_device == self.device else corrupted.to(self.device)

    def _documents(self, step: int) -> tuple[Documents, Tensor]:
        """The documents of a step, and where in the corpus they begin, int64 ``[n]``."""
        first = step * self.global_batch + self.rank * self.batch_size
        pieces = self.plan.rows(first, self.batch_size)
        given = (pieces.start, pieces.length, pieces.sample)
        starts, lengths, slots = map(torch.from_numpy, given)
        if self.random_length_prob:
            lengths = random_lengths(lengths, slots, self.random_length_prob, self.seed)
        eos_lengths = None
        if self.eos_fill == "fill_row":
            eos_lengths = self.seq_len - lengths
        elif self.eos_fill == "fill_block":
            eos_lengths = -lengths % self.block_size
        in_rows: dict[str, Any] = {}
        if self.layout == "rows":
            places = (pieces.row - first) * self.seq_len + pieces.offset
            in_rows = {"places": torch.from_numpy(places)}
            in_rows |= {"num_rows": self.batch_size, "seq_len": self.seq_len}
        documents = check_documents(lengths, eos_lengths=eos_lengths, sample_ids=slots, **in_rows)
        return documents, starts

    def _corrupt(self, documents: Documents, starts: Tensor) -> Corrupted:
        place, device = self._place, self._compute_device
        tokens, runs = place.tokens, place.runs
        loss_mask, loss_mask_runs = place.loss_mask, place.loss_mask_runs
        if device.type != "cpu" and self.corpus_memory == "mapped":
            lengths = documents.stored
            tokens = gather_ragged(tokens, runs, starts, lengths).to(device)
            if self.corpus.loss_mask is not None:
                mask = self.corpus.loss_mask
                loss_mask = gather_ragged(mask.flat, mask.runs, starts, lengths).to(device)
            starts = lengths.cumsum(0) - lengths
            runs = loss_mask_runs = None
        return corrupt_documents(
            documents,
            tokens,
            starts.to(device),
            self.masking,
            seed=self.seed,
            global_batch=self.plan.num_documents,
            runs=runs,
            loss_mask=loss_mask,
            loss_mask_runs=loss_mask_runs,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
            max_length=self.seq_len,
            views=self._views,
            wanted=self._wanted,
            backend=self.backend,
        )

    def _where(self, documents: Documents, starts: Tensor, offset: int) -> str:
        if self._compute_device.type != "cpu" and self.corpus_memory == "mapped":
            # Of the tokens of the batch, one document after the other.
            ends = documents.stored.cumsum(0)
            i = int(torch.searchsorted(ends, offset, right=True))
            offset += int(starts[i] + documents.stored[i] - ends[i])
        return self.corpus.where(offset)

    def raise_if_invalid(self) -> None:
        """Synchronises with the last batch on a CUDA device and raises its error, if any."""
        self._deferred_check.run()

    def __getitem__(self, step: int) -> Corrupted:
        """``batch(step)``, for workers: as of ``MaskedLoader``."""
        return self.batch(step)

    def __iter__(self) -> Iterator[Corrupted]:
        return self

    def __next__(self) -> Corrupted:
        batch = self.batch(self.step)
        self.step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from: the next step, where the plan is, and everything that must not
        change until then. Equal on all ranks. For JSON."""
        return {
            "version": _VERSION,
            "step": self.step,
            "global_batch": self.global_batch,
            "corpus_digest": self.corpus.digest,
            "loss_mask_digest": self.corpus.loss_mask_digest,
            "layout": self.layout,
            "eos_fill": self.eos_fill,
            "eos_id": self.eos_id,
            "pad_id": self.pad_id,
            "random_length_prob": self.random_length_prob,
            "views": self._views.state(),
            **masking_state(self.masking),
            "place": self.plan.state(self.step * self.global_batch),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resumes where :meth:`state_dict` was taken, without packing what came before.

        ``world_size`` may have changed, if ``batch_size * world_size`` has not.

        Raises:
            ValueError: the state is of other data, packing or masking, so that this loader would
                not continue the same sequence of batches.
        """
        for name in ("place", "step"):
            if not isinstance(state_dict, Mapping) or name not in state_dict:
                raise ValueError(f"the state has no {name!r}: it is not one of a PackedLoader")
        if state_dict.get("version") != _VERSION:
            raise ValueError(
                f"the state has version {state_dict.get('version')!r}, and this version of "
                f"nar-kernels reads {_VERSION}: use the one that wrote it"
            )
        for name, here in self.state_dict().items():
            if name not in ("step", "place") and state_dict.get(name) != here:
                raise ValueError(
                    f"cannot continue: {name} is {state_dict.get(name)!r} in the state, but "
                    f"{here!r} here; make the loader with the arguments it had when the state was "
                    "taken"
                )
        step = as_int("step", state_dict["step"])
        if step < 0:
            raise ValueError(f"step is {step}: it must be at least 0")
        self.plan.resume(state_dict["place"])
        self.step = step
