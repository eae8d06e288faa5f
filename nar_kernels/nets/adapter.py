"""What :class:`nar_kernels.NonAutoregressiveWrapper` needs of a network, and an adapter to it.

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
    """Protocol of an ``nn.Module`` from ids to logits, with two attributes.

    x-transformers' ``TransformerWrapper`` implements it; :class:`NetAdapter` adapts other modules.

    Attributes:
        num_tokens: V, rows of the embedding, the mask token's included.
        max_seq_len: L, the length of every sequence in training, and of those generated unless
            another is asked for: then the net is called with shorter ones, ``[B, length]``.

    Optional attributes:
        output_is_log_prob: true if the output is log-probabilities. Default: false.
        output_head: the last module, position-wise from hidden states to logits. Promises that
            ``forward(ids, return_embeddings=True)`` returns its input ``[B, L, D]``. Training then
            applies it to the masked rows only. (``to_logits`` of x-transformers'
            ``TransformerWrapper`` is found without this.)
        batch_independent: true promises that equal ids get equal outputs, whatever their index in
            the batch and the batch size, unless the arguments of the call differ: the net stores no
            per-sequence condition. If all sequences start alike, generation then runs its first
            step on one. (Known for x-transformers' own nets; false opts out.)
        num_classes: C, of a net whose ``forward`` takes the class of each sequence, int64 ``[B]``
            in [0, C], as ``class_ids``, ``class_labels`` or ``y``: C stands for none, in the
            unconditional call of guidance. (Of x-transformers' ``TransformerWrapper`` it is known
            from ``embed_num_tokens={"class": C + 1}``.)
        emb_dim: D. Promises that ``forward`` takes these keywords, which ``self_cond`` (all three)
            and ``self_token_critic`` (the first) need:

            * ``return_embeddings=True``: return the last hidden states ``[B, L, D]``;
            * ``return_logits_and_embeddings=True``: return the pair;
            * ``sum_embeds``: ``[D]`` or ``[B, L, D]``, added to the token embeddings.
    """

    num_tokens: int
    max_seq_len: int

    def __call__(self, ids: Tensor, **kwargs: Any) -> Tensor:
        """From int64 ``[B, L]`` to ``[B, L, V]``; ``kwargs`` come from the wrapper's caller."""


class HeadMismatchError(TypeError):
    """The output of a net is not the output of its head."""


class _CaptureHeadInput(TorchFunctionMode):
    """Skips a linear head, in this thread only, and captures its input.

    In place of logits the net gets an expanded NaN for one position, from which it can be told
    whether the net returns it unmodified.
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
            with torch.inference_mode(False):  # inference tensors have no version
                # Expanded, so that most in-place writes raise.
                nan = torch.full((), math.nan, dtype=args[0].dtype, device=args[0].device)
                self._logits = nan.expand(shape)
            self._versions, self._data_ptr = self._snapshot()
            return self._logits
        return func(*args, **(kwargs or {}))

    def _snapshot(self) -> tuple[tuple[int, int] | None, int]:
        """Version counters and data pointer, which reveal writes to the logits or hidden states."""
        assert self.hidden is not None and self._logits is not None
        if torch.compiler.is_compiling():  # which cannot trace versions
            return None, 0
        hidden_version = 0 if self.hidden.is_inference() else self.hidden._version
        return (self._logits._version, hidden_version), self._logits.data_ptr()

    def is_output(self, logits: Tensor) -> bool:
        """Whether ``logits`` is the unmodified output of the head, called once."""
        if self.num_calls != 1 or logits is not self._logits:
            return False
        if self._versions is not None:
            return self._snapshot() == (self._versions, self._data_ptr)
        # A compiled net has no versions: unmodified logits are NaN. (Looking is a sync; it is not
        # possible if this function is compiled as well.)
        return torch.compiler.is_compiling() or bool(logits.isnan().all())


class NetAdapter(nn.Module):
    """Adapts any module from ids to logits, such as a Hugging Face masked LM, to :class:`TokenNet`.

    Args:
        net: called as ``net(ids, **kwargs)``. Returns the logits ``[B, L, V]``, an object with
            ``.logits``, or a tuple that begins with them.
        num_tokens: V, rows of the net's embedding, the mask token's included.
        max_seq_len: L, the length to train and generate at.
        head: the linear layer of ``net`` that outputs the logits, such as
            ``net.get_output_embeddings()`` of most Hugging Face masked LMs. With it, logits are
            computed at the masked rows only. If the net does more than return the layer's output
            (scaled or capped logits, hooks, a LoRA adapter), or the layer is not a plain
            ``nn.Linear``, they are computed at all positions, as without it.

    There is no ``emb_dim``, so ``self_cond`` and ``self_token_critic`` are not supported.

    Raises:
        ValueError: ``head`` is not a submodule of ``net``, or a size is below 1.

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
                f"head is a {type(head).__name__} that is no submodule of {type(net).__name__}: "
                "pass the module of the net whose output is the logits"
            )
        self.net = net
        self.num_tokens = as_int("num_tokens", num_tokens)
        self.max_seq_len = as_int("max_seq_len", max_seq_len)
        for name in ("num_tokens", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        self._head_name = names[0] if names else None
        # By the names of the keyword arguments.
        self._head_is_last: dict[frozenset[str], bool] = {}

    @property
    def output_head(self) -> nn.Module | None:
        """The head, if it and the modules that hold it are plain; else None."""
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
                that operates on the logits may raise another error.)
        """
        if not return_embeddings:
            return self._logits(self.net(ids, **kwargs))
        head = self.output_head
        if not isinstance(head, nn.Linear):
            raise HeadMismatchError("return_embeddings needs a NetAdapter with a plain linear head")
        head_input = _CaptureHeadInput(head)
        with head_input:
            logits = self._logits(self.net(ids, **kwargs))
        if not head_input.is_output(logits):
            raise HeadMismatchError(
                f"{type(self.net).__name__} does not return the output of its head"
            )
        assert head_input.hidden is not None
        return head_input.hidden

    def head_is_last(self, names: Iterable[str]) -> bool | None:
        """Whether the net returns the output of its head when called with keywords of these names;
        None if not verified yet."""
        return self._head_is_last.get(frozenset(names))

    def set_head_is_last(self, names: Iterable[str], *, is_last: bool) -> None:
        """Sets the result of :meth:`head_is_last`."""
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
        TypeError: it is missing, and there is no default; the message shows how to adapt the net.
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
    """The net inside wrappers such as DistributedDataParallel or torch.compile's."""
    inner: Any = net
    while True:
        inside = [inner._modules.get(name) for name in ("_orig_mod", "module")]
        if inside == [None, None]:
            return inner
        inner = inside[0] if inside[0] is not None else inside[1]


