"""Class-conditional training, from image codes with labels to samples of a class."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from nar_kernels.cli.main import main
from nar_kernels.data.prepare.pipeline import prepare
from nar_kernels.data.sources import open_data
from nar_kernels.likelihood import evaluate
from nar_kernels.training import checkpoint
from nar_kernels.training.config import TrainConfig
from nar_kernels.training.model import load_model
from nar_kernels.training.train import Run, train
from tests.helpers.runs import killed_in_step, rgb, same, small

pytest.importorskip("x_transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CODEBOOK, HEIGHT, WIDTH, N = 37, 4, 6, 96
LABELS = np.arange(N) % 2
# An image of a class has one of two codes at each position.
PATTERNS = np.random.default_rng(0).integers(0, CODEBOOK - 1, (2, HEIGHT, WIDTH))
NOISE = np.random.default_rng(1).integers(0, 2, (N, HEIGHT, WIDTH))
CODES = PATTERNS[LABELS] + NOISE


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    np.save(folder / "codes.npy", CODES.astype(np.uint16))
    np.save(folder / "labels.npy", LABELS)
    prepare(
        folder / "codes.npy",
        folder / "prepared",
        labels=folder / "labels.npy",
        vocab_size=CODEBOOK,
        quiet=True,
    )
    return folder


def options(codes, out, **more) -> TrainConfig:
    settings = {"seq_len": None, "labels": "data", "held_out": 16, "dropout": 0.0, "lr": 1e-2}
    settings |= {"dim": 64, "heads": 2, "batch_size": 16, "steps": 150, "eval_every": 150}
    return small(codes / "prepared", out, **{**settings, **more})


@pytest.fixture(scope="module")
def learnt(codes, tmp_path_factory):
    """The report and the folder of a run that can tell the classes apart."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run") / "out"
    return train(options(codes, out)), out


def share_of_class(ids: np.ndarray, class_id: int) -> float:
    there = ids.reshape(-1, HEIGHT, WIDTH) - PATTERNS[class_id]
    return ((there == 0) | (there == 1)).mean()


def test_generate_makes_the_class_that_is_asked_for(learnt, tmp_path):
    _, out = learnt
    command = ["generate", "--checkpoint", str(out / "best.pt"), "--strategy", "halton"]
    ids = tmp_path / "ids.npy"
    for class_id in (0, 1):
        asked = ["--class", str(class_id), "--num-samples", "4", "--guidance-scale", "2"]
        assert main([*command, *asked, "--out", str(ids)]) == 0
        images = np.load(ids)
        assert images.shape == (4, HEIGHT * WIDTH) and images.max() < CODEBOOK
        assert share_of_class(images, class_id) > 0.9
        assert share_of_class(images, 1 - class_id) < 0.5
    assert main([*command, "--class", "1", "0", "--out", str(ids)]) == 0
    rows = np.load(ids)
    assert len(rows) == 16 and share_of_class(rows[:8], 1) > 0.9
    assert share_of_class(rows[8:], 0) > 0.9
    assert main([*command, "--num-samples", "3", "--out", str(ids)]) == 0  # of any class
    prompt = " ".join(map(str, PATTERNS[1].flatten()[:3]))
    prompted = ["--class", "1", "--prompt", prompt, "--num-samples", "2", "--guidance-scale", "1.5"]
    assert main([*command, *prompted, "--out", str(ids)]) == 0
    assert (np.load(ids)[:, :3] == PATTERNS[1].flatten()[:3]).all()


def test_a_picture_has_a_row_for_each_class(learnt, tmp_path):
    report, out = learnt
    assert report["files"]["samples_by_class"] == "classes.png"
    command = ["generate", "--checkpoint", str(out / "last.pt"), "--class", "0", "1"]
    assert main([*command, "--num-samples", "6", "--out", str(tmp_path / "a.png")]) == 0
    gap, pixels, margin = 8, 6, 36

    def size(rows: int, columns: int) -> tuple[int, int]:
        cells = (rows, HEIGHT), (columns, WIDTH)
        return tuple(n * (of * pixels + gap) - gap + margin for n, of in cells)

    assert rgb(tmp_path / "a.png").shape[:2] == size(2, 3)
    title = 26
    height, width = size(2, 8)
    assert rgb(out / "classes.png").shape[:2] == (height + title, width)


def test_evaluation_is_given_the_true_class(codes, learnt):
    report, out = learnt
    model, spec = load_model(out / "last.pt")
    assert spec.num_classes == 2 and spec.image_shape == (HEIGHT, WIDTH)
    data = open_data(codes / "prepared", labels="data", num_held_out=16)
    assert data.held_out_classes.tolist() == LABELS[-16:].tolist()
    assert data.train_classes.tolist() == LABELS[:-16].tolist()
    bits = {}
    for name, class_ids in (
        ("true", data.held_out_classes),
        ("wrong", 1 - data.held_out_classes),
        ("none", torch.full((16,), 2)),
    ):
        bits[name] = evaluate(
            model.net,
            data.held_out,
            data.held_out_windows,
            draws=2,
            device=CPU,
            class_ids=class_ids,
        ).bits_per_token
    assert bits["true"] == pytest.approx(report["bits_per_token"], rel=1e-5)
    assert bits["true"] < bits["none"] < bits["wrong"]
    with pytest.raises(ValueError, match=rf"class_ids has shape \[{N}\]: it must be \[16\]"):
        where = data.held_out, data.held_out_windows
        evaluate(model.net, *where, draws=2, device=CPU, class_ids=torch.from_numpy(LABELS))


