"""What ids a corpus holds, in one pass over it: an operation without a GPU kernel.

Shapes: T corpus tokens, L sequence length (``seq_len``), V vocabulary (``num_tokens``).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nar_kernels.ops.backends import cpp, resolve_backend
from nar_kernels.ops.dispatch import host_address
from nar_kernels.ops.reference import scan_ref
from nar_kernels.ops.tokens import DTYPE_CODE, check_token_dtype

_ON_CPU = ("reference", "cpp")


class Scanned(NamedTuple):
    """Attributes:
    least, greatest: of the ids; if there were none, the largest int64, and the smallest.
    outside: how many are not in [0, V).
    masked: how many are ``mask_id``.
    uncounted: how many were to be counted and have no bin.
    places: the lowest offsets of ids that are either, at most ``max_places``, ascending.
    """

    least: int
    greatest: int
    outside: int
    masked: int
    uncounted: int
    places: list[int]


class Covered(NamedTuple):
    """Window i covers ``seq_len`` tokens from ``phase + i * stride`` on."""

    phase: int
    stride: int
    seq_len: int


EVERYTHING = Covered(0, 1, 1)


def scan(
    tokens: Tensor,
    runs: Tensor | None,
    start: int,
    stop: int,
    *,
    covered: Covered = EVERYTHING,
    num_tokens: int | None = None,
    mask_id: int | None = None,
    counts: Tensor | None = None,
    max_places: int = 0,
    backend: str = "auto",
) -> Scanned:
    """Looks at each token once.

    Args:
        tokens, runs: as in :class:`~nar_kernels.ops.arguments.CorruptArgs`, on the CPU.
        start, stop: which tokens of the corpus, 0 <= start <= stop <= T.
        covered: by which windows, whose ``phase`` is at most ``start``. Default: all of those.
        num_tokens: V. Default: all ids that are not negative.
        mask_id: in [0, V). Default: no id is taken for a mask.
        counts: int64 ``[bins]``: how often each id of [0, bins) occurs is added to it. Then it
            takes below 2**32 tokens at a time.
        max_places: how many bad ids to locate.

    Raises:
        IndexError: ``start`` or ``stop`` is outside the corpus.
        ValueError: too many tokens are to be counted.
    """
    check_token_dtype(tokens.dtype)
    length = len(tokens) if runs is None else int(runs[0, -1])
    if not 0 <= start <= stop <= length:
        raise IndexError(f"tokens {start} to {stop} are not all in the corpus, which has {length}")
    if counts is not None and stop - start >= 1 << 32:
        raise ValueError(f"{stop - start} tokens are too many to count: give below 2**32 at a time")
    highest = torch.iinfo(torch.int64).max if num_tokens is None else num_tokens - 1
    mask_id = -1 if mask_id is None else mask_id
    if resolve_backend(backend, tokens.device, _ON_CPU) == "reference":
        found = scan_ref(tokens, runs, start, stop, *covered, highest, mask_id, counts, max_places)
        return Scanned(*found)
    assert cpp is not None
    places = torch.empty(max_places, dtype=torch.int64, device="cpu")
    tokens = tokens.contiguous()  # kept until the kernel is done
    least, greatest, outside, masked, uncounted, num_places = cpp.scan(
        host_address(tokens),
        DTYPE_CODE[tokens.dtype],
        *((0, 0) if runs is None else (host_address(runs), runs.shape[1] - 1)),
        start,
        stop,
        *covered,
        highest,
        mask_id,
        *((0, 0) if counts is None else (len(counts), host_address(counts))),
        max_places,
        host_address(places),
        torch.get_num_threads(),
    )
    located = places[:num_places].tolist()
    return Scanned(least, greatest, outside, masked, uncounted, located)
