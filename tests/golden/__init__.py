"""Outputs that an earlier version wrote, which later ones must give again bit for bit: batches,
samples, losses and a run's checkpoint.

They are the same on every machine: the net's weights and sums are multiples of 1/8, which float32
holds exactly. ``python -m tests.golden`` writes them anew, which is right only where results are
meant to change: seeds, and what users have made with them, change then too.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nar_kernels import (
    MaskedLoader,
    MaskingConfig,
    NonAutoregressiveWrapper,
    TokenDataset,
    TrainConfig,
    corrupt,
    unmask,
)
from nar_kernels.train import train
from nar_kernels.training import checkpoint

FOLDER = Path(__file__).resolve().parent
OUTPUTS = FOLDER / "outputs.npz"
CHECKPOINT = FOLDER / "last.pt"
NUMBERS = FOLDER / "numbers.json"

V, L, D = 24, 16, 8
MASK = V - 1


class ExactNet(nn.Module):
    """A net whose sums are exact, so that no machine rounds them in another way."""

    num_tokens, max_seq_len, emb_dim = V, L, D
    batch_independent = True

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)

        def eighths(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randint(-8, 9, shape, generator=draw) / 8)

        self.embedding, self.positions, self.weight = eighths(V, D), eighths(L, D), eighths(V, D)

    def forward(
        self,
        ids: Tensor,
        return_embeddings: bool = False,
        return_logits_and_embeddings: bool = False,
        sum_embeds: Tensor | float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        own = self.embedding[ids] + self.positions + sum_embeds
        hidden = own + own.roll(1, 1) / 2 - own.roll(-2, 1)
        if return_embeddings:
            return hidden
        logits = hidden @ self.weight.T
        return (logits, hidden) if return_logits_and_embeddings else logits


class ExactCritic(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return ((ids * 7 + torch.arange(L) * 3) % 11 / 8)[..., None]


def wrapper(**options: object) -> NonAutoregressiveWrapper:
    return NonAutoregressiveWrapper(ExactNet(), mask_id=MASK, steps=6, **options)


def masking_configs() -> dict[str, MaskingConfig]:
    return {
        "linear": MaskingConfig(V, MASK),
        "bernoulli": MaskingConfig(V, MASK, draw="bernoulli", times="uniform"),
        "cosine": MaskingConfig(V, MASK, schedule="cosine", never_mask_ids=(3,)),
        "bert": MaskingConfig(
            V, 0, no_replace_prob=0.15, random_token_prob=0.1, corruption_prob=0.5
        ),
    }


def corpus(mask_id: int) -> np.ndarray:
    ids = np.random.default_rng(3).integers(0, V - 1, 3000).astype(np.uint16)
    return ids + (mask_id == 0)


def batches() -> dict[str, Tensor]:
    found = {}
    for name, masking in masking_configs().items():
        data = TokenDataset(
            corpus(masking.mask_id), L, num_tokens=V, mask_id=masking.mask_id, stride=8
        )
        loader = MaskedLoader(data, masking, 6, seed=11)
        parts = loader.batch(0), loader.batch(1), loader.batch(70)
        for field in ("input_ids", "labels", "times", "loss_weight", "masked_rows"):
            found[f"batches/{name}/{field}"] = torch.cat([getattr(part, field) for part in parts])
        clean = parts[0].clean_ids
        masked = corrupt(clean, masking, seed=2**63 + 5, sample_ids=torch.arange(6) * 5)
        found[f"corrupt/{name}/input_ids"] = masked.input_ids
    return found


def samples() -> dict[str, Tensor]:
    plain = wrapper()
    prompt = torch.arange(5) % 4
    critic = wrapper(token_critic=ExactCritic())
    self_cond = wrapper(self_cond=True)
    with torch.no_grad():
        self_cond.null_embed.fill_(0.125)
        self_cond.to_self_cond.weight.copy_(torch.eye(D))
    found = {
        strategy: plain.generate(5, seed=7, strategy=strategy)
        for strategy in ("confidence", "margin", "entropy", "threshold", "random", "halton")
    }
    found |= {
        "critic": critic.generate(5, seed=7),
        "self_cond": self_cond.generate(5, seed=7),
        "x_transformers_arguments": critic.generate(3, 0.5, 0.9, 2.0, seed=8),
        "noisy": plain.generate(5, seed=7, choice_temperature=4.5, filter_thres=None),
        "remask": plain.generate(5, seed=7, can_mask_prev_unmasked=True),
        "blocks": plain.generate(5, seed=7, block_length=4, strategy="margin"),
        "prompt": plain.generate(4, seed=9, prompt=prompt),
        "guided": plain.generate(4, seed=9, prompt=prompt, guidance_scale=2.0),
        "processed": plain.generate(
            4, seed=9, logits_processor=lambda logits, rows: logits - rows[:, None] % 2
        ),
        "sequences_from_3": plain.generate(3, seed=7, first_sequence=3),
        "alone": plain.generate(seed=7),
    }
    return {f"samples/{name}": ids for name, ids in found.items()}


def unmasked() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randint(-40, 41, (9, 300), generator=draw) / 8
    found = {}
    for confidence in ("probability", "margin", "entropy"):
        result = unmask(
            logits,
            mask_id=300,
            seed=4,
            noise_slots=torch.arange(9) * 3,
            temperature=0.7,
            top_k=50,
            forbidden_ids=(1, 2, 3),
            confidence=confidence,
        )
        found |= {f"unmask/{confidence}/{name}": x for name, x in result._asdict().items()}
    return found


def outputs() -> dict[str, Tensor]:
    """Every output, by name."""
    return batches() | samples() | unmasked()


def losses() -> dict[str, float]:
    """Of the wrapper: up to rounding, which machines do in another order."""
    ids = torch.from_numpy(corpus(MASK)[: 4 * L].astype(np.int64)).view(4, L)
    models = {
        "nelbo": wrapper(),
        "mean": wrapper(use_simple_mdlm_loss_weight=False, schedule="cosine"),
        "critic": wrapper(token_critic=ExactCritic()),
    }
    return {name: model(ids, seed=13).loss.item() for name, model in models.items()}


def train_options() -> dict[str, object]:
    """Of a run that takes a second."""
    return {
        **{"data": "digits", "dim": 8, "depth": 1, "heads": 2, "ema": 0.9, "batch_size": 16},
        **{"steps": 12, "warmup": 2, "eval_every": 4, "save_every": 4, "eval_draws": 1},
        **{"seed": 3, "device": "cpu", "quiet": True},
    }


def continued_bits(folder: Path) -> float:
    """Bits per token of the run in a folder, when it has made four steps more."""
    saved = checkpoint.read(folder / "last.pt")["config"]
    train(TrainConfig.continued(saved, out=folder, resume=True, steps=16, quiet=True))
    return json.loads((folder / "report.json").read_text())["bits_per_token"]
