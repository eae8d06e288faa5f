"""Class-conditional images (MaskGIT, arXiv:2202.04200) from VQ codes, with guidance.

python examples/class_conditional_images.py codes.npy labels.npy    # integers [N, h, w] and [N]
"""

import sys

import numpy as np
import torch
from x_transformers import Encoder, TransformerWrapper

from nar_kernels import MaskedLoader, NonAutoregressiveWrapper, TokenDataset


def main(codes: str, labels: str, steps: int = 2000) -> torch.Tensor:
    images, classes = np.load(codes), np.load(labels)
    mask_id, num_classes, grid = int(images.max()) + 1, int(classes.max()) + 1, images.shape[1:]
    size = {"num_tokens": mask_id + 1, "mask_id": mask_id}
    dataset = TokenDataset(images.reshape(-1), grid[0] * grid[1], **size)
    layers = Encoder(dim=128, depth=4, heads=4)
    ids = {"num_tokens": mask_id + 1, "embed_num_tokens": {"class": num_classes + 1}}
    net = TransformerWrapper(max_seq_len=dataset.seq_len, attn_layers=layers, **ids)
    model = NonAutoregressiveWrapper(net, mask_id=mask_id, schedule="cosine")
    # One in ten is not told its class, whatever the epoch: for guidance.
    loader = MaskedLoader(dataset, model.masking, 32, classes=classes, class_dropout_prob=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, batch in zip(range(steps), loader):
        loss = model(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}: {loss.item():.3f} nats a token")
    each = {"class_ids": torch.arange(num_classes), "guidance_scale": 2.0}
    return model.generate(num_classes, strategy="halton", grid=grid, **each).view(-1, *grid)


if __name__ == "__main__":
    np.save("samples.npy", main(*sys.argv[1:]).numpy())
