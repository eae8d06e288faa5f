"""Builds the extensions with ninja; all else about the package is in pyproject.toml.

Both are optional. Where one cannot be built, the installation still succeeds, the package runs on
the other backends, and the reason is left in nar_kernels/_build_failure.txt. The CUDA extension is
built for the GPUs of this machine. CONTRIBUTING.md lists the environment variables.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

CPP_FLAGS = "-Icsrc -O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -DNDEBUG -pthread"

# After the user's own flags: results are bit-identical on every machine, whatever those say.
EXACT_FLAGS = "-fno-fast-math -ffp-contract=off"

# Only these files, for x86-64, may use more than the baseline instruction set; which one runs is
# chosen at run time. Never -march=native: a wheel must run on machines other than its builder.
SIMD_FLAGS = {
    "csrc/levels/avx2.cpp": "-mavx2 -mfma -mbmi2 -mpopcnt",
    "csrc/levels/avx512.cpp": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mbmi2 -mpopcnt "
    "-mprefer-vector-width=512 "
    # GCC 12 warns inside its own AVX-512 header, and clang does not know the warning.
    "-Wno-unknown-warning-option -Wno-maybe-uninitialized",
}


CUDA_SOURCES = sorted(
    path.as_posix() for pattern in ("*.cu", "*_cuda.cpp") for path in Path("csrc").rglob(pattern)
)
CPP_SOURCES = sorted({path.as_posix() for path in Path("csrc").rglob("*.cpp")} - {*CUDA_SOURCES})

# No --use_fast_math, and no contraction: as EXACT_FLAGS.
NVCC_FLAGS = (
    "-Icsrc -O3 -std=c++17 --fmad=false --cudart=static --threads=0 -DNDEBUG"
    " -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-fno-fast-math,-ffp-contract=off"
)

# "all" is those of these that the toolkit knows. Code for one runs on later ones of the same
# generation (86 on 87, 100 on 103, ...).
CUDA_ARCHITECTURES = (80, 86, 89, 90, 100, 110, 120)

NVIDIA_SMI_SECONDS = 60

# Variables that, set to 1, make it an error that an extension is not built.
REQUIRED_BY = {
    "nar_kernels._cpp": ("NAR_KERNELS_REQUIRE_CPP",),
    "nar_kernels._cuda": ("NAR_KERNELS_CUDA", "NAR_KERNELS_REQUIRE_CUDA"),  # two names of one
}

HOW_TO_CHOOSE = {
    "nar_kernels._cpp": "it needs a C++17 compiler",
    "nar_kernels._cuda": (
        "NAR_KERNELS_CUDA=1 builds it for the GPUs here, or else for all; "
        'NAR_KERNELS_CUDA_ARCHS="90" for one architecture; NAR_KERNELS_CUDA=0 leaves it out'
    ),
}


class BuildFailure(Exception):
    """An extension is not built here; the message says why.

    Args:
        reason: true on any machine that the package goes to.
        details: of this machine only, such as paths and compiler output.
    """

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(f"{reason}: {details}" if details else reason)
        self.reason = reason


def switch(name: str) -> bool | None:
    """An environment variable that is 1 or 0; None if it is not set."""
    value = os.environ.get(name, "").strip()
    if value not in ("", "0", "1"):
        raise OptionError(f"{name} is {value!r}: set it to 1 or 0, or not at all")
    return value == "1" if value else None


def required_by(extension: str) -> str | None:
    """The variable that makes it an error if this is not built."""
    return next((name for name in REQUIRED_BY[extension] if switch(name)), None)


def find_compiler() -> list[str]:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    raise BuildFailure("no C++ compiler", f"{', '.join(candidates)} not found")


def targets_x86(compiler: list[str], flags: list[str]) -> bool:
    """Ask the compiler, not the host, since CXX may cross-compile."""
    probe = [*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull]
    result = subprocess.run(probe, capture_output=True, text=True)
    if result.returncode != 0:
        details = f"{shlex.join(probe)}: {result.stderr.strip()}"
        raise BuildFailure("the C++ compiler does not run", details)
    return "__x86_64__" in result.stdout


def python_includes(folder: Path) -> list[str]:
    """Headers of Python, and a copy of pybind11's in ``folder``.

    Every isolated build has pybind11 at another path, and would compile everything again.
    """
    import pybind11  # a build requirement, not always there in a plain `setup.py` run

    copy = folder / f"pybind11-{pybind11.__version__}"
    if not copy.exists():
        unfinished = folder / "pybind11.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(Path(pybind11.get_include(), "pybind11"), unfinished / "pybind11")
        unfinished.rename(copy)
    return ["-isystem", sysconfig.get_path("include"), "-isystem", copy.as_posix()]


def write_ninja(
    ninja_file: Path,
    sources: list[str],
    output: str,
    *,
    compiler: list[str],
    compile_flags: list[str],
    link_flags: list[str],
    libraries: list[str],
    own_flags: dict[str, str],
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
        objects = [f"{folder}/{Path(source).with_suffix('.o').as_posix()}" for source in sources]
        for source, target in zip(sources, objects, strict=True):
            ninja.build(target, "compile", source, variables={"own": own_flags.get(source, "")})
        ninja.build(output, "link", objects)


def user_flags(*variables: str) -> list[str]:
    return [flag for name in variables for flag in shlex.split(os.environ.get(name, ""))]


def write_cpp_ninja(ninja_file: Path, output: str) -> None:
    """`nar_kernels._cpp`."""
    compiler = find_compiler()
    flags = user_flags("CPPFLAGS", "CFLAGS", "CXXFLAGS")
    x86 = targets_x86(compiler, flags)
    sources = [source for source in CPP_SOURCES if x86 or source not in SIMD_FLAGS]
    print(f"nar_kernels._cpp: {len(sources)} files, with {shlex.join(compiler)}", flush=True)
    shared = ["-shared"]
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup"]
    write_ninja(
        ninja_file,
        # The linker keeps the first copy of an inline function: baseline files come first, or CPUs
        # without AVX would run an AVX copy.
        sorted(sources, key=lambda source: (source in SIMD_FLAGS, source)),
        output,
        compiler=compiler,
        compile_flags=[
            *CPP_FLAGS.split(),
            *python_includes(ninja_file.parent),
            *(["-DNAR_X86"] if x86 else []),
            *flags,
        ],
        link_flags=[*shared, "-pthread"],
        libraries=[*user_flags("LDFLAGS"), "-ldl"],
        own_flags=SIMD_FLAGS,
        last_flags=EXACT_FLAGS,
    )


def find_nvcc() -> str:
    """In CUDA_HOME if that is set, else on PATH or where the toolkit's installer puts it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        where = f"{home}/bin" if home else "PATH or /usr/local/cuda/bin"
        raise BuildFailure("no CUDA toolkit", f"nvcc is not in {where}")
    return nvcc


