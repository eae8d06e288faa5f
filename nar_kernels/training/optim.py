"""The optimiser: AdamW, its learning rate schedule, and the batch size of a rank."""

import math
from typing import Any

import torch
from torch import Tensor, nn

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


def adamw(model: nn.Module, config: TrainConfig, rate: Tensor | None = None) -> torch.optim.AdamW:
    """Fused AdamW, with weight decay on matrices and embeddings, but not on biases and norms.

    Args:
        rate: the learning rate, for an optimiser that a CUDA graph captures: one element on the
            device. Default: a number, to be set in the parameter groups.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.lr if rate is None else rate,
        betas=(0.9, config.beta2),
        fused=True,
        capturable=rate is not None,
    )


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state dict, the same with and without a CUDA graph."""
    state = optimizer.state_dict()
    groups = [{**g, "lr": float(g["lr"]), "capturable": False} for g in state["param_groups"]]
    return {**state, "param_groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads :func:`optimizer_state`; where the learning rate is remains as it was."""
    kept = [{name: g[name] for name in ("lr", "capturable")} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, ours in zip(optimizer.param_groups, kept, strict=True):
        group.update(ours)
