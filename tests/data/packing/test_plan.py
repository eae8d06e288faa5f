"""The endless sequence of rows: what they hold, by hand; random access; resuming."""

import itertools
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nar_kernels import Corpus, PackingPlan
from nar_kernels.data.packing import spans
from nar_kernels.data.packing.plan import Pieces
from tests.helpers.packing import METHODS, epoch_by_hand

L = 12


def lengths_of(num: int, most: int = 40, seed: int = 0) -> list[int]:
    """Some empty, some longer than L, and at least one that is neither."""
    drawn = np.random.default_rng(seed).integers(-3, most, num).clip(0).tolist()
    return [*drawn[:-1], 5]


def plan_of(lengths: list[int], seq_len: int = L, seed: int = 7, **options: Any) -> PackingPlan:
    return PackingPlan(np.cumsum(lengths), seq_len, seed=seed, **options)


def equal(a: Pieces, b: Pieces) -> bool:
    assert all(field.dtype == np.int64 for field in (*a, *b))
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def pieces_by_hand(rows: list[list[tuple]], first: int = 0) -> list[tuple]:
    return [(first + i, *piece) for i, row in enumerate(rows) for piece in row]


# By hand

OPTIONS = [
    {"method": method, "window": window, "overlong": overlong, "shuffle": shuffle}
    for method, window, overlong, shuffle in itertools.product(
        METHODS, (1, 7, 30, 1000), ("split", "truncate"), (True, False)
    )
]
OPTIONS += [{"round_to": 4, "window": 9, "method": method} for method in METHODS]
OPTIONS += [{"round_to": L, "window": 9}, {"alone": True}, {"alone": True, "window": 5}]
OPTIONS += [{"alone": True, "round_to": 3, "shuffle": False, "overlong": "truncate"}]


CASES = [(num, options) for options in OPTIONS for num in (1, 2, 33)]
CASES += [(300, {"window": 70}), (300, {"alone": True})]  # above what is permuted by rank


@pytest.mark.parametrize(("num", "options"), CASES, ids=str)
def test_three_epochs_by_hand(num, options):
    lengths = lengths_of(num, most=30 if num > 100 else 40)
    plan = plan_of(lengths, **options)
    first = 0
    for epoch in range(3):
        rows = epoch_by_hand(lengths, L, epoch, seed=7, **options)
        assert plan.num_rows(epoch) == len(rows)
        found = plan.rows(first, len(rows))
        assert list(zip(*map(np.ndarray.tolist, found), strict=True)) == pieces_by_hand(rows, first)
        tokens = sum(piece[2] for row in rows for piece in row)
        assert plan.padding_share(epoch) == pytest.approx(1 - tokens / len(rows) / L)
        first += len(rows)


@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=30).filter(any),
    window=st.integers(1, 40),
    method=st.sampled_from(METHODS),
    round_to=st.sampled_from((1, 2, 5)),
    alone=st.booleans(),
    seed=st.integers(-(1 << 63), (1 << 64) - 1),
)
def test_every_token_once_in_each_epoch(lengths, window, method, round_to, alone, seed):
    plan = plan_of(lengths, 10, seed, window=window, method=method, round_to=round_to, alone=alone)
    first = 0
    for epoch in range(3):
        num_rows = plan.num_rows(epoch)
        found = plan.rows(first, num_rows)
        first += num_rows
        tokens = [
            i for s, n in zip(found.start, found.length, strict=True) for i in range(s, s + n)
        ]
        assert sorted(tokens) == list(range(sum(lengths)))
        # Rows without a gap, none of them empty, none too long, in order.
        assert sorted({*found.row}) == list(range(first - num_rows, first))
        place = found.row * 10 + found.offset
        assert (np.diff(place) >= found.space[:-1]).all()
        assert (found.offset + found.space <= 10).all()
        assert (found.space % round_to == 0).all() and (found.space >= found.length).all()
        assert (found.space - found.length < round_to).all()
        # Slots: of this epoch, each once, and of the document that is there.
        assert len({*found.sample}) == len(found.sample)
        group, document = np.divmod(found.sample, plan.num_documents)
        epochs, part = np.divmod(group, plan.max_pieces)
        assert (epochs == epoch).all()
        begins = np.cumsum([0, *lengths])
        assert (found.start == begins[document] + part * 10).all()


