"""What only a GPU can show: streams, graphs, no waiting, and a corpus in three kinds of memory."""

import contextlib
import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import nar_kernels
from nar_kernels import (
    Corpus,
    InvalidTokenError,
    MaskedLoader,
    MaskingConfig,
    Mixture,
    PackedLoader,
    PinnedMemoryError,
    TokenDataset,
)
from nar_kernels.data.pinned import _forget_last_error, _register, pin_exactly
from nar_kernels.data.stream import TokenStream
from nar_kernels.sampling.strategies import Candidates, Counts, StepNoise, UnmaskingPolicy
from tests.helpers.batches import assert_same, clean_batch
from tests.helpers.devices import no_waiting
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.gpu
BACKENDS = [
    pytest.param("cuda", marks=pytest.mark.cuda),
    pytest.param("triton", marks=pytest.mark.triton),
]
MEMORIES = ["device", "pinned", "mapped"]
MASKING = MaskingConfig(300, 299, no_replace_prob=0.1, random_token_prob=0.1)


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


def make_dataset(path: Path, num_windows: int = 50, bad_offset: int | None = None) -> TokenDataset:
    ids = (np.arange(num_windows * 64 + 5) % 299).astype(np.uint16)
    if bad_offset is not None:
        ids[bad_offset] = 299
    ids.tofile(path / "corpus.bin")
    return TokenDataset(path / "corpus.bin", 64, num_tokens=300, mask_id=299, dtype="uint16")


def cpu_batch(loader: MaskedLoader, step: int) -> nar_kernels.Corrupted:
    """The same batch, made on the CPU."""
    return MaskedLoader(
        loader.dataset,
        loader.masking,
        loader.batch_size,
        seed=loader.seed,
        rank=loader.rank,
        world_size=loader.world_size,
    ).batch(step)


