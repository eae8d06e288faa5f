"""The trainer's model: building it, and loading its weights from checkpoints."""

import os
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.extras import import_extra
from nar_kernels.nets.adapter import NetAdapter
from nar_kernels.nets.classes import CLASS
from nar_kernels.ops.backends import multiplies_in
from nar_kernels.options import option_of
from nar_kernels.training import checkpoint, hugging_face, parallel
from nar_kernels.training.config import TrainConfig
from nar_kernels.wrapper import NonAutoregressiveWrapper


def choose_device(device: str) -> torch.device:
    """The device; ``"auto"`` is CUDA if available, else the CPU.

    Raises:
        ValueError: ``device`` is ``"cuda"`` and CUDA is not available.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch sees no CUDA device; use auto or cpu")
    return torch.device(device)


def choose_bf16(precision: str, device: torch.device) -> bool:
    """Whether to use bf16 autocast; ``"auto"`` does where the hardware computes in bf16."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return multiplies_in(torch.bfloat16)


def build_model(
    config: TrainConfig, spec: SequenceSpec, saved_net: dict[str, str] | None = None
) -> NonAutoregressiveWrapper:
    """A bidirectional x-transformers encoder, or the ``net`` of the config, in a
    :class:`NonAutoregressiveWrapper`, on the CPU.

    Args:
        saved_net: of a checkpoint, in place of the files that the config names.
    """
    with torch.device("cpu"):  # whatever the default device
        net: nn.Module
        if config.net is None:
            net = _own_net(config, spec)
        else:
            inner = (
                hugging_face.open_net(str(config.net), spec)
                if saved_net is None
                else hugging_face.rebuilt(saved_net)
            )
            net = hugging_face.adapted(inner, spec, config.block_length)
        return _wrapped(net, config, spec)


def _own_net(config: TrainConfig, spec: SequenceSpec) -> nn.Module:
    x_transformers = import_extra("x_transformers")
    net: Any = x_transformers.TransformerWrapper(
        num_tokens=spec.num_tokens,
        max_seq_len=spec.seq_len,
        emb_dropout=config.dropout,
        embed_num_tokens={} if spec.num_classes is None else {CLASS: spec.num_classes + 1},
        attn_layers=x_transformers.Encoder(
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            attn_dim_head=config.dim // config.heads,
            attn_flash=True,
            shift_tokens=config.shift_tokens,
            rotary_pos_emb=config.rotary,
            rotary_emb_dim=config.dim // config.heads,
            disable_abs_pos_emb=config.block_length is not None,  # of twice as many tokens
            verbose=False,  # no advice to use larger nets
            attn_dropout=config.dropout,
            ff_dropout=config.dropout,
        ),
    )
    if spec.num_classes is not None:  # as DiT (arXiv:2212.09748): at first, tokens count more
        nn.init.normal_(net.embeds[f"{CLASS}_embed"].weight, std=0.02)
    return net


def _wrapped(net: nn.Module, config: TrainConfig, spec: SequenceSpec) -> NonAutoregressiveWrapper:
    model = NonAutoregressiveWrapper(
        net,
        mask_id=spec.mask_id,
        schedule=config.schedule,
        draw=config.draw,  # type: ignore[arg-type]
        no_replace_prob=0.0,
        random_token_prob=0.0,
        use_simple_mdlm_loss_weight=config.loss == "nelbo",
        reduction=config.loss,  # type: ignore[arg-type]
        block_length=config.block_length,
    )
    times = config.time_low, config.time_high
    model.masking = replace(model.masking, time_range=times)
    return model


def blocks(model: NonAutoregressiveWrapper) -> list[list[nn.Module]]:
    """[attention, feed-forward] of each transformer block, in execution order."""
    net: Any = model.net
    layers = [layer for _, layer, _ in net.attn_layers.layers]
    return [layers[i : i + 2] for i in range(0, len(layers), 2)]


