"""Likelihood bound on held-out windows, in bits per token.

Shapes: B batch, L sequence length, V vocabulary, N windows, R masked rows, E draws per window.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nar_kernels.checks import as_int
from nar_kernels.data.windows.dataset import TokenDataset
from nar_kernels.distributed import rank, sum_over_ranks, world_size
from nar_kernels.nets.modes import eval_mode
from nar_kernels.nets.prediction import TrunkAndHead
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.corrupted import Corrupted
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


def evaluation_batch(dataset: TokenDataset, windows: Tensor, draws: int, part: slice) -> Corrupted:
    """A part of the samples: each window ``draws`` times in a row, times stratified over its draws.

    Masks depend only on the window's index in ``windows`` and the draw, and on the loss mask of
    the corpus.
    """
    chosen = windows.repeat_interleave(draws)[part]
    return corrupt(
        dataset.windows(chosen),
        MaskingConfig(dataset.num_tokens, dataset.mask_id),
        seed=_EVALUATION_SEED,
        sample_ids=torch.arange(len(windows) * draws, device="cpu")[part],
        global_batch=draws,
        loss_mask=dataset.loss_mask(chosen),
    )


@torch.no_grad()
def evaluate(
    net: nn.Module, dataset: TokenDataset, windows: Tensor, *, draws: int, device: torch.device
) -> Evaluation:
    """The likelihood bound of ``net`` (ids ``[B, L]`` to logits ``[B, L, V]``) on some windows.

    An upper bound on the negative log-likelihood, estimated with exact draws of the linear
    schedule, in eval mode. Tokens that the loss mask of the corpus leaves out, such as prompts, are
    given, and not counted. Under ``torch.distributed`` all ranks must call this; they share the
    work, and each gets the single-process result.

    Args:
        windows: int64 ``[N]``, indices into ``dataset``.
        draws: E, masks per window.
    """
    draws = as_int("draws", draws)
    parts = evaluation_parts(dataset, len(windows), draws)
    nats = torch.zeros(len(windows) * draws, dtype=torch.float64, device="cpu")  # per token
    counts = torch.zeros_like(nats)  # of tokens
    for first in range(0, len(parts), world_size()):
        # Spare ranks in the last round join in: a sharded net must be called by all ranks.
        mine = first + rank()
        part = parts[min(mine, len(parts) - 1)]
        batch = evaluation_batch(dataset, windows, draws, part).to(device)
        with eval_mode(net, net):
            nll = TrunkAndHead(net)(batch.input_ids, {}).loss(batch, reduction="none")  # [R]
        samples = batch.masked_rows // dataset.seq_len
        totals = nll.new_zeros(len(batch)).index_add_(0, samples, nll)
        if mine < len(parts):
            per_token = totals * batch.loss_weight / batch.num_maskable.clamp(min=1)
            nats[part], counts[part] = per_token.double().cpu(), batch.num_maskable.cpu().double()
    bits = sum_over_ranks(nats).view(-1, draws).mean(1) / NATS_PER_BIT
    share = sum_over_ranks(counts).view(-1, draws)[:, 0]
    if not share.any():
        raise ValueError(
            f"no token of the held-out windows of {dataset.corpus.name} counts in a loss, by its "
            "loss mask: hold out more windows, or longer ones"
        )
    share /= share.mean()
    mean = (bits * share).mean()
    # Undefined for a single window.
    spread = ((bits - mean) * share).square().sum() / max(len(bits) - 1, 1)
    error = math.sqrt(spread.item() / len(bits)) if len(bits) > 1 else math.nan
    return Evaluation(mean.item(), error)
