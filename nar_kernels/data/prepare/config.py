"""Options of ``nar-kernels prepare``: :class:`PrepareConfig`."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields

from nar_kernels.options import coerce_fields, option, option_of

_LEAST_BPE = 257  # 256 bytes and the end of a text


@dataclass(frozen=True)
class PrepareConfig:
    """Every option of ``nar-kernels prepare``, described in ``metadata["help"]``.

    Attributes:
        append_eos: None: to text if the tokenizer has an ``eos_id``, and not to conversations,
            whose template says how they end.
        batch_bytes: of text that a worker is given at a time. Changes no token.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range, or options exclude each other.
    """

    tokenizer: str | os.PathLike[str] | None = option(
        None,
        "bytes, a tokenizer.json, a folder of Hugging Face, or tiktoken:gpt2",
        type=str,
        otherwise="a BPE trained on the inputs, as large as their amount of text supports",
    )
    train_bpe: int | None = option(
        None,
        "train a byte-level BPE with this many tokens on the inputs, in place of --tokenizer",
        type=int,
        metavar="N",
    )
    text_column: str = option("text", "column or key of records with the text, or a conversation")
    document_separator: str | None = option(
        None, "split text files into documents at this text, which is dropped", type=str
    )
    chat_template: str | os.PathLike[str] | None = option(
        None, "Jinja file for conversations", type=str, otherwise="the tokenizer's own"
    )
    parse_special_tokens: bool = option(
        True,
        "take special tokens in a text, such as <|im_end|>, for these tokens, and not for text; "
        "never the mask token",
    )
    labels: str | os.PathLike[str] | None = option(None, "class of each image: .npy [N]", type=str)
    vocab_size: int | None = option(
        None, "of image codes", type=int, otherwise="the greatest code plus one"
    )
    shard_tokens: int = option(
        100_000_000, "a file ends with the document that brings it to this many tokens"
    )
    workers: int | None = option(None, "processes", type=int, otherwise="one a core")
    overwrite: bool = option(False, "replace a corpus in --out", action="store_true")
    quiet: bool = option(False, "print nothing", action="store_true")
    append_eos: bool | None = option(
        None,
        "end each document with the tokenizer's end of text (default: yes if it has one; "
        "conversations end as their template says)",
    )
    batch_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        coerce_fields(self)
        for name, least in (("workers", 1), ("shard_tokens", 1), ("vocab_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: it must be at least {least}")
        if self.train_bpe is not None and not _LEAST_BPE <= self.train_bpe < 1 << 31:
            raise ValueError(
                f"train_bpe is {self.train_bpe}: it must be in [{_LEAST_BPE}, 2**31), a token for "
                "each byte, one for the end of a text, and merges"
            )
        if self.tokenizer is not None and self.train_bpe is not None:
            raise ValueError(
                f"{option_of('tokenizer')} and {option_of('train_bpe')} exclude each other: give "
                "one of them"
            )
        if self.batch_bytes < 1:
            raise ValueError(f"batch_bytes is {self.batch_bytes}: it must be at least 1")

    def check_unset(self, names: Iterable[str], why: str) -> None:
        """Raises ValueError for options that another kind of input would need."""
        for f in fields(self):
            if f.name in names and getattr(self, f.name) != f.default:
                raise ValueError(f"{f.name} {why}: leave it out")
