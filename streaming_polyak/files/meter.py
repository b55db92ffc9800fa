"""What a pass over files costs, while it runs and in the end: bytes, seconds, memory."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

_SAMPLE_SECONDS = 0.02
_UNITS = {"": 1, "B": 1, **{f"{p}{b}": (1024 if b == "iB" else 1000) ** (i + 1) for i, p in enumerate("KMGT")
          for b in ("iB", "B")}, **{p: 1024 ** (i + 1) for i, p in enumerate("KMGT")}}  # fmt: skip


class Meter:
    """Shows progress in bytes, and takes the time and the peak of anonymous memory.

    Args:
        total: bytes that will pass; `None` if not known yet.
        label: what is done.
        show: whether to show a bar (only if the error output is a terminal).
    """

    def __init__(self, total: int | None, label: str, show: bool) -> None:
        self._lock = threading.Lock()
        self._bar = tqdm(
            total=total,
            desc=label,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=hidden(show),
            dynamic_ncols=True,
        )
        self._next_sample = 0.0
        self._started = time.perf_counter()
        self.passed = 0
        self.peak_bytes = anonymous_bytes()

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._started

    def expect(self, count: int) -> None:
        """Sets how many bytes will pass in all."""
        self._bar.total = count
        self._bar.refresh()

    def add(self, count: int) -> None:
        """Tells that bytes have passed; by any thread."""
        with self._lock:
            self.passed += count
            self._bar.update(count)
            now = time.perf_counter()
            if now >= self._next_sample:
                self._next_sample = now + _SAMPLE_SECONDS
                self.peak_bytes = max(self.peak_bytes, anonymous_bytes())


def hidden(show: bool) -> bool | None:
    """Returns what tqdm's `disable` has to be: `None`, which shows a bar on a terminal, or true for none at all."""
    return None if show and sys.stderr is not None else True  # it is None where a program was started without it


def anonymous_bytes() -> int:
    """Returns the anonymous memory of this process now (what no file backs); 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def cpus() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_bytes(size: int | str) -> int:
    """Returns bytes from a number or a text such as "64MiB", "200 MB", "1.5G".

    >>> parse_bytes("64MiB") == 64 * 2**20
    True

    Raises:
        ValueError: it is neither.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if not found or found[2].lower() not in units:
        raise ValueError(f'Expected a size in bytes such as 67108864, "64MiB" or "1GB", got {size!r}.')
    return int(float(found[1]) * units[found[2].lower()])


def format_bytes(count: float) -> str:
    """Returns bytes in words, such as "64.0 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
