"""What the host knows of a batch without asking the device: how many positions it masks."""

import torch
from torch import Tensor

from nar_kernels.ops.arguments import CorruptArgs
from nar_kernels.ops.backends import cpp
from nar_kernels.ops.dispatch import host_address
from nar_kernels.ops.masking import MaskingConfig


def num_strata(masking: MaskingConfig, slots: range | None, global_batch: int) -> int:
    """How many strata of time there are, if each sample has one of its own; else 0.

    Args:
        slots: of the samples, up to whole steps, if known.
    """
    if not slots or not masking.stratified:
        return 0
    return global_batch if slots[0] // global_batch == slots[-1] // global_batch else 0


def count_on_host(a: CorruptArgs, masking: MaskingConfig, slots: range | None) -> Tensor | None:
    """int64 ``[B]`` on the CPU: how many positions each row masks, without a sync; None where that
    depends on device memory.

    Args:
        slots: of the samples, up to whole steps, if known.
    """
    on_device = (a.step, a.maskable, a.never_mask, a.seed_tensor)
    if slots is None or any(tensor is not None for tensor in on_device):
        return None
    if cpp is None or torch.compiler.is_compiling():
        return None
    sample_ids = None
    if slots.step != 1 or a.sample_ids is not None:
        sample_ids = torch.arange(slots.start, slots.stop, slots.step, device="cpu")
    counts = torch.empty(a.batch, dtype=torch.int64, device="cpu")
    cpp.count_masked(
        a.batch,
        a.seq_len,
        0 if sample_ids is None else host_address(sample_ids),
        a.first_sample,
        a.global_batch,
        a.exact,
        a.stratified,
        a.seed,
        host_address(masking.table.ratio),
        host_address(counts),
        torch.get_num_threads(),
    )
    return counts
