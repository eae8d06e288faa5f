"""Options of a training run: checked, and plain."""

import json
import math
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from nar_kernels.training import checkpoint
from nar_kernels.training.config import TrainConfig
from nar_kernels.training.train import train
from tests.helpers.runs import small

pytest.importorskip("x_transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads is 3: it must divide dim"),
        ({"shift_tokens": -1}, "shift_tokens is -1: it must be at least 0"),
        ({"dim": 8, "heads": 1, "shift_tokens": 4}, "shift_tokens is 4: it must be below half of"),
        ({"dim": 12}, "dim / heads is 3.*--no-rotary"),
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"ema": 1.0}, r"ema is 1.0: it must be in \[0, 1\)"),
        ({"schedule": "quadratic"}, "schedule is 'quadratic'.*cosine"),
        ({"accumulate": 33}, "a batch has only 32 sequences"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"lr": math.inf}, "lr is inf"),
        ({"clip": math.nan}, "clip is nan"),
        ({"weight_decay": math.nan}, "weight_decay is nan: it must be at least 0"),
        ({"warmup": -1}, "warmup is -1: it must be at least 0"),
        ({"num_tokens": 1}, r"num_tokens is 1: it must be in \[2, 2\*\*31\)"),
        ({"seed": 1 << 64}, "seed is 18446744073709551616: it must have 64 bits"),
        ({"threads": np.int64(0)}, "threads is 0"),
        ({"batch_size": 1 << 31}, r"batch_size is 2147483648: it must be below 2\*\*31"),
        ({"num_tokens": 1 << 31}, "num_tokens is 2147483648"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig("digits", **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", value) for value in (1.0, "3", True, None, np.float32(3), [3])),
        *(("lr", value) for value in ("0.1", True, None, np.bool_(True))),
        *(("rotary", value) for value in (1, "yes", None)),
        *(("out", value) for value in (3, b"runs")),
        *(("data", value) for value in (3, b"digits", None)),
        *(("schedule", value) for value in (3, None)),
        *(("threads", value) for value in (1.5, "2", False)),
        *(("dtype", value) for value in (np.uint16, torch.uint8)),
    ],
)
def test_options_of_the_wrong_type_are_named(name, value):
    with pytest.raises(TypeError, match=f"^{name} is .*: it must be "):
        TrainConfig(**{"data": "digits", name: value})


def test_numbers_of_numpy_and_paths_become_plain(sentences, tmp_path):
    options = {
        **{"steps": np.int64(2), "batch_size": np.uint8(8), "seed": np.uint64((1 << 64) - 1)},
        **{"lr": np.float32(0.5), "warmup": np.array(1), "dropout": 0, "rotary": np.bool_(True)},
        **{"held_out": np.int32(8), "precision": np.str_("fp32")},
    }
    config = small(sentences, tmp_path, **options)
    config = replace(config, data=sentences, out=tmp_path)
    plain = TrainConfig(**json.loads(json.dumps(config.to_dict())))
    assert plain == config
    for name, value in config.to_dict().items():
        assert type(value) in (str, int, float, bool, type(None)), name
    assert TrainConfig.for_data(Path("digits")).dim == 96
    report = train(config)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert checkpoint.load(tmp_path / "last.pt")["config"] == config.to_dict()


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 40),
    st.sampled_from([10**400, 1 << 31, 1 << 64, -(1 << 63), np.int64(3), np.bool_(True)]),
    st.floats(),
    st.sampled_from([np.float32(0.5), np.float16(np.inf), Fraction(1, 3), 1j]),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.sampled_from(
        ["digits", "cosine", "auto", "bf16", Path("a"), torch.tensor(3), torch.ones(2)]
    ),
    st.lists(st.integers(), max_size=2),
)
OPTIONS = [f.name for f in fields(TrainConfig)]


@given(st.dictionaries(st.sampled_from(OPTIONS), ANYTHING, max_size=3))
@example({"lr": 10**400})
@example({"seed": 1 << 63, "out": Path("a")})
def test_any_options_are_valid_or_named(options):
    try:
        config = TrainConfig(**{"data": "digits", **options})
    except (TypeError, ValueError) as error:
        named = {name for name in OPTIONS if name in str(error).replace("-", "_")}
        assert named & {*options}, error
        return
    plain = json.loads(json.dumps(config.to_dict()))
    assert TrainConfig(**plain) == config
    once = {"resume": False, "overwrite": False, "quiet": False}
    assert TrainConfig.continued(plain) == replace(config, **once)
    TrainConfig.continued(plain).refuse_to_continue(plain, done=config.steps)


@pytest.mark.parametrize(
    ("data", "folder"),
    [
        ("digits", "digits"),
        ("a/corpus.bin", "corpus"),
        ("shards/*.bin", "shards"),
        ("a/b/part-[0-9]/*.bin", "b"),
        (".", "here"),
        ("..", "above"),
        ("*.bin", "here"),
    ],
)
def test_the_folder_of_a_run_is_named_after_its_data(tmp_path, monkeypatch, data, folder):
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    assert TrainConfig(data).folder == Path("runs") / folder


def test_a_run_is_named_after_a_link_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus-3").mkdir()
    (tmp_path / "latest").symlink_to("corpus-3")
    assert TrainConfig("latest").folder == Path("runs/latest")


def test_data_without_a_name():
    with pytest.raises(ValueError, match="out is not given, and / has no name"):
        _ = TrainConfig("/").folder


def test_the_stride_of_a_preset_divides_another_seq_len():
    assert TrainConfig.for_data("text").stride == 32
    assert TrainConfig.for_data("text", seq_len=96).stride == 32
    assert TrainConfig.for_data("text", seq_len=100).stride is None
    assert TrainConfig.for_data("text", seq_len=100, stride=25).stride == 25
