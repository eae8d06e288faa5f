"""A `MaskedLoader` in the loaders of others: PyTorch's and torchdata's, whose
workers make batches ahead. Masks depend neither on their number nor on how they were started."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from nar_kernels import MaskedLoader, MaskingConfig, Mixture, TokenDataset
from nar_kernels.integrations.torchdata import LoaderBatches
from nar_kernels.ops.corrupted import Corrupted
from tests.helpers.windows import assert_same

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process.*is multi-threaded",
    "ignore::UserWarning:torch",
    "ignore:This DataLoader will",
)

V, MASK_ID = 301, 300
MASKING = MaskingConfig(V, MASK_ID, random_token_prob=0.1)


def make_loader(folder: Path, seed: int = 3) -> MaskedLoader:
    """A mixture of two files: files are mapped again in each worker."""
    ids = (np.arange(4000) * 7 % 300).astype("uint16")
    np.save(folder / "a.npy", ids[:3000])
    np.save(folder / "b.npy", ids[3000:])
    make = {"num_tokens": V, "mask_id": MASK_ID}
    sets = [TokenDataset(folder / name, 16, **make) for name in ("a.npy", "b.npy")]
    return MaskedLoader(Mixture(sets, [2, 1]), MASKING, 6, seed=seed)


@pytest.mark.parametrize(
    ("workers", "method"),
    [
        (0, None),
        (1, "fork"),
        (3, "fork"),
        pytest.param(2, "spawn", marks=pytest.mark.slow),
        pytest.param(2, "forkserver", marks=pytest.mark.slow),
    ],
)
def test_workers_of_a_data_loader(tmp_path: Path, workers: int, method: str | None) -> None:
    loader = make_loader(tmp_path)
    data: Any = DataLoader(
        loader,  # type: ignore[arg-type]
        batch_size=None,
        sampler=range(5, 12),
        num_workers=workers,
        multiprocessing_context=method,
    )
    batches: list[Corrupted] = list(data)
    assert len(batches) == 7
    for step, batch in enumerate(batches, 5):
        assert_same(batch, loader.batch(step))
        batch.raise_if_invalid()
        assert batch.masking == MASKING


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_data_loader_resumes(tmp_path: Path, workers: int) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    loader = make_loader(tmp_path)

    def make() -> Any:
        return torchdata.StatefulDataLoader(
            loader, batch_size=None, sampler=range(20), num_workers=workers
        )

    data = make()
    batches = iter(data)
    for _ in range(7):
        next(batches)
    state = data.state_dict()
    rest = list(batches)
    resumed = make()
    resumed.load_state_dict(state)
    again = list(resumed)
    assert len(rest) == len(again) == 13
    for step, (one, two) in enumerate(zip(rest, again, strict=True), 7):
        assert_same(one, two)
        assert_same(one, loader.batch(step))


@pytest.mark.parametrize(("workers", "done"), [(0, 1), (0, 7), (2, 4)])
def test_a_stateful_data_loader_iterates_over_a_loader(
    tmp_path: Path, workers: int, done: int
) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    loader = make_loader(tmp_path)

    def make(of: MaskedLoader = loader) -> Any:
        batches = copy.copy(of)
        batches.step = 2
        return torchdata.StatefulDataLoader(
            LoaderBatches(batches, 13), batch_size=None, num_workers=workers
        )

    data = make()
    batches = iter(data)
    first = [next(batches) for _ in range(done)]
    state = data.state_dict()
    rest = list(batches)
    resumed = make()
    resumed.load_state_dict(state)
    again = list(resumed)
    assert len(first) + len(rest) == 11 and len(again) == len(rest)
    for step, batch in enumerate([*first, *rest], 2):
        assert_same(batch, loader.batch(step))
    for one, two in zip(rest, again, strict=True):
        assert_same(one, two)
    if workers == 0:
        (tmp_path / "other").mkdir()
        other = make(make_loader(tmp_path / "other", seed=4))
        other.load_state_dict(state)
        with pytest.raises(ValueError, match="seed"):
            next(iter(other))
