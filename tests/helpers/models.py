"""A small wrapped transformer, and a net that records what it is given."""

import torch
from torch import Tensor, nn
from x_transformers import Encoder, TransformerWrapper

from nar_kernels.nets.adapter import NetAdapter
from nar_kernels.wrapper import NonAutoregressiveWrapper
from tests.helpers.tiny import tiny_sizes

NUM_TOKENS, MASK_ID, LENGTH, BATCH = 12, 4, 10, 6


def make_net(dropout=0.0, **kwargs) -> TransformerWrapper:
    torch.manual_seed(0)
    return TransformerWrapper(
        num_tokens=NUM_TOKENS,
        max_seq_len=LENGTH,
        attn_layers=Encoder(dim=16, depth=1, heads=2, attn_dim_head=8, attn_dropout=dropout),
        **kwargs,
    )


class Recorder(nn.Module):
    """The simplest net: logits of each id by itself. Records what it is given."""

    num_tokens, max_seq_len = NUM_TOKENS, LENGTH

    def __init__(self, num_outputs: int = NUM_TOKENS) -> None:
        super().__init__()
        self.table = nn.Embedding(NUM_TOKENS, num_outputs)
        self.inputs: list[Tensor] = []
        self.kwargs: list[dict] = []

    def forward(self, ids: Tensor, **kwargs) -> Tensor:
        self.inputs.append(ids)
        self.kwargs.append(kwargs)
        return self.table(ids)


def clean_batch(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    ids = torch.randint(0, NUM_TOKENS - 1, (batch, length), generator=generator())
    return ids + (ids >= MASK_ID)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def make_model(net=None, **kwargs) -> NonAutoregressiveWrapper:
    return NonAutoregressiveWrapper(
        make_net() if net is None else net, **{"mask_id": MASK_ID, "steps": 4, **kwargs}
    )


def hugging_face_net() -> NetAdapter:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        **tiny_sizes(NUM_TOKENS, LENGTH),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    bert = BertForMaskedLM(config)
    head = bert.get_output_embeddings()
    nn.init.normal_(head.bias)
    return NetAdapter(bert, num_tokens=NUM_TOKENS, max_seq_len=LENGTH, head=head)


def masks_of(model, **kwargs) -> Tensor:
    model.net.inputs.clear()
    model(clean_batch(), **kwargs)
    return model.net.inputs[0] != clean_batch()
