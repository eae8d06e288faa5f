"""The loss at the masked rows, without materialising the logits ``[B, L, V]``.

Shapes: B batch, L sequence length, V vocabulary (rows of the head), D width, R masked rows, C rows
of a chunk.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nar_kernels.ops.arguments import LinearNllArgs, NllArgs
from nar_kernels.ops.backends import resolve_backend
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.dispatch import register
from nar_kernels.ops.linear import TRAINING_LIMITS, chunk_size, linear_chunks, product_dtype
from nar_kernels.ops.masking import IGNORE_INDEX, MaskingConfig
from nar_kernels.ops.nll import NLL_DTYPES, run_nll
from nar_kernels.spec.schedules import NUM_TIMES

Reduction = Literal["nelbo", "mean", "none"]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden, weight and bias

_BACKENDS = tuple(NLL_DTYPES)


def masked_nll(
    hidden: Tensor,
    weight: Tensor,
    corrupted: Corrupted,
    *,
    bias: Tensor | None = None,
    reduction: Reduction = "nelbo",
    normalizer: float | Tensor | None = None,
    static_shapes: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The negative log-likelihood of the masked tokens under a linear head.

    Equivalent to ``F.cross_entropy`` of ``hidden @ weight.T + bias`` at ``corrupted.masked_rows``,
    weighted and reduced. Logits exist for one chunk of rows at a time and are overwritten by their
    gradient: the gradients of ``hidden``, ``weight`` and ``bias`` are computed in the forward pass.
    Under ``torch.autocast`` the GEMMs are in its dtype; softmax and sums are in float32 (float64 if
    ``hidden`` is). On CPUs without bfloat16 or float16 GEMMs these run in float32, which is many
    times faster there.

    Args:
        hidden: ``[B, L, D]``, any strides: float32, bfloat16, float16 or float64.
        weight: ``[V, D]``; V is ``num_tokens``, or one less if ``mask_id`` is the last id.
        corrupted: the batch: its masked rows, labels and loss weights.
        bias: ``[V]``, of any of these types.
        reduction: ``"nelbo"`` is ``sum(loss_weight * nll) / num_maskable``, in expectation a bound
            on the negative log-likelihood in nats per token. ``"mean"`` is the mean over masked
            positions. ``"none"`` is ``nll`` itself, ``[R]``, in the order of ``masked_rows``.
        normalizer: divide by this instead of the batch's own count of maskable (``"nelbo"``) or
            masked (``"mean"``) positions: that of the whole batch where this is a part of it
            (:func:`count`). One positive number; on a GPU its value is not checked, to avoid a
            sync.
        static_shapes: pad the masked rows to C, ``corrupted.row_capacity``, so that shapes do not
            depend on data: the host never waits for the device, and a CUDA graph can capture this.
            Padding adds exactly 0 to the loss and to every gradient. ``"none"`` gives ``[C]``, with
            0 at padding.
        backend: of the softmax: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``. GEMMs are
            PyTorch's, except float32 logits of a large head with ``"cpp"``.

    Returns:
        A scalar, ``[R]`` or ``[C]``; float32 (float64 if ``hidden`` is). 0 where nothing is masked.

    Masked positions whose label was set to -100 count neither in the sum nor in the default
    normalizer. Not twice differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit each other; ``"nelbo"`` with the
            weights of a schedule that gives no bound.
    """
    _check(hidden, corrupted, reduction, normalizer, static_shapes)
    _check_head(hidden, weight, bias, corrupted)
    device, dtype = hidden.device, product_dtype(hidden, weight)
    backend = _resolve(backend, device, dtype)
    rows, labels = masked_labels(corrupted, static_shapes)
    labels, is_ignored = _without_ignored(labels, static_shapes)
    picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows).to(dtype)
    with torch.autocast(device.type, enabled=False):
        # needs_input_grad of a Function ignores torch.no_grad.
        if not torch.is_grad_enabled():
            nothing = (False, False, False)
            run = _traced_losses if torch.compiler.is_compiling() else _losses_and_gradients
            nll, _ = run(picked, weight, bias, labels, None, backend, nothing)
            return reduce_nll(
                _zero(nll, is_ignored), corrupted, reduction, normalizer, static_shapes
            )
        if reduction == "none":
            per_row = _TracedPerRow if torch.compiler.is_compiling() else _PerRow
            return _zero(per_row.apply(picked, weight, bias, labels, backend), is_ignored)
        row_weight = _zero(_row_weight(corrupted, rows, reduction), is_ignored)
        weighted_sum = _TracedSum if torch.compiler.is_compiling() else _WeightedSum
        total = weighted_sum.apply(picked, weight, bias, labels, row_weight, backend)
        if normalizer is None:
            num_ignored = 0 if is_ignored is None else is_ignored.sum()
            num_padding = len(rows) - corrupted.num_masked.sum() if static_shapes else 0
            counted = _count(corrupted, reduction, num_ignored - num_padding)
            normalizer = counted.clamp(min=1)
        return _normalized(total, normalizer)


