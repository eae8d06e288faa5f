"""Corpora of every format, written by hand, of the same documents; and what must hold of any."""

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from nar_kernels.data.corpus import Corpus
from nar_kernels.errors import CorpusFormatError

Documents = Sequence[np.ndarray]

MEGATRON_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
MDS_CODES = {
    "uint8": 8,
    "int8": 9,
    "uint16": 16,
    "int16": 17,
    "uint32": 32,
    "int32": 33,
    "int64": 65,
}


class Written(NamedTuple):
    """A corpus in files."""

    source: Path  # what names it
    files: list[Path]  # all that are read
    options: dict[str, Any] = {}  # of Corpus


def ends_of(documents: Documents) -> list[int]:
    return np.cumsum([len(document) for document in documents]).tolist()


def megatron_index(
    lengths: Sequence[int],
    pointers: Sequence[int],
    documents: Sequence[int],
    code: int = 8,
    modes: bool = False,
) -> bytes:
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(documents))
    arrays = (np.array(lengths, "<i4"), np.array(pointers, "<i8"), np.array(documents, "<i8"))
    return head + b"".join(a.tobytes() for a in arrays) + bytes(len(lengths) * modes)


def write_megatron(folder: Path, documents: Documents) -> Written:
    """Each document is a sequence."""
    ids = np.concatenate(documents)
    begins = [0, *ends_of(documents)]
    pointers = [begin * ids.itemsize for begin in begins[:-1]]
    lengths = np.diff(begins).tolist()
    path, index = folder / "megatron.bin", folder / "megatron.idx"
    path.write_bytes(ids.tobytes())
    code = MEGATRON_CODES[ids.dtype.name]
    index.write_bytes(megatron_index(lengths, pointers, range(len(begins)), code))
    return Written(path, [index, path])


def write_scattered_megatron(folder: Path, documents: Documents) -> Written:
    """Documents lie in the reverse order, an odd number of bytes from the beginning."""
    path, index = folder / "scattered.bin", folder / "scattered.idx"
    content, pointers = b"x", {}
    for i in reversed(range(len(documents))):
        pointers[i] = len(content)
        content += documents[i].tobytes()
    path.write_bytes(content)
    lengths = [len(document) for document in documents]
    code = MEGATRON_CODES[documents[0].dtype.name]
    places = [pointers[i] for i in range(len(documents))]
    index.write_bytes(megatron_index(lengths, places, range(len(documents) + 1), code))
    return Written(path, [index, path])


def llmc_bytes(ids: np.ndarray, **changes: int) -> bytes:
    magic, version = (20240520, 1) if ids.dtype == "uint16" else (20240801, 7)
    fields = {"magic": magic, "version": version, "count": len(ids)} | changes
    return struct.pack("<3I1012x", *fields.values()) + ids.tobytes()


def write_llmc(folder: Path, documents: Documents) -> Written:
    path = folder / "llmc.bin"
    path.write_bytes(llmc_bytes(np.concatenate(documents)))
    return Written(path, [path])


def litpkds_bytes(ids: np.ndarray, **changes: int) -> bytes:
    code = MEGATRON_CODES.get(ids.dtype.name)
    fields = {"version": 1, "code": code, "chunk_size": len(ids)} | changes
    return b"LITPKDS" + struct.pack("<QBQ", *fields.values()) + ids.tobytes()


def write_litpkds(folder: Path, documents: Documents) -> Written:
    path = folder / "litpkds.bin"
    path.write_bytes(litpkds_bytes(np.concatenate(documents)))
    return Written(path, [path])


def write_datatrove(folder: Path, documents: Documents) -> Written:
    """Every third token counts in a loss."""
    ids, path = np.concatenate(documents), folder / "datatrove.ds"
    companions = {
        ".metadata": f"name|{ids.itemsize}\n{len(ids)}\n{len(ids)} T".encode(),
        ".index": np.array(ends_of(documents), "<u8").tobytes(),
        ".loss": (np.arange(len(ids)) % 3 == 0).tobytes(),
    }
    path.write_bytes(ids.tobytes())
    for suffix, content in companions.items():
        Path(f"{path}{suffix}").write_bytes(content)
    return Written(path, [path, *(Path(f"{path}{suffix}") for suffix in companions)])


def mds_array(ids: np.ndarray, dtype: bool, shape: bool) -> bytes:
    """A cell of a column, with its dtype and its shape or without."""
    width = next(w for w in (1, 2, 4, 8) if len(ids) < 256**w)
    head = bytes([MDS_CODES[ids.dtype.name]]) if dtype else b""
    if shape:
        head += bytes([4 | width.bit_length() - 1]) + len(ids).to_bytes(width, "little")
    return head + ids.tobytes()


def mds_shard(
    columns: dict[str, tuple[str, int | None]],
    samples: Sequence[Sequence[bytes]],
    size_limit: int = 1 << 26,
) -> tuple[bytes, dict[str, Any]]:
    """Content of a shard, and its entry in the index. Columns: encoding, and size if it is fixed;
    samples: their cells."""
    config = {
        "column_encodings": [encoding for encoding, _ in columns.values()],
        "column_names": list(columns),
        "column_sizes": [size for _, size in columns.values()],
        "compression": None,
        "format": "mds",
        "hashes": [],
        "size_limit": size_limit,
        "version": 2,
    }
    text = json.dumps(config, sort_keys=True).encode()
    bodies = []
    for cells in samples:
        varying = [
            len(c) for c, size in zip(cells, config["column_sizes"], strict=True) if not size
        ]
        bodies.append(np.array(varying, "<u4").tobytes() + b"".join(cells))
    begins = np.cumsum([8 + 4 * len(bodies) + len(text), *map(len, bodies)]).astype("<u4")
    content = struct.pack("<I", len(bodies)) + begins.tobytes() + text + b"".join(bodies)
    raw = {"basename": "shard.00000.mds", "bytes": len(content), "hashes": {}}
    return content, {"samples": len(samples), "raw_data": raw, "zip_data": None} | config


