"""What a network must offer to :class:`nar_kernels.NonAutoregressiveWrapper`, an adapter, and where
its head begins, so that logits are computed at the masked rows only.

Shapes: B batch, L sequence length, V vocabulary, D width, R masked rows, C rows of a chunk.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nar_kernels.loss import Reduction, chunk_size, head_nll, logits_nll, masked_nll, reduce_nll
from nar_kernels.masking import Corrupted


class TokenNet(Protocol):
    """The protocol: an ``nn.Module`` with two attributes, from ids to logits.

    x-transformers' ``TransformerWrapper`` follows it; :class:`NetAdapter` makes others follow it.

    Attributes:
        num_tokens: V, rows of the embedding, the mask token's included.
        max_seq_len: L, the length of every sequence, in training and generation.

    Optional attributes:
        output_is_log_prob: true if the output is log-probabilities. Default: false.
        output_head: the last module, from hidden states to logits, each position by itself.
            Promises that ``forward(ids, return_embeddings=True)`` returns what it is applied to,
            ``[B, L, D]``. Training then applies it to the masked rows only. (``to_logits`` of
            x-transformers' ``TransformerWrapper`` is found without this.)
        emb_dim: D. Promises that ``forward`` understands these, which ``self_cond`` (all three) and
            ``self_token_critic`` (the first) need:

            * ``return_embeddings=True``: return the last hidden states ``[B, L, D]``;
            * ``return_logits_and_embeddings=True``: return the pair;
            * ``sum_embeds``: ``[D]`` or ``[B, L, D]``, to be added to the token embeddings.
    """

    num_tokens: int
    max_seq_len: int

    def __call__(self, ids: Tensor, **kwargs: Any) -> Tensor:
        """From int64 ``[B, L]`` to ``[B, L, V]``; ``kwargs`` are those of the wrapper's call."""


class NetAdapter(nn.Module):
    """Any module from ids to logits as a :class:`TokenNet`, for instance a Hugging Face masked LM.

    Args:
        net: called as ``net(ids, **kwargs)``. It returns the logits ``[B, L, V]``, something with
            them as ``.logits``, or a tuple that begins with them.
        num_tokens: V, rows of the net's embedding, the mask token's included.
        max_seq_len: L, the length to train and generate at.
        head: the module of ``net`` whose output is the logits, such as
            ``net.get_output_embeddings()`` of most Hugging Face masked LMs. With it, training
            computes logits at the masked rows only. Not for nets that scale or cap what it returns.

    It has no ``emb_dim``, so it serves neither ``self_cond`` nor ``self_token_critic``.

    >>> bert = BertForMaskedLM(config)
    >>> head = bert.get_output_embeddings()
    >>> net = NetAdapter(bert, num_tokens=config.vocab_size, max_seq_len=128, head=head)
    >>> model = NonAutoregressiveWrapper(net, mask_id=tokenizer.mask_token_id)
    """

    def __init__(
        self, net: nn.Module, *, num_tokens: int, max_seq_len: int, head: nn.Module | None = None
    ) -> None:
        super().__init__()
        if head is not None and not any(module is head for module in net.modules()):
            raise ValueError(
                f"head is a {type(head).__name__} that is no part of {type(net).__name__}: pass the"
                " module of the net whose output is the logits"
            )
        self.net = net
        self.num_tokens = num_tokens
        self.max_seq_len = max_seq_len
        self._head = (head,)  # not registered twice

    @property
    def output_head(self) -> nn.Module | None:
        return self._head[0]

    def forward(self, ids: Tensor, *, return_embeddings: bool = False, **kwargs: Any) -> Tensor:
        if not return_embeddings:
            return self._logits(self.net(ids, **kwargs))
        if self.output_head is None:
            raise TypeError("return_embeddings needs a NetAdapter that knows its head")
        with _attribute(self.output_head, "forward", lambda hidden: hidden):
            return self._logits(self.net(ids, **kwargs))

    def _logits(self, out: Any) -> Tensor:
        if isinstance(out, Tensor):
            return out
        logits = getattr(out, "logits", None)
        if logits is None and isinstance(out, tuple) and out:
            logits = out[0]
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"{type(self.net).__name__} returned {type(out).__name__}: NetAdapter takes a "
                "tensor of logits, an object with .logits, or a tuple that begins with them"
            )
        return logits