def checkpoint_activations(model: NonAutoregressiveWrapper) -> None:
    """Activation checkpointing, in place: attention and feed-forward of each block keep only their
    inputs and are recomputed in the backward pass. x-transformers has no option for that; models
    of transformers do.

    Keys of the state dict do not change.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net: Any = model.net
    if isinstance(net, NetAdapter):
        inner: Any = net.net
        name = "activation_checkpointing_enable"  # from transformers 5 on
        enable = getattr(inner, name, None) or inner.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        return
    for layer in net.attn_layers.layers:
        layer[1] = checkpoint_wrapper(layer[1])


def prepare(
    model: NonAutoregressiveWrapper,
    config: TrainConfig,
    device: torch.device,
    stream: torch.cuda.Stream | None = None,
) -> nn.Module:
    """Prepares ``model`` for training, in place: activation checkpointing, ``torch.compile`` and
    sharding as in ``config``, and the move to ``device``. Returns the module to call in training,
    which synchronises gradients over ranks.

    ``stream``: as in :func:`parallel.replicate`.
    """
    if config.checkpoint_activations:
        checkpoint_activations(model)
    if config.compile:
        # One graph, with breaks where FSDP2 gathers the weights of a block, and in lines of
        # x-transformers that PyTorch 2.7 and earlier cannot trace.
        model.net.compile(mode=config.compile_mode)
    if config.shard:
        parallel.shard(model, blocks(model), device)  # never all of it on one device
        return model
    return parallel.replicate(model.to(device), stream)


# Options that must match to load weights, and fields of SequenceSpec that must, too.
_SAME_NET = ("dim", "depth", "heads", "rotary", "shift_tokens", "block_length")
_SAME_SEQUENCES = ("num_tokens", "seq_len")


def net_options(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The options of a :class:`TrainConfig` that a net must share to start from a checkpoint."""
    state = checkpoint.load(path)
    saved = TrainConfig.continued(state["config"])
    if saved.net is not None:
        raise ValueError(
            f"init is {path}, of a run with --net: run `nar-kernels export` on it, and name the "
            "folder as --net hf:FOLDER"
        )
    options = {name: getattr(saved, name) for name in _SAME_NET}
    return options | {"seq_len": spec_of(state, path).seq_len}


def init_from_checkpoint(
    model: NonAutoregressiveWrapper,
    path: str | os.PathLike[str],
    config: TrainConfig,
    spec: SequenceSpec,
) -> None:
    """Loads the weights of another run's checkpoint, its EMA weights if it has any, into ``model``,
    which was built from ``config`` and ``spec``.

    Raises:
        FileNotFoundError, ValueError: no checkpoint, or one of a different net.
    """
    state = checkpoint.load(path)
    spec_there = spec_of(state, path)
    theirs = TrainConfig.continued(state["config"]).to_dict() | spec_there._asdict()
    ours = config.to_dict() | spec._asdict()
    for name in (*_SAME_SEQUENCES, *_SAME_NET):
        if ours[name] != theirs[name]:
            raise ValueError(
                f"cannot start from {path}: {option_of(name)} is {theirs[name]} there and "
                f"{ours[name]} here; weights fit a net of the same shape only, so give the same "
                "options, and data with the same vocabulary"
            )
    if spec.num_classes != spec_there.num_classes:
        raise ValueError(
            f"cannot start from {path}: its net takes {spec_there.num_classes or 'no'} classes, "
            f"and this one {spec.num_classes or 'none'}: give --labels of as many, or none"
        )
    for name in ("tokenizer", "mask_id"):
        if getattr(spec, name) != getattr(spec_there, name):
            warnings.warn(
                f"the {name} of {path} is another than that of the data: its weights were trained "
                "on ids that mean something else, unless only a chat template differs",
                stacklevel=2,
            )
    _load_weights(model, path, state)


def _load_weights(
    model: NonAutoregressiveWrapper, path: str | os.PathLike[str], state: dict[str, Any]
) -> None:
    """Loads the weights of a checkpoint: the EMA weights if the run kept any."""
    try:
        model.load_state_dict(state.get("ema") or state["model"])
    except RuntimeError as error:  # mismatched keys or shapes, one per line
        raise ValueError(
            f"{path} holds the weights of another net than this version builds from its options: "
            "use the versions of nar-kernels and x-transformers that wrote it"
        ) from error


def spec_of(state: dict[str, Any], path: str | os.PathLike[str]) -> SequenceSpec:
    """The format of the sequences of a checkpoint.

    Raises:
        ValueError: it says none, or what this version does not know.
    """
    try:
        return SequenceSpec(**state["spec"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} describes its sequences by what this version does not know ({error}): use the "
            "version that wrote it"
        ) from error


def load_model(path: str | os.PathLike[str]) -> tuple[NonAutoregressiveWrapper, SequenceSpec]:
    """The trained model of a checkpoint, and the format of its sequences: of :func:`load_run`."""
    model, spec, _ = load_run(path)
    return model, spec


def load_run(
    path: str | os.PathLike[str],
) -> tuple[NonAutoregressiveWrapper, SequenceSpec, TrainConfig]:
    """The trained model of a checkpoint, on the CPU in evaluation mode, the format of its
    sequences, and the options of its run.

    Loads the EMA weights if the run kept any.

    Raises:
        FileNotFoundError, ValueError: no such file, or it is not a checkpoint.
    """
    state = checkpoint.load(path)
    spec, config = spec_of(state, path), TrainConfig.continued(state["config"])
    model = build_model(config, spec, state.get("net"))
    _load_weights(model, path, state)
    return model.eval(), spec, config
