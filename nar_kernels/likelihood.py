"""Bits per token on held-out windows, and the baselines to compare with.

Shapes: B batch, L sequence length, V vocabulary, N windows, E noise draws of each window.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nar_kernels.checks import as_int
from nar_kernels.data.dataset import TokenDataset
from nar_kernels.distributed import rank, sum_over_ranks, world_size
from nar_kernels.nets.modes import eval_mode
from nar_kernels.nets.prediction import TrunkAndHead
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.masking import MaskingConfig

NATS_PER_BIT = math.log(2)

# The noise of every evaluation of every run, whatever its seed and its step.
_EVALUATION_SEED = 0x5EED

_MAX_TOKENS, _MAX_LOGITS = 1 << 14, 1 << 25  # of one batch


class Evaluation(NamedTuple):
    """Bits per token and its standard error over windows."""

    bits_per_token: float
    standard_error: float


def evaluation_parts(dataset: TokenDataset, num_windows: int, draws: int) -> list[slice]:
    """Batches of whole windows among all ``num_windows * draws`` samples."""
    most = min(_MAX_TOKENS, _MAX_LOGITS // dataset.num_tokens) // dataset.seq_len
    size, total = max(most // draws, 1) * draws, num_windows * draws
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def evaluation_batch(dataset: TokenDataset, windows: Tensor, draws: int, part: slice) -> Corrupted:
    """Some of the samples: each window ``draws`` times in a row, with times spread evenly over its
    draws.

    The masks are a function of the window's place in ``windows`` and of the draw alone.
    """
    return corrupt(
        dataset.corpus.tokens,
        MaskingConfig(dataset.num_tokens, dataset.mask_id),
        seed=_EVALUATION_SEED,
        starts=dataset.starts(windows).repeat_interleave(draws)[part],
        seq_len=dataset.seq_len,
        sample_ids=torch.arange(len(windows) * draws, device="cpu")[part],
        global_batch=draws,
    )


@torch.no_grad()
def evaluate(
    net: nn.Module, dataset: TokenDataset, windows: Tensor, *, draws: int, device: torch.device
) -> Evaluation:
    """The likelihood bound of ``net`` (ids ``[B, L]`` to logits ``[B, L, V]``) on some windows.

    It is an upper bound on the negative log-likelihood, estimated with exact draws of the linear
    schedule, in evaluation mode. Under ``torch.distributed`` all ranks must call this; they share
    the work, and each gets the result of one process.

    Args:
        windows: int64 ``[N]``, indices into ``dataset``.
        draws: E, masks per window.
    """
    draws = as_int("draws", draws)
    parts = evaluation_parts(dataset, len(windows), draws)
    nats = torch.zeros(len(windows) * draws, dtype=torch.float64, device="cpu")
    for first in range(0, len(parts), world_size()):
        # A rank left over in the last turn joins in: a sharded net is called by all or none.
        mine = first + rank()
        part = parts[min(mine, len(parts) - 1)]
        batch = evaluation_batch(dataset, windows, draws, part).to(device)
        with eval_mode(net, net):
            nll = TrunkAndHead(net)(batch.input_ids, {}).loss(batch, reduction="none")  # [R]
        samples = batch.masked_rows // dataset.seq_len
        totals = nll.new_zeros(len(batch)).index_add_(0, samples, nll)
        if mine < len(parts):
            nats[part] = (totals * batch.loss_weight / batch.num_maskable).double().cpu()
    bits = sum_over_ranks(nats).view(-1, draws).mean(1) / NATS_PER_BIT
    # With one window there is no spread to estimate from.
    error = bits.std().item() / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
    return Evaluation(bits.mean().item(), error)
