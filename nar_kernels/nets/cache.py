"""Keys and values of finished blocks, kept between calls of a block-causal net.

In a block-causal net each position attends to all of its own block and of the blocks before, which
are counted from position 0 (BD3LM, arXiv:2503.09573; SDAR, arXiv:2510.06303; Fast-dLLM v2,
arXiv:2509.26328; LLaDA 2, arXiv:2512.15745). What a block's keys and values are is therefore
settled once its ids are, whatever is decoded after it.

Shapes: B sequences, n positions of a call, c positions whose keys and values are kept.
"""

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nar_kernels.nets.adapter import (
    first_position,
    innermost,
    is_transformer_wrapper,
    refuse_shifted,
    unwrap,
)
from nar_kernels.nets.block_attention import block_mask, dense_block_mask
from nar_kernels.nets.hugging_face import mask_for, stores_on_request
from nar_kernels.nets.keywords import declared_names
from nar_kernels.nets.mask_form import DENSE, FLEX, taken_mask


class BlockCache(Protocol):
    """What a :class:`CachingNet` keeps."""

    def select(self, index: Tensor) -> None:
        """Goes on with some of the sequences: int64 ``[N]``, their places in the batch."""


class CachingNet(Protocol):
    """Protocol of a block-causal :class:`TokenNet` that keeps keys and values by itself.

    x-transformers' ``TransformerWrapper`` and decoders of Hugging Face do not need it.
    """

    def new_cache(self) -> BlockCache:
        """A cache that is empty."""

    def __call__(
        self,
        ids: Tensor,
        *,
        cache: BlockCache,
        store: bool,
        positions: Tensor,
        attn_mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """What the net returns without a cache, at the n positions of ``ids``.

        Args:
            ids: int64 ``[B, n]``, which follow those in the cache: one block, or several.
            cache: keys and values of c positions, to which these attend as well.
            store: keys and values of ``ids`` join the cache, and what is returned is not used.
                Otherwise the cache stays as it is.
            positions: int64 ``[n]``, from c to c + n.
            attn_mask: bool ``[n, c + n]``: True where a query attends to a key; None: everywhere.
        """


class Span(NamedTuple):
    """The positions of a call, which follow those that are kept.

    Attributes:
        begin, end: c, and c + n. Blocks begin at multiples of ``block_length``, as the span does.
    """

    begin: int
    end: int
    block_length: int
    device: torch.device

    def positions(self) -> Tensor:
        """int64 ``[n]``."""
        return torch.arange(self.begin, self.end, device=self.device)

    def mask(self) -> Tensor | None:
        """bool ``[n, c + n]``: True where a query attends to a key; None if everywhere."""
        if self.end - self.begin <= self.block_length:
            return None
        # The span has two blocks or more, so the block is not too long.
        whole = dense_block_mask(self.end, self.block_length, noisy=False, device=self.device)
        return whole[0, 0, self.begin :]


class Kept(Protocol):
    """Keys and values of one kind of net; none at first.

    Attributes:
        names: of all arguments that the net may be given.
    """

    @property
    def names(self) -> frozenset[str]: ...

    def arguments(self, span: Span) -> dict[str, Any]:
        """What the net is called with, beside ids ``[B, n]``, to predict them."""

    def store(self, ids: Tensor, span: Span, kwargs: dict[str, Any]) -> None:
        """Keeps the keys and values of ids ``[B, n]``, by a call of the net."""

    def select(self, index: Tensor) -> None:
        """As of :class:`BlockCache`."""


class _OfXTransformers:
    """Keys join the attention of a block as additional ones, which takes them as they are: so what
    is kept is rotated already. (x-transformers' own ``cache`` is for causal attention.)"""

    names = frozenset(("attn_mask", "pos", "self_attn_additional_kv"))

    def __init__(self, net: nn.Module) -> None:
        self._net, self._kept = net, list[tuple[Tensor, Tensor]]()

    def arguments(self, span: Span) -> dict[str, Any]:
        arguments: dict[str, Any] = {"attn_mask": span.mask()}
        if span.begin > 0:
            arguments |= {"pos": span.positions(), "self_attn_additional_kv": self._kept}
        return arguments

    def store(self, ids: Tensor, span: Span, kwargs: dict[str, Any]) -> None:
        _, found = self._net(
            ids, return_embeddings_and_intermediates=True, **kwargs, **self.arguments(span)
        )
        rotary = unwrap(self._net).attn_layers.rotary_pos_emb
        new = []
        for layer in found.attn_intermediates:
            if layer.layer_type != "a":  # of another sequence, by cross-attention
                continue
            keys, values = layer.cached_kv
            if rotary is not None:
                frequencies, _ = rotary(span.positions())
                keys = sys.modules["x_transformers.x_transformers"].apply_rotary_pos_emb(
                    keys, frequencies
                )
            new.append((keys, values))
        old = self._kept or [(keys[..., :0, :], values[..., :0, :]) for keys, values in new]
        self._kept = [
            (torch.cat([a, c], -2), torch.cat([b, d], -2))
            for (a, b), (c, d) in zip(old, new, strict=True)
        ]

    def select(self, index: Tensor) -> None:
        self._kept = [(k.index_select(0, index), v.index_select(0, index)) for k, v in self._kept]


class _OfHuggingFace:
    """Decoders with ``past_key_values``. Their own mask is causal, so each call has another one:
    four-dimensional, which they take as it is."""

    names = frozenset(("attention_mask", "position_ids", "past_key_values", "use_cache"))

    def __init__(self, net: nn.Module) -> None:
        self._net, self._cache = net, _dynamic_cache()()
        # Our cache knows by itself what to store.
        self._more = {"store_kv": True} if stores_on_request(innermost(net)) else {}
        # A call that stores needs no logits, and this is the fewest that there can be.
        names = declared_names(net) or frozenset()
        self._storing = {"logits_to_keep": 1} if "logits_to_keep" in names else {}

    def arguments(self, span: Span) -> dict[str, Any]:
        mask = span.mask()
        if mask is None:
            shape = span.end - span.begin, span.end
            mask = torch.ones(shape, dtype=torch.bool, device=span.device)
        return {
            "attention_mask": mask_for(innermost(self._net), mask[None, None]),
            "position_ids": span.positions()[None] + first_position(self._net),
            "past_key_values": self._cache,
            "use_cache": True,
            **self._more,
        }

    def store(self, ids: Tensor, span: Span, kwargs: dict[str, Any]) -> None:
        self._cache.stores = True
        try:
            self._net(ids, **kwargs, **self.arguments(span), **self._storing)
        finally:
            self._cache.stores = False

    def select(self, index: Tensor) -> None:
        self._cache.batch_select_indices(index)


@lru_cache(maxsize=1)
def _dynamic_cache() -> Any:
    from transformers import DynamicCache  # the net is of it

    class BlockDynamicCache(DynamicCache):
        """Grows only where ``stores`` is set; otherwise attention gets what it would hold, and the
        same call may be made again."""

        stores = False

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **more: Any
        ) -> tuple[Tensor, Tensor]:
            if self.stores:
                return super().update(key_states, value_states, layer_idx, *args, **more)
            if self.get_seq_length(layer_idx) == 0:
                return key_states, value_states
            layer: Any = self.layers[layer_idx]
            return (
                torch.cat([layer.keys, key_states], -2),
                torch.cat([layer.values, value_states], -2),
            )

    return BlockDynamicCache


