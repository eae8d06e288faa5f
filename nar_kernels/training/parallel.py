"""Models that ranks share: replicated (DistributedDataParallel) or sharded (FSDP2).

Without torchrun there is one rank, and most of this does nothing.
"""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nar_kernels.distributed import has_group, is_launched, rank, world_size

# FSDP2 records events on the streams of its device.
SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")


@contextmanager
def init_distributed(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, if it did; gives this one's device."""
    joins = is_launched() and not has_group()
    if joins:
        # What is on the host, such as flags, goes through gloo also where the net is on GPUs.
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    if device.type == "cuda" and has_group():
        fallback = rank() % torch.cuda.device_count()  # who is not started by torchrun
        device = torch.device("cuda", dist.get_node_local_rank(fallback))
        torch.cuda.set_device(device)
    yield device
    # Not after an error: others may wait for this rank in the middle of something.
    if joins:
        dist.destroy_process_group()


def replicate(model: nn.Module) -> nn.Module:
    """``model`` with gradients that are means over ranks; itself if there is one."""
    if world_size() == 1:
        return model
    # Buffers are constants here: nobody needs to send them around in every step. PyTorch 2.13 has
    # a new name for that, and warns of the old one.
    names = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(model, **options)


def shard(model: Any, blocks: Sequence[list[nn.Module]], device: torch.device) -> None:
    """Divides the parameters of ``model`` over ranks, in place, and moves them to ``device``.

    Those of a block are whole from the call of its first module to the end of its last one, those
    outside of blocks while ``model`` runs. Gradients are means over ranks.

    Raises:
        ValueError: there is only one process, or this PyTorch has FSDP2 for GPUs alone.
    """
    if world_size() == 1:
        raise ValueError(
            "--shard divides the weights over processes, and there is one: start several with "
            "torchrun --nproc-per-node 8 -m nar_kernels.cli train ..., or leave it out"
        )
    if device.type == "cpu" and not SHARDS_ON_CPU:
        raise ValueError(
            f"PyTorch {torch.__version__} divides weights over GPUs alone, and this is the CPU: "
            "install a later one, or leave out --shard"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # It says that nothing may be added in place to what blocks return; x-transformers adds to it
    # out of place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # What is called first is the root to FSDP2 from then on, and evaluation may call a block first.
    model.call_nothing = lambda: None
    register_fsdp_forward_method(model, "call_nothing")
    model.call_nothing()
    model.reshard()


def is_sharded(model: nn.Module) -> bool:
    # The class of FSDP2 costs a second to import.
    return hasattr(model, "set_requires_gradient_sync")


def accumulating(model: Any, *, is_last: bool) -> AbstractContextManager[Any]:
    """Around the forward and backward pass of a part of a batch: only at its last part do ranks
    exchange gradients."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if is_last else model.no_sync()
    if is_sharded(model):
        model.set_requires_gradient_sync(is_last)
    return nullcontext()


@contextmanager
def unsharded(model: Any) -> Iterator[None]:
    """Where parts of ``model`` are called by themselves, which do not gather what is not theirs."""
    if is_sharded(model):
        model.unshard()
    yield
    if is_sharded(model):
        model.reshard()


def local(tensor: Any) -> Tensor:
    """This rank's part of a tensor that is divided over ranks; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor: Any) -> Tensor:
    """All parts of a tensor that is divided over ranks; any other as it is."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def is_divided(value: Any) -> bool:
    """Whether it is a tensor that is divided over ranks."""
    return hasattr(value, "full_tensor")


def distribute_like(state: dict[Any, Any], like: dict[Any, Any]) -> dict[Any, Any]:
    """Whole tensors, divided as those of their shape in ``like`` if those are. One on the device
    ``meta`` becomes memory without values."""
    return {key: _divide(value, like.get(key)) for key, value in state.items()}


def divide_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Whole tensors of a state dict, divided as the parameters are to which they belong."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    divided = {
        index: distribute_like(entry, dict.fromkeys(entry, parameters[index]))
        for index, entry in state["state"].items()
    }
    return {**state, "state": divided}


def _divide(value: Any, like: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    fits = is_divided(like) and value.shape == like.shape
    if value.is_meta:
        return torch.empty_like(like) if fits else torch.empty_like(value, device="cpu")
    if not fits:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)
