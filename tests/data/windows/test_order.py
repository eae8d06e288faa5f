"""Which window a sample slot holds: epochs, documents, shifted epochs, mixtures; whatever the
number of processes."""

import itertools
import math
import pickle
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nar_kernels import Corpus, MaskedLoader, MaskingConfig, Mixture, TokenDataset
from nar_kernels.data.windows.mixture import even_schedule, shares_of
from nar_kernels.data.windows.window_table import WindowTable
from nar_kernels.errors import CorpusFormatError, InvalidTokenError
from nar_kernels.spec.philox import Stream, derived_seed, permute, words

V, MASK_ID, EOS = 1001, 1000, 999
MASKING = MaskingConfig(V, MASK_ID)


def dataset_of(length: int, seq_len: int = 4, **options: Any) -> TokenDataset:
    """Ids that say where they are, without an end of a document."""
    ids = np.arange(length, dtype="uint16") % EOS
    return TokenDataset(ids, seq_len, num_tokens=V, mask_id=MASK_ID, **options)


def slots_of(loaders: list[MaskedLoader], steps: int) -> list[list[int]]:
    """The windows of successive sample slots."""
    rows = [loader.batch(s).clean_ids for s in range(steps) for loader in loaders]
    return torch.cat(rows).tolist()


# By hand, one slot at a time


def window_by_hand(dataset: TokenDataset, slot: int, seed: int, shift: bool) -> list[int]:
    num = len(dataset) - shift
    epoch, place = divmod(slot, num)
    order = permute(torch.tensor([place]), num, seed=seed, stream=Stream.WINDOW_ORDER, round=epoch)
    start = int(dataset.starts(order))
    if shift:
        word = words(seed, Stream.WINDOW_PHASE, torch.tensor(epoch), torch.tensor(0))
        start += int(word) * dataset.stride >> 32
    return dataset.corpus.read(start, start + dataset.seq_len).tolist()


def mixture_by_hand(mixture: Mixture, slots: int, seed: int, shift: bool) -> list[list[int]]:
    period = math.lcm(*(share.denominator for share in mixture.shares))
    sources = even_schedule([int(share * period) for share in mixture.shares])
    seen, rows = [0] * len(mixture.datasets), []
    for slot in range(slots):
        source = sources[slot % period]
        own = derived_seed(seed, Stream.WINDOW_ORDER, source)
        rows.append(window_by_hand(mixture.datasets[source], seen[source], own, shift))
        seen[source] += 1
    return rows


SHAPES = [(1, 1), (1, 5), (2, 3), (3, 2), (4, 4)]  # world size, batch size of a rank
KINDS = ("flat", "overlapping", "documents", "mixture", "mixture of three")


def source_of(kind: str, num_windows: int) -> TokenDataset | Mixture:
    if kind == "flat":
        return dataset_of(4 * num_windows + 1)
    if kind == "overlapping":
        return dataset_of(4 + 3 * (num_windows - 1), stride=3)
    if kind == "documents":
        corpus = Corpus(np.arange(9 * num_windows, dtype="uint16") % 9 + 990, eos_id=998)
        return TokenDataset(corpus, 6, num_tokens=V, mask_id=MASK_ID, within_documents=True)
    weights = (0.7, 0.3) if kind == "mixture" else (3, 1, 2.5)
    sizes = [num_windows, 2, 5][: len(weights)]
    return Mixture([dataset_of(4 * n + 3) for n in sizes], weights)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_windows", [2, 3, 7, 12, 40])
