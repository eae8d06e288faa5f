"""Clean windows of a corpus, and keyed permutations: operations without a GPU kernel.

Shapes: B batch, L sequence length (``seq_len``), V vocabulary (``num_tokens``), T corpus tokens.
"""

import torch
from torch import Tensor

from nar_kernels.errors import InvalidTokenError
from nar_kernels.ops.backends import cpp, resolve_backend
from nar_kernels.ops.dispatch import host_address
from nar_kernels.ops.reference import windows_ref
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
    num_tokens: int,
    mask_id: int,
    validate: bool = True,
    source: str = "tokens",
    backend: str = "auto",
) -> Tensor:
    """Clean windows of a flat corpus, checked against the vocabulary.

    Args:
        tokens: ``[T]``, any integer dtype of :data:`TOKEN_DTYPES`.
        starts: int64 ``[B]`` in [0, T - L].
        seq_len: L, at least 1.
        num_tokens, mask_id: valid ids are [0, ``num_tokens``) without ``mask_id``.
        validate: raise on bad ids; otherwise they are replaced by a valid one (0, or 1 if
            ``mask_id`` is 0).
        source: what errors call the corpus.

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
    out, record = read(tokens, starts, seq_len, num_tokens, mask_id)
    count, offset, token_id = record.tolist()
    if count and validate:
        raise InvalidTokenError.at(
            f"offset {offset} of {source}",
            token_id=token_id,
            offset=offset,
            count=count,
            num_tokens=num_tokens,
            mask_id=mask_id,
        )
    return out


def _windows_cpp(
    tokens: Tensor, starts: Tensor, seq_len: int, num_tokens: int, mask_id: int
) -> tuple[Tensor, Tensor]:
    """As ``windows_ref``."""
    assert cpp is not None
    tokens = tokens.contiguous()
    out = torch.empty((starts.shape[0], seq_len), dtype=torch.int64, device="cpu")
    record = torch.empty(3, dtype=torch.int64, device="cpu")
    cpp.windows(
        host_address(tokens),
        DTYPE_CODE[tokens.dtype],
        tokens.numel(),
        host_address(starts),
        *out.shape,
        num_tokens,
        mask_id,
        host_address(out),
        host_address(record),
    )
    return out, record


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
