"""Ragged and packed batches: backends agree, and a document is the same wherever it lies."""

import copy
import pickle
import random
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import nar_kernels
from nar_kernels import InvalidTokenError, MaskingConfig
from nar_kernels.data.stream import ArrayInMemory, TokenStream
from nar_kernels.ops.corrupt import corrupt_documents
from nar_kernels.ops.documents import _lay_out_cpp, _lay_out_ref, _LayOutArgs
from tests.helpers.batches import assert_same, corrupt

COMPILED = [
    pytest.param("cpp", marks=pytest.mark.cpp),
    pytest.param("cuda", marks=pytest.mark.cuda),
    pytest.param("triton", marks=pytest.mark.triton),
]
BACKENDS = ["reference", *COMPILED]

NUM_TOKENS, MASK, EOS, PAD = 60, 59, 1, 2


def corpus(num_documents, longest, rng, dtype=torch.uint16):
    """Tokens, and starts and lengths of documents, some of which are empty."""
    lengths = torch.tensor(
        [rng.choice([0, 1, rng.randint(1, longest)]) for _ in range(num_documents)]
    )
    starts = lengths.cumsum(0) - lengths
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    tokens = torch.randint(3, MASK, (max(int(lengths.sum()), 1),), generator=generator)
    return tokens.to(dtype), starts, lengths


def rows_of(lengths, seq_len, rng):
    """``places`` and ``num_rows``: rows filled in order, with gaps here and there."""
    places, row, used = [], 0, 0
    for length in lengths.tolist():
        gap = rng.choice([0, 0, 3]) if used else 0
        if used and used + gap + length > seq_len:
            row, used, gap = row + 1, 0, 0
        places.append(row * seq_len + used + gap)
        used += gap + length
    return {"places": torch.tensor(places), "num_rows": row + 1, "seq_len": seq_len}


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(
    "longest", [5, 127, 300, pytest.param(5000, marks=pytest.mark.slow_interpreted)]
)
def test_equals_reference(longest, backend):
    rng = random.Random(longest)
    for draw in ("exact", "bernoulli"):
        for layout in ("flat", "padded", "rows"):
            masking = MaskingConfig(
                NUM_TOKENS,
                MASK,
                draw=draw,
                no_replace_prob=rng.choice([0, 0.1]),
                random_token_prob=rng.choice([0, 0.1]),
                never_mask_ids=rng.choice([(), (EOS, 7)]),
            )
            n = rng.randint(1, 9)
            tokens, starts, lengths = corpus(
                n, longest, rng, rng.choice([torch.uint8, torch.int64])
            )
            eos_lengths = torch.tensor([rng.randint(0, 4) for _ in range(n)])
            ids = torch.tensor([rng.randrange(1 << 40) for _ in range(n)])
            how = {"starts": starts, "lengths": lengths, "sample_ids": ids, "seed": 7}
            how |= {"eos_lengths": eos_lengths, "eos_id": EOS, "pad_id": PAD}
            how |= {"global_batch": 1000}
            if layout == "padded":
                how["seq_len"] = longest + 4 + rng.randint(0, 3)
            if layout == "rows":
                how |= rows_of(lengths + eos_lengths, longest + 4, rng)
            if rng.random() < 0.5:
                how["loss_mask"] = torch.tensor([rng.random() < 0.7 for _ in range(len(tokens))])
            if rng.random() < 0.5:
                how["prompt_lengths"] = (lengths * rng.random()).long()
            expected = corrupt(tokens, masking, backend="reference", **how)
            got = corrupt(tokens, masking, backend=backend, **how)
            assert_same(got, expected)
            if rng.random() < 0.5:
                rest = {k: v for k, v in how.items() if k != "loss_mask"}
                rest["labels"] = expected.clean_ids.masked_fill(
                    expected.position_ids % 3 == 0, -100
                )
                assert_same(
                    corrupt(tokens, masking, backend=backend, **rest),
                    corrupt(tokens, masking, backend="reference", **rest),
                )


# ---- a document is the same wherever it lies


def by_document(batch):
    """What each document of a batch became, by its id."""
    documents, found = batch.documents, {}
    for i, sample in enumerate(documents.ids_on_host.tolist()):
        begin, length = int(documents.begins[i]), int(documents.lengths[i])
        here = slice(begin, begin + length)
        found[sample] = (
            batch.input_ids.flatten()[here].tolist(),
            batch.labels.flatten()[here].tolist(),
            float(batch.times[i]),
            float(batch.loss_weight[i]),
            int(batch.num_masked[i]),
        )
    return found