def test_every_combination(kind: str, num_windows: int) -> None:
    """Each of (world size, batch, step, epoch, seed, shuffle, shift): the slots of all ranks, in
    order, are what one reads by hand; also where a run is resumed by other ranks."""
    dataset = source_of(kind, num_windows)
    for (world_size, batch), seed, shift in itertools.product(SHAPES, (0, 7), (False, True)):
        if shift and kind == "documents":
            continue
        options: dict[str, Any] = {"seed": seed, "shift_epochs": shift}
        loaders = [
            MaskedLoader(dataset, MASKING, batch, rank=r, world_size=world_size, **options)
            for r in range(world_size)
        ]
        steps = 3 * num_windows // (batch * world_size) + 2  # beyond three epochs
        got = slots_of(loaders, steps)
        if isinstance(dataset, Mixture):
            assert got == mixture_by_hand(dataset, len(got), seed, shift)
        else:
            assert got == [window_by_hand(dataset, g, seed, shift) for g in range(len(got))]

        state = pickle.loads(pickle.dumps(loaders[0].state_dict())) | {"step": 1}
        alone = MaskedLoader(dataset, MASKING, batch * world_size, **options)
        alone.load_state_dict(state)
        size = batch * world_size
        assert next(alone).clean_ids.tolist() == got[size : 2 * size]
        whole = alone.batch(1)
        of_ranks = torch.cat([loader.batch(1).input_ids for loader in loaders])
        assert torch.equal(of_ranks, whole.input_ids)


@pytest.mark.cpp
@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree(kind: str) -> None:
    dataset = source_of(kind, 12)
    loader = MaskedLoader(dataset, MASKING, 5, seed=3, backend="cpp")
    expected = MaskedLoader(dataset, MASKING, 5, seed=3, backend="reference")
    for step in (0, 3, 1 << 40):
        assert torch.equal(loader.batch(step).input_ids, expected.batch(step).input_ids)


def test_an_epoch_of_a_million_million_windows_takes_no_memory() -> None:
    """By the order alone: no corpus is so long."""
    dataset = dataset_of(40)
    dataset._num_windows = 10**12
    order = MaskedLoader(dataset, MASKING, 6)._order
    indices = order.indices(torch.tensor([0, 1, 10**12 - 1, 10**12, 10**15]))
    assert len(set(indices.tolist())) == 5 and indices.min() >= 0 and indices.max() < 10**12


# Shifted epochs


def test_shifted_epochs_are_cut_elsewhere() -> None:
    dataset = dataset_of(4 * 50, stride=4)
    loader = MaskedLoader(dataset, MASKING, 49, shift_epochs=True)
    assert len(loader) == 1
    phases = set()
    for epoch in range(40):
        starts = loader.batch(epoch).clean_ids[:, 0]
        assert len((starts % 4).unique()) == 1
        phases.add(int(starts[0]) % 4)
        assert sorted((starts // 4).tolist()) == list(range(49))
    assert phases == {0, 1, 2, 3}


def test_shifted_windows_stay_on_their_side_of_a_split() -> None:
    train, held_out = dataset_of(60, stride=3).split(4)
    first_held_out = int(held_out.starts([0]))
    loader = MaskedLoader(train, MASKING, len(train) - 1, shift_epochs=True)
    assert max(int(loader.batch(e).clean_ids.max()) for e in range(40)) < first_held_out
    late = MaskedLoader(held_out, MASKING, 3, shift_epochs=True)
    assert min(int(late.batch(e).clean_ids.min()) for e in range(40)) == first_held_out


@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        (dataset_of(7), "there is only one"),
        (source_of("documents", 9), "they lie within documents"),
    ],
)
def test_windows_that_cannot_be_shifted(dataset: TokenDataset, why: str) -> None:
    with pytest.raises(ValueError, match=f"shift_epochs is true, but .* cannot be shifted: {why}"):
        MaskedLoader(dataset, MASKING, 2, shift_epochs=True)


# Documents


def corpus_of_documents(lengths: list[int]) -> Corpus:
    """Each ends with EOS; other ids count up."""
    ids = np.arange(sum(lengths), dtype="uint16")
    ids[np.cumsum(lengths) - 1] = EOS
    return Corpus(ids, eos_id=EOS)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 6), st.integers(1, 8))
