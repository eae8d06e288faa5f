"""The loss at the masked rows, without materialising the logits ``[B, L, V]``.

Shapes: B batch, L sequence length, V vocabulary (rows of the head), D width, R masked rows, C rows
of a chunk.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nar_kernels.ops.arguments import LinearNllArgs
from nar_kernels.ops.backends import resolve_backend
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.dispatch import outside_graphs
from nar_kernels.ops.linear import TRAINING_LIMITS, chunk_size, product_dtype
from nar_kernels.ops.linear_nll import losses, losses_by_row, weighted_sum
from nar_kernels.ops.masking import IGNORE_INDEX, MaskingConfig
from nar_kernels.ops.nll import NLL_DTYPES
from nar_kernels.ops.views import Pairing
from nar_kernels.ops.vocab_parallel import is_dtensor, local_head

Reduction = Literal["nelbo", "mean", "token", "sequence", "answer", "batch", "none"]
REDUCTIONS = get_args(Reduction)
_BY_SAMPLE = ("sequence", "answer", "batch")  # these divide by a number of samples

_NUMBERS = Tensor, float, int  # Dynamo of PyTorch 2.6 knows no unions of types

_BACKENDS = tuple(NLL_DTYPES)


def masked_nll(
    hidden: Tensor,
    weight: Tensor,
    corrupted: Corrupted,
    *,
    bias: Tensor | None = None,
    reduction: Reduction = "nelbo",
    normalizer: float | Tensor | None = None,
    position_weight: Tensor | None = None,
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
        weight: ``[V, D]``; V is ``num_tokens``, or one less if ``mask_id`` is the last id. A
            ``DTensor`` sharded by rows (``Shard(0)``, also unevenly) over a mesh of one dimension
            is a vocabulary-parallel head: each rank of the mesh computes the logits of its rows,
            the loss is the same on all of them, the gradient of ``hidden`` is summed over them, and
            that of ``weight`` is sharded as it is. All ranks must pass the same ``hidden`` and
            ``corrupted``: a weight that FSDP2 has sharded over parts of a batch must be gathered
            first.
        corrupted: the batch: its masked rows, labels and loss weights.
        bias: ``[V]``, of any of these types; sharded as ``weight`` is.
        reduction: what becomes of ``nll``, the losses of the masked positions.

            * ``"nelbo"``: ``sum(loss_weight * nll)`` over the number of maskable positions, in
              expectation a bound on the negative log-likelihood in nats per token.
            * ``"token"``: the same sum and number for any loss weights, also of no bound.
            * ``"sequence"``: ``sum(loss_weight * nll)`` of each row of the batch over its own
              number of maskable positions, then the mean over rows: each counts the same.
            * ``"answer"``: the same of each sample, which in a packed batch is a document, however
              long its answer is and of however many blocks (LLaDA's loss of fine-tuning,
              arXiv:2502.09992): the mean over those that have maskable positions.
            * ``"batch"``: ``sum(loss_weight * nll)`` over the number of rows. (A flat batch of
              documents has a row for each.)
            * ``"mean"``: the mean over masked positions, without weights.
            * ``"none"``: ``nll`` itself, ``[R]``, in the order of ``masked_rows``.
        normalizer: divide by this instead of the batch's own count of maskable (``"nelbo"``,
            ``"token"``) or masked (``"mean"``) positions or samples: that of the whole batch where
            this is a part of it (:func:`count`). One positive number; on a GPU its value is not
            checked, to avoid a sync.
        position_weight: float ``[B, L]``: factors of the losses at these positions, such as
            :func:`cart_weights`; not with ``"nelbo"``, of which no bound would be left, and
            ``"none"``. A constant: no gradient goes there.
        static_shapes: pad the masked rows to C, ``corrupted.row_capacity``, so that shapes do not
            depend on data: the host never waits for the device, and a CUDA graph can capture this.
            Padding adds exactly 0 to the loss and, if hidden states are finite, to every gradient.
            ``"none"`` gives ``[C]``, with 0 at padding.
        backend: of the softmax: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``. GEMMs are
            PyTorch's, except float32 logits of a large head with ``"cpp"``.

    Returns:
        A scalar, ``[R]`` or ``[C]``; float32 (float64 if ``hidden`` is). 0 where nothing is masked.

    Masked positions whose label was set to -100 count neither in the sum nor in a number of
    positions. Not twice differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit each other; ``"nelbo"`` with the
            weights of a schedule that gives no bound.
    """
    if torch.compiler.is_compiling() and is_dtensor(weight):
        # Dynamo traces neither these tensors nor what ranks exchange.
        return outside_graphs(masked_nll)(
            hidden,
            weight,
            corrupted,
            bias=bias,
            reduction=reduction,
            normalizer=normalizer,
            position_weight=position_weight,
            static_shapes=static_shapes,
            backend=backend,
        )
    _check(hidden, corrupted, reduction, normalizer, static_shapes)
    _check_position_weight(position_weight, corrupted, reduction)
    _check_head(hidden, weight, bias, corrupted)
    device, dtype = hidden.device, product_dtype(hidden, weight)
    wide = torch.promote_types(dtype, torch.float32)
    backend = _resolve(backend, device, dtype)
    weight, bias, shard = local_head(weight, bias)
    rows, labels = masked_labels(corrupted, static_shapes)
    is_ignored = _ignored(labels, static_shapes)
    picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows).to(dtype)
    inputs = picked, weight, bias, labels
    with torch.autocast(device.type, enabled=False):
        # needs_input_grad of a Function ignores torch.no_grad.
        if not torch.is_grad_enabled():
            nll = _zero(losses(LinearNllArgs(*inputs), backend, shard), is_ignored)
            return reduce_nll(
                nll, rows, corrupted, reduction, normalizer, static_shapes, position_weight
            )
        if reduction == "none":
            return _zero(losses_by_row(LinearNllArgs(*inputs), backend, shard), is_ignored)
        row_weight = _row_weight(corrupted, rows, reduction, position_weight)
        row_weight = _zero(row_weight, is_ignored).to(wide)
        total = weighted_sum(LinearNllArgs(*inputs, row_weight), backend, shard)
        if normalizer is None and reduction in _BY_SAMPLE:
            normalizer = count(corrupted, reduction)
        elif normalizer is None:
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
    position_weight: Tensor | None = None,
    static_shapes: bool = False,
) -> Tensor:
    """:func:`masked_nll` for any head, from ``[C, D]`` to logits ``[C, V]``. Chunks of rows are
    checkpointed, so the logits of one chunk exist at a time.

    Args:
        is_log_prob: the head returns log-probabilities.
    """
    _check(hidden, corrupted, reduction, normalizer, static_shapes)
    _check_position_weight(position_weight, corrupted, reduction)
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
    nll = torch.cat(parts)
    return reduce_nll(nll, rows, corrupted, reduction, normalizer, static_shapes, position_weight)


