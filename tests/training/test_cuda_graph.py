"""The step that a CUDA graph captures: the same as any other, with shapes that do not depend on
data, and nothing in it that waits for the device."""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nar_kernels.errors import InvalidTokenError
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.training import checkpoint, cuda_graph, parallel
from nar_kernels.training import train as train_module
from nar_kernels.training.config import TrainConfig
from nar_kernels.training.cuda_graph import StepGraph
from nar_kernels.training.optim import learning_rate
from nar_kernels.training.train import Run, train
from tests.helpers.pretend_gpu import DEVICE, PretendGpu, pretend_gpu
from tests.helpers.runs import killed_in_step, same, small

pytest.importorskip("x_transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer runs the step of --cuda-graph on a CPU, which has no graphs."""
    monkeypatch.setattr(TrainConfig, "check_device", lambda config, device: None)


def run_steps(run: Run, steps: int) -> tuple[list[float], list[Tensor]]:
    """Losses, and the weights in the end."""
    for step, batch in zip(range(steps), run.batches(), strict=False):
        run.step(batch, step)
    losses, _, _ = run.metrics.flush(stop=False)
    return losses, [p.detach().clone() for p in run.model.parameters()]


# ---- the same steps


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "mean"},
        {"loss": "nelbo", "accumulate": 3, "ema": 0.9},
        {"loss": "mean", "accumulate": 2, "draw": "bernoulli"},
    ],
    ids=str,
)
def test_equals_the_ordinary_step(sentences, tmp_path, options):
    config = small(sentences, tmp_path, dropout=0.1, **options)
    ordinary, static = Run(config, CPU), Run(replace(config, cuda_graph=True), CPU)
    losses, weights = run_steps(ordinary, 8)
    got_losses, got = run_steps(static, 8)
    assert got_losses == pytest.approx(losses, rel=1e-4)
    for x, y in zip(got, weights, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
    assert static.loader.step == ordinary.loader.step == 8
    if static.ema is not None and ordinary.ema is not None:
        for name, average in static.ema.state_dict().items():
            torch.testing.assert_close(
                average, ordinary.ema.state_dict()[name], rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("loss", ["mean", "nelbo"])
def test_equals_it_bit_for_bit(sentences, tmp_path, loss, accumulate, rows_of_a_chunk, monkeypatch):
    """Where products do not differ by their number of rows, and the learning rate has 32 bits."""
    rows_of_a_chunk(1, 257)

    def rounded(step: int, config: TrainConfig) -> float:
        return float(np.float32(learning_rate(step, config)))

    monkeypatch.setattr(train_module, "learning_rate", rounded)
    config = small(sentences, tmp_path, loss=loss, accumulate=accumulate, dropout=0.1)
    losses, weights = run_steps(Run(config, CPU), 5)
    got_losses, got = run_steps(Run(replace(config, cuda_graph=True), CPU), 5)
    assert got_losses == pytest.approx(losses, rel=1e-6)
    assert same(got, weights)


@pytest.mark.seconds
def test_resumes_bit_for_bit(sentences, tmp_path, anywhere):
    config = small(
        sentences, tmp_path / "whole", cuda_graph=True, steps=8, eval_every=4, save_every=4, ema=0.9
    )
    train(config)
    half = replace(config, out=str(tmp_path / "half"))
    killed_in_step(5, half, CPU)
    train(replace(half, resume=True))
    whole, resumed = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "half"))
    for name in ("model", "ema", "optimizer", "loader"):
        assert same(whole[name], resumed[name]), name
    assert same(whole["log"]["losses"], resumed["log"]["losses"])


@pytest.mark.seconds
@pytest.mark.parametrize("first", [False, True])
def test_resumes_with_and_without(sentences, tmp_path, anywhere, first):
    """A checkpoint does not say how its steps were launched."""
    config = small(sentences, tmp_path, steps=4, save_every=2, eval_every=4, cuda_graph=first)
    train(config)
    groups = checkpoint.load(tmp_path / "last.pt")["optimizer"]["param_groups"]
    assert all(type(g["lr"]) is float and g["capturable"] is False for g in groups)
    other = replace(config, cuda_graph=not first, resume=True, steps=6)
    run = Run(other, CPU)
    run.restore(tmp_path / "last.pt", checkpoint.read(tmp_path / "last.pt"))
    is_tensor = [isinstance(g["lr"], Tensor) for g in run.optimizer.param_groups]
    assert is_tensor == [not first] * 2
    train(other)
    assert checkpoint.load(tmp_path / "last.pt")["loader"]["step"] == 6


# ---- nothing waits