def test_windows_within_documents(lengths: list[int], seq_len: int, stride: int) -> None:
    corpus = corpus_of_documents(lengths)
    begins = np.cumsum([0, *lengths])
    expected = [
        range(b + i, b + i + seq_len)
        for b, n in zip(begins.tolist(), lengths, strict=False)
        for i in range(0, n - seq_len + 1, stride)
    ]
    make: dict[str, Any] = {"num_tokens": V, "mask_id": MASK_ID, "stride": stride}
    if not expected:
        with pytest.raises(ValueError, match="longest of .* tokens|less than one window"):
            TokenDataset(corpus, seq_len, within_documents=True, **make)
        return
    dataset = TokenDataset(corpus, seq_len, within_documents=True, **make)
    ids = corpus.tokens.tolist()
    assert [window.tolist() for window in dataset] == [[ids[i] for i in r] for r in expected]
    assert dataset.starts(torch.arange(len(dataset))).tolist() == [r.start for r in expected]
    for held_out in range(1, len(expected)):
        boundary = expected[-held_out].start
        num_train = sum(r.stop <= boundary for r in expected)
        if num_train:
            train, late = dataset.split(held_out)
            assert (len(train), len(late)) == (num_train, held_out)
            assert late[0].tolist() == [ids[i] for i in expected[-held_out]]


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=9),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sets(st.integers(0, 40), max_size=6),
)
def test_all_windows_within_documents_are_validated(
    lengths: list[int], seq_len: int, stride: int, bad: set[int]
) -> None:
    corpus = corpus_of_documents(lengths)
    corpus.document_ends  # noqa: B018 : before the ids are spoilt
    ids = corpus.tokens
    for place in bad:
        if place < len(ids):
            ids[place] = V
    make: dict[str, Any] = {"num_tokens": V, "mask_id": MASK_ID, "stride": stride}
    try:
        whole = TokenDataset(corpus, seq_len, within_documents=True, **make)
        views = [whole, *whole.split(1)]
    except ValueError:  # no window, or only one
        return
    for dataset in views:
        starts = dataset.starts(torch.arange(len(dataset))).tolist()
        covered = {s + i for s in starts for i in range(seq_len)} & bad
        if not covered:
            dataset.validate_all()
            continue
        with pytest.raises(InvalidTokenError) as caught:
            dataset.validate_all()
        assert (caught.value.offset, caught.value.count) == (min(covered), len(covered))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 9), st.data())
def test_document_ids(lengths: list[int], seq_len: int, data: Any) -> None:
    total = sum(lengths)
    if total < seq_len:
        return
    corpus = Corpus(np.zeros(total, "uint8"))
    corpus.__dict__["document_ends"] = np.cumsum(lengths)
    dataset = TokenDataset(corpus, seq_len, num_tokens=V, mask_id=MASK_ID, stride=1)
    indices = data.draw(st.lists(st.integers(0, len(dataset) - 1), max_size=5))
    of_token = np.repeat(np.arange(len(lengths)), lengths)
    expected = [of_token[i : i + seq_len].tolist() for i in indices]
    assert dataset.document_ids(indices).tolist() == expected


def test_document_ids_of_a_batch() -> None:
    corpus = corpus_of_documents([3, 9, 1, 20, 2])
    dataset = TokenDataset(corpus, 5, num_tokens=V, mask_id=MASK_ID)
    loader = MaskedLoader(dataset, MASKING, 4, seed=1)
    ids = loader.document_ids(2)
    windows = loader.window_indices(2)
    assert torch.equal(ids, dataset.document_ids(windows))
    of_token = np.repeat(np.arange(5), [3, 9, 1, 20, 2])
    assert ids.tolist() == [of_token[5 * w : 5 * w + 5].tolist() for w in windows.tolist()]


def test_corpora_that_do_not_say_where_documents_end() -> None:
    dataset = dataset_of(40)
    assert dataset.corpus.document_ends is None
    with pytest.raises(ValueError, match="array does not say where its documents end: give eos_id"):
        dataset.document_ids([0])
    with pytest.raises(ValueError, match="within_documents is true, but array does not say where"):
        dataset_of(40, within_documents=True)


def test_documents_by_their_last_id() -> None:
    assert corpus_of_documents([3, 1, 2]).document_ends.tolist() == [3, 4, 6]  # type: ignore[union-attr]
    open_ended = Corpus(np.array([5, EOS, 6, 7]), eos_id=EOS)
    assert open_ended.document_ends.tolist() == [2, 4]  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="does not occur"):
        assert Corpus(np.array([5, 6]), eos_id=EOS).document_ends.tolist() == [2]  # type: ignore[union-attr]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(0, 60),
)
def test_windows_before_an_offset(
    lengths: list[int], seq_len: int, stride: int, offset: int
) -> None:
    ends = np.cumsum(lengths)
    table = WindowTable(ends - lengths, np.array(lengths), seq_len, stride)
    starts = table.starts(torch.arange(len(table))) if len(table) else torch.empty(0)
    assert table.num_before(offset) == int((starts < offset).sum())