_MISSING = object()


def net_attribute(net: nn.Module, name: str, default: Any = _MISSING) -> Any:
    """``net.name``, also through wrappers such as DistributedDataParallel.

    Raises:
        TypeError: there is none and no default; the message shows how to adapt the net.
    """
    inner: Any = net
    while not hasattr(inner, name) and isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    value = getattr(inner, name, default)
    if value is _MISSING:
        raise TypeError(
            f"{type(net).__name__} has no attribute {name!r}: wrap it as NetAdapter(net, "
            "num_tokens=<rows of its embedding>, max_seq_len=<length of your sequences>)"
        )
    return value


@contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """``module`` with another value of an attribute or method."""
    own = module.__dict__.get(name, _MISSING), module._modules.get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if own[1] is not None:
            setattr(module, name, own[1])
        elif own[0] is _MISSING:
            delattr(module, name)
        else:
            setattr(module, name, own[0])


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
    inner: Any = net
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
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
            with _attribute(net, "to_mixture", None):
                return hidden(ids, **kwargs)

        def mixture(rows: Tensor) -> Tensor:
            of_each = net.to_logits(net.to_mixture(rows)).float().softmax(-1)  # [C, K, V]
            share = net.combine_mixture(rows).float().softmax(-1)
            return torch.einsum("ckv,ck->cv", of_each, share).log()

        return SplitNet(before_mixture, mixture)
    if getattr(net, "sigsoftmax_logits", False):

        def before_sigsoftmax(ids: Tensor, **kwargs: Any) -> Tensor:
            with _attribute(net, "sigsoftmax_logits", False):
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


class Prediction:
    """What a net says of a batch: hidden states and its head, or logits where it cannot be split.

    Args:
        net: a :class:`TokenNet`.
        ids: int64 ``[B, L]``.
        kwargs: of the net's call.

    Attributes:
        output: hidden states ``[B, L, D]`` or logits ``[B, L, V]``; unchecked.
        head: what makes logits of hidden states; None if ``output`` are logits.
    """

    def __init__(self, net: nn.Module, ids: Tensor, kwargs: dict[str, Any]) -> None:
        # Arguments of the head itself cannot be told from others.
        split = None if "to_logits_kwargs" in kwargs else split_net(net)
        self.head = None if split is None else split.head
        self.output = net(ids, **kwargs) if split is None else split.hidden(ids, **kwargs)
        self._is_log_prob = net_attribute(net, "output_is_log_prob", False)

    @property
    def width(self) -> int | None:
        """V of the logits, if that is known before they are made."""
        if isinstance(self.head, LinearHead):
            return self.head.weight.shape[0]
        return self.output.shape[-1] if self.head is None else None

    def loss(
        self,
        corrupted: Corrupted,
        *,
        reduction: Reduction,
        normalizer: float | Tensor | None,
        backend: str,
    ) -> Tensor:
        """As :func:`nar_kernels.masked_nll`."""
        head, output = self.head, self.output
        if head is None:
            rows = corrupted.masked_rows
            logits = output.reshape(-1, output.shape[-1]).index_select(0, rows)
            labels = corrupted.labels.view(-1).index_select(0, rows)
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

    def logits_at(self, rows: Tensor) -> Iterator[Tensor]:
        """Logits ``[C, V]`` of chunks of the rows, indices into the flat ``[B * L]``, in order."""
        picked = self.output.reshape(-1, self.output.shape[-1]).index_select(0, rows)
        head = self.head
        if head is None:
            yield picked
            return
        if isinstance(head, LinearHead):
            width = head.weight.shape[0]
        else:
            width = head(picked[:1]).shape[-1]
        for some in picked.split(chunk_size(len(rows), width, rows.device)):
            if isinstance(head, LinearHead):
                yield nn.functional.linear(some * head.scale, head.weight, head.bias)
            else:
                yield head(some)
