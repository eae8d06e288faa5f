"""Bits per token on held-out windows, and the baselines to compare with.

Shapes: B batch, L sequence length, V vocabulary, N windows, E noise draws of each window.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nar_kernels.checks import as_int
from nar_kernels.data.loader import TokenDataset
from nar_kernels.distributed import rank, sum_over_ranks, world_size
from nar_kernels.nets.modes import evaluating
from nar_kernels.nets.prediction import TrunkAndHead
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.masking import Corrupted, MaskingConfig

NATS_PER_BIT = math.log(2)

# The noise of every evaluation of every run, whatever its seed and its step.
_EVALUATION_SEED = 0x5EED

_MAX_TOKENS, _MAX_LOGITS = 1 << 14, 1 << 25  # of one batch
_TOKENS_COUNTED = 1 << 22


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
        with evaluating(net, net):
            nll = TrunkAndHead(net)(batch.input_ids, {}).loss(batch, reduction="none")  # [R]
        samples = batch.masked_rows // dataset.seq_len
        totals = nll.new_zeros(len(batch)).index_add_(0, samples, nll)
        if mine < len(parts):
            nats[part] = (totals * batch.loss_weight / batch.num_maskable).double().cpu()
    bits = sum_over_ranks(nats).view(-1, draws).mean(1) / NATS_PER_BIT
    # With one window there is no spread to estimate from.
    error = bits.std().item() / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
    return Evaluation(bits.mean().item(), error)


class Baseline(NamedTuple):
    """What a model without context reaches, in bits per token, and what it is."""

    bits_per_token: float
    meaning: str


def baselines(
    train: TokenDataset, held_out: TokenDataset, windows: Tensor, *, per_position: bool
) -> dict[str, Baseline]:
    """Models that know only how often each id occurs, at any position or at each one.

    Args:
        windows: the held-out windows that are evaluated. Counts use at most 4 M tokens a side.
        per_position: true where a position has a meaning, as in images.
    """
    seen = _count(train, torch.arange(len(train), device="cpu"), per_position)
    unseen = _count(held_out, windows, per_position)
    seen_anywhere, unseen_anywhere = seen.sum(0), unseen.sum(0)
    known = {
        "unigram_cross_entropy": Baseline(
            _bits(unseen_anywhere, seen_anywhere + 1),
            "held-out tokens coded with the token frequencies of the training split (plus one)",
        ),
        "unigram_entropy": Baseline(
            _bits(seen_anywhere, seen_anywhere), "entropy of the training split's token frequencies"
        ),
    }
    if per_position:
        known |= {
            "per_position_cross_entropy": Baseline(
                _bits(unseen, seen + 1),
                "held-out tokens coded with the frequencies at each position of the training split "
                "(plus one): what a model without context can reach",
            ),
            "per_position_entropy": Baseline(
                _bits(seen, seen), "mean entropy of the frequencies at a position, training split"
            ),
            "per_position_entropy_held_out": Baseline(
                _bits(unseen, unseen), "the same of the held-out split: no model may know these"
            ),
        }
    return known


def _count(dataset: TokenDataset, windows: Tensor, per_position: bool) -> Tensor:
    """float64 ``[L or 1, V - 1]``: how often each id but the mask stands at each position."""
    most = max(_TOKENS_COUNTED // dataset.seq_len, 1)
    most = min(len(windows), most)
    spread = torch.linspace(0, len(windows) - 1, most, dtype=torch.float32, device="cpu")
    chosen = windows[spread.long()]
    rows = dataset.seq_len if per_position else 1
    counts = torch.zeros(rows, dataset.num_tokens, dtype=torch.float64, device="cpu")
    for some in chosen.split(1024):
        ids = torch.stack(dataset.__getitems__(some.tolist()))
        ids = ids.T if per_position else ids.view(1, -1)
        counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.float64))
    is_clean = torch.arange(dataset.num_tokens, device="cpu") != dataset.mask_id
    return counts[:, is_clean]


def _bits(counts: Tensor, model: Tensor) -> float:
    """Mean code length of ``counts`` under frequencies proportional to ``model`` (last axis)."""
    log2 = (model / model.sum(-1, keepdim=True)).log2()
    return -(counts * log2).nan_to_num(0).sum().item() / counts.sum().item()
