"""Where the head of a net begins, so that logits are computed at the masked rows only.

Shapes: B batch, L sequence length, V vocabulary, D width, C rows of a chunk.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nar_kernels.nets.adapter import is_transformer_wrapper, plain_core
from nar_kernels.nets.plain import is_plain, is_plain_linear, is_plain_tensor, is_pointwise


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
        if core is net and (split := _split_custom_softmax(core)) is not None:
            return split
        head = _transformer_wrapper_head(core)
    elif (module := getattr(core, "output_head", None)) is not None:
        head = _declared_head(module) if _forward_matches_output_head(type(core)) else None
    if head is None:
        return None

    def hidden(ids: Tensor, **kwargs: Any) -> Tensor:
        return net(ids, return_embeddings=True, **kwargs)

    return SplitNet(hidden, head)


def _forward_matches_output_head(kind: type) -> bool:
    """Whether no subclass of the one that has ``output_head`` overrides its ``forward``."""
    promising = next((c for c in kind.__mro__ if "output_head" in vars(c)), None)
    calling = next(c for c in kind.__mro__ if "forward" in vars(c))
    # Of an attribute of the instance it is not known which class set it.
    return promising is None or issubclass(promising, calling)


def _declared_head(module: nn.Module) -> Head | None:
    if is_plain_linear(module):
        return LinearHead(module.weight, module.bias)  # type: ignore[arg-type]
    if type(module) is nn.Linear or not is_plain(module):
        return None
    return _on_rows(module)


def _on_rows(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda rows: module(rows[None])[0]  # some expect a batch of sequences


def _has_custom_output(net: Any, but: str = "") -> bool:
    """Whether a TransformerWrapper does more than to apply ``to_logits`` at each position."""
    unusual = (
        *("has_multiple_heads", "average_pool_embed", "looped", "squeeze_out_last_dim"),
        *("sigsoftmax_logits", "to_mixture", "cls_token", "attn_pool"),
    )
    values = [getattr(net, name, None) for name in unusual if name != but]
    return any(value is not None and value is not False for value in values)


def _transformer_wrapper_head(net: Any) -> Head | None:
    """That of x-transformers' TransformerWrapper, if it has one output for each position."""
    if _has_custom_output(net):
        return None
    module = getattr(net, "to_logits", None)
    if isinstance(module, nn.Module):
        if is_plain_linear(module):
            return LinearHead(module.weight, module.bias)  # type: ignore[arg-type]
        return _on_rows(module) if is_pointwise(module) else None
    scale = getattr(net, "tie_embedding_scale", None)
    if scale is None or not _is_tied(net) or not is_plain_tensor(net.token_emb.emb.weight):
        return None
    return LinearHead(net.token_emb.emb.weight, scale=scale)


def _split_custom_softmax(net: Any) -> SplitNet | None:
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

        return _split_before(net, "to_mixture", None, mixture)
    if getattr(net, "sigsoftmax_logits", False):

        def sigsoftmax(rows: Tensor) -> Tensor:
            logits = net.to_logits(rows)
            return logits + logits.sigmoid().log()

        return _split_before(net, "sigsoftmax_logits", False, sigsoftmax)
    return None


def _split_before(net: Any, name: str, without: Any, head: Head) -> SplitNet | None:
    if _has_custom_output(net, but=name) or net._compiled_call_impl is not None:
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
