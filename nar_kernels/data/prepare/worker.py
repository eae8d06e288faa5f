"""A process that encodes: a script, to which :mod:`nar_kernels.data.prepare.pool` sends jobs."""

import os
import pickle
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, too
    # What libraries print must not get between answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    jobs = sys.stdin.buffer
    sys.path[:] = pickle.load(jobs)
    text, name, fields = _load(jobs)
    # There are as many workers as cores; tokenizers has no other switch.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    from nar_kernels.data.prepare.encode import Encoder
    from nar_kernels.data.tokenizer import tokenizer_from_json

    tokenizer = tokenizer_from_json(text)
    tokenizer.name = name  # for errors: not all kinds have it in their JSON
    encoder = Encoder(tokenizer=tokenizer, **fields)
    while True:
        try:
            job = pickle.load(jobs)
        except (EOFError, pickle.UnpicklingError):  # the parent is gone
            return
        try:
            answer: Any = [encoder.encode(batch) for batch in job]
        except Exception as error:
            answer = error
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except BrokenPipeError:
            os._exit(1)


def _load(jobs: Any) -> tuple[str, str, dict[str, Any]]:
    """What the parent sends first. Its classes are in packages whose ``__init__`` imports PyTorch,
    which takes seconds, and which nothing here needs: it is left out."""
    package = Path(__file__).parents[2]
    for name in ("nar_kernels", "nar_kernels.data", "nar_kernels.data.prepare"):
        module = ModuleType(name)
        module.__path__ = [str(package.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module
    return pickle.load(jobs)


if __name__ == "__main__":
    main()
