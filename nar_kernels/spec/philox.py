"""Philox4x32-10 counter-based RNG in PyTorch: the readable specification of all randomness here.

Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).

A random word is a pure function of ``(seed, stream, sample, position)``; there is no generator
state:

* key     = the 64-bit seed as ``(low, high)``
* counter = ``(position // 4, sample_low, sample_high, stream)``; ``position % 4`` picks the word.

``sample`` is a global sample slot, never a rank or a worker, so results do not depend on how a
batch is sharded. All 32-bit words are held in int64 tensors, in [0, 2**32).
"""

from enum import IntEnum

import torch
from torch import Tensor

from nar_kernels.checks import as_int

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_U32 = 0xFFFFFFFF

# Up to this size a permutation is the ranks of random words, hence uniform over all n! orders.
EXACT_PERMUTATION_MAX = 256
FEISTEL_ROUNDS = 24


class Stream(IntEnum):
    """Independent random streams, one per use. Values are frozen: results depend on them."""

    TIME = 0
    STRATUM = 1
    MASK_KEY = 2
    RANDOM_TOKEN = 3
    CORRUPTION = 4
    WINDOW_ORDER = 5
    DECODE_NOISE = 7
    CRITIC_NOISE = 8
    GENERATOR_SEED = 9
    WINDOW_PHASE = 10
    ROW_ORDER = 11
    RANDOM_LENGTH = 12
    REMASK_COUNT = 13
    CLASS_DROPOUT = 14


# A view of a sample has streams of its own: the number of the view is above that of the stream.
VIEW_SHIFT = 8
MAX_VIEWS = 1 << 32 - VIEW_SHIFT


def of_view(stream: Stream, view: int) -> int:
    """The stream of a use in one of several views of a sample; that of view 0 is the use's own."""
    return stream + (view << VIEW_SHIFT)


def _round(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    c0, c1, c2, c3 = counter
    # int64 products wrap modulo 2**64: the bits are those of the unsigned 64-bit product.
    p0, p1 = c0 * _M0, c2 * _M1
    return [
        ((p1 >> 32) & _U32) ^ c1 ^ key[0],
        p1 & _U32,
        ((p0 >> 32) & _U32) ^ c3 ^ key[1],
        p0 & _U32,
    ]


def philox4x32(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Ten rounds of Philox4x32. ``counter``: four int64 tensors of 32-bit words that broadcast."""
    for r in range(10):
        counter = _round(counter, ((key[0] + r * _W0) & _U32, (key[1] + r * _W1) & _U32))
    return counter


def words(seed: int, stream: int, samples: Tensor, positions: Tensor) -> Tensor:
    """Random words of ``(sample, position)`` pairs.

    Args:
        seed: 64-bit integer; taken modulo 2**64.
        stream: one of :class:`Stream`, or of a view.
        samples: int64 global sample slots (broadcasts with ``positions``).
        positions: int64 in [0, 2**34).

    Returns:
        int64 tensor of the broadcast shape, uniform in [0, 2**32).
    """
    samples, positions = torch.broadcast_tensors(samples, positions)
    counter = [
        positions >> 2,
        samples & _U32,
        (samples >> 32) & _U32,
        torch.full_like(samples, int(stream)),
    ]
    out = philox4x32(counter, (seed & _U32, (seed >> 32) & _U32))
    return torch.stack(out, -1).gather(-1, (positions & 3).unsqueeze(-1)).squeeze(-1)


def derived_seed(seed: int, use: Stream, slot: int = 0) -> int:
    """A 64-bit seed derived from ``seed`` for one ``use`` and ``slot``."""
    position = 2 * int(use) + torch.arange(2, device="cpu")
    sample = torch.tensor(slot, device="cpu")
    low, high = words(seed, Stream.GENERATOR_SEED, sample, position).tolist()
    return high << 32 | low


def noise_generator(
    seed: int, use: Stream, device: torch.device | str = "cpu", slot: int = 0
) -> torch.Generator:
    """A fresh ``torch.Generator`` on ``device``, seeded for one ``use`` and ``slot``.

    Philox mixes the seed first: PyTorch's CPU generator uses only 32 bits of its seed.
    """
    return torch.Generator(device).manual_seed(derived_seed(seed, use, slot))


def _mix(x: Tensor) -> Tensor:
    """32-bit integer hash (Wellons' lowbias32)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _U32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _U32
    return x ^ (x >> 16)


def _feistel(x: Tensor, keys: list[int], bits: int) -> Tensor:
    """Unbalanced xor Feistel network of ``FEISTEL_ROUNDS``: a bijection on ``[0, 2**bits)``."""
    right_bits = bits - bits // 2
    left, right = x >> right_bits, x & ((1 << right_bits) - 1)
    for r in range(0, FEISTEL_ROUNDS, 2):
        left = left ^ (_mix(right ^ keys[r]) & ((1 << (bits // 2)) - 1))
        right = right ^ (_mix(left ^ keys[r + 1]) & ((1 << right_bits) - 1))
    return left << right_bits | right


def permute(index: Tensor, n: int, *, seed: int, stream: int, round: int) -> Tensor:
    """Applies a random permutation of ``[0, n)`` to ``index``; O(1) memory for n > 256.

    Up to n = 256 the permutation is the rank of n random words: uniform over all orders. Above, it
    is a 24-round Feistel network on the next power of two, with cycle walking until the result is
    below n. Both are exact bijections for every n.

    Args:
        index: int64, any shape, in [0, n).
        n: size of the domain, at least 1.
        seed, stream: as in :func:`words`.
        round: selects the permutation: an epoch, or a step. Used as the sample slot.

    Returns:
        int64 tensor like ``index``.

    Raises:
        IndexError: an index outside [0, n).
    """
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < n:
        raise IndexError(f"index is outside the permutation of [0, {n})")
    slot = torch.tensor([round], device=index.device)
    if n <= EXACT_PERMUTATION_MAX:
        keys = words(seed, stream, slot, torch.arange(n, device=index.device))
        rank = keys.argsort(stable=True).argsort()
        return rank[index]
    bits = (n - 1).bit_length()
    round_keys = words(seed, stream, slot, torch.arange(FEISTEL_ROUNDS, device=index.device))
    out = _feistel(index, round_keys.tolist(), bits)
    while bool((outside := out >= n).any()):
        out = torch.where(outside, _feistel(out, round_keys.tolist(), bits), out)
    return out


def signed_seed(seed: int) -> int:
    """A 64-bit seed as the signed integer with the same bits."""
    return (as_int("seed", seed) + (1 << 63)) % (1 << 64) - (1 << 63)
