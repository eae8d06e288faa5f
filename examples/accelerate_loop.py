"""A training loop of Accelerate, which resumes bit for bit.

nar-kernels prepare notes/ --out notes-tokens
accelerate launch examples/accelerate_loop.py notes-tokens
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from x_transformers import Encoder, TransformerWrapper

from nar_kernels import MaskedLoader, NonAutoregressiveWrapper, TokenDataset


def main(data: str, out: str = "runs/accelerate", steps: int = 1000, save_every: int = 100) -> None:
    accelerator = Accelerator(project_dir=out)
    torch.manual_seed(0)
    dataset = TokenDataset(data, seq_len=64)
    net = TransformerWrapper(
        num_tokens=dataset.num_tokens,
        max_seq_len=64,
        attn_layers=Encoder(dim=64, depth=2, heads=2, rotary_pos_emb=True),
    )
    model = NonAutoregressiveWrapper(
        net, mask_id=dataset.mask_id, no_replace_prob=0.0, random_token_prob=0.0
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # Each process takes its part of a batch by itself, on its device: the loader is not prepared.
    batch_size = 16 // accelerator.num_processes
    loader = MaskedLoader(dataset, model.masking, batch_size, device=accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(loader)  # masks are a function of its step
    if (Path(out) / "checkpoint").exists():
        accelerator.load_state(f"{out}/checkpoint")

    for step, batch in zip(range(loader.step, steps), loader):
        loss = model(batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % save_every == 0:
            accelerator.print(f"step {step + 1}: {loss.item():.3f} nats a token")
            accelerator.save_state(f"{out}/checkpoint")


if __name__ == "__main__":
    main(*sys.argv[1:])
