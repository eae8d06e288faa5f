"""The loss of the rows of a linear head, and its gradients, a chunk of logits at a time.

Shapes: R rows, V vocabulary (rows of the head), D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nar_kernels.ops.arguments import LinearNllArgs, NllArgs
from nar_kernels.ops.dispatch import register
from nar_kernels.ops.linear import (
    NLL_LIMITS,
    add_product,
    chunk_size,
    has_few_shapes,
    linear_chunks,
    round_up_rows,
)
from nar_kernels.ops.nll import run_nll
from nar_kernels.ops.vocab_parallel import VocabularyShard, rows_of_a_shard, shard_nll

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden, weight and bias


def losses(a: LinearNllArgs, backend: str, shard: VocabularyShard | None) -> Tensor:
    """The loss of each row ``[R]``, without gradients; NaN where a label is outside the vocabulary.

    Args:
        a: with a ``shard``, its ``weight`` and ``bias`` are this rank's part of the head.
        backend: of the softmax.
    """
    return _losses_and_gradients(a, backend, shard)[0]


def losses_by_row(a: LinearNllArgs, backend: str, shard: VocabularyShard | None) -> Tensor:
    """:func:`losses`, differentiable."""
    return _PerRow.apply(*a, backend, shard)


def weighted_sum(a: LinearNllArgs, backend: str, shard: VocabularyShard | None) -> Tensor:
    """``sum(row_weight * losses)``, differentiable but in ``row_weight``. Labels outside the
    vocabulary are ignored where the weight is 0."""
    return _WeightedSum.apply(*a, backend, shard)


def _padded(a: LinearNllArgs, num_more: int) -> LinearNllArgs:
    """With so many more rows, of weight 0."""
    if not num_more:
        return a
    row_weight = a.row_weight
    if row_weight is None:
        row_weight = torch.ones(len(a.hidden), dtype=torch.float32, device=a.hidden.device)
    return a._replace(
        hidden=F.pad(a.hidden, (0, 0, 0, num_more)),
        labels=F.pad(a.labels, (0, num_more)),
        row_weight=F.pad(row_weight, (0, num_more)),
    )


def _losses_and_gradients(
    a: LinearNllArgs, backend: str, shard: VocabularyShard | None
) -> tuple[Tensor, Gradients]:
    """The loss of each row, unweighted, and the gradients of ``sum(row_weight * loss)`` that are
    wanted.

    GEMMs are in the dtype of ``hidden``; sums over rows are at least in float32.
    """
    if torch.compiler.is_compiling():  # with a shard, masked_nll is not compiled
        return _as_an_operator(a, backend)
    num_rows = len(a.hidden)
    few = has_few_shapes(a.hidden)
    if few:
        a = _padded(a, round_up_rows(num_rows) - num_rows)
    hidden = a.hidden
    wide = torch.promote_types(hidden.dtype, torch.float32)
    nll = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    of_hidden = torch.empty_like(hidden) if a.of_hidden else None
    # The first chunk, if any, overwrites it.
    new = torch.empty_like if len(hidden) else torch.zeros_like
    of_weight = new(a.weight, dtype=wide) if a.of_weight else None
    of_bias = torch.zeros(len(a.weight), dtype=wide, device=hidden.device) if a.of_bias else None
    weight = a.weight.to(hidden.dtype)
    bias = None if a.bias is None else a.bias.to(wide).contiguous()
    # Ranks wait for each other at every chunk.
    width = len(weight) if shard is None else rows_of_a_shard(shard.vocabulary, shard.num_ranks)
    is_shared = shard is not None
    size = chunk_size(
        len(hidden), width, hidden.device, NLL_LIMITS, same_on_ranks=is_shared, few_shapes=few
    )
    wanted = a.of_hidden or a.of_weight or a.of_bias
    for logits, part in linear_chunks(hidden, weight, size, backend):
        row_weight = None if a.row_weight is None else a.row_weight[part]
        chunk = NllArgs(logits, a.labels[part], bias, row_weight, wanted)
        nll[part] = run_nll(chunk, backend) if shard is None else shard_nll(chunk, backend, shard)
        if of_hidden is not None:
            torch.mm(logits, weight, out=of_hidden[part])
        if of_weight is not None:
            add_product(of_weight, logits.t(), hidden[part], first=part.start == 0)
        if of_bias is not None:
            of_bias += logits.sum(0, dtype=wide)
    if of_hidden is not None and shard is not None:
        shard.sum_over_ranks(of_hidden)
    if of_hidden is not None:
        of_hidden = of_hidden[:num_rows]
    return nll[:num_rows], (of_hidden, of_weight, of_bias)


class _WeightedSum(torch.autograd.Function):
    """``sum(row_weight * nll)``, with its gradients made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _keep_inputs(ctx, inputs)
        a = LinearNllArgs(*inputs[:5], *ctx.needs_input_grad[:3])
        assert a.row_weight is not None
        nll, ctx.gradients = _losses_and_gradients(a, ctx.backend, ctx.shard)
        return (a.row_weight * nll).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        a = LinearNllArgs(*ctx.saved_tensors, *ctx.needs_input_grad[:3])
        # Moved and scaled in place: a retained graph recomputes them in its next backward pass.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, gradients = _losses_and_gradients(a, ctx.backend, ctx.shard)
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(upstream)
        return _for_inputs(gradients, a)


