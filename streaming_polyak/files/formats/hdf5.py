"""HDF5 files of Keras: `.weights.h5`, the legacy `.h5`, and the one inside a `.keras` archive.

Data sets are contiguous raw numbers at an offset that libhdf5 tells, so they are read in place. The metadata are parsed
by a child process (`hdf5_child`), and what comes back - names, dtypes, shapes, offsets - is validated here like any
other table. What is chunked, compressed or compact is unpacked by the child into a temporary file first.

This module also checks what libhdf5 does not: that the file ends where its superblock says, that it was closed
properly, and that it is no part of a family of files.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files.descriptors import moved, temporary_file
from streaming_polyak.files.source import Source, check_room, closed_on_error, last_unpacked, unpacking
from streaming_polyak.files.tensors import Tensor, TensorTable, read_provenance

SIGNATURE = b"\x89HDF\r\n\x1a\n"
TABLE_SECONDS = 10.0
_START_SECONDS = 60.0
_EXIT_SECONDS = 5.0
_MAX_ANSWER_BYTES = 64 << 20
_LAST_BYTES = 4096  # of what the process said before it died
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_UNDEFINED = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True)
class Hdf5Part:
    """Where an HDF5 file stands: from byte `start` of a source on, `size` bytes."""

    source: Source
    start: int
    size: int


class Parser:
    """The child process that parses HDF5 metadata; started when first needed, one for a whole job.

    Args:
        seconds: how long the metadata of one file may take.
    """

    def __init__(self, seconds: float = TABLE_SECONDS) -> None:
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._socket: socket.socket | None = None
        self._errors: IO[bytes] | None = None  # a file: a pipe that nobody reads would fill up

    def __enter__(self) -> Parser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Starts the process already now, while the caller does something else; anew if it was killed meanwhile."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            self.close()
        ours, theirs = (socket.socket(fileno=moved(end.detach())) for end in socket.socketpair())
        environment = {
            **os.environ,
            "HDF5_PLUGIN_PRELOAD": "::",  # no plugins
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._socket, self._errors = ours, temporary_file()
        program = Path(__file__).with_name("hdf5_child.py")
        try:
            with theirs:
                self._process = subprocess.Popen(
                    # -I: nothing of the environment or of our folder; -S: looking for packages takes time.
                    [sys.executable, "-IS", program, str(theirs.fileno()), *_packages()],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._errors,
                    env=environment,
                )
        except OSError as error:
            self.close()
            raise ChildProcessError(f"the process that parses HDF5 cannot be started: {error}") from error

    def close(self) -> None:
        """Ends the process."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._errors is not None:
            self._errors.close()
        self._process = self._socket = self._errors = None
        self._ready = False

    def ask(self, path: Path, do: str, fds: list[int], seconds: float | None = None, **request: Any) -> dict[str, Any]:
        """Sends a request and returns the answer.

        Args:
            path: the file it is about, for messages.
            do: the kind of request, see `hdf5_child`.
            fds: descriptors it needs; they stay open here.
            seconds: how long it may take; `None` for what the metadata of one file may take.
            **request: the rest of the request.

        Raises:
            CheckpointError: the file was refused, or the process died of it or took too long, or was killed.
            ChildProcessError: the process did not start, for which no file is to blame.
        """
        self.start()
        assert self._socket is not None
        limit = self.seconds if seconds is None else seconds
        data = json.dumps({"do": do, "seconds": limit, **request}).encode()
        try:
            self._socket.settimeout(_START_SECONDS)
            socket.send_fds(self._socket, [struct.pack("<Q", len(data))], fds)
            self._socket.sendall(data)
            if not self._ready:
                self._receive(1, time.monotonic() + _START_SECONDS)
                self._ready = True
            deadline = time.monotonic() + limit
            (length,) = struct.unpack("<Q", self._receive(8, deadline))
            if length > _MAX_ANSWER_BYTES:
                raise ValueError(f"an answer of {length} bytes")
            answer: dict[str, Any] = json.loads(self._receive(length, deadline))
        except TimeoutError:
            ready = self._ready
            self.close()
            if not ready:
                raise ChildProcessError(
                    f"the process that parses HDF5 was not ready to read {path} in {_START_SECONDS:g} s; "
                    "the machine may be overloaded."
                ) from None
            raise _too_slow(path, limit) from None
        except ConnectionError:
            raise self._died(path, limit) from None
        except ValueError as error:
            self.close()
            raise CheckpointError("crash", path, f"what libhdf5 made of it is nonsense: {error}.") from None
        except BaseException:  # the answer must not be taken for that to the next request
            self.close()
            raise
        if "refused" in answer:
            if answer.get("errno"):
                raise OSError(answer["errno"], os.strerror(answer["errno"]), str(path))
            code, tensor, reason = answer["refused"]
            raise CheckpointError(code, path, reason, tensor=tensor)
        return answer

    def _receive(self, count: int, deadline: float) -> bytes:
        assert self._socket is not None
        parts: list[bytes] = []
        while count:
            self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
            part = self._socket.recv(min(count, 1 << 20))
            if not part:
                raise ConnectionResetError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _died(self, path: Path, limit: float) -> Exception:
        """Returns the error that says of what the process died; what ends it from outside is not the file's fault."""
        assert self._process is not None
        assert self._errors is not None
        try:
            status = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.close()
            return CheckpointError("crash", path, "the process that parses it hung up, but did not end.")
        errors = self._errors.fileno()
        output = os.pread(errors, _LAST_BYTES, max(0, os.fstat(errors).st_size - _LAST_BYTES))
        last = output.decode(errors="replace").strip().rpartition("\n")[2]
        name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
        ready = self._ready
        self.close()
        if not ready:
            how = f"was killed ({name})" if status < 0 else f"ended with status {status}"
            said = f": {last}" if last else "."
            return ChildProcessError(f"the process that parses HDF5 {how} before it was ready to read {path}{said}")
        if status >= 0:
            return CheckpointError("crash", path, f"the process that parses HDF5 ended with status {status}: {last}")
        if -status == signal.SIGALRM:  # its own timer
            return _too_slow(path, limit)
        if -status in _CRASHES:
            return CheckpointError("crash", path, f"libhdf5 crashed on it ({name}) in the process that parses it.")
        return CheckpointError(
            "killed",
            path,
            f"the process that parses it was killed ({name}), perhaps by the system for want of memory; that is not "
            "necessarily the file's fault. Run it again.",
        )


