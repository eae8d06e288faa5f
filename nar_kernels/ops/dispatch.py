"""From tensors to kernels: allocates outputs and calls a backend, as ``torch.library`` operators.

Arguments have been checked by the callers: ``ops.py``, ``loss.py``, ``linear.py``,
``unmasking.py``.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from nar_kernels.ops.arguments import (
    TOKEN_DTYPES,
    CorruptArgs,
    LinearArgs,
    NllArgs,
    UnmaskArgs,
    schema,
)
from nar_kernels.ops.backends import cpp, cuda
from nar_kernels.ops.masking import NUM_INVALID
from nar_kernels.ops.reference import corrupt_ref, nll_ref, unmask_ref

# The codes that the C++ side switches on.
DTYPE_CODE = {dtype: code for code, dtype in enumerate(TOKEN_DTYPES.values())}
_LOGIT_CODE = {torch.float32: 0, torch.bfloat16: 1}

_lib = torch.library.Library("nar_kernels", "DEF")


def _register(
    name: str,
    arguments: Any,
    result: str,
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    options: str = ", str backend",
) -> None:
    """Registers an operator that takes the fields of the named tuple ``arguments``, then
    ``options``.

    Args:
        launch, fake: take the tuple, then the options.
    """
    count = len(arguments._fields)

    def from_fields(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: function(arguments(*args[:count]), *args[count:])

    _lib.define(f"{name}({schema(arguments)}{options}) -> {result}")
    _lib.impl(name, from_fields(launch), "CompositeExplicitAutograd")
    torch.library.register_fake(f"nar_kernels::{name}", from_fields(fake), lib=_lib)


def _interceptors() -> tuple[Callable[[], object], ...] | None:
    """Functions that are true while a dispatch mode, a tracer, a transform or a profiler is active.
    They are private to PyTorch: None if a later version lacks one."""
    try:
        return (
            torch._C._len_torch_dispatch_stack,
            torch._C._get_tracing_state,
            torch._C._functorch.peek_interpreter_stack,
            torch.autograd._profiler_enabled,
        )
    except AttributeError:
        return None


_INTERCEPTORS = _interceptors()
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def _needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether a call must be an operator that torch's dispatcher sees: for whatever records, traces
    or intercepts, and for tensors without values. Other calls skip it, which saves some 10 us."""
    if torch.compiler.is_compiling() or _INTERCEPTORS is None:  # first: it cannot trace the rest
        return True
    grad = torch.is_grad_enabled()
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _PLAIN_TENSORS or t.is_meta or (grad and t.requires_grad):
            return True
    for is_active in _INTERCEPTORS:
        if is_active():
            return True
    return False


def _on_device(tensor: Tensor, launch: Callable[..., Any], *args: Any) -> Any:
    """``launch(*args)``, which goes to the current device, on that of ``tensor``."""
    device = tensor.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(*args)
    return launch(*args)


def host_address(tensor: Tensor) -> int:
    """Where a kernel of the CPU finds it.

    Raises:
        ValueError: it is somewhere else. (Callers check what users pass.)
    """
    check_on_host((tensor,))
    return tensor.data_ptr()


def check_on_host(arguments: Iterable[object]) -> None:
    """Raises ValueError for a tensor that a kernel of the CPU cannot read."""
    for x in arguments:
        if isinstance(x, Tensor) and not x.is_cpu:
            raise ValueError(f"a tensor is on {x.device}, but the kernel runs on the CPU")


# ---- corrupt


def _empty_outputs(batch: int, seq_len: int, device: torch.device) -> tuple[Tensor, ...]:
    # Sizes one by one, and empty_like: they save 5 us in all.
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


def _public_raw_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


# The private one is faster, and is missing where PyTorch has no CUDA.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _public_raw_stream)


def _corrupt_cuda(a: CorruptArgs) -> tuple[Tensor, ...]:
    assert cuda is not None
    device = a.ratio_table.device
    workspace = torch.empty(cuda.workspace_size(a.batch), dtype=torch.int64, device=device)
    outputs = (*_empty_outputs(a.batch, a.seq_len, device), workspace)
    where = (0, 0)
    if device.type == "cuda":
        where = device.index, _raw_stream(device.index)
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


def _launch_corrupt(a: CorruptArgs, backend: str) -> tuple[Tensor, ...]:
    return _on_device(a.ratio_table, _CORRUPT[backend], a)


def _corrupt_fake(a: CorruptArgs, backend: str) -> tuple[Tensor, ...]:
    device = a.ratio_table.device
    outputs = _empty_outputs(a.batch, a.seq_len, device)
    return *outputs, torch.empty(NUM_INVALID, dtype=torch.int64, device=device)


_register("corrupt", CorruptArgs, f"({', '.join(['Tensor'] * 9)})", _launch_corrupt, _corrupt_fake)


