"""``nar-kernels doctor``."""

import argparse
import platform

import torch

from nar_kernels.extras import EXTRAS, install_command, version
from nar_kernels.ops.backends import backends, cpp

HELP = "print versions and available backends, and why others are unavailable"

_SIMD_LEVELS = ("generic", "AVX2", "AVX512")  # indexed by the C++ extension's simd_level()


def add_to(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run, names={})


def _run(arguments: argparse.Namespace) -> None:
    simd = "-" if cpp is None else _SIMD_LEVELS[cpp.simd_level()]
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    _table(
        "versions",
        {
            "nar-kernels": version("nar-kernels") or "not installed, running from a checkout",
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    )
    _table(
        "machine",
        {
            "platform": platform.platform(),
            "simd": f"{simd} in nar_kernels, {torch.backends.cpu.get_cpu_capability()} in torch",
            "threads": str(torch.get_num_threads()),
            "cuda": cuda,
        },
    )
    _table("backends", backends())
    _table(
        "optional packages",
        {
            (package := requirement.partition(">")[0]): version(package)
            or f"not installed: {install_command(extra)}"
            for extra, requirements in EXTRAS.items()
            for requirement in requirements
        },
    )


def _table(title: str, rows: dict[str, str]) -> None:
    print(title)
    for name, value in rows.items():
        print(f"  {name:<16}{value.partition(chr(10))[0]}")
