"""Which form of an attention mask a net takes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nar_kernels.nets.adapter import innermost
from nar_kernels.nets.hugging_face import attention_of, mask_for

# Keywords of which the first that a net declares is taken, as FlexAttention, x-transformers and
# Hugging Face call them.
FLEX, DENSE = "block_mask", ("attn_mask", "attention_mask")


def taken_mask(net: nn.Module, dense: Callable[[], Tensor], flex: Callable[[], Any]) -> Any:
    """A mask as the attention of the net takes it: Hugging Face's "eager" adds it to scores, where
    one of bools would mask nothing; its "flex_attention" takes tiles."""
    module: Any = innermost(net)
    if attention_of(module) == "flex_attention":
        return flex()
    return mask_for(module, dense())
