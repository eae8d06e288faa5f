"""Tiny models of Hugging Face, and stand-ins for those that come with code of their own."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_TOKENS, MASK_ID, LENGTH, WIDTH = 41, 40, 12, 16


def config_of(family: str, **options: Any) -> Any:
    transformers = __import__("transformers")
    common = {
        "vocab_size": NUM_TOKENS,
        "max_position_embeddings": LENGTH,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    decoders = {"num_key_value_heads": 1, "head_dim": 8}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    special = {
        "Bert": no_dropout,
        "Roberta": {**no_dropout, "max_position_embeddings": LENGTH + 1},
        "ModernBert": {f"{name}_token_id": 0 for name in ("bos", "eos", "cls", "sep")},
        "Esm": {**no_dropout, "position_embedding_type": "rotary"},
        "EuroBert": {**decoders, "mask_token_id": MASK_ID},
    }
    more = special.get(family, decoders)
    return getattr(transformers, f"{family}Config")(
        **{**common, "pad_token_id": 0, **more, **options}
    )


def model_of(family: str, **options: Any) -> Any:
    """With random biases, which are 0 at first."""
    transformers = __import__("transformers")
    masked = getattr(transformers, f"{family}ForMaskedLM", None)
    decoder = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM", None)
    torch.manual_seed(0)
    model = (masked or decoder)(config_of(family, **options))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


class Remote(nn.Module):
    """What all of them have: attention that looks both ways, and methods of a PreTrainedModel."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(**config)
        self.wte = nn.Embedding(NUM_TOKENS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.ff_out = nn.Linear(WIDTH, NUM_TOKENS, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.ff_out

    def trunk(self, input_ids: Tensor) -> Tensor:
        x = self.wte(input_ids)
        return x + self.mix(x.roll(1, 1) - x.mean(1, keepdim=True))


class LikeLlada(Remote):
    """Ties its head to the embedding without a module, and scales in place."""

    def __init__(self) -> None:
        super().__init__(max_sequence_length=LENGTH, d_model=WIDTH, scale_logits=True)
        del self.ff_out

    def get_output_embeddings(self) -> nn.Module:
        return self.wte

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        logits = F.linear(self.trunk(input_ids), self.wte.weight, None)
        logits.mul_(self.config.d_model**-0.5)
        return SimpleNamespace(logits=logits)


class LikeDream(Remote):
    """Returns logits in float32, of the token after each."""

    def __init__(self) -> None:
        super().__init__(max_position_embeddings=LENGTH)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.ff_out(self.trunk(input_ids)).float())


class HiddenStates(Remote):
    """Leaves the head to others."""

    def __init__(self) -> None:
        super().__init__(max_position_embeddings=LENGTH)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.trunk(input_ids))


class Odd(Remote):
    """Does with its logits what nothing says."""

    def __init__(self) -> None:
        super().__init__(max_position_embeddings=LENGTH, logit_scale=0.5)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        logits = self.ff_out(self.trunk(input_ids))
        return SimpleNamespace(logits=torch.where(torch.arange(NUM_TOKENS) < 5, logits, -9.0))


class SdarAttention(nn.Module):
    """Needs a mask, of bools whatever they are given as. Keys and values go to the cache only on
    request."""

    is_causal = True

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, mask: Any, cache: Any, store_kv: bool | None) -> Tensor:
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, -1))
        if cache is not None and store_kv:
            k, v = cache.update(k, v, 0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bool())[:, 0]


class SdarModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(NUM_TOKENS, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.attention = SdarAttention()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        store_kv: bool | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        x = self.embed_tokens(input_ids) + self.positions(position_ids)
        return x + self.attention(x, attention_mask, past_key_values, store_kv)


class LikeSdar(nn.Module):
    """A block diffusion decoder, which in training mode masks its input itself and returns a loss
    in place of logits."""

    def __init__(self, attention: str = "sdpa") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(
            max_position_embeddings=LENGTH, block_size=4, _attn_implementation=attention
        )
        self.model = SdarModel()
        self.lm_head = nn.Linear(WIDTH, NUM_TOKENS, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_decoder(self) -> nn.Module:
        return self.model

    def prepare_for_bd_training(self, input_ids: Tensor, position_ids: Any, prompt: Any) -> Any:
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> SimpleNamespace:
        if self.training:
            self.prepare_for_bd_training(input_ids, position_ids, labels == -100)
        hidden = self.model(
            input_ids, attention_mask, position_ids, past_key_values, use_cache, **kwargs
        )
        return SimpleNamespace(logits=self.lm_head(hidden[:, -logits_to_keep:]))
