"""A GPU that is not there: tensors that say they are on it, computed by the CPU, and a record of
what would have made the host wait.

    gpu = PretendGpu()
    with gpu:
        x = torch.ones(3, device="cuda")  # x.device, x.is_cuda and x.is_cpu are those of a GPU
        (x * 2).sum().backward()
        assert not gpu.waits
        x.tolist()
        assert gpu.waits == ["Tensor.tolist"]

What PyTorch's own fake tensors lack: they have no values, and autograd refuses them on devices that
PyTorch was not built for.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_any, tree_leaves, tree_map_only

DEVICE = torch.device("cuda", 0)

aten = torch.ops.aten

# Operators that read the device to know their result, or its shape.
_WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"),
    *("unique_consecutive", "unique_dim", "repeat_interleave", "_pin_memory", "bincount"),
}
_BY_INDICES = ("index", "index_put", "index_put_", "_index_put_impl_")


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class GpuTensor(Tensor):
    """To autograd a tensor of the CPU; to whoever asks in Python, one of a GPU."""

    inner: Tensor
    gpu: "PretendGpu"

    @staticmethod
    def __new__(cls, inner: Tensor, gpu: "PretendGpu") -> "GpuTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=inner.device,
            requires_grad=inner.requires_grad,
        )
        made.inner, made.gpu = inner, gpu
        return made

    def __repr__(self) -> str:
        return f"GpuTensor({self.inner})"

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name in ("tolist", "numpy", "__array__", "cpu", "data_ptr"):
            args[0].gpu.waits.append(f"Tensor.{name}")
            return function(args[0].inner.detach(), *args[1:], **kwargs)
        if name == "to":
            args, kwargs, elsewhere = _without_device(args, kwargs)
            if elsewhere is not None:
                args[0].gpu.waits.append(f"Tensor.to({str(elsewhere)!r})")
                return args[0].inner.detach().to(elsewhere, *args[1:], **kwargs)
            if len(args) == 1 and not {"dtype", "copy", "memory_format"} & kwargs.keys():
                return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        gpu = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, GpuTensor)).gpu
        return gpu.run(function, args, kwargs or {})


def _without_device(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], Any]:
    """Arguments of `Tensor.to` without a device, and where it wants to go, if not to the GPU."""
    wanted = [
        x for x in (*args[1:], kwargs.pop("device", None)) if isinstance(x, str | torch.device)
    ]
    others = [x for x in args[1:] if not isinstance(x, str | torch.device)]
    if others and isinstance(others[0], Tensor):
        wanted, others = [others[0].device], [others[0].dtype, *others[1:]]
    elsewhere = next((d for d in wanted if not _is_gpu(d)), None)
    return (args[0], *others), kwargs, elsewhere


class PretendGpu(TorchDispatchMode):
    """While it is active, ``device="cuda"`` works.

    Attributes:
        waits: what has made the host wait, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.run(function, args, kwargs or {})

    def run(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        leaves = tree_leaves((args, kwargs))
        on_gpu = any(isinstance(x, GpuTensor) for x in leaves) or _is_gpu(kwargs.get("device"))
        self._note_waiting(function, args, kwargs, on_gpu)
        inner_args, inner_kwargs = tree_map_only(GpuTensor, lambda x: x.inner, (args, kwargs))
        if _is_gpu(inner_kwargs.get("device")):
            inner_kwargs["device"] = torch.device("cpu")
        if function.namespace == "nar_kernels":  # kernels of a GPU are those of the CPU
            inner_args = tuple("reference" if x in ("cuda", "triton") else x for x in inner_args)
        is_pinned = inner_kwargs.pop("pin_memory", False)
        with torch.utils._python_dispatch._disable_current_modes():
            out = function(*inner_args, **inner_kwargs)
        if is_pinned:
            out.is_pretended_pinned = True
        if not on_gpu:
            return out
        out = tree_map_only(Tensor, lambda x: GpuTensor(x, self), out)
        if function.namespace == "nar_kernels":
            return out
        return return_and_correct_aliasing(function, args, kwargs, out)

    def _note_waiting(self, function: Any, args: Any, kwargs: dict[str, Any], on_gpu: bool) -> None:
        if not on_gpu:
            return
        name = function._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        is_mask = name in _BY_INDICES and tree_any(
            lambda x: isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8), args[1]
        )
        # A copy from memory that is not pinned, or not declared asynchronous; a scalar of the host
        # goes along with the launch.
        on_host = [x for x in tensors if not isinstance(x, GpuTensor)]
        crosses = 0 < len(on_host) < len(tensors)
        if crosses and all(hasattr(x, "is_pretended_pinned") for x in on_host):
            crosses = not (kwargs.get("non_blocking") or any(x is True for x in args))
        is_copy = name in ("copy_", "_to_copy", "_copy_from")
        arrives = name == "_to_copy" and not any(isinstance(x, GpuTensor) for x in tensors)
        if name in _WAITING or is_mask or (is_copy and (crosses or arrives)):
            self.waits.append(f"aten.{name}")


def _tensor(*args: Any, device: Any = None, _tensor: Any = torch.tensor, **kwargs: Any) -> Tensor:
    """`torch.tensor`: values of the host, which go to the GPU by a copy that waits."""
    if not _is_gpu(device):
        return _tensor(*args, device=device, **kwargs)
    return _tensor(*args, device="cpu", **kwargs).to(DEVICE)


def _device_type(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") else "cpu"


def _group_by_type(lists: Any, with_indices: bool = False) -> dict[Any, Any]:
    """`torch._C._group_tensors_by_device_and_dtype`, which asks C++ for the device."""
    places: dict[Any, list[int]] = {}
    for i, x in enumerate(lists[0]):
        places.setdefault((x.device, x.dtype), []).append(i)
    return {
        key: (
            [[column[i] for i in chosen] if column else [] for column in lists],
            chosen if with_indices else [],
        )
        for key, chosen in places.items()
    }


class _Event(NamedTuple):
    gpu: PretendGpu

    def synchronize(self) -> None:
        self.gpu.waits.append("Event.synchronize")


class _Stream(NamedTuple):
    gpu: PretendGpu

    def record_event(self) -> _Event:
        return _Event(self.gpu)


@contextmanager
def pretend_gpu() -> Iterator[PretendGpu]:
    """:class:`PretendGpu`, where PyTorch and this package believe in it."""
    gpu = PretendGpu()
    get_overwrite = torch.__future__.get_overwrite_module_params_on_conversion
    set_overwrite = torch.__future__.set_overwrite_module_params_on_conversion
    before = get_overwrite()
    with (
        gpu,
        mock.patch("torch.cuda._lazy_init"),
        mock.patch("torch.cuda.get_device_name", lambda device: "none"),
        mock.patch("torch.cuda.mem_get_info", lambda device: (1 << 40, 1 << 40)),
        mock.patch("torch.tensor", _tensor),
        mock.patch("torch._C._group_tensors_by_device_and_dtype", _group_by_type),
        mock.patch("nar_kernels.ops.backends.device_type", _device_type),
        mock.patch("torch.cuda.device_count", lambda: 1),
        mock.patch("torch.cuda.current_device", lambda: 0),
        mock.patch("torch.cuda.device", nullcontext),
        mock.patch("torch.cuda.current_stream", lambda device=None: _Stream(gpu)),
        mock.patch("torch.cuda.is_current_stream_capturing", lambda: False),
    ):
        set_overwrite(True)  # a parameter that moves is another tensor
        try:
            yield gpu
        finally:
            set_overwrite(before)
