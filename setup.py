"""Builds the extensions with ninja; all else about the package is in pyproject.toml.

An extension is optional. Where it cannot be built the installation still succeeds, the package runs
on the other backends, and the reason is left in nar_kernels/_build_failure.txt. Setting
NAR_KERNELS_REQUIRE_CPP=1 makes a failure of `nar_kernels._cpp` fatal, NAR_KERNELS_REQUIRE_CUDA=1
one of `nar_kernels._cuda`.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CPP_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -DNDEBUG -pthread"

# After the user's own flags: results are bit-identical on every machine, whatever those say.
EXACT_FLAGS = "-fno-fast-math -ffp-contract=off"

# Only these files may use more than the baseline instruction set; the code in them is chosen at run
# time. Never -march=native: a wheel must run on machines other than the one that built it.
SIMD_FLAGS = {
    "avx2": "-mavx2 -mfma -mbmi2 -mpopcnt",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mbmi2 -mpopcnt "
    "-mprefer-vector-width=512 "
    # GCC 12 warns inside its own AVX-512 header, and clang does not know the warning.
    "-Wno-unknown-warning-option -Wno-maybe-uninitialized",
}


CUDA_SOURCES = sorted(
    path.as_posix() for pattern in ("*.cu", "*_cuda.cpp") for path in Path("csrc").glob(pattern)
)
CPP_SOURCES = sorted({path.as_posix() for path in Path("csrc").glob("*.cpp")} - {*CUDA_SOURCES})

# No --use_fast_math, and no contraction: as EXACT_FLAGS.
NVCC_FLAGS = (
    "-O3 -std=c++17 --fmad=false --cudart=static --threads=0 -DNDEBUG"
    " -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-fno-fast-math,-ffp-contract=off"
)

# Binary code for each of these that the toolkit knows; code for one runs on later ones of the same
# generation (86 on 87, 100 on 103, ...). The newest is also kept as PTX, for GPUs yet to come.
CUDA_ARCHITECTURES = (80, 86, 89, 90, 100, 110, 120)


class BuildFailure(Exception):
    """An extension cannot be built here; the message says why."""


def find_compiler() -> list[str]:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    raise BuildFailure(f"no C++ compiler: {', '.join(candidates)} not found")


def targets_x86(compiler: list[str], flags: list[str]) -> bool:
    """Ask the compiler, not the host, since CXX may cross-compile."""
    probe = [*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull]
    result = subprocess.run(probe, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildFailure(f"{shlex.join(probe)} failed: {result.stderr.strip()}")
    return "__x86_64__" in result.stdout


def simd_level(source: str) -> str:
    """The instruction set that a file name asks for; "" is the baseline."""
    match = re.search(r"_(avx2|avx512)\.cpp$", source)
    return match[1] if match else ""


def python_includes() -> list[str]:
    import pybind11  # a build requirement, not always there in a plain `setup.py` run

    return ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]


def write_ninja(
    ninja_file: Path,
    sources: list[str],
    output: str,
    *,
    compiler: list[str],
    compile_flags: list[str],
    link_flags: list[str],
    libraries: list[str],
    flags_of: Callable[[str], str] = lambda source: "",
    last_flags: str = "",
) -> None:
    """Describe the build of a shared library. Paths are relative to the repository."""
    from ninja.ninja_syntax import Writer, escape

    def quoted(flags: list[str]) -> str:
        return escape(shlex.join(flags))

    folder = ninja_file.parent.as_posix()
    ninja_file.parent.mkdir(parents=True, exist_ok=True)
    with ninja_file.open("w") as stream:
        ninja = Writer(stream, width=10**6)
        ninja.variable("builddir", folder)
        ninja.rule(
            "compile",
            f"{quoted([*compiler, *compile_flags])} $own {last_flags}"
            " -MD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="compile $in",
        )
        link = f"{quoted([*compiler, *link_flags])} $in {quoted(libraries)} -o $out"
        ninja.rule("link", link, description="link $out")
        objects = [f"{folder}/{Path(source).stem}.o" for source in sources]
        for source, target in zip(sources, objects, strict=True):
            ninja.build(target, "compile", source, variables={"own": flags_of(source)})
        ninja.build(output, "link", objects)


def user_flags(*variables: str) -> list[str]:
    return [flag for name in variables for flag in shlex.split(os.environ.get(name, ""))]


def write_cpp_ninja(ninja_file: Path, output: str) -> None:
    """`nar_kernels._cpp`."""
    compiler = find_compiler()
    flags = user_flags("CPPFLAGS", "CFLAGS", "CXXFLAGS")
    x86 = targets_x86(compiler, flags)
    sources = [source for source in CPP_SOURCES if x86 or not simd_level(source)]
    shared = ["-shared"]
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup"]
    write_ninja(
        ninja_file,
        # An inline function emitted by several files is kept once, from the first: link the
        # baseline first, or its AVX copy would also serve processors without AVX.
        sorted(sources, key=lambda source: (len(simd_level(source)), source)),
        output,
        compiler=compiler,
        compile_flags=[
            *CPP_FLAGS.split(),
            *python_includes(),
            *(["-DNAR_X86"] if x86 else []),
            *flags,
        ],
        link_flags=[*shared, "-pthread"],
        libraries=[*user_flags("LDFLAGS"), "-ldl"],
        flags_of=lambda source: SIMD_FLAGS.get(simd_level(source), ""),
        last_flags=EXACT_FLAGS,
    )


def find_nvcc() -> str:
    """In CUDA_HOME if that is set, else on PATH or where the toolkit's installer puts it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        where = f"{home}/bin" if home else "PATH or /usr/local/cuda/bin"
        raise BuildFailure(f"no CUDA toolkit: nvcc is not in {where}")
    return nvcc


