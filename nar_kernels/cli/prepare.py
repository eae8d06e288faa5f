"""``nar-kernels prepare``."""

import argparse
import dataclasses

from nar_kernels.cli.arguments import add_options
from nar_kernels.data.prepare import prepare
from nar_kernels.data.prepare.config import PrepareConfig
from nar_kernels.options import option_of

HELP = "turn text, conversations or image codes into a corpus of tokens"

# From Python arguments, as error messages name them, to command-line options.
NAMES = {
    **{f.name: option_of(f.name) for f in dataclasses.fields(PrepareConfig) if f.metadata},
    "out": "--out",
}


def add_to(parser: argparse.ArgumentParser) -> None:
    """One option for each field of PrepareConfig."""
    parser.set_defaults(run=_run, names=NAMES)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="files, folders, globs or URLs: text, .jsonl, .parquet (.gz, .zst), or .npy of image "
        "codes [N, h, w]",
    )
    parser.add_argument("--out", required=True, help="folder of the corpus")
    add_options(parser, PrepareConfig, exclude=("append_eos",))
    parser.add_argument(
        "--append-eos",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help=PrepareConfig.__dataclass_fields__["append_eos"].metadata["help"],
    )


def _run(arguments: argparse.Namespace) -> None:
    options = {name: value for name, value in vars(arguments).items() if name in NAMES}
    manifest = prepare(arguments.inputs, options.pop("out"), **options)
    if options.get("quiet"):
        return
    what = "images" if manifest.image_shape else "documents"
    total = f"{manifest.total_tokens:,} tokens of {manifest.total_documents:,} {what}"
    print(f"{arguments.out}: {total}, {manifest.dtype}, in {len(manifest.shards)} shards")
    ids = f"num_tokens {manifest.num_tokens}, mask_id {manifest.mask_id}"
    eos = "" if manifest.eos_id is None else f", eos_id {manifest.eos_id}"
    name = "" if manifest.tokenizer is None else f"tokenizer {manifest.tokenizer.name}, "
    print(f"{name}vocab_size {manifest.vocab_size}, {ids}{eos}")
