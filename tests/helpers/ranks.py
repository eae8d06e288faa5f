"""Processes of torch.distributed, and what each of them does for `test_ranks.py`."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.helpers.paths import ROOT

RANKS = 2


def run(work: str, folder: Path) -> list[dict]:
    """What the function ``work(rank)`` of this module returns in each of two processes."""
    script = (
        "import sys, torch; import torch.distributed as dist; from tests.helpers import ranks\n"
        "rank, folder = int(sys.argv[1]), sys.argv[2]\n"
        "torch.set_num_threads(1)\n"
        "store = f'file://{folder}/store'\n"
        f"dist.init_process_group('gloo', init_method=store, rank=rank, world_size={RANKS})\n"
        f"torch.save(ranks.{work}(rank), f'{{folder}}/{{rank}}.pt')\n"
        "dist.barrier(); dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-c", script]
    workers = [
        subprocess.Popen([*command, str(rank), str(folder)], cwd=ROOT, env={**os.environ})
        for rank in range(RANKS)
    ]
    assert [worker.wait(timeout=180) for worker in workers] == [0] * RANKS
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


V, L, B = 37, 16, 4


def make_model(kind: str = "adapter", **options):
    from torch import nn
    from x_transformers import Encoder, TransformerWrapper

    from nar_kernels import NetAdapter, NonAutoregressiveWrapper

    torch.manual_seed(0)
    if kind == "transformer":
        layers = Encoder(dim=32, depth=1, heads=2, verbose=False)
        net = TransformerWrapper(num_tokens=V, max_seq_len=L, attn_layers=layers)
    else:
        body = nn.Sequential(nn.Embedding(V, 32), nn.Linear(32, V))
        net = NetAdapter(body, num_tokens=V, max_seq_len=L, head=body[1])
    return NonAutoregressiveWrapper(net, mask_id=V - 1, **options)


def batch_of(rank: int, size: int):
    from nar_kernels import MaskingConfig, corrupt

    ids = torch.arange(size * L).view(size, L) * (rank + 3) % (V - 1)
    maskable = torch.ones(size, L, dtype=torch.bool)
    if rank == 0:
        maskable[:, 2:] = False  # padding
    slots = torch.arange(size) + 100 * rank
    return corrupt(ids, MaskingConfig(V, V - 1), seed=1, sample_ids=slots, maskable=maskable)


def gradients(model) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def work_of_training(rank: int) -> dict:
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    found = {}
    for name, options in {
        "nelbo": {},
        "mean": {"use_simple_mdlm_loss_weight": False},
        "apart": {"average_tokens_across_devices": False},
    }.items():
        model = make_model(**options)
        parallel = DistributedDataParallel(model)
        loss = parallel(batch_of(rank, B + rank)).loss
        loss.backward()
        found[name] = {"loss": loss.item(), "gradients": gradients(model)}

    # A head that is called outside of it must not be taken for one that is not used.
    for kind in ("adapter", "transformer"):
        model = make_model(kind)
        model.net = DistributedDataParallel(model.net, find_unused_parameters=True)
        model(batch_of(rank, B)).loss.backward()

    critic = nn.Sequential(nn.Embedding(V, 1))
    model = make_model(token_critic=critic)
    with torch.no_grad():
        critic[0].weight.copy_(torch.linspace(-1, 1, V)[:, None])
    losses = DistributedDataParallel(model)(batch_of(rank, B + rank), seed=3)
    found["critic"] = losses.critic_loss.item() * (B * RANKS + 1) / (B + rank) / RANKS
    model.token_critic = None

    # One rank alone, as for an evaluation: nobody is waited for.
    if rank == 0:
        with torch.no_grad():
            model(batch_of(0, B))
        model.eval()
        model(batch_of(0, B))
    return found


def work_of_generation(rank: int) -> dict:
    model = make_model()
    options = {"seed": 5, "steps": 4, "strategy": "random"}
    return {
        "default": model.generate(3, **options),
        "fewer": model.generate(3 - rank, **options),
        "the same": model.generate(3, first_sequence=0, **options),
    }


def work_of_sharding(rank: int) -> dict:
    import warnings

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh("cpu", (RANKS,))
    ids = torch.arange(B * L).view(B, L) % (V - 1)
    found = {}
    for kind in ("adapter", "transformer", "inside"):
        expected = make_model(kind)
        model = make_model(kind)
        fully_shard(model.net.net if kind == "inside" else model.net, mesh=mesh)
        loss, wanted = (m(ids, seed=0).loss for m in (model, expected))
        loss.backward()
        wanted.backward()
        grads = [
            (p.grad.full_tensor(), q.grad)
            for p, q in zip(model.parameters(), expected.parameters(), strict=True)
        ]
        found[kind] = {
            "losses": (loss.item(), wanted.item()),
            "gradients": grads,
            "samples": (model.generate(3, seed=0), expected.generate(3, seed=0)),
        }
    return found
