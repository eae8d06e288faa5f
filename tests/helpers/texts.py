"""Small texts, and small tokenizers of each kind."""

import json
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

# What tokenizers get wrong, if anything: blanks, line breaks, accents, other scripts, emoji.
HARD = (
    "",
    " ",
    "\n",
    "a",
    "  two blanks,  and\tthree\n\n\nlines  \n ",
    "Crème brûlée, naïve\u0301 e\u0301 — “quoted”…",
    "日本語のテキスト、 한국어 텍스트 и русский",
    "👩‍👩‍👧 smile 😀\u200b zero\u00a0width",
    "def f(x):\r\n\treturn x**2 + 10_000.5e-3  # it's I'LL\r\n",
    "\ufeffmark \x00 null",
)


@cache
def prose() -> tuple[str, ...]:
    """Some hundred texts in English, 0.6 MB."""
    return tuple(topics[name] for name in sorted(topics))


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@cache
def bpe_json() -> str:
    """The ``tokenizer.json`` of a byte-level BPE, whose text ends with id 0."""
    from nar_kernels.data.prepare.train_bpe import train_bpe

    return train_bpe(iter([list(prose()[:20])]), 600).to_json()


def word_pieces() -> Any:
    """A tokenizer like BERT's, with a mask and no end of text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(prose()[:10], trainer)
    return tokenizer


CHAT_ML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_chat_tokenizer(folder: Path, template: str = CHAT_ML) -> Path:
    """A folder as Hugging Face writes it, of a chat model whose turns end with ``<|im_end|>``."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(bpe_json())
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|mdm_mask|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
        "bos_token": "<|im_start|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    r"\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


def encoding(name: str = "small") -> Any:
    """An encoding of tiktoken, with the pattern of cl100k_base."""
    import tiktoken

    merges = [b"th", b"the", b" the", b"in", b"ing", b"\n\n", b"er", b" a", "é".encode()]
    ranks = {bytes([i]): i for i in range(256)} | {m: 256 + i for i, m in enumerate(merges)}
    special = {"<|endoftext|>": 300, "<|other|>": 301}
    return tiktoken.Encoding(name, pat_str=_CL100K, mergeable_ranks=ranks, special_tokens=special)