# Mixtures


@given(st.lists(st.integers(1, 40), min_size=1, max_size=7))
def test_shares_are_exact_in_every_prefix(counts: list[int]) -> None:
    period = sum(counts)
    schedule = np.array(even_schedule(counts))
    for source, count in enumerate(counts):
        so_far = np.cumsum(schedule == source)
        due = [Fraction(n * count, period) for n in range(1, period + 1)]
        assert all(math.floor(d) <= c <= math.ceil(d) for c, d in zip(so_far, due, strict=True))


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ((1,), ["1"]),
        ((0.7, 0.3), ["7/10", "3/10"]),
        ((2, 1), ["2/3", "1/3"]),
        ((0.1, 0.2, 0.3), ["1/6", "1/3", "1/2"]),
        ((np.float32(0.5), 1.5), ["1/4", "3/4"]),
        ((math.pi, math.e), ["35135/65536", "30401/65536"]),
    ],
)
def test_shares(weights: Any, shares: list[str]) -> None:
    assert list(shares_of(weights)) == [Fraction(share) for share in shares]


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=9))
def test_any_weights(weights: list[float]) -> None:
    shares = shares_of(weights)
    assert sum(shares) == 1
    for share, weight in zip(shares, weights, strict=True):
        assert abs(float(share) - weight / sum(weights)) < 1 / 65536


def test_each_source_has_epochs_of_its_own() -> None:
    """A small one begins again, and sees each of its windows as often."""
    mixture = Mixture([dataset_of(4 * 100), dataset_of(4 * 3)], [0.5, 0.5])
    loader = MaskedLoader(mixture, MASKING, 20)
    rows = [tuple(row) for s in range(9) for row in loader.batch(s).clean_ids.tolist()]
    small = [rows.count(tuple(range(i, i + 4))) for i in (0, 4, 8)]
    assert sum(small) >= 90 and max(small) - min(small) <= 2
    assert len(mixture) == 103 and len(loader) == 5


def test_a_mixture_of_equal_datasets_shuffles_each() -> None:
    one = dataset_of(400)
    mixture = Mixture([one, one], [1, 1])
    indices = MaskedLoader(mixture, MASKING, 200).window_indices(0)
    sources = mixture.assign(torch.arange(200))[0]
    assert indices[sources == 0].tolist() != indices[sources == 1].tolist()


def test_bad_ids_of_a_mixture_name_their_source(tmp_path: Any) -> None:
    np.save(tmp_path / "good.npy", np.arange(40))
    np.save(tmp_path / "bad.npy", np.append(np.arange(39), V + 5))
    make: dict[str, Any] = {"num_tokens": V, "mask_id": MASK_ID}
    sets = [TokenDataset(tmp_path / f"{name}.npy", 4, **make) for name in ("good", "bad")]
    with pytest.raises(ValueError, match=r"token id 1006 at offset 39 of .*bad\.npy is outside"):
        MaskedLoader(Mixture(sets, [1, 1]), MASKING, 20).batch(0)


