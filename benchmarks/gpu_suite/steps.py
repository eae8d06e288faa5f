"""The steps of the suite, most valuable first, since a call stops when its time budget ends."""

import os
import sys
from pathlib import Path

from benchmarks.gpu_suite.step import Step

# Files with tests of GPU kernels; they need only PyTorch, Triton and pytest.
TESTS = [
    "tests/test_gpu.py",
    *(
        f"tests/ops/test_{name}.py"
        for name in (
            "blocks",
            "choose",
            "corrupt",
            "cuda_kernels",
            "documents",
            "linear",
            "mask_tokens",
            "masked_nll",
            "nll",
            "static_shapes",
            "top_p",
            "unmask",
            "views",
        )
    ),
]

# Shared by two parallel test steps, one worker per core.
CORES = max(os.cpu_count() or 1, 6)

# Tests to run under the sanitizers, by kernel name.
SANITIZED = {
    "corrupt": [
        "tests/ops/test_corrupt.py::test_equals_reference[129-exact-cuda]",
        "tests/ops/test_corrupt.py::test_equals_reference[1000-exact-cuda]",
        "tests/ops/test_corrupt.py::test_equals_reference[4097-bernoulli-cuda]",
        "tests/ops/test_corrupt.py::test_equals_reference[1000-exact-triton]",
    ],
    "nll": ["tests/test_gpu.py::test_masked_nll_equals_that_of_the_cpu[float32-300]"],
    # In CUDA: rows of a warp, of a block, with a table of exponentials, too long for shared memory.
    "unmask": [
        f"tests/test_gpu.py::test_unmask_equals_that_of_the_cpu[{case}]"
        for case in (
            "float32-300-cuda",
            "float16-4099-cuda",
            "bfloat16-50258-cuda",
            "bfloat16-128256-cuda",
            "float16-4099-triton",
        )
    ],
    "choose": ["tests/ops/test_choose.py::test_triton_agrees[noise]"],
}

SANITIZERS = {
    "memcheck": "no out-of-bounds access",
    "racecheck": "no shared-memory races",
    "synccheck": "no invalid barriers",
    "initcheck": "no uninitialised reads",
}


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.gpu_suite.{name}", *arguments]


def setup_steps(wheels: Path | None, dry: list[str], is_prebuilt: bool) -> list[Step]:
    prebuilt = ["--prebuilt"] if is_prebuilt else []
    return [
        Step(
            "wheels",
            "installs wheels: peers, and plugins of pytest",
            module("wheels", "install", str(wheels or ""), "{work}/site"),
            timeout=60,
            is_setup=True,
        ),
        Step(
            "environment",
            "the GPU, and the versions of everything",
            module("environment", "{work}/environment.json", *dry),
            timeout=60,
            is_setup=True,
        ),
        *(
            Step(
                f"build_{name}",
                f"the extension nar_kernels._{name} builds and loads",
                module("build", name, "{work}", *dry, *prebuilt),
                timeout=200,
                needs=("environment",),
                parallel=True,
                is_setup=True,
            )
            for name in ("cpp", "cuda")
        ),
    ]


def tests(
    name: str, about: str, marks: str, dry: list[str], *, timeout: float, workers: int = 1
) -> Step:
    """A step that runs the tests in ``TESTS`` with these ``marks``, on ``workers`` processes."""
    options = ["--workers", str(workers), "--results", f"{{work}}/{name}", *dry]
    return Step(
        name,
        about,
        module("run_tests", *options, "--", *TESTS, "-m", marks),
        timeout=timeout,
        min_seconds=30,
        needs=("environment",),
        packages=("pytest",),
        parallel=workers > 1,
    )