def known_architectures(nvcc: str) -> list[int]:
    """Those that nvcc compiles for, from the first of CUDA_ARCHITECTURES on."""
    probe = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    numbers = map(int, re.findall(r"^compute_(\d+)$", probe.stdout, re.MULTILINE))
    known = sorted(number for number in numbers if number >= CUDA_ARCHITECTURES[0])
    if not known:
        oldest = CUDA_ARCHITECTURES[0]
        details = f"{nvcc} --list-gpu-arch names none from compute_{oldest} on"
        raise BuildFailure("the CUDA toolkit is too old", details)
    return known


def chosen_architectures() -> list[str]:
    """The words of NAR_KERNELS_CUDA_ARCHS: "all", or numbers; none if it is not set."""
    words = os.environ.get("NAR_KERNELS_CUDA_ARCHS", "").split()
    if words != ["all"] and not all(re.fullmatch("[0-9]+", word) for word in words):
        raise OptionError(
            f"NAR_KERNELS_CUDA_ARCHS is {' '.join(words)!r}: give numbers with spaces between, "
            "such as '80 90', or 'all'"
        )
    return words


def architectures_here(known: list[int]) -> list[int]:
    """For the GPUs of this machine: asked of the driver's tool, since a build has no PyTorch."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            query,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=NVIDIA_SMI_SECONDS,
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailure("no GPU was found", str(error)) from None
    # A lost GPU, or a driver that does not know the query, prints something else.
    numbers = re.findall(r"^\s*(\d+)\.(\d)\s*$", answer, re.MULTILINE)
    found = sorted({int(major + minor) for major, minor in numbers})
    if not found:
        first_line = next(iter(answer.strip().splitlines()), "nothing")
        raise BuildFailure("no GPU was found", f"{query[0]} says: {first_line}")
    # For a GPU newer than nvcc: the newest architecture before it, whose code or PTX it runs.
    served = {max(n for n in known if n <= gpu) for gpu in found if gpu >= known[0]}
    if not served:
        names = " ".join(f"sm_{gpu}" for gpu in found)
        raise BuildFailure(f"no GPU from sm_{known[0]} on was found", f"there is {names}")
    return sorted(served)


def torch_lacks_cuda() -> bool:
    """Whether PyTorch is here, built without CUDA. Its file is read: to import it takes seconds."""
    spec = find_spec("torch")
    for folder in (spec and spec.submodule_search_locations) or []:
        version = Path(folder, "version.py")
        if version.is_file():
            return runpy.run_path(str(version)).get("cuda", "") is None
    return False


def cuda_architectures(nvcc: str) -> list[int]:
    """What to compile for, in ascending order.

    Raises:
        BuildFailure: for nothing, since no GPU is here and nobody asked for code.
    """
    chosen = chosen_architectures()
    if chosen and chosen != ["all"]:
        return sorted({*map(int, chosen)})
    known = known_architectures(nvcc)
    everything = [number for number in CUDA_ARCHITECTURES if number in known]
    if chosen:
        return everything
    is_required = required_by("nar_kernels._cuda") is not None
    if not is_required and torch_lacks_cuda():
        raise BuildFailure("PyTorch had no CUDA")
    try:
        return architectures_here(known)
    except BuildFailure:
        if is_required:
            return everything
        raise


def write_cuda_ninja(ninja_file: Path, output: str) -> None:
    """`nar_kernels._cuda`, which needs no CUDA library when it is loaded."""
    if switch("NAR_KERNELS_CUDA") is False:
        raise BuildFailure("NAR_KERNELS_CUDA was 0")
    nvcc = find_nvcc()
    architectures = cuda_architectures(nvcc)
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    # The newest is also kept as PTX, for GPUs yet to come.
    newest = architectures[-1]
    codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    names = " ".join(f"sm_{a}" for a in architectures)
    print(f"nar_kernels._cuda: {names}, with {nvcc}", flush=True)
    write_ninja(
        ninja_file,
        CUDA_SOURCES,
        output,
        compiler=[nvcc],
        compile_flags=[
            *NVCC_FLAGS.split(),
            *codes,
            f'-DNAR_CUDA_ARCHS="{names}"',
            *python_includes(ninja_file.parent),
        ],
        link_flags=["-shared", "--cudart=static"],
        libraries=[],
        own_flags={},
    )


def run_ninja(ninja_file: Path, jobs: int | None, is_dry_run: bool) -> None:
    import ninja

    # BIN_DIR is empty in an isolated build environment, which has ninja on PATH instead.
    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", os.fspath(ninja_file)]
    command += ["-j", str(jobs)] if jobs else []
    command += ["-n"] if is_dry_run else []
    said = ""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},  # plain quotes in the messages that are kept
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            said += line
    if process.returncode != 0:
        _, failed, details = said.partition("FAILED: ")
        first_lines = (failed + details or said).splitlines()[:20]
        raise BuildFailure("the compilation failed", "\n".join(first_lines))


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
        # Checked first: later, an error in them would pass for a failure of an optional extension.
        chosen_architectures()
        required = {extension: required_by(extension) for extension in REQUIRED_BY}
        self.failures: dict[str, BuildFailure] = {}
        super().run()
        package = Path("nar_kernels") if self.inplace else Path(self.build_lib, "nar_kernels")
        report = package / "_build_failure.txt"
        report.unlink(missing_ok=True)
        if not self.failures:
            return
        lines = [
            # What goes into a wheel may be read on another machine.
            f"{name}: {failure if self.inplace else failure.reason}"
            for name, failure in self.failures.items()
        ]
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text("\n".join(lines) + "\n", encoding="utf-8")
        for name, failure in self.failures.items():
            # A library of an earlier build would hide that its sources do not build now.
            (package / Path(self.get_ext_filename(name)).name).unlink(missing_ok=True)
            if required[name]:
                raise CompileError(
                    f"{required[name]} is set, and the build failed: {name}: {failure}"
                )
            self.warn(f"{name} is not built: {failure} ({HOW_TO_CHOOSE[name]})")

    def build_extension(self, ext: Extension) -> None:
        ninja_file = Path(self.build_temp, ext.name, "build.ninja")
        output = self.get_ext_fullpath(ext.name)
        try:
            build(ext.name, ninja_file, output, self.parallel)
        except BuildFailure as failure:
            self.failures[ext.name] = failure
        except (ImportError, OSError) as error:
            reason = f"the build stopped with {type(error).__name__}"
            self.failures[ext.name] = BuildFailure(reason, str(error))
        if ext.name in self.failures:
            Path(output).unlink(missing_ok=True)


def long_description() -> str:
    """README.md without relative links, which lead nowhere on a package index: their text stays,
    pictures go. Code is left as it is.
    """
    readme = Path("README.md")
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    relative = r"\((?![a-z]+:|#)[^)]*\)"
    code, picture = r"```.*?```|`[^`\n]*`", rf"!\[[^]]*\]{relative}\n*"
    link = rf"\[([^]]*)\]{relative}"
    return re.sub(f"({code})|{picture}|{link}", r"\1\2", text, flags=re.DOTALL)


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
        long_description=long_description(),
        long_description_content_type="text/markdown",
    )
