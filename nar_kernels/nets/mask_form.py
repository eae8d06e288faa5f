"""Which form of an attention mask a net takes."""

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from nar_kernels.nets.adapter import innermost, is_compiled
from nar_kernels.nets.hugging_face import attention_of, is_hugging_face, mask_for, takes_pairs
from nar_kernels.nets.modes import eval_mode, no_grad

# Keywords of which the first that a net declares is taken, as FlexAttention, x-transformers and
# Hugging Face call them.
FLEX, DENSE = "block_mask", ("attn_mask", "attention_mask")


_right: WeakSet[nn.Module] = WeakSet()  # nets that have been found to attend by a mask


def taken_mask(net: nn.Module, dense: Callable[[], Tensor], flex: Callable[[], Any]) -> Any:
    """A mask as the attention of the net takes it: Hugging Face's "eager" adds it to scores, where
    one of bools would mask nothing; its "flex_attention" takes tiles.

    Raises:
        ValueError: a model of Hugging Face that also looks at tokens by other means.
    """
    module: Any = innermost(net)
    if attention_of(module) == "flex_attention":
        return flex()
    _check(module)
    return mask_for(module, dense())


def _check(module: nn.Module) -> None:
    """Once for a net, by a call for three tokens."""
    if module in _right or not is_hugging_face(module) or any(map(is_compiled, module.modules())):
        return
    if any(p.is_meta for p in module.parameters()):
        return
    cause: Exception | None = None
    try:
        with eval_mode(module, module), no_grad():
            is_right = takes_pairs(module)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a net may do anything with what it does not expect
        is_right, cause = False, error
    if not is_right:
        raise ValueError(
            f"{type(module).__name__} does not attend by a mask of pairs [B, 1, L, L], which keeps "
            "documents, or blocks, apart: it may have recurrent layers, or a mask of its own. Use "
            "another net"
        ) from cause
    _right.add(module)
