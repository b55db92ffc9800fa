"""Checkpoints of one model, all open at once: compared before anything is read, then read by ranges of elements.

Only the table of the newest is kept. Of the others, what is kept is where each tensor stands and what its checksum is:
eleven bytes a tensor, and up to twenty-two more where the format keeps a checksum of each.
"""

from __future__ import annotations

import errno
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files.formats import open_checkpoint
from streaming_polyak.files.formats.hdf5 import Parser
from streaming_polyak.files.source import Source, UnpackedSource
from streaming_polyak.files.tensors import DTYPES, FLOATS, Checksum, TensorTable, differences, is_optimizer

_CHECKSUM = np.dtype([("source", np.uint16), ("start", np.int64), ("size", np.int64), ("crc32", np.uint32)])
_OPEN_FILES = 64  # descriptors left for everything else


class CheckpointSet:
    """Checkpoints with the same tensors.

    Args:
        paths: oldest first.
        parser: what HDF5 metadata are parsed with.
        stack: closes the files in the end.

    Attributes:
        newest: the table of the newest.
        averaged: its tensors that are averaged: floating ones of the model.
        copied: its other tensors of numbers that belong to the model.
        offsets: int64 of shape (checkpoints, averaged and then copied tensors): where each begins in its file.
        source_numbers: of the same shape: in which file of its checkpoint.
        big_endian: of the same shape: the byte order.
        crc32c: of those checkpoints whose format keeps them, by number: of each tensor, uint32.
        tables: of all checkpoints, without their tensors, checksums and provenance.
        sizes: bytes of the files of each checkpoint.
        are_averages: of each checkpoint, whether it says that it is an average.

    Raises:
        CheckpointError: one cannot be read, is there twice, or is not of the same model as the newest.
        OSError: so many have to be unpacked that the limit on open files is too low; or any error of the disk.
    """

    def __init__(self, paths: list[Path], parser: Parser, stack: ExitStack) -> None:
        self.paths = paths
        if any(path.name.endswith((".keras", ".h5", ".hdf5", ".weights.json")) for path in paths):
            parser.start()
        self.newest = open_checkpoint(paths[-1], parser)
        stack.callback(self.newest.close)
        self.averaged = [
            t
            for name, t in self.newest.tensors.items()
            if t.dtype in FLOATS and not is_optimizer(name, self.newest.format)
        ]
        if not self.averaged:
            raise self.newest.refuse("no-floats", "it has no floating tensor that could be averaged.")
        compared = {n: t for n, t in self.newest.tensors.items() if not is_optimizer(n, self.newest.format)}
        self.copied = [t for t in compared.values() if t.dtype in DTYPES and t.dtype not in FLOATS]
        placed = [*self.averaged, *self.copied]
        shape = len(paths), len(placed)
        self.offsets = np.zeros(shape, np.int64)
        self.source_numbers = np.zeros(shape, np.uint16)
        self.big_endian = np.zeros(shape, bool)
        self.crc32c: dict[int, NDArray[np.uint32]] = {}
        self._checksums: list[tuple[NDArray[np.void], Sequence[str]]] = []
        self.tables: list[TensorTable] = []
        self.sizes: list[int] = []
        self.are_averages: list[bool] = []
        seen: dict[tuple[int, int], Path] = {}
        room, unpacked = _free_descriptors(), 0
        kept: list[Source] = []  # with a descriptor, which they can do without: they are opened anew for each read then
        for i, path in enumerate(paths):
            table = self.newest if i == len(paths) - 1 else open_checkpoint(path, parser)
            stack.callback(table.close)
            for source in table.sources:
                if isinstance(source, UnpackedSource):
                    continue  # made of one of the others
                key = source.identity[0], source.identity[1]
                if key in seen:
                    raise CheckpointError(
                        "same-file", path, f"it is the same file as {seen[key]}, which is in the list already."
                    )
                seen[key] = path
            different = differences(self.newest, table, compared)
            if different:
                raise CheckpointError(
                    "different-models",
                    path,
                    f"expected the same tensors as in {self.newest.path}, but they differ:\n"
                    + "\n".join([*different[:20], *([f"  ... and {len(different) - 20} more"] * (len(different) > 20))])
                    + "\nAverage checkpoints of one model only.",
                )
            for k, tensor in enumerate(placed):
                there = table.tensors[tensor.name]
                self.offsets[i, k] = there.offset or 0
                self.source_numbers[i, k] = there.source
                self.big_endian[i, k] = there.big_endian
            if table.tensors[placed[0].name].crc32c is not None:
                self.crc32c[i] = np.array([table.tensors[t.name].crc32c for t in placed], np.uint32)
            self._keep_checksums(table)
            self.are_averages.append(table.provenance is not None)
            self.sizes.append(sum(s.size for s in table.sources if not isinstance(s, UnpackedSource)))
            if table is not self.newest:
                table.tensors = {}
                table.layout = table.provenance = None
            self.tables.append(table)
            for source in table.sources:
                if not isinstance(source, UnpackedSource):
                    kept.append(source)
                elif 0 < room <= unpacked:
                    raise OSError(
                        errno.EMFILE,
                        f"it has to be unpacked, and so had {unpacked} before it: more do not fit, as each takes a "
                        f"file in {tempfile.gettempdir()} that stays open; allow more open files (ulimit -n), or save "
                        "the inputs uncompressed",
                        str(path),
                    )
                else:
                    unpacked += 1
            while kept and len(kept) + unpacked > room:
                kept.pop().close()

    @property
    def kept_bytes(self) -> int:
        """What is kept of all tables."""
        arrays: list[NDArray[Any]] = [self.offsets, self.source_numbers, self.big_endian, *self.crc32c.values()]
        return sum(array.nbytes for array in [*arrays, *(kept for kept, _ in self._checksums)])

    def checksums(self, i: int) -> list[Checksum]:
        """Returns the CRC-32 that the format of an input keeps over ranges of its files."""
        kept, whats = self._checksums[i]
        return [
            Checksum(source, start, size, crc, what)
            for (source, start, size, crc), what in zip(kept.tolist(), whats, strict=True)
        ]

    def _keep_checksums(self, table: TensorTable) -> None:
        """Moves the checksums of a table into arrays: as objects, of thousands of tensors, they take much memory."""
        rows = [(c.source, c.start, c.size, c.crc32) for c in table.checksums]
        whats: Sequence[str] = [checksum.what for checksum in table.checksums]
        if self._checksums and whats == self._checksums[-1][1]:
            whats = self._checksums[-1][1]
        self._checksums.append((np.array(rows, _CHECKSUM), whats))
        table.checksums = ()

    def read_into(self, i: int, k: int, buffer: memoryview, first: int) -> None:
        """Reads elements of an averaged tensor of an input, as stored."""
        source = self.tables[i].sources[self.source_numbers[i, k]]
        source.read_into(buffer, int(self.offsets[i, k]) + first * self.itemsize(k))

    def check_crc32c(self, i: int, k: int, crc: int) -> None:
        """Checks the CRC-32C of what was read of a tensor.

        Raises:
            CheckpointError: it is not what the index of the checkpoint says.
        """
        if i in self.crc32c:
            name = [*self.averaged, *self.copied][k].name
            self.tables[i].check_crc32c(name, crc, int(self.crc32c[i][k]))

    def places(self, k: int) -> list[tuple[Source, int, bool]]:
        """Returns of each input in which file an averaged tensor stands, from which byte on, and if big-endian."""
        return [
            (table.sources[number], offset, big_endian)
            for table, number, offset, big_endian in zip(
                self.tables,
                self.source_numbers[:, k].tolist(),
                self.offsets[:, k].tolist(),
                self.big_endian[:, k].tolist(),
                strict=True,
            )
        ]

    def itemsize(self, k: int) -> int:
        """Bytes of an element of an averaged tensor."""
        return self.averaged[k].stored_dtype.itemsize

    def check_unchanged(self) -> None:
        """Checks that nobody wrote to any of the files."""
        for table in self.tables:
            table.check_unchanged()


def _free_descriptors() -> int:
    """Returns how many files may be kept open."""
    try:
        import resource
    except ImportError:
        return sys.maxsize
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OPEN_FILES


def as_floats(raw: NDArray[np.uint8], dtype: str, big_endian: bool, buffer: NDArray[np.uint8]) -> NDArray[Any]:
    """Returns stored bytes as native floats of the same values, float32 for two-byte ones; perhaps in `buffer`."""
    order = ">" if big_endian else "<"
    if dtype == "bfloat16":
        out = buffer[: 2 * raw.size].view(np.uint32)
        np.left_shift(raw.view(f"{order}u2"), 16, out=out, dtype=np.uint32)
        return out.view(np.float32)
    if dtype == "float16":
        half = buffer[: 2 * raw.size].view(np.float32)
        np.copyto(half, raw.view(f"{order}f2"))
        return half
    stored = raw.view(f"{order}f{4 if dtype == 'float32' else 8}")
    if not big_endian:
        return stored
    native = buffer[: raw.size].view(stored.dtype.newbyteorder("="))
    np.copyto(native, stored)
    return native
