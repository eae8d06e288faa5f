"""The net of the trainer, and its way into and out of checkpoints."""

import os
from typing import Any

import torch
from torch import nn

from nar_kernels.data.sources import SequenceSpec
from nar_kernels.extras import import_extra
from nar_kernels.ops.backends import multiplies_in
from nar_kernels.options import option_of
from nar_kernels.training import checkpoint, parallel
from nar_kernels.training.config import TrainConfig
from nar_kernels.wrapper import NonAutoregressiveWrapper


def choose_device(device: str) -> torch.device:
    """``"auto"`` is CUDA where there is one.

    Raises:
        ValueError: CUDA was asked for and is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch sees no CUDA device; use auto or cpu")
    return torch.device(device)


def choose_bf16(precision: str, device: torch.device) -> bool:
    """Whether to run the net in bf16 autocast; ``"auto"`` does where it is faster."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return multiplies_in(torch.bfloat16)


def build_model(config: TrainConfig, spec: SequenceSpec) -> NonAutoregressiveWrapper:
    """A bidirectional transformer of x-transformers, in the wrapper that trains it."""
    x_transformers = import_extra("x_transformers")
    with torch.device("cpu"):  # whatever the default is
        return _build_model(x_transformers, config, spec)


def _build_model(
    x_transformers: Any, config: TrainConfig, spec: SequenceSpec
) -> NonAutoregressiveWrapper:
    net = x_transformers.TransformerWrapper(
        num_tokens=spec.num_tokens,
        max_seq_len=spec.seq_len,
        emb_dropout=config.dropout,
        attn_layers=x_transformers.Encoder(
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            attn_dim_head=config.dim // config.heads,
            attn_flash=True,
            rotary_pos_emb=config.rotary,
            rotary_emb_dim=config.dim // config.heads,
            disable_abs_pos_emb=False,
            verbose=False,  # it advises larger nets
            attn_dropout=config.dropout,
            ff_dropout=config.dropout,
        ),
    )
    return NonAutoregressiveWrapper(
        net,
        mask_id=spec.mask_id,
        schedule=config.schedule,
        draw=config.draw,  # type: ignore[arg-type]
        no_replace_prob=0.0,
        random_token_prob=0.0,
        use_simple_mdlm_loss_weight=config.loss == "nelbo",
    )


def blocks(model: NonAutoregressiveWrapper) -> list[list[nn.Module]]:
    """The attention and the feed-forward of each block, in the order in which they run."""
    net: Any = model.net
    layers = [layer for _, layer, _ in net.attn_layers.layers]
    return [layers[i : i + 2] for i in range(0, len(layers), 2)]


def checkpoint_activations(model: NonAutoregressiveWrapper) -> None:
    """Attention and feed-forward of each block, in place, keep only their inputs for the backward
    pass, and run once more in it. x-transformers has no option for that.

    The keys of the state dict stay as they are.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net: Any = model.net
    for layer in net.attn_layers.layers:
        layer[1] = checkpoint_wrapper(layer[1])


def prepare(
    model: NonAutoregressiveWrapper, config: TrainConfig, device: torch.device
) -> nn.Module:
    """Moves ``model``, in place, to the device that trains it, with its recomputation, compilation
    and sharding as ``config`` says; returns what to call so that ranks share gradients."""
    if config.checkpoint_activations:
        checkpoint_activations(model)
    if config.compile:
        # As one graph, but for what breaks it: FSDP2 gathering the weights of a block, and lines of
        # x-transformers that PyTorch 2.7 and earlier cannot trace.
        model.net.compile()
    if config.shard:
        parallel.shard(model, blocks(model), device)  # no device holds all of it
        return model
    return parallel.replicate(model.to(device))


# What the weights of a net must have in common with it; beside them, what a sequence is.
_SAME_NET = ("dim", "depth", "heads", "rotary")
_SAME_SEQUENCES = ("num_tokens", "seq_len")


def start_from(
    model: NonAutoregressiveWrapper,
    path: str | os.PathLike[str],
    config: TrainConfig,
    spec: SequenceSpec,
) -> None:
    """Gives ``model``, which is of ``config`` and ``spec``, the weights of another run's
    checkpoint: the averages, if it kept some.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is of another net.
    """
    state = checkpoint.load(path)
    theirs = TrainConfig.continued(state["config"]).to_dict() | state["spec"]
    ours = config.to_dict() | spec._asdict()
    for name in (*_SAME_SEQUENCES, *_SAME_NET):
        if ours[name] != theirs[name]:
            raise ValueError(
                f"cannot start from {path}: {option_of(name)} is {theirs[name]} there and "
                f"{ours[name]} here; weights fit a net of the same shape only, so give the same "
                "options, and data with the same vocabulary"
            )
    _take_weights(model, path, state)


def _take_weights(
    model: NonAutoregressiveWrapper, path: str | os.PathLike[str], state: dict[str, Any]
) -> None:
    """Those of a checkpoint: the averages, if the run kept any."""
    try:
        model.load_state_dict(state.get("ema") or state["model"])
    except RuntimeError as error:  # keys or shapes, one a line
        raise ValueError(
            f"{path} holds the weights of another net than this version builds from its options: "
            "use the versions of nar-kernels and x-transformers that wrote it"
        ) from error


def load_model(
    path: str | os.PathLike[str],
) -> tuple[NonAutoregressiveWrapper, SequenceSpec]:
    """The trained model of a checkpoint, on the CPU, and what it makes.

    Its weights are the averages, if the run kept any.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is another kind of file.
    """
    state = checkpoint.load(path)
    spec = SequenceSpec(**state["spec"])
    model = build_model(TrainConfig.continued(state["config"]), spec)
    _take_weights(model, path, state)
    return model.eval(), spec
