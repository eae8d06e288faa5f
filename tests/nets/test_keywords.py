"""Keyword arguments of the wrapper that are for the net."""

import pytest
import torch
from torch import Tensor, nn
from x_transformers import Encoder, TransformerWrapper

from nar_kernels import NetAdapter, NonAutoregressiveWrapper, corrupt
from nar_kernels.nets.keywords import declared_names

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_TOKENS, MASK_ID, LENGTH = 12, 11, 8
IDS = torch.zeros(2, LENGTH, dtype=torch.int64)


class AnyKeyword(nn.Module):
    """Takes any keyword, as the nets of transformers do; declares one."""

    num_tokens, max_seq_len = NUM_TOKENS, LENGTH

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(NUM_TOKENS, NUM_TOKENS)
        self.got: list[dict] = []

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        self.got.append({"attention_mask": attention_mask, **kwargs})
        return self.table(ids)


def adapted() -> NetAdapter:
    return NetAdapter(AnyKeyword(), num_tokens=NUM_TOKENS, max_seq_len=LENGTH)


NETS = {
    "plain": AnyKeyword,
    "adapted": adapted,
    "in DataParallel": lambda: nn.DataParallel(AnyKeyword()),
    "compiled": lambda: torch.compile(AnyKeyword(), backend="eager"),
    "adapted and compiled": lambda: torch.compile(adapted(), backend="eager"),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("call", ["forward", "generate", "generate_steps"])
@pytest.mark.parametrize(
    ("keyword", "near"),
    [("maskabel", None), ("attn_mask", "attention_mask"), ("stategy", None), ("xyz", None)],
)
def test_what_nobody_declares_is_an_error(name, call, keyword, near):
    model = NonAutoregressiveWrapper(NETS[name](), mask_id=MASK_ID)
    near = near or {("forward", "maskabel"): "maskable"}.get((call, keyword))
    if keyword == "stategy" and call != "forward":
        near = "strategy"
    suggestion = f"; did you mean '{near}'" if near else r"\."
    with pytest.raises(TypeError, match=f"unknown argument '{keyword}': .*{suggestion}"):
        if call == "forward":
            model(IDS, **{keyword: 1})
        elif call == "generate":
            model.generate(1, **{keyword: 1})
        else:
            list(model.generate_steps(1, **{keyword: 1}))


def test_declared_and_explicit_ones_reach_the_net():
    net = AnyKeyword()
    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID, steps=1)
    mask = torch.ones_like(IDS)
    model(IDS, attention_mask=mask, net_kwargs={"other": 1})
    model.generate(2, attention_mask=mask, net_kwargs={"other": 2})
    assert [got["other"] for got in net.got] == [1, 2]
    assert all(got["attention_mask"] is mask for got in net.got)
    with pytest.raises(TypeError, match="'attention_mask' was given twice"):
        model(IDS, attention_mask=mask, net_kwargs={"attention_mask": mask})


def test_names_of_known_nets():
    layers = Encoder(dim=16, depth=1, heads=2, verbose=False)
    net = TransformerWrapper(num_tokens=NUM_TOKENS, max_seq_len=LENGTH, attn_layers=layers)
    names = declared_names(net)
    assert {"mask", "pos", "sum_embeds", "to_logits_kwargs"} <= names  # its own
    assert {"context", "context_mask", "attn_mask"} <= names  # of its layers
    assert "maskable" not in names and "self" not in names

    class Later(TransformerWrapper):
        def forward(self, x, *, condition_on=None, **kwargs):
            return super().forward(x, **kwargs)

    layers = Encoder(dim=16, depth=1, heads=2, verbose=False)
    later = Later(num_tokens=NUM_TOKENS, max_seq_len=LENGTH, attn_layers=layers)
    assert {"condition_on", "mask", "context"} <= declared_names(later)


def test_what_may_be_masked_in_other_terms():
    """Each gives the loss that the same positions give as flags."""
    net = AnyKeyword()
    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID)
    lengths = torch.tensor([3, LENGTH - 2])
    flags = torch.arange(LENGTH) >= lengths[:, None]
    expected = model(IDS, seed=1, maskable=flags).loss
    assert expected != model(IDS, seed=1).loss
    for how in (
        dict(labels=IDS.masked_fill(~flags, -100)),
        dict(loss_mask=flags.long()),
        dict(prompt_lengths=lengths),
    ):
        assert torch.equal(model(IDS, seed=1, **how).loss, expected)
        (name,) = how
        with pytest.raises(ValueError, match=f"{name} was given with a batch that is corrupted"):
            model(corrupt(IDS, model.masking, seed=0), **how)


def test_maskable():
    net = AnyKeyword()
    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID, no_replace_prob=0.0, random_token_prob=0)
    maskable = torch.zeros(64, LENGTH, dtype=torch.bool)
    maskable[:, 3:] = True
    asked = []
    net.register_forward_pre_hook(lambda module, args: asked.append(args[0]))
    model(IDS[:1].expand(64, -1), maskable=maskable)
    masked = asked[0] == MASK_ID
    assert not (masked & ~maskable).any() and masked.any(0)[3:].all()
    with pytest.raises(ValueError, match=r"maskable is .*\[64, 8\]: it must be bool \[2, 8\]"):
        model(IDS, maskable=maskable)
    with pytest.raises(ValueError, match="corrupted already: pass it to what made that"):
        model(corrupt(IDS, model.masking, seed=0), maskable=maskable[:2])
