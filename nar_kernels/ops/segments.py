"""Documents of a packed batch: where they begin, as FlashAttention has it (``cu_seqlens``)."""

import torch
from torch import Tensor

_INTEGERS = (torch.int32, torch.int64)


def check_cu_seqlens(cu_seqlens: Tensor, total: int) -> None:
    """Raises unless ``cu_seqlens`` is int32 or int64 `[n + 1]` with n > 0 and, on the CPU, ascends
    from 0 to ``total``, the positions of the batch."""
    check_integers("cu_seqlens", cu_seqlens, "[n + 1], n > 0")
    if len(cu_seqlens) < 2:
        raise ValueError("cu_seqlens has no document: it must be [0, ..., T]")
    if not can_read(cu_seqlens):
        return
    if (is_less := cu_seqlens.diff() < 0).any():
        at = int(is_less.nonzero()[0])
        raise ValueError(
            f"cu_seqlens[{at + 1}] is {int(cu_seqlens[at + 1])}, after {int(cu_seqlens[at])}: "
            "documents must begin in order"
        )
    if (ends := (int(cu_seqlens[0]), int(cu_seqlens[-1]))) != (0, total):
        raise ValueError(
            f"cu_seqlens goes from {ends[0]} to {ends[1]}: it must go from 0 to {total}, "
            "the positions of the batch"
        )


def check_integers(name: str, tensor: object, wanted: str, size: int | None = None) -> None:
    """Raises unless ``tensor`` is int32 or int64 and one-dimensional, of ``size`` if given."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in _INTEGERS:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} is {got}: it must be a tensor of int32 or int64, {wanted}")
    if tensor.ndim != 1 or size not in (None, len(tensor)):
        raise ValueError(f"{name} is {list(tensor.shape)}: it must be {wanted}")


def can_read(tensor: Tensor) -> bool:
    """Whether its values may be looked at: a GPU would be waited for, a trace has none."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def segment_ids(bounds: Tensor, total: int) -> Tensor:
    """int32 `[total]`: ascending, the same within a segment alone. Segments begin at ``bounds``,
    which ends with ``total``; some may be empty."""
    begins = torch.zeros(total + 1, dtype=torch.int32, device=bounds.device)
    begins.index_add_(0, bounds, torch.ones_like(bounds, dtype=torch.int32))
    return begins.cumsum(0, dtype=torch.int32)[:-1]
