"""`PackedLoader`: every document of an epoch once, the same wherever it lies, on any number of
ranks, and a run goes on where it stopped."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from nar_kernels import (
    Corpus,
    CorpusChangedError,
    Corrupted,
    InvalidTokenError,
    MaskingConfig,
    PackedLoader,
)
from nar_kernels.data.prepare import prepare
from nar_kernels.data.stream import ArrayInMemory, TokenStream
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.windows import gather_ragged
from tests.helpers.windows import assert_same

V, MASK, EOS, PAD, L = 100, 99, 1, 2, 20
MASKING = MaskingConfig(V, MASK)
LENGTHS = [*np.random.default_rng(1).integers(0, 15, 40), L, 0, 1]


def make_corpus(lengths: Any = LENGTHS, *, num_runs: int = 1, masked: bool = False) -> Corpus:
    """Documents of ids from 3 on, by number."""
    ids = np.concatenate([np.full(n, 3 + i % 90) for i, n in enumerate(lengths)]).astype(np.uint8)
    corpus = Corpus(ids)

    def stream(array: np.ndarray) -> TokenStream:
        parts = np.array_split(array, num_runs)
        return TokenStream([ArrayInMemory(torch.from_numpy(part.copy())) for part in parts])

    corpus.stream = stream(ids)
    corpus.__dict__["document_ends"] = np.cumsum(lengths)
    if masked:
        corpus.loss_mask = stream((np.arange(len(ids)) % 3 > 0).astype(np.uint8))
    return corpus


def make(corpus: Corpus | None = None, batch_size: int = 3, **options: Any) -> PackedLoader:
    options = {"seed": 4, "window": 16} | options
    return PackedLoader(corpus or make_corpus(), L, MASKING, batch_size, **options)


def by_document(batch: Corrupted) -> dict[int, tuple]:
    found = {}
    documents = batch.documents
    assert documents is not None
    for i, sample in enumerate(documents.ids_on_host.tolist()):
        here = slice(int(documents.begins[i]), int(documents.begins[i] + documents.lengths[i]))
        found[sample] = (
            batch.input_ids.flatten()[here].tolist(),
            batch.labels.flatten()[here].tolist(),
            float(batch.times[i]),
        )
    return found


def run(loader: PackedLoader, num_steps: int) -> dict[int, tuple]:
    found: dict[int, tuple] = {}
    for step in range(num_steps):
        here = by_document(loader.batch(step))
        assert not found.keys() & here.keys(), "repeated"
        found |= here
    return found


def epochs(found: dict[int, tuple], num: int) -> dict[int, tuple]:
    """Those of the first epochs."""
    return {k: v for k, v in found.items() if k < num * len(LENGTHS)}


@pytest.mark.parametrize("num_runs", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", ["rows", "flat"])
def test_every_document_once_in_an_epoch(layout: str, masked: bool, num_runs: int) -> None:
    corpus = make_corpus(num_runs=num_runs, masked=masked)
    loader = make(corpus, layout=layout)
    found = run(loader, 20)
    filled = [d for d, n in enumerate(LENGTHS) if n]
    for epoch in (0, 1):
        here = {k - epoch * len(LENGTHS) for k in found if k // len(LENGTHS) == epoch}
        assert sorted(here) == filled
    whole = corrupt(
        corpus.read(0, len(corpus)),
        MASKING,
        seed=4,
        starts=torch.from_numpy(np.cumsum(LENGTHS) - LENGTHS),
        lengths=torch.tensor(LENGTHS),
        sample_ids=torch.arange(len(LENGTHS)),
        global_batch=len(LENGTHS),
        loss_mask=(None if corpus.loss_mask is None else corpus.loss_mask.read(0, len(corpus))),
    )
    expected = by_document(whole)
    assert epochs(found, 1) == {d: expected[d] for d in filled}


def test_a_document_is_the_same_in_any_packing() -> None:
    expected = epochs(run(make(), 30), 2)
    for options in (
        {"method": "in_order"},
        {"window": 7},
        {"alone": True},
        {"shuffle": False},
        {"layout": "flat"},
        {"batch_size": 1},
        {"batch_size": 11},
    ):
        loader = make(**options)
        steps = 2 * (loader.plan.num_rows(0) + loader.plan.num_rows(1)) // loader.global_batch
        assert epochs(run(loader, steps + 2), 2) == expected, options
    for world_size in (2, 3):
        found: dict[int, tuple] = {}
        for rank in range(world_size):
            found |= run(make(batch_size=2, rank=rank, world_size=world_size), 20)
        assert epochs(found, 2) == expected


def test_rows_hold_whole_documents() -> None:
    for batch in (make(pad_id=PAD).batch(step) for step in range(12)):
        assert batch.input_ids.shape == (3, L)
        begins = batch.cu_seqlens[:-1].tolist()
        lengths = batch.lengths.tolist()
        assert all(b // L == (b + n - 1) // L for b, n in zip(begins, lengths, strict=True))
        assert (batch.input_ids[~batch.attention_mask] == PAD).all()
        assert (batch.labels[~batch.attention_mask] == -100).all()


def test_share_of_padding() -> None:
    loader = make()
    rows = loader.plan.num_rows()
    assert loader.padding_share() == pytest.approx(1 - sum(LENGTHS) / (rows * L))
    assert len(loader) == rows // 3


def test_batches_of_a_number_of_tokens() -> None:
    """No more than that, and no padding."""
    loader = PackedLoader(
        make_corpus(), 60, MASKING, 1, layout="flat", method="in_order", shuffle=False
    )
    sizes = []
    for step in range(4):
        batch = loader.batch(step)
        assert batch.attention_mask.all() and batch.input_ids.dim() == 1
        sizes.append(batch.input_ids.numel())
    assert max(sizes) <= 60 and min(sizes) > 60 - 2 * L


@pytest.mark.parametrize("fill", ["fill_block", "fill_row"])
def test_ends_of_sequence(fill: str) -> None:
    loader = make(eos_fill=fill, eos_id=EOS, block_size=4 if fill == "fill_block" else None)
    for step in range(8):
        batch = loader.batch(step)
        documents = batch.documents
        assert documents is not None
        clean, real = batch.clean_ids.flatten(), batch.attention_mask.flatten()
        for i in range(len(documents)):
            begin, stored, length = (
                int(x[i]) for x in (documents.begins, documents.stored, documents.lengths)
            )
            assert length == (L if fill == "fill_row" else -(-stored // 4) * 4)
            assert (clean[begin : begin + stored] != EOS).all()
            assert (clean[begin + stored : begin + length] == EOS).all()
            assert real[begin : begin + length].all()
            assert int(batch.num_maskable[i]) == length
        if fill == "fill_row":
            assert len(documents) == 3


def test_random_lengths() -> None:
    whole, cut = make(), make(random_length_prob=0.5)
    lengths: list[tuple[int, int]] = []
    for step in range(60):
        ours, theirs = (loader.batch(step).documents for loader in (whole, cut))
        assert ours is not None and theirs is not None
        assert torch.equal(ours.ids_on_host, theirs.ids_on_host)
        lengths += zip(ours.lengths.tolist(), theirs.lengths.tolist(), strict=True)
    assert all(1 <= b <= a for a, b in lengths)
    share = np.mean([a != b for a, b in lengths if a > 3])
    assert 0.25 < share < 0.55  # half of them, of which some keep their length
    relative = np.array([b / a for a, b in lengths if a > 8 and a != b])
    assert 0.4 < relative.mean() < 0.6
    never = make(random_length_prob=0.0)
    assert_same(never.batch(3), whole.batch(3))


def test_resume() -> None:
    loader = make()
    for _ in range(9):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    other = make(batch_size=1, rank=2, world_size=3)
    other.load_state_dict(state)
    expected = next(loader)
    assert_same(next(other), expected[2:3])
    assert_same(other.batch(0), make().batch(0)[2:3])  # and what was before is still there


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 5}, "cannot continue: seed is 4 in the state"),
        ({"window": 9}, "cannot continue: window is 16 in the state"),
        ({"batch_size": 4}, "global_batch is 3 in the state"),
        ({"eos_fill": "fill_row", "eos_id": 1}, "eos_fill is 'none' in the state"),
        ({"corpus": make_corpus(masked=True)}, "loss_mask_digest is None in the state"),
        ({"corpus": make_corpus([3, 4, 5])}, "corpus_digest"),
        ({"random_length_prob": 0.1}, "random_length_prob is 0.0 in the state"),
    ],
)
def test_states_of_another_run(options: dict[str, Any], message: str) -> None:
    state = make().state_dict()
    with pytest.raises(ValueError, match=message):
        make(**options).load_state_dict(state)


def test_what_is_no_state() -> None:
    for state in ({}, {"place": 1, "version": 9}, make().plan.state(0)):
        with pytest.raises(ValueError, match="state"):
            make().load_state_dict(state)
    without = make().state_dict()
    del without["step"]
    with pytest.raises(ValueError, match="the state has no 'step'"):
        make().load_state_dict(without)


def test_a_state_is_json_whatever_the_numbers() -> None:
    loader = make(eos_fill="fill_row", eos_id=np.int64(EOS), pad_id=np.int32(PAD), seed=np.int64(3))
    json.dumps(loader.state_dict())


def test_workers() -> None:
    """Batches made by forked processes are the same."""
    loader = make()
    made = DataLoader(loader, batch_size=None, sampler=range(3, 9), num_workers=2)
    for step, batch in zip(range(3, 9), made, strict=True):
        assert_same(batch, loader.batch(step))
        assert by_document(batch) == by_document(loader.batch(step))


def test_files_that_change(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(900, dtype=np.uint8) % 99)
    loader = make(Corpus(tmp_path / "a.npy", eos_id=98))
    loader.batch(0)
    np.save(tmp_path / "a.npy", np.arange(900, dtype=np.uint8) % 97)
    with pytest.raises(CorpusChangedError, match=r"a\.npy changed while it was in use"):
        for step in range(1, 20):
            loader.batch(step)


def test_another_vocabulary(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    pytest.importorskip("tqdm")
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n' * 9)
    prepare(tmp_path / "a.jsonl", tmp_path / "a", tokenizer="bytes", workers=1, quiet=True)
    with pytest.raises(ValueError, match="masking has num_tokens 100 but .* has 257"):
        make(Corpus(tmp_path / "a"))
    with pytest.raises(TypeError, match="masking is a NoneType"):
        PackedLoader(make_corpus(), L, None, 2)  # type: ignore[arg-type]


def test_copies() -> None:
    loader = make(make_corpus(masked=True, num_runs=3))
    next(loader)
    for arrived in (pickle.loads(pickle.dumps(loader)), copy.deepcopy(loader)):
        assert_same(next(arrived), loader.batch(1))


def test_a_batch_for_another_device() -> None:
    loader = make()
    loader.device = torch.device("meta")  # the only other one that is everywhere
    assert loader.batch(0).input_ids.is_meta


def test_tokens_gathered_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device with a corpus that stays in its files; bad ids have their offsets."""
    corpus = make_corpus(masked=True, num_runs=4)
    loader, expected = make(corpus), make(corpus)
    monkeypatch.setattr(loader, "_compute_device", OnTheCpu())
    monkeypatch.setattr(loader._deferred_check, "defer", lambda batch, check: check(batch.invalid))
    for step in (0, 3):
        documents, starts = loader._documents(step)
        assert_same(loader._corrupt(documents, starts), expected.batch(step))
        gathered = gather_ragged(corpus.stream.flat, corpus.stream.runs, starts, documents.stored)
        ends = documents.stored.cumsum(0)
        for i in range(len(documents)):
            within = int(documents.stored[i]) - 1
            offset = int(ends[i]) - 1
            where = loader._where(documents, starts, offset)
            assert where == corpus.where(int(starts[i]) + within)
            assert gathered[offset] == corpus.read(int(starts[i]) + within, len(corpus))[0]