def _too_slow(path: Path, seconds: float) -> CheckpointError:
    return CheckpointError("too-slow", path, f"libhdf5 did not read it in {seconds:g} s; it may be damaged.")


def _packages() -> list[str]:
    """Returns the folders that hold NumPy and h5py, which the child puts behind the standard library.

    Nothing else of the path of this process is for the child: it would import a user's `json.py` that lies beside a
    script to score with. h5py is looked for beside NumPy, which is imported already, then along the path; as a folder,
    so that a user's `h5py.py` is passed over. Packages in a zip file, or found by an import hook as those installed as
    editable are, are not found: then the child cannot start.
    """
    folders = [str(Path(np.__file__).parents[1])]
    for package in ("h5py", "mpi4py"):  # which h5py imports if it was built with MPI
        along = [*folders, *(os.path.abspath(entry) for entry in sys.path if entry)]
        folders += next(([folder] for folder in along if Path(folder, package, "__init__.py").is_file()), [])
    return list(dict.fromkeys(folders))


def open_hdf5(source: Source, parser: Parser) -> TensorTable:
    """Returns the table of an HDF5 file."""
    part = Hdf5Part(source, 0, source.size)
    sources = [source]
    with closed_on_error(sources):
        legacy, tensors, provenance = read_part(part, 0, sources, parser)
        table = TensorTable(
            source.path, "h5" if legacy else "weights.h5", sources, tensors, layout=part, provenance=provenance
        )
        return table.validate()


