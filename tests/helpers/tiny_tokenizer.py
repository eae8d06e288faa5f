"""A tokenizer of Hugging Face, made on the spot."""

from typing import Any

WORDS = [f"w{i}" for i in range(24)]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_tokenizer(**options: Any) -> Any:
    """Word pieces: a word is ``w0`` .. ``w23``, and ``w3w5`` is two tokens; special ids are 0 .. 3
    (padding, [CLS], [SEP], [MASK]), and 4 is unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, "[UNK]", *WORDS, *(f"##{word}" for word in WORDS)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    inner = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = dict(zip(("pad_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **names, **options)
