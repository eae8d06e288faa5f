"""A net's output as hidden states and a head, or as logits where it cannot be split.

Shapes: B batch, L sequence length, V vocabulary, D width, R masked rows, C rows of a chunk.
"""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nar_kernels.nets.adapter import NetAdapter, is_compiled, net_attribute, plain_core
from nar_kernels.nets.capture import HeadMismatchError
from nar_kernels.nets.logit_form import UNMODIFIED, LogitForm
from nar_kernels.nets.modes import eval_mode, no_grad
from nar_kernels.nets.split import Head, LinearHead, adapted_head, split_net
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.linear import TRAINING_LIMITS, LogitsMemory, chunk_size, inferred_logits
from nar_kernels.ops.masked_nll import (
    Reduction,
    head_nll,
    head_widths,
    logits_nll,
    masked_labels,
    masked_nll,
    reduce_nll,
)
from nar_kernels.ops.masking import MaskingConfig


def describe(output: Any) -> str:
    """The shape or type of a net's output, for errors."""
    return f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__


class Prediction(NamedTuple):
    """The result of a :class:`TrunkAndHead`.

    Attributes:
        output: hidden states ``[B, L, D]``, or logits ``[B, L, V]`` without a head; unchecked
            before :meth:`check`.
        head: from hidden states to logits; None if ``output`` is the logits.
        embeddings: the hidden states; None if unknown.
        is_log_prob: whether logits are log-probabilities.
    """

    output: Tensor
    head: Head | None
    embeddings: Tensor | None
    is_log_prob: bool

    @property
    def width(self) -> int | None:
        """V of the logits, if known without computing them."""
        if isinstance(self.head, LinearHead):
            return self.head.weight.shape[0]
        return self.output.shape[-1] if self.head is None else None

    def check(self, ids: Tensor, masking: MaskingConfig) -> None:
        """Raises TypeError unless ``output`` is what :class:`TokenNet` specifies."""
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
        # The column of mask_id may be missing if it is the last id.
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
        position_weight: Tensor | None = None,
        static_shapes: bool = False,
        backend: str = "auto",
    ) -> Tensor:
        """See :func:`nar_kernels.masked_nll`."""
        head, output = self.head, self.output
        if head is None:
            rows, labels = masked_labels(corrupted, static_shapes)
            logits = output.reshape(-1, output.shape[-1]).index_select(0, rows)
            nll = logits_nll(logits, labels, self.is_log_prob)
            return reduce_nll(
                nll, rows, corrupted, reduction, normalizer, static_shapes, position_weight
            )
        if isinstance(head, LinearHead):
            return masked_nll(
                output if head.scale == 1 else output * head.scale,
                head.weight,
                corrupted,
                bias=head.bias,
                reduction=reduction,
                normalizer=normalizer,
                position_weight=position_weight,
                static_shapes=static_shapes,
                backend=backend,
            )
        return head_nll(
            output,
            head,
            corrupted,
            is_log_prob=self.is_log_prob,
            reduction=reduction,
            normalizer=normalizer,
            position_weight=position_weight,
            static_shapes=static_shapes,
        )

    @torch.no_grad()
    def logits_at(self, rows: Tensor, memory: LogitsMemory | None = None) -> Iterator[Tensor]:
        """Logits ``[C, V]`` at ``rows``, indices into the flat ``[B * L]``, in chunks, in order.

        Without gradients; a chunk is valid until the next. ``memory`` is the buffer for the logits
        of a linear head. ``output`` is read at once: a CUDA graph overwrites it in its next call.
        """
        picked = self.output.reshape(-1, self.output.shape[-1]).index_select(0, rows)
        return _logits(self.head, picked, memory or LogitsMemory())


@torch.no_grad()
def _logits(head: Head | None, picked: Tensor, memory: LogitsMemory) -> Iterator[Tensor]:
    """Of ``picked`` outputs of the net ``[R, D]``, or ``[R, V]`` without a head."""
    if head is None:
        yield picked
    elif isinstance(head, LinearHead):
        scaled = picked * head.scale if head.scale != 1 else picked
        yield from inferred_logits(scaled, head.weight, head.bias, memory)
    else:
        width = head(picked[:1]).shape[-1]
        size = chunk_size(len(picked), width, picked.device, TRAINING_LIMITS)
        for some in picked.split(size):
            yield head(some)


_OF_DOCUMENTS = {"cu_seqlens", "block_mask"}

# x-transformers' arguments for the head itself, or for what comes after it: no split.
_UNSPLIT_KWARGS = {"to_logits_kwargs", "prepend_embeds", "excise_prepend_embeds"}


