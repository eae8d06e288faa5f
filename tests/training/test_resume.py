"""`--resume` and `--overwrite`: which options, data and folders a run may go on with."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nar_kernels.cli.main import main
from nar_kernels.data.prepare import prepare
from nar_kernels.training import checkpoint
from nar_kernels.training.model import load_model
from nar_kernels.training.optim import learning_rate
from nar_kernels.training.train import train
from tests.helpers.runs import small, step_of

pytest.importorskip("x_transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_existing_run_is_not_overwritten_by_accident(sentences, tmp_path):
    config = small(sentences, tmp_path, steps=2)
    train(config)
    (tmp_path / "mine.txt").write_text("kept")
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(FileExistsError, match="--resume continues it, --overwrite starts again"):
        train(config)
    with pytest.raises(ValueError, match="seq_len"):  # a mistake is found before anything is lost
        train(replace(config, overwrite=True, seq_len=10**6))
    assert (tmp_path / "last.pt").read_bytes() == before
    report = train(replace(config, overwrite=True, seed=3))
    assert report["config"]["seed"] == 3
    assert (tmp_path / "mine.txt").read_text() == "kept"
    assert len(list((tmp_path / "tb").glob("*"))) == 1


def test_resume_refuses_another_course(sentences, tmp_path):
    config = small(sentences, tmp_path, steps=2)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        train(replace(config, resume=True))
    train(config)
    for change, message in (
        ({"lr": 1.0}, "--lr was 0.003 and is 1.0"),
        ({"steps": 1}, "--steps was 2 and is 1 now, but 2 are done"),
        ({"eval_draws": 3}, "--eval-draws was 2 and is 3"),
        ({"init": "other.pt"}, "--init was None and is other.pt"),
        ({"data": "text"}, "--data was .*fox.txt and is text now, which holds other tokens"),
    ):
        with pytest.raises(ValueError, match=f"cannot resume .*{message}"):
            train(replace(config, resume=True, **change))


def test_a_run_may_be_given_more_steps(sentences, tmp_path, capsys):
    config = small(sentences, tmp_path / "run", steps=6)
    train(config)
    train(replace(config, resume=True, steps=9, quiet=False))
    printed = capsys.readouterr().out
    assert "resuming from step 6: 3 of 9 remain" in printed
    was, now = 0.0, learning_rate(6, replace(config, steps=9))
    assert f"it is {now:.1e} now instead of {was:.1e}" in printed
    state = checkpoint.load(config.folder / "last.pt")
    assert state["loader"]["step"] == len(state["log"]["losses"]) == 9
    assert [step for step, *_ in state["log"]["curve"]] == [6, 9]
    assert state["config"]["steps"] == 9
    train(replace(config, resume=True, steps=9, quiet=False))
    printed = capsys.readouterr().out
    assert "resuming from step 9: 0 of 9 remain" in printed and "--steps was" not in printed


def test_data_may_move(sentences, tmp_path, monkeypatch):
    content = sentences.read_bytes()
    for name in ("start", "elsewhere", "start/run"):
        (tmp_path / name).mkdir()
    (tmp_path / "start" / "fox.txt").write_bytes(content)
    monkeypatch.chdir(tmp_path / "start")
    config = small(Path("fox.txt"), tmp_path / "start" / "run", steps=2)
    train(config)

    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = replace(config, resume=True)
    places = f"{tmp_path / 'elsewhere' / 'fox.txt'} and {tmp_path / 'start' / 'run' / 'fox.txt'}"
    with pytest.raises(FileNotFoundError, match=f"no file fox.txt .looked for {places}"):
        train(resumed)
    (tmp_path / "moved.txt").write_bytes(content)
    train(replace(resumed, data=tmp_path / "moved.txt"))
    state = checkpoint.load(config.folder / "last.pt")
    assert state["config"]["data"] == "fox.txt"  # nothing remained to be saved
    train(replace(resumed, data=tmp_path / "moved.txt", steps=3))
    state = checkpoint.load(config.folder / "last.pt")
    assert state["config"]["data"] == str(tmp_path / "moved.txt")

    (config.folder / "fox.txt").write_bytes(content)
    train(replace(resumed, steps=3))
    (tmp_path / "elsewhere" / "fox.txt").write_bytes(content.upper())  # comes first
    with pytest.raises(ValueError, match="fox.txt now, which holds other tokens .corpus_digest"):
        train(replace(resumed, steps=3))


def test_data_may_move_into_another_container(tmp_path, capsys):
    """What says the type of the ids is then another file, or another option."""
    ids = np.arange(4000, dtype=np.uint16) % 50
    ids.tofile(tmp_path / "ids.bin")
    np.save(tmp_path / "ids.npy", ids)
    np.save(tmp_path / "wider.npy", ids.astype(np.int64))
    raw = tmp_path / "ids.bin"
    config = small(raw, tmp_path / "run", steps=2, dtype="uint16", num_tokens=51)
    train(config)
    resume = ["train", "--resume", "--out", str(config.folder), "--quiet", "--steps"]
    assert main([*resume, "3", "--data", str(tmp_path / "ids.npy")]) == 0
    assert main([*resume, "4", "--data", str(raw), "--dtype", "uint16"]) == 0
    assert step_of(config.folder / "last.pt") == 4
    assert main([*resume, "5", "--data", str(tmp_path / "wider.npy")]) == 2
    assert "which holds other tokens" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()  # raw files again, whose type only the run knows
    ids.tofile(tmp_path / "folder" / "ids.bin")
    assert main([*resume, "6", "--data", str(tmp_path / "folder")]) == 0
    assert checkpoint.load(config.folder / "last.pt")["config"]["dtype"] == "uint16"
    assert main([*resume, "7", "--data", str(raw), "--dtype", "uint8"]) == 2
    assert "which holds other tokens" in capsys.readouterr().err


def test_a_table_may_become_another_container(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    ids = np.arange(4000, dtype=np.uint16) % 50
    rows = pa.array(ids.reshape(-1, 40).tolist(), pa.list_(pa.uint16()))
    parquet.write_table(pa.table({"mine": rows, "other": rows}), tmp_path / "a.parquet")
    np.save(tmp_path / "a.npy", ids)
    config = small(tmp_path / "a.parquet", tmp_path / "run", steps=2, column="mine", num_tokens=51)
    train(config)
    resume = ["train", "--resume", "--out", str(config.folder), "--quiet", "--steps"]
    assert main([*resume, "3", "--data", str(tmp_path / "a.npy")]) == 0
    assert checkpoint.load(config.folder / "last.pt")["config"]["column"] is None


def test_a_run_keeps_its_tokenizer(tmp_path):
    """Its ids are the same tokens; what new files say of them, or do not, changes nothing."""
    pytest.importorskip("tokenizers")
    (tmp_path / "poem.txt").write_text("to be or not to be, that is the question. " * 99)
    prepare(tmp_path / "poem.txt", tmp_path / "poem", train_bpe=300, workers=1, quiet=True)
    config = small(tmp_path / "poem", tmp_path / "run", steps=2)
    train(config)
    spec = load_model(config.folder / "last.pt")[1]
    assert spec.render == "text"
    (tmp_path / "poem" / "tokenizer.json").write_text("{}")
    (shard,) = (tmp_path / "poem").glob("tokens-*.npy")
    for steps, data in ((3, shard), (4, tmp_path / "poem")):
        train(replace(config, resume=True, data=data, steps=steps))
        assert load_model(config.folder / "last.pt")[1] == spec
    with pytest.raises(ValueError, match="the tokenizer of .*poem cannot be read: "):
        train(replace(config, out=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_new_run_looks_for_data_in_the_current_folder_alone(sentences, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.txt").write_bytes(sentences.read_bytes())
    with pytest.raises(FileNotFoundError, match="no file a.txt"):
        train(small(Path("a.txt"), tmp_path / "run"))
    assert os.listdir(tmp_path / "run") == ["a.txt"]


def test_resume_refuses_another_corpus(sentences, tmp_path):
    data = tmp_path / "data.txt"
    data.write_bytes(sentences.read_bytes())
    config = small(data, tmp_path / "run", steps=2)
    train(config)
    data.write_bytes(sentences.read_bytes().upper())
    with pytest.raises(ValueError, match="corpus_digest"):
        train(replace(config, resume=True))


def test_an_older_checkpoint_has_fewer_options(sentences, tmp_path):
    config = small(sentences, tmp_path, steps=2)
    train(config)
    state = checkpoint.load(tmp_path / "last.pt")
    for name in ("ema", "compile", "shard", "checkpoint_activations"):
        del state["config"][name]
    del state["ema"]
    checkpoint.save(tmp_path / "last.pt", state)
    train(replace(config, resume=True))
    with pytest.raises(ValueError, match="--ema was 0.0 and is 0.5"):
        train(replace(config, resume=True, ema=0.5))
    load_model(tmp_path / "last.pt")
