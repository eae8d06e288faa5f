"""Inputs, cut into batches of about as much text each: :class:`Cutter`."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from nar_kernels.data.prepare.inputs import Input
from nar_kernels.data.prepare.progress import short
from nar_kernels.errors import CorpusFormatError
from nar_kernels.extras import import_extra
from nar_kernels.files import with_filename

_BOM = b"\xef\xbb\xbf"
_LARGE = 1 << 28  # bytes, of which the user is told that they are in memory
_LOOK_BACK = 1 << 12  # bytes searched for a place to cut at, at a time


class Position(NamedTuple):
    """Where a batch begins.

    Attributes:
        source: index of the input.
        offset: bytes of its decompressed content before the batch; rows, of a Parquet file.
        line: its first line, from 1; 0 where lines have no meaning.
    """

    source: int
    offset: int
    line: int


START = Position(0, 0, 1)


@dataclass(frozen=True)
class Batch:
    """Some documents of one input, as bytes: what a worker is given.

    Attributes:
        at: where it begins.
        name, kind: of the input.
        payload: bytes of its content; of a Parquet file, an Arrow stream.
        read: bytes of the input, as stored, that were read so far.
        goes_on: the text of this batch goes on in the next: its last document does not end here.
    """

    at: Position
    name: str
    kind: str
    payload: bytes
    read: int
    goes_on: bool = False


@dataclass(frozen=True)
class Cutter:
    """How inputs are cut; the documents are the same however they are.

    Attributes:
        size: bytes of a batch; a record that is longer is a batch of its own.
        separator: ends a document of a text file; None: each file is a document.
        boundary: ``piece_boundary`` of the tokenizer, where a long document may be cut.
        columns: which of those of a Parquet file are read.
        say: takes a note for the user.
    """

    size: int
    separator: bytes | None
    boundary: re.Pattern[bytes] | None
    columns: Callable[[Sequence[str]], list[str]]
    say: Callable[[str], None]

    def batches(self, inputs: list[Input], start: Position = START) -> Iterator[Batch]:
        """All batches from ``start`` on, the beginning of one of them."""
        for i, input in enumerate(inputs[start.source :], start.source):
            at = start if i == start.source else Position(i, 0, 1)
            try:
                yield from self._of_input(input, at)
            except ImportError:
                raise
            except Exception as error:  # decompressors and pyarrow raise many kinds
                if isinstance(error, OSError) and error.errno is not None:
                    raise with_filename(error, input.name) from error
                raise CorpusFormatError(
                    f"{input.name} cannot be read ({type(error).__name__}: {error}): get a whole "
                    "copy of it"
                ) from error

    def _of_input(self, input: Input, at: Position) -> Iterator[Batch]:
        with input.open() as (content, stored):
            if input.kind == "parquet":
                yield from self._parquet(input, content, at)
                return
            _skip(content, at.offset, self.size)
            separator = b"\n" if input.kind == "lines" else self.separator
            if separator is None:
                yield from self._text(input, content, stored, at)
            else:
                yield from self._separated(input, content, stored, at, separator)

    def _separated(
        self, input: Input, content: BinaryIO, stored: BinaryIO, at: Position, separator: bytes
    ) -> Iterator[Batch]:
        pattern = re.compile(re.escape(separator))
        rest = bytearray()
        is_end = False
        while not is_end:
            cut, wanted = 0, self.size
            while not cut and not is_end:
                is_end = not _fill(rest, content, wanted)
                cut = len(rest) if is_end else _end_of_last(pattern, rest)
                if not cut:
                    self._say_if_large(input, wanted // 2, wanted)
                wanted *= 2
            payload = bytes(rest[:cut])
            del rest[:cut]
            yield Batch(at, input.name, input.kind, payload, stored.tell())
            at = _after(at, payload)

    def _text(
        self, input: Input, content: BinaryIO, stored: BinaryIO, at: Position
    ) -> Iterator[Batch]:
        rest = bytearray()
        wanted = self.size
        while _fill(rest, content, wanted):
            searched = wanted - self.size
            cut = None if self.boundary is None else _last(self.boundary, rest, searched)
            if not cut:
                self._say_if_large(input, searched, wanted)
            wanted += self.size
            if cut:
                payload = bytes(rest[:cut])
                del rest[:cut]
                yield Batch(at, input.name, "text", payload, stored.tell(), goes_on=True)
                at, wanted = _after(at, payload), self.size
        yield Batch(at, input.name, "text", bytes(rest), stored.tell())

    def _say_if_large(self, input: Input, before: int, now: int) -> None:
        """Once: when what is held of an input comes to this size."""
        if before < _LARGE <= now:
            self.say(
                f"note: {input.name} has {short(now)}B in which it may not be cut, and is held in "
                "memory until it may be: --document-separator splits text"
            )

    def _parquet(self, input: Input, content: BinaryIO, at: Position) -> Iterator[Batch]:
        file = import_extra("pyarrow.parquet", None).ParquetFile(content)
        columns = self.columns(file.schema_arrow.names)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        total, row = file.metadata.num_rows, 0
        for i, group in enumerate(groups):
            if row + group.num_rows <= at.offset:
                row += group.num_rows
                continue
            rows = max(1, self.size * group.num_rows // max(group.total_byte_size, 1))
            for table in file.iter_batches(rows, row_groups=[i], columns=columns):
                skipped = max(0, at.offset - row)
                if skipped < table.num_rows:
                    here = Position(at.source, row + skipped, 0)
                    last = row + table.num_rows
                    payload = _arrow_stream(table.slice(skipped))
                    read = input.size * last // total
                    yield Batch(here, input.name, "parquet", payload, read)
                row += table.num_rows


def together(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Groups of batches that have about ``size`` bytes together: one job of a worker each."""
    group: list[Batch] = []
    total = 0
    for batch in batches:
        group.append(batch)
        total += len(batch.payload) + 1
        if total >= size:
            yield group
            group, total = [], 0
    if group:
        yield group


