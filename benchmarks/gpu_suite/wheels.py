"""Wheels for an offline machine: peers, and dependencies of the suite that may be missing there.

    python -m benchmarks.gpu_suite.wheels fill FOLDER [--python 3.12]

downloads wheels to a folder (about 13 MB; needs a network); with `--wheels FOLDER` the suite
installs from it, into a folder of its own.
"""

import argparse
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_suite.step import SKIP

PEERS = ("x-transformers", "liger-kernel", "cut-cross-entropy", "attn-gym")
# Dependencies of peers and suite except PyTorch, Triton and numpy, installed where missing.
NEEDED = (
    "einops einx frozendict loguru mpmath packaging sympy torch-einops-utils"
    " pytest pytest-timeout pytest-xdist execnet iniconfig pluggy pygments"
    " setuptools pybind11 ninja"
).split()
OLDEST = {"setuptools": "77", "liger-kernel": "0.8.2", "x-transformers": "2.31"}
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 17)] + ["manylinux2014_x86_64"]


def requirement(package: str) -> str:
    return f"{package}>={OLDEST[package]}" if package in OLDEST else package


def fill(folder: Path, python: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", python, "--dest", str(folder)]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    subprocess.run([*command, *map(requirement, [*PEERS, *NEEDED])], check=True)
    wheels = list(folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels, {size / 1e6:.1f} MB, for Python {python}: {folder}")


def name_and_version(wheel: Path) -> tuple[str, str]:
    name, version = wheel.name.split("-")[:2]
    return name.replace("_", "-").lower(), version


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))


def is_wanted(wheel: Path) -> bool:
    """Whether to install a wheel: a peer, or a package that is missing here or too old."""
    name, _ = name_and_version(wheel)
    here = installed(name)
    return name in PEERS or here is None or release(here) < release(OLDEST.get(name, "0"))


def install(folder: Path, site: Path) -> None:
    wheels = sorted(filter(is_wanted, folder.glob("*.whl")))
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(site)]
        subprocess.run([*command, *map(str, wheels)], check=True)
    sys.path.insert(0, str(site))
    print("\n".join(wheel.name for wheel in wheels))
    missing = [package for package in PEERS if installed(package) is None]
    if missing:
        print(f"peers that are not installed: {', '.join(missing)}")
        sys.exit(SKIP)
    print(", ".join(f"{package} {installed(package)}" for package in PEERS))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    filling = commands.add_parser("fill", help="download the wheels")
    filling.add_argument("folder", type=Path)
    filling.add_argument("--python", default="3.12", help="version to download for (3.12)")
    installing = commands.add_parser("install", help="install them from a folder")
    installing.add_argument("folder", help='"" for none: then only say what is missing')
    installing.add_argument("site", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "fill":
        fill(arguments.folder, arguments.python)
    else:
        install(Path(arguments.folder or arguments.site / "none"), arguments.site)


if __name__ == "__main__":
    main()
