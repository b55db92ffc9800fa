"""One checkpoint of a run: a safetensors file whose every bit is under a checksum.

Tensors stand raw in it. `__metadata__` has two strings:

* "header_crc32": the CRC-32 of everything before the data, its own eight digits as zeros. It comes first, so that they
  always stand at the same place.
* "streaming_polyak_run": JSON with the version of this format, the step, which save of the run this is, a CRC-32 a
  tensor, and the state that is not tensors.

Data are written before the header, so no tensor is needed twice or kept: what is read is written and forgotten.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files.checksums import crc32
from streaming_polyak.files.disk import Disk, NewFile
from streaming_polyak.files.formats import safetensors
from streaming_polyak.files.meter import cpus
from streaming_polyak.files.source import Source
from streaming_polyak.files.tensors import DTYPES, Tensor, TensorTable, read_json
from streaming_polyak.files.verify import read_all

VERSION = 1
_KEY = "streaming_polyak_run"
_BEGINNING = b'{"__metadata__":{"header_crc32":"'
_AT = 8 + len(_BEGINNING)  # where the digits are
_ZEROS = "0" * 8
_BLOCK_BYTES = 4 << 20
_SMALL_BYTES = 1 << 20  # not worth several threads


@dataclass(frozen=True)
class Part:
    """A tensor to be saved.

    Args:
        name: unique in the checkpoint.
        dtype: a key of `DTYPES`.
        shape: of the tensor.
        read: returns it when its turn has come; an array of that shape and dtype, which is let go soon.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]

    @classmethod
    def of(cls, name: str, array: NDArray[Any]) -> Part:
        """Returns the part that an array is."""
        return cls(name, array.dtype.name, array.shape, lambda: array)


def write_run_checkpoint(
    path: Path, parts: Iterable[Part], state: Mapping[str, Any], *, step: int, save: int, disk: Disk | None = None
) -> None:
    """Writes a checkpoint to a file that does not exist yet, and waits until the disk has it.

    Args:
        path: the file.
        parts: the tensors; at most one is looked at at a time.
        state: JSON values.
        step: how many optimizer steps the run has made.
        save: which save of the run this is, counted from 1.
        disk: what is written to; `None` for the local disk.

    Raises:
        OSError: the disk refused.
        ValueError: two parts have one name, or one gives something else than it said.
    """
    by_name: dict[str, Part] = {}
    for part in parts:
        if by_name.setdefault(part.name, part) is not part:
            raise ValueError(f"Expected a name of its own for each tensor, got two parts called {part.name!r}.")
    tensors = [
        Tensor(p.name, p.dtype, p.shape, None, int(np.prod(p.shape, dtype=np.int64)) * DTYPES[p.dtype].itemsize)
        for p in by_name.values()
    ]
    digests = dict.fromkeys(by_name, _ZEROS)

    def header(header_crc32: str) -> tuple[bytes, dict[str, Tensor]]:
        said = {"version": VERSION, "step": step, "save": save, "crc32": digests, "state": state}
        metadata = {"header_crc32": header_crc32, _KEY: json.dumps(said, separators=(",", ":"), allow_nan=False)}
        return safetensors.header(tensors, metadata)

    beginning, places = header(_ZEROS)
    with closing(NewFile(path, disk)) as file:
        file.truncate(len(beginning) + sum(tensor.nbytes for tensor in tensors))
        for name, place in places.items():
            array = np.ascontiguousarray(by_name[name].read())
            if (array.dtype.name, array.size * array.itemsize) != (place.dtype, place.nbytes):
                raise ValueError(f"{name!r} is {array.dtype.name} {array.shape}, not {place.describe()} as it said.")
            assert place.offset is not None
            data, crc = array.reshape(-1).view(np.uint8).data, 0
            for at in range(0, len(data), _BLOCK_BYTES):
                block = data[at : at + _BLOCK_BYTES]
                file.write(block, place.offset + at)
                crc = crc32(block, crc)
            digests[name] = f"{crc:08x}"
        zeros, _ = header(_ZEROS)
        whole, _ = header(f"{crc32(zeros):08x}")
        assert len(whole) == len(beginning), "digests are of one length"
        file.write(whole, 0)
        file.sync()


class RunCheckpoint:
    """A checkpoint of a run, open for reading; its header has been checked, its data only if `verify` says so.

    Args:
        path: the file.

    Raises:
        CheckpointError: no such file, or one that is damaged, of a later version, or none of a run.
    """

    def __init__(self, path: Path) -> None:
        source = Source(path)
        with closing(source):
            beginning = source.read(0, min(source.size, _AT + 8))
            if beginning[8:_AT] != _BEGINNING:
                raise CheckpointError("run-checkpoint", path, "it is no checkpoint of a run, or its header is damaged.")
            (length,) = struct.unpack_from("<Q", beginning)
            header = source.read(0, 8 + min(length, safetensors.MAX_HEADER_BYTES))
            said = header[_AT : _AT + 8]
            crc = crc32(header[:_AT] + _ZEROS.encode() + header[_AT + 8 :])
            if said != f"{crc:08x}".encode():
                raise CheckpointError("damaged", path, "its header does not have the CRC-32 that it says.")
        self._table: TensorTable = safetensors.open_safetensors(source)
        run = read_json(source, str(self._table.layout.get(_KEY, "{}")).encode(), "its metadata")
        if run.get("version") != VERSION:
            raise CheckpointError(
                "version", path, f"it has version {run.get('version')} of this format; this library reads {VERSION}."
            )
        self.path = path
        self.step: int = run["step"]
        self.save: int = run["save"]
        self.state: dict[str, Any] = run["state"]
        self._crc32: dict[str, str] = run["crc32"]

    def __enter__(self) -> RunCheckpoint:
        self._table.sources[0].keep_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._table.close()

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What it holds, by name."""
        return self._table.tensors

    def read(self, name: str) -> NDArray[Any]:
        """Returns a tensor as a new array."""
        return self._table.read(name)

    def verify(self, threads: int | None = None) -> None:
        """Reads all data and checks each tensor against its checksum.

        Raises:
            CheckpointError: one is damaged, or somebody wrote to the file meanwhile.
        """
        small = sum(tensor.nbytes for tensor in self.tensors.values()) < _SMALL_BYTES
        found = read_all(self._table, threads or (1 if small else cpus())).digests
        if self._crc32.keys() != found.keys():
            raise self._table.refuse("damaged", "it does not have a checksum for each tensor.")
        for name, crc in found.items():
            if f"{crc:08x}" != self._crc32[name]:
                raise self._table.refuse("damaged", f"its CRC-32 is {crc:08x}, not {self._crc32[name]}.", name)
        self._table.check_unchanged()
