"""Runs of PyTorch Lightning go on with the step that follows the last one, also in mid-epoch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nar_kernels.data.loader import MaskedLoader
from nar_kernels.data.windows.dataset import TokenDataset
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.masking import MaskingConfig

lightning = pytest.importorskip("pytorch_lightning")
# It has advice on workers and the like, and calls what PyTorch has deprecated.
pytestmark = [
    pytest.mark.seconds,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]

V, MASK_ID, BATCH, EPOCH = 20, 19, 4, 5


def make_loader() -> MaskedLoader:
    """Five whole steps an epoch, and a batch that straddles epochs."""
    tokens = np.arange((EPOCH * BATCH + 1) * 8, dtype="uint16") % MASK_ID
    dataset = TokenDataset(tokens, 8, num_tokens=V, mask_id=MASK_ID)
    return MaskedLoader(dataset, MaskingConfig(V, MASK_ID), BATCH, seed=3)


class Model(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, 1)
        self.seen: list[Tensor] = []

    def training_step(self, batch: Corrupted, index: int) -> Tensor:
        self.seen.append(batch.input_ids.clone())
        return self.embedding(batch.input_ids).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(
    folder: Path, checkpoint: Path | None = None, max_steps: int = 4 * EPOCH, **options: Any
) -> list[Tensor]:
    """What a run has seen; it leaves a checkpoint after every step."""
    model = Model()
    keep_all = lightning.callbacks.ModelCheckpoint(
        folder, "{step}", save_top_k=-1, every_n_train_steps=1
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[keep_all],
        max_steps=max_steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, make_loader(), ckpt_path=checkpoint)
    return model.seen


def steps(seen: list[Tensor]) -> list[int]:
    """The steps of the loader that these batches are."""
    loader = make_loader()
    batches = [loader.batch(step).input_ids for step in range(4 * EPOCH + 1)]
    return [
        next(step for step, batch in enumerate(batches) if torch.equal(batch, ids)) for ids in seen
    ]


def test_epochs_follow_each_other(tmp_path: Path) -> None:
    assert steps(fit(tmp_path, max_epochs=3)) == list(range(3 * EPOCH))


@pytest.mark.parametrize("done", [1, 3, EPOCH, EPOCH + 2, 2 * EPOCH])
def test_resume(tmp_path: Path, done: int) -> None:
    fit(tmp_path, max_steps=done)
    resumed = fit(tmp_path, tmp_path / f"step={done}.ckpt", max_epochs=3)
    assert steps(resumed) == list(range(done, 3 * EPOCH))


def test_an_interrupted_run(tmp_path: Path) -> None:
    """As after a kill: the checkpoint is one of a run that had gone on."""
    fit(tmp_path, max_epochs=2)
    resumed = fit(tmp_path, tmp_path / "step=7.ckpt", max_epochs=3)
    assert steps(resumed) == list(range(7, 3 * EPOCH))
