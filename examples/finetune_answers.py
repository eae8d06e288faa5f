"""Fine-tunes on prompts and answers of any length, whole and packed into rows.

nar-kernels prepare pairs.jsonl --out pairs-tokens --tokenizer notes-tokens/tokenizer.json
python examples/finetune_answers.py pairs-tokens runs/notes-tokens/best.pt

A line of pairs.jsonl is {"prompt": "...", "completion": "..."}; the run is one on notes-tokens.
"""

import sys

import torch
from torch import Tensor

from nar_kernels import Corpus, PackedLoader, load_model


def main(data: str, checkpoint: str, out: str = "answers.pt", steps: int = 1000) -> list[Tensor]:
    model, spec = load_model(checkpoint)  # with the tokenizer of the data
    model.train()
    # Answers are masked, prompts are given: the corpus says which tokens are which.
    loader = PackedLoader(
        Corpus(data), spec.seq_len, model.masking, batch_size=8, overlong="truncate"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for step, batch in zip(range(steps), loader):
        loss = model(batch).loss  # a document attends to itself alone
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % 100 == 99:
            print(f"step {step + 1}: {torch.stack(losses[-100:]).mean():.3f} nats a token")
    torch.save(model.state_dict(), out)
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
