"""Keras' sharded store: `NAME.weights.json`, which maps groups to the `NAME_00000.weights.h5` ... beside it.

Keras opens the shard 00000 in any case, and every other one by the name the map gives. Names that lead to another
folder are refused, so that no file is opened but those.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files.formats.hdf5 import Hdf5Part, Parser, read_part
from streaming_polyak.files.source import Source, closed_on_error
from streaming_polyak.files.tensors import PROVENANCE, Tensor, TensorTable, read_json

SUFFIX = ".weights.json"
_MAX_MAP_BYTES = 8 << 20  # parsed JSON takes up to 25 times its bytes


@dataclass(frozen=True)
class Shards:
    """The structure of a store: the map as parsed, and the HDF5 files by name."""

    map: dict[str, Any]
    parts: dict[str, Hdf5Part]


def open_sharded(source: Source, parser: Parser) -> TensorTable:
    """Returns the table of a sharded store."""

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError("sharded", source.path, reason)

    said, shards = _read_map(source)
    sources: list[Source] = [source]
    tensors: dict[str, Tensor] = {}
    parts: dict[str, Hdf5Part] = {}
    with closed_on_error(sources):
        for name, groups in shards.items():
            shard = Source(source.path.with_name(name))
            sources.append(shard)
            parts[name] = Hdf5Part(shard, 0, shard.size)
            _, found, _ = read_part(parts[name], len(sources) - 1, sources, parser)
            for tensor in found.values():
                if tensor.name.rpartition("/")[0] not in groups:
                    raise CheckpointError(
                        "sharded", shard.path, f"the weight_map of {source.path} does not list it.", tensor=tensor.name
                    )
                if tensor.name in tensors:
                    raise CheckpointError("sharded", shard.path, "another shard has it too.", tensor=tensor.name)
                tensors[tensor.name] = tensor
        listed = {group for groups in shards.values() for group in groups}
        missing = listed - {name.rpartition("/")[0] for name in tensors}
        if missing:
            raise refuse(f"no shard has anything of {sorted(missing)[0]!r:.100}.")
        provenance = said.get("metadata", {}).get(PROVENANCE) if isinstance(said.get("metadata"), dict) else None
        return TensorTable(
            source.path,
            "weights.json",
            sources,
            tensors,
            layout=Shards(said, parts),
            provenance=provenance if isinstance(provenance, dict) else None,
        ).validate()


def shard_names(source: Source) -> list[str]:
    """Returns the names of the HDF5 files of a store, from its map alone."""
    return list(_read_map(source)[1])


def _read_map(source: Source) -> tuple[dict[str, Any], dict[str, set[str]]]:
    """Returns the map as parsed, and the groups of each shard."""

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError("sharded", source.path, reason)

    if source.size > _MAX_MAP_BYTES:
        raise refuse("it is unreasonably long.")
    said = read_json(source, source.read(0, source.size), "it")
    if not isinstance(said, dict) or not isinstance(said.get("weight_map"), dict):
        raise refuse("it has no weight_map.")
    shards: dict[str, set[str]] = {}
    for group, names in said["weight_map"].items():
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str) or name != Path(name).name or not name.endswith(".weights.h5"):
                raise refuse(f"the shard {name!r:.100} of {group!r:.100} is not a .weights.h5 file in its own folder.")
            shards.setdefault(name, set()).add(group.strip("/"))
    return said, shards
