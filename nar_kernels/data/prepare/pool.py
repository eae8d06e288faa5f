"""Processes that encode: :func:`encode_all`."""

import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from nar_kernels.data.prepare.batches import Batch
from nar_kernels.data.prepare.encode import Encoded, Encoder

_WORKER = Path(__file__).with_name("worker.py")
_AHEAD = 3  # jobs that wait or run, for each worker

Job = list[Batch]


def encode_all(
    jobs: Iterator[Job], encoder: Encoder, num_workers: int
) -> Generator[tuple[Batch, Encoded], None, None]:
    """Each batch and its tokens, in order. A single worker is this process.

    Raises:
        CorpusFormatError: of the first batch that cannot be encoded.
        ChildProcessError: a worker died.
    """
    if num_workers == 1:
        for job in jobs:
            for batch in job:
                yield batch, encoder.encode(batch)
        return
    workers = _Workers(encoder)
    # A thread for each worker, which waits for it.
    threads = ThreadPoolExecutor(num_workers)
    waiting: deque[tuple[Job, Future[list[Encoded]]]] = deque()
    try:
        for job in jobs:
            waiting.append((job, threads.submit(workers.encode, job)))
            if len(waiting) > num_workers * _AHEAD:
                yield from _results(waiting)
        while waiting:
            yield from _results(waiting)
    finally:
        for _, future in waiting:
            future.cancel()
        workers.kill()
        threads.shutdown()
        workers.close()


def _results(
    waiting: deque[tuple[Job, Future[list[Encoded]]]],
) -> Iterator[tuple[Batch, Encoded]]:
    job, future = waiting.popleft()
    yield from zip(job, future.result(), strict=True)


class _Workers:
    """Runs ``worker.py`` in a process for each thread that asks.

    Not by ``multiprocessing``, which would import the script that called :func:`prepare` in each
    process, and with it PyTorch: seconds, and hundreds of megabytes.
    """

    def __init__(self, encoder: Encoder) -> None:
        fields = {name: value for name, value in vars(encoder).items() if name != "tokenizer"}
        tokenizer = encoder.tokenizer
        self._start = pickle.dumps((tokenizer.to_json(), tokenizer.name, fields))
        self._of_thread = threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._is_ended = False
        self._lock = threading.Lock()

    def encode(self, job: Job) -> list[Encoded]:
        process = self._process()
        try:
            _send(process, pickle.dumps(job))
            answer = pickle.load(process.stdout)  # type: ignore[arg-type]
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise ChildProcessError(
                f"a worker process died with status {process.wait()}: if the system ran out of "
                "memory, give fewer workers"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _process(self) -> subprocess.Popen[bytes]:
        process: Any = getattr(self._of_thread, "process", None)
        if process is None:
            with self._lock:
                if self._is_ended:
                    raise ChildProcessError("the run has ended")
                process = subprocess.Popen(
                    # -I: nothing is imported from the folder of the script.
                    [sys.executable, "-I", str(_WORKER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    # Ctrl-C is for this process, which ends the others: so does the end of a pipe.
                    start_new_session=True,
                )
                self._processes.append(process)
            self._of_thread.process = process
            _send(process, pickle.dumps(sys.path) + self._start)
        return process

    def kill(self) -> None:
        """Ends all workers, whatever they are at."""
        with self._lock:
            self._is_ended = True
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):  # what it was still to be sent
                    pipe.close()


def _send(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(data)
    process.stdin.flush()