class OnTheCpu:
    """In place of a device: says that it is none of the host, and is it."""

    type = "cuda"


@pytest.fixture(autouse=True)
def _moves_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    to = Tensor.to

    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], OnTheCpu):
            return self
        return to(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", moved)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gather_ragged(backend: str) -> None:
    if backend == "cpp":
        pytest.importorskip("nar_kernels._cpp")
    corpus = make_corpus(num_runs=6)
    starts, lengths = torch.tensor([3, 50, 0, 7]), torch.tensor([9, 0, 100, 1])
    got = gather_ragged(corpus.stream.flat, corpus.stream.runs, starts, lengths, backend)
    expected = [corpus.read(s, s + n) for s, n in zip(starts, lengths, strict=True)]
    assert torch.equal(got, torch.cat(expected))
    with pytest.raises(IndexError, match="outside the corpus"):
        gather_ragged(corpus.stream.flat, corpus.stream.runs, starts, lengths * 9, backend)


def test_invalid_ids_are_named() -> None:
    lengths = [5, 5, 5]
    corpus = make_corpus(lengths)
    corpus.stream.flat[7] = MASK
    with pytest.raises(InvalidTokenError, match="offset 7 of array"):
        make(corpus).batch(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_documents": 99}, r"num_documents is 99: it must be in \[1, 43\]"),
        ({"layout": "row"}, "layout is 'row'"),
        ({"eos_fill": "fill"}, "eos_fill is 'fill'"),
        ({"eos_fill": "fill_row"}, "give eos_id"),
        ({"eos_fill": "fill_block", "eos_id": 1}, "block_size is None and eos_fill 'fill_block'"),
        ({"block_size": 4}, "block_size is 4 and eos_fill 'none'"),
        (
            {"block_size": 3, "eos_fill": "fill_block", "eos_id": 1},
            "block_size is 3: it must divide seq_len",
        ),
        ({"eos_id": MASK}, "eos_id is 99: .* not mask_id"),
        ({"pad_id": V}, r"pad_id is 100: it must be in \[0, 100\)"),
        (
            {"eos_fill": "fill_row", "eos_id": 1, "random_length_prob": 0.1},
            "a document that is cut has no end to be learned",
        ),
        ({"random_length_prob": 1.5}, r"random_length_prob is 1.5: it must be in \[0, 1\]"),
        ({"rank": 3, "world_size": 2}, "rank is 3"),
        ({"corpus": make_corpus([30]), "overlong": "refuse"}, "document 0 has 30 tokens"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_corpus_without_documents() -> None:
    with pytest.raises(ValueError, match="does not say where its documents end: open it with eos"):
        PackedLoader(np.arange(50) % 9, L, MASKING, 2)
    with pytest.raises(ValueError, match="step is -1"):
        make().batch(-1)
