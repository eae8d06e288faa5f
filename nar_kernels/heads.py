"""Where the head of a net begins, so that logits are computed at the masked rows only.

Shapes: B batch, L sequence length, V vocabulary, D width, R masked rows, C rows of a chunk.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nar_kernels.linear import TRAINING_LIMITS, LogitsMemory, chunk_size, inferred_logits
from nar_kernels.loss import (
    Reduction,
    head_nll,
    head_widths,
    logits_nll,
    masked_labels,
    masked_nll,
    reduce_nll,
)
from nar_kernels.masking import Corrupted, MaskingConfig
from nar_kernels.nets import net_attribute, other_attribute, unwrapped


class LinearHead(NamedTuple):
    """Logits are ``scale * hidden @ weight.T + bias``."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0


class SplitNet(NamedTuple):
    """A net in two: ``head(hidden(ids, **kwargs))`` are the logits."""

    hidden: Callable[..., Tensor]  # from ids [B, L] to [B, L, D]
    head: LinearHead | Callable[[Tensor], Tensor]  # from [C, D] to [C, V]


def split_net(net: nn.Module) -> SplitNet | None:
    """Where the head of ``net`` begins, or None if that cannot be told."""

    def hidden(ids: Tensor, **kwargs: Any) -> Tensor:
        return net(ids, return_embeddings=True, **kwargs)

    module = net_attribute(net, "output_head", None)
    if module is not None:
        return SplitNet(hidden, _head(module))
    inner = unwrapped(net)
    if _is_plain_transformer_wrapper(inner):
        return _split_transformer_wrapper(inner, hidden)
    return None


def _head(module: nn.Module) -> LinearHead | Callable[[Tensor], Tensor]:
    has_hooks = module._forward_hooks or module._forward_pre_hooks
    if type(module) is nn.Linear and not has_hooks:
        return LinearHead(module.weight, module.bias)
    return lambda rows: module(rows[None])[0]  # some expect a batch of sequences


def _is_plain_transformer_wrapper(net: nn.Module) -> bool:
    """Whether this is x-transformers' TransformerWrapper, with one output for each position."""
    if not hasattr(net, "attn_layers") or getattr(net, "to_logits", None) is None:
        return False
    unusual = ("has_multiple_heads", "average_pool_embed", "looped", "squeeze_out_last_dim")
    modules = ("cls_token", "attn_pool")
    return not any(getattr(net, name, False) for name in unusual) and all(
        getattr(net, name, None) is None for name in modules
    )


def _split_transformer_wrapper(net: Any, hidden: Callable[..., Tensor]) -> SplitNet:
    if getattr(net, "to_mixture", None) is not None:  # a mixture of softmaxes

        def before_mixture(ids: Tensor, **kwargs: Any) -> Tensor:
            with other_attribute(net, "to_mixture", None):
                return hidden(ids, **kwargs)

        def mixture(rows: Tensor) -> Tensor:
            of_each = net.to_logits(net.to_mixture(rows)).float().softmax(-1)  # [C, K, V]
            share = net.combine_mixture(rows).float().softmax(-1)
            return torch.einsum("ckv,ck->cv", of_each, share).log()

        return SplitNet(before_mixture, mixture)
    if getattr(net, "sigsoftmax_logits", False):

        def before_sigsoftmax(ids: Tensor, **kwargs: Any) -> Tensor:
            with other_attribute(net, "sigsoftmax_logits", False):
                return hidden(ids, **kwargs)

        def sigsoftmax(rows: Tensor) -> Tensor:
            logits = net.to_logits(rows)
            return logits + logits.sigmoid().log()

        return SplitNet(before_sigsoftmax, sigsoftmax)
    if isinstance(net.to_logits, nn.Module):
        return SplitNet(hidden, _head(net.to_logits))
    scale = getattr(net, "tie_embedding_scale", None)
    if scale is not None:
        return SplitNet(hidden, LinearHead(net.token_emb.emb.weight, scale=scale))
    return SplitNet(hidden, net.to_logits)


def describe(output: Any) -> str:
    """What a net returned."""
    return f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__