# ---- corrupt


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_replays_with_another_seed(backend):
    tokens = clean_batch(MASKING, 33, 200)
    on_device, seed = tokens.cuda(), torch.tensor(1, device="cuda")
    maskable = torch.rand(33, 200) < 0.8

    def run():
        return nar_kernels.corrupt(
            on_device, MASKING, seed=seed, maskable=maskable_on_device, backend=backend
        )

    maskable_on_device = maskable.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles, and copies the tables
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for value in (1, 2, -3):
        seed.fill_(value)
        graph.replay()
        expected = nar_kernels.corrupt(tokens, MASKING, seed=value, maskable=maskable)
        assert_same(got.to("cpu"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_the_device(backend):
    tokens = clean_batch(MASKING, 8, 100).cuda()
    nar_kernels.corrupt(tokens, MASKING, seed=1, backend=backend)  # compiles, copies the tables
    with no_waiting():
        for seed in range(3):
            nar_kernels.corrupt(tokens, MASKING, seed=seed, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_the_current_stream(backend):
    tokens = clean_batch(MASKING, 64, 1000)
    expected = nar_kernels.corrupt(tokens, MASKING, seed=4)
    side = torch.cuda.Stream()
    on_device = torch.full((64, 1000), -1, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        on_device.copy_(tokens.pin_memory(), non_blocking=True)
        got = nar_kernels.corrupt(on_device, MASKING, seed=4, backend=backend)
    side.synchronize()
    assert_same(got.to("cpu"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one(backend):
    tokens = clean_batch(MASKING, 8, 100)
    got = nar_kernels.corrupt(tokens.to("cuda:1"), MASKING, seed=4, backend=backend)
    assert torch.cuda.current_device() == 0 and got.labels.device.index == 1
    assert_same(got.to("cpu"), nar_kernels.corrupt(tokens, MASKING, seed=4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("kind", ["files", "mixture", "documents"])
def test_windows_that_the_host_finds(tmp_path, kind, memory, backend):
    """In several files, of a mixture and within documents: the starts go to the kernel."""
    ids = (np.arange(6000) % 299).astype(np.uint16)
    for i, part in enumerate(np.split(ids, [1000, 1003])):
        np.save(tmp_path / f"{i}.npy", part)
    options = {"num_tokens": 300, "mask_id": 299}
    if kind == "documents":
        dataset = TokenDataset(tmp_path, 64, eos_id=298, within_documents=True, **options)
    else:
        dataset = TokenDataset(tmp_path, 64, **options)
        if kind == "mixture":
            dataset = Mixture([dataset, TokenDataset(ids[:999], 64, **options)], [0.7, 0.3])
    loader = MaskedLoader(
        dataset, MASKING, 9, seed=3, device="cuda", backend=backend, corpus_memory=memory
    )
    for step in (0, 1, 7):
        assert_same(loader.batch(step).to("cpu"), cpu_batch(loader, step))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("layout", ["rows", "flat"])
def test_packed_documents(layout, memory, backend):
    ids = (np.arange(6000) % 299).astype(np.uint16)
    corpus = Corpus(ids, eos_id=298)
    corpus.loss_mask = TokenStream.of_array(torch.from_numpy((ids % 5 > 0).astype(np.uint8)))

    def loader(**where):
        return PackedLoader(
            corpus, 128, MASKING, 5, seed=3, layout=layout, random_length_prob=0.3, **where
        )

    on_gpu = loader(device="cuda", backend=backend, corpus_memory=memory)
    for step in (0, 1, 7):
        got, expected = on_gpu.batch(step), loader().batch(step)
        assert_same(got.to("cpu"), expected)
        assert torch.equal(got.position_ids.cpu(), expected.position_ids)
        assert got.cu_seqlens.is_cuda


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64], ids=name_of
)
def test_a_pinned_corpus(dtype, backend):
    masking = MaskingConfig(120, 119)
    corpus = clean_batch(masking, 1, 5000, dtype)[0].pin_memory()
    starts = torch.tensor([0, 1, 2, 3, 77, 5000 - 333])
    args = dict(seed=3, seq_len=333)
    expected = nar_kernels.corrupt(corpus, masking, starts=starts, **args)
    got = nar_kernels.corrupt(corpus, masking, starts=starts.cuda(), backend=backend, **args)
    assert_same(got.to("cpu"), expected)


def test_an_exactly_pinned_corpus_is_unpinned_with_its_last_view():
    device, masking = torch.device("cuda", 0), MaskingConfig(120, 119)
    tokens = clean_batch(masking, 1, 3 * 2**20 + 5, torch.uint8)[0]
    pinned = pin_exactly(TokenStream.of_array(tokens), device)
    assert pinned.is_pinned() and torch.equal(pinned, tokens)
    args = dict(seed=3, seq_len=333)
    starts = torch.tensor([0, 77, len(tokens) - 333])
    got = nar_kernels.corrupt(pinned, masking, starts=starts.cuda(), **args)
    assert_same(got.to("cpu"), nar_kernels.corrupt(tokens, masking, starts=starts, **args))
    address, view = pinned.data_ptr(), pinned[5:]
    del pinned
    assert view.is_pinned()
    del view
    assert int(torch.cuda.cudart().cudaHostUnregister(address)) != 0  # it was done
    _forget_last_error(device)


def test_a_corpus_that_cannot_be_pinned():
    """The error is ours, and PyTorch does not find it later."""
    device = torch.device("cuda", 0)
    pinned = pin_exactly(TokenStream.of_array(torch.zeros(5000, dtype=torch.int64)), device)
    with pytest.raises(PinnedMemoryError, match="cannot be pinned for the GPU, 40000 bytes"):
        _register(pinned.numpy().view(np.uint8), device)  # a second time
    assert torch.ones(3, device=device).sum() == 3


def test_a_corpus_that_the_device_cannot_read():
    with pytest.raises(ValueError, match=r"a GPU cannot read: use tokens.pin_memory\(\)"):
        nar_kernels.corrupt(
            torch.zeros(100, dtype=torch.int64),
            MASKING,
            seed=1,
            starts=torch.zeros(1, dtype=torch.int64, device="cuda"),
            seq_len=3,
        )


@pytest.mark.large
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [512, 40000])
def test_more_than_2_to_the_31_positions(length, backend):
    batch = 2**31 // length + 40
    torch.cuda.empty_cache()  # PyTorch holds what the test before this one has freed
    if torch.cuda.mem_get_info()[0] < 32 * batch * length:
        pytest.skip("needs 64 GiB of free device memory")
    corpus = clean_batch(MASKING, 1, 10**6, torch.int16)[0]
    starts = torch.arange(batch) % (10**6 - length)
    got = nar_kernels.corrupt(
        corpus.cuda(), MASKING, seed=3, starts=starts.cuda(), seq_len=length, backend=backend
    )
    got.raise_if_invalid()
    last = torch.arange(batch - 3, batch)
    expected = nar_kernels.corrupt(
        corpus,
        MASKING,
        seed=3,
        starts=starts[last],
        seq_len=length,
        sample_ids=last,
        global_batch=batch,
    )
    for name in ("input_ids", "labels", "masked_indices", "times", "loss_weight", "num_masked"):
        assert torch.equal(getattr(got, name)[last.cuda()].cpu(), getattr(expected, name)), name
    rows = got.masked_rows[-len(expected.masked_rows) :].cpu()
    assert torch.equal(rows, expected.masked_rows + (batch - 3) * length)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_step(backend):
    tokens = clean_batch(MASKING, 16, 100).cuda()
    embedding = torch.nn.Embedding(300, 8, device="cuda")

    @torch.compile(fullgraph=True)
    def step(tokens, seed):
        batch = nar_kernels.corrupt(tokens, MASKING, seed=seed, backend=backend)
        return embedding(batch.input_ids).sum() * batch.loss_weight.sum(), batch.labels

    for seed in (1, 2, 3):
        batch = nar_kernels.corrupt(tokens.cpu(), MASKING, seed=seed)
        loss, labels = step(tokens, seed)
        assert torch.equal(labels.cpu(), batch.labels)
        expected = embedding(batch.input_ids.cuda()).sum() * batch.loss_weight.sum().cuda()
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


# ---- MaskedLoader


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_batches_equal_those_of_the_cpu(memory, backend, tmp_path):
    loader = MaskedLoader(
        make_dataset(tmp_path),
        MASKING,
        7,
        seed=5,
        device="cuda",
        rank=1,
        world_size=3,
        backend=backend,
        corpus_memory=memory,
    )
    assert loader.corpus_memory == memory
    for step, batch in zip(range(12), loader, strict=False):
        assert batch.input_ids.is_cuda
        assert_same(batch.to("cpu"), cpu_batch(loader, step))
    for step in (3, 2**33):
        assert_same(loader.batch(step).to("cpu"), cpu_batch(loader, step))


@pytest.mark.parametrize("memory", MEMORIES)
def test_iteration_waits_for_no_kernel(memory, tmp_path):
    loader = MaskedLoader(make_dataset(tmp_path), MASKING, 8, device="cuda", corpus_memory=memory)
    next(loader)
    with no_waiting():
        for _, batch in zip(range(5), loader, strict=False):
            batch.input_ids.sum()


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
def test_the_host_knows_the_counts(draw, memory, tmp_path):
    masking = MaskingConfig(300, 299, draw=draw)
    loader = MaskedLoader(make_dataset(tmp_path), masking, 8, device="cuda", corpus_memory=memory)
    for batch, step in ((next(loader), 0), (loader.batch(5), 5)):
        assert torch.equal(batch.host_counts, batch.num_masked.cpu())
        assert torch.equal(batch.masked_rows.cpu(), cpu_batch(loader, step).masked_rows)


@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
@pytest.mark.parametrize("reduction", ["nelbo", "mean", "none"])
def test_masked_nll_waits_for_nothing(reduction, draw, tmp_path):
    masking = MaskingConfig(300, 299, draw=draw)
    loader = MaskedLoader(make_dataset(tmp_path), masking, 8, device="cuda")
    hidden = torch.randn(8, 64, 32, device="cuda", requires_grad=True)
    weight = torch.randn(300, 32, device="cuda", requires_grad=True)

    def step():
        batch = next(loader)
        nar_kernels.masked_nll(hidden, weight, batch, reduction=reduction).sum().backward()

    step()  # compiles
    with no_waiting():
        step()


@pytest.mark.parametrize("vocabulary", [300, 50258, 256000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_masked_nll_equals_that_of_the_cpu(dtype, vocabulary):
    torch.manual_seed(0)
    masking = MaskingConfig(vocabulary, vocabulary - 1)
    batch = nar_kernels.corrupt(clean_batch(masking, 4, 50), masking, seed=1)
    inputs = [torch.randn(4, 50, 16), torch.randn(vocabulary, 16), torch.randn(vocabulary)]
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        hidden, weight, bias = (x.to(dtype).to(device, kind).requires_grad_() for x in inputs)
        loss = nar_kernels.masked_nll(hidden, weight, batch.to(device), bias=bias)
        gradients = torch.autograd.grad(loss, (hidden, weight, bias))
        results.append([loss.double().cpu(), *(g.double().cpu() for g in gradients)])
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for got, expected in zip(*reversed(results), strict=True):
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_masked_nll_on_another_device_than_the_current():
    batch = nar_kernels.corrupt(clean_batch(MASKING, 4, 50), MASKING, seed=1)
    inputs = [torch.randn(4, 50, 16), torch.randn(MASKING.num_tokens, 16)]
    results = []
    for device in ("cpu", "cuda:1"):
        hidden, weight = (x.to(device).requires_grad_() for x in inputs)
        loss = nar_kernels.masked_nll(hidden, weight, batch.to(device))
        results.append([x.cpu() for x in (loss, *torch.autograd.grad(loss, (hidden, weight)))])
    for got, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", ["device", "pinned"])
def test_a_graph_with_the_data_in_it(memory, backend, tmp_path):
    loader = MaskedLoader(
        make_dataset(tmp_path), MASKING, 8, device="cuda", backend=backend, corpus_memory=memory
    )
    step = torch.zeros(1, dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loader.batch(step)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch = loader.batch(step)
        step += 1
    for expected in range(10):
        graph.replay()
        assert_same(copy.copy(batch).to("cpu"), cpu_batch(loader, expected))


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_bad_id_is_reported_with_the_next_batch(memory, tmp_path):
    dataset = make_dataset(tmp_path, bad_offset=64 * 9 + 5)
    loader = MaskedLoader(dataset, MASKING, 4, device="cuda", shuffle=False, corpus_memory=memory)
    for call in (lambda: next(loader), loader.raise_if_invalid):
        loader.step = 2  # windows 8 to 11
        batch = next(loader)
        assert (batch.input_ids < 300).all() and int(batch.invalid[0]) == 1
        with pytest.raises(InvalidTokenError, match="299 at offset 581 of .*corpus.bin"):
            call()
    loader.raise_if_invalid()  # said once


def test_a_step_on_the_device_needs_a_corpus_that_the_kernel_reads(tmp_path):
    loader = MaskedLoader(make_dataset(tmp_path), MASKING, 4, device="cuda", corpus_memory="mapped")
    with pytest.raises(ValueError, match="here it is cuda:0 and 'mapped', so pass an int"):
        loader.batch(torch.zeros(1, dtype=torch.int64, device="cuda"))


# ---- unmask, generate


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype, vocabulary",
    [
        (torch.float32, 300),
        (torch.float16, 4099),
        (torch.float32, 50258),
        (torch.bfloat16, 50258),
        (torch.bfloat16, 50304),
        (torch.bfloat16, 128_256),
    ],
    ids=name_of,
)
def test_unmask_equals_that_of_the_cpu(dtype, vocabulary, backend):
    logits = (4 * torch.randn(64, vocabulary)).to(dtype)
    slots = torch.arange(64) * 2**33
    for top_k, top_p, confidence in (
        (None, 1, "margin"),
        (1, 1, "entropy"),
        (7, 1, "probability"),
        (vocabulary // 3, 1, "probability"),
        (None, 0.9, "entropy"),
        (None, 0.999, "probability"),
        (vocabulary // 3, 0.5, "margin"),
    ):
        options = dict(mask_id=3, seed=1, top_k=top_k, top_p=top_p)
        options |= dict(confidence=confidence, temperature=0.7)
        moved = dict(noise_slots=slots.cuda(), backend=backend)
        got = nar_kernels.unmask(logits.cuda(), **moved, **options)
        expected = nar_kernels.unmask(logits, noise_slots=slots, **options)
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours.cpu(), theirs)


@pytest.mark.triton
def test_a_graph_chooses_positions():
    rows, counts = torch.arange(8 * 1000), np.array([[1000] * 8, [300, *range(7)]])
    noise = StepNoise(5, 4, 1, 1000, range(8))
    policy, score = UnmaskingPolicy(temperature=2.0), torch.randn(8 * 1000)

    def choose(device, score):
        of_all, left = Counts.of(counts, torch.device(device))
        candidates = Candidates(rows.to(device), of_all)
        return lambda: policy.choose(candidates, left, score, 0.5, noise)

    on_device = score.cuda()
    captured = choose("cuda", on_device)
    captured()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = captured()
    for values in (score, -score):
        on_device.copy_(values)
        graph.replay()
        for ours, expected in zip(got, choose("cpu", values)(), strict=True):
            assert torch.equal(ours.cpu(), expected)


@pytest.mark.triton
@pytest.mark.parametrize("strategy", ["confidence", "margin", "random", "halton"])
@pytest.mark.parametrize("block_length", [None, 4])
def test_generate_waits_for_nothing(strategy, block_length):
    net = torch.nn.Sequential(torch.nn.Embedding(300, 32), torch.nn.Linear(32, 300)).cuda()
    adapted = nar_kernels.NetAdapter(net, num_tokens=300, max_seq_len=16, head=net[1])
    model = nar_kernels.NonAutoregressiveWrapper(adapted, mask_id=299)
    options = dict(strategy=strategy, block_length=block_length, seed=0)
    model.generate(4, **options)  # kernels are compiled
    steps = model.generate_steps(4, **options)
    num_steps = next(steps).num_steps
    with no_waiting():
        for _ in range(num_steps):
            state = next(steps)
    assert next(steps, None) is None  # which has looked for NaN
    assert (state.ids < 299).all()


@pytest.mark.triton
@pytest.mark.parametrize("strategy", ["confidence", "random"])
def test_nan_is_found_in_the_end(strategy):
    net = torch.nn.Sequential(torch.nn.Embedding(300, 32), torch.nn.Linear(32, 300)).cuda()
    adapted = nar_kernels.NetAdapter(net, num_tokens=300, max_seq_len=16, head=net[1])
    model = nar_kernels.NonAutoregressiveWrapper(adapted, mask_id=299)
    torch.nn.init.constant_(net[1].bias, float("nan"))
    with pytest.raises(nar_kernels.InvalidLogitsError, match="logits are NaN in step 1 of"):
        model.generate(4, strategy=strategy, seed=0)


@pytest.mark.triton
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_generate_with_a_net_in_cuda_graphs(guidance_scale):
    """A graph overwrites the outputs of its last call."""

    def generate(mode):
        torch.manual_seed(0)
        embedding, head = torch.nn.Embedding(300, 32), torch.nn.Linear(32, 300)
        net = torch.nn.Sequential(embedding, torch.nn.Linear(32, 32), head).cuda()
        adapted = nar_kernels.NetAdapter(net, num_tokens=300, max_seq_len=16, head=head)
        compiled = torch.compile(adapted, mode=mode)
        model = nar_kernels.NonAutoregressiveWrapper(compiled, mask_id=299)
        options = dict(prompt=[[1, 2], [3]], steps=6, guidance_scale=guidance_scale)
        return [model.generate(seed=seed, **options) for seed in range(3)]

    for graphed, expected in zip(generate("reduce-overhead"), generate("default"), strict=True):
        assert torch.equal(graphed, expected)


# ---- training


def test_a_training_step_waits_for_nothing(tmp_path):
    from nar_kernels import TrainConfig
    from nar_kernels.training.train import Run

    pytest.importorskip("x_transformers")
    config = TrainConfig.for_data("digits", device="cuda", out=str(tmp_path), quiet=True)
    run = Run(config, torch.device("cuda", 0))
    for step in range(2):  # compiles kernels, and gives AdamW its state
        run.step(next(run.loader), step)
    with no_waiting():
        for step in range(2, 4):
            run.step(next(run.loader), step)
    losses, _, _ = run.metrics.flush(stop=False)
    assert len(losses) == 4 and all(0 < loss < 4 for loss in losses)


def weights_of(run):
    return [p.detach().float().cpu() for p in run.model.parameters()]


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2, "ema": 0.9, "loss": "nelbo"}, {"compile": True}], ids=str
)
def test_a_training_step_in_a_graph(tmp_path, options):
    """It waits for nothing, before the capture, in it and after it, and is the ordinary one."""
    from nar_kernels import TrainConfig
    from nar_kernels.training.train import Run

    pytest.importorskip("x_transformers")
    config = TrainConfig.for_data(
        "digits", device="cuda", out=str(tmp_path), quiet=True, dropout=0.1, **options
    )
    device = torch.device("cuda", 0)
    ordinary = Run(config, device)
    for step, batch in zip(range(12), ordinary.loader, strict=False):
        ordinary.step(batch, step)
    run = Run(dataclasses.replace(config, cuda_graph=True), device)
    for step in range(12):
        is_compiled = step > 0 and step != 3  # kernels, and the graph
        with no_waiting() if is_compiled else contextlib.nullcontext():
            run.step(None, step)
        if step == 7:  # the host reads and writes between replays
            first, first_norms, _ = run.metrics.flush(stop=False)
            run.graph.raise_if_invalid()
            with run.ema_weights(), torch.no_grad():
                run.model.eval()
                run.model(run.loader.batch(0))
                run.model.train()
    assert run.graph._graph is not None
    losses, norms, _ = run.metrics.flush(stop=False)
    expected, expected_norms, _ = ordinary.metrics.flush(stop=False)
    assert len(expected) == 12
    np.testing.assert_allclose(first + losses, expected, rtol=5e-3)
    np.testing.assert_allclose(first_norms + norms, expected_norms, rtol=5e-2)
    for x, y in zip(weights_of(run), weights_of(ordinary), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-3)


def test_a_graph_goes_on_after_a_resume(tmp_path):
    from nar_kernels import TrainConfig
    from nar_kernels.training import checkpoint
    from nar_kernels.training.train import train
    from tests.helpers.runs import killed_in_step

    pytest.importorskip("x_transformers")
    config = TrainConfig.for_data(
        "digits",
        device="cuda",
        quiet=True,
        **{"cuda_graph": True, "steps": 16, "eval_every": 8, "save_every": 8, "dim": 32},
        **{"warmup": 2, "dropout": 0.1},
    )
    train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    half = dataclasses.replace(config, out=str(tmp_path / "half"))
    killed_in_step(14, half, torch.device("cuda", 0))  # six of them are lost
    assert checkpoint.load(tmp_path / "half" / "last.pt")["loader"]["step"] == 8
    train(dataclasses.replace(half, resume=True))
    whole, resumed = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "half"))
    losses, expected = (state["log"]["losses"] for state in (resumed, whole))
    assert len(expected) == 16
    torch.testing.assert_close(losses, expected, rtol=5e-3, atol=0)
    for name, value in whole["model"].items():
        torch.testing.assert_close(resumed["model"][name], value, rtol=2e-2, atol=2e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_graph_over_two_gpus(tmp_path):
    """It holds collectives; the run is that of one GPU, and it ends."""
    from nar_kernels.training import checkpoint

    pytest.importorskip("x_transformers")
    options = "--data digits --steps 16 --warmup 2 --eval-every 16 --device cuda --quiet".split()
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    losses = []
    for name, launcher, more in (("one", [], []), ("two", torchrun, ["--cuda-graph"])):
        command = [sys.executable, *launcher, "-m", "nar_kernels.cli", "train", *options, *more]
        out = tmp_path / name
        subprocess.run([*command, "--out", str(out)], cwd=ROOT, check=True, timeout=300)
        losses.append(checkpoint.load(out / "last.pt")["log"]["losses"])
    assert len(losses[0]) == 16
    torch.testing.assert_close(losses[1], losses[0], rtol=5e-3, atol=0)


def test_static_shapes_wait_for_nothing(tmp_path):
    """The counts of a batch whose step is a tensor are on the device alone."""
    loader = MaskedLoader(make_dataset(tmp_path), MASKING, 8, device="cuda", corpus_memory="device")
    hidden = torch.randn(8, 64, 32, device="cuda", requires_grad=True)
    weight = torch.randn(300, 32, device="cuda", requires_grad=True)
    step = torch.zeros(1, dtype=torch.int64, device="cuda")
    args = dict(static_shapes=True)

    def losses():
        batch = loader.batch(step)
        parts = [
            nar_kernels.masked_nll(some, weight, part, normalizer=batch.num_maskable.sum(), **args)
            for some, part in zip(hidden.split(3), batch.microbatches(3), strict=True)
        ]
        whole = nar_kernels.masked_nll(hidden, weight, batch, **args)
        (whole + sum(parts)).backward()
        return whole.detach(), sum(parts).detach()

    losses()  # compiles
    with no_waiting():
        whole, parts = losses()
    expected = nar_kernels.masked_nll(hidden, weight, loader.batch(0))
    torch.testing.assert_close(whole, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts, expected.detach(), rtol=1e-4, atol=1e-5)


def test_clean_ids_wait_for_nothing():
    net = torch.nn.Sequential(torch.nn.Embedding(300, 32), torch.nn.Linear(32, 300)).cuda()
    adapted = nar_kernels.NetAdapter(net, num_tokens=300, max_seq_len=16, head=net[1])
    model = nar_kernels.NonAutoregressiveWrapper(adapted, mask_id=299)
    ids = torch.randint(0, 299, (8, 16), device="cuda")
    model(ids).loss.backward()
    torch.cuda.synchronize()
    with no_waiting():  # but for the event of the check before, which is over
        model(ids).loss.backward()
    bad = ids.clone()
    bad[2, 3] = 299
    model(bad)
    with pytest.raises(InvalidTokenError, match=r"299 at tokens\[2, 3\]"):
        model.raise_if_invalid()
