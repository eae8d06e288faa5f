"""What a loop over batches does for the files that it reads."""

from pathlib import Path

import numpy as np
import pytest

from nar_kernels import MaskedLoader, MaskingConfig, TokenDataset
from nar_kernels.data import residency


@pytest.fixture
def loader(tmp_path: Path) -> MaskedLoader:
    np.arange(8000, dtype="uint16").tofile(tmp_path / "a.bin")
    dataset = TokenDataset(tmp_path / "a.bin", 8, num_tokens=8001, mask_id=8000, dtype="uint16")
    return MaskedLoader(dataset, MaskingConfig(8001, 8000), 4)


def test_pages_of_the_next_batch_are_asked_for_while_a_disk_is_read(
    loader: MaskedLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, asked = 0, []
    monkeypatch.setattr(residency, "_disk_reads", lambda: reads)
    monkeypatch.setattr(
        loader._residency, "read_ahead", lambda starts, seq_len: asked.append((loader.step, starts))
    )
    loader._residency._reads = 0
    for step in range(200):
        reads += step in (20, 50)
        next(loader)
    # It is looked at in every eighth batch, and believed for 64 batches after the last read.
    assert [step for step, _ in asked] == [*range(24, 120)]
    for step, starts in asked:
        assert starts.tolist() == (8 * loader.window_indices(step)).tolist()


def test_memory_of_a_file_can_be_asked_for(loader: MaskedLoader) -> None:
    """A hint, which changes nothing that can be seen from here; nor does one outside crash."""
    starts = loader._window_starts(0)
    loader._residency.read_ahead(starts, 8)
    with pytest.raises(IndexError, match="window start .* reaches outside the corpus of 8000"):
        loader._residency.read_ahead(starts + 8000, 8)
