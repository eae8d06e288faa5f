"""Triton's own dispatch of every kernel beside ours, with a driver that launches nothing.

Both end in the launcher that Triton compiles, which is linked against a stand-in for libcuda: what
is compared is what the GPU would be given. Run as a program, since Triton's interpreter, which
other tests need, cannot be switched off again. Prints what went wrong, or for each kernel how many
were compiled and the host's microseconds a call of both.
"""

import os

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import ctypes
import time
import warnings
from functools import partial
from typing import NamedTuple

import torch

from tests import cuda_on_cpu

warnings.simplefilter("ignore")
STAND_IN = cuda_on_cpu.stand_in_for_libcuda()
os.environ["TRITON_LIBCUDA_PATH"] = os.fspath(STAND_IN.parent)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402


class Launch(ctypes.Structure):
    _fields_ = (("grid_and_block", ctypes.c_uint32 * 6), ("arguments", ctypes.c_uint64 * 64))


libcuda = ctypes.CDLL(os.fspath(STAND_IN), mode=ctypes.RTLD_GLOBAL)  # launchers find it loaded
sizes = (ctypes.c_int * 64).in_dll(libcuda, "sizes")
num_arguments = ctypes.c_int.in_dll(libcuda, "num_arguments")
num_launches = ctypes.c_int.in_dll(libcuda, "num_launches")
last = Launch.in_dll(libcuda, "last")


class Utilities(CudaUtils):
    def __init__(self):
        super().__init__()
        self.load_binary = lambda *arguments: (0, 77, 32, 0, 1024)
        self.unload_module = lambda module: None
        self.get_device_properties = lambda device: {
            "max_shared_mem": 228_000,
            "warpSize": 32,
            "max_num_regs": 65536,
        }


class NoDriver:
    """What Triton asks of a driver; kernels are compiled for sm_90."""

    def __init__(self):
        self.utils = Utilities()
        self.launcher_cls = CudaLauncher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


driver.set_active(NoDriver())
SIZES = {"i1": 1, "i32": 4, "fp32": 4, "i64": 8}

from nar_kernels import MaskingConfig  # noqa: E402
from nar_kernels.ops.arguments import ChooseArgs, NllArgs, UnmaskArgs  # noqa: E402
from nar_kernels.ops.corrupt_launch import empty_outputs  # noqa: E402
from nar_kernels.ops.kernels import choose, corrupt, nll, unmask  # noqa: E402
from nar_kernels.ops.kernels.launcher import Launcher  # noqa: E402
from tests.helpers.batches import arguments  # noqa: E402

CORPUS = torch.zeros(40_000, dtype=torch.uint16)
FLOATS = torch.zeros(40_000)
WORDS = torch.zeros(64, dtype=torch.int64)


def corrupt_call(
    num_tokens=300, skip=0, batch=4, length=128, seed=1, step=0, keep=0.0, maskable=False, windows=7
):
    """A batch that is a corpus with windows in an order."""
    masking = MaskingConfig(num_tokens, num_tokens - 1, no_replace_prob=keep)
    tokens = CORPUS[skip : skip + batch * length].view(batch, length)
    a = arguments(
        tokens, masking, seed=seed, first_sample=step * batch, num_windows=windows, stride=3
    )
    if maskable:
        a = a._replace(maskable=torch.ones(batch, length, dtype=torch.bool))
    outputs = empty_outputs(a, tokens.device)
    workspace = torch.zeros(corrupt.workspace_size(batch), dtype=torch.int64)
    return partial(corrupt.corrupt_triton, (*outputs, workspace), a)


def nll_call(
    vocabulary=300, stride=304, rows=5, dtype=torch.float32, bias=False, weight=False, gradient=True
):
    logits = torch.empty(rows, stride, dtype=dtype)[:, :vocabulary]
    return partial(
        nll.nll_triton,
        FLOATS[:rows],
        NllArgs(
            logits,
            WORDS[:rows],
            FLOATS[:vocabulary] if bias else None,
            FLOATS[:rows] if weight else None,
            gradient,
        ),
    )


def unmask_call(
    vocabulary=300,
    skip=0,
    dtype=torch.float32,
    given=False,
    forbidden=(299,),
    seed=1,
    top_k=30,
    top_p=1 << 30,
    inverse_temperature=2.0,
    confidence="probability",
):
    rows = 5
    logits = torch.empty(rows * vocabulary + skip, dtype=dtype)[skip:].view(rows, vocabulary)
    slots = WORDS[:rows]
    outputs = torch.empty_like(slots), FLOATS[:rows], FLOATS[8 : 8 + rows]
    options = slots if given else None, list(forbidden), 7, seed, top_k, top_p, inverse_temperature
    a = UnmaskArgs(logits, slots, *options, confidence)
    return partial(unmask.unmask_triton, outputs, a)


def choose_call(
    length=300, skip=0, score=True, noise=0.0, lowest_first=False, by_position=False, seed=1, slot=5
):
    rows = WORDS[skip : skip + 20]
    return partial(
        choose.choose_triton,
        (WORDS[:20], WORDS[:20]),
        ChooseArgs(
            score=FLOATS[:20] if score else None,
            by_position=by_position,
            lowest_first=lowest_first,
            noise_scale=noise,
            rows=rows,
            bounds=WORDS[:5],
            left_bounds=WORDS[:5],
            num_left=0,
            length=length,
            seed=seed,
            first_slot=slot,
            slot_stride=7,
        ),
    )


