"""Iterative unmasking: from a row of masks to token ids, in plain PyTorch.

Ghazvininejad et al. 2019 (Mask-Predict, arXiv:1904.09324), Chang et al. 2022 (MaskGIT,
arXiv:2202.04200). Shapes: B batch, L sequence length, V vocabulary, K positions in question.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nar_kernels.philox import Stream, words
from nar_kernels.schedules import Schedule

# Below this, a temperature only loses precision: the sample is the argmax already.
MIN_TEMPERATURE = 1e-3


def noise_generator(
    seed: int, use: Stream, device: torch.device | str = "cpu", slot: int = 0
) -> torch.Generator:
    """A fresh generator on ``device`` for one use of ``seed``.

    Philox mixes the seed first: PyTorch's CPU generator reads only 32 bits of the one it is given.
    """
    position = 2 * int(use) + torch.arange(2)
    low, high = words(seed, Stream.GENERATOR_SEED, torch.tensor(slot), position).tolist()
    return torch.Generator(device).manual_seed(high << 32 | low)


def num_masked_after(schedule: Schedule, steps: int, length: int) -> list[int]:
    """How many of ``length`` positions are masked after each step: ``floor(m((i + 1) / steps) L)``.

    In float32, as x-transformers counts. Never rises, and ends at 0 whatever the schedule.
    """
    times = torch.linspace(0, 1, steps + 1)[1:]
    ratios = torch.tensor([float(schedule(t)) for t in times])
    counts = (ratios * length).long().clamp(0, length).cummin(0).values.tolist()
    return [*counts[:-1], 0]


def gumbel(random_bits: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 and finite, from int32 words in [0, 2**31).

    -log(-log(1 - u)): the resolution of u near 0 becomes the upper tail, which decides which token
    wins. It reaches 22; 24-bit uniforms would stop at 16 and lose tokens of small probability.
    """
    u = (random_bits.float() + 0.5) * 2**-31
    return -torch.log(-torch.log1p(-u.clamp(max=1 - 2**-24)))


def gumbel_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """float32 noise of ``shape`` on the generator's device."""
    bits = torch.empty(shape, dtype=torch.int32, device=generator.device)
    return gumbel(bits.random_(generator=generator))


def exclude_mask_id(logits: Tensor, mask_id: int) -> Tensor:
    """``logits`` in float32, with -inf for ``mask_id``."""
    is_mask_id = torch.arange(logits.shape[-1], device=logits.device) == mask_id
    return logits.float().masked_fill(is_mask_id, -torch.inf)


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """``logits`` with -inf for all but the ``k`` largest of each row."""
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1, sorted=False)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, values)


def sample(logits: Tensor, temperature: float, mask_id: int, generator: torch.Generator) -> Tensor:
    """Ids drawn from ``softmax(logits / temperature)``, by Gumbel-max.

    ``logits`` come from :func:`exclude_mask_id`. A row of nothing but -inf gives some id that is
    not ``mask_id`` either.
    """
    noise = gumbel_noise(logits.shape, generator)
    ids = (logits / max(temperature, MIN_TEMPERATURE) + noise).argmax(-1)
    return torch.where(ids == mask_id, int(mask_id == 0), ids)


def decode(
    predict: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    num_masked: Sequence[int],
    *,
    mask_id: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    critic: Callable[[Tensor], Tensor] | None = None,
    critic_noise: float = 1.0,
    remask: bool = False,
    on_step: Callable[[int, Tensor, Tensor], object] | None = None,
) -> Tensor:
    """Fills a batch of masks step by step, most trusted positions first.

    Each step samples all masked positions, then masks those again that are trusted least. Both
    temperature and critic noise fall linearly and are 0 at the last step.

    Args:
        predict: from ids ``[B, L]`` to logits ``[B, L, V]``.
        shape: (B, L).
        num_masked: how many positions stay masked after each step; must not rise, and end at 0.
        mask_id: what stands at masked positions, and is never sampled.
        generator: source of all noise; its device is where everything happens.
        temperature: of the first step, at least 0.
        top_k: sample among the k most probable ids only.
        critic: from ids ``[B, L]`` to scores ``[B, L]``, higher where an id looks wrong. Without
            it, a position is trusted by the probability of its id.
        critic_noise: scale of Gumbel noise on the critic's scores.
        remask: whether positions filled in an earlier step may be masked again.
        on_step: called after each step with its number, the ids and bool ``[B, L]``, true where
            still masked. It must not change them.

    Returns:
        int64 ``[B, L]`` without ``mask_id``.
    """
    batch, length = shape
    device = generator.device
    rows = torch.arange(batch, device=device)[:, None]
    everywhere = torch.arange(length, device=device).expand(batch, length)
    ids = torch.full((batch, length), mask_id, device=device)
    masked = everywhere  # [B, K], the positions still masked

    for step, num_left in enumerate(num_masked):
        annealing = 1 - (step + 1) / len(num_masked)
        candidates = everywhere if remask else masked

        logits = exclude_mask_id(predict(ids)[rows, candidates], mask_id)
        if top_k is not None:
            logits = filter_top_k(logits, top_k)
        sampled = sample(logits, temperature * annealing, mask_id, generator)
        current = ids.gather(1, candidates)
        filled = torch.where(current == mask_id, sampled, current)
        ids = ids.scatter(1, candidates, filled)

        if num_left > 0:
            if critic is None:
                doubt = -logits.log_softmax(-1).gather(-1, filled[..., None]).squeeze(-1)
            else:
                doubt = critic(ids).gather(1, candidates).float()
                doubt += critic_noise * annealing * gumbel_noise(doubt.shape, generator)
            masked = candidates.gather(1, doubt.topk(num_left, dim=1).indices)
            ids = ids.scatter(1, masked, mask_id)

        if on_step is not None:
            on_step(step, ids, ids == mask_id)
        if num_left == 0:
            break
    return ids
