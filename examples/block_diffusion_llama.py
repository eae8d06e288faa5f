"""Block diffusion (BD3LM, arXiv:2503.09573) with a decoder of Hugging Face.

nar-kernels prepare notes/ --out notes-tokens
python examples/block_diffusion_llama.py notes-tokens
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nar_kernels import MaskedLoader, NetAdapter, NonAutoregressiveWrapper, TokenDataset

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}


def main(data: str, out: str = "runs/blocks", steps: int = 2000) -> torch.Tensor:
    dataset = TokenDataset(data, seq_len=128)
    config = LlamaConfig(vocab_size=dataset.num_tokens, num_attention_heads=4, **SIZES)
    llama = LlamaForCausalLM(config)
    # Blocks of 16 tokens are denoised at once, each given the clean ones before it.
    blocks = {"block_length": 16, "no_replace_prob": 0.0, "random_token_prob": 0.0}
    net = NetAdapter(llama, max_seq_len=128)
    model = NonAutoregressiveWrapper(net, mask_id=dataset.mask_id, **blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, batch in zip(range(steps), MaskedLoader(dataset, model.masking, batch_size=8)):
        loss = model(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}: {loss.item():.3f} nats a token")
    llama.save_pretrained(out)
    # Block after block; keys and values of finished ones are kept.
    return model.generate(2, strategy="random", filter_thres=None, steps=128)


if __name__ == "__main__":
    main(*sys.argv[1:])
