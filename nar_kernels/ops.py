"""The public operations: all checks, registration with ``torch.library``, dispatch to a backend.

Shapes: B batch, L sequence length (``seq_len``), V vocabulary (``num_tokens``), T corpus tokens.
"""

import struct
from typing import Any

import torch
from torch import Tensor

from nar_kernels.backends import cpp, resolve_backend
from nar_kernels.corpus import TOKEN_DTYPES as _DTYPES
from nar_kernels.errors import InvalidTokenError
from nar_kernels.masking import NUM_INVALID, Corrupted, MaskingConfig
from nar_kernels.philox import Stream
from nar_kernels.philox import permute as permute_ref
from nar_kernels.reference import corrupt_ref, windows_ref

# In the order of the codes that the C++ side switches on.
TOKEN_DTYPES = tuple(_DTYPES.values())
_DTYPE_CODE = {dtype: code for code, dtype in enumerate(TOKEN_DTYPES)}

# What has no kernel on a GPU: the host does it there.
_ON_CPU = ("reference", "cpp")

_lib = torch.library.Library("nar_kernels", "DEF")
_lib.define(
    "corrupt(Tensor tokens, Tensor? starts, SymInt seq_len, int num_tokens, int mask_id,"
    " Tensor? sample_ids, Tensor? maskable, Tensor ratio_table, Tensor weight_table,"
    " Tensor? never_mask, int seed, int global_batch, bool exact, bool stratified,"
    " int keep_share, int random_share, int coin_share, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _num_windows(tokens: Tensor, starts: Tensor | None) -> int:
    return tokens.shape[0] if starts is None else starts.shape[0]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _empty_outputs(batch: int, seq_len: int, device: torch.device) -> tuple[Tensor, ...]:
    ids = torch.empty((batch, seq_len), dtype=torch.int64, device=device)
    masked = torch.empty((batch, seq_len), dtype=torch.bool, device=device)
    times = torch.empty(batch, dtype=torch.float32, device=device)
    counts = torch.empty(batch, dtype=torch.int64, device=device)
    row_buffer = torch.empty(batch * seq_len, dtype=torch.int64, device=device)
    # In the order of Corrupted, without `invalid`. (empty_like takes half the time of empty.)
    labels, weight, num_maskable = map(torch.empty_like, (ids, times, counts))
    return ids, labels, masked, times, weight, counts, num_maskable, row_buffer


_pack = struct.Struct("=30q").pack


def _packed_corrupt(
    outputs: tuple[Tensor, ...],
    tokens: Tensor,
    starts: Tensor | None,
    seq_len: int,
    num_tokens: int,
    mask_id: int,
    sample_ids: Tensor | None,
    maskable: Tensor | None,
    ratio_table: Tensor,
    weight_table: Tensor,
    never_mask: Tensor | None,
    seed: int,
    *scalars: int,
) -> bytes:
    """The arguments as C++ reads them (`unpack_corrupt` in csrc/bindings.h)."""
    return _pack(
        tokens.data_ptr(),
        _DTYPE_CODE[tokens.dtype],
        tokens.numel(),
        _address(starts),
        outputs[0].shape[0],
        seq_len,
        num_tokens,
        mask_id,
        _address(sample_ids),
        _address(maskable),
        ratio_table.data_ptr(),
        weight_table.data_ptr(),
        _address(never_mask),
        seed,
        0,
        *scalars,
        *[t.data_ptr() for t in outputs],
    )


def _corrupt_cpp(
    tokens: Tensor, starts: Tensor | None, seq_len: int, *rest: Any
) -> tuple[Tensor, ...]:
    assert cpp is not None
    invalid = torch.empty(NUM_INVALID, dtype=torch.int64)
    outputs = (*_empty_outputs(_num_windows(tokens, starts), seq_len, tokens.device), invalid)
    cpp.corrupt(_packed_corrupt(outputs, tokens, starts, seq_len, *rest), torch.get_num_threads())
    return outputs


def _corrupt_triton(
    tokens: Tensor, starts: Tensor | None, seq_len: int, *rest: Any
) -> tuple[Tensor, ...]:
    from nar_kernels.kernels.corrupt import corrupt_triton, workspace_size

    batch = _num_windows(tokens, starts)
    outputs = _empty_outputs(batch, seq_len, tokens.device)
    workspace = torch.zeros(workspace_size(batch), dtype=torch.int64, device=tokens.device)
    corrupt_triton((*outputs, workspace), tokens, starts, seq_len, *rest)
    return *outputs, workspace[:NUM_INVALID]


_CORRUPT = {"cpp": _corrupt_cpp, "triton": _corrupt_triton, "reference": corrupt_ref}


def _corrupt_impl(*args: Any) -> tuple[Tensor, ...]:
    *inputs, backend = args
    return _CORRUPT[backend](*inputs)


def _corrupt_fake(
    tokens: Tensor, starts: Tensor | None, seq_len: int, *_: Any
) -> tuple[Tensor, ...]:
    outputs = _empty_outputs(_num_windows(tokens, starts), seq_len, tokens.device)
    return *outputs, torch.empty(NUM_INVALID, dtype=torch.int64, device=tokens.device)


_lib.impl("corrupt", _corrupt_impl, "CompositeExplicitAutograd")
torch.library.register_fake("nar_kernels::corrupt", _corrupt_fake, lib=_lib)
_corrupt_op = torch.ops.nar_kernels.corrupt.default


def _int64(seed: int) -> int:
    """A 64-bit seed as the signed integer with the same bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _check_ids(name: str, ids: Tensor, like: Tensor) -> Tensor:
    if ids.dim() != 1 or ids.dtype != torch.int64:
        raise ValueError(f"{name} must be int64 [B]; got {ids.dtype} {list(ids.shape)}")
    if ids.device != like.device:
        raise ValueError(f"{name} is on {ids.device} but tokens are on {like.device}")
    return ids.contiguous()


def check_token_dtype(dtype: torch.dtype, what: str = "tokens") -> None:
    """Raises TypeError unless ``dtype`` is one of :data:`TOKEN_DTYPES`."""
    if dtype not in _DTYPE_CODE:
        raise TypeError(f"{what} have dtype {dtype}: token ids must be one of {', '.join(_DTYPES)}")


def corrupt(
    tokens: Tensor,
    masking: MaskingConfig,
    *,
    seed: int,
    starts: Tensor | None = None,
    seq_len: int | None = None,
    sample_ids: Tensor | None = None,
    global_batch: int | None = None,
    maskable: Tensor | None = None,
    source: str = "tokens",
    backend: str = "auto",
) -> Corrupted:
    """Extracts windows, checks them, draws masks at a ratio per sample, and makes the labels.

    A pure function of its arguments: the same sample slot and seed give the same mask whatever the
    batch, the device, the backend or the number of threads.

    Args:
        tokens: clean ids, ``[B, L]``; or a flat corpus ``[T]`` with ``starts`` and ``seq_len``.
            Any of uint8, int8, uint16, int16, uint32, int32, int64.
        masking: how to mask.
        seed: 64-bit integer key of all randomness.
        starts: int64 ``[B]``, first token of each window of a flat corpus, in [0, T - L].
        seq_len: L, for a flat corpus.
        sample_ids: int64 ``[B]``, global sample slots, at least 0: ``step * global_batch + j``.
            Default: ``0 .. B - 1``. The slot picks the noise, so do not reuse slots under one seed.
        global_batch: how many consecutive slots share one stratification of times. Default: B.
        maskable: bool ``[B, L]``, positions that may be masked. Default: all.
        source: what errors call the flat corpus, such as its path.
        backend: ``"auto"``, or one of :func:`nar_kernels.backends`.

    Returns:
        A :class:`Corrupted`. ``input_ids`` and ``labels`` are int64.

    Raises:
        InvalidTokenError: an id outside [0, V), or equal to ``mask_id``.
        IndexError: a window reaches outside the corpus.
        TypeError, ValueError: wrong dtypes, shapes or devices, a negative sample slot.

    Values are checked on the device. On the CPU these errors come at once; elsewhere, where to look
    at them would stall the device, when ``raise_if_invalid()`` is called on the result.
    """
    check_token_dtype(tokens.dtype)
    if starts is None:
        if tokens.dim() != 2:
            raise ValueError(
                f"tokens have shape {list(tokens.shape)}: pass [B, L], or a flat corpus [T] with "
                "starts and seq_len"
            )
        batch, length = tokens.shape
        if seq_len is not None and seq_len != length:
            raise ValueError(f"seq_len is {seq_len} but tokens have length {length}")
    else:
        if tokens.dim() != 1 or seq_len is None:
            raise ValueError("with starts, tokens must be a flat corpus [T] and seq_len given")
        starts, length = _check_ids("starts", starts, tokens), seq_len
        if starts.shape[0] and tokens.shape[0] < seq_len:
            raise IndexError(
                f"a window of seq_len {seq_len} reaches outside the corpus of {tokens.shape[0]} "
                "tokens"
            )
        batch = starts.shape[0]
    if length < 1:
        raise ValueError(f"seq_len is {length}: a window has at least one token")
    if sample_ids is not None:
        sample_ids = _check_ids("sample_ids", sample_ids, tokens)
        if sample_ids.shape[0] != batch:
            raise ValueError(f"there are {batch} windows but {sample_ids.shape[0]} sample_ids")
    if global_batch is None:
        global_batch = max(batch, 1)
    if not 1 <= global_batch < 1 << 32:
        raise ValueError(f"global_batch is {global_batch}: it must be in [1, 2**32)")
    if maskable is not None:
        if maskable.dtype != torch.bool or maskable.shape != (batch, length):
            raise ValueError(
                f"maskable must be bool [{batch}, {length}]; got {maskable.dtype} "
                f"{list(maskable.shape)}"
            )
        if maskable.device != tokens.device:
            raise ValueError(f"maskable is on {maskable.device} but tokens are on {tokens.device}")
        maskable = maskable.contiguous()

    outputs = _corrupt_op(
        tokens.contiguous(),
        starts,
        length,
        masking.num_tokens,
        masking.mask_id,
        sample_ids,
        maskable,
        *masking.tables(tokens.device),
        _int64(seed),
        global_batch,
        masking.exact,
        masking.stratified,
        *masking.shares,
        resolve_backend(backend, tokens.device),
    )
    corrupted = Corrupted(*outputs, masking)  # type: ignore[call-arg]
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        corrupted.raise_if_invalid(None if starts is None else source)
    return corrupted


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
    starts = _check_ids("starts", starts, tokens)
    if resolve_backend(backend, tokens.device, _ON_CPU) == "cpp":
        assert cpp is not None
        tokens = tokens.contiguous()
        out = torch.empty((starts.shape[0], seq_len), dtype=torch.int64)
        record = torch.empty(3, dtype=torch.int64)
        cpp.windows(
            tokens.data_ptr(),
            _DTYPE_CODE[tokens.dtype],
            tokens.numel(),
            starts.data_ptr(),
            *out.shape,
            num_tokens,
            mask_id,
            out.data_ptr(),
            record.data_ptr(),
        )
    else:
        out, record = windows_ref(tokens, starts, seq_len, num_tokens, mask_id)
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


def permute(
    index: Tensor, n: int, *, seed: int, stream: Stream, round: int, backend: str = "auto"
) -> Tensor:
    """Where a keyed random permutation of ``[0, n)`` sends each index; O(1) memory.

    Args and result as in :func:`nar_kernels.philox.permute`; ``index`` is int64, any shape.
    """
    if resolve_backend(backend, index.device, _ON_CPU) == "reference":
        return permute_ref(index, n, seed=seed, stream=stream, round=round)
    assert cpp is not None
    index = index.contiguous()
    out = torch.empty_like(index)
    cpp.permute(index.data_ptr(), index.numel(), n, _int64(seed), stream, round, out.data_ptr())
    return out
