"""The trainer: what a step computes, and that stopping and going on changes nothing."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nar_kernels import cli
from nar_kernels.data.dataset import TokenDataset
from nar_kernels.data.loader import MaskedLoader
from nar_kernels.data.sources import SequenceSpec, open_data
from nar_kernels.errors import CorpusFormatError, InvalidTokenError
from nar_kernels.likelihood import evaluate, evaluation_batch, evaluation_parts
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.sampling.config import SamplingConfig, Strategy
from nar_kernels.show import pictures, samples
from nar_kernels.training import checkpoint
from nar_kernels.training.baselines import baselines
from nar_kernels.training.config import TrainConfig
from nar_kernels.training.ema import Ema
from nar_kernels.training.interrupt import SIGNALS, Interrupt, Interrupted, interruptible
from nar_kernels.training.lock import FolderInUseError
from nar_kernels.training.model import build_model, checkpoint_activations, choose_bf16, load_model
from nar_kernels.training.train import DivergedError, Run, learning_rate, loss_and_gradient, train

pytest.importorskip("x_transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = SequenceSpec(num_tokens=257, seq_len=16, render="bytes", image_shape=None)
SENTENCE = b"the quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "fox.txt"
    path.write_bytes(SENTENCE * 100)
    return path


def small(data: Path, out: Path, **options: Any) -> TrainConfig:
    settings = {
        **{"data": str(data), "out": str(out), "seq_len": 16, "held_out": 8, "eval_draws": 2},
        **{"dim": 32, "depth": 1, "heads": 1, "dropout": 0.1, "batch_size": 8, "lr": 3e-3},
        **{"steps": 40, "warmup": 5, "eval_every": 20, "save_every": 10, "threads": 1},
        **{"quiet": True, "device": "cpu", "precision": "fp32"},
    }
    return TrainConfig(**{**settings, **options})


def same(a: Any, b: Any) -> bool:
    """Bit for bit, through containers."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# The loss and its gradient


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def uneven_batch(sentences: Path) -> Corrupted:
    """Windows of very different counts of masked tokens."""
    dataset = TokenDataset(sentences, 16, num_tokens=257, mask_id=256, dtype="uint8")
    return MaskedLoader(dataset, MaskingConfig(257, 256, draw="bernoulli"), 8).batch(0)


@pytest.mark.parametrize("loss", ["mean", "nelbo"])
@pytest.mark.parametrize("accumulate", [2, 3, 4, 8])
def test_accumulation_is_exact(sentences, tmp_path, loss, accumulate):
    config = small(sentences, tmp_path, loss=loss, dropout=0.0)
    torch.manual_seed(0)
    model, batch = build_model(config, SPEC), uneven_batch(sentences)
    whole = loss_and_gradient(model, batch).item()
    expected = gradients(model)
    model.zero_grad()

    assert loss_and_gradient(model, batch, accumulate).item() == pytest.approx(whole, rel=1e-6)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_mean_of_means_would_be_noticed(sentences, tmp_path):
    torch.manual_seed(0)
    model = build_model(small(sentences, tmp_path, dropout=0.0), SPEC)
    batch = uneven_batch(sentences)
    parts = [model(part).loss.item() for part in batch.microbatches(2)]
    whole = loss_and_gradient(model, batch).item()
    assert sum(parts) / len(parts) != pytest.approx(whole, rel=1e-3)


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig("digits", lr=2.0, warmup=10, steps=110)
    rates = [learning_rate(step, config) for step in range(110)]
    assert 0 < rates[0] < rates[5] < rates[9] < rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[60] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.01


# Evaluation


