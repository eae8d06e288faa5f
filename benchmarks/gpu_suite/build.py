"""Builds an extension in place (CUDA: for the local GPU's architecture), and loads it.

Uses the ninja files of setup.py directly, not setuptools' build, which would require a version of
setuptools that an offline machine may not have. With `--prebuilt`, one that lies there and loads is
used as it is: minutes on a GPU are dearer than on the machine that the checkout comes from.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

LOADED = """
from nar_kernels.ops.backends import backends, cpp, cuda
if {name} is None:
    raise SystemExit("not loaded: " + backends()["{name}"])
print("loaded", getattr({name}, "architectures", ""))
"""


def loads(name: str) -> bool:
    """Whether the extension loads, in a process of its own; prints why not."""
    return subprocess.run([sys.executable, "-c", LOADED.format(name=name)]).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("cpp", "cuda"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="say what would be compiled")
    parser.add_argument("--prebuilt", action="store_true", help="use one that is there and loads")
    arguments = parser.parse_args()
    if arguments.prebuilt and loads(arguments.name):
        return
    folder = Path("build", sys.implementation.cache_tag)
    capability = "90"
    if arguments.dry_run:  # do not touch the existing build
        folder = arguments.work / "build"
    else:
        environment = json.loads((arguments.work / "environment.json").read_text())
        capability = environment.get("capability") or capability
    os.environ["NAR_KERNELS_CUDA_ARCHS"] = capability
    try:
        import setup

        name = f"nar_kernels._{arguments.name}"
        output = f"{name.replace('.', '/')}{sysconfig.get_config_var('EXT_SUFFIX')}"
        setup.build(name, folder / name / "build.ninja", output, is_dry_run=arguments.dry_run)
    except Exception as error:  # BuildFailure, or a missing dependency
        sys.exit(f"{type(error).__name__}: {error}")
    if not (arguments.dry_run or loads(arguments.name)):
        sys.exit(1)


if __name__ == "__main__":
    main()
