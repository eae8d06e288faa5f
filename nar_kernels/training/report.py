"""Results of a run: ``report.json``, plots, samples, and the header and summary on the terminal."""

import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.data.sources import Data, PackedData
from nar_kernels.distributed import world_size
from nar_kernels.extras import version
from nar_kernels.sampling.config import SamplingConfig
from nar_kernels.show import samples
from nar_kernels.show.pictures import images, loss_curve
from nar_kernels.training import checkpoint
from nar_kernels.training.baselines import Baseline
from nar_kernels.training.config import TrainConfig
from nar_kernels.training.log import Log
from nar_kernels.wrapper import NonAutoregressiveWrapper

_FILMSTRIP_ROWS = 10
_OF_CLASS = 8  # samples, beside each other
_RUN_FILES = (
    *("last.pt", "best.pt", "report.json", "loss.png"),
    *("filmstrip.png", "samples.txt", "samples.npy", "classes.png"),
)


def prepare_folder(folder: Path) -> None:
    """Creates the folder, and removes the files of an earlier run; no others."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    remove_leftovers(folder)
    for events in (folder / "tb").glob("events.out.tfevents.*"):
        events.unlink()


def remove_leftovers(folder: Path) -> None:
    """Removes partially written files of a killed run."""
    for name in _RUN_FILES:
        checkpoint.remove_leftovers(folder / name)


def environment(device: torch.device, bf16: bool) -> dict[str, Any]:
    """Versions, hardware and precision: everything that rounding depends on."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "x_transformers": version("x-transformers"),
        "nar_kernels": version("nar-kernels"),
        "device": f"{device.type} ({where})",
        "simd": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": "bf16" if bf16 else "fp32",
        "processes": world_size(),
    }


def describe(
    config: TrainConfig,
    data: Data | PackedData,
    model: nn.Module,
    baselines: dict[str, Baseline],
    environment: dict[str, Any],
) -> str:
    """The header of a run, for the terminal."""
    num_parameters = sum(p.numel() for p in model.parameters())
    vocabulary = data.spec.num_tokens - 1
    to_train_on, held_out, of = data.sizes()
    in_rows = f"windows of {data.spec.seq_len} tokens"
    if of == "documents":
        in_rows = f"documents in rows of {data.spec.seq_len} tokens"
    lines = {
        "data": f"{data.name}: {to_train_on} {in_rows} to train on, {held_out} held out; "
        f"{vocabulary} ids and the mask",
        **_longer(config, data),
        **_classes(config, data),
        "net": f"{_net(config)}: {num_parameters:,} parameters",
        "masking": f"{config.schedule} schedule, {config.draw} draw{_views(config)}; loss: "
        f"{config.loss}",
        "steps": f"{config.steps} of {config.batch_size} {'rows' if config.pack else 'windows'}; "
        "AdamW, peak learning rate "
        f"{config.lr:g}",
        **({} if config.init is None else {"from": f"the weights of {config.init}"}),
        "on": f"{environment['device']}, {environment['threads']} threads, "
        f"{environment['precision']}"
        + (f", {environment['processes']} processes" if environment["processes"] > 1 else ""),
        "to beat": ", ".join(
            f"{b.bits_per_token:.3f} ({name})" for name, b in _shown(baselines).items()
        ),
        "folder": str(config.folder),
    }
    return "\n".join(f"{name:>8}  {line}" for name, line in lines.items())


def _classes(config: TrainConfig, data: Data | PackedData) -> dict[str, str]:
    if data.spec.num_classes is None:
        return {}
    return {"classes": f"{data.spec.num_classes}, dropped with probability {config.class_dropout}"}


def _views(config: TrainConfig) -> str:
    in_blocks = "" if config.block_length is None else f" in blocks of {config.block_length}"
    return in_blocks + ("" if config.views == 1 else f", {config.views} views")


def _longer(config: TrainConfig, data: Data | PackedData) -> dict[str, str]:
    """What to say of documents that do not fit into a row."""
    if not isinstance(data, PackedData):
        return {}
    longer = data.train.num_longer + data.held_out.num_longer
    if not longer:
        return {}
    done = "in pieces, of which only the first has the prompt"
    if config.overlong == "truncate":
        done = "cut off"
    return {"note": f"{longer} documents are longer than that, {done}"}


def _shown(baselines: dict[str, Baseline]) -> dict[str, Baseline]:
    """The held-out cross-entropies among the baselines, by label."""
    names = {
        "unigram_cross_entropy": "token frequencies",
        "per_position_cross_entropy": "frequencies at each position",
    }
    return {label: baselines[name] for name, label in names.items() if name in baselines}