class Case(NamedTuple):
    """A kernel, the calls that are tried, and how many kernels they are in all."""

    launcher: Launcher
    calls: list
    compiled: int


CASES = {
    "corrupt": Case(
        corrupt._launch,
        [
            corrupt_call(),
            # The same kernel: other and wider numbers.
            corrupt_call(seed=2, step=3),
            corrupt_call(seed=-(2**62), step=2**40),
            corrupt_call(seed=2**62, step=2**41, windows=2**33),
            corrupt_call(num_tokens=304, batch=5, windows=1),
            corrupt_call(keep=0.1),
            corrupt_call(keep=0.2),
            corrupt_call(keep=1.0),
            corrupt_call(skip=1),  # ids that do not begin at a multiple of 16 bytes
            corrupt_call(skip=8),
            corrupt_call(maskable=True),
            corrupt_call(length=120),
            corrupt_call(windows=0),
            corrupt_call(),
        ],
        6,
    ),
    "nll": Case(
        nll._launch,
        [
            nll_call(),
            nll_call(vocabulary=290, rows=7),
            nll_call(vocabulary=304),
            nll_call(vocabulary=299, stride=299),  # rows at any address
            nll_call(weight=True),
            nll_call(bias=True),
            nll_call(gradient=False),
            nll_call(dtype=torch.bfloat16),
            nll_call(vocabulary=2100, stride=2112),
        ],
        7,
    ),
    "unmask": Case(
        unmask._launch,
        [
            unmask_call(),
            unmask_call(seed=-(2**62), top_k=1, inverse_temperature=0, forbidden=()),
            unmask_call(forbidden=(1, 16), inverse_temperature=0.5, top_k=16),
            unmask_call(top_k=300),
            unmask_call(top_k=300, dtype=torch.bfloat16),
            unmask_call(top_k=300, dtype=torch.bfloat16, skip=1),
            unmask_call(forbidden=(1, 2, 3)),
            unmask_call(given=True),
            unmask_call(confidence="entropy"),
            unmask_call(vocabulary=304),
            unmask_call(top_p=1 << 29),
            # The same kernel.
            unmask_call(top_p=1),
            unmask_call(top_p=1 << 28, inverse_temperature=0),
        ],
        9,
    ),
    "choose": Case(
        choose._launch,
        [
            choose_call(),
            # The same kernel: other and wider numbers.
            choose_call(length=304, seed=2**62, slot=-(2**63)),
            choose_call(noise=1.0),
            choose_call(noise=0.25, seed=16),
            choose_call(score=False),
            choose_call(lowest_first=True),
            choose_call(by_position=True),
            choose_call(skip=1),
            choose_call(length=70_000),
        ],
        7,
    ),
}


def given_to_the_gpu(call):
    """The kernel that a call launches, its grid, and the values of its arguments."""
    before = num_launches.value
    kernel = call()
    assert num_launches.value == before + 1, "it does not launch once"
    return kernel, list(last.grid_and_block), list(last.arguments)


def launch_of(launcher, call):
    """What a call asks of its launcher: grid, arguments, variant, options; and what it got."""
    asked = []
    original = Launcher.__call__

    def spy(self, *arguments):
        asked.append((self, arguments))
        return original(self, *arguments)

    Launcher.__call__ = spy
    try:
        call()
    finally:
        Launcher.__call__ = original
    ((asked_of, arguments),) = asked
    assert asked_of is launcher
    return arguments


def check(launcher, call):
    """Ours launches the kernel that Triton would, with the same values."""
    num_arguments.value = 0  # until it is known how many the kernel has
    grid, arguments, variant, options = launch_of(launcher, call)
    kernel = launcher(grid, arguments, variant, options)
    types = [kind for kind in kernel.src.signature.values() if kind != "constexpr"]
    num_arguments.value = len(types)
    sizes[: len(types)] = [SIZES.get(kind, 8) for kind in types]
    mine = given_to_the_gpu(lambda: launcher(grid, arguments, variant, options))
    theirs = given_to_the_gpu(lambda: launcher._kernel[(grid,)](*arguments, **options()))
    assert mine[0] is theirs[0], "another kernel"
    assert mine[1] == theirs[1] and mine[1][:3] == [grid, 1, 1], "another grid"
    assert mine[2] == theirs[2], "other values"
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    assert {x.data_ptr() for x in tensors} <= {*mine[2]}, "tensors are not among them"


def microseconds(fn, calls=300, repeats=10):
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


if __name__ == "__main__":
    for name, case in CASES.items():
        kernels = set()
        for call in 2 * case.calls:
            try:
                check(case.launcher, call)
            except Exception as error:
                raise AssertionError(f"{name}: {call}") from error
        kernels = {id(kernel) for kernel, _ in case.launcher._compiled.values()}
        assert len(kernels) == case.compiled, f"{name}: {len(kernels)} kernels"
        grid, given, variant, options = launch_of(case.launcher, case.calls[0])
        kernel, constants = case.launcher._kernel, options()
        ours = microseconds(partial(case.launcher, grid, given, variant, options))
        theirs = microseconds(lambda: kernel[(grid,)](*given, **constants))  # noqa: B023
        print(f"{name}: {len(kernels)} kernels; {ours:.1f} us ours, {theirs:.1f} us Triton's")
