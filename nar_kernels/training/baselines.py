"""What a model without context reaches: token frequencies.

Shapes: L sequence length, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nar_kernels.data.dataset import TokenDataset

_TOKENS_COUNTED = 1 << 22


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
