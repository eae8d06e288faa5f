"""Opens tokenizers: :func:`open_tokenizer`, :func:`tokenizer_from_json`."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nar_kernels.data.tokenizers.base import Tokenizer, read_fields
from nar_kernels.data.tokenizers.byte_level import ByteTokenizer
from nar_kernels.data.tokenizers.hugging_face import (
    HuggingFaceTokenizer,
    open_folder,
    read_config,
)
from nar_kernels.data.tokenizers.tiktoken_ranks import TiktokenTokenizer, open_encoding

__all__ = ["Tokenizer", "open_tokenizer", "tokenizer_from_json"]

_FROM_FIELDS: dict[str, Callable[[dict[str, Any]], Tokenizer]] = {
    ByteTokenizer.kind: lambda fields: ByteTokenizer(),
    HuggingFaceTokenizer.kind: HuggingFaceTokenizer.from_fields,
    TiktokenTokenizer.kind: TiktokenTokenizer.from_fields,
}

_VALID = (
    "a tokenizer is 'bytes', the path of a tokenizer.json, a folder with one, or 'tiktoken:gpt2' "
    "(or another encoding of tiktoken)"
)


def open_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """Opens a tokenizer from files on this machine; nothing is downloaded.

    Args:
        name: one of

            * ``"bytes"``: each byte of UTF-8 is a token;
            * the path of a ``tokenizer.json`` of the package tokenizers. Files beside it that
              Hugging Face writes say which tokens end documents and mask, and how a conversation
              reads. Without them, the usual names do, such as ``<|endoftext|>`` and ``[MASK]``;
            * a folder with such files;
            * ``"tiktoken:gpt2"``, or another encoding whose files are in tiktoken's cache.

    Raises:
        FileNotFoundError: no such file, or not in tiktoken's cache.
        ValueError: nothing of the above, or malformed.
        ImportError: the package that reads it is not installed; the message gives the pip command.
    """
    name = os.fspath(name)
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if name.startswith("tiktoken:"):
        return open_encoding(name.removeprefix("tiktoken:"))
    path = Path(name)
    if path.is_dir():
        file = path / "tokenizer.json"
        return _open_file(file, name) if file.is_file() else open_folder(path, name)
    if not path.exists():
        hint = ""
        if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) and not name.endswith(".json"):
            files = "--include '*token*' 'vocab*' 'chat_template*'"
            hint = f"; if it is on the Hugging Face hub, `hf download {name} {files}` first"
            hint += ", with --local-dir FOLDER"
        raise FileNotFoundError(f"there is no tokenizer {name}: {_VALID}{hint}")
    return _open_file(path, name)


def _open_file(path: Path, name: str) -> Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no tokenizer.json, but binary: {_VALID}") from error
    try:
        if read_fields(text, _FROM_FIELDS) is not None:
            return tokenizer_from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_VALID}") from error
    return HuggingFaceTokenizer(text, name, read_config(path.parent))


def tokenizer_from_json(text: str) -> Tokenizer:
    """The tokenizer whose ``to_json()`` is ``text``, or that of a ``tokenizer.json`` of the package
    tokenizers.

    Raises:
        ValueError: it is neither.
        ImportError: the package that reads it is not installed.
    """
    fields = read_fields(text, _FROM_FIELDS)
    if fields is None:
        return HuggingFaceTokenizer(text, "tokenizer.json")
    try:
        tokenizer = _FROM_FIELDS[fields["kind"]](fields)
        tokenizer.chat_template = fields["chat_template"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"this tokenizer is malformed ({type(error).__name__}: {error}): take the file as "
            "prepare wrote it"
        ) from error
    return tokenizer
