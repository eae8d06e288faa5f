"""From tokens, batch by batch, to shards: :func:`write_shards`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nar_kernels.data.formats.manifest import Shard, sha256_of
from nar_kernels.data.prepare.batches import Position
from nar_kernels.data.prepare.encode import Encoded
from nar_kernels.data.prepare.progress import Progress
from nar_kernels.data.prepare.shards import NpyWriter, ShardWriter, write_ones
from nar_kernels.data.prepare.staging import Staging


class Result(NamedTuple):
    """The tokens of a batch: where it begins, and the bytes of all inputs read up to its end."""

    at: Position
    read: int
    encoded: Encoded


def write_shards(
    results: Iterator[Result], staging: Staging, dtype: str, shard_tokens: int, progress: Progress
) -> dict[str, int]:
    """Writes the shards that are still to be written. Each ends with the document that brings it to
    ``shard_tokens`` tokens.

    Args:
        results: in order, from the batch on in which the last finished shard ends.

    Returns:
        Of all batches, how many documents were ``"empty"``, and how many mask tokens read as
        ``"plain"`` text.
    """
    done = staging.done
    to_skip, is_counted = done.num_documents, bool(done.shards)
    counts = {"empty": 0, "plain": 0} | done.counts
    writer: ShardWriter | None = None
    at, num_documents = done.at, done.num_documents
    try:
        for at, read, encoded in results:
            if not is_counted:
                counts["empty"] += encoded.num_empty
                counts["plain"] += encoded.num_plain
            rest, num_documents = encoded, to_skip
            if to_skip:
                rest = encoded.split(to_skip)[1]
            num_new = len(rest.ids)
            to_skip, is_counted = 0, False
            while len(rest.ids) or len(rest.ends):
                if writer is None:
                    writer = ShardWriter(staging.folder, len(staging.done.shards), dtype)
                # The first document that ends with the shard full.
                full = int(np.searchsorted(rest.ends, shard_tokens - writer.num_tokens))
                if full == len(rest.ends):
                    num_documents += len(rest.ends)
                    writer.add(rest)
                    break
                part, rest = rest.split(full + 1)
                num_documents += full + 1
                writer.add(part)
                staging.add(writer.close(), at, num_documents, dict(counts))
                writer = None
            progress.update(read, num_new)
        if writer is not None:
            staging.add(writer.close(), at, num_documents, counts)
            writer = None
        return counts
    finally:
        if writer is not None:
            writer.discard()


def with_loss_masks(folder: Path, shards: list[Shard]) -> list[Shard]:
    """All shards with a loss mask if one of them has one: a corpus has one for all or none."""
    if all(shard.loss_mask is None for shard in shards):
        return shards
    return [shard if shard.loss_mask else _with_ones(folder, shard) for shard in shards]


def _with_ones(folder: Path, shard: Shard) -> Shard:
    path = folder / shard.tokens.replace("tokens", "loss-mask")
    writer = NpyWriter(path, "uint8")
    write_ones(writer, shard.num_tokens)
    writer.close()
    return replace(shard, loss_mask=path.name, sha256={**shard.sha256, path.name: sha256_of(path)})
