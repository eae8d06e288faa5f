"""What users hang on a net, override in it or wrap around it takes part in loss and generation:
both are those of a net whose head nobody calls by itself."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from x_transformers import TransformerWrapper

from nar_kernels import MaskingConfig, NetAdapter, NonAutoregressiveWrapper
from nar_kernels.nets.split import split_net
from tests.helpers.nets_of_users import (
    BATCH,
    IDS,
    LENGTH,
    MASK_ID,
    NUM_TOKENS,
    RARE,
    WIDTH,
    Halved,
    Lora,
    Net,
    rule_out,
    transformer,
    whole_loss,
    with_forward_hook,
    with_other_forward,
)
from tests.helpers.tiny import tiny_sizes

pytestmark = pytest.mark.usefixtures("one_thread")


class Ruled(TransformerWrapper):
    def forward(self, *args, **kwargs):
        return rule_out(super().forward(*args, **kwargs))


class Silent(nn.Module):
    """A wrapper of a user, whose ``module`` is where PyTorch's have it."""

    num_tokens, max_seq_len = NUM_TOKENS, LENGTH

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, ids: Tensor, **kwargs) -> Tensor:
        return rule_out(self.module(ids, **kwargs))


def with_head_hook(net: TransformerWrapper) -> TransformerWrapper:
    with_forward_hook(net.to_logits)
    return net


def with_parametrization(net: TransformerWrapper) -> TransformerWrapper:
    parametrize.register_parametrization(net.to_logits, "weight", Halved())
    return net


def with_lora(net: TransformerWrapper) -> TransformerWrapper:
    net.to_logits = Lora(net.to_logits)
    return net


class Positional(nn.Module):
    """A head that looks at other positions."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(WIDTH, NUM_TOKENS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


NETS = {
    "a subclass": lambda: transformer(Ruled),
    "a hook": lambda: with_forward_hook(transformer()),
    "a hook of the head": lambda: with_head_hook(transformer()),
    "another forward": lambda: with_other_forward(transformer()),
    "another forward of the head": lambda: _with_head(transformer(), with_other_forward),
    "a parametrization": lambda: with_parametrization(transformer()),
    "LoRA": lambda: with_lora(transformer()),
    "a head that looks around": lambda: transformer(to_logits=Positional()),
    "a wrapper": lambda: Silent(transformer()),
    "a hook in DataParallel": lambda: nn.DataParallel(with_forward_hook(transformer())),
    "a hook on DataParallel": lambda: with_forward_hook(nn.DataParallel(transformer())),
    "a tied copy": lambda: _tied_copy(),
}


def _with_head(net, change):
    change(net.to_logits)
    return net


_ORIGINALS = []


def _tied_copy() -> TransformerWrapper:
    """x-transformers' tied head is a closure, which a deep copy shares with the original."""
    net = transformer(tie_embedding=True)
    _ORIGINALS.append(net)
    copied = copy.deepcopy(net)
    with torch.no_grad():
        copied.token_emb.emb.weight.mul_(3)
    return copied


@pytest.mark.parametrize("name", NETS)
def test_what_users_changed_is_in_the_loss(name):
    net = NETS[name]()
    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID)
    wanted = whole_loss(net, model, 3)
    got = model(IDS, seed=3).loss
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    parameters = [p for p in net.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(got, parameters, allow_unused=True),
        torch.autograd.grad(wanted, parameters, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["a subclass", "a hook", "another forward", "a wrapper"])
def test_what_users_rule_out_is_not_generated(name):
    model = NonAutoregressiveWrapper(NETS[name](), mask_id=MASK_ID)
    for strategy in ("confidence", "random"):
        ids = model.generate(100, seed=0, filter_thres=None, strategy=strategy)
        assert ids.max() < RARE


def test_global_hooks():
    model = NonAutoregressiveWrapper(transformer(), mask_id=MASK_ID)
    assert split_net(model.net) is not None

    def hook(module, args, out):
        return rule_out(out) if module is model.net else None

    handle = register_module_forward_hook(hook)
    try:
        torch.testing.assert_close(model(IDS, seed=0).loss, whole_loss(model.net, model, 0))
        assert model.generate(50, seed=0, filter_thres=None).max() < RARE
    finally:
        handle.remove()
    assert model.generate(50, seed=0, filter_thres=None).max() >= RARE


@pytest.mark.parametrize("owner", [TransformerWrapper, nn.Linear])
def test_another_forward_of_the_class(owner, monkeypatch):
    original = owner.forward
    monkeypatch.setattr(
        owner, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs) / 2
    )
    model = NonAutoregressiveWrapper(transformer(), mask_id=MASK_ID)
    torch.testing.assert_close(model(IDS, seed=0).loss, whole_loss(model.net, model, 0))


