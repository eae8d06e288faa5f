"""Block diffusion in nets: a training step is what its blocks are one by one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_kernels import (
    Corrupted,
    MaskingConfig,
    NetAdapter,
    NonAutoregressiveWrapper,
    block_diffusion_inputs,
    corrupt,
    dense_block_mask,
)

V, MASK, L = 41, 40, 24


def x_transformers_net() -> nn.Module:
    x_transformers = pytest.importorskip("x_transformers")
    layers = x_transformers.Encoder(
        dim=32, depth=2, heads=2, attn_flash=True, rotary_pos_emb=True, verbose=False
    )
    return x_transformers.TransformerWrapper(
        num_tokens=V, max_seq_len=L, use_abs_pos_emb=False, attn_layers=layers
    )


def decoder(family: str, attention: str = "sdpa") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        use_cache=False,
        attn_implementation=attention,
    )
    net = getattr(transformers, f"{family}ForCausalLM")(config)
    return NetAdapter(net, num_tokens=V, max_seq_len=L, head=net.get_output_embeddings())


NETS = {
    "x-transformers": x_transformers_net,
    "Llama": lambda: decoder("Llama"),
    "Llama, eager": lambda: decoder("Llama", "eager"),
    "Qwen3": lambda: decoder("Qwen3"),
}


def wrapper_of(net: nn.Module, block_length: int, **options: Any) -> NonAutoregressiveWrapper:
    return NonAutoregressiveWrapper(
        net.double(),
        mask_id=MASK,
        block_length=block_length,
        no_replace_prob=0.0,
        random_token_prob=0.0,
        **options,
    )


def logits_of(net: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    if not isinstance(net, NetAdapter):
        return net(ids, attn_mask=mask)
    if net.net.config._attn_implementation == "eager":
        mask = torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, -1e300)
    return net(ids, attention_mask=mask)


def loss_by_block(net: nn.Module, clean: Tensor, batch: Corrupted, block_length: int) -> Tensor:
    """Each block after the clean ones before it, in a call of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for block, first in enumerate(range(0, clean.shape[1], block_length)):
        part = slice(first, first + block_length)
        ids = torch.cat([clean[:, :first], batch.input_ids[:, part]], 1)
        mask = dense_block_mask(ids.shape[1], min(block_length, ids.shape[1]), noisy=False)
        logits = logits_of(net, ids, mask)[:, first:]
        nll = F.cross_entropy(logits.mT, batch.labels[:, part], reduction="none")
        total = total + (nll * batch.loss_weight[:, block, None]).sum()
    return total / batch.num_maskable.sum()


@pytest.mark.seconds
@pytest.mark.parametrize("block_length", [1, 8, 10, L])
@pytest.mark.parametrize("name", NETS)
def test_a_step_is_its_blocks_one_by_one(name: str, block_length: int) -> None:
    torch.manual_seed(0)
    net = NETS[name]()
    model = wrapper_of(net, block_length)
    clean = torch.randint(0, MASK, (2, L))
    batch = corrupt(clean, model.masking, seed=3)
    expected = loss_by_block(net, clean, batch, block_length)
    expected.backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    loss = model(clean, seed=3).loss
    tolerance = 1e-6 if "eager" in name else 1e-12  # its softmax is in float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    loss.backward()
    # Hugging Face's norms are in float32.
    tolerance = 1e-11 if name == "x-transformers" else 1e-6
    trained = [p for p in net.parameters() if p.grad is not None]
    for p, gradient in zip(trained, gradients, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=0, atol=tolerance)
    assert model(batch).loss.item() == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.seconds
@pytest.mark.parametrize("layout", ["rows", "flat"])
@pytest.mark.parametrize("name", ["x-transformers", "Llama"])
def test_documents(name: str, layout: str) -> None:
    """Each as it is alone, wherever it lies."""
    torch.manual_seed(0)
    model = wrapper_of(NETS[name](), 5)
    lengths = torch.tensor([9, 13, 1, 20])
    tokens = torch.randint(0, MASK, (43,))
    starts = lengths.cumsum(0) - lengths
    how: dict[str, Any] = {"seed": 1, "max_length": 20, "global_batch": 4}
    rows: dict[str, Any] = {}
    if layout == "rows":
        rows = {"seq_len": L, "num_rows": 2, "places": torch.tensor([0, 9, 22, 24])}
    batch = corrupt(tokens, model.masking, starts=starts, lengths=lengths, **how, **rows)
    alone = 0.0
    for i in range(4):
        one = corrupt(
            tokens, model.masking, starts=starts[i : i + 1], lengths=lengths[i : i + 1],
            sample_ids=torch.tensor([i]), **how,
        )  # fmt: skip
        alone += model(one, normalizer=43).loss.item()
    assert model(batch).loss.item() == pytest.approx(alone, rel=1e-11)


def test_inputs() -> None:
    masking = MaskingConfig(V, MASK, block_length=4)
    clean = torch.randint(0, MASK, (2, 10))
    batch = corrupt(clean, masking, seed=1)
    ids, positions = block_diffusion_inputs(batch)
    assert torch.equal(ids, torch.cat([batch.input_ids, clean], 1))
    assert positions.tolist() == 2 * [[*range(10), *range(10)]]
    batch.labels[0, batch.masked_indices[0].nonzero()[0]] = -100
    assert (block_diffusion_inputs(batch).input_ids >= 0).all()
    lengths = torch.tensor([3, 4])
    flat = corrupt(
        clean.flatten(), masking, seed=1, starts=torch.tensor([0, 3]), lengths=lengths, max_length=4
    )
    ids, positions = block_diffusion_inputs(flat)
    assert ids.shape == (1, 14) and positions[0, :7].tolist() == [0, 1, 2, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="the batch has no labels"):
        block_diffusion_inputs(corrupt(clean, masking, seed=1, outputs=("masked_rows",)))


class Net(nn.Module):
    """Takes neither a mask nor positions."""

    num_tokens, max_seq_len = V, L

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, 8), nn.Linear(8, V)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


class Masked(Net):
    def forward(self, ids: Tensor, attn_mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(ids)


def test_bad_input() -> None:
    clean = torch.randint(0, MASK, (2, L))
    with pytest.raises(ValueError, match="holds blocks, but the forward of Net declares none of"):
        wrapper_of(Net(), 4)(clean)
    with pytest.raises(ValueError, match="Masked declares neither position_ids nor pos"):
        wrapper_of(Masked(), 4)(clean)
    with pytest.raises(ValueError, match="block_length is 4, with which a critic does not go"):
        wrapper_of(Net(), 4, token_critic=Net())
    model = wrapper_of(Net(), 4)
    batch = corrupt(clean, MaskingConfig(V, MASK), seed=1)
    with pytest.raises(ValueError, match="with block_length None, but this wrapper has 4"):
        model(batch)


def test_a_causal_decoder_is_as_good() -> None:
    """No warning: it gets a mask."""
    wrapper_of(decoder("Llama"), 4)


@pytest.mark.seconds
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_with_and_without_a_cache(attention: str) -> None:
    """Masks are such as the net's attention takes, either way."""
    torch.manual_seed(0)
    model = wrapper_of(decoder("Llama", attention), 8).eval()
    ids = [model.generate(3, seed=1, cache=cache) for cache in (False, True)]
    assert torch.equal(*ids) and len(ids[0].unique()) > 5
