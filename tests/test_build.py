"""The real setup.py on dummy sources with a fake compiler: which flags, what is rebuilt, for which
GPUs, what happens where nothing can be compiled, and what is in a distribution."""

import email
import importlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from nar_kernels.extras import EXTRAS
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.seconds
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


# Code for every architecture that the fake nvcc knows and the package builds for.
ALL = ["sm_80", "sm_90", "sm_120", "compute_120"]

TRAP = "raise ImportError('the build imported torch')"


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
        (root / "csrc/levels").mkdir(parents=True)
        (root / "csrc/shared.h").write_text("")
        (root / "csrc/op_cpu.cpp").write_text("// csrc/shared.h")
        for name in ("levels/avx2", "levels/avx512", "bindings", "bindings_cuda"):
            (root / f"csrc/{name}.cpp").write_text("")
        (root / "csrc/op.cu").write_text("// csrc/shared.h")
        # Without a toolkit, unless a test adds one: this folder is where it is looked for.
        self.cuda_home = root / "cuda"
        # The build must not need torch: importing this one fails.
        (root / "trap").mkdir()
        (root / "trap/torch.py").write_text(TRAP)
        # Nor a GPU, whatever this machine has.
        self.tools = root / "tools"
        self.tools.mkdir()
        self.nvidia_smi("echo 'NVIDIA-SMI has failed: there is no driver'; exit 9")

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

    def nvidia_smi(self, script: str) -> None:
        path = self.tools / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("NAR_KERNELS_") and not name.endswith("FLAGS")
        }
        own = {
            "PYTHONPATH": str(self.root / "trap"),
            "CUDA_HOME": str(self.cuda_home),
            "PATH": os.pathsep.join([str(self.tools), os.environ["PATH"]]),
        }
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

    def architectures(self) -> list[str]:
        """What the CUDA extension was compiled for since the last call."""
        flags = self.compiled().get("csrc/op.cu", [])
        return [flag.partition(",code=")[2] for flag in flags if flag.startswith("-gencode")]

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
        f"csrc/{name}.cpp" for name in ("op_cpu", "levels/avx2", "levels/avx512", "bindings")
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
    assert objects == ["bindings", "op_cpu", "avx2", "avx512"]


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
        assert codes == ALL
        assert "--fmad=false" in flags and not any("fast_math" in flag for flag in flags)


@pytest.mark.parametrize(
    ("chosen", "codes"),
    [("100 90", ["sm_90", "sm_100", "compute_100"]), (" 80 80", ["sm_80", "compute_80"])],
)
def test_chosen_cuda_architectures(checkout: Checkout, chosen: str, codes: list[str]) -> None:
    checkout.add_toolkit()
    checkout.build(CXX="/nonexistent", NAR_KERNELS_CUDA_ARCHS=chosen)
    assert checkout.architectures() == codes


@pytest.mark.parametrize(
    ("answer", "codes"),
    [
        ("9.0", ["sm_90", "compute_90"]),
        ("9.0\\n8.0\\n9.0", ["sm_80", "sm_90", "compute_90"]),
        (" 9.0 \\n[N/A]\\n", ["sm_90", "compute_90"]),
        ("7.5\\n8.0", ["sm_80", "compute_80"]),
        ("8.6", ["sm_80", "compute_80"]),  # which this nvcc does not know
        ("12.1", ["sm_120", "compute_120"]),
    ],
)
def test_cuda_is_built_for_the_gpus_here(checkout: Checkout, answer: str, codes: list[str]) -> None:
    checkout.add_toolkit()
    checkout.nvidia_smi(
        f"printf '{answer}'; [ \"$*\" = '--query-gpu=compute_cap --format=csv,noheader' ]"
    )
    result = checkout.build(CXX="/nonexistent")
    assert result.returncode == 0, result.stdout
    assert checkout.architectures() == codes
    assert checkout.libraries("_cuda") and not checkout.report("_cuda")
    assert f"nar_kernels._cuda: {' '.join(codes[:-1])}, with " in result.stdout


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 0", "no GPU was found: nvidia-smi says: nothing"),
        (
            "echo 'No devices were found'",
            "no GPU was found: nvidia-smi says: No devices were found",
        ),
        ("echo '[N/A]'; exit 2", "no GPU was found: nvidia-smi says: [N/A]"),
        ("printf '\\377\\n'", "no GPU was found: nvidia-smi says: \ufffd"),
        ("echo 7.5; echo 6.1", "no GPU from sm_80 on was found: there is sm_61 sm_75"),
    ],
)
def test_no_cuda_without_a_gpu(checkout: Checkout, script: str, reason: str) -> None:
    """Though nvcc is there. What was built before goes, and the output says how to choose."""
    checkout.add_toolkit()
    compiler = checkout.fake_compiler()
    checkout.build(CXX=compiler, NAR_KERNELS_CUDA="1")
    assert checkout.libraries("_cuda") and checkout.compiled()
    checkout.nvidia_smi(script)
    result = checkout.build(CXX=compiler)
    assert result.returncode == 0, result.stdout
    assert checkout.compiled() == {} and not checkout.libraries("_cuda")
    assert checkout.libraries() and checkout.report("_cuda") == reason
    assert "NAR_KERNELS_CUDA=1 builds it" in result.stdout


