"""What a network must offer to :class:`nar_kernels.NonAutoregressiveWrapper`, and an adapter.

Shapes: B batch, L sequence length, V vocabulary, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn


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
        is_function_of_ids: true promises that equal ids get equal outputs, whatever their place in
            the batch and its size, as far as the arguments of the call say nothing else: no
            condition for each sequence is kept in the net. Generation then asks once for sequences
            that begin alike. (Of x-transformers' own nets this is known; false says no.)
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
        with other_attribute(self.output_head, "forward", lambda hidden: hidden):
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


def unwrapped(net: nn.Module) -> Any:
    """The net in wrappers such as DistributedDataParallel."""
    inner: Any = net
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    return inner


def is_function_of_ids(net: nn.Module) -> bool:
    """Whether one sequence may stand for others with the same ids, as :class:`TokenNet` says; but
    not for compiled nets, which would have to be compiled for another size of batch."""
    promise = net_attribute(net, "is_function_of_ids", None)
    if promise is None:
        promise = type(unwrapped(net)).__module__.startswith("x_transformers.")
    return bool(promise) and not any(map(_is_compiled, net.modules()))


def _is_compiled(module: nn.Module) -> bool:
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or "forward" in vars(module)  # perhaps a compiled one
    )


@contextmanager
def other_attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
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