def arrangement(num_documents, rng):
    """Documents in batches of any size and order."""
    order = list(range(num_documents))
    rng.shuffle(order)
    while order:
        size = rng.randint(1, len(order))
        yield torch.tensor(order[:size])
        del order[:size]


@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_independent_of_packing_order_batch_and_world_size(backend, draw):
    rng = random.Random(5)
    n, longest = 23, 60
    tokens, starts, lengths = corpus(n, longest, rng)
    masking = MaskingConfig(NUM_TOKENS, MASK, draw=draw, random_token_prob=0.1)
    first_slot = 3 * n  # epoch 3
    whole = corrupt(
        tokens,
        masking,
        seed=9,
        starts=starts,
        lengths=lengths,
        sample_ids=first_slot + torch.arange(n),
        global_batch=n,
        backend=backend,
    )
    expected = by_document(whole)
    assert sorted(expected) == [*range(first_slot, first_slot + n)]
    # Stratified over the documents of the epoch: one time in each stratum.
    strata = (whole.times.double() * n).long()
    assert strata.sort().values.tolist() == list(range(n))
    for turn in range(2 if backend == "triton" else 12):
        layout = ("rows", "flat", "padded")[turn % 3]
        found = {}
        for chosen in arrangement(n, rng):
            how = {"starts": starts[chosen], "lengths": lengths[chosen]}
            if layout == "padded":
                how["seq_len"] = longest + turn
            if layout == "rows":
                how |= rows_of(lengths[chosen], longest + turn, rng)
            batch = corrupt(
                tokens,
                masking,
                seed=9,
                sample_ids=first_slot + chosen,
                global_batch=n,
                backend=backend,
                **how,
            )
            found |= by_document(batch)
        assert found == expected


def test_views_of_a_batch_of_documents():
    """Position ids, document ids and the attention mask are those of a loop over documents."""
    rng = random.Random(2)
    masking = MaskingConfig(NUM_TOKENS, MASK)
    for _ in range(20):
        tokens, starts, lengths = corpus(7, 9, rng)
        how = rng.choice([{}, {"seq_len": 11}, rows_of(lengths, 12, rng)])
        ids = torch.tensor([rng.randrange(1000) for _ in range(7)])
        batch = corrupt(
            tokens, masking, seed=1, starts=starts, lengths=lengths, sample_ids=ids, **how
        )
        positions, documents, real = [], [], []
        begins = batch.cu_seqlens.tolist()
        for i, length in enumerate(lengths.tolist()):
            space = begins[i + 1] - begins[i]
            positions += range(space)
            documents += [int(ids[i])] * length + [-1] * (space - length)
            real += [True] * length + [False] * (space - length)
        assert batch.position_ids.flatten().tolist() == positions
        assert batch.document_ids.flatten().tolist() == documents
        assert batch.attention_mask.flatten().tolist() == real
        assert batch.max_seqlen == max(1, *batch.cu_seqlens.diff().tolist())
        clean = [tokens[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)]
        assert batch.clean_ids[batch.attention_mask].tolist() == sum(clean, [])


