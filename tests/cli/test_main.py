"""The command line: what it prints, and its exit status."""

import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from nar_kernels.cli.main import _in_options, main
from nar_kernels.cli.train import NAMES
from nar_kernels.options import option_of
from nar_kernels.sampling.config import SamplingConfig
from nar_kernels.training import checkpoint
from nar_kernels.training.config import FREE_ON_RESUME, TrainConfig
from nar_kernels.training.interrupt import SIGNALS, Interrupted

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = "--dim 32 --depth 1 --heads 1 --batch-size 4 --threads 1 --eval-draws 1 --device cpu".split()


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory) -> Path:
    pytest.importorskip("x_transformers")
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", "--data", "digits", "--out", str(out), "--steps", "3", *TINY]) == 0
    return out


@pytest.fixture(scope="module")
def text_run(tmp_path_factory) -> Path:
    pytest.importorskip("x_transformers")
    folder = tmp_path_factory.mktemp("text")
    (folder / "abc.txt").write_bytes(b"abc" * 200)
    data = ["--data", str(folder / "abc.txt"), "--seq-len", "8", "--out", str(folder / "run")]
    assert main(["train", *data, "--steps", "3", *TINY]) == 0
    return folder / "run"


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a mistake is answered with."""
    assert main([str(argument) for argument in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nar-kernels: ") and error.count("\n") == 1
    return error


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in ("torch", torch.__version__, "reference", "cpp", "simd", "x-transformers"):
        assert words in out


def test_doctor_says_why(capsys, monkeypatch):
    monkeypatch.setattr("nar_kernels.cli.doctor.backends", lambda: {"cpp": "no compiler"})
    monkeypatch.setattr("nar_kernels.cli.doctor.cpp", None)
    monkeypatch.setattr("nar_kernels.cli.doctor.version", lambda package: None)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "no compiler" in out and "not installed: pip install 'x-transformers>=" in out


def test_every_option_is_on_the_command_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all("--" + f.name.replace("_", "-") in out for f in fields(TrainConfig))


def test_train_says_what_it_does(digits_run, capsys, tmp_path):
    out = tmp_path / "run"
    assert main(["train", "--data", "digits", "--out", str(out), "--steps", "2", *TINY]) == 0
    printed = capsys.readouterr().out
    for words in (
        "1617 windows of 64 tokens",
        "180 held out",
        " parameters",
        "2.360 (frequencies at each position)",
        "step      2:",
        "bits per token held out",
        str(out / "filmstrip.png"),
        str(out / "report.json"),
    ):
        assert words in printed
    assert (out / "filmstrip.png").read_bytes().startswith(b"\x89PNG")


def test_quiet(capfd, tmp_path):
    pytest.importorskip("x_transformers")
    (tmp_path / "a").write_bytes(b"abc" * 200)
    argv = ["--data", str(tmp_path / "a"), "--out", str(tmp_path / "run"), "--seq-len", "8"]
    assert main(["train", *argv, "--steps", "1", "--quiet", *TINY]) == 0
    assert capfd.readouterr().out == ""


def test_resume_takes_its_options_from_the_run(text_run, capsys):
    """The run is complete: only the report is written again."""
    (text_run / "report.json").unlink()
    assert main(["train", "--resume", "--out", str(text_run)]) == 0
    assert (text_run / "report.json").exists()
    assert "--lr was 0.001 and is 0.5" in fails(
        capsys, "train", "--resume", "--out", text_run, "--lr", "0.5"
    )


SWITCHES = [
    name
    for name in sorted(FREE_ON_RESUME)
    if isinstance(getattr(TrainConfig("digits"), name), bool)
]


@pytest.mark.parametrize("name", sorted({*SWITCHES} - {"resume", "overwrite", "quiet"}))
def test_a_switch_of_a_run_is_undone_on_resume(text_run, monkeypatch, name):
    """It may change, and what a run was started with is its default."""
    configs: list[TrainConfig] = []
    monkeypatch.setattr("nar_kernels.cli.train.train", configs.append)
    saved = checkpoint.read(text_run / "last.pt")
    saved["config"][name] = True
    monkeypatch.setattr("nar_kernels.cli.train.checkpoint.read", lambda path: saved)
    resume = ["train", "--resume", "--out", str(text_run)]
    assert main(resume) == 0 and main([*resume, option_of(f"no_{name}")]) == 0
    assert [getattr(config, name) for config in configs] == [True, False]


def test_what_was_said_of_one_call_is_no_default_of_the_next(text_run, monkeypatch):
    configs: list[TrainConfig] = []
    monkeypatch.setattr("nar_kernels.cli.train.train", configs.append)
    saved = checkpoint.read(text_run / "last.pt")
    saved["config"] |= {"quiet": True, "overwrite": True}
    monkeypatch.setattr("nar_kernels.cli.train.checkpoint.read", lambda path: saved)
    assert main(["train", "--resume", "--out", str(text_run)]) == 0
    assert configs[0].resume and not configs[0].quiet and not configs[0].overwrite


def test_a_graph_is_given_up_on_resume(text_run, capsys, tmp_path):
    """On a machine without a GPU; the error says how."""
    out = tmp_path / "run"
    shutil.copytree(text_run, out)
    state = checkpoint.load(out / "last.pt")
    state["config"]["cuda_graph"] = True
    checkpoint.save(out / "last.pt", state)
    resume = "train", "--resume", "--out", out, "--steps", 4
    assert fails(capsys, *resume).endswith("or --no-cuda-graph\n")
    assert main([*map(str, resume), "--no-cuda-graph"]) == 0
    assert checkpoint.load(out / "last.pt")["loader"]["step"] == 4


def test_mistakes_in_train(capsys, tmp_path, text_run):
    assert "no file nowhere.txt" in fails(capsys, "train", "--data", "nowhere.txt")
    assert "give --data" in fails(capsys, "train")
    assert "needs --out" in fails(capsys, "train", "--resume")
    assert "no checkpoint" in fails(capsys, "train", "--resume", "--out", tmp_path)
    assert "holds a run" in fails(capsys, "train", "--data", "text", "--out", text_run)
    assert "--heads is 5: it must divide --dim, which is 96" in fails(
        capsys, "train", "--data", "digits", "--heads", 5
    )
    assert "ema is 1.5" in fails(capsys, "train", "--data", "digits", "--ema", 1.5)
    out = "--out", tmp_path / "shards"
    assert "torchrun" in fails(capsys, "train", "--data", "digits", "--shard", *out)
    np.save(tmp_path / "ids.npy", np.full(1000, 300, dtype=np.int32))
    assert "token id 300 at offset 0 of" in fails(
        capsys, "train", "--data", tmp_path / "ids.npy", "--num-tokens", 300, *out
    )
    (tmp_path / "short.txt").write_bytes(b"short")
    assert "less than one window" in fails(capsys, "train", "--data", tmp_path / "short.txt")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--data", "digits", "--steps", "many"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("package", ["x_transformers", "tqdm", "sklearn.datasets"])
def test_a_missing_package_is_named(capsys, monkeypatch, tmp_path, package):
    pytest.importorskip("x_transformers")
    monkeypatch.setitem(sys.modules, package, None)
    error = fails(capsys, "train", "--data", "digits", "--out", tmp_path / "run")
    assert f"{package} is not installed: run `pip install 'x-transformers>=" in error
    assert not (tmp_path / "run").exists()


def test_generate_images(digits_run, capsys, tmp_path):
    command = ["generate", "--checkpoint", str(digits_run / "last.pt"), "--num-samples", "3"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 3 * 8 + 2
    for suffix in ("npy", "png", "txt"):
        assert main([*command, "--out", str(tmp_path / f"a.{suffix}")]) == 0
    ids = np.load(tmp_path / "a.npy")
    assert ids.shape == (3, 64) and 0 <= ids.min() and ids.max() < 17
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.txt").read_text() == printed


def test_generate_text(text_run, capsys, tmp_path):
    command = ["generate", "--checkpoint", str(text_run / "best.pt"), "--steps", "4"]
    assert main([*command, "--seed", "1"]) == 0
    first = capsys.readouterr().out
    assert first.count("-" * 72) == 15
    assert main([*command, "--seed", "1"]) == 0
    assert capsys.readouterr().out == first
    assert main([*command, "--seed", "2"]) == 0
    assert capsys.readouterr().out != first


def generate(run: Path, *options: object) -> int:
    return main(["generate", "--checkpoint", str(run / "best.pt"), *map(str, options)])


def test_prompts(text_run, digits_run, capsys, tmp_path):
    out = tmp_path / "a.npy"
    assert generate(text_run, "--prompt", "ab[", "--num-samples", 3, "--out", out) == 0
    ids = np.load(out)
    assert ids.shape == (3, 8) and (ids[:, :3] == list(b"ab[")).all()
    infill = ["--infill", "a[MASK:2]b[MASK]c", "--strategy", "margin", "--guidance-scale", 1.5]
    assert generate(text_run, *infill, "--out", out) == 0
    ids = np.load(out)
    assert ids.shape == (16, 8) and (ids[:, [0, 3, 5]] == list(b"abc")).all()
    assert generate(digits_run, "--prompt", "3 4 5", "--out", out, "--strategy", "halton") == 0
    assert (np.load(out)[:, :3] == [3, 4, 5]).all()
    half = np.load(out)[:2]
    half[:, 32:] = -1
    np.save(tmp_path / "half.npy", half)
    assert generate(digits_run, "--infill", tmp_path / "half.npy", "--out", out) == 0
    assert np.load(out).shape == (2, 64) and (np.load(out)[:, :32] == half[:, :32]).all()


def test_lengths(text_run, digits_run, capsys, tmp_path):
    out = tmp_path / "a.npy"
    assert generate(text_run, "--length", 5, "--num-samples", 3, "--out", out) == 0
    assert np.load(out).shape == (3, 5)
    assert generate(text_run, "--prompt", "ab", "--max-new-tokens", 4, "--out", out) == 0
    assert np.load(out).shape == (16, 6)
    halton = "--strategy", "halton", "--length", 4, "--out", out
    assert generate(text_run, *halton) == 0 and np.load(out).shape == (16, 4)
    for options, message in (
        (["--length", 9], "--length is 9: the net takes 8 at most"),
        (["--length", 1, "--prompt", "ab"], "a prompt has 2 ids, but length is 1"),
        (["--max-new-tokens", 7, "--prompt", "ab"], "--max-new-tokens is 7, after a prompt of 2"),
        (["--length", 2, "--max-new-tokens", 7], "--length is 2 and --max-new-tokens is 7: give"),
        (["--strategy", "halton", "--length", 5], "this model makes 5 tokens"),
        (["--eos", "never"], "--eos is never, but the model has no tokenizer that says"),
        (["--eos-id", 300], "--eos-id is 300: it must be in [0, 257)"),
    ):
        last = text_run / "last.pt"
        assert message in fails(capsys, "generate", "--checkpoint", last, *options)
    last = digits_run / "last.pt"
    error = fails(capsys, "generate", "--checkpoint", last, "--length", 49)
    assert "this model makes images of 8 x 8: leave out --length" in error


def test_ends(text_run, capsys, tmp_path):
    out, options = tmp_path / "a.npy", ["--prompt", "ab", "--num-samples", 4]
    assert generate(text_run, *options, "--out", out) == 0
    ids = np.load(out)
    end = ids[0, 4]
    first = (ids[:, 2:] == end).argmax(1) + 3
    for i, row in enumerate(ids):
        if end in row[2:]:
            row[first[i] :] = end
    assert generate(text_run, *options, "--eos-id", end, "--out", out) == 0
    assert (np.load(out) == ids).all()
    capsys.readouterr()
    assert generate(text_run, *options, "--eos-id", end) == 0
    shown = capsys.readouterr().out.split("\n" + "-" * 72 + "\n")
    text = bytes(ids[0, : first[0] - 1].tolist()).decode(errors="replace")
    assert shown[0] == text


@pytest.mark.parametrize(
    "chosen",
    [
        ("confidence", "--remask"),
        ("entropy", "--remask"),
        ("threshold", "--remask"),
        ("quota", "--steps", 32, "--threshold", 0.5, "--editing-threshold", 0.3),
        ("factor", "--factor", 2),
        ("entropy_bound", "--entropy-bound", 0.5),
        ("remdm_cap", "--eta", 0.2),
        ("remdm_rescale", "--eta", 0.5),
    ],
    ids=lambda chosen: chosen[0],
)
def test_strategies(text_run, capsys, chosen):
    options = ["--strategy", *chosen, "--block-length", 4, "--num-samples", 2]
    assert generate(text_run, *options, "--temperature", 0.5) == 0
    assert "-" * 72 in capsys.readouterr().out


def test_html(digits_run, capsys, tmp_path):
    page = tmp_path / "a.html"
    assert generate(digits_run, "--num-samples", 2, "--html", page) == 0
    assert str(page) in capsys.readouterr().out
    assert page.read_text().lower().startswith("<!doctype html>")


@pytest.mark.parametrize("name", ["digits_run", "text_run"])
def test_watching_in_a_terminal(name, request, capsys, monkeypatch):
    run = request.getfixturevalue(name)
    capsys.readouterr()  # of the training, if this is the first test of the run
    assert generate(run, "--num-samples", 2, "--steps", 4) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert generate(run, "--num-samples", 2, "--steps", 4) == 0
    shown = capsys.readouterr().out
    assert shown.endswith(expected)  # as without a terminal, when all is done
    frames = shown[: -len(expected)].split("\x1b[J")[1:]
    assert [frame.splitlines()[0] for frame in frames if frame] == [
        f"step {step} of 4, {share}% masked" for step, share in enumerate((100, 75, 50, 25, 0))
    ]
    assert "░" in frames[0] and "░" not in frames[4]


def test_mistakes_in_generate(text_run, capsys, tmp_path):
    last = text_run / "last.pt"
    assert "no checkpoint" in fails(capsys, "generate", "--checkpoint", tmp_path / "x.pt")
    (tmp_path / "x.pt").write_text("x")
    assert "not a checkpoint" in fails(capsys, "generate", "--checkpoint", tmp_path / "x.pt")
    assert "not images" in fails(capsys, "generate", "--checkpoint", last, "--out", "a.png")
    assert "--num-samples is 0" in fails(
        capsys, "generate", "--checkpoint", last, "--num-samples", 0
    )
    assert "--filter-thres is 2.0" in fails(
        capsys, "generate", "--checkpoint", last, "--filter-thres", 2
    )
    for options, message in (
        (["--prompt", "abcdefghi"], "a prompt has 9 ids: the net takes 8 at most"),
        (["--infill", "[MASK:9]"], "a prompt has 9 ids"),
        (["--infill", "x.npy"], "No such file"),
        (["--steps", 2, "--block-length", 1], "steps is 2: it must be at least 8"),
        (["--guidance-scale", 2], "nothing to be guided by"),
        (["--strategy", "random", "--choice-temperature", 1], "has no meaning"),
        (["--top-k", 3, "--filter-thres", 0.5], "--top-k and --filter-thres exclude each other"),
    ):
        assert message in fails(capsys, "generate", "--checkpoint", last, *options)


def test_mistakes_in_prompts_of_ids(digits_run, capsys, tmp_path):
    np.save(tmp_path / "float.npy", np.zeros(3))
    (tmp_path / "no.npy").write_text("x")
    for prompt, message in (
        ("a b", "this model takes ids, numbers separated by blanks"),
        ("1 99", "the prompt holds id 99: ids must be in [0, 18), with 17 where"),
        (tmp_path / "float.npy", r"float64 [3]: a prompt is integers"),
        (tmp_path / "no.npy", "is no .npy file"),
    ):
        last = digits_run / "last.pt"
        error = fails(capsys, "generate", "--checkpoint", last, "--prompt", prompt)
        assert message in error


@pytest.mark.parametrize(
    ("option", "value", "valid"),
    [
        *(("--num-samples", value, "in [1, 2**31)") for value in (0, -1, 1 << 31)),
        *(("--steps", value, "in [1, 2**31)") for value in (0, -3)),
        *(("--block-length", value, "in [1, 2**31)") for value in (0, -4)),
        *(("--temperature", value, "at least 0 and finite") for value in ("-1.0", "nan", "inf")),
        *(("--choice-temperature", value, "at least 0 and") for value in ("-0.5", "nan", "inf")),
        *(("--guidance-scale", value, "finite") for value in ("nan", "inf")),
        *(("--top-k", value, "in [1, 2**31)") for value in (0, -1)),
        *(("--top-p", value, "in (0, 1]") for value in ("0.0", "-0.5", "1.1", "nan")),
        *(("--filter-thres", value, "in [0, 1]") for value in ("-0.1", "1.5", "nan", "inf")),
        *(("--threshold", value, "in [0, 1]") for value in ("-0.1", "90.0", "nan", "inf")),
        *(("--eta", value, "in [0, 1]") for value in ("-0.1", "1.5")),
        *(("--editing-threshold", value, "in [0, 1]") for value in ("-0.1", "1.5")),
        *(("--factor", value, "at least 0 and finite") for value in ("-0.1", "inf")),
        *(("--entropy-bound", value, "at least 0 and finite") for value in ("-0.1", "nan")),
        *(("--seed", value, "64 bits") for value in (1 << 64, -(1 << 63) - 1)),
    ],
)
def test_numbers_of_generate_are_checked_before_any_work(
    text_run, capsys, monkeypatch, option, value, valid
):
    monkeypatch.setattr("nar_kernels.cli.generate.load_model", None)
    options = f"{option}={value}", "--prompt", "a"
    error = fails(capsys, "generate", "--checkpoint", text_run / "last.pt", *options)
    assert error.startswith(f"nar-kernels: {option} is {value}: it must ") and valid in error


def test_every_option_of_sampling_is_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    out = capsys.readouterr().out
    options = {option_of(f.name) for f in fields(SamplingConfig) if f.name != "grid"}
    assert all(option in out for option in options)


@pytest.mark.parametrize("seed", [(1 << 64) - 1, -(1 << 63)])
def test_seeds_have_64_bits(text_run, capsys, tmp_path, seed):
    assert generate(text_run, f"--seed={seed}", "--num-samples", 1) == 0
    argv = ["--data", str(text_run.parent / "abc.txt"), "--seq-len", "8", "--steps", "1", *TINY]
    assert main(["train", *argv, f"--seed={seed}", "--out", str(tmp_path / "run")]) == 0
    assert "--seed is" in fails(capsys, "train", *argv, f"--seed={1 << 64}")


def test_where_samples_cannot_be_written(text_run, digits_run, capsys, tmp_path, monkeypatch):
    """Known before anything is decoded."""
    monkeypatch.setattr("nar_kernels.cli.generate._states", None)
    (tmp_path / "file").write_text("")
    for option, path, message in (
        ("--out", tmp_path / "a.jpg", "ends in .jpg: write .npy (ids), .png (images), or .txt"),
        ("--out", tmp_path / "a.npz", "ends in .npz"),
        ("--out", tmp_path / "no" / "a.npy", f"there is no folder {tmp_path / 'no'}"),
        ("--html", tmp_path / "no" / "a.html", f"there is no folder {tmp_path / 'no'}"),
        ("--out", tmp_path / "file" / "a.txt", f"there is no folder {tmp_path / 'file'}"),
        ("--out", tmp_path, "it is a folder; name a file in it"),
        ("--html", tmp_path, "it is a folder; name a file in it"),
    ):
        last = digits_run / "last.pt"
        assert message in fails(capsys, "generate", "--checkpoint", last, option, path)
    assert "written to a .html file" in fails(
        capsys, "generate", "--checkpoint", last, "--html", tmp_path / "a.pt"
    )
    for option in ("checkpoint", "out", "html", "prompt"):
        others = () if option == "checkpoint" else ("--checkpoint", last)
        assert f"--{option} is empty" in fails(capsys, "generate", *others, f"--{option}", "")
    both = "--out", tmp_path / "a.txt", "--html", tmp_path / "a.txt"
    assert "a file of its own" in fails(capsys, "generate", "--checkpoint", "x.pt", *both)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for option in ("--out", "--html"):
        target = option, tmp_path / "a.txt"
        assert "is not writable" in fails(capsys, "generate", "--checkpoint", "x.pt", *target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_name_without_a_suffix_is_text(text_run, capsys, tmp_path):
    assert generate(text_run, "--num-samples", 1, "--out", tmp_path / "a") == 0
    assert len((tmp_path / "a").read_text().rstrip("\n")) == 8


def test_a_grid_needs_a_square(text_run, capsys):
    last = text_run / "last.pt"
    error = fails(capsys, "generate", "--checkpoint", last, "--strategy", "halton")
    assert "--strategy halton fills a grid" in error and "8 tokens" in error


def test_the_default_strategy_is_said(digits_run, capsys):
    """That of the pictures, not that of Python."""
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "(default: random, for samples as varied as the data; in Python it is confid" in printed
    shown = {}
    for name in ("random", "confidence", None):
        options = [] if name is None else ["--strategy", name]
        assert generate(digits_run, "--num-samples", 2, *options) == 0
        shown[name] = capsys.readouterr().out
    assert shown[None] == shown[SamplingConfig().strategy] == shown["random"] != shown["confidence"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("give num_tokens, or not", "give --num-tokens, or not"),
        ("num_held_out is 3: too many", "--held-out is 3: too many"),
        ("pass dtype= (files are dtype='uint16'; or", "pass --dtype (files are --dtype uint16; or"),
        ("heads is 3: it must divide dim, which is 8", "--heads is 3: it must divide --dim, which"),
        ("seq_len is 9 of 8", "--seq-len is 9 of 8"),
        ("the data is short, and so is the loss", "the data is short, and so is the loss"),
        ("/a/num_tokens/b is missing", "/a/num_tokens/b is missing"),
        ("num_tokens.txt is missing", "num_tokens.txt is missing"),
        ('write {"dtype": "uint16"}', 'write {"dtype": "uint16"}'),
        ("--steps was 2 and is 3", "--steps was 2 and is 3"),
    ],
)
def test_messages_speak_of_options(message, expected):
    assert _in_options(message, NAMES).startswith(expected)


def test_data_of_an_unknown_type(capsys, tmp_path):
    (tmp_path / "raw.bin").write_bytes(bytes(100))
    raw = "train", "--data", tmp_path / "raw.bin"
    assert "pass --dtype (" in fails(capsys, *raw, "--num-tokens", 9)
    error = fails(capsys, *raw, "--num-tokens", 9, "--dtype", "float16")
    assert "was given --dtype float16: a raw file holds" in error
    assert "--num-tokens is 1: it must be in [2, 2**31)" in fails(capsys, *raw, "--num-tokens", 1)
    assert "--seq-len is 0" in fails(capsys, *raw, "--seq-len", 0)
    text = "train", "--data", "text"
    assert "--held-out is 1000000: it must be in [1, " in fails(capsys, *text, "--held-out", 10**6)
    assert "--num-tokens is 9, but that of text" in fails(capsys, *text, "--num-tokens", 9)
    for option in ("--lr", "--weight-decay", "--clip", "--ema", "--dropout", "--beta2"):
        assert f"{option} is nan" in fails(capsys, *text, option, "nan")


def test_init_on_the_command_line(text_run, capsys, tmp_path):
    argv = ["--data", str(text_run.parent / "abc.txt"), "--steps", "2", *TINY]
    argv += ["--init", str(text_run / "best.pt")]
    out = tmp_path / "run"
    assert main(["train", *argv, "--seq-len", "8", "--out", str(out)]) == 0
    assert f"the weights of {text_run / 'best.pt'}" in capsys.readouterr().out
    error = fails(capsys, "train", *argv, "--seq-len", "4", "--out", tmp_path / "other")
    assert "cannot start from" in error and "--seq-len is 8 there and 4 here" in error
    error = fails(capsys, "train", "--resume", "--out", out, "--init", "other.pt")
    assert f"--init was {text_run / 'best.pt'} and is other.pt now" in error


def test_resuming_says_where_it_goes_on(text_run, capsys, tmp_path):
    out = tmp_path / "run"
    argv = ["--data", str(text_run.parent / "abc.txt"), "--seq-len", "8", "--out", str(out)]
    assert main(["train", *argv, "--steps", "3", *TINY]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(out), "--steps", "5"]) == 0
    printed = capsys.readouterr().out
    assert "resuming from step 3: 2 of 5 remain" in printed
    assert "note: --steps was 3 and is 5; the learning rate falls to zero over the new" in printed
    assert "--steps was 5 and is 4 now, but 5 are done" in fails(
        capsys, "train", "--resume", "--out", out, "--steps", 4
    )


def test_lines_where_there_is_no_terminal(text_run, capsys, tmp_path):
    out = tmp_path / "run"
    argv = ["--data", str(text_run.parent / "abc.txt"), "--seq-len", "8", "--out", str(out)]
    argv += ["--steps", "20", "--eval-every", "10", *TINY]
    assert main(["train", *argv]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    steps = [line.split(":")[0] for line in lines]
    assert [step.split()[1] for step in steps] == [str(step) for step in range(2, 21, 2)]
    assert [step for step in steps if "of 20" not in step] == ["step     10", "step     20"]
    assert all("loss " in line and "tokens/s" in line for line in lines)
    assert main(["train", *argv, "--quiet", "--overwrite"]) == 0
    assert capsys.readouterr().out == ""


def test_a_file_is_no_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    error = fails(capsys, "train", "--data", "text", "--out", tmp_path / "file")
    assert "is a file: --out must name a folder" in error


def test_prompts_that_no_tensor_holds(digits_run, text_run, capsys, tmp_path):
    for prompt in (f"1 {1 << 64}", f"{-(1 << 64)}"):
        error = fails(
            capsys, "generate", "--checkpoint", digits_run / "last.pt", "--prompt", prompt
        )
        assert "ids must be in [0, 18)" in error
    np.save(tmp_path / "large.npy", np.array([1 << 63], dtype=np.uint64))
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "archive.npz", np.zeros(3))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    for name, message in (
        ("large", "holds id 9223372036854775808"),
        ("empty", "is no .npy file of ids"),
        ("archive", "is no .npy file of ids: it is a .npz archive"),
    ):
        prompt = "--infill", tmp_path / f"{name}.npy"
        last = digits_run / "last.pt"
        assert message in fails(capsys, "generate", "--checkpoint", last, *prompt)
    gap = "--infill", "a[MASK:99999999999999]"
    error = fails(capsys, "generate", "--checkpoint", text_run / "last.pt", *gap)
    assert "a prompt has 100000000000000 ids: the net takes 8 at most" in error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), 130),
        *((Interrupted(number), 128 + number) for number in SIGNALS),
    ],
)
def test_the_status_after_a_signal(monkeypatch, error, status):
    def interrupted(config: TrainConfig) -> None:
        raise error

    monkeypatch.setattr("nar_kernels.cli.train.train", interrupted)
    assert main(["train", "--data", "digits"]) == status


def test_generate_does_not_write_over_what_it_reads(digits_run, capsys, tmp_path, monkeypatch):
    weights = (digits_run / "last.pt").read_bytes()
    for name in ("checkpoint", "page.html"):
        (tmp_path / name).write_bytes(weights)
        (tmp_path / f"link to {name}").symlink_to(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for source, option, path in (
        ("checkpoint", "--out", "./checkpoint"),
        (tmp_path / "checkpoint", "--out", "link to checkpoint"),
        ("page.html", "--html", tmp_path / "page.html"),
    ):
        error = fails(capsys, "generate", "--checkpoint", source, option, path)
        assert f"{option} and --checkpoint are both" in error
    np.save("ids.npy", np.zeros((3, 64), dtype=np.int64))
    options = "--checkpoint", "checkpoint", "--prompt", "ids.npy"
    assert "--out and --prompt are both" in fails(capsys, "generate", *options, "--out", "ids.npy")
    error = fails(capsys, "generate", *options, "--num-samples", 2)
    assert "--num-samples is 2, but the prompt has 3 sequences" in error
    assert (tmp_path / "checkpoint").read_bytes() == weights


def test_an_empty_name_is_no_folder(capsys):
    error = fails(capsys, "train", "--data", "digits", "--out", "")
    assert "--out is empty: leave it out" in error
    error = fails(capsys, "train", "--data", "digits", "--threads", 1_000_000)
    assert "--threads is 1000000: it must be at most 1024" in error


@pytest.mark.skipif(os.name != "posix", reason="SIGPIPE")
def test_output_that_nobody_reads(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(9))
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "nar_kernels.cli", "inspect", tmp_path / "a.npy"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")