def test_no_cuda_without_the_drivers_tool(checkout: Checkout) -> None:
    checkout.add_toolkit()
    (checkout.tools / "nvidia-smi").unlink()
    result = checkout.build(CXX="/nonexistent", PATH=str(checkout.tools))
    assert result.returncode == 0, result.stdout
    assert checkout.report("_cuda").startswith("no GPU was found: ")
    assert "nvidia-smi" in checkout.report("_cuda")


SLOW_TOOL = """
import setup
setup.NVIDIA_SMI_SECONDS = 0.1
print(setup.architectures_here([80]))
"""


def test_a_driver_that_hangs_is_not_waited_for(checkout: Checkout) -> None:
    checkout.nvidia_smi("exec sleep 600")
    result = checkout.run("-c", SLOW_TOOL)
    assert "BuildFailure: no GPU was found" in result.stdout and "timed out" in result.stdout


def test_cuda_can_be_forbidden(checkout: Checkout) -> None:
    checkout.add_toolkit()
    checkout.nvidia_smi("echo 9.0")
    chosen = {"NAR_KERNELS_CUDA": "0", "NAR_KERNELS_CUDA_ARCHS": "90"}
    result = checkout.build(CXX="/nonexistent", **chosen)
    assert result.returncode == 0, result.stdout
    assert checkout.compiled() == {} and checkout.report("_cuda") == "NAR_KERNELS_CUDA was 0"


def test_cuda_can_be_forced(checkout: Checkout) -> None:
    forced = {"CXX": "/nonexistent", "NAR_KERNELS_CUDA": "1"}
    result = checkout.build(**forced)
    assert result.returncode != 0
    assert "NAR_KERNELS_CUDA is set, and the build failed" in result.stdout
    assert "no CUDA toolkit: nvcc is not in" in result.stdout
    checkout.add_toolkit()
    for script, chosen, codes in (
        ("exit 9", "", ALL),
        ("echo 9.0", "", ["sm_90", "compute_90"]),
        ("echo 9.0", "all", ALL),
        ("echo 9.0", "80", ["sm_80", "compute_80"]),
    ):
        checkout.nvidia_smi(script)
        result = checkout.build(**forced, NAR_KERNELS_CUDA_ARCHS=chosen)
        assert result.returncode == 0, result.stdout
        assert checkout.architectures() == codes


def test_cuda_is_optional_where_only_architectures_are_chosen(checkout: Checkout) -> None:
    result = checkout.build(CXX=checkout.fake_compiler(), NAR_KERNELS_CUDA_ARCHS="all")
    assert result.returncode == 0, result.stdout
    assert "no CUDA toolkit" in checkout.report("_cuda")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NAR_KERNELS_CUDA", "yes"),
        ("NAR_KERNELS_CUDA", "2"),
        ("NAR_KERNELS_REQUIRE_CUDA", "on"),
        ("NAR_KERNELS_REQUIRE_CPP", "true"),
        ("NAR_KERNELS_CUDA_ARCHS", "9.0"),
        ("NAR_KERNELS_CUDA_ARCHS", "80,90"),
        ("NAR_KERNELS_CUDA_ARCHS", "all 90"),
    ],
)
def test_a_wrong_value_is_named(checkout: Checkout, name: str, value: str) -> None:
    """Also where nothing would be built."""
    result = checkout.build(CXX="/nonexistent", **{name: value})
    assert result.returncode != 0 and "Traceback" not in result.stdout
    assert f"error: {name} is {value!r}: " in result.stdout


