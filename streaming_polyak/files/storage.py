"""The one object through which files of the library reach the disk: a whole file under its name, or none.

A commit writes to a temporary name in the same folder, syncs the file, renames it and syncs the folder. Killed at any
moment it leaves under the final name what was there before or the whole new file, never a part; what it may leave
behind is a file or folder whose name starts with `TEMPORARY`.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import filecmp
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from streaming_polyak.files.descriptors import moved
from streaming_polyak.files.disk import Disk

logger = logging.getLogger("streaming_polyak")

TEMPORARY = ".writing-"
REPLACED = "replaced"
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # what file systems without hard links say


class Storage:
    """Commits of files to a disk.

    Args:
        disk: what is written to; `None` for the local disk.
    """

    def __init__(self, disk: Disk | None = None) -> None:
        self._disk = disk or Disk()

    def commit(self, path: Path, write: Callable[[Path], object], *, overwrite: bool = False) -> None:
        """Makes the file `path`, whole and durable when this returns.

        Args:
            path: the final name; missing folders on the way are made.
            write: gets a temporary path with the same suffixes and must make that file, or a folder with files in it
                (which replaces nothing: `overwrite` must be false then).
            overwrite: whether a file that has the name already is replaced, in one step.

        Raises:
            FileExistsError: `path` exists and `overwrite` is false; also if it appeared meanwhile.
            OSError: the disk refused; it names `path`, which is as it was (but for a file that replaced another when
                the folder could not be synced).
        """
        if not overwrite and path.exists():
            raise _in_the_way(path)
        temporary = _temporary(path)
        try:
            self.make_folders(path.parent)
            write(temporary)
            self._sync_tree(temporary)
            with _alone_in(path.parent), ExitStack() as undo:
                if overwrite:
                    self._disk.rename(temporary, path)
                else:
                    undo.callback(self._take_back, _identity(temporary), path)
                    self._rename_without_replacing(temporary, path)
                self._disk.sync_folder(path.parent)
                undo.pop_all()
        except OSError as error:
            _blame(error, path)
            raise
        finally:
            self._discard(temporary)

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
        folder = _temporary(record)
        aside = folder / REPLACED
        try:
            self.make_folders(home)
            self._disk.make_folder(folder)
            write(folder)
            new = sorted(path.name for path in folder.iterdir() if path.name != record.name)
            for name in [*new, record.name]:
                self._disk.sync_file(folder / name)
            with _alone_in(home), ExitStack() as undo:
                # What killed runs had moved aside, so that files which their records name are none of strangers.
                left = _left_aside(record)
                if overwrite:
                    self._disk.make_folder(aside)
                    records = [path for path in (record, *(other / record.name for other in left)) if path.exists()]
                    named = {name for path in records for name in parts(path)} - {record.name}
                    for name in [record.name, *sorted(named)]:
                        if (home / name).exists() or (home / name).is_symlink():
                            undo.callback(self._move_back, aside / name, home / name)
                            self._disk.rename(home / name, aside / name)
                    self._disk.sync_folder(home)
                for name in [*new, record.name]:
                    if name == record.name:
                        self._disk.sync_folder(home)
                    if name == record.name or not _same_bytes(folder / name, home / name):
                        undo.callback(self._take_back, _identity(folder / name), home / name)
                        try:
                            self._rename_without_replacing(folder / name, home / name)
                        except FileExistsError:
                            raise FileExistsError(_clash(home / name, record, overwrite, left)) from None
                self._disk.sync_folder(home)
                undo.pop_all()
                for old in [aside, *(other.parent for other in left)] if overwrite else []:
                    self._discard_old(old)
        except OSError as error:
            _blame(error, record)
            raise
        finally:
            if not (aside.is_dir() and any(aside.iterdir())):  # else it could not be moved back
                self._discard(folder)

    def remove(self, path: Path) -> None:
        """Removes one file; that it is gone already is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._disk.remove(path)

    def _rename_without_replacing(self, temporary: Path, path: Path) -> None:
        if temporary.is_dir():  # a rename replaces an empty folder at most
            if path.exists():
                raise _in_the_way(path)
            self._disk.rename(temporary, path)
            return
        try:
            self._disk.link(temporary, path)  # unlike a rename, refuses to replace
        except FileExistsError as error:
            raise _in_the_way(path) from error
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if path.exists():
                raise _in_the_way(path) from None
            self._disk.rename(temporary, path)  # no other run of ours can come in between, see `_alone_in`

    def make_folders(self, path: Path) -> None:
        """Makes a folder and those on the way to it, to last."""
        if not path.is_dir():
            self.make_folders(path.parent)
            with contextlib.suppress(FileExistsError):  # somebody else was quicker
                self._disk.make_folder(path)
            self._disk.sync_folder(path.parent)

    def _sync_tree(self, path: Path) -> None:
        if not path.is_dir():
            self._disk.sync_file(path)
            return
        for inside in path.iterdir():
            self._sync_tree(inside)
        self._disk.sync_folder(path)

    def _move_back(self, aside: Path, home: Path) -> None:
        if aside.exists() or aside.is_symlink():
            self._disk.rename(aside, home)

    def _take_back(self, identity: tuple[int, int], home: Path) -> None:
        """Removes a file or folder that was given its final name, if it got that far; none that somebody else made."""
        if os.path.lexists(home) and _identity(home) == identity:
            self._discard(home)

    def _discard_old(self, folder: Path) -> None:
        """Removes what was replaced; that it stays is no reason to say that the new one is not there."""
        try:
            self._discard(folder)
        except OSError as error:
            logger.warning("What was replaced could not be removed and is still in %s: %s", folder, error)

    def _discard(self, temporary: Path) -> None:
        """Removes what was being written, if it is still there: a file, or a folder with all in it."""
        if temporary.is_dir() and not temporary.is_symlink():
            for inside in temporary.iterdir():
                self._discard(inside)
            self._disk.remove_folder(temporary)
        elif os.path.lexists(temporary):
            self.remove(temporary)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a CSV file, whole or not at all; replaces a file `path`."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)

    Storage().commit(path, write, overwrite=True)


