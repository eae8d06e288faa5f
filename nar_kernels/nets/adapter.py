"""What :class:`nar_kernels.NonAutoregressiveWrapper` needs of a network, and an adapter to it.

Shapes: B batch, L sequence length, V vocabulary, D width.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from nar_kernels.checks import as_int
from nar_kernels.nets import hugging_face
from nar_kernels.nets.capture import CaptureHeadInput, HeadMismatchError
from nar_kernels.nets.logit_form import UNMODIFIED, LogitForm, find_form, probe
from nar_kernels.nets.plain import has_hooks, is_plain, is_plain_linear, is_plain_tensor


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


class NetAdapter(nn.Module):
    """Adapts any module from ids to logits to :class:`TokenNet`. Of models of Hugging Face it knows
    the rest: ``NetAdapter(net)``.

    Args:
        net: called as ``net(ids, **kwargs)``. Returns the logits ``[B, L, V]``, an object with
            ``.logits``, a tuple that begins with them, or, where the head is known, an object with
            ``.last_hidden_state``.
        num_tokens: V, rows of the net's embedding, the mask token's included. Default: those of
            ``net.get_input_embeddings()``.
        max_seq_len: L, the length to train and generate at. Default: what ``net.config`` says.
        head: the linear layer of ``net`` that outputs the logits, or the embedding whose weight
            does. With it, logits are computed at the masked rows only. ``"auto"``:
            ``net.get_output_embeddings()``, if there is one. None: logits at all positions.

            Where a model of Hugging Face scales or soft-caps the output of its head, or adds a
            bias, by what its configuration says, this is done at the masked rows, too. If a net
            does anything else with it (hooks, a LoRA adapter), or the layer is not a plain
            ``nn.Linear``, logits are computed at all positions.
        bidirectional: call decoders of Hugging Face so that attention looks both ways. (Where a
            mask of pairs is passed, as in block diffusion, that counts.)
        shift_logits: the net predicts a token at the position before it, as decoders do and Dream
            (arXiv:2508.15487) still does. The first is predicted at its own. In packed documents,
            the first of each, if the net takes ``position_ids``.

    A net that computes a loss of its own in training mode, as SDAR does, stays in evaluation mode.

    There is no ``emb_dim``, so ``self_cond`` and ``self_token_critic`` are not supported.

    Raises:
        TypeError: ``num_tokens`` or ``max_seq_len`` is missing, and the net does not say it.
        ValueError: ``head`` is not a submodule of ``net``, a size is below 1, or ``net`` is a
            decoder that cannot look both ways.

    >>> net = NetAdapter(BertForMaskedLM(config))
    >>> model = NonAutoregressiveWrapper(net, mask_id=tokenizer.mask_token_id)
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        num_tokens: int | None = None,
        max_seq_len: int | None = None,
        head: nn.Module | Literal["auto"] | None = "auto",
        bidirectional: bool = True,
        shift_logits: bool = False,
    ) -> None:
        super().__init__()
        is_found = head == "auto"
        module = hugging_face.output_embeddings(net) if isinstance(head, str) else head
        names = [name for name, part in net.named_modules() if part is module]
        if module is not None and not names and not is_found:
            raise ValueError(
                f"head is a {type(module).__name__} that is no submodule of {type(net).__name__}: "
                "pass the module of the net whose output is the logits"
            )
        self.net = net
        self.num_tokens = _size(net, "num_tokens", num_tokens, hugging_face.embedding_rows)
        self.max_seq_len = _size(net, "max_seq_len", max_seq_len, hugging_face.max_length)
        self._head_name = names[0] if names else None
        # By the names of the keyword arguments; None where it is none that is known.
        self._forms: dict[frozenset[str], LogitForm | None] = {}
        self.shift_logits = shift_logits
        self.first_position = hugging_face.first_position(net)
        self._stays_in_eval = hugging_face.computes_own_loss(net)
        if self._stays_in_eval:
            net.eval()
        self._unmasking: hugging_face.Unmasking | None = None
        if bidirectional and hugging_face.is_hugging_face(net) and hugging_face.is_decoder(net):
            self._unmasking = hugging_face.Unmasking(net)

    def train(self, mode: bool = True) -> "NetAdapter":
        """As of ``nn.Module``, but a net like SDAR, which in training mode returns a loss of its
        own, stays in evaluation mode."""
        super().train(mode)
        if self._stays_in_eval:
            self.net.eval()
        return self

    @property
    def looks_both_ways(self) -> bool:
        """Whether it makes a decoder look both ways."""
        return self._unmasking is not None

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
        is_embedding = type(module) is nn.Embedding and is_plain_tensor(module.weight)
        return module if module is not None and (is_embedding or is_plain_linear(module)) else None

    def forward(self, ids: Tensor, *, return_embeddings: bool = False, **kwargs: Any) -> Tensor:
        """Logits ``[B, L, V]``, or with ``return_embeddings`` the input of the head ``[B, L, D]``.

        Raises:
            HeadMismatchError: there is no head, or its output is not what the net returns. (A net
                that operates on the logits may raise another error.)
        """
        if return_embeddings:
            form = self._forms.get(frozenset(kwargs)) or UNMODIFIED
            return self.hidden_states(ids, form, kwargs)
        out = self._call(ids, kwargs)
        hidden = _last_hidden_state(out)
        if hidden is None:
            return self._shifted(self._logits(out), kwargs)
        head: Any = self.output_head
        if head is None:
            raise TypeError(
                f"{type(self.net).__name__} returned hidden states, and its head is unknown or not "
                "plain: pass a net that returns logits, or head, the linear layer that makes them"
            )
        hidden = self._shifted(hidden, kwargs)
        return nn.functional.linear(hidden, head.weight, getattr(head, "bias", None))

    def hidden_states(self, ids: Tensor, form: LogitForm, kwargs: dict[str, Any]) -> Tensor:
        """The input of the head ``[B, L, D]``, of a net whose logits have this form.

        Raises:
            HeadMismatchError: as of :meth:`forward`.
        """
        head_input = CaptureHeadInput(self._head(), is_unmodified=form.is_unmodified)
        with head_input:
            out = self._call(ids, kwargs)
            hidden = _last_hidden_state(out)
        if hidden is None:
            if not head_input.is_output(self._logits(out)):
                raise HeadMismatchError(
                    f"{type(self.net).__name__} does not return the output of its head"
                )
            hidden = head_input.hidden
        assert hidden is not None
        return self._shifted(hidden, kwargs)

    def find_logit_form(self, ids: Tensor, kwargs: dict[str, Any]) -> LogitForm:
        """What the net does with the output of its head, on one sequence ``[1, L]``.

        Raises:
            HeadMismatchError: none of what it may do by its configuration.
        """
        if not hugging_face.is_hugging_face(self.net):
            return UNMODIFIED  # which each call verifies
        head = self._head()
        name = hugging_face.added_bias(self.net, head)
        bias = None if name is None else self.net.get_parameter(name)
        head_input = CaptureHeadInput(head, is_unmodified=False, probes=True, bias=bias)
        with head_input:
            out = self._call(ids, kwargs)
        if _last_hidden_state(out) is not None:
            return UNMODIFIED
        logits, given = self._logits(out), head_input.given
        if given is None:
            return UNMODIFIED
        probed = probe(given.shape[-1], given)
        if logits is given and torch.equal(logits, probed):
            return UNMODIFIED
        if not head_input.adds_bias:
            name = bias = None
        forms = hugging_face.logit_forms(self.net, name)
        form = find_form(forms, logits, probed, bias) if head_input.is_output(logits) else None
        if form is None:
            raise HeadMismatchError(
                f"{type(self.net).__name__} does something else with the output of its head than "
                "its configuration says"
            )
        return form

    def _head(self) -> nn.Module:
        head = self.output_head
        if head is None:
            raise HeadMismatchError("return_embeddings needs a NetAdapter with a plain linear head")
        return head

    def _call(self, ids: Tensor, kwargs: dict[str, Any]) -> Any:
        if self._unmasking is not None:
            kwargs = kwargs | self._unmasking.arguments(ids, kwargs)
        return self.net(ids, **kwargs)

    def _shifted(self, of_positions: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Logits or hidden states ``[B, L, ...]``, of the position before each."""
        if not self.shift_logits:
            return of_positions
        shifted = torch.cat([of_positions[:, :1], of_positions[:, :-1]], 1)
        positions = kwargs.get("position_ids")
        if positions is None:
            return shifted
        return torch.where((positions == self.first_position)[..., None], of_positions, shifted)

    def head_is_last(self, names: Iterable[str]) -> bool | None:
        """Whether the net returns the output of its head, in a form that is known, when called with
        keywords of these names; None if not verified yet."""
        names = frozenset(names)
        return self._forms[names] is not None if names in self._forms else None

    def logit_form(self, names: Iterable[str]) -> LogitForm:
        """That form, once verified."""
        return self._forms.get(frozenset(names)) or UNMODIFIED

    def set_logit_form(self, names: Iterable[str], form: LogitForm | None) -> None:
        """Sets the result of :meth:`logit_form`; None: it is none that is known."""
        self._forms[frozenset(names)] = form

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


def _size(net: nn.Module, name: str, value: int | None, find: Callable[[nn.Module], Any]) -> int:
    found = find(net) if value is None else value
    if found is None:
        means = "rows of its embedding" if name == "num_tokens" else "length of your sequences"
        raise TypeError(
            f"{type(net).__name__} does not say its {name}: wrap it as NetAdapter(net, "
            f"{name}=<{means}>)"
        )
    size = as_int(name, found)
    if size < 1:
        raise ValueError(f"{name} is {size}: it must be at least 1")
    return size


def _last_hidden_state(out: Any) -> Tensor | None:
    """Of what a net without a head of its own returned."""
    if isinstance(out, Tensor) or getattr(out, "logits", None) is not None:
        return None
    return getattr(out, "last_hidden_state", None)


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
    ``causal`` (x-transformers); None if none does, or it is made to look both ways."""
    inner = unwrap(net)
    if isinstance(inner, NetAdapter) and inner.looks_both_ways:
        return None
    for module in net.modules():
        if any(getattr(module, name, None) is True for name in ("is_causal", "causal")):
            return module
    return None


def first_position(net: nn.Module) -> int:
    """The ``position_ids`` of the first token of a document."""
    return int(getattr(unwrap(net), "first_position", 0))


def refuse_shifted(net: nn.Module, what: str) -> None:
    """Raises ValueError if a net has ``shift_logits``, with which ``what`` does not go."""
    if getattr(unwrap(net), "shift_logits", False):
        raise ValueError(
            f"the NetAdapter has shift_logits, with which {what} does not go: a block would be "
            "predicted from the positions of the one before; leave one of them out"
        )


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
