"""The `.keras` archive: `config.json`, `metadata.json`, `model.weights.h5`, perhaps `assets/`.

All members that Keras writes are stored, so the tensors of the HDF5 file inside stand raw in the archive, at the
member's place plus their place in the HDF5 file. The configuration is kept and never looked into. An average has one
member more, `streaming_polyak.json`, which says how it was made; Keras ignores it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files.formats.archive import STORED, Member, checksum, in_place, read_directory
from streaming_polyak.files.formats.hdf5 import Hdf5Part, Parser, check_superblock, read_part
from streaming_polyak.files.source import Source, closed_on_error
from streaming_polyak.files.tensors import PROVENANCE, TensorTable, read_provenance

WEIGHTS = "model.weights.h5"
PROVENANCE_MEMBER = f"{PROVENANCE}.json"
_MAX_PROVENANCE_BYTES = 16 << 20
_NAMES = ("config.json", "metadata.json", WEIGHTS, PROVENANCE_MEMBER)


@dataclass(frozen=True)
class KerasArchive:
    """The structure of an archive: all its members, and where its HDF5 file stands."""

    source: Source
    members: dict[str, Member]
    weights: Hdf5Part


def open_keras(source: Source, parser: Parser) -> TensorTable:
    """Returns the table of a `.keras` archive."""
    members = read_directory(source, lambda name: name in _NAMES or name.startswith("assets/"))
    if WEIGHTS not in members or "config.json" not in members:
        raise CheckpointError("keras", source.path, f"it has no {WEIGHTS} or no config.json in it.")
    weights = members[WEIGHTS]
    inside, start, mapped = in_place(
        source, weights, check=lambda beginning: check_superblock(Hdf5Part(beginning, 0, weights.size))
    )
    sources = [source] if mapped else [source, inside]
    number = len(sources) - 1
    with closed_on_error(sources):
        part = Hdf5Part(inside, start, weights.size)
        _, tensors, _ = read_part(part, number, sources, parser)
        checksums = [checksum(member, 0) for member in members.values() if member.method == STORED]
        return TensorTable(
            source.path,
            "keras",
            sources,
            tensors,
            tuple(checksums),
            KerasArchive(source, members, part),
            _provenance(source, members.get(PROVENANCE_MEMBER)),
        ).validate()


def _provenance(source: Source, member: Member | None) -> dict[str, Any] | None:
    if member is None or member.size > _MAX_PROVENANCE_BYTES:
        return None
    inside, start, mapped = in_place(source, member)
    try:
        return read_provenance(inside.path, inside.read(start, member.size))
    finally:
        if not mapped:
            inside.close()
