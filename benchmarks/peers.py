"""Implementations under comparison: peers, run unmodified, and ours in the same harness."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from x_transformers import Encoder, TransformerWrapper
from x_transformers.nonautoregressive_wrapper import NonAutoregressiveWrapper

import nar_kernels


class _LargestLogits(TorchDispatchMode):
    """Tracks the most rows of any tensor created with ``vocabulary`` columns."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self._vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (self._vocabulary,):
                self.rows = max(self.rows, tensor.numel() // self._vocabulary)
        return out


class Masked(Exception):
    """Aborts x-transformers' forward once the masked input is made."""


class StopNet(TransformerWrapper):
    def forward(self, *args, **kwargs):
        raise Masked


def x_transformers_masking(
    length: int, num_tokens: int, mask_id: int, device: str = "cpu"
) -> Callable[[Tensor], None]:
    """The masking code of x-transformers' `NonAutoregressiveWrapper.forward` at its default
    arguments (times, exact-k by argsort, keep and random subsets, masked input), by running that
    method on a net that aborts it. No windows, no validation, no labels."""
    net = StopNet(
        num_tokens=num_tokens, max_seq_len=length, attn_layers=Encoder(dim=8, depth=1, heads=1)
    )
    wrapper = NonAutoregressiveWrapper(net, mask_id=mask_id).to(device)

    def run(batch: Tensor) -> None:
        try:
            wrapper(batch)
        except Masked:
            pass

    return run


TRUNK, PEER, OURS, COMPILED = "trunk", "x-transformers", "ours", "ours, compiled"
PASSES, STEP = "forward + backward", "whole step"
# Learning rate so small that weights stay as initialised: the peer's loss has no minimum.
RATE = 1e-6


class Setting(NamedTuple):
    """V, B, L, and the size of the net."""

    num_tokens: int
    batch: int
    length: int
    dim: int = 256
    depth: int = 4
    heads: int = 4
    flash: bool = False


def make_net(setting: Setting, device: str) -> TransformerWrapper:
    """A net with fixed initial weights (seed 0)."""
    torch.manual_seed(0)
    return TransformerWrapper(
        num_tokens=setting.num_tokens,
        max_seq_len=setting.length,
        attn_layers=Encoder(
            dim=setting.dim,
            depth=setting.depth,
            heads=setting.heads,
            attn_flash=setting.flash,
            verbose=False,  # no advice to use larger nets
        ),
    ).to(device)


class Training:
    """Training of a net in one of the wrappers (or alone): net, optimiser, and a batch."""

    def __init__(self, who: str, setting: Setting, device: str) -> None:
        self.who, self.setting, self.device = who, setting, device
        self.net = make_net(setting, device)
        self.draw(setting.batch)
        if who == TRUNK:
            return
        wrapper = NonAutoregressiveWrapper if who == PEER else nar_kernels.NonAutoregressiveWrapper
        self.wrapper = wrapper(self.net, mask_id=setting.num_tokens - 1)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=RATE, **({} if who == PEER else {"fused": True})
        )
        if who == COMPILED:
            self.net.compile()

    def draw(self, batch: int) -> None:
        shape = batch, self.setting.length
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.setting.num_tokens - 1, shape, generator=generator)
        self.ids = ids.to(self.device)
        self.upstream = None
        if self.who == TRUNK:
            self.upstream = torch.randn(*shape, self.setting.dim, generator=generator).to(
                self.device
            )

    def forward(self) -> Tensor:
        on_gpu = self.device == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            if self.who == TRUNK:
                return self.net(self.ids, return_embeddings=True)
            return self.wrapper(self.ids).loss

    def passes(self) -> None:
        out = self.forward()
        out.backward(None if self.upstream is None else self.upstream.to(out.dtype))
        self.net.zero_grad()

    def step(self) -> None:
        with record_function("forward"):
            loss = self.forward()
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def calls(self) -> dict[str, Callable[[], None]]:
        return {PASSES: self.passes} | ({} if self.who == TRUNK else {STEP: self.step})

    def makes_all_logits(self) -> bool:
        """Whether the net's head runs at all positions in a forward pass."""
        setting = self.setting
        with _LargestLogits(
            setting.num_tokens
        ) as largest:  # not a hook: the wrapper would detect it
            self.forward()
        return largest.rows >= setting.batch * setting.length
