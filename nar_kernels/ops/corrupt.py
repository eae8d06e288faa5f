"""The public operations: all checks, and the choice of a backend.

Shapes: B batch, L sequence length (``seq_len``), V vocabulary (``num_tokens``), T corpus tokens.
"""

import torch
from torch import Tensor

from nar_kernels.checks import as_int
from nar_kernels.errors import InvalidTokenError
from nar_kernels.ops.arguments import TOKEN_DTYPES as _DTYPES
from nar_kernels.ops.arguments import CorruptArgs, WindowOrder
from nar_kernels.ops.backends import cpp, resolve_backend
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.dispatch import DTYPE_CODE, host_address, run_corrupt
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.ops.reference import windows_ref
from nar_kernels.spec.philox import Stream
from nar_kernels.spec.philox import permute as permute_ref

TOKEN_DTYPES = tuple(DTYPE_CODE)

# Backends of operations without a GPU kernel.
_ON_CPU = ("reference", "cpp")


def signed_seed(seed: int) -> int:
    """A 64-bit seed as the signed integer with the same bits."""
    return (as_int("seed", seed) + (1 << 63)) % (1 << 64) - (1 << 63)


def _check_ids(name: str, ids: Tensor, device: torch.device) -> Tensor:
    if ids.dim() != 1 or ids.dtype != torch.int64:
        raise ValueError(f"{name} must be int64 [B]; got {ids.dtype} {list(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"{name} is on {ids.device} but tokens are on {device}")
    return ids.contiguous()


def _check_starts(starts: Tensor, tokens: Tensor) -> Tensor:
    if starts.is_cuda and tokens.device.type == "cpu":
        if not tokens.is_pinned():
            raise ValueError(
                f"starts is on {starts.device} but tokens are on the CPU, in memory that a GPU "
                "cannot read: use tokens.pin_memory(), or move either"
            )
        return _check_ids("starts", starts, starts.device)
    return _check_ids("starts", starts, tokens.device)


def _batch_shape(tokens: Tensor, seq_len: int | None) -> tuple[int, int]:
    """B and L of a batch ``[B, L]``."""
    if tokens.dim() != 2:
        raise ValueError(
            f"tokens have shape {list(tokens.shape)}: pass [B, L], or a flat corpus [T] with "
            "starts and seq_len"
        )
    batch, length = tokens.shape
    if seq_len is not None and seq_len != length:
        raise ValueError(f"seq_len is {seq_len} but tokens have length {length}")
    return batch, length


def _check_windows(tokens: Tensor, starts: Tensor, seq_len: int | None) -> tuple[Tensor, int]:
    """Starts and L of windows of a flat corpus."""
    if tokens.dim() != 1 or seq_len is None:
        raise ValueError("with starts, tokens must be a flat corpus [T] and seq_len given")
    starts = _check_starts(starts, tokens)
    if starts.shape[0] and tokens.shape[0] < seq_len:
        raise IndexError(
            f"a window of seq_len {seq_len} reaches outside the corpus of {tokens.shape[0]} tokens"
        )
    return starts, seq_len


def _check_maskable(maskable: object, shape: tuple[int, int], device: torch.device) -> Tensor:
    wanted = f"[{shape[0]}, {shape[1]}]"
    if not isinstance(maskable, Tensor):
        raise TypeError(
            f"maskable is a {type(maskable).__name__}: it must be a bool tensor {wanted}"
        )
    if maskable.dtype != torch.bool or maskable.shape != shape:
        raise ValueError(
            f"maskable must be bool {wanted}; got {maskable.dtype} {list(maskable.shape)}"
        )
    if maskable.device != device:
        raise ValueError(f"maskable is on {maskable.device}, but the kernel runs on {device}")
    return maskable.contiguous()


def _check_scalar(name: str, scalar: Tensor, device: torch.device) -> Tensor:
    if scalar.dtype != torch.int64 or scalar.numel() != 1:
        raise ValueError(
            f"{name} as a tensor must be int64 with one element; got {scalar.dtype} "
            f"{list(scalar.shape)}"
        )
    if scalar.device != device:
        raise ValueError(f"{name} is on {scalar.device}, but the kernel runs on {device}")
    return scalar


def check_token_dtype(dtype: torch.dtype, what: str = "tokens") -> None:
    """Raises TypeError unless ``dtype`` is one of :data:`TOKEN_DTYPES`."""
    if dtype not in DTYPE_CODE:
        raise TypeError(f"{what} have dtype {dtype}: token ids must be one of {', '.join(_DTYPES)}")


def corrupt(
    tokens: Tensor,
    masking: MaskingConfig,
    *,
    seed: int | Tensor,
    starts: Tensor | None = None,
    seq_len: int | None = None,
    sample_ids: Tensor | None = None,
    global_batch: int | None = None,
    maskable: Tensor | None = None,
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

    Values are checked on the device. On the CPU errors are raised at once; on other devices, where
    that would be a sync, by ``raise_if_invalid()`` of the result.
    """
    check_token_dtype(tokens.dtype)
    seq_len = None if seq_len is None else as_int("seq_len", seq_len)
    if starts is None:
        batch, seq_len = _batch_shape(tokens, seq_len)
    else:
        starts, seq_len = _check_windows(tokens, starts, seq_len)
        batch = starts.shape[0]
    if not 1 <= seq_len < 1 << 31:
        raise ValueError(f"seq_len is {seq_len}: it must be in [1, 2**31)")
    device = tokens.device if starts is None else starts.device
    if sample_ids is not None:
        sample_ids = _check_ids("sample_ids", sample_ids, device)
        if sample_ids.shape[0] != batch:
            raise ValueError(f"there are {batch} windows but {sample_ids.shape[0]} sample_ids")
    global_batch = max(batch, 1) if global_batch is None else as_int("global_batch", global_batch)
    if not 1 <= global_batch < 1 << 32:
        raise ValueError(f"global_batch is {global_batch}: it must be in [1, 2**32)")
    if maskable is not None:
        maskable = _check_maskable(maskable, (batch, seq_len), device)

    corrupted = _corrupt(
        masking,
        seed,
        device,
        backend,
        tokens=tokens.contiguous(),
        starts=starts,
        batch=batch,
        seq_len=seq_len,
        sample_ids=sample_ids,
        maskable=maskable,
        global_batch=global_batch,
    )
    if device.type == "cpu" and not torch.compiler.is_compiling():
        corrupted.raise_if_invalid(None if starts is None else source)
    return corrupted


def corrupt_step(
    tokens: Tensor,
    masking: MaskingConfig,
    order: WindowOrder | None,
    *,
    step: int | Tensor,
    batch_size: int,
    rank: int,
    global_batch: int,
    seq_len: int,
    seed: int | Tensor,
    device: torch.device,
    backend: str = "auto",
) -> Corrupted:
    """``corrupt`` for one rank's part of a step: the kernel computes slots and windows itself.

    Args:
        tokens: contiguous, on ``device`` or in pinned memory: the corpus ``[T]``, or, if there is
            no ``order``, the windows ``[B, L]``.
        order: which windows the slots hold.
        step: at least 0; or an int64 tensor of one element on ``device``, which the kernel reads.
        batch_size, rank, global_batch: slots are ``step * global_batch + rank * batch_size + j``
            for j in [0, ``batch_size``).

    Raises nothing for invalid data: the result records it.
    """
    first_sample, step_tensor = rank * batch_size, None
    if isinstance(step, Tensor):
        step_tensor = _check_scalar("step", step, device)
    else:
        first_sample += step * global_batch
    return _corrupt(
        masking,
        seed,
        device,
        backend,
        tokens=tokens,
        batch=batch_size,
        seq_len=seq_len,
        first_sample=first_sample,
        step=step_tensor,
        global_batch=global_batch,
        **({} if order is None else order._asdict()),
    )


def _corrupt(
    masking: MaskingConfig,
    seed: int | Tensor,
    device: torch.device,
    backend: str,
    *,
    tokens: Tensor,
    batch: int,
    seq_len: int,
    global_batch: int,
    starts: Tensor | None = None,
    sample_ids: Tensor | None = None,
    first_sample: int = 0,
    step: Tensor | None = None,
    num_windows: int = 0,
    phase: int = 0,
    stride: int = 0,
    shuffle: bool = False,
    maskable: Tensor | None = None,
) -> Corrupted:
    seed_tensor = None
    if isinstance(seed, Tensor):
        seed_tensor = _check_scalar("seed", seed, device)
        seed = 0
    arguments = CorruptArgs(
        tokens,
        starts,
        batch,
        seq_len,
        masking.num_tokens,
        masking.mask_id,
        sample_ids,
        first_sample,
        step,
        num_windows,
        phase,
        stride,
        shuffle,
        maskable,
        *masking.tables(device),
        signed_seed(seed),
        seed_tensor,
        global_batch,
        masking.exact,
        masking.stratified,
        *masking.shares,
    )
    backend = resolve_backend(backend, device)
    if backend == "reference" and tokens.device != device:
        raise ValueError(f"backend 'reference' reads only tokens on {device}, not pinned ones")
    outputs = run_corrupt(arguments, backend)
    counts = count_on_host(arguments, masking) if device.type == "cuda" else None
    return Corrupted(*outputs, masking, counts)  # type: ignore[call-arg, arg-type]


def count_on_host(a: CorruptArgs, masking: MaskingConfig) -> Tensor | None:
    """int64 ``[B]`` on the CPU: how many positions each row masks, without a sync; None where that
    depends on device memory."""
    on_device = (a.sample_ids, a.step, a.maskable, a.never_mask, a.seed_tensor)
    known = all(tensor is None for tensor in on_device)
    if not known or cpp is None or torch.compiler.is_compiling():
        return None
    counts = torch.empty(a.batch, dtype=torch.int64, device="cpu")
    cpp.count_masked(
        a.batch,
        a.seq_len,
        a.first_sample,
        a.global_batch,
        a.exact,
        a.stratified,
        a.seed,
        host_address(masking.table.ratio),
        host_address(counts),
        torch.get_num_threads(),
    )
    return counts


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
    starts = _check_ids("starts", starts, tokens.device)
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
