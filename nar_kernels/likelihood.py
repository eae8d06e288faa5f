"""Likelihood bound on held-out windows, in bits per token.

Shapes: B batch, L sequence length, V vocabulary, N windows, R masked rows, E draws per window.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nar_kernels.checks import as_int
from nar_kernels.data.classes import check_labels
from nar_kernels.data.packing.document_range import DocumentRange
from nar_kernels.data.packing.pack import pack
from nar_kernels.data.windows.dataset import TokenDataset
from nar_kernels.distributed import rank, sum_over_ranks, world_size
from nar_kernels.nets.classes import batch_class_keywords
from nar_kernels.nets.modes import eval_mode
from nar_kernels.nets.packed import block_keywords, packed_keywords, predict_blocks
from nar_kernels.nets.prediction import Prediction, TrunkAndHead
from nar_kernels.ops.corrupt import corrupt, corrupt_documents
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.documents import check_documents
from nar_kernels.ops.masking import MaskingConfig

NATS_PER_BIT = math.log(2)

# Same noise in every evaluation of every run, whatever its seed and step.
_EVALUATION_SEED = 0x5EED

_MAX_TOKENS, _MAX_LOGITS = 1 << 14, 1 << 25  # per batch


class Evaluation(NamedTuple):
    """Bits per token and its standard error over windows."""

    bits_per_token: float
    standard_error: float


def evaluation_parts(dataset: TokenDataset, num_windows: int, draws: int) -> list[slice]:
    """Batches of the ``num_windows * draws`` samples, each with all draws of its windows."""
    most = min(_MAX_TOKENS, _MAX_LOGITS // dataset.num_tokens) // dataset.seq_len
    size, total = max(most // draws, 1) * draws, num_windows * draws
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def evaluation_batch(
    dataset: TokenDataset,
    windows: Tensor,
    draws: int,
    part: slice,
    block_length: int | None = None,
    class_ids: Tensor | None = None,
) -> Corrupted:
    """A part of the samples: each window ``draws`` times in a row, times stratified over its draws.

    Masks depend only on the window's index in ``windows`` and the draw, and on the loss mask of
    the corpus.

    Args:
        class_ids: int64 ``[N]``, of each of ``windows``.
    """
    chosen = windows.repeat_interleave(draws)[part]
    batch = corrupt(
        dataset.windows(chosen),
        MaskingConfig(dataset.num_tokens, dataset.mask_id, block_length=block_length),
        seed=_EVALUATION_SEED,
        sample_ids=torch.arange(len(windows) * draws, device="cpu")[part],
        global_batch=draws,
        loss_mask=dataset.loss_mask(chosen),
    )
    if class_ids is not None:
        batch.class_ids = class_ids.repeat_interleave(draws)[part]
    return batch


@torch.no_grad()
def evaluate(
    net: nn.Module,
    dataset: TokenDataset,
    windows: Tensor,
    *,
    draws: int,
    device: torch.device,
    block_length: int | None = None,
    class_ids: Tensor | None = None,
) -> Evaluation:
    """The likelihood bound of ``net`` (ids ``[B, L]`` to logits ``[B, L, V]``) on some windows.

    An upper bound on the negative log-likelihood, estimated with exact draws of the linear
    schedule, in eval mode. Tokens that the loss mask of the corpus leaves out, such as prompts, are
    given, and not counted. Under ``torch.distributed`` all ranks must call this; they share the
    work, and each gets the single-process result.

    Args:
        windows: int64 ``[N]``, indices into ``dataset``.
        draws: E, masks per window.
        block_length: of block diffusion: each block is predicted given the clean ones before it.
        class_ids: integers ``[N]``, the class of each of ``windows``, of which the net is told: the
            bound is then on the likelihood given the class.

    Raises:
        TypeError, ValueError: ``draws`` or ``class_ids`` is something else.
    """
    draws = as_int("draws", draws)
    batches = window_batches(dataset, windows, draws, block_length, class_ids)
    nats, counts = _nats(net, batches, len(windows) * draws, device)
    return _evaluation(nats, counts, draws, dataset.corpus.name)


@torch.no_grad()
def evaluate_documents(
    net: nn.Module,
    documents: DocumentRange,
    *,
    draws: int,
    device: torch.device,
    block_length: int | None = None,
) -> Evaluation:
    """:func:`evaluate` on whole documents, packed into rows in which ``net`` keeps them apart.

    Args:
        draws: E, masks per document. They depend on the document and the draw alone.
        block_length: as there.
    """
    draws = as_int("draws", draws)
    batches = document_batches(documents, draws, block_length)
    nats, counts = _nats(net, batches, len(documents.pieces()[0]) * draws, device)
    return _evaluation(nats, counts, draws, documents.corpus.name)


# Makes the numbers int64 [n] of some samples, and their batch.
MakeBatch = Callable[[], tuple[Tensor, Corrupted]]


def window_batches(
    dataset: TokenDataset,
    windows: Tensor,
    draws: int,
    block_length: int | None,
    class_ids: Tensor | None = None,
) -> list[MakeBatch]:
    """Those of :func:`evaluate`."""
    if class_ids is not None:  # not those of all windows of the dataset
        class_ids = check_labels("class_ids", class_ids, len(windows))

    def batch(part: slice) -> tuple[Tensor, Corrupted]:
        chosen = torch.arange(len(windows) * draws, device="cpu")[part]
        return chosen, evaluation_batch(dataset, windows, draws, part, block_length, class_ids)

    return [partial(batch, part) for part in evaluation_parts(dataset, len(windows), draws)]


def document_batches(
    documents: DocumentRange, draws: int, block_length: int | None
) -> list[MakeBatch]:
    """Those of :func:`evaluate_documents`."""
    starts, lengths = (x.repeat_interleave(draws) for x in documents.pieces())
    places = pack(lengths.numpy(), documents.seq_len, "in_order")
    rows, offsets = torch.from_numpy(places.rows), torch.from_numpy(places.offsets)
    masking = MaskingConfig(documents.num_tokens, documents.mask_id, block_length=block_length)
    stream, mask = documents.corpus.stream, documents.corpus.loss_mask

    def batch(first: int) -> tuple[Tensor, Corrupted]:
        last = min(first + rows_at_once, places.num_rows)
        chosen = ((rows >= first) & (rows < last)).nonzero().flatten()
        where = check_documents(
            lengths[chosen],
            sample_ids=chosen,
            places=(rows[chosen] - first) * documents.seq_len + offsets[chosen],
            num_rows=last - first,
            seq_len=documents.seq_len,
        )
        made = corrupt_documents(
            where,
            stream.flat,
            starts[chosen],
            masking,
            seed=_EVALUATION_SEED,
            global_batch=draws,
            runs=stream.runs,
            loss_mask=None if mask is None or mask.runs is not None else mask.flat,
            loss_mask_runs=None if mask is None else mask.runs,
        )
        made.raise_if_invalid(documents.corpus.name)
        return chosen, made

    most = min(_MAX_TOKENS, _MAX_LOGITS // documents.num_tokens)
    rows_at_once = max(most // documents.seq_len, 1)
    return [partial(batch, first) for first in range(0, places.num_rows, rows_at_once)]


def weighted_nats(net: nn.Module, batch: Corrupted) -> Tensor:
    """Of each draw of a batch, in the shape of its ``times``: the sum of its losses in nats, times
    its weight. ``net`` is called in eval mode."""
    with eval_mode(net, net):
        nll = _predict(net, batch).loss(batch, reduction="none")  # [R]
    totals = nll.new_zeros(batch.times.numel())
    totals.index_add_(0, batch.draws_of(batch.masked_rows), nll)
    return totals.view_as(batch.times) * batch.loss_weight


def _nats(
    net: nn.Module,
    batches: Sequence[MakeBatch],
    num_samples: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """float64 ``[num_samples]``: nats per token that counts, and how many do. The ranks share the
    batches, of which each makes a part of the samples."""
    nats = torch.zeros(num_samples, dtype=torch.float64, device="cpu")
    counts = torch.zeros_like(nats)
    for first in range(0, len(batches), world_size()):
        # Spare ranks in the last round join in: a sharded net must be called by all ranks.
        mine = first + rank()
        samples, batch = batches[min(mine, len(batches) - 1)]()
        batch = batch.to(device)
        weighted, maskable = weighted_nats(net, batch), batch.num_maskable
        if batch.has_blocks:
            weighted, maskable = weighted.sum(1), maskable.sum(1)
        per_token = weighted / maskable.clamp(min=1)
        if mine < len(batches):
            nats[samples] = per_token.double().cpu()
            counts[samples] = maskable.double().cpu()
    summed = sum_over_ranks(torch.stack([nats, counts]))
    return summed[0], summed[1]


def _predict(net: nn.Module, batch: Corrupted) -> Prediction:
    block_length = batch.masking.block_length
    kwargs = batch_class_keywords(net, batch, {})
    if block_length is not None:
        kwargs |= block_keywords(net, batch, block_length, {})
        return predict_blocks(TrunkAndHead(net), batch, kwargs)
    if batch.documents is not None:
        kwargs |= packed_keywords(net, batch, {})
    return TrunkAndHead(net)(batch.input_ids, kwargs)


def _evaluation(nats: Tensor, counts: Tensor, draws: int, name: str) -> Evaluation:
    """Of nats per token and counts of tokens, float64 ``[N * draws]``."""
    bits = nats.view(-1, draws).mean(1) / NATS_PER_BIT
    share = counts.view(-1, draws)[:, 0]
    if not share.any():
        raise ValueError(
            f"no token that is held out of {name} counts in a loss, by its loss mask: hold out more"
        )
    share = share / share.mean()
    mean = (bits * share).mean()
    # Undefined for a single window.
    spread = ((bits - mean) * share).square().sum() / max(len(bits) - 1, 1)
    error = math.sqrt(spread.item() / len(bits)) if len(bits) > 1 else math.nan
    return Evaluation(mean.item(), error)
