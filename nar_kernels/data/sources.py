"""Data for ``--data``: windows to train on and windows held out, of one source or a mixture; or
whole documents.

Shapes: L sequence length (``seq_len``), V vocabulary (``num_tokens``).
"""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nar_kernels.checks import as_int
from nar_kernels.data.corpus import Corpus
from nar_kernels.data.formats.prepared import has_answers, is_prepared_text
from nar_kernels.data.inspect.scan import known_scan, scan
from nar_kernels.data.labels import read_labels
from nar_kernels.data.mixture_file import MixtureSource, read_mixture
from nar_kernels.data.opened import Opened, open_source, with_tokenizer
from nar_kernels.data.packing.document_range import DocumentRange
from nar_kernels.data.packing.plan import Overlong
from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.data.tokenizer import Tokenizer
from nar_kernels.data.windows.dataset import TokenDataset
from nar_kernels.data.windows.mixture import Mixture, apportion
from nar_kernels.distributed import on_first_rank

_DEFAULT_SEQ_LEN = 256
_MAX_HELD_OUT = 256
# Bytes; half a minute from a disk that reads 1 GB/s, and some minutes from a slow one. The other
# ranks wait meanwhile, ten minutes at most.
_MAX_VALIDATED = 32 << 30


class Data(NamedTuple):
    """Windows to train on, and windows held out.

    Attributes:
        name: as the user gave it.
        spec: what a window is.
        train: the training windows; they may overlap each other. Of several sources, a mixture.
        held_out: windows at the end of each source, which share no token with ``train``.
        held_out_windows: int64, indices of windows in ``held_out`` that do not overlap.
        train_classes, held_out_classes: int64, the class of each training window, and of each of
            ``held_out_windows``; None without labels.
    """

    name: str
    spec: SequenceSpec
    train: TokenDataset | Mixture
    held_out: TokenDataset
    held_out_windows: Tensor
    train_classes: Tensor | None = None
    held_out_classes: Tensor | None = None

    @property
    def corpus(self) -> Corpus:
        return self.train.corpus

    def sizes(self) -> tuple[int, int, str]:
        """How much there is to train on, how much is held out, and of what."""
        return len(self.train), len(self.held_out_windows), "windows"

    def validate(self) -> None:
        """Checks all ids up front, so that a bad one does not stop a run midway. All ranks must
        call this.

        What a corpus holds is remembered, by ``nar-kernels inspect``, too. One of more than 32 GiB
        of which nothing is known is not read: its windows are checked when fetched.

        Raises:
            InvalidTokenError: an id is outside [0, V), or is ``mask_id``.
        """
        on_first_rank(self._validate)

    def _validate(self) -> None:
        sources = self.train.datasets if isinstance(self.train, Mixture) else (self.train,)
        for dataset in (*sources, self.held_out):
            corpus = dataset.corpus
            if corpus.nbytes <= _MAX_VALIDATED or known_scan(corpus) is not None:
                dataset.validate_all()


class PackedData(NamedTuple):
    """Documents to train on, which are packed into rows, and documents held out.

    Attributes:
        name, spec: as of :class:`Data`; a sequence is a row.
        train, held_out: the first documents, and the last.
    """

    name: str
    spec: SequenceSpec
    train: DocumentRange
    held_out: DocumentRange

    @property
    def corpus(self) -> Corpus:
        return self.train.corpus

    def sizes(self) -> tuple[int, int, str]:
        """As of :class:`Data`."""
        return self.train.num_documents, self.held_out.num_documents, "documents"

    def validate(self) -> None:
        """As of :class:`Data`."""
        on_first_rank(self._validate)

    def _validate(self) -> None:
        corpus = self.corpus
        if corpus.nbytes <= _MAX_VALIDATED or known_scan(corpus) is not None:
            TokenDataset(
                corpus, 1, num_tokens=self.spec.num_tokens, mask_id=self.spec.mask_id
            ).validate_all()


