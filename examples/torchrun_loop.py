"""A training loop of PyTorch alone, for any number of processes; the number may change on a resume.

nar-kernels prepare notes/ --out notes-tokens
torchrun --nproc-per-node 2 examples/torchrun_loop.py notes-tokens
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from x_transformers import Encoder, TransformerWrapper

from nar_kernels import MaskedLoader, NonAutoregressiveWrapper, TokenDataset


def main(
    data: str, out: str = "runs/torchrun.pt", steps: int = 1000, save_every: int = 100
) -> None:
    dist.init_process_group()
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{dist.get_rank() % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    dataset = TokenDataset(data, seq_len=64)
    layers = Encoder(dim=64, depth=2, heads=2, rotary_pos_emb=True)
    net = TransformerWrapper(num_tokens=dataset.num_tokens, max_seq_len=64, attn_layers=layers)
    model = NonAutoregressiveWrapper(
        net, mask_id=dataset.mask_id, no_replace_prob=0.0, random_token_prob=0.0
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # Of a global batch of 16; ranks are those of the process group.
    loader = MaskedLoader(dataset, model.masking, 16 // dist.get_world_size(), device=device)
    if Path(out).exists():
        saved = torch.load(out, map_location=device)
        loader.load_state_dict(saved["loader"])
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    parallel = DistributedDataParallel(model)

    for step, batch in zip(range(loader.step, steps), loader):
        loss = parallel(batch).loss  # over the tokens of all ranks
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % save_every == 0 and dist.get_rank() == 0:
            print(f"step {step + 1}: {loss.item():.3f} nats a token")
            state = {"model": model, "optimizer": optimizer, "loader": loader}
            torch.save({name: part.state_dict() for name, part in state.items()}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
