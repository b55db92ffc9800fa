"""TensorFlow's checkpoints ("tensor bundles") and the SavedModel folders around them, without TensorFlow.

A bundle is PREFIX.index and PREFIX.data-00000-of-0000N. A data file is the raw bytes of tensors, so each tensor is read
in place. The index is a table (see `leveldb`) whose key "" has a BundleHeaderProto; every other key is the name of a
tensor and has a BundleEntryProto.

Keras' SavedModels hold the variables of the model twice, as `variables/I` in the order of the layers and as
`_all_variables/J` in an order that changes from one export to the next. The latter are named after the former here, by
the variables' own names in the object graph, so that no two different ones are averaged.

Source: TensorFlow, core/protobuf/tensor_bundle.proto, core/protobuf/trackable_object_graph.proto and
core/util/tensor_bundle.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files import checksums
from streaming_polyak.files.formats.leveldb import read_table, table_bytes
from streaming_polyak.files.formats.protobuf import (
    BYTES,
    FIXED32,
    VARINT,
    Malformed,
    decode,
    read_fields,
    read_varint,
    single,
)
from streaming_polyak.files.source import Source
from streaming_polyak.files.tensors import MAX_RANK, MAX_TENSORS, PROVENANCE, Tensor, TensorTable, read_provenance

INDEX = ".index"
_MAX_SHARDS = 10_000
_VERSION = 1  # of tensor bundles

_DTYPES = dict(enumerate([
    "float32", "float64", "int32", "uint8", "int16", "int8", "string", "complex64", "int64", "bool", "qint8", "quint8",
    "qint32", "bfloat16", "qint16", "quint16", "uint16", "complex128", "float16", "resource", "variant", "uint32",
    "uint64", "float8_e5m2", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2fnuz",
    "int4", "uint4", "int2", "uint2",
], start=1))  # fmt: skip

_HEADER_PROTO = {1: VARINT, 2: VARINT, 3: BYTES}  # num_shards, endianness, version
_VERSION_PROTO = {2: VARINT}  # min_consumer
_ENTRY_PROTO = {1: VARINT, 2: BYTES, 3: VARINT, 4: VARINT, 5: VARINT, 6: FIXED32, 7: BYTES}
_SHAPE_PROTO = {2: BYTES, 3: VARINT}  # dim, unknown_rank
_DIM_PROTO = {1: VARINT}  # size
_CRC_FIELD = 6
_GRAPH_PROTO = {1: BYTES}  # nodes
_NODE_PROTO = {2: BYTES}  # attributes
_ATTRIBUTE_PROTO = {2: BYTES, 3: BYTES}  # full_name, checkpoint_key

_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_MAX_GRAPH_BYTES = 64 << 20
_MAX_VARINT = 10
_BLOCK_BYTES = 1 << 20
PROVENANCE_PLACE = Path("assets.extra") / f"{PROVENANCE}.json"  # where TensorFlow's users put files of their own
_MAX_PROVENANCE_BYTES = 16 << 20
_ORDERED, _UNORDERED = "variables/", "_all_variables/"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of an index: its name here and there, whether it holds strings, and its BundleEntryProto."""

    name: str
    key: str
    strings: bool
    proto: bytes


@dataclass(frozen=True)
class Bundle:
    """The structure of a bundle: its prefix, the BundleHeaderProto, the entries in order, and its data files.

    The data files are those that hold a tensor, in the order of `TensorTable.sources[1:]`, each as what follows the
    prefix in its name, such as ".data-00000-of-00001".
    """

    prefix: Path
    header: bytes
    entries: tuple[Entry, ...]
    shards: tuple[str, ...]


