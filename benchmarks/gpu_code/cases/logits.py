"""What depends on the logits in `unmask`, from simulations of rows like those of `bench_unmask`."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import LOGIT_STD, TEMPERATURE

NUM_ROWS = 10
SIGN = {torch.float32: 1 << 31, torch.bfloat16: 1 << 15, torch.float16: 1 << 15}
INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


def random_logits(rng: np.random.Generator, vocabulary: int, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(LOGIT_STD * rng.standard_normal(vocabulary)).to(dtype)


def keys_of(logits: Tensor) -> np.ndarray:
    """Integers in the order of the logits: `key_of_bits` of `csrc/unmask/gpu/logits.h`."""
    sign = SIGN[logits.dtype]
    width = torch.int32 if logits.dtype == torch.float32 else torch.int16
    bits = logits.view(width).numpy().astype(np.int64) & (2 * sign - 1)
    return np.where(bits & sign, 2 * sign - bits, sign + bits)


def kept_of(keys: np.ndarray, k: int) -> np.ndarray:
    """Which are among the k largest; of equal ones those that come first."""
    kept = np.zeros(len(keys), bool)
    kept[np.argsort(-keys, kind="stable")[:k]] = True
    return kept


# ---- what a warp comes to with its tiles, in CUDA C++

TABLE_MOST_GAP = 21.5  # ExpTable::kMostGap
MOST_NOISE = 23.0  # Sampler::kMostNoise
SLACK = 1e-3  # Sampler::kSlack


class Trips(NamedTuple):
    """How often a warp of ``unmask`` comes to what depends on the data, for each of its tiles.

    Attributes:
        taken: tiles with logits that the filter keeps, and that matter.
        offers: of noise that may win.
        made: rounds in which noise is made.
        low: tiles with logits that the table of exponentials leaves out.
        low_rounds: rounds in which the exponentials of those are made.
    """

    taken: float
    offers: float
    made: float
    low: float
    low_rounds: float


def trips(
    vocabulary: int, warps: int, size: int, dtype: torch.dtype, k: int, table_size: int
) -> Trips:
    """If all warps go on at one pace and learn of a score with their next tile.

    Args:
        size: logits of a lane.
    """
    rng = np.random.default_rng(0)
    rounds = -(-vocabulary // (warps * 32 * size))
    total = np.zeros(5)
    for _ in range(NUM_ROWS):
        logits = random_logits(rng, vocabulary, dtype)
        kept = kept_of(keys_of(logits), k)
        x = np.full(rounds * warps * 32 * size, -np.inf)
        x[:vocabulary] = np.where(kept, logits.double().numpy(), -np.inf)
        largest = x.max()
        word = rng.integers(0, 1 << 32, len(x))
        u = (word + 0.5) * 2.0**-32
        score = (x - largest) / TEMPERATURE - np.log(-np.log1p(-u))
        best = float(score[x.argmax()])
        lowest_gap = min(-26.0, (best - MOST_NOISE) * TEMPERATURE)
        least = max(largest, TABLE_MOST_GAP - largest) * 2.0 ** (-table_size / 128)
        shape = rounds, warps, 32, size
        gap = (x - largest).reshape(shape)
        of_round = (a.reshape(shape) for a in (np.abs(x) < least, _bound_on_noise(word), score))
        for gaps, low, noise, scores in zip(gap, *of_round, strict=True):  # [warps, 32, size]
            lanes_low = low.sum(2)
            of_lane = gaps.max(2) / TEMPERATURE + noise.max(2) > best
            open_ = (gaps / TEMPERATURE + noise > best).sum(2)
            total += [
                (gaps.max(2) >= lowest_gap).any(1).sum(),
                of_lane.any(1).sum(),
                open_.max(1).sum(),
                lanes_low.any(1).sum(),
                lanes_low.max(1).sum(),
            ]
            best = max(best, scores.max())
    num_tiles = -(-vocabulary // (32 * size))
    return Trips(*(total / (NUM_ROWS * num_tiles)).tolist())


def _bound_on_noise(word: np.ndarray) -> np.ndarray:
    """`Sampler::at_most`, without the lift."""
    bits = word.astype(np.float32).view(np.int32).astype(np.float64)
    return (127 + 32) * np.log(2) + SLACK - 2.0**-23 * np.log(2) * bits


# ---- Triton


def made_blocks(vocabulary: int, dtype: torch.dtype, k: int, block: int) -> float:
    """The share of blocks whose noise is made."""
    rng = np.random.default_rng(0)
    blocks = -(-vocabulary // block)
    made = 0
    for _ in range(NUM_ROWS):
        logits = random_logits(rng, vocabulary, dtype)
        kept = kept_of(keys_of(logits), k)
        x = np.full(blocks * block, -np.inf)
        x[:vocabulary] = np.where(kept, logits.double().numpy(), -np.inf)
        u = rng.random(len(x))
        gap = (x - x.max()) / TEMPERATURE
        bound = (gap - np.log(u)).reshape(blocks, block).max(1)
        score = (gap - np.log(-np.log1p(-u))).reshape(blocks, block).max(1)
        to_beat = -np.inf
        for most, best in zip(bound, score, strict=True):
            if most + SLACK >= to_beat:
                made += 1
                to_beat = max(to_beat, best)
    return made / (NUM_ROWS * blocks)


class RadixSelect(NamedTuple):
    """Digits that `_find_top_k` looks at, and blocks in which it looks for the last tie."""

    digits: float
    tie_blocks: float


def radix_select(vocabulary: int, dtype: torch.dtype, k: int, block: int) -> RadixSelect:
    rng = np.random.default_rng(0)
    most, widened = (4, 16) if dtype == torch.bfloat16 else (8, 0)
    digits = tie_blocks = 0
    for _ in range(NUM_ROWS):
        logits = random_logits(rng, vocabulary, dtype)
        keys = keys_of(logits) << widened
        keys = 2**32 - 1 - keys  # as Triton's, in reverse order
        prefix, wanted, equal, digit = 0, k, k + 1, 0
        while digit < most and wanted < equal:
            digit += 1
            upper = keys >> (32 - 4 * digit)
            of_digit = np.bincount((upper - prefix * 16)[(upper >> 4) == prefix], minlength=16)
            up_to = np.cumsum(of_digit)
            found = int((up_to < wanted).sum())
            wanted -= int(up_to[found] - of_digit[found])
            equal = int(of_digit[found])
            prefix = prefix * 16 + found
        digits += digit
        if wanted < equal:
            columns = np.flatnonzero(keys >> (32 - 4 * digit) == prefix)
            tie_blocks += int(columns[wanted - 1]) // block + 1
    return RadixSelect(digits / NUM_ROWS, tie_blocks / NUM_ROWS)
