"""Which form of an attention mask a net takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nar_kernels.nets.adapter import innermost

# Keywords of which the first that a net declares is taken, as FlexAttention, x-transformers and
# Hugging Face call them.
FLEX, DENSE = "block_mask", ("attn_mask", "attention_mask")


def taken_mask(net: nn.Module, dense: Callable[[], Tensor], flex: Callable[[], Any]) -> Any:
    """A mask as the attention of the net takes it: Hugging Face's "eager" adds it to scores, where
    one of bools would mask nothing; its "flex_attention" takes tiles."""
    module: Any = innermost(net)
    attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if attention == "flex_attention":
        return flex()
    mask = dense()
    if attention != "eager":
        return mask
    kind = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if torch.is_autocast_enabled(mask.device.type):
        kind = torch.get_autocast_dtype(mask.device.type)
    nothing = torch.zeros((), dtype=kind, device=mask.device)
    return nothing.masked_fill(~mask, torch.finfo(kind).min)