def write_mds_folder(folder: Path, shards: Sequence[tuple[bytes, dict[str, Any]]]) -> Written:
    folder.mkdir(exist_ok=True)
    files = []
    for i, (content, entry) in enumerate(shards):
        entry["raw_data"]["basename"] = f"shard.{i:05}.mds"
        files.append(folder / f"shard.{i:05}.mds")
        files[-1].write_bytes(content)
    index = {"version": 2, "shards": [entry for _, entry in shards]}
    (folder / "index.json").write_text(json.dumps(index, sort_keys=True))
    return Written(folder, [folder / "index.json", *files])


def write_mds(folder: Path, documents: Documents) -> Written:
    """Two shards of samples between which a string of varying length lies."""
    columns = {"a": ("str", None), "id": ("int", 8), "tokens": ("ndarray", None)}
    cells = [
        (b"x" * (i % 4), bytes(8), mds_array(document, dtype=True, shape=True))
        for i, document in enumerate(documents)
    ]
    half = len(cells) // 2
    shards = [mds_shard(columns, part) for part in (cells[:half], cells[half:]) if part]
    return write_mds_folder(folder / "mds", shards)


def table_of(documents: Documents) -> Any:
    pa = pytest.importorskip("pyarrow")
    ids = pa.array(
        [d.tolist() for d in documents], pa.list_(pa.from_numpy_dtype(documents[0].dtype))
    )
    return pa.table({"id": list(range(len(documents))), "input_ids": ids})


def write_ipc(path: Path, table: Any, stream: bool, compression: str | None = None) -> Path:
    """In batches of two rows."""
    ipc = pytest.importorskip("pyarrow").ipc
    options = ipc.IpcWriteOptions(compression=compression)
    new = ipc.new_stream if stream else ipc.new_file
    with new(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def write_arrow(folder: Path, documents: Documents) -> Written:
    path = write_ipc(folder / "file.arrow", table_of(documents), stream=False)
    return Written(path, [path])


def write_arrow_stream(folder: Path, documents: Documents) -> Written:
    path = write_ipc(folder / "stream.arrow", table_of(documents), stream=True)
    return Written(path, [path])


def write_compressed_arrow(folder: Path, documents: Documents) -> Written:
    path = write_ipc(folder / "zstd.arrow", table_of(documents), False, "zstd")
    return Written(path, [path])


def write_parquet(folder: Path, documents: Documents) -> Written:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = folder / "table.parquet"
    parquet.write_table(table_of(documents), path, row_group_size=2)
    return Written(path, [path])


def write_npy(folder: Path, documents: Documents) -> Written:
    path = folder / "array.npy"
    np.save(path, np.concatenate(documents))
    return Written(path, [path])


def write_raw(folder: Path, documents: Documents) -> Written:
    path = folder / "raw.bin"
    path.write_bytes(np.concatenate(documents).tobytes())
    return Written(path, [path], {"dtype": documents[0].dtype.name})


WRITERS: dict[str, Callable[[Path, Documents], Written]] = {
    "npy": write_npy,
    "raw": write_raw,
    "megatron": write_megatron,
    "scattered megatron": write_scattered_megatron,
    "llm.c": write_llmc,
    "litpkds": write_litpkds,
    "datatrove": write_datatrove,
    "mds": write_mds,
    "arrow": write_arrow,
    "arrow stream": write_arrow_stream,
    "compressed arrow": write_compressed_arrow,
    "parquet": write_parquet,
}

# Those that say where documents end.
WITH_DOCUMENTS = [name for name in WRITERS if name not in ("npy", "raw", "llm.c", "litpkds")]


def ids_of(corpus: Corpus) -> list[int]:
    return corpus.read(0, len(corpus)).tolist()


def check_runs(corpus: Corpus) -> None:
    """All that a corpus maps lies within its files, and can be read."""
    streams = [corpus.stream] + ([corpus.loss_mask] if corpus.loss_mask is not None else [])
    for stream in streams:
        for layout in stream.layouts:
            size, itemsize = Path(layout.mapped).stat().st_size, np.dtype(layout.dtype).itemsize
            for offset, length in zip(layout.offsets, layout.lengths, strict=True):
                assert 0 <= offset <= offset + length * itemsize <= size
        assert len(stream) == len(corpus)
        assert len(stream.read(0, len(stream))) == len(corpus)
    assert len(corpus) > 0


def read_or_refuse(source: Any, **options: Any) -> Corpus | None:
    """A corpus that is sound, or None if it is refused in words."""
    try:
        corpus = Corpus(source, **options)
        ends = corpus.document_ends
    except (CorpusFormatError, OSError):
        return None
    check_runs(corpus)
    if ends is not None:
        assert ends[-1] == len(corpus)
        assert ends[0] >= 0
        assert (np.diff(ends) >= 0).all()
    return corpus


def refused(source: Any, message: str, **options: Any) -> None:
    """The corpus is refused when it is opened or, where that is looked at later, its documents."""
    with pytest.raises(CorpusFormatError, match=message):
        assert Corpus(source, **options).document_ends is not None
