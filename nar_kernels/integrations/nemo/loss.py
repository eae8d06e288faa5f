"""NeMo Automodel's ``loss.dllm_loss``: the loss of masked diffusion.

Shapes: B batch, L sequence length, V vocabulary, N = B * L.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nar_kernels.ops.arguments import NllArgs
from nar_kernels.ops.backends import resolve_backend
from nar_kernels.ops.masking import IGNORE_INDEX
from nar_kernels.ops.nll import NLL_DTYPES, run_nll


class DLLMLossOutput(NamedTuple):
    """The fields of NeMo's tuple of this name; the last two are None."""

    total_loss: Tensor
    dllm_loss: Tensor
    draft_correct_per_pos: Tensor | None = None
    draft_count_per_pos: Tensor | None = None


class MDLMCrossEntropyLoss(nn.Module):
    """``sum(NLL / p_mask)`` over the masked supervised tokens, whose logits alone are read.

    The NLL is in float32, also of bfloat16 logits. The gradient of those logits is computed in the
    forward pass.

    Args:
        fp32_upcast: has no effect, as in NeMo.
    """

    def __init__(self, fp32_upcast: bool = True) -> None:
        super().__init__()
        self.fp32_upcast = fp32_upcast

    def forward(
        self,
        logits: Tensor,
        target_ids: Tensor,
        noise_mask: Tensor,
        p_mask: Tensor,
        loss_mask: Tensor,
        loss_mask_ar: Tensor | None = None,
        num_diffusion_tokens: int | None = None,
        num_ar_tokens: int | None = None,
        causal_logits: Tensor | None = None,
        noisy_input_ids: Tensor | None = None,
    ) -> DLLMLossOutput:
        """
        Args:
            logits: ``[B, L, V]``; a DTensor is gathered.
            target_ids: clean ids ``[B, L]``; -100 counts for nothing.
            noise_mask: bool ``[B, L]``, the masked positions.
            p_mask: ``[B, L]``, with which probability.
            loss_mask: ``[B, L]``, not 0 at supervised positions.
            num_diffusion_tokens: what the sum is divided by, at least 1: supervised tokens of all
                microbatches. Default: it is not divided.
            loss_mask_ar, num_ar_tokens, causal_logits, noisy_input_ids: have no effect.

        Raises:
            IndexError: on the CPU, a masked id has no logit. (Elsewhere the loss is NaN.)
        """
        if hasattr(logits, "full_tensor"):
            logits = logits.full_tensor()
        device, num_tokens = logits.device, logits.shape[-1]
        mask = (noise_mask & loss_mask.bool() & (target_ids != IGNORE_INDEX)).to(device)
        rows = mask.flatten().nonzero().flatten()
        labels, ratio = (x.to(device).expand_as(mask).flatten()[rows] for x in (target_ids, p_mask))
        if labels.is_cpu:
            _check_labels(labels, num_tokens)
        weight = ratio.clamp(min=1e-8).reciprocal()
        loss = _WeightedNll.apply(logits.reshape(-1, num_tokens), rows, labels.long(), weight)
        if num_diffusion_tokens is not None:
            loss = loss / max(num_diffusion_tokens, 1)
        return DLLMLossOutput(loss, loss.detach().clone())


def _check_labels(labels: Tensor, num_tokens: int) -> None:
    outside = labels[(labels < 0) | (labels >= num_tokens)]
    if len(outside):
        raise IndexError(
            f"target_ids have {int(outside[0])} at a masked position, where logits are of "
            f"{num_tokens} ids: they must be in [0, {num_tokens}), or {IGNORE_INDEX}"
        )


class _WeightedNll(torch.autograd.Function):
    """``sum(weight * NLL)`` of some rows of logits ``[N, V]``, differentiable in these."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        picked = logits.index_select(0, rows)
        weight = weight.to(torch.promote_types(picked.dtype, torch.float32))
        backend = resolve_backend("auto", picked.device, tuple(NLL_DTYPES))
        if picked.dtype not in NLL_DTYPES[backend]:
            backend = "reference"
        of_logits = ctx.needs_input_grad[0]
        nll = run_nll(NllArgs(picked, labels, None, weight, of_logits), backend)
        if of_logits:
            ctx.save_for_backward(picked, rows)  # now the gradient
            ctx.num_rows = len(logits)
        return (weight * nll).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, rows = ctx.saved_tensors
        of_logits = gradient.new_zeros(ctx.num_rows, gradient.shape[1])
        of_logits.index_copy_(0, rows, gradient * upstream)
        return of_logits, None, None, None