@pytest.mark.parametrize(("cuda", "is_built"), [("None", False), ("'13.0'", True)])
def test_a_pytorch_without_cuda_has_no_use_for_it(
    checkout: Checkout, cuda: str, is_built: bool
) -> None:
    checkout.add_toolkit()
    checkout.nvidia_smi("echo 9.0")
    (checkout.root / "trap/torch.py").unlink()
    (checkout.root / "trap/torch").mkdir()
    (checkout.root / "trap/torch/__init__.py").write_text(TRAP)
    version = f"from typing import Optional\n__version__ = '2.13.0'\ncuda: Optional[str] = {cuda}\n"
    (checkout.root / "trap/torch/version.py").write_text(version)
    result = checkout.build(CXX="/nonexistent")
    assert result.returncode == 0, result.stdout
    assert bool(checkout.architectures()) == is_built
    assert checkout.report("_cuda") == ("" if is_built else "PyTorch had no CUDA")
    for chosen in ({"NAR_KERNELS_CUDA": "1"}, {"NAR_KERNELS_CUDA_ARCHS": "90"}):
        shutil.rmtree(checkout.root / "build", ignore_errors=True)
        checkout.build(CXX="/nonexistent", **chosen)
        assert checkout.architectures() == ["sm_90", "compute_90"]


def test_another_isolated_build_compiles_nothing_again(checkout: Checkout) -> None:
    """Each has build requirements of its own, at another path, unpacked later."""
    compiler = checkout.fake_compiler()
    compiled = []
    for name, version in (("first", "3.1.0"), ("second", "3.1.0"), ("third", "3.2.0")):
        package = checkout.root / name / "pybind11"
        (package / "include/pybind11").mkdir(parents=True)
        (package / "include/pybind11/pybind11.h").write_text("")
        (package / "__init__.py").write_text(
            f"__version__ = '{version}'\ndef get_include(): return {str(package / 'include')!r}\n"
        )
        path = os.pathsep.join([str(checkout.root / name), str(checkout.root / "trap")])
        result = checkout.build(CXX=compiler, PYTHONPATH=path)
        assert result.returncode == 0, result.stdout
        compiled.append(len(checkout.compiled()))
        shutil.rmtree(package)
    assert compiled == [5, 0, 5]


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
    assert not list(installed.glob("_cpp.*"))
    assert (installed / "_build_failure.txt").read_text() == (
        "nar_kernels._cpp: no C++ compiler\nnar_kernels._cuda: no CUDA toolkit\n"
    )


def test_a_wheel_says_nothing_of_the_machine_that_built_it(checkout: Checkout) -> None:
    (checkout.root / "csrc/broken.cpp").write_text("")
    result = checkout.run("setup.py", "bdist_wheel", CXX=checkout.fake_compiler())
    assert result.returncode == 0 and "broken.cpp:1: error" in result.stdout
    (wheel,) = checkout.root.glob("dist/*.whl")
    report = zipfile.ZipFile(wheel).read(REPORT).decode()
    assert (
        report == "nar_kernels._cpp: the compilation failed\nnar_kernels._cuda: no CUDA toolkit\n"
    )
    (checkout.root / "csrc/broken.cpp").unlink()
    checkout.add_toolkit()
    both = {"CXX": checkout.fake_compiler(), "NAR_KERNELS_CUDA": "1"}
    checkout.run("setup.py", "bdist_wheel", **both)
    assert REPORT not in zipfile.ZipFile(wheel).namelist()


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


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file of the repository, beside what a build in place leaves."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("needs a git checkout")
    root = tmp_path_factory.mktemp("sources")
    built = [REPORT, "nar_kernels/_cpp.so", "tests/__pycache__/a.pyc", "docs/__pycache__/a.txt"]
    for name in [*listing.stdout.split("\0")[:-1], *built]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name in built:
            (root / name).write_text("")
        else:
            shutil.copy(ROOT / name, root / name)
    return root


def run_setup(sources: Path, *arguments: str) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=sources,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout


