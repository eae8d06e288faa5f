"""What a run says while it lasts: :class:`Progress`."""

import sys
import time
from typing import Any

from nar_kernels.extras import import_extra

_LOG_SECONDS = 30.0


class Progress:
    """Lines on stdout; a bar on stderr, with tokens a second and the time left, if that is a
    terminal, and else a line every half minute."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._tqdm = import_extra("tqdm", "prepare").tqdm
        self._bar: Any = None

    def say(self, line: str) -> None:
        if not self._quiet:
            self._tqdm.write(line)
            sys.stdout.flush()

    def begin(self, total: int, done: int) -> None:
        """The inputs have ``total`` bytes, of which ``done`` need not be read again."""
        self._bar = self._tqdm(
            total=total,
            initial=done,
            unit="B",
            unit_scale=True,
            disable=self._quiet or None,
            dynamic_ncols=True,
        )
        self._num_tokens = 0
        self._began = self._logged = time.monotonic()
        self._read, self._total = done, total

    def update(self, read: int, num_tokens: int) -> None:
        """Of the inputs, ``read`` bytes are done, which gave so many more tokens."""
        self._num_tokens += num_tokens
        self._bar.set_postfix_str(self._state(), refresh=False)
        self._bar.update(read - self._read)
        self._read = read
        now = time.monotonic()
        if self._bar.disable and now - self._logged >= _LOG_SECONDS:
            self._logged = now
            self.say(f"{100 * read / max(self._total, 1):.0f} %: {self._state()}")

    def _state(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = self._num_tokens / seconds
        return f"{short(self._num_tokens)} tokens, {short(rate)} tokens/s"

    def end(self) -> str:
        """What was done, in how much time."""
        self._bar.close()
        seconds = time.monotonic() - self._began
        return f"{self._state()}, {seconds:.1f} s"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def short(number: float) -> str:
    """Such as 12.3M."""
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.3g}"
