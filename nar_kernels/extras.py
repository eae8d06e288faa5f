"""Optional dependencies, and how to install them."""

import importlib
import shlex
from importlib import metadata
from typing import Any

# Mirrors pyproject.toml: an uninstalled source tree has no metadata to query.
EXTRAS = {
    "train": ("x-transformers>=2.31", "tqdm", "matplotlib", "tensorboard", "scikit-learn"),
    "prepare": ("tokenizers", "tqdm", "fsspec"),
    "triton": ("triton>=3.2",),
    "arrow": ("pyarrow",),
}


def install_command(extra: str) -> str:
    """The pip command for the packages of an extra; works wherever this package came from."""
    return f"pip install {shlex.join(EXTRAS[extra])}"


def import_extra(module: str, extra: str | None = "train") -> Any:
    """Imports an optional module of an extra, or, with None, one that few uses need and no extra
    has: a package of the same name.

    Raises:
        ImportError: not installed; the message gives the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        command = install_command(extra) if extra else f"pip install {module.partition('.')[0]}"
        raise ImportError(f"{error.name} is not installed: run `{command}`") from error


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