def open_data(
    name: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    column: str | None = None,
    eos_id: int | None = None,
    num_tokens: int | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    within_documents: bool = False,
    pack: bool = False,
    overlong: Overlong = "split",
    num_held_out: int | None = None,
    labels: str | os.PathLike[str] | None = None,
    folder: Path | None = None,
    tokenizer: Tokenizer | None = None,
) -> Data | PackedData:
    """Opens a built-in data set, a corpus or a mixture of several, and splits off its last windows
    for evaluation.

    Args:
        name: ``"digits"``, ``"text"``, or a path. Files and folders of token ids are recognised;
            any other file is read as bytes. (``./digits`` is a file with that name.) A JSON file
            ``{"mixture": [{"data": "a.bin", "weight": 0.7, "dtype": "uint16"}, ...]}`` names
            several sources, relative to its own folder.
        dtype, column, eos_id: as of :class:`Corpus`. A file with a ``dtype`` holds token ids.
        num_tokens: V, for token ids: the vocabulary of the data plus one for the mask token, which
            gets the last id. Fixed for data that says it. Default: two more than the greatest id.
        seq_len: L. Default: that of the images; else 256.
        stride: tokens from one training window to the next; divides L. Default: L.
        within_documents: no window reaches beyond a document.
        pack: whole documents instead of windows; of one source.
        overlong: as of ``PackingPlan``, for ``pack``.
        num_held_out: non-overlapping windows held out at the end, or documents. Default: 180 for
            ``digits``, else a tenth of all, at most 256. Of a mixture: by weight, at least one of
            each source.
        labels: the class of each window: a ``.npy`` file of integers ``[N]``, or ``"data"`` for
            those that the data hold. Of one source, whose windows do not overlap.
        folder: where else to look for a relative path.
        tokenizer: of ids whose files do not say it.

    Raises:
        TypeError, ValueError, CorpusFormatError, FileNotFoundError: an option or the file is wrong.
        ImportError: ``digits`` without scikit-learn.
    """
    name = os.fspath(name)
    if pack and (within_documents or stride is not None):
        raise ValueError(
            "pack is given with stride or within_documents, which are of windows: leave them out, "
            "or do not pack"
        )
    options: dict[str, Any] = {"num_tokens": num_tokens, "seq_len": seq_len, "stride": stride}
    for option, value in options.items():
        options[option] = None if value is None else as_int(option, value)
    num_held_out = None if num_held_out is None else as_int("num_held_out", num_held_out)
    sources, opened = open_sources(name, dtype=dtype, column=column, eos_id=eos_id, folder=folder)
    if tokenizer is not None:
        named = zip(sources, opened, strict=True)
        opened = [with_tokenizer(source.data, one, tokenizer) for source, one in named]
    _check_alike([source.data for source in sources], opened)
    for source, one in zip(sources, opened, strict=True):
        options |= _fixed_by(source.data, one, options)
    if options["num_tokens"] is None:
        options["num_tokens"] = _least_vocabulary([one.corpus for one in opened])
    spec = _spec_of(opened, options["num_tokens"], options["seq_len"] or _DEFAULT_SEQ_LEN)
    if labels is not None:
        _check_may_have_labels(name, len(opened), pack, spec.seq_len, options["stride"])
    if pack:
        if len(opened) > 1:
            raise ValueError(
                f"pack is for the documents of one source, and {name} is a mixture of "
                f"{len(opened)}: do not pack, or name one"
            )
        parts = _split_documents(opened[0].corpus, spec, num_held_out, overlong)
        return PackedData(name, spec, *parts)
    stride = _check_stride(spec.seq_len, options["stride"])
    datasets = [
        TokenDataset(
            one.corpus,
            spec.seq_len,
            num_tokens=spec.num_tokens,
            mask_id=spec.mask_id,
            stride=stride,
            within_documents=within_documents,
        )
        for one in opened
    ]
    if len(datasets) == 1:
        split = _split(datasets[0], num_held_out, opened[0].num_held_out)
        data = Data(name, spec, *split)
        if labels is not None:
            every = read_labels(os.fspath(labels), name, opened[0], len(datasets[0]), folder)
            data = _with_classes(data, every)
    else:
        weights = [source.weight for source in sources]
        data = Data(name, spec, *_split_mixture(datasets, weights, num_held_out))
    flags = data.held_out.loss_mask(data.held_out_windows)
    if flags is not None and not flags.any():
        raise ValueError(_nothing_counts(data.corpus, "held-out windows"))
    return data


