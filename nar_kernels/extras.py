"""Optional packages, and how to get what is missing."""

import importlib
import shlex
from importlib import metadata
from typing import Any

# As in pyproject.toml, which a package that is not installed cannot ask.
EXTRAS = {
    "train": ("x-transformers>=2.31", "tqdm", "matplotlib", "tensorboard", "scikit-learn"),
    "triton": ("triton>=3.2",),
}


def install_command(extra: str) -> str:
    """The command for the packages of an extra: by their own names, wherever this one is from."""
    return f"pip install {shlex.join(EXTRAS[extra])}"


def import_extra(module: str) -> Any:
    """An optional package of the extra ``train``.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed: run `{install_command('train')}`"
        ) from error


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
