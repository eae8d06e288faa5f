"""Small nets, as users write and wrap them, and the loss of one whose head nobody calls."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers import Encoder, TransformerWrapper

from nar_kernels import NetAdapter, NonAutoregressiveWrapper, corrupt

NUM_TOKENS, MASK_ID, LENGTH, BATCH, WIDTH = 37, 36, 16, 4, 32

RARE = 20  # ids from here on are ruled out by the users' code

IDS = torch.randint(0, RARE, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def rule_out(logits: Tensor) -> Tensor:
    return torch.where(torch.arange(NUM_TOKENS) >= RARE, -30.0, logits)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e = nn.Embedding(NUM_TOKENS, WIDTH)
        self.head = nn.Linear(WIDTH, NUM_TOKENS)

    def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(self.e(ids) * scale)


def adapted(net: nn.Module, head: nn.Module | None = None, knows: bool = True) -> NetAdapter:
    head = (head or net.head) if knows else None
    return NetAdapter(net, num_tokens=NUM_TOKENS, max_seq_len=LENGTH, head=head)


def transformer(cls=TransformerWrapper, **options) -> TransformerWrapper:
    torch.manual_seed(0)
    layers = Encoder(dim=WIDTH, depth=1, heads=2, attn_dim_head=8, verbose=False)
    return cls(num_tokens=NUM_TOKENS, max_seq_len=LENGTH, attn_layers=layers, **options)


def with_forward_hook(net: nn.Module) -> nn.Module:
    net.register_forward_hook(lambda module, args, out: rule_out(out))
    return net


def with_other_forward(net: nn.Module) -> nn.Module:
    """As accelerate's ``add_hook_to_module`` replaces it, on the instance."""
    old = net.forward

    @functools.wraps(old)
    def forward(*args, **kwargs):
        return rule_out(old(*args, **kwargs))

    net.forward = forward
    return net


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Lora(nn.Module):
    """As peft puts it in the place of a layer."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.a = nn.Linear(base_layer.in_features, 2, bias=False)
        self.b = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.b(self.a(x))


def whole_loss(net: nn.Module, model: NonAutoregressiveWrapper, seed: int, **kwargs) -> Tensor:
    """The likelihood bound of logits at all positions."""
    batch = corrupt(IDS, model.masking, seed=seed)
    logits = net(batch.input_ids, **kwargs)
    nll = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    return (nll.view(IDS.shape) * batch.loss_weight[:, None]).sum() / batch.num_maskable.sum()
