"""Where the head of a net begins, so that logits are computed at the masked rows only.

Shapes: B batch, L sequence length, V vocabulary, D width, R masked rows, C rows of a chunk.
"""

import copy
import warnings
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
from nar_kernels.modes import evaluating, no_grad
from nar_kernels.nets import (
    HeadMismatchError,
    NetAdapter,
    is_compiled,
    is_transformer_wrapper,
    net_attribute,
    plain_core,
)
from nar_kernels.plain import is_plain, is_plain_linear, is_plain_tensor, is_pointwise


class LinearHead(NamedTuple):
    """Logits are ``scale * hidden @ weight.T + bias``."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0


Head = LinearHead | Callable[[Tensor], Tensor]  # from [C, D] to [C, V]


class SplitNet(NamedTuple):
    """A net in two: ``head(hidden(ids, **kwargs))`` are the logits."""

    hidden: Callable[..., Tensor]  # from ids [B, L] to [B, L, D]
    head: Head


def split_net(net: nn.Module) -> SplitNet | None:
    """Where the head of ``net`` begins; None where it is not sure that its call does nothing else
    than to apply the head to the hidden states, hooks and overridden methods included."""
    core: Any = plain_core(net)
    if core is None:
        return None
    head = None
    if is_transformer_wrapper(core):
        if core is net and (split := _split_unusual_softmax(core)) is not None:
            return split
        head = _transformer_wrapper_head(core)
    elif (module := getattr(core, "output_head", None)) is not None:
        head = _promised_head(module) if _keeps_its_promise(type(core)) else None
    if head is None:
        return None

    def hidden(ids: Tensor, **kwargs: Any) -> Tensor:
        return net(ids, return_embeddings=True, **kwargs)

    return SplitNet(hidden, head)


def _keeps_its_promise(kind: type) -> bool:
    """Whether no subclass of the one that has ``output_head`` overrides its ``forward``."""
    promising = next((c for c in kind.__mro__ if "output_head" in vars(c)), None)
    calling = next(c for c in kind.__mro__ if "forward" in vars(c))
    # Of an attribute of the instance it is not known which class set it.
    return promising is None or issubclass(promising, calling)


def _promised_head(module: nn.Module) -> Head | None:
    if is_plain_linear(module):
        return LinearHead(module.weight, module.bias)  # type: ignore[arg-type]
    if type(module) is nn.Linear or not is_plain(module):
        return None
    return _of_rows(module)


def _of_rows(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda rows: module(rows[None])[0]  # some expect a batch of sequences


def _has_unusual_output(net: Any, but: str = "") -> bool:
    """Whether a TransformerWrapper does more than to apply ``to_logits`` at each position."""
    unusual = (
        *("has_multiple_heads", "average_pool_embed", "looped", "squeeze_out_last_dim"),
        *("sigsoftmax_logits", "to_mixture", "cls_token", "attn_pool"),
    )
    values = [getattr(net, name, None) for name in unusual if name != but]
    return any(value is not None and value is not False for value in values)


def _transformer_wrapper_head(net: Any) -> Head | None:
    """That of x-transformers' TransformerWrapper, if it has one output for each position."""
    if _has_unusual_output(net):
        return None
    module = getattr(net, "to_logits", None)
    if isinstance(module, nn.Module):
        if is_plain_linear(module):
            return LinearHead(module.weight, module.bias)  # type: ignore[arg-type]
        return _of_rows(module) if is_pointwise(module) else None
    scale = getattr(net, "tie_embedding_scale", None)
    if scale is None or not _is_tied(net) or not is_plain_tensor(net.token_emb.emb.weight):
        return None
    return LinearHead(net.token_emb.emb.weight, scale=scale)


def _split_unusual_softmax(net: Any) -> SplitNet | None:
    """A TransformerWrapper whose logits are no linear function of its hidden states: a mixture of
    softmaxes, or sigsoftmax."""
    if not is_plain_linear(getattr(net, "to_logits", None)):
        return None
    if (to_mixture := getattr(net, "to_mixture", None)) is not None:
        layers = (net.combine_mixture, to_mixture[0])
        if not (all(map(is_plain_linear, layers)) and all(map(is_plain, to_mixture.modules()))):
            return None

        def mixture(rows: Tensor) -> Tensor:
            of_each = net.to_logits(net.to_mixture(rows)).float().softmax(-1)  # [C, K, V]
            share = net.combine_mixture(rows).float().softmax(-1)
            return torch.einsum("ckv,ck->cv", of_each, share).log()

        return _split_at(net, "to_mixture", None, mixture)
    if getattr(net, "sigsoftmax_logits", False):

        def sigsoftmax(rows: Tensor) -> Tensor:
            logits = net.to_logits(rows)
            return logits + logits.sigmoid().log()

        return _split_at(net, "sigsoftmax_logits", False, sigsoftmax)
    return None


