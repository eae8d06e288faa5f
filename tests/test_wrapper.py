"""NonAutoregressiveWrapper: input checks, randomness, critics, generation, adapters."""

import copy
import math
import os
import pickle
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from x_transformers import Encoder, TransformerWrapper

from nar_kernels import wrapper
from nar_kernels.errors import InvalidTokenError
from nar_kernels.nets.adapter import NetAdapter, net_attribute
from nar_kernels.nets.prediction import TrunkAndHead
from nar_kernels.nets.split import LinearHead, split_net
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.linear import TRAINING_LIMITS, ChunkLimits
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.wrapper import Losses, NonAutoregressiveWrapper
from tests.tiny import tiny_sizes

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_TOKENS, MASK_ID, LENGTH, BATCH = 12, 4, 10, 6


def make_net(dropout=0.0, **kwargs) -> TransformerWrapper:
    torch.manual_seed(0)
    return TransformerWrapper(
        num_tokens=NUM_TOKENS,
        max_seq_len=LENGTH,
        attn_layers=Encoder(dim=16, depth=1, heads=2, attn_dim_head=8, attn_dropout=dropout),
        **kwargs,
    )


class Recorder(nn.Module):
    """The simplest net: logits of each id by itself. Records what it is given."""

    num_tokens, max_seq_len = NUM_TOKENS, LENGTH

    def __init__(self, num_outputs: int = NUM_TOKENS) -> None:
        super().__init__()
        self.table = nn.Embedding(NUM_TOKENS, num_outputs)
        self.inputs: list[Tensor] = []
        self.kwargs: list[dict] = []

    def forward(self, ids: Tensor, **kwargs) -> Tensor:
        self.inputs.append(ids)
        self.kwargs.append(kwargs)
        return self.table(ids)


