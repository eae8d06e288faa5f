"""The wrapper under torch.distributed, in two processes: losses, samples, divided weights."""

import pytest
import torch

from nar_kernels.training.parallel import SHARDS_ON_CPU
from tests.helpers.ranks import RANKS, B, V, batch_of, gradients, make_model, run

pytestmark = pytest.mark.seconds


def whole(name: str) -> tuple[float, list[torch.Tensor]]:
    model = make_model(use_simple_mdlm_loss_weight=name != "mean")
    parts = [batch_of(rank, B + rank) for rank in range(RANKS)]
    counts = [p.num_maskable if name != "mean" else p.num_masked for p in parts]
    normalizer = torch.cat(counts).sum()
    losses = [model(part, normalizer=normalizer).loss for part in parts]
    sum(losses).backward()
    return sum(losses).item(), gradients(model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run("work_of_training", tmp_path_factory.mktemp("training"))


@pytest.mark.parametrize("name", ["nelbo", "mean"])
def test_gradients_are_those_of_one_batch(trained, name):
    """Though one rank has an eighth of the positions of the other."""
    loss, wanted = whole(name)
    for found in trained:
        for got, expected in zip(found[name]["gradients"], wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert sum(f[name]["loss"] for f in trained) / RANKS == pytest.approx(loss, rel=1e-6)


def test_ranks_may_count_for_themselves(trained):
    for rank, found in enumerate(trained):
        alone = make_model()(batch_of(rank, B + rank)).loss.item()
        assert found["apart"]["loss"] == pytest.approx(alone, rel=1e-6)
    far = [
        (got - expected).norm() / expected.norm()
        for got, expected in zip(trained[0]["apart"]["gradients"], whole("nelbo")[1], strict=True)
    ]
    assert max(far) > 0.1  # this is what it is about


def test_the_critic_counts_all_ranks(trained):
    """Its loss times the size of the global batch over ranks is that of a batch alone."""
    critic = torch.nn.Sequential(torch.nn.Embedding(V, 1))
    with torch.no_grad():
        critic[0].weight.copy_(torch.linspace(-1, 1, V)[:, None])
    for rank, found in enumerate(trained):
        model = make_model(token_critic=critic).eval()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nar_kernels.distributed.rank", lambda rank=rank: rank)
            patch.setattr("nar_kernels.distributed.world_size", lambda: RANKS)
            alone = model(batch_of(rank, B + rank), seed=3).critic_loss.item()
        assert found["critic"] == pytest.approx(alone, rel=1e-5)


def test_ranks_generate_different_sequences(tmp_path):
    found = run("work_of_generation", tmp_path)
    options = {"seed": 5, "steps": 4, "strategy": "random"}
    together = torch.stack([f["default"] for f in found], 1).flatten(0, 1)
    assert torch.equal(together, make_model().generate(6, **options))
    assert torch.equal(found[0]["the same"], found[1]["the same"])
    assert not (found[0]["fewer"][:, None] == found[1]["fewer"]).all(-1).any()


@pytest.mark.skipif(not SHARDS_ON_CPU, reason="this PyTorch has FSDP2 for GPUs alone")
def test_a_net_that_is_sharded_by_itself(tmp_path):
    """By FSDP2, inside a wrapper that knows nothing of it."""
    found = run("work_of_sharding", tmp_path)
    for kind in ("adapter", "transformer", "inside"):
        for f in found:
            assert f[kind]["losses"][0] == pytest.approx(f[kind]["losses"][1], rel=1e-5)
            assert torch.equal(*f[kind]["samples"])
        # A mean over ranks here, and this rank's own there.
        for i, (got, _) in enumerate(found[0][kind]["gradients"]):
            mean = sum(f[kind]["gradients"][i][1] for f in found) / RANKS
            torch.testing.assert_close(got, mean, rtol=1e-4, atol=1e-6)
