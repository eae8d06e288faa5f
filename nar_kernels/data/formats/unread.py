"""Unsupported formats, which a raw reader would take for tokens, headers included."""

import json
import re
from pathlib import Path

from nar_kernels.errors import CorpusFormatError

# By remedy: patterns of the first (and last) bytes, and what they identify. Ids or text could start
# with a short magic number, so that of gzip and others includes what must follow it.
HEAD_BYTES, TAIL_BYTES = 512, 8
_RAW = (
    "; if these are raw ids all the same, pass np.memmap(file, dtype=..., mode='r'), or np.save it "
    "to a .npy file"
)
_BY_LIBRARY = f"read the ids with a library for this format, and pass them as an array{_RAW}"
_UNSUPPORTED_FORMATS: dict[str, dict[bytes, str]] = {
    f"load it, with np.load or torch.load, and pass the array of ids that it holds{_RAW}": {
        rb"PK(\x03\x04|\x05\x06)": "a zip archive, as np.savez and torch.save write them",
        # Protocols 4 and 5 start with a frame length.
        rb"\x80[\x04\x05]\x95.{5}\0{3}": "a pickle",
        rb"\x80[\x02\x03]([]}]q\0[(KX]|c(numpy|torch|array|collections|builtins|__builtin__)\b)": (
            "a pickle"
        ),
        rb"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19": "a torch.save file in its legacy format",
    },
    f"decompress it{_RAW}": {
        # Flags, time, compression level, operating system.
        rb"\x1f\x8b\x08[\0-\x1f].{4}[\0\x02\x04][\0-\x0d\xff]": "compressed by gzip",
        rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "compressed by bzip2",
        rb"\xfd7zXZ\0": "compressed by xz",
        rb"\x28\xb5\x2f\xfd": "compressed by zstd",
        rb"\x04\x22\x4d\x18[\x40-\x7f][\x40-\x70]": "compressed by lz4",
        rb"7z\xbc\xaf\x27\x1c": "a 7z archive",
        rb"Rar!\x1a\x07[\0\x01]": "a RAR archive",
    },
    f"extract it{_RAW}": {rb".{257}ustar(\x0000|  \0)": "a tar archive"},
    _BY_LIBRARY: {
        rb"PARE.{4,}PARE\Z": "an encrypted Parquet file",
        rb"FEA1.{4,}FEA1\Z": "a Feather file, version 1",
        re.escape((20240522).to_bytes(4, "little")): "questions with answers for llm.c",
        rb"[\xc6-\xc8]\xd7\x34\x01": "a checkpoint or tokenizer of llm.c",
        # The header length, below 128 MiB, and the start of the header.
        rb'.{3}[\0-\x07]\0{4}\{"[ -~]': "a safetensors file",
        rb"\x89HDF\r\n\x1a\n": "an HDF5 file",
        rb"GGUF[\x01-\x0f]\0{3}": "a GGUF file",
        rb"Obj\x01.{1,16}avro\.": "an Avro file",
        rb"%PDF-\d\.\d": "a PDF document",
        rb"SQLite format 3\0": "an SQLite database",
    },
    f"decode it, and pass its ids as an array{_RAW}": {
        rb"\x89PNG\r\n\x1a\n": "a PNG image",
        rb"\xff\xd8\xff[\xc0-\xfe]..(JFIF|Exif)\0": "a JPEG image",
        rb"GIF8[79]a": "a GIF image",
        rb"RIFF.{4}WAVEfmt": "a WAV file",
        rb"fLaC\0{3}\x22": "a FLAC file",
    },
}


# All at once: there may be many files, and few are of these formats.
_ANY = re.compile(
    b"|".join(b"(?:%s)" % p for formats in _UNSUPPORTED_FORMATS.values() for p in formats),
    re.DOTALL,
)


def reject_unsupported_formats(path: Path, head: bytes, tail: bytes) -> None:
    """Raises CorpusFormatError if the first or last bytes are those of an unsupported format."""
    found = []
    if _ANY.match(head + tail):
        found = [
            (what, remedy)
            for remedy, formats in _UNSUPPORTED_FORMATS.items()
            for pattern, what in formats.items()
            if re.match(pattern, head + tail, re.DOTALL)
        ]
    if _is_tfrecord(head):
        found.append(("a TFRecord file", _BY_LIBRARY))
    if _is_litdata_chunk(path):
        found.append(("a chunk of a LitData dataset", _BY_LIBRARY))
    for what, remedy in found:
        raise CorpusFormatError(f"{path} is {what}. This format is not supported yet: {remedy}")


def _is_tfrecord(head: bytes) -> bool:
    """Whether the file starts with a record length and its masked CRC-32C."""
    crc = 0xFFFFFFFF
    for byte in head[:8]:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    masked = (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF
    return head[8:12] == masked.to_bytes(4, "little")


def _is_litdata_chunk(path: Path) -> bool:
    """Whether the index of such a dataset, beside the file, names it."""
    try:
        index = json.loads(path.with_name("index.json").read_bytes())
        return any(chunk["filename"] == path.name for chunk in index["chunks"])
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return False
