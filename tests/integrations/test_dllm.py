"""dllm's loss, against its formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_kernels import InvalidTokenError, MaskingConfig, corrupt
from nar_kernels.integrations.dllm import compute_loss

pytestmark = pytest.mark.usefixtures("one_thread")

V, MASK_ID, EPS = 12, 11, 1e-3


class Net(nn.Module):
    num_tokens, max_seq_len = V, 64

    def __init__(self, has_head: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, 8), nn.Linear(8, V)
        if has_head:
            self.output_head = self.head

    def forward(
        self, ids: Tensor, attention_mask: Tensor | None = None, return_embeddings: bool = False
    ) -> Tensor:
        x = self.embed(ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        hidden = torch.tanh(x + x.mean(1, keepdim=True))
        return hidden if return_embeddings else self.head(hidden)


def batch_of(dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
    ids = torch.randint(0, MASK_ID, (5, 16), generator=torch.Generator().manual_seed(1)).to(dtype)
    labels, attention_mask = ids.long().clone(), torch.ones(5, 16, dtype=torch.int64)
    labels[0, :7] = labels[1, 12:] = -100
    attention_mask[1, 12:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": attention_mask}


def cart(masked: Tensor, p: float) -> Tensor:
    """Dream's weights, by the distance of each pair."""
    distance = (torch.arange(16)[:, None] - torch.arange(16)).abs().double()
    pairs = 0.5 * p * (1 - p) ** (distance - 1)
    pairs[distance == 0] = 0
    return (~masked).double() @ pairs * masked


def formula(net: Net, inputs: dict[str, Tensor], schedule: str, weights: str, norm: str) -> Tensor:
    labels = inputs["labels"]
    masking = MaskingConfig(
        V, MASK_ID, schedule=schedule, draw="bernoulli", times="uniform", time_range=(0, 1 - EPS)
    )
    batch = corrupt(inputs["input_ids"], masking, seed=3, labels=labels)
    masked, maskable = batch.masked_indices, labels != -100
    t = (1 - batch.times).double()[:, None]  # alpha(t) = 1 - m(1 - t)
    assert ((t >= EPS) & (t < 1)).all()
    if weights == "uniform":
        of_tokens = torch.ones_like(labels, dtype=torch.float64)
    elif weights.startswith("cart"):
        of_tokens = cart(masked, 0.4)
    elif schedule == "linear":
        of_tokens = (1 / t).expand_as(labels)
    else:
        angle = torch.pi / 2 * (1 - t)
        of_tokens = (torch.pi / 2 * torch.tan(angle)).expand_as(labels)
    logits = net(batch.input_ids, inputs["attention_mask"])
    nll = F.cross_entropy(logits.transpose(1, 2), inputs["input_ids"].long(), reduction="none")
    nll = nll * of_tokens * masked
    if norm == "token":
        return nll.sum() / maskable.sum()
    if norm == "sequence":
        return (nll / maskable.sum(1, keepdim=True) / 5).sum()
    return nll.sum() / 5


@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
@pytest.mark.parametrize(
    ("schedule", "weights"),
    [
        ("linear", "scheduler"),
        ("cosine", "scheduler"),
        ("linear", "uniform"),
        ("linear", "cart[geo_p:0.4]"),
    ],
)
@pytest.mark.parametrize("has_head", [True, False])
def test_the_loss_is_dllms(norm, schedule, weights, has_head):
    torch.manual_seed(0)
    net, inputs = Net(has_head).double(), batch_of()
    options = {"mask_token_id": MASK_ID, "scheduler": schedule, "loss_weight_type": weights}
    loss = compute_loss(net, inputs, loss_norm_type=norm, seed=3, **options)
    expected = formula(net, inputs, schedule, weights, norm)
    assert torch.allclose(loss, expected, rtol=1e-3)  # of times of 16 bits, and slopes over them
    loss.backward()
    assert net.embed.weight.grad.abs().sum() > 0


def test_parts_of_a_batch_add_up():
    net, inputs = Net(True).double(), batch_of(torch.int32)
    options = {"mask_token_id": MASK_ID, "seed": 3, "loss_norm_type": "token"}
    whole = compute_loss(net, inputs, **options)
    count = (inputs["labels"] != -100).sum()
    parts = sum(
        compute_loss(
            net,
            {name: x[rows] for name, x in inputs.items()},
            num_items_in_batch=count,
            sample_ids=torch.arange(5)[rows],
            **options,
        )
        for rows in (slice(0, 2), slice(2, 5))
    )
    assert torch.allclose(parts, whole, rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss_norm_type": "mean"}, "loss_norm_type is 'mean'"),
        ({"loss_weight_type": "cart"}, "loss_weight_type is 'cart'"),
        ({"scheduler": "lin"}, "lin"),
        ({"time_epsilon": 1.5}, "time_epsilon is 1.5"),
    ],
)
def test_clear_errors(options, match):
    with pytest.raises(ValueError, match=match):
        compute_loss(Net(True), batch_of(), mask_token_id=MASK_ID, **options)


def test_a_mask_token_in_a_prompt_is_an_error():
    inputs = batch_of()
    inputs["input_ids"][0, 2] = MASK_ID  # its label is -100
    with pytest.raises(InvalidTokenError, match=f"id {MASK_ID}"):
        compute_loss(Net(True), inputs, mask_token_id=MASK_ID)
