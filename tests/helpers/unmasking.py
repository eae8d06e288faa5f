"""Shared by tests of `unmask`: logits that are hard to filter, and a comparison of backends."""

import torch
from torch import Tensor

from nar_kernels import unmask
from nar_kernels.ops.unmask import Unmasked
from tests.helpers.devices import device_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASK = 3


def draw(logits: Tensor, **args) -> Unmasked:
    slots = torch.arange(len(logits), device=logits.device)
    defaults = dict(mask_id=MASK, seed=1, noise_slots=slots)
    return unmask(logits, **{**defaults, **args})


def awkward_logits(rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Ties, zeros of both signs, what is not finite, and rows of nothing else."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(rows, vocabulary, generator=generator)
    logits[1] = logits[1].round()
    logits[2] = logits[2].sign() * 0.0
    logits[3, ::2] = -torch.inf
    logits[4, ::3] = torch.nan
    logits[5, vocabulary // 2] = torch.inf
    logits[6] = -torch.inf
    logits[7] *= 1e38
    return logits.to(dtype)


def nearly_equal_rows(length: int) -> Tensor:
    """Ties, and logits that differ by a bit."""
    nearly = 1 + torch.randint(0, 9, (length,)) * 2.0**-23
    rows = (torch.zeros(length), nearly, -nearly, nearly.where(nearly > 1, -torch.inf))
    return torch.stack(rows)


def assert_equals_reference(logits: Tensor, *, backend: str, **args) -> None:
    expected = draw(logits, backend="reference", **args)
    moved = {"noise_slots": torch.arange(len(logits)), **args, "logits": logits}
    for name, value in moved.items():
        moved[name] = value.to(device_of(backend)) if isinstance(value, Tensor) else value
    got = draw(backend=backend, **moved)
    for name in got._fields:
        assert torch.equal(getattr(got, name).cpu(), getattr(expected, name)), (name, args)
