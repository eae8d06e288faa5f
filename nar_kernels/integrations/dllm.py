"""dllm (github.com/ZHZisZZ/dllm): ``compute_loss`` of its MDLM and Dream trainers.

Shapes: B batch, L sequence length.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor, nn

from nar_kernels.integrations.draws import check_ids, masking_of, seed_of, time_range_of
from nar_kernels.nets.adapter import net_attribute
from nar_kernels.nets.prediction import TrunkAndHead
from nar_kernels.ops.cart import cart_weights
from nar_kernels.ops.corrupt import corrupt

Norm = Literal["token", "sequence", "batch"]
_CART = re.compile(r"cart\[geo_p:(0?\.\d+)\]")


def compute_loss(
    net: nn.Module,
    inputs: Mapping[str, Any],
    *,
    mask_token_id: int,
    scheduler: str = "linear",
    time_epsilon: float = 1e-3,
    loss_weight_type: str = "scheduler",
    loss_norm_type: Norm = "token",
    num_items_in_batch: float | Tensor | None = None,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """The loss of a masked diffusion language model on a batch, with logits at the masked tokens
    alone.

    Args:
        net: a :class:`~nar_kernels.TokenNet`, such as ``NetAdapter(model)`` of a Hugging Face
            model, with ``shift_logits=True`` for ``right_shift_logits``.
        inputs: ``input_ids`` ``[B, L]``, ``labels`` ``[B, L]`` (-100 at prompts and padding, which
            are not masked; elsewhere the ids), and ``attention_mask``, which the net gets, or None.
        mask_token_id: the mask token.
        scheduler: ``"linear"`` or ``"cosine"``, or any other mask schedule: alpha is one minus it.
        time_epsilon: the earliest time, in [0, 1).
        loss_weight_type: ``"scheduler"``: -alpha' / (1 - alpha); ``"uniform"``: 1; or
            ``"cart[geo_p:0.3]"``, Dream's (:func:`nar_kernels.cart_weights`).
        loss_norm_type: divide by the number of tokens that count, ``"token"``; by that of each
            sequence and by B, ``"sequence"``; or by B, ``"batch"``.
        num_items_in_batch: divide by this instead, where this is a part of a batch: how many tokens
            count in all of it, or, of the other two norms, how many sequences it has.
        seed, sample_ids: see :mod:`nar_kernels.integrations.draws`.

    Returns:
        A scalar, float32.
    """
    if loss_norm_type not in get_args(Norm):
        names = ", ".join(map(repr, get_args(Norm)))
        raise ValueError(f"loss_norm_type is {loss_norm_type!r}: it must be one of {names}")
    cart = _CART.fullmatch(loss_weight_type)
    if cart is None and loss_weight_type not in ("scheduler", "uniform"):
        raise ValueError(
            f"loss_weight_type is {loss_weight_type!r}: it must be 'scheduler', 'uniform' or "
            "'cart[geo_p:0.3]' with a number between 0 and 1"
        )
    check_ids("input_ids", inputs["input_ids"], 2)
    masking = masking_of(
        mask_token_id,
        num_tokens=net_attribute(net, "num_tokens"),
        schedule=scheduler,
        draw="bernoulli",
        times="uniform",
        time_range=time_range_of("time_epsilon", time_epsilon),
        weighting="elbo" if loss_weight_type == "scheduler" else "unit",
    )
    batch = corrupt(
        inputs["input_ids"],
        masking,
        seed=seed_of(seed),
        sample_ids=sample_ids,
        labels=inputs["labels"],
    )
    attention_mask = inputs.get("attention_mask")
    kwargs = {} if attention_mask is None else {"attention_mask": attention_mask}
    position_weight = None
    if cart is not None:
        assert batch.masked_indices is not None
        position_weight = cart_weights(batch.masked_indices, float(cart[1]))
    return TrunkAndHead(net)(batch.input_ids, kwargs).loss(
        batch,
        reduction=loss_norm_type,
        normalizer=num_items_in_batch,
        position_weight=position_weight,
    )
