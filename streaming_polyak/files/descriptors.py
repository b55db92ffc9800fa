"""Descriptors that are none of 0 to 2, even where those are free because the program was started with them closed.

A file that got one of them would have written into it whatever any library prints, and a child process that gets its
own standard streams would find it replaced.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from typing import IO

_FIRST = 3


def duplicate(fd: int) -> int:
    """Returns a new descriptor of the same file."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST)


def moved(fd: int) -> int:
    """Returns the same descriptor, or another one in place of a standard one, which is closed."""
    if fd >= _FIRST:
        return fd
    try:
        return duplicate(fd)
    finally:
        os.close(fd)


def temporary_file() -> IO[bytes]:
    """Returns a file without a name in the folder for temporary files; it is gone when the process ends."""
    with tempfile.TemporaryFile(prefix="streaming_polyak-", buffering=0) as file:
        return os.fdopen(duplicate(file.fileno()), "r+b", buffering=0)