def same_file(path: Path, other: Path) -> bool:
    """Returns whether both are there and names of one file; either may go away meanwhile."""
    try:
        return path.samefile(other)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _temporary(path: Path) -> Path:
    """Returns a free name beside `path` with the same suffixes."""
    return path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{_end(path)}")


def _end(path: Path) -> str:
    return path.name[-50:]  # a name may have 255 bytes, a character up to 4


def _blame(error: OSError, path: Path) -> None:
    """Has an error name the file that was to be made, if it names none, as on a full disk, or a temporary one."""
    if error.errno is not None and (error.filename is None or TEMPORARY in str(error.filename)):
        error.filename = str(path)
        if error.filename2 is not None:
            del error.filename2


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Has others wait that would give files in a folder their names; nobody, where the system locks no folders."""
    fd = moved(os.open(folder, os.O_RDONLY | os.O_CLOEXEC))
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):  # to close it is not enough if the process was forked meanwhile
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _left_aside(record: Path) -> list[Path]:
    """Returns where killed runs left the old group of a record; of this one, not of one whose name ends alike."""
    name = re.compile(re.escape(TEMPORARY) + "[0-9a-f]{12}-" + re.escape(_end(record)))
    folders = [record.with_name(found) / REPLACED for found in os.listdir(record.parent) if name.fullmatch(found)]
    return [folder for folder in sorted(folders) if os.path.lexists(folder / record.name)]


def _clash(path: Path, record: Path, overwrite: bool, left: Sequence[Path]) -> str:
    """Says what is in the way of a group, and what to do."""
    if left and not overwrite:
        return (
            f"{path} is in the way: a run that was to replace {record.name} was killed in the middle. What it replaced "
            f"is in {left[-1]}. Pass overwrite=True to make the new one, or move that back."
        )
    why = "no older one names this file" if overwrite else "it has other bytes"
    return f"{path} is in the way: {record.name} needs the name, and {why}. Move it away, or choose another name."


def _identity(path: Path) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _same_bytes(new: Path, there: Path) -> bool:
    return there.is_file() and filecmp.cmp(new, there, shallow=False)


def _in_the_way(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists already. Choose another name, or pass overwrite=True to replace it.")