class Constant(nn.Module):
    """The same logits everywhere."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits.expand(*ids.shape, -1)


def held_out(length: int = 7, vocabulary: int = 4) -> TokenDataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (40 * length,), generator=generator)
    return TokenDataset(ids, length, num_tokens=vocabulary + 1, mask_id=vocabulary)


def test_uniform_predictions_have_the_bits_of_the_vocabulary():
    dataset = held_out()
    net = Constant(torch.tensor([0.0, 0.0, 0.0, 0.0, -torch.inf]))
    cpu = torch.device("cpu")
    result = evaluate(net, dataset, torch.arange(len(dataset)), draws=3, device=cpu)
    assert result.bits_per_token == pytest.approx(2.0, abs=1e-5)
    assert result.standard_error < 1e-5
    assert net.training


def test_bits_per_token_are_those_of_a_code():
    """With the same prediction everywhere, the bound is the cross-entropy, whatever the noise."""
    dataset = held_out()
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0])
    every, cpu = torch.arange(len(dataset)), torch.device("cpu")
    bits, error = evaluate(Constant(probabilities.log()), dataset, every, draws=64, device=cpu)
    ids = torch.stack([dataset[i] for i in range(len(dataset))])
    expected = -probabilities[ids].log2().mean().item()
    assert 0 < error < 0.1
    assert bits == pytest.approx(expected, abs=0.02)


def test_noise_of_evaluation_depends_on_the_window_alone():
    """Neither on PyTorch's generator, nor on how windows are batched."""
    dataset = held_out(length=700)  # 2**14 tokens hold 7 windows of 3 draws
    torch.manual_seed(1)
    windows, parts = torch.arange(40), evaluation_parts(dataset, 40, 3)
    assert len(parts) == 6
    all_at_once = torch.cat(
        [evaluation_batch(dataset, windows, 3, part).masked_indices for part in parts]
    )
    torch.manual_seed(2)
    few = evaluation_batch(dataset, windows[:5], 3, slice(0, 15)).masked_indices
    assert len(all_at_once) == 120
    assert torch.equal(all_at_once[:15], few)
    ratio = all_at_once.float().mean(1).view(-1, 3).sort(1).values
    # The times of a window's draws are one in each third.
    assert (ratio[:, 0] < 0.34).all() and (ratio[:, 2] > 0.66).all()


def test_baselines_are_entropies():
    # Windows "00", "01", "01", "01" | "11": what stands first differs from what stands second.
    ids = torch.tensor([0, 0, 0, 1, 0, 1, 0, 1, 1, 1])
    train_part, rest = TokenDataset(ids, 2, num_tokens=3, mask_id=2).split(1)
    found = baselines(train_part, rest, torch.arange(1), per_position=True)
    bits = {name: baseline.bits_per_token for name, baseline in found.items()}

    def entropy(p: float) -> float:
        return -p * math.log2(p) - (1 - p) * math.log2(1 - p)

    assert bits["unigram_entropy"] == pytest.approx(entropy(3 / 8))
    assert bits["unigram_cross_entropy"] == pytest.approx(-math.log2((3 + 1) / (8 + 2)))
    assert bits["per_position_entropy"] == pytest.approx((0 + entropy(3 / 4)) / 2)
    expected = (-math.log2((0 + 1) / (4 + 2)) - math.log2((3 + 1) / (4 + 2))) / 2
    assert bits["per_position_cross_entropy"] == pytest.approx(expected)
    assert bits["per_position_entropy_held_out"] == 0


# Data


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


def test_the_mask_token_must_be_counted(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(320, dtype=np.uint16) % 10)
    config = small(tmp_path / "ids.npy", tmp_path / "run", num_tokens=10, held_out=4)
    with pytest.raises(InvalidTokenError, match="equals mask_id"):
        train(config)
    assert not (tmp_path / "run").exists()


# Checkpoints


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"config": {"seed": 1}})

    def fail(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"config": {"seed": 2}})
    monkeypatch.undo()
    assert checkpoint.load(path) == {"config": {"seed": 1}}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save({"config": Path}, tmp_path / "code.pt")  # a class is code
    for name in ("text.pt", "other.pt", "code.pt"):
        with pytest.raises(ValueError, match="not a checkpoint"):
            checkpoint.load(tmp_path / name)


# Runs

LONG = {"steps": 200, "eval_every": 100, "save_every": 25, "ema": 0.95}


@pytest.fixture(scope="module")
def uninterrupted(sentences, tmp_path_factory) -> dict[str, Any]:
    """The checkpoint of a run that never stopped."""
    out = tmp_path_factory.mktemp("uninterrupted")
    train(small(sentences, out, **LONG))
    return checkpoint.load(out / "last.pt")


