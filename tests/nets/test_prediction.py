"""The loss of a net whose head runs at the masked positions alone: that of all its logits."""

import math
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nar_kernels.nets.adapter import NetAdapter, net_attribute
from nar_kernels.nets.prediction import TrunkAndHead
from nar_kernels.nets.split import LinearHead, split_net
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.linear import TRAINING_LIMITS, ChunkLimits
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.wrapper import NonAutoregressiveWrapper
from tests.helpers.models import (
    BATCH,
    LENGTH,
    MASK_ID,
    NUM_TOKENS,
    Recorder,
    clean_batch,
    generator,
    hugging_face_net,
    make_model,
    make_net,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_corrupted_batch_gives_the_same_loss_as_clean_ids():
    model = make_model(schedule="cosine", never_mask_ids=(1, 2))
    batch = clean_batch()
    corrupted = corrupt(batch, model.masking, seed=5)
    assert model(corrupted) == model(batch, seed=5)
    assert not torch.isin(corrupted.labels, torch.tensor([1, 2])).any()


class Says(nn.Module):
    """Returns what it is made of."""

    def __init__(self, logits: Tensor, output_is_log_prob: bool = False) -> None:
        super().__init__()
        self.logits, self.output_is_log_prob = logits, output_is_log_prob

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits


def masked_loss(logits, corrupted, *, weighted, is_log_prob=False):
    """Of a net that cannot be split."""
    prediction = TrunkAndHead(Says(logits, is_log_prob))(corrupted.input_ids, {})
    return prediction.loss(
        corrupted, reduction="nelbo" if weighted else "mean", normalizer=None, backend="auto"
    )


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("is_log_prob", [True, False])
def test_masked_loss_against_boolean_indexing(weighted, is_log_prob):
    masking = MaskingConfig(NUM_TOKENS, MASK_ID, draw="bernoulli")
    corrupted = corrupt(clean_batch(64), masking, seed=0)
    logits = torch.randn(64, LENGTH, NUM_TOKENS, generator=generator(), requires_grad=True)
    log_probs = logits if is_log_prob else logits.log_softmax(-1)
    nll = -log_probs.gather(-1, corrupted.clean_ids[..., None]).squeeze(-1)
    masked = corrupted.masked_indices
    if weighted:
        expected = (nll * corrupted.loss_weight[:, None])[masked].sum() / masked.numel()
    else:
        expected = nll[masked].mean()
    got = masked_loss(logits, corrupted, weighted=weighted, is_log_prob=is_log_prob)
    torch.testing.assert_close(got, expected)
    assert torch.allclose(
        *(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (got, expected))
    )


@pytest.mark.parametrize("weighted", [True, False])
def test_nothing_masked_is_a_loss_of_zero(weighted):
    model = make_model(
        use_simple_mdlm_loss_weight=weighted,
        never_mask_ids=[i for i in range(NUM_TOKENS) if i != MASK_ID],
        self_token_critic=True,
    )
    losses = model(clean_batch())
    assert losses.generator_loss.item() == 0
    losses.generator_loss.backward(retain_graph=True)
    losses.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_bfloat16_logits_are_widened_first():
    corrupted = corrupt(clean_batch(), MaskingConfig(NUM_TOKENS, MASK_ID), seed=0)
    logits = torch.randn(BATCH, LENGTH, NUM_TOKENS, generator=generator()).bfloat16()
    loss = masked_loss(logits, corrupted, weighted=True)
    assert loss.dtype == torch.float32
    assert loss == masked_loss(logits.float(), corrupted, weighted=True)


class DeepHead(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, NUM_TOKENS))


