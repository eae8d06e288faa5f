"""What a network must offer to :class:`nar_kernels.NonAutoregressiveWrapper`, and an adapter.

Shapes: B batch, L sequence length, V vocabulary, D width.
"""

import sys
from typing import Any, Protocol

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nar_kernels.checks import as_int
from nar_kernels.plain import has_hooks, is_plain, is_plain_linear


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


class HeadMismatchError(TypeError):
    """What a net returns is not the output of its head."""


class _HeadInput(TorchFunctionMode):
    """Within it, and in this thread alone, a linear head is not applied: its input is kept.

    In place of logits the net gets a tensor of theirs at one position, so that it can be told
    afterwards whether they are what it returns.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self._weight = head.weight
        self.hidden: Tensor | None = None
        self.logits: Tensor | None = None
        self.num_calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.linear and len(args) > 1 and args[1] is self._weight:
            self.num_calls += 1
            self.hidden = args[0]
            # Elements share their memory, so that writing to it is an error.
            shape = (*args[0].shape[:-2], 1, self._weight.shape[0])
            self.logits = args[0].detach().new_zeros(()).expand(shape)
            return self.logits
        return func(*args, **(kwargs or {}))


class NetAdapter(nn.Module):
    """Any module from ids to logits as a :class:`TokenNet`, for instance a Hugging Face masked LM.

    Args:
        net: called as ``net(ids, **kwargs)``. It returns the logits ``[B, L, V]``, something with
            them as ``.logits``, or a tuple that begins with them.
        num_tokens: V, rows of the net's embedding, the mask token's included.
        max_seq_len: L, the length to train and generate at.
        head: the linear layer of ``net`` whose output is the logits, such as
            ``net.get_output_embeddings()`` of most Hugging Face masked LMs. With it, logits are
            made at the masked rows only. Where the net does more than to return what the layer
            does (it scales or caps logits, has hooks or a LoRA adapter there), or the layer is not
            plainly ``nn.Linear``, logits are made at all positions, as without it.

    It has no ``emb_dim``, so it serves neither ``self_cond`` nor ``self_token_critic``.

    Raises:
        ValueError: ``head`` is no part of ``net``, or a size is below 1.

    >>> bert = BertForMaskedLM(config)
    >>> head = bert.get_output_embeddings()
    >>> net = NetAdapter(bert, num_tokens=config.vocab_size, max_seq_len=128, head=head)
    >>> model = NonAutoregressiveWrapper(net, mask_id=tokenizer.mask_token_id)
    """

    def __init__(
        self, net: nn.Module, *, num_tokens: int, max_seq_len: int, head: nn.Module | None = None
    ) -> None:
        super().__init__()
        names = [name for name, module in net.named_modules() if module is head]
        if head is not None and not names:
            raise ValueError(
                f"head is a {type(head).__name__} that is no part of {type(net).__name__}: pass the"
                " module of the net whose output is the logits"
            )
        self.net = net
        self.num_tokens = as_int("num_tokens", num_tokens)
        self.max_seq_len = as_int("max_seq_len", max_seq_len)
        for name in ("num_tokens", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        self._head_name = names[0] if names else None
        self._head_is_last = True  # as far as is known

    @property
    def output_head(self) -> nn.Module | None:
        """The head, if logits may be made of its input here."""
        if self._head_name is None or not self._head_is_last:
            return None
        module: nn.Module | None = self.net
        for name in self._head_name.split("."):
            if module is None or not is_plain(module):
                return None
            module = module._modules.get(name)
        return module if module is not None and is_plain_linear(module) else None

    def forward(self, ids: Tensor, *, return_embeddings: bool = False, **kwargs: Any) -> Tensor:
        """Logits ``[B, L, V]``, or with ``return_embeddings`` the input of the head ``[B, L, D]``.

        Raises:
            HeadMismatchError: there is no head, or its output is not what the net returns. (A net
                that works on the logits may also raise something else.)
        """
        if not return_embeddings:
            return self._logits(self.net(ids, **kwargs))
        head = self.output_head
        if not isinstance(head, nn.Linear):
            raise HeadMismatchError("return_embeddings needs a NetAdapter that knows its head")
        head_input = _HeadInput(head)
        with head_input:
            logits = self._logits(self.net(ids, **kwargs))
        if head_input.num_calls != 1 or logits is not head_input.logits:
            raise HeadMismatchError(
                f"{type(self.net).__name__} returns something else than the output of its head"
            )
        assert head_input.hidden is not None
        return head_input.hidden

    def distrust_head(self) -> None:
        """Makes logits at all positions from now on."""
        self._head_is_last = False

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
    """The net in wrappers such as DistributedDataParallel, or compiled."""
    inner: Any = net
    while True:
        inside = [inner._modules.get(name) for name in ("_orig_mod", "module")]
        if inside == [None, None]:
            return inner
        inner = inside[0] if inside[0] is not None else inside[1]


# Wrappers of PyTorch that return what the module in them does, and where that is.
_TRANSPARENT = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


def plain_core(net: nn.Module) -> nn.Module | None:
    """The net in wrappers of PyTorch; None if anything between its call and its class is unknown:
    hooks, a ``forward`` of its own, wrappers that divide parameters."""
    while is_plain(net):
        if not type(net).__module__.startswith("torch."):
            return net
        name = _TRANSPARENT.get(type(net).__name__)
        if name is None:
            return net
        net = net._modules[name]  # type: ignore[assignment]
    return None


def is_transformer_wrapper(net: nn.Module) -> bool:
    """Whether it is x-transformers' own TransformerWrapper, and no subclass of it."""
    module = sys.modules.get("x_transformers.x_transformers")
    return module is not None and type(net) is module.TransformerWrapper


def causal_module(net: nn.Module) -> nn.Module | None:
    """The first submodule that says of itself that a position does not see those behind it:
    ``is_causal`` (transformers' attention), ``causal`` (x-transformers'); None if none does."""
    for module in net.modules():
        if any(getattr(module, name, None) is True for name in ("is_causal", "causal")):
            return module
    return None


def is_function_of_ids(net: nn.Module) -> bool:
    """Whether one sequence may stand for others with the same ids, as :class:`TokenNet` says; but
    not for compiled nets, which would have to be compiled for another size of batch."""
    promise = net_attribute(net, "is_function_of_ids", None)
    if promise is None:
        promise = is_transformer_wrapper(unwrapped(net)) and not any(map(has_hooks, net.modules()))
    return bool(promise) and not any(map(_is_compiled, net.modules()))


def _is_compiled(module: nn.Module) -> bool:
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or "forward" in vars(module)  # perhaps a compiled one
    )
