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


def vocabulary_cases() -> dict:
    """Number of tokens, type, options of `masked_nll`, and what is special, by name."""
    import itertools

    wide, narrow = torch.float64, torch.bfloat16
    cases = {
        f"{tokens}-{reduction}": (tokens, wide, {"reduction": reduction}, "")
        for tokens, reduction in itertools.product((258, 12, 2), ("nelbo", "mean", "none"))
    }
    for name in ("no bias", "no_grad", "chunks", "again", "ignored", "forbidden", "hidden alone"):
        for reduction in ("nelbo", "none"):
            cases[f"{name}-{reduction}"] = 12, wide, {"reduction": reduction}, name
    for name in ("forbidden label", "all forbidden", "infinite"):
        cases[name] = 12, wide, {"reduction": "none"}, name
    cases["float32"] = 258, torch.float32, {}, ""
    cases["reference"] = 258, torch.float32, {"backend": "reference"}, ""
    if os.environ.get("TRITON_INTERPRET") == "1":
        cases["triton"] = 258, torch.float32, {"backend": "triton"}, ""
    cases["far from 0"] = 12, torch.float32, {"reduction": "none"}, "far"
    cases["bfloat16"] = 258, narrow, {}, ""
    cases["confident"] = 12, narrow, {"reduction": "none"}, "confident"
    cases["confident, half"] = 12, torch.float16, {}, "confident"
    cases["compiled"] = 258, torch.float32, {}, "compiled"
    cases["autocast"] = 258, torch.float32, {}, "autocast"
    return cases


def vocabulary_case(name: str, distribute) -> list[torch.Tensor]:
    """The loss of a case, and its gradients. The head is given to ``distribute`` first."""
    import dataclasses

    from nar_kernels import masked_nll
    from nar_kernels.ops import linear
    from tests.helpers.losses import corrupted_batch, random_inputs

    tokens, dtype, options, special = vocabulary_cases()[name]
    batch = corrupted_batch(tokens, tokens - 1, length=9)
    hidden, weight, bias = random_inputs(batch, tokens - 1, dtype=dtype)
    if special == "forbidden":
        bias[: len(bias) // 2 + 1] = -torch.inf  # all that the first rank has
        batch = dataclasses.replace(batch, labels=batch.labels.masked_fill(batch.labels >= 0, 9))
    if special == "forbidden label":
        bias[batch.labels.max()] = -torch.inf
    if special == "all forbidden":
        bias[:] = -torch.inf
    if special == "infinite":
        bias[2] = torch.inf
    if special == "far":  # whole numbers, which float32 has exactly
        hidden, weight, bias = (1000 * hidden).round(), weight.round(), 0 * bias
    if special == "confident":  # gaps to the label's logit of up to 12
        weight = torch.nn.functional.normalize(weight, dim=1)
        at_label = weight[batch.labels.clamp(0, len(weight) - 1)]
        hidden = torch.linspace(5, 12, 9)[:, None].to(dtype) * at_label
    if special == "ignored":
        batch.labels[1] = -100
    limits = linear.NLL_LIMITS["cpu"]
    if special == "chunks":
        linear.NLL_LIMITS["cpu"] = limits._replace(logits=7 * tokens)
    hidden.requires_grad_()
    weight, bias = (distribute(x) for x in (weight, bias))
    leaves = [hidden] if special == "hidden alone" else [hidden, weight, bias]
    if special == "no bias":
        del leaves[2]
    for leaf in leaves:
        leaf.requires_grad_()
    enabled = special != "no_grad"
    with torch.set_grad_enabled(enabled), torch.autocast("cpu", enabled=special == "autocast"):
        given = None if special == "no bias" else bias
        function = masked_nll
        if special == "compiled":
            function = torch.compile(masked_nll, backend="eager")
        loss = function(hidden, weight, batch, bias=given, **options)
    linear.NLL_LIMITS["cpu"] = limits
    if not enabled:
        return [loss]
    upstream = torch.linspace(1, 2, loss.numel()).view(loss.shape).to(loss)
    if special == "again":
        loss.backward(upstream, retain_graph=True)
    loss.backward(upstream)
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def work_of_vocabulary(rank: int) -> dict:
    import pytest
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from nar_kernels import masked_nll
    from tests.helpers.losses import corrupted_batch, random_inputs

    mesh = init_device_mesh("cpu", (RANKS,))
    found = {}
    for name in vocabulary_cases():
        got = vocabulary_case(name, lambda x: distribute_tensor(x, mesh, [Shard(0)]))
        for gradient in got[2:]:
            assert gradient.placements == (Shard(0),)
        found[name] = [*got[:2], *(gradient.full_tensor() for gradient in got[2:])]

    batch = corrupted_batch()
    hidden, weight, bias = random_inputs(batch)
    whole, rows = [Replicate()], [Shard(0)]
    sharded = distribute_tensor(weight, mesh, rows)
    for match, weight_, bias_ in (
        (
            r"weight is a DTensor with placements \(Replicate",
            distribute_tensor(weight, mesh, whole),
            None,
        ),
        (r"placements \(Shard\(dim=1", distribute_tensor(weight, mesh, [Shard(1)]), None),
        ("bias must be a DTensor, sharded as weight is", sharded, bias),
        ("bias must be a DTensor", sharded, distribute_tensor(bias, mesh, whole)),
        ("bias is a DTensor, but weight is not", weight, distribute_tensor(bias, mesh, rows)),
    ):
        with pytest.raises(ValueError, match=match):
            masked_nll(hidden, weight_, batch, bias=bias_)
    with pytest.raises(ValueError, match=r"weight has shape \[10, 5\]"):
        masked_nll(hidden, distribute_tensor(weight[:10], mesh, rows), batch)
    with pytest.raises(ValueError, match="hidden is a DTensor: pass the whole tensor"):
        masked_nll(distribute_tensor(hidden, mesh, whole), sharded, batch)
    return found
