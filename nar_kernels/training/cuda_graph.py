"""A training step in one CUDA graph: its windows and masks, forward, backward and optimiser.

Launching the kernels of a small net takes the host longer than the device takes to run them. With a
graph the host writes two numbers, the step and the learning rate, and launches once; what the
trainer does around that (dropout's seed, metrics, the moving average) are a few launches more.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nar_kernels import distributed
from nar_kernels.data.loader import MaskedLoader
from nar_kernels.data.staging import corpus_limits, free_memory
from nar_kernels.ops.corrupted import Corrupted

# Steps before the capture, in which kernels are compiled and the optimiser gets its state.
# DistributedDataParallel measures the first ten by events, which a capture does not allow.
_WARM_UP, _WARM_UP_DDP = 3, 11


def _check_loader(loader: MaskedLoader) -> None:
    """Raises ValueError for a loader on a GPU whose batches cannot be captured."""
    if loader.device.type != "cuda":
        return
    if loader.backend == "reference":
        raise ValueError(
            "--cuda-graph needs a kernel that makes batches, and neither Triton nor the CUDA "
            "extension of nar_kernels is here: install one (`nar-kernels doctor` says how), or use "
            "--no-cuda-graph"
        )
    if loader.corpus_memory == "mapped":
        corpus = loader.dataset.corpus
        on_device, on_host = corpus_limits(*free_memory(loader.device, loader.world_size))
        raise ValueError(
            "--cuda-graph needs the corpus in memory that kernels read, and corpus_memory is "
            f"'mapped' for {corpus.name}: its {corpus.nbytes} bytes are more than an eighth "
            f"of the free GPU memory, {on_device}, and either more than a quarter of the host's "
            f"for each process, {on_host}, or the system has refused to pin them (there is a "
            "warning, then); free memory, or use --no-cuda-graph"
        )


def capture_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for a capture, which the default one cannot have; None where there are no graphs."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class StepGraph:
    """``update`` of the batch of a step, captured with the making of that batch.

    The first calls run on the stream of the capture but are not captured. They are steps like all
    others: nothing is computed twice, or undone. Between calls the host may read and write the
    memory that the step works on, in place: evaluate, save, exchange weights for their average.

    Without a stream, as on a CPU, calls just run: the same code, without the graph.

    Args:
        update: from a batch to results. It must wait for nothing, and compute from what is in
            device memory: the learning rate from ``rate``. Without memory of its own, such as
            gradients, from one call to the next.
        loader: of the batches. On a GPU its corpus must be where kernels read it.
        stream: from :func:`capture_stream`: of the warm-up and the capture. A data-parallel model
            must have been made on it.

    Attributes:
        rate: float32 scalar on the device, the learning rate.

    Raises:
        ValueError: the corpus is neither in device nor in pinned memory, or no kernel reads it.
    """

    def __init__(
        self,
        update: Callable[[Corrupted], tuple[Tensor, ...]],
        loader: MaskedLoader,
        stream: torch.cuda.Stream | None,
    ) -> None:
        device = loader.device
        _check_loader(loader)
        self._update, self._loader = update, loader
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self.rate = torch.zeros((), dtype=torch.float32, device=device)
        self._first_invalid: Tensor | None = None
        self._warm_up = _WARM_UP if distributed.world_size() == 1 else _WARM_UP_DDP
        self._stream = stream
        self._graph: torch.cuda.CUDAGraph | None = None
        self._results: tuple[Tensor, ...] = ()

    def __call__(self, step: int, rate: float) -> tuple[Tensor, ...]:
        """Runs ``step`` with this learning rate, and advances the loader. The results are valid
        until the next call."""
        self._step.fill_(step)
        self.rate.fill_(rate)
        self._loader.step = step + 1
        if self._graph is not None:
            self._graph.replay()
        elif self._stream is None:
            self._results = self._run()
        elif self._warm_up > 0:
            self._warm_up -= 1
            current = torch.cuda.current_stream(self._loader.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self._results = self._run()
            current.wait_stream(self._stream)
        else:
            self._graph = torch.cuda.CUDAGraph()
            # Other threads, such as those of NCCL, may ask for events meanwhile.
            with torch.cuda.graph(
                self._graph, stream=self._stream, capture_error_mode="thread_local"
            ):
                self._results = self._run()
            self._graph.replay()
        return self._results

    def release(self) -> None:
        """Frees the graph and its memory; the last results are gone. The next call would capture
        again.

        Call it before the process group is destroyed: NCCL waits until no graph holds a collective
        of it. Going out of scope is not enough, since ``update`` is usually a method of what owns
        this object: a cycle.
        """
        if self._graph is not None:
            self._graph.reset()
        self._graph, self._results = None, ()

    def _run(self) -> tuple[Tensor, ...]:
        # The C++ kernel for CPUs takes the step from the host.
        step = int(self._step) if self._step.is_cpu else self._step
        batch = self._loader.batch(step)
        if self._first_invalid is None:
            self._first_invalid = torch.zeros_like(batch.invalid)
        is_first = ~self._first_invalid.any()
        self._first_invalid.copy_(torch.where(is_first, batch.invalid, self._first_invalid))
        return self._update(batch)

    def raise_if_invalid(self) -> None:
        """Synchronises with the device; raises the error of the first invalid batch, if any."""
        if self._first_invalid is not None:
            self._loader.raise_if_invalid(self._first_invalid)