def start(config: TrainConfig) -> subprocess.Popen[str]:
    """The same run in a process of its own, through the command line."""
    # Tests in the background of a script hand down that Ctrl-C is to be ignored.
    heed = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "signal.signal(signal.SIGTERM, signal.SIG_DFL); "
        "signal.signal(signal.SIGUSR1, signal.SIG_DFL)"
    )
    main = "import sys; from nar_kernels.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", f"{heed}; {main}", "train"]
    for name, value in config.to_dict().items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            command += [flag] if value else []
        elif value is not None:
            command += [flag, str(value)]
    root = Path(__file__).resolve().parent.parent
    return subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)


def step_of(path: Path) -> int:
    return checkpoint.load(path)["loader"]["step"] if path.exists() else -1


def signal_in_the_middle(config: TrainConfig, number: signal.Signals) -> tuple[int, str]:
    """Signals the run once it has a checkpoint after the first step; (exit status, stderr)."""
    process, last = start(config), config.folder / "last.pt"
    deadline = time.monotonic() + 120
    while step_of(last) < 1 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert 1 <= step_of(last) < config.steps, errors
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_stopped_run_continues_bit_for_bit(sentences, tmp_path, uninterrupted, number):
    config = small(sentences, tmp_path / "run", **LONG)
    status, errors = signal_in_the_middle(config, number)
    if number != signal.SIGKILL:
        assert status == 128 + number
        assert f"{number.name}: finishing this step to save it" in errors
        assert not (config.folder / "run.lock").exists()
        assert f"--resume --out {config.folder}" in errors and "Traceback" not in errors
        assert f"saved step {step_of(config.folder / 'last.pt')}" in errors
    else:
        assert status == -signal.SIGKILL
        assert (config.folder / "run.lock").exists()
        (config.folder / "last.pt.0123456789ab.tmp").write_bytes(b"half of it")

    train(replace(config, resume=True))
    resumed = checkpoint.load(config.folder / "last.pt")
    assert resumed["loader"]["step"] == 200
    assert not [*config.folder.glob("*.tmp"), *config.folder.glob("run.lock")]
    for part in ("model", "ema", "optimizer", "loader"):
        assert same(resumed[part], uninterrupted[part]), part
    for part in ("losses", "curve"):
        assert same(resumed["log"][part], uninterrupted["log"][part]), part


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("where", ["begin", "finish"])
def test_a_signal_before_the_first_step_or_after_the_last(
    sentences, tmp_path, monkeypatch, where, number
):
    """Nothing is left that would keep another run from the folder."""
    config = small(sentences, tmp_path / "run", steps=10)
    handlers = [signal.getsignal(n) for n in SIGNALS]
    original = getattr(Run, where)

    def disturbed(run: Run) -> Any:
        signal.raise_signal(number)
        return original(run)

    monkeypatch.setattr(Run, where, disturbed)
    with pytest.raises(Interrupted) as stopped:
        train(config)
    assert stopped.value.signum == number
    assert not [*config.folder.glob("*.tmp"), *config.folder.glob("run.lock")]
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    monkeypatch.setattr(Run, where, original)
    train(replace(config, resume=where == "finish"))


def interrupted_at(run: Run, at_step: int, *numbers: int) -> None:
    """The run hears these signals in the middle of a step."""
    step = run.step

    def disturbed(batch: Corrupted, number: int) -> None:
        step(batch, number)
        if number == at_step:
            for signum in numbers:
                signal.raise_signal(signum)

    run.step = disturbed  # type: ignore[method-assign]


