"""``choose``: which positions of a step of decoding keep their ids, and which are left to others.

Shapes: B sequences of length L, R candidate positions, given as "rows": indices into the flat
``[B * L]``.
"""

import torch
from torch import Tensor

from nar_kernels.ops.arguments import ChooseArgs
from nar_kernels.ops.backends import cpp
from nar_kernels.ops.dispatch import check_on_host, needs_dispatcher, on_device, register
from nar_kernels.ops.reference import choose_ref

CHOOSE_BACKENDS = ("reference", "cpp", "triton")


def _choose_outputs(a: ChooseArgs) -> tuple[Tensor, Tensor]:
    return a.rows.new_empty(a.rows.shape[0] - a.num_left), a.rows.new_empty(a.num_left)


def _choose_cpp(a: ChooseArgs) -> tuple[Tensor, Tensor]:
    assert cpp is not None
    outputs = _choose_outputs(a)
    check_on_host(a)
    cpp.choose(a, outputs, len(a.bounds) - 1, torch.get_num_threads())
    return outputs


def _choose_triton(a: ChooseArgs) -> tuple[Tensor, Tensor]:
    from nar_kernels.ops.kernels.choose import choose_triton

    outputs = _choose_outputs(a)
    choose_triton(outputs, a)
    return outputs


_CHOOSE = {"reference": choose_ref, "cpp": _choose_cpp, "triton": _choose_triton}


def _launch_choose(a: ChooseArgs, backend: str) -> tuple[Tensor, Tensor]:
    return on_device(a.rows, _CHOOSE[backend], a)


register(
    "choose",
    ChooseArgs,
    "(Tensor, Tensor)",
    _launch_choose,
    lambda a, backend: _choose_outputs(a),
)


def run_choose(a: ChooseArgs, backend: str) -> tuple[Tensor, Tensor]:
    """The rows that keep their ids ``[R - num_left]``, and those that are left ``[num_left]``, both
    int64, ascending. Arguments are not checked: they are those of a decoding, not of users."""
    if needs_dispatcher(a.score, a.rows, a.bounds, a.left_bounds):
        return torch.ops.nar_kernels.choose.default(*a, backend)
    return _launch_choose(a, backend)
