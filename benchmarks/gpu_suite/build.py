"""Builds both extensions in place, for the GPU that is here, and loads them.

By the ninja files of setup.py, without setuptools' own machinery, which would ask for a version of
it that a machine without a network may not have.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

LOADED = """
from nar_kernels.backends import backends, cpp, cuda
if cpp is None or cuda is None:
    raise SystemExit(f"built, but not loaded: {backends()}")
print(f"built for {cuda.architectures}, and loaded")
"""


def capability() -> str:
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    output = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return output.splitlines()[0].replace(".", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="say what would be compiled")
    arguments = parser.parse_args()
    is_dry_run = arguments.dry_run
    os.environ["NAR_KERNELS_CUDA_ARCHS"] = "90" if is_dry_run else capability()
    folder = arguments.work / "build" if is_dry_run else Path("build", sys.implementation.cache_tag)

    import setup

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for name in setup.NINJA_WRITERS:
        output = f"{name.replace('.', '/')}{suffix}"
        try:
            setup.build(name, folder / name / "build.ninja", output, is_dry_run=is_dry_run)
        except setup.BuildFailure as error:
            sys.exit(str(error))
    if not is_dry_run:
        sys.exit(subprocess.run([sys.executable, "-c", LOADED]).returncode)


if __name__ == "__main__":
    main()
