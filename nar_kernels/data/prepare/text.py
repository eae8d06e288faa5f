"""From text and conversations to a corpus: :func:`prepare_text`."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

from nar_kernels.data.formats.manifest import Manifest, TokenizerFile, Vocabulary
from nar_kernels.data.prepare.batches import Batch, Cutter, together
from nar_kernels.data.prepare.chat import Chat
from nar_kernels.data.prepare.config import PrepareConfig
from nar_kernels.data.prepare.encode import Encoder
from nar_kernels.data.prepare.inputs import Input, bytes_before, digest
from nar_kernels.data.prepare.pool import encode_all
from nar_kernels.data.prepare.progress import Progress, short
from nar_kernels.data.prepare.records import Reader
from nar_kernels.data.prepare.staging import Staging
from nar_kernels.data.prepare.train_bpe import EOS, default_size, named, sample_every, train_bpe
from nar_kernels.data.prepare.write import Result, with_loss_masks, write_shards
from nar_kernels.data.tokenizer import Tokenizer, open_tokenizer, tokenizer_from_json
from nar_kernels.data.tokenizers.boundaries import BETWEEN_WORDS
from nar_kernels.errors import CorpusFormatError
from nar_kernels.files import atomic_write

_TOKENIZER_FILE = "tokenizer.json"
_BATCHES_OF_WORKER = 4  # fewer are not worth another process


def prepare_text(
    inputs: list[Input], out: Path, config: PrepareConfig, progress: Progress
) -> Manifest:
    """See :func:`nar_kernels.data.prepare.pipeline.prepare`."""
    config.check_unset(("labels", "vocab_size"), "is for image codes, .npy files")
    template = None if config.chat_template is None else _template(Path(config.chat_template))
    tokenizer, size = _choose(inputs, config, progress)
    if config.append_eos and tokenizer is not None and tokenizer.eos_id is None:
        raise ValueError(
            f"append_eos is true, but the tokenizer {tokenizer.name} has no token that ends a "
            "text: leave it out, or use another tokenizer"
        )
    record = {
        "inputs": digest(inputs),
        "tokenizer": None if tokenizer is None else _sha256(tokenizer.to_json()),
        "train_bpe": size,
        "chat_template": None if template is None else _sha256(template),
        "text_column": config.text_column,
        "document_separator": config.document_separator,
        "append_eos": config.append_eos,
        "parse_special_tokens": config.parse_special_tokens,
        "shard_tokens": config.shard_tokens,
        "batch_bytes": config.batch_bytes,
    }
    with Staging(out, record, config.overwrite) as staging:
        file = staging.folder / _TOKENIZER_FILE
        if tokenizer is None:
            assert size is not None
            tokenizer = _trained(inputs, file, size, template, config, progress)
        if template is not None:
            tokenizer.chat_template = template
        with atomic_write(file) as stream:
            stream.write(tokenizer.to_json().encode())
        return _write(inputs, tokenizer, staging, config, progress)


def _template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no chat template, but binary ({error}): name a Jinja file, in UTF-8"
        ) from error


def _choose(
    inputs: list[Input], config: PrepareConfig, progress: Progress
) -> tuple[Tokenizer | None, int | None]:
    """The tokenizer, or how large a BPE to train."""
    if config.tokenizer is not None:
        return open_tokenizer(config.tokenizer), None
    if config.train_bpe is not None:
        return None, config.train_bpe
    text_bytes = sum(input.text_bytes for input in inputs)
    size = default_size(text_bytes)
    chosen = "bytes" if size is None else f"a BPE of {size} tokens, trained on them"
    why = "too little for a BPE" if size is None else "as many tokens as so much text can teach"
    progress.say(f"no tokenizer was given: {chosen} ({short(text_bytes)}B of text, {why})")
    return (open_tokenizer("bytes"), None) if size is None else (None, size)


def _reader(template: str | None, special_tokens: dict[str, str], config: PrepareConfig) -> Reader:
    chat = None if template is None else Chat(template, special_tokens)
    return Reader(config.text_column, config.document_separator, chat)


def _cutter(
    reader: Reader, tokenizer: Tokenizer | None, config: PrepareConfig, progress: Progress
) -> Cutter:
    separator = config.document_separator
    return Cutter(
        size=config.batch_bytes,
        separator=None if separator is None else separator.encode(),
        boundary=BETWEEN_WORDS if tokenizer is None else tokenizer.piece_boundary,
        columns=reader.columns,
        say=progress.say,
    )


def _trained(
    inputs: list[Input],
    file: Path,
    size: int,
    template: str | None,
    config: PrepareConfig,
    progress: Progress,
) -> Tokenizer:
    """A BPE of the inputs; that in ``file``, if it was trained before."""
    if file.exists():
        return named(tokenizer_from_json(file.read_text(encoding="utf-8")))
    reader = _reader(template, {"eos_token": EOS}, config)
    cutter = _cutter(reader, None, config, progress)
    every = sample_every(sum(input.text_bytes for input in inputs))
    sample = "" if every == 1 else f", on one part of {every}"
    progress.say(f"training a BPE of {size} tokens{sample}")

    def texts() -> Iterator[list[str]]:
        for batch in islice(cutter.batches(inputs), 0, None, every):
            yield [document.text for document in reader.documents(batch)]

    return train_bpe(texts(), size)


def _write(
    inputs: list[Input],
    tokenizer: Tokenizer,
    staging: Staging,
    config: PrepareConfig,
    progress: Progress,
) -> Manifest:
    vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.mask_id)
    reader = _reader(tokenizer.chat_template, dict(tokenizer.special_tokens), config)
    encoder = Encoder(
        reader, tokenizer, vocabulary.dtype, config.append_eos, config.parse_special_tokens
    )
    cutter = _cutter(reader, tokenizer, config, progress)
    before = bytes_before(inputs)
    done = staging.done
    if done.shards:
        progress.say(f"going on after {len(done.shards)} finished shards")
    progress.begin(before[-1], before[done.at.source])
    undivided: list[str] = []
    batches = _noting_undivided(cutter.batches(inputs, done.at), cutter.separator, undivided)
    num_workers = _num_workers(inputs, config)
    with closing(encode_all(together(batches, config.batch_bytes), encoder, num_workers)) as all_:
        results = (Result(b.at, before[b.at.source] + b.read, encoded) for b, encoded in all_)
        limit = config.shard_tokens
        counts = write_shards(results, staging, vocabulary.dtype, limit, progress)
    if not staging.done.shards:
        raise CorpusFormatError("there is no text in the inputs: all documents are empty")
    shards = with_loss_masks(staging.folder, staging.done.shards)
    manifest = Manifest.of_shards(
        shards,
        vocabulary,
        eos_id=tokenizer.eos_id,
        tokenizer=TokenizerFile(tokenizer.name, _TOKENIZER_FILE),
    )
    staging.finish(manifest)
    speed = progress.end()
    progress.say(f"this run: {speed}, workers: {num_workers}")
    if undivided:
        progress.say(
            f"files in which the separator {config.document_separator!r} does not occur, each one "
            f"document: {len(undivided)}, such as {undivided[0]}"
        )
    if counts["empty"]:
        progress.say(f"empty documents, left out: {counts['empty']}")
    if counts["plain"]:
        progress.say(f"mask tokens that the text names, taken for text: {counts['plain']}")
    return manifest


def _noting_undivided(
    batches: Iterator[Batch], separator: bytes | None, names: list[str]
) -> Iterator[Batch]:
    """Adds to ``names`` those of files of text in which the separator does not occur."""
    for batch in batches:
        if separator is not None and batch.kind == "text" and batch.at.offset == 0:
            if batch.payload and separator not in batch.payload:
                names.append(batch.name)
        yield batch


def _num_workers(inputs: list[Input], config: PrepareConfig) -> int:
    wanted = config.workers
    if wanted is None:
        has_affinity = hasattr(os, "sched_getaffinity")
        wanted = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    text_bytes = sum(input.text_bytes for input in inputs)
    return max(1, min(wanted, text_bytes // (config.batch_bytes * _BATCHES_OF_WORKER)))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
