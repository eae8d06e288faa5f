"""``cart_weights``: loss weights by how much of its context a masked position sees (CART, Dream 7B,
arXiv:2508.15487).

Shapes: B batch, L sequence length, T positions of a flat batch, n documents.
"""

import torch
from torch import Tensor

from nar_kernels.checks import as_float
from nar_kernels.ops.segments import check_cu_seqlens, segment_ids

_DTYPES = (torch.float32, torch.float64)


def cart_weights(
    masked_indices: Tensor,
    p: float = 0.8,
    *,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Half the sum of ``p * (1 - p) ** (distance - 1)`` over the unmasked positions before and
    behind a masked one, which is in [0, 1]: 1 if no other is masked and both sides are long.

    Rows, and documents, see nothing of each other. The work is proportional to the number of
    positions, and on a GPU nothing waits for the device.

    Args:
        masked_indices: bool `[B, L]` or `[T]`, as of a batch: True where a token is masked.
        p: of the geometric distribution, in (0, 1]; the larger, the nearer is what counts.
        cu_seqlens: int32 or int64 `[n + 1]`: where in the flattened batch each document begins, and
            at last B L or T, ascending from 0; from :func:`~nar_kernels.varlen_arguments`
            (``"cu_seqlens_q"``), where padding is a segment of its own, not context. Default: a row
            is a document.
        dtype: of the weights, float32 or float64.

    Returns:
        ``dtype``, of the shape of ``masked_indices``; 0 where that is False.

    Raises:
        TypeError: ``masked_indices`` is not bool, or ``cu_seqlens`` not of integers; ``p`` is no
            number.
        ValueError: a wrong shape, device or ``dtype``, ``p`` outside (0, 1]; on the CPU also
            documents that are not in order, or not all of the batch.
    """
    if not isinstance(masked_indices, Tensor) or masked_indices.dtype != torch.bool:
        is_tensor = isinstance(masked_indices, Tensor)
        got = masked_indices.dtype if is_tensor else type(masked_indices).__name__
        raise TypeError(f"masked_indices is {got}: it must be a bool tensor, [B, L] or [T]")
    if masked_indices.ndim not in (1, 2):
        shape = list(masked_indices.shape)
        raise ValueError(f"masked_indices is {shape}: it must be [B, L] or [T]")
    if not 0 < (p := as_float("p", p)) <= 1:  # also NaN
        raise ValueError(f"p is {p}: it must be in (0, 1], such as 0.8")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}: it must be torch.float32 or torch.float64")
    documents = _documents(masked_indices, cu_seqlens)
    clean = (~masked_indices).to(dtype)
    # Forwards, and backwards: what is before a position then is what was behind it.
    clean = torch.stack((clean, clean.flip(-1)))
    if documents is not None:
        documents = torch.stack((documents, documents.flip(-1)))
    sums = torch.zeros_like(clean)
    sums[..., 1:] = _earlier(clean, documents, 1)
    # A sum over `reach` positions, and that from `reach` before, are one over twice as many.
    reach, decay = 1, 1 - p
    while reach < clean.shape[-1] and decay >= torch.finfo(dtype).tiny:
        sums[..., reach:] += decay * _earlier(sums, documents, reach)
        reach, decay = 2 * reach, decay * decay
    return (sums[0] + sums[1].flip(-1)) * (p / 2) * masked_indices


def _documents(masked_indices: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """int32, of the shape of ``masked_indices``: the document of each position."""
    if cu_seqlens is None:
        return None
    total = masked_indices.numel()
    check_cu_seqlens(cu_seqlens, total)
    if cu_seqlens.device != masked_indices.device:
        raise ValueError(
            f"cu_seqlens is on {cu_seqlens.device}, but masked_indices on {masked_indices.device}: "
            "move one to the other"
        )
    return segment_ids(cu_seqlens, total).view(masked_indices.shape)


def _earlier(values: Tensor, documents: Tensor | None, distance: int) -> Tensor:
    """``values`` of ``distance`` positions before, from position ``distance`` on; 0 where another
    document is."""
    earlier = values[..., :-distance]
    if documents is None:
        return earlier
    return earlier * (documents[..., distance:] == documents[..., :-distance])