def head_nll(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    corrupted: Corrupted,
    *,
    is_log_prob: bool = False,
    reduction: Reduction = "nelbo",
    normalizer: float | Tensor | None = None,
    static_shapes: bool = False,
) -> Tensor:
    """:func:`masked_nll` for any head, from ``[C, D]`` to logits ``[C, V]``. Chunks of rows are
    checkpointed, so the logits of one chunk exist at a time.

    Args:
        is_log_prob: the head returns log-probabilities.
    """
    _check(hidden, corrupted, reduction, normalizer, static_shapes)
    rows, labels = masked_labels(corrupted, static_shapes)
    picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)

    def shapes(num_rows: int) -> list[tuple[int, int]]:
        return [(num_rows, width) for width in head_widths(corrupted.masking)]

    def chunk_nll(picked: Tensor, labels: Tensor) -> Tensor:
        logits = head(picked)
        if logits.shape not in shapes(len(picked)):
            raise TypeError(
                f"the head returned shape {list(logits.shape)} for {len(picked)} rows, but it must "
                f"return logits of shape {[len(picked), corrupted.masking.num_tokens]}"
            )
        return logits_nll(logits, labels, is_log_prob)

    size = chunk_size(len(rows), corrupted.masking.num_tokens, hidden.device, TRAINING_LIMITS)
    parts = [
        checkpoint(chunk_nll, some, of_them, use_reentrant=False)
        for some, of_them in zip(picked.split(size), labels.split(size), strict=True)
    ]
    return reduce_nll(torch.cat(parts), corrupted, reduction, normalizer, static_shapes)


