"""Logits of a linear head, for a chunk of rows at a time.

Shapes: V vocabulary (rows of the head), D width, R rows, C rows of a chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

from nar_kernels.ops.arguments import LinearArgs
from nar_kernels.ops.backends import cpp, multiplies_in
from nar_kernels.ops.dispatch import check_on_host, needs_dispatcher, register

# Whether `linear_` has a kernel here, for float32 on the CPU: one that fuses multiply-adds.
HAS_LINEAR = cpp is not None and cpp.has_linear()


def _has_kernel(a: LinearArgs) -> bool:
    tensors = [a.logits, a.hidden, a.weight] + ([] if a.bias is None else [a.bias])
    return (
        cpp is not None
        and cpp.has_linear()  # not HAS_LINEAR: limit_simd may have changed it
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        and a.logits.stride(1) == a.hidden.stride(1) == a.weight.stride(1) == 1
        and a.hidden.shape[1] == a.weight.shape[1]
        and a.logits.shape == (len(a.hidden), len(a.weight))
        and (a.bias is None or a.bias.shape == a.weight.shape[:1])
    )


def _launch_linear(a: LinearArgs) -> None:
    if _has_kernel(a):
        assert cpp is not None
        if a.bias is not None:
            a = a._replace(bias=a.bias.contiguous())
        check_on_host(a)
        cpp.linear(a, torch.get_num_threads())
    # PyTorch takes, or refuses, whatever the kernel does not know.
    elif a.bias is None:
        torch.mm(a.hidden, a.weight.t(), out=a.logits)
    else:
        torch.addmm(a.bias, a.hidden, a.weight.t(), out=a.logits)


register("linear_", LinearArgs, "()", _launch_linear, lambda a: None, options="")


def run_linear(a: LinearArgs) -> None:
    """Writes the logits: there are no gradients. Where there is a kernel, each logit is one chain
    of fused multiply-adds, the same bit for bit whatever rows come with it."""
    if needs_dispatcher(*a):
        torch.ops.nar_kernels.linear_.default(*a)
    else:
        _launch_linear(a)


class ChunkLimits(NamedTuple):
    """How large a chunk may be.

    Attributes:
        logits: the most a chunk may have, unless a single row has more.
        rows: enough for full speed; so are :data:`_ENOUGH_LOGITS` logits.
    """

    logits: int
    rows: int


_ENOUGH_LOGITS = 1 << 20

# Beside the logits of a chunk, autograd keeps several tensors of their size.
TRAINING_LIMITS = {"cpu": ChunkLimits(1 << 24, 512), "cuda": ChunkLimits(1 << 27, 4096)}

# Logits alone, which become their own gradient: 2 GiB in bfloat16, 4 in float32. Each chunk reads
# and writes the gradient of the head once more, 8 bytes a weight, for 6 operations a weight and
# row: at 16384 rows that is a fortieth of the time of its three GEMMs on an H100, and at 4096 rows
# a tenth.
NLL_LIMITS = {"cpu": ChunkLimits(1 << 24, 512), "cuda": ChunkLimits(1 << 30, 16384)}

# No more logits than this part of the bytes of a GPU: in bfloat16, a 32nd of its memory.
_BYTES_PER_LOGIT = 64

# BLAS repacks the weight at every GEMM. For smaller heads that is cheap, and BLAS is as fast as
# `run_linear`, or faster.
_LARGE_HEAD = 1 << 20

# Only logits are kept here, so a GPU may have more of them. On a CPU the GEMM is fast from some 100
# rows on; each chunk reads the head once more, so 256 are a little faster yet.
INFERENCE_LIMITS = {"cpu": ChunkLimits(1 << 24, 256), "cuda": ChunkLimits(1 << 28, 8192)}


def has_few_shapes(hidden: Tensor) -> bool:
    """Whether products of these should be of few shapes: oneDNN, which multiplies narrow types on a
    CPU, compiles code for each and keeps a thousand of them, some MB each; and hardly two batches
    mask as many positions."""
    return hidden.device.type == "cpu" and hidden.dtype.itemsize == 2


def round_up_rows(num_rows: int) -> int:
    """To a multiple of 64, or below that to a power of two."""
    if num_rows > 32:
        return -(-num_rows // 64) * 64
    return 1 << (num_rows - 1).bit_length() if num_rows else 0


def _round_down_rows(num_rows: int) -> int:
    return num_rows // 64 * 64 if num_rows >= 64 else 1 << (num_rows.bit_length() - 1)


def chunk_size(
    num_rows: int,
    vocabulary: int,
    device: torch.device,
    limits: dict[str, ChunkLimits],
    *,
    same_on_ranks: bool = False,
    few_shapes: bool = False,
) -> int:
    """Rows of a chunk, at least 1: equal parts, within the limits and the memory of a GPU, unless
    ranks whose GPUs may differ need the ``same``; or, with ``few_shapes``, as many whatever the
    number of rows."""
    most_logits, enough_rows = limits.get(device.type, limits["cuda"])
    if device.type == "cuda" and torch.cuda.is_available() and not same_on_ranks:
        memory = torch.cuda.get_device_properties(device).total_memory
        most_logits = min(most_logits, memory // _BYTES_PER_LOGIT)
    enough = max(enough_rows, _ENOUGH_LOGITS // vocabulary)
    most = max(min(most_logits // vocabulary, enough), 1)
    if few_shapes:
        return _round_down_rows(most)
    num_chunks = max(-(-num_rows // most), 1)
    return max(-(-num_rows // num_chunks), 1)


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type of the GEMM of hidden states and head: theirs, or that of autocast; float32 where a
    CPU has no instructions for it.

    Raises:
        TypeError: they differ, and there is no autocast.
    """
    device, dtype = hidden.device, hidden.dtype
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    elif hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype} but weight is {weight.dtype}: use torch.autocast, or convert"
            " one of them"
        )
    return torch.float32 if device.type == "cpu" and not multiplies_in(dtype) else dtype


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total += a @ b``, or ``total = a @ b`` if ``first``; ``total`` may be of a wider dtype."""
    if total.dtype == a.dtype:
        if first:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
    elif total.dtype == torch.float32 and _gemm_adds_in_float32(a.device):
        # By overload: type stubs do not know `out_dtype`.
        if first:
            torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
        else:
            torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


# PyTorch takes a float32 matrix to add to since pytorch/pytorch#167931, which 2.11 surely has.
_HAS_FLOAT32_SUMS = torch.version.cuda is not None and TorchVersion(torch.__version__) >= "2.11"


def _gemm_adds_in_float32(device: torch.device) -> bool:
    """Whether a GEMM of narrow matrices can add to a float32 one, which saves a pass over a narrow
    product and its rounding."""
    return _HAS_FLOAT32_SUMS and device.type == "cuda"


class LogitsMemory:
    """One buffer that all chunks of logits share."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None  # [R, V and the gap behind each row]
        self._vocabulary = 0

    def rows(self, num_rows: int, vocabulary: int, like: Tensor) -> Tensor:
        """``[num_rows, V]`` of the type of ``like``, without values."""
        memory = self._memory
        is_new = memory is None or len(memory) < num_rows or memory.dtype != like.dtype
        if is_new or self._vocabulary != vocabulary:
            # Rows start at multiples of 64 bytes, for wide loads and stores: the GEMM stores them
            # twice as fast.
            width = -(-vocabulary // 32) * 32
            self._memory = memory = like.new_empty(num_rows, width)
            self._vocabulary = vocabulary
            if vocabulary < width:
                # With AMX, bfloat16 products of oneDNN multiply what lies behind a row of odd
                # length by 0, which is NaN of NaN.
                memory[:, vocabulary:].zero_()
        assert memory is not None
        return memory[:num_rows, :vocabulary]


def linear_chunks(
    hidden: Tensor, weight: Tensor, size: int, backend: str
) -> Iterator[tuple[Tensor, slice]]:
    """``hidden @ weight.T`` of ``size`` rows at a time, and which rows. Logits are valid until the
    next. All backends but ``"cpp"`` leave the product to PyTorch."""
    memory = LogitsMemory()
    is_large = weight.numel() >= _LARGE_HEAD
    for start in range(0, len(hidden), size):
        part = slice(start, min(start + size, len(hidden)))
        logits = memory.rows(part.stop - part.start, len(weight), hidden)
        if is_large and backend == "cpp":
            run_linear(LinearArgs(logits, hidden[part], weight, None))
        else:
            torch.mm(hidden[part], weight.t(), out=logits)
        yield logits, part


@torch.no_grad()
def inferred_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, memory: LogitsMemory
) -> Iterator[Tensor]:
    """Logits ``[C, V]`` of chunks of hidden states ``[R, D]``, in order, each valid until the next.

    They have no gradients.
    """
    dtype = product_dtype(hidden, weight)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    needs_many_rows = hidden.device.type == "cpu" and not (HAS_LINEAR and dtype == torch.float32)
    limits = TRAINING_LIMITS if needs_many_rows else INFERENCE_LIMITS
    few = has_few_shapes(hidden)
    size = chunk_size(len(hidden), len(weight), hidden.device, limits, few_shapes=few)
    # Autocast, which must not be switched off around a yield, does not change these products.
    for start in range(0, len(hidden), size):
        some = hidden[start : start + size]
        num_rows = len(some)
        if few:
            some = F.pad(some, (0, 0, 0, round_up_rows(num_rows) - num_rows))
        logits = memory.rows(len(some), len(weight), some)
        run_linear(LinearArgs(logits, some, weight, bias))
        yield logits[:num_rows]