@contextlib.contextmanager
def run_on_a_gpu(config: TrainConfig) -> Iterator[tuple[Run, PretendGpu]]:
    """A run on a GPU that is not there, after two steps, and what has waited since."""
    with pretend_gpu() as gpu, pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "capture_stream", lambda device: None)
        patch.setattr("nar_kernels.data.loader.resolve_backend", lambda backend, device: "triton")
        run = Run(config, DEVICE)
        assert next(run.model.parameters()).is_cuda and run.loader.corpus_memory == "device"
        for step in range(2):
            run.step(None, step)
        gpu.waits.clear()
        yield run, gpu


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "mean"},
        {"loss": "nelbo", "accumulate": 3, "ema": 0.9},
        {"draw": "bernoulli", "accumulate": 2},
    ],
    ids=str,
)
def test_a_step_waits_for_nothing(sentences, tmp_path, options):
    config = small(sentences, tmp_path, cuda_graph=True, **options)
    with run_on_a_gpu(config) as (run, gpu):
        for step in range(2, 5):
            run.step(None, step)
        assert gpu.waits == []
        losses, norms, _ = run.metrics.flush(stop=False)
        assert gpu.waits == ["Tensor.cpu"]
        weights = [p.detach().inner for p in run.model.parameters()]
    expected = Run(replace(config, cuda_graph=False), CPU)
    of_cpu, weights_of_cpu = run_steps(expected, 5)
    assert losses == pytest.approx(of_cpu, rel=1e-4)
    for x, y in zip(weights, weights_of_cpu, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def item_of_the_loss(run: Run, batch: Corrupted) -> tuple[Tensor, ...]:
    loss, norm = Run.update(run, batch)
    float(loss)
    return loss, norm


def number_of_rows(run: Run, batch: Corrupted) -> tuple[Tensor, ...]:
    len(batch.masked_rows)
    return Run.update(run, batch)


def rows_by_nonzero(run: Run, batch: Corrupted) -> tuple[Tensor, ...]:
    batch.masked_indices.nonzero()
    return Run.update(run, batch)


def a_bool_index(run: Run, batch: Corrupted) -> tuple[Tensor, ...]:
    batch.labels[batch.masked_indices]
    return Run.update(run, batch)


def some_samples(run: Run, batch: Corrupted) -> tuple[Tensor, ...]:
    batch[[0, 1]]
    return Run.update(run, batch)


def a_check(run: Run, batch: Corrupted) -> tuple[Tensor, ...]:
    batch.raise_if_invalid()
    return Run.update(run, batch)


def a_copy_to_the_host(run: Run, batch: Corrupted) -> tuple[Tensor, ...]:
    loss, norm = Run.update(run, batch)
    norm.cpu()
    return loss, norm


def a_copy_from_the_host(run: Run, batch: Corrupted) -> tuple[Tensor, ...]:
    torch.tensor([1.0], device=batch.times.device)
    return Run.update(run, batch)


def ordinary_rows(run: Run, batch: Corrupted) -> tuple[Tensor, ...]:
    config = run.config
    run.config = replace(config, cuda_graph=False)
    results = Run.update(run, batch)
    run.config = config
    return results


MISTAKES = {
    item_of_the_loss: "aten._local_scalar_dense",
    number_of_rows: "aten._local_scalar_dense",
    rows_by_nonzero: "aten.nonzero",
    a_bool_index: "aten.index",
    some_samples: "aten.nonzero",
    a_check: "Tensor.tolist",
    a_copy_to_the_host: "Tensor.cpu",
    a_copy_from_the_host: "aten._to_copy",
    ordinary_rows: "aten._local_scalar_dense",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_a_step_that_waits_is_noticed(sentences, tmp_path, mistake):
    with run_on_a_gpu(small(sentences, tmp_path, cuda_graph=True)) as (run, gpu):
        assert run.graph is not None
        run.graph._update = lambda batch: mistake(run, batch)
        run.step(None, 2)
        assert {*gpu.waits} == {MISTAKES[mistake]}


def test_invalid_ids_are_reported_with_the_next_flush(sentences, tmp_path):
    """Also if the steps after the first such batch had none."""
    config = small(sentences, tmp_path, cuda_graph=True)
    with run_on_a_gpu(config) as (run, gpu):
        clean = run.loader._place.tokens
        bad = torch.full_like(clean, 300, dtype=torch.int64)
        for step, tokens in ((2, bad), (3, clean)):
            run.loader._place.tokens, run.loader._step = tokens, None
            run.step(None, step)
        assert gpu.waits == []
        with pytest.raises(InvalidTokenError, match=r"token id 300 at offset \d+ of .*fox.txt"):
            run.flush()


# ---- the capture


class Recorded:
    """In place of what PyTorch has for streams and graphs; notes what happens, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        recorded = self

        class Stream:
            def __init__(self, name: str) -> None:
                self.name, self.device = name, DEVICE

            def wait_stream(self, other: "Stream") -> None:
                recorded.events.append(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self) -> None:
                recorded.events.append(f"replay on {recorded.current.name}")

            def reset(self) -> None:
                recorded.events.append("reset")

        @contextlib.contextmanager
        def stream(stream: Stream) -> Iterator[None]:
            before, recorded.current = recorded.current, stream
            yield
            recorded.current = before

        @contextlib.contextmanager
        def capture(graph: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
            assert isinstance(graph, Graph)
            recorded.events.append(f"capture, {capture_error_mode}")
            before, recorded.current = recorded.current, stream
            yield
            recorded.current = before
            recorded.events.append("captured")

        self.current, self.aside = Stream("default"), Stream("aside")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"new on {device}"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: recorded.current)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(train_module, "capture_stream", lambda device: self.aside)


def test_the_stream_of_a_capture(monkeypatch):
    Recorded(monkeypatch)
    stream = cuda_graph.capture_stream(DEVICE)
    assert stream is not None and stream.name == "new on cuda:0"  # type: ignore[attr-defined]
    assert cuda_graph.capture_stream(CPU) is None


def test_warm_up_capture_and_replay(sentences, tmp_path, monkeypatch):
    """Each step is launched once: the steps of the warm-up are not repeated, and the capture itself
    computes nothing."""
    loader = Run(small(sentences, tmp_path), CPU).loader
    recorded = Recorded(monkeypatch)
    updates: list[int] = []

    def update(batch: Corrupted) -> tuple[Tensor, ...]:
        updates.append(loader.step - 1)
        recorded.events.append(f"update {recorded.current.name}")
        return (batch.times.sum(),)

    graph = StepGraph(update, loader, recorded.aside)
    for step in range(3):
        graph(step, 0.5)
        assert recorded.events == [
            "aside waits for default", "update aside", "default waits for aside"
        ]  # fmt: skip
        recorded.events.clear()
    first = graph(3, 0.5)
    # Other threads, such as those of NCCL, may not be errors.
    assert recorded.events == [
        "capture, thread_local", "update aside", "captured", "replay on default"
    ]  # fmt: skip
    recorded.events.clear()
    for step in (4, 5):
        again = graph(step, 0.25)
        assert again is first  # their memory is what the graph writes
    assert recorded.events == ["replay on default"] * 2 and updates == [0, 1, 2, 3]
    # What the graph reads.
    assert graph._step.item() == 5 and graph.rate.item() == 0.25 and loader.step == 6

    recorded.events.clear()
    results = weakref.ref(first[0])
    del first, again
    graph.release()
    assert recorded.events == ["reset"] and results() is None
    graph.release()  # there is nothing left
    graph(6, 0.5)
    assert recorded.events.count("reset") == 1
    assert recorded.events[1:] == [
        "capture, thread_local", "update aside", "captured", "replay on default"
    ]  # fmt: skip


def test_data_parallelism_takes_a_longer_warm_up(sentences, tmp_path, monkeypatch):
    loader = Run(small(sentences, tmp_path), CPU).loader
    recorded = Recorded(monkeypatch)
    monkeypatch.setattr(cuda_graph.distributed, "world_size", lambda: 2)
    graph = StepGraph(lambda batch: (batch.times,), loader, recorded.aside)
    for step in range(11):
        graph(step, 0.5)
        assert "captured" not in recorded.events
    graph(11, 0.5)
    assert recorded.events.count("captured") == 1


@pytest.mark.parametrize("is_captured", [False, True])
def test_gradients_are_accumulated_on_the_stream_of_the_capture(
    sentences, tmp_path, monkeypatch, is_captured
):
    """The one on which DistributedDataParallel is made."""
    recorded = Recorded(monkeypatch)
    made_on: list[Any] = []

    class Replicated(torch.nn.Module):
        def __init__(self, model: torch.nn.Module, **options: Any) -> None:
            super().__init__()
            made_on.append(recorded.current)

    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "DistributedDataParallel", Replicated)
    default = recorded.current
    run = Run(small(sentences, tmp_path, cuda_graph=is_captured), CPU)
    assert isinstance(run.trained, Replicated) and recorded.current is default
    if run.graph is None:
        assert made_on == [default]
    else:
        assert made_on == [run.graph._stream] == [recorded.aside]


def test_the_optimiser_reads_what_the_graph_is_told(sentences, tmp_path):
    for captured in (False, True):
        run = Run(small(sentences, tmp_path, cuda_graph=captured), CPU)
        groups = run.optimizer.param_groups
        assert [g["capturable"] for g in groups] == [captured] * 2
        if run.graph is not None:
            assert all(g["lr"] is run.graph.rate for g in groups)


@pytest.fixture
def process_group(monkeypatch, anywhere) -> Recorded:
    """One that the trainer makes and destroys, and the graphs of its run."""
    recorded = Recorded(monkeypatch)
    monkeypatch.setattr(parallel, "is_launched", lambda: True)
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(
        parallel.dist, "destroy_process_group", lambda: recorded.events.append("destroy")
    )
    return recorded


@pytest.mark.seconds
def test_the_graph_is_gone_before_the_process_group(sentences, tmp_path, process_group):
    """Which waits for every graph that holds one of its collectives."""
    train(small(sentences, tmp_path, cuda_graph=True, steps=6))
    events = [e for e in process_group.events if "waits for" not in e]
    assert events == [
        "capture, thread_local", "captured", *["replay on default"] * 3, "reset", "destroy"
    ]  # fmt: skip


@pytest.mark.seconds
def test_the_graph_is_gone_after_an_error(sentences, tmp_path, process_group, monkeypatch):
    def fail(self: Run) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Run, "finish", fail)
    with pytest.raises(OSError, match="no space left"):
        train(small(sentences, tmp_path, cuda_graph=True, steps=6))
    assert process_group.events[-1] == "reset"


# ---- what it refuses


REDUCED = {"compile": True, "compile_mode": "reduce-overhead"}


@pytest.mark.parametrize(
    ("options", "name", "without"),
    [
        ({"cuda_graph": True}, "--cuda-graph", "--no-cuda-graph"),
        (REDUCED, "--compile-mode reduce-overhead", "--compile-mode default"),
    ],
    ids=["cuda_graph", "compile_mode"],
)
def test_a_cpu_has_no_graphs(sentences, tmp_path, options, name, without):
    config = small(sentences, tmp_path / "run", **options)
    message = f"^{name} captures .* this run is on the cpu: use --device cuda .*, or {without}$"
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_corpus_that_kernels_cannot_read(sentences, tmp_path):
    with pretend_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (800, 800))
        patch.setattr("nar_kernels.data.staging._free_host_bytes", lambda: 801)
        patch.setattr("nar_kernels.data.loader.Stager", lambda *args: None)
        patch.setattr("nar_kernels.data.loader.resolve_backend", lambda backend, device: "triton")
        patch.setattr(train_module, "capture_stream", lambda device: None)
        config = small(sentences, tmp_path, cuda_graph=True)
        message = (
            rf"corpus_memory is 'mapped' for .*fox.txt: its {sentences.stat().st_size} bytes are "
            "more than .* GPU memory, 100, and either .* for each process, 200, or the system has "
            "refused to pin them .*--no-cuda-graph"
        )
        with pytest.raises(ValueError, match=message):
            Run(config, DEVICE)


def test_a_gpu_without_kernels(sentences, tmp_path):
    with pretend_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "nar_kernels.ops.backends._present",
            {"reference": True, "cpp": True} | dict.fromkeys(("triton", "cuda"), False),
        )
        patch.setattr(train_module, "capture_stream", lambda device: None)
        Run(small(sentences, tmp_path), DEVICE)
        message = "neither Triton nor the CUDA extension .*doctor.* or use --no-cuda-graph"
        with pytest.raises(ValueError, match=message):
            Run(small(sentences, tmp_path, cuda_graph=True), DEVICE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cuda_graph": True, "shard": True},
            "--cuda-graph and --shard exclude each other: FSDP2 .*; use --no-cuda-graph, or "
            "--no-shard$",
        ),
        (
            {"cuda_graph": True, "checkpoint_activations": True},
            "--cuda-graph and --checkpoint-activations exclude each other: recomputing a block "
            ".*; use --no-cuda-graph, or --no-checkpoint-activations$",
        ),
        (
            {"cuda_graph": True, **REDUCED},
            "--cuda-graph and --compile-mode reduce-overhead exclude each other: there are no "
            ".*; use --no-cuda-graph, or --compile-mode default$",
        ),
        (
            {**REDUCED, "shard": True},
            "--compile-mode reduce-overhead and --shard exclude .*; use --compile-mode default, "
            "or --no-shard$",
        ),
        (
            {**REDUCED, "checkpoint_activations": True},
            "reduce-overhead and --checkpoint-activations exclude .*, or --no-checkpoint-act",
        ),
        (
            {"compile_mode": "reduce-overhead"},
            "--compile-mode reduce-overhead needs --compile: add it, or use --compile-mode default",
        ),
        ({**REDUCED, "accumulate": 2}, "accumulate is 2: use --cuda-graph instead"),
        ({"compile_mode": "fast"}, "compile_mode is 'fast': it must be one of default, reduce"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig("digits", **options)


def test_options_that_do_not() -> None:
    for options in (
        {"cuda_graph": True, "compile": True},
        REDUCED,
        {"shard": True, "compile": True},
    ):
        TrainConfig("digits", checkpoint_activations="shard" in options, **options)