def sanitizer(tool: str, kernel: str, dry: list[str]) -> Step:
    return Step(
        f"{tool}_{kernel}",
        f"{tool} of {kernel}: {SANITIZERS[tool]}",
        module("sanitize", tool, kernel, *dry, "--", *SANITIZED[kernel]),
        timeout=150,
        min_seconds=40,
        needs=("environment",),
        packages=("pytest", "triton"),
        tools=() if dry else ("compute-sanitizer",),
        parallel=True,
        # Without the caching allocator, an access out of a tensor's bounds is one out of an
        # allocation's bounds.
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def benchmark(
    name: str,
    about: str,
    script: str,
    *options: str,
    timeout: float,
    needs: tuple[str, ...] = (),
    packages: tuple[str, ...] = ("triton",),
    tools: tuple[str, ...] = (),
) -> Step:
    command = [sys.executable, f"benchmarks/{script}.py", *options]
    return Step(
        name,
        about,
        [*command, "--json", f"{{work}}/{name}.json"],
        timeout=timeout,
        min_seconds=20,
        needs=("environment", *needs),
        packages=packages,
        tools=tools,
        is_benchmark=True,
    )


def first_half(dry: list[str]) -> list[Step]:
    """Steps for a first call of about six minutes."""
    on_gpu = ["--device", "cuda", *dry]
    briefly = [*on_gpu, "--repeats", "3"]  # calls of seconds
    return [
        tests(
            "smoke",
            "streams, CUDA graphs and memory kinds with corrupt and unmask in CUDA C++",
            "gpu and cuda and not large",
            dry,
            timeout=100,
        ),
        benchmark(
            "bench_corrupt_cuda",
            "speed of corrupt in CUDA C++",
            "bench_corrupt_gpu",
            *("--backend", "cuda", *dry),
            timeout=60,
            needs=("build_cuda",),
        ),
        tests(
            "tests_cuda",
            "corrupt and unmask in CUDA C++; host synchronisation; loaders, loss, training steps",
            "(cuda or gpu) and not (gpu and cuda) and not triton and not large",
            dry,
            timeout=150,
            workers=CORES // 3,
        ),
        tests(
            "tests_triton",
            "corrupt, masked_nll, unmask and choose in Triton",
            "triton and not large",
            dry,
            timeout=260,
            workers=CORES * 2 // 3,
        ),
        *(sanitizer("memcheck", kernel, dry) for kernel in SANITIZED),
        *(sanitizer("racecheck", kernel, dry) for kernel in SANITIZED),
        *(sanitizer("synccheck", kernel, dry) for kernel in SANITIZED),
        *(sanitizer("initcheck", kernel, dry) for kernel in ("corrupt", "unmask")),
        benchmark("bench_unmask", "speed of unmask", "bench_unmask", *on_gpu, timeout=90),
        benchmark("bench_nll", "speed of the loss of logits", "bench_nll", *on_gpu, timeout=60),
        benchmark(
            "bench_masked_nll", "speed of masked_nll", "bench_masked_nll", *briefly, timeout=150
        ),
    ]


def second_half(dry: list[str]) -> list[Step]:
    """Steps for a second call of about four minutes."""
    on_gpu = ["--device", "cuda", *dry]
    briefly = [*on_gpu, "--repeats", "3"]
    return [
        benchmark(
            "bench_train_step",
            "a training step against x-transformers' wrapper",
            "bench_train_step",
            *briefly,
            timeout=150,
            packages=("triton", "x_transformers"),
        ),
        benchmark(
            "bench_generate",
            "generate against x-transformers' wrapper",
            "bench_generate",
            *briefly,
            timeout=120,
            packages=("triton", "x_transformers"),
        ),
        benchmark(
            "bench_corrupt_triton",
            "speed of corrupt in Triton",
            "bench_corrupt_gpu",
            *("--backend", "triton", *dry),
            timeout=100,
        ),
        benchmark(
            "profile_kernels",
            "instructions, issue slots and stalls by Nsight Compute",
            "profile_kernels",
            *dry,
            timeout=100,
            needs=("build_cuda",),
            tools=() if dry else ("ncu",),
        ),
        benchmark("bench_choose", "speed of choose", "bench_choose", *on_gpu, timeout=60),
        tests("tests_large", "more than 2**31 positions", "large", dry, timeout=90),
    ]


def all_steps(
    wheels: Path | None, is_dry_run: bool = False, is_prebuilt: bool = False
) -> list[Step]:
    dry = ["--dry-run"] if is_dry_run else []
    return setup_steps(wheels, dry, is_prebuilt) + first_half(dry) + second_half(dry)
