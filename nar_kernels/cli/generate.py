"""``nar-kernels generate``."""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from nar_kernels.checks import check_seed
from nar_kernels.cli import prompts
from nar_kernels.cli.arguments import add_options
from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.data.tokenizer import tokenizer_from_json
from nar_kernels.files import check_writable
from nar_kernels.options import option_of
from nar_kernels.sampling.config import SamplingConfig, Strategy, top_k_from_filter_thres
from nar_kernels.sampling.decode import DecodeState
from nar_kernels.sampling.states import DecodeIterator
from nar_kernels.show import samples
from nar_kernels.show.player import page
from nar_kernels.show.terminal import watch
from nar_kernels.training.model import choose_device, load_model
from nar_kernels.wrapper import NonAutoregressiveWrapper

HELP = "generate samples from a checkpoint"

_NUM_SAMPLES, _NUM_OF_CLASS = 16, 8

# From Python arguments, as error messages name them, to command-line options.
NAMES = {f.name: option_of(f.name) for f in dataclasses.fields(SamplingConfig) if f.metadata} | {
    **{"seed": "--seed", "device": "--device", "filter_thres": "--filter-thres"},
    **{"batch_size": "--num-samples", "eos_id": "--eos-id", "class_ids": "--class"},
}


def add_to(parser: argparse.ArgumentParser) -> None:
    """One option for each field of SamplingConfig, and options for input and output."""
    parser.set_defaults(run=_run, names=NAMES)
    parser.add_argument("--checkpoint", required=True, help="checkpoint, e.g. runs/demo/last.pt")
    parser.add_argument(
        "--num-samples",
        type=int,
        help=f"(default: {_NUM_SAMPLES}, or {_NUM_OF_CLASS} of each of several classes, or one for "
        "each prompt)",
    )
    parser.add_argument(
        "--class",
        dest="class_ids",
        type=int,
        nargs="+",
        metavar="CLASS",
        help="of a model that was trained with --labels: the class of the samples; of several, as "
        "many samples each, in a picture a row (default: samples of any class)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    add_options(parser, SamplingConfig, exclude=("strategy",))
    strategies = [name for name in get_args(Strategy) if name != "critic"]  # no run trains one
    default = SamplingConfig().strategy
    parser.add_argument(
        "--strategy",
        choices=strategies,
        default=argparse.SUPPRESS,
        help=f"unmasking order: which tokens are unmasked first (default: {default}, for samples "
        "as varied as the data; in Python it is confidence, as in x-transformers)",
    )
    parser.add_argument(
        "--filter-thres",
        type=float,
        help="in place of --top-k: fraction of the vocabulary, the least probable ids, that is "
        "filtered out (default: 0; in Python it is 0.7, as in x-transformers)",
    )
    parser.add_argument(
        "--eos-id",
        type=int,
        nargs="+",
        help="ids that end an answer: what follows is cut (default: that of the model's tokenizer "
        "with --eos or --max-new-tokens, else none)",
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--prompt", help="prefix: text, whitespace-separated ids, or a .npy file of ids"
    )
    given.add_argument(
        "--infill",
        help="prompt with gaps to fill: [MASK] stands for one token, [MASK:12] for twelve, "
        "negative ids in a file for one each",
    )
    parser.add_argument(
        "--out", help="output file: .npy (ids), .png (images) or .txt (default: the terminal)"
    )
    parser.add_argument("--html", help="also write an HTML player of the decoding steps")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _run(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    out, html = (None if name is None else Path(name) for name in (arguments.out, arguments.html))
    _validate(arguments, config, out, html)
    model, spec = load_model(arguments.checkpoint)
    if out is not None:
        samples.check_suffix(out, spec)
    config, eos_ids = _resolve(config, arguments, spec), _eos_ids(arguments, spec)
    model = model.to(choose_device(arguments.device))
    states: Iterator[DecodeState] = (made := _states(arguments, config, model, spec, eos_ids))
    kept = None
    if html is not None:
        states = iter(kept := list(states))
    if out is None and sys.stdout.isatty():
        ids = watch(states, spec, sys.stdout).ids
    else:
        for last in states:  # noqa: B007
            pass
        ids = last.ids
    ids = ids.cpu()
    if out is None:
        print(samples.text(ids, spec, padding=eos_ids), end="")
    else:
        samples.write(out, ids, spec, padding=eos_ids, num_rows=len(arguments.class_ids or ()))
        print(out)
    if kept is not None:
        title = f"{Path(arguments.checkpoint).parent.name}: {config.strategy}"
        assert html is not None
        samples.write_text(html, page(kept, spec, title=title, blocks=made.blocks))
        print(html)


def _config(arguments: argparse.Namespace) -> SamplingConfig:
    """The sampling options given on the command line."""
    given = vars(arguments)
    names = {f.name for f in dataclasses.fields(SamplingConfig)}
    return SamplingConfig(**{name: given[name] for name in names & given.keys()})


def _resolve(
    config: SamplingConfig, arguments: argparse.Namespace, spec: SequenceSpec
) -> SamplingConfig:
    """Completes the config with what depends on the model: ``steps``, ``grid`` and ``top_k``."""
    length = spec.seq_len
    if isinstance(config.length, int):
        length = config.length
    if spec.image_shape is not None and (config.length, config.max_new_tokens) != (None, None):
        raise ValueError(
            f"this model makes images of {spec.image_shape[0]} x {spec.image_shape[1]}: leave out "
            "--length and --max-new-tokens"
        )
    if config.strategy == "halton" and spec.image_shape is None:
        is_square = config.max_new_tokens is None and math.isqrt(length) ** 2 == length
        if not is_square:
            raise ValueError(
                f"--strategy halton fills a grid, and this model makes {length} tokens, or what "
                "--max-new-tokens says, which are neither an image nor a square: use another one"
            )
    top_k = config.top_k
    if arguments.filter_thres is not None:
        top_k = top_k_from_filter_thres(arguments.filter_thres, spec.num_tokens)
    if config.steps is None and spec.render in ("bytes", "text"):
        # Neighbours that are drawn at once do not know of each other, which words do not bear.
        config = dataclasses.replace(config, steps=length)
    return dataclasses.replace(config, grid=spec.image_shape, top_k=top_k)


def _eos_ids(arguments: argparse.Namespace, spec: SequenceSpec) -> list[int] | None:
    """The ids that end an answer, if it is to be ended."""
    if arguments.eos_id is not None:
        return arguments.eos_id
    given = [name for name in ("eos", "max_new_tokens") if name in arguments]
    eos_id = None
    if given and spec.tokenizer is not None:
        eos_id = tokenizer_from_json(spec.tokenizer).eos_id
    if eos_id is None and "eos" in given:
        raise ValueError(
            f"--eos is {arguments.eos}, but the model has no tokenizer that says which token ends "
            "an answer: give its --eos-id"
        )
    return None if eos_id is None else [eos_id]


def _validate(
    arguments: argparse.Namespace, config: SamplingConfig, out: Path | None, html: Path | None
) -> None:
    """Fails before any work is done: checks all that needs no model."""
    if arguments.num_samples is not None and not 1 <= arguments.num_samples < 1 << 31:
        raise ValueError(f"--num-samples is {arguments.num_samples}: it must be in [1, 2**31)")
    check_seed(arguments.seed)
    if arguments.filter_thres is not None and config.top_k is not None:
        raise ValueError("--top-k and --filter-thres exclude each other: give one of them")
    top_k_from_filter_thres(arguments.filter_thres, num_tokens=1)  # raises if out of range
    guides = arguments.prompt, arguments.infill, arguments.class_ids
    if config.guidance_scale != 1 and all(guide is None for guide in guides):
        raise ValueError(
            f"--guidance-scale is {config.guidance_scale}, but there is nothing to be guided by: "
            "give --class, --prompt or --infill"
        )
    _validate_files(arguments, out, html)


def _validate_files(arguments: argparse.Namespace, out: Path | None, html: Path | None) -> None:
    """Checks that output files are writable, distinct, and not among the inputs."""
    for name in ("checkpoint", "out", "html", "prompt", "infill"):
        if getattr(arguments, name) == "":
            raise ValueError(f"--{name} is empty: leave it out, or say what it is")
    read = {"--checkpoint": arguments.checkpoint, "--prompt": arguments.prompt}
    taken = {
        os.path.realpath(path): option
        for option, path in read.items()
        if path is not None and os.path.isfile(path)
    }
    for option, path in (("--out", out), ("--html", html)):
        if path is None:
            continue
        check_writable(path)
        other = taken.setdefault(os.path.realpath(path), option)
        if other != option:
            raise ValueError(f"{option} and {other} are both {path}: give each a file of its own")
        if option == "--html" and path.suffix not in (".html", ".htm"):
            raise ValueError(f"--html is {path}: a page is written to a .html file")


def _states(
    arguments: argparse.Namespace,
    config: SamplingConfig,
    model: NonAutoregressiveWrapper,
    spec: SequenceSpec,
    eos_ids: list[int] | None,
) -> DecodeIterator:
    prompt, has_gaps = arguments.prompt, arguments.infill is not None
    if has_gaps:
        prompt = arguments.infill
    ids = None if prompt is None else prompts.from_text(prompt, spec, gaps=has_gaps)
    num_samples = arguments.num_samples
    if num_samples is None and (ids is None or ids.dim() == 1):
        several = len(arguments.class_ids or ())
        num_samples = _NUM_OF_CLASS * several if several > 1 else _NUM_SAMPLES
    class_ids = None
    if arguments.class_ids is not None:
        total = num_samples if ids is None or num_samples is not None else len(ids)
        class_ids = _of_samples(arguments.class_ids, total, spec)
    return model.sample(
        config,
        num_samples,
        seed=arguments.seed,
        prompt=ids,
        eos_id=eos_ids,
        class_ids=class_ids,
    )


def _of_samples(class_ids: list[int], num_samples: int, spec: SequenceSpec) -> list[int]:
    """The class of each sample: as many of each, together."""
    if spec.num_classes is None:
        raise ValueError(
            "--class is given, but the model takes no class: leave it out, or train one with "
            "--labels"
        )
    for class_id in class_ids:
        if not 0 <= class_id < spec.num_classes:
            raise ValueError(f"--class is {class_id}: it must be in [0, {spec.num_classes})")
    each, rest = divmod(num_samples, len(class_ids))
    if rest:
        raise ValueError(
            f"there are {num_samples} samples or prompts, and {len(class_ids)} classes of "
            "--class: give as many of each class"
        )
    return [class_id for class_id in class_ids for _ in range(each)]
