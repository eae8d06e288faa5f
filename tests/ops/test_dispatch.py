"""The way from the checks to the kernels: past the dispatcher, or through it."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nar_kernels.ops import dispatch
from tests.helpers.outputs import digest
from tests.helpers.paths import ROOT

PRIVATE = [
    "torch._C._len_torch_dispatch_stack",
    "torch._C._get_tracing_state",
    "torch._C._functorch.peek_interpreter_stack",
    "torch.autograd._profiler_enabled",
]


# PyTorch's own code needs some of them: they are gone only while the package is imported.
WITHOUT = """
import torch
kept = {name}
del {name}
from nar_kernels.ops import dispatch
from tests.helpers.outputs import digest
{name} = kept
print(dispatch.needs_dispatcher(), digest())
"""


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_name_that_pytorch_has_dropped(name):
    command = [sys.executable, "-c", WITHOUT.format(name=name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"True {digest()}\n", done.stderr


def test_the_dispatcher_is_skipped():
    assert not dispatch.needs_dispatcher(torch.zeros(1), None)
    assert dispatch.needs_dispatcher(torch.zeros(1, device="meta"))
    with torch.autograd.profiler.profile():
        assert dispatch.needs_dispatcher()
    with FlopCounterMode(display=False):
        assert dispatch.needs_dispatcher()


def test_kernels_of_the_cpu_refuse_other_memory():
    with pytest.raises(ValueError, match="a tensor is on meta, but the kernel runs on the CPU"):
        dispatch.check_on_host((1, None, torch.zeros(1), torch.zeros(1, device="meta")))