@pytest.fixture
def handlers() -> Iterator[dict[int, Any]]:
    """Those of the caller's, which must be there afterwards."""
    ours = {number: lambda signum, frame: None for number in SIGNALS}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    yield ours
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_lets_the_step_finish(sentences, tmp_path, handlers, number):
    run = Run(small(sentences, tmp_path), torch.device("cpu"))
    run.begin()
    interrupted_at(run, 3, number)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run.fit()
    assert isinstance(stopped.value, Interrupted) and stopped.value.signum == number
    assert pickle.loads(pickle.dumps(stopped.value)).signum == number
    assert str(stopped.value) == signal.Signals(number).name
    assert checkpoint.load(tmp_path / "last.pt")["loader"]["step"] == 4
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (1, 1), (2, 0)])
def test_a_second_signal_does_not_wait(sentences, tmp_path, handlers, first, second):
    run = Run(small(sentences, tmp_path), torch.device("cpu"))
    run.begin()
    interrupted_at(run, 3, SIGNALS[first], SIGNALS[second])
    with pytest.raises(Interrupted) as stopped:
        run.fit()
    assert stopped.value.signum == SIGNALS[second]
    assert checkpoint.load(tmp_path / "last.pt")["loader"]["step"] == 0
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers


def test_the_echo_of_a_launcher_waits(monkeypatch):
    """torchrun hands on what a scheduler has sent to its processes, too."""
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    interrupt = Interrupt(ignore_duplicates=True)
    interrupt.handle(signal.SIGTERM, None)
    interrupt.handle(signal.SIGTERM, None)
    now += 2
    with pytest.raises(Interrupted):
        interrupt.handle(signal.SIGTERM, None)


def test_ignored_signals_stay_ignored(handlers):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with interruptible() as interrupt:
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        signal.raise_signal(signal.SIGTERM)
        assert not interrupt.requested
        signal.raise_signal(signal.SIGINT)
        assert interrupt.signum == signal.SIGINT


def test_handlers_of_c_code_are_left_alone(handlers, monkeypatch):
    monkeypatch.setattr("signal.getsignal", lambda number: None)
    with interruptible():
        monkeypatch.undo()
        assert {number: signal.getsignal(number) for number in SIGNALS} == handlers


def test_only_the_main_thread_hears_signals(handlers):
    found: list[bool] = []

    def elsewhere() -> None:
        with interruptible() as interrupt:
            found.append(interrupt.requested)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_second_trainer_is_refused(sentences, tmp_path):
    config = small(sentences, tmp_path / "run", **{**LONG, "steps": 100_000, "save_every": 1})
    process, last = start(config), config.folder / "last.pt"
    try:
        deadline = time.monotonic() + 120
        while step_of(last) < 1 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        for changes in ({}, {"resume": True}, {"overwrite": True}):
            message = f"is in use by process {process.pid} on .*, since .*: wait until it ends"
            with pytest.raises(FolderInUseError, match=message):
                train(replace(config, **changes))
        before = step_of(last)
        while step_of(last) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert step_of(last) > before
    finally:
        process.kill()
        process.communicate()
    train(replace(config, resume=True, steps=step_of(last)))


def test_the_comparison_sees_another_seed(sentences, tmp_path, uninterrupted):
    train(small(sentences, tmp_path, **{**LONG, "seed": 1}))
    assert not same(checkpoint.load(tmp_path / "last.pt")["model"], uninterrupted["model"])


def steps_of(config: TrainConfig, disturb: Callable[[Run], object]) -> list[Tensor]:
    """The weights after some steps, each of them after a call of ``disturb``."""
    run = Run(config, torch.device("cpu"))
    for step, batch in zip(range(5), run.loader, strict=False):
        disturb(run)
        run.step(batch, step)
    return [p.detach() for p in run.model.parameters()]


def test_dropout_is_a_function_of_seed_and_step(sentences, tmp_path):
    """So the state of PyTorch's generator need not be saved."""
    config = small(sentences, tmp_path, dropout=0.5)
    expected = steps_of(config, lambda run: None)
    assert same(steps_of(config, lambda run: torch.manual_seed(5)), expected)

    def another_seed(run: Run) -> None:
        run.noise_seed = 5

    assert not same(steps_of(config, another_seed), expected)