def open_saved_model(folder: Path) -> TensorTable:
    """Returns the table of the variables of a SavedModel folder."""
    prefix = folder / "variables" / "variables"
    if not ((folder / "saved_model.pb").is_file() and Path(f"{prefix}{INDEX}").is_file()):
        raise CheckpointError(
            "folder",
            folder,
            "it is a folder, but neither a SavedModel (saved_model.pb and variables/variables.index) nor a checkpoint. "
            "Of a TensorFlow checkpoint give the prefix, such as folder/ckpt-1.",
        )
    table = _in_one_order(open_tf_checkpoint(prefix, format="saved_model", path=folder))
    said = folder / PROVENANCE_PLACE
    if said.is_file() and said.stat().st_size <= _MAX_PROVENANCE_BYTES:
        source = Source(said)
        table.provenance = read_provenance(said, source.read(0, source.size))
    return table


def open_tf_checkpoint(prefix: Path, *, format: str = "tf_checkpoint", path: Path | None = None) -> TensorTable:
    """Returns the table of a bundle.

    The `crc32c` of a tensor of strings is not that of the bytes in the file, see `check_strings`.

    Args:
        prefix: the name of the bundle, without ".index".
        format: of the table.
        path: of the table; `None` for the prefix.

    Raises:
        CheckpointError: the index is damaged, has something that is not read here, or a data file is missing or short.
    """
    index = Source(Path(f"{prefix}{INDEX}"))
    rows = read_table(index)
    key, header = next(rows)
    if key:
        raise CheckpointError("tf-index", index.path, "it does not begin with the header of a bundle.")
    num_shards, big_endian = _read_header(index, header)
    tensors: dict[str, Tensor] = {}
    entries = []
    for key, proto in rows:
        if len(tensors) == MAX_TENSORS:
            raise CheckpointError("too-many", index.path, f"it has more than {MAX_TENSORS} tensors.")
        tensor = _read_entry(index, key, proto, num_shards, big_endian)
        tensors[tensor.name] = tensor
        entries.append(Entry(tensor.name, tensor.name, tensor.dtype == "string", proto))
    numbers = {shard: number for number, shard in enumerate(sorted({t.source for t in tensors.values()}), start=1)}
    shards = tuple(f".data-{shard:05d}-of-{num_shards:05d}" for shard in numbers)
    return TensorTable(
        path or prefix,
        format,
        [index, *(Source(Path(f"{prefix}{shard}")) for shard in shards)],
        {name: replace(tensor, source=numbers[tensor.source]) for name, tensor in tensors.items()},
        layout=Bundle(prefix, header, tuple(entries), shards),
    ).validate()


def check_strings(table: TensorTable) -> int:
    """Checks the tensors of strings against their CRC-32C; returns how many there are.

    Stored are the lengths as varints, a masked CRC-32C of the lengths, and the strings. Both CRCs take the lengths as
    numbers of four bytes (of eight, if they need them), that of the tensor also the other CRC and the strings.

    Raises:
        CheckpointError: one is damaged.

    Source: TensorFlow, core/util/tensor_bundle/tensor_bundle.cc, WriteStringTensor.
    """
    strings = [tensor for tensor in table.tensors.values() if tensor.dtype == "string"]
    for tensor in strings:
        _check_string(table, tensor)
    return len(strings)


def _check_string(table: TensorTable, tensor: Tensor) -> None:
    assert tensor.offset is not None
    source, end = table.sources[tensor.source], tensor.offset + tensor.nbytes
    try:
        crc, at, total = 0, tensor.offset, 0
        data, start = b"", at
        for _ in range(tensor.size):
            if at - start + _MAX_VARINT > len(data) and start + len(data) < end:
                start, data = at, source.read(at, min(_BLOCK_BYTES, end - at))
            length, here = read_varint(data, at - start, len(data))
            at, total = start + here, total + length
            number = struct.pack("<I" if length < 1 << 32 else "<Q", length)
            crc = checksums.crc32c(number[::-1] if tensor.big_endian else number, crc)
        if at + 4 + total != end:
            raise Malformed("its lengths are not those of its strings")
        said = source.read(at, 4)
        if struct.unpack("<I", said)[0] != checksums.mask_crc32c(crc):
            raise Malformed("its lengths do not have the CRC-32C that it says")
        crc = checksums.crc32c(said, crc)
        for begin in range(at + 4, end, _BLOCK_BYTES):
            crc = checksums.crc32c(source.read(begin, min(_BLOCK_BYTES, end - begin)), crc)
    except Malformed as error:
        raise table.refuse("damaged", f"{error}: the file is damaged.", tensor.name) from None
    table.check_crc32c(tensor.name, crc)