def cuda_architectures(nvcc: str) -> list[int]:
    """Those of NAR_KERNELS_CUDA_ARCHS ("90 100"), or of CUDA_ARCHITECTURES that nvcc knows."""
    chosen = os.environ.get("NAR_KERNELS_CUDA_ARCHS")
    if chosen:
        return sorted(map(int, chosen.split()))
    probe = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    known = {int(number) for number in re.findall(r"^compute_(\d+)$", probe.stdout, re.MULTILINE)}
    architectures = [number for number in CUDA_ARCHITECTURES if number in known]
    if not architectures:
        raise BuildFailure(f"{nvcc} knows none of the architectures {CUDA_ARCHITECTURES}")
    return architectures


def write_cuda_ninja(ninja_file: Path, output: str) -> None:
    """`nar_kernels._cuda`, which needs no CUDA library when it is loaded."""
    nvcc = find_nvcc()
    architectures = cuda_architectures(nvcc)
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    newest = architectures[-1]
    codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    names = " ".join(f"sm_{a}" for a in architectures)
    write_ninja(
        ninja_file,
        CUDA_SOURCES,
        output,
        compiler=[nvcc],
        compile_flags=[
            *NVCC_FLAGS.split(),
            *codes,
            f'-DNAR_CUDA_ARCHS="{names}"',
            *python_includes(),
        ],
        link_flags=["-shared", "--cudart=static"],
        libraries=[],
    )


def run_ninja(ninja_file: Path, jobs: int | None, is_dry_run: bool) -> None:
    import ninja

    # BIN_DIR is empty in an isolated build environment, which has ninja on PATH instead.
    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", os.fspath(ninja_file)]
    command += ["-j", str(jobs)] if jobs else []
    command += ["-n"] if is_dry_run else []
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},  # plain quotes in the messages that are kept
    )
    print(result.stdout, end="", flush=True)
    if result.returncode != 0:
        _, failed, details = result.stdout.partition("FAILED: ")
        first_lines = (failed + details or result.stdout).splitlines()[:20]
        raise BuildFailure("the compilation failed:\n" + "\n".join(first_lines))


# Each raises BuildFailure where it cannot be built, such as for want of a compiler.
NINJA_WRITERS = {"nar_kernels._cpp": write_cpp_ninja, "nar_kernels._cuda": write_cuda_ninja}


def build(
    name: str, ninja_file: Path, output: str, jobs: int | None = None, is_dry_run: bool = False
) -> None:
    """Builds an extension; needs nothing of setuptools.

    Raises:
        BuildFailure, ImportError, OSError: it cannot be built here.
    """
    NINJA_WRITERS[name](ninja_file, os.path.relpath(output))
    run_ninja(ninja_file, jobs, is_dry_run)


class OptionalBuildExt(build_ext):
    def initialize_options(self) -> None:
        super().initialize_options()
        # Shared by `pip install -e .` and `build_ext --inplace`.
        self.build_temp = f"build/{sys.implementation.cache_tag}"

    def run(self) -> None:
        self.failures: dict[str, str] = {}
        super().run()
        package = Path("nar_kernels") if self.inplace else Path(self.build_lib, "nar_kernels")
        report = package / "_build_failure.txt"
        report.unlink(missing_ok=True)
        if not self.failures:
            return
        text = "\n".join(f"{name}: {reason}" for name, reason in self.failures.items())
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(text + "\n", encoding="utf-8")
        for name in self.failures:
            # A library left from an earlier build would hide that its sources do not build now.
            (package / Path(self.get_ext_filename(name)).name).unlink(missing_ok=True)
            require = f"NAR_KERNELS_REQUIRE_{name.rpartition('_')[2].upper()}"
            if os.environ.get(require, "0") not in ("", "0"):
                raise CompileError(f"{require} is set, and the build failed: {text}")
        self.warn(f"installing nar_kernels without an optional extension: {text}")

    def build_extension(self, ext: Extension) -> None:
        ninja_file = Path(self.build_temp, ext.name, "build.ninja")
        output = self.get_ext_fullpath(ext.name)
        try:
            build(ext.name, ninja_file, output, self.parallel)
        except (BuildFailure, ImportError, OSError) as error:
            Path(output).unlink(missing_ok=True)
            self.failures[ext.name] = str(error)


if __name__ == "__main__":
    # pip installs the build requirements by itself; a direct run of this file uses what is there.
    if int(__version__.partition(".")[0]) < 77:
        raise SystemExit(
            f"setup.py needs setuptools 77 or newer and found {__version__}: run `make`, or "
            "`pip install -U 'setuptools>=77' pybind11 ninja`"
        )
    setup(
        ext_modules=[
            Extension("nar_kernels._cpp", CPP_SOURCES, optional=True),
            Extension("nar_kernels._cuda", CUDA_SOURCES, optional=True),
        ],
        cmdclass={"build_ext": OptionalBuildExt},
    )
