"""The data sets that come along, and files of a user's own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nar_kernels import Corpus, MaskedLoader, MaskingConfig, Mixture
from nar_kernels.data.inspect.scan import scan
from nar_kernels.data.prepare import prepare
from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.data.sources import open_data
from nar_kernels.errors import CorpusFormatError
from nar_kernels.training.baselines import baselines
from tests.helpers.corpora import write_scattered_megatron

pytest.importorskip("x_transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_digits_are_images_of_seventeen_shades():
    pytest.importorskip("sklearn")
    data = open_data("digits")
    assert (len(data.train), len(data.held_out)) == (1617, 180)
    assert data.spec == SequenceSpec(18, 64, "image", (8, 8))
    found = baselines(data.train, data.held_out, data.held_out_windows, per_position=True)
    assert found["per_position_entropy"].bits_per_token == pytest.approx(2.42, abs=0.005)


def test_text_is_prose():
    data = open_data("text", stride=64)
    assert data.spec == SequenceSpec(257, 256, "bytes", None)
    assert "statement" in bytes(data.train.corpus.tokens.tolist()).decode()
    starts = data.held_out.starts(data.held_out_windows)
    assert (starts.diff() == 256).all()
    last_of_train = data.train.starts(torch.tensor([-1])).item() + 256
    assert last_of_train <= starts[0]


def test_files(tmp_path):
    ids = np.arange(200, dtype=np.uint16) % 50
    np.save(tmp_path / "ids.npy", ids)
    ids.tofile(tmp_path / "ids.bin")
    (tmp_path / "ids.text").write_bytes(bytes(200))
    options = {"seq_len": 10, "num_held_out": 2}
    for name, more in (("ids.npy", {}), ("ids.bin", {"dtype": "uint16"})):
        data = open_data(str(tmp_path / name), num_tokens=51, **more, **options)
        assert data.spec == SequenceSpec(51, 10, "ids", None)
        assert data.train[1].tolist() == list(range(10, 20))
    assert open_data(str(tmp_path / "ids.text"), **options).spec.num_tokens == 257


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("nothing.txt", {}, FileNotFoundError, "no file nothing.txt.*digits and text"),
        ("text", {"dtype": "int8"}, ValueError, "dtype is int8, but text has its own"),
        ("text", {"num_tokens": 300}, ValueError, "num_tokens is 300, .* always 257"),
        ("digits", {"stride": 32}, ValueError, "stride is 32, .* always 64"),
        ("text", {"stride": 100}, ValueError, "stride is 100: it must divide seq_len"),
        ("text", {"seq_len": 1 << 20}, ValueError, "less than one window"),
        ("text", {"num_held_out": 10**6}, ValueError, "num_held_out is"),
    ],
)
def test_wrong_data_options(name, options, error, message):
    with pytest.raises(error, match=message):
        open_data(name, **options)


def test_token_files_must_say_what_they_hold(tmp_path):
    np.save(tmp_path / "ids.npy", np.zeros(100, dtype=np.uint16))
    data = open_data(str(tmp_path / "ids.npy"), seq_len=10)  # ids of 0 alone, and the mask
    assert (data.spec.num_tokens, data.spec.mask_id) == (2, 1)
    (tmp_path / "raw.bin").write_bytes(bytes(100))
    with pytest.raises(CorpusFormatError, match="dtype"):
        open_data(str(tmp_path / "raw.bin"), num_tokens=10)


@pytest.mark.parametrize("name", ["tokens", "tokens.dat", "tokens.txt", "A.NPY"])
def test_token_ids_are_recognised_by_content(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        np.save(file, np.arange(100, dtype=np.uint16))
    data = open_data(tmp_path / name, seq_len=10)
    assert data.spec.render == "ids" and data.train[0].tolist() == [*range(10)]


def test_raw_ids_of_any_name_are_recognised_by_a_sidecar(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "tokens.u2")
    (tmp_path / "tokens.u2.json").write_text('{"dtype": "uint16"}')
    assert open_data(tmp_path / "tokens.u2", seq_len=10).spec.num_tokens == 101


def test_a_megatron_corpus_is_named_by_its_prefix(tmp_path):
    write_scattered_megatron(tmp_path, [np.arange(60), np.arange(40)])
    assert open_data(tmp_path / "scattered", seq_len=10).spec.num_tokens == 61


def test_text_has_no_columns(tmp_path):
    (tmp_path / "a.txt").write_text("words " * 100)
    with pytest.raises(CorpusFormatError, match="column='x' was given, but .* is not a table"):
        open_data(tmp_path / "a.txt", seq_len=10, column="x")


def test_a_large_corpus_is_not_read_for_its_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr("nar_kernels.data.sources._MAX_VALIDATED", 100)
    np.save(tmp_path / "a.npy", np.arange(100, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"a\.npy has 0 GiB, which are not read .* num_tokens"):
        open_data(tmp_path / "a.npy", seq_len=10)
    assert open_data(tmp_path / "a.npy", seq_len=10, num_tokens=500).spec.num_tokens == 500
    scan(Corpus(tmp_path / "a.npy"))  # as `nar-kernels inspect` does
    assert open_data(tmp_path / "a.npy", seq_len=10).spec.num_tokens == 101


# Mixtures


def write_mixture(folder, *sources):
    path = folder / "mix.json"
    path.write_text(json.dumps({"mixture": list(sources)}))
    return path


def test_a_mixture_of_files(tmp_path):
    ids = np.arange(1000, dtype=np.uint16)
    np.save(tmp_path / "a.npy", ids[:600])
    ids[600:].tofile(tmp_path / "b.bin")
    path = write_mixture(
        tmp_path,
        {"data": "a.npy", "weight": 3},
        {"data": "b.bin", "dtype": "uint16"},
    )
    data = open_data(path, seq_len=10, num_held_out=8, stride=5)
    assert data.spec == SequenceSpec(1001, 10, "ids", None)
    assert isinstance(data.train, Mixture)
    assert [str(share) for share in data.train.shares] == ["3/4", "1/4"]
    held_out = data.held_out.windows(data.held_out_windows)
    assert held_out[:, 0].tolist() == [*range(540, 600, 10), 980, 990]
    for dataset, first in zip(data.train.datasets, (540, 980), strict=True):
        assert dataset.windows(range(len(dataset))).max() < first
    data.validate()
    found = baselines(data.train, data.held_out, data.held_out_windows, per_position=False)
    assert 9 < found["unigram_entropy"].bits_per_token < 10
    loader = MaskedLoader(data.train, MaskingConfig(1001, 1000), 8)
    assert (loader.batch(0).clean_ids[:, 0] < 600).sum() == 6


@pytest.mark.parametrize(
    ("weights", "sizes", "num_held_out", "expected"),
    [
        ((99, 1), (40_000, 40_000), None, (253, 3)),
        ((99, 1), (40_000, 40_000), 100, (99, 1)),
        ((1, 1, 1), (1000, 1000, 1000), 4, (2, 1, 1)),
        ((999, 1), (1000, 1000), 10, (10, 1)),  # at least one
        ((1, 1), (40_000, 200), None, (2, 2)),  # a tenth of the small one
    ],
)
def test_windows_of_a_mixture_are_held_out_by_weight(
    tmp_path, weights, sizes, num_held_out, expected
):
    sources = []
    for i, (weight, size) in enumerate(zip(weights, sizes, strict=True)):
        np.save(tmp_path / f"{i}.npy", np.full(size, i, np.uint8))
        sources.append({"data": f"{i}.npy", "weight": weight})
    data = open_data(write_mixture(tmp_path, *sources), seq_len=10, num_held_out=num_held_out)
    of_source = data.held_out.windows(data.held_out_windows)[:, 0].bincount()
    assert tuple(of_source.tolist()) == expected


def test_a_file_named_like_a_built_in_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(b"my own " * 100)
    write_mixture(Path(), {"data": "./text"})
    data = open_data("mix.json", seq_len=7)
    assert bytes(data.train.windows([0])[0].tolist()) == b"my own "


def test_a_mixture_of_answers_and_of_all_tokens(tmp_path):
    """Where there is no loss mask, all tokens count."""
    pytest.importorskip("fsspec")
    pytest.importorskip("tqdm")
    pair = json.dumps({"prompt": "to be or not to be", "completion": "that is the question"})
    (tmp_path / "a.jsonl").write_text(f"{pair}\n" * 9)
    (tmp_path / "b.txt").write_text("whether tis nobler in the mind to suffer\n" * 9)
    for name in ("a.jsonl", "b.txt"):
        prepare(tmp_path / name, tmp_path / name[0], tokenizer="bytes", workers=1, quiet=True)
    data = open_data(write_mixture(tmp_path, {"data": "a"}, {"data": "b"}), seq_len=16)
    assert isinstance(data.train, Mixture)
    corpus = data.train.corpus
    text = bytes(corpus.read(0, len(corpus)).tolist())
    flags = corpus.loss_mask.read(0, len(corpus)).numpy()
    is_answer = [text[flags_at : flags_at + 2] for flags_at in np.flatnonzero(flags[:60])[:1]]
    assert is_answer == [b"th"] and 0 < flags.mean() < 1
    assert flags[text.index(b"whether") :].all()


def test_a_mixture_of_what_comes_along(tmp_path):
    (tmp_path / "mine.txt").write_bytes(b"some text of mine " * 400)
    path = write_mixture(tmp_path, {"data": "text", "weight": 0.9}, {"data": "mine.txt"})
    assert open_data(path).spec == SequenceSpec(257, 256, "bytes", None)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ([], r"mixture is \[\]: .*mix\.json must be like"),
        ({"data": "a"}, "mixture is {'data': 'a'}"),
        (["a.npy"], r"mixture\[0\] is 'a\.npy'"),
        ([{"data": 3}], r"mixture\[0\] is {'data': 3}"),
        ([{"data": "a.npy", "wieght": 3}], r"mixture\[0\] has 'wieght'"),
        ([{"data": "a.npy", "weight": "3"}], r"mixture\[0\] has the weight '3'"),
        ([{"data": "a.npy", "weight": -1}, {"data": "a.npy"}], "a weight is -1: it must be pos"),
        ([{"data": "a.npy"}, {"data": "text"}], r"text and .* differ in their render"),
        ([{"data": "gone.npy"}], r"there is no file .*gone\.npy"),
        ([{"data": "mix.json"}], r"mixture\[0\] is a mixture itself, .*mix\.json: name its"),
        ([{"data": "a.npy", "dtype": 16}], r"mixture\[0\] has the dtype 16"),
        ([{"data": "a.npy", "weight": True}], r"mixture\[0\] has the weight True"),
    ],
)
def test_wrong_mixtures(tmp_path, mixture, message):
    np.save(tmp_path / "a.npy", np.arange(600, dtype=np.uint16))
    path = tmp_path / "mix.json"
    path.write_text(json.dumps({"mixture": mixture}))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_data(path)


def test_a_mixture_that_is_not_json(tmp_path):
    path = tmp_path / "mix.json"
    path.write_text('{"mixture": [{"data": "a.npy"},]}')
    with pytest.raises(CorpusFormatError, match=r"mix\.json is no JSON \(.*column 32"):
        open_data(path)
    path.write_text('{"mixture": [{"data": "a.npy"}], "dtype": "uint16"}')
    with pytest.raises(CorpusFormatError, match=r"mix\.json has 'dtype' beside mixture"):
        open_data(path)


def test_json_that_is_text(tmp_path):
    path = tmp_path / "records.json"
    path.write_text('{"mixture of": "words"} ' * 200)
    assert open_data(path).spec.render == "bytes"


def test_data_in_several_files(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.arange(100, dtype=np.uint16) + 100 * i)
    for name in (tmp_path, f"{tmp_path}/*.npy"):
        data = open_data(name, seq_len=30, num_held_out=1)
        assert data.spec.num_tokens == 301
        assert data.held_out[0].tolist() == list(range(270, 300))


def test_windows_within_documents_are_held_out_whole(tmp_path):
    ids = np.arange(1, 401) % 40
    np.save(tmp_path / "a.npy", ids.astype("uint8"))
    data = open_data(
        tmp_path / "a.npy", eos_id=0, within_documents=True, seq_len=16, stride=8, num_held_out=4
    )
    windows = data.held_out.windows(data.held_out_windows)
    assert (windows[:, :-1] != 0).all() and len(windows) == 4
    starts = data.held_out.starts(data.held_out_windows)
    assert starts.diff().min() >= 16
    assert data.train.starts(torch.arange(len(data.train))).max() + 16 <= starts[0]