def data_names(index: Source) -> list[str]:
    """Returns the names of the data files of a bundle, from its index alone."""
    prefix = index.path.name.removesuffix(INDEX)
    count, _ = _read_header(index, next(read_table(index))[1])
    return [f"{prefix}.data-{shard:05d}-of-{count:05d}" for shard in range(count)]


def index_bytes(layout: Bundle, crc32c: Mapping[str, int]) -> bytes:
    """Returns an index with the same tensors at the same places, some of them with other contents.

    Args:
        layout: of the bundle whose structure it has.
        crc32c: CRC-32C of the new bytes of tensors, by name; the other tensors keep theirs.

    Raises:
        ValueError: there is no such tensor, or it holds strings.
    """
    strings = {entry.name: entry.strings for entry in layout.entries}
    for name in crc32c:
        if strings.get(name, True):
            raise ValueError(f"{name!r} is not a tensor of numbers in {layout.prefix}; strings keep their checksum.")
    rows = [(b"", layout.header)]
    for entry in layout.entries:
        crc = crc32c.get(entry.name)
        rows.append((entry.key.encode(), entry.proto if crc is None else _with_crc(entry.proto, crc)))
    return table_bytes(rows)


def _in_one_order(table: TensorTable) -> TensorTable:
    """Names the variables of a Keras export that stand in no order after those that do."""
    unordered = [name for name in table.tensors if name.startswith(_UNORDERED)]
    if not unordered:
        return table
    full_names = _full_names(table)
    ordered: dict[str, list[str]] = {}
    for name in table.tensors:
        if name.startswith(_ORDERED) and name in full_names:
            ordered.setdefault(full_names[name], []).append(name)
    renamed = {}
    for name in unordered:
        same = ordered.get(full_names.get(name, ""), [])
        if len(same) != 1 or table.tensors[same[0]].describe() != table.tensors[name].describe():
            raise table.refuse(
                "ambiguous",
                "its place among the others changes from one export to the next, and its own name "
                f"{full_names.get(name)!r} does not tell which variable it is. Average .keras files and export the "
                "average instead.",
                name,
            )
        renamed[name] = _UNORDERED + same[0]
    if len(set(renamed.values())) != len(renamed):
        raise table.refuse(
            "ambiguous", "two variables have one name. Average .keras files and export the average instead."
        )
    bundle: Bundle = table.layout
    table.tensors = {
        renamed.get(name, name): replace(tensor, name=renamed.get(name, name)) for name, tensor in table.tensors.items()
    }
    table.layout = replace(
        bundle, entries=tuple(replace(entry, name=renamed.get(entry.key, entry.key)) for entry in bundle.entries)
    )
    return table


def _full_names(table: TensorTable) -> dict[str, str]:
    """Returns the own names of variables by their keys, from the object graph."""
    tensor = table.tensors.get(_GRAPH)
    if tensor is None or tensor.dtype != "string" or tensor.shape or not 6 <= tensor.nbytes <= _MAX_GRAPH_BYTES:
        raise table.refuse("tf-graph", "it has no object graph, or one of an unreasonable size.", _GRAPH)
    _check_string(table, tensor)
    assert tensor.offset is not None
    data = table.sources[tensor.source].read(tensor.offset, tensor.nbytes)
    found = {}
    try:
        length, at = read_varint(data, 0, len(data))
        if at + 4 + length != len(data):
            raise Malformed("its length is not that of the string")
        for node in decode(data[at + 4 :], _GRAPH_PROTO).get(1, []):
            for attribute in decode(node, _NODE_PROTO).get(2, []):
                fields = decode(attribute, _ATTRIBUTE_PROTO)
                key, full_name = single(fields, 3, b""), single(fields, 2, b"")
                found[key.decode("utf-8", "replace")] = full_name.decode("utf-8", "replace")
    except Malformed as error:
        raise table.refuse("tf-graph", f"the object graph is damaged: {error}.", _GRAPH) from None
    return found


