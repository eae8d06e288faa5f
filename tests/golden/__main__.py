"""Writes the outputs anew."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from nar_kernels.train import train
from nar_kernels.training.config import TrainConfig
from tests.golden import (
    CHECKPOINT,
    NUMBERS,
    OUTPUTS,
    continued_bits,
    losses,
    outputs,
    train_options,
)

np.savez_compressed(OUTPUTS, **{name: x.numpy() for name, x in outputs().items()})
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)  # the checkpoint says where it was written
    run = Path("run")
    train(TrainConfig.for_data(**train_options(), out=run))
    shutil.copy(run / "last.pt", CHECKPOINT)
    numbers = {"losses": losses(), "continued_bits": continued_bits(run)}
NUMBERS.write_text(json.dumps(numbers, indent=2) + "\n")
