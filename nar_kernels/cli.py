"""The command line: ``nar-kernels train | generate | doctor``."""

import argparse
import dataclasses
import math
import os
import platform
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from nar_kernels import checkpoint, prompts, samples
from nar_kernels.backends import backends, cpp
from nar_kernels.choice import Strategy
from nar_kernels.config import PRESETS, TrainConfig, check_seed, option_of
from nar_kernels.decode import DecodeState
from nar_kernels.errors import BackendUnavailableError
from nar_kernels.extras import EXTRAS, how_to_install
from nar_kernels.files import check_writable
from nar_kernels.interrupt import Interrupted
from nar_kernels.model import choose_device, load_model
from nar_kernels.player import page
from nar_kernels.report import version
from nar_kernels.sources import SequenceSpec
from nar_kernels.train import DivergedError, train
from nar_kernels.watch import watch
from nar_kernels.wrapper import NonAutoregressiveWrapper

_NUM_SAMPLES = 16
_STEPS = 18  # of decoding

# Of the numbers of `generate`: the least, the largest, and both in words.
_COUNT = (1, (1 << 31) - 1, "in [1, 2**31)")
_SHARE = (0, 1, "in [0, 1]")
_FINITE = (0, sys.float_info.max, "at least 0 and finite")
_RANGES = {
    **{"num_samples": _COUNT, "steps": _COUNT, "block_length": _COUNT},
    **{"threshold": _SHARE, "filter_thres": _SHARE},
    **{"temperature": _FINITE, "choice_temperature": _FINITE, "guidance_scale": _FINITE},
}

# What options are called in Python, by which messages know them.
_TRAIN_NAMES = {f.name: option_of(f.name) for f in dataclasses.fields(TrainConfig)} | {
    "num_held_out": "--held-out"
}
_GENERATE_NAMES = {name: option_of(name) for name in (*_RANGES, "seed", "strategy", "device")} | {
    "batch_size": "--num-samples",
    "start_temperature": "--temperature",
    "can_mask_prev_unmasked": "--remask",
}

_SIMD_LEVELS = ("generic", "AVX2", "AVX512")  # as the C++ extension numbers them


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0, 1 if training diverged, 2 if the user can mend it (said in one line); after a signal 128
        and its number, as shells count: 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt as error:
        return 128 + (error.signum if isinstance(error, Interrupted) else signal.SIGINT)
    except DivergedError as error:
        print(f"nar-kernels: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError, BackendUnavailableError) as error:
        print(f"nar-kernels: {_in_options(str(error), arguments.names)}", file=sys.stderr)
        return 2
    return 0


def _in_options(message: str, names: Mapping[str, str]) -> str:
    """A message that speaks of arguments in Python, with the options that set them.

    Args:
        names: from arguments to options. One that is a common word is taken for the argument only
            where messages give its value.
    """
    for name, option in names.items():
        word = rf"(?<![\w./'\"-]){name}"
        own = rf"(?<!\()(?<!, ){word}"  # and no argument of a call that is written out
        message = re.sub(rf"{own}='(\w+)'", rf"{option} \1", message)
        message = re.sub(rf"{own}=", option, message)
        message = re.sub(rf"^{name}(?= is )|{word}(?=, which is )", option, message)
        if "_" in name:
            message = re.sub(rf"{word}(?![\w/'\"-]|\.\w)", option, message)
    return message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nar-kernels", description="Masked-prediction (non-autoregressive) models."
    )
    parser.add_argument("--version", action="version", version=version("nar-kernels") or "unknown")
    commands = parser.add_subparsers(metavar="command", required=True)
    _add_train(commands.add_parser("train", help="train a net and write checkpoints and a report"))
    _add_generate(commands.add_parser("generate", help="write samples of a checkpoint"))
    doctor = commands.add_parser("doctor", help="say what works here, and why the rest does not")
    doctor.set_defaults(run=_doctor, names={})
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    """One option for each field of TrainConfig. Those not given do not appear in the result."""
    parser.set_defaults(run=_train, names=_TRAIN_NAMES)
    for f in dataclasses.fields(TrainConfig):
        keywords = {k: v for k, v in f.metadata.items() if k not in ("help", "otherwise")}
        help_text = f.metadata["help"]
        if f.default is dataclasses.MISSING:
            pass
        elif isinstance(f.default, bool):
            keywords["action"] = argparse.BooleanOptionalAction if f.default else "store_true"
        else:
            keywords.setdefault("type", type(f.default))
            help_text += _defaults(f.name, f.metadata.get("otherwise", f.default))
        parser.add_argument(
            option_of(f.name), default=argparse.SUPPRESS, help=help_text, **keywords
        )


def _defaults(name: str, default: Any) -> str:
    """What stands behind the help of an option."""
    presets = [f"{data} {preset[name]}" for data, preset in PRESETS.items() if name in preset]
    shown = [*([] if default is None else [str(default)]), *presets]
    return f" (default: {', '.join(shown)})" if shown else ""


