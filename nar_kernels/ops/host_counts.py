"""What the host knows of a batch without asking the device: how many positions it masks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nar_kernels.ops.arguments import CorruptArgs
from nar_kernels.ops.backends import cpp
from nar_kernels.ops.dispatch import host_address
from nar_kernels.ops.documents import Documents
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.ops.views import Pairing, Views, view_tables


def num_strata(masking: MaskingConfig, slots: range | None, global_batch: int) -> int:
    """How many strata of time there are, if each sample has one of its own; else 0.

    Args:
        slots: of the samples, up to whole steps, if known.
    """
    if not slots or not masking.stratified:
        return 0
    return global_batch if slots[0] // global_batch == slots[-1] // global_batch else 0


class HostCounts:
    """int64 ``[B]`` on the CPU: how many positions each sample masks, in each view. Counted when
    first asked for, since only an unknown number of rows needs it, and a draw takes the host as
    long as a GPU."""

    def __init__(self, count: Callable[[], Tensor]) -> None:
        self._count = count
        self._counts: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._counts is None:
            self._counts = self._count()
            del self._count  # and what it needs
        return self._counts

    def __getitem__(self, index: Any) -> "HostCounts":
        return HostCounts(lambda: self()[index])

    def __reduce__(self) -> tuple[Any, ...]:
        return HostCounts.of, (self().clone(),)  # not the storage of a whole batch

    @classmethod
    def of(cls, counts: Tensor) -> "HostCounts":
        return cls(lambda: counts)


def count_on_host(
    a: CorruptArgs, masking: MaskingConfig, slots: range | None, documents: Documents | None = None
) -> HostCounts | None:
    """The counts of a batch without a sync; None where they depend on device memory.

    Args:
        slots: of the samples, up to whole steps, if known.
        documents: which the samples are, if they have spans.
    """
    on_device = (
        a.step, a.maskable, a.loss_mask, a.prompt_lengths, a.never_mask, a.seed_tensor,
    )  # fmt: skip
    if any(tensor is not None for tensor in on_device) or (slots is None and documents is None):
        return None
    if cpp is None or a.view_times is not None or torch.compiler.is_compiling():
        return None
    count = cpp.count_masked
    listed = slots is None or slots.step != 1 or a.sample_ids is not None
    # Not ``a`` itself, which would keep its tensors.
    shape, slot = (a.batch, a.seq_len), (a.first_sample, a.global_batch)
    blocks = (a.block_length, a.num_blocks, a.blocks_per_slot)
    views = Views(a.views, a.first_view, Pairing(a.pairing))
    draw = (a.exact, a.stratified, a.seed)

    def counts() -> Tensor:
        sample_ids = spans = None
        if documents is not None:
            sample_ids = documents.ids_on_host
            spans = documents.spans(torch.device("cpu"))
        elif listed:
            assert slots is not None
            sample_ids = torch.arange(slots.start, slots.stop, slots.step, device="cpu")
        lists = [0 if x is None else host_address(x) for x in (spans, sample_ids)]
        made = torch.empty(views.num * shape[0], dtype=torch.int64, device="cpu")
        ratio = view_tables(masking, views, made.device).ratio
        tables = host_address(ratio), host_address(made)
        count(*shape, *blocks, *views, *lists, *slot, *draw, *tables, torch.get_num_threads())
        return made

    return HostCounts(counts)
