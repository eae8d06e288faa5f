"""`MaskedLoader`: which windows a batch holds, and that a run goes on where it stopped."""

import copy
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nar_kernels.data import loader as loader_module
from nar_kernels.data.loader import MaskedLoader
from nar_kernels.data.staging import Stager
from nar_kernels.data.stream import ArrayInMemory, TokenStream
from nar_kernels.data.windows.dataset import TokenDataset
from nar_kernels.errors import BackendUnavailableError
from nar_kernels.ops.backends import backends, device_type
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.spec.philox import Stream, permute
from tests.helpers.windows import (
    MASK_ID,
    MASKING,
    V,
    assert_same,
    make_dataset,
    masking_for,
    numbered,
    tensors,
)


def with_loss_mask(dataset: TokenDataset, flags: np.ndarray, num_runs: int = 1) -> TokenDataset:
    dataset = copy.copy(dataset)
    dataset.corpus = copy.copy(dataset.corpus)
    parts = np.array_split(flags.astype(np.uint8), num_runs)
    dataset.corpus.loss_mask = TokenStream([ArrayInMemory(torch.from_numpy(p)) for p in parts])
    return dataset


@pytest.mark.parametrize("num_runs", [1, 7])
def test_only_what_counts_in_the_loss_is_masked(num_runs: int) -> None:
    whole = make_dataset()
    flags = np.random.default_rng(0).random(len(whole.corpus)) < 0.5
    loader = MaskedLoader(with_loss_mask(whole, flags, num_runs), MASKING, 8, seed=3)
    for step in (0, 4, 15):  # the last straddles epochs
        batch = loader.batch(step)
        windows = loader.window_indices(step)
        starts = loader.dataset.starts(windows)
        expected = torch.from_numpy(flags)[starts[:, None] + torch.arange(whole.seq_len)]
        assert torch.equal(batch.num_maskable, expected.sum(1))
        assert (expected | ~batch.masked_indices).all() and batch.masked_indices.any()
        same = corrupt(
            whole.windows(windows),
            MASKING,
            seed=3,
            sample_ids=loader.sample_ids(step),
            loss_mask=expected,
            global_batch=8,
        )
        assert_same(batch, same)
    assert torch.equal(loader.dataset.loss_mask(windows), expected.to(torch.uint8))


@pytest.mark.parametrize("masked", [False, True])
def test_windows_of_random_lengths(masked: bool) -> None:
    """Those that are cut mask as they would of that length; the others are as ever."""
    dataset = make_dataset(np.arange(3000) % 900, seq_len=11)
    if masked:
        dataset = with_loss_mask(dataset, np.arange(3000) % 4 > 0, num_runs=3)
    whole = MaskedLoader(dataset, MASKING, 8, seed=2)
    cut = MaskedLoader(dataset, MASKING, 8, seed=2, random_length_prob=0.4)
    lengths: list[int] = []
    for step in range(20):
        expected, batch = whole.batch(step), cut.batch(step)
        assert batch.input_ids.shape == (8, 11) and batch.documents is not None
        assert torch.equal(batch.times, expected.times)
        real = batch.attention_mask
        assert torch.equal(batch.clean_ids[real], expected.clean_ids[real])
        is_whole = batch.lengths == 11
        assert torch.equal(batch.labels[is_whole], expected.labels[is_whole])
        assert not batch.masked_indices[~real].any()
        lengths += batch.lengths.tolist()
    counts = np.bincount(lengths, minlength=12)
    assert counts[0] == 0 and 0.5 < counts[11] / 160 < 0.75 and (counts[1:11] > 0).all()
    assert_same(cut.batch(19), batch)
    for state in (whole.state_dict(), {**whole.state_dict(), "version": 3}):
        with pytest.raises(ValueError, match="random_length_prob is 0.0 in the state, but 0.4"):
            cut.load_state_dict(state)


def test_a_window_without_answers_weighs_nothing() -> None:
    dataset = make_dataset(np.arange(14))
    flags = np.arange(len(dataset.corpus)) < 2
    batch = MaskedLoader(with_loss_mask(dataset, flags), MASKING, 2, shuffle=False).batch(0)
    assert batch.num_masked[1] == 0 and batch.loss_weight.isfinite().all()
    assert batch.loss_weight[1] == 0


