"""The wire format of protocol buffers, read strictly: a field of another type or outside of its message is refused.

Source: https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # the wire types, without groups


class Malformed(Exception):
    """What is wrong with some bytes; whoever knows whose they are makes a message of it."""


def decode(proto: bytes, wires: Mapping[int, int]) -> dict[int, list[Any]]:
    """Returns the values of the known fields of a message by number, each of the wire type it must have."""
    found: dict[int, list[Any]] = {}
    for number, wire, value, _, _ in read_fields(proto):
        if number in wires:
            if wires[number] != wire:
                raise Malformed(f"field {number} has wire type {wire}, expected {wires[number]}")
            found.setdefault(number, []).append(value)
    return found


def single(fields: Mapping[int, list[Any]], number: int, default: Any) -> Any:
    values = fields.get(number, [default])
    if len(values) > 1:
        raise Malformed(f"field {number} is there {len(values)} times")
    return values[0]


def read_fields(proto: bytes) -> Iterator[tuple[int, int, Any, int, int]]:
    """Yields (number, wire type, value, start, end) of each field of a message; varints as signed 64-bit numbers."""
    at, size = 0, len(proto)
    while at < size:
        start = at
        tag, at = read_varint(proto, at, size)
        number, wire = tag >> 3, tag & 7
        value: int | bytes
        if not 1 <= number < 1 << 29:
            raise Malformed(f"there is a field of number {number}")
        if wire == VARINT:
            value, at = read_varint(proto, at, size)
            value -= value >> 63 << 64
        elif wire in (BYTES, FIXED32, FIXED64):
            length = {FIXED32: 4, FIXED64: 8}.get(wire)
            if length is None:
                length, at = read_varint(proto, at, size)
            if length > size - at:
                raise Malformed(f"field {number} ends outside of it")
            value, at = proto[at : at + length], at + length
            value = uint32(value, 0) if wire == FIXED32 else value
        else:
            raise Malformed(f"field {number} has the unknown wire type {wire}")
        yield number, wire, value, start, at


def read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
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
    raise Malformed("a number ends outside of it, or has more than 64 bits")


def varint(value: int) -> bytes:
    data = bytearray()
    while value >= 0x80:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def uint32(data: bytes, at: int) -> int:
    (value,) = struct.unpack_from("<I", data, at)
    return int(value)
