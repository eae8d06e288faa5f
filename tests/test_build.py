"""The real setup.py on dummy sources with a fake compiler: which flags, what is rebuilt, and what
happens where nothing can be compiled."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REPORT = "nar_kernels/_build_failure.txt"

# Logs its arguments, writes the file after -o and the dependencies after -MF, and compiles nothing.
FAKE_COMPILER = """#!/bin/sh
case "$*" in *-dM*) echo "#define {macro} 1"; exit ;; esac
case "$*" in --list-gpu-arch) printf 'compute_%s\\n' 75 80 90 120; exit ;; esac
echo "$*" >>{log}
case "$*" in *broken.cpp*) echo "broken.cpp:1: error: no such thing"; exit 1 ;; esac
while [ $# -gt 0 ]; do
    case "$1" in
    -o) out=$2; shift ;;
    -MF) dep=$2; shift ;;
    *.cpp | *.cu) source=$1 ;;
    esac
    shift
done
echo object >"$out"
[ -z "$dep" ] || echo "$out: $source $(grep -o 'csrc/.*\\.h' "$source")" >"$dep"
"""


class Checkout:
    """A copy of the parts of the repository that make the build."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = root / "compiler.log"
        for name in ("setup.py", "pyproject.toml", "LICENSE"):
            shutil.copy(ROOT / name, root)
        for package in (ROOT / "nar_kernels").rglob("__init__.py"):
            (root / package.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            (root / package.relative_to(ROOT)).write_text("")
        (root / "csrc").mkdir()
        (root / "csrc/shared.h").write_text("")
        (root / "csrc/op_cpu.cpp").write_text("// csrc/shared.h")
        for name in ("a_avx2", "a_avx512", "bindings", "bindings_cuda"):
            (root / f"csrc/{name}.cpp").write_text("")
        (root / "csrc/op.cu").write_text("// csrc/shared.h")
        # Without a toolkit, unless a test adds one: this folder is where it is looked for.
        self.cuda_home = root / "cuda"
        # The build must not need torch: importing this one fails.
        (root / "trap").mkdir()
        (root / "trap/torch.py").write_text("raise ImportError('the build imported torch')")

    def fake_compiler(self, macro: str = "__x86_64__") -> str:
        path = self.root / "fake c++"
        path.write_text(FAKE_COMPILER.format(macro=macro, log=self.log))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return f"'{path}'"

    def add_toolkit(self) -> None:
        (self.cuda_home / "bin").mkdir(parents=True)
        nvcc = self.cuda_home / "bin/nvcc"
        nvcc.write_text(FAKE_COMPILER.format(macro="", log=self.log))
        nvcc.chmod(0o755)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("NAR_KERNELS_") and not name.endswith("FLAGS")
        }
        own = {"PYTHONPATH": str(self.root / "trap"), "CUDA_HOME": str(self.cuda_home)}
        environment = inherited | own | variables
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def build(self, **variables: str) -> subprocess.CompletedProcess:
        return self.run("setup.py", "build_ext", "--inplace", **variables)

    def compiled(self) -> dict[str, list[str]]:
        """Arguments by source file, of what was compiled since the last call; "" is the link."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        sources = [
            "".join(w for w in line.split() if w.endswith((".cpp", ".cu"))) for line in lines
        ]
        return {source: line.split() for source, line in zip(sources, lines, strict=True)}

    def libraries(self, name: str = "_cpp") -> list[Path]:
        return list(self.root.glob(f"nar_kernels/{name}.*"))

    def report(self, name: str = "_cpp") -> str:
        """Why an extension was not built; empty if it was."""
        path = self.root / REPORT
        text = path.read_text() if path.exists() else ""
        _, _, reason = text.partition(f"nar_kernels.{name}: ")
        return reason.partition("\nnar_kernels.")[0].strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_flags_on_x86(checkout: Checkout) -> None:
    result = checkout.build(CXX=checkout.fake_compiler(), CXXFLAGS="-ffast-math -O1")
    assert result.returncode == 0, result.stdout
    assert checkout.libraries() and not checkout.report()
    compiled = checkout.compiled()
    link = compiled.pop("")
    assert set(compiled) == {
        f"csrc/{name}.cpp" for name in ("op_cpu", "a_avx2", "a_avx512", "bindings")
    }
    for source, flags in compiled.items():
        assert not any(flag.startswith(("-march", "-mtune")) for flag in flags)
        assert "-DNAR_X86" in flags
        assert any("avx2" in flag for flag in flags if flag.startswith("-m")) == ("avx2" in source)
        assert ("-mavx512f" in flags) == ("avx512" in source)
        assert ("-mfma" in flags) == ("avx2" in source)
        # The user's flags win over -O3, but never over what keeps results equal everywhere.
        assert flags.index("-O3") < flags.index("-O1") < flags.index("-ffp-contract=off")
        assert flags.index("-ffast-math") < flags.index("-fno-fast-math")
    objects = [Path(word).stem for word in link if word.endswith(".o")]
    assert objects == ["bindings", "op_cpu", "a_avx2", "a_avx512"]


def test_other_processors_leave_the_x86_files_out(checkout: Checkout) -> None:
    result = checkout.build(CXX=checkout.fake_compiler(macro="__aarch64__"))
    assert result.returncode == 0, result.stdout
    compiled = checkout.compiled()
    assert set(compiled) == {"csrc/op_cpu.cpp", "csrc/bindings.cpp", ""}
    assert not any("NAR_X86" in flag for flags in compiled.values() for flag in flags)


def test_rebuilds_only_what_changed(checkout: Checkout) -> None:
    compiler = checkout.fake_compiler()
    checkout.build(CXX=compiler)
    assert len(checkout.compiled()) == 5
    checkout.build(CXX=compiler)
    assert checkout.compiled() == {}
    header = checkout.root / "csrc/shared.h"
    later = header.stat().st_mtime + 10
    os.utime(header, (later, later))
    checkout.build(CXX=compiler)
    assert set(checkout.compiled()) == {"csrc/op_cpu.cpp", ""}


def test_without_a_compiler(checkout: Checkout) -> None:
    checkout.build(CXX=checkout.fake_compiler())
    result = checkout.build(CXX="/nonexistent")
    assert result.returncode == 0, result.stdout
    assert "no C++ compiler: /nonexistent not found" in result.stdout
    assert checkout.report() == "no C++ compiler: /nonexistent not found"
    assert not checkout.libraries(), "the library of the earlier build is still there"


def test_a_failed_compilation_is_reported_until_it_succeeds(checkout: Checkout) -> None:
    compiler = checkout.fake_compiler()
    broken = checkout.root / "csrc/broken.cpp"
    broken.write_text("")
    result = checkout.build(CXX=compiler)
    assert result.returncode == 0, result.stdout
    assert "broken.cpp:1: error: no such thing" in checkout.report()
    broken.unlink()
    checkout.build(CXX=compiler)
    assert checkout.libraries() and not checkout.report()


def test_a_required_extension_fails_loudly(checkout: Checkout) -> None:
    result = checkout.build(CXX="/nonexistent", NAR_KERNELS_REQUIRE_CPP="1")
    assert result.returncode != 0
    assert "NAR_KERNELS_REQUIRE_CPP is set" in result.stdout
    assert "/nonexistent not found" in result.stdout


def test_without_a_cuda_toolkit(checkout: Checkout) -> None:
    result = checkout.build(CXX=checkout.fake_compiler())
    assert result.returncode == 0, result.stdout
    assert checkout.libraries() and not checkout.libraries("_cuda")
    assert checkout.report("_cuda") == f"no CUDA toolkit: nvcc is not in {checkout.cuda_home}/bin"
    result = checkout.build(CXX=checkout.fake_compiler(), NAR_KERNELS_REQUIRE_CUDA="1")
    assert result.returncode != 0
    assert "NAR_KERNELS_REQUIRE_CUDA is set" in result.stdout


def test_flags_of_cuda(checkout: Checkout) -> None:
    checkout.add_toolkit()
    result = checkout.build(CXX="/nonexistent", NAR_KERNELS_REQUIRE_CUDA="1")
    assert result.returncode == 0, result.stdout
    assert checkout.libraries("_cuda") and not checkout.libraries()
    assert checkout.report() and not checkout.report("_cuda")
    compiled = checkout.compiled()
    assert "--cudart=static" in compiled.pop("")
    assert set(compiled) == {"csrc/op.cu", "csrc/bindings_cuda.cpp"}
    for flags in compiled.values():
        codes = [flag.partition(",code=")[2] for flag in flags if flag.startswith("-gencode")]
        assert codes == ["sm_80", "sm_90", "sm_120", "compute_120"]
        assert "--fmad=false" in flags and not any("fast_math" in flag for flag in flags)


def test_chosen_cuda_architectures(checkout: Checkout) -> None:
    checkout.add_toolkit()
    checkout.build(CXX="/nonexistent", NAR_KERNELS_CUDA_ARCHS="100 90")
    flags = checkout.compiled()["csrc/op.cu"]
    codes = [flag.partition(",code=")[2] for flag in flags if flag.startswith("-gencode")]
    assert codes == ["sm_90", "sm_100", "compute_100"]


OLD_SETUPTOOLS = """
import sys, setuptools
setuptools.__version__ = "68.2.2"
sys.argv[1:] = ["build_ext", "--inplace"]
"""
WITHOUT_IT = """
from pathlib import Path
import setup
setup.build("nar_kernels._cpp", Path("build/build.ninja"), "nar_kernels/_cpp.so")
"""


def test_an_old_setuptools_is_named_and_can_be_done_without(checkout: Checkout) -> None:
    script = f"{OLD_SETUPTOOLS}import runpy; runpy.run_path('setup.py', run_name='__main__')"
    result = checkout.run("-c", script, CXX=checkout.fake_compiler())
    assert result.returncode == 1
    assert "needs setuptools 77 or newer and found 68.2.2: run `make`, or" in result.stdout
    assert not checkout.libraries()
    result = checkout.run("-c", OLD_SETUPTOOLS + WITHOUT_IT, CXX=checkout.fake_compiler())
    assert result.returncode == 0, result.stdout
    assert checkout.libraries() and "csrc/op_cpu.cpp" in checkout.compiled()


def test_installing_without_a_compiler(checkout: Checkout) -> None:
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--target", "site"]
    result = checkout.run("-m", "pip", "install", *options, ".", CXX="/nonexistent")
    assert result.returncode == 0, result.stdout
    installed = checkout.root / "site/nar_kernels"
    assert (installed / "__init__.py").exists()
    assert "/nonexistent not found" in (installed / "_build_failure.txt").read_text()
    assert not list(installed.glob("_cpp.*"))


def test_editable_build_without_a_compiler(checkout: Checkout) -> None:
    script = "from setuptools import build_meta; build_meta.build_editable('wheel')"
    (checkout.root / "wheel").mkdir()
    result = checkout.run("-c", script, CXX="/nonexistent")
    assert result.returncode == 0, result.stdout
    assert list(checkout.root.glob("wheel/*.whl"))
    assert "/nonexistent not found" in (checkout.root / REPORT).read_text()


def test_an_isolated_build_does_not_install_torch() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    build_system = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    assert not [name for name in build_system["requires"] if name.startswith("torch")]


def test_nothing_is_shared_by_files_for_one_instruction_set():
    """A linker keeps any one copy of a function that several files have: maybe one that this CPU
    cannot run."""
    objects = [*(ROOT / "build").glob("*/nar_kernels._cpp/*_avx*.o")]
    if not objects or shutil.which("nm") is None:
        pytest.skip("needs nm, and the objects of a build in place")
    for path in objects:
        symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        shared = [line for line in symbols.splitlines() if line[17:18] in "WVu"]
        assert [line for line in shared if "DW.ref.__gxx_personality" not in line] == [], path