class _PerRow(torch.autograd.Function):
    """``nll`` of each row. The upstream gradient of each is known only in the backward pass, so
    gradients are computed there."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _keep_inputs(ctx, inputs)
        return losses(LinearNllArgs(*inputs[:5]), ctx.backend, ctx.shard)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, _ = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        a = LinearNllArgs(hidden, weight, bias, labels, upstream.contiguous(), *wanted)
        _, gradients = _losses_and_gradients(a, ctx.backend, ctx.shard)
        return _for_inputs(gradients, a)


# Inputs are plain tuples here and in masked_nll: Dynamo of PyTorch 2.6 cannot slice a named one.


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...]) -> None:
    """What both functions get (LinearNllArgs, backend, shard), for the backward pass."""
    ctx.save_for_backward(*inputs[:5])
    ctx.backend, ctx.shard = inputs[8:]


def _for_inputs(gradients: Gradients, a: LinearNllArgs) -> tuple[Tensor | None, ...]:
    """What a backward pass returns: gradients in the dtypes of their inputs, and for the other
    inputs None."""
    typed = (
        None if g is None or x is None else g.to(x.dtype)
        for g, x in zip(gradients, (a.hidden, a.weight, a.bias), strict=True)
    )
    return *typed, *[None] * 7


# torch.compile cannot trace the chunks, whose products go to memory with gaps, and need not: for it
# they are one operator.


def _launch_linear_nll(a: LinearNllArgs, backend: str) -> tuple[Tensor, ...]:
    nll, gradients = _losses_and_gradients(a, backend, None)
    return nll, *(a.hidden.new_empty(0) if g is None else g for g in gradients)


def _linear_nll_fake(a: LinearNllArgs, backend: str) -> tuple[Tensor, ...]:
    wide = torch.promote_types(a.hidden.dtype, torch.float32)
    of_hidden = torch.empty_like(a.hidden) if a.of_hidden else a.hidden.new_empty(0)
    of_weight = a.hidden.new_empty(a.weight.shape if a.of_weight else (0,), dtype=wide)
    of_bias = a.hidden.new_empty(len(a.weight) if a.of_bias else 0, dtype=wide)
    return a.hidden.new_empty(len(a.hidden), dtype=wide), of_hidden, of_weight, of_bias


_FOUR = "(Tensor, Tensor, Tensor, Tensor)"
register("linear_nll", LinearNllArgs, _FOUR, _launch_linear_nll, _linear_nll_fake)


def _as_an_operator(a: LinearNllArgs, backend: str) -> tuple[Tensor, Gradients]:
    nll, *found = torch.ops.nar_kernels.linear_nll.default(*a, backend)
    wanted = a.of_hidden, a.of_weight, a.of_bias
    of_hidden, of_weight, of_bias = (
        g if is_wanted else None for g, is_wanted in zip(found, wanted, strict=True)
    )
    return nll, (of_hidden, of_weight, of_bias)
