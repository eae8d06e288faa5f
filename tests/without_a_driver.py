"""Triton's own dispatch of `corrupt` and ours, side by side, with a driver that launches nothing.

Run as a program, since Triton's interpreter, which other tests need, cannot be switched off again.
Prints what went wrong, and the host's microseconds a call of both.
"""

import os

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import time
import warnings

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

warnings.simplefilter("ignore")
launched: list[tuple] = []


class Utilities:
    def load_binary(self, *arguments):
        return 0, 0, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 228_000, "warpSize": 32, "max_num_regs": 65536}


class NoDriver:
    """What Triton asks of a driver; kernels are compiled for sm_90, and their launches listed."""

    utils = Utilities()

    @staticmethod
    def launcher_cls(source, metadata):
        return lambda *arguments: launched.append(arguments)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


driver.set_active(NoDriver())

from nar_kernels import MaskingConfig  # noqa: E402
from nar_kernels.kernels import corrupt  # noqa: E402
from nar_kernels.launch import _empty_outputs  # noqa: E402
from tests.test_corrupt import arguments  # noqa: E402

CORPUS = torch.zeros(40_000, dtype=torch.uint16)


def call(num_tokens=300, skip=0, batch=4, length=128, seed=1, step=0, keep=0.0, maskable=False):
    """Arguments and outputs of one call; a batch that is a corpus with windows in an order."""
    masking = MaskingConfig(num_tokens, num_tokens - 1, no_replace_prob=keep)
    tokens = CORPUS[skip : skip + batch * length].view(batch, length)
    a = arguments(tokens, masking, seed=seed, first_sample=step * batch, num_windows=7, stride=3)
    if maskable:
        a = a._replace(maskable=torch.ones(batch, length, dtype=torch.bool))
    outputs = _empty_outputs(batch, length, tokens.device)
    return (*outputs, torch.zeros(corrupt.workspace_size(batch), dtype=torch.int64)), a


CALLS = [
    call(),
    call(seed=2, step=3),  # the same kernel
    call(seed=-(2**62), step=2**40),  # wider numbers
    call(seed=2**62, step=2**41),
    call(keep=0.1),
    call(keep=0.2),
    call(skip=1),  # ids that do not begin at a multiple of 16 bytes
    call(skip=8),
    call(maskable=True),
    call(num_tokens=304, batch=5),  # divides by 16
    call(length=120),
    call(),
]


def addresses(values):
    return [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in values]


def check(outputs, a):
    """Ours launches the kernel that Triton would, with the same values."""
    launched.clear()
    kernel = corrupt.corrupt_triton(outputs, a)
    own = corrupt.corrupt_kernel
    expected = own[(a.batch,)](*corrupt.kernel_arguments(outputs, a), **corrupt.launch_options(a))
    (mine, theirs) = launched[0], launched[-1]
    assert kernel is expected, "another kernel"
    assert mine[:3] == theirs[:3] == (a.batch, 1, 1), "another grid"
    first = len(theirs) - len(own.arg_names)
    assert addresses(mine[first:]) == addresses(theirs[first:]), "other values"


def microseconds(fn, calls=300, repeats=10):
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        best = min(best, (time.perf_counter() - start) / calls)
        launched.clear()
    return best * 1e6


if __name__ == "__main__":
    for _ in range(2):
        for outputs, a in CALLS:
            check(outputs, a)
    outputs, a = CALLS[0]
    options = corrupt.launch_options(a)
    values = corrupt.kernel_arguments(outputs, a)
    ours = microseconds(lambda: corrupt.corrupt_triton(outputs, a))
    theirs = microseconds(lambda: corrupt.corrupt_kernel[(4,)](*values, **options))
    print(f"{len(corrupt._launch._compiled)} kernels; {ours:.1f} us ours, {theirs:.1f} us Triton's")
