"""Coverage-guided fuzzing of the corpus readers; no test, and not collected.

    pip install atheris
    python -m tests.fuzz.fuzz_formats megatron -max_total_time=60

Arguments after the format are those of libFuzzer. An input is the bytes of all files of a corpus,
each after its length, so that index and ids are mutated together; the first ones are files that
read. Whatever comes of them must be a CorpusFormatError or an OSError, and what still reads must
lie within its files, in documents that ascend to its end: anything else is a finding, which
libFuzzer writes to ``crash-<hash>``. ``python -m tests.fuzz.fuzz_formats megatron crash-<hash>``
runs it again. Formats: those below.
"""

import contextlib
import os
import struct
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["nar_kernels.data"]):
    from nar_kernels.data import corpus  # noqa: F401

from tests.helpers.corpora import WRITERS, Written, read_or_refuse, write_ipc

DOCUMENTS = [np.arange(length).astype("uint16") for length in (5, 1, 0, 40)]


def write_dataset(folder: Path, documents: list[np.ndarray]) -> Written:
    """A folder as ``save_to_disk`` makes it."""
    import pyarrow as pa

    data = write_ipc(folder / "a.arrow", pa.table({"input_ids": documents}), stream=True)
    state = folder / "state.json"
    state.write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    return Written(folder, [state, data])


def write_list(folder: Path, documents: list[np.ndarray]) -> Written:
    """A raw file, its sidecar, and a list of it."""
    raw, sidecar, listing = (folder / name for name in ("a.bin", "a.bin.json", "list.json"))
    raw.write_bytes(np.concatenate(documents).tobytes())
    sidecar.write_text('{"dtype": "uint16"}')
    listing.write_text('{"files": ["a.bin"], "dtype": "uint16"}')
    return Written(listing, [listing, sidecar, raw])


def write_untyped(folder: Path, documents: list[np.ndarray]) -> Written:
    """A file of which nothing is known, long enough for statistics."""
    path = folder / "a.bin"
    path.write_bytes(np.tile(np.concatenate(documents), 60).tobytes())
    return Written(path, [path])


TARGETS = WRITERS | {"dataset": write_dataset, "list": write_list, "untyped": write_untyped}


def pack(contents: list[bytes]) -> bytes:
    return b"".join(struct.pack("<H", len(content)) + content for content in contents)


def unpack(data: bytes, count: int) -> Iterator[bytes]:
    """As many files; the last one takes what is left."""
    for i in range(count):
        length = int.from_bytes(data[:2], "little") if i < count - 1 else len(data)
        yield data[2 : 2 + length]
        data = data[2 + length :]


def main() -> None:
    name, arguments = sys.argv[1], sys.argv[2:]
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    os.environ["NAR_KERNELS_CACHE"] = str(folder / "cache")
    (folder / "corpus").mkdir()
    written = TARGETS[name](folder / "corpus", DOCUMENTS)
    seeds = folder / "seeds"
    seeds.mkdir()
    (seeds / "good").write_bytes(pack([path.read_bytes() for path in written.files]))
    assert read_or_refuse(written.source, **written.options) is not None or name == "untyped"
    warnings.simplefilter("ignore")
    runs = reads = 0

    def one_input(data: bytes) -> None:
        nonlocal runs, reads
        for path, content in zip(written.files, unpack(data, len(written.files)), strict=True):
            path.write_bytes(content)
        read = read_or_refuse(written.source, **written.options)
        runs, reads = runs + 1, reads + (read is not None)
        for path in (folder / "cache").glob("*"):
            path.unlink()
        if runs % 10_000 == 0:
            print(f"{name}: {runs} inputs, of which {reads} were read", flush=True)

    # A file to run again is named alone; otherwise inputs are made from the first one.
    again = any(Path(argument).is_file() for argument in arguments)
    corpus_folders = [] if again else [str(seeds)]
    atheris.Setup([sys.argv[0], *arguments, *corpus_folders], one_input)
    with contextlib.suppress(KeyboardInterrupt):
        atheris.Fuzz()


if __name__ == "__main__":
    main()
