"""``nar-kernels export``."""

import argparse
from pathlib import Path

from nar_kernels.nets.adapter import NetAdapter
from nar_kernels.training import hugging_face
from nar_kernels.training.model import load_model

HELP = "write the net of a run with --net hf: to a folder that transformers loads"

NAMES: dict[str, str] = {}


def add_to(parser: argparse.ArgumentParser) -> None:
    """A checkpoint, and a folder."""
    parser.set_defaults(run=_run, names=NAMES)
    parser.add_argument("--checkpoint", required=True, help="checkpoint, e.g. runs/demo/best.pt")
    parser.add_argument("--out", required=True, help="a new folder, or an empty one")


def _run(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already: --out names a new folder, or an empty one")
    model, spec = load_model(arguments.checkpoint)
    if not isinstance(model.net, NetAdapter):
        raise ValueError(
            f"{arguments.checkpoint} holds a net of x-transformers, which transformers does not "
            "know: export is for runs with --net hf:"
        )
    has_tokenizer = hugging_face.export(model.net.net, spec, out)
    print(out if has_tokenizer else f"{out} (its data has no tokenizer that transformers reads)")
