"""From tensors to kernels: allocates outputs and calls a backend, as ``torch.library`` operators.

Arguments have been checked in ``ops.py``.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from nar_kernels.ops.arguments import TOKEN_DTYPES, CorruptArgs
from nar_kernels.ops.backends import cpp, cuda
from nar_kernels.ops.masking import NUM_INVALID
from nar_kernels.ops.reference import corrupt_ref, nll_ref, unmask_ref

# The codes that the C++ side switches on.
DTYPE_CODE = {dtype: code for code, dtype in enumerate(TOKEN_DTYPES.values())}

_lib = torch.library.Library("nar_kernels", "DEF")
_lib.define(f"corrupt({CorruptArgs.schema()}, str backend) -> ({', '.join(['Tensor'] * 9)})")


def host_address(tensor: Tensor | None) -> int:
    """Where a kernel of the CPU finds it; 0 for None.

    Raises:
        ValueError: it is somewhere else. (Callers check what users pass.)
    """
    if tensor is None:
        return 0
    if not tensor.is_cpu:
        raise ValueError(f"a tensor is on {tensor.device}, but the kernel runs on the CPU")
    return tensor.data_ptr()


def _empty_outputs(batch: int, seq_len: int, device: torch.device) -> tuple[Tensor, ...]:
    # Sizes one by one, and empty_like: what they spare adds up to 5 us.
    ids = torch.empty(batch, seq_len, dtype=torch.int64, device=device)
    masked = torch.empty(batch, seq_len, dtype=torch.bool, device=device)
    times = torch.empty(batch, dtype=torch.float32, device=device)
    counts = torch.empty(batch, dtype=torch.int64, device=device)
    row_buffer = torch.empty(batch * seq_len, dtype=torch.int64, device=device)
    # In the order of Corrupted, without `invalid`.
    labels, weight, num_maskable = map(torch.empty_like, (ids, times, counts))
    return ids, labels, masked, times, weight, counts, num_maskable, row_buffer


def _corrupt_cpp(a: CorruptArgs) -> tuple[Tensor, ...]:
    assert cpp is not None
    invalid = torch.empty(NUM_INVALID, dtype=torch.int64, device="cpu")
    outputs = (*_empty_outputs(a.batch, a.seq_len, invalid.device), invalid)
    token_type, num_tokens = DTYPE_CODE[a.tokens.dtype], a.tokens.numel()
    cpp.corrupt(a, outputs, token_type, num_tokens, torch.get_num_threads())
    return outputs


def _corrupt_cuda(a: CorruptArgs) -> tuple[Tensor, ...]:
    assert cuda is not None
    device = a.ratio_table.device
    workspace = torch.empty(cuda.workspace_size(a.batch), dtype=torch.int64, device=device)
    outputs = (*_empty_outputs(a.batch, a.seq_len, device), workspace)
    where = (0, 0)
    if device.type == "cuda":
        where = device.index, torch._C._cuda_getCurrentRawStream(device.index)
    cuda.corrupt(a, outputs, DTYPE_CODE[a.tokens.dtype], a.tokens.numel(), *where)
    return *outputs[:-1], workspace[:NUM_INVALID]


def _corrupt_triton(a: CorruptArgs) -> tuple[Tensor, ...]:
    from nar_kernels.ops.kernels.corrupt import corrupt_triton, workspace_size

    device = a.ratio_table.device
    outputs = _empty_outputs(a.batch, a.seq_len, device)
    workspace = torch.zeros(workspace_size(a.batch), dtype=torch.int64, device=device)
    corrupt_triton((*outputs, workspace), a)
    return *outputs, workspace[:NUM_INVALID]


_CORRUPT = {
    "reference": corrupt_ref,
    "cpp": _corrupt_cpp,
    "triton": _corrupt_triton,
    "cuda": _corrupt_cuda,
}


def _needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether something records, traces or intercepts what is done with tensors: it is to see
    operators, as are tensors without values. Anybody else is spared torch's dispatcher, which costs
    some 10 us a call."""
    return (
        torch.compiler.is_compiling()  # which knows nothing of what follows
        or any(
            type(t) not in (Tensor, torch.nn.Parameter) or t.is_meta
            for t in tensors
            if t is not None
        )
        or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None))
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
    )


def _on_device(tensor: Tensor, launch: Callable[..., Any], *args: Any) -> Any:
    """``launch(*args)``, which goes to the current device, on that of ``tensor``."""
    device = tensor.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(*args)
    return launch(*args)