def test_arguments_for_what_is_behind_the_hidden_states():
    model = NonAutoregressiveWrapper(transformer(), mask_id=MASK_ID)
    options = {"prepend_embeds": torch.randn(BATCH, 3, WIDTH), "excise_prepend_embeds": True}
    wanted = whole_loss(model.net, model, 0, **options)
    torch.testing.assert_close(model(IDS, seed=0, **options).loss, wanted)
    with pytest.raises(TypeError, match="unknown argument 'return_embeddings'"):
        model(IDS, return_embeddings=True)


@pytest.mark.parametrize("place", ["net", "head"])
def test_hooks_see_logits_and_not_hidden_states(place):
    net, seen = transformer(), []
    where = net if place == "net" else net.to_logits
    where.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID)
    model(IDS)
    model.generate(2, steps=2)
    assert set(seen) == {(BATCH, LENGTH, NUM_TOKENS), (2, LENGTH, NUM_TOKENS)}


def test_a_subclass_of_a_net_that_promised_its_head():
    class Promising(Net):
        num_tokens, max_seq_len = NUM_TOKENS, LENGTH

        @property
        def output_head(self) -> nn.Module:
            return self.head

        def forward(self, ids: Tensor, return_embeddings: bool = False) -> Tensor:
            hidden = self.e(ids)
            return hidden if return_embeddings else self.head(hidden)

    class Breaking(Promising):
        def forward(self, ids: Tensor, **kwargs) -> Tensor:
            return rule_out(super().forward(ids, **kwargs))

    assert split_net(Promising()) is not None
    net = Breaking()
    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID)
    torch.testing.assert_close(model(IDS, seed=0).loss, whole_loss(net, model, 0))


# Causal nets


def test_a_causal_net_is_remarked_upon():
    from transformers import LlamaConfig, LlamaForCausalLM
    from x_transformers import Decoder

    config = LlamaConfig(**tiny_sizes(NUM_TOKENS, LENGTH))
    llama = LlamaForCausalLM(config)
    net = NetAdapter(llama, bidirectional=False)
    with pytest.warns(UserWarning, match="holds a LlamaAttention that is causal"):
        NonAutoregressiveWrapper(net, mask_id=MASK_ID)
    layers = Decoder(dim=16, depth=1, heads=2, verbose=False)
    decoder = TransformerWrapper(num_tokens=NUM_TOKENS, max_seq_len=LENGTH, attn_layers=layers)
    with pytest.warns(UserWarning, match="that is causal"):
        NonAutoregressiveWrapper(decoder, mask_id=MASK_ID)
    for module in llama.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    NonAutoregressiveWrapper(net, mask_id=MASK_ID)  # warnings are errors here


def test_masks_are_those_of_the_configuration():
    """A check of this file: the loss above is one of masks that `corrupt` draws by itself."""
    model = NonAutoregressiveWrapper(transformer(), mask_id=MASK_ID, no_replace_prob=0.0)
    masking = MaskingConfig(NUM_TOKENS, MASK_ID, random_token_prob=0.1, corruption_prob=0.5)
    assert model.masking == masking