def without_bom(batch: Batch) -> bytes:
    """The payload, without the mark that some editors begin UTF-8 with."""
    return batch.payload.removeprefix(_BOM) if batch.at.offset == 0 else batch.payload


def _after(at: Position, payload: bytes) -> Position:
    return Position(at.source, at.offset + len(payload), at.line + payload.count(b"\n"))


def _end_of_last(pattern: re.Pattern[bytes], text: bytearray) -> int:
    """From the left, as documents are split: a separator may overlap itself, as two line breaks."""
    return max((match.end() for match in pattern.finditer(text)), default=0)


def _fill(buffer: bytearray, content: BinaryIO, wanted: int) -> bool:
    """Reads on until the buffer has so many bytes; False if the content ends first. How an input is
    cut from a position on must not depend on how it was read up to there."""
    while len(buffer) < wanted:
        block = content.read(wanted - len(buffer))
        if not block:
            return False
        buffer += block
    return True


def _skip(content: BinaryIO, offset: int, size: int) -> None:
    if offset and content.seekable():
        content.seek(offset)
        return
    while offset > 0:
        block = content.read(min(size, offset))
        if not block:
            raise EOFError("it is shorter than it was")
        offset -= len(block)


def _last(boundary: re.Pattern[bytes], text: bytearray, searched: int) -> int | None:
    """Where the last match in ``text`` ends; None if there is none but what was searched before."""
    stop = len(text)
    while stop > searched:
        # A match may begin before and look beyond the part that is searched.
        start = max(stop - _LOOK_BACK, searched)
        matches = boundary.finditer(text, max(start - 2, 0), min(stop + 2, len(text)))
        end = max((match.end() for match in matches), default=0)
        if end:
            return end
        stop = start
    return None


def _arrow_stream(table: Any) -> bytes:
    pyarrow = import_extra("pyarrow", None)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_batch(table)
    return sink.getvalue().to_pybytes()
