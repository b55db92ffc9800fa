"""One file of a checkpoint, opened for reading only and read by ranges, or what a part of it was unpacked into.

Data are read with `pread` into buffers of the caller, not through a mapping: a mapped file that somebody truncates
kills the process with SIGBUS, a read that comes back short is an error with a name. `Source.check_unchanged` afterwards
tells whether anybody wrote to the file meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files.descriptors import duplicate, moved, temporary_file

_MOST_OF_FREE = 0.9  # of a disk, what may be filled with what is unpacked
_TICK_NS = 10_000_000  # file times may be as coarse as this


class Source:
    """One regular file, opened for reading only, of which ranges are read; perhaps unpacked into a temporary file.

    Args:
        path: the file; links to it are followed before it is opened.

    Raises:
        CheckpointError: no such file, or none that can be read in place (a folder, a pipe, a device).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._resolved = Path(os.path.realpath(path))
        except ValueError as error:  # a NUL character, or half of a surrogate pair
            raise CheckpointError("unreadable", path, f"no file can have this name: {error}.") from None
        self._fd: int | None = None
        self.unpacked: IO[bytes] | None = None
        fd = self._open()
        try:
            status = os.fstat(fd)
            age = time.time_ns() - status.st_ctime_ns
            if 0 <= age < _TICK_NS:  # a write in the same tick of the clock could not be told apart later
                time.sleep((_TICK_NS - age) / 1e9)
                status = os.fstat(fd)
            self.identity = _identity(status)
            self.size = status.st_size
        finally:
            os.close(fd)

    def keep_open(self) -> None:
        """Keeps a descriptor, so that many reads cost one opening."""
        if self._fd is None:
            self._fd = self._reopen()

    def close(self) -> None:
        """Gives back the descriptor and what was unpacked."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if self.unpacked is not None:
            self.unpacked.close()
            self.unpacked = None

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` with the bytes of the file from `offset` on.

        Raises:
            CheckpointError: the file ended before, so somebody truncated it.
            OSError: the disk refused.
        """
        fd = self._fd if self._fd is not None else self._reopen()
        try:
            done = 0
            while done < len(buffer):
                count = os.preadv(fd, [buffer[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(
                        "truncated",
                        self.path,
                        f"the file ended at byte {offset + done} while it was read; it had {self.size} bytes before. "
                        "Do not write to checkpoints while they are averaged.",
                    )
                done += count
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise
        finally:
            if fd != self._fd:
                os.close(fd)

    def read(self, offset: int, count: int) -> bytes:
        """Returns `count` bytes from `offset` on, which must be in the file; for metadata only."""
        if offset < 0 or count < 0 or offset + count > self.size:
            raise CheckpointError(
                "truncated", self.path, f"bytes {offset} to {offset + count} are wanted, but it has only {self.size}."
            )
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def check_unchanged(self) -> None:
        """Checks that nobody wrote to the file, replaced it or removed it since the table was made.

        Raises:
            CheckpointError: somebody did; what was read may be mixed.
        """
        try:
            now = _identity(os.stat(self._resolved))
        except OSError as error:
            raise CheckpointError("changed", self.path, f"it is gone or unreadable now ({error.strerror}).") from error
        if now != self.identity:
            raise CheckpointError(
                "changed",
                self.path,
                "it was written to or replaced while it was read, so its numbers may be mixed. "
                "Average files that nobody writes to.",
            )

    def duplicate(self) -> int:
        """Returns a new descriptor of the same file, for a child process."""
        return duplicate(self._fd) if self._fd is not None else self._reopen()

    def _open(self) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe without a writer would wait
        try:
            fd = moved(os.open(self._resolved, flags))
        except FileNotFoundError:
            raise CheckpointError("missing", self.path, "there is no such file.") from None
        except OSError as error:
            raise CheckpointError("unreadable", self.path, f"it cannot be opened: {error.strerror}.") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise CheckpointError("not-a-file", self.path, "it is not a regular file.")
        return fd

    def _reopen(self) -> int:
        fd = self._open()
        if _identity(os.fstat(fd)) != self.identity:
            os.close(fd)
            self.check_unchanged()
            raise CheckpointError("changed", self.path, "it was replaced while it was read.")
        return fd


class UnpackedSource(Source):
    """The contents of a compressed or compact part of another file, in a temporary file without a name.

    It stands in the folder for temporary files (TMPDIR) and is gone when the process ends, however it ends.

    Args:
        origin: where the data came from.
    """

    def __init__(self, origin: Source) -> None:
        self.path, self.origin, self.size = origin.path, origin, 0
        self.unpacked = temporary_file()
        self._fd = None
        self.identity = origin.identity

    def write(self, data: bytes) -> None:
        """Appends data."""
        assert self.unpacked is not None
        view = memoryview(data)
        with unpacking(self.path):
            while view:
                count = os.pwrite(self.unpacked.fileno(), view, self.size)
                view, self.size = view[count:], self.size + count

    def keep_open(self) -> None:
        """Does nothing: a file without a name is open as long as it exists."""

    def check_unchanged(self) -> None:
        """Checks the file that was unpacked."""
        self.origin.check_unchanged()

    def duplicate(self) -> int:
        """Returns a new descriptor of the temporary file."""
        assert self.unpacked is not None
        return duplicate(self.unpacked.fileno())

    def _reopen(self) -> int:
        return self.duplicate()


def last_unpacked(sources: list[Source], origin: Source) -> UnpackedSource:
    """Returns the temporary file at the end of `sources`; if there is none, one for what `origin` holds is appended."""
    last = sources[-1]
    if not isinstance(last, UnpackedSource):
        last = UnpackedSource(origin)
        sources.append(last)
    return last


def check_room(path: Path, nbytes: int) -> None:
    """Checks that the folder for temporary files has room for `nbytes` that are unpacked from a file.

    Raises:
        OSError: it has not. The file is not to blame, so that is no CheckpointError.
    """
    if not nbytes:  # where nothing is unpacked, such a folder need not exist
        return
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if nbytes > _MOST_OF_FREE * free:
        raise OSError(
            errno.ENOSPC,
            f"unpacking it takes {nbytes} bytes in {folder}, where {free} are free; set TMPDIR to a folder with room",
            str(path),
        )


@contextlib.contextmanager
def unpacking(path: Path) -> Iterator[None]:
    """Has errors of a full disk say which file was being unpacked, where to, and what helps."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)} in {tempfile.gettempdir()}, into which it is unpacked; set TMPDIR to a folder "
            "with room",
            str(path),
        ) from error


@contextlib.contextmanager
def closed_on_error(sources: list[Source]) -> Iterator[None]:
    """Closes all sources, those that were appended meanwhile too, if the block fails; else they are the table's."""
    try:
        yield
    except BaseException:
        for source in sources:
            source.close()
        raise


def _identity(status: os.stat_result) -> tuple[int, int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
