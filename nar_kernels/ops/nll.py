"""``nll_``: the loss of rows of logits, and its gradient in their place."""

import torch
from torch import Tensor

from nar_kernels.ops.arguments import NllArgs
from nar_kernels.ops.backends import cpp
from nar_kernels.ops.dispatch import (
    LOGIT_CODE,
    check_on_host,
    needs_dispatcher,
    on_device,
    register,
)
from nar_kernels.ops.reference import nll_ref

# The types of logits that each backend takes.
NLL_DTYPES = {
    "reference": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cpp": tuple(LOGIT_CODE),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def _nll_cpp(a: NllArgs) -> Tensor:
    assert cpp is not None
    nll = torch.empty(a.logits.shape[0], dtype=torch.float32, device="cpu")
    check_on_host(a)
    cpp.nll(a, (nll,), LOGIT_CODE[a.logits.dtype], torch.get_num_threads())
    return nll


def _nll_triton(a: NllArgs) -> Tensor:
    from nar_kernels.ops.kernels.nll import nll_triton

    nll = torch.empty(a.logits.shape[0], dtype=torch.float32, device=a.logits.device)
    nll_triton(nll, a)
    return nll


_NLL = {"reference": nll_ref, "cpp": _nll_cpp, "triton": _nll_triton}


def _launch_nll(a: NllArgs, backend: str) -> Tensor:
    return on_device(a.logits, _NLL[backend], a)


def _nll_fake(a: NllArgs, backend: str) -> Tensor:
    dtype = torch.promote_types(a.logits.dtype, torch.float32)
    return a.logits.new_empty(a.logits.shape[0], dtype=dtype)


register("nll_", NllArgs, "Tensor", _launch_nll, _nll_fake)


def run_nll(a: NllArgs, backend: str) -> Tensor:
    """The loss of each row ``[R]``."""
    if needs_dispatcher(a.logits, a.labels, a.bias, a.weight):
        return torch.ops.nar_kernels.nll_.default(*a, backend)
    return _launch_nll(a, backend)
