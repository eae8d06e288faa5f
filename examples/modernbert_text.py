"""A masked diffusion language model: ModernBERT from a config, on text in byte-pair tokens.

nar-kernels prepare notes/ --out notes-tokens
python examples/modernbert_text.py notes-tokens
"""

import sys

import torch
from transformers import ModernBertConfig, ModernBertForMaskedLM

from nar_kernels import MaskedLoader, NetAdapter, NonAutoregressiveWrapper, TokenDataset

ONLY_MASKS = {"no_replace_prob": 0.0, "random_token_prob": 0.0}
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}


def main(data: str, out: str = "runs/modernbert", steps: int = 2000) -> torch.Tensor:
    dataset = TokenDataset(data, seq_len=128)
    ids = {"vocab_size": dataset.num_tokens, "pad_token_id": None}
    bert = ModernBertForMaskedLM(ModernBertConfig(num_attention_heads=4, **SIZES, **ids))
    net = NetAdapter(bert, max_seq_len=128)
    model = NonAutoregressiveWrapper(net, mask_id=dataset.mask_id, **ONLY_MASKS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, batch in zip(range(steps), MaskedLoader(dataset, model.masking, batch_size=16)):
        loss = model(batch).loss  # a bound on the negative log-likelihood, in nats a token
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}: {loss.item():.3f}")
    bert.save_pretrained(out)
    return model.generate(4, strategy="random", filter_thres=None, steps=128)


if __name__ == "__main__":
    main(*sys.argv[1:])
