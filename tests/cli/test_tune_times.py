"""`nar-kernels tune-times`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nar_kernels.cli.main import main
from nar_kernels.likelihood import evaluate
from nar_kernels.training.data import data_of
from nar_kernels.training.model import load_run

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = "--dim 32 --depth 1 --heads 1 --batch-size 4 --threads 1 --eval-draws 2 --device cpu".split()


def trained(folder: Path, *options: object) -> str:
    """The checkpoint of a short run on text of its own."""
    pytest.importorskip("x_transformers")
    folder.mkdir(exist_ok=True)
    (folder / "abc.txt").write_bytes(b"abc" * 200)
    data = ["--data", folder / "abc.txt", "--seq-len", 8, "--out", folder / "run", "--steps", 3]
    assert main([str(argument) for argument in ["train", *data, *TINY, *options]]) == 0
    return str(folder / "run" / "last.pt")


@pytest.fixture(scope="module")
def of_blocks(tmp_path_factory) -> str:
    return trained(tmp_path_factory.mktemp("blocks"), "--block-length", 4)


def test_what_it_finds_is_what_train_takes(of_blocks, capsys, tmp_path):
    capsys.readouterr()
    assert main(["tune-times", "--checkpoint", of_blocks]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("train with: --time-low ")
    found = last.partition("with: ")[2].split()
    trained(tmp_path, "--block-length", "4", *found)
    config = load_run(tmp_path / "run" / "last.pt")[2]
    assert config.loss == "sequence" and config.time_high - config.time_low > 0.499


def test_all_times_have_the_bits_of_an_evaluation(of_blocks, capsys):
    capsys.readouterr()
    assert main(["tune-times", "--checkpoint", of_blocks, "--draws", "5", "--json"]) == 0
    ranges = json.loads(capsys.readouterr().out)["ranges"]
    whole = next(r for r in ranges if (r["low"], r["high"]) == (0, 1))
    model, spec, config = load_run(of_blocks)
    data = data_of(config, spec)
    cpu = torch.device("cpu")
    windows = data.held_out_windows
    held_out = evaluate(model.net, data.held_out, windows, draws=5, device=cpu, block_length=4)
    assert whole["mean"] / torch.tensor(2.0).log().item() == pytest.approx(
        held_out.bits_per_token, rel=1e-5
    )
    assert whole["num_draws"] == len(windows) * 5 * 2


def test_of_other_blocks_and_of_documents(of_blocks, capsys, tmp_path):
    assert main(["tune-times", "--checkpoint", of_blocks, "--block-length", "2"]) == 0
    (tmp_path / "documents.txt").write_bytes(b"ab\ncd\n" * 50)
    packed = trained(tmp_path, "--pack", "--eos-id", 99)
    assert main(["tune-times", "--checkpoint", packed]) == 0
    assert capsys.readouterr().out.count("0..1 ") == 2  # all times are shown each time


def test_mistakes(of_blocks, capsys, tmp_path):
    def fails(*options: str) -> str:
        capsys.readouterr()
        assert main(["tune-times", *options]) == 2
        return capsys.readouterr().err

    whole = trained(tmp_path)
    assert "--block-length is 4, but the run is no block diffusion" in fails(
        "--checkpoint", whole, "--block-length", "4"
    )
    assert "--grid is 0.3: it must divide 1" in fails("--checkpoint", whole, "--grid", "0.3")
    assert "--draws is 0" in fails("--checkpoint", whole, "--draws", "0")
    assert "there is no checkpoint" in fails("--checkpoint", str(tmp_path / "none.pt"))
    (tmp_path / "abc.txt").unlink()
    assert "abc.txt" in fails("--checkpoint", whole)


def test_data_that_have_moved(capsys, tmp_path):
    """Also to a format that says its dtype, unlike the former; not to other ids."""
    pytest.importorskip("x_transformers")
    ids = np.arange(900, dtype=np.uint16) % 7
    ids.tofile(tmp_path / "ids.bin")
    run = ["--data", tmp_path / "ids.bin", "--dtype", "uint16", "--out", tmp_path / "run"]
    options = ["--seq-len", 8, "--steps", 2, "--schedule", "cosine", "--draw", "bernoulli", *TINY]
    assert main([str(argument) for argument in ["train", *run, *options]]) == 0
    (tmp_path / "ids.bin").unlink()
    np.save(tmp_path / "ids.npy", ids)
    np.save(tmp_path / "other.npy", np.arange(900, dtype=np.uint16) % 20)
    search = ["tune-times", "--checkpoint", str(tmp_path / "run" / "last.pt"), "--data"]
    capsys.readouterr()
    assert main([*search, str(tmp_path / "ids.npy")]) == 0
    # What was measured is not what the run was trained with.
    assert "with: --schedule linear --draw exact --time-low" in capsys.readouterr().out
    assert main([*search, "digits"]) == 2
    error = capsys.readouterr().err
    assert "digits is not such data as" in error and error.count("\n") == 1
    assert main([*search, str(tmp_path / "other.npy")]) == 2
    assert "token id 8" in capsys.readouterr().err