def test_slots_do_not_depend_on_the_packing():
    """The same document, or part of it, has the same slot."""
    lengths = lengths_of(50)

    def slots(**options: Any) -> list[dict[int, int]]:
        plan = plan_of(lengths, **options)
        out, first = [], 0
        for epoch in range(2):
            found = plan.rows(first, plan.num_rows(epoch))
            first += plan.num_rows(epoch)
            out.append(dict(zip(found.start.tolist(), found.sample.tolist(), strict=True)))
        return out

    want = slots()
    assert want[0].keys() == want[1].keys() and want[0] != want[1]
    for options in (
        *({"seed": 8}, {"window": 3}, {"method": "in_order"}, {"shuffle": False}),
        *({"alone": True}, {"round_to": 6}),
    ):
        assert slots(**options) == want


def test_rows_of_long_documents_do_not_always_come_first():
    lengths = np.random.default_rng(1).integers(1, 100, 4000)
    options = {"seq_len": 100, "seed": 3, "window": 1000}
    plan = PackingPlan(lengths.cumsum(), **options)
    found = plan.rows(0, plan.num_rows())
    longest = found.length[found.offset == 0]
    halves = longest[: len(longest) // 8], longest[len(longest) // 8 : len(longest) // 4]
    assert abs(halves[0].mean() - halves[1].mean()) < 10
    # As they were opened.
    found = PackingPlan(lengths.cumsum(), **options, shuffle=False).rows(0, 100)
    longest = found.length[found.offset == 0]
    assert (np.diff(longest) <= 0).all() and longest[0] > 95


def test_a_larger_window_needs_less_padding():
    lengths = np.random.default_rng(1).lognormal(4, 1, 3000).astype(int) + 1
    shares = [plan_of(lengths, 512, window=w).padding_share() for w in (10, 100, 3000)]
    assert shares == sorted(shares, reverse=True) and shares[2] < 0.01 < shares[0]
    in_order = plan_of(lengths, 512, method="in_order", window=3000).padding_share()
    assert in_order > 5 * shares[2]


# Random access


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"window": 5, "alone": True}], ids=str)
def test_any_rows_in_any_order(options):
    lengths = lengths_of(40)
    whole = plan_of(lengths, **options).rows(0, 150)
    rng = np.random.default_rng(0)
    plan = plan_of(lengths, **options)
    for _ in range(60):
        first, end = sorted(rng.integers(0, 151, 2).tolist())
        part = (whole.row >= first) & (whole.row < end)
        assert equal(plan.rows(first, end - first), Pieces(*(field[part] for field in whole)))
    assert equal(plan_of(lengths, **options).rows(149, 1), plan.rows(149, 1))
    nothing = plan.rows(3, 0)
    assert [len(field) for field in nothing] == [0] * 6


@pytest.mark.parametrize("count", [1, 9])
def test_what_is_returned_is_the_callers(count):
    plan = plan_of(lengths_of(40), window=7)
    want = plan.rows(0, count)
    for field in plan.rows(0, count):
        field[:] = -1
    assert equal(plan.rows(0, count), want)