def make_report(
    config: TrainConfig,
    data: Data | PackedData,
    model: NonAutoregressiveWrapper,
    log: Log,
    baselines: dict[str, Baseline],
    environment: dict[str, Any],
) -> dict[str, Any]:
    """The contents of ``report.json``."""
    step, bits, error = log.curve[-1]
    best_step, best_bits, _ = log.best()
    tokens = len(log.losses) * config.batch_size * data.spec.seq_len
    to_train_on, held_out, of = data.sizes()
    return {
        "bits_per_token": bits,
        "standard_error": None if math.isnan(error) else error,
        "below_best_baseline": min(b.bits_per_token for b in _shown(baselines).values()) - bits,
        "baselines": {name: b._asdict() for name, b in baselines.items()},
        "best": {"step": best_step, "bits_per_token": best_bits},
        "steps": step,
        "seconds": log.seconds,
        "step_seconds": log.step_seconds,
        "tokens_per_second": tokens / log.step_seconds,
        "data": {
            "name": data.name,
            "num_tokens": data.spec.num_tokens,
            "seq_len": data.spec.seq_len,
            f"train_{of}": to_train_on,
            f"held_out_{of}": held_out,
            "digest": data.corpus.digest,
        },
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "config": config.to_dict(),
        "environment": environment,
        "files": {
            "last_checkpoint": "last.pt",
            "best_checkpoint": "best.pt",
            "tensorboard": "tb",
            "loss_curve": "loss.png",
            "samples": _samples_name(data.spec),
            **({"samples_by_class": "classes.png"} if _shows_classes(data.spec) else {}),
        },
        "curve": {
            # config.loss / ln 2: bits per masked token, or with "nelbo" the bound, per token.
            "train": [{"step": s, "bits": b} for s, b in log.smooth()],
            "held_out": [{"step": s, "bits_per_token": b} for s, b, _ in log.curve],
        },
    }


def _samples_name(spec: SequenceSpec) -> str:
    if spec.image_shape is not None:
        return "filmstrip.png"
    return "samples.txt" if spec.render in ("bytes", "text") else "samples.npy"


def _shows_classes(spec: SequenceSpec) -> bool:
    return spec.num_classes is not None and spec.image_shape is not None


def _shown_classes(spec: SequenceSpec) -> Tensor:
    """int64: the classes of the rows of pictures, evenly spread."""
    assert spec.num_classes is not None
    rows = min(spec.num_classes, _FILMSTRIP_ROWS)
    return torch.arange(rows, device="cpu") * spec.num_classes // rows


def _net(config: TrainConfig) -> str:
    if config.net is not None:
        return str(config.net)
    return f"{config.depth} blocks of width {config.dim}, {config.heads} heads"


def draw_samples(
    config: TrainConfig, data: Data | PackedData, model: NonAutoregressiveWrapper
) -> Tensor:
    """Samples for the report: ids ``[N, L]``; of images every state, ``[N, S + 1, L]``, of
    classes several of each, together."""
    if data.spec.image_shape is not None:
        rows: dict[str, Any] = {"batch_size": _FILMSTRIP_ROWS}
        if _shows_classes(data.spec):
            rows = {"class_ids": _shown_classes(data.spec).repeat_interleave(_OF_CLASS)}
        states = model.sample(SamplingConfig(), **rows, seed=config.seed)
        return torch.stack([state.ids.cpu() for state in states], 1)
    sampling = SamplingConfig(steps=data.spec.seq_len)
    prompts = data.held_out.prompts(4) if isinstance(data, PackedData) else []
    if prompts:  # and what the model answers
        length = data.spec.seq_len
        sampling = SamplingConfig(steps=length, length=length)
        return model.sample(sampling, prompt=prompts, seed=config.seed).last().ids.cpu()
    return model.sample(sampling, 4, seed=config.seed).last().ids.cpu()


def write_results(
    config: TrainConfig,
    data: Data | PackedData,
    log: Log,
    baselines: dict[str, Baseline],
    report: dict[str, Any],
    ids: Tensor,
) -> None:
    """Writes ``report.json``, the loss curve and the samples ``ids`` into the run's folder."""
    bits, steps = report["bits_per_token"], report["steps"]
    loss_curve(
        config.folder / "loss.png",
        train=log.smooth(),
        held_out=log.curve,
        baselines={label: b.bits_per_token for label, b in _shown(baselines).items()},
        train_label="training batches" + (", unweighted" if config.loss == "mean" else ""),
        title=f"{Path(data.name).name}: {bits:.3f} bits per token after {steps} steps",
    )
    path = config.folder / report["files"]["samples"]
    if data.spec.image_shape is None:
        samples.write(path, ids, data.spec)
    else:
        ids = ids.unflatten(-1, data.spec.image_shape)
        if _shows_classes(data.spec):
            images(
                config.folder / report["files"]["samples_by_class"],
                ids[:, -1].unflatten(0, (-1, _OF_CLASS)),
                mask_id=data.spec.mask_id,
                title=f"classes {', '.join(map(str, _shown_classes(data.spec).tolist()))}",
            )
            ids = ids[::_OF_CLASS]
        images(
            path,
            ids,
            mask_id=data.spec.mask_id,
            column_labels=["start", *map(str, range(1, ids.shape[1]))],
            title=f"{data.name}: decoding steps, coloured where still masked",
        )
    samples.write_text(config.folder / "report.json", json.dumps(report, indent=2) + "\n")


def summary(report: dict[str, Any]) -> str:
    """The summary of a finished run, for the terminal."""
    folder = TrainConfig(**report["config"]).folder
    names = ("samples", "samples_by_class", "loss_curve")
    files = (report["files"][name] for name in names if name in report["files"])
    below, error = report["below_best_baseline"], report["standard_error"]
    spread = "" if error is None else f" ± {error:.4f}"
    return (
        f"{report['bits_per_token']:.4f}{spread} bits per token held out, "
        f"{abs(below):.3f} {'below' if below >= 0 else 'above'} the best model without context\n"
        f"{report['steps']} steps in {report['seconds']:.0f} s, "
        f"{report['tokens_per_second']:,.0f} tokens/s\n"
        + "".join(f"{folder / file}\n" for file in (*files, "report.json"))
    ).rstrip()
