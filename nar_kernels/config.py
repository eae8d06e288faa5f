"""The options of a training run, and how they differ by data set."""

import math
import os
import shlex
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any, get_args

import numpy as np

from nar_kernels.checks import as_float, as_int
from nar_kernels.schedules import SCHEDULES


def _option(default: Any, help: str, **more: Any) -> Any:
    """A field for TrainConfig and the command line.

    ``otherwise`` says what None stands for; the rest of ``more`` is for argparse.
    """
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class TrainConfig:
    """Every option of ``nar-kernels train``; ``for_data`` gives the defaults of a data set.

    Each field carries its description, with units, as ``metadata["help"]``; the command line is
    made from it. Numbers of numpy and paths of any kind are welcome; the fields hold plain ones.

    Raises:
        TypeError: a value is not of the field's type.
        ValueError: a value is out of range.
    """

    data: str | os.PathLike[str] = _option(
        MISSING,
        "digits, text, or a file: .npy and .bin hold token ids, others bytes. To resume, a file "
        "that has moved: what it holds must be the same",
        type=str,
    )
    out: str | os.PathLike[str] | None = _option(
        None, "folder of the run", type=str, otherwise="runs/ and the name of the data"
    )
    init: str | os.PathLike[str] | None = _option(
        None,
        "checkpoint of a run with the same net, vocabulary and seq-len: a new run starts from its "
        "weights, or their averages if it kept some",
        type=str,
    )

    dtype: str | None = _option(None, "type of the ids in a raw file, such as uint16", type=str)
    num_tokens: int | None = _option(
        None,
        "for token ids: the vocabulary of the data plus one for the mask token, which gets the "
        "last id (GPT-2: 50258)",
        type=int,
    )
    seq_len: int | None = _option(None, "tokens of a window", type=int, otherwise="256, digits 64")
    stride: int | None = _option(
        None,
        "tokens from one training window to the next; divides seq-len",
        type=int,
        otherwise="seq-len",
    )
    held_out: int | None = _option(
        None,
        "windows held out for evaluation, at the end of the data",
        type=int,
        otherwise="a tenth, at most 256, digits 180",
    )

    dim: int = _option(128, "width of the net")
    depth: int = _option(4, "blocks of attention and feed-forward")
    heads: int = _option(4, "attention heads; divides dim")
    dropout: float = _option(0.0, "probability of dropping an activation")
    rotary: bool = _option(True, "rotary position embeddings, beside the learnt absolute ones")

    schedule: str = _option("linear", "mask ratio over time", choices=tuple(SCHEDULES))
    draw: str = _option(
        "exact", "masks of an exact count or by coins", choices=("exact", "bernoulli")
    )
    loss: str = _option(
        "mean",
        "what is minimised: the mean over masked tokens, which has less variance, or nelbo, the "
        "likelihood bound that evaluation reports",
        choices=("mean", "nelbo"),
    )

    steps: int = _option(
        2000,
        "optimiser steps, over which the learning rate falls to zero. To resume, another number "
        "than before: from there on it is the rate of a run of so many steps",
    )
    batch_size: int = _option(32, "windows of one optimiser step, on all processes together")
    accumulate: int = _option(
        1, "parts that a batch (of each process) is split into, to save memory"
    )
    lr: float = _option(1e-3, "peak learning rate of AdamW")
    warmup: int = _option(100, "steps of linear warm-up, before cosine decay to zero")
    weight_decay: float = _option(0.1, "of matrices")
    beta2: float = _option(0.99, "AdamW's decay of squared gradients")
    clip: float = _option(1.0, "largest norm of the gradient")
    ema: float = _option(
        0.0,
        "decay of a moving average of the weights, such as 0.999, which evaluation and generate "
        "then use; 0 is off",
    )

    eval_every: int = _option(200, "steps from one evaluation to the next")
    eval_draws: int = _option(8, "masks of each held-out window")
    save_every: int = _option(200, "steps from one checkpoint to the next")

    seed: int = _option(0, "of weights, order of windows, masks, dropout")
    device: str = _option("auto", "where to train", choices=("auto", "cpu", "cuda"))
    threads: int | None = _option(
        None,
        "CPU threads of each process; few are best for a small net, and on a machine with other "
        "work to do",
        type=int,
        otherwise="PyTorch's choice",
    )
    precision: str = _option(
        "auto",
        "bf16 is autocast; auto takes it where the hardware multiplies in it",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool = _option(False, "compile the net with torch.compile, which takes a minute")
    checkpoint_activations: bool = _option(
        False, "save memory: compute the inside of each block again for its gradient"
    )
    shard: bool = _option(
        False,
        "divide weights, gradients and AdamW's state over the processes of torchrun (FSDP2), and "
        "checkpoints: each process keeps its part in a folder beside them, and any number of "
        "processes resumes",
    )
    resume: bool = _option(False, "continue the run in the folder; its options are the defaults")
    overwrite: bool = _option(False, "start again where the folder holds a run")
    quiet: bool = _option(False, "print nothing but errors")

    @classmethod
    def for_data(cls, data: str | os.PathLike[str], **options: Any) -> "TrainConfig":
        """The defaults for ``data``, with some options changed."""
        return cls(**{"data": data, **PRESETS.get(str(data), {}), **options})

    @classmethod
    def continued(cls, saved: dict[str, Any], **options: Any) -> "TrainConfig":
        """The options of a checkpoint, with some changed, to resume it.

        Raises:
            ValueError: the checkpoint is of another version of this class.
        """
        unknown = sorted(set(saved) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                "the checkpoint has options that this version does not know: "
                f"{', '.join(unknown)}; use the version that wrote it"
            )
        once = {"resume": False, "overwrite": False, "quiet": False}
        return cls(**{**saved, **once, **options})

    def __post_init__(self) -> None:
        for f in fields(self):
            value = _plain(f, getattr(self, f.name))
            object.__setattr__(self, f.name, value)
            choices = f.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(f"{f.name} is {value!r}: it must be one of {', '.join(choices)}")
            if f.name in _AT_LEAST_ONE and value is not None and value < 1:
                raise ValueError(f"{f.name} is {value}: it must be at least 1")
            if value == "":
                raise ValueError(f"{option_of(f.name)} is empty: leave it out, or say what it is")
            if f.name == "threads" and value is not None and value > _MOST_THREADS:
                raise ValueError(f"threads is {value}: it must be at most {_MOST_THREADS}")
            if f.name != "seed" and isinstance(value, int) and value >= 1 << 31:
                raise ValueError(f"{f.name} is {value}: it must be below 2**31")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be positive and finite")
        for name in ("dropout", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be in [0, 1)")
        for name in ("weight_decay", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0")
        if self.num_tokens is not None and self.num_tokens < 2:
            raise ValueError(f"num_tokens is {self.num_tokens}: it must be in [2, 2**31)")
        check_seed(self.seed)
        if self.dim % self.heads:
            raise ValueError(f"heads is {self.heads}: it must divide dim, which is {self.dim}")
        if self.rotary and self.dim // self.heads % 2:
            raise ValueError(
                f"dim / heads is {self.dim // self.heads}: rotary embeddings need an even width of "
                "a head; change them, or use --no-rotary"
            )
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate is {self.accumulate}, but a batch has only {self.batch_size} windows"
            )
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other")

    @property
    def folder(self) -> Path:
        """Where the run is written: ``out``, or a folder in ``runs`` with the name of the data."""
        return Path(self.out) if self.out is not None else Path("runs") / Path(self.data).stem

    @property
    def how_to_resume(self) -> str:
        return f"nar-kernels train --resume --out {shlex.quote(str(self.folder))}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return asdict(self)

    def refuse_to_continue(self, saved: dict[str, Any], done: int) -> None:
        """Raises ValueError unless a run with the ``saved`` options can go on with these after
        ``done`` steps."""
        for f in fields(self):
            ours = getattr(self, f.name)
            theirs = saved.get(f.name, f.default)  # older versions had fewer options
            if f.name not in FREE_ON_RESUME and theirs != ours:
                raise ValueError(
                    f"cannot resume {self.folder}: {option_of(f.name)} was {theirs} and is {ours} "
                    "now; leave it out, or start another run with another --out"
                )
        if self.steps < done:
            raise ValueError(
                f"cannot resume {self.folder}: --steps was {saved['steps']} and is {self.steps} "
                f"now, but {done} are done; give at least as many, or leave it out"
            )


def option_of(name: str) -> str:
    """The option of the command line for a field of TrainConfig."""
    return "--" + name.replace("_", "-")


def check_seed(seed: int) -> None:
    """Raises ValueError unless ``seed`` has 64 bits, with or without a sign."""
    if not -1 << 63 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}: it must have 64 bits, in [-2**63, 2**64)")


def _plain(f: Field[Any], value: Any) -> Any:
    """``value`` as a plain one of the field's type.

    Raises:
        TypeError: it is of another type.
    """
    types = get_args(f.type) or (f.type,)
    if value is None and type(None) in types:
        return None
    if bool in types and isinstance(value, bool | np.bool_):
        return bool(value)
    if int in types and not isinstance(value, bool | np.bool_):
        return as_int(f.name, value)
    if float in types and isinstance(value, Real) and not isinstance(value, bool):
        return as_float(f.name, value)
    if os.PathLike[str] in types and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if str in types and isinstance(value, str):
        return str(value)
    names = [getattr(t, "__name__", str(t)) for t in types if t is not type(None)]
    raise TypeError(f"{f.name} is {value!r}: it must be of type {' or '.join(names)}")


_MOST_THREADS = 1024  # PyTorch crashes where the system does not give it as many

_AT_LEAST_ONE = (
    *("seq_len", "stride", "held_out", "dim", "depth", "heads", "steps", "batch_size"),
    *("accumulate", "eval_every", "eval_draws", "save_every", "threads"),
)

# Options that do not change what is learnt, but for rounding and the noise of dropout; and the
# number of steps, which changes the learning rate of those to come. Data may lie elsewhere, in
# another container: that it is the same is for its digest to say.
FREE_ON_RESUME = frozenset(
    (
        *("data", "dtype", "out", "steps"),
        *("device", "threads", "accumulate", "eval_every", "save_every"),
        *("compile", "checkpoint_activations", "shard", "resume", "overwrite", "quiet"),
    )
)

PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        **{"dim": 96, "rotary": False, "lr": 6e-3, "steps": 1000, "warmup": 50},
        **{"eval_every": 100, "eval_draws": 4, "threads": 1, "precision": "fp32"},
    },
    "text": {
        **{"stride": 32, "batch_size": 16, "lr": 2e-3, "steps": 1500},
        **{"eval_every": 250, "eval_draws": 4},
    },
}
