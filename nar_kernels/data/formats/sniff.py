"""The width of raw ids by statistics of their bytes, where nothing else says it.

Measured with text, digits, ids by Zipf's law and uniform ones of vocabularies from 100 to 256000,
and ids of a byte-level BPE on source code: 200 files each of 4 KiB, 100 of 16 KiB, 20 of 256 KiB, 3
of 2 MiB.

* No ids were taken for those of another width.
* Found at 4 KiB: text as uint8 in 98 %, int64 in all, ids of 16 and 32 bits in 10 to 100 %; from
  16 KiB on 97 % or more; from 256 KiB on all.
* Never found, and so errors: uint16 from 61440 on, or uniform up to 60000; uint8 with both 0 and
  248 or more, or uniform in all values; uint8 in rows of a multiple of 8 bytes that differ by
  column, such as digits; big-endian ids, and those of 24 bits.
* What is no ids, such as floats, sound, programs and random bytes: nothing from 256 KiB on. Below,
  pieces of programs were taken for uint8 in up to 11 %, and loud sound for uint16 in up to 2 %. Of
  8662 files of a Linux system, text was found as uint8, and one matrix of int32.
"""

import os
import warnings
from pathlib import Path

import numpy as np

_MIN_BYTES = 4096
_BLOCKS = 64
_PERIODS = (3, 5, 7, 8)  # bytes
_PERIOD = 3 * 5 * 7 * 8  # of all of them: blocks begin at multiples
_BLOCK_BYTES = 5 * _PERIOD

# Bits of information that the place of a byte gives about its value, chance taken off.
_ALIKE, _DIFFERENT = 0.05, 0.1

_NOT_IN_UTF_8 = 0xF8
_MAX_HIGH_BYTES = 0xF0  # of ids in 2 bytes: beyond, they could as well be negative
_MAX_HIGH_BYTE = 15  # of ids in 4 or 8 bytes, from bit 16 on: vocabularies below 2**20
_MAX_ENTROPY = 7.9  # bits: beyond, bytes are compressed, encrypted or random
_MIN_ENTROPY = 0.5  # of the lowest byte: below, nearly all ids are the same


def sniff_dtype(path: Path) -> str | None:
    """The dtype of a file of ids of at least 4 KiB if its bytes leave no doubt, with a warning."""
    dtype = dtype_by_statistics(_sample(path))
    if dtype is not None:
        warnings.warn(
            f"{path} does not say what dtype its tokens have; by statistics of its bytes it is "
            f'{dtype}: confirm this by dtype={dtype!r}, or {{"dtype": "{dtype}"}} in '
            f"{path.name}.json",
            stacklevel=2,
        )
    return dtype


def dtype_by_statistics(sample: np.ndarray) -> str | None:
    """``uint8``, ``uint16``, ``uint32`` or ``int64``, or None.

    Args:
        sample: uint8, blocks of a file that begin at multiples of 840 bytes, and are as long.

    One test for each width, from the places of a byte modulo 8: those of the same place in an id
    are alike, others are not, and high bytes are small.
    """
    if not len(sample):
        return None
    place = {period: _histograms(sample, period) for period in _PERIODS}
    eight = place[8]
    even, odd = eight[0::2], eight[1::2]
    if _are_alike(even) and _are_alike(odd) and _information(_sums(even, odd)) > _DIFFERENT:
        return "uint16" if _are_ids_of_16_bits(even.sum(0), odd.sum(0)) else None
    used = [np.flatnonzero(row).max() for row in eight]  # largest byte at each place
    varied = _entropy(eight[0]) >= _MIN_ENTROPY
    if varied and used[2] <= _MAX_HIGH_BYTE and not any(used[3:]):
        return "int64"
    pairs = [_are_alike(eight[i::4]) for i in range(4)]
    if varied and all(pairs) and max(used[2], used[6]) <= _MAX_HIGH_BYTE and not used[3] | used[7]:
        return "uint32"
    if all(map(_are_alike, place.values())) and _are_ids_of_8_bits(eight.sum(0)):
        return "uint8"
    return None


def _are_ids_of_8_bits(bytes_: np.ndarray) -> bool:
    """Whether this is a histogram of text, which has no NUL, or of ids below a vocabulary. Programs
    have both NUL and bytes that UTF-8 has not."""
    return _MIN_ENTROPY <= _entropy(bytes_) <= _MAX_ENTROPY and not (
        bytes_[0] and bytes_[_NOT_IN_UTF_8:].any()
    )


def _are_ids_of_16_bits(low: np.ndarray, high: np.ndarray) -> bool:
    """Whether these are histograms of bytes of ids in [0, V): high ones go from 0 up to a number,
    and large ones are not more frequent than small ones. Samples of sound are negative, too; floats
    have few exponents, mostly large ones."""
    high = high[: np.flatnonzero(high).max() + 1]
    up_to, of_equal = np.cumsum(high) / high.sum(), np.arange(1, len(high) + 1) / len(high)
    return bool(
        _entropy(low) >= max(_entropy(high) + 0.05, _MIN_ENTROPY)
        and len(high) <= _MAX_HIGH_BYTES
        and np.count_nonzero(high) >= len(high) / 2
        and (up_to >= of_equal - 0.1).all()
    )


def _sample(path: Path) -> np.ndarray:
    size = os.stat(path).st_size
    if size < _MIN_BYTES:
        return np.empty(0, np.uint8)
    last = max(size - _BLOCK_BYTES, 0)
    count = min(_BLOCKS, -(-size // _BLOCK_BYTES))
    starts = {last * i // max(count - 1, 1) // _PERIOD * _PERIOD for i in range(count)}
    with path.open("rb") as file:
        blocks = []
        for start in sorted(starts):
            file.seek(start)
            content = file.read(_BLOCK_BYTES)
            blocks.append(content[: len(content) // _PERIOD * _PERIOD])
    return np.frombuffer(b"".join(blocks), np.uint8)


def _histograms(sample: np.ndarray, period: int) -> np.ndarray:
    """``[period, 256]``: how often each byte is at each place."""
    where = np.arange(len(sample)) % period * 256
    return np.bincount(where + sample, minlength=256 * period).reshape(period, 256)


def _sums(*groups: np.ndarray) -> np.ndarray:
    return np.stack([group.sum(0) for group in groups])


def _are_alike(histograms: np.ndarray) -> bool:
    return _information(histograms) < _ALIKE


def _information(histograms: np.ndarray) -> float:
    """Bits that the row tells about the column, less what it would by chance (Miller-Madow)."""
    counts = histograms[:, histograms.any(0)]
    rows, columns = counts.shape
    by_chance = (rows - 1) * (columns - 1) / (2 * np.log(2) * counts.sum())
    return _entropy(counts.sum(0)) + _entropy(counts.sum(1)) - _entropy(counts) - by_chance


def _entropy(counts: np.ndarray) -> float:
    """Bits."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())