class _OfCachingNet:
    """A :class:`CachingNet`."""

    names = frozenset(("cache", "store", "positions", "attn_mask"))

    def __init__(self, net: nn.Module) -> None:
        self._net, self._cache = net, innermost(net).new_cache()

    def arguments(self, span: Span) -> dict[str, Any]:
        return {
            "cache": self._cache,
            "store": False,
            "positions": span.positions(),
            "attn_mask": span.mask(),
        }

    def store(self, ids: Tensor, span: Span, kwargs: dict[str, Any]) -> None:
        self._net(ids, **kwargs, **self.arguments(span) | {"store": True})

    def select(self, index: Tensor) -> None:
        self._cache.select(index)


class _Nothing:
    """Of a net that keeps nothing, but takes a mask."""

    def __init__(self, net: nn.Module) -> None:
        names = declared_names(net) or frozenset()
        masks = FLEX, *DENSE
        name = next((name for name in masks if name in names), None)
        if name is None:
            raise ValueError(
                f"the forward of {type(innermost(net)).__name__} declares none of "
                f"{', '.join(masks)}, by which a block is kept from attending to later ones: add "
                "one, or make it a nar_kernels.CachingNet"
            )
        self._net, self._name, self.names = net, name, frozenset((name,))

    def arguments(self, span: Span) -> dict[str, Any]:
        size = span.end, min(span.block_length, span.end)
        dense = partial(dense_block_mask, *size, noisy=False, device=span.device)
        flex = partial(block_mask, *size, noisy=False, device=span.device)
        if self._name == FLEX:
            return {FLEX: flex()}
        return {self._name: taken_mask(self._net, dense, flex)}

    def store(self, ids: Tensor, span: Span, kwargs: dict[str, Any]) -> None:
        raise ValueError(f"{type(innermost(self._net)).__name__} keeps nothing: ask can_keep")

    def select(self, index: Tensor) -> None:
        pass


def _kind(net: nn.Module) -> Callable[[nn.Module], Kept]:
    names = declared_names(net) or frozenset()
    if is_transformer_wrapper(unwrap(net)) and "self_attn_additional_kv" in names:
        return _OfXTransformers
    if hasattr(innermost(net), "new_cache"):
        return _OfCachingNet
    if "transformers" in sys.modules and _OfHuggingFace.names <= names:
        return _OfHuggingFace
    return _Nothing


def can_keep(net: nn.Module) -> bool:
    """Whether it is known how to keep the keys and values of a net: of x-transformers'
    ``TransformerWrapper``, a decoder of Hugging Face, or a :class:`CachingNet`."""
    return _kind(net) is not _Nothing


def keep_nothing_yet(net: nn.Module) -> Kept:
    """The keys and values of a net, of which there are none.

    Raises:
        ValueError: the net takes neither a cache nor a mask, or has ``shift_logits``.
    """
    refuse_shifted(net, "decoding block by block with a cache")
    return _kind(net)(net)