def _train(arguments: argparse.Namespace) -> None:
    options = {k: v for k, v in vars(arguments).items() if k not in ("run", "names")}
    if options.get("resume"):
        if "out" not in options:
            raise ValueError("--resume needs --out, the folder of the run to continue")
        saved = checkpoint.read(Path(options["out"]) / "last.pt")
        if Path(options.get("data", "")).suffix == ".npy":
            options.setdefault("dtype", None)  # the same tokens with a header of their own
        train(TrainConfig.continued(saved["config"], **options))
    elif "data" not in options:
        raise ValueError("give --data: digits, text, or a file (or --resume and --out)")
    else:
        train(TrainConfig.for_data(**options))


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_generate, names=_GENERATE_NAMES)
    parser.add_argument("--checkpoint", required=True, help="such as runs/demo/last.pt")
    parser.add_argument(
        "--num-samples", type=int, help=f"(default: {_NUM_SAMPLES}, or one for each prompt)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument(
        "--steps",
        type=int,
        help=f"calls of the net (default: {_STEPS}; as many as it takes with threshold)",
    )
    parser.add_argument(
        "--strategy",
        choices=[name for name in get_args(Strategy) if name != "critic"],
        default=samples.STRATEGY,
        help=f"which tokens are filled first (default: {samples.STRATEGY}, for samples as varied "
        "as the data; in Python it is confidence, as in x-transformers)",
    )
    parser.add_argument(
        "--choice-temperature",
        type=float,
        default=0.0,
        help="noise on what --strategy confidence, margin and entropy say (default: 0)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.9,
        help="probability from which --strategy threshold fills a token at once (default: 0.9)",
    )
    parser.add_argument(
        "--block-length", type=int, help="fill blocks of so many tokens, from left to right"
    )
    parser.add_argument(
        "--remask",
        action="store_true",
        help="tokens that became improbable may be masked again",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=samples.TEMPERATURE,
        help=f"at the first step, falling to 0 (default: {samples.TEMPERATURE:g})",
    )
    parser.add_argument(
        "--filter-thres",
        type=float,
        default=samples.FILTER_THRES,
        help="share of the vocabulary never sampled: the least probable ids (default: "
        f"{samples.FILTER_THRES:g}; in Python it is 0.7, as in x-transformers)",
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--prompt", help="how samples begin: text, ids separated by blanks, or a .npy file of ids"
    )
    given.add_argument(
        "--infill",
        help="the same with gaps: [MASK] stands for one token, [MASK:12] for twelve, negative "
        "ids in a file for one each",
    )
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=1.0,
        help="how much what is given counts: classifier-free guidance (default: 1)",
    )
    parser.add_argument(
        "--out", help="a file: .npy (ids), .png (images) or .txt (default: the terminal)"
    )
    parser.add_argument("--html", help="also write a page that plays the decoding step by step")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _generate(arguments: argparse.Namespace) -> None:
    out, html = (None if name is None else Path(name) for name in (arguments.out, arguments.html))
    _check_generate(arguments, out, html)
    model, spec = load_model(arguments.checkpoint)
    if out is not None:
        samples.check_suffix(out, spec)
    if arguments.strategy == "halton" and spec.image_shape is None:
        if math.isqrt(spec.seq_len) ** 2 != spec.seq_len:
            raise ValueError(
                f"--strategy halton fills a grid, and this model makes {spec.seq_len} tokens, "
                "which are neither an image nor a square: use another one"
            )
    states = _states(arguments, model.to(choose_device(arguments.device)), spec)
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
        print(samples.text(ids, spec), end="")
    else:
        samples.write(out, ids, spec)
        print(out)
    if kept is not None:
        title = f"{Path(arguments.checkpoint).parent.name}: {arguments.strategy}"
        assert html is not None
        samples.write_text(html, page(kept, spec, title=title))
        print(html)


def _check_generate(arguments: argparse.Namespace, out: Path | None, html: Path | None) -> None:
    """What can be known before there is a model, so that no work is lost to it."""
    for name, (least, most, words) in _RANGES.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:  # nor NaN
            raise ValueError(f"{option_of(name)} is {value}: it must be {words}")
    check_seed(arguments.seed)
    if arguments.guidance_scale != 1 and arguments.prompt is None and arguments.infill is None:
        raise ValueError(
            f"--guidance-scale is {arguments.guidance_scale}, but there is nothing to be guided "
            "by: give --prompt or --infill"
        )
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
    arguments: argparse.Namespace, model: NonAutoregressiveWrapper, spec: SequenceSpec
) -> Iterator[DecodeState]:
    prompt, has_gaps = arguments.prompt, arguments.infill is not None
    if has_gaps:
        prompt = arguments.infill
    ids = None if prompt is None else prompts.from_text(prompt, spec, gaps=has_gaps)
    steps = arguments.steps
    if steps is None and arguments.strategy != "threshold":
        steps = _STEPS
    num_samples = arguments.num_samples
    if num_samples is None and (ids is None or ids.dim() == 1):
        num_samples = _NUM_SAMPLES
    return samples.states(
        model,
        num_samples,
        seed=arguments.seed,
        steps=steps,
        strategy=arguments.strategy,
        choice_temperature=arguments.choice_temperature,
        threshold=arguments.threshold,
        grid=spec.image_shape,
        block_length=arguments.block_length,
        can_mask_prev_unmasked=arguments.remask,
        temperature=arguments.temperature,
        filter_thres=arguments.filter_thres,
        prompt=ids,
        guidance_scale=arguments.guidance_scale,
    )


def _doctor(arguments: argparse.Namespace) -> None:
    simd = "-" if cpp is None else _SIMD_LEVELS[cpp.simd_level()]
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    _table(
        "versions",
        {
            "nar-kernels": version("nar-kernels") or "not installed, running from a checkout",
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    )
    _table(
        "machine",
        {
            "platform": platform.platform(),
            "simd": f"{simd} in nar_kernels, {torch.backends.cpu.get_cpu_capability()} in torch",
            "threads": str(torch.get_num_threads()),
            "cuda": cuda,
        },
    )
    _table("backends", backends())
    _table(
        "optional packages",
        {
            (package := requirement.partition(">")[0]): version(package)
            or f"not installed: {how_to_install(extra)}"
            for extra, requirements in EXTRAS.items()
            for requirement in requirements
        },
    )


def _table(title: str, rows: dict[str, str]) -> None:
    print(title)
    for name, value in rows.items():
        print(f"  {name:<16}{value.partition(chr(10))[0]}")


if __name__ == "__main__":
    sys.exit(main())
