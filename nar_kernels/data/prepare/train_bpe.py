"""A tokenizer of the inputs' own: :func:`train_bpe`, and how large it is by default."""

import math
from collections.abc import Iterator

from nar_kernels.data.tokenizers.base import Tokenizer
from nar_kernels.data.tokenizers.hugging_face import HuggingFaceTokenizer
from nar_kernels.extras import import_extra

EOS = "<|endoftext|>"

# Different words grow like the root of a text (Heaps' law), and so may tokens: half a megabyte gets
# 1024, 33 MB get 8192. A net then meets each often enough to learn it.
_TOKENS_OF_ROOT = 1.5
_SMALLEST, _LARGEST = 512, 32768
_SAMPLE_BYTES = 1 << 28


def default_size(text_bytes: int) -> int | None:
    """Tokens of a BPE for so much text: a power of two from 512 to 32768. None: too little text
    for a BPE; bytes then."""
    size = min(int(_TOKENS_OF_ROOT * math.sqrt(text_bytes)), _LARGEST)
    return None if size < _SMALLEST else 1 << int(math.log2(size))


def sample_every(text_bytes: int) -> int:
    """So that every such part of the text, together, is a sample to train on: 256 MiB at most."""
    return max(1, math.ceil(text_bytes / _SAMPLE_BYTES))


def train_bpe(texts: Iterator[list[str]], size: int) -> Tokenizer:
    """A byte-level BPE with at most ``size`` tokens, of which the first is the end of a text; fewer
    if the texts have too few pairs. The same texts give the same."""
    tokenizers = import_extra("tokenizers", "prepare")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[EOS],
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return named(HuggingFaceTokenizer(tokenizer.to_str(), "BPE"))


def named(tokenizer: Tokenizer) -> Tokenizer:
    """A trained tokenizer, with a name that says what it is."""
    tokenizer.name = f"BPE of {tokenizer.vocab_size} tokens"
    return tokenizer