@pytest.mark.parametrize("layout", ["flat", "rows"])
def test_parts_of_a_batch_of_documents(layout):
    rng = random.Random(3)
    masking = MaskingConfig(NUM_TOKENS, MASK)
    tokens, starts, lengths = corpus(12, 9, rng)
    how = {} if layout == "flat" else rows_of(lengths, 12, rng)
    batch = corrupt(tokens, masking, seed=1, starts=starts, lengths=lengths, **how)
    parts = list(batch.microbatches(2))
    assert len(parts) == -(-len(batch) // 2) > 2
    joined = type(batch).cat(parts)
    assert_same(joined, batch)
    assert torch.equal(joined.cu_seqlens, batch.cu_seqlens)
    assert by_document(joined) == by_document(batch)
    chosen = [2, 0]
    expected = {}
    for i in chosen:
        expected |= by_document(batch[i : i + 1])
    parts = [batch[index] for index in (chosen, [2 - len(batch), 0], torch.tensor(chosen))]
    mask = torch.zeros(len(batch), dtype=torch.bool)
    mask[chosen] = True
    parts += [batch[mask], batch[[]]]
    for part in parts[:-1]:
        assert by_document(part) == expected
        assert torch.equal(part.masked_rows, part.masked_indices.flatten().nonzero().flatten())
        assert torch.equal(part.lengths, part.documents.lengths)
    assert len(parts[-1]) == 0 and parts[-1].input_ids.numel() == 0


@pytest.mark.parametrize("layout", ["flat", "rows"])
def test_parts_without_a_mask_of_positions(layout):
    """What `masked_nll` needs is enough for gradient accumulation."""
    rng = random.Random(3)
    tokens, starts, lengths = corpus(12, 9, rng)
    how = {"starts": starts, "lengths": lengths, "seed": 1}
    how |= {} if layout == "flat" else rows_of(lengths, 12, rng)
    masking = MaskingConfig(NUM_TOKENS, MASK)
    whole = corrupt(tokens, masking, **how)
    fewer = corrupt(tokens, masking, outputs=("labels", "masked_rows"), **how)
    for some, part in zip(whole.microbatches(2), fewer.microbatches(2), strict=True):
        assert torch.equal(some.masked_rows, part.masked_rows)
        assert torch.equal(some.labels, part.labels) and part.masked_indices is None


def test_batches_of_documents_travel():
    lengths = torch.full((100_000,), 3)
    ids = torch.arange(100_000)
    batch = corrupt(
        T6,
        MaskingConfig(NUM_TOKENS, MASK),
        seed=1,
        starts=torch.tensor([0, 2, 1]),
        lengths=lengths[:3],
        sample_ids=ids[7:10],
    )
    lengths.fill_(1)  # of the user: the batch has its own
    pickled = pickle.dumps(batch)
    assert len(pickled) < 20_000
    for other in (pickle.loads(pickled), copy.deepcopy(batch), batch.to("cpu")):
        assert_same(other, batch)
        assert by_document(other) == by_document(batch)
        assert torch.equal(other.document_ids, batch.document_ids)
    batch.lengths.fill_(1)
    assert batch.lengths.tolist() == batch.documents.lengths.tolist() == [3, 3, 3]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("backend", COMPILED)
def test_only_wanted_outputs(backend, narrow):
    rng = random.Random(6)
    tokens, starts, lengths = corpus(6, 40, rng)
    how = {"starts": starts, "lengths": lengths, "seed": 1, "eos_id": EOS}
    how |= {"eos_lengths": torch.ones_like(lengths), "seq_len": 50}
    how["ids_dtype"] = torch.int32 if narrow else torch.int64
    masking = MaskingConfig(NUM_TOKENS, MASK)
    whole = corrupt(tokens, masking, backend="reference", **how)
    for outputs in ((), ("labels",), ("masked_indices", "masked_rows")):
        got = corrupt(tokens, masking, backend=backend, outputs=outputs, **how)
        assert torch.equal(got.input_ids, whole.input_ids)
        for name in ("labels", "masked_indices"):
            value = getattr(got, name)
            assert (
                value is None if name not in outputs else torch.equal(value, getattr(whole, name))
            )
        if "masked_rows" in outputs:
            assert torch.equal(got.masked_rows, whole.masked_rows)


@pytest.mark.parametrize("backend", COMPILED)
def test_a_loss_mask_in_runs(backend):
    """Beside tokens in one piece, as a file of several parts has it."""
    if backend != "cpp":
        pytest.skip("runs are of the host")
    rng = random.Random(8)
    tokens, starts, lengths = corpus(9, 30, rng)
    flags = torch.tensor([rng.random() < 0.6 for _ in range(len(tokens))], dtype=torch.uint8)
    parts = TokenStream([ArrayInMemory(part) for part in flags.clone().chunk(5)])
    masking = MaskingConfig(NUM_TOKENS, MASK)
    expected = corrupt(tokens, masking, seed=1, starts=starts, lengths=lengths, loss_mask=flags)
    got = corrupt_documents(
        expected.documents, tokens, starts, masking, seed=1, global_batch=9,
        loss_mask_runs=parts.runs, backend=backend,
    )  # fmt: skip
    assert_same(got, expected)


@pytest.mark.triton
def test_rows_of_other_lengths_have_other_kernels(monkeypatch):
    """What a kernel was compiled for, such as how long a tile is, tells it from others."""
    kernels = pytest.importorskip("nar_kernels.ops.kernels.corrupt")
    variants = []

    def note(grid, arguments, variant, options):
        variants.append((variant, tuple(sorted(options().items()))))

    monkeypatch.setattr(kernels, "_launch", note)
    tokens = torch.zeros(20_000, dtype=torch.uint8)
    for length in (50, 60, 100, 3000, 4096, 9000, 12000):
        nar_kernels.corrupt(
            tokens,
            MaskingConfig(NUM_TOKENS, MASK),
            seed=1,
            starts=torch.tensor([0]),
            lengths=torch.tensor([length]),
            backend="triton",
        )
    kernel_of = dict(variants)
    assert all(kernel_of[variant] == options for variant, options in variants)
    assert len(kernel_of) == 4


@pytest.mark.parametrize("layout", ["flat", "rows"])
def test_static_shapes(layout):
    rng = random.Random(9)
    tokens, starts, lengths = corpus(8, 9, rng)
    how = {"starts": starts, "lengths": lengths, "seed": 1}
    how |= {} if layout == "flat" else rows_of(lengths, 12, rng)
    batch = corrupt(tokens, MaskingConfig(NUM_TOKENS, MASK), **how)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*batch.input_ids.shape, 6, generator=generator, dtype=torch.float64)
    head = torch.randn(NUM_TOKENS, 6, generator=generator, dtype=torch.float64)
    weight = torch.rand(batch.input_ids.shape, generator=generator, dtype=torch.float64)
    for reduction in ("nelbo", "token", "mean", "sequence", "answer", "batch"):
        given = {} if reduction == "nelbo" else {"position_weight": weight}
        losses = [
            nar_kernels.masked_nll(
                hidden, head, batch, reduction=reduction, static_shapes=static, **given
            )
            for static in (False, True)
        ]
        assert losses[0] > 0 and abs(losses[0] / losses[1] - 1) < 1e-12


