"""Clean windows of a corpus, and keyed permutations: operations without a GPU kernel.

Shapes: B batch, L sequence length (``seq_len``), V vocabulary (``num_tokens``), T corpus tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nar_kernels.errors import InvalidTokenError
from nar_kernels.ops.backends import cpp, resolve_backend
from nar_kernels.ops.dispatch import host_address
from nar_kernels.ops.reference import gather_ref, windows_ref
from nar_kernels.ops.tokens import DTYPE_CODE, check_ids, check_token_dtype
from nar_kernels.spec.philox import Stream, signed_seed
from nar_kernels.spec.philox import permute as permute_ref

# Backends of operations without a GPU kernel.
_ON_CPU = ("reference", "cpp")


def windows(
    tokens: Tensor,
    starts: Tensor,
    seq_len: int,
    *,
    runs: Tensor | None = None,
    num_tokens: int,
    mask_id: int,
    validate: bool = True,
    where: Callable[[int], str] = "offset {} of tokens".format,
    backend: str = "auto",
) -> Tensor:
    """Clean windows of a flat corpus, checked against the vocabulary.

    Args:
        tokens, runs: as in :class:`~nar_kernels.ops.arguments.CorruptArgs`.
        starts: int64 ``[B]`` in [0, T - L].
        seq_len: L, at least 1.
        num_tokens, mask_id: valid ids are [0, ``num_tokens``) without ``mask_id``.
        validate: raise on bad ids; otherwise they are replaced by a valid one (0, or 1 if
            ``mask_id`` is 0).
        where: what errors call an offset of the corpus.

    Returns:
        int64 ``[B, L]``.

    Raises:
        InvalidTokenError: with ``offset`` into the corpus.
        IndexError: a window reaches outside the corpus.
    """
    check_token_dtype(tokens.dtype)
    starts = check_ids("starts", starts, tokens.device)
    is_cpp = resolve_backend(backend, tokens.device, _ON_CPU) == "cpp"
    read = _windows_cpp if is_cpp else windows_ref
    out, record = read(tokens, runs, starts, seq_len, num_tokens, mask_id)
    count, offset, token_id = record.tolist()
    if count and validate:
        raise InvalidTokenError.at(
            where(offset),
            token_id=token_id,
            offset=offset,
            count=count,
            num_tokens=num_tokens,
            mask_id=mask_id,
        )
    return out


def _windows_cpp(
    tokens: Tensor,
    runs: Tensor | None,
    starts: Tensor,
    seq_len: int,
    num_tokens: int,
    mask_id: int,
) -> tuple[Tensor, Tensor]:
    """As ``windows_ref``."""
    assert cpp is not None
    out = torch.empty((starts.shape[0], seq_len), dtype=torch.int64, device="cpu")
    record = torch.empty(3, dtype=torch.int64, device="cpu")
    source = _source(tokens.contiguous(), runs, starts)
    cpp.windows(*source, *out.shape, num_tokens, mask_id, host_address(out), host_address(record))
    return out, record


def _source(tokens: Tensor, runs: Tensor | None, starts: Tensor) -> tuple[int, ...]:
    """A corpus and the starts of windows, as the C++ extension takes them."""
    where = (host_address(tokens), DTYPE_CODE[tokens.dtype], tokens.numel())
    lies = (0, 0) if runs is None else (host_address(runs), runs.shape[1] - 1)
    return *where, *lies, host_address(starts)


def gather(
    tokens: Tensor,
    runs: Tensor | None,
    starts: Tensor,
    seq_len: int,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Copies windows of a corpus, not checked, to ``[B, L]`` in its own dtype.

    Args:
        tokens, runs, starts, seq_len: as in :func:`windows`.
        out: where to, contiguous.

    Raises:
        IndexError: a window reaches outside the corpus.
    """
    starts = check_ids("starts", starts, tokens.device)
    if resolve_backend(backend, tokens.device, _ON_CPU) == "reference":
        copied = gather_ref(tokens, runs, starts, seq_len)
        return copied if out is None else out.copy_(copied)
    assert cpp is not None
    if out is None:
        out = torch.empty((starts.shape[0], seq_len), dtype=tokens.dtype, device="cpu")
    source = _source(tokens.contiguous(), runs, starts)
    cpp.gather(*source, *out.shape, 0, host_address(out), torch.get_num_threads())
    return out


def gather_ragged(
    tokens: Tensor,
    runs: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Copies parts of a corpus, not checked, one after the other: ``[sum(lengths)]`` in its dtype.

    Args:
        tokens, runs, starts: as in :func:`windows`.
        lengths: int64 ``[B]``.

    Raises:
        IndexError: a part reaches outside the corpus.
    """
    starts = check_ids("starts", starts, tokens.device)
    if resolve_backend(backend, tokens.device, _ON_CPU) == "reference":
        parts = [
            gather_ref(tokens, runs, start, length)[0]
            for start, length in zip(starts.split(1), lengths.tolist(), strict=True)
        ]
        return torch.cat(parts) if parts else tokens.new_empty(0)
    assert cpp is not None
    last = lengths.new_zeros(1)
    begins, counts = torch.cat([last, lengths.cumsum(0)]), torch.cat([lengths, last])
    spans = torch.stack([begins, counts, counts])
    out = torch.empty(int(begins[-1]), dtype=tokens.dtype, device="cpu")
    source = _source(tokens.contiguous(), runs, starts)
    where = host_address(spans), host_address(out)
    cpp.gather(*source, len(starts), 1, *where, torch.get_num_threads())
    return out


def read_ahead(tokens: Tensor, runs: Tensor | None, starts: Tensor, seq_len: int) -> None:
    """Asks the system to read the pages of these windows of a memory-mapped corpus, in the order in
    which they lie, and returns at once. Without the C++ extension, it does nothing.

    Args:
        tokens, runs, starts, seq_len: as in :func:`windows`.
    """
    if cpp is not None:
        starts = check_ids("starts", starts, tokens.device)
        cpp.read_ahead(*_source(tokens, runs, starts), starts.shape[0], seq_len)


def permute(
    index: Tensor, n: int, *, seed: int, stream: Stream, round: int, backend: str = "auto"
) -> Tensor:
    """Where a keyed random permutation of ``[0, n)`` sends each index; O(1) memory.

    Args and result as in :func:`nar_kernels.spec.philox.permute`; ``index`` is int64, any shape.
    """
    if resolve_backend(backend, index.device, _ON_CPU) == "reference":
        return permute_ref(index, n, seed=seed, stream=stream, round=round)
    assert cpp is not None
    index = index.contiguous()
    out = torch.empty_like(index)
    cpp.permute(
        host_address(index), index.numel(), n, signed_seed(seed), stream, round, host_address(out)
    )
    return out
