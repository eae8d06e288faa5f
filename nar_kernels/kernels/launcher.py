"""Launches past Triton's own dispatch, which looks at every argument again in each call. With as
many as `corrupt` has that takes longer than a small batch does on a GPU: some 40 microseconds where
this takes 14 (`python -m tests.without_a_driver` measures both).
"""

from collections.abc import Callable, Hashable
from typing import Any

import triton
from torch import Tensor

# Earlier versions pass other arguments to a compiled kernel.
_COMPILED_KERNELS_TAKE_ALL = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)

_MOST_VARIANTS = 1024


class Launcher:
    """One kernel, and what it has been compiled to.

    Args:
        kernel: a ``triton.jit`` function.
        varying: arguments that differ from call to call and are listed in its
            ``do_not_specialize``: of them only the width matters.
    """

    def __init__(self, kernel: Any, varying: list[str]) -> None:
        self._kernel = kernel
        self._varying = [kernel.arg_names.index(name) for name in varying]
        self._compiled: dict[Hashable, tuple[Any, list]] = {}

    def __call__(
        self,
        grid: int,
        arguments: tuple[Tensor | int | None, ...],
        variant: Hashable,
        options: Callable[[], dict[str, Any]],
    ) -> Any:
        """Launches ``grid`` programs on the current stream of the current device.

        Args:
            arguments: in the kernel's order. The types of tensors are told by ``variant``.
            variant: the device, and all that ``options`` and types depend on beside ``arguments``.
            options: gives the compile-time arguments, of the kernel and of the compiler.

        Returns:
            The compiled kernel; None in the interpreter.
        """
        values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
        found = self._compiled.get(self._key(arguments, values, variant))
        if found is None:
            return self._launch_and_keep(grid, arguments, values, variant, options())
        compiled, constants = found
        compiled[(grid, 1, 1)](*values, *constants)
        return compiled

    def _key(self, arguments: tuple, values: list, variant: Hashable) -> Hashable:
        """What Triton tells kernels apart by, or finer: equal numbers, equal alignments."""
        key: list[Hashable] = [
            x if x is None or type(x) is int else value & 15
            for x, value in zip(arguments, values, strict=True)
        ]
        for i in self._varying:
            key[i] = -(1 << 31) <= values[i] < 1 << 31
        return variant, *key

    def _launch_and_keep(
        self, grid: int, arguments: tuple, values: list, variant: Hashable, options: dict[str, Any]
    ) -> Any:
        compiled = self._kernel[(grid,)](*arguments, **options)
        if compiled is not None and _COMPILED_KERNELS_TAKE_ALL:
            if len(self._compiled) >= _MOST_VARIANTS:
                self._compiled.clear()
            names = self._kernel.arg_names[len(arguments) :]
            key = self._key(arguments, values, variant)
            self._compiled[key] = compiled, [options[name] for name in names]
        return compiled
