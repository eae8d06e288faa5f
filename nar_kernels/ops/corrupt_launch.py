"""The tensors of ``corrupt``: their memory, and the kernel of each backend that fills them."""

import math

import torch
from torch import Tensor

from nar_kernels.ops.arguments import CorruptArgs
from nar_kernels.ops.backends import cpp, cuda
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.dispatch import host_address, needs_dispatcher, on_device, raw_stream, register
from nar_kernels.ops.masking import NUM_INVALID
from nar_kernels.ops.reference import corrupt_ref
from nar_kernels.ops.tokens import DTYPE_CODE

Memory = tuple[Tensor, ...] | None  # of the outputs, to be written again


def memory_of(batch: Corrupted, a: CorruptArgs, device: torch.device) -> tuple[Tensor, ...]:
    """The tensors of a batch, if it can take the outputs of ``a``: kernels trust their sizes."""
    if not isinstance(batch, Corrupted):
        raise TypeError(f"out is a {type(batch).__name__}: it must be a batch of `corrupt`")
    if batch.documents is not None:
        raise ValueError("out is a batch of documents: it must be one of windows")
    tensors = (
        batch.input_ids, batch.labels, batch.masked_indices, batch.times, batch.loss_weight,
        batch.num_masked, batch.num_maskable, batch.row_buffer,
    )  # fmt: skip
    size, rows = math.prod(a.shape), math.prod(a.of_samples)
    ids = torch.int32 if a.narrow else torch.int64
    kinds = (
        (ids, size), (ids, size * a.labels), (torch.bool, size * a.masked_indices),
        (torch.float32, rows), (torch.float32, rows), (torch.int64, rows), (torch.int64, rows),
        (ids, size * a.masked_rows),
    )  # fmt: skip
    memory = tuple(batch.input_ids.new_empty(0) if x is None else x for x in tensors)
    for x, tensor, (dtype, numel) in zip(tensors, memory, kinds, strict=True):
        fits = tensor.numel() == numel and tensor.is_contiguous() and tensor.device == device
        if not fits or (x is not None and x.dtype != dtype):
            raise ValueError(
                f"out is {batch} of {batch.input_ids.dtype}: it must be a whole batch of shape "
                f"{list(a.shape)} and {ids} on {device}, made with the same outputs"
            )
    return memory


def empty_outputs(a: CorruptArgs, device: torch.device) -> tuple[Tensor, ...]:
    """In the order of Corrupted, without ``invalid``; what is not wanted is empty."""
    # Sizes one by one, empty_like and new_empty: they save 6 us in all.
    ids = torch.empty(*a.shape, dtype=torch.int32 if a.narrow else torch.int64, device=device)
    labels = torch.empty_like(ids) if a.labels else ids.new_empty(0)
    masked = torch.empty_like(ids if a.masked_indices else ids.new_empty(0), dtype=torch.bool)
    times = ids.new_empty(*a.of_samples, dtype=torch.float32)
    counts = ids.new_empty(*a.of_samples, dtype=torch.int64)
    row_buffer = ids.new_empty(ids.numel() if a.masked_rows else 0)
    weight, num_maskable = torch.empty_like(times), torch.empty_like(counts)
    return ids, labels, masked, times, weight, counts, num_maskable, row_buffer


def _moved(outputs: tuple[Tensor, ...], memory: Memory) -> tuple[Tensor, ...]:
    """Outputs whose kernel could not write to ``memory`` itself."""
    if memory is None:
        return outputs
    *made, invalid = outputs
    for to, value in zip(memory, made, strict=True):
        to.copy_(value)
    return *memory, invalid


def _corrupt_ref(a: CorruptArgs, memory: Memory) -> tuple[Tensor, ...]:
    return _moved(corrupt_ref(a), memory)


def _corrupt_cpp(a: CorruptArgs, memory: Memory) -> tuple[Tensor, ...]:
    assert cpp is not None
    tensors = memory or empty_outputs(a, a.ratio_table.device)
    outputs = (*tensors, tensors[0].new_empty(NUM_INVALID, dtype=torch.int64))
    token_type, num_tokens = DTYPE_CODE[a.tokens.dtype], a.tokens.numel()
    cpp.corrupt(a, outputs, token_type, num_tokens, torch.get_num_threads())
    return outputs


class PlannedCorrupt:
    """The C++ kernel with all arguments but the first sample slot and the starts of the windows,
    which it reads once."""

    def __init__(self, a: CorruptArgs) -> None:
        assert cpp is not None
        self._arguments, self._device = a, a.ratio_table.device  # kept: the plan has addresses
        self._plan = cpp.CorruptPlan(a, DTYPE_CODE[a.tokens.dtype], a.tokens.numel())

    def __call__(self, first_sample: int, starts: Tensor | None) -> tuple[Tensor, ...]:
        tensors = empty_outputs(self._arguments, self._device)
        outputs = (*tensors, tensors[0].new_empty(NUM_INVALID, dtype=torch.int64))
        at = 0 if starts is None else host_address(starts)
        self._plan(first_sample, at, outputs, torch.get_num_threads())
        return outputs


def _corrupt_cuda(a: CorruptArgs, memory: Memory) -> tuple[Tensor, ...]:
    assert cuda is not None
    device = a.ratio_table.device
    workspace = torch.empty(
        cuda.workspace_size(math.prod(a.of_samples)), dtype=torch.int64, device=device
    )
    outputs = (*(memory or empty_outputs(a, device)), workspace)
    where = (0, 0)
    if device.type == "cuda":
        where = device.index, raw_stream(device.index)
    cuda.corrupt(a, outputs, DTYPE_CODE[a.tokens.dtype], a.tokens.numel(), *where)
    return *outputs[:-1], workspace[:NUM_INVALID]


def _corrupt_triton(a: CorruptArgs, memory: Memory) -> tuple[Tensor, ...]:
    from nar_kernels.ops.kernels.corrupt import corrupt_triton, workspace_size

    device = a.ratio_table.device
    outputs = memory or empty_outputs(a, device)
    workspace = torch.zeros(
        workspace_size(math.prod(a.of_samples)), dtype=torch.int64, device=device
    )
    corrupt_triton((*outputs, workspace), a)
    return *outputs, workspace[:NUM_INVALID]


_CORRUPT = {
    "reference": _corrupt_ref,
    "cpp": _corrupt_cpp,
    "triton": _corrupt_triton,
    "cuda": _corrupt_cuda,
}


def _launch_corrupt(a: CorruptArgs, backend: str, memory: Memory = None) -> tuple[Tensor, ...]:
    outputs = on_device(a.ratio_table, _CORRUPT[backend], a, memory)
    if memory is not None:  # kernels write to addresses, of which autograd does not know
        torch.autograd.graph.increment_version(memory)
    return outputs


def _corrupt_fake(a: CorruptArgs, backend: str) -> tuple[Tensor, ...]:
    device = a.ratio_table.device
    outputs = empty_outputs(a, device)
    return *outputs, torch.empty(NUM_INVALID, dtype=torch.int64, device=device)


register("corrupt", CorruptArgs, f"({', '.join(['Tensor'] * 9)})", _launch_corrupt, _corrupt_fake)


def run_corrupt(a: CorruptArgs, backend: str, memory: Memory = None) -> tuple[Tensor, ...]:
    """The tensors of :class:`Corrupted`, in ``memory`` if that is given."""
    if needs_dispatcher(a.tokens, a.maskable, a.loss_mask, a.prompt_lengths):
        return _moved(torch.ops.nar_kernels.corrupt.default(*a, backend), memory)
    return _launch_corrupt(a, backend, memory)
