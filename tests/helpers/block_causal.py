"""Small nets in float64 that keep keys and values of finished blocks, each in its own way."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_kernels import NetAdapter, NonAutoregressiveWrapper, dense_block_mask

NUM_TOKENS, MASK_ID, LENGTH, BLOCK = 20, 7, 22, 4  # the last block is short


def rotary(**options: Any) -> nn.Module:
    return _x_transformers(use_abs_pos_emb=False, rotary_pos_emb=True, **options)


def absolute(**options: Any) -> nn.Module:
    return _x_transformers(use_abs_pos_emb=True, **options)


def _x_transformers(*, use_abs_pos_emb: bool, **options: Any) -> nn.Module:
    from x_transformers import Encoder, TransformerWrapper

    torch.manual_seed(0)
    layers = Encoder(
        **{"dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 32, "ff_mult": 1, **options}
    )
    net = TransformerWrapper(
        num_tokens=NUM_TOKENS,
        max_seq_len=LENGTH,
        use_abs_pos_emb=use_abs_pos_emb,
        attn_layers=layers,
    )
    return _larger(net)


def llama(attention: str = "sdpa") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _hugging_face(LlamaForCausalLM, LlamaConfig, attn_implementation=attention)


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _hugging_face(Qwen3ForCausalLM, Qwen3Config, head_dim=8)


def _hugging_face(kind: Any, config: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = kind(
        config(
            vocab_size=NUM_TOKENS,
            max_position_embeddings=LENGTH,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
            **options,
        )
    )
    head = net.get_output_embeddings()
    return NetAdapter(_larger(net), num_tokens=NUM_TOKENS, max_seq_len=LENGTH, head=head)


def _larger(net: nn.Module) -> nn.Module:
    """With weights that make the ids around a position matter."""
    with torch.no_grad():
        for weight in net.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1 / weight.shape[1] ** 0.5)
    return net.double()


class OwnCache:
    def __init__(self) -> None:
        self.keys: Tensor | None = None

    def select(self, index: Tensor) -> None:
        assert self.keys is not None
        self.keys = self.keys.index_select(0, index)


class Own(nn.Module):
    """A net of a user's: one layer, in which keys are values. Records what it is given."""

    num_tokens, max_seq_len = NUM_TOKENS, LENGTH

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(NUM_TOKENS, 16), nn.Embedding(LENGTH, 16)
        self.output_head = nn.Linear(16, NUM_TOKENS)
        self.fed: list[tuple[tuple[int, ...], bool]] = []

    def new_cache(self) -> OwnCache:
        return OwnCache()

    def forward(
        self,
        ids: Tensor,
        *,
        cache: OwnCache | None = None,
        store: bool = False,
        positions: Tensor | None = None,
        attn_mask: Tensor | None = None,
        shift: Tensor | float = 0.0,
        return_embeddings: bool = False,
    ) -> Tensor:
        if positions is None:
            positions = torch.arange(ids.shape[1])
        x = self.embed(ids) + self.place(positions) + torch.as_tensor(shift).view(-1, 1, 1)
        keys = x if cache is None or cache.keys is None else torch.cat([cache.keys, x], 1)
        if store:
            assert cache is not None
            cache.keys = keys
        self.fed.append((tuple(ids.shape), store))
        x = x + F.scaled_dot_product_attention(x, keys, keys, attn_mask=attn_mask)
        return x if return_embeddings else self.output_head(x)


def own() -> Own:
    torch.manual_seed(0)
    return _larger(Own())  # type: ignore[return-value]


class Masked(nn.Module):
    """A net that keeps nothing, but takes a mask."""

    num_tokens, max_seq_len = NUM_TOKENS, LENGTH

    def __init__(self) -> None:
        super().__init__()
        self.inner = own()

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(ids, attn_mask=attention_mask[:, 0])


NETS = {"rotary": rotary, "absolute": absolute, "llama": llama, "qwen3": qwen3, "own": own}


def model_of(net: nn.Module, **options: Any) -> NonAutoregressiveWrapper:
    return NonAutoregressiveWrapper(net, mask_id=MASK_ID, block_length=BLOCK, steps=12, **options)


def whole_mask(net: nn.Module) -> dict[str, Tensor]:
    """What the net is called with for a whole sequence, without a cache."""
    mask = dense_block_mask(LENGTH, BLOCK, noisy=False)[0, 0]
    if isinstance(net, NetAdapter):
        return {"attention_mask": torch.where(mask, 0.0, -torch.inf).double()[None, None]}
    return {"attn_mask": mask}
