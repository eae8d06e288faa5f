"""``nar-kernels tune-times``."""

import argparse
import dataclasses
import json

from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.data.sources import Data, PackedData
from nar_kernels.options import option_of
from nar_kernels.time_ranges import GRID, LEAST_WIDTH, TimeRange, time_ranges
from nar_kernels.training.config import TrainConfig
from nar_kernels.training.data import data_of, with_data_that_moved
from nar_kernels.training.model import choose_device, load_run

HELP = (
    "find the range of times (mask ratios) whose losses vary least, for a model; of the linear "
    "schedule with exact counts"
)

_SHOWN = 5

# From Python arguments, as error messages name them, to command-line options.
NAMES = {
    name: option_of(name)
    for name in ("data", "draws", "block_length", "least_width", "grid", "device")
}


def add_to(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run, names=NAMES)
    parser.add_argument("--checkpoint", required=True, help="checkpoint, e.g. runs/demo/best.pt")
    parser.add_argument(
        "--data",
        help="its data, if they have moved, or others of the same vocabulary: losses are those of "
        "the held-out part",
    )
    parser.add_argument(
        "--draws", type=int, help="masks per held-out window or document (default: the run's)"
    )
    parser.add_argument(
        "--block-length",
        type=int,
        help="of block diffusion, another than the run's: shorter blocks want other times",
    )
    parser.add_argument(
        "--least-width",
        type=float,
        default=LEAST_WIDTH,
        help=f"of a range (default: {LEAST_WIDTH})",
    )
    parser.add_argument(
        "--grid", type=float, default=GRID, help=f"between the ends of ranges (default: {GRID})"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object: all ranges")


def _run(arguments: argparse.Namespace) -> None:
    model, spec, config = load_run(arguments.checkpoint)
    if arguments.block_length is not None:
        if config.block_length is None:
            raise ValueError(
                f"block_length is {arguments.block_length}, but the run is no block diffusion: "
                "leave it out, or train with --block-length"
            )
        config = dataclasses.replace(config, block_length=arguments.block_length)
    data, device = _data(config, spec, arguments.data), choose_device(arguments.device)
    found = time_ranges(
        model.net.to(device),
        data.held_out,
        None if isinstance(data, PackedData) else data.held_out_windows,
        draws=config.eval_draws if arguments.draws is None else arguments.draws,
        device=device,
        block_length=config.block_length,
        least_width=arguments.least_width,
        grid=arguments.grid,
        class_ids=None if isinstance(data, PackedData) else data.held_out_classes,
    )
    if arguments.json:
        print(json.dumps({"ranges": [time_range._asdict() for time_range in found]}))
    else:
        print(_text(found, config))


def _data(config: TrainConfig, spec: SequenceSpec, other: str | None) -> Data | PackedData:
    """The data of the run, or others of the same vocabulary."""
    if other is None:
        return data_of(config, spec)
    try:
        config_there = with_data_that_moved(dataclasses.replace(config, data=other), {})
        data = data_of(config_there, spec)
    except ValueError as error:
        raise ValueError(
            f"{other} is not such data as {config.data} of the run: {error}"
        ) from error
    for name in ("num_tokens", "mask_id"):
        here, there = getattr(data.spec, name), getattr(spec, name)
        if here != there:
            raise ValueError(
                f"{other} is not such data as {config.data} of the run: {name} is {here} there, "
                f"and {there} in the checkpoint"
            )
    return data


def _text(found: list[TimeRange], config: TrainConfig) -> str:
    """The first ranges, and that of all times; what to train with."""
    best, whole = found[0], next(r for r in found if (r.low, r.high) == (0, 1))
    lines = [f"{'times':>12} {'mean':>8} {'variance':>10} {'±':>8}   (nats per token)"]
    for r in [*found[:_SHOWN], *([] if whole in found[:_SHOWN] else [whole])]:
        span = f"{r.low:g}..{r.high:g}"
        lines.append(f"{span:>12} {r.mean:8.3f} {r.variance:10.4f} {r.standard_error:8.4f}")
    if best.variance >= whole.variance:
        return "\n".join(
            [*lines, "no range has less variance than all times: leave them as they are"]
        )
    # What was measured, whatever the run was trained with.
    others = {"schedule": "linear", "draw": "exact"}
    options = [
        *(f"--{name} {value}" for name, value in others.items() if getattr(config, name) != value),
        f"--time-low {best.low:g} --time-high {best.high:g} --loss sequence",
    ]
    return "\n".join([*lines, f"train with: {' '.join(options)}"])
