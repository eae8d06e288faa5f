"""The training loop.

Which windows a step sees, how they are masked, and the noise of evaluation are functions of (seed,
step). So (step, weights, optimiser, PyTorch's generator) is all it takes to continue a run as if it
had never stopped.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from nar_kernels import checkpoint
from nar_kernels.config import TrainConfig
from nar_kernels.data import MaskedLoader
from nar_kernels.evaluate import NATS_PER_BIT, baselines, evaluate
from nar_kernels.interrupt import interruptible
from nar_kernels.masking import Corrupted
from nar_kernels.model import build_model, choose_bf16, choose_device
from nar_kernels.report import Log, describe, environment, prepare_folder, summary, write_results
from nar_kernels.sources import import_extra, open_data
from nar_kernels.wrapper import NonAutoregressiveWrapper

__all__ = ["DivergedError", "TrainConfig", "learning_rate", "loss_and_gradient", "train"]

_LOG_EVERY = 10  # steps


class DivergedError(RuntimeError):
    """The loss or its gradient is not finite."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains as ``config`` says.

    ``config.folder`` gets ``last.pt`` and ``best.pt`` (checkpoints), ``report.json``, ``loss.png``,
    samples, and ``tb`` (TensorBoard).

    Returns:
        What is in ``report.json``.

    Raises:
        ValueError, OSError: an option or the data is wrong, or the folder holds a run already.
        ImportError: a package of the extra ``train`` is missing.
        DivergedError: the loss is not finite. The checkpoints are from before.
        KeyboardInterrupt: after Ctrl-C. The first one finishes the step and saves; a second one
            does not wait.
    """
    last = config.folder / "last.pt"
    saved = checkpoint.load(last) if config.resume else None
    if saved is not None:
        config.refuse_to_continue(saved["config"])
    elif last.exists() and not config.overwrite:
        raise FileExistsError(
            f"{config.folder} holds a run: --resume continues it, --overwrite starts again, and "
            "--out names another folder"
        )
    run = Run(config)
    if saved is not None:
        run.restore(saved)
    else:
        prepare_folder(config.folder)
        run.save("last.pt")
    run.say(describe(run.config, run.data, run.model, run.baselines, run.environment))
    run.fit()
    report = write_results(run.config, run.data, run.model, run.log, run.baselines, run.environment)
    run.say(summary(report))
    return report


class Run:
    """Everything that training changes, and what it needs for that."""

    def __init__(self, config: TrainConfig) -> None:
        # All at once, rather than one after an hour of training.
        for module in ("x_transformers", "tqdm", "matplotlib.figure", "torch.utils.tensorboard"):
            import_extra(module)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config
        self.device = choose_device(config.device)
        self.bf16 = choose_bf16(config.precision, self.device)
        self.environment = environment(self.device, self.bf16)
        self.data = open_data(
            config.data,
            dtype=config.dtype,
            num_tokens=config.num_tokens,
            seq_len=config.seq_len,
            stride=config.stride,
            num_held_out=config.held_out,
        )
        torch.manual_seed(config.seed)
        self.model = build_model(config, self.data.spec).to(self.device)
        self.optimizer = adamw(self.model, config)
        self.loader = MaskedLoader(
            self.data.train,
            self.model.masking,
            config.batch_size,
            seed=config.seed,
            device=self.device,
        )
        self.log = Log()
        self.baselines = baselines(
            self.data.train,
            self.data.held_out,
            self.data.held_out_windows,
            per_position=self.data.spec.render == "image",
        )

    def fit(self) -> None:
        """The loop."""
        config, first = self.config, self.loader.step
        self.log.tick()
        with interruptible() as interrupt, self.board(first) as board, self.bar(first) as bar:
            steps = range(first, config.steps)
            for step, batch in zip(steps, self.loader, strict=False):
                started, rate = time.perf_counter(), learning_rate(step, config)
                loss, grad_norm = self.step(batch, rate)
                self.log.add(loss, time.perf_counter() - started)

                done, is_last = step + 1, step + 1 == config.steps
                bar.set_postfix_str(f"{self.speed()}, lr {rate:.1e}", refresh=False)
                bar.update()
                if done % _LOG_EVERY == 0:
                    board.add_scalar("train/bits_per_token", loss / NATS_PER_BIT, done)
                    board.add_scalar("train/gradient_norm", grad_norm, done)
                    board.add_scalar("train/learning_rate", rate, done)
                if done % config.eval_every == 0 or is_last:
                    bits = self.evaluate(done)
                    board.add_scalar("held_out/bits_per_token", bits, done)
                    self.say(f"step {done:>6}: {bits:.4f} bits per token held out, {self.speed()}")
                self.log.tick()
                if done % config.save_every == 0 or is_last or interrupt.requested:
                    self.save("last.pt")
                if interrupt.requested:
                    break
        if interrupt.requested:
            print(
                f"saved step {self.loader.step}; to continue: {config.how_to_resume}",
                file=sys.stderr,
            )
            raise KeyboardInterrupt

    def step(self, batch: Corrupted, learning_rate: float) -> tuple[float, float]:
        """One optimiser step; returns the loss, in nats, and the norm of the gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = loss_and_gradient(self.model, batch, self.config.accumulate, self.autocast)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip).item()
        self.check_finite("loss or gradient", loss + norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm

    def evaluate(self, step: int) -> float:
        """Bits per token on the held-out windows; keeps the best weights."""
        with self.autocast():
            result = evaluate(
                self.model.net,
                self.data.held_out,
                self.data.held_out_windows,
                draws=self.config.eval_draws,
                device=self.device,
            )
        self.check_finite("held-out loss", result.bits_per_token)
        self.log.curve.append((step, *result))
        if self.log.best()[0] == step:
            self.save("best.pt")
        return result.bits_per_token

    def check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise DivergedError(
                f"the {what} is {value} after {len(self.log.losses)} steps: try a lower --lr than "
                f"{self.config.lr}, or a longer --warmup; the last checkpoint is from before"
            )

    def save(self, name: str) -> None:
        state = {
            "config": self.config.to_dict(),
            "spec": self.data.spec._asdict(),
            "environment": self.environment,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
            "log": self.log.state_dict(),
        }
        checkpoint.save(self.config.folder / name, state)

    def restore(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state["loader"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.log.load_state_dict(state["log"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
        for name, now in self.environment.items():
            if now != (then := state["environment"].get(name)):
                self.say(f"note: {name} was {then} and is {now}; rounding may differ from here on")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def speed(self) -> str:
        seconds = max(self.log.step_seconds, 1e-9)
        tokens = len(self.log.losses) * self.config.batch_size * self.data.spec.seq_len
        loss = self.log.recent_loss() / NATS_PER_BIT
        return f"loss {loss:.3f} bits, {tokens / seconds / 1000:.1f}k tokens/s"

    def say(self, line: str) -> None:
        if not self.config.quiet:
            import_extra("tqdm").tqdm.write(line)  # above the progress bar
            sys.stdout.flush()  # or a log file would lag behind

    def bar(self, first: int) -> Any:
        """A progress bar on standard error, if that is a terminal."""
        return import_extra("tqdm").tqdm(
            total=self.config.steps,
            initial=first,
            unit="step",
            disable=self.config.quiet or None,
            dynamic_ncols=True,
        )

    def board(self, first: int) -> Any:
        """TensorBoard; what a killed run logged after its last checkpoint is dropped."""
        return import_extra("torch.utils.tensorboard").SummaryWriter(
            str(self.config.folder / "tb"), purge_step=first + 1
        )


def loss_and_gradient(
    model: NonAutoregressiveWrapper,
    batch: Corrupted,
    accumulate: int = 1,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """Adds the gradient of the batch's loss to the parameters; returns the loss, in nats.

    A batch in parts has the loss and the gradient of the whole batch, up to rounding: each part
    counts by its share of the positions that the loss is a mean over, not by its share of windows.
    """
    weighted = model.use_simple_mdlm_loss_weight

    def size(part: Corrupted) -> int:
        return int((part.num_maskable if weighted else part.num_masked).sum())

    total, loss = max(size(batch), 1), 0.0
    device = next(model.parameters()).device
    for part in batch.microbatches(-(-len(batch) // accumulate)):
        with autocast():
            part_loss = model(part.to(device)).loss * (size(part) / total)
        part_loss.backward()
        loss += part_loss.item()
    return loss


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine, which reaches zero after the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings, but neither biases nor norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)
