"""Philox against Random123's vectors, the streams, and the keyed permutation."""

import pytest
import torch

from nar_kernels.ops import windows
from nar_kernels.spec.philox import (
    EXACT_PERMUTATION_MAX,
    Stream,
    derived_seed,
    noise_generator,
    permute,
    philox4x32,
    words,
)
from tests.helpers.goodness_of_fit import assert_uniform

# kat_vectors of Random123: philox4x32, 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, result", KNOWN_ANSWERS)
def test_known_answers(counter, key, result):
    out = philox4x32([torch.tensor([c]) for c in counter], key)
    assert tuple(int(word) for word in out) == result


def test_counter_layout():
    """Word i % 4 of block i // 4, with the sample's low and high half and the stream."""
    seed, sample, stream = 0x0123456789ABCDEF, 0x1122334455667788, Stream.RANDOM_TOKEN
    got = words(seed, stream, torch.tensor(sample), torch.arange(9))
    for i in range(9):
        counter = [torch.tensor(c) for c in (i // 4, 0x55667788, 0x11223344, int(stream))]
        assert got[i] == philox4x32(counter, (0x89ABCDEF, 0x01234567))[i % 4]


def test_streams_are_frozen():
    assert {s.name: int(s) for s in Stream} == {
        "TIME": 0,
        "STRATUM": 1,
        "MASK_KEY": 2,
        "RANDOM_TOKEN": 3,
        "CORRUPTION": 4,
        "WINDOW_ORDER": 5,
        "DECODE_NOISE": 7,
        "CRITIC_NOISE": 8,
        "GENERATOR_SEED": 9,
        "WINDOW_PHASE": 10,
        "ROW_ORDER": 11,
        "RANDOM_LENGTH": 12,
        "REMASK_COUNT": 13,
        "CLASS_DROPOUT": 14,
    }


def test_words_differ_by_every_argument():
    base = words(1, Stream.TIME, torch.tensor(2), torch.arange(64))
    others = [
        words(2, Stream.TIME, torch.tensor(2), torch.arange(64)),
        words(1 + (1 << 32), Stream.TIME, torch.tensor(2), torch.arange(64)),
        words(1, Stream.STRATUM, torch.tensor(2), torch.arange(64)),
        words(1, Stream.TIME, torch.tensor(3), torch.arange(64)),
        words(1, Stream.TIME, torch.tensor(2 + (1 << 32)), torch.arange(64)),
        words(1, Stream.TIME, torch.tensor(2), torch.arange(64, 128)),
    ]
    for other in others:
        assert (base == other).sum() == 0
    assert torch.equal(base, words(1 + (1 << 64), Stream.TIME, torch.tensor(2), torch.arange(64)))


POWERS = [2**k + d for k in range(13, 21) for d in (-1, 0, 1)]


def test_permutation_is_a_bijection_for_every_size():
    """Exhaustive up to 4096, and around powers of two, where other Feistel shuffles fail."""
    for n in [*range(1, 4097), *POWERS]:
        order = windows.permute(torch.arange(n), n, seed=n, stream=Stream.WINDOW_ORDER, round=3)
        assert torch.bincount(order, minlength=n).eq(1).all() and len(order) == n, n


@pytest.mark.parametrize(
    "n", [1, 2, 3, 255, 256, 257, 258, 511, 513, 1000, 65537, 2**31 + 11, 2**62]
)
def test_permutation_backends_agree(n):
    index = torch.arange(min(n, 300))
    if n > 300:
        index = torch.cat([index, n - 1 - index]).unique()
    for seed, round in [(0, 0), (-5, 7), (2**63 + 1, 2**40)]:
        args = dict(seed=seed, stream=Stream.WINDOW_ORDER, round=round)
        expected = permute(index, n, **args)
        assert torch.equal(windows.permute(index, n, **args), expected)
        assert expected.min() >= 0 and expected.max() < n and len(expected.unique()) == len(index)


def test_small_permutations_are_uniform_over_all_orders():
    n, rounds = 4, 24 * 100
    base = n ** torch.arange(n)
    codes = torch.stack(
        [
            (
                windows.permute(torch.arange(n), n, seed=1, stream=Stream.STRATUM, round=r) * base
            ).sum()
            for r in range(rounds)
        ]
    )
    _, counts = codes.unique(return_counts=True)
    assert len(counts) == 24
    assert_uniform(counts, num_tests=1)


def test_feistel_sends_an_index_anywhere():
    n = EXACT_PERMUTATION_MAX + 1
    rounds = 20 * n
    index = torch.tensor([n // 3])
    images = torch.cat(
        [
            windows.permute(index, n, seed=9, stream=Stream.WINDOW_ORDER, round=r)
            for r in range(rounds)
        ]
    )
    assert_uniform(torch.bincount(images, minlength=n), num_tests=1)


def test_permutation_is_frozen():
    small = windows.permute(torch.arange(8), 8, seed=1, stream=Stream.STRATUM, round=2)
    large = windows.permute(torch.arange(8), 10**6, seed=1, stream=Stream.WINDOW_ORDER, round=2)
    assert small.tolist() == [0, 5, 6, 1, 2, 4, 3, 7]
    assert large.tolist() == [881252, 711992, 722626, 521043, 728524, 539088, 302736, 907922]


def test_noise_generators_differ_by_seed_stream_and_slot():
    draws = [
        torch.rand(4, generator=noise_generator(seed, stream, slot=slot)).tolist()
        for seed in (0, 1, 1 << 32, -1)  # PyTorch's own seeding ignores the high 32 bits
        for stream in (Stream.DECODE_NOISE, Stream.CRITIC_NOISE)
        for slot in (0, 1)
    ]
    assert len(set(map(tuple, draws))) == 16
    again = torch.rand(4, generator=noise_generator(0, Stream.DECODE_NOISE))
    assert draws[0] == again.tolist()
    seed = derived_seed(5, Stream.GENERATOR_SEED)
    assert noise_generator(5, Stream.GENERATOR_SEED).initial_seed() == seed
