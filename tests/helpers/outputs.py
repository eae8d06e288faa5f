"""What the operations return."""

import hashlib

import torch

from nar_kernels import MaskingConfig, corrupt, masked_nll, unmask


def digest() -> str:
    """Of what the operations return."""
    generator = torch.Generator().manual_seed(0)
    batch = corrupt(torch.arange(64).view(4, 16), MaskingConfig(65, 64), seed=1)
    hidden = torch.randn(4, 16, 8, generator=generator)
    logits = torch.randn(64, 65, generator=generator)
    weight = torch.randn(65, 8, generator=generator)
    drawn = unmask(logits, mask_id=64, seed=2, noise_slots=torch.arange(64), top_k=5)
    outputs = [batch.input_ids, batch.loss_weight, drawn.tokens, drawn.log_prob]
    outputs.append(masked_nll(hidden, weight, batch, reduction="none"))
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in outputs)).hexdigest()
