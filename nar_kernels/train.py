"""Training runs from Python: ``train(TrainConfig.for_data("digits"))``."""

from nar_kernels.training.config import TrainConfig
from nar_kernels.training.interrupt import Interrupted
from nar_kernels.training.lock import FolderInUseError
from nar_kernels.training.optim import learning_rate
from nar_kernels.training.step import loss_and_gradient
from nar_kernels.training.train import DivergedError, train

__all__ = [
    "DivergedError",
    "FolderInUseError",
    "Interrupted",
    "TrainConfig",
    "learning_rate",
    "loss_and_gradient",
    "train",
]
