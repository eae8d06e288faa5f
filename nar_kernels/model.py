"""The net of the trainer, and its way into and out of checkpoints."""

from pathlib import Path

import torch

from nar_kernels import checkpoint
from nar_kernels.config import TrainConfig
from nar_kernels.sources import SequenceSpec, import_extra
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
    # PyTorch has no public name for these two.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def build_model(config: TrainConfig, spec: SequenceSpec) -> NonAutoregressiveWrapper:
    """A bidirectional transformer of x-transformers, in the wrapper that trains it."""
    x_transformers = import_extra("x_transformers")
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


def load_model(path: Path) -> tuple[NonAutoregressiveWrapper, SequenceSpec]:
    """The trained model of a checkpoint, on the CPU, and what it makes.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is another kind of file.
    """
    state = checkpoint.load(path)
    spec = SequenceSpec(**state["spec"])
    model = build_model(TrainConfig.continued(state["config"]), spec)
    model.load_state_dict(state["model"])
    return model.eval(), spec
