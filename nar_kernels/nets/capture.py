"""Captures the input of a net's linear head, without computing logits."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nar_kernels.nets.logit_form import probe


class HeadMismatchError(TypeError):
    """The output of a net is not the output of its head."""


class CaptureHeadInput(TorchFunctionMode):
    """Skips the product with a head's weight, in this thread only, and captures its input.

    In place of logits the net gets NaN for one position, from which it can be told whether the net
    returns it unmodified.

    Args:
        head: the head, or an embedding whose weight it shares.
        is_unmodified: the net is to return the very tensor that it gets. If false, it may modify
            it, also in place.
        probes: give it :func:`probe` in place of NaN.
        bias: a parameter of which to tell whether the net adds it afterwards.
    """

    def __init__(
        self,
        head: nn.Module,
        *,
        is_unmodified: bool = True,
        probes: bool = False,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._weight: Any = head.weight
        self._is_unmodified, self._probes, self._bias = is_unmodified, probes, bias
        self.hidden: Tensor | None = None
        self.num_calls = 0
        self.adds_bias = False
        self.given: Tensor | None = None
        self._versions: tuple[int, int] | None = None
        self._data_ptr = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.linear and len(args) > 1 and args[1] is self._weight:
            self.num_calls += 1
            self.hidden = args[0]
            with torch.inference_mode(False):  # inference tensors have no version
                self.given = self._make(args[0])
            self._versions, self._data_ptr = self._snapshot()
            return self.given
        if self._bias is not None and any(arg is self._bias for arg in args):
            self.adds_bias = True
        return func(*args, **(kwargs or {}))

    def _make(self, hidden: Tensor) -> Tensor:
        num_logits = self._weight.shape[0]
        if self._probes:
            return probe(num_logits, hidden)
        shape = (*hidden.shape[:-2], 1, num_logits)
        if not self._is_unmodified:
            return torch.full(shape, math.nan, dtype=hidden.dtype, device=hidden.device)
        # Expanded, so that most in-place writes raise.
        nan = torch.full((), math.nan, dtype=hidden.dtype, device=hidden.device)
        return nan.expand(shape)

    def _snapshot(self) -> tuple[tuple[int, int] | None, int]:
        """Version counters and data pointer, which reveal writes to the logits or hidden states."""
        assert self.hidden is not None and self.given is not None
        if torch.compiler.is_compiling():  # which cannot trace versions
            return None, 0
        hidden_version = 0 if self.hidden.is_inference() else self.hidden._version
        logits_version = self.given._version if self._is_unmodified else 0
        return (logits_version, hidden_version), self.given.data_ptr()

    def is_output(self, logits: Tensor) -> bool:
        """Whether ``logits`` is the output of the head, called once, or made of that."""
        if self.num_calls != 1 or self.given is None:
            return False
        if not self._is_unmodified:
            unwritten = self._versions is None or self._snapshot()[0] == self._versions
            return unwritten and logits.shape == self.given.shape
        if logits is not self.given:
            return False
        if self._versions is not None:
            return self._snapshot() == (self._versions, self._data_ptr)
        # A compiled net has no versions: unmodified logits are NaN. (Looking is a sync; it is not
        # possible if this function is compiled as well.)
        return torch.compiler.is_compiling() or bool(logits.isnan().all())