@pytest.mark.parametrize(
    ("datasets", "weights", "message"),
    [
        ([], [], "0 datasets and 0 weights"),
        ([dataset_of(9)], [1, 2], "1 datasets and 2 weights"),
        ([dataset_of(9), dataset_of(9, 3)], [1, 2], "seq_len is 4 for array and 3 for array"),
        ([dataset_of(9)], [0], "a weight is 0: it must be positive and finite"),
        ([dataset_of(9)], [math.nan], "a weight is nan"),
        ([dataset_of(9)] * 2, [1, math.inf], "a weight is inf"),
        ([dataset_of(9)] * 2, [1, 1e-6], "must be at least 1/65536 of all"),
    ],
)
def test_datasets_that_do_not_mix(datasets: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(datasets, weights)


def test_what_is_no_dataset() -> None:
    array = np.arange(9)
    with pytest.raises(TypeError, match="a dataset of the mixture is a str: each must be"):
        Mixture(["a.bin"], [1])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="a Mixture: each must be a TokenDataset .of a mixture wi"):
        Mixture([Mixture([dataset_of(9)], [1])], [1])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="a weight is '1': it must be a number"):
        Mixture([dataset_of(9)], ["1"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="dataset is a ndarray: it must be a TokenDataset"):
        MaskedLoader(array, MASKING, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [0.1, np.float32(0.1), torch.tensor(0.1, dtype=torch.float64)])
def test_weights_are_decimal_fractions(weight: Any) -> None:
    assert shares_of([weight, 0.9]) == (Fraction(1, 10), Fraction(9, 10))


def test_a_mixture_is_pickled_without_its_schedule() -> None:
    mixture = Mixture([dataset_of(9), dataset_of(99)], [0.12345, 0.87655])
    size = len(pickle.dumps(mixture))
    mixture.assign(torch.arange(9))
    assert len(pickle.dumps(mixture)) == size


def test_dtypes_that_do_not_mix() -> None:
    other = TokenDataset(np.arange(9), 4, num_tokens=V, mask_id=MASK_ID)
    with pytest.raises(CorpusFormatError, match=r"holds torch\.int64 and array torch\.uint16"):
        Mixture([dataset_of(9), other], [1, 1])


# States


@pytest.mark.parametrize(
    ("here", "message"),
    [
        (dataset_of(400), "the state is of a mixture of datasets, and here is one dataset"),
        (Mixture([dataset_of(400)], [1]), "the state is of 2 datasets, and here are 1"),
        (
            Mixture([dataset_of(400), dataset_of(40)], [1, 2]),
            r"sources\[0\]\.share is 2/3 in the state, but 1/3 here",
        ),
        (
            Mixture([dataset_of(400), dataset_of(44)], [2, 1]),
            r"sources\[1\]\.corpus_digest is .* of array here",
        ),
    ],
)
def test_states_of_other_mixtures(here: Any, message: str) -> None:
    mixture = Mixture([dataset_of(400), dataset_of(40)], [2, 1])
    state = MaskedLoader(mixture, MASKING, 4).state_dict()
    assert len(repr(state)) < 2000
    MaskedLoader(mixture, MASKING, 4).load_state_dict(state | {"step": 5})
    with pytest.raises(ValueError, match=f"cannot continue: {message}"):
        MaskedLoader(here, MASKING, 4).load_state_dict(state)


def test_a_state_knows_where_documents_end() -> None:
    """The digest of a corpus does not."""
    corpora = [corpus_of_documents([9, 9, 10]) for _ in range(2)]
    corpora[1].__dict__["document_ends"] = np.array([9, 19, 28])
    one, two = (
        MaskedLoader(
            TokenDataset(c, 4, num_tokens=V, mask_id=MASK_ID, within_documents=True), MASKING, 2
        )
        for c in corpora
    )
    with pytest.raises(ValueError, match="cannot continue: table_digest is"):
        two.load_state_dict(one.state_dict())


def test_states_of_later_versions() -> None:
    loader = MaskedLoader(dataset_of(40), MASKING, 2)
    state = loader.state_dict()
    version = state["version"]
    wanted = f"state has version {version + 1}, and this version .* reads up to {version}"
    with pytest.raises(ValueError, match=wanted):
        loader.load_state_dict(state | {"version": version + 1})


def test_states_from_before_blocks_and_views() -> None:
    state = MaskedLoader(dataset_of(40), MASKING, 2).state_dict()
    old = {k: v for k, v in state.items() if k not in ("block_length", "views")} | {"version": 4}
    MaskedLoader(dataset_of(40), MASKING, 2).load_state_dict(old | {"step": 3})
    blocks = MaskedLoader(dataset_of(40), replace(MASKING, block_length=2), 2)
    with pytest.raises(ValueError, match="block_length is None in the state, but 2 here"):
        blocks.load_state_dict(old)
    pairs = MaskedLoader(dataset_of(40), MASKING, 2, views="complement")
    with pytest.raises(ValueError, match=r"views is None in the state, but \[2, 0, 1\] here"):
        pairs.load_state_dict(old)
    assert pairs.batch(0).input_ids.shape[0] == 4
