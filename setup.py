"""Builds the C++ extension with ninja; all else about the package is in pyproject.toml.

An extension is optional. Where it cannot be built the installation still succeeds, the package runs
on the pure-Python backends, and the reason is left in nar_kernels/_build_failure.txt. Setting
NAR_KERNELS_REQUIRE_CPP=1 makes a failure of `nar_kernels._cpp` fatal.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# pip installs the build requirements by itself; a direct run of this file uses what is there.
if int(__version__.partition(".")[0]) < 77:
    raise SystemExit(
        f"setup.py needs setuptools 77 or newer and found {__version__}: run `make`, or "
        "`pip install -U 'setuptools>=77' pybind11 ninja`"
    )

CPP_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -DNDEBUG -pthread"

# After the user's own flags: results are bit-identical on every machine, whatever those say.
EXACT_FLAGS = "-fno-fast-math -ffp-contract=off"

# Only these files may use more than the baseline instruction set; the code in them is chosen at run
# time. Never -march=native: a wheel must run on machines other than the one that built it.
SIMD_FLAGS = {
    "avx2": "-mavx2 -mbmi2 -mpopcnt",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mbmi2 -mpopcnt "
    "-mprefer-vector-width=512 "
    # GCC 12 warns inside its own AVX-512 header, and clang does not know the warning.
    "-Wno-unknown-warning-option -Wno-maybe-uninitialized",
}


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


def write_cpp_ninja(ninja_file: Path, sources: list[str], output: str) -> None:
    """Describe the build of `nar_kernels._cpp`. Paths are relative to the repository."""
    import pybind11  # both are build requirements, not always there in a plain `setup.py` run
    from ninja.ninja_syntax import Writer, escape

    compiler = find_compiler()
    user_flags = [
        flag
        for variable in ("CPPFLAGS", "CFLAGS", "CXXFLAGS")
        for flag in shlex.split(os.environ.get(variable, ""))
    ]
    x86 = targets_x86(compiler, user_flags)
    includes = [f"-isystem{sysconfig.get_path('include')}", f"-isystem{pybind11.get_include()}"]
    defines = ["-DNAR_X86"] if x86 else []
    if not x86:
        sources = [source for source in sources if not simd_level(source)]
    # An inline function emitted by several files is kept once, from the first: link the baseline
    # first, or its AVX copy would also serve processors without AVX.
    sources = sorted(sources, key=lambda source: (len(simd_level(source)), source))
    shared = ["-shared"]
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup"]

    def quoted(*flags: str) -> str:
        return escape(shlex.join(flags))

    ninja_file.parent.mkdir(parents=True, exist_ok=True)
    with ninja_file.open("w") as stream:
        ninja = Writer(stream, width=10**6)
        ninja.variable("builddir", ninja_file.parent.as_posix())
        ninja.variable("cxx", quoted(*compiler))
        ninja.variable("flags", quoted(*CPP_FLAGS.split(), *includes, *defines, *user_flags))
        ninja.variable("exact", EXACT_FLAGS)
        ninja.variable("ldflags", quoted(*shlex.split(os.environ.get("LDFLAGS", ""))))
        ninja.rule(
            "compile",
            "$cxx $flags $simd $exact -MD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="compile $in",
        )
        link = f"$cxx {quoted(*shared)} -pthread $in $ldflags -ldl -o $out"
        ninja.rule("link", link, description="link $out")
        objects = [f"{ninja_file.parent.as_posix()}/{Path(source).stem}.o" for source in sources]
        for source, target in zip(sources, objects, strict=True):
            simd = SIMD_FLAGS.get(simd_level(source), "")
            ninja.build(target, "compile", source, variables={"simd": simd})
        ninja.build(output, "link", objects)


def run_ninja(ninja_file: Path, jobs: int | None) -> None:
    import ninja

    # BIN_DIR is empty in an isolated build environment, which has ninja on PATH instead.
    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", os.fspath(ninja_file)]
    command += ["-j", str(jobs)] if jobs else []
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


# Another optional extension (CUDA) is one more entry here, whose writer raises BuildFailure where
# its toolkit is missing, and its sources below.
NINJA_WRITERS = {"nar_kernels._cpp": write_cpp_ninja}


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
            NINJA_WRITERS[ext.name](ninja_file, ext.sources, os.path.relpath(output))
            run_ninja(ninja_file, self.parallel)
        except (BuildFailure, ImportError, OSError) as error:
            Path(output).unlink(missing_ok=True)
            self.failures[ext.name] = str(error)


cpp_sources = sorted(
    path.as_posix() for path in Path("csrc").glob("*.cpp") if not path.stem.endswith("_cuda")
)

setup(
    ext_modules=[Extension("nar_kernels._cpp", cpp_sources, optional=True)],
    cmdclass={"build_ext": OptionalBuildExt},
)
