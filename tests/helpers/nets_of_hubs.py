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
