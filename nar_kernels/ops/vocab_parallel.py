"""Heads whose rows are sharded over ranks: each rank computes the logits of its part of the
vocabulary, and three numbers a row are gathered.

Shapes: V vocabulary, S rows of the head on this rank, D width, C rows of a chunk, N ranks.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nar_kernels.ops.arguments import NllArgs
from nar_kernels.ops.linear import LogitsMemory
from nar_kernels.ops.nll import run_nll


class VocabularyShard(NamedTuple):
    """The part of the vocabulary that this rank has."""

    group: Any  # a ProcessGroup, on which ranks hold the same rows of hidden states
    rank: int
    num_ranks: int
    vocabulary: int
    first: int  # id of its first token

    def sum_over_ranks(self, values: Tensor) -> None:
        """In place."""
        dist.all_reduce(values, group=self.group)

    def gather(self, values: Tensor) -> Tensor:
        """``values`` of every rank, ``[N, ...]``."""
        out = values.new_empty(self.num_ranks, *values.shape)
        dist.all_gather(list(out), values, group=self.group)
        return out


def rows_of_a_shard(vocabulary: int, num_ranks: int) -> int:
    """Those of all ranks but the last ones, which may have fewer, or none: as ``Shard(0)`` does."""
    return -(-vocabulary // num_ranks)


def is_dtensor(value: object) -> bool:
    # By name: importing the type takes a second. (To torch.compile, attributes of one look like
    # those of a tensor.)
    return type(value).__name__ == "DTensor"


def local_head(
    weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, VocabularyShard | None]:
    """The rows of the head ``[S, D]`` and its bias ``[S]`` that this rank has, and which they are;
    the head itself and None if it is not sharded. Gradients are sharded like the head.

    Raises:
        ValueError: the head is sharded in another way, or its bias is not sharded as it is.
    """
    if not is_dtensor(weight):
        if is_dtensor(bias):
            raise ValueError(
                "bias is a DTensor, but weight is not: shard both by rows, or pass "
                "bias.full_tensor()"
            )
        return weight, bias, None
    sharded: Any = weight
    mesh, placements = sharded.device_mesh, sharded.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"weight is a DTensor with placements {placements}: it must be sharded by rows, "
            "(Shard(0),), on a mesh of one dimension, whose ranks hold the same hidden states; or "
            "pass weight.full_tensor()"
        )
    if bias is not None and (
        not is_dtensor(bias)
        or bias.device_mesh != mesh  # type: ignore[attr-defined]
        or bias.placements != placements  # type: ignore[attr-defined]
    ):
        raise ValueError("bias must be a DTensor, sharded as weight is: by rows on the same mesh")
    vocabulary, num_ranks, rank = len(weight), mesh.size(), mesh.get_local_rank()
    first = min(rank * rows_of_a_shard(vocabulary, num_ranks), vocabulary)
    shard = VocabularyShard(mesh.get_group(), rank, num_ranks, vocabulary, first)
    local_bias = None if bias is None else bias.to_local()  # type: ignore[attr-defined]
    return sharded.to_local(), local_bias, shard


def shard_nll(a: NllArgs, backend: str, shard: VocabularyShard) -> Tensor:
    """``run_nll`` where this rank has the logits ``[C, S]`` and the bias ``[S]``. Labels are those
    of the whole vocabulary; labels, weights and losses are the same on all ranks.

    The softmax of a rank is that of its own logits times its share of the probability. Differences
    of logits come first, as in the kernels: they may be far from 0. So does that of the label's
    gradient, ``probability - 1``, before it is rounded.
    """
    logits = a.logits
    column, is_here = _columns(a.labels - shard.first, logits.shape[1])
    at_label = _at(a, column).masked_fill(~is_here, -torch.inf)
    gathered = shard.gather(torch.stack([*_large_and_log_sum(a, backend), at_label]))
    maxima, log_sums, at_labels = gathered.unbind(1)  # [N, C] each
    largest, at_label = maxima.amax(0), at_labels.amax(0)
    # Ranks that have nothing but -inf have no share; -inf - -inf would be NaN.
    log_sums = (log_sums + (maxima - largest)).masked_fill(maxima == -torch.inf, -torch.inf)
    log_sum = log_sums.logsumexp(0)

    valid = (a.labels >= 0) & (a.labels < shard.vocabulary)
    nll = (log_sum - (at_label - largest)).masked_fill(~valid, torch.nan)
    scale = torch.ones_like(nll) if a.weight is None else a.weight
    ignored = ~valid & (scale == 0)
    if a.gradient and logits.shape[1] > 0:
        share = (log_sums[shard.rank] - log_sum).exp().masked_fill(ignored, 0)
        nowhere = torch.full_like(a.labels, -1)
        run_nll(NllArgs(logits, nowhere, a.bias, scale * share, True), backend)
        of_label = (scale * torch.expm1(-nll)).to(logits.dtype)[:, None]
        others = logits.gather(1, column[:, None])
        logits.scatter_(1, column[:, None], of_label.where(is_here[:, None], others))
    return nll.masked_fill(ignored, 0)


def _columns(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``labels``, or 0 in place of those outside of [0, ``count``), and which are inside."""
    is_inside = (labels >= 0) & (labels < count)
    return labels.where(is_inside, 0), is_inside


def _at(a: NllArgs, column: Tensor) -> Tensor:
    """The logit of each row in a column, bias included, at least in float32."""
    wide = torch.promote_types(a.logits.dtype, torch.float32)
    if a.logits.shape[1] == 0:
        return torch.zeros(len(a.logits), dtype=wide, device=a.logits.device)
    logits = a.logits.gather(1, column[:, None])[:, 0].to(wide)
    return logits if a.bias is None else logits + a.bias.index_select(0, column)


def _large_and_log_sum(a: NllArgs, backend: str) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, up to rounding, and the logarithm of the sum of
    ``exp(logit - it)``."""
    logits = a.logits
    if logits.shape[1] == 0:
        nothing = torch.full_like(_at(a, a.labels), -torch.inf)
        return nothing, nothing
    if a.bias is not None:
        # The kernel needs memory of its own for logits with a bias, and does not keep them.
        logits = LogitsMemory().rows(len(logits), logits.shape[1], logits)
        torch.add(a.logits, a.bias, out=logits)
    column = logits.argmax(1)
    large = _at(a, column)
    if a.bias is not None:
        logits.copy_(a.logits)
    # The loss of that column.
    return large, run_nll(NllArgs(logits, column, a.bias, None, False), backend)