def _read_header(index: Source, proto: bytes) -> tuple[int, bool]:
    """Returns the number of data files and whether they are big-endian."""
    try:
        fields = decode(proto, _HEADER_PROTO)
        num_shards, endianness = single(fields, 1, 0), single(fields, 2, 0)
        needed = single(decode(single(fields, 3, b""), _VERSION_PROTO), 2, 0)
    except Malformed as error:
        raise CheckpointError("tf-header", index.path, f"the header of the bundle is damaged: {error}.") from None
    if needed > _VERSION:
        raise CheckpointError("tf-header", index.path, f"it needs a reader of version {needed}; this is {_VERSION}.")
    if not 1 <= num_shards <= _MAX_SHARDS or endianness not in (0, 1):
        raise CheckpointError(
            "tf-header",
            index.path,
            f"it has {num_shards} data files and byte order {endianness}; expected 1 to {_MAX_SHARDS}, and 0 or 1.",
        )
    return num_shards, endianness == 1


def _read_entry(index: Source, key: bytes, proto: bytes, num_shards: int, big_endian: bool) -> Tensor:
    """Returns a tensor with the number of its data file as source; `TensorTable.validate` checks the rest."""
    in_slices = "it is a partitioned variable, stored in slices, which are not put together here. Save it whole."
    if key.startswith(b"\0"):  # the key of one slice
        raise CheckpointError("slices", index.path, f"key {key!r}: {in_slices}")
    try:
        name = key.decode()
    except UnicodeDecodeError:
        raise CheckpointError("name", index.path, f"the name {key!r} of a tensor is not UTF-8.") from None

    def refuse(code: str, reason: str) -> CheckpointError:
        return CheckpointError(code, index.path, reason, tensor=name)

    try:
        fields = decode(proto, _ENTRY_PROTO)
        shape_fields = decode(single(fields, 2, b""), _SHAPE_PROTO)
        unknown_rank, dims = single(shape_fields, 3, 0), shape_fields.get(2, [])
        shape = tuple(single(decode(dim, _DIM_PROTO), 1, 0) for dim in dims[: MAX_RANK + 1])
        dtype, shard, offset, nbytes, masked = (single(fields, number, 0) for number in (1, 3, 4, 5, _CRC_FIELD))
    except Malformed as error:
        raise refuse("tf-entry", f"its entry in the index is damaged: {error}.") from None
    if 7 in fields:
        raise refuse("slices", in_slices)
    if unknown_rank or len(dims) > MAX_RANK or any(size < 0 for size in shape):
        raise refuse("shape", f"its shape {shape} is impossible, or not known.")
    if not 0 <= shard < num_shards:
        raise refuse("tf-entry", f"it is said to be in data file {shard} of {num_shards}.")
    tensor = Tensor(
        name,
        _DTYPES.get(dtype, f"number {dtype} of TensorFlow"),
        shape,
        offset,
        nbytes,
        shard,
        big_endian,
        crc32c=checksums.unmask_crc32c(masked),
    )
    if nbytes < (tensor.size + 4 if tensor.dtype == "string" else 0):  # a length each, and a CRC of the lengths
        raise refuse("size", f"{tensor.describe()} does not take {nbytes} bytes.")
    return tensor


def _with_crc(proto: bytes, crc: int) -> bytes:
    """Returns a BundleEntryProto with another CRC-32C."""
    others = b"".join(proto[start:end] for number, _, _, start, end in read_fields(proto) if number != _CRC_FIELD)
    return others + struct.pack("<BI", _CRC_FIELD << 3 | FIXED32, checksums.mask_crc32c(crc))
