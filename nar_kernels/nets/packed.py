"""What a net is called with so that it keeps apart the documents of a packed batch, or the blocks
of block diffusion.

Shapes: B rows, L their length; a flat batch `[N]` is one row of N.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nar_kernels.nets.adapter import first_position, innermost, refuse_shifted
from nar_kernels.nets.attention import dense_mask, flex_block_mask, varlen_arguments
from nar_kernels.nets.block_attention import block_mask, dense_block_mask
from nar_kernels.nets.keywords import declared_names
from nar_kernels.nets.mask_form import DENSE, FLEX, taken_mask
from nar_kernels.nets.prediction import Prediction, TrunkAndHead
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.masking import IGNORE_INDEX


def rows_of(batch: Corrupted) -> tuple[int, int]:
    """B and L."""
    shape = batch.input_ids.shape
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def packed_keywords(net: nn.Module, batch: Corrupted, given: dict[str, Any]) -> dict[str, Any]:
    """Keywords for the call of ``net`` on a batch of documents, beside those that are given.

    Raises:
        ValueError: the net declares none that keeps documents apart, and none is given.
    """
    where, shape = (batch.cu_seqlens, batch.lengths), rows_of(batch)

    # Of documents, and of the padding behind them, which they must not see.
    def begins() -> Any:
        return varlen_arguments(*where, shape=shape)["cu_seqlens_q"]

    return _keywords(
        net,
        given,
        "packed documents",
        dense=lambda: dense_mask(*where, shape=shape),
        flex=lambda: flex_block_mask(*where, shape=shape),
        apart={"cu_seqlens": begins},
        more={
            "max_seqlen": lambda: batch.max_seqlen,
            "position_ids": lambda: batch.position_ids.view(shape) + first_position(net),
            "pos": lambda: batch.position_ids.view(shape),
            "document_ids": lambda: batch.document_ids.view(shape),
        },
    )


class BlockInputs(NamedTuple):
    """What a net gets of a batch of block diffusion.

    Attributes:
        input_ids: `[B, 2 L]`: the noisy tokens x_t, then the clean ones x_0.
        position_ids: int64 `[B, 2 L]`: those of the noisy tokens, then the same again.
    """

    input_ids: Tensor
    position_ids: Tensor


def block_diffusion_inputs(corrupted: Corrupted) -> BlockInputs:
    """The inputs of a training step of block diffusion (BD3LM, arXiv:2503.09573), which denoises
    all blocks at once: each noisy block attends to the clean ones before it (:func:`block_mask`).
    The loss is that of the hidden states of the first half: ``masked_nll(hidden[:, :L], ...)``.

    Args:
        corrupted: of ``MaskingConfig(block_length=...)``, with labels and ``masked_indices``.
            Positions count from the beginning of each document. (Where a label was set to -100 the
            clean id is not known: the noisy one is repeated.)

    Raises:
        ValueError: the batch was made without these outputs.
    """
    shape = rows_of(corrupted)
    clean = corrupted.clean_ids
    clean = torch.where(clean == IGNORE_INDEX, corrupted.input_ids, clean)
    positions = corrupted.position_ids.view(shape)
    return BlockInputs(
        torch.cat([corrupted.input_ids.view(shape), clean.view(shape)], 1),
        torch.cat([positions, positions], 1),
    )


def block_keywords(
    net: nn.Module, batch: Corrupted, block_length: int, given: dict[str, Any]
) -> dict[str, Any]:
    """Keywords for the call of ``net`` on :func:`block_diffusion_inputs`, beside those that are
    given.

    Raises:
        ValueError: the net declares none for a mask of all pairs or of tiles, and none is given; or
            it takes no positions.
    """
    refuse_shifted(net, "block diffusion")
    rows, length = rows_of(batch)
    block_length = min(block_length, length)
    where: dict[str, Any] = {"device": batch.input_ids.device}
    if batch.documents is not None:
        where = {"cu_seqlens": batch.cu_seqlens, "lengths": batch.lengths, "rows": rows}
    positions = torch.arange(length, device=batch.input_ids.device).repeat(2)[None]
    if batch.documents is not None:
        positions = batch.position_ids.view(rows, length).repeat(1, 2)
    kwargs = _keywords(
        net,
        given,
        "blocks",
        dense=lambda: dense_block_mask(length, block_length, **where),
        flex=lambda: block_mask(length, block_length, **where),
        apart={},
        more={"position_ids": lambda: positions + first_position(net), "pos": lambda: positions},
    )
    if not (kwargs.keys() | given.keys()) & {"position_ids", "pos"}:
        raise ValueError(
            f"the forward of {type(innermost(net)).__name__} declares neither position_ids nor "
            "pos: block diffusion calls it with noisy and clean tokens at the same positions"
        )
    return kwargs


def predict_blocks(net: TrunkAndHead, batch: Corrupted, kwargs: dict[str, Any]) -> Prediction:
    """The prediction of a net at the noisy tokens of a batch.

    Args:
        kwargs: for the net, with those of :func:`block_keywords`.

    Raises:
        TypeError: the net returned something else than :class:`TokenNet` specifies.
    """
    ids = block_diffusion_inputs(batch).input_ids
    prediction = net(ids, kwargs)
    prediction.check(ids, batch.masking)
    noisy = prediction.output[:, : ids.shape[1] // 2]
    is_flat = batch.input_ids.dim() == 1
    return prediction._replace(output=noisy[0] if is_flat else noisy, embeddings=None)


def _keywords(
    net: nn.Module,
    given: dict[str, Any],
    what: str,
    *,
    dense: Callable[[], Tensor],
    flex: Callable[[], Any],
    apart: dict[str, Callable[[], Any]],
    more: dict[str, Callable[[], Any]],
) -> dict[str, Any]:
    """
    Args:
        dense, flex: make masks of all pairs, bool, and of tiles.
        apart: what else keeps them apart.
        more: what else is passed to a net that declares it.
    """
    declared = declared_names(net) or frozenset()
    choices: dict[str, Callable[[], Any]] = {FLEX: flex, **apart}
    choices |= {name: lambda: taken_mask(net, dense, flex) for name in DENSE}
    chosen = {}
    if not given.keys() & choices.keys():
        name = next((name for name in choices if name in declared), None)
        if name is None:
            raise ValueError(
                f"the batch holds {what}, but the forward of {type(innermost(net)).__name__} "
                f"declares none of {', '.join(choices)}, which keep them apart: add one, or pass "
                "what it takes in net_kwargs"
            )
        chosen[name] = choices[name]()
    for name, make in more.items():
        if name in declared and name not in given:
            chosen[name] = make()
    return chosen
