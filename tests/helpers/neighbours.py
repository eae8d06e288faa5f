"""A net whose logits depend on the whole sequence, but by integers: equal in any batch."""

import torch
from torch import Tensor, nn

from nar_kernels import NonAutoregressiveWrapper

NUM_TOKENS, MASK_ID, LENGTH = 12, 8, 16


class Neighbours(nn.Module):
    """Keeps what it was asked."""

    num_tokens, max_seq_len = NUM_TOKENS, LENGTH

    def __init__(self) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(0)
        self.table = 2 * torch.randn(97, NUM_TOKENS, generator=noise)
        self.asked: list[Tensor] = []

    def forward(self, ids: Tensor, shift: int | Tensor = 0) -> Tensor:
        self.asked.append(ids)
        both = ids.roll(1, 1) * 3 + ids.roll(-1, 1) * 11
        place = torch.arange(ids.shape[1]) * 29
        return self.table[(ids * 5 + both + place + ids.sum(1, keepdim=True) + shift) % 97]


def neighbours(net: nn.Module | None = None, **options) -> NonAutoregressiveWrapper:
    return NonAutoregressiveWrapper(net or Neighbours(), mask_id=MASK_ID, **options)
