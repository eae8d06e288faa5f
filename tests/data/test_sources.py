"""The data sets that come along, and files of a user's own."""

import numpy as np
import pytest
import torch

from nar_kernels.data.sources import SequenceSpec, open_data
from nar_kernels.errors import CorpusFormatError
from nar_kernels.training.baselines import baselines

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
        ("text", {"dtype": "int8"}, ValueError, "dtype is int8, but that of text is always uint8"),
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
    with pytest.raises(ValueError, match="--num-tokens 50258"):
        open_data(str(tmp_path / "ids.npy"))
    (tmp_path / "raw.bin").write_bytes(bytes(100))
    with pytest.raises(CorpusFormatError, match="dtype"):
        open_data(str(tmp_path / "raw.bin"), num_tokens=10)