# PyTorch wrappers that return their module's output, and the name of that module.
_TRANSPARENT = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


def innermost(net: nn.Module) -> Any:
    """The net inside all wrappers, :class:`NetAdapter` included."""
    module: Any = unwrap(net)
    while isinstance(module, NetAdapter):
        module = unwrap(module.net)
    return module


def plain_core(net: nn.Module) -> nn.Module | None:
    """The net inside PyTorch wrappers; None if hooks, an instance-level ``forward`` or wrappers
    that shard parameters may intervene."""
    while is_plain(net):
        if not type(net).__module__.startswith("torch."):
            return net
        name = _TRANSPARENT.get(type(net).__name__)
        if name is None:
            return net
        if getattr(net, "find_unused_parameters", False):
            return None  # a head called outside of it would count as unused
        net = net._modules[name]  # type: ignore[assignment]
    return None


def is_transformer_wrapper(net: nn.Module) -> bool:
    """Whether it is x-transformers' own TransformerWrapper: not a subclass, ``forward`` not
    patched."""
    module = sys.modules.get("x_transformers.x_transformers")
    if module is None or type(net) is not module.TransformerWrapper:
        return False
    forward = type(net).forward
    return forward.__module__ == module.__name__ and not hasattr(forward, "__wrapped__")


def causal_module(net: nn.Module) -> nn.Module | None:
    """The first submodule that declares causal attention, by ``is_causal`` (transformers) or
    ``causal`` (x-transformers); None if none does."""
    for module in net.modules():
        if any(getattr(module, name, None) is True for name in ("is_causal", "causal")):
            return module
    return None


def batch_independent(net: nn.Module) -> bool:
    """Whether the net is batch-independent, as :class:`TokenNet` defines it; false for compiled
    nets, which would recompile for another batch size."""
    promise = net_attribute(net, "batch_independent", None)
    if promise is None:
        promise = is_transformer_wrapper(unwrap(net)) and not any(map(has_hooks, net.modules()))
    return bool(promise) and not any(map(is_compiled, net.modules()))


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of the module itself may run code compiled by torch.compile."""
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or "forward" in vars(module)  # perhaps a compiled one
    )