def _launch(a: CorruptArgs, backend: str) -> tuple[Tensor, ...]:
    return _on_device(a.ratio_table, _CORRUPT[backend], a)


def _corrupt_impl(*args: Any) -> tuple[Tensor, ...]:
    return _launch(CorruptArgs(*args[:-1]), args[-1])


def _corrupt_fake(*args: Any) -> tuple[Tensor, ...]:
    a = CorruptArgs(*args[:-1])
    device = a.ratio_table.device
    outputs = _empty_outputs(a.batch, a.seq_len, device)
    return *outputs, torch.empty(NUM_INVALID, dtype=torch.int64, device=device)


_lib.impl("corrupt", _corrupt_impl, "CompositeExplicitAutograd")
torch.library.register_fake("nar_kernels::corrupt", _corrupt_fake, lib=_lib)


def run_corrupt(a: CorruptArgs, backend: str) -> tuple[Tensor, ...]:
    """The tensors of :class:`Corrupted`."""
    if _needs_dispatcher(a.tokens, a.maskable):
        return torch.ops.nar_kernels.corrupt.default(*a, backend)
    return _launch(a, backend)


# ---- nll

_lib.define(
    "nll_(Tensor(a!) logits, Tensor labels, Tensor? bias, Tensor? weight, bool gradient, "
    "str backend) -> Tensor"
)

# The types of logits that each compiled backend has, by the number that C++ switches on.
_CPP_LOGITS = {torch.float32: 0, torch.bfloat16: 1}
NLL_DTYPES = {
    "reference": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cpp": tuple(_CPP_LOGITS),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def _nll_cpp(
    logits: Tensor, labels: Tensor, bias: Tensor | None, weight: Tensor | None, gradient: bool
) -> Tensor:
    assert cpp is not None
    nll = torch.empty(logits.shape[0], dtype=torch.float32, device="cpu")
    cpp.nll(
        host_address(logits),
        _CPP_LOGITS[logits.dtype],
        *logits.shape,
        logits.stride(0),
        host_address(bias),
        host_address(labels),
        host_address(weight),
        gradient,
        host_address(nll),
        torch.get_num_threads(),
    )
    return nll


def _nll_triton(
    logits: Tensor, labels: Tensor, bias: Tensor | None, weight: Tensor | None, gradient: bool
) -> Tensor:
    from nar_kernels.ops.kernels.nll import nll_triton

    nll = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    nll_triton(nll, logits, labels, bias, weight, gradient)
    return nll


_NLL = {"reference": nll_ref, "cpp": _nll_cpp, "triton": _nll_triton}


def _nll_impl(logits: Tensor, *args: Any) -> Tensor:
    *others, backend = args
    return _on_device(logits, _NLL[backend], logits, *others)


def _nll_fake(logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))


_lib.impl("nll_", _nll_impl, "CompositeExplicitAutograd")
torch.library.register_fake("nar_kernels::nll_", _nll_fake, lib=_lib)


def run_nll(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    *,
    gradient: bool,
    backend: str,
) -> Tensor:
    """float32 ``[R]`` (float64 for such logits): the loss of each row of ``logits``. All but those
    must be contiguous.

    Args:
        logits: ``[R, V]`` of a type in :data:`NLL_DTYPES`, contiguous but for a gap behind each
            row, behind the last one too unless the memory ends there. With ``gradient`` they become
            ``weight * (softmax - one_hot)``; otherwise they are undefined afterwards, as gaps
            always are. Rows that begin at multiples of 64 bytes are the fastest.
        labels: int64 ``[R]``. One outside [0, V) gives NaN.
        bias: ``[V]`` of the type of the result, is added to the logits; or None.
        weight: ``[R]`` of the type of the result; None for 1.
    """
    return torch.ops.nar_kernels.nll_.default(logits, labels, bias, weight, gradient, backend)


# ---- linear

_lib.define("linear_(Tensor(a!) logits, Tensor hidden, Tensor weight, Tensor? bias) -> ()")

# Whether `linear_` has a kernel here, for float32 on the CPU: one that fuses multiply-adds.
HAS_LINEAR = cpp is not None and cpp.has_linear()


