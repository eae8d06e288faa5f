"""``mask_tokens`` in Triton: a coin for each position, at given ratios."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nar_kernels.ops.arguments import MaskTokensArgs
from nar_kernels.ops.kernels.launcher import Launcher
from nar_kernels.ops.kernels.random import random_words

# Positions of a program.
BLOCK = 1024

_VARYING = ["mask_id", "length", "seed", "stream"]


@triton.jit(do_not_specialize=_VARYING)
def mask_tokens_kernel(
    ids, mask, tokens, bounds, sample_ids, mask_id, length, seed: tl.int64, stream,
    BY_POSITION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``BLOCK`` positions of a row. Arguments as in ``MaskTokensArgs``."""
    per_row = tl.cdiv(length, BLOCK)
    program = tl.program_id(0)
    b, first = (program // per_row).to(tl.int64), program % per_row * BLOCK
    words = random_words(seed, stream, tl.load(sample_ids + b), first, BLOCK)
    i = first + tl.arange(0, BLOCK)
    is_inside, place = i < length, b * length + i
    if BY_POSITION:
        bound = tl.load(bounds + place, mask=is_inside, other=0)
    else:
        bound = tl.load(bounds + b)
    is_masked = words.to(tl.int64) < bound
    token = tl.load(tokens + place, mask=is_inside, other=0)
    tl.store(ids + place, tl.where(is_masked, mask_id, token), mask=is_inside)
    tl.store(mask + place, is_masked.to(tl.uint8), mask=is_inside)


_launch = Launcher(mask_tokens_kernel, _VARYING)


def launch_options(by_position: bool) -> dict[str, int]:
    return {"BY_POSITION": by_position, "BLOCK": BLOCK, "num_warps": 4}


def mask_tokens_triton(outputs: tuple[Tensor, Tensor], a: MaskTokensArgs) -> None:
    """Fills ``outputs``: the ids and the mask."""
    batch, length = a.tokens.shape
    programs = batch * triton.cdiv(length, BLOCK)
    if programs == 0:
        return
    ids, mask = outputs
    by_position = a.bounds.shape[1] > 1
    arguments = (
        ids, mask.view(torch.uint8), a.tokens, a.bounds, a.sample_ids, a.mask_id, length, a.seed,
        a.stream,
    )  # fmt: skip
    variant = ids.get_device(), ids.dtype, by_position
    _launch(programs, arguments, variant, lambda: launch_options(by_position))
