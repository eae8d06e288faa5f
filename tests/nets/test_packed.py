"""Packed batches in a net: documents are as they are alone."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_kernels import Corrupted, MaskingConfig, NetAdapter, NonAutoregressiveWrapper, corrupt
from nar_kernels.nets.packed import packed_keywords

V, MASK, L, D = 40, 39, 24, 16


def batches(seed: int) -> tuple[Corrupted, Corrupted, Corrupted]:
    """The same documents packed into rows, flat, and each in a row of its own."""
    rng = random.Random(seed)
    tokens = torch.randint(0, MASK, (300,), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([rng.randint(1, 12) for _ in range(7)])
    how: dict[str, Any] = {"seed": 1, "starts": lengths.cumsum(0) - lengths, "lengths": lengths}
    places, at = [], 0
    for length in lengths.tolist():
        if at % L + length > L:
            at = (at // L + 1) * L
        places.append(at)
        at += length
    rows = {"places": torch.tensor(places), "num_rows": -(-at // L), "seq_len": L}
    masking = MaskingConfig(V, MASK)
    return tuple(corrupt(tokens, masking, **how, **more) for more in (rows, {}, {"seq_len": L}))  # type: ignore[return-value]


class Attention(nn.Module):
    """One layer, by what keeps documents apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(V, D), nn.Embedding(L, D)
        self.mix, self.head = nn.Linear(D, 3 * D), nn.Linear(D, V)

    def attend(self, ids: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(position_ids)
        q, k, v = self.mix(x)[:, None].chunk(3, -1)
        return self.head(x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0])


