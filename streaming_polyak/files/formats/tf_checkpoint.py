"""TensorFlow's checkpoints ("tensor bundles") and the SavedModel folders around them, without TensorFlow.

A bundle is PREFIX.index and PREFIX.data-00000-of-0000N. A data file is the raw bytes of tensors, so each tensor is read
in place. The index is a sorted table in the format of LevelDB:

    data blocks, an empty metaindex block, an index block (key not before the last of each data block -> place), footer
    block:  entries, restarts (4 bytes each: where entries with a whole key begin), the number of restarts (4 bytes);
            behind it one byte for the compression, here none, and the masked CRC-32C of block and byte
    entry:  varints (bytes common with the key before, further bytes of the key, bytes of the value), key, value
    footer: places (varints: offset, size) of metaindex and index, zeros up to 40 bytes, 8 bytes of magic

Key "" has a BundleHeaderProto, every other key is the name of a tensor and has a BundleEntryProto. TensorFlow searches
by restarts and by keys of the index block, here everything is read in order; a table in which the two could see
something different is refused.

Keras' SavedModels hold the variables of the model twice, as `variables/I` in the order of the layers and as
`_all_variables/J` in an order that changes from one export to the next. The latter are named after the former here, by
the variables' own names in the object graph, so that no two different ones are averaged.

Source: TensorFlow, core/protobuf/tensor_bundle.proto, core/protobuf/trackable_object_graph.proto and
core/util/tensor_bundle; LevelDB, doc/table_format.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files import checksums
from streaming_polyak.files.tensors import MAX_RANK, MAX_TENSORS, Source, Tensor, TensorTable

INDEX = ".index"
_MAGIC = struct.pack("<Q", 0xDB47_7524_8B80_FB57)
_PLACES_BYTES, _TRAILER_BYTES = 40, 5
_MAX_INDEX_BYTES, _MAX_BLOCK_BYTES = 256 << 20, 16 << 20
_MAX_KEY_BYTES, _MAX_VALUE_BYTES = 4096, 1 << 16
_MAX_SHARDS = 10_000
_VERSION = 1  # of tensor bundles
_BLOCK_ENTRIES, _RESTART_EVERY = 128, 16

_DTYPES = dict(enumerate([
    "float32", "float64", "int32", "uint8", "int16", "int8", "string", "complex64", "int64", "bool", "qint8", "quint8",
    "qint32", "bfloat16", "qint16", "quint16", "uint16", "complex128", "float16", "resource", "variant", "uint32",
    "uint64", "float8_e5m2", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2fnuz",
    "int4", "uint4", "int2", "uint2",
], start=1))  # fmt: skip

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # the wire types of protobuf, without its groups
_HEADER_PROTO = {1: _VARINT, 2: _VARINT, 3: _BYTES}  # num_shards, endianness, version
_VERSION_PROTO = {2: _VARINT}  # min_consumer
_ENTRY_PROTO = {1: _VARINT, 2: _BYTES, 3: _VARINT, 4: _VARINT, 5: _VARINT, 6: _FIXED32, 7: _BYTES}
_SHAPE_PROTO = {2: _BYTES, 3: _VARINT}  # dim, unknown_rank
_DIM_PROTO = {1: _VARINT}  # size
_CRC_FIELD = 6
_GRAPH_PROTO = {1: _BYTES}  # nodes
_NODE_PROTO = {2: _BYTES}  # attributes
_ATTRIBUTE_PROTO = {2: _BYTES, 3: _BYTES}  # full_name, checkpoint_key

_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_MAX_GRAPH_BYTES = 64 << 20
_ORDERED, _UNORDERED = "variables/", "_all_variables/"


class _Malformed(Exception):
    """What is wrong with some bytes; whoever knows whose they are makes a message of it."""


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
    return _in_one_order(open_tf_checkpoint(prefix, format="saved_model", path=folder))


def open_tf_checkpoint(prefix: Path, *, format: str = "tf_checkpoint", path: Path | None = None) -> TensorTable:
    """Returns the table of a bundle.

    Tensors of strings have no `crc32c`: what TensorFlow keeps for them is not the CRC of the bytes in the file.

    Args:
        prefix: the name of the bundle, without ".index".
        format: of the table.
        path: of the table; `None` for the prefix.

    Raises:
        CheckpointError: the index is damaged, has something that is not read here, or a data file is missing or short.
    """
    index = Source(Path(f"{prefix}{INDEX}"))
    rows = _read_table(index)
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
    contents, places = bytearray(), []
    for begin in range(0, len(rows), _BLOCK_ENTRIES):
        block = rows[begin : begin + _BLOCK_ENTRIES]
        places.append((block[-1][0], _append_block(contents, block, _RESTART_EVERY)))
    footer = _append_block(contents, [], 1) + _append_block(contents, places, 1)
    return bytes(contents + footer.ljust(_PLACES_BYTES, b"\0") + _MAGIC)


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
    assert tensor.offset is not None
    data = table.sources[tensor.source].read(tensor.offset, tensor.nbytes)
    found = {}
    try:
        length, at = _read_varint(data, 0, len(data))
        if at + 4 + length != len(data):
            raise _Malformed("its length is not that of the string")
        for node in _decode(data[at + 4 :], _GRAPH_PROTO).get(1, []):
            for attribute in _decode(node, _NODE_PROTO).get(2, []):
                fields = _decode(attribute, _ATTRIBUTE_PROTO)
                key, full_name = _single(fields, 3, b""), _single(fields, 2, b"")
                found[key.decode("utf-8", "replace")] = full_name.decode("utf-8", "replace")
    except _Malformed as error:
        raise table.refuse("tf-graph", f"the object graph is damaged: {error}.", _GRAPH) from None
    return found


def _read_table(index: Source) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys, in ascending order, and values of a table; at least one."""

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError("tf-index", index.path, reason)

    end = index.size - _PLACES_BYTES - len(_MAGIC)
    if end < 0 or index.size > _MAX_INDEX_BYTES:
        raise refuse(f"it has {index.size} bytes; an index has 48 to {_MAX_INDEX_BYTES}.")
    footer = index.read(end, _PLACES_BYTES + len(_MAGIC))
    if footer[_PLACES_BYTES:] != _MAGIC:
        raise refuse("it does not end with the magic number of a table: it is truncated, or no index of a checkpoint.")
    try:
        meta_offset, meta_size, at = _read_place(footer[:_PLACES_BYTES], 0)
        index_offset, index_size, _ = _read_place(footer[:_PLACES_BYTES], at)
        meta_end, index_end = meta_offset + meta_size + _TRAILER_BYTES, index_offset + index_size + _TRAILER_BYTES
        if (index_offset, end) != (meta_end, index_end):
            raise _Malformed("its last blocks do not lie one behind the other before the footer")
        follows, before = 0, None
        for limit, place in _read_block(index, index_offset, index_size):
            offset, size, used = _read_place(place, 0)
            if offset != follows or used != len(place):
                raise _Malformed(f"the block at byte {offset} should begin at byte {follows}")
            rows = _read_block(index, offset, size)
            if (before is not None and rows[0][0] <= before) or rows[-1][0] > limit:
                raise _Malformed(f"the keys of the block at byte {offset} are not in the order that its index gives")
            yield from rows
            follows, before = offset + size + _TRAILER_BYTES, limit
        if follows != meta_offset:
            raise _Malformed(f"there is something between its blocks, at byte {follows}")
    except _Malformed as error:
        raise refuse(f"{error}.") from None


