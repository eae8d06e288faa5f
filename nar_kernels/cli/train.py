"""``nar-kernels train``."""

import argparse
import dataclasses
from pathlib import Path

from nar_kernels.cli.arguments import add_options
from nar_kernels.options import option_of
from nar_kernels.training import checkpoint
from nar_kernels.training.config import PRESETS, TrainConfig
from nar_kernels.training.data import with_data_that_moved
from nar_kernels.training.model import net_options
from nar_kernels.training.train import train

HELP = "train a model; write checkpoints and a report"

# From Python arguments, as error messages name them, to command-line options.
NAMES = {f.name: option_of(f.name) for f in dataclasses.fields(TrainConfig)} | {
    "num_held_out": "--held-out"
}


def add_to(parser: argparse.ArgumentParser) -> None:
    """One option for each field of TrainConfig."""
    parser.set_defaults(run=_run, names=NAMES)
    add_options(parser, TrainConfig, presets=PRESETS)


def _run(arguments: argparse.Namespace) -> None:
    options = {k: v for k, v in vars(arguments).items() if k in NAMES}
    if options.get("resume"):
        if "out" not in options:
            raise ValueError("--resume needs --out, the folder of the run to continue")
        saved = checkpoint.read(Path(options["out"]) / "last.pt")
        config = TrainConfig.continued(saved["config"], **options)
        train(with_data_that_moved(config, options) if "data" in options else config)
    elif "data" not in options:
        raise ValueError("give --data: digits, text, or a file (or --resume and --out)")
    else:
        of_init = net_options(options["init"]) if options.get("init") else {}
        train(TrainConfig.for_data(**of_init | options))
