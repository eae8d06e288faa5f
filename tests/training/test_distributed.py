"""Two processes with half of the batch each do what one does with all of it."""

import itertools
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nar_kernels import distributed
from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.likelihood import evaluate
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.training import checkpoint, parallel
from nar_kernels.training import train as train_module
from nar_kernels.training.config import TrainConfig
from nar_kernels.training.interrupt import Interrupted
from nar_kernels.training.lock import FolderLock
from nar_kernels.training.model import build_model, load_model
from nar_kernels.training.step import loss_and_gradient
from nar_kernels.training.train import Run, train
from tests.helpers.paths import ROOT
from tests.helpers.runs import killed_in_step

pytest.importorskip("x_transformers")
pytestmark = [
    pytest.mark.seconds,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available() or os.name != "posix",
        reason="needs the gloo backend",
    ),
]

RANKS = 2
SENTENCE = b"the quick brown fox jumps over the lazy dog. "
CPU = torch.device("cpu")

STOPS = {"ctrl_c": signal.SIGINT, "terminated": signal.SIGTERM, "warned": signal.SIGUSR1}
UNEVEN = 2  # a step in which coins mask 40 tokens of one rank and 22 of the other
GRADIENTS = [(loss, accumulate) for loss in ("mean", "nelbo") for accumulate in (1, 3)]
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "parts": {"accumulate": 2, "loss": "nelbo", "ema": 0.9},
}
if parallel.SHARDS_ON_CPU:
    RUNS["shard"] = {"shard": True}
    RUNS["shard_parts"] = {**RUNS["parts"], "shard": True, "checkpoint_activations": True}
needs_shards = pytest.mark.skipif(
    not parallel.SHARDS_ON_CPU, reason=f"PyTorch {torch.__version__} has FSDP2 for GPUs alone"
)


def small(folder: Path, name: str, **options: Any) -> TrainConfig:
    settings = {
        **{"data": str(folder / "fox.txt"), "out": str(folder / name), "draw": "bernoulli"},
        **{"seq_len": 16, "held_out": 90, "eval_draws": 16, "batch_size": 8},
        **{"dim": 32, "depth": 2, "heads": 2, "lr": 3e-3, "steps": 12, "warmup": 2},
        **{"eval_every": 6, "save_every": 6, "threads": 1, "quiet": True, "device": "cpu"},
        "precision": "fp32",
    }
    return TrainConfig(**{**settings, **options})


def gradients(folder: Path, loss: str, accumulate: int) -> tuple[Tensor, list[Tensor]]:
    run = Run(small(folder, "none", loss=loss), CPU)
    value = loss_and_gradient(run.trained, run.loader.batch(UNEVEN), accumulate)
    value = distributed.sum_over_ranks(value) / distributed.world_size()
    return value, [p.grad.clone() for p in run.model.parameters() if p.grad is not None]


def half_a_run(config: TrainConfig) -> None:
    """Leaves what a run leaves that is killed in step 7, after it has saved step 6."""
    killed_in_step(7, config, CPU)


def as_a_rank(rank: int, folder: Path) -> None:
    """What each of the processes does, and leaves in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    found: dict[str, Any] = {}
    run = Run(small(folder, "none"), CPU)
    found["batches"] = [tensors(run.loader.batch(step)) for step in range(3)]
    run.step(run.loader.batch(0), 0)
    found["dropout"] = torch.initial_seed()
    found["exchanges"] = []
    for is_last in (False, True):
        with parallel.accumulating(run.trained, is_last=is_last):
            found["exchanges"].append(run.trained.require_backward_grad_sync)
    for loss, accumulate in GRADIENTS:
        found[f"{loss} {accumulate}"] = gradients(folder, loss, accumulate)
    found["mistake"] = with_counts_of_its_own(folder)
    found["static"] = [weights_after(folder, cuda_graph=flag) for flag in (False, True)]
    for name, number in STOPS.items():
        config = small(folder, name)
        found[name] = signalled(config, number, at_step=4, here=rank == 1)
    found["refused"] = (refused(folder, rank), refused_data(folder))
    for name, options in RUNS.items():
        train(small(folder, f"ranks_{name}", **options))
    train(small(folder, "one_then_two", resume=True))
    if parallel.SHARDS_ON_CPU:
        train(small(folder, "ranks_shard", shard=True, resume=True))  # it is complete
        train(small(folder, "one_then_shard", resume=True, shard=True, ema=0.9))
        half_a_run(small(folder, "shard_then_one", shard=True, ema=0.9))
        found["full_disk"] = with_a_full_disk(folder / "full_disk", here=rank == 1)
    torch.save(found, folder / f"found_{rank}.pt")
    dist.destroy_process_group()


def signalled(config: TrainConfig, number: int, at_step: int, here: bool) -> int | None:
    """Trains; the signal by which that ended, as if it had come to this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    calls = itertools.count(1)

    def pressed(*arguments: Any) -> Tensor:
        if next(calls) == at_step and here:
            signal.raise_signal(number)
        return loss_and_gradient(*arguments)

    train_module.loss_and_gradient = pressed
    try:
        train(config)
    except Interrupted as stopped:
        return stopped.signum
    finally:
        train_module.loss_and_gradient = loss_and_gradient
    return None


