"""``bernoulli_mask`` in Triton: a coin for each position, at given ratios."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nar_kernels.ops.arguments import BernoulliArgs
from nar_kernels.ops.kernels.launcher import Launcher
from nar_kernels.ops.kernels.random import random_words

# Positions of a program.
BLOCK = 1024
_VARYING = ["length", "seed", "stream"]


@triton.jit(do_not_specialize=_VARYING)
def bernoulli_kernel(
    mask, bounds, sample_ids, length, seed: tl.int64, stream,
    BY_POSITION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``BLOCK`` positions of a row. Arguments as in ``BernoulliArgs``."""
    per_row = tl.cdiv(length, BLOCK)
    program = tl.program_id(0)
    b, first = (program // per_row).to(tl.int64), program % per_row * BLOCK
    i = first + tl.arange(0, BLOCK)
    words = random_words(seed, stream, tl.load(sample_ids + b), first, BLOCK)
    begin = b * length
    bound = tl.load(bounds + b)
    if BY_POSITION:
        bound = tl.load(bounds + begin + i, mask=i < length, other=0)
    tl.store(mask + begin + i, (words.to(tl.int64) < bound).to(tl.uint8), mask=i < length)


_launch = Launcher(bernoulli_kernel, _VARYING)


def bernoulli_triton(mask: Tensor, a: BernoulliArgs) -> None:
    """Fills ``mask``."""
    programs = len(a.bounds) * triton.cdiv(a.length, BLOCK)
    if programs == 0:
        return
    by_position = a.bounds.shape[1] > 1
    arguments = mask.view(torch.uint8), a.bounds, a.sample_ids, a.length, a.seed, a.stream
    options = {"BY_POSITION": by_position, "BLOCK": BLOCK, "num_warps": 4}
    _launch(programs, arguments, (mask.get_device(), by_position), lambda: options)