def _read_block(index: Source, offset: int, size: int) -> list[tuple[bytes, bytes]]:
    """Returns keys and values of one block, of which there is at least one."""
    where = f"the block at byte {offset}"
    if not 8 <= size <= _MAX_BLOCK_BYTES:
        raise _Malformed(f"{where} has {size} bytes")
    block = index.read(offset, size + _TRAILER_BYTES)
    if checksums.crc32c(block[:-4]) != checksums.unmask_crc32c(_uint32(block, size + 1)):
        raise CheckpointError("crc", index.path, f"{where} does not have the CRC-32C it should: the file is damaged.")
    if block[size]:
        raise _Malformed(f"{where} is compressed (type {block[size]}), as TensorFlow never writes it")
    count = _uint32(block, size - 4)
    end = size - 4 - 4 * count
    if end < 0:
        raise _Malformed(f"{where} has {count} restarts, more than it has room for")
    rows: list[tuple[bytes, bytes]] = []
    whole, key, at = [], b"", 0
    while at < end:
        start = at
        common, at = _read_varint(block, at, end)
        further, at = _read_varint(block, at, end)
        value_size, at = _read_varint(block, at, end)
        if common > len(key) or at + further + value_size > end:
            raise _Malformed(f"the entry at byte {offset + start} reaches outside of what there is")
        if common + further > _MAX_KEY_BYTES or value_size > _MAX_VALUE_BYTES:
            raise _Malformed(f"the entry at byte {offset + start} is unreasonably long")
        last, key = key, key[:common] + block[at : at + further]
        if rows and key <= last:
            raise _Malformed(f"the key {key!r} does not come after {last!r}")
        rows.append((key, block[at + further : at + further + value_size]))
        at += further + value_size
        if not common:
            whole.append(start)
    if not 1 <= count <= len(whole):
        raise _Malformed(f"{where} has {count} restarts for {len(whole)} entries with a whole key")
    restarts = struct.unpack_from(f"<{count}I", block, end)
    if restarts[0] or list(restarts) != sorted(set(restarts)) or not set(restarts) <= set(whole):
        raise _Malformed(f"{where} has restarts where no entry with a whole key begins")
    return rows


