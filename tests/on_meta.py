"""A plugin of pytest: whatever tests call in nar_kernels runs with another default device and type.

Tests and their nets make tensors on the CPU, as ever; a tensor that the package makes without
saying where would be on the device "meta", without values, and one without saying of what type
would be of bfloat16.
"""

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def other_defaults() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def usual_defaults() -> Iterator[None]:
    """For what belongs to a user, and is called from inside."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


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
        with other_defaults():
            return function(*args, **kwargs)

    return call


def pytest_configure() -> None:
    from nar_kernels import (  # noqa: F401
        choice,
        corpus,
        data,
        decode,
        loss,
        masking,
        ops,
        plan,
        schedules,
        unmasking,
        wrapper,
    )

    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "nar_kernels"]
    functions = {
        f: wrapped(f)
        for f in (
            *(ops.corrupt, ops.corrupt_step, ops.windows, ops.permute, unmasking.unmask),
            *(loss.masked_nll, loss.head_nll, plan.make_plan, plan.halton_order),
            *(plan.num_masked_after, schedules.tabulate, decode.decode, decode.draw_tokens),
        )
    }
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, types.FunctionType) and value in functions:
                setattr(module, name, functions[value])
    for cls in (
        *(masking.MaskingConfig, masking.Corrupted, corpus.Corpus, data.TokenDataset),
        *(data.MaskedLoader, choice.Ranking),
    ):
        for name, value in list(vars(cls).items()):
            if isinstance(value, types.FunctionType):
                setattr(cls, name, wrapped(value))
    # Not those that only pass something on, and not the making of modules, whose place is wanted.
    for name in ("forward", "generate", "generate_steps"):
        function = getattr(wrapper.NonAutoregressiveWrapper, name)
        setattr(wrapper.NonAutoregressiveWrapper, name, wrapped(function))

    ours = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(self).__module__.startswith("nar_kernels."):
            return ours(self, *args, **kwargs)
        with usual_defaults():
            return ours(self, *args, **kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
