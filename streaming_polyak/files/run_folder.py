"""The folder of a run: its checkpoints, of which the newest that verifies is the latest, and who is at work in it.

    RUN_DIR/
    ├── LOCK                               who trains; freed by the system when that process ends, however it ends
    ├── checkpoints/step-000000001200.safetensors
    ├── members/epoch-00012.keras          raw weights kept for averaging, if asked for
    └── history.csv                        as of the last commit

There is no file that points to the latest: nothing can be out of step with the files themselves. A checkpoint is there
whole and on the disk before `commit` returns, and only then are older ones removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from streaming_polyak.errors import CheckpointError, RunLockedError
from streaming_polyak.files.disk import Disk
from streaming_polyak.files.run_checkpoint import Part, RunCheckpoint, write_run_checkpoint
from streaming_polyak.files.storage import TEMPORARY, Storage

logger = logging.getLogger("streaming_polyak")

_NAME = re.compile(r"step-(\d{12})\.safetensors")
_LEFT = re.compile(re.escape(TEMPORARY) + r"[0-9a-f]{12}-" + _NAME.pattern)
_TOUCHED = 100  # times that a checkpoint is found gone or touched while it is read, until it counts as damaged


@dataclass(frozen=True)
class Saved:
    """A checkpoint as its name tells.

    Args:
        step: how many optimizer steps the run had made.
        path: the file.
    """

    step: int
    path: Path


class RunFolder:
    """The files of one run.

    Args:
        path: of the folder; made by the first commit.
        keep: how many of the newest checkpoints are kept, at least 2: one may turn out damaged.
        keep_every: besides, every so many saves is kept for good; `None` for none.
        disk: what is written to; `None` for the local disk.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, keep: int = 3, keep_every: int | None = None, disk: Disk | None = None
    ) -> None:
        if keep < 2:
            raise ValueError(f"Expected keep >= 2, as one checkpoint may turn out damaged, got keep={keep}.")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"Expected keep_every >= 1 or None, got keep_every={keep_every}.")
        self.path = Path(path).absolute()  # the program may change its folder
        self._keep, self._keep_every = keep, keep_every
        self._disk = disk or Disk()
        self._storage = Storage(self._disk)
        self._reported: set[Path] = set()

    @property
    def checkpoints_folder(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def members_folder(self) -> Path:
        """Where members are kept."""
        return self.path / "members"

    def saved(self) -> list[Saved]:
        """Returns the checkpoints there are, oldest first, good or not; files of other names are left alone."""
        try:
            names = os.listdir(self.checkpoints_folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = [(match, self.checkpoints_folder / name) for name in names if (match := _NAME.fullmatch(name))]
        return sorted((Saved(int(match[1]), path) for match, path in found), key=lambda saved: saved.step)

    def latest(self) -> RunCheckpoint | None:
        """Returns the newest checkpoint that is whole, read through once; `None` if there are none at all.

        Damaged newer ones are left where they are, and told of once.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
        """
        touched = 0
        while saved := self.saved():
            for entry in reversed(saved):
                try:
                    return self.open(entry)
                except CheckpointError as error:
                    # The process that trains has just committed it, or has removed it, as there is a newer one.
                    touched += error.code in ("missing", "changed")
                    if error.code in ("missing", "changed") and touched < _TOUCHED:
                        break
                    if entry.path not in self._reported:
                        self._reported.add(entry.path)
                        logger.warning("A checkpoint is damaged and passed over; it is left where it is. %s", error)
            else:
                raise CheckpointError(
                    "all-damaged",
                    self.checkpoints_folder,
                    f"none of its {len(saved)} checkpoints is whole. Bring one back from elsewhere, or start anew in "
                    "another folder.",
                )
        return None

    def open(self, saved: Saved) -> RunCheckpoint:
        """Returns one checkpoint, read through once.

        Raises:
            CheckpointError: it is damaged, or of another step than its name says.
        """
        checkpoint = RunCheckpoint(saved.path)
        with checkpoint:
            if checkpoint.step != saved.step:
                raise CheckpointError(
                    "renamed", saved.path, f"it is that of step {checkpoint.step}, and has the name of another."
                )
            checkpoint.verify()
        return checkpoint

    def commit(self, step: int, parts: Iterable[Part], state: Mapping[str, Any], *, save: int) -> Path:
        """Saves a checkpoint; it is whole and on the disk when this returns. Then older ones are removed.

        Args:
            step: how many optimizer steps the run has made.
            parts: the tensors.
            state: JSON values.
            save: which save of the run this is, counted from 1.

        Raises:
            OSError: the disk refused; the older ones are as they were.
        """
        path = self.checkpoints_folder / f"step-{step:012d}.safetensors"
        self._storage.commit(
            path,
            lambda temporary: write_run_checkpoint(temporary, parts, state, step=step, save=save, disk=self._disk),
            overwrite=path.exists(),  # by what is later in the same step, such as after validation
        )
        self._retire(step)
        return path

    def clean(self) -> None:
        """Removes checkpoints that a killed process was writing; only for the holder of the lock."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.checkpoints_folder):
                if _LEFT.fullmatch(name):
                    self._storage.remove(self.checkpoints_folder / name)

    def _retire(self, step: int) -> None:
        """Removes checkpoints before the newest ones up to `step`; those of later steps are none of its business."""
        older = [saved for saved in self.saved() if saved.step <= step][: -self._keep]
        for saved in older:
            if self._keep_every is not None:
                try:
                    if RunCheckpoint(saved.path).save % self._keep_every == 0:
                        continue
                except CheckpointError:
                    continue  # damaged: not known whether it was to be kept
            self._storage.remove(saved.path)

    def lock(self) -> RunLock:
        """Takes the folder for this process; release it by `close` or as a context.

        Raises:
            RunLockedError: another process, or another run in this one, has it.
        """
        return RunLock(self.path, self._storage)


_held: dict[Path, int] = {}  # folders locked by this process (its number, as a fork copies this)


class RunLock:
    """A lock on the folder of a run, held until it is closed or the process ends, however it ends.

    It is a record lock of the system (fcntl), which children made by a fork do not inherit.

    Args:
        folder: made if it is not there.
        storage: what folders are made with.

    Raises:
        RunLockedError: somebody has it; the message names process and host.
    """

    def __init__(self, folder: Path, storage: Storage) -> None:
        storage.make_folders(folder)
        self._folder = folder.resolve()
        self._path = path = folder.absolute() / "LOCK"  # by which the run writes, though it may be a link
        if _held.get(self._folder) == os.getpid():
            raise RunLockedError(f"{folder} is in use by another run of this process. Let it end first.")
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            said = os.pread(self._fd, 4096, 0)
            os.close(self._fd)
            if not isinstance(error, BlockingIOError | PermissionError):
                raise
            raise RunLockedError(
                f"{folder} is in use by {_words(said)}. Let it end, or choose another folder."
            ) from None
        _held[self._folder] = os.getpid()
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(who).encode(), 0)

    def check(self) -> None:
        """Checks that the folder is still where it was; one made anew in its place would be nobody's.

        Raises:
            FileNotFoundError: it was removed, renamed or exchanged.
        """
        try:
            same = os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except (FileNotFoundError, NotADirectoryError):
            same = False
        if not same:
            raise FileNotFoundError(
                f"{self._path.parent} (or LOCK in it) was removed, renamed or exchanged while the run in it trained. "
                "Bring it back if it is elsewhere, and start the run again: it goes on from its last checkpoint."
            )

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the folder; can be called twice, and in a forked child, where it does nothing to the lock."""
        if self._fd >= 0:
            if _held.get(self._folder) == os.getpid():
                del _held[self._folder]
            os.close(self._fd)
            self._fd = -1


def holder(folder: Path) -> str | None:
    """Returns in words who has the lock on a folder; `None` if nobody."""
    path = folder.resolve() / "LOCK"
    if _held.get(folder.resolve()) == os.getpid():  # to open and close the file would free it
        return "this process"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _words(os.pread(fd, 4096, 0))
    finally:
        os.close(fd)
    return None


def _words(said: bytes) -> str:
    try:
        who = json.loads(said)
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
