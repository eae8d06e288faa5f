"""Processes that encode: :func:`encode_all`."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from nar_kernels.data.prepare.batches import Batch
from nar_kernels.data.prepare.encode import Encoded, Encoder
from nar_kernels.data.tokenizer import tokenizer_from_json

_AHEAD = 3  # jobs that wait or run, for each worker

Job = list[Batch]


def encode_all(
    jobs: Iterator[Job], encoder: Encoder, num_workers: int
) -> Generator[tuple[Batch, Encoded], None, None]:
    """Each batch and its tokens, in order. One worker is this process.

    Raises:
        CorpusFormatError: of the first batch that cannot be encoded.
        ChildProcessError: a worker died.
    """
    if num_workers == 1:
        for job in jobs:
            for batch in job:
                yield batch, encoder.encode(batch)
        return
    # Workers are forked off a server that has imported what they need, where that exists: it takes
    # seconds, and memory that they share.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([__name__])
    fields = {name: value for name, value in vars(encoder).items() if name != "tokenizer"}
    arguments = encoder.tokenizer.to_json(), fields
    executor = ProcessPoolExecutor(num_workers, context, _begin, arguments)
    waiting: deque[tuple[Job, Future[list[Encoded]]]] = deque()
    try:
        for job in jobs:
            waiting.append((job, executor.submit(_encode, job)))
            if len(waiting) > num_workers * _AHEAD:
                yield from _results(waiting)
        while waiting:
            yield from _results(waiting)
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process died: of memory, if the system ran out of it (give fewer workers); "
            "or at its start, if your script calls prepare() outside of "
            "`if __name__ == '__main__':`"
        ) from error
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _results(
    waiting: deque[tuple[Job, Future[list[Encoded]]]],
) -> Iterator[tuple[Batch, Encoded]]:
    job, future = waiting.popleft()
    yield from zip(job, future.result(), strict=True)


_encoder: Encoder


def _begin(tokenizer: str, fields: dict[str, Any]) -> None:
    """Makes this process a worker."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, too
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # There are as many workers as cores; tokenizers has no other switch.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(tokenizer=tokenizer_from_json(tokenizer), **fields)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(job: Job) -> list[Encoded]:
    return [_encoder.encode(batch) for batch in job]