def read_part(
    part: Hdf5Part, number: int, sources: list[Source], parser: Parser
) -> tuple[bool, dict[str, Tensor], dict[str, Any] | None]:
    """Returns (legacy layout, tensors, provenance) of an HDF5 file that stands in source `number` of `sources`.

    What has to be unpacked goes to a temporary file, which is appended to `sources`.
    """
    begin = check_superblock(part)
    path = part.source.path
    where = {"offset": part.start, "size": part.size}
    fd = part.source.duplicate()
    try:
        answer = parser.ask(path, "table", [fd], **where)
        check_room(path, sum(nbytes for *_, offset, nbytes in answer["tensors"] if offset == -1))
        tensors: dict[str, Tensor] = {}
        for name, dtype, big, shape, offset, nbytes in answer["tensors"]:
            common = {"name": name, "dtype": dtype, "shape": tuple(shape), "nbytes": nbytes, "big_endian": big}
            if name in tensors:
                raise CheckpointError("name", path, "its name stands there twice.", tensor=name)
            if offset == -1:
                unpacked = _unpack(part, fd, where, common, sources, parser)
                tensors[name] = Tensor(**common, offset=unpacked, source=len(sources) - 1, mapped=False)
            else:
                if offset is not None and nbytes and not begin <= offset <= part.size - nbytes:
                    raise CheckpointError(
                        "bounds",
                        path,
                        f"bytes {offset} to {offset + nbytes} are outside of the HDF5 file, which has its data from "
                        f"byte {begin} to {part.size}.",
                        tensor=name,
                    )
                at = None if offset is None else part.start + offset
                tensors[name] = Tensor(**common, offset=at, source=number, mapped=part.source.unpacked is None)
    finally:
        os.close(fd)
    return answer["legacy"], tensors, read_provenance(path, answer["provenance"])


def _unpack(
    part: Hdf5Part, fd: int, where: dict[str, int], tensor: dict[str, Any], sources: list[Source], parser: Parser
) -> int:
    """Lets the child append a dataset to the last source, made if that is no temporary file; returns its offset."""
    path, to = part.source.path, last_unpacked(sources, part.source)
    begin = to.size
    target = to.duplicate()
    try:
        os.lseek(target, begin, os.SEEK_SET)
        seconds = parser.seconds + tensor["nbytes"] / 2e6  # 2 MB/s is slow even for deflate on a slow disk
        with unpacking(path):
            parser.ask(path, "unpack", [fd, target], seconds, name=tensor["name"], **where)
        to.size = os.fstat(target).st_size
    finally:
        os.close(target)
    if to.size - begin != tensor["nbytes"]:
        raise CheckpointError("size", path, f"{to.size - begin} bytes came out of it.", tensor=tensor["name"])
    return begin


def check_superblock(part: Hdf5Part) -> int:
    """Checks what libhdf5 leaves unchecked; returns the byte behind the superblock.

    It is enough if the source has the beginning of the part only, because the rest is still being inflated.

    Source: HDF5 File Format Specification 3.0, section II.A.
    """

    def refuse(code: str, reason: str) -> CheckpointError:
        return CheckpointError(code, part.source.path, reason)

    base, there = 0, min(part.size, part.source.size - part.start)
    while part.source.read(part.start + base, min(8, max(0, there - base))) != SIGNATURE:
        base = 2 * base or 512
        if base + 8 > there:
            raise refuse("hdf5", "it is not an HDF5 file, or its beginning is damaged.")
    block = part.source.read(part.start + base, min(96, there - base)).ljust(96, b"\0")
    version = block[8]
    if version in (0, 1, 2, 3):
        sizes = block[13:15] if version < 2 else block[9:11]
        if sizes != b"\x08\x08":
            raise refuse("hdf5", "its addresses are not of 8 bytes, as those of Keras' files are.")
    if version in (0, 1):
        flags, at = struct.unpack_from("<I", block, 20)[0], 24 if version == 0 else 28
        _, _, end, driver = struct.unpack_from("<4Q", block, at)
        if driver != _UNDEFINED:
            raise refuse("driver", "it is one of a family of files, of which only whole files are read.")
    elif version in (2, 3):
        flags, at = block[11], 12
        end = struct.unpack_from("<Q", block, 28)[0]
    else:
        raise refuse("hdf5", f"its superblock has the version {version}; versions 0 to 3 are read.")
    if flags:
        raise refuse("not-closed", "it is open for writing, or its writer died before closing it.")
    if base + end != part.size and end != part.size:
        kind = "truncated" if end > part.size else "trailing"
        raise refuse(kind, f"it has {part.size} bytes, but says that it ends at byte {end}.")
    return base + at + (72 if version < 2 else 36)
