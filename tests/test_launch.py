"""The way from the checks to the kernels: past the dispatcher, or through it."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nar_kernels import MaskingConfig, corrupt, launch, masked_nll, unmask

ROOT = Path(__file__).resolve().parent.parent

PRIVATE = [
    "torch._C._len_torch_dispatch_stack",
    "torch._C._get_tracing_state",
    "torch._C._functorch.peek_interpreter_stack",
    "torch.autograd._profiler_enabled",
]


def digest() -> str:
    """Of what the operations return."""
    generator = torch.Generator().manual_seed(0)
    batch = corrupt(torch.arange(64).view(4, 16), MaskingConfig(65, 64), seed=1)
    hidden = torch.randn(4, 16, 8, generator=generator)
    logits = torch.randn(64, 65, generator=generator)
    weight = torch.randn(65, 8, generator=generator)
    drawn = unmask(logits, mask_id=64, seed=2, noise_slots=torch.arange(64), top_k=5)
    outputs = [batch.input_ids, batch.loss_weight, drawn.tokens, drawn.log_prob]
    outputs.append(masked_nll(hidden, weight, batch, reduction="none"))
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in outputs)).hexdigest()


# PyTorch's own code needs some of them: they are gone only while the package is imported.
WITHOUT = """
import torch
kept = {name}
del {name}
from tests.test_launch import digest, launch
{name} = kept
print(launch._needs_dispatcher(), digest())
"""


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_name_that_pytorch_has_dropped(name):
    command = [sys.executable, "-c", WITHOUT.format(name=name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"True {digest()}\n", done.stderr


def test_the_dispatcher_is_skipped():
    assert not launch._needs_dispatcher(torch.zeros(1), None)
    assert launch._needs_dispatcher(torch.zeros(1, device="meta"))
    with torch.autograd.profiler.profile():
        assert launch._needs_dispatcher()
    with FlopCounterMode(display=False):
        assert launch._needs_dispatcher()


def test_kernels_of_the_cpu_refuse_other_memory():
    with pytest.raises(ValueError, match="a tensor is on meta, but the kernel runs on the CPU"):
        launch.check_on_host((1, None, torch.zeros(1), torch.zeros(1, device="meta")))