def _check_may_have_labels(
    name: str, num_sources: int, pack: bool, seq_len: int, stride: int | None
) -> None:
    why = None
    if num_sources > 1:
        why = f"{name} is a mixture of {num_sources} sources: name one"
    elif pack:
        why = "documents are packed into rows: do not pack"
    elif stride not in (None, seq_len):
        why = f"windows overlap, with stride {stride} and seq_len {seq_len}: leave stride out"
    if why is not None:
        raise ValueError(f"labels are of windows, and {why}, or leave labels out")


def _with_classes(data: Data, labels: Tensor) -> Data:
    """``labels``: of all windows, of which the first are trained on, and the last held out."""
    held_out = labels[len(labels) - len(data.held_out) :]
    return data._replace(
        spec=data.spec._replace(num_classes=int(labels.max()) + 1),
        train_classes=labels[: len(data.train)],
        held_out_classes=held_out[data.held_out_windows],
    )


def _nothing_counts(corpus: Corpus, where: str) -> str:
    return (
        f"no token in the {where} of {corpus.name} counts in a loss, by its loss mask: hold out "
        "more or fewer, or mend the mask"
    )


def open_sources(
    name: str, *, dtype: str | None, column: str | None, eos_id: int | None, folder: Path | None
) -> tuple[list[MixtureSource], list[Opened]]:
    """The sources of a mixture, or the only one; arguments as of :func:`open_data`."""
    sources = read_mixture(name, folder) or [MixtureSource(name)]
    opened = [
        open_source(
            source.data,
            dtype=source.dtype or dtype,
            column=source.column or column,
            eos_id=eos_id,
            folder=folder,
        )
        for source in sources
    ]
    return sources, opened


def is_all_prepared_text(name: str | os.PathLike[str]) -> bool:
    """Whether all that a ``--data`` names are folders of text of ``nar-kernels prepare``: itself,
    what a glob matches, or the sources of a mixture."""
    sources = read_mixture(os.fspath(name)) or [MixtureSource(os.fspath(name))]
    return all(is_prepared_text(path) for source in sources for path in _paths(source.data))


def is_all_answers(name: str | os.PathLike[str]) -> bool:
    """Whether a ``--data`` names one source, of folders of prompts and answers."""
    name = os.fspath(name)
    return not read_mixture(name) and all(map(has_answers, _paths(name)))


def _paths(name: str) -> list[str]:
    """A path, or what a glob matches."""
    return [name] if os.path.exists(name) else glob.glob(name) or [name]


def _least_vocabulary(corpora: Sequence[Corpus]) -> int:
    """One more than the greatest id, and one for the mask token.

    Raises:
        ValueError: a corpus is too large to be read for this, and nothing is known of it.
    """
    for corpus in corpora:
        if corpus.nbytes > _MAX_VALIDATED and known_scan(corpus) is None:
            raise ValueError(
                f"{corpus.name} has {corpus.nbytes >> 30} GiB, which are not read to find its "
                "greatest id: give num_tokens, the vocabulary and the mask token, or run "
                "`nar-kernels inspect` on it first"
            )

    def greatest() -> int:
        return max(scan(corpus, histogram=False).max_id for corpus in corpora)

    on_first_rank(greatest)  # the others recall it
    return greatest() + 2


def _check_alike(names: Sequence[str], opened: Sequence[Opened]) -> None:
    first = opened[0]
    for name, other in zip(names[1:], opened[1:], strict=True):
        for field in ("render", "image_shape", "own_mask_id", "tokenizer"):
            if getattr(other, field) != getattr(first, field):
                raise ValueError(
                    f"{name} and {names[0]} differ in their {field}: the sources of a mixture hold "
                    "the same kind of sequences, of one tokenizer"
                )


def _fixed_by(name: str, opened: Opened, options: dict[str, Any]) -> dict[str, int]:
    """The options that a source determines; ValueError if others were given."""
    for option, value in opened.fixed.items():
        if options[option] not in (None, value):
            raise ValueError(
                f"{option} is {options[option]}, but that of {name} is always {value}: leave it out"
            )
    return opened.fixed