def test_a_run_goes_on_bit_for_bit(codes, tmp_path):
    whole = options(codes, tmp_path / "whole", steps=12, dropout=0.1)
    train(whole)
    parts = dataclasses.replace(whole, out=str(tmp_path / "parts"))
    killed_in_step(11, parts, CPU)
    # The labels have moved.
    again = dataclasses.replace(parts, resume=True, labels=str(codes / "labels.npy"))
    train(again)
    states = [checkpoint.load(config.folder / "last.pt") for config in (whole, parts)]
    for name in ("model", "optimizer", "loader"):
        assert same(states[0][name], states[1][name]), name
    for change in ({"class_dropout": 0.2}, {"labels": None}):
        with pytest.raises(ValueError, match="cannot"):
            train(dataclasses.replace(again, **change, steps=13))
    np.save(tmp_path / "other.npy", LABELS[::-1])
    with pytest.raises(ValueError, match="classes_digest"):
        train(dataclasses.replace(again, labels=str(tmp_path / "other.npy"), steps=13))


def test_without_labels_nothing_changes(codes, tmp_path):
    with_labels, without = (
        Run(options(codes, tmp_path / name, labels=labels), CPU)
        for name, labels in (("a", "data"), ("b", None))
    )
    assert without.loader.batch(0).class_ids is None
    assert not any("class" in name for name in without.model.state_dict())
    added = set(with_labels.model.state_dict()) - set(without.model.state_dict())
    assert added == {"net.embeds.class_embed.weight"}
    assert without.data.spec.num_classes is None


def test_weights_of_another_number_of_classes_do_not_start_a_run(codes, learnt, tmp_path):
    config = options(codes, tmp_path / "run", labels=None, init=learnt[1] / "last.pt")
    with pytest.raises(ValueError, match="takes 2 classes, and this one none"):
        train(config)


def test_texts_may_have_classes(sentences, tmp_path):
    count = len(sentences.read_bytes()) // 16
    np.save(tmp_path / "labels.npy", np.arange(count) % 3)
    config = small(sentences, tmp_path / "run", labels=tmp_path / "labels.npy", steps=2)
    report = train(config)
    assert report["files"]["samples"] == "samples.txt"
    assert json.loads((tmp_path / "run" / "report.json").read_text())["config"]["labels"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"labels": "missing.npy"}, "there is no file missing.npy"),
        ({"pack": True}, "--pack and --labels exclude each other"),
        ({"shift_epochs": True}, "--labels and --shift-epochs exclude each other"),
        ({"cuda_graph": True}, "--labels and --cuda-graph exclude each other"),
        ({"class_dropout": 1.5}, "class_dropout is 1.5"),
        ({"labels": None, "class_dropout": 0.2}, "there are no classes to drop"),
    ],
)
def test_options_that_do_not_fit(codes, tmp_path, more, message):
    with pytest.raises((ValueError, OSError), match=message):
        train(options(codes, tmp_path / "run", **more))


def test_labels_that_do_not_fit(codes, sentences, tmp_path):
    path = tmp_path / "labels.npy"
    for labels, error, message in (
        (LABELS[1:], ValueError, rf"must be \[{N}\], a class for each window"),
        (LABELS - 1, ValueError, "holds -1"),
        (LABELS / 2, TypeError, "classes are integers"),
    ):
        np.save(path, labels)
        with pytest.raises(error, match=message):
            open_data(codes / "prepared", labels=path)
    for content in (b"no array", b"PK\3\4 no archive", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no .npy file"):
            open_data(codes / "prepared", labels=path)
    with pytest.raises(ValueError, match="holds none: give a .npy file"):
        open_data(sentences, labels="data")
    with pytest.raises(ValueError, match="windows overlap"):
        open_data(sentences, labels="data", seq_len=16, stride=8)
    mixture = tmp_path / "mix.json"
    both = [{"data": str(sentences), "weight": 1}] * 2
    mixture.write_text(json.dumps({"mixture": both}))
    with pytest.raises(ValueError, match="mixture of 2 sources"):
        open_data(mixture, labels="data")


def test_mistakes_on_the_command_line(learnt, capsys, tmp_path):
    best = ["generate", "--checkpoint", str(learnt[1] / "best.pt")]
    for given, message in (
        (["--class", "2"], "--class is 2: it must be in [0, 2)"),
        (["--class", "-1"], "--class is -1"),
        (["--class", "0", "1", "--num-samples", "3"], "give as many of each class"),
        (["--guidance-scale", "2"], "give --class, --prompt or --infill"),
    ):
        assert main([*best, *given]) == 2
        assert message in capsys.readouterr().err