class Prediction:
    """What a net says of a batch: hidden states and its head, or logits where it cannot be split.

    Args:
        net: a :class:`TokenNet`.
        ids: int64 ``[B, L]``.
        kwargs: of the net's call.
        with_embeddings: also ask a net that cannot be split for its hidden states.

    Attributes:
        output: hidden states ``[B, L, D]`` or logits ``[B, L, V]``; see :meth:`check`.
        head: what makes logits of hidden states; None if ``output`` are logits.
        embeddings: the hidden states; None if they are not known.
    """

    def __init__(
        self,
        net: nn.Module,
        ids: Tensor,
        kwargs: dict[str, Any],
        *,
        with_embeddings: bool = False,
    ) -> None:
        # Arguments of the head itself cannot be told from others.
        split = None if "to_logits_kwargs" in kwargs else split_net(net)
        self.head = None if split is None else split.head
        self.embeddings: Tensor | None = None
        if split is not None:
            self.output = self.embeddings = split.hidden(ids, **kwargs)
        elif with_embeddings:
            self.output, self.embeddings = net(ids, return_logits_and_embeddings=True, **kwargs)
        else:
            self.output = net(ids, **kwargs)
        self._is_log_prob = net_attribute(net, "output_is_log_prob", False)

    @property
    def width(self) -> int | None:
        """V of the logits, if that is known before they are made."""
        if isinstance(self.head, LinearHead):
            return self.head.weight.shape[0]
        return self.output.shape[-1] if self.head is None else None

    def check(self, ids: Tensor, masking: MaskingConfig) -> None:
        """Raises TypeError unless the net did what a :class:`TokenNet` promises."""
        output, expected = self.output, [*ids.shape, masking.num_tokens]
        fits = isinstance(output, Tensor) and output.shape[:-1] == ids.shape
        if self.head is None and not fits:
            raise TypeError(
                f"the net returned {describe(output)}, but it must return logits of shape "
                f"{expected}; NetAdapter picks them out of most outputs"
            )
        if not fits:
            raise TypeError(
                f"the net returned {describe(output)} with return_embeddings=True, but it must "
                f"return hidden states of shape {[*ids.shape, 'D']}"
            )
        # mask_id needs no column if it is the last id.
        if self.width is not None and self.width not in head_widths(masking):
            raise TypeError(
                f"the net returned shape {[*ids.shape, self.width]}, but it must return logits of "
                f"shape {expected}: num_tokens is the number of its embedding rows"
            )

    def loss(
        self,
        corrupted: Corrupted,
        *,
        reduction: Reduction,
        normalizer: float | Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """As :func:`nar_kernels.masked_nll`."""
        head, output = self.head, self.output
        if head is None:
            rows, labels = masked_labels(corrupted)
            logits = output.reshape(-1, output.shape[-1]).index_select(0, rows)
            nll = logits_nll(logits, labels, self._is_log_prob)
            return reduce_nll(nll, corrupted, reduction, normalizer)
        if isinstance(head, LinearHead):
            return masked_nll(
                output if head.scale == 1 else output * head.scale,
                head.weight,
                corrupted,
                bias=head.bias,
                reduction=reduction,
                normalizer=normalizer,
                backend=backend,
            )
        return head_nll(
            output,
            head,
            corrupted,
            is_log_prob=self._is_log_prob,
            reduction=reduction,
            normalizer=normalizer,
        )

    @torch.no_grad()
    def logits_at(self, rows: Tensor, memory: LogitsMemory | None = None) -> Iterator[Tensor]:
        """Logits ``[C, V]`` of chunks of the rows, indices into the flat ``[B * L]``, in order.

        They are without gradients, and valid until the next chunk. ``memory`` is for those of a
        linear head.
        """
        picked = self.output.reshape(-1, self.output.shape[-1]).index_select(0, rows)
        head = self.head
        if head is None:
            yield picked
        elif isinstance(head, LinearHead):
            scaled = picked * head.scale if head.scale != 1 else picked
            yield from inferred_logits(scaled, head.weight, head.bias, memory or LogitsMemory())
        else:
            width = head(picked[:1]).shape[-1]
            size = chunk_size(len(rows), width, rows.device, TRAINING_LIMITS)
            for some in picked.split(size):
                yield head(some)