@pytest.fixture(scope="module")
def learnt(sentences, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("learnt")
    report = train(small(sentences, out, dropout=0.0, steps=300, eval_every=50, dim=64, lr=6e-3))
    return report, out


def test_it_learns(learnt):
    report, _ = learnt
    unigram = report["baselines"]["unigram_cross_entropy"]["bits_per_token"]
    assert report["bits_per_token"] < 0.7 * unigram
    assert report["below_best_baseline"] == pytest.approx(unigram - report["bits_per_token"])
    curve = [point["bits_per_token"] for point in report["curve"]["held_out"]]
    assert len(curve) == 6 and curve[-1] == report["bits_per_token"]
    assert report["best"]["bits_per_token"] == min(curve)


def test_the_report_and_its_files(learnt):
    report, out = learnt
    assert json.loads((out / "report.json").read_text()) == report
    assert all((out / name).exists() for name in report["files"].values())
    assert report["steps"] == 300
    assert report["data"]["train_windows"] == 273 and report["data"]["held_out_windows"] == 8
    assert report["tokens_per_second"] == pytest.approx(300 * 8 * 16 / report["step_seconds"])
    assert report["seconds"] > report["step_seconds"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_one_held_out_window_has_no_spread(sentences, tmp_path):
    report = train(small(sentences, tmp_path, steps=1, held_out=1))
    assert report["standard_error"] is None
    assert "NaN" not in (tmp_path / "report.json").read_text()


def test_tensorboard_has_the_curves(learnt):
    report, out = learnt
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(out / "tb")).Reload()
    held_out = events.Scalars("held_out/bits_per_token")
    assert [point.step for point in held_out] == [50, 100, 150, 200, 250, 300]
    assert held_out[-1].value == pytest.approx(report["bits_per_token"], rel=1e-5)
    assert len(events.Scalars("train/bits_per_token")) == 30


def test_a_checkpoint_generates(learnt):
    model, spec = load_model(learnt[1] / "best.pt")
    assert spec == SPEC
    ids = model.generate(4, seed=0)
    assert ids.shape == (4, 16) and ids.max() < 256
    assert torch.equal(ids, model.generate(4, seed=0))
    assert set(bytes(ids.flatten().tolist())) <= set(SENTENCE)


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


@pytest.mark.usefixtures("handlers")
def test_a_run_may_be_made_to_end_where_it_stands(sentences, tmp_path):
    config = small(sentences, tmp_path, steps=30, eval_every=20)
    run = Run(config, torch.device("cpu"))
    run.begin()
    interrupted_at(run, 6, signal.SIGINT)
    with pytest.raises(Interrupted):
        run.fit()
    report = train(replace(config, resume=True, steps=7))
    assert report["steps"] == 7 and math.isfinite(report["bits_per_token"])
    assert checkpoint.load(tmp_path / "last.pt")["config"]["steps"] == 7
    assert load_model(str(tmp_path / "best.pt"))[1] == SPEC


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
    assert cli.main([*resume, "3", "--data", str(tmp_path / "ids.npy")]) == 0
    assert cli.main([*resume, "4", "--data", str(raw), "--dtype", "uint16"]) == 0
    assert step_of(config.folder / "last.pt") == 4
    assert cli.main([*resume, "5", "--data", str(tmp_path / "wider.npy")]) == 2
    assert "which holds other tokens" in capsys.readouterr().err


def test_a_new_run_looks_for_data_in_the_current_folder_alone(sentences, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.txt").write_bytes(sentences.read_bytes())
    with pytest.raises(FileNotFoundError, match="no file a.txt"):
        train(small(Path("a.txt"), tmp_path / "run"))
    assert os.listdir(tmp_path / "run") == ["a.txt"]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_may_start_from_the_weights_of_another(sentences, tmp_path, ema):
    config = small(sentences, tmp_path / "first", steps=5, ema=ema)
    train(config)
    (tmp_path / "other.txt").write_bytes(sentences.read_bytes().upper())
    later = replace(config, data=tmp_path / "other.txt", out=tmp_path / "later", seed=1, steps=3)
    run = Run(replace(later, init=tmp_path / "first" / "last.pt"), torch.device("cpu"))
    first = checkpoint.load(tmp_path / "first" / "last.pt")
    assert same(dict(run.model.state_dict()), dict(first["ema" if ema else "model"]))
    assert run.loader.step == 0 and not run.optimizer.state_dict()["state"]
    if run.ema is not None:
        assert same(run.ema.state_dict(), dict(run.model.state_dict()))

    report = train(run.config)
    assert report["config"]["init"] == str(tmp_path / "first" / "last.pt")
    assert report["steps"] == 3
    (tmp_path / "first" / "last.pt").unlink()  # to resume, it is not needed
    train(replace(run.config, resume=True, steps=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 64}, "--dim is 32 there and 64 here"),
        ({"depth": 2}, "--depth is 1 there and 2 here"),
        ({"heads": 2}, "--heads is 1 there and 2 here"),
        ({"rotary": False}, "--rotary is True there and False here"),
        ({"seq_len": 8}, "--seq-len is 16 there and 8 here"),
        ({"dtype": "uint8", "num_tokens": 300}, "--num-tokens is 257 there and 300 here"),
    ],
)
def test_weights_of_another_net_are_refused(learnt_weights, sentences, tmp_path, options, message):
    config = small(sentences, tmp_path / "run", init=learnt_weights, **options)
    with pytest.raises(ValueError, match=f"cannot start from .*last.pt: {message}"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def learnt_weights(sentences, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("weights")
    train(small(sentences, out, steps=1))
    return out / "last.pt"


def test_weights_that_fit_no_net_of_their_options(learnt_weights, tmp_path):
    state = checkpoint.load(learnt_weights)
    state["model"].popitem()
    checkpoint.save(tmp_path / "a.pt", state)
    with pytest.raises(ValueError, match="a.pt holds the weights of another net"):
        load_model(tmp_path / "a.pt")


def test_bad_ids_are_found_before_the_first_step(tmp_path):
    """Also one that no step would show, or only the evaluation."""
    ids = np.arange(3200, dtype=np.uint16) % 10
    for place in (5, 3195):
        bad = ids.copy()
        bad[place] = 77
        np.save(tmp_path / "ids.npy", bad)
        config = small(tmp_path / "ids.npy", tmp_path / "run", num_tokens=11, steps=1)
        with pytest.raises(InvalidTokenError, match=f"token id 77 at offset {place} of"):
            train(config)
        assert not (tmp_path / "run").exists()


def test_the_default_device_changes_nothing(sentences, tmp_path):
    config = small(sentences, tmp_path / "plain", steps=4, eval_every=2, ema=0.9, accumulate=2)
    expected = train(config)
    model, _ = load_model(tmp_path / "plain" / "best.pt")
    drawn = model.sample(SamplingConfig(), 2, seed=0).last().ids
    try:
        torch.set_default_device("meta")
        report = train(replace(config, out=tmp_path / "meta"))
        train(replace(config, out=tmp_path / "meta", resume=True, steps=5))
        with torch.device("meta"):
            model, _ = load_model(tmp_path / "plain" / "best.pt")
            again = model.sample(SamplingConfig(), 2, seed=0).last().ids
    finally:
        torch.set_default_device(None)
    assert report["curve"] == expected["curve"]
    assert torch.equal(again, drawn)


def test_resume_refuses_another_corpus(sentences, tmp_path):
    data = tmp_path / "data.txt"
    data.write_bytes(sentences.read_bytes())
    config = small(data, tmp_path / "run", steps=2)
    train(config)
    data.write_bytes(sentences.read_bytes().upper())
    with pytest.raises(ValueError, match="corpus_digest"):
        train(replace(config, resume=True))


def test_divergence_saves_nothing(sentences, tmp_path):
    config = small(sentences, tmp_path, lr=1e38, warmup=0, save_every=1, eval_every=1, clip=1e38)
    with pytest.raises(DivergedError, match="is (nan|inf) after .* steps: .* lower --lr"):
        train(config)
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["loader"]["step"] < 40
    assert all(p.isfinite().all() for p in state["model"].values() if p.is_floating_point())


def test_divergence_that_is_noticed_late_saves_nothing(sentences, tmp_path):
    """On a GPU nobody looks at the loss in every step, and AdamW goes on with what is ruined."""
    run = Run(small(sentences, tmp_path, save_every=5, eval_every=1000), torch.device("cpu"))
    run.flush_every = 10
    run.begin()
    step = run.step

    def ruined(batch: Corrupted, number: int) -> None:
        step(batch, number)
        if number == 6:
            next(run.model.parameters()).data.fill_(math.nan)

    run.step = ruined  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match="is nan after 7 steps"):
        run.fit()
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["loader"]["step"] == 5 and len(state["log"]["losses"]) == 5
    assert all(p.isfinite().all() for p in state["model"].values())


def test_when_the_loss_is_looked_at_changes_nothing(sentences, tmp_path):
    config = small(sentences, tmp_path / "often", steps=25, eval_every=12, save_every=7)
    expected = train(config)
    run = Run(replace(config, out=str(tmp_path / "rarely")), torch.device("cpu"))
    run.flush_every = 10
    flushed: list[int] = []
    flush = run.flush

    def noted(stop: bool = False) -> bool:
        stops = flush(stop)
        flushed.append(len(run.log.losses))
        return stops

    run.flush = noted  # type: ignore[method-assign]
    run.begin()
    run.fit()
    assert flushed == [7, 10, 12, 14, 20, 21, 24, 25]
    assert run.finish()["curve"] == expected["curve"]
    ours, theirs = (checkpoint.load(tmp_path / name / "last.pt") for name in ("rarely", "often"))
    assert same(ours["model"], theirs["model"])
    assert same(ours["log"]["losses"], theirs["log"]["losses"])


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


# Averaged weights


def test_the_average_is_what_it_says():
    model = nn.Linear(3, 2)
    average, expected = Ema(model, 0.8), model.weight.detach().clone()
    for step in range(60):
        with torch.no_grad():
            model.weight.copy_(torch.full_like(expected, step))
        average.update(step)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with average.applied():
        torch.testing.assert_close(model.weight, expected)
    assert (model.weight == 59).all()
    # In the long run a ramp is followed at a distance of decay / (1 - decay).
    assert average.state_dict()["weight"].mean().item() == pytest.approx(55, abs=0.1)


def test_evaluation_and_generation_use_the_average(sentences, tmp_path):
    config = small(sentences, tmp_path, steps=20, ema=0.9)
    report = train(config)
    state = checkpoint.load(tmp_path / "last.pt")
    assert not same(state["ema"], state["model"]) and state["ema"].keys() == state["model"].keys()
    model, _ = load_model(tmp_path / "last.pt")
    assert same(dict(model.state_dict()), dict(state["ema"]))
    data = open_data(str(sentences), seq_len=16, num_held_out=8)
    bits = {}
    for name in ("ema", "model"):
        model.load_state_dict(state[name])
        arguments = model.net, data.held_out, data.held_out_windows
        bits[name] = evaluate(*arguments, draws=2, device=torch.device("cpu")).bits_per_token
    assert report["bits_per_token"] == bits["ema"] != bits["model"]
    plain = train(small(sentences, tmp_path / "plain", steps=20))
    assert same(checkpoint.load(tmp_path / "plain" / "last.pt")["model"], state["model"])
    assert plain["bits_per_token"] == bits["model"]


# Recomputed and compiled nets


def test_checkpointed_activations_change_no_gradient(sentences, tmp_path):
    config, found = small(sentences, tmp_path, depth=2, dropout=0.3), []
    batch = uneven_batch(sentences)
    for recomputed in (False, True):
        torch.manual_seed(0)
        model, calls = build_model(config, SPEC), []
        keys = list(model.state_dict())
        layer: Any = model.net
        layer = layer.attn_layers.layers[1][1]
        layer.ff[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if recomputed:
            checkpoint_activations(model)
        assert list(model.state_dict()) == keys
        torch.manual_seed(1)
        loss_and_gradient(model, batch)
        assert len(calls) == 1 + recomputed
        found.append(gradients(model))
    assert same(*found)


def test_options_that_change_no_weight(sentences, tmp_path, monkeypatch):
    """The backend that compiles takes a minute; here another one, which only traces."""
    compile_it = nn.Module.compile
    counters = torch._dynamo.utils.counters

    def trace(net: nn.Module) -> None:
        counters.clear()
        compile_it(net, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", trace)
    states = []
    for name in ("", "compile", "checkpoint_activations"):
        torch._dynamo.reset()
        config = small(sentences, tmp_path / f"run{name}", heads=2, steps=3, accumulate=3)
        train(replace(config, **({name: True} if name else {})))
        states.append(checkpoint.load(config.folder / "last.pt"))
    assert counters["stats"]["unique_graphs"] > 0
    if torch.__version__ >= torch.torch_version.TorchVersion("2.13"):
        assert not counters["graph_break"]
    for state in states[1:]:
        assert state["model"].keys() == states[0]["model"].keys()
        for key, value in states[0]["model"].items():
            torch.testing.assert_close(state["model"][key], value, rtol=1e-3, atol=1e-5)
        expected = states[0]["log"]["losses"]
        torch.testing.assert_close(state["log"]["losses"], expected, rtol=1e-5, atol=0)


def test_bf16(sentences, tmp_path):
    report = train(small(sentences, tmp_path, steps=5, precision="bf16"))
    assert report["environment"]["precision"] == "bf16"
    assert math.isfinite(report["bits_per_token"])
    assert not choose_bf16("fp32", torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads is 3: it must divide dim"),
        ({"dim": 12}, "dim / heads is 3.*--no-rotary"),
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"ema": 1.0}, r"ema is 1.0: it must be in \[0, 1\)"),
        ({"schedule": "quadratic"}, "schedule is 'quadratic'.*cosine"),
        ({"accumulate": 33}, "a batch has only 32 windows"),
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


# Pictures and samples


def rgb(path: Path) -> np.ndarray:
    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(path).convert("RGB")).astype(int)


def test_images_show_ink_and_masks(tmp_path):
    ids = torch.tensor([0, 1, 2, 3, 4, 4]).view(1, 1, 2, 3)
    pictures.images(tmp_path / "a.png", ids, mask_id=4)
    picture = rgb(tmp_path / "a.png")
    size = pictures._PIXELS
    cells = [
        picture[18 + row * size + size // 2, 18 + column * size + size // 2]
        for row in range(2)
        for column in range(3)
    ]
    ink = [cell.sum() for cell in cells[:4]]
    assert ink[0] == 3 * 255 and ink == sorted(ink, reverse=True) and ink[3] < 200
    assert (cells[4] == cells[5]).all() and cells[4].max() - cells[4].min() > 100  # no grey


def test_order_of_filling(learnt):
    """In random order, what stays masked does not depend on the net."""
    model, _ = load_model(learnt[1] / "last.pt")
    kept: dict[str, list[Tensor]] = {}
    orders: tuple[Strategy, Strategy] = ("random", "confidence")
    for order in orders:
        for trained in (True, False):
            if not trained:
                model = build_model(TrainConfig("text", dim=32), SPEC)
            states = model.sample(SamplingConfig(strategy=order), 8, seed=1)
            kept.setdefault(order, []).extend(state.masked for state in states)
    random, confidence = (torch.stack(kept[order]) for order in orders)
    half = len(random) // 2
    assert torch.equal(random[:half], random[half:])
    assert not torch.equal(confidence[:half], confidence[half:])


def test_samples_as_text(tmp_path):
    spec = SequenceSpec(257, 3, "bytes", None)
    assert "abc\n---" in samples.text(torch.tensor([[97, 98, 99], [255, 97, 97]]), spec)
    ids = torch.tensor([[0, 1], [1, 0]])
    assert samples.text(ids, SequenceSpec(3, 2, "ids", None)) == "0 1\n1 0\n"
    image = SequenceSpec(3, 2, "image", (1, 2))
    assert samples.text(ids, image) == "  @@\n\n@@  \n"
    samples.write(tmp_path / "a.npy", ids, image)
    assert np.load(tmp_path / "a.npy").tolist() == ids.tolist()
    samples.write(tmp_path / "a.png", ids, image)
    assert rgb(tmp_path / "a.png").shape[2] == 3
    with pytest.raises(ValueError, match="not images"):
        samples.write(tmp_path / "b.png", ids, spec)
