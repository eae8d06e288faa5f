"""Clean windows of a corpus: :class:`TokenDataset`.

Shapes: B batch, L sequence length (``seq_len``), T corpus length in tokens, N windows.
"""

import copy
import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from numpy.typing import DTypeLike
from torch import Tensor
from torch.utils.data import Dataset

from nar_kernels.checks import as_int
from nar_kernels.data.corpus import Corpus, Source
from nar_kernels.data.scan import CorpusScan, find_bad, known_scan, scan
from nar_kernels.errors import InvalidTokenError
from nar_kernels.ops.masking import check_vocabulary
from nar_kernels.ops.scan import Covered
from nar_kernels.ops.windows import windows


class TokenDataset(Dataset[Tensor]):
    """Windows of exactly ``seq_len`` clean token ids, for ``torch.utils.data.DataLoader``.

    Window ``i`` is ``tokens[i * stride : i * stride + seq_len]`` as int64 ``[L]``. There are
    ``N = (T - seq_len) // stride + 1`` of them, none padded; a tail too short for one is dropped.

    Args:
        source: a path, an array or a tensor: see :class:`~nar_kernels.data.corpus.Corpus`.
        seq_len: L, at least 1.
        num_tokens: V, the number of embedding rows, in [2, 2**31).
        mask_id: the mask token, in [0, V). Clean data must not contain it.
        stride: tokens from one window's start to the next, at least 1. Default: ``seq_len``.
        dtype: dtype of the ids in a raw file, such as ``"uint16"``. See ``Corpus``.
        validate: check every fetched window. If false, invalid ids are replaced by 0 (1 if
            ``mask_id`` is 0), so that embedding lookups stay in bounds.

    Attributes:
        corpus: the :class:`Corpus`.
        phase: corpus offset of window 0: 0, except for windows held out by ``split``.

    Raises:
        CorpusFormatError, FileNotFoundError: the corpus cannot be read.
        ValueError: an argument is out of range, or the corpus is shorter than a window.
        InvalidTokenError: (on fetching) a token id is outside [0, V), or is ``mask_id``.
        IndexError: (on fetching) an index is outside [-N, N).
    """

    def __init__(
        self,
        source: Source,
        seq_len: int,
        *,
        num_tokens: int,
        mask_id: int,
        stride: int | None = None,
        dtype: DTypeLike | torch.dtype | None = None,
        validate: bool = True,
    ) -> None:
        num_tokens, mask_id = as_int("num_tokens", num_tokens), as_int("mask_id", mask_id)
        check_vocabulary(num_tokens, mask_id)
        seq_len = as_int("seq_len", seq_len)
        stride = seq_len if stride is None else as_int("stride", stride)
        for name, value in (("seq_len", seq_len), ("stride", stride)):
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        self.corpus = Corpus(source, dtype=dtype)
        if len(self.corpus) < seq_len:
            raise ValueError(
                f"{self.corpus.name} has {len(self.corpus)} tokens, less than one window of "
                f"seq_len {seq_len}"
            )
        self.seq_len, self.stride = seq_len, stride
        self.num_tokens, self.mask_id = num_tokens, mask_id
        self.validate = validate
        self.phase = 0
        self._num_windows = (len(self.corpus) - seq_len) // stride + 1

    def __len__(self) -> int:
        """N, the number of windows."""
        return self._num_windows

    def starts(self, indices: Tensor | Sequence[int]) -> Tensor:
        """int64 ``[B]``: corpus offsets of the windows with these indices; on the device of
        ``indices`` if that is a tensor.

        Raises:
            IndexError: an index is outside [-N, N).
            TypeError: an index is not an integer.
        """
        if isinstance(indices, Tensor):
            if indices.is_floating_point() or indices.dtype == torch.bool:
                raise TypeError(f"window indices are {indices.dtype}: they must be integers")
            index = indices.to(torch.int64)
        else:
            numbers = [as_int("window index", i) for i in indices]
            index = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        outside = (index < -len(self)) | (index >= len(self))
        if outside.any():
            raise IndexError(
                f"window index {index[outside][0].item()} is outside [-{len(self)}, {len(self)})"
            )
        return self.phase + index.remainder(len(self)) * self.stride

    def __getitem__(self, index: SupportsIndex) -> Tensor:
        """int64 ``[L]``: one window."""
        return self.__getitems__([operator.index(index)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """Batched fetch for DataLoader: int64 ``[L]`` windows, rows of one ``[B, L]`` tensor."""
        return list(self.windows(indices))

    def windows(self, indices: Tensor | Sequence[int]) -> Tensor:
        """int64 ``[B, L]``: the windows with these indices."""
        stream = self.corpus.stream
        return windows(
            stream.flat,
            self.starts(indices),
            self.seq_len,
            runs=stream.runs,
            num_tokens=self.num_tokens,
            mask_id=self.mask_id,
            validate=self.validate,
            source=self.corpus.name,
        )

    def split(self, num_held_out: int) -> tuple["TokenDataset", "TokenDataset"]:
        """``(train, held_out)``: the last ``num_held_out`` windows are kept for evaluation.

        The two share the corpus but no token. If windows overlap (``stride < seq_len``), those that
        reach into the first held-out window belong to neither; so
        ``len(train) == N - num_held_out - (ceil(seq_len / stride) - 1)``.

        Raises:
            ValueError: either side would be empty.
        """
        num_held_out = as_int("num_held_out", num_held_out)
        dropped = -(-self.seq_len // self.stride) - 1
        num_train = len(self) - num_held_out - dropped
        if num_held_out < 1 or num_train < 1:
            raise ValueError(
                f"num_held_out is {num_held_out}: of {len(self)} windows, at least 1 must be held "
                f"out and at least {dropped + 1} not, so that one training window shares no token "
                "with them"
            )
        train, held_out = copy.copy(self), copy.copy(self)
        train._num_windows = num_train
        held_out._num_windows = num_held_out
        held_out.phase = self.phase + (len(self) - num_held_out) * self.stride
        return train, held_out

    def validate_all(self) -> None:
        """Checks every token that a window covers, on all threads of PyTorch.

        What a corpus in files holds is remembered in a cache folder (docs/data.md), so that it is
        read once, unless it has bad ids.

        Raises:
            InvalidTokenError: with the lowest offset of a bad id, and how many there are.
        """
        end = self.phase + (len(self) - 1) * self.stride + self.seq_len
        known = self._known_scan(end)
        if known is not None and known.is_valid(self.num_tokens, self.mask_id):
            return
        # The bad ids may be where no window is.
        bad = find_bad(
            self.corpus,
            num_tokens=self.num_tokens,
            mask_id=self.mask_id,
            start=self.phase,
            stop=end,
            covered=Covered(self.phase, self.stride, self.seq_len),
        )
        if bad.count:
            offset = bad.offsets[0]
            raise InvalidTokenError.at(
                f"offset {offset} of {self.corpus.name}",
                token_id=int(self.corpus.read(offset, offset + 1)),
                offset=offset,
                count=bad.count,
                num_tokens=self.num_tokens,
                mask_id=self.mask_id,
            )

    def _known_scan(self, end: int) -> CorpusScan | None:
        """A scan of the corpus that is remembered, or is made now and will be."""
        if self.corpus.stream.layouts and end - self.phase > len(self.corpus) // 2:
            # If mask_id is the last id, as usual, the greatest id says whether it occurs.
            return scan(self.corpus, histogram=self.mask_id < self.num_tokens - 1)
        return known_scan(self.corpus)
