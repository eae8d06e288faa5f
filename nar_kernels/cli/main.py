"""``nar-kernels prepare | inspect | train | tune-times | generate | export | doctor``."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence

from nar_kernels.cli import doctor, export, generate, inspect, prepare, train, tune_times
from nar_kernels.errors import BackendUnavailableError, CorpusChangedError
from nar_kernels.extras import version
from nar_kernels.training.interrupt import Interrupted
from nar_kernels.training.train import DivergedError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: runs a subcommand.

    Returns:
        Exit status: 0; 1 if training diverged, or ``inspect`` found bad ids; 2 for user errors (a
        one-line message); 128 plus the signal number after a signal, as in shells: 130 after
        Ctrl-C, 143 after SIGTERM, 141 where nobody reads the output.
    """
    arguments = _parser().parse_args(argv)
    try:
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush on exit
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as error:
        return 128 + (error.signum if isinstance(error, Interrupted) else signal.SIGINT)
    except DivergedError as error:
        print(f"nar-kernels: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError, BackendUnavailableError, CorpusChangedError) as error:
        print(f"nar-kernels: {_in_options(str(error), arguments.names)}", file=sys.stderr)
        return 2


def _in_options(message: str, names: Mapping[str, str]) -> str:
    """Replaces Python argument names in an error message by command-line options.

    Args:
        names: from arguments to options. A name that is a common word is replaced only where the
            message states its value.
    """
    for name, option in names.items():
        word = rf"(?<![\w./'\"-]){name}"
        own = rf"(?<!\()(?<!, ){word}"  # not an argument in a quoted call
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
    for command in (prepare, inspect, train, tune_times, generate, export, doctor):
        name = command.__name__.rpartition(".")[2].replace("_", "-")
        command.add_to(commands.add_parser(name, help=command.HELP))
    return parser
