"""The one object through which files of the library reach the disk: a whole file under its name, or none.

A commit writes to a temporary name in the same folder, syncs the file, renames it and syncs the folder. Killed at any
moment it leaves under the final name what was there before or the whole new file, never a part; what it may leave
behind is a file or folder whose name starts with `TEMPORARY`.
"""

from __future__ import annotations

import csv
import filecmp
import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

TEMPORARY = ".writing-"
REPLACED = "replaced"


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
        temporary = _temporary(path)
        try:
            write(temporary)
            self._sync_tree(temporary)
            if overwrite:
                os.replace(temporary, path)
            else:
                self._rename_without_replacing(temporary, path)
        except OSError as error:
            _blame(error, path)
            raise
        finally:
            _discard(temporary)
        self._sync(path.parent)

    def commit_group(
        self,
        record: Path,
        write: Callable[[Path], object],
        *,
        overwrite: bool = False,
        parts: Callable[[Path], Iterable[str]] = lambda record: (),
    ) -> None:
        """Makes several files in one folder of which `record` is the one that makes sense of the others.

        The others are there before the record is; a reader that begins with it finds all or nothing. Killed before
        that, some of the others may be there without it, and a second run that writes the same bytes takes them over.

        An old group is moved into the temporary folder first, its record before the rest, and is back in its place
        when this raises. Killed in between there is no record, and the old group is in that folder, under `REPLACED`,
        until a second run has made the new one.

        Args:
            record: its final name.
            write: gets a temporary folder, and must make the files in it under their final names.
            overwrite: whether an old group is replaced.
            parts: gives the names of the others of an old group, all that may be replaced beside its record.

        Raises:
            FileExistsError: a file has one of the names already, is none that may be replaced, and has other bytes.
            OSError: the disk refused.
        """
        if not overwrite and record.exists():
            raise _in_the_way(record)
        home = record.parent
        home.mkdir(parents=True, exist_ok=True)
        folder = _temporary(record)
        aside = folder / REPLACED
        # What runs that were killed had moved aside, so that files which their records name are none of strangers.
        left = list(home.glob(f"{TEMPORARY}*-{glob.escape(_end(record))}/{REPLACED}")) if overwrite else []
        try:
            folder.mkdir()
            write(folder)
            new = sorted(path.name for path in folder.iterdir() if path.name != record.name)
            for name in [*new, record.name]:
                self._sync(folder / name)
            with ExitStack() as undo:
                if overwrite:
                    aside.mkdir()
                    records = [path for path in (record, *(other / record.name for other in left)) if path.exists()]
                    named = {name for path in records for name in parts(path)} - {record.name}
                    for name in [record.name, *sorted(named)]:
                        if (home / name).exists() or (home / name).is_symlink():
                            undo.callback(_move_back, aside / name, home / name)
                            os.rename(home / name, aside / name)
                    self._sync(home)
                for name in [*new, record.name]:
                    if name == record.name:
                        self._sync(home)
                    if name == record.name or not _same_bytes(folder / name, home / name):
                        undo.callback(_take_back, folder / name, home / name)
                        try:
                            self._rename_without_replacing(folder / name, home / name)
                        except FileExistsError:
                            raise FileExistsError(
                                f"{home / name} is in the way: {record.name} needs the name, and "
                                + ("no older one names this file" if overwrite else "it has other bytes")
                                + ". Move it away, or choose another name."
                            ) from None
                self._sync(home)
                undo.pop_all()
            if aside.is_dir():
                _discard(aside)
        except OSError as error:
            _blame(error, record)
            raise
        finally:
            if not (aside.is_dir() and any(aside.iterdir())):  # else it could not be moved back
                _discard(folder)
        for other in left:
            _discard(other.parent)

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


def _temporary(path: Path) -> Path:
    """Returns a free name beside `path` with the same suffixes."""
    return path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{_end(path)}")


def _end(path: Path) -> str:
    return path.name[-50:]  # a name may have 255 bytes, a character up to 4


def _blame(error: OSError, path: Path) -> None:
    """Has an error name the file that was to be made, if it names none, as on a full disk, or a temporary one."""
    if error.errno is not None and (error.filename is None or TEMPORARY in str(error.filename)):
        error.filename, error.filename2 = str(path), None


def _discard(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary)
    else:
        temporary.unlink(missing_ok=True)


def _same_bytes(new: Path, there: Path) -> bool:
    return there.is_file() and filecmp.cmp(new, there, shallow=False)


def _move_back(aside: Path, home: Path) -> None:
    if aside.exists() or aside.is_symlink():
        os.rename(aside, home)


def _take_back(temporary: Path, home: Path) -> None:
    """Removes a file that was given its final name, if it got that far; never one that somebody else made."""
    if not temporary.exists() or (home.exists() and home.samefile(temporary)):
        home.unlink(missing_ok=True)


def _in_the_way(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists already. Choose another name, or pass overwrite=True to replace it.")
