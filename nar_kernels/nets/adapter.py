"""What a network must offer to :class:`nar_kernels.NonAutoregressiveWrapper`, and an adapter.

Shapes: B batch, L sequence length, V vocabulary, D width.
"""

import math
import sys
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nar_kernels.checks import as_int
from nar_kernels.nets.plain import has_hooks, is_plain, is_plain_linear


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
        batch_independent: true promises that equal ids get equal outputs, whatever their place in
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


class _CaptureHeadInput(TorchFunctionMode):
    """Within it, and in this thread alone, a linear head is not applied: its input is kept.

    In place of logits the net gets NaN for one position, in a tensor that tells afterwards whether
    it is what the net returns, untouched.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self._weight = head.weight
        self.hidden: Tensor | None = None
        self.num_calls = 0
        self._logits: Tensor | None = None
        self._versions: tuple[int, int] | None = None
        self._data_ptr = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.linear and len(args) > 1 and args[1] is self._weight:
            self.num_calls += 1
            self.hidden = args[0]
            shape = (*args[0].shape[:-2], 1, self._weight.shape[0])
            with torch.inference_mode(False):  # else it has no version
                # Elements share their memory, so that most ways to write to it are errors.
                nan = torch.full((), math.nan, dtype=args[0].dtype, device=args[0].device)
                self._logits = nan.expand(shape)
            self._versions, self._data_ptr = self._snapshot()
            return self._logits
        return func(*args, **(kwargs or {}))

    def _snapshot(self) -> tuple[tuple[int, int] | None, int]:
        """What changes when somebody writes to the logits, or to the hidden states."""
        assert self.hidden is not None and self._logits is not None
        if torch.compiler.is_compiling():  # which cannot ask
            return None, 0
        hidden_version = 0 if self.hidden.is_inference() else self.hidden._version
        return (self._logits._version, hidden_version), self._logits.data_ptr()

    def is_output(self, logits: Tensor) -> bool:
        """Whether ``logits`` are the only output of the head, as it was."""
        if self.num_calls != 1 or logits is not self._logits:
            return False
        if self._versions is not None:
            return self._snapshot() == (self._versions, self._data_ptr)
        # A compiled net, which has no versions: what nobody wrote to is NaN. (To look waits for the
        # device; where all of this is compiled, it cannot be looked at.)
        return torch.compiler.is_compiling() or bool(logits.isnan().all())


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
        # By the names of keyword arguments: whether the head was seen to be the last thing.
        self._head_is_last: dict[frozenset[str], bool] = {}

    @property
    def output_head(self) -> nn.Module | None:
        """The head, if logits may be made of its input here."""
        if self._head_name is None:
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
        head_input = _CaptureHeadInput(head)
        with head_input:
            logits = self._logits(self.net(ids, **kwargs))
        if not head_input.is_output(logits):
            raise HeadMismatchError(
                f"{type(self.net).__name__} returns something else than the output of its head"
            )
        assert head_input.hidden is not None
        return head_input.hidden

    def head_is_last(self, names: Iterable[str]) -> bool | None:
        """Whether the head is the last thing in the net where it is called with keywords of these
        names; None if nobody has looked."""
        return self._head_is_last.get(frozenset(names))

    def set_head_is_last(self, names: Iterable[str], *, is_last: bool) -> None:
        """What :meth:`head_is_last` says from now on."""
        self._head_is_last[frozenset(names)] = is_last

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


def unwrap(net: nn.Module) -> Any:
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


def innermost(net: nn.Module) -> Any:
    """The net in all wrappers, :class:`NetAdapter` among them."""
    module: Any = unwrap(net)
    while isinstance(module, NetAdapter):
        module = unwrap(module.net)
    return module


def plain_core(net: nn.Module) -> nn.Module | None:
    """The net in wrappers of PyTorch; None if anything between its call and its class is unknown:
    hooks, a ``forward`` of its own, wrappers that divide parameters."""
    while is_plain(net):
        if not type(net).__module__.startswith("torch."):
            return net
        name = _TRANSPARENT.get(type(net).__name__)
        if name is None:
            return net
        if getattr(net, "find_unused_parameters", False):
            return None  # it would take a head that is called outside for one that is not used
        net = net._modules[name]  # type: ignore[assignment]
    return None


def is_transformer_wrapper(net: nn.Module) -> bool:
    """Whether it is x-transformers' own TransformerWrapper: no subclass of it, nor with another
    ``forward``."""
    module = sys.modules.get("x_transformers.x_transformers")
    if module is None or type(net) is not module.TransformerWrapper:
        return False
    forward = type(net).forward
    return forward.__module__ == module.__name__ and not hasattr(forward, "__wrapped__")


def causal_module(net: nn.Module) -> nn.Module | None:
    """The first submodule that says of itself that a position does not see those behind it:
    ``is_causal`` (transformers' attention), ``causal`` (x-transformers'); None if none does."""
    for module in net.modules():
        if any(getattr(module, name, None) is True for name in ("is_causal", "causal")):
            return module
    return None


def batch_independent(net: nn.Module) -> bool:
    """Whether one sequence may stand for others with the same ids, as :class:`TokenNet` says; but
    not for compiled nets, which would have to be compiled for another size of batch."""
    promise = net_attribute(net, "batch_independent", None)
    if promise is None:
        promise = is_transformer_wrapper(unwrap(net)) and not any(map(has_hooks, net.modules()))
    return bool(promise) and not any(map(is_compiled, net.modules()))


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of the module, or of what is in it, runs what torch.compile made."""
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or "forward" in vars(module)  # perhaps a compiled one
    )
