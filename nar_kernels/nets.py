"""What a network must offer to :class:`nar_kernels.NonAutoregressiveWrapper`, and an adapter.

Shapes: B batch, L sequence length, V vocabulary, D width.
"""

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

    It has no ``emb_dim``, so it serves neither ``self_cond`` nor ``self_token_critic``.

    >>> net = NetAdapter(BertForMaskedLM(config), num_tokens=config.vocab_size, max_seq_len=128)
    >>> model = NonAutoregressiveWrapper(net, mask_id=tokenizer.mask_token_id)
    """

    def __init__(self, net: nn.Module, *, num_tokens: int, max_seq_len: int) -> None:
        super().__init__()
        self.net = net
        self.num_tokens = num_tokens
        self.max_seq_len = max_seq_len

    def forward(self, ids: Tensor, **kwargs: Any) -> Tensor:
        out = self.net(ids, **kwargs)
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