def _linear_impl(logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    # PyTorch takes, or refuses, whatever the kernel does not know.
    tensors = [logits, hidden, weight] + ([] if bias is None else [bias])
    is_known = (
        all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        and logits.stride(1) == hidden.stride(1) == weight.stride(1) == 1
        and hidden.shape[1] == weight.shape[1]
        and logits.shape == (len(hidden), len(weight))
        and (bias is None or bias.shape == weight.shape[:1])
    )
    if is_known and cpp is not None and cpp.has_linear():
        bias = None if bias is None else bias.contiguous()
        cpp.linear(
            host_address(logits),
            logits.stride(0),
            host_address(hidden),
            *hidden.shape,
            hidden.stride(0),
            host_address(weight),
            weight.shape[0],
            weight.stride(0),
            host_address(bias),
            torch.get_num_threads(),
        )
    elif bias is None:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        torch.addmm(bias, hidden, weight.t(), out=logits)


_lib.impl("linear_", _linear_impl, "CompositeExplicitAutograd")
torch.library.register_fake("nar_kernels::linear_", lambda *args: None, lib=_lib)


def run_linear(logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Writes ``hidden @ weight.T + bias`` into ``logits [R, V]``, whose rows are contiguous.

    All are of one type and device, and there are no gradients. Where there is a kernel, each logit
    is one chain of fused multiply-adds, the same bit for bit whatever rows come with it.
    """
    if _needs_dispatcher(logits, hidden, weight, bias):
        torch.ops.nar_kernels.linear_.default(logits, hidden, weight, bias)
    else:
        _linear_impl(logits, hidden, weight, bias)


# ---- unmask

_lib.define(
    "unmask(Tensor logits, Tensor noise_slots, Tensor? given, SymInt[] forbidden, SymInt fallback, "
    "SymInt seed, SymInt top_k, float inverse_temperature, str confidence, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)

# In the order of the numbers that C++ switches on.
Confidence = Literal["probability", "margin", "entropy"]
CONFIDENCES = get_args(Confidence)


def _unmask_outputs(noise_slots: Tensor, confidence: str) -> tuple[Tensor, Tensor, Tensor]:
    rows = noise_slots.shape[0]
    others = 0 if confidence == "probability" else rows
    return (
        torch.empty_like(noise_slots),
        torch.empty_like(noise_slots, dtype=torch.float32),
        noise_slots.new_empty(others, dtype=torch.float32),
    )


def _unmask_cpp(
    logits: Tensor,
    noise_slots: Tensor,
    given: Tensor | None,
    forbidden: list[int],
    fallback: int,
    seed: int,
    top_k: int,
    inverse_temperature: float,
    confidence: str,
) -> tuple[Tensor, Tensor, Tensor]:
    assert cpp is not None
    if logits.dtype not in _CPP_LOGITS:
        logits = logits.float()
    outputs = _unmask_outputs(noise_slots, confidence)
    cpp.unmask(
        host_address(logits),
        _CPP_LOGITS[logits.dtype],
        *logits.shape,
        logits.stride(0),
        host_address(noise_slots),
        host_address(given),
        forbidden,
        fallback,
        seed,
        top_k,
        inverse_temperature,
        CONFIDENCES.index(confidence),
        *map(host_address, outputs),
        torch.get_num_threads(),
    )
    return outputs


def _unmask_triton(
    logits: Tensor, noise_slots: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from nar_kernels.ops.kernels.unmask import unmask_triton

    outputs = _unmask_outputs(noise_slots, args[-1])
    unmask_triton(outputs, logits, noise_slots, *args)
    return outputs


_UNMASK = {"reference": unmask_ref, "cpp": _unmask_cpp, "triton": _unmask_triton}


def _unmask_impl(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *others, backend = args
    return _on_device(logits, _UNMASK[backend], logits, *others)


def _unmask_fake(logits: Tensor, noise_slots: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _unmask_outputs(noise_slots, args[-2])


_lib.impl("unmask", _unmask_impl, "CompositeExplicitAutograd")
torch.library.register_fake("nar_kernels::unmask", _unmask_fake, lib=_lib)


def run_unmask(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """int64, float32 and float32 ``[R]``: the result of :func:`nar_kernels.unmask`, whose arguments
    these are in the order of the schema; the rows of the logits contiguous, all else entirely. The
    last is empty for ``"probability"``."""
    if _needs_dispatcher(*args[:3]):
        return torch.ops.nar_kernels.unmask.default(*args)
    return _unmask_impl(*args)
