"""Training runs from Python: ``train(TrainConfig.for_data("digits"))``."""

from nar_kernels.training.config import TrainConfig
from nar_kernels.training.train import DivergedError, train

__all__ = ["DivergedError", "TrainConfig", "train"]
