"""``nar-kernels tune-times``."""

import argparse
import dataclasses
import json

from nar_kernels.data.sources import PackedData
from nar_kernels.time_ranges import GRID, LEAST_WIDTH, TimeRange, time_ranges
from nar_kernels.training.data import data_of
from nar_kernels.training.model import choose_device, load_run

HELP = "find the range of times (mask ratios) whose losses vary least, for a model"

_SHOWN = 5

# From Python arguments, as error messages name them, to command-line options.
NAMES = {
    name: f"--{name.replace('_', '-')}"
    for name in ("data", "draws", "block_length", "least_width", "grid", "device")
}


def add_to(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run, names=NAMES)
    parser.add_argument("--checkpoint", required=True, help="checkpoint, e.g. runs/demo/best.pt")
    parser.add_argument("--data", help="its data, if they have moved; the held-out part is used")
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
    if arguments.data is not None:
        config = dataclasses.replace(config, data=arguments.data)
    if arguments.block_length is not None:
        if config.block_length is None:
            raise ValueError(
                f"block_length is {arguments.block_length}, but the run is no block diffusion: "
                "leave it out, or train with --block-length"
            )
        config = dataclasses.replace(config, block_length=arguments.block_length)
    data, device = data_of(config, spec), choose_device(arguments.device)
    found = time_ranges(
        model.net.to(device),
        data.held_out,
        None if isinstance(data, PackedData) else data.held_out_windows,
        draws=config.eval_draws if arguments.draws is None else arguments.draws,
        device=device,
        block_length=config.block_length,
        least_width=arguments.least_width,
        grid=arguments.grid,
    )
    if arguments.json:
        print(json.dumps({"ranges": [time_range._asdict() for time_range in found]}))
    else:
        print(_text(found))


def _text(found: list[TimeRange]) -> str:
    """The first ranges, and that of all times; what to train with."""
    best, whole = found[0], next(r for r in found if (r.low, r.high) == (0, 1))
    lines = [f"{'times':>12} {'mean':>8} {'variance':>10} {'±':>8}   (nats per token)"]
    for r in [*found[:_SHOWN], *([] if whole in found[:_SHOWN] else [whole])]:
        span = f"{r.low:.2f}..{r.high:.2f}"
        lines.append(f"{span:>12} {r.mean:8.3f} {r.variance:10.4f} {r.standard_error:8.4f}")
    if best is whole:
        return "\n".join(
            [*lines, "no range has less variance than all times: leave them as they are"]
        )
    return "\n".join(
        [
            *lines,
            f"{whole.variance / best.variance:.2f} times less variance than over all times with: "
            f"--time-low {best.low:g} --time-high {best.high:g} --loss sequence",
        ]
    )
