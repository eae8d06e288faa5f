"""Splits a net into trunk and head, so that logits are computed at the masked rows only.

Shapes: B batch, L sequence length, V vocabulary, D width, C rows of a chunk.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nar_kernels.nets.adapter import NetAdapter, is_transformer_wrapper, plain_core
from nar_kernels.nets.logit_form import UNMODIFIED, CappedHead, LogitForm
from nar_kernels.nets.plain import is_plain, is_plain_linear, is_plain_tensor, is_pointwise


class LinearHead(NamedTuple):
    """Logits are ``scale * hidden @ weight.T + bias``."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0


Head = LinearHead | Callable[[Tensor], Tensor]  # from [C, D] to [C, V]


class SplitNet(NamedTuple):
    """A net as trunk and head: ``head(hidden(ids, **kwargs))`` are its logits."""

    hidden: Callable[..., Tensor]  # from ids [B, L] to [B, L, D]
    head: Head


def split_net(net: nn.Module) -> SplitNet | None:
    """Splits ``net`` at its head; None unless a call is known to do nothing but apply the head to
    the hidden states (hooks and overridden methods rule it out)."""
    core: Any = plain_core(net)
    if core is None:
        return None
    head = None
    if is_transformer_wrapper(core):
        if core is net and (split := _split_custom_softmax(core)) is not None:
            return split
        head = _transformer_wrapper_head(core)
    elif type(core) is NetAdapter:
        head = None if core.output_head is None else adapted_head(core, UNMODIFIED)
    elif (module := getattr(core, "output_head", None)) is not None:
        head = _declared_head(module) if _forward_matches_output_head(type(core)) else None
    if head is None:
        return None

    def hidden(ids: Tensor, **kwargs: Any) -> Tensor:
        return net(ids, return_embeddings=True, **kwargs)

    return SplitNet(hidden, head)


def adapted_head(adapter: NetAdapter, form: LogitForm) -> Head:
    """The head of an adapter that has one, whose logits have this form."""
    module: Any = adapter.output_head
    bias = getattr(module, "bias", None)
    if form.bias is not None:
        added = adapter.net.get_parameter(form.bias)
        bias = added if bias is None else bias + added
    if bias is not None and form.scale != 1:
        bias = bias * form.scale
    if form.cap is not None:
        return CappedHead(module.weight, bias, form)
    return LinearHead(module.weight, bias, form.scale)


def _forward_matches_output_head(kind: type) -> bool:
    """Whether no subclass of the class with ``output_head`` overrides ``forward``."""
    promising = next((c for c in kind.__mro__ if "output_head" in vars(c)), None)
    calling = next(c for c in kind.__mro__ if "forward" in vars(c))
    # For an instance attribute, the class that set it is unknown.
    return promising is None or issubclass(promising, calling)


def _declared_head(module: nn.Module) -> Head | None:
    if is_plain_linear(module):
        return LinearHead(module.weight, module.bias)  # type: ignore[arg-type]
    if type(module) is nn.Linear or not is_plain(module):
        return None
    return _on_rows(module)


def _on_rows(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda rows: module(rows[None])[0]  # some modules expect a batch of sequences


def _has_custom_output(net: Any, ignore: str = "") -> bool:
    """Whether a TransformerWrapper does more than apply ``to_logits`` position-wise."""
    unusual = (
        *("has_multiple_heads", "average_pool_embed", "looped", "squeeze_out_last_dim"),
        *("sigsoftmax_logits", "to_mixture", "cls_token", "attn_pool"),
    )
    values = [getattr(net, name, None) for name in unusual if name != ignore]
    return any(value is not None and value is not False for value in values)


def _transformer_wrapper_head(net: Any) -> Head | None:
    """The head of x-transformers' TransformerWrapper, if it has one output per position."""
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
    """Splits a TransformerWrapper whose logits are not linear in its hidden states: a mixture of
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


def _split_before(net: Any, name: str, disabled: Any, head: Head) -> SplitNet | None:
    if _has_custom_output(net, ignore=name) or net._compiled_call_impl is not None:
        return None
    # With this attribute the net fails when asked for hidden states. It is disabled in a shallow
    # copy, which shares everything else; the user's net is unchanged.
    trunk = copy.copy(net)
    trunk.__dict__["_modules"] = net._modules.copy()
    setattr(trunk, name, disabled)

    def hidden(ids: Tensor, **kwargs: Any) -> Tensor:
        trunk.training = net.training  # eval_mode does not reach the copy
        return trunk(ids, return_embeddings=True, **kwargs)

    return SplitNet(hidden, head)


def _is_tied(net: Any) -> bool:
    """Whether ``to_logits`` is x-transformers' function for the tied embedding of this very net: in
    a deep copy it still refers to the original."""
    function = net.to_logits
    closure = getattr(function, "__closure__", None) or ()
    return (
        getattr(function, "__module__", None) == type(net).__module__
        and getattr(function, "__qualname__", "").startswith("TransformerWrapper.__init__")
        and [cell.cell_contents for cell in closure] == [net]
    )
