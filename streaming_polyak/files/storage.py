"""The one object through which files of the library reach the disk: a whole file under its name, or none.

A commit writes to a temporary name in the same folder, syncs the file, renames it and syncs the folder. Killed at any
moment it leaves under the final name what was there before or the whole new file, never a part; what it may leave
behind is a file or folder whose name starts with `TEMPORARY`.
"""

from __future__ import annotations

import csv
import filecmp
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

TEMPORARY = ".writing-"


class NewFile:
    """A file that did not exist, written at any places, by several threads at once.

    Args:
        path: its name, which must be free.

    Raises:
        FileExistsError: it is not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, data: Any, offset: int) -> int:
        """Writes all bytes of `data` (any buffer) from `offset` on; returns the byte after them."""
        view = memoryview(data).cast("B")
        while view:
            count = os.pwrite(self.fd, view, offset)
            view, offset = view[count:], offset + count
        return offset

    def read(self, offset: int, count: int) -> bytes:
        """Returns up to `count` bytes from `offset` on."""
        return os.pread(self.fd, count, offset)

    def truncate(self, size: int) -> None:
        """Sets the size; what was never written reads as zeros."""
        os.ftruncate(self.fd, size)

    def sync(self) -> None:
        """Waits until the disk has all that was written."""
        os.fsync(self.fd)

    def close(self) -> None:
        """Closes the file; it can be closed twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Storage:
    """Files of the local disk."""

    def commit(self, path: Path, write: Callable[[Path], object], *, overwrite: bool = False) -> None:
        """Makes the file `path`, whole and durable when this returns.

        Args:
            path: the final name; missing folders on the way are made.
            write: gets a temporary path with the same suffixes and must make that file, or a folder with files in it
                (which replaces nothing: `overwrite` must be false then).
            overwrite: whether a file that has the name already is replaced, in one step.

        Raises:
            FileExistsError: `path` exists and `overwrite` is false; also if it appeared meanwhile.
            OSError: the disk refused; it names `path`, which is as it was.
        """
        if not overwrite and path.exists():
            raise _in_the_way(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{path.name}")
        try:
            write(temporary)
            self._sync_tree(temporary)
            if overwrite:
                os.replace(temporary, path)
            else:
                self._rename_without_replacing(temporary, path)
        except OSError as error:
            if error.errno is not None and error.filename is None:  # such as a full disk
                error.filename = str(path)
            raise
        finally:
            _discard(temporary)
        self._sync(path.parent)

    def commit_group(self, record: Path, write: Callable[[Path], object], *, overwrite: bool = False) -> None:
        """Makes several files in one folder of which `record` is the one that makes sense of the others.

        The others are there before the record is; a reader that begins with it finds all or nothing. Killed before
        that, some of the others may be there without it, and a second run that writes the same bytes takes them over.

        Args:
            record: its final name.
            write: gets a temporary folder, and must make the files in it under their final names.
            overwrite: whether files of these names are replaced; the old record goes first, so that killed in between
                there is none.

        Raises:
            FileExistsError: a file has one of the names already, other bytes in it, and `overwrite` is false.
            OSError: the disk refused.
        """
        if not overwrite and record.exists():
            raise _in_the_way(record)
        record.parent.mkdir(parents=True, exist_ok=True)
        folder = record.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{record.name}")
        folder.mkdir()
        try:
            write(folder)
            parts = sorted(path for path in folder.iterdir() if path.name != record.name)
            for path in [*parts, folder / record.name]:
                self._sync(path)
            if overwrite and record.exists():
                self.remove(record)
                self._sync(record.parent)
            for part in parts:
                final = record.with_name(part.name)
                if overwrite or (final.is_file() and filecmp.cmp(part, final, shallow=False)):
                    os.replace(part, final)
                else:
                    self._rename_without_replacing(part, final)
            self._rename_without_replacing(folder / record.name, record)
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = str(record)
            raise
        finally:
            _discard(folder)
        self._sync(record.parent)

    def remove(self, path: Path) -> None:
        """Removes one file; that it is gone already is no error."""
        path.unlink(missing_ok=True)

    @staticmethod
    def _rename_without_replacing(temporary: Path, path: Path) -> None:
        if temporary.is_dir():  # a rename replaces an empty folder at most
            if path.exists():
                raise _in_the_way(path)
            os.rename(temporary, path)
            return
        try:
            os.link(temporary, path)  # unlike a rename, refuses to replace
        except FileExistsError as error:
            raise _in_the_way(path) from error
        except OSError:  # a file system without hard links: take the name first
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError as error:
                raise _in_the_way(path) from error
            os.replace(temporary, path)

    @classmethod
    def _sync_tree(cls, path: Path) -> None:
        if path.is_dir():
            for inside in path.iterdir():
                cls._sync_tree(inside)
        cls._sync(path)

    @staticmethod
    def _sync(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a CSV file, whole or not at all; replaces a file `path`."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)

    Storage().commit(path, write, overwrite=True)


def _discard(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary)
    else:
        temporary.unlink(missing_ok=True)


def _in_the_way(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists already. Choose another name, or pass overwrite=True to replace it.")
