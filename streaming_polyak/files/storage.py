"""The one object through which files of the library reach the disk: a whole file under its name, or none.

A commit writes to a temporary name in the same folder, syncs the file, renames it and syncs the folder. Killed at any
moment it leaves under the final name what was there before or the whole new file, never a part; what it may leave
behind is a file whose name starts with `TEMPORARY`.
"""

from __future__ import annotations

import csv
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

TEMPORARY = ".writing-"


class Storage:
    """Files of the local disk."""

    def commit(self, path: Path, write: Callable[[Path], object], *, overwrite: bool = False) -> None:
        """Makes the file `path`, whole and durable when this returns.

        Args:
            path: the final name; missing folders on the way are made.
            write: gets a temporary path with the same suffixes and must make that file.
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
            self._sync(temporary)
            if overwrite:
                os.replace(temporary, path)
            else:
                self._rename_without_replacing(temporary, path)
        except OSError as error:
            if error.errno is not None and error.filename is None:  # such as a full disk
                error.filename = str(path)
            raise
        finally:
            temporary.unlink(missing_ok=True)
        self._sync(path.parent)

    def remove(self, path: Path) -> None:
        """Removes one file; that it is gone already is no error."""
        path.unlink(missing_ok=True)

    @staticmethod
    def _rename_without_replacing(temporary: Path, path: Path) -> None:
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


def _in_the_way(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists already. Choose another name, or pass overwrite=True to replace it.")
