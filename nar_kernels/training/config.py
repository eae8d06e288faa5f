"""Training options, and presets for the built-in data sets."""

import glob
import math
import os
import shlex
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nar_kernels.checks import check_seed
from nar_kernels.data.sources import is_all_answers, is_all_prepared_text
from nar_kernels.ops.views import check_views
from nar_kernels.options import coerce_fields, option, option_of
from nar_kernels.spec.schedules import SCHEDULES


@dataclass(frozen=True)
class TrainConfig:
    """Training options: every option of ``nar-kernels train``. :meth:`for_data` gives the defaults
    of a data set.

    Each field's description, with units, is in ``metadata["help"]``, from which the command line
    is generated. NumPy scalars and path-like objects are converted to plain Python values.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range.
    """

    data: str | os.PathLike[str] = option(
        MISSING,
        "digits, text, a folder that `nar-kernels prepare` wrote, or files of token ids in any "
        "format of docs/data.md; other files are bytes. With --resume, the new path of data that "
        "has moved; its contents must be the same",
        type=str,
    )
    out: str | os.PathLike[str] | None = option(
        None, "output folder of the run", type=str, otherwise="runs/ and the name of the data"
    )
    init: str | os.PathLike[str] | None = option(
        None,
        "start a new run from the weights of this checkpoint (EMA weights if it has any), of a run "
        "with the same net, vocabulary and seq-len",
        type=str,
    )

    net: str | os.PathLike[str] | None = option(
        None,
        "a model of transformers, of the vocabulary of the data: hf: and a folder with its "
        "config.json, whose weights are taken if it has any, or such a file. Decoders are trained "
        "to look both ways",
        type=str,
        otherwise="an encoder of x-transformers, of dim, depth and the options that follow them",
    )
    tokenizer: str | os.PathLike[str] | None = option(
        None,
        "for token ids that do not say it: the tokenizer that made them, a folder or a "
        "tokenizer.json",
        type=str,
    )

    dtype: str | None = option(None, "dtype of the ids in a raw file, such as uint16", type=str)
    column: str | None = option(
        None, "of a table (Arrow, Parquet, MDS), the column with the ids", type=str
    )
    eos_id: int | None = option(
        None, "the id that ends each document, for data that does not say where they end", type=int
    )
    num_tokens: int | None = option(
        None,
        "for token ids: vocabulary size including the mask token, which gets the last id (GPT-2: "
        "50258)",
        type=int,
        otherwise="what the data says, or two more than its greatest id",
    )
    seq_len: int | None = option(
        None, "tokens per window or row (context length)", type=int, otherwise="256, digits 64"
    )
    stride: int | None = option(
        None,
        "tokens between the starts of training windows; divides seq-len",
        type=int,
        otherwise="seq-len",
    )
    within_documents: bool = option(False, "no window reaches beyond a document")
    pack: bool = option(
        False,
        "train on whole documents, packed into rows of at most seq-len tokens, in which each "
        "attends to itself alone (shift-tokens still looks at neighbours across documents)",
    )
    overlong: str = option(
        "split",
        "with pack, what becomes of documents longer than a row: pieces of seq-len tokens, of "
        "which only the first has the prompt; cut off; or an error",
        choices=("split", "truncate", "refuse"),
    )
    shift_epochs: bool = option(
        False, "the windows of each epoch begin up to a stride later than those of the last"
    )
    held_out: int | None = option(
        None,
        "windows (with pack: documents) held out for evaluation, at the end of the data",
        type=int,
        otherwise="a tenth, at most 256, digits 180",
    )

    labels: str | os.PathLike[str] | None = option(
        None,
        "class-conditional training: a .npy file of integers, the class of each window, or data: "
        "those that the data hold (digits, or images prepared with --labels). `nar-kernels "
        "generate --class` then takes a class",
        type=str,
    )
    class_dropout: float = option(
        0.1,
        "with labels, the share of windows whose class the net is not told, for classifier-free "
        "guidance (`nar-kernels generate --guidance-scale`)",
    )

    dim: int = option(128, "model width (hidden size)")
    depth: int = option(4, "transformer blocks (attention and feed-forward)")
    heads: int = option(4, "attention heads; divides dim")
    dropout: float = option(0.0, "dropout probability")
    rotary: bool = option(
        True, "rotary position embeddings (RoPE), beside learned absolute embeddings"
    )

    shift_tokens: int = option(
        0,
        "how many neighbours on each side a block sees without attention: parts of the width are "
        "those of the tokens beside. 1 learns text several times as fast",
    )

    schedule: str = option(
        "linear", "mask schedule: mask ratio over time", choices=tuple(SCHEDULES)
    )
    draw: str = option(
        "exact",
        "masks with an exact count, or an independent coin per token",
        choices=("exact", "bernoulli"),
    )
    block_length: int | None = option(
        None,
        "block diffusion (BD3LM): tokens of a block, each denoised given the clean blocks before "
        "it. A step takes twice the tokens through the net. Needs rotary, and no shift-tokens",
        type=int,
        otherwise="every token attends to all others",
    )
    views: int | str = option(
        1,
        "masks of each window or document in a step, all of which go through the net: a number; "
        "complement: a mask and the rest, so that each token is predicted once (Fast-dLLM v2); "
        "coupled: those two, and everything masked (DiffuCoder), whose weights give no bound",
        type=str,
    )
    loss: str = option(
        "mean",
        "training objective: mean over masked tokens, which has less variance; nelbo, the "
        "likelihood bound that evaluation reports; or that bound of each row (sequence) or each "
        "document (answer, as LLaDA) by its own number of tokens, so that all count the same",
        choices=("mean", "nelbo", "sequence", "answer"),
    )
    time_low: float = option(
        0.0,
        "times are drawn from here on: 0 masks everything, 1 nothing (with the linear schedule)",
    )
    time_high: float = option(1.0, "up to here")

    steps: int = option(
        2000,
        "optimiser steps, over which the learning rate decays to zero. May change with --resume; "
        "the rate from there on is that of a run with the new number",
    )
    batch_size: int = option(32, "global batch size: windows or rows per step over all processes")
    accumulate: int = option(
        1, "gradient accumulation: microbatches per step and process, to save memory"
    )
    lr: float = option(1e-3, "peak learning rate of AdamW")
    warmup: int = option(100, "steps of linear warm-up, before cosine decay to zero")
    weight_decay: float = option(0.1, "AdamW weight decay of matrices and embeddings")
    beta2: float = option(0.99, "AdamW beta2")
    clip: float = option(1.0, "gradient clipping: maximum norm")
    ema: float = option(
        0.0,
        "decay of an exponential moving average (EMA) of the weights, such as 0.999, which "
        "evaluation and generate then use; 0 is off",
    )

    eval_every: int = option(200, "steps between evaluations")
    eval_draws: int = option(8, "masks per held-out window or document")
    save_every: int = option(200, "steps between checkpoints")

    seed: int = option(0, "random seed of weights, window order, masks and dropout")
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"))
    threads: int | None = option(
        None,
        "CPU threads per process; few are best for a small net or on a busy machine",
        type=int,
        otherwise="PyTorch's choice",
    )
    precision: str = option(
        "auto",
        "bf16 is autocast; auto uses it where the hardware multiplies in bf16",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool = option(False, "compile the net with torch.compile, which takes a minute")
    compile_mode: str = option(
        "default",
        "of --compile: reduce-overhead, on a GPU, also captures the net, without the rest of the "
        "step, in CUDA graphs",
        choices=("default", "reduce-overhead"),
    )
    cuda_graph: bool = option(
        False,
        "on a GPU, capture a step, from its windows to AdamW, in one CUDA graph, which the host "
        "launches at once: for nets whose kernels run no longer than it takes to launch them",
    )
    checkpoint_activations: bool = option(
        False, "activation checkpointing: recompute each block in the backward pass, to save memory"
    )
    shard: bool = option(
        False,
        "shard weights, gradients and optimiser state over the processes of torchrun (FSDP2). "
        "Checkpoints are sharded, too: each process writes its shard to a folder beside them, and "
        "any number of processes can resume",
    )
    # Of one call, so never defaults of another.
    resume: bool = option(
        False, "continue the run in --out; its options are the defaults", action="store_true"
    )
    overwrite: bool = option(False, "start over if --out holds a run", action="store_true")
    quiet: bool = option(False, "print nothing but errors", action="store_true")

    @classmethod
    def for_data(cls, data: str | os.PathLike[str], **options: Any) -> "TrainConfig":
        """The preset of ``data``, with ``options`` overridden."""
        preset = dict(_preset_of(data))
        seq_len = options.get("seq_len")
        if isinstance(seq_len, int) and "stride" in preset and seq_len % preset["stride"]:
            del preset["stride"]  # which must divide it
        if options.get("pack") or options.get("labels"):
            preset.pop("stride", None)
        elif any(options.get(name) for name in _NOT_PACKED):
            preset.pop("pack", None)
        if options.get("net") is not None:
            preset = {name: value for name, value in preset.items() if name not in _OF_OWN_NET}
        return cls(**{"data": data, **preset, **options})

    @classmethod
    def continued(cls, saved: dict[str, Any], **options: Any) -> "TrainConfig":
        """The options ``saved`` in a checkpoint, with ``options`` overridden, to resume it.

        Raises:
            ValueError: ``saved`` has options that this version does not know.
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
        coerce_fields(self)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in _AT_LEAST_ONE and value is not None and value < 1:
                raise ValueError(f"{f.name} is {value}: it must be at least 1")
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
        for name in ("weight_decay", "warmup", "shift_tokens"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0")
        if self.num_tokens is not None and self.num_tokens < 2:
            raise ValueError(f"num_tokens is {self.num_tokens}: it must be in [2, 2**31)")
        check_seed(self.seed)
        if self.dim % self.heads:
            raise ValueError(f"heads is {self.heads}: it must divide dim, which is {self.dim}")
        if 2 * self.shift_tokens >= self.dim:
            raise ValueError(
                f"shift_tokens is {self.shift_tokens}: it must be below half of dim, which is "
                f"{self.dim}, a part of which goes to each neighbour"
            )
        if self.rotary and self.dim // self.heads % 2:
            raise ValueError(
                f"dim / heads is {self.dim // self.heads}: rotary embeddings need an even width of "
                "a head; change them, or use --no-rotary"
            )
        if self.block_length is not None and not (self.rotary and self.shift_tokens == 0):
            why = "--rotary, since noisy and clean tokens have the same positions"
            if self.rotary:
                why = "--shift-tokens 0, since clean tokens would show what is to be predicted"
            raise ValueError(f"block_length is {self.block_length}: it needs {why}")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate is {self.accumulate}, but a batch has only {self.batch_size} sequences"
            )
        if not 0 <= self.time_low < self.time_high <= 1:
            raise ValueError(
                f"time_low is {self.time_low} and time_high {self.time_high}: they must be "
                "0 <= time_low < time_high <= 1"
            )
        is_whole = (self.time_low, self.time_high) == (0, 1)
        if self.loss == "nelbo" and not is_whole:
            raise ValueError(
                "loss is nelbo, which is a bound only with all times: use another loss, or leave "
                "out time_low and time_high"
            )
        if isinstance(self.views, str) and self.views.lstrip("-").isdecimal():
            object.__setattr__(self, "views", int(self.views))
        check_views(self.views)  # type: ignore[arg-type]
        if self.views == "coupled" and self.loss == "nelbo":
            raise ValueError(
                "views is coupled, whose weights give no bound: use another loss than nelbo, or "
                "complement"
            )
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout is {self.class_dropout}: it must be in [0, 1]")
        if self.labels is None and self.class_dropout != type(self).class_dropout:
            raise ValueError(
                f"class_dropout is {self.class_dropout}, but there are no classes to drop: give "
                "--labels, or leave it out"
            )
        for name in ("shift_epochs", "cuda_graph"):
            if self.labels is not None and getattr(self, name):
                why = "it moves the windows that labels belong to"
                if name == "cuda_graph":
                    why = "labels are looked up on the host"
                raise ValueError(
                    f"--labels and {option_of(name)} exclude each other, since {why}: leave one of "
                    "them out"
                )
        given = [name for name in _NOT_PACKED if getattr(self, name)]
        if self.pack and given:
            why = "it is of windows, and documents are packed whole"
            if given[0] == "cuda_graph":
                why = "a graph has the same shapes in each step"
            raise ValueError(
                f"{option_of('pack')} and {option_of(given[0])} exclude each other, since {why}: "
                f"leave one of them out"
            )
        if self.net is not None:
            self._check_net()
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other")
        self._check_graphs()

    def _check_net(self) -> None:
        if not str(self.net).startswith("hf:"):
            raise ValueError(f"net is {self.net}: it must be hf: and a folder, or a config.json")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in (*_OF_OWN_NET, "labels", "shard", "init") and value != f.default:
                why = "the net has its own"
                if f.name == "labels":
                    why = "models of transformers take no class"
                if f.name == "init":
                    why = "export that run, and name its folder as the net"
                if f.name == "shard":
                    why = "only the net of this trainer is known in parts"
                raise ValueError(f"{f.name} is {value}, which does not go with --net: {why}")

    def _check_graphs(self) -> None:
        mode, default = f"--compile-mode {self.compile_mode}", "--compile-mode default"
        if self.compile_mode != "default":
            if not self.compile:
                raise ValueError(f"{mode} needs --compile: add it, or use {default}")
            if self.accumulate > 1:
                raise ValueError(
                    f"{mode} keeps gradients in memory that the next microbatch overwrites, and "
                    f"accumulate is {self.accumulate}: use --cuda-graph instead, or accumulate 1"
                )
        without = self._graphs()
        for name in ("shard", "checkpoint_activations"):
            if getattr(self, name):
                without[option_of(name)] = option_of(f"no_{name}")
        gathers = "FSDP2 gathers weights into other memory in each step, and a graph reads the same"
        draws = "recomputing a block reads and sets the state of dropout, which a graph cannot"
        for one, other, why in (
            ("--cuda-graph", mode, "there are no graphs inside of a graph"),
            ("--cuda-graph", "--shard", gathers),
            ("--cuda-graph", "--checkpoint-activations", draws),
            (mode, "--shard", gathers),
            (mode, "--checkpoint-activations", draws),
        ):
            if one in without and other in without:
                raise ValueError(
                    f"{one} and {other} exclude each other: {why}; use {without[one]}, or "
                    f"{without[other]}"
                )

    def _graphs(self) -> dict[str, str]:
        """The options given that capture CUDA graphs, and how to go without each."""
        graphs = {"--cuda-graph": "--no-cuda-graph"} if self.cuda_graph else {}
        if self.compile_mode != "default":
            graphs[f"--compile-mode {self.compile_mode}"] = "--compile-mode default"
        return graphs

    def check_device(self, device: str) -> None:
        """Raises ValueError for options that capture CUDA graphs on another type of device."""
        for name, without in self._graphs().items():
            if device != "cuda":
                raise ValueError(
                    f"{name} captures the kernels of a GPU, and this run is on the {device}: use "
                    f"--device cuda on a machine that has one, or {without}"
                )

    @property
    def folder(self) -> Path:
        """Output folder: ``out``, or ``runs/`` and the name of the data: of a glob, that of the
        folder that it looks in.

        Raises:
            ValueError: the data have no name.
        """
        if self.out is not None:
            return Path(self.out)
        path = Path(os.path.abspath(self.data))
        while glob.has_magic(str(path)) and not path.exists():
            path = path.parent
        if not path.stem:
            raise ValueError(f"out is not given, and {self.data} has no name: give it")
        return Path("runs") / path.stem

    @property
    def how_to_resume(self) -> str:
        return f"nar-kernels train --resume --out {shlex.quote(str(self.folder))}"

    def to_dict(self) -> dict[str, Any]:
        """Fields as plain values, for JSON and checkpoints."""
        return asdict(self)

    def refuse_to_continue(self, saved: dict[str, Any], done: int) -> None:
        """Raises ValueError if a run with ``saved`` options cannot be resumed with these after
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


_MOST_THREADS = 1024  # PyTorch crashes if the OS cannot start as many as requested

_AT_LEAST_ONE = (
    *("seq_len", "stride", "held_out", "dim", "depth", "heads", "steps", "batch_size"),
    "block_length",
    *("accumulate", "eval_every", "eval_draws", "save_every", "threads"),
)

# Options that may change on resume: those that do not affect what is learned, except rounding and
# dropout noise; and the number of steps, which changes the learning rate of those to come. Data may
# have moved or changed format: its digest must match.
FREE_ON_RESUME = frozenset(
    (
        *("data", "dtype", "column", "labels", "out", "steps"),
        *("device", "threads", "accumulate", "eval_every", "save_every"),
        *("compile", "compile_mode", "cuda_graph", "checkpoint_activations", "shard"),
        *("resume", "overwrite", "quiet"),
    )
)


# Options of the net that is built without --net.
_OF_OWN_NET = ("dim", "depth", "heads", "dropout", "rotary", "shift_tokens")

# Options of windows, or of fixed shapes.
_NOT_PACKED = ("stride", "within_documents", "shift_epochs", "cuda_graph", "labels")


def _preset_of(data: str | os.PathLike[str]) -> dict[str, Any]:
    if is_all_answers(data):
        return PRESETS[ANSWERS]
    if is_all_prepared_text(data):
        return PRESETS[PREPARED_TEXT]
    return PRESETS.get(str(data), {})


PREPARED_TEXT, ANSWERS = "prepared text", "prompts and answers"

PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        **{"dim": 96, "rotary": False, "lr": 6e-3, "steps": 1000, "warmup": 50},
        **{"eval_every": 100, "eval_draws": 4, "threads": 1, "precision": "fp32"},
    },
    "text": {
        **{"stride": 32, "batch_size": 16, "lr": 2e-3, "steps": 1500},
        **{"eval_every": 250, "eval_draws": 4},
    },
    # Some ten minutes on two cores.
    PREPARED_TEXT: {
        **{"seq_len": 128, "stride": 32, "batch_size": 16, "lr": 3e-3, "steps": 4000},
        **{"shift_tokens": 1, "eval_every": 500, "save_every": 500, "eval_draws": 4},
    },
    ANSWERS: {
        **{"pack": True, "batch_size": 16, "lr": 1e-3, "steps": 1000},
        **{"eval_every": 250, "eval_draws": 4},
    },
}