def _spec_of(opened: Sequence[Opened], num_tokens: int, seq_len: int) -> SequenceSpec:
    first = opened[0]
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}: it must be at least 1")
    return SequenceSpec(
        num_tokens, seq_len, first.render, first.image_shape, first.own_mask_id, first.tokenizer
    )


def _check_stride(seq_len: int, stride: int | None) -> int:
    stride = seq_len if stride is None else stride
    if stride < 1 or seq_len % stride:
        raise ValueError(f"stride is {stride}: it must divide seq_len, which is {seq_len}")
    return stride


def _split(
    windows: TokenDataset, num_held_out: int | None, default: int | None
) -> tuple[TokenDataset, TokenDataset, Tensor]:
    # Training windows may overlap; held-out ones are this many apart, so that they do not.
    apart = windows.seq_len // windows.stride
    if num_held_out is None:
        num_held_out = default or min(_a_tenth(windows), _MAX_HELD_OUT)
    # At least one training window must remain.
    most = (len(windows) - 1) // apart
    if most < 1:
        raise ValueError(
            f"{windows.corpus.name} has {len(windows.corpus)} tokens: too few for two windows of "
            f"seq_len {windows.seq_len}, one to train on and one held out; give more data, or a "
            "shorter seq_len"
        )
    if not 1 <= num_held_out <= most:
        raise ValueError(
            f"num_held_out is {num_held_out}: it must be in [1, {most}], so that one window of "
            f"{windows.corpus.name} that shares no token with them remains to train on"
        )
    train, held_out = windows.split((num_held_out - 1) * apart + 1)
    return train, held_out, torch.arange(0, len(held_out), apart, device="cpu")


def _split_documents(
    corpus: Corpus, spec: SequenceSpec, num_held_out: int | None, overlong: Overlong
) -> tuple[DocumentRange, DocumentRange]:
    ends = corpus.document_ends
    if ends is None:
        raise ValueError(
            f"{corpus.name} does not say where its documents end, so they cannot be packed: give "
            "eos_id, the id that ends each"
        )
    total = len(ends)
    if num_held_out is None:
        num_held_out = min(max(total // 10, 1), _MAX_HELD_OUT)
    if not 1 <= num_held_out < total:
        raise ValueError(
            f"num_held_out is {num_held_out}: {corpus.name} has {total} documents, of which at "
            "least one must be held out and one not"
        )
    whole = DocumentRange(corpus, 0, total, spec.seq_len, spec.num_tokens, spec.mask_id, overlong)
    if overlong == "refuse" and whole.num_longer:
        raise ValueError(
            f"{whole.num_longer} documents of {corpus.name} have more than seq_len "
            f"{spec.seq_len} tokens: give a longer one, or overlong split or truncate"
        )
    first = total - num_held_out
    parts = whole._replace(last=first), whole._replace(first=first)
    for part, what in zip(parts, ("to train on", "held out"), strict=True):
        if not part.spans()[1].any():
            raise ValueError(f"the documents of {corpus.name} that are {what} are empty")
        if not len(part.counted_ids(1)):
            raise ValueError(_nothing_counts(corpus, f"documents {what}"))
    return parts


def _a_tenth(windows: TokenDataset) -> int:
    """Of the windows that do not overlap; at least one."""
    return max(len(windows) * windows.stride // windows.seq_len // 10, 1)


def _split_mixture(
    datasets: Sequence[TokenDataset], weights: Sequence[float], num_held_out: int | None
) -> tuple[Mixture, TokenDataset, Tensor]:
    whole = Mixture(datasets, weights)
    parts: list[TokenDataset] = []
    starts: list[Tensor] = []
    if num_held_out is None:  # as many as leave each source nine tenths
        tenths = zip(datasets, whole.shares, strict=True)
        num_held_out = min(_MAX_HELD_OUT, *(int(_a_tenth(d) / share) for d, share in tenths))
    counts = apportion(num_held_out, whole.shares)
    for dataset, count, offset in zip(datasets, counts, whole.offsets, strict=True):
        train, held_out, chosen = _split(dataset, max(count, 1), None)
        parts.append(train)
        starts.append(held_out.starts(chosen) + offset)
    mixture = Mixture(parts, weights)
    held_out = datasets[0].at(mixture.corpus, torch.cat(starts))
    return mixture, held_out, torch.arange(len(held_out), device="cpu")
