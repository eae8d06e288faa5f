"""`nar_kernels._cuda` compiled for the CPU: its kernels run in the emulation beside this file."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIBRARY = ROOT / "build/cuda_on_cpu" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
SOURCES = [
    ROOT / "csrc/corrupt/corrupt.cu",
    ROOT / "csrc/unmask/unmask.cu",
    ROOT / "csrc/bindings_cuda.cpp",
    HERE / "testing.cpp",
]

FLAGS = (
    "-std=c++17 -O2 -fPIC -shared -fvisibility=hidden -pthread -ffp-contract=off"
    " -Wall -Wextra -Werror -Wno-unknown-pragmas"
    # A GPU faults where a pair is loaded from an address that it does not divide; so does this.
    " -fsanitize=alignment,bounds,shift,signed-integer-overflow -fsanitize-undefined-trap-on-error"
).split()


def _compile(compiler: list[str]) -> None:
    headers = [*(ROOT / "csrc").rglob("*.h"), *HERE.glob("*.h"), Path(__file__)]
    newest = max(path.stat().st_mtime for path in (*SOURCES, *headers))
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > newest:
        return
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *compiler,
        *FLAGS,
        '-DNAR_CUDA_ARCHS="cpu"',
        f"-I{HERE}",
        f"-I{ROOT / 'csrc'}",
        f"-isystem{sysconfig.get_path('include')}",
        f"-isystem{pybind11.get_include()}",
        "-xc++",
        *map(str, SOURCES),
        "-o",
        str(LIBRARY),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")


def stand_in_for_libcuda() -> Path:
    """A library that takes the calls of Triton's launchers; compiled if its source has changed."""
    source, library = HERE / "libcuda.cpp", ROOT / "build/cuda_on_cpu/libcuda.so.1"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        library.parent.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        options = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-std=c++17"]
        options.append(f"-Wl,-soname,{library.name}")
        subprocess.run([*compiler, *options, str(source), "-o", str(library)], check=True)
    return library


def load() -> ModuleType | None:
    """The module, compiled if its sources have changed; None where there is no compiler."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        return None
    _compile(compiler)
    spec = importlib.util.spec_from_file_location("nar_kernels._cuda", LIBRARY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
