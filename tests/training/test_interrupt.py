"""Signals: a run that is stopped saves its step, and goes on bit for bit."""

import math
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.training import checkpoint
from nar_kernels.training.config import TrainConfig
from nar_kernels.training.interrupt import SIGNALS, Interrupt, Interrupted, interruptible
from nar_kernels.training.lock import FolderInUseError
from nar_kernels.training.model import load_model
from nar_kernels.training.train import Run, train
from tests.helpers.paths import ROOT
from tests.helpers.runs import SPEC, same, small, step_of

pytest.importorskip("x_transformers")

pytestmark = [pytest.mark.seconds, pytest.mark.usefixtures("one_thread")]

LONG = {"steps": 200, "eval_every": 100, "save_every": 25, "ema": 0.95}


@pytest.fixture
def heeds_signals() -> Iterator[None]:
    """In the background of a script, Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
    main = "import sys; from nar_kernels.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", f"{heed}; {main}", "train"]
    for name, value in config.to_dict().items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            command += [flag] if value else []
        elif value is not None:
            command += [flag, str(value)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


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


@pytest.mark.usefixtures("heeds_signals")
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
