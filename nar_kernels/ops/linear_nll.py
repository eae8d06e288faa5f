"""The loss of the rows of a linear head, and its gradients, a chunk of logits at a time.

Shapes: R rows, V vocabulary (rows of the head), D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nar_kernels.ops.arguments import LinearNllArgs, NllArgs
from nar_kernels.ops.dispatch import register
from nar_kernels.ops.linear import NLL_LIMITS, add_product, chunk_size, linear_chunks
from nar_kernels.ops.nll import run_nll
from nar_kernels.ops.vocab_parallel import VocabularyShard, rows_of_a_shard, shard_nll

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden, weight and bias


def losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    backend: str,
    shard: VocabularyShard | None,
) -> Tensor:
    """The loss of each row ``[R]``, without gradients.

    Args:
        hidden: ``[R, D]``.
        weight, bias: ``[V, D]`` and ``[V]``; with a ``shard`` this rank's part of them.
        labels: int64 ``[R]``; the loss of one outside the vocabulary is NaN.
        backend: of the softmax.
    """
    nothing = (False, False, False)
    return _losses_and_gradients(hidden, weight, bias, labels, None, backend, shard, nothing)[0]


def losses_by_row(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    backend: str,
    shard: VocabularyShard | None,
) -> Tensor:
    """:func:`losses`, differentiable."""
    return _PerRow.apply(hidden, weight, bias, labels, backend, shard)


def weighted_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_weight: Tensor,
    backend: str,
    shard: VocabularyShard | None,
) -> Tensor:
    """``sum(row_weight * losses)``, differentiable but in ``row_weight``. Labels outside the
    vocabulary are ignored where the weight is 0."""
    return _WeightedSum.apply(hidden, weight, bias, labels, row_weight, backend, shard)


def _losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_weight: Tensor | None,
    backend: str,
    shard: VocabularyShard | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Gradients]:
    """The loss of each row, unweighted, and the gradients of ``sum(row_weight * loss)`` with
    respect to those of ``hidden``, ``weight`` and ``bias`` that are ``wanted``.

    GEMMs are in the dtype of ``hidden``; sums over rows are at least in float32. With a ``shard``,
    ``weight`` and ``bias`` are this rank's part of the head.
    """
    if torch.compiler.is_compiling():  # with a shard, masked_nll is not compiled
        return _as_an_operator(hidden, weight, bias, labels, row_weight, backend, wanted)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    nll = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    # The first chunk, if any, overwrites it.
    new = torch.empty_like if len(hidden) else torch.zeros_like
    of_weight = new(weight, dtype=wide) if wanted[1] else None
    of_bias = torch.zeros(len(weight), dtype=wide, device=hidden.device) if wanted[2] else None
    weight = weight.to(hidden.dtype)
    bias = None if bias is None else bias.to(wide).contiguous()
    # Ranks wait for each other at every chunk.
    width = len(weight) if shard is None else rows_of_a_shard(shard.vocabulary, shard.num_ranks)
    size = chunk_size(
        len(hidden), width, hidden.device, NLL_LIMITS, same_on_ranks=shard is not None
    )
    for logits, part in linear_chunks(hidden, weight, size, backend):
        counts = None if row_weight is None else row_weight[part]
        a = NllArgs(logits, labels[part], bias, counts, any(wanted))
        nll[part] = run_nll(a, backend) if shard is None else shard_nll(a, backend, shard)
        if of_hidden is not None:
            torch.mm(logits, weight, out=of_hidden[part])
        if of_weight is not None:
            add_product(of_weight, logits.t(), hidden[part], first=part.start == 0)
        if of_bias is not None:
            of_bias += logits.sum(0, dtype=wide)
    if of_hidden is not None and shard is not None:
        shard.sum_over_ranks(of_hidden)
    return nll, (of_hidden, of_weight, of_bias)


def _typed(gradients: Gradients, inputs: Sequence[Tensor | None]) -> Gradients:
    """Gradients in the dtypes of their inputs."""
    of_hidden, of_weight, of_bias = (
        None if g is None or x is None else g.to(x.dtype)
        for g, x in zip(gradients, inputs, strict=True)
    )
    return of_hidden, of_weight, of_bias


class _WeightedSum(torch.autograd.Function):
    """``sum(row_weight * nll)``, with its gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        row_weight: Tensor,
        backend: str,
        shard: VocabularyShard | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels, row_weight)
        ctx.backend, ctx.shard = backend, shard
        nll, ctx.gradients = _losses_and_gradients(
            hidden, weight, bias, labels, row_weight, backend, shard, ctx.needs_input_grad[:3]
        )
        return (row_weight * nll).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, row_weight = ctx.saved_tensors
        # Moved and scaled in place: a retained graph recomputes them in its next backward pass.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, gradients = _losses_and_gradients(
                hidden,
                weight,
                bias,
                labels,
                row_weight,
                ctx.backend,
                ctx.shard,
                ctx.needs_input_grad[:3],
            )
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(upstream)
        return *_typed(gradients, (hidden, weight, bias)), None, None, None, None


class _PerRow(torch.autograd.Function):
    """``nll`` of each row. The upstream gradient of each is known only in the backward pass, so
    gradients are computed there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        backend: str,
        shard: VocabularyShard | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.backend, ctx.shard = backend, shard
        none = (False, False, False)
        return _losses_and_gradients(hidden, weight, bias, labels, None, backend, shard, none)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        _, gradients = _losses_and_gradients(
            hidden,
            weight,
            bias,
            labels,
            upstream.contiguous(),
            ctx.backend,
            ctx.shard,
            ctx.needs_input_grad[:3],
        )
        return *_typed(gradients, (hidden, weight, bias)), None, None, None


# torch.compile cannot trace the chunks, whose products go to memory with gaps, and need not: for it
# they are one operator.


def _launch_linear_nll(a: LinearNllArgs, backend: str) -> tuple[Tensor, ...]:
    nll, gradients = _losses_and_gradients(*a[:5], backend, None, a[5:])
    return nll, *(a.hidden.new_empty(0) if g is None else g for g in gradients)


def _linear_nll_fake(a: LinearNllArgs, backend: str) -> tuple[Tensor, ...]:
    wide = torch.promote_types(a.hidden.dtype, torch.float32)
    of_hidden = torch.empty_like(a.hidden) if a.of_hidden else a.hidden.new_empty(0)
    of_weight = a.hidden.new_empty(a.weight.shape if a.of_weight else (0,), dtype=wide)
    of_bias = a.hidden.new_empty(len(a.weight) if a.of_bias else 0, dtype=wide)
    return a.hidden.new_empty(len(a.hidden), dtype=wide), of_hidden, of_weight, of_bias


_FOUR = "(Tensor, Tensor, Tensor, Tensor)"
register("linear_nll", LinearNllArgs, _FOUR, _launch_linear_nll, _linear_nll_fake)


def _as_an_operator(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_weight: Tensor | None,
    backend: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Gradients]:
    arguments = LinearNllArgs(hidden, weight, bias, labels, row_weight, *wanted)
    nll, *found = torch.ops.nar_kernels.linear_nll.default(*arguments, backend)
    of_hidden, of_weight, of_bias = (
        g if is_wanted else None for g, is_wanted in zip(found, wanted, strict=True)
    )
    return nll, (of_hidden, of_weight, of_bias)
