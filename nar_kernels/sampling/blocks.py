"""Calls of a block-causal net for one block after the other, with keys and values of those before
or with their ids.

Shapes: B batch, L sequence length, n positions of a call, R candidate positions, given as "rows":
indices into the flat ``[B * L]``.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from nar_kernels.nets.adapter import innermost, is_compiled
from nar_kernels.nets.cache import Span, can_keep, keep_nothing_yet
from nar_kernels.nets.modes import eval_mode, no_grad
from nar_kernels.nets.prediction import TrunkAndHead
from nar_kernels.sampling.config import SamplingConfig
from nar_kernels.sampling.members import Members


class BlockCalls:
    """What a block-causal net is called with for the block that is decoded.

    Args:
        net: a :class:`nar_kernels.nets.adapter.TokenNet`.
        block_length: of the net.
        device: of the net.
        cached: keep the keys and values of the blocks before. Otherwise the net gets their ids.

    Attributes:
        cached: as above.
        arguments: of the net, beside its ids.

    Raises:
        ValueError: the net takes neither a cache nor a mask.
    """

    def __init__(
        self, net: nn.Module, block_length: int, device: torch.device, *, cached: bool
    ) -> None:
        self._kept, self.cached = keep_nothing_yet(net), cached
        self._span = Span(0, 0, block_length, device)
        self.arguments: dict[str, Any] = {}

    def enter(self, ids: Tensor, block: slice, kwargs: dict[str, Any]) -> None:
        """Goes on to another block, whose predecessors are final.

        Args:
            ids: int64 ``[B, L]``.
            kwargs: of the net.
        """
        begin = self._span.begin
        if self.cached and block.start > begin:
            finished = self._span._replace(end=block.start)
            self._kept.store(ids[:, begin : block.start], finished, kwargs)
            begin = block.start
        self._span = self._span._replace(begin=begin, end=block.stop)
        self.arguments = self._kept.arguments(self._span)

    def of(self, ids: Tensor) -> Tensor:
        """``[B, n]`` of ``[B, L]``: what the net is called with."""
        return ids[:, self._span.begin : self._span.end]

    def rows(self, rows: Tensor, length: int) -> Tensor:
        """Indices into the flat ``[B * n]``: int64 ``[R]``, rows of the block."""
        begin, end = self._span[:2]
        return rows - rows // length * (length - (end - begin)) - begin

    def narrow(self, index: Tensor) -> None:
        """From now on these sequences only: int64 ``[N]``, their places among those until now."""
        if self._span.begin > 0:
            self._kept.select(index)


def with_blocks_of(config: SamplingConfig, block_length: int | None) -> SamplingConfig:
    """The config for a net that is block-causal in blocks of ``block_length``; None for others.

    Raises:
        ValueError: the config has other blocks, or none where it needs some, or a strategy that
            does not go with them.
    """
    if block_length is None and not config.cache:
        return config
    if block_length is None:
        if config.block_length is None:
            raise ValueError(
                "cache is True, but nothing says in which blocks the net is causal: give it its "
                "block_length"
            )
    elif config.block_length not in (None, block_length):
        raise ValueError(
            f"block_length is {config.block_length}, but the net has blocks of {block_length}: "
            "leave it out"
        )
    else:
        config = replace(config, block_length=block_length)
    if config.strategy == "critic":
        raise ValueError(
            "strategy is 'critic', but a critic would look at the blocks after that of a "
            "block-causal net: use another one, such as 'confidence'"
        )
    return config


def make_block_calls(
    net: nn.Module,
    config: SamplingConfig,
    kwargs: dict[str, Any],
    batch: int,
    *,
    num_tokens: int,
    max_seq_len: int,
    device: torch.device,
) -> Callable[[], BlockCalls]:
    """Makes the calls of a block-causal net, with a cache if the config says so; if it leaves that
    open, if the net can have one.

    Args:
        config: from :func:`with_blocks_of`.
        kwargs: of the net, for ``batch`` sequences.

    Raises:
        ValueError: the config asks for a cache, and the net cannot have one; the net takes no mask;
            ``kwargs`` have what the calls are given.

    Warns:
        UserWarning: the config leaves it open, and the net should be able to, but is not.
    """
    assert config.block_length is not None
    taken = sorted(keep_nothing_yet(net).names & kwargs.keys())
    if taken:
        raise ValueError(
            f"{taken[0]} was given for the net, but a block-causal net is given its own for each "
            "block: leave it out"
        )
    problem = None
    if config.cache or (config.cache is None and can_keep(net)):
        problem = _problem(net, config.block_length, kwargs, batch, num_tokens, max_seq_len, device)
    if problem is not None and config.cache:
        raise ValueError(f"cache is True, but {problem}: leave it out, or use cache=False")
    if problem is not None:
        warnings.warn(f"decoding without a cache, since {problem}", stacklevel=3)
    cached = problem is None and config.cache is not False and can_keep(net)
    return partial(BlockCalls, net, config.block_length, device, cached=cached)


# Of a net: for which blocks, and with keywords of which names, its cache has been found right.
_right: WeakKeyDictionary[nn.Module, set[tuple[int, frozenset[str]]]] = WeakKeyDictionary()


def _problem(
    net: nn.Module,
    block_length: int,
    kwargs: dict[str, Any],
    batch: int,
    num_tokens: int,
    max_seq_len: int,
    device: torch.device,
) -> str | None:
    """Why a net cannot have a cache; None if it can.

    Nets have too many options to know of each whether it minds, so it is tried, once for a net: one
    sequence of up to three blocks must have the same logits with a cache and without. (That is also
    when the head of a :class:`NetAdapter` is verified, which takes calls of a single sequence.)
    """
    name = type(innermost(net)).__name__
    if not can_keep(net):
        return (
            f"{name} is neither of x-transformers, nor a decoder of Hugging Face, nor a "
            "nar_kernels.CachingNet"
        )
    if any(map(is_compiled, net.modules())):
        return f"{name} is compiled, and would be again for each block"
    key, right = (block_length, frozenset(kwargs)), _right.setdefault(net, set())
    begin = min(2, (max_seq_len - 1) // block_length) * block_length
    if key in right or begin == 0 or batch == 0:
        return None
    kwargs = Members(np.arange(batch) == 0, device).kwargs(kwargs)
    block = slice(begin, min(begin + block_length, max_seq_len))
    ids = torch.arange(max_seq_len, device=device)[None] * 7919 % num_tokens
    with_and_without = []
    try:
        with eval_mode(net, net), no_grad():
            for cached in (True, False):
                calls = BlockCalls(net, block_length, device, cached=cached)
                calls.enter(ids, block, kwargs)
                prediction = TrunkAndHead(net)(calls.of(ids), {**kwargs, **calls.arguments})
                rows = calls.rows(torch.arange(block.start, block.stop, device=device), max_seq_len)
                chunks = [chunk.clone() for chunk in prediction.logits_at(rows)]
                with_and_without.append(torch.cat(chunks))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{name} fails with one ({str(error) or type(error).__name__})"
    cached_logits, logits = with_and_without
    tolerance = 0.005 if logits.dtype.itemsize >= 4 else 0.05
    difference = (cached_logits - logits).abs().amax().item()
    if difference > tolerance * logits.abs().amax().item():  # not if NaN, which decoding reports
        return (
            f"the logits of {name} differ by {difference:.2g} with one and without: it has options "
            "that look across blocks, or does not take the mask"
        )
    right.add(key)
    return None
