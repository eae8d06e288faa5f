"""The suite's log file."""

import threading
from collections import Counter
from pathlib import Path

LIMIT = 12 << 20  # bytes, over all steps and calls
LIMIT_OF_STEP = 1 << 20  # bytes per step in this call


class Log:
    """One thread-safe log file for all steps, with lines ``name| line``."""

    def __init__(self, path: Path) -> None:
        if path.exists() and path.stat().st_size > LIMIT // 2:  # room for this call
            path.write_bytes(path.read_bytes()[-LIMIT // 2 :])
        self._file = path.open("a", encoding="utf-8", errors="replace")
        self._size = path.stat().st_size
        self._sizes: Counter[str] = Counter()
        self._lock = threading.Lock()

    def write(self, name: str, line: str) -> None:
        text = f"{name}| {line[:2000]}\n"
        size = len(text.encode("utf-8", "replace"))
        with self._lock:
            is_full = self._size + size > LIMIT or self._sizes[name] > LIMIT_OF_STEP
            if is_full or self._file.closed:  # closed: by a reader thread that outlived its step
                return
            if self._sizes[name] + size > LIMIT_OF_STEP:
                text = f"{name}| (and more, which is left out)\n"
            self._size += size
            self._sizes[name] += size
            self._file.write(text)
            self._file.flush()

    def close(self) -> None:
        with self._lock:
            self._file.close()
