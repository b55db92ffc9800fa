"""Reads a checkpoint whole, once, and tells whether it is one that can be trusted and averaged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from streaming_polyak.errors import NonFiniteError
from streaming_polyak.files import pieces
from streaming_polyak.files.checksums import crc32, crc32_combine, crc32c, crc32c_combine
from streaming_polyak.files.formats import open_checkpoint
from streaming_polyak.files.formats.archive import STORED, in_place
from streaming_polyak.files.formats.hdf5 import Parser
from streaming_polyak.files.formats.keras_archive import WEIGHTS, KerasArchive
from streaming_polyak.files.formats.tf_checkpoint import check_strings
from streaming_polyak.files.meter import Meter, cpus, format_bytes
from streaming_polyak.files.pieces import Piece, Segment
from streaming_polyak.files.source import UnpackedSource
from streaming_polyak.files.summation import TILE
from streaming_polyak.files.tensors import DTYPES, FLOATS, Tensor, TensorTable, is_optimizer, printable, without_nan


@dataclass
class Reading:
    """What reading a whole checkpoint found.

    Args:
        digests: CRC-32 (or CRC-32C) of each tensor that is stored, by name.
        nonfinite: names of the tensors with NaN or infinity in them, those of the optimizer left out.
        crc32: of all its files, one after the other.
        checked: how many checksums of the format held.
        size: bytes of all its files.
    """

    digests: dict[str, int] = field(default_factory=dict)
    nonfinite: list[str] = field(default_factory=list)
    crc32: int = 0
    checked: int = 0
    size: int = 0


@dataclass(frozen=True)
class Verified:
    """A checkpoint that is whole and can be averaged.

    Args:
        path: of the checkpoint.
        format: of the checkpoint.
        tensors: how many it has.
        bytes: of its files.
        crc32: of its files, one after the other.
        checksums: how many checksums it carries; all hold. 0 where the format has none: then flipped bits in numbers
            would not have been seen.
        provenance: how it was made, if it is an average.
    """

    path: Path
    format: str
    tensors: int
    bytes: int
    crc32: int
    checksums: int
    provenance: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        return {
            "path": str(self.path),
            "format": self.format,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "crc32": f"{self.crc32:08x}",
            "checksums": self.checksums,
            "provenance": without_nan(self.provenance),
        }

    def __str__(self) -> str:
        checks = (
            f"{self.checksums} checksums hold"
            if self.checksums
            else "the format has no checksums, so a flipped bit would not show"
        )
        made = ""
        if self.provenance is not None and isinstance(self.provenance.get("inputs"), list):
            made = f"; {self.provenance.get('weighting')} average of {len(self.provenance['inputs'])} checkpoints"
        return (
            f"{printable(str(self.path))}: good. {self.format}, {self.tensors} tensors, {format_bytes(self.bytes)}, "
            f"CRC-32 {self.crc32:08x}; all finite; {checks}{made}"
        )


def verify_checkpoint(path: str | os.PathLike[str], *, progress: bool = False) -> Verified:
    """Reads everything once: checks the structure, the checksums that the format has, and that all is finite.

    Args:
        path: a checkpoint of any format that can be averaged.
        progress: show a bar, if the error output is a terminal.

    Returns:
        What was found, all of it good.

    Raises:
        CheckpointError: it is damaged, hostile, of an unknown format, or changed meanwhile.
        NonFiniteError: a floating tensor of the model holds NaN or infinity.
    """
    with Parser() as parser, open_checkpoint(Path(path), parser) as table, Meter(None, "verifying", progress) as meter:
        meter.expect(sum(source.size for source in table.sources if not isinstance(source, UnpackedSource)))
        reading = read_all(table, cpus(), meter=meter)
        table.check_unchanged()
        if reading.nonfinite:
            raise NonFiniteError(
                f"{table.path}, tensor {reading.nonfinite[0]!r}: it holds NaN or infinity"
                + (f", and so do {len(reading.nonfinite) - 1} others." if reading.nonfinite[1:] else ".")
            )
        if not any(t.dtype in FLOATS and not is_optimizer(name, table.format) for name, t in table.tensors.items()):
            raise table.refuse("no-floats", "it has no floating tensor that could be averaged.")
        checked = reading.checked + _check_deflated(table)
        checked += check_strings(table) if table.format in ("tf_checkpoint", "saved_model") else 0
        return Verified(
            table.path, table.format, len(table.tensors), reading.size, reading.crc32, checked, table.provenance
        )


def read_all(table: TensorTable, threads: int, *, castagnoli: bool = False, meter: Meter | None = None) -> Reading:
    """Reads all bytes of a checkpoint, each once.

    Args:
        table: of the checkpoint.
        threads: how many may read.
        castagnoli: give CRC-32C as digests of tensors.
        meter: is told of the bytes read.

    Raises:
        CheckpointError: a checksum does not hold.
    """
    meter = meter or Meter(None, "", False)
    stored = [t for t in table.tensors.values() if t.offset is not None]
    numbers = [_as_numbers(t) for t in stored]
    cuts = pieces.cut(numbers)
    both = castagnoli or any(t.crc32c is not None for t in stored)
    crcs, others = np.zeros(len(cuts), np.uint32), np.zeros(len(cuts), np.uint32)
    nonfinite: set[int] = set()

    def read(job: tuple[int, Piece]) -> None:
        number, (k, lo, hi) = job
        tensor = stored[k]
        assert tensor.offset is not None
        itemsize = 1 if tensor.dtype == "string" else DTYPES[tensor.dtype].itemsize
        watched = tensor.dtype in FLOATS and not is_optimizer(tensor.name, table.format)
        buffer, crc, other = np.empty(min(TILE, hi - lo) * itemsize, np.uint8), 0, 0
        for at in range(lo, hi, TILE):
            part = buffer[: min(TILE, hi - at) * itemsize]
            view = part.data
            table.sources[tensor.source].read_into(view, tensor.offset + at * itemsize)
            crc = crc32(view, crc)
            other = crc32c(view, other) if both else 0
            with np.errstate(invalid="ignore"):  # of a NaN that signals
                if watched and not np.isfinite(part.view(tensor.stored_dtype)).all():
                    nonfinite.add(k)
            if tensor.mapped:
                meter.add(part.size)
        crcs[number], others[number] = crc, other

    pieces.run(enumerate(cuts), read, threads)
    reading = Reading(nonfinite=[stored[k].name for k in sorted(nonfinite)])
    plain = {t.name: 0 for t in stored}
    second = dict(plain)
    segments: dict[int, list[Segment]] = {number: [] for number in range(len(table.sources))}
    for (k, lo, hi), crc, other in zip(cuts, crcs.tolist(), others.tolist(), strict=True):
        tensor = stored[k]
        assert tensor.offset is not None
        itemsize = 1 if tensor.dtype == "string" else DTYPES[tensor.dtype].itemsize
        size = (hi - lo) * itemsize
        segments[tensor.source].append(Segment(tensor.offset + lo * itemsize, size, crc))
        plain[tensor.name] = crc32_combine(plain[tensor.name], crc, size)
        if both:
            second[tensor.name] = crc32c_combine(second[tensor.name], other, size)
    for tensor in stored:
        if tensor.crc32c is not None and tensor.dtype != "string":
            table.check_crc32c(tensor.name, second[tensor.name])
            reading.checked += 1
    for number, source in enumerate(table.sources):
        checksums = [c for c in table.checksums if c.source == number]
        crc = pieces.digest(source, segments[number], checksums, meter)
        reading.checked += len(checksums)
        if not isinstance(source, UnpackedSource):
            reading.crc32 = crc32_combine(reading.crc32, crc, source.size)
            reading.size += source.size
    reading.digests = second if castagnoli else plain
    provenance = table.provenance or {}
    said = provenance.get("content_crc32")
    if isinstance(said, str) and not castagnoli and said != "0" * 8:
        crc = content_crc32(provenance, stored, plain, table.format)
        if f"{crc:08x}" != said:
            raise table.refuse(
                "damaged",
                f"the CRC-32 of its tensors and of what it says of its making is {crc:08x}, not {said} as it says: the "
                "file is damaged.",
            )
        reading.checked += 1
    return reading


def _check_deflated(table: TensorTable) -> int:
    """Checks the deflated members of an archive; returns how many there are.

    Those with tensors in them were checked when they were inflated, to read the tensors.
    """
    if table.format == "npz":
        return len(table.tensors) - len(table.checksums)
    if not isinstance(table.layout, KerasArchive):
        return 0
    deflated = [member for member in table.layout.members.values() if member.method != STORED]
    for member in deflated:
        if member.name != WEIGHTS:
            in_place(table.layout.source, member)[0].close()
    return len(deflated)


def content_crc32(
    provenance: Mapping[str, Any], tensors: Iterable[Tensor], digests: Mapping[str, int], format: str
) -> int:
    """Returns the CRC-32 of what an average says of its making and of all tensors of the model.

    Of a tensor that is its name, dtype and shape, and its data; in the order of the names.

    Args:
        provenance: what it says; the CRC-32 itself is left out.
        tensors: of the checkpoint.
        digests: CRC-32 of the data of each, by name.
        format: of the checkpoint.
    """
    crc = crc32(_canonical({key: value for key, value in provenance.items() if key != "content_crc32"}))
    for tensor in sorted(tensors, key=lambda t: t.name):
        if not is_optimizer(tensor.name, format):
            crc = crc32(f"{tensor.name} {tensor.describe()}".encode(), crc)
            crc = crc32_combine(crc, digests[tensor.name], tensor.nbytes)
    return crc


def _canonical(said: dict[str, Any]) -> bytes:
    try:
        return json.dumps(said, sort_keys=True).encode()
    except RecursionError:  # nested so deep that it could just be read: none of ours
        return b""


def _as_numbers(tensor: Tensor) -> Any:
    """A string tensor, whose elements have no fixed size, counts as bytes."""
    if tensor.dtype != "string":
        return tensor
    return Tensor(tensor.name, "uint8", (tensor.nbytes,), tensor.offset, tensor.nbytes, tensor.source)
