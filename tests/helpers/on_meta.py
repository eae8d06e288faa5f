"""A plugin of pytest: whatever tests call in nar_kernels runs with another default device and type.

Tests and their nets make tensors on the CPU, as ever; a tensor that the package makes without
saying where would be on the device "meta", without values, and one without saying of what type
would be of bfloat16.
"""

import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def _defaults(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    # The type is that of all threads, of which one at a time may change it.
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        if is_main:
            torch.set_default_dtype(before)


def other_defaults() -> AbstractContextManager[None]:
    return _defaults("meta", torch.bfloat16)


def usual_defaults() -> AbstractContextManager[None]:
    """For what belongs to a user, and is called from inside."""
    return _defaults("cpu", torch.float32)


def with_usual_defaults(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with usual_defaults():
            return function(*args, **kwargs)

    return call


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generator(*args: Any, **kwargs: Any) -> Any:
            steps = function(*args, **kwargs)
            while True:
                with other_defaults():
                    step = next(steps, steps)
                if step is steps:
                    return
                yield step

        return generator

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        processor = kwargs.get("logits_processor")
        if processor is not None:  # a user's
            kwargs["logits_processor"] = with_usual_defaults(processor)
        with other_defaults():
            return function(*args, **kwargs)

    return call


def pytest_configure() -> None:
    from nar_kernels import wrapper
    from nar_kernels.data import corpus, loader
    from nar_kernels.data.windows import dataset
    from nar_kernels.ops import choose, corrupt, corrupted, masked_nll, masking, unmask, windows
    from nar_kernels.sampling import decode, halton, plan, states
    from nar_kernels.spec import schedules

    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "nar_kernels"]
    functions = {
        f: wrapped(f)
        for f in (
            *(corrupt.corrupt, windows.windows, windows.permute),
            *(
                choose.run_choose,
                unmask.unmask,
                masked_nll.masked_nll,
                masked_nll.head_nll,
                decode.sample_tokens,
            ),
            *(plan.make_plan, plan.num_masked_after, halton.halton_order, schedules.tabulate),
        )
    }
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, types.FunctionType) and value in functions:
                setattr(module, name, functions[value])
    for cls in (
        *(masking.MaskingConfig, corrupted.Corrupted, corpus.Corpus, dataset.TokenDataset),
        *(corrupt.CorruptStep, loader.MaskedLoader, states.DecodeIterator),
    ):
        for name, value in list(vars(cls).items()):
            if isinstance(value, types.FunctionType):
                setattr(cls, name, wrapped(value))
    # Not those that only pass something on, and not the making of modules, whose place is wanted.
    for name in ("forward", "generate", "generate_steps", "sample"):
        function = getattr(wrapper.NonAutoregressiveWrapper, name)
        setattr(wrapper.NonAutoregressiveWrapper, name, wrapped(function))

    ours = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(self).__module__.startswith("nar_kernels."):
            return ours(self, *args, **kwargs)
        with usual_defaults():
            return ours(self, *args, **kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
