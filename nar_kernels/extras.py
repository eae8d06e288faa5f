"""Optional packages."""

import importlib
from typing import Any


def import_extra(module: str) -> Any:
    """An optional package of the extra ``train``.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed: run `pip install 'nar-kernels[train]'`"
        ) from error