def test_a_state_knows_the_loss_mask() -> None:
    dataset = make_dataset(np.arange(63))
    flags = np.arange(len(dataset.corpus)) % 2
    loaders = [
        MaskedLoader(of, MASKING, 3) for of in (dataset, *(
            with_loss_mask(dataset, some) for some in (flags, 1 - flags)))
    ]  # fmt: skip
    states = [loader.state_dict() for loader in loaders]
    loaders[1].load_state_dict(states[1])
    for i in (0, 2):
        with pytest.raises(ValueError, match="loss_mask_digest"):
            loaders[1].load_state_dict(states[i])


def expected_window(slot: int, num_windows: int, seed: int) -> int:
    epoch, position = divmod(slot, num_windows)
    index = torch.tensor([position])
    order = permute(index, num_windows, seed=seed, stream=Stream.WINDOW_ORDER, round=epoch)
    return int(order.item())


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_windows", [1, 3, 10, 300])
def test_a_batch_holds_the_windows_of_its_slots(num_windows: int, shuffle: bool) -> None:
    dataset = numbered(num_windows)
    for rank in range(2):
        loader = MaskedLoader(
            dataset, masking_for(dataset), 7, seed=5, rank=rank, world_size=2, shuffle=shuffle
        )
        for step in (0, 1, 50):
            slots = [step * 14 + rank * 7 + j for j in range(7)]
            expected = [
                expected_window(g, num_windows, 5) if shuffle else g % num_windows for g in slots
            ]
            batch = loader.batch(step)
            assert loader.sample_ids(step).tolist() == slots
            assert loader.window_indices(step).tolist() == expected
            assert torch.equal(batch.clean_ids, torch.stack(dataset.__getitems__(expected)))
            assert batch.clean_ids[:, 0].tolist() == expected


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("num_windows", "batch_size"), [(24, 4), (10, 3), (5, 4), (1, 3), (300, 9)]
)
def test_every_epoch_visits_every_window_once(
    num_windows: int, batch_size: int, world_size: int
) -> None:
    dataset = numbered(num_windows)
    masking = masking_for(dataset)
    ranks = [
        MaskedLoader(dataset, masking, batch_size, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    num_steps = -(-3 * num_windows // (batch_size * world_size))
    order = [
        int(window)
        for step in range(num_steps)
        for loader in ranks
        for window in loader.batch(step).clean_ids[:, 0]
    ]
    epochs = [order[e * num_windows : (e + 1) * num_windows] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_windows))
    if num_windows >= 10:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_depends_on_the_seed() -> None:
    dataset = numbered(50)
    orders = {
        tuple(MaskedLoader(dataset, masking_for(dataset), 50, seed=seed).window_indices(0).tolist())
        for seed in (0, 1, -1, 1 << 32)
    }
    assert len(orders) == 4


def test_the_order_is_frozen() -> None:
    """A change here breaks every run that is resumed."""
    loader = MaskedLoader(numbered(10), MaskingConfig(11, 10), 12, seed=1)
    assert loader.window_indices(0).tolist() == [2, 1, 7, 4, 3, 5, 9, 6, 0, 8, 6, 2]
    loader = MaskedLoader(numbered(1000), MaskingConfig(1001, 1000), 8, seed=1)
    assert loader.window_indices(1000).tolist() == [288, 660, 197, 146, 48, 930, 59, 526]


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_batches_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    dataset = make_dataset()
    masking = MaskingConfig(V, MASK_ID, no_replace_prob=0.1, random_token_prob=0.1)
    whole = MaskedLoader(dataset, masking, 12, seed=3)
    parts = [
        MaskedLoader(dataset, masking, 12 // world_size, seed=3, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    for step in (0, 10, 11):  # 128 windows: step 10 straddles two epochs
        of_parts = [tensors(loader.batch(step)) for loader in parts]
        for name, value in tensors(whole.batch(step)).items():
            if name not in ("row_buffer", "invalid"):
                assert torch.equal(torch.cat([part[name] for part in of_parts]), value), name


def test_steps_have_masks_of_their_own() -> None:
    dataset = numbered(1, seq_len=64)  # one window, for ever
    loader = MaskedLoader(dataset, masking_for(dataset), 4)
    batches = torch.cat([loader.batch(step).masked_indices for step in range(3)])
    assert len(batches.unique(dim=0)) == 12


def test_iteration() -> None:
    loader = MaskedLoader(make_dataset(), MASKING, 5, seed=2)
    for step, batch in zip(range(4), loader, strict=False):
        assert loader.step == step + 1
        assert_same(batch, loader.batch(step))
    assert loader.step == 4
    assert_same(next(iter(loader)), loader.batch(4))  # another iterator goes on from there
    assert loader.step == 5


def test_resume() -> None:
    def make(**kwargs: Any) -> MaskedLoader:
        return MaskedLoader(make_dataset(), MASKING, **{"batch_size": 6, "seed": 9, **kwargs})

    loader = make()
    for _, _ in zip(range(5), loader, strict=False):
        state = pickle.loads(pickle.dumps(loader.state_dict()))
    rest = [batch for _, batch in zip(range(4), loader, strict=False)]

    resumed = make()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for batch, again in zip(rest, resumed, strict=False):
        assert_same(batch, again)

    halves = [make(batch_size=3, rank=r, world_size=2) for r in range(2)]
    for half in halves:
        half.load_state_dict(state)
    for batch in rest:
        assert torch.equal(torch.cat([next(h).input_ids for h in halves]), batch.input_ids)


def test_state_can_be_saved_by_torch(tmp_path: Path) -> None:
    loader = MaskedLoader(make_dataset(), MASKING, 5)
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    loader.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


OTHER_CORPUS = np.arange(900, dtype="uint16")

OTHER_CORPUS[500] = 0


def test_a_state_is_plain() -> None:
    masking = MaskingConfig(
        V, MASK_ID, schedule=lambda t: 1 - t**3, never_mask_ids=(7, 3, 7), random_token_prob=0.1
    )
    loader = MaskedLoader(make_dataset(), masking, 5, shuffle=np.bool_(True))
    state = loader.state_dict()
    restored = json.loads(json.dumps(state))
    assert restored == state
    assert state["never_mask_ids"] == [3, 7]
    loader.load_state_dict(restored | {"step": 8})
    assert loader.step == 8


@pytest.mark.parametrize(
    ("dataset", "kwargs", "message"),
    [
        (make_dataset(OTHER_CORPUS), {}, "corpus_digest is .* of array here"),
        (make_dataset(), {"seed": 1}, "seed is 0 in the state, but 1 here"),
        (make_dataset(), {"batch_size": 5}, r"batch_size \* world_size is 6 .*, but 5 here"),
        (
            make_dataset(),
            {"rank": 0, "world_size": 2},
            r"batch_size \* world_size is 6 .*, but 12 here",
        ),
        (make_dataset(), {"shuffle": False}, "shuffle is True in the state, but False here"),
        (make_dataset(seq_len=8), {}, "seq_len is 7 in the state, but 8 here"),
        (make_dataset(stride=6), {}, "stride is 7 in the state, but 6 here"),
        (make_dataset().split(3)[0], {}, "num_windows is 128 in the state, but 125 here"),
    ],
)
def test_states_of_another_run(dataset: TokenDataset, kwargs: dict[str, Any], message: str) -> None:
    state = MaskedLoader(make_dataset(), MASKING, 6).state_dict() | {"step": 17}
    loader = MaskedLoader(dataset, MASKING, **{"batch_size": 6, **kwargs})
    with pytest.raises(ValueError, match=f"cannot continue: {message}"):
        loader.load_state_dict(state)
    assert loader.step == 0


def falling(t: Tensor) -> Tensor:
    return 1 - t.clamp(0.25, 0.75)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask_id": 999}, "mask_id is 1000 in the state, but 999 here"),
        ({"num_tokens": 1002}, "num_tokens is 1001 in the state, but 1002 here"),
        ({"schedule": "cosine"}, "schedule_digest is .* of 'cosine' here"),
        ({"schedule": falling}, "schedule_digest is .* of <function falling.* here"),
        ({"schedule": lambda t: 1 - t**1.001}, "schedule_digest is "),
        ({"draw": "bernoulli"}, "draw is exact in the state, but bernoulli here"),
        ({"times": "uniform"}, "times is stratified in the state, but uniform here"),
        ({"never_mask_ids": [3]}, r"never_mask_ids is \[\] in the state, but \[3\] here"),
        ({"no_replace_prob": 0.1}, "no_replace_prob is 0.0 in the state, but 0.1 here"),
        ({"random_token_prob": 0.1}, "random_token_prob is 0.0 in the state, but 0.1 here"),
        ({"corruption_prob": 0.5}, "corruption_prob is 1.0 in the state, but 0.5 here"),
    ],
)
def test_states_of_other_masking(changed: dict[str, Any], message: str) -> None:
    state = MaskedLoader(make_dataset(), MASKING, 6).state_dict() | {"step": 17}
    masking = replace(MASKING, **changed)
    dataset = make_dataset(num_tokens=masking.num_tokens, mask_id=masking.mask_id)
    loader = MaskedLoader(dataset, masking, 6)
    for theirs in (state, json.loads(json.dumps(state))):
        with pytest.raises(ValueError, match=f"cannot continue: {message}"):
            loader.load_state_dict(theirs)
    assert loader.step == 0


def test_the_state_knows_a_schedule_by_its_values() -> None:
    """However it is named, and whatever the last bits of a cosine are on this CPU."""

    def almost(t: Tensor) -> Tensor:
        return torch.cos(t * (torch.pi / 2)) * (1 - 1e-15 * t)

    def digest(schedule: Any) -> str:
        masking = replace(MASKING, schedule=schedule)
        return MaskedLoader(make_dataset(), masking, 6).state_dict()["schedule_digest"]

    assert digest("cosine") == digest(almost)
    assert digest("linear") == digest(lambda t: 1 - t) != digest("cosine")


def test_states_of_earlier_versions() -> None:
    """They say nothing of the masking."""
    loader = MaskedLoader(make_dataset(), MASKING, 6)
    names = "step seed global_batch shuffle corpus_digest seq_len stride phase num_windows"
    state = {name: loader.state_dict()[name] for name in names.split()}
    loader.load_state_dict(state | {"step": 17})
    assert loader.step == 17


def test_states_before_ranges_of_times() -> None:
    """Version 2 says nothing of them: its times were of all of time, its weights those of the
    bound."""
    loader = MaskedLoader(make_dataset(), MASKING, 6)
    state = loader.state_dict() | {"version": 2, "step": 17}
    del state["time_range"], state["weighting"]
    loader.load_state_dict(state)
    assert loader.step == 17
    for options, name in (
        (dict(time_range=(0.2, 1)), "time_range"),
        (dict(weighting="unit"), "weighting"),
    ):
        other = MaskedLoader(make_dataset(), replace(MASKING, **options), 6)
        for earlier in (state, loader.state_dict()):
            with pytest.raises(ValueError, match=f"cannot continue: {name} is"):
                other.load_state_dict(earlier)
        # As the state comes back from a file.
        other.load_state_dict(json.loads(json.dumps(other.state_dict())))


def test_states_of_something_else() -> None:
    loader = MaskedLoader(make_dataset(), MASKING, 6)
    state = loader.state_dict()
    for name in ("step", "seed", "global_batch", "shuffle", "corpus_digest", "num_windows"):
        partial = copy.copy(state)
        del partial[name]
        with pytest.raises(ValueError, match=f"the state has no '{name}'"):
            loader.load_state_dict(partial)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"rank": 2, "world_size": 2}, r"rank is 2: it must be in \[0, world_size\) = \[0, 2\)"),
        ({"rank": -1, "world_size": 1}, "rank is -1"),
        ({"rank": 1}, "rank is 1 and world_size is None: give both, or neither"),
        ({"world_size": 2}, "rank is None and world_size is 2: give both, or neither"),
        ({"rank": 0, "world_size": 0}, r"rank is 0: it must be in \[0, world_size\) = \[0, 0\)"),
        ({"masking": MaskingConfig(V + 1, MASK_ID)}, "masking has num_tokens 1002 but .* 1001"),
        ({"masking": MaskingConfig(V, 0)}, "masking has mask_id 0 but the dataset has 1000"),
        ({"backend": "fastest"}, "unknown backend 'fastest'"),
        ({"corpus_memory": "ram"}, "corpus_memory is 'ram': it must be 'auto', 'device'"),
    ],
)
def test_bad_arguments_of_a_loader(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedLoader(make_dataset(), **{"masking": MASKING, "batch_size": 4, **kwargs})


def test_no_step_is_too_large_unless_its_slots_are() -> None:
    loader = MaskedLoader(make_dataset(), MASKING, 4)
    last = (1 << 61) - 2
    assert loader.sample_ids(last).tolist() == [4 * last + i for i in range(4)]
    loader.batch(last)
    for refuse in (loader.batch, loader.sample_ids, loader.window_indices):
        with pytest.raises(ValueError, match=rf"step is {last + 1}: it .* in \[0, {last + 1}\)"):
            refuse(last + 1)
    with pytest.raises(ValueError, match=f"step is {1 << 70}"):
        loader.load_state_dict(loader.state_dict() | {"step": 1 << 70})


def test_seeds_have_64_bits() -> None:
    with pytest.raises(ValueError, match="seed is 18446744073709551616: it must have 64 bits"):
        MaskedLoader(make_dataset(), MASKING, 4, seed=1 << 64)


def test_negative_step() -> None:
    with pytest.raises(ValueError, match="step is -1: it must be in"):
        MaskedLoader(make_dataset(), MASKING, 4).batch(-1)


def test_backend() -> None:
    reference = MaskedLoader(make_dataset(), MASKING, 4, backend="reference").batch(3)
    for backend in ("auto", "triton", "cuda"):  # those of a GPU where they run on the CPU
        here = backend == "auto" or device_type(backend) == "cpu"
        if here and backends().get(backend, "available") == "available":
            loader = MaskedLoader(make_dataset(), MASKING, 4, backend=backend)
            assert_same(loader.batch(3), reference)
    if backends()["cpp"] != "available":
        with pytest.raises(BackendUnavailableError):
            MaskedLoader(make_dataset(), MASKING, 4, backend="cpp")


def test_a_step_on_a_device() -> None:
    with pytest.raises(ValueError, match="step is a tensor: .* here it is cpu .* pass an int"):
        MaskedLoader(make_dataset(), MASKING, 4).batch(torch.zeros(1, dtype=torch.int64))


def test_another_device() -> None:
    dataset = make_dataset()
    loader = MaskedLoader(dataset, MASKING, 4, classes=[0] * len(dataset))
    loader.device = torch.device("meta")  # the only other one that is everywhere
    batch = loader.batch(0)
    others = "masking", "counts_on_host", "num_strata", "documents", "spans", "views", "num_classes"
    assert {tensor.device.type for name, tensor in vars(batch).items() if name not in others} == {
        "meta"
    }
    assert batch.input_ids.shape == (4, 7)


@pytest.mark.parametrize("device", ["meta", "nonsense", "cpu:x", "cuda:99", "xla", "hpu", None])
def test_devices_where_no_batch_can_go(device: Any) -> None:
    with pytest.raises(ValueError, match=f"device is '{device}', where no batch can go: PyTorch"):
        MaskedLoader(make_dataset(), MASKING, 4, device=device)


def test_the_number_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    check = loader_module.check_device
    assert [check(d).index for d in ("cuda", "cuda:0", torch.device("cuda:1"))] == [1, 0, 1]
    with pytest.raises(ValueError, match="'cuda:2', .* sees 2 CUDA devices"):
        check("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="'cuda', .* sees 0 CUDA devices"):
        check("cuda")


@pytest.mark.parametrize(
    ("num_windows", "batch_size", "world_size", "steps"),
    [(24, 4, 1, 6), (24, 4, 2, 3), (25, 4, 2, 3), (23, 4, 2, 2), (3, 4, 1, 1), (1, 1, 1, 1)],
)
def test_length(num_windows: int, batch_size: int, world_size: int, steps: int) -> None:
    dataset = numbered(num_windows)
    loader = MaskedLoader(dataset, masking_for(dataset), batch_size, rank=0, world_size=world_size)
    assert len(loader) == steps
    for _ in zip(range(steps + 2), loader, strict=False):  # it does not end there
        pass
    assert loader.step == steps + 2


# Copies of a MaskedLoader


def test_a_loader_travels_without_its_data(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", (np.arange(1_000_000) % MASK_ID).astype("uint16"))
    masking = MaskingConfig(V, MASK_ID, schedule="cosine", never_mask_ids=[3], draw="bernoulli")
    loader = MaskedLoader(make_dataset(tmp_path / "a.npy"), masking, 4, seed=3)
    next(loader)
    pickled = pickle.dumps(loader)
    assert len(pickled) < 4000
    arrived = pickle.loads(pickled)
    assert arrived.state_dict() == loader.state_dict()
    assert_same(next(arrived), next(loader))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_loader_has_a_step_of_its_own(
    copied: Callable[[MaskedLoader], MaskedLoader],
) -> None:
    loader = MaskedLoader(make_dataset(), MASKING, 4)
    next(loader)
    other = copied(loader)
    assert other.dataset.corpus is loader.dataset.corpus
    assert other.masking is loader.masking
    assert_same(next(other), loader.batch(1))
    assert (loader.step, other.step) == (1, 2)


def test_what_belongs_to_a_device_stays_here() -> None:
    """Threads, buffers, events: those of a GPU, on the CPU."""
    loader = MaskedLoader(make_dataset(), MASKING, 4)
    loader._stager = Stager(
        loader.dataset.corpus.stream, loader._window_starts, 4, 7, torch.device("cpu")
    )
    loader._stager.prefetch(0)
    loader._deferred_check._pending = torch.Event(), lambda record: None
    for arrived in (pickle.loads(pickle.dumps(loader)), copy.deepcopy(loader)):
        assert arrived._stager is None and arrived._deferred_check._pending is None
        assert_same(arrived.batch(5), MaskedLoader(make_dataset(), MASKING, 4).batch(5))


def test_a_loader_arrives_where_its_device_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    loader = MaskedLoader(make_dataset(), MASKING, 4)
    loader.device = torch.device("cuda:0")
    with pytest.raises(ValueError, match="device is 'cuda:0', where no batch can go"):
        pickle.loads(pickle.dumps(loader))


# Several processes


def as_a_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    loader = MaskedLoader(make_dataset(), MASKING, 4)
    alone = MaskedLoader(make_dataset(), MASKING, 8, rank=0, world_size=1)
    torch.save([loader.batch(2).input_ids, alone.batch(2).input_ids], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or os.name != "posix",
    reason="needs the gloo backend",
)
def test_the_process_group_says_which_rank_this_is(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(as_a_rank, (tmp_path,), 2)
    whole = MaskedLoader(make_dataset(), MASKING, 8).batch(2).input_ids
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.equal(torch.cat([half[0] for half in halves]), whole)
    for half in halves:  # what is given counts
        assert torch.equal(half[1], whole)


def test_torchrun_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    with pytest.warns(UserWarning, match="there is no process group yet.*init_process_group"):
        loader = MaskedLoader(make_dataset(), MASKING, 4)
    assert (loader.rank, loader.world_size) == (0, 1)
    MaskedLoader(make_dataset(), MASKING, 4, rank=0, world_size=1)


# The default device


def test_the_default_device_changes_nothing() -> None:
    dataset = make_dataset()
    expected = MaskedLoader(dataset, MASKING, 4, seed=3).batch(40)
    with torch.device("meta"):
        again = make_dataset()
        again.validate_all()
        train, _ = again.split(5)
        assert train.starts([3]).device.type == "cpu"
        loader = pickle.loads(pickle.dumps(MaskedLoader(again, MASKING, 4, seed=3)))
        loader.load_state_dict(loader.state_dict() | {"step": 40})
        assert loader.sample_ids(40).tolist() == [160, 161, 162, 163]
        stager = Stager(
            loader.dataset.corpus.stream, loader._window_starts, 4, 7, torch.device("cpu")
        )
        assert torch.equal(stager.windows(40).to(torch.int64), expected.clean_ids)


def test_a_loader_writes_what_is_asked_for() -> None:
    options: dict[str, Any] = {"outputs": ("labels", "masked_rows"), "ids_dtype": torch.int32}
    whole = MaskedLoader(make_dataset(), MASKING, 4)
    loader = MaskedLoader(make_dataset(), MASKING, 4, **options)
    second = loader.batch(3)
    assert second.masked_indices is None
    assert second.input_ids.dtype == second.masked_rows.dtype == torch.int32
    for name in ("input_ids", "labels", "masked_rows"):
        assert torch.equal(getattr(second, name).long(), getattr(whole.batch(3), name)), name
