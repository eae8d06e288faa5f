"""`NetAdapter`: logits of any output, and models of Hugging Face."""

import copy
import math

import pytest
import torch
from torch import nn

from nar_kernels.nets.adapter import NetAdapter
from tests.helpers.models import (
    LENGTH,
    NUM_TOKENS,
    Recorder,
    clean_batch,
    make_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("output", ["tensor", "tuple", "logits"])
def test_adapter_takes_logits_from_any_output(output):
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Net(Recorder):
        def forward(self, ids, **kwargs):
            logits = super().forward(ids, **kwargs)
            return {"tensor": logits, "tuple": (logits, None), "logits": Output(logits)}[output]

    torch.manual_seed(0)
    net = Net()
    model = make_model(NetAdapter(net, num_tokens=NUM_TOKENS, max_seq_len=LENGTH))
    losses = model(clean_batch(), seed=0)
    torch.manual_seed(0)
    assert losses == make_model(Recorder())(clean_batch(), seed=0)
    assert model.generate().shape == (LENGTH,)


def test_adapter_refuses_what_holds_no_logits():
    net = NetAdapter(nn.Identity(), num_tokens=NUM_TOKENS, max_seq_len=LENGTH)
    with pytest.raises(TypeError, match="Identity returned dict"):
        net({"a": 1})


def test_hugging_face_masked_lm():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    net = NetAdapter(
        transformers.BertForMaskedLM(config), num_tokens=config.vocab_size, max_seq_len=LENGTH
    )
    critic_config = copy.deepcopy(config)
    critic_config.num_labels = 1
    critic = transformers.BertForTokenClassification(critic_config)
    model = make_model(
        net, token_critic=NetAdapter(critic, num_tokens=NUM_TOKENS, max_seq_len=LENGTH)
    )
    batch = clean_batch(1).expand(16, -1)
    attention_mask = torch.ones_like(batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        losses = model(batch, attention_mask=attention_mask)
        losses.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses.generator_loss.item() < 0.5 * math.log(NUM_TOKENS)
    generated = model.generate(4, seed=0)
    assert (generated == batch[0]).float().mean() > 0.8
