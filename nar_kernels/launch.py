"""From tensors to kernels: allocates outputs and calls a backend, as ``torch.library`` operators.

Arguments have been checked in ``ops.py``.
"""

import struct
from typing import Any

import torch
from torch import Tensor

from nar_kernels.backends import cpp, cuda
from nar_kernels.corpus import TOKEN_DTYPES
from nar_kernels.masking import NUM_INVALID
from nar_kernels.reference import corrupt_ref

# The codes that the C++ side switches on.
DTYPE_CODE = {dtype: code for code, dtype in enumerate(TOKEN_DTYPES.values())}

_lib = torch.library.Library("nar_kernels", "DEF")
_lib.define(
    "corrupt(Tensor tokens, Tensor? starts, SymInt seq_len, int num_tokens, int mask_id,"
    " Tensor? sample_ids, Tensor? maskable, Tensor ratio_table, Tensor weight_table,"
    " Tensor? never_mask, int seed, Tensor? seed_tensor, int global_batch, bool exact,"
    " bool stratified, int keep_share, int random_share, int coin_share, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _num_windows(tokens: Tensor, starts: Tensor | None) -> int:
    return tokens.shape[0] if starts is None else starts.shape[0]


def _device(tokens: Tensor, starts: Tensor | None) -> torch.device:
    """Where the kernel runs: a flat corpus may lie in pinned memory of the host."""
    return tokens.device if starts is None else starts.device


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
    seed_tensor: Tensor | None,
    *scalars: int,
) -> bytes:
    """The arguments as C++ reads them (`unpack_corrupt` in csrc/bindings.h)."""
    return _pack(
        tokens.data_ptr(),
        DTYPE_CODE[tokens.dtype],
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
        _address(seed_tensor),
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


def _corrupt_cuda(
    tokens: Tensor, starts: Tensor | None, seq_len: int, *rest: Any
) -> tuple[Tensor, ...]:
    assert cuda is not None
    batch, device = _num_windows(tokens, starts), _device(tokens, starts)
    workspace = torch.empty(cuda.workspace_size(batch), dtype=torch.int64, device=device)
    outputs = (*_empty_outputs(batch, seq_len, device), workspace)
    packed = _packed_corrupt(outputs, tokens, starts, seq_len, *rest)
    if device.type == "cuda":
        cuda.corrupt(packed, device.index, torch._C._cuda_getCurrentRawStream(device.index))
    else:
        cuda.corrupt(packed, 0, 0)
    return *outputs[:-1], workspace[:NUM_INVALID]


def _corrupt_triton(
    tokens: Tensor, starts: Tensor | None, seq_len: int, *rest: Any
) -> tuple[Tensor, ...]:
    from nar_kernels.kernels.corrupt import corrupt_triton, workspace_size

    batch, device = _num_windows(tokens, starts), _device(tokens, starts)
    outputs = _empty_outputs(batch, seq_len, device)
    workspace = torch.zeros(workspace_size(batch), dtype=torch.int64, device=device)
    corrupt_triton((*outputs, workspace), tokens, starts, seq_len, *rest)
    return *outputs, workspace[:NUM_INVALID]


_CORRUPT = {
    "reference": corrupt_ref,
    "cpp": _corrupt_cpp,
    "triton": _corrupt_triton,
    "cuda": _corrupt_cuda,
}


def _corrupt_impl(*args: Any) -> tuple[Tensor, ...]:
    tokens, starts, *inputs, backend = args
    device = _device(tokens, starts)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # launches go to the current device
            return _CORRUPT[backend](tokens, starts, *inputs)
    return _CORRUPT[backend](tokens, starts, *inputs)


def _corrupt_fake(
    tokens: Tensor, starts: Tensor | None, seq_len: int, *_: Any
) -> tuple[Tensor, ...]:
    device = _device(tokens, starts)
    outputs = _empty_outputs(_num_windows(tokens, starts), seq_len, device)
    return *outputs, torch.empty(NUM_INVALID, dtype=torch.int64, device=device)


_lib.impl("corrupt", _corrupt_impl, "CompositeExplicitAutograd")
torch.library.register_fake("nar_kernels::corrupt", _corrupt_fake, lib=_lib)
corrupt_op = torch.ops.nar_kernels.corrupt.default
