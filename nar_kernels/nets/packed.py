"""What a net is called with so that it keeps the documents of a packed batch apart."""

from collections.abc import Callable
from typing import Any

from torch import nn

from nar_kernels.nets.adapter import innermost
from nar_kernels.nets.attention import dense_mask, flex_block_mask, varlen_arguments
from nar_kernels.nets.keywords import declared_names
from nar_kernels.ops.corrupted import Corrupted


def _rows(batch: Corrupted) -> tuple[int, int]:
    """B and L; a flat batch is one row."""
    shape = batch.input_ids.shape
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def _dense(batch: Corrupted) -> Any:
    return dense_mask(batch.cu_seqlens, batch.lengths, shape=_rows(batch))


def _blocks(batch: Corrupted) -> Any:
    return flex_block_mask(batch.cu_seqlens, batch.lengths, shape=_rows(batch))


def _begins(batch: Corrupted) -> Any:
    """Of documents, and of the padding behind them, which they must not see."""
    return varlen_arguments(batch.cu_seqlens, batch.lengths, shape=_rows(batch))["cu_seqlens_q"]


def _positions(batch: Corrupted) -> Any:
    return batch.position_ids.view(_rows(batch))


# Keywords that keep documents apart, the first that a net declares is taken: masks of all pairs,
# as x-transformers and Hugging Face call them; of blocks; where documents begin.
_APART: dict[str, Callable[[Corrupted], Any]] = {
    "block_mask": _blocks,
    "cu_seqlens": _begins,
    "attn_mask": _dense,
    "attention_mask": _dense,
}
# What else is passed to a net that declares it.
_MORE: dict[str, Callable[[Corrupted], Any]] = {
    "max_seqlen": lambda batch: batch.max_seqlen,
    "position_ids": _positions,
    "pos": _positions,
    "document_ids": lambda batch: batch.document_ids.view(_rows(batch)),
}


def packed_keywords(net: nn.Module, batch: Corrupted, given: dict[str, Any]) -> dict[str, Any]:
    """Keywords for the call of ``net`` on a batch of documents, beside those that are given.

    Raises:
        ValueError: the net declares none that keeps documents apart, and none is given.
    """
    declared = declared_names(net) or frozenset()
    chosen = {}
    if not given.keys() & _APART.keys():
        name = next((name for name in _APART if name in declared), None)
        if name is None:
            names = ", ".join(_APART)
            raise ValueError(
                f"the batch holds packed documents, but the forward of "
                f"{type(innermost(net)).__name__} declares none of {names}, which keep them apart: "
                "add one, or pass what it takes in net_kwargs"
            )
        chosen[name] = _APART[name](batch)
    for name, make in _MORE.items():
        if name in declared and name not in given:
            chosen[name] = make(batch)
    return chosen
