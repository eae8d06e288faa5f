"""The training loop.

The windows of a step, their masks, its dropout, and the noise of evaluation are functions of (seed,
step). So (step, weights, optimiser) is the whole state: a resumed run continues as if it had never
stopped, also with another number of processes.

Steps do not synchronise with the device: metrics stay there until ``Run.flush``.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nar_kernels import distributed
from nar_kernels.data.loader import MaskedLoader
from nar_kernels.data.packed_loader import PackedLoader
from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.data.sources import PackedData
from nar_kernels.extras import import_extra
from nar_kernels.likelihood import NATS_PER_BIT, evaluate, evaluate_documents
from nar_kernels.nets.adapter import NetAdapter
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.spec.philox import Stream, derived_seed
from nar_kernels.training import checkpoint, parallel
from nar_kernels.training.baselines import baselines
from nar_kernels.training.config import TrainConfig
from nar_kernels.training.cuda_graph import StepGraph, capture_stream
from nar_kernels.training.data import data_of
from nar_kernels.training.ema import Ema
from nar_kernels.training.hugging_face import described
from nar_kernels.training.interrupt import Interrupted, interruptible, raise_on_signals
from nar_kernels.training.lock import FolderLock
from nar_kernels.training.log import Log
from nar_kernels.training.model import (
    build_model,
    choose_bf16,
    choose_device,
    init_from_checkpoint,
    prepare,
    spec_of,
)
from nar_kernels.training.optim import (
    adamw,
    learning_rate,
    load_optimizer_state,
    local_batch_size,
    optimizer_state,
)
from nar_kernels.training.progress import Progress
from nar_kernels.training.report import (
    describe,
    draw_samples,
    environment,
    make_report,
    prepare_folder,
    remove_leftovers,
    summary,
    write_results,
)
from nar_kernels.training.step import DeferredMetrics, loss_and_gradient

_LOG_EVERY = 10  # steps


class DivergedError(RuntimeError):
    """Training diverged: the loss or its gradient is not finite."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs training as configured, data-parallel if launched by torchrun.

    Writes to ``config.folder``: ``last.pt`` and ``best.pt`` (checkpoints), ``report.json``,
    ``loss.png``, samples, and ``tb`` (TensorBoard). Only rank 0 writes (with ``shard``, each rank
    its shards), but all ranks must see the folder. No other run may use it at the same time:
    ``run.lock`` names the one that does.

    Returns:
        The contents of ``report.json``.

    Raises:
        ValueError, OSError: an option or the data is invalid, the folder already holds a run, or
            the disk is full.
        InvalidTokenError: the data holds an id outside the vocabulary.
        FolderInUseError: another run is using the folder; the message names it.
        ImportError: a package of the extra ``train`` is missing.
        DivergedError: the loss is not finite. The checkpoints are from before that.
        Interrupted: after Ctrl-C, SIGTERM or SIGUSR1; a subclass of KeyboardInterrupt. The first
            signal finishes the step and saves; a second one, or one before the first step or after
            the last, stops at once.
    """
    folder, last = config.folder, config.folder / "last.pt"
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: --out must name a folder, or a new one")
    with (
        raise_on_signals(),
        parallel.init_distributed(choose_device(config.device)) as device,
        FolderLock(folder) as lock,
    ):

        def claim(create: bool) -> None:
            if create or folder.is_dir():
                lock.acquire()
                check_overwrite(config)

        distributed.on_first_rank(lambda: claim(create=False))
        saved = checkpoint.read(last) if config.resume else None
        if saved is not None:
            config.refuse_to_continue(saved["config"], saved["loader"]["step"])
        config.check_device(device.type)
        spec = None if saved is None else spec_of(saved, last)
        run = Run(config, device, spec, None if saved is None else saved.get("net"))
        # No rank writes before all have checked. A new folder is created once all else is valid.
        distributed.barrier()
        distributed.on_first_rank(lambda: claim(create=True))
        if saved is not None:
            run.restore(last, saved)
        else:
            run.begin()
        try:
            run.fit()
            return run.finish()
        finally:
            run.release()


def check_overwrite(config: TrainConfig) -> None:
    """Raises FileExistsError if the folder holds a run, without ``resume`` or ``overwrite``."""
    if (config.folder / "last.pt").exists() and not (config.resume or config.overwrite):
        raise FileExistsError(
            f"{config.folder} holds a run: --resume continues it, --overwrite starts again, "
            "and --out names another folder"
        )


class Run:
    """The state of a training run, and its loop.

    Args:
        saved_spec: of the run that this one continues, whose data may have moved to files that say
            less of themselves.
        saved_net: of that run, whose ``net`` may have moved, too.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        saved_spec: SequenceSpec | None = None,
        saved_net: dict[str, str] | None = None,
    ) -> None:
        # Import all extras up front, rather than fail after an hour of training.
        for module in ("x_transformers", "tqdm", "matplotlib.figure", "torch.utils.tensorboard"):
            import_extra(module)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config, self.device = config, device
        self.bf16 = choose_bf16(config.precision, device)
        self.environment = environment(device, self.bf16)
        self.data = data_of(config, saved_spec)
        self.data.validate()
        # On the CPU there is no sync to avoid.
        self.flush_every = 1 if device.type == "cpu" else _LOG_EVERY
        self.metrics = DeferredMetrics()
        torch.manual_seed(config.seed)
        # `model` has the state dict keys of checkpoints; `trained` wraps it for data parallelism.
        self.model = build_model(config, self.data.spec, saved_net)
        if config.init is not None and not config.resume:
            init_from_checkpoint(self.model, config.init, config, self.data.spec)
        stream = capture_stream(device) if config.cuda_graph else None
        self.trained = prepare(self.model, config, device, stream)
        self.ema = Ema(self.model, config.ema) if config.ema else None
        self.loader = self.make_loader()
        self.graph: StepGraph | None = None
        if config.cuda_graph:
            assert isinstance(self.loader, MaskedLoader)
            self.graph = StepGraph(self.update, self.loader, stream)
        rate = None if self.graph is None else self.graph.rate
        self.optimizer = adamw(self.model, config, rate)
        self.noise_seed = derived_seed(config.seed, Stream.GENERATOR_SEED)
        self.log, self.progress = Log(), Progress(config)
        is_packed = isinstance(self.data, PackedData)
        self.baselines = baselines(
            self.data.train,
            self.data.held_out,
            None if isinstance(self.data, PackedData) else self.data.held_out_windows,
            per_position=self.data.spec.render == "image" and not is_packed,
        )

    def make_loader(self) -> MaskedLoader | PackedLoader:
        config, data = self.config, self.data
        batch_size = local_batch_size(config)
        where: dict[str, Any] = {
            "seed": config.seed,
            "views": config.views,
            "device": self.device,
            "rank": distributed.rank(),
            "world_size": distributed.world_size(),
        }
        if isinstance(data, PackedData):
            return PackedLoader(
                data.corpus,
                data.spec.seq_len,
                self.model.masking,
                batch_size,
                num_documents=data.train.last,
                overlong=config.overlong,  # type: ignore[arg-type]
                **where,
            )
        if data.train_classes is not None:
            where["classes"] = data.train_classes
            where["num_classes"] = data.spec.num_classes
            where["class_dropout_prob"] = config.class_dropout
        return MaskedLoader(
            data.train, self.model.masking, batch_size, shift_epochs=config.shift_epochs, **where
        )

    def begin(self) -> None:
        if distributed.rank() == 0:
            prepare_folder(self.config.folder)
        self.save("last.pt")

    def fit(self) -> None:
        """The training loop."""
        config, first = self.config, self.loader.step
        self.progress.say(describe(config, self.data, self.model, self.baselines, self.environment))
        alone, stops = distributed.world_size() == 1, False
        self.log.tick()
        if first == config.steps != self.log.last_evaluated():  # --steps lowered to what is done
            self.evaluate(first)
            self.save("last.pt")
        with interruptible(distributed.is_launched()) as interrupt, self.progress.running(first):
            steps = range(first, config.steps)
            for step, batch in zip(steps, self.batches(), strict=False):
                self.step(batch, step)

                done, is_last = step + 1, step + 1 == config.steps
                evaluates = is_last or done % config.eval_every == 0
                saves = is_last or done % config.save_every == 0
                # With several ranks, flush only at scheduled steps: it is collective.
                heard = interrupt.requested and alone
                if evaluates or saves or heard or done % self.flush_every == 0:
                    stops = self.flush(interrupt.requested)
                    if evaluates:
                        self.evaluate(done)
                    self.log.tick()
                    if saves or stops:
                        self.save("last.pt")
                        self.log.tick()
                    self.progress.log_if_due(self.state())
                if stops:
                    break
        if stops:
            signum = distributed.max_over_ranks(interrupt.signum or 0)
            if distributed.rank() == 0:
                print(
                    f"saved step {self.loader.step}; to continue: {config.how_to_resume}",
                    file=sys.stderr,
                )
            raise Interrupted(signum)

    def batches(self) -> Iterator[Corrupted | None]:
        """Those of the loader; None for a step in a CUDA graph, which makes its own."""
        return iter(self.loader) if self.graph is None else itertools.repeat(None)

    def step(self, batch: Corrupted | None, step: int) -> None:
        """One optimiser step. The loss, in nats, and the gradient norm go to ``metrics``."""
        config = self.config
        # Seed dropout for this step and rank, by the slot of the first window.
        first_slot = step * self.loader.global_batch + self.loader.rank * self.loader.batch_size
        torch.manual_seed((self.noise_seed + first_slot) % (1 << 63))
        rate = learning_rate(step, config)
        if self.graph is not None:
            loss, norm = self.graph(step, rate)
        else:
            assert batch is not None
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss, norm = self.update(batch)
        self.metrics.add(loss, norm)
        if self.ema is not None:
            self.ema.update(step)

    def update(self, batch: Corrupted) -> tuple[Tensor, Tensor]:
        """Gradient, clipping and optimiser; returns the loss and the gradient norm. A CUDA graph
        may hold it."""
        config = self.config
        loss = loss_and_gradient(
            self.trained, batch, config.accumulate, self.autocast, config.cuda_graph
        )
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, parallel.full_tensor(norm)

    def flush(self, stop: bool = False) -> bool:
        """Synchronises with the device and logs the steps since the last call; returns whether
        ``stop`` is true on any rank.

        Call it before evaluating or saving the weights: a non-finite gradient has ruined them.

        Raises:
            DivergedError: a loss or gradient norm is not finite.
            InvalidTokenError: a step in a CUDA graph met an id outside the vocabulary.
        """
        if self.graph is not None:
            self.graph.raise_if_invalid()
        losses, norms, stops = self.metrics.flush(stop)
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            self.check_finite("loss or gradient", loss + norm, len(self.log.losses) + i)
        self.log.add(losses)
        self.show(losses, norms)
        return stops

    def show(self, losses: list[float], norms: list[float]) -> None:
        done = len(self.log.losses)
        self.progress.advance(len(losses), self.state())
        if done % _LOG_EVERY == 0:
            values = {"bits_per_token": losses[-1] / NATS_PER_BIT, "gradient_norm": norms[-1]}
            values["learning_rate"] = learning_rate(done - 1, self.config)
            self.progress.plot(done, {f"train/{name}": value for name, value in values.items()})

    def evaluate(self, step: int) -> None:
        """Evaluates bits per token on the held-out windows; saves the best weights."""
        with self.ema_weights(), parallel.unsharded(self.model), self.autocast():
            net, data = self.model.net, self.data
            how: dict[str, Any] = {"draws": self.config.eval_draws, "device": self.device}
            how["block_length"] = self.config.block_length
            if isinstance(data, PackedData):
                result = evaluate_documents(net, data.held_out, **how)
            else:
                how["class_ids"] = data.held_out_classes
                result = evaluate(net, data.held_out, data.held_out_windows, **how)
        bits = result.bits_per_token
        self.check_finite("held-out loss", bits, step)
        self.log.curve.append((step, *result))
        if self.log.best()[0] == step:
            self.save("best.pt")
        self.progress.plot(step, {"held_out/bits_per_token": bits})
        self.progress.say(f"step {step:>6}: {bits:.4f} bits per token held out, {self.speed()}")

    def finish(self) -> dict[str, Any]:
        """Writes the report and samples; returns the report."""
        config, data = self.config, self.data
        report = make_report(config, data, self.model, self.log, self.baselines, self.environment)
        with self.ema_weights(), parallel.unsharded(self.model):
            ids = draw_samples(config, data, self.model)
        if distributed.rank() == 0:
            write_results(config, data, self.log, self.baselines, report, ids)
        self.progress.say(summary(report))
        return report

    def release(self) -> None:
        """Frees what must not outlive the process group."""
        if self.graph is not None:
            self.graph.release()

    def check_finite(self, what: str, value: float, steps: int) -> None:
        if not math.isfinite(value):
            raise DivergedError(
                f"the {what} is {value} after {steps} steps: try a lower --lr than "
                f"{self.config.lr}, or a longer --warmup; the last checkpoint is from before"
            )

    def save(self, name: str) -> None:
        state = {
            "config": self.config.to_dict(),
            "spec": self.data.spec._asdict(),
            "net": described(self.model.net.net)
            if isinstance(self.model.net, NetAdapter)
            else None,
            "environment": self.environment,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
            "loader": self.loader.state_dict(),
            "log": self.log.state_dict(),
        }
        checkpoint.save(self.config.folder / name, state)

    def restore(self, path: Path, state: dict[str, Any]) -> None:
        """Resumes from ``state``, as read from ``path`` by :func:`checkpoint.read`."""
        config, was = self.config, state["config"]
        self.check_corpus(state)
        self.loader.load_state_dict(state["loader"])
        if distributed.rank() == 0:
            remove_leftovers(config.folder)
        ours = self.model.state_dict()
        for name in ("model", "ema") if self.ema is not None else ("model",):
            state[name] = parallel.distribute_like(state[name], ours)
        state["optimizer"] = parallel.distribute_optimizer_state(state["optimizer"], self.optimizer)
        checkpoint.load_shards(path, state)
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.log.load_state_dict(state["log"])
        done = self.loader.step
        self.progress.say(
            f"resuming from step {done}: {config.steps - done} of {config.steps} remain"
        )
        if config.steps != was["steps"]:
            before = learning_rate(done, replace(config, steps=was["steps"]))
            self.progress.say(
                f"note: --steps was {was['steps']} and is {config.steps}; the learning rate falls "
                f"to zero over the new number, so it is {learning_rate(done, config):.1e} now "
                f"instead of {before:.1e}"
            )
        for name, now in self.environment.items():
            if now != (then := state["environment"].get(name, now)):
                self.progress.say(
                    f"note: {name} was {then} and is {now}; rounding may differ from here on"
                )

    def check_corpus(self, state: dict[str, Any]) -> None:
        """Raises ValueError unless the data, wherever it is, is what ``state`` was trained on."""
        ours, theirs = (
            [s["corpus_digest"] for s in loader.get("sources", [loader])]
            for loader in (self.loader.state_dict(), state["loader"])
        )
        if ours != theirs:
            was, now = state["config"]["data"], self.config.data
            digests = [", ".join(digest[:12] for digest in of) for of in (theirs, ours)]
            raise ValueError(
                f"cannot resume {self.config.folder}: --data was {was} and is {now} now, which "
                f"holds other tokens (corpus_digest {digests[0]} and {digests[1]}); give what the "
                "run was trained on, or start another run with another --out"
            )

    def ema_weights(self) -> AbstractContextManager[None]:
        """Context in which the model has its EMA weights, if it keeps any."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def state(self) -> str:
        rate = learning_rate(len(self.log.losses) - 1, self.config)
        return f"{self.speed()}, lr {rate:.1e}"

    def speed(self) -> str:
        seconds = max(self.log.step_seconds, 1e-9)
        tokens = len(self.log.losses) * self.config.batch_size * self.data.spec.seq_len
        loss = self.log.recent_loss() / NATS_PER_BIT
        return f"loss {loss:.3f} bits, {tokens / seconds / 1000:.1f}k tokens/s"
