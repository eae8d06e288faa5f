"""Prints this machine's environment (GPU, versions), and writes it to a JSON file."""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_suite.wheels import PEERS, installed

PACKAGES = "torch triton numpy pytest pytest-xdist pytest-timeout setuptools pybind11 ninja".split()


def output_of(*command: str) -> str:
    """Stdout of a program; empty if it is not installed or times out."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def version_of(program: str) -> str | None:
    lines = output_of(program, "--version").splitlines()
    return next((line.strip() for line in lines if "release" in line or "ersion" in line), None)


def describe() -> dict:
    import torch

    found: dict = {
        "gpu": None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "nvcc": version_of("nvcc"),
        "compute_sanitizer": version_of("compute-sanitizer"),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "packages": {package: installed(package) for package in [*PACKAGES, *PEERS]},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU")
    arguments = parser.parse_args()
    found = describe()
    arguments.json.write_text(json.dumps(found))
    print(output_of("nvidia-smi"))
    print(json.dumps(found, indent=1))
    if found["gpu"] is None and not arguments.dry_run:
        sys.exit("PyTorch sees no CUDA device; --dry-run needs none")
    packages = found["packages"]
    print(f"{found['gpu'] or 'no GPU'}, torch {packages['torch']}, Triton {packages['triton']}")


if __name__ == "__main__":
    main()
