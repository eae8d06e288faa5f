"""Whether a module is plain: no hooks, overridden ``forward`` or parametrization.

:mod:`nar_kernels.nets.split` calls parts of a net directly, which is equivalent only if they are.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LINEAR_FORWARD = nn.Linear.forward
_GLOBAL_HOOKS = [getattr(torch_module, f"_global{name}", {}) for name in _HOOKS]


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks, its own or global ones."""
    return any(map(vars(module).get, _HOOKS)) or any(_GLOBAL_HOOKS)


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module runs the ``forward`` of its class and nothing else."""
    # torch.compile's OptimizedModule always has one.
    own_forward = "forward" in vars(module) and type(module).__name__ != "OptimizedModule"
    return not own_forward and not has_hooks(module)


def is_plain_tensor(tensor: Any) -> bool:
    """Whether it is an ordinary dense tensor: not sharded, quantised or another subclass."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


def is_plain_linear(module: Any) -> bool:
    """Whether a call of the module is ``F.linear`` with its weight and bias."""
    return (
        type(module) is nn.Linear  # parametrizations change the class
        and nn.Linear.forward is _LINEAR_FORWARD
        and is_plain(module)
        and is_plain_tensor(module.weight)
        and (module.bias is None or is_plain_tensor(module.bias))
    )


_POINTWISE = (
    *(nn.Identity, nn.LayerNorm, nn.Dropout, nn.ReLU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh),
    *(nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.Softplus),
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)


def is_pointwise(module: nn.Module) -> bool:
    """Whether the module is known to be position-wise."""
    if type(module).forward is nn.Sequential.forward:
        return is_plain(module) and all(map(is_pointwise, module.children()))
    return is_plain_linear(module) or (type(module) in _POINTWISE and is_plain(module))
