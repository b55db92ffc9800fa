"""Disks for tests: one that keeps a trace, one that fails, and what a power cut may leave of a trace.

The model of a power cut is harsher than real disks: each write since the last sync of its file is on the disk, or not,
or in part, or as rubbish; each change of a name since the last sync of its folder was made, or not, whatever came
before it. Source of the idea: SQLite's test6.c, RocksDB's FaultInjectionTestFS.
"""

import os
import random
from pathlib import Path

from streaming_polyak.files.disk import Disk


class RecordingDisk(Disk):
    """Does what it is told, and keeps a trace of it: events (kind, ...) with files by number and names by path."""

    def __init__(self):
        self.trace = []
        self._files = {}  # by descriptor
        self._names = {}  # by path
        self._count = 0

    def acknowledge(self, what):
        """Notes that somebody was told that `what` is safe."""
        self.trace.append(("acknowledge", what))

    def create(self, path):
        fd = super().create(path)
        self._count += 1
        self._files[fd] = self._names[path] = self._count
        self.trace.append(("name", path, self._count))
        return fd

    def write(self, fd, data, offset):
        count = super().write(fd, data, offset)
        self.trace.append(("write", self._files[fd], offset, bytes(data[:count])))
        return count

    def truncate(self, fd, size):
        super().truncate(fd, size)
        self.trace.append(("truncate", self._files[fd], size))

    def sync(self, fd):
        super().sync(fd)
        self.trace.append(("sync", self._files[fd]))

    def sync_file(self, path):
        super().sync_file(path)
        self.trace.append(("sync", self._names[path]))

    def sync_folder(self, path):
        super().sync_folder(path)
        self.trace.append(("sync_folder", path))

    def rename(self, old, new):
        super().rename(old, new)
        self._names[new] = self._names.pop(old)
        self.trace += [("name", new, self._names[new]), ("unname", old)]

    def link(self, old, new):
        super().link(old, new)
        self._names[new] = self._names[old]
        self.trace.append(("name", new, self._names[new]))

    def remove(self, path):
        super().remove(path)
        self._names.pop(path, None)
        self.trace.append(("unname", path))


class FailingDisk(Disk):
    """Raises an error at the n-th call, or from it on; the calls are those that change something."""

    def __init__(self, n, error, forever=False):
        self.calls = 0
        self._n, self._error, self._forever = n, error, forever

    def _count(self):
        self.calls += 1
        if self.calls == self._n or (self._forever and self.calls > self._n):
            raise OSError(self._error, os.strerror(self._error))


def _failing(name):
    def method(self, *args):
        self._count()
        return getattr(Disk, name)(self, *args)

    return method


CALLS = ("create", "write", "truncate", "sync", "sync_file", "sync_folder", "make_folder", "rename", "link", "remove")
for _name in CALLS:
    setattr(FailingDisk, _name, _failing(_name))


class CutShort(Disk):
    """Writes a few bytes less than it is asked to, as the system may."""

    def write(self, fd, data, offset):
        return super().write(fd, data[: max(1, len(data) // 2)], offset)


class PowerCut:
    """What may be on a disk after the first events of a trace."""

    def __init__(self, trace):
        self._contents, self._pending = {}, {}  # of each file: what is safe, and events that are not
        self._names, self._pending_names = {}, []
        self.acknowledged = None
        for event in trace:
            self._take(event)

    def _take(self, event):
        kind = event[0]
        if kind in ("write", "truncate"):
            self._pending.setdefault(event[1], []).append(event)
        elif kind == "sync":
            data = bytearray(self._contents.get(event[1], b""))
            for change in self._pending.pop(event[1], []):
                _apply(data, change)
            self._contents[event[1]] = bytes(data)
        elif kind in ("name", "unname"):
            self._pending_names.append(event)
        elif kind == "sync_folder":
            for change in [c for c in self._pending_names if c[1].parent == event[1]]:
                _rename(self._names, change)
            self._pending_names = [c for c in self._pending_names if c[1].parent != event[1]]
        elif kind == "acknowledge":
            self.acknowledged = event[1]

    def state(self, choice):
        """Returns bytes by path. `choice` is "killed" (all is there), "lost" (nothing unsafe is), or random numbers."""
        names = dict(self._names)
        for change in self._pending_names:
            if choice == "killed" or (choice != "lost" and choice.random() < 0.6):
                _rename(names, change)
        contents = {}
        for path, number in names.items():
            data = bytearray(self._contents.get(number, b""))
            for change in self._pending.get(number, []):
                fate = "kept" if choice == "killed" else "lost" if choice == "lost" else _fate(choice)
                _apply(data, change, fate, choice)
            contents[path] = bytes(data)
        return contents


_RUBBISH = random.Random(0).randbytes(1 << 16)


def _fate(choice):
    return choice.choice(("kept", "kept", "lost", "torn", "rubbish"))


def _apply(data, change, fate="kept", choice=None):
    if fate == "lost":
        return
    if change[0] == "truncate":
        del data[change[2] :]
        data.extend(bytes(change[2] - len(data)))
        return
    _, _, offset, new = change
    if fate == "torn":
        new = new[: choice.randrange(len(new) + 1)]
    elif fate == "rubbish":
        new = _RUBBISH[: len(new)]
    data.extend(bytes(max(0, offset + len(new) - len(data))))
    data[offset : offset + len(new)] = new


def _rename(names, change):
    if change[0] == "name":
        names[change[1]] = change[2]
    else:
        names.pop(change[1], None)


def materialize(state, old, new):
    """Writes the files of a state below the folder `new`, those that were below `old`."""
    for path, data in state.items():
        target = Path(new) / path.relative_to(old)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