def logits_nll(logits: Tensor, labels: Tensor, is_log_prob: bool = False) -> Tensor:
    """Loss of given logits ``[R, V]``: ``[R]``, at least float32; 0 where the label is -100."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = torch.nn.functional.nll_loss if is_log_prob else torch.nn.functional.cross_entropy
    return loss(logits, labels, reduction="none")


def reduce_nll(
    nll: Tensor,
    rows: Tensor,
    corrupted: Corrupted,
    reduction: Reduction,
    normalizer: float | Tensor | None = None,
    static_shapes: bool = False,
    position_weight: Tensor | None = None,
) -> Tensor:
    """The losses of the masked rows ``[R]`` or, with 0 at padding, ``[C]``, reduced as
    :func:`masked_nll` does; the rows are those of :func:`masked_labels`."""
    if reduction == "none":
        return nll
    _check_reduction(corrupted, reduction, normalizer, static_shapes)
    row_weight = _row_weight(corrupted, rows, reduction, position_weight)
    total = (row_weight.to(nll.dtype) * nll).sum()
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
    """int64 scalar on the device: how many rows there are (``"sequence"``, ``"batch"``), or samples
    with maskable positions (``"answer"``), or positions that are maskable (``"nelbo"``,
    ``"token"``) or masked, without those whose label was set to -100."""
    if reduction in _BY_SAMPLE:
        if reduction == "answer":
            counted = corrupted.num_maskable - _num_ignored(corrupted)
            if corrupted.has_blocks:
                counted = counted.sum(1)
            return (counted > 0).sum()
        return corrupted.num_masked.new_full((), len(corrupted))
    return _count(corrupted, reduction, _num_ignored(corrupted).sum())


def _num_ignored(corrupted: Corrupted) -> Tensor:
    """int64 ``[B]``: how many masked positions of each sample, or block, have the label -100."""
    corrupted.need("labels")
    is_ignored = corrupted.labels == IGNORE_INDEX
    if corrupted.masked_indices is not None:
        return corrupted.sum_by_draw(is_ignored & corrupted.masked_indices)
    return corrupted.num_masked - corrupted.sum_by_draw(~is_ignored)


def _count(corrupted: Corrupted, reduction: Reduction, num_ignored: int | Tensor) -> Tensor:
    counts = corrupted.num_masked if reduction == "mean" else corrupted.num_maskable
    return counts.sum() - num_ignored


def masked_labels(corrupted: Corrupted, static_shapes: bool = False) -> tuple[Tensor, Tensor]:
    """``masked_rows`` and the labels there, ``[R]`` both; with ``static_shapes`` padded to
    ``[C]``, with the label -100. Labels are int64."""
    corrupted.need("labels", "masked_rows")
    labels = corrupted.labels.reshape(-1)
    if not static_shapes:
        rows = corrupted.masked_rows
        return rows, labels.index_select(0, rows).to(torch.int64)
    rows, is_padding = corrupted.padded_rows()
    labels = labels.index_select(0, rows).to(torch.int64)
    return rows, labels.masked_fill(is_padding, IGNORE_INDEX)


def _ignored(labels: Tensor, static_shapes: bool) -> Tensor | None:
    """Which labels are -100, bool ``[R]``; None where there are none, as far as that is known
    without a sync, or a branch of a static graph."""
    is_ignored = labels == IGNORE_INDEX
    return None if labels.is_cpu and not static_shapes and not is_ignored.any() else is_ignored


def _zero(values: Tensor, where: Tensor | None) -> Tensor:
    return values if where is None else values.masked_fill(where, 0)


def _row_weight(
    corrupted: Corrupted, rows: Tensor, reduction: Reduction, position_weight: Tensor | None
) -> Tensor:
    """``[R]``: of each masked row, what its loss is multiplied by before the sum."""
    if reduction == "mean":
        of_rows = torch.ones_like(rows, dtype=torch.float32)
    else:
        weight = corrupted.loss_weight
        if reduction in ("sequence", "answer"):
            lengths = corrupted.num_maskable - _num_ignored(corrupted)
            sums = (
                corrupted.sum_over_rows if reduction == "sequence" else corrupted.sum_over_samples
            )
            weight = weight.double() / sums(lengths).clamp(min=1)
        of_rows = weight.flatten().index_select(0, corrupted.draws_of(rows))
    if position_weight is not None:
        of_rows = of_rows * position_weight.detach().reshape(-1).index_select(0, rows)
    return of_rows


def _check(
    hidden: Tensor,
    corrupted: Corrupted,
    reduction: Reduction,
    normalizer: float | Tensor | None,
    static_shapes: bool = False,
) -> None:
    if not isinstance(corrupted, Corrupted):
        raise TypeError(f"corrupted is {_kind(corrupted)}: it must be a batch of `corrupt`")
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden is {_kind(hidden)}: it must be a tensor [B, L, D]")
    _check_reduction(corrupted, reduction, normalizer, static_shapes)
    corrupted.need("labels", "masked_rows")
    labels, shape = corrupted.labels, tuple(corrupted.input_ids.shape)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != shape:
        raise ValueError(
            f"labels are {_kind(labels)}: they must be integers {list(shape)}, or -100"
        )
    if hidden.dim() != len(shape) + 1 or hidden.shape[:-1] != shape:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)}: it must be [{', '.join(map(str, shape))}, D], "
            "the hidden states of the corrupted batch"
        )
    if hidden.device != corrupted.labels.device:
        raise ValueError(
            f"corrupted is on {corrupted.labels.device}, but hidden on {hidden.device}"
        )


def _check_position_weight(
    position_weight: Tensor | None, corrupted: Corrupted, reduction: Reduction
) -> None:
    if position_weight is None:
        return
    if reduction in ("nelbo", "none"):
        raise ValueError(
            f"position_weight was given with reduction {reduction!r}: use 'token', 'mean', "
            "'sequence', 'answer' or 'batch'"
        )
    shape, device = corrupted.input_ids.shape, corrupted.input_ids.device
    is_float = isinstance(position_weight, Tensor) and position_weight.is_floating_point()
    if not is_float or position_weight.shape != shape or position_weight.device != device:
        raise ValueError(
            f"position_weight is {_kind(position_weight)}: it must be floats {list(shape)} on "
            f"{device}"
        )


def _kind(value: object) -> str:
    """For errors."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"


