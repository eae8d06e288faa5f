"""The command line: ``nar-kernels train | generate | doctor``."""

import argparse
import dataclasses
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from nar_kernels import checkpoint, prompts, samples
from nar_kernels.backends import backends, cpp
from nar_kernels.choice import Strategy
from nar_kernels.config import PRESETS, TrainConfig
from nar_kernels.decode import DecodeState
from nar_kernels.errors import BackendUnavailableError
from nar_kernels.model import choose_device, load_model
from nar_kernels.player import page
from nar_kernels.report import version
from nar_kernels.sources import SequenceSpec
from nar_kernels.train import DivergedError, train
from nar_kernels.watch import watch
from nar_kernels.wrapper import NonAutoregressiveWrapper

_INTERRUPTED = 130  # 128 + SIGINT, as shells count

_STEPS = 18  # of decoding

_SIMD_LEVELS = ("generic", "AVX2", "AVX512")  # as the C++ extension numbers them

_OPTIONAL = {
    "train": ("x-transformers", "tqdm", "matplotlib", "tensorboard", "scikit-learn"),
    "triton": ("triton",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0, 1 if training diverged, 2 if the user can mend it (said in one line), 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except DivergedError as error:
        print(f"nar-kernels: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError, BackendUnavailableError) as error:
        print(f"nar-kernels: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nar-kernels", description="Masked-prediction (non-autoregressive) models."
    )
    parser.add_argument("--version", action="version", version=version("nar-kernels") or "unknown")
    commands = parser.add_subparsers(metavar="command", required=True)
    _add_train(commands.add_parser("train", help="train a net and write checkpoints and a report"))
    _add_generate(commands.add_parser("generate", help="write samples of a checkpoint"))
    doctor = commands.add_parser("doctor", help="say what works here, and why the rest does not")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    """One option for each field of TrainConfig. Those not given do not appear in the result."""
    parser.set_defaults(run=_train)
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
            "--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=help_text, **keywords
        )


def _defaults(name: str, default: Any) -> str:
    """What stands behind the help of an option."""
    presets = [f"{data} {preset[name]}" for data, preset in PRESETS.items() if name in preset]
    shown = [*([] if default is None else [str(default)]), *presets]
    return f" (default: {', '.join(shown)})" if shown else ""


def _train(arguments: argparse.Namespace) -> None:
    options = {k: v for k, v in vars(arguments).items() if k != "run"}
    if options.get("resume"):
        if "out" not in options:
            raise ValueError("--resume needs --out, the folder of the run to continue")
        saved = checkpoint.read(Path(options["out"]) / "last.pt")
        train(TrainConfig.continued(saved["config"], **options))
    elif "data" not in options:
        raise ValueError("give --data: digits, text, or a file (or --resume and --out)")
    else:
        train(TrainConfig.for_data(**options))


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_generate)
    parser.add_argument("--checkpoint", required=True, help="such as runs/demo/last.pt")
    parser.add_argument("--num-samples", type=int, default=16, help="(default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument(
        "--steps",
        type=int,
        help=f"calls of the net (default: {_STEPS}; as many as it takes with threshold)",
    )
    parser.add_argument(
        "--strategy",
        choices=[name for name in get_args(Strategy) if name != "critic"],
        default="random",
        help="which tokens are filled first (default: random)",
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
        default=1.0,
        help="at the first step, falling to 0 (default: 1)",
    )
    parser.add_argument(
        "--filter-thres",
        type=float,
        default=0.0,
        help="share of the vocabulary never sampled: the least probable ids (default: 0)",
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
    parser.add_argument("--out", help=".npy, .png (images) or text (default: the terminal)")
    parser.add_argument("--html", help="also write a page that plays the decoding step by step")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _generate(arguments: argparse.Namespace) -> None:
    for name in ("num_samples", "steps"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    model, spec = load_model(Path(arguments.checkpoint))
    out = None if arguments.out is None else Path(arguments.out)
    if out is not None:
        samples.check_suffix(out, spec)
    states = _states(arguments, model.to(choose_device(arguments.device)), spec)
    kept = None
    if arguments.html is not None:
        states = iter(kept := list(states))
    if out is None and sys.stdout.isatty():
        ids = watch(states, spec, sys.stdout).ids
    else:
        *_, last = states
        ids = last.ids
    ids = ids.cpu()
    if out is None:
        print(samples.text(ids, spec), end="")
    else:
        samples.write(out, ids, spec)
        print(out)
    if kept is not None:
        title = f"{Path(arguments.checkpoint).parent.name}: {arguments.strategy}"
        Path(arguments.html).write_text(page(kept, spec, title=title), "utf-8")
        print(arguments.html)


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
    return samples.states(
        model,
        None if ids is not None and ids.dim() == 2 else arguments.num_samples,
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
            package: version(package) or f"not installed: pip install 'nar-kernels[{extra}]'"
            for extra, packages in _OPTIONAL.items()
            for package in packages
        },
    )


def _table(title: str, rows: dict[str, str]) -> None:
    print(title)
    for name, value in rows.items():
        print(f"  {name:<16}{value}")


if __name__ == "__main__":
    sys.exit(main())
