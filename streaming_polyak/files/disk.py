"""The operations by which files reach the local disk, one method each; tests hand in a disk that fails or forgets.

What is written is safe from a power cut only after `sync`; a name that was made, changed or removed only after
`sync_folder` of its folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from streaming_polyak.files.descriptors import moved


class Disk:
    """The disk as the system has it."""

    def create(self, path: Path) -> int:
        """Makes an empty file and returns its descriptor.

        Raises:
            FileExistsError: there is something of this name.
        """
        return moved(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        """Writes bytes from `offset` on and returns how many, at least one."""
        return os.pwrite(fd, data, offset)

    def read(self, fd: int, count: int, offset: int) -> bytes:
        """Returns up to `count` bytes from `offset` on."""
        return os.pread(fd, count, offset)

    def truncate(self, fd: int, size: int) -> None:
        """Sets the size of a file; what was never written reads as zeros."""
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        """Waits until the disk has all that was written to a file."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Closes a file."""
        os.close(fd)

    def sync_file(self, path: Path) -> None:
        """Waits until the disk has all that was written to a file by anybody."""
        self._sync_path(path)

    def sync_folder(self, path: Path) -> None:
        """Waits until the disk has all names in a folder."""
        self._sync_path(path)

    def make_folder(self, path: Path) -> None:
        """Makes a folder, which must not be there yet."""
        os.mkdir(path)

    def rename(self, old: Path, new: Path) -> None:
        """Gives a file another name, or a folder; a file `new` is replaced, in one step."""
        os.replace(old, new)

    def link(self, old: Path, new: Path) -> None:
        """Gives a file a second name, which must be free."""
        os.link(old, new)

    def remove(self, path: Path) -> None:
        """Removes a name of a file."""
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        """Removes an empty folder."""
        os.rmdir(path)

    @staticmethod
    def _sync_path(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class NewFile:
    """A file that did not exist, written at any places, by several threads at once.

    Args:
        path: its name, which must be free.
        disk: what it is written to.

    Raises:
        FileExistsError: the name is taken.
    """

    def __init__(self, path: Path, disk: Disk | None = None) -> None:
        self.path, self._disk = path, disk or Disk()
        self.fd = self._disk.create(path)

    def write(self, data: Any, offset: int) -> int:
        """Writes all bytes of `data` (any buffer) from `offset` on; returns the byte after them."""
        view = memoryview(data).cast("B")
        while view:
            count = self._disk.write(self.fd, view, offset)
            view, offset = view[count:], offset + count
        return offset

    def read(self, offset: int, count: int) -> bytes:
        """Returns up to `count` bytes from `offset` on."""
        return self._disk.read(self.fd, count, offset)

    def truncate(self, size: int) -> None:
        """Sets the size; what was never written reads as zeros."""
        self._disk.truncate(self.fd, size)

    def sync(self) -> None:
        """Waits until the disk has all that was written."""
        self._disk.sync(self.fd)

    def close(self) -> None:
        """Closes the file; it can be closed twice."""
        if self.fd >= 0:
            self._disk.close(self.fd)
            self.fd = -1