def random_layout(rng):
    """Arguments of `lay_out`, about half of them right."""

    def some(*values):
        return torch.tensor([rng.choice(values) for _ in range(n)], dtype=torch.int64)

    n, seq_len = rng.randint(0, 4), rng.choice([None, 1, 3, 8])
    lengths, places, num_rows = some(0, 1, 2, 3), None, n
    if seq_len is not None and n and rng.random() < 0.7:
        rows = rows_of(lengths, seq_len, rng)
        places, num_rows = rows["places"], rows["num_rows"]
    given = [lengths, rng.choice([None, some(0, 0, 1)]), places, some(0, 7, 1 << 62)]
    if rng.random() < 0.3:
        wrong = rng.choice([x for x in given if x is not None])
        wrong[rng.randrange(n) if n else slice(0)] = rng.choice(
            [-1, 1, 4, 9, (1 << 31) - 1, 1 << 31]
        )
    if rng.random() < 0.2:
        given[3] = range(5, 5 + 2 * n, 2)
    return _LayOutArgs(*given, rng.choice([num_rows] * 9 + [num_rows + 1]), seq_len)


@pytest.mark.cpp
def test_layouts_of_both_backends():
    rng, right = random.Random(11), 0
    for _ in range(4000):
        given = random_layout(rng)
        got = _lay_out_cpp(given)
        try:
            expected = _lay_out_ref(given)
        except ValueError:
            assert got is None, given
            continue
        assert got is not None, given
        assert torch.equal(got.table, expected.table), given
        assert (got.extent, got.shape) == (expected.extent, expected.shape), given
        right += 1
    assert 1000 < right < 3000


# ---- bad input