def refused(folder: Path, rank: int) -> str:
    """The error where another run has the folder, which only the first rank looks at."""
    config = small(folder, "locked")
    with FolderLock(config.folder) as lock:
        if rank == 0:
            lock.acquire()
        distributed.barrier()
        try:
            train(config)
        except OSError as error:
            return f"{type(error).__name__} {error}"
        finally:
            distributed.barrier()
    return "nothing"


def refused_data(folder: Path) -> str:
    """The error of a bad id, which only the first rank looks for."""
    try:
        train(small(folder, "bad", data=str(folder / "fox.npy"), num_tokens=100))
    except ValueError as error:
        return f"{type(error).__name__} {error}"
    return "nothing"


def weights_after(folder: Path, **options: Any) -> list[Tensor]:
    """Those of three steps of two microbatches."""
    run = Run(small(folder, "none", accumulate=2, **options), CPU)
    for step, batch in zip(range(3), run.batches(), strict=False):
        run.step(batch, step)
    return [p.detach().clone() for p in run.model.parameters()]


def with_counts_of_its_own(folder: Path) -> tuple[Tensor, list[Tensor]]:
    """Each rank divides by the count of its own masked tokens: a mean of means."""
    exchange = distributed.sum_over_ranks
    distributed.sum_over_ranks = lambda values: (
        values * (1 if values.dtype.is_floating_point else 2)
    )
    try:
        return gradients(folder, "mean", 1)
    finally:
        distributed.sum_over_ranks = exchange


def with_a_full_disk(folder: Path, here: bool) -> str:
    """The error of a checkpoint that one rank cannot write."""
    folder.mkdir(exist_ok=True)
    path = folder / "last.pt"
    checkpoint.save(path, {"config": 1})
    model = nn.Linear(8, 8)
    parallel.shard(model, [], CPU)

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    save = torch.save
    if here:
        torch.save = fail
    try:
        checkpoint.save(path, {"config": 2, "model": model.state_dict()})
    except OSError as error:
        return str(error)
    finally:
        torch.save = save
    return "nothing"


def tensors(batch: Corrupted) -> list[Tensor]:
    return [batch.input_ids, batch.labels, batch.masked_indices, batch.times, batch.loss_weight]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    (folder / "fox.txt").write_bytes(SENTENCE * 200)
    np.save(folder / "fox.npy", np.frombuffer(SENTENCE * 200, dtype=np.uint8))
    half_a_run(small(folder, "one_then_two"))
    half_a_run(small(folder, "one_then_shard", ema=0.9))
    torch.multiprocessing.spawn(as_a_rank, (folder,), RANKS)
    return folder


