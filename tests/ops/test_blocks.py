"""Blocks: each is drawn as a window of its own would be, on every backend, in any layout."""

import random

import pytest
import torch

import nar_kernels
from nar_kernels import Corrupted, MaskingConfig, masked_nll
from nar_kernels.ops import corrupt as corrupt_module
from nar_kernels.ops.host_counts import count_on_host
from tests.helpers.batches import assert_same, clean_batch, corrupt
from tests.helpers.devices import device_of

COMPILED = [
    pytest.param("cpp", marks=pytest.mark.cpp),
    pytest.param("cuda", marks=pytest.mark.cuda),
    pytest.param("triton", marks=pytest.mark.triton),
]
BACKENDS = ["reference", *COMPILED]
OF_SAMPLES = "times", "loss_weight", "num_masked", "num_maskable"
EOS = 1


def config(**options) -> MaskingConfig:
    return MaskingConfig(60, 59, **options)


def random_config(rng, block_length) -> MaskingConfig:
    return config(
        block_length=block_length,
        draw=rng.choice(["exact", "bernoulli"]),
        times=rng.choice(["stratified", "uniform"]),
        weighting=rng.choice(["elbo", "elbo", "unit"]),
        schedule=rng.choice(["linear", "cosine"]),
        no_replace_prob=rng.choice([0, 0.1, 0.5]),
        random_token_prob=rng.choice([0, 0.1, 0.5]),
        corruption_prob=rng.choice([0.5, 1]),
        never_mask_ids=rng.choice([(), (7,)]),
    )


