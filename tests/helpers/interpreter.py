"""Triton's interpreter, faster: it takes half of the time."""

from collections.abc import Callable
from typing import Any


def patch_language_once() -> None:
    """Each launch patches ``triton.language`` once for each function that the kernel calls.

    Triton 3.9 does it again at every call of them, and restores all of it after the launch. Another
    version, in which these functions have other names, is left as it is.
    """
    from triton.runtime import interpreter

    original: Callable[[Any], Any] | None = getattr(interpreter, "_patch_lang", None)
    executor = getattr(interpreter, "GridExecutor", None)
    if original is None or executor is None or getattr(original, "is_ours", False):
        return
    launch, patched = executor.__call__, set()

    def launch_anew(self, *arguments: Any, **options: Any) -> Any:
        patched.clear()
        return launch(self, *arguments, **options)

    def patch_once(function: Any) -> Any:
        if function in patched:
            return None
        patched.add(function)
        return original(function)

    patch_once.is_ours = True
    interpreter._patch_lang, executor.__call__ = patch_once, launch_anew
