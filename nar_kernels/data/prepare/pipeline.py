"""``nar-kernels prepare`` in Python: :func:`prepare`."""

import os
from pathlib import Path
from typing import Any

from nar_kernels.data.formats.manifest import Manifest
from nar_kernels.data.prepare.config import PrepareConfig
from nar_kernels.data.prepare.folders import check_out, partial_folder
from nar_kernels.data.prepare.images import prepare_images
from nar_kernels.data.prepare.inputs import Names, find_inputs
from nar_kernels.data.prepare.progress import Progress
from nar_kernels.data.prepare.text import prepare_text


def prepare(inputs: Names, out: str | os.PathLike[str], **options: Any) -> Manifest:
    """Turns text, conversations or image codes into a corpus: a folder for
    :class:`~nar_kernels.data.corpus.Corpus`.

    A run that was stopped, by whatever, goes on when it is called again with the same arguments.
    The files are the same for any number of workers, and whether it was stopped or not.

    Args:
        inputs: files, folders, globs, URLs of fsspec, or a list of such. By suffix: ``.jsonl``,
            ``.ndjson`` and ``.json`` have a JSON record a line, ``.parquet`` one a row, ``.npy``
            image codes ``[N, h, w]``; all else is UTF-8 text. ``.gz``, ``.bz2``, ``.xz`` and
            ``.zst`` are decompressed.
        out: the folder; it must not exist, unless with ``overwrite=True``.
        options: those of :class:`~nar_kernels.data.prepare.config.PrepareConfig`.

    Returns:
        What is in ``manifest.json``.

    Raises:
        CorpusFormatError: an input or a record is malformed; the message names file and line.
        TypeError, ValueError: an option is wrong.
        FileExistsError: there is a corpus in ``out``, or an unfinished one of another run.
        OSError: a file cannot be read or written, or a worker died.
        ImportError: a package that is needed is not installed; the message gives the pip command.
    """
    config = PrepareConfig(**options)
    if "://" in os.fspath(out):
        raise ValueError(
            f"out is {os.fspath(out)!r}: it must be a folder of this machine; copy it from there"
        )
    folder = Path(os.path.realpath(out))  # a link stays, and what it leads to is replaced
    check_out(folder, config.overwrite)
    found = find_inputs(inputs, exclude=[str(folder), str(partial_folder(folder))])
    run = prepare_images if found[0].kind == "images" else prepare_text
    progress = Progress(config.quiet)
    try:
        return run(found, folder, config, progress)
    except KeyboardInterrupt:
        progress.close()
        progress.say("stopped: the same command goes on after the last finished shard")
        raise
    finally:
        progress.close()