T6 = torch.arange(3, 9)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lengths": [2, -1]}, ValueError, r"lengths\[1\] is -1: it must be at least 0"),
        ({"lengths": [2]}, ValueError, "2 starts but 1 lengths"),
        ({"lengths": [2.0, 1.0]}, ValueError, "lengths must be int64"),
        ({"lengths": [2, 5]}, IndexError, "length 5 reaches outside the corpus of 6"),
        ({"lengths": [2, 9]}, IndexError, "document 1 has length 9, which reaches outside"),
        ({"starts": None}, ValueError, "starts say where"),
        ({"eos_lengths": [1, 1]}, ValueError, "eos_lengths are given without eos_id"),
        ({"eos_lengths": [1], "eos_id": 1}, ValueError, "2 lengths but 1 eos_lengths"),
        ({"eos_lengths": [1, 1], "eos_id": MASK}, ValueError, "eos_id is 59: .*not mask_id"),
        ({"pad_id": 60}, ValueError, r"pad_id is 60: it must be in \[0, 60\)"),
        ({"places": [0, 2], "num_rows": 1}, ValueError, "give seq_len"),
        ({"places": [0, 2], "seq_len": 4}, ValueError, "places and num_rows go together"),
        ({"num_rows": 2, "seq_len": 4}, ValueError, "places and num_rows go together"),
        ({"places": [0, 4], "seq_len": 4, "num_rows": -1}, ValueError, "num_rows is -1"),
        (
            {"places": [0, 4], "seq_len": 4, "num_rows": 1},
            ValueError,
            "document 1 begins at position 4, behind the last row",
        ),
        ({"lengths": [1 << 40, 1]}, ValueError, r"less than 2\*\*31"),
        ({"lengths": [1 << 62, 1 << 62]}, ValueError, r"less than 2\*\*31"),
        ({"sample_ids": range(5, 3, -1)}, ValueError, "with a step of at least 1"),
        ({"sample_ids": range(0, 1, 1 << 70)}, ValueError, r"must be in \[0, 2\*\*63\)"),
        ({"sample_ids": torch.tensor(0)}, ValueError, "sample_ids must be int64"),
        ({"out": True}, ValueError, "the memory of documents is not reused"),
        (
            {"places": [0, 1], "seq_len": 4, "num_rows": 1},
            ValueError,
            "document 0 has 2 tokens from position 0 on, but the next begins at 1",
        ),
        (
            {"places": [0, 3], "seq_len": 4, "num_rows": 2},
            ValueError,
            "document 1 has 3 tokens from position 3 on, which reaches over the end of its row",
        ),
        (
            {"places": [0, 5], "seq_len": 4, "num_rows": 2},
            ValueError,
            "no document begins at position 4, where row 1 does",
        ),
        ({"seq_len": 2}, ValueError, "places must ascend and leave each its length"),
        ({"sample_ids": [0, -3]}, ValueError, "sample id -3 is negative"),
        ({"prompt_lengths": [3, 0]}, ValueError, r"prompt_lengths\[0\] is 3: .* \[0, 2\]"),
        ({"loss_mask": [1, 0]}, ValueError, r"beside a corpus it must be bool or uint8 \[6\]"),
    ],
)
def test_errors(change, error, message):
    how = {"starts": [0, 3], "lengths": [2, 3]} | change
    how = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in how.items()}
    with pytest.raises(error, match=message):
        corrupt(T6, MaskingConfig(NUM_TOKENS, MASK), seed=1, **how)


@pytest.mark.seconds
def test_documents_of_a_compiled_step():
    """`corrupt` runs between graphs: any number of documents, and slots as a range."""

    def step(tokens, starts, lengths):
        slots = range(7, 7 + len(lengths))
        batch = nar_kernels.corrupt(
            tokens, masking, seed=1, starts=starts, lengths=lengths, sample_ids=slots
        )
        return batch.input_ids * 2, batch.cu_seqlens

    masking, tokens = MaskingConfig(NUM_TOKENS, MASK), torch.arange(50)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager")
    for n in (3, 4, 6):
        of = tokens, torch.arange(n) * 2, torch.arange(n) + 1
        for got, expected in zip(compiled(*of), step(*of), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.seconds
def test_documents_that_are_traced():
    """Their layout is read on the host, so a trace that would keep it is refused."""
    masking, of = MaskingConfig(NUM_TOKENS, MASK), (T6, torch.tensor([0, 3]), torch.tensor([2, 3]))

    def step(tokens, starts, lengths):
        return nar_kernels.corrupt(
            tokens, masking, seed=1, starts=starts, lengths=lengths
        ).input_ids

    for mode in ("real", "fake"):
        with pytest.raises(RuntimeError, match="get value out of a tracing tensor|data-dependent"):
            make_fx(step, tracing_mode=mode)(*of)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException):
        step(*of)
    with FakeTensorMode() as fake, pytest.raises(DataDependentOutputException):
        step(*map(fake.from_tensor, of))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(step, of, check_trace=False)
    assert torch.equal(traced(*of), step(*of))


