"""Views: several masks of each sample in one batch, on every backend."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch

import nar_kernels
from nar_kernels import Corrupted, MaskingConfig, masked_nll
from tests.helpers.batches import assert_same, clean_batch, corrupt

COMPILED = [
    pytest.param("cpp", marks=pytest.mark.cpp),
    pytest.param("cuda", marks=pytest.mark.cuda),
    pytest.param("triton", marks=pytest.mark.triton),
]
BACKENDS = ["reference", *COMPILED]
DRAWS = pytest.mark.parametrize("draw", ["exact", "bernoulli"])


def config(**options) -> MaskingConfig:
    return MaskingConfig(60, 59, **options)


def view(batch, v, count):
    """Of a batch of windows."""
    size = len(batch) // count
    return batch[v * size : (v + 1) * size]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_length", [None, 6])
def test_a_view_depends_on_its_number_alone(block_length, backend):
    """Old, new and reference policy see the same masks, whatever the batch."""
    masking = config(block_length=block_length, no_replace_prob=0.2, random_token_prob=0.2)
    tokens, slots = clean_batch(masking, 6, 20), torch.tensor([4, 100, 7, 2, 50, 1])
    how = {"seed": 3, "global_batch": 60, "backend": backend}
    whole = corrupt(tokens, masking, sample_ids=slots, views=3, **how)
    assert whole.input_ids.shape == (18, 20)
    alone = corrupt(tokens, masking, sample_ids=slots, **how)
    assert_same(view(whole, 0, 3), alone)
    order = torch.tensor([5, 2, 0])
    others = corrupt(tokens[order], masking, sample_ids=slots[order], views=range(1, 3), **how)
    for v in (1, 2):
        assert_same(view(others, v - 1, 2), view(whole, v, 3)[order])
    masks = {str(m.tolist()) for m in whole.masked_indices}
    assert len(masks) > 14  # some mask everything


@pytest.mark.parametrize("layout", ["flat", "padded", "rows"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_documents(backend, layout):
    masking = config(block_length=3)
    lengths = torch.tensor([7, 2, 11, 4])
    tokens = clean_batch(masking, 1, 24).flatten()
    how = {"starts": lengths.cumsum(0) - lengths, "lengths": lengths, "max_length": 12, "seed": 1}
    how |= {"backend": backend}
    if layout == "padded":
        how["seq_len"] = 12
    if layout == "rows":
        how |= {"seq_len": 16, "num_rows": 2, "places": torch.tensor([0, 9, 16, 28])}
    one = corrupt(tokens, masking, **how)
    two = corrupt(tokens, masking, views=2, **how)
    n = one.input_ids.shape[0]
    assert two.input_ids.shape == (2 * n, *one.input_ids.shape[1:]) and len(two) == 2 * len(one)
    assert_same(two[: len(one)], one)
    assert torch.equal(two.position_ids, one.position_ids.repeat(2, *[1] * (two.labels.dim() - 1)))
    assert two.cu_seqlens.tolist()[:4] == one.cu_seqlens.tolist()[:4] and len(two.cu_seqlens) == 9
    pair = corrupt(tokens, masking, views="complement", **how)
    masks = pair.masked_indices.view(2, -1)
    assert torch.equal(masks[0] ^ masks[1], pair.attention_mask.view(2, -1)[0])
    hidden, head = torch.randn(*pair.labels.shape, 4), torch.randn(60, 4)
    halves = [pair[: len(one)], pair[len(one) :]]
    parts = [masked_nll(hidden.view(2, *one.labels.shape, 4)[v], head, halves[v]) for v in (0, 1)]
    assert torch.allclose(masked_nll(hidden, head, pair), sum(parts) / 2, rtol=1e-5)


@DRAWS
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_length", [None, 8])
def test_a_pair_predicts_each_token_once(block_length, backend, draw):
    masking = config(block_length=block_length, draw=draw, random_token_prob=0.3)
    tokens = clean_batch(masking, 4, 30)
    maskable = torch.rand(4, 30, generator=torch.Generator().manual_seed(1)) < 0.7
    prompts = torch.tensor([0, 30, 3, 11])
    given = {"maskable": maskable, "prompt_lengths": prompts, "seed": 1, "backend": backend}
    pair = corrupt(tokens, masking, views="complement", **given)
    can = maskable & (torch.arange(30) >= prompts[:, None])
    first, second = view(pair, 0, 2), view(pair, 1, 2)
    assert torch.equal(first.masked_indices ^ second.masked_indices, can)
    assert not (first.masked_indices & second.masked_indices).any()
    assert int(pair.num_masked.sum()) == int(can.sum()) == int(pair.num_maskable.sum()) // 2
    assert torch.equal(first.times, second.times)
    alone = corrupt(tokens, masking, **given)
    assert torch.equal(first.input_ids, alone.input_ids)
    kept = torch.where(second.masked_indices, second.labels, second.input_ids)
    assert torch.equal(kept, tokens)


@DRAWS
@pytest.mark.parametrize("backend", BACKENDS)
def test_coupled_views(draw, backend):
    masking = config(draw=draw, time_range=(0.2, 0.8))
    tokens = clean_batch(masking, 5, 40)
    alone = corrupt(tokens, masking, seed=2, backend=backend)
    batch = corrupt(tokens, masking, seed=2, views="coupled", backend=backend)
    everything, drawn, rest = (view(batch, v, 3) for v in range(3))
    assert everything.masked_indices.all() and everything.input_ids.eq(59).all()
    assert torch.equal(drawn.input_ids, alone.input_ids)
    assert torch.equal(rest.masked_indices, ~drawn.masked_indices)
    share = drawn.num_masked / 40 if draw == "exact" else 1 - drawn.times
    assert torch.equal(everything.loss_weight, torch.ones(5))
    assert torch.allclose(drawn.loss_weight, 1 / share, rtol=1e-4)
    assert torch.allclose(rest.loss_weight, 1 / (1 - share), rtol=1e-4)
    hidden, head = torch.randn(15, 40, 4), torch.randn(60, 4)
    with pytest.raises(ValueError, match="'coupled', whose weights give no bound"):
        masked_nll(hidden, head, batch)
    assert masked_nll(hidden, head, batch, reduction="token").isfinite()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@DRAWS
def test_a_pair_gives_the_bound(draw, schedule):
    """The mean over times of what a set of k masked positions costs is the same for both views of a
    pair as for one: sum over k of cost(k) / n, whatever the schedule."""
    n, size = 5, 1 << 15
    masking = MaskingConfig(9, 8, draw=draw, schedule=schedule)
    tokens = torch.zeros(size, n, dtype=torch.int64)
    cost = torch.tensor([0.0, 1.0, 5.0, 2.0, 7.0, 3.0])  # of k masked positions together
    pair = nar_kernels.corrupt(tokens, masking, seed=1, views="complement")
    one = nar_kernels.corrupt(tokens, masking, seed=1)
    bound = sum(cost[k] / k for k in range(1, n + 1))
    for batch in (one, pair):
        total = (cost[batch.num_masked] * batch.loss_weight).mean().item()
        assert total == pytest.approx(bound.item(), rel=2e-3 if draw == "exact" else 0.05)
    # Unit weights count each token once, whatever the mask.
    units = MaskingConfig(9, 8, draw=draw, schedule=schedule, weighting="unit")
    pair = nar_kernels.corrupt(tokens[:8], units, seed=1, views="complement")
    hidden, head = torch.zeros(16, n, 3), torch.randn(9, 3)
    loss = masked_nll(hidden, head, pair, reduction="token", normalizer=8 * n)
    assert loss.item() == pytest.approx(math.log(9), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@DRAWS
def test_quadrature(draw, backend):
    masking = config(draw=draw, times="quadrature")
    tokens = clean_batch(masking, 2, 64)
    nodes, weights = np.polynomial.legendre.leggauss(3)
    batch = corrupt(tokens, masking, seed=1, views=3, backend=backend)
    for v in range(3):
        part = view(batch, v, 3)
        t = (nodes[v] + 1) / 2
        assert part.times.tolist() == pytest.approx([t, t], abs=1e-5)
        factor = 64 / part.num_masked[0].item() if draw == "exact" else 1 / (1 - t)
        expected = weights[v] / 2 * 3 * factor
        assert part.loss_weight.tolist() == pytest.approx([expected] * 2, rel=1e-4)
    # A polynomial of degree 5 in time is integrated exactly by three nodes.
    share = batch.loss_weight * (batch.num_masked / 64 if draw == "exact" else 1 - batch.times)
    assert (share * batch.times.double() ** 5).mean().item() == pytest.approx(1 / 6, rel=1e-4)
    one = corrupt(tokens, masking, seed=1, backend=backend)
    assert one.times.tolist() == pytest.approx([0.5, 0.5], abs=1e-5)


@pytest.mark.parametrize("views", [2, "complement", "coupled"])
def test_most_rows(views):
    masking = config()
    for step in range(20):
        batch = corrupt(
            clean_batch(masking, 4, 10), masking, seed=1, views=views,
            sample_ids=range(4 * step, 4 * step + 4),
        )  # fmt: skip
        assert len(batch.masked_rows) <= batch.row_capacity <= batch.labels.numel()
        for size in (1, 3, 6):
            assert len(batch[:size].masked_rows) <= batch[:size].row_capacity
        assert len(batch[[0, 5]].masked_rows) <= batch[[0, 5]].row_capacity
    assert batch.row_capacity == {2: 2 * 26, "complement": 40, "coupled": 80}[views]
    assert_same(Corrupted.cat([batch[:5], batch[5:]]), batch)
    assert_same(pickle.loads(pickle.dumps(batch)), batch)


def test_bad_input():
    tokens = clean_batch(config(), 2, 8)
    for views in (0, -1, range(0), range(2, 0, -1), range(0, 4, 2), range(-1, 2), 1 << 24):
        with pytest.raises(ValueError, match="views is "):
            corrupt(tokens, config(), seed=1, views=views if views != 1 << 24 else views + 1)
    with pytest.raises(ValueError, match="views is 'antithetic': it must be a number of views"):
        corrupt(tokens, config(), seed=1, views="antithetic")
    with pytest.raises(TypeError, match="views"):
        corrupt(tokens, config(), seed=1, views=1.5)
    for views in ("complement", range(1, 2), 65):
        with pytest.raises(ValueError, match="quadrature"):
            corrupt(tokens, config(times="quadrature"), seed=1, views=views)


@pytest.mark.parametrize("views", [2, "complement"])
def test_compiled(views):
    masking = config(block_length=4)
    tokens = clean_batch(masking, 2, 10)

    def step(tokens):
        batch = nar_kernels.corrupt(tokens, masking, seed=1, views=views)
        return batch.input_ids, batch.loss_weight

    expected = step(tokens)
    got = torch.compile(step, backend="eager", fullgraph=True)(tokens)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_memory_of_another_batch():
    masking = config(block_length=4)
    batches = [clean_batch(masking, 2, 10, seed=s) for s in (0, 1)]
    first = nar_kernels.corrupt(batches[0], masking, seed=1, views=2)
    memory = first.input_ids.data_ptr()
    second = nar_kernels.corrupt(batches[1], masking, seed=1, views=2, out=first)
    assert second.input_ids.data_ptr() == memory
    assert_same(second, nar_kernels.corrupt(batches[1], masking, seed=1, views=2))
    with pytest.raises(ValueError, match="out is"):
        nar_kernels.corrupt(batches[1], masking, seed=1, views=3, out=first)


def test_pairs_of_views_are_independent():
    """Masks of a position in two views, over many samples."""
    masking = config(draw="bernoulli", times="uniform", schedule=lambda t: 0 * t + 0.5)
    size = 1 << 14
    batch = corrupt(clean_batch(masking, size, 4), masking, seed=5, views=3)
    masks = batch.masked_indices.view(3, size, 4)[..., 0].double()
    for a, b in itertools.combinations(range(3), 2):
        correlation = ((masks[a] - 0.5) * (masks[b] - 0.5)).mean().item() * 4
        assert abs(correlation) < 5 / size**0.5
