"""Tables in the format of LevelDB, as TensorFlow writes them: sorted keys with values.

    data blocks, an empty metaindex block, an index block (key not before the last of each data block -> place), footer
    block:  entries, restarts (4 bytes each: where entries with a whole key begin), the number of restarts (4 bytes);
            behind it one byte for the compression, here none, and the masked CRC-32C of block and byte
    entry:  varints (bytes common with the key before, further bytes of the key, bytes of the value), key, value
    footer: places (varints: offset, size) of metaindex and index, zeros up to 40 bytes, 8 bytes of magic

TensorFlow searches by restarts and by keys of the index block, here everything is read in order; a table in which the
two could see something different is refused.

Source: LevelDB, doc/table_format.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files import checksums
from streaming_polyak.files.formats.protobuf import Malformed, read_varint, uint32, varint
from streaming_polyak.files.source import Source

_MAGIC = struct.pack("<Q", 0xDB47_7524_8B80_FB57)
_PLACES_BYTES, _TRAILER_BYTES = 40, 5
_MAX_INDEX_BYTES, _MAX_BLOCK_BYTES = 256 << 20, 16 << 20
_MAX_KEY_BYTES, _MAX_VALUE_BYTES = 4096, 1 << 16
_BLOCK_ENTRIES, _RESTART_EVERY = 128, 16


def read_table(index: Source) -> Iterator[tuple[bytes, bytes]]:
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
            raise Malformed("its last blocks do not lie one behind the other before the footer")
        follows, before = 0, None
        for limit, place in _read_block(index, index_offset, index_size):
            offset, size, used = _read_place(place, 0)
            if offset != follows or used != len(place):
                raise Malformed(f"the block at byte {offset} should begin at byte {follows}")
            rows = _read_block(index, offset, size)
            if (before is not None and rows[0][0] <= before) or rows[-1][0] > limit:
                raise Malformed(f"the keys of the block at byte {offset} are not in the order that its index gives")
            yield from rows
            follows, before = offset + size + _TRAILER_BYTES, limit
        if follows != meta_offset:
            raise Malformed(f"there is something between its blocks, at byte {follows}")
    except Malformed as error:
        raise refuse(f"{error}.") from None


def _read_block(index: Source, offset: int, size: int) -> list[tuple[bytes, bytes]]:
    """Returns keys and values of one block, of which there is at least one."""
    where = f"the block at byte {offset}"
    if not 8 <= size <= _MAX_BLOCK_BYTES:
        raise Malformed(f"{where} has {size} bytes")
    block = index.read(offset, size + _TRAILER_BYTES)
    if checksums.crc32c(block[:-4]) != checksums.unmask_crc32c(uint32(block, size + 1)):
        raise CheckpointError("crc", index.path, f"{where} does not have the CRC-32C it should: the file is damaged.")
    if block[size]:
        raise Malformed(f"{where} is compressed (type {block[size]}), as TensorFlow never writes it")
    count = uint32(block, size - 4)
    end = size - 4 - 4 * count
    if end < 0:
        raise Malformed(f"{where} has {count} restarts, more than it has room for")
    rows: list[tuple[bytes, bytes]] = []
    whole, key, at = [], b"", 0
    while at < end:
        start = at
        common, at = read_varint(block, at, end)
        further, at = read_varint(block, at, end)
        value_size, at = read_varint(block, at, end)
        if common > len(key) or at + further + value_size > end:
            raise Malformed(f"the entry at byte {offset + start} reaches outside of what there is")
        if common + further > _MAX_KEY_BYTES or value_size > _MAX_VALUE_BYTES:
            raise Malformed(f"the entry at byte {offset + start} is unreasonably long")
        last, key = key, key[:common] + block[at : at + further]
        if rows and key <= last:
            raise Malformed(f"the key {key!r} does not come after {last!r}")
        rows.append((key, block[at + further : at + further + value_size]))
        at += further + value_size
        if not common:
            whole.append(start)
    if not 1 <= count <= len(whole):
        raise Malformed(f"{where} has {count} restarts for {len(whole)} entries with a whole key")
    restarts = struct.unpack_from(f"<{count}I", block, end)
    if restarts[0] or list(restarts) != sorted(set(restarts)) or not set(restarts) <= set(whole):
        raise Malformed(f"{where} has restarts where no entry with a whole key begins")
    return rows


def table_bytes(rows: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Returns a table of keys, in ascending order, and values."""
    contents, places = bytearray(), []
    for begin in range(0, len(rows), _BLOCK_ENTRIES):
        block = rows[begin : begin + _BLOCK_ENTRIES]
        places.append((block[-1][0], _append_block(contents, block, _RESTART_EVERY)))
    footer = _append_block(contents, [], 1) + _append_block(contents, places, 1)
    return bytes(contents + footer.ljust(_PLACES_BYTES, b"\0") + _MAGIC)


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
        block += varint(common) + varint(len(key) - common) + varint(len(value)) + key[common:] + value
        last = key
    restarts = restarts or [0]
    block += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
    place = varint(len(contents)) + varint(len(block))
    block += b"\0"
    contents += block + struct.pack("<I", checksums.mask_crc32c(checksums.crc32c(block)))
    return place


def _read_place(data: bytes, at: int) -> tuple[int, int, int]:
    """Returns offset and size of a block, and where the next place begins."""
    offset, at = read_varint(data, at, len(data))
    size, at = read_varint(data, at, len(data))
    return offset, size, at
