"""What the wrapper draws: a function of its seed, on every rank another."""

import os
import subprocess
import sys

import pytest
import torch

from nar_kernels import distributed
from nar_kernels.ops.corrupt import corrupt
from tests.helpers.models import Recorder, clean_batch, make_model, masks_of
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.seconds
def test_two_ranks_never_share_a_mask(tmp_path):
    command = [sys.executable, "-c", WORKER, str(ROOT)]
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
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
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