def _check_reduction(
    corrupted: Corrupted,
    reduction: Reduction,
    normalizer: float | Tensor | None,
    static_shapes: bool,
) -> None:
    if reduction not in REDUCTIONS:
        names = ", ".join(map(repr, REDUCTIONS))
        raise ValueError(f"reduction is {reduction!r}: it must be one of {names}")
    if reduction == "nelbo" and corrupted.views.pairing is Pairing.COUPLED:
        raise ValueError(
            "the batch has views 'coupled', whose weights give no bound on the likelihood: use "
            "reduction 'token', or views 'complement'"
        )
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
    if not isinstance(normalizer, _NUMBERS):
        raise TypeError(f"normalizer is {_kind(normalizer)}: it must be one number")
    on_device = isinstance(normalizer, Tensor) and not normalizer.is_cpu  # reading it would sync
    if not on_device and not 0 < float(normalizer) < math.inf:
        raise ValueError(
            f"normalizer is {float(normalizer)}: it must be positive, the count of positions that "
            "the sum of losses is divided by"
        )


def _weights_are_drawn(corrupted: Corrupted) -> bool:
    """Whether ``loss_weight`` is that of the schedule, not a user's own. Syncs."""
    masking = corrupted.masking
    if corrupted.views.is_paired or masking.is_quadrature:  # depends on the view: taken as drawn
        return True
    weight = masking.tables(corrupted.times.device)[1][corrupted.quantised_times]
    if masking.weighs_counts:
        weight = weight * corrupted.num_maskable / corrupted.num_masked.clamp(min=1)
    return torch.allclose(weight, corrupted.loss_weight)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, corrupted: Corrupted) -> None:
    if is_dtensor(hidden):
        raise ValueError(
            "hidden is a DTensor: pass the whole tensor on every rank, as hidden.full_tensor() is"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) and not (name == "bias" and bias is None):
            raise TypeError(f"{name} is {_kind(tensor)}: it must be a tensor")
    widths = head_widths(corrupted.masking)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] not in widths:
        valid = " or ".join(f"[{width}, {hidden.shape[-1]}]" for width in sorted(widths))
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