HEADS = {
    "linear": make_net,
    "tied": lambda: make_net(tie_embedding=True),
    "no column for the mask": lambda: make_net(logits_dim=NUM_TOKENS - 1),
    "module": lambda: make_net(to_logits=DeepHead()),
    "mixture of softmaxes": lambda: make_net(mixture_of_softmax=True),
    "sigsoftmax": lambda: make_net(sigsoftmax_logits=True),
    "Hugging Face": hugging_face_net,
    "in a parallel wrapper": lambda: nn.DataParallel(make_net()),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("weighted", [True, False])
def test_heads_see_the_masked_rows_only(name, weighted, monkeypatch):
    """The loss and all gradients are those of logits at all positions, which nobody makes."""
    few = ChunkLimits(7 * NUM_TOKENS, 7)  # several chunks
    monkeypatch.setitem(TRAINING_LIMITS, "cpu", few)
    net = HEADS[name]()
    mask_id = NUM_TOKENS - 1 if name == "no column for the mask" else MASK_ID
    model = NonAutoregressiveWrapper(
        net, mask_id=mask_id, use_simple_mdlm_loss_weight=weighted, self_token_critic=False
    )
    batch = torch.randint(0, NUM_TOKENS - 1, (BATCH, LENGTH))
    batch += batch >= mask_id
    corrupted = corrupt(batch, model.masking, seed=3)
    split = split_net(net)
    assert isinstance(split.head, LinearHead) == (
        name not in ("module", "mixture of softmaxes", "sigsoftmax")
    )
    state = list(model.state_dict())

    logits = net(corrupted.input_ids)
    expected = masked_loss(
        logits,
        corrupted,
        weighted=weighted,
        is_log_prob=net_attribute(net, "output_is_log_prob", False),
    )
    wanted = torch.autograd.grad(expected, list(net.parameters()), allow_unused=True)
    with LargestTensor() as largest:
        got = model(corrupted).loss
        gradients = torch.autograd.grad(got, list(net.parameters()), allow_unused=True)
    assert list(model.state_dict()) == state
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    for (parameter, _), a, b in zip(net.named_parameters(), gradients, wanted, strict=True):
        assert (a is None) == (b is None), parameter
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=parameter)
    assert largest.width[NUM_TOKENS] < logits.numel() or name == "tied"
    torch.testing.assert_close(net(corrupted.input_ids), logits)  # the net is whole again


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor made, by its last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.width: dict[int, int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.dim() > 1:
                last = tensor.shape[-1]
                self.width[last] = max(self.width[last], tensor.numel())
        return out


def test_arguments_of_the_head_reach_it():
    net = make_net(to_logits=DeepHead())
    net.to_logits.forward = lambda x, factor: factor * net.to_logits[3](x)
    model = make_model(net)
    a, b = (model(clean_batch(), seed=0, to_logits_kwargs={"factor": f}).loss for f in (0.0, 1.0))
    assert a != b


def test_a_head_of_the_wrong_width():
    for head in (DeepHead(), nn.Linear(16, NUM_TOKENS)):
        (head[3] if isinstance(head, DeepHead) else head).weight.data = torch.zeros(14, 16)
        (head[3] if isinstance(head, DeepHead) else head).bias.data = torch.zeros(14)
        with pytest.raises(
            TypeError, match=r"returned shape \[.*14\].* must return logits of shape"
        ):
            make_model(make_net(to_logits=head))(clean_batch())


def test_loss_under_autocast_is_float32():
    model = make_model()
    batch = clean_batch(64)
    full = model(batch, seed=0).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(batch, seed=0).loss
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=0.02)


@pytest.mark.parametrize("only_train_critic", [False, True])
def test_gradients_flow_under_autocast(only_train_critic):
    """Though the net has run without gradients just before, inside the same autocast region."""
    model = make_model(self_cond=True, self_cond_train_prob=1.0, self_token_critic=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(clean_batch(), only_train_critic=only_train_critic).loss
    loss.backward()
    assert all(p.grad is not None for p in model.net.attn_layers.parameters())


def test_other_kwargs_reach_the_net():
    net = Recorder()
    make_model(net)(clean_batch(), net_kwargs={"context": 1})
    make_model(net, steps=1).generate(net_kwargs={"context": 2})
    assert net.kwargs == [{"context": 1}, {"context": 2}]


def test_labels_edited_by_the_user_count_alike_with_any_head():
    values = []
    for head in (True, False):
        net = hugging_face_net()
        if not head:
            net = NetAdapter(net.net, num_tokens=NUM_TOKENS, max_seq_len=LENGTH)
        for weighted in (True, False):
            model = make_model(net, use_simple_mdlm_loss_weight=weighted)
            batch = corrupt(clean_batch(), model.masking, seed=0)
            batch.labels[:, :4] = -100
            values.append(model(batch).loss.item())
    assert values[:2] == pytest.approx(values[2:]) and all(map(math.isfinite, values))


def test_a_ratio_that_gives_no_bound():
    with pytest.raises(ValueError, match="goes from 0.15 at t = 0 to 0.15 at t = 1.*the mean"):
        make_model(schedule=lambda t: 0.15)
    model = make_model(schedule=lambda t: 0.15, use_simple_mdlm_loss_weight=False)
    model(clean_batch()).loss.backward()
    assert model.net.to_logits.weight.grad.abs().sum() > 0
    assert model.generate(2).shape == (2, LENGTH)
    model = make_model()
    model.masking = replace(model.masking, schedule=lambda t: 0.8 - 0.5 * t)
    with pytest.raises(ValueError, match="goes from 0.8 at t = 0 to 0.3"):
        model(clean_batch())
