"""``tokenizer.json`` files, and folders of Hugging Face that hold one."""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nar_kernels.data.tokenizers import boundaries
from nar_kernels.data.tokenizers.base import Tokenizer, find_eos, find_mask
from nar_kernels.extras import import_extra


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the package ``tokenizers``.

    Truncation and padding, which such files may ask for, are off.

    Args:
        text: the content of a ``tokenizer.json``.
        name: see :class:`Tokenizer`.
        config: what ``tokenizer_config.json`` says: ``eos_token``, ``mask_token``, other special
            tokens and ``chat_template``. None: there is none, and special tokens are found by name.

    Raises:
        ValueError: not a tokenizer, one that draws at random, or whose end or mask is no token.
    """

    kind = "tokenizers"

    def __init__(self, text: str, name: str, config: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self._tokenizer = _load(text, name)
        self._text = self._tokenizer.to_str()
        # It adds special tokens, which is not wanted, and takes blanks out of spans.
        self._tokenizer.post_processor = None
        spec = json.loads(self._text)
        if spec["model"].get("dropout"):
            raise ValueError(
                f"the tokenizer {name} drops merges at random (dropout "
                f'{spec["model"]["dropout"]}): set "dropout" to null in its "model"'
            )
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        self._has_gaps = len(set(ids)) != self.vocab_size
        self.piece_boundary = boundaries.of_tokenizers(spec)
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        # By name where files do not say, as of the masks of most diffusion language models.
        by_name = {"eos_token": find_eos(added), "mask_token": find_mask(added)}
        self._by_name = {role: token for role, token in by_name.items() if token is not None}
        self.special_tokens = self._by_name | _special_tokens(config or {})
        self.eos_id, self.mask_id = self._id("eos_token"), self._id("mask_token")
        self.chat_template = _default_template((config or {}).get("chat_template"))

    def _id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        id_ = None if token is None else self._tokenizer.token_to_id(token)
        if token is not None and id_ is None:
            raise ValueError(
                f"the {role} of {self.name} is {token!r}, which is no token of its vocabulary: "
                "correct its tokenizer_config.json"
            )
        return id_

    @cached_property
    def _without_special(self) -> Any:
        return self._with_text_of(lambda token: token["special"] or token["id"] == self.mask_id)

    @cached_property
    def without_mask(self) -> Tokenizer:
        other = copy(self)
        other._tokenizer = self._with_text_of(lambda token: token["id"] == self.mask_id)
        return other

    def _with_text_of(self, is_text: Callable[[dict[str, Any]], bool]) -> Any:
        """Takes such added tokens in a text for text, and no others."""
        spec = json.loads(self._text)
        for token in spec["added_tokens"]:
            token["special"] = is_text(token)
        spec["post_processor"] = None
        tokenizer = _load(json.dumps(spec, ensure_ascii=False), self.name)
        tokenizer.encode_special_tokens = True  # that is, as text
        return tokenizer

    def _encode(self, texts: Sequence[str], parse_special: bool, method: str) -> list[Any]:
        tokenizer = self._tokenizer if parse_special else self._without_special
        try:
            return getattr(tokenizer, method)(list(texts), add_special_tokens=False)
        except Exception as error:  # the package raises plain Exceptions
            for text in texts:
                text.encode()  # raises for the text that is none
            raise ValueError(
                f"{self.name} cannot encode a text ({error}): use a tokenizer that has tokens for "
                "all of it"
            ) from error

    def encode_batch(
        self, texts: Sequence[str], *, parse_special: bool = True
    ) -> list[Sequence[int]]:
        return [
            encoding.ids for encoding in self._encode(texts, parse_special, "encode_batch_fast")
        ]

    def encode_with_spans(
        self, text: str, *, parse_special: bool = True
    ) -> tuple[Sequence[int], np.ndarray]:
        (encoding,) = self._encode([text], parse_special, "encode_batch")
        return encoding.ids, np.array(encoding.offsets, np.int64).reshape(-1, 2)

    def _knows(self, id_: int) -> bool:
        is_in_range = super()._knows(id_)
        if is_in_range and self._has_gaps:
            return self._tokenizer.id_to_token(id_) is not None
        return is_in_range

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def backend(self) -> Any:
        """The tokenizer of the package ``tokenizers``, as its file has it."""
        return _load(self._text, self.name)

    def to_json(self) -> str:
        """The ``tokenizer.json`` itself, unless end and mask are not those that their names say, or
        there is a chat template."""
        roles = ("eos_token", "mask_token")
        is_usual = all(self.special_tokens.get(r) == self._by_name.get(r) for r in roles)
        if self.chat_template is None and is_usual:
            return self._text
        return self._as_json(special_tokens=self.special_tokens, tokenizer=json.loads(self._text))

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "HuggingFaceTokenizer":
        """From those of :meth:`to_json`."""
        text = json.dumps(fields["tokenizer"], ensure_ascii=False)
        return cls(text, fields["name"], fields["special_tokens"])


def open_folder(folder: Path, name: str) -> HuggingFaceTokenizer:
    """The tokenizer of a folder of Hugging Face without a ``tokenizer.json``, from its files alone.

    Raises:
        ValueError, ImportError: it has none that can be read.
    """
    transformers = import_extra("transformers", None)
    try:
        slow = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # of any kind, for a folder that is something else
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} has no tokenizer.json, and transformers finds no other tokenizer in it "
            f"({first_line}): name a folder with the files of a tokenizer"
        ) from error
    backend = getattr(slow, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"the tokenizer in {name} is a {type(slow).__name__}, which is written in Python: use "
            "one that has a tokenizer.json"
        )
    config = {**slow.special_tokens_map, "chat_template": slow.chat_template}
    return HuggingFaceTokenizer(backend.to_str(), name, config)


def read_config(folder: Path) -> dict[str, Any] | None:
    """What the files beside a ``tokenizer.json`` say of it; None if there are none."""
    files = ("special_tokens_map.json", "tokenizer_config.json")  # the later one counts
    present = [folder / file for file in files if (folder / file).is_file()]
    template = folder / "chat_template.jinja"
    config: dict[str, Any] = {}
    for path in present:
        try:
            config |= json.loads(path.read_bytes())
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no JSON object ({error}): correct it") from error
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    return config if present or template.is_file() else None


def _load(text: str, name: str) -> Any:
    tokenizers = import_extra("tokenizers", "prepare")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises plain Exceptions
        raise ValueError(
            f"{name} is no tokenizer.json that the package tokenizers "
            f"{tokenizers.__version__} reads ({error}): update the package, or name another file"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """``"bos_token"`` and the like; in files, a token is a string or an object with more."""
    tokens = {}
    for name, token in config.items():
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _default_template(template: object) -> str | None:
    """None if there are several, by name, and none is the default."""
    if isinstance(template, list):
        named = {entry.get("name"): entry for entry in template if isinstance(entry, dict)}
        template = named.get("default", {}).get("template")
    return template if isinstance(template, str) else None