def run_corrupt(a: CorruptArgs, backend: str) -> tuple[Tensor, ...]:
    """The tensors of :class:`Corrupted`."""
    if _needs_dispatcher(a.tokens, a.maskable):
        return torch.ops.nar_kernels.corrupt.default(*a, backend)
    return _launch_corrupt(a, backend)


# ---- nll

# The types of logits that each backend takes.
NLL_DTYPES = {
    "reference": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cpp": tuple(_LOGIT_CODE),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def _nll_cpp(a: NllArgs) -> Tensor:
    assert cpp is not None
    nll = torch.empty(a.logits.shape[0], dtype=torch.float32, device="cpu")
    check_on_host(a)
    cpp.nll(a, (nll,), _LOGIT_CODE[a.logits.dtype], torch.get_num_threads())
    return nll


def _nll_triton(a: NllArgs) -> Tensor:
    from nar_kernels.ops.kernels.nll import nll_triton

    nll = torch.empty(a.logits.shape[0], dtype=torch.float32, device=a.logits.device)
    nll_triton(nll, a)
    return nll


_NLL = {"reference": nll_ref, "cpp": _nll_cpp, "triton": _nll_triton}


def _launch_nll(a: NllArgs, backend: str) -> Tensor:
    return _on_device(a.logits, _NLL[backend], a)


def _nll_fake(a: NllArgs, backend: str) -> Tensor:
    dtype = torch.promote_types(a.logits.dtype, torch.float32)
    return a.logits.new_empty(a.logits.shape[0], dtype=dtype)


_register("nll_", NllArgs, "Tensor", _launch_nll, _nll_fake)


def run_nll(a: NllArgs, backend: str) -> Tensor:
    """The loss of each row ``[R]``."""
    if _needs_dispatcher(a.logits, a.labels, a.bias, a.weight):
        return torch.ops.nar_kernels.nll_.default(*a, backend)
    return _launch_nll(a, backend)


# ---- linear

# Whether `linear_` has a kernel here, for float32 on the CPU: one that fuses multiply-adds.
HAS_LINEAR = cpp is not None and cpp.has_linear()


def _has_kernel(a: LinearArgs) -> bool:
    tensors = [a.logits, a.hidden, a.weight] + ([] if a.bias is None else [a.bias])
    return (
        all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        and a.logits.stride(1) == a.hidden.stride(1) == a.weight.stride(1) == 1
        and a.hidden.shape[1] == a.weight.shape[1]
        and a.logits.shape == (len(a.hidden), len(a.weight))
        and (a.bias is None or a.bias.shape == a.weight.shape[:1])
        and cpp is not None
        and cpp.has_linear()
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


_register("linear_", LinearArgs, "()", _launch_linear, lambda a: None, options="")


def run_linear(a: LinearArgs) -> None:
    """Writes the logits: there are no gradients. Where there is a kernel, each logit is one chain
    of fused multiply-adds, the same bit for bit whatever rows come with it."""
    if _needs_dispatcher(*a):
        torch.ops.nar_kernels.linear_.default(*a)
    else:
        _launch_linear(a)


# ---- unmask

Confidence = Literal["probability", "margin", "entropy"]
CONFIDENCES = get_args(Confidence)


def _unmask_outputs(a: UnmaskArgs) -> tuple[Tensor, Tensor, Tensor]:
    others = 0 if a.confidence == "probability" else a.noise_slots.shape[0]
    return (
        torch.empty_like(a.noise_slots),
        torch.empty_like(a.noise_slots, dtype=torch.float32),
        a.noise_slots.new_empty(others, dtype=torch.float32),
    )


def _unmask_cpp(a: UnmaskArgs) -> tuple[Tensor, Tensor, Tensor]:
    assert cpp is not None
    if a.logits.dtype not in _LOGIT_CODE:
        a = a._replace(logits=a.logits.float())
    outputs = _unmask_outputs(a)
    check_on_host(a)
    cpp.unmask(a, outputs, _LOGIT_CODE[a.logits.dtype], torch.get_num_threads())
    return outputs


def _unmask_triton(a: UnmaskArgs) -> tuple[Tensor, Tensor, Tensor]:
    from nar_kernels.ops.kernels.unmask import unmask_triton

    outputs = _unmask_outputs(a)
    unmask_triton(outputs, a)
    return outputs


_UNMASK = {"reference": unmask_ref, "cpp": _unmask_cpp, "triton": _unmask_triton}


def _launch_unmask(a: UnmaskArgs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return _on_device(a.logits, _UNMASK[backend], a)


_register(
    "unmask",
    UnmaskArgs,
    "(Tensor, Tensor, Tensor)",
    _launch_unmask,
    lambda a, backend: _unmask_outputs(a),
)


def run_unmask(a: UnmaskArgs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities and confidences ``[R]``: int64, float32 and float32. The last is
    empty for ``"probability"``."""
    if _needs_dispatcher(a.logits, a.noise_slots, a.given):
        return torch.ops.nar_kernels.unmask.default(*a, backend)
    return _launch_unmask(a, backend)
