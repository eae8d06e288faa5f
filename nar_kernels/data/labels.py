"""The classes of ``--labels``: :func:`read_labels`."""

import os
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from torch import Tensor

from nar_kernels.data.classes import check_labels
from nar_kernels.data.opened import Opened
from nar_kernels.errors import CorpusFormatError

FROM_DATA = "data"


def read_labels(labels: str, data: str, opened: Opened, count: int, folder: Path | None) -> Tensor:
    """int64 ``[count]``: the class of each window.

    Args:
        labels: a ``.npy`` file, or ``"data"``: those that the data hold.
        data: the name of the data.
        folder: where else to look for a relative path.

    Raises:
        ValueError, TypeError: the data hold no labels, or they are not ``count`` integers from 0
            on.
        CorpusFormatError, FileNotFoundError: there is no such file, or it is no array.
    """
    if labels == FROM_DATA:
        if opened.labels is None:
            raise ValueError(
                f"labels is {FROM_DATA!r}, but {data} holds none: give a .npy file of integers "
                f"[{count}], or prepare the images with --labels"
            )
        return check_labels(f"labels of {data}", opened.labels(), count)
    path = labels
    if folder is not None and not os.path.exists(path):
        path = os.path.join(folder, labels)
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"there is no file {labels}: labels is a .npy file, or {FROM_DATA!r} for those that "
            "the data hold"
        )
    try:
        with open(path, "rb") as file:
            given = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, BadZipFile) as error:
        raise CorpusFormatError(f"{path} is no .npy file of labels ({error})") from error
    if not isinstance(given, np.ndarray):
        raise CorpusFormatError(f"{path} holds several arrays: labels are one, in a .npy file")
    return check_labels(f"labels of {path}", given, count)