def test_a_source_distribution_is_complete(sources: Path) -> None:
    before = {path.relative_to(sources).as_posix() for path in sources.rglob("*") if path.is_file()}
    run_setup(sources, "sdist")
    (archive,) = sources.glob("dist/*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {member.name.partition("/")[2] for member in tar if member.isfile()}
    built = {name for name in before if "__pycache__" in name or name.endswith(".so")} | {REPORT}
    added = {name for name in names if name.startswith("nar_kernels.egg-info/")}
    assert names - added - {"PKG-INFO", "setup.cfg"} == before - built


def test_the_package_is_typed(sources: Path) -> None:
    run_setup(sources, "build_py", "--build-lib", "lib")
    package = sources / "lib/nar_kernels"
    assert (package / "py.typed").exists() and (package / "show/player.html").exists()
    assert not (sources / "lib" / REPORT).exists()


def test_the_description_of_a_package_index_leads_nowhere_else(sources: Path) -> None:
    """Relative links and pictures of the README have no target there."""
    run_setup(sources, "egg_info")
    metadata = email.message_from_bytes((sources / "nar_kernels.egg-info/PKG-INFO").read_bytes())
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload(decode=True).decode()
    assert re.findall(r"\]\((?!https?://)[^)]*\)", description) == []
    readme = (ROOT / "README.md").read_text()
    assert "(docs/" in readme and "docs/design.md is the contract" in description
    assert "[B, L]" in description and "![" not in description
    assert readme.count("```") == description.count("```")


DESCRIBED = """
import setup
print(setup.long_description(), end="")
"""


def test_only_links_to_files_are_taken_out_of_the_readme(checkout: Checkout) -> None:
    kept = (
        "[a](https://a.example/b) `x[0](y)` [c](mailto:c@d.example) [e](#e) [B, L] (f)\n"
        "```\nx[i](y)\n\n\n![z](z)\n```\n"
    )
    relative = "![picture](docs/p.png)\n\nsee [`g`](docs/g.md#h), [i\nj](../k)"
    (checkout.root / "README.md").write_text(f"{kept}\n{relative}\n{kept}")
    described = checkout.run("-c", DESCRIBED).stdout
    assert described == f"{kept}\nsee `g`, i\nj\n{kept}"


def test_hints_name_the_packages_of_the_extras() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, packages in EXTRAS.items():
        declared = project["optional-dependencies"][extra]
        assert [*packages] == [name.partition(";")[0] for name in declared]


def test_a_missing_backend_says_what_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Commands that work where no package index has this package."""
    backends = importlib.import_module("nar_kernels.ops.backends")
    monkeypatch.setattr(backends, "_BUILD_REPORT", tmp_path / "_build_failure.txt")
    monkeypatch.setattr(backends, "_import_errors", {"_cpp": "no such module"})
    monkeypatch.setattr(backends, "_present", dict.fromkeys(backends.BACKENDS, False))
    (tmp_path / "_build_failure.txt").write_text("nar_kernels._cuda: no GPU was found\n")
    status = backends.backends()
    assert "is not built (no such module); with a C++17 compiler, run" in status["cpp"]
    assert "is not built (at the build: no GPU was found); with the CUDA toolkit" in status["cuda"]
    assert "`NAR_KERNELS_CUDA=1 pip install .`" in status["cuda"]
    assert "`pip install 'triton>=3.2'`" in status["triton"]
    for name in ("cpp", "triton", "cuda"):
        assert not re.search(r"install [^`]*nar-kernels", status[name])


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_installs_for_a_demo_what_it_needs(checkout: Checkout) -> None:
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, checkout.root)
    plans = {}
    for target in ("demo", "test"):
        plan = ["make", "--no-print-directory", "-n", target]
        result = subprocess.run(plan, cwd=checkout.root, capture_output=True, text=True, check=True)
        plans[target] = result.stdout
    assert "'.[train,prepare]'" in plans["demo"] and "dev]" not in plans["demo"]
    assert "'.[train,prepare,test,dev]'" in plans["test"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_builds_again_if_a_choice_is_made(checkout: Checkout) -> None:
    shutil.copy(ROOT / "Makefile", checkout.root)
    (checkout.root / "constraints.txt").write_text("")
    (checkout.root / ".venv/bin").mkdir(parents=True)
    for stamp in ("bin/python", "requirements", "built", "installed"):
        (checkout.root / ".venv" / stamp).write_text("")
    for choice, status in ("", 0), ("NAR_KERNELS_CUDA=0", 1), ("NAR_KERNELS_CUDA_ARCHS=90", 1):
        command = ["make", "-q", "build", *choice.split()]
        assert subprocess.run(command, cwd=checkout.root).returncode == status, choice


def test_nothing_is_shared_by_files_for_one_instruction_set():
    """A linker keeps any one copy of a function that several files have: maybe one that this CPU
    cannot run."""
    objects = [*(ROOT / "build").glob("*/nar_kernels._cpp/csrc/levels/avx*.o")]
    if not objects or shutil.which("nm") is None:
        pytest.skip("needs nm, and the objects of a build in place")
    for path in objects:
        symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        shared = [line for line in symbols.splitlines() if line[17:18] in "WVu"]
        assert [line for line in shared if "DW.ref.__gxx_personality" not in line] == [], path
