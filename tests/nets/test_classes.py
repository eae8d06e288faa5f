"""Nets that take a class: what they are called with in training and in generation."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nar_kernels.nets.adapter import NetAdapter
from nar_kernels.nets.classes import num_classes_of
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.sampling.config import SamplingConfig
from nar_kernels.wrapper import NonAutoregressiveWrapper
from tests.helpers.models import LENGTH, MASK_ID, NUM_TOKENS, clean_batch, make_model, make_net

C = 3
IDS = torch.tensor([0, 1, 2, C, 1, 0])


class Named(nn.Module):
    """Logits that depend on the class alone, which it takes by a name of its own."""

    num_tokens, max_seq_len, num_classes = NUM_TOKENS, LENGTH, C

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(C + 1, NUM_TOKENS, generator=generator))
        self.calls: list[Tensor] = []

    def logits(self, ids: Tensor, class_ids: Tensor) -> Tensor:
        self.calls.append(class_ids)
        return self.table[class_ids][:, None].expand(-1, ids.shape[1], -1)


class ClassIds(Named):
    def forward(self, ids: Tensor, class_ids: Tensor) -> Tensor:
        return self.logits(ids, class_ids)


class Diffusers(Named):
    def forward(self, ids: Tensor, class_labels: Tensor) -> Tensor:
        return self.logits(ids, class_labels)


class DiT(Named):
    def forward(self, ids: Tensor, y: Tensor) -> Tensor:
        return self.logits(ids, y)


NAMED = [ClassIds, Diffusers, DiT]


def conditional_net():
    return make_net(embed_num_tokens={"class": C + 1})


def batch_with_classes(model: NonAutoregressiveWrapper) -> Corrupted:
    batch = corrupt(clean_batch(), model.masking, seed=0)
    batch.class_ids = IDS
    return batch


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_net_gets_the_classes_by_the_name_that_it_declares(kind, adapted) -> None:
    net = kind()
    wrapped = NetAdapter(net, num_tokens=NUM_TOKENS, max_seq_len=LENGTH) if adapted else net
    model = NonAutoregressiveWrapper(wrapped, mask_id=MASK_ID)
    loss = model(batch_with_classes(model)).loss
    assert torch.equal(net.calls[-1], IDS)
    batch = batch_with_classes(model)
    of_rows = net.table.log_softmax(-1)[IDS][:, None].expand(-1, LENGTH, -1).flatten(0, 1)
    rows = batch.masked_rows
    nll = -of_rows[rows].gather(1, batch.labels.flatten()[rows][:, None])[:, 0]
    expected = (nll * batch.loss_weight[rows // LENGTH]).sum() / batch.num_maskable.sum()
    assert torch.allclose(loss, expected)
    model(clean_batch(), class_ids=IDS, seed=0)
    assert torch.equal(net.calls[-1], IDS)
    assert num_classes_of(wrapped) == C


def test_x_transformers_nets_get_a_summed_embedding() -> None:
    model = make_model(conditional_net())
    batch = batch_with_classes(model)
    got = model(batch, seed=1).loss
    expected = make_model(model.net)(
        corrupt(clean_batch(), model.masking, seed=0), seed=1, embed_ids={"class": IDS[:, None]}
    ).loss
    assert torch.equal(got, expected)
    assert got != model(clean_batch(), class_ids=IDS.flip(0), seed=0).loss
    for part in batch.microbatches(2):
        assert model(part).loss.isfinite()
    assert num_classes_of(model.net) == C


def test_guidance_is_that_of_two_calls() -> None:
    """At each masked position the logits are those without the class, plus scale times the rest."""
    net = ClassIds()
    seen = []

    def look(logits: Tensor, rows: Tensor) -> Tensor:
        seen.append((logits, rows))
        return logits

    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID)
    config = SamplingConfig(guidance_scale=2.5, steps=3)
    ids = torch.tensor([2, 0])
    model.sample(config, class_ids=ids, seed=0, logits_processor=look).last()
    assert net.calls and all(call.tolist() in ([2, 0], [C, C]) for call in net.calls)
    for logits, rows in seen:
        of_class, of_none = net.table[ids[rows // LENGTH]], net.table[C]
        assert torch.allclose(logits, of_none + 2.5 * (of_class - of_none))


def test_x_transformers_guidance_is_that_of_embed_ids() -> None:
    model = make_model(conditional_net())
    config = SamplingConfig(guidance_scale=2.0, steps=4)
    got = model.sample(config, 3, class_ids=1, seed=0).last().ids
    ids = torch.full((3, 1), 1)
    none = {"embed_ids": {"class": torch.full((3, 1), C)}}
    expected = (
        model.sample(config, 3, seed=0, embed_ids={"class": ids}, unconditional=none).last().ids
    )
    assert torch.equal(got, expected)


def test_a_sequence_is_the_same_in_any_batch() -> None:
    """Also where lengths divide the batch, and of its arguments each part gets its own."""
    model = make_model(conditional_net()).eval()
    with torch.no_grad():
        model.net.embeds["class_embed"].weight.mul_(20)  # which decides everything
    config = SamplingConfig(steps=4, guidance_scale=1.5, length=(LENGTH, 6, LENGTH, 6))
    ids = [2, 0, C, 1]
    together = model.sample(config, class_ids=ids, seed=3).last().ids
    for i, class_id in enumerate(ids):
        one = SamplingConfig(steps=4, guidance_scale=1.5, length=config.length[i])
        alone = model.sample(one, 1, class_ids=class_id, first_sequence=i, seed=3).last().ids
        assert torch.equal(together[i, : config.length[i]], alone[0])


def test_generate_without_a_class_asks_for_none() -> None:
    model = make_model(conditional_net())
    assert torch.equal(model.generate(2, seed=0), model.generate(2, seed=0, class_ids=C))
    assert model.generate(seed=0, class_ids=[0, 1]).shape == (2, LENGTH)
    assert model.generate(seed=0, class_ids=1).shape == (LENGTH,)


def test_blocks_with_a_cache_have_classes_and_guidance() -> None:
    from x_transformers import Encoder, TransformerWrapper

    torch.manual_seed(0)
    net = TransformerWrapper(
        num_tokens=NUM_TOKENS,
        max_seq_len=8,
        embed_num_tokens={"class": C + 1},
        attn_layers=Encoder(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True),
    )
    model = NonAutoregressiveWrapper(net, mask_id=MASK_ID, block_length=4)
    assert model(clean_batch(4, 8), class_ids=IDS[:4], seed=0).loss.isfinite()
    config = SamplingConfig(steps=8, guidance_scale=2.0)
    found = [
        model.sample(
            SamplingConfig(**{**vars(config), "cache": cache}), class_ids=[0, 1, 2], seed=0
        )
        .last()
        .ids
        for cache in (True, False)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_classes_of_any_integer_dtype(dtype: torch.dtype) -> None:
    model = make_model(conditional_net()).eval()
    batch = batch_with_classes(model)
    expected = model(batch).loss
    batch.class_ids = IDS.to(dtype)
    assert torch.equal(model(batch).loss, expected)


def test_generate_takes_any_array_of_classes() -> None:
    model = make_model(conditional_net())
    expected = model.generate(class_ids=IDS.flip(0), steps=2, seed=0)
    for given in (IDS.numpy()[::-1], IDS.flip(0).numpy().astype(">i4")):
        assert torch.equal(model.generate(class_ids=given, steps=2, seed=0), expected)
    with pytest.raises(ValueError, match=r"class_ids has shape \[0\]"):
        model.generate(2, class_ids=[], steps=2, seed=0)


def test_errors() -> None:
    plain, conditional = make_model(), make_model(conditional_net())
    with pytest.raises(ValueError, match="TransformerWrapper takes none.*embed_num_tokens"):
        plain(batch_with_classes(plain))
    with pytest.raises(ValueError, match="takes none"):
        plain.generate(2, class_ids=1)
    with pytest.raises(ValueError, match="the batch has none"):
        conditional(clean_batch())
    with pytest.raises(ValueError, match="the class was given twice"):
        conditional(batch_with_classes(conditional), embed_ids={"class": IDS[:, None]})
    with pytest.raises(ValueError, match="its own"):
        conditional(batch_with_classes(conditional), class_ids=IDS)
    with pytest.raises(ValueError, match=r"classes \[6\] in 2 rows"):
        conditional(clean_batch(2), class_ids=IDS)
    for class_ids, error, message in (
        (C + 1, ValueError, rf"holds {C + 1}: the classes of the net are in \[0, {C}\)"),
        ([0, -1], ValueError, "holds -1"),
        ([0, 1, 2], ValueError, r"shape \[3\]: it must be an int or \[2\]"),
        ([0.5, 1.0], TypeError, "classes are integers"),
    ):
        with pytest.raises(error, match=message):
            conditional.generate(2, class_ids=class_ids)
    with pytest.raises(ValueError, match="self_token_critic"):
        make_model(conditional_net(), self_token_critic=True)
    indexes = NonAutoregressiveWrapper(ClassIds(), mask_id=MASK_ID)  # of which -1 is one
    for class_ids, error, message in (
        (IDS - 1, ValueError, rf"holds -1: the classes of the net are in \[0, {C}\)"),
        (IDS + 1, ValueError, f"holds {C + 1}: "),
        (IDS.float(), TypeError, "class_ids is torch.float32: it must be a tensor of integers"),
        (IDS.bool(), TypeError, "torch.bool"),
        (IDS.tolist(), TypeError, "class_ids is a list"),
    ):
        with pytest.raises(error, match=message):
            indexes(clean_batch(), class_ids=class_ids)
    # Of labels without the last class.
    fewer = replace(batch_with_classes(conditional), num_classes=C - 1)
    with pytest.raises(ValueError, match=f"the net has {C} classes: give MaskedLoader num_classes"):
        conditional(fewer)
    conditional(replace(fewer, num_classes=C))
    silent = ClassIds()
    silent.num_classes = None
    model = NonAutoregressiveWrapper(silent, mask_id=MASK_ID)
    assert model.generate(2, class_ids=1).shape == (2, LENGTH)
    with pytest.raises(ValueError, match="ClassIds does not say: give it the attribute"):
        model.generate(2, class_ids=1, prompt=[0, 1], guidance_scale=2.0)
    none = {"class_ids": torch.full((2,), C)}
    model.generate(2, class_ids=1, guidance_scale=2.0, unconditional=none)
    with pytest.raises(ValueError, match="nothing to be guided by"):
        conditional.generate(2, guidance_scale=2.0)
