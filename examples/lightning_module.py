"""A LightningModule and a LightningDataModule; a run resumes within an epoch, bit for bit.

nar-kernels prepare notes/ --out notes-tokens
python examples/lightning_module.py notes-tokens [CHECKPOINT]
"""

import sys
from typing import Any

import pytorch_lightning as pl
import torch
from x_transformers import Encoder, TransformerWrapper

from nar_kernels import Corrupted, MaskedLoader, NonAutoregressiveWrapper, TokenDataset


class Windows(pl.LightningDataModule):
    def __init__(self, data: str, model: NonAutoregressiveWrapper) -> None:
        super().__init__()
        self.dataset, self.masking = TokenDataset(data, seq_len=64), model.masking

    def train_dataloader(self) -> MaskedLoader:
        # Made here, where Lightning knows the ranks; it knows where each of them is.
        batch_size = 16 // self.trainer.world_size
        device = self.trainer.strategy.root_device
        return MaskedLoader(self.dataset, self.masking, batch_size, device=device)


class MaskedDiffusion(pl.LightningModule):
    def __init__(self, num_tokens: int, mask_id: int) -> None:
        super().__init__()
        layers = Encoder(dim=64, depth=2, heads=2, rotary_pos_emb=True)
        net = TransformerWrapper(num_tokens=num_tokens, max_seq_len=64, attn_layers=layers)
        self.model = NonAutoregressiveWrapper(
            net, mask_id=mask_id, no_replace_prob=0.0, random_token_prob=0.0
        )

    def training_step(self, batch: Corrupted, index: int) -> torch.Tensor:
        return self.model(batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(data: str, checkpoint: str | None = None, **trainer: Any) -> MaskedDiffusion:
    torch.manual_seed(0)
    corpus = TokenDataset(data, seq_len=64)
    module = MaskedDiffusion(corpus.num_tokens, corpus.mask_id)
    # Lightning's sampler of ranks is not needed: the loader takes the part of its rank.
    runner = pl.Trainer(**{"max_steps": 1000, "use_distributed_sampler": False, **trainer})
    runner.fit(module, datamodule=Windows(data, module.model), ckpt_path=checkpoint)
    return module


if __name__ == "__main__":
    main(*sys.argv[1:])