class ByMask(Attention):
    def forward(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        return self.attend(ids, position_ids, attention_mask)


class ByBlocks(Attention):
    def forward(self, ids: Tensor, block_mask: Any, position_ids: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        x = self.embed(ids) + self.place(position_ids)
        q, k, v = (y.contiguous() for y in self.mix(x)[:, None].chunk(3, -1))
        return self.head(x + flex_attention(q, k, v, block_mask=block_mask)[:, 0])


class ByBegins(Attention):
    """Segment by segment, as a varlen kernel."""

    def forward(self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, pos: Tensor) -> Tensor:
        assert int(cu_seqlens.diff().max()) <= max_seqlen
        of = torch.bucketize(torch.arange(ids.numel()), cu_seqlens[1:], right=True)
        mask = (of[:, None] == of[None]).view(ids.shape[0], -1, ids.numel())
        rows = mask.view(*ids.shape, *ids.shape)
        same = torch.stack([rows[b, :, b] for b in range(len(ids))])
        return self.attend(ids, pos, same[:, None])


def model_of(kind: type[nn.Module]) -> NonAutoregressiveWrapper:
    torch.manual_seed(0)
    net = NetAdapter(kind(), num_tokens=V, max_seq_len=L)
    return NonAutoregressiveWrapper(net.double(), mask_id=MASK)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", [ByMask, ByBlocks, ByBegins])
@pytest.mark.parametrize("seed", range(3))
def test_documents_are_as_they_are_alone(kind: type[nn.Module], seed: int) -> None:
    packed, flat, padded = batches(seed)
    model = model_of(kind)
    with torch.no_grad():
        parts = [model(padded[i : i + 1]) for i in range(len(padded))]
        lengths = padded.num_maskable
        expected = sum(float(p.loss) * int(n) for p, n in zip(parts, lengths, strict=True))
        for batch in (packed, flat, padded):
            assert float(model(batch).loss) == pytest.approx(expected / int(lengths.sum()), 1e-12)


@pytest.mark.parametrize("rotary", [False, True])
def test_in_x_transformers(rotary: bool) -> None:
    x_transformers = pytest.importorskip("x_transformers")
    net = x_transformers.TransformerWrapper(
        num_tokens=V,
        max_seq_len=100,
        attn_layers=x_transformers.Encoder(
            dim=D, depth=2, heads=2, attn_dim_head=8, attn_flash=True, rotary_pos_emb=rotary
        ),
    )
    model = NonAutoregressiveWrapper(net.double(), mask_id=MASK)
    losses = [float(model(batch).loss.detach()) for batch in batches(5)]
    assert losses == pytest.approx(losses[:1] * 3, 1e-12)
    gradients = []
    for batch in batches(5)[::2]:
        model.zero_grad()
        model(batch).loss.backward()
        gradients.append(net.token_emb.emb.weight.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12)


def test_what_is_given_is_taken() -> None:
    packed, *_ = batches(0)
    net, mask = model_of(ByMask).net, torch.ones(1)
    chosen = packed_keywords(net, packed, {"attention_mask": mask})
    assert {*chosen} == {"position_ids"}
    assert {*packed_keywords(net, packed, {})} == {"attention_mask", "position_ids"}


def test_a_net_that_cannot_keep_documents_apart() -> None:
    class Plain(Attention):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    packed, *_ = batches(0)
    model = model_of(Plain)
    with pytest.raises(ValueError, match="Plain declares none of block_mask, cu_seqlens"):
        model(packed)


def test_rows_longer_than_the_net() -> None:
    tokens, masking = torch.arange(30), MaskingConfig(V, MASK)
    how = {"seed": 1, "starts": torch.tensor([0]), "lengths": torch.tensor([L + 1])}
    model = model_of(ByMask)
    with pytest.raises(ValueError, match="a document of 25 tokens, but the net takes 24"):
        model(corrupt(tokens, masking, **how))
    with pytest.raises(ValueError, match="rows of 30, but the net takes 24"):
        model(corrupt(tokens, masking, **how, seq_len=30))


@pytest.mark.parametrize("reduction", ["token", "sequence", "answer", "batch"])
def test_reductions_of_the_wrapper(reduction: str) -> None:
    packed, *_ = batches(1)
    model = model_of(ByMask)
    weighted = NonAutoregressiveWrapper(model.net, mask_id=MASK, reduction=reduction)  # type: ignore[arg-type]
    hidden = model.net(packed.input_ids, **packed_keywords(model.net, packed, {}))
    rows = packed.masked_rows
    nll = F.cross_entropy(
        hidden.flatten(0, 1)[rows], packed.labels.flatten()[rows], reduction="none"
    )
    each = nll * packed.loss_weight[packed.samples_of(rows)]
    n = packed.num_maskable[packed.samples_of(rows)]
    of_rows = packed.sum_over_rows(packed.num_maskable)[packed.samples_of(rows)]
    expected = {
        "token": each.sum() / packed.num_maskable.sum(),
        "answer": (each / n).sum() / len(packed.times),
        "sequence": (each / of_rows).sum() / len(packed),
        "batch": each.sum() / len(packed),
    }[reduction]
    assert float(weighted(packed).loss.detach()) == pytest.approx(float(expected.detach()), 1e-6)
    assert weighted.reduction == reduction


def test_unknown_reductions() -> None:
    for reduction in ("none", "sum"):
        with pytest.raises(ValueError, match=f"reduction is '{reduction}'"):
            NonAutoregressiveWrapper(model_of(ByMask).net, mask_id=MASK, reduction=reduction)  # type: ignore[arg-type]


def test_critics_are_not_trained_on_documents() -> None:
    packed, *_ = batches(0)
    critic = nn.Sequential(nn.Embedding(V, 1))
    net = model_of(ByMask).net
    model = NonAutoregressiveWrapper(net, mask_id=MASK, token_critic=critic)
    with pytest.raises(ValueError, match="documents, which a critic would not keep apart"):
        model(packed)
    assert model(packed, only_train_generator=True).loss.isfinite()


def test_self_conditioning_of_a_flat_batch() -> None:
    x_transformers = pytest.importorskip("x_transformers")
    net = x_transformers.TransformerWrapper(
        num_tokens=V,
        max_seq_len=100,
        attn_layers=x_transformers.Encoder(dim=D, depth=1, heads=2, attn_dim_head=8),
    )
    model = NonAutoregressiveWrapper(
        net.double(), mask_id=MASK, self_cond=True, self_cond_train_prob=1.0
    )
    losses = [float(model.double()(batch, seed=1).loss.detach()) for batch in batches(5)]
    assert losses == pytest.approx(losses[:1] * 3, 1e-9)


def test_a_head_is_verified_on_the_whole_batch() -> None:
    """What describes documents describes all of them."""

    class Strict(ByBegins):
        def forward(  # type: ignore[override]
            self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, pos: Tensor
        ) -> Tensor:
            assert int(cu_seqlens[-1]) == ids.numel()
            return super().forward(ids, cu_seqlens, max_seqlen, pos)

    net = Strict()
    adapter = NetAdapter(net, num_tokens=V, max_seq_len=L, head=net.head)
    model = NonAutoregressiveWrapper(adapter.double(), mask_id=MASK)
    for batch in batches(2):
        assert model(batch).loss.isfinite()