def clean_batch(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    ids = torch.randint(0, NUM_TOKENS - 1, (batch, length), generator=generator())
    return ids + (ids >= MASK_ID)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def make_model(net=None, **kwargs) -> NonAutoregressiveWrapper:
    return NonAutoregressiveWrapper(
        make_net() if net is None else net, **{"mask_id": MASK_ID, "steps": 4, **kwargs}
    )


# Construction


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask_id": NUM_TOKENS}, r"mask_id 12 is not in \[0, num_tokens\)"),
        ({"schedule": "linaer"}, "unknown schedule 'linaer'"),
        ({"schedule": lambda t: t}, "increases"),
        ({"steps": 0}, "steps is 0"),
        ({"no_replace_prob": 1.5}, "no_replace_prob is 1.5"),
        ({"draw": "both"}, "draw is 'both'"),
        ({"token_critic": nn.Identity(), "self_token_critic": True}, "not both"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(**kwargs)


def test_a_net_without_the_attributes():
    with pytest.raises(TypeError, match=r"Linear has no attribute 'max_seq_len': .*NetAdapter\("):
        make_model(nn.Linear(2, 2))


@pytest.mark.parametrize("feature", ["self_cond", "self_token_critic"])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_net_without_embeddings_serves_no_self_conditioning(feature, adapted):
    net = Recorder()
    if adapted:
        net = NetAdapter(net, num_tokens=NUM_TOKENS, max_seq_len=LENGTH)
    with pytest.raises(ValueError, match=f"{feature} needs the net's embeddings"):
        make_model(net, **{feature: True})


class Replica(nn.Module):
    """Like DistributedDataParallel: no attributes but those of a module, and ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_net_inside_a_parallel_wrapper():
    model = make_model(Replica(make_net()), self_cond=True, self_token_critic=True)
    assert (model.num_tokens, model.max_seq_len, model.dim) == (NUM_TOKENS, LENGTH, 16)
    model(clean_batch()).loss.backward()
    assert model.generate().shape == (LENGTH,)
    assert net_attribute(Replica(Replica(make_net())), "emb_dim") == 16


def test_masking_can_be_exchanged_but_not_silently_ignored():
    model = make_model()
    with pytest.raises(AttributeError):
        model.no_replace_prob = 0.0
    model.masking = replace(model.masking, no_replace_prob=0.0)
    assert model.no_replace_prob == 0.0


def test_copies():
    model = make_model(self_cond=True, self_token_critic=True, schedule="cosine")
    batch = clean_batch()
    expected = model(batch, seed=1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu")):
        assert other.token_critic.net is other.net
        assert other(batch, seed=1) == expected
    assert model.double()(batch, seed=1).loss.dtype == torch.float64


# Input checks: the net must not see bad data


@pytest.mark.parametrize("bad", [-1, NUM_TOKENS, 10**6, MASK_ID])
def test_bad_ids(bad):
    net = Recorder()
    batch = clean_batch()
    batch[2, 3] = bad
    with pytest.raises(InvalidTokenError, match=rf"token id {bad} at tokens\[2, 3\]"):
        make_model(net)(batch)
    assert net.inputs == []


@pytest.mark.parametrize("shape", [(LENGTH,), (BATCH, LENGTH - 1), (BATCH, LENGTH + 1), (1, 1, 1)])
def test_wrong_shapes(shape):
    net = Recorder()
    with pytest.raises(ValueError, match=r"x has shape .* must be \[batch, 10\]"):
        make_model(net)(torch.zeros(shape, dtype=torch.int64))
    assert net.inputs == []


def test_a_batch_corrupted_at_another_length():
    batch = corrupt(clean_batch(length=LENGTH + 1), MaskingConfig(NUM_TOKENS, MASK_ID), seed=0)
    with pytest.raises(ValueError, match=r"x has shape \[6, 11\]: it must be \[batch, 10\]"):
        make_model()(batch)


def test_ids_that_are_not_integers():
    with pytest.raises(TypeError, match="float32"):
        make_model()(torch.zeros(BATCH, LENGTH))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.uint16])
def test_other_integer_types(dtype):
    model = make_model()
    assert model(clean_batch().to(dtype), seed=0) == model(clean_batch(), seed=0)


@pytest.mark.parametrize(("num_tokens", "mask_id"), [(NUM_TOKENS + 1, MASK_ID), (NUM_TOKENS, 0)])
def test_a_batch_corrupted_for_another_vocabulary(num_tokens, mask_id):
    batch = torch.full((BATCH, LENGTH), 5)
    batch = corrupt(batch, MaskingConfig(num_tokens, mask_id), seed=0)
    with pytest.raises(ValueError, match="the batch was corrupted for"):
        make_model()(batch)


def test_an_invalid_corrupted_batch():
    batch = corrupt(clean_batch(), MaskingConfig(NUM_TOKENS, MASK_ID), seed=0)
    batch = replace(batch, invalid=torch.tensor([1, 13, 99, 0, 0]))
    with pytest.raises(InvalidTokenError, match=r"token id 99 at tokens\[1, 3\]"):
        make_model()(batch)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (make_net(return_only_embed=True), r"shape \[6, 10, 16\]"),
        (make_net(logits_dim=NUM_TOKENS - 1), r"shape \[6, 10, 11\]"),
        (make_net(logits_dim=NUM_TOKENS + 4), r"shape \[6, 10, 16\]"),
        (make_net(num_output_heads=2), "tuple"),
    ],
)
def test_a_net_that_does_not_return_logits(net, message):
    with pytest.raises(TypeError, match=f"the net returned {message}"):
        make_model(net)(clean_batch())


def test_a_critic_that_does_not_return_scores():
    model = make_model(token_critic=make_net())
    with pytest.raises(TypeError, match=r"token_critic returned shape \[6, 10, 12\]"):
        model(clean_batch())


# The loss


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


def hugging_face_net() -> NetAdapter:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        **tiny_sizes(NUM_TOKENS, LENGTH),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    bert = BertForMaskedLM(config)
    head = bert.get_output_embeddings()
    nn.init.normal_(head.bias)
    return NetAdapter(bert, num_tokens=NUM_TOKENS, max_seq_len=LENGTH, head=head)


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


def test_an_adapter_refuses_a_head_that_is_not_in_the_net():
    with pytest.raises(ValueError, match="a Linear that is no submodule of Recorder"):
        NetAdapter(Recorder(), num_tokens=12, max_seq_len=10, head=nn.Linear(2, 2))


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


# Randomness


def masks_of(model, **kwargs) -> Tensor:
    model.net.inputs.clear()
    model(clean_batch(), **kwargs)
    return model.net.inputs[0] != clean_batch()


def test_seed_and_manual_seed():
    model = make_model(Recorder(), no_replace_prob=0, random_token_prob=0)
    assert torch.equal(masks_of(model, seed=3), masks_of(model, seed=3))
    assert not torch.equal(masks_of(model, seed=3), masks_of(model, seed=4))

    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append([masks_of(model) for _ in range(3)])
    assert all(map(torch.equal, *runs))
    assert not torch.equal(runs[0][0], runs[0][1])


def test_everything_in_forward_comes_from_the_seed():
    model = make_model(self_cond=True, self_cond_train_prob=0.5, self_token_critic=True)
    first = [model(clean_batch(), seed=seed) for seed in range(8)]
    torch.manual_seed(99)
    assert [model(clean_batch(), seed=seed) for seed in range(8)] == first
    state = torch.get_rng_state()
    model(clean_batch(), seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_self_conditioning_coin():
    model = make_model(self_cond=True, self_cond_train_prob=0.75)
    calls = []
    model.net.register_forward_hook(lambda *_: calls.append(1))
    for seed in range(200):
        model(clean_batch(1), seed=seed)
    # 200 + binomial(200, 0.75): standard deviation 6.
    assert abs(len(calls) - 350) < 28


RECORD_MASKS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from nar_kernels.wrapper import NonAutoregressiveWrapper

class Net(torch.nn.Module):
    num_tokens, max_seq_len = 8, 16
    def forward(self, ids):
        self.masks.append(ids == 7)
        return torch.zeros(*ids.shape, 8)

def record_masks(batch):
    net = Net()
    net.masks = []
    model = NonAutoregressiveWrapper(net, mask_id=7, no_replace_prob=0, random_token_prob=0)
    torch.manual_seed(0)
    for _ in range(20):
        model(torch.zeros(batch, 16, dtype=torch.int64))
    return torch.stack(net.masks)
"""

WORKER = f"""{RECORD_MASKS}
import torch.distributed
rank, folder = int(sys.argv[2]), sys.argv[3]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{{folder}}/store", rank=rank, world_size=2
)
torch.save(record_masks(6), f"{{folder}}/{{rank}}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_ranks_never_share_a_mask(tmp_path):
    root = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", WORKER, root]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=env) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    masks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for one, other in zip(*masks, strict=True):
        assert not (one[:, None] == other).all(-1).any()

    # Together they are the masks of one process that has the whole batch.
    names = {}
    exec(RECORD_MASKS.replace("sys.path", "# "), names)
    whole = names["record_masks"](12)
    assert torch.equal(whole, torch.stack(masks, 2).flatten(1, 2))


def test_ranks_share_the_coin_but_not_the_noise(monkeypatch):
    """The coin decides which graph is built, so it must be common; sampled ids must differ."""
    critic = Recorder(num_outputs=1)
    model = make_model(self_cond=True, self_cond_train_prob=0.5, token_critic=critic)
    model.average_tokens_across_devices = False  # there is no process group
    corrupted = corrupt(clean_batch(), model.masking, seed=0)
    calls, losses = [], []
    model.net.register_forward_hook(lambda *_: calls[-1].append(1))
    for rank in range(2):
        monkeypatch.setattr(wrapper.distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(wrapper.distributed, "world_size", lambda: 2)
        for seed in range(20):
            calls.append([])
            losses.append(model(corrupted, generator_sample_temperature=1.0, seed=seed))
    assert calls[:20] == calls[20:]
    assert {len(c) for c in calls} == {1, 2}
    for one, other, judged, judged_too in zip(
        losses[:20], losses[20:], critic.inputs[:20], critic.inputs[20:], strict=True
    ):
        assert one.generator_loss == other.generator_loss
        assert not torch.equal(judged, judged_too)


# Critics


def critic_call(**kwargs):
    """A forward with recording generator and critic: the critic's input and its loss."""
    critic = Recorder(num_outputs=1)
    model = make_model(Recorder(), token_critic=critic, **kwargs)
    losses = model(clean_batch(64), seed=0, net_kwargs={"context": "for the generator only"})
    return model, critic, losses


def test_critic_labels_are_what_was_sampled_wrongly():
    model, critic, losses = critic_call()
    clean, judged = clean_batch(64), critic.inputs[0]
    masked = corrupt(clean, model.masking, seed=0).masked_indices
    wrong = judged != clean
    assert not (wrong & ~masked).any()
    assert (wrong & masked).any() and (~wrong & masked).any()
    assert (judged != MASK_ID).all()
    assert critic.kwargs == [{}]
    expected = F.binary_cross_entropy_with_logits(critic.table(judged).squeeze(-1), wrong.float())
    torch.testing.assert_close(losses.critic_loss, expected)


def test_a_perfect_critic_has_no_loss():
    """Possible only if the labels agree with what the critic sees: not so in the original."""

    class Perfect(nn.Module):
        def forward(self, ids):
            return torch.where(ids == clean_batch(), -50.0, 50.0)[..., None]

    losses = make_model(token_critic=Perfect())(clean_batch())
    assert losses.critic_loss.item() < 1e-6


def test_critic_weight_and_which_part_is_trained():
    model = make_model(token_critic=make_net(logits_dim=1), critic_loss_weight=0.25)
    batch = clean_batch()
    total, generator_loss, critic_loss = model(batch, seed=0)
    assert total.item() == pytest.approx(generator_loss.item() + 0.25 * critic_loss.item())

    generator_only = model(batch, only_train_generator=True, seed=0)
    assert generator_only == (generator_loss, generator_loss, None)

    critic_only = model(batch, only_train_critic=True, seed=0)
    assert critic_only == (critic_loss, None, critic_loss)
    critic_only.loss.backward()
    assert all(p.grad is None for p in model.net.parameters())
    assert any(p.grad is not None for p in model.token_critic.parameters())


def test_only_train_critic_without_a_critic():
    with pytest.raises(ValueError, match="only_train_critic needs"):
        make_model()(clean_batch(), only_train_critic=True)
    with pytest.raises(ValueError, match="exclude each other"):
        make_model(self_token_critic=True)(
            clean_batch(), only_train_critic=True, only_train_generator=True
        )


def test_sample_temperature():
    net = Recorder()
    with torch.no_grad():
        net.table.weight.copy_(torch.eye(NUM_TOKENS) * 3)  # prefers the id that it sees
    net.table.weight.data[MASK_ID, 7] = 3.0

    def judged(temperature):
        critic = Recorder(num_outputs=1)
        model = make_model(net, token_critic=critic, no_replace_prob=0, random_token_prob=0)
        model(clean_batch(64), generator_sample_temperature=temperature, seed=0)
        masked = net.inputs[-1] == MASK_ID
        return critic.inputs[0][masked]

    assert (judged(0.0) == 7).all()
    assert judged(100.0).bincount(minlength=NUM_TOKENS).min() == 0  # mask_id
    assert (judged(100.0) == 7).float().mean() < 0.3
    assert judged(None).unique().numel() > 1


# Generation


class Lover(nn.Module):
    """A net that wants mask_id everywhere; with ``only``, nothing else at all."""

    num_tokens, max_seq_len = NUM_TOKENS, LENGTH

    def __init__(self, mask_id: int, only: bool) -> None:
        super().__init__()
        self.logits = torch.full((NUM_TOKENS,), -torch.inf if only else 0.0)
        self.logits[mask_id] = 1e4

    def forward(self, ids):
        return self.logits.expand(*ids.shape, -1)


@pytest.mark.parametrize("mask_id", [0, MASK_ID, NUM_TOKENS - 1])
@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("filter_thres", [None, 0.0, 0.7, 1.0])
def test_never_generates_mask_id(mask_id, only, filter_thres):
    model = make_model(Lover(mask_id, only), mask_id=mask_id)
    ids = model.generate(16, filter_thres=filter_thres)
    assert ((ids >= 0) & (ids < NUM_TOKENS) & (ids != mask_id)).all()


@pytest.mark.parametrize("self_cond", [False, True])
@pytest.mark.parametrize("critic", [{}, {"self_token_critic": True}, {"token_critic": 1}])
@pytest.mark.parametrize("can_mask_prev_unmasked", [False, True])
@pytest.mark.parametrize("steps", [1, 12])
def test_generate_with_all_arguments(self_cond, critic, can_mask_prev_unmasked, steps):
    if "token_critic" in critic:
        critic = {"token_critic": make_net(logits_dim=1)}
    model = make_model(
        self_cond=self_cond, can_mask_prev_unmasked=can_mask_prev_unmasked, steps=steps, **critic
    )
    for batch_size, kwargs in [
        (None, {}),
        (1, {"start_temperature": 0.0}),
        (3, {"filter_thres": None, "noise_level_scale": 0.0}),
        (2, {"filter_thres": 1.0, "start_temperature": 10.0}),
    ]:
        ids = model.generate(batch_size, **kwargs)
        assert ids.shape == ((LENGTH,) if batch_size is None else (batch_size, LENGTH))
        assert ids.dtype == torch.int64
        assert ((ids >= 0) & (ids < NUM_TOKENS) & (ids != MASK_ID)).all()


def test_generate_repeats_by_seed_and_manual_seed():
    model = make_model()
    state = torch.get_rng_state()
    one = model.generate(4, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, model.generate(4, seed=7))
    assert not torch.equal(one, model.generate(4, seed=8))

    torch.manual_seed(1)
    first, second = model.generate(4), model.generate(4)
    torch.manual_seed(1)
    assert torch.equal(model.generate(4), first)
    assert not torch.equal(first, second)


def test_generate_restores_every_modules_mode():
    model = make_model(make_net(dropout=0.5), token_critic=make_net(logits_dim=1))
    model.token_critic.eval()  # frozen by the user
    modes = [m.training for m in model.modules()]
    during = []
    model.net.register_forward_pre_hook(lambda *_: during.append(model.net.attn_layers.training))
    model.generate()
    assert not any(during)
    assert [m.training for m in model.modules()] == modes

    for _ in model.generate_steps():
        assert [m.training for m in model.modules()] == modes  # also in between

    def fail(*_):
        raise KeyboardInterrupt

    model.net.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model.generate()
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("filter_thres", [-0.1, 1.1])
def test_filter_out_of_range(filter_thres):
    with pytest.raises(ValueError, match="filter_thres is"):
        make_model().generate(filter_thres=filter_thres)


def test_a_head_without_a_column_for_the_mask_token():
    last = NUM_TOKENS - 1
    model = make_model(make_net(logits_dim=last), mask_id=last, self_token_critic=True)
    model(clean_batch().clamp(max=last - 1)).loss.backward()
    for filter_thres in (None, 0.0, 0.7):
        ids = model.generate(32, start_temperature=50.0, filter_thres=filter_thres)
        assert ids.max() < last


def test_learns_and_generates_what_it_has_seen():
    model = make_model(self_token_critic=True, schedule="cosine")
    rows = clean_batch(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(120):
        model(rows.repeat(8, 1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    generated = model.generate(16, seed=0)
    matches = (generated[:, None] == rows).all(-1)
    assert matches.any(1).float().mean() > 0.8


# Other networks


@pytest.mark.parametrize("output", ["tensor", "tuple", "logits"])
def test_adapter_takes_logits_from_any_output(output):
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Net(Recorder):
        def forward(self, ids, **kwargs):
            logits = super().forward(ids, **kwargs)
            return {"tensor": logits, "tuple": (logits, None), "logits": Output(logits)}[output]

    torch.manual_seed(0)
    net = Net()
    model = make_model(NetAdapter(net, num_tokens=NUM_TOKENS, max_seq_len=LENGTH))
    losses = model(clean_batch(), seed=0)
    torch.manual_seed(0)
    assert losses == make_model(Recorder())(clean_batch(), seed=0)
    assert model.generate().shape == (LENGTH,)


def test_adapter_refuses_what_holds_no_logits():
    net = NetAdapter(nn.Identity(), num_tokens=NUM_TOKENS, max_seq_len=LENGTH)
    with pytest.raises(TypeError, match="Identity returned dict"):
        net({"a": 1})


def test_hugging_face_masked_lm():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    net = NetAdapter(
        transformers.BertForMaskedLM(config), num_tokens=config.vocab_size, max_seq_len=LENGTH
    )
    critic_config = copy.deepcopy(config)
    critic_config.num_labels = 1
    critic = transformers.BertForTokenClassification(critic_config)
    model = make_model(
        net, token_critic=NetAdapter(critic, num_tokens=NUM_TOKENS, max_seq_len=LENGTH)
    )
    batch = clean_batch(1).expand(16, -1)
    attention_mask = torch.ones_like(batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        losses = model(batch, attention_mask=attention_mask)
        losses.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses.generator_loss.item() < 0.5 * math.log(NUM_TOKENS)
    generated = model.generate(4, seed=0)
    assert (generated == batch[0]).float().mean() > 0.8


# What other trainers do with it


def test_losses_are_a_named_tuple_and_what_transformers_makes_of_one():
    losses = make_model()(clean_batch(), seed=0)
    loss, generator_loss, critic_loss = losses
    assert losses._fields == ("loss", "generator_loss", "critic_loss") and critic_loss is None
    assert losses == Losses(loss, generator_loss, None) == losses._replace(critic_loss=None)
    assert Losses(loss=loss, generator_loss=None, critic_loss=loss).critic_loss is loss
    assert pickle.loads(pickle.dumps(Losses(1.0, 2.0, None))) == Losses(1.0, 2.0, None)
    leaves, spec = tree_flatten(losses)
    assert type(tree_unflatten(leaves, spec)) is Losses
    assert losses[1:] == (generator_loss,) and losses[2] is None  # `outputs[1:]` of transformers
    # `nested_detach` of transformers: type(tensors)(f(t) for t in tensors)
    assert type(losses)(t if t is None else t.detach() for t in losses) == (loss, generator_loss)


@pytest.mark.parametrize("kind", ["tied", "self critic", "buffers"])
def test_a_state_dict_shares_no_memory(kind, tmp_path):
    from safetensors.torch import load_file, save_file

    if kind == "tied":
        net = hugging_face_net()
        net.net.cls.predictions.decoder.weight = net.net.bert.embeddings.word_embeddings.weight
        make = lambda: make_model(net)  # noqa: E731
    elif kind == "self critic":
        make = lambda: make_model(self_token_critic=True)  # noqa: E731
    else:
        net = make_net()
        net.register_buffer("one", torch.arange(4.0))
        net.register_buffer("other", net.one[1:])
        make = lambda: make_model(net)  # noqa: E731
    model = make()
    state = model.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == state.keys()
    model.load_state_dict(loaded)
    kept = model.state_dict(keep_vars=True)  # the parameters themselves
    assert all(kept[name] is parameter for name, parameter in model.named_parameters())
    with torch.device("meta"):
        empty = make_model(self_token_critic=True).state_dict()
    assert all(value.is_meta for value in empty.values())


def test_a_critic_does_not_judge_what_is_not_known():
    critic = Recorder(num_outputs=1)
    model = make_model(Recorder(), token_critic=critic)
    batch = corrupt(clean_batch(), model.masking, seed=0)
    known = batch.clean_ids
    batch.labels[:, :4] = -100
    ignored = batch.masked_indices.clone()
    ignored[:, 4:] = False
    losses = model(batch, seed=1)
    judged = critic.inputs[0]
    assert ((judged >= 0) & (judged < NUM_TOKENS) & (judged != MASK_ID)).all() and ignored.any()
    scores = critic.table(judged).squeeze(-1)
    each = F.binary_cross_entropy_with_logits(scores, (judged != known).float(), reduction="none")
    torch.testing.assert_close(losses.critic_loss, each[~ignored].mean())
    assert losses.loss.isfinite()


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


def test_the_default_type_changes_no_count():
    model, expected = make_model(), make_model().generate(3, seed=0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        masking = MaskingConfig(NUM_TOKENS, MASK_ID, schedule="cosine")
        assert torch.equal(model.generate(3, seed=0), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    wanted = MaskingConfig(NUM_TOKENS, MASK_ID, schedule="cosine")
    assert all(map(torch.equal, masking.table, wanted.table))


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_integers_of_any_kind_are_plain_inside(kind):
    class Sized(Recorder):
        num_tokens, max_seq_len = kind(NUM_TOKENS), kind(LENGTH)

    model = make_model(Sized(), mask_id=kind(MASK_ID), steps=kind(4), never_mask_ids=[kind(1)])
    values = model.masking.num_tokens, model.masking.mask_id, model.steps, model.max_seq_len
    assert all(type(value) is int for value in (*values, *model.masking.never_mask_ids))
    assert torch.equal(masks_of(model, seed=kind(3)), masks_of(model, seed=3))
    for wrong in (1.5, "1", None):
        with pytest.raises(TypeError, match=f"mask_id is {wrong!r}: it must be an int"):
            make_model(mask_id=wrong)