class TrunkAndHead:
    """A net split into trunk and head, once for many calls: in between, values of parameters may
    change, but not which tensors, modules and hooks there are.

    Args:
        net: a :class:`nar_kernels.nets.adapter.TokenNet`.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net, self._split = net, split_net(net)
        core = None if self._split is None else plain_core(net)
        self._adapter = core if isinstance(core, NetAdapter) else None
        self._is_log_prob = net_attribute(net, "output_is_log_prob", False)

    def __call__(
        self, ids: Tensor, kwargs: dict[str, Any], *, with_embeddings: bool = False
    ) -> Prediction:
        """Runs the trunk, or the whole net if it cannot be split.

        Args:
            ids: int64 ``[B, L]``.
            kwargs: for the net.
            with_embeddings: request the hidden states of a net that cannot be split as well.
        """
        mismatch: Exception | None = None
        if self._can_split(kwargs):
            try:
                return self._at_head(ids, kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if self._adapter is None:
                    raise
                mismatch = error
        embeddings = None
        if with_embeddings:
            output, embeddings = self._net(ids, return_logits_and_embeddings=True, **kwargs)
        else:
            output = self._net(ids, **kwargs)
        if mismatch is not None:  # an invalid call has raised by now
            assert self._adapter is not None
            _disable_head(self._adapter, kwargs, mismatch)
        return Prediction(output, None, embeddings, self._is_log_prob)

    def _at_head(self, ids: Tensor, kwargs: dict[str, Any]) -> Prediction:
        assert self._split is not None
        adapter = self._adapter
        if adapter is None:
            hidden = self._split.hidden(ids, **kwargs)
            return Prediction(hidden, self._split.head, hidden, self._is_log_prob)
        if adapter.head_is_last(kwargs) is not None:
            try:
                return self._of_adapter(adapter, ids, kwargs)
            except HeadMismatchError:
                pass  # verified in another dtype, perhaps
        adapter.set_logit_form(kwargs, _verified_form(adapter, ids, kwargs))
        return self._of_adapter(adapter, ids, kwargs)

    def _of_adapter(self, adapter: NetAdapter, ids: Tensor, kwargs: dict[str, Any]) -> Prediction:
        assert self._split is not None
        hidden = self._split.hidden(ids, **kwargs)
        head = adapted_head(adapter, adapter.logit_form(kwargs))
        return Prediction(hidden, head, hidden, self._is_log_prob)

    def _can_split(self, kwargs: dict[str, Any]) -> bool:
        if self._split is None or _UNSPLIT_KWARGS & kwargs.keys():
            return False
        return self._adapter is None or self._adapter.head_is_last(kwargs) is not False


def _verified_form(adapter: NetAdapter, ids: Tensor, kwargs: dict[str, Any]) -> LogitForm:
    """How the net's logits follow from its hidden states; verified numerically, on one sequence or
    a packed batch: changes to their values may be invisible from outside.

    Raises:
        HeadMismatchError: in no way that is known.
    """
    if any(map(is_compiled, adapter.net.modules())):
        return UNMODIFIED  # it would recompile for another batch size
    some, given = ids[:1], kwargs
    if _OF_DOCUMENTS & kwargs.keys():  # which describe the whole batch
        some = ids
    else:
        given = {
            name: value[:1]
            if isinstance(value, Tensor) and value.shape[:1] == ids.shape[:1]
            else value
            for name, value in kwargs.items()
        }
    with eval_mode(adapter, adapter), no_grad():
        form = adapter.find_logit_form(some, given)
        logits = adapter.forward(some, **given)
        hidden = adapter.hidden_states(some, form, given)
        head = adapted_head(adapter, form)
        expected = (
            nn.functional.linear(hidden * head.scale, head.weight, head.bias)
            if isinstance(head, LinearHead)
            else head(hidden)
        )
    largest = expected.abs().amax().item() if expected.numel() else 0.0
    if logits.shape != expected.shape or not torch.allclose(
        logits.float(), expected.float(), rtol=0, atol=0.02 * largest, equal_nan=True
    ):
        raise HeadMismatchError(f"its logits are not those of its head, {form}")
    return form


def _disable_head(adapter: NetAdapter, kwargs: dict[str, Any], reason: Exception) -> None:
    adapter.set_logit_form(kwargs, None)
    why = str(reason).partition("\n")[0]
    warnings.warn(
        "NetAdapter(head=...): called like this, the net does more than return the output of its "
        f"head, so logits are computed at all positions, as without head ({why})",
        stacklevel=2,
    )
