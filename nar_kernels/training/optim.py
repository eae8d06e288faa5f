"""The optimiser: AdamW, its learning rate schedule, and the batch size of a rank."""

import math

import torch
from torch import nn

from nar_kernels import distributed
from nar_kernels.training.config import TrainConfig


def local_batch_size(config: TrainConfig) -> int:
    """Windows per step on this rank.

    Raises:
        ValueError: ``batch_size`` is not divisible by the number of ranks, or ``accumulate`` is
            larger than the result.
    """
    ranks = distributed.world_size()
    if config.batch_size % ranks:
        raise ValueError(
            f"batch_size is {config.batch_size}, of all {ranks} processes together: it must be a "
            f"multiple of {ranks}"
        )
    batch_size = config.batch_size // ranks
    if config.accumulate > batch_size:
        raise ValueError(
            f"accumulate is {config.accumulate}, but a batch has only {batch_size} windows for "
            f"each of {ranks} processes"
        )
    return batch_size


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine decay, which reaches zero after the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW, with weight decay on matrices and embeddings, but not on biases and norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)