def random_views(rng):
    return rng.choice([1, 1, 2, range(1, 3), "complement", "coupled"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
@pytest.mark.parametrize("block_length", [100, 1 << 20])
def test_one_block_is_the_whole_window(block_length, draw, backend):
    whole = config(draw=draw, no_replace_prob=0.1, random_token_prob=0.1)
    tokens = clean_batch(whole, 3, 100)
    expected = corrupt(tokens, whole, seed=5, sample_ids=range(6, 9), backend=backend)
    blocks = config(
        draw=draw, no_replace_prob=0.1, random_token_prob=0.1, block_length=block_length
    )
    got = corrupt(tokens, blocks, seed=5, sample_ids=range(6, 9), backend=backend)
    for name in OF_SAMPLES:
        assert getattr(got, name).shape == (3, 1)
        setattr(got, name, getattr(got, name).flatten())
    assert_same(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_length", [1, 4, 6, 32])
def test_blocks_are_windows_of_their_length(block_length, backend):
    rng = random.Random(block_length)
    for draw in ("exact", "bernoulli"):
        options = {"draw": draw, "no_replace_prob": 0.2, "random_token_prob": 0.2}
        num_blocks, batch = rng.choice([1, 2, 5]), rng.choice([1, 3])
        length = num_blocks * block_length
        tokens = clean_batch(config(), batch, length)
        maskable = torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) < 0.8
        slots = torch.tensor([rng.randrange(1 << 40) for _ in range(batch)])
        got = corrupt(
            tokens,
            config(block_length=block_length, **options),
            seed=9,
            sample_ids=slots,
            global_batch=7,
            maskable=maskable,
            backend=backend,
        )
        expected = corrupt(
            tokens.view(-1, block_length),
            config(**options),
            seed=9,
            sample_ids=(slots[:, None] * num_blocks + torch.arange(num_blocks)).flatten(),
            global_batch=7 * num_blocks,
            maskable=maskable.view(-1, block_length),
            backend=backend,
        )
        for name in ("input_ids", "labels", "masked_indices"):
            setattr(got, name, getattr(got, name).view(-1, block_length))
        for name in OF_SAMPLES:
            assert getattr(got, name).shape == (batch, num_blocks)
            setattr(got, name, getattr(got, name).flatten())
        assert_same(got, expected)


def random_windows(rng, length):
    batch = rng.choice([1, 2, 3])
    tokens = clean_batch(config(), batch, length, seed=rng.randrange(99))
    how = {}
    generator = torch.Generator().manual_seed(rng.randrange(99))
    given = rng.random()
    if given < 0.3:
        share = rng.choice([0.0, 0.02, 0.5, 0.98, 1.0])
        how["maskable"] = torch.rand(batch, length, generator=generator) < share
    elif given < 0.5:
        how["prompt_lengths"] = torch.randint(0, length + 1, (batch,), generator=generator)
    if rng.random() < 0.5:
        how["sample_ids"] = torch.randint(0, 1 << 40, (batch,), generator=generator)
        how["global_batch"] = rng.choice([3, 300])
    return tokens, how


def random_documents(rng, longest):
    n = rng.choice([1, 2, 4])
    lengths = torch.tensor([rng.choice([0, 1, rng.randint(1, longest)]) for _ in range(n)])
    starts = lengths.cumsum(0) - lengths
    tokens = clean_batch(config(), 1, max(int(lengths.sum()), 1)).flatten()
    eos_lengths = torch.tensor([rng.randint(0, 3) for _ in range(n)])
    how = {"starts": starts, "lengths": lengths, "eos_lengths": eos_lengths, "eos_id": EOS}
    how |= {"pad_id": 2, "sample_ids": torch.tensor([rng.randrange(1 << 30) for _ in range(n)])}
    how |= {"global_batch": 1000, "max_length": longest + 3 + rng.choice([0, 9])}
    if rng.random() < 0.6:
        how["seq_len"] = longest + 3 + rng.choice([0, 5])
    if rng.random() < 0.3:
        how["loss_mask"] = torch.tensor([rng.random() < 0.7 for _ in range(len(tokens))])
    if rng.random() < 0.3:
        how["prompt_lengths"] = (lengths * rng.random()).long()
    return tokens, how


def check_against_reference(rng, backend, kinds, lengths):
    for kind in kinds:
        length = rng.choice(lengths)
        block_length = rng.choice([None, *range(max(length // 12, 1), length + 2)])
        masking = random_config(rng, block_length)
        tokens, how = (random_windows if kind == "windows" else random_documents)(rng, length)
        how |= {"views": random_views(rng), "seed": rng.getrandbits(60)}
        if rng.random() < 0.3:
            how["ids_dtype"] = torch.int32
        expected = corrupt(tokens, masking, backend="reference", **how)
        assert_same(corrupt(tokens, masking, backend=backend, **how), expected)


@pytest.mark.parametrize("kind", ["windows", "documents"])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("backend", COMPILED[1:])
def test_equals_reference(backend, number, kind):
    check_against_reference(random.Random(number), backend, 2 * [kind], [1, 9, 37, 130, 200])


@pytest.mark.cpp
@pytest.mark.parametrize("kind", ["windows", "documents"])
def test_cpp_equals_reference(kind, simd_level):
    kinds = 60 * [kind]
    check_against_reference(random.Random(simd_level), "cpp", kinds, [1, 5, 37, 64, 130, 257, 700])


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_one_mask_everything(backend):
    """Of exact draws: with the conditionals that block diffusion has, the loss is that of an
    autoregressive model."""
    masking = config(block_length=1)
    batch = corrupt(clean_batch(masking, 2, 9), masking, seed=1, backend=backend)
    assert batch.masked_indices.all()
    assert torch.allclose(batch.loss_weight, torch.ones(2, 9))


def test_times_have_a_stratum_for_each_block():
    """Of a global batch; and the strata of a place in the row are not those of another batch."""
    masking = config(block_length=4)
    batches = [
        corrupt(clean_batch(masking, 8, 32), masking, seed=3, sample_ids=range(8 * g, 8 * g + 8))
        for g in range(40)
    ]
    for batch in batches:
        strata = (batch.times * 64).long().flatten().sort().values
        assert strata.tolist() == list(range(64))
    times = torch.stack([batch.times for batch in batches])
    assert (times.mean(0) - 0.5).abs().max() < 6 * (1 / 12 / 40) ** 0.5


def one_by_one(batch: Corrupted, documents, block_length):
    """What each document has, by its slot, wherever it lies."""
    found = {}
    begins = batch.documents.begins.tolist()
    lengths = batch.documents.lengths.tolist()
    for i, slot in enumerate(batch.documents.ids_on_host.tolist()):
        at = slice(begins[i], begins[i] + lengths[i])
        blocks = -(-lengths[i] // block_length)
        found[slot] = [getattr(batch, x).flatten()[at].tolist() for x in ("input_ids", "labels")]
        found[slot] += [getattr(batch, x)[i, :blocks].tolist() for x in OF_SAMPLES]
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_document_is_the_same_wherever_it_lies(backend):
    rng = random.Random(4)
    masking = config(block_length=5, no_replace_prob=0.1)
    lengths = torch.tensor([17, 1, 20, 5, 9])
    tokens = clean_batch(masking, 1, int(lengths.sum())).flatten()
    how = {"lengths": lengths, "starts": lengths.cumsum(0) - lengths, "global_batch": 50}
    how |= {"sample_ids": torch.tensor([3, 14, 15, 9, 26]), "seed": 1, "backend": backend}
    flat = corrupt(tokens, masking, **how, max_length=20)
    expected = one_by_one(flat, lengths, 5)
    assert one_by_one(corrupt(tokens, masking, **how, seq_len=20), lengths, 5) == expected
    wide = corrupt(tokens, masking, **how, seq_len=33, max_length=20)
    assert one_by_one(wide, lengths, 5) == expected
    for _ in range(3):
        order = torch.tensor(rng.sample(range(5), 5))
        mixed = how | {name: how[name][order] for name in ("lengths", "starts", "sample_ids")}
        ends = mixed["lengths"].cumsum(0)
        rows = {"seq_len": 52, "num_rows": 1, "places": ends - mixed["lengths"]}
        packed = corrupt(tokens, masking, **mixed, **rows, max_length=20)
        assert one_by_one(packed, lengths, 5) == expected


@pytest.mark.parametrize("layout", ["windows", "flat", "rows"])
def test_losses_are_weighed_by_block(layout):
    masking = config(block_length=4)
    lengths = torch.tensor([10, 3, 7, 4])
    if layout == "windows":
        batch = corrupt(clean_batch(masking, 3, 10), masking, seed=2)
        sample = torch.arange(3)[:, None].expand(3, 10)
        place, row = torch.arange(10).expand(3, 10), sample
    else:
        tokens = clean_batch(masking, 1, 24).flatten()
        where = {"lengths": lengths, "starts": lengths.cumsum(0) - lengths, "seed": 2}
        if layout == "rows":
            where |= {"seq_len": 13, "num_rows": 2, "places": torch.tensor([0, 10, 13, 20])}
        batch = corrupt(tokens, masking, **where, max_length=12)
        begins = batch.documents.begins
        flat = torch.arange(int(begins[-1]))
        sample = torch.searchsorted(begins[1:], flat, right=True)
        place = flat - begins[sample]
        row = sample if layout == "flat" else flat // 13
        sample, place, row = (x.view(batch.input_ids.shape) for x in (sample, place, row))
    hidden = torch.randn(*batch.input_ids.shape, 8, dtype=torch.float64)
    head = torch.randn(60, 8, dtype=torch.float64)
    nll = torch.nn.functional.cross_entropy(
        (hidden @ head.T).flatten(0, -2), batch.labels.flatten(), reduction="none"
    ).view(batch.labels.shape)
    block = (place // 4).clamp(max=batch.times.shape[1] - 1)
    weighted = nll * batch.loss_weight[sample, block] * batch.masked_indices
    n = batch.num_maskable.sum(1)
    num_rows = int(row.max()) + 1
    of_row = [n[sample[row == r].unique()].sum() for r in range(num_rows)]
    expected = {
        "nelbo": weighted.sum() / n.sum(),
        "sequence": sum(weighted[row == r].sum() / of_row[r] for r in range(num_rows)) / num_rows,
        "answer": sum(weighted[sample == s].sum() / n[s] for s in range(len(n))) / len(n),
    }
    for reduction, loss in expected.items():
        got = masked_nll(hidden, head, batch, reduction=reduction)
        assert torch.allclose(got, loss, rtol=1e-12), reduction
    padded = masked_nll(hidden, head, batch, static_shapes=True)
    assert torch.allclose(padded, expected["nelbo"], rtol=1e-12)


@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
@pytest.mark.parametrize("block_length", [1, 2, 3, 4])
def test_with_exact_conditionals_the_loss_is_the_entropy(block_length, draw):
    """Of a joint distribution of four bits, whatever the blocks: block j is predicted given the
    blocks before it, clean, and what is left of its own."""
    joint = torch.rand(2, 2, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    joint /= joint.sum()
    entropy = -(joint * joint.log()).sum().item()
    num = 40_000
    which = torch.multinomial(
        joint.flatten(), num, True, generator=torch.Generator().manual_seed(2)
    )
    tokens = torch.stack([which >> 3, which >> 2 & 1, which >> 1 & 1, which & 1], 1)
    masking = MaskingConfig(3, 2, block_length=block_length, draw=draw)
    batch = nar_kernels.corrupt(tokens, masking, seed=7)
    total = 0.0
    for position in range(4):
        block = position // block_length
        first, end = block * block_length, min(block * block_length + block_length, 4)
        at = batch.masked_indices[:, position]
        # Sums of the joint over what is not known at this position.
        patterns = batch.masked_indices[at].clone()
        patterns[:, :first], patterns[:, end:] = False, True
        for pattern in patterns.unique(dim=0):
            rows = at.nonzero()[:, 0][(patterns == pattern).all(1)]
            unknown = [i for i in range(4) if pattern[i] and i != position]
            marginal = joint.sum(unknown, keepdim=True) if unknown else joint
            p = (marginal / marginal.sum(position, keepdim=True)).expand_as(joint)
            nll = -p[tuple(tokens[rows].T)].log()
            total += (nll * batch.loss_weight[rows, block]).sum().item()
    # The weights of few masked positions are large with Bernoulli draws.
    tolerance = 0.02 if draw == "exact" else 0.05
    assert total / num == pytest.approx(entropy, abs=tolerance * entropy)


@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
def test_most_rows(draw):
    masking = config(block_length=8, draw=draw)
    for step in range(30):
        slots = range(4 * step, 4 * step + 4)
        batch = corrupt(clean_batch(masking, 4, 30), masking, seed=1, sample_ids=slots)
        assert len(batch.masked_rows) <= batch.row_capacity <= 120
        parts = [batch[:1], batch[1:]]
        assert all(len(part.masked_rows) <= part.row_capacity for part in parts)
        assert_same(Corrupted.cat(parts), batch)
    if draw == "exact":  # 16 strata: half of the positions, and half of one more for each
        assert batch.row_capacity < 80


def test_parts_of_documents_with_blocks():
    masking = config(block_length=4)
    lengths = torch.tensor([9, 2, 13])
    tokens = clean_batch(masking, 1, 24).flatten()
    how = {"starts": lengths.cumsum(0) - lengths, "lengths": lengths, "max_length": 16}
    batch = corrupt(tokens, masking, seed=1, **how)
    one, two = batch[:1], batch[1:]
    assert one.times.shape == (1, 4) and torch.equal(two.num_masked, batch.num_masked[1:])
    alone = corrupt(
        tokens, masking, seed=1, starts=torch.tensor([0]), lengths=lengths[:1], max_length=16,
        global_batch=3,
    )  # fmt: skip
    assert alone.times.shape == (1, 3)  # blocks of the longest of the batch
    whole = Corrupted.cat([alone, two])
    assert torch.equal(whole.input_ids, batch.input_ids)
    assert torch.equal(whole.num_masked, batch.num_masked)


@pytest.mark.cpp
@pytest.mark.parametrize("views", [1, range(1, 3), "complement", "coupled"])
@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
def test_counts_on_the_host(draw, views, monkeypatch):
    """What spares a GPU a sync."""
    calls = []
    run = corrupt_module.run_corrupt
    monkeypatch.setattr(
        corrupt_module, "run_corrupt", lambda a, *rest: calls.append(a) or run(a, *rest)
    )
    masking = config(block_length=4, draw=draw)
    how = {"seed": 3, "views": views, "backend": "cpp"}
    batch = corrupt(clean_batch(masking, 3, 10), masking, sample_ids=range(6, 9), **how)
    counts = count_on_host(calls[-1], masking, range(6, 9))()
    assert torch.equal(counts, batch.num_masked.sum(1))
    lengths = torch.tensor([7, 2, 11])
    tokens = clean_batch(masking, 1, 20).flatten()
    where = {"starts": lengths.cumsum(0) - lengths, "lengths": lengths, "max_length": 12}
    batch = corrupt(tokens, masking, **where, **how)
    documents = batch.documents
    if views != 1:
        documents = batch[:3].documents
    counts = count_on_host(calls[-1], masking, None, documents)()
    assert torch.equal(counts, batch.num_masked.sum(1))


def test_probabilities_of_positions():
    masking = config(block_length=4, draw="bernoulli")
    batch = corrupt(clean_batch(masking, 2, 10), masking, seed=1)
    for block, at in enumerate((slice(0, 4), slice(4, 8), slice(8, 10))):
        share = 1 - batch.times[:, block, None]
        assert torch.allclose(batch.p_mask[:, at], share.expand_as(batch.p_mask[:, at]), atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    masking = config(block_length=4)
    tokens = clean_batch(masking, 2, 10)
    with pytest.raises(ValueError, match="block_length is 0: it must be in"):
        config(block_length=0)
    with pytest.raises(ValueError, match="max_length.* are for documents"):
        corrupt(tokens, masking, seed=1, max_length=10, backend=backend)
    documents = {"starts": torch.tensor([0, 9]), "lengths": torch.tensor([9, 5]), "seed": 1}
    flat = tokens.flatten()
    with pytest.raises(ValueError, match="a flat batch of documents needs max_length"):
        corrupt(flat, masking, **documents, backend=backend)
    with pytest.raises(ValueError, match="document 0 has 9 positions: max_length is 8"):
        corrupt(flat, masking, **documents, max_length=8, backend=backend)
    with pytest.raises(ValueError, match=r"global_batch is 2000000000 with 3 blocks"):
        corrupt(tokens, masking, seed=1, global_batch=2_000_000_000, backend=backend)
    bad = tokens.clone()
    bad[1, 7] = 59
    with pytest.raises(nar_kernels.InvalidTokenError, match=r"tokens\[1, 7\]"):
        corrupt(bad, masking, seed=1, views=2, backend=backend)
    if backend == "cpp":
        huge = torch.tensor([1, 1 << 62])
        with pytest.raises(ValueError, match="is too large: with 3 blocks a sample"):
            corrupt(tokens, masking, seed=1, sample_ids=huge, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_id_counts_once(backend):
    """Whatever the views."""
    masking = config(block_length=4)
    bad = clean_batch(masking, 2, 10).to(device_of(backend))
    bad[1, 7] = bad[0, 3] = 61
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Corrupted, "raise_if_invalid", lambda *_: None)
        batch = nar_kernels.corrupt(bad, masking, seed=1, views=3, backend=backend)
    assert batch.invalid.tolist() == [2, 3, 61, 0, 0]
