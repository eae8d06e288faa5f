"""What the suite does, in the order of what it is worth: a call ends where its minutes end."""

import sys
from pathlib import Path

from benchmarks.gpu_suite.runner import Step

# The files with tests of GPU kernels, which need no package beside PyTorch, Triton and pytest.
TESTS = [
    f"tests/test_{name}.py" for name in ("gpu", "corrupt", "cuda_kernels", "masked_nll", "unmask")
]

# What a sanitizer looks at: the kernel's name, and some six tests in all.
SANITIZED = {
    "corrupt": [
        "tests/test_corrupt.py::test_equals_reference[129-exact-cuda]",
        "tests/test_corrupt.py::test_equals_reference[1000-exact-cuda]",
        "tests/test_corrupt.py::test_equals_reference[4097-bernoulli-cuda]",
        "tests/test_corrupt.py::test_equals_reference[1000-exact-triton]",
    ],
    "nll": ["tests/test_gpu.py::test_masked_nll_equals_that_of_the_cpu[float32-300]"],
    "unmask": ["tests/test_gpu.py::test_unmask_equals_that_of_the_cpu[float16-4099]"],
}

SANITIZERS = {
    "memcheck": "no access out of bounds",
    "racecheck": "no race in shared memory",
    "synccheck": "no barrier that is used wrongly",
    "initcheck": "no read of memory that nobody wrote",
}


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.gpu_suite.{name}", *arguments]


def setup_steps(wheels: Path | None, dry: list[str]) -> list[Step]:
    return [
        Step(
            "environment",
            "the GPU, and the versions of everything",
            module("environment", "{work}/environment.json", *dry),
            seconds=60,
            is_setup=True,
        ),
        Step(
            "wheels",
            "packages brought along: peers, and plugins of pytest",
            module("wheels", "install", str(wheels or ""), "{work}/site"),
            seconds=60,
            is_setup=True,
        ),
        Step(
            "build",
            "both extensions build, for this GPU, and load",
            module("build", "{work}", *dry),
            seconds=200,
            needs=("environment",),
            tools=("nvcc",),
            is_setup=True,
        ),
    ]


def tests(name: str, about: str, expression: str, dry: list[str], **more) -> Step:
    """Those in ``TESTS`` with these marks."""
    workers = more.pop("workers", "1")
    options = ["--workers", workers, "--junit", f"{{work}}/{name}.xml", *dry]
    command = module("run_tests", *options, "--", *TESTS, "-m", expression)
    return Step(name, about, command, needs=("build",), packages=("pytest",), **more)


def sanitizer(tool: str, kernel: str, dry: list[str]) -> Step:
    name = f"{tool}_{kernel}"
    command = module("sanitize", tool, kernel, *dry, "--", *SANITIZED[kernel])
    return Step(
        name,
        f"{tool} of {kernel}: {SANITIZERS[tool]}",
        command,
        seconds=150,
        needs=("build",),
        packages=("pytest", "triton"),
        tools=() if dry else ("compute-sanitizer",),
        beside=True,
        # Without PyTorch's own allocator an access outside of a tensor is one outside of an
        # allocation.
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def benchmark(name: str, about: str, script: str, *options: str, seconds: float, **more) -> Step:
    options = *options, "--json", f"{{work}}/{name}.json"
    command = [sys.executable, f"benchmarks/{script}.py", *options]
    return Step(
        name, about, command, seconds=seconds, least=20, needs=("build",), has_figures=True, **more
    )


def all_steps(wheels: Path | None, is_dry_run: bool) -> list[Step]:
    dry = ["--dry-run"] if is_dry_run else []
    on_gpu = ["--device", "cuda", *dry]
    peer = ("x_transformers",)
    first = [
        tests(
            "smoke",
            "tests of streams, graphs, waiting, memory, large batches; corrupt in CUDA C++",
            "gpu and not triton",
            dry,
            seconds=120,
        ),
        benchmark(
            "bench_corrupt_cuda",
            "speed of corrupt in CUDA C++",
            "bench_corrupt_gpu",
            *("--backend", "cuda", *dry),
            seconds=60,
        ),
        benchmark(
            "bench_masked_nll", "speed of masked_nll", "bench_masked_nll", *on_gpu, seconds=150
        ),
        benchmark("bench_unmask", "speed of unmask", "bench_unmask", *on_gpu, seconds=60),
        tests(
            "tests_cuda",
            "tests of corrupt in CUDA C++",
            "cuda and not gpu",
            dry,
            workers="a core",
            seconds=120,
            beside=True,
        ),
        tests(
            "tests_triton",
            "tests of corrupt, masked_nll and unmask in Triton",
            "triton and not large",
            dry,
            workers="a core",
            seconds=200,
            beside=True,
        ),
        *(
            sanitizer(tool, kernel, dry)
            for tool in ("memcheck", "racecheck")
            for kernel in SANITIZED
        ),
    ]
    second = [
        benchmark(
            "bench_corrupt_triton",
            "speed of corrupt in Triton",
            "bench_corrupt_gpu",
            *("--backend", "triton", *dry),
            seconds=100,
        ),
        benchmark(
            "bench_train_step",
            "a training step beside x-transformers' wrapper",
            "bench_train_step",
            *on_gpu,
            seconds=120,
            packages=peer,
        ),
        benchmark(
            "bench_generate",
            "generate beside x-transformers' wrapper",
            "bench_generate",
            *on_gpu,
            seconds=120,
            packages=peer,
        ),
        tests(
            "tests_large",
            "more than 2**31 positions in Triton",
            "triton and large",
            dry,
            seconds=60,
        ),
        *(sanitizer("synccheck", kernel, dry) for kernel in SANITIZED),
        *(sanitizer("initcheck", kernel, dry) for kernel in ("corrupt", "unmask")),
    ]
    return setup_steps(wheels, dry) + first + second
