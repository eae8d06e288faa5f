"""How operators are registered as ``torch.library`` operators, and when a call may skip torch's
dispatcher.

Each operation registers its own, in its file; its arguments have been checked there.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nar_kernels.ops.arguments import schema

# As numbered in csrc/nll/nll.h.
LOGIT_CODE = {torch.float32: 0, torch.bfloat16: 1}

_lib = torch.library.Library("nar_kernels", "DEF")


def register(
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


def needs_dispatcher(*tensors: Tensor | None) -> bool:
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


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which torch.compile runs between its graphs. Not a decorator: that would import
    Dynamo, which takes seconds."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def on_device(tensor: Tensor, launch: Callable[..., Any], *args: Any) -> Any:
    """Runs ``launch(*args)`` with the device of ``tensor`` current."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            return launch(*args)
    return launch(*args)


def host_address(tensor: Tensor) -> int:
    """The address of a CPU tensor.

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


def _public_raw_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


# The private one is faster, and is missing where PyTorch has no CUDA.
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _public_raw_stream)