def counted(plan: PackingPlan, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The windows that are packed from now on."""
    packed: list[int] = []
    pack = plan._packed
    monkeypatch.setattr(plan, "_packed", lambda number: [packed.append(number), pack(number)][1])
    return packed


def test_each_window_is_packed_once(monkeypatch):
    """Also where batches straddle two."""
    plan = plan_of(lengths_of(40), window=8)
    packed = counted(plan, monkeypatch)
    for row in range(100):
        plan.rows(row, 3)
        plan.state(row)
    assert packed == list(range(len(packed))) and len(packed) > 5


@pytest.mark.parametrize("row", [0, 1, 37, 88, 200])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"window": 5, "alone": True}], ids=str)
def test_resuming(monkeypatch, options, row):
    lengths = [0, 0, 0, 0, *lengths_of(40)]
    before = plan_of(lengths, **options)
    want = before.rows(0, row + 50)
    state = json.loads(json.dumps(before.state(row)))
    assert state == plan_of(lengths, **options).state(row)
    plan = plan_of(lengths, **options)
    packed = counted(plan, monkeypatch)
    plan.resume(state)
    here = want.row >= row
    assert equal(plan.rows(row, 50), Pieces(*(field[here] for field in want)))
    first = state["epoch"] * plan.num_windows + state["window"]
    assert packed == list(range(first, first + len(packed)))
    # Later states, and rows before.
    assert plan.state(row + 50) == before.state(row + 50)
    assert equal(plan.rows(0, row + 50), want)
    assert equal(plan.rows(row, 50), Pieces(*(field[here] for field in want)))
    plan.resume(plan_of(lengths, **options).state(3))  # back
    assert equal(plan.rows(0, row + 50), want)


def test_a_state_says_where_a_row_is():
    plan = plan_of(lengths_of(40), window=15)
    epochs = [plan.num_rows(epoch) for epoch in range(3)]
    states = [plan.state(row) for row in range(sum(epochs))]
    assert [state["row"] for state in states] == list(range(sum(epochs)))
    windows = [(state["epoch"], state["window"]) for state in states]
    assert windows == sorted(windows) and {w for _, w in windows} == {0, 1, 2}
    assert [[e for e, _ in windows].count(epoch) for epoch in range(3)] == epochs
    assert [state["first_row"] for state in states] == [windows.index(w) for w in windows]


def test_windows_without_rows():
    """Long runs of empty documents, in the order of the corpus."""
    lengths = [0] * 20 + [5, 9, 0] + [0] * 30 + [11] + [0] * 7
    plan = plan_of(lengths, window=4, shuffle=False)
    assert plan.num_empty == 58 and plan.num_rows() == 3
    found = plan.rows(0, 9)
    assert found.start.tolist() == [5, 0, 14] * 3
    assert (found.sample % plan.num_documents).tolist() == [21, 20, 53] * 3
    state = plan.state(5)
    assert (state["epoch"], state["window"], state["first_row"]) == (1, 13, 5)
    other = plan_of(lengths, window=4, shuffle=False)
    other.resume(state)
    assert equal(other.rows(5, 4), plan.rows(5, 4)) and equal(other.rows(0, 9), found)


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": 8}, {"window": 6}, {"method": "in_order"}, {"shuffle": False}),
        *({"alone": True}, {"round_to": 2}, {"seq_len": 24}, {"overlong": "truncate"}),
    ],
    ids=str,
)
def test_a_state_of_another_plan_is_refused(change):
    lengths = lengths_of(40)
    state = plan_of(lengths, window=5).state(20)
    with pytest.raises(ValueError, match=f"cannot continue: {next(iter(change))} is .* in the st"):
        plan_of(lengths, **({"window": 5} | change)).resume(state)


def test_a_state_of_other_documents_is_refused():
    lengths = lengths_of(40)
    state = plan_of(lengths).state(20)
    swapped = [lengths[1], lengths[0], *lengths[2:]]
    with pytest.raises(ValueError, match="documents_digest"):
        plan_of(swapped).resume(state)
    with pytest.raises(ValueError, match="num_documents is 40 in the state, but 41 here"):
        plan_of([*lengths, 1]).resume(state)


def test_what_is_no_state_is_refused():
    plan = plan_of(lengths_of(40), window=5)
    state = plan.state(60)
    missing = {name: value for name, value in state.items() if name != "first_row"}
    for wrong in (None, {}, {"row": 60}, missing, state | {"row": 60.0}, state | {"plan": 3}):
        with pytest.raises(ValueError, match="not one of PackingPlan.state"):
            plan.resume(wrong)
    for wrong in (
        *({"epoch": -1}, {"window": 8}, {"window": -1}, {"first_row": 61}, {"row": 1 << 63}),
        *({"epoch": 1 << 62}, {"epoch": 0, "window": 0}, {"epoch": 61, "window": 0}),
    ):
        with pytest.raises(ValueError, match="this plan has no such place"):
            plan.resume(state | wrong)
    assert plan.state(60) == state


def test_copies_continue():
    plan = plan_of(lengths_of(40), window=5)
    want = plan.rows(30, 20)
    copy = pickle.loads(pickle.dumps(plan))
    assert equal(copy.rows(30, 20), want) and copy.state(44) == plan.state(44)


def test_several_threads():
    lengths = lengths_of(200)
    whole = plan_of(lengths, window=3).rows(0, 400)
    plan = plan_of(lengths, window=3)
    with ThreadPoolExecutor(8) as pool:
        rows = [*pool.map(lambda row: plan.rows(row, 7), [i * 37 % 390 for i in range(390)])]
    for i, found in enumerate(rows):
        here = (whole.row >= i * 37 % 390) & (whole.row < i * 37 % 390 + 7)
        assert equal(found, Pieces(*(field[here] for field in whole)))


# Documents


def test_ends_of_a_corpus(tmp_path):
    ids = np.array([1, 2, 9, 9, 3, 4, 5, 9, 6], np.uint16)
    corpus = Corpus(ids, eos_id=9)
    plan = PackingPlan(corpus.document_ends, 8, seed=0, shuffle=False, method="in_order")
    found = plan.rows(0, 1)
    texts = [corpus.read(s, s + n).tolist() for s, n in zip(found.start, found.length, strict=True)]
    assert texts == [[1, 2, 9], [9], [3, 4, 5, 9]]


def test_ends_of_any_kind(tmp_path):
    ends = np.cumsum(lengths_of(40))
    np.save(tmp_path / "ends.npy", ends)
    want = PackingPlan(ends, L, seed=1)
    strided = np.repeat(ends, 2)[::2]
    mapped = np.load(tmp_path / "ends.npy", mmap_mode="r")
    kinds = (mapped, torch.from_numpy(ends), ends.astype(">u4"), ends.astype("uint64"), strided)
    for kind in kinds:
        plan = PackingPlan(kind, L, seed=1)
        assert equal(plan.rows(0, 200), want.rows(0, 200))
        assert plan.options == want.options and plan.padding_share() == want.padding_share()


def test_ends_are_read_in_pieces(monkeypatch):
    lengths = lengths_of(40)
    want = plan_of(lengths, overlong="truncate")
    monkeypatch.setattr(spans, "_DOCUMENTS_AT_ONCE", 7)
    plan = plan_of(lengths, overlong="truncate")
    assert plan.num_empty == want.num_empty == lengths.count(0)
    assert plan.options == want.options and plan.padding_share() == want.padding_share()
    longest = max(lengths)
    with pytest.raises(ValueError, match=f"document {lengths.index(longest)} has {longest} tok"):
        plan_of(lengths, overlong="refuse")
    with pytest.raises(ValueError, match="document 22 ends before it begins, at 3"):
        PackingPlan(np.array([*range(22), 3, 30]), L, seed=0)


def test_overlong():
    lengths = [12, 30, 5, 24, 24]
    assert plan_of(lengths).max_pieces == 3
    assert plan_of(lengths, overlong="truncate").max_pieces == 1
    assert plan_of(lengths, 30, overlong="refuse").max_pieces == 1
    found = plan_of(lengths, overlong="truncate").rows(0, 5)
    assert sorted(found.length.tolist()) == [5, 12, 12, 12, 12]
    with pytest.raises(ValueError, match="document 1 has 30 tokens, more than seq_len 29.*'split'"):
        plan_of(lengths, 29, overlong="refuse")


def test_a_document_alone_in_a_corpus():
    for options in ({}, {"alone": True}, {"method": "in_order"}):
        plan = plan_of([30], **options)
        found = plan.rows(0, 6)
        assert sorted(found.length[:3].tolist()) == [6, 12, 12] == sorted(found.length[3:].tolist())
        assert sorted(found.sample.tolist()) == list(range(6))


def test_rows_far_away():
    """As far as slots go."""
    lengths = [5, 30]
    plan = plan_of(lengths, window=1)
    last = (1 << 63) // 6 - 1  # P = 3, D = 2
    row = (1 << 62) - 1
    state = plan.state(0) | {"row": row, "epoch": last, "window": 0, "first_row": row}
    plan.resume(state)
    found = plan.rows(row, 4)
    assert found.sample.min() == last * 6 and 0 < found.sample.max() <= (1 << 63) - 1
    assert {*(found.sample - last * 6)} == {0, 1, 3, 5}
    with pytest.raises(ValueError, match=rf"epoch {last + 1} has sample slots from 2\*\*63 on"):
        plan.rows(row, 5)
    with pytest.raises(ValueError, match=rf"epoch is {last + 1}"):
        plan.num_rows(last + 1)
    assert plan.num_rows(last) == 4


def test_slots_from_2_63_on_are_refused():
    def ends(num: int) -> np.ndarray:
        return np.array([*[1 << 62] * num])

    assert PackingPlan(ends(2), 1, seed=0).max_pieces == 1 << 62
    with pytest.raises(ValueError, match=r"3 documents of up to \d+ pieces.*2\*\*63"):
        PackingPlan(ends(3), 1, seed=0)
    found = PackingPlan(ends(3), 1, seed=0, overlong="truncate").rows(0, 1)
    assert (found.start.tolist(), found.length.tolist()) == ([0], [1])


def test_errors():
    def refused(error, message, ends=(3, 5), seq_len=L, **options):
        with pytest.raises(error, match=message):
            PackingPlan(np.asarray(ends), seq_len, **({"seed": 0} | options))

    refused(ValueError, "nothing to pack: no document", np.array([], np.int64))
    refused(ValueError, "nothing to pack: no document", [])
    refused(ValueError, "nothing to pack: none of 3 documents has a token", [0, 0, 0])
    refused(ValueError, "document 1 ends before it begins, at 3.*cumulative", [5, 3])
    refused(ValueError, "document 0 ends before it begins, at -1", [-1, 3])
    refused(TypeError, "float64.*integers", [1.0])
    refused(TypeError, "bool.*integers", [True])
    refused(ValueError, r"shape \[1, 2\].*\[D\]", [[1, 2]])
    refused(ValueError, r"below 2\*\*32", np.broadcast_to(np.int64(1), (1 << 32,)))
    refused(ValueError, r"seq_len is 0.*\[1, 2\*\*31\)", seq_len=0)
    refused(ValueError, "seq_len is 2147483648", seq_len=1 << 31)
    refused(TypeError, "seq_len is 1.5", seq_len=1.5)
    refused(ValueError, "window is 0", window=0)
    refused(ValueError, "round_to is 0.*divide seq_len, which is 12", round_to=0)
    refused(ValueError, "round_to is 5.*divide seq_len, which is 12", round_to=5)
    refused(ValueError, "round_to is 24", round_to=24)
    refused(ValueError, "seed is .*64 bits", seed=1 << 64)
    refused(ValueError, "method is 'best'", method="best")
    refused(ValueError, "overlong is 'drop'.*'split', 'truncate' or 'refuse'", overlong="drop")
    plan = plan_of([3, 5])
    for first, count in ((-1, 1), (0, -1), (5, -1), (0, 1 << 63), ((1 << 63) - 1, 1)):
        with pytest.raises(ValueError, match="must ascend, in"):
            plan.rows(first, count)
    with pytest.raises(TypeError, match="first is 0.5"):
        plan.rows(0.5, 1)
    for row in (-1, 1 << 63):
        with pytest.raises(ValueError, match=f"row is {row}"):
            plan.state(row)
    with pytest.raises(ValueError, match="epoch is -1"):
        plan.padding_share(-1)
