"""Baselines without context: bits per token of unigram (token frequency) models.

Shapes: L sequence length, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nar_kernels.data.packing.document_range import DocumentRange
from nar_kernels.data.windows.dataset import TokenDataset
from nar_kernels.data.windows.mixture import Mixture

_TOKENS_COUNTED = 1 << 22


class Baseline(NamedTuple):
    """Bits per token of a model without context, and a description of it."""

    bits_per_token: float
    meaning: str


def baselines(
    train: TokenDataset | Mixture | DocumentRange,
    held_out: TokenDataset | DocumentRange,
    windows: Tensor | None,
    *,
    per_position: bool,
) -> dict[str, Baseline]:
    """Unigram baselines: token frequencies over all positions, or at each position, of the tokens
    that count in the loss.

    Args:
        windows: the held-out windows that are evaluated; None for documents. At most 4 M tokens of
            each split are counted.
        per_position: also model each position separately; for data such as images, where a
            position has a meaning.
    """
    seen = _count(train, None, per_position)
    unseen = _count(held_out, windows, per_position)
    seen_anywhere, unseen_anywhere = seen.sum(0), unseen.sum(0)
    known = {
        "unigram_cross_entropy": Baseline(
            _bits(unseen_anywhere, seen_anywhere + 1),
            "cross-entropy of held-out tokens under the token frequencies of the training split "
            "(add-one smoothing)",
        ),
        "unigram_entropy": Baseline(
            _bits(seen_anywhere, seen_anywhere), "entropy of the training split's token frequencies"
        ),
    }
    if per_position:
        known |= {
            "per_position_cross_entropy": Baseline(
                _bits(unseen, seen + 1),
                "cross-entropy of held-out tokens under the token frequencies at each position of "
                "the training split (add-one smoothing): what a model without context can reach",
            ),
            "per_position_entropy": Baseline(
                _bits(seen, seen),
                "mean over positions of the entropy of the training split's token frequencies",
            ),
            "per_position_entropy_held_out": Baseline(
                _bits(unseen, unseen),
                "the same of the held-out split, whose frequencies no model may know",
            ),
        }
    return known


def _count(
    dataset: TokenDataset | Mixture | DocumentRange, windows: Tensor | None, per_position: bool
) -> Tensor:
    """float64 ``[L or 1, V - 1]``: counts of ids but ``mask_id``, at each position or pooled, in
    evenly spread windows of those with these indices, or of all."""
    is_clean = torch.arange(dataset.num_tokens, device="cpu") != dataset.mask_id
    if isinstance(dataset, DocumentRange):
        ids = dataset.counted_ids(_TOKENS_COUNTED)
        return ids.bincount(minlength=dataset.num_tokens).double()[None, is_clean]
    total = len(dataset) if windows is None else len(windows)
    most = min(total, max(_TOKENS_COUNTED // dataset.seq_len, 1))
    chosen = torch.arange(most, device="cpu") * (total - 1) // max(most - 1, 1)
    if windows is not None:
        chosen = windows[chosen]
    rows = dataset.seq_len if per_position else 1
    counts = torch.zeros(rows, dataset.num_tokens, dtype=torch.float64, device="cpu")
    for some in chosen.split(1024):
        ids = dataset.windows(some)
        flags = dataset.loss_mask(some)  # of what counts
        weight = torch.ones_like(ids) if flags is None else flags
        ids, weight = (x.T if per_position else x.reshape(1, -1) for x in (ids, weight))
        counts.scatter_add_(1, ids, weight.to(torch.float64))
    return counts[:, is_clean]


def _bits(counts: Tensor, model: Tensor) -> float:
    """Cross-entropy in bits of ``counts`` under probabilities proportional to ``model`` (last
    axis)."""
    log2 = (model / model.sum(-1, keepdim=True)).log2()
    return -(counts * log2).nan_to_num(0).sum().item() / max(counts.sum().item(), 1)