@pytest.mark.parametrize("name", ["lengths", "sample_ids", "loss_mask", "places"])
def test_lists_are_no_tensors(name):
    how = {"starts": torch.tensor([0, 3]), "lengths": torch.tensor([2, 3]), name: [0, 1]}
    how |= {"seq_len": 4, "num_rows": 2} if name == "places" else {}
    with pytest.raises(TypeError, match=f"{name} is a list"):
        nar_kernels.corrupt(T6, MaskingConfig(NUM_TOKENS, MASK), seed=1, **how)


def test_memory_of_windows_is_not_of_documents():
    masking = MaskingConfig(NUM_TOKENS, MASK)
    how = {"starts": torch.tensor([0, 3]), "lengths": torch.tensor([3, 3])}
    documents = corrupt(T6, masking, seed=1, **how)
    with pytest.raises(ValueError, match="out is a batch of documents"):
        nar_kernels.corrupt(T6.view(2, 3), masking, seed=1, out=documents)


@pytest.mark.parametrize("backend", COMPILED)
def test_documents_longer_than_the_corpus(backend):
    """The kernels of a GPU would read behind its end."""
    how = {"seed": 1, "starts": torch.tensor([0]), "lengths": torch.tensor([1000])}
    with pytest.raises(IndexError, match="document 0 has length 1000, .* corpus of 6 tokens"):
        corrupt(T6, MaskingConfig(NUM_TOKENS, MASK), backend=backend, **how)


def test_options_of_documents_need_their_lengths():
    with pytest.raises(ValueError, match="are for documents: give their lengths, and starts"):
        corrupt(T6, MaskingConfig(NUM_TOKENS, MASK), seed=1, starts=T6[:1], seq_len=2, pad_id=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_mask_weighs_nothing(backend):
    """An empty document, a prompt that fills one, and no documents."""
    masking = MaskingConfig(NUM_TOKENS, MASK)
    how = {"seed": 1, "backend": backend}
    batch = corrupt(
        T6,
        masking,
        starts=torch.tensor([0, 2, 2]),
        lengths=torch.tensor([2, 0, 4]),
        prompt_lengths=torch.tensor([2, 0, 1]),
        **how,
    )
    assert batch.num_maskable.tolist() == [0, 0, 3] and batch.num_masked[:2].tolist() == [0, 0]
    assert batch.loss_weight[:2].tolist() == [0, 0] and batch.loss_weight.isfinite().all()
    zeros = torch.zeros(3, dtype=torch.int64)
    for how_many in ({}, {"seq_len": 4}, {"eos_lengths": torch.tensor([0, 2, 0]), "eos_id": EOS}):
        all_empty = corrupt(T6, masking, starts=zeros, lengths=zeros, **how, **how_many)
        eos = int(how_many.get("eos_lengths", zeros).sum())
        assert int(all_empty.num_maskable.sum()) == int(all_empty.attention_mask.sum()) == eos
    nothing = torch.empty(0, dtype=torch.int64)
    empty = corrupt(T6, masking, starts=nothing, lengths=nothing, **how)
    assert empty.input_ids.shape == (0,) and len(empty) == 0 and empty.masked_rows.numel() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_ids_of_documents_are_named(backend):
    tokens = torch.tensor([3, 99, 4, 5, 59, 6])
    how = {"seed": 1, "backend": backend, "starts": torch.tensor([4, 0])}
    with pytest.raises(InvalidTokenError, match="offset 4 of tokens") as found:
        corrupt(tokens, MaskingConfig(90, 59), lengths=torch.tensor([2, 1]), **how)
    assert found.value.count == 1
    with pytest.raises(InvalidTokenError, match="offset 1 of tokens"):
        corrupt(tokens, MaskingConfig(90, 59), lengths=torch.tensor([2, 3]), **how)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_labels_are_the_ids(dtype):
    ids = torch.randint(0, MASK, (3, 40), generator=torch.Generator().manual_seed(0))
    masking, labels = MaskingConfig(NUM_TOKENS, MASK), ids.to(dtype, copy=True)
    labels[:, :9] = -100
    corrupt(ids, masking, seed=1, labels=labels)
    wrong = labels.clone()
    wrong[1, 20] = (ids[1, 20] + 1) % MASK
    with pytest.raises(ValueError, match=r"labels\[1, 20\] is .* labels must be the ids"):
        corrupt(ids, masking, seed=1, labels=wrong)
    shifted = labels.roll(-1, 1)
    shifted[:, -1] = -100
    with pytest.raises(ValueError, match="they look shifted by one, as those of a causal model"):
        corrupt(ids, masking, seed=1, labels=shifted)
