"""Launches kernels past Triton's dispatch, which inspects every argument in each call: with as many
as `corrupt` has, that takes longer than a small batch on a GPU (host time in microseconds: `python
-m tests.helpers.without_a_driver`).
"""

from collections.abc import Callable, Hashable
from typing import Any

import triton
from torch import Tensor

# Allow-list: versions whose compiled kernels tests/ops/test_gpu_code.py launches this way. The call
# is not Triton's public interface, so any other version takes its own dispatch.
TESTED_TRITON = ("3.6", "3.8", "3.9")
_IS_TESTED = triton.__version__.startswith(tuple(f"{version}." for version in TESTED_TRITON))

_MOST_VARIANTS = 1024

Argument = Tensor | int | float | None


class Launcher:
    """One kernel, and what it has been compiled to.

    Args:
        kernel: a ``triton.jit`` function.
        varying: its ``do_not_specialize``: numbers on whose values no kernel is specialized. Each
            has one width, by its range or by an annotation.
    """

    def __init__(self, kernel: Any, varying: list[str]) -> None:
        self._kernel = kernel
        self._varying = frozenset(kernel.arg_names.index(name) for name in varying)
        self._compiled: dict[Hashable, tuple[Any, list]] = {}

    def __call__(
        self,
        grid: int,
        arguments: tuple[Argument, ...],
        variant: Hashable,
        options: Callable[[], dict[str, Any]],
    ) -> Any:
        """Launches ``grid`` programs on the current stream of the current device.

        Args:
            arguments: in the kernel's order. The types of tensors are told by ``variant``.
            variant: the device, and all that ``options`` and types depend on beside the
                ``arguments`` that do not vary.
            options: gives the compile-time arguments, of the kernel and of the compiler.

        Returns:
            The compiled kernel; None in the interpreter.
        """
        values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
        key = variant, *self._specialized(arguments, values)
        found = self._compiled.get(key)
        if found is None:
            return self._launch_and_keep(grid, arguments, key, options())
        compiled, constants = found
        compiled[(grid, 1, 1)](*values, *constants)
        return compiled

    def _specialized(self, arguments: tuple, values: list) -> list[Hashable]:
        """At least what Triton specializes on: values of numbers, alignment of tensors."""
        return [
            value & 15 if isinstance(x, Tensor) else x
            for i, (x, value) in enumerate(zip(arguments, values, strict=True))
            if i not in self._varying
        ]

    def _launch_and_keep(
        self, grid: int, arguments: tuple, key: Hashable, options: dict[str, Any]
    ) -> Any:
        compiled = self._kernel[(grid,)](*arguments, **options)
        if compiled is not None and _IS_TESTED:
            if len(self._compiled) >= _MOST_VARIANTS:
                self._compiled.clear()
            names = self._kernel.arg_names[len(arguments) :]
            self._compiled[key] = compiled, [options[name] for name in names]
        return compiled