def _read_header(index: Source, proto: bytes) -> tuple[int, bool]:
    """Returns the number of data files and whether they are big-endian."""
    try:
        fields = _decode(proto, _HEADER_PROTO)
        num_shards, endianness = _single(fields, 1, 0), _single(fields, 2, 0)
        needed = _single(_decode(_single(fields, 3, b""), _VERSION_PROTO), 2, 0)
    except _Malformed as error:
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
        fields = _decode(proto, _ENTRY_PROTO)
        shape_fields = _decode(_single(fields, 2, b""), _SHAPE_PROTO)
        unknown_rank, dims = _single(shape_fields, 3, 0), shape_fields.get(2, [])
        shape = tuple(_single(_decode(dim, _DIM_PROTO), 1, 0) for dim in dims[: MAX_RANK + 1])
        dtype, shard, offset, nbytes, masked = (_single(fields, number, 0) for number in (1, 3, 4, 5, _CRC_FIELD))
    except _Malformed as error:
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
        crc32c=None if _DTYPES.get(dtype) == "string" else checksums.unmask_crc32c(masked),
    )
    if nbytes < (tensor.size + 4 if tensor.dtype == "string" else 0):  # a length each, and a CRC of the lengths
        raise refuse("size", f"{tensor.describe()} does not take {nbytes} bytes.")
    return tensor


def _with_crc(proto: bytes, crc: int) -> bytes:
    """Returns a BundleEntryProto with another CRC-32C."""
    others = b"".join(proto[start:end] for number, _, _, start, end in _read_fields(proto) if number != _CRC_FIELD)
    return others + struct.pack("<BI", _CRC_FIELD << 3 | _FIXED32, checksums.mask_crc32c(crc))


def _append_block(contents: bytearray, rows: Sequence[tuple[bytes, bytes]], restart_every: int) -> bytes:
    """Appends a block to a table; returns its place."""
    block, restarts, last = bytearray(), [], b""
    for number, (key, value) in enumerate(rows):
        common = 0
        if number % restart_every == 0:
            restarts.append(len(block))
        else:
            while common < min(len(key), len(last)) and key[common] == last[common]:
                common += 1
        block += _varint(common) + _varint(len(key) - common) + _varint(len(value)) + key[common:] + value
        last = key
    restarts = restarts or [0]
    block += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
    place = _varint(len(contents)) + _varint(len(block))
    block += b"\0"
    contents += block + struct.pack("<I", checksums.mask_crc32c(checksums.crc32c(block)))
    return place


def _decode(proto: bytes, wires: Mapping[int, int]) -> dict[int, list[Any]]:
    """Returns the values of the known fields of a message by number, each of the wire type it must have."""
    found: dict[int, list[Any]] = {}
    for number, wire, value, _, _ in _read_fields(proto):
        if number in wires:
            if wires[number] != wire:
                raise _Malformed(f"field {number} has wire type {wire}, expected {wires[number]}")
            found.setdefault(number, []).append(value)
    return found


def _single(fields: Mapping[int, list[Any]], number: int, default: Any) -> Any:
    values = fields.get(number, [default])
    if len(values) > 1:
        raise _Malformed(f"field {number} is there {len(values)} times")
    return values[0]


def _read_fields(proto: bytes) -> Iterator[tuple[int, int, Any, int, int]]:
    """Yields (number, wire type, value, start, end) of each field of a message; varints as signed 64-bit numbers."""
    at, size = 0, len(proto)
    while at < size:
        start = at
        tag, at = _read_varint(proto, at, size)
        number, wire = tag >> 3, tag & 7
        value: int | bytes
        if not 1 <= number < 1 << 29:
            raise _Malformed(f"there is a field of number {number}")
        if wire == _VARINT:
            value, at = _read_varint(proto, at, size)
            value -= value >> 63 << 64
        elif wire in (_BYTES, _FIXED32, _FIXED64):
            length = {_FIXED32: 4, _FIXED64: 8}.get(wire)
            if length is None:
                length, at = _read_varint(proto, at, size)
            if length > size - at:
                raise _Malformed(f"field {number} ends outside of it")
            value, at = proto[at : at + length], at + length
            value = _uint32(value, 0) if wire == _FIXED32 else value
        else:
            raise _Malformed(f"field {number} has the unknown wire type {wire}")
        yield number, wire, value, start, at


def _read_place(data: bytes, at: int) -> tuple[int, int, int]:
    """Returns offset and size of a block, and where the next place begins."""
    offset, at = _read_varint(data, at, len(data))
    size, at = _read_varint(data, at, len(data))
    return offset, size, at


def _read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Returns an unsigned number of up to 64 bits, seven a byte, lowest first, and where it ends."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise _Malformed("a number ends outside of it, or has more than 64 bits")


def _varint(value: int) -> bytes:
    data = bytearray()
    while value >= 0x80:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def _uint32(data: bytes, at: int) -> int:
    (value,) = struct.unpack_from("<I", data, at)
    return int(value)
