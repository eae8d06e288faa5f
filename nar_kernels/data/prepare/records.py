"""Documents of a batch: :class:`Reader`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nar_kernels.data.prepare.batches import Batch, without_bom
from nar_kernels.data.prepare.chat import Chat, Spans
from nar_kernels.data.shown import shown
from nar_kernels.errors import CorpusFormatError
from nar_kernels.extras import import_extra

_OTHER_COLUMNS = ("messages", "prompt", "completion", "tools")


class Document(NamedTuple):
    """A text, or a part of one that goes on in the next batch.

    Attributes:
        where: for messages: the file, and the line or row.
        text: as it is encoded.
        counts: the characters whose tokens count in a loss, as (first, first after); None: all.
        ends_itself: whether the text says where it ends, as a chat template does.
    """

    where: str
    text: str
    counts: Spans | None = None
    ends_itself: bool = False


@dataclass
class Reader:
    """Reads the documents of batches.

    Attributes:
        text_column: of the text in records.
        separator: ends a document of a text file, or None.
        chat: renders conversations; None: there is no chat template.
    """

    text_column: str
    separator: str | None
    chat: Chat | None

    def columns(self, names: Sequence[str]) -> list[str]:
        """Which of a table's columns are read: all of one without text, for the error."""
        has_text = {self.text_column, "messages"} & {*names} or {"prompt", "completion"} <= {*names}
        wanted = (self.text_column, *_OTHER_COLUMNS)
        return [name for name in names if name in wanted or not has_text]

    def documents(self, batch: Batch) -> Iterator[Document]:
        """In order, empty ones included.

        Raises:
            CorpusFormatError: a record is malformed; the message names file and line.
        """
        if batch.kind == "text":
            yield from self._texts(batch)
            return
        for where, record in _lines(batch) if batch.kind == "lines" else _rows(batch):
            try:
                yield self._of_record(where, record)
            except ValueError as error:
                raise CorpusFormatError(f"{where}: {error}") from error

    def _texts(self, batch: Batch) -> Iterator[Document]:
        payload = without_bom(batch)
        if self.separator is None:
            yield Document(_where(batch, 0), _decoded(payload, batch))
            return
        parts = _decoded(payload, batch).split(self.separator)
        if not parts[-1]:  # what the last separator ends
            parts.pop()
        line = 0
        for part in parts:
            yield Document(_where(batch, line), part)
            line += part.count("\n") + self.separator.count("\n")

    def _of_record(self, where: str, record: Any) -> Document:
        if not isinstance(record, dict):
            raise ValueError(
                f"it is no object, but {shown(record)}: a line is like "
                f'{{"{self.text_column}": "..."}}'
            )
        if self.text_column in record:
            content = record[self.text_column]
            if isinstance(content, str):
                return Document(where, content)
            if isinstance(content, list) and content:
                return self._conversation(where, content, [], record)
            raise ValueError(
                f"{self.text_column!r} is {shown(content)}: it must be text, or a list of "
                "messages; correct or remove the record"
            )
        if "messages" in record:
            return self._conversation(where, record["messages"], [], record)
        if "prompt" in record and "completion" in record:
            return self._pair(where, record["prompt"], record["completion"], record)
        raise ValueError(
            f"there is no {self.text_column!r}, but {', '.join(map(repr, record)) or 'nothing'}: "
            "name the one with the text with text_column (conversations are 'messages', or "
            "'prompt' and 'completion')"
        )

    def _pair(
        self, where: str, prompt: object, completion: object, record: dict[str, Any]
    ) -> Document:
        if isinstance(prompt, str) and isinstance(completion, str):
            text = prompt + completion
            return Document(where, text, [(len(prompt), len(text))])
        if isinstance(prompt, list) and isinstance(completion, list):
            if not completion:
                raise ValueError("'completion' has no messages: give one, or remove the record")
            return self._conversation(where, prompt + completion, prompt, record)
        raise ValueError(
            f"'prompt' is {shown(prompt)} and 'completion' {shown(completion)}: both must be "
            "text, or both lists of messages"
        )

    def _conversation(
        self, where: str, messages: object, prompt: list[Any], record: dict[str, Any]
    ) -> Document:
        if self.chat is None:
            raise ValueError(
                "it is a conversation, and the tokenizer has no chat template, or several and none "
                "by the name of default: give one with chat_template, a Jinja file, or the "
                "tokenizer of a chat model"
            )
        tools = _tools(record.get("tools"))
        text, counts = self.chat.render(messages, num_prompt=len(prompt), tools=tools)
        return Document(where, text, counts, ends_itself=True)


def _tools(tools: object) -> list[Any] | None:
    """Some data sets hold them as JSON."""
    found = tools
    if isinstance(tools, str):
        try:
            found = json.loads(tools)
        except ValueError:
            pass  # it is no list
    if found is None or isinstance(found, list):
        return found
    raise ValueError(f"'tools' is {shown(tools)}: it must be a list of objects, or such JSON")


def _where(batch: Batch, lines: int) -> str:
    return f"{batch.name}, line {batch.at.line + lines}"


def _decoded(payload: bytes, batch: Batch, line: int = 0) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError as error:
        line += payload.count(b"\n", 0, error.start)
        raise CorpusFormatError(
            f"{_where(batch, line)}: byte {payload[error.start]:#04x} is not UTF-8 "
            f"({error.reason}): convert the file with `iconv -t UTF-8`; if it is no text, "
            "leave it out, by a glob such as 'folder/**/*.txt'"
        ) from error


def _lines(batch: Batch) -> Iterator[tuple[str, Any]]:
    for i, line in enumerate(without_bom(batch).split(b"\n")):
        if not line.strip():
            continue
        text = _decoded(line, batch, i)
        try:
            yield _where(batch, i), json.loads(text)
        except (ValueError, RecursionError) as error:
            hint = ""
            if batch.at.offset == 0 and i == 0:
                command = "jq -c '.[]'" if text.lstrip().startswith("[") else "jq -c ."
                hint = f"; JSON that takes several lines becomes a line a record with `{command}`"
            raise CorpusFormatError(
                f"{_where(batch, i)} is no JSON ({error}): each line is a record of its own; "
                f"correct or remove it{hint}"
            ) from error


def _rows(batch: Batch) -> Iterator[tuple[str, Any]]:
    table = import_extra("pyarrow", None).ipc.open_stream(batch.payload).read_all()
    for i, record in enumerate(table.to_pylist()):
        record = {name: _without_nulls(value) for name, value in record.items()}
        yield f"{batch.name}, row {batch.at.offset + i}", record


def _without_nulls(value: Any) -> Any:
    """As it is in JSON: in a table, each object has the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