def logits_nll(logits: Tensor, labels: Tensor, is_log_prob: bool = False) -> Tensor:
    """Loss of given logits ``[R, V]``: ``[R]``, at least float32; 0 where the label is -100."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = torch.nn.functional.nll_loss if is_log_prob else torch.nn.functional.cross_entropy
    return loss(logits, labels, reduction="none")


def reduce_nll(
    nll: Tensor,
    corrupted: Corrupted,
    reduction: Reduction,
    normalizer: float | Tensor | None = None,
    static_shapes: bool = False,
) -> Tensor:
    """The losses of the masked rows ``[R]`` or, with 0 at padding, ``[C]``, reduced as
    :func:`masked_nll` does."""
    if reduction == "none":
        return nll
    _check_reduction(corrupted, reduction, normalizer, static_shapes)
    rows = corrupted.padded_rows()[0] if static_shapes else corrupted.masked_rows
    total = (_row_weight(corrupted, rows, reduction) * nll).sum()
    return _normalized(total, count(corrupted, reduction) if normalizer is None else normalizer)


def _normalized(total: Tensor, normalizer: float | Tensor) -> Tensor:
    return (total / normalizer).to(total.dtype).view(())


def head_widths(masking: MaskingConfig) -> set[int]:
    """How many logits a head may give: ``mask_id`` needs none if it is the last id."""
    return {masking.num_tokens, masking.num_tokens - (masking.mask_id == masking.num_tokens - 1)}


def count(corrupted: Corrupted, reduction: Reduction) -> Tensor:
    """int64 scalar, at least 1, on the device: what a reduction divides by."""
    return num_counted(corrupted, reduction).clamp(min=1)


def num_counted(corrupted: Corrupted, reduction: Reduction) -> Tensor:
    """int64 scalar on the device: how many positions are maskable (``"nelbo"``) or masked, without
    those whose label was set to -100."""
    is_ignored = corrupted.masked_indices & (corrupted.labels == IGNORE_INDEX)
    return _count(corrupted, reduction, is_ignored.sum())


def _count(corrupted: Corrupted, reduction: Reduction, num_ignored: int | Tensor) -> Tensor:
    counts = corrupted.num_maskable if reduction == "nelbo" else corrupted.num_masked
    return counts.sum() - num_ignored


def masked_labels(corrupted: Corrupted, static_shapes: bool = False) -> tuple[Tensor, Tensor]:
    """``masked_rows`` and the labels there, int64 ``[R]`` both; with ``static_shapes`` padded to
    ``[C]``, with the label -100."""
    labels = corrupted.labels.reshape(-1)
    if not static_shapes:
        rows = corrupted.masked_rows
        return rows, labels.index_select(0, rows).to(torch.int64)
    rows, is_padding = corrupted.padded_rows()
    labels = labels.index_select(0, rows).to(torch.int64)
    return rows, labels.masked_fill(is_padding, IGNORE_INDEX)


def _without_ignored(labels: Tensor, static_shapes: bool) -> tuple[Tensor, Tensor | None]:
    """Labels ``[R]`` with 0 in place of -100, and a mask of those, bool ``[R]``; None where there
    are none, as far as that is known without a sync."""
    is_ignored = labels == IGNORE_INDEX
    if labels.is_cpu and not static_shapes and not is_ignored.any():
        return labels, None
    return labels.masked_fill(is_ignored, 0), is_ignored


def _zero(values: Tensor, where: Tensor | None) -> Tensor:
    return values if where is None else values.masked_fill(where, 0)


def _row_weight(corrupted: Corrupted, rows: Tensor, reduction: Reduction) -> Tensor:
    """float32 ``[R]``: ``loss_weight`` at each masked row, or 1."""
    if reduction == "mean":
        return torch.ones_like(rows, dtype=torch.float32)
    return corrupted.loss_weight.index_select(0, rows // corrupted.labels.shape[1])


def _check(
    hidden: Tensor,
    corrupted: Corrupted,
    reduction: Reduction,
    normalizer: float | Tensor | None,
    static_shapes: bool = False,
) -> None:
    _check_reduction(corrupted, reduction, normalizer, static_shapes)
    labels, shape = corrupted.labels, tuple(corrupted.input_ids.shape)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != shape:
        what = f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(f"labels are {what}: they must be integers {list(shape)}, or -100")
    if hidden.dim() != 3 or hidden.shape[:2] != shape:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)}: it must be [{shape[0]}, {shape[1]}, D], the "
            "hidden states of the corrupted batch"
        )
    if hidden.device != corrupted.labels.device:
        raise ValueError(
            f"corrupted is on {corrupted.labels.device}, but hidden on {hidden.device}"
        )


def _check_reduction(
    corrupted: Corrupted,
    reduction: Reduction,
    normalizer: float | Tensor | None,
    static_shapes: bool,
) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}: it must be 'nelbo', 'mean' or 'none'")
    if reduction == "nelbo" and not corrupted.masking.is_bound:
        # Whether they are is read from the device: never with static shapes there.
        is_unread = static_shapes and not corrupted.loss_weight.is_cpu
        if not is_unread and _weights_are_drawn(corrupted):
            corrupted.masking.check_bound()
    if normalizer is None:
        return
    if reduction == "none":
        raise ValueError("normalizer was given, but reduction 'none' divides by nothing")
    if isinstance(normalizer, Tensor) and normalizer.numel() != 1:
        raise ValueError(f"normalizer has shape {list(normalizer.shape)}: it must be one number")
    on_device = isinstance(normalizer, Tensor) and not normalizer.is_cpu  # reading it would sync
    if not on_device and not 0 < float(normalizer) < math.inf:
        raise ValueError(
            f"normalizer is {float(normalizer)}: it must be positive, the count of positions that "
            "the sum of losses is divided by"
        )


def _weights_are_drawn(corrupted: Corrupted) -> bool:
    """Whether ``loss_weight`` is that of the schedule, not a user's own. Syncs."""
    masking = corrupted.masking
    t16 = (corrupted.times * NUM_TIMES).long()
    weight = masking.tables(corrupted.times.device)[1].index_select(0, t16)
    if masking.exact:
        weight = weight * corrupted.num_maskable / corrupted.num_masked.clamp(min=1)
    return torch.allclose(weight, corrupted.loss_weight)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, corrupted: Corrupted) -> None:
    widths = head_widths(corrupted.masking)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[2] or weight.shape[0] not in widths:
        valid = " or ".join(f"[{width}, {hidden.shape[2]}]" for width in sorted(widths))
        raise ValueError(f"weight has shape {list(weight.shape)}: it must be [V, D] = {valid}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}: it must be [{weight.shape[0]}]")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in NLL_DTYPES["reference"]:
            names = ", ".join(str(dtype) for dtype in NLL_DTYPES["reference"])
            raise TypeError(f"{name} is {tensor.dtype}: it must be one of {names}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, but hidden is on {hidden.device}")


def _resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    resolved = resolve_backend(backend, device, _BACKENDS)
    if dtype in NLL_DTYPES[resolved]:
        return resolved
    if backend == "auto":
        return "reference"
    raise TypeError(f"backend {backend!r} has no kernel for {dtype}; use 'auto' or 'reference'")


