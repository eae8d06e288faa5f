"""Where files are kept that save work, and can be made again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$NAR_KERNELS_CACHE``, else ``$XDG_CACHE_HOME/nar_kernels``, else ``~/.cache/nar_kernels``;
    it may not exist, and may not be writable.

    Raises:
        RuntimeError: this user has no home.
    """
    if own := os.environ.get("NAR_KERNELS_CACHE"):
        return Path(own).expanduser().absolute()
    common = os.environ.get("XDG_CACHE_HOME", "")
    # Its specification says to ignore a relative path.
    folder = Path(common) if os.path.isabs(common) else Path.home() / ".cache"
    return folder / "nar_kernels"
