"""Data parallelism: replicated (DistributedDataParallel) or sharded (FSDP2) models.

Without torchrun there is one rank, and most of this is a no-op.
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
    """Initialises the process group if launched by torchrun; yields this rank's device."""
    joins = is_launched() and not has_group()
    if joins:
        # gloo also with GPUs: for host tensors, such as flags.
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    if device.type == "cuda" and has_group():
        fallback = rank() % torch.cuda.device_count()  # not launched by torchrun
        device = torch.device("cuda", dist.get_node_local_rank(fallback))
        torch.cuda.set_device(device)
    yield device
    # Not after an error: other ranks may be waiting for this one in a collective.
    if joins:
        dist.destroy_process_group()


def replicate(model: nn.Module, stream: torch.cuda.Stream | None = None) -> nn.Module:
    """``model`` in DistributedDataParallel, which averages gradients over ranks; ``model`` itself
    with one rank.

    Args:
        stream: where a CUDA graph captures the backward pass, if one does: gradients are
            accumulated on the stream that DistributedDataParallel is made on.
    """
    if world_size() == 1:
        return model
    # Buffers are constants here: no broadcast per step. PyTorch 2.13 renames the option, and warns
    # of the old name.
    names = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
    if stream is None:
        return DistributedDataParallel(model, **options)
    torch.cuda.synchronize(stream.device)
    with torch.cuda.stream(stream):
        parallel = DistributedDataParallel(model, **options)
    torch.cuda.synchronize(stream.device)
    return parallel


def shard(model: Any, blocks: Sequence[list[nn.Module]], device: torch.device) -> None:
    """Shards the parameters of ``model`` over ranks (FSDP2) on ``device``, in place.

    Parameters of a block are gathered from the call of its first module to the end of its last
    one, parameters outside of blocks while ``model`` runs. Gradients are averaged over ranks.

    Raises:
        ValueError: there is only one process, or this PyTorch has FSDP2 for GPUs only.
    """
    if world_size() == 1:
        raise ValueError(
            "--shard shards the weights over processes, and there is one: start several with "
            "torchrun --nproc-per-node 8 -m nar_kernels.cli train ..., or use --no-shard"
        )
    if device.type == "cpu" and not SHARDS_ON_CPU:
        raise ValueError(
            f"PyTorch {torch.__version__} shards weights over GPUs only, and this is the CPU: "
            "install a later one, or use --no-shard"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # The warning is about in-place addition to the outputs of blocks; x-transformers adds out of
    # place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # FSDP2 takes the module that is called first for the root: call the model, since evaluation may
    # call a block first.
    model.call_nothing = lambda: None
    register_fsdp_forward_method(model, "call_nothing")
    model.call_nothing()
    model.reshard()


def is_sharded(model: nn.Module) -> bool:
    # Not isinstance: importing FSDPModule takes a second.
    return hasattr(model, "set_requires_gradient_sync")


def accumulating(model: Any, *, is_last: bool) -> AbstractContextManager[Any]:
    """Context for forward and backward of a microbatch: gradients are synchronised over ranks only
    at the last one (``no_sync``)."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if is_last else model.no_sync()
    if is_sharded(model):
        model.set_requires_gradient_sync(is_last)
    return nullcontext()


@contextmanager
def unsharded(model: Any) -> Iterator[None]:
    """Context for calls of submodules of ``model``: gathers the parameters outside of blocks."""
    if is_sharded(model):
        model.unshard()
    yield
    if is_sharded(model):
        model.reshard()


def to_local(tensor: Any) -> Tensor:
    """This rank's shard of a DTensor; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Any) -> Tensor:
    """A DTensor gathered from all ranks; any other tensor unchanged."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def is_dtensor(value: Any) -> bool:
    """Whether ``value`` is a DTensor: a tensor sharded over ranks."""
    return hasattr(value, "full_tensor")


def distribute_like(state: dict[Any, Any], like: dict[Any, Any]) -> dict[Any, Any]:
    """Shards full tensors to the placements of their namesakes in ``like`` that are DTensors of the
    same shape. Tensors on ``meta`` become uninitialised memory."""
    return {key: _distribute(value, like.get(key)) for key, value in state.items()}


def distribute_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Shards the full tensors of an optimiser state dict like the parameters they belong to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        index: distribute_like(entry, dict.fromkeys(entry, parameters[index]))
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def _distribute(value: Any, like: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    fits = is_dtensor(like) and value.shape == like.shape
    if value.is_meta:
        return torch.empty_like(like) if fits else torch.empty_like(value, device="cpu")
    if not fits:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)