def _split_at(net: Any, name: str, without: Any, head: Head) -> SplitNet | None:
    if _has_unusual_output(net, but=name) or net._compiled_call_impl is not None:
        return None
    # Asked for hidden states, the net would trip over this attribute. The net of the user stays as
    # it is: this one shares all parts with it but that one.
    trunk = copy.copy(net)
    trunk.__dict__["_modules"] = net._modules.copy()
    setattr(trunk, name, without)

    def hidden(ids: Tensor, **kwargs: Any) -> Tensor:
        return trunk(ids, return_embeddings=True, **kwargs)

    return SplitNet(hidden, head)


def _is_tied(net: Any) -> bool:
    """Whether ``to_logits`` is what x-transformers makes of the embedding of this very net: that of
    a deep copy is still the original's."""
    function = net.to_logits
    closure = getattr(function, "__closure__", None) or ()
    return (
        getattr(function, "__module__", None) == type(net).__module__
        and getattr(function, "__qualname__", "").startswith("TransformerWrapper.__init__")
        and [cell.cell_contents for cell in closure] == [net]
    )


def _check_head(adapter: NetAdapter, ids: Tensor, kwargs: dict[str, Any]) -> None:
    """Looks once whether the logits of a sequence are what the head makes of its hidden states: a
    net may do with their values what cannot be seen from outside.

    Raises:
        HeadMismatchError: they are not.
    """
    if any(map(is_compiled, adapter.modules())):
        return  # which would have to be compiled for another size of batch
    one: dict[str, Any] = {
        name: value[:1] if isinstance(value, Tensor) and value.shape[:1] == ids.shape[:1] else value
        for name, value in kwargs.items()
    }
    head: Any = adapter.output_head
    with evaluating(adapter, adapter), no_grad():
        logits = adapter.forward(ids[:1], **one)
        hidden = adapter.forward(ids[:1], return_embeddings=True, **one)
        expected = nn.functional.linear(hidden, head.weight, head.bias)
    scale = expected.abs().amax().item() if expected.numel() else 0.0
    if logits.shape != expected.shape or not torch.allclose(
        logits.float(), expected.float(), rtol=0, atol=0.02 * scale, equal_nan=True
    ):
        raise HeadMismatchError("its logits of a sequence are others")


def _distrust_head(adapter: NetAdapter, kwargs: dict[str, Any], reason: Exception) -> None:
    adapter.take_note_of_head(kwargs, is_last=False)
    why = str(reason).partition("\n")[0]
    warnings.warn(
        "NetAdapter(head=...): called like this, the net does more than to return what its head "
        f"does, so logits are made at all positions, as without head ({why})",
        stacklevel=2,
    )


def describe(output: Any) -> str:
    """What a net returned."""
    return f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__


# Arguments of x-transformers' nets for the head itself, or for what is behind it.
_AT_ALL_POSITIONS = {"to_logits_kwargs", "prepend_embeds", "excise_prepend_embeds"}


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
        split = None if _AT_ALL_POSITIONS & kwargs.keys() else split_net(net)
        adapter = None if split is None else plain_core(net)
        if isinstance(adapter, NetAdapter) and adapter.head_is_last(kwargs) is False:
            split = None
        self.head: Head | None = None
        self.embeddings: Tensor | None = None
        unfit: Exception | None = None
        if split is not None:
            try:
                if isinstance(adapter, NetAdapter) and adapter.head_is_last(kwargs) is None:
                    _check_head(adapter, ids, kwargs)
                    adapter.take_note_of_head(kwargs, is_last=True)
                self.output = self.embeddings = split.hidden(ids, **kwargs)
                self.head = split.head
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if not isinstance(adapter, NetAdapter):
                    raise
                unfit = error
        if self.head is None and with_embeddings:
            self.output, self.embeddings = net(ids, return_logits_and_embeddings=True, **kwargs)
        elif self.head is None:
            self.output = net(ids, **kwargs)
        if unfit is not None:  # a call that is wrong by itself has raised
            assert isinstance(adapter, NetAdapter)
            _distrust_head(adapter, kwargs, unfit)
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