def _losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_weight: Tensor | None,
    backend: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Gradients]:
    """The loss of each row, unweighted, and the gradients of ``sum(row_weight * loss)`` with
    respect to those of ``hidden``, ``weight`` and ``bias`` that are ``wanted``.

    GEMMs are in the dtype of ``hidden``; sums over rows are at least in float32.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    nll = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    # The first chunk, if any, overwrites it.
    new = torch.empty_like if len(hidden) else torch.zeros_like
    of_weight = new(weight, dtype=wide) if wanted[1] else None
    of_bias = torch.zeros(len(weight), dtype=wide, device=hidden.device) if wanted[2] else None
    weight = weight.to(hidden.dtype)
    bias = None if bias is None else bias.to(wide).contiguous()
    size = chunk_size(len(hidden), len(weight), hidden.device, TRAINING_LIMITS)
    for logits, part in linear_chunks(hidden, weight, size, backend):
        counts = None if row_weight is None else row_weight[part]
        nll[part] = run_nll(NllArgs(logits, labels[part], bias, counts, any(wanted)), backend)
        if of_hidden is not None:
            torch.mm(logits, weight, out=of_hidden[part])
        if of_weight is not None:
            _add_product(of_weight, logits.t(), hidden[part], first=part.start == 0)
        if of_bias is not None:
            of_bias += logits.sum(0, dtype=wide)
    return nll, (of_hidden, of_weight, of_bias)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total += a @ b``, or ``total = a @ b`` if ``first``; ``total`` may be of a wider dtype."""
    if total.dtype != a.dtype:
        product = a @ b
        if first:
            total.copy_(product)
        else:
            total += product
    elif first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


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
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels, row_weight)
        ctx.backend = backend
        nll, ctx.gradients = _losses_and_gradients(
            hidden, weight, bias, labels, row_weight, backend, ctx.needs_input_grad[:3]
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
                hidden, weight, bias, labels, row_weight, ctx.backend, ctx.needs_input_grad[:3]
            )
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(upstream)
        return *_typed(gradients, (hidden, weight, bias)), None, None, None


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
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.backend = backend
        none = (False, False, False)
        return _losses_and_gradients(hidden, weight, bias, labels, None, backend, none)[0]

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
            ctx.needs_input_grad[:3],
        )
        return *_typed(gradients, (hidden, weight, bias)), None, None


# torch.compile cannot trace the chunks, whose products go to memory with gaps, and need not: for it
# they are one operator.


def _launch_linear_nll(a: LinearNllArgs, backend: str) -> tuple[Tensor, ...]:
    nll, gradients = _losses_and_gradients(*a[:5], backend, a[5:])
    return nll, *(a.hidden.new_empty(0) if g is None else g for g in gradients)


def _linear_nll_fake(a: LinearNllArgs, backend: str) -> tuple[Tensor, ...]:
    wide = torch.promote_types(a.hidden.dtype, torch.float32)
    of_hidden = torch.empty_like(a.hidden) if a.of_hidden else a.hidden.new_empty(0)
    of_weight = a.hidden.new_empty(a.weight.shape if a.of_weight else (0,), dtype=wide)
    of_bias = a.hidden.new_empty(len(a.weight) if a.of_bias else 0, dtype=wide)
    return a.hidden.new_empty(len(a.hidden), dtype=wide), of_hidden, of_weight, of_bias


_FOUR = "(Tensor, Tensor, Tensor, Tensor)"
register("linear_nll", LinearNllArgs, _FOUR, _launch_linear_nll, _linear_nll_fake)


def _traced_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_weight: Tensor | None,
    backend: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Gradients]:
    """:func:`_losses_and_gradients` as an operator."""
    arguments = LinearNllArgs(hidden, weight, bias, labels, row_weight, *wanted)
    nll, *found = torch.ops.nar_kernels.linear_nll.default(*arguments, backend)
    of_hidden, of_weight, of_bias = (
        g if is_wanted else None for g, is_wanted in zip(found, wanted, strict=True)
    )
    return nll, (of_hidden, of_weight, of_bias)


class _TracedSum(torch.autograd.Function):
    """:class:`_WeightedSum` for torch.compile, which keeps its gradients as it sees fit."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        row_weight: Tensor,
        backend: str,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        nll, gradients = _traced_losses(hidden, weight, bias, labels, row_weight, backend, wanted)
        ctx.save_for_backward(hidden, weight, bias, *gradients)
        return (row_weight * nll).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, gradients = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        of_hidden, of_weight, of_bias = (None if g is None else g * upstream for g in gradients)
        return *_typed((of_hidden, of_weight, of_bias), inputs), None, None, None


class _TracedPerRow(torch.autograd.Function):
    """:class:`_PerRow` for torch.compile."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.backend = backend
        none = (False, False, False)
        return _traced_losses(hidden, weight, bias, labels, None, backend, none)[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        wanted, row_weight = ctx.needs_input_grad[:3], upstream.contiguous()
        _, gradients = _traced_losses(hidden, weight, bias, labels, row_weight, ctx.backend, wanted)
        return *_typed(gradients, (hidden, weight, bias)), None, None
