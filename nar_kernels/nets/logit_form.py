"""How the logits of a net follow from the product of its hidden states with the head's weight.

Shapes: V vocabulary, D width, C rows.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear


class LogitForm(NamedTuple):
    """Logits are ``cap * tanh(scale * (x + bias) / cap)``, with x what the head returns, or without
    a cap ``scale * (x + bias)``.

    Attributes:
        is_unmodified: the net returns the very tensor that its head does, which each call verifies.
        scale: a factor, such as Cohere's ``logit_scale``.
        cap: of the soft-capping (Gemma 2, arXiv:2408.00118), or None.
        bias: name of a parameter of the net ``[V]`` that is not the head's own, or None.
    """

    is_unmodified: bool = True
    scale: float = 1.0
    cap: float | None = None
    bias: str | None = None

    def __str__(self) -> str:
        parts = [f"scale {self.scale:g}"] if self.scale != 1 else []
        parts += [f"cap {self.cap:g}"] if self.cap is not None else []
        parts += [f"bias {self.bias}"] if self.bias is not None else []
        return ", ".join(parts) or "as they are"

    def capped(self, logits: Tensor) -> Tensor:
        """Logits, of those before the cap: float32 or wider where there is one."""
        if self.cap is None:
            return logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.cap * torch.tanh(wide / self.cap)

    def applied(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Logits, of what the head returns ``[..., V]``."""
        return self.capped(self.scale * (x if bias is None else x + bias))


@dataclass(frozen=True)
class CappedHead:
    """A linear head with soft-capped logits, from ``[C, D]`` to ``[C, V]``."""

    weight: Tensor
    bias: Tensor | None
    form: LogitForm

    def __call__(self, rows: Tensor) -> Tensor:
        x = linear(rows if self.form.scale == 1 else rows * self.form.scale, self.weight, self.bias)
        return self.form.capped(x)


UNMODIFIED = LogitForm()


def probe(num_logits: int, like: Tensor) -> Tensor:
    """What a head might return at one position, ``[1, 1, V]``: large enough for a cap to show, and
    not contiguous, so that a copy shows, too."""
    values = torch.linspace(-50, 50, num_logits, device=like.device, dtype=torch.float32)
    return values.to(like.dtype)[:, None].repeat(1, 2)[None, None, :, 0]


def find_form(
    forms: Iterable[LogitForm], returned: Tensor, probed: Tensor, bias: Tensor | None
) -> LogitForm | None:
    """The form in which a net ``returned`` logits when its head returned ``probed``: of those that
    are close enough, the closest."""
    if returned.shape != probed.shape:
        return None
    is_wide = probed.dtype in (torch.float32, torch.float64)
    tolerance = 1e-4 if is_wide else 3e-2
    found, least = None, math.inf
    for form in forms:
        expected = form.applied(probed, bias).float()
        error = (returned.float() - expected).abs()
        largest = error.amax().item()
        if largest < least and (error <= tolerance * (1 + expected.abs())).all():
            found, least = form, largest
    return found