@pytest.fixture(scope="module")
def found(folder) -> list[dict[str, Any]]:
    return [torch.load(folder / f"found_{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, dict[str, Any]]:
    """The checkpoints of the same runs in one process."""
    checkpoints = {}
    for name, options in {**RUNS, "ema": {"ema": 0.9}}.items():
        train(small(folder, f"alone_{name}", **{**options, "shard": False}))
        checkpoints[name] = checkpoint.load(folder / f"alone_{name}" / "last.pt")
    return checkpoints


def assert_same_run(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Equal up to rounding; and what was not rounded, equal."""
    assert ours["loader"] == theirs["loader"]
    torch.testing.assert_close(ours["log"]["losses"], theirs["log"]["losses"], rtol=1e-4, atol=0)
    assert len(theirs["log"]["losses"]) == 12
    for (step, bits, error), expected in zip(
        ours["log"]["curve"], theirs["log"]["curve"], strict=True
    ):
        assert (step, bits, error) == pytest.approx(expected, rel=1e-4)
    for part in ("model", "ema"):
        assert (ours[part] is None) == (theirs[part] is None)
        for name, value in (theirs[part] or {}).items():
            torch.testing.assert_close(ours[part][name], value, rtol=1e-3, atol=1e-4)


def test_windows_and_masks_are_bit_identical(folder, found):
    loader = Run(small(folder, "none"), CPU).loader
    for step in range(3):
        halves = [found[rank]["batches"][step] for rank in range(RANKS)]
        assert halves[0][0].shape == (4, 16)
        for whole, parts in zip(
            tensors(loader.batch(step)), zip(*halves, strict=True), strict=True
        ):
            assert torch.equal(torch.cat(parts), whole)


def test_only_the_last_part_exchanges_gradients(found):
    assert found[0]["exchanges"] == [False, True]


def test_each_rank_has_dropout_of_its_own(found):
    assert found[0]["dropout"] != found[1]["dropout"]


@pytest.mark.parametrize(("loss", "accumulate"), GRADIENTS)
def test_losses_and_gradients(folder, found, loss, accumulate):
    value, expected = gradients(folder, loss, 1)
    for rank in range(RANKS):
        ours, grads = found[rank][f"{loss} {accumulate}"]
        torch.testing.assert_close(ours, value, rtol=1e-5, atol=0)
        torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-6)


def test_the_step_of_a_cuda_graph(found):
    for rank in range(RANKS):
        ordinary, static = found[rank]["static"]
        for x, y in zip(static, ordinary, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
    for x, y in zip(*(found[rank]["static"][1] for rank in range(RANKS)), strict=True):
        assert torch.equal(x, y)


def test_a_mean_of_means_would_be_noticed(folder, found):
    counts = [found[rank]["batches"][UNEVEN][2].sum().item() for rank in range(RANKS)]
    assert counts == [40, 22]
    value, expected = gradients(folder, "mean", 1)
    ours, grads = found[0]["mistake"]
    assert ours.item() != pytest.approx(value.item(), rel=1e-3)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_a_run(folder, alone, name):
    assert_same_run(checkpoint.load(folder / f"ranks_{name}" / "last.pt"), alone[name])
    assert (folder / f"ranks_{name}" / "report.json").exists()
    # One process writes; a run that is resumed begins another file.
    assert len(list((folder / f"ranks_{name}" / "tb").iterdir())) == 1 + (name == "shard")
    load_model(folder / f"ranks_{name}" / "best.pt")[0].generate(2, seed=0)


def test_replicas_and_shards_save_the_same_optimizer(folder, alone):
    for name in RUNS:
        ours = checkpoint.load(folder / f"ranks_{name}" / "last.pt")["optimizer"]
        theirs = alone[name]["optimizer"]
        assert ours["param_groups"] == theirs["param_groups"]
        torch.testing.assert_close(ours["state"], theirs["state"], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("one_then_two", "plain"), pytest.param("one_then_shard", "ema", marks=needs_shards)],
)
def test_resuming_with_more_processes(folder, alone, name, expected):
    assert_same_run(checkpoint.load(folder / name / "last.pt"), alone[expected])


@needs_shards
def test_shards_are_written_by_their_ranks(folder):
    run = folder / "ranks_shard_parts"
    state = checkpoint.read(run / "last.pt")
    shards = run / state["shards"]
    # The folders of earlier steps are gone, and each rank has written as much as the other.
    assert sorted(run.glob("*.shards-*")) == sorted(
        [shards, run / checkpoint.read(run / "best.pt")["shards"]]
    )
    sizes = [sum(f.stat().st_size for f in shards.glob(f"__{rank}_*")) for rank in range(RANKS)]
    assert min(sizes) > 0.8 * max(sizes)
    assert (run / "last.pt").stat().st_size < 0.5 * min(sizes)
    parameters = dict(load_model(run / "last.pt")[0].named_parameters())
    for name in ("model", "ema"):
        assert {key for key, value in state[name].items() if value.is_meta} == set(parameters)


@needs_shards
def test_missing_shards(folder, tmp_path):
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).write_bytes((folder / "ranks_shard" / name).read_bytes())
        with pytest.raises(FileNotFoundError, match=f"{name} has its weights in .*not there"):
            load_model(tmp_path / name)


@needs_shards
def test_shards_that_cannot_be_written(folder, found):
    """The checkpoint is as it was, and nothing else is left."""
    for rank in range(RANKS):
        assert "No space left" in found[rank]["full_disk"]
    assert sorted(path.name for path in (folder / "full_disk").iterdir()) == ["last.pt"]
    assert checkpoint.load(folder / "full_disk" / "last.pt") == {"config": 1}


@needs_shards
def test_resuming_a_sharded_run_in_one_process(folder, alone):
    config = small(folder, "shard_then_one", ema=0.9)
    assert checkpoint.load(config.folder / "last.pt")["loader"]["step"] == 6
    train(replace(config, resume=True))
    assert_same_run(checkpoint.load(config.folder / "last.pt"), alone["ema"])


def test_shares_of_the_evaluation_are_those_of_one_process(monkeypatch):
    """Three ranks with two batches: the third only joins in."""
    net = build_model(TrainConfig("text", dim=32, depth=1), SPEC).net
    dataset = Run(TrainConfig("text", seq_len=64, held_out=160, threads=1), CPU).data
    arguments = net, dataset.held_out, dataset.held_out_windows
    expected = evaluate(*arguments, draws=2, device=CPU)
    shares: list[Tensor] = []
    monkeypatch.setattr("nar_kernels.likelihood.world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr("nar_kernels.likelihood.rank", lambda rank=rank: rank)
        monkeypatch.setattr(
            "nar_kernels.likelihood.sum_over_ranks",
            lambda share: shares.append(share) or torch.ones_like(share),
        )
        evaluate(*arguments, draws=2, device=CPU)
    assert [bool(share.any()) for share in shares] == [True, True, False]
    bits = sum(shares)[0].mean() / math.log(2)  # of as many tokens each
    assert bits.item() == pytest.approx(expected.bits_per_token, rel=1e-12)


SPEC = SequenceSpec(num_tokens=257, seq_len=64, render="bytes", image_shape=None)


# Through torchrun


def torchrun(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(RANKS), "-m", "nar_kernels.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def options_of(config: TrainConfig) -> list[object]:
    options: list[object] = []
    for name, value in config.to_dict().items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            options += [flag] if value else []
        elif value is not None:
            options += [flag, value]
    return options


@pytest.fixture(scope="module", params=["SIGINT", "SIGTERM"])
def long_run(request, tmp_path_factory) -> tuple[TrainConfig, str]:
    """A run of two processes that a signal stopped in the middle, and what it printed."""
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "fox.txt").write_bytes(SENTENCE * 200)
    more = {"eval_every": 1000, "save_every": 5, "dropout": 0.1, "quiet": False}
    config = small(folder, "run", steps=2000, **more)
    process, last = torchrun("train", *options_of(config)), config.folder / "last.pt"
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if last.exists() and checkpoint.load(last)["loader"]["step"] > 0:
            break
        time.sleep(0.05)
    # torchrun hands it on to every rank.
    process.send_signal(getattr(signal, request.param))
    return config, process.communicate(timeout=120)[0]


@pytest.mark.parametrize("name", STOPS)
def test_a_signal_to_one_process_stops_all(folder, found, name):
    assert [found[rank][name] for rank in range(RANKS)] == [STOPS[name]] * RANKS
    state = checkpoint.load(folder / name / "last.pt")
    assert state["loader"]["step"] == len(state["log"]["losses"]) == 4


def test_what_the_first_process_finds_stops_all(folder, found):
    for rank in range(RANKS):
        in_use, bad_data = found[rank]["refused"]
        assert in_use.startswith(f"FolderInUseError {folder / 'locked'} is in use by process")
        assert bad_data.startswith("InvalidTokenError token id 116 at offset 0 of")
    assert not (folder / "bad").exists()


def test_a_signal_under_torchrun(long_run):
    config, printed = long_run
    state = checkpoint.load(config.folder / "last.pt")
    assert 0 < state["loader"]["step"] < 2000
    assert len(state["log"]["losses"]) == state["loader"]["step"]
    assert printed.count(f"saved step {state['loader']['step']};") == 1, printed
    assert printed.count("to beat") == 1 and "2 processes" in printed


def test_torchrun_says_what_is_wrong(folder):
    config = small(folder, "other", batch_size=7)
    process, out = torchrun("train", *options_of(config)), config.folder
    printed = process.communicate(timeout=240)[0]
    assert process.returncode != 0
    assert "--batch-size is 7, of all 2 processes together: it must be a multiple of 2" in printed
    assert not out.exists()


def test_sharding_needs_processes(folder, monkeypatch):
    with pytest.raises(ValueError, match="there is one: start several with torchrun"):
        train(small(folder, "nowhere", shard=True))
    monkeypatch.setattr(parallel, "SHARDS_ON_CPU", False)
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="shards weights over GPUs only, and this is the CPU"):
        parallel.shard(nn.Linear(1, 1), [], CPU)
    assert not (folder / "nowhere").exists()
