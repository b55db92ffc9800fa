"""Zip archives, of which stored members are read in place: the directory, checked before anything in it is believed.

Python's `zipfile` takes the last of two members of one name, accepts members that share bytes, and ignores local
headers that say something else than the directory; another reader of the same file may then see other data. Here all
three are refused, as is everything that Keras and NumPy never write: encryption, data descriptors, comments, bytes that
belong to no record, extra fields that rename a member, members that are links.

Layout: APPNOTE.TXT 6.3.10 of PKWARE, sections 4.3.7 (local header), 4.3.12 (directory), 4.3.14 to 4.3.16 (its end).
"""

from __future__ import annotations

import itertools
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from zlib_ng import zlib_ng

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files.source import Source, UnpackedSource, check_room
from streaming_polyak.files.tensors import MAX_TENSORS, Checksum

MAGIC = b"PK\x03\x04"
_LOCATOR = b"PK\x06\x07"
STORED, DEFLATED = 0, 8
MAX_EXPANSION = 1100  # deflate cannot do more than 1,032
_MAX_DIRECTORY_BYTES = 64 << 20
_COPY_BYTES = 1 << 20
_16, _32 = 0xFFFF, 0xFFFF_FFFF
_UTF8 = 0x800
_EXTRA64, _EXTRA_TIMES, _EXTRA_OWNER = 1, 0x5455, 0x7875
_EXTRAS = (_EXTRA64, _EXTRA_TIMES, _EXTRA_OWNER)

_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True, slots=True)
class Member:
    """One file in an archive: its data are `packed` bytes from `start` on, behind a local header at `header`."""

    name: str
    method: int
    header: int
    start: int
    packed: int
    size: int
    crc32: int
    modified: tuple[int, int]

    @property
    def end(self) -> int:
        """The byte after its data."""
        return self.start + self.packed


@dataclass(frozen=True, slots=True)
class NewMember:
    """One stored file in an archive that is being written, its local header at `header`."""

    name: str
    header: int
    size: int
    crc32: int
    modified: tuple[int, int] = (0, 0x21)  # the first of January 1980, midnight
    zip64: bool = False


def read_directory(source: Source, allowed: Callable[[str], bool]) -> dict[str, Member]:
    """Returns the members of an archive by name, in the order of their places.

    Args:
        source: the archive.
        allowed: whether a name may stand in an archive of this kind.

    Raises:
        CheckpointError: anything in the directory or in a local header is not as it should be.
    """

    def refuse(code: str, reason: str, member: str | None = None) -> NoReturn:
        inside = "" if member is None else f"member {member!r}: "
        raise CheckpointError(code, source.path, f"{inside}{reason}")

    if source.size < _END.size:
        refuse("zip", "it is too short for a zip archive.")
    at_end = source.size - _END.size
    signature, disk, of_disk, here, count, size, start, comment = _END.unpack(source.read(at_end, _END.size))
    if signature != b"PK\x05\x06" or comment:
        refuse(
            "zip-end",
            "it does not end with the end record of a zip archive without a comment: it is truncated, or there is "
            "something behind it.",
        )
    if _16 in (here, count) or _32 in (size, start):
        at_end -= _END64_LOCATOR.size
        locator, of_disk64, at_end64, disks = _END64_LOCATOR.unpack(source.read(at_end, _END64_LOCATOR.size))
        if locator != _LOCATOR or of_disk64 or disks != 1 or at_end64 + _END64.size != at_end:
            refuse("zip-end", "its ZIP64 end record is not where it says.")
        at_end = at_end64
        end64 = _END64.unpack(source.read(at_end, _END64.size))
        if end64[0] != b"PK\x06\x06" or end64[1] != _END64.size - 12:
            refuse("zip-end", "its ZIP64 end record is damaged.")
        short = (here, count, size, start)
        disk, of_disk, here, count, size, start = end64[4:]
        if any(a not in (b, ones) for a, b, ones in zip(short, end64[6:], (_16, _16, _32, _32), strict=True)):
            refuse("zip-end", "its two end records contradict each other.")
    elif source.size >= _END.size + _END64_LOCATOR.size and source.read(at_end - _END64_LOCATOR.size, 4) == _LOCATOR:
        refuse("zip-end", "it has a ZIP64 end record, though nothing in it asks for one.")
    if disk or of_disk or here != count:
        refuse("zip-disks", "it is part of an archive that is split over several files.")
    if start + size != at_end or size > _MAX_DIRECTORY_BYTES:
        refuse("zip-end", "its directory does not lie between the last member and the end record.")
    if count > MAX_TENSORS:
        refuse("too-many", f"it has {count} members, more than {MAX_TENSORS}.")

    directory, at, members = source.read(start, size), 0, []
    names: set[str] = set()
    for _ in range(count):
        if at + _ENTRY.size > size:
            refuse("zip-directory", "its directory is shorter than the number of members it gives.")
        entry = _ENTRY.unpack_from(directory, at)
        flags, method, time, date, crc = entry[3:8]
        packed, unpacked, name_size, extra_size, comment, disk, _, mode, header = entry[8:]
        at_extra = at + _ENTRY.size + name_size
        if entry[0] != b"PK\x01\x02" or at_extra + extra_size > size:
            refuse("zip-directory", "an entry of its directory is damaged.")
        raw, extra = directory[at + _ENTRY.size : at_extra], directory[at_extra : at_extra + extra_size]
        at = at_extra + extra_size
        try:
            name = raw.decode("utf-8" if flags & _UTF8 else "ascii")
        except UnicodeDecodeError:
            refuse("zip-name", f"the name {raw!r} is neither ASCII nor marked as UTF-8.")
        if name in names:
            refuse("zip-twice", "there are two members of this name.", name)
        names.add(name)
        parts = name.removesuffix("/").split("/")
        drive = len(parts[0]) == 2 and parts[0][1] == ":"
        if any(part in ("", ".", "..") for part in parts) or drive or set(name) & set("\\\0"):
            refuse("zip-name", "the name is absolute, or has '..', a drive, a backslash or a NUL in it.", name)
        if stat.S_ISLNK(mode >> 16):
            refuse("zip-link", "it is a symbolic link.", name)
        if comment:
            refuse("zip-comment", "it has a comment, in which another directory could hide.", name)
        if not allowed(name):
            refuse("zip-name", "no file of this kind has such a member.", name)
        if flags & ~(_UTF8 | 0x6):  # the bits 1 and 2 tell how hard deflate tried
            refuse("zip-flags", f"it is encrypted, patched or streamed (flags {flags:#x}).", name)
        if method not in (STORED, DEFLATED):
            refuse("zip-method", f"it is packed with method {method}; stored and deflated members are read.", name)
        wide = _zip64(extra, [unpacked, packed, header])
        if wide is None:
            refuse("zip-extra", "its extra fields are of an unknown kind, or not those that its sizes ask for.", name)
        unpacked, packed, header = wide
        if method == STORED and packed != unpacked:
            refuse("zip-size", f"it is stored, but its sizes are {packed} and {unpacked}.", name)
        if unpacked > MAX_EXPANSION * packed:
            refuse("expansion", f"{unpacked} bytes are declared, but only {packed} stored.", name)
        if disk or header + _LOCAL.size > start:
            refuse("zip-bounds", "its header is outside of the archive.", name)

        local = _LOCAL.unpack(source.read(header, _LOCAL.size))
        data = header + _LOCAL.size + local[9] + local[10]
        if data + packed > start:
            refuse("zip-bounds", "its data reach into the directory.", name)
        local_name = source.read(header + _LOCAL.size, local[9])
        local_extra = source.read(header + _LOCAL.size + local[9], local[10])
        if (local[0], local_name, local[2], local[3], local[6], _zip64(local_extra, [local[8], local[7]])) != (
            MAGIC, raw, flags, method, crc, [unpacked, packed],
        ):  # fmt: skip
            refuse("zip-local", "its local header says something else than the directory.", name)
        members.append(Member(name, method, header, data, packed, unpacked, crc, (time, date)))
    if at != size:
        refuse("zip-directory", "its directory has more in it than the members.")

    members.sort(key=lambda member: member.header)
    begins = [*(member.header for member in members), start]
    if begins[0] != 0:
        refuse("zip-before", "there is something before its first member.")
    for member, following in itertools.pairwise(members):
        if following.header < member.end:
            refuse("zip-overlap", f"it shares bytes with {following.name!r}.", member.name)
    for member, begin in zip(members, begins[1:], strict=True):
        if begin != member.end:
            refuse("zip-hole", f"{begin - member.end} bytes behind it belong to no member.", member.name)
    return {member.name: member for member in members}


def in_place(
    source: Source,
    member: Member,
    into: UnpackedSource | None = None,
    check: Callable[[UnpackedSource], object] | None = None,
) -> tuple[Source, int, bool]:
    """Returns (source, offset, whether that is in the archive itself) of a member's data, inflated if need be.

    Args:
        source: the archive.
        member: of it.
        into: what it is appended to if it must be inflated; `None` for a temporary file of its own, which the caller
            closes.
        check: is given what it is inflated into when the first block is there, to refuse it before the rest is.

    Raises:
        CheckpointError: it does not inflate to the size and the CRC-32 that the directory gives.
        OSError: there is no room for it.
    """
    if member.method == STORED:
        return source, member.start, True
    check_room(source.path, member.size)
    unpacked = into or UnpackedSource(source)
    start, crc = unpacked.size, 0
    try:
        for out in _inflate(source, member):
            crc = zlib_ng.crc32(out, crc)
            unpacked.write(out)
            if check is not None:
                check(unpacked)
                check = None
            if unpacked.size - start > member.size:
                break
        if unpacked.size - start != member.size or crc != member.crc32:
            raise CheckpointError(
                "damaged", source.path, f"member {member.name!r} does not inflate to the size and CRC-32 it declares."
            )
    except BaseException:
        if into is None:
            unpacked.close()
        raise
    return unpacked, start, False


def _inflate(source: Source, member: Member) -> Iterator[bytes]:
    """Yields the inflated data of a member in pieces; checks that they end where the member ends."""
    inflate, data, at = zlib_ng.decompressobj(-15), b"", member.start
    while not inflate.eof:
        if not data and at < member.end:
            data = source.read(at, min(_COPY_BYTES, member.end - at))
            at += len(data)
        given = len(data)
        try:
            out = inflate.decompress(data, _COPY_BYTES)
        except zlib_ng.error as error:  # type: ignore[misc]  # its stub says that this is an instance
            raise CheckpointError("damaged", source.path, f"member {member.name!r}: {error}.") from None
        data = inflate.unconsumed_tail
        if not out and not given and not inflate.eof:  # with nothing given it can still have something to say
            raise CheckpointError("damaged", source.path, f"member {member.name!r}: it ends too soon.")
        yield out
    if inflate.unused_data or data or at < member.end:
        raise CheckpointError("damaged", source.path, f"member {member.name!r}: there is something behind its data.")


def checksum(member: Member, number: int) -> Checksum:
    """Returns the CRC-32 of a stored member as one to be checked while it is read, in source `number`."""
    return Checksum(number, member.start, member.size, member.crc32, f"member {member.name!r}")


def local_header(name: str, size: int, crc32: int, modified: tuple[int, int], zip64: bool) -> bytes:
    """Returns the local header of a stored member; its length depends on `name` and `zip64` only."""
    extra = struct.pack("<2H2Q", 1, 16, size, size) if zip64 else b""
    sizes = (_32, _32) if zip64 else (size, size)
    version = 45 if zip64 else 20
    raw = name.encode()
    return _LOCAL.pack(MAGIC, version, _UTF8, STORED, *modified, crc32, *sizes, len(raw), len(extra)) + raw + extra


def directory(members: list[NewMember], start: int) -> bytes:
    """Returns the directory that begins at `start`, and the end record."""
    entries = b""
    for member in members:
        wide = [value for value in (member.size, member.size, member.header) if value >= _32]
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size, header, raw = min(member.size, _32), min(member.header, _32), member.name.encode()
        version = 45 if member.zip64 else 20
        entries += _ENTRY.pack(
            b"PK\x01\x02", 3 << 8 | version, version, _UTF8, STORED, *member.modified, member.crc32, size, size,
            len(raw), len(extra), 0, 0, 0, (stat.S_IFREG | 0o600) << 16, header,
        ) + raw + extra  # fmt: skip
    end, count = start + len(entries), len(members)
    if end < _32 and count < _16:
        return entries + _END.pack(b"PK\x05\x06", 0, 0, count, count, len(entries), start, 0)
    return (
        entries
        + _END64.pack(b"PK\x06\x06", _END64.size - 12, 3 << 8 | 45, 45, 0, 0, count, count, len(entries), start)
        + _END64_LOCATOR.pack(_LOCATOR, 0, end, 1)
        + _END.pack(b"PK\x05\x06", 0, 0, _16, _16, _32, _32, 0)
    )


def _zip64(extra: bytes, fields: list[int]) -> list[int] | None:
    """Replaces fields of all ones by the 8-byte values that the ZIP64 extra field has for them, in their order.

    Returns `None` if there are more or fewer values than such fields, or extra fields that could change more than that:
    one of them gives the member another name.
    """
    at, wide = 0, b""
    while at < len(extra):
        kind, size = struct.unpack_from("<2H", extra.ljust(at + 4, b"\xff"), at)
        if at + 4 + size > len(extra) or kind not in _EXTRAS or (kind == _EXTRA64 and wide):
            return None
        if kind == _EXTRA64:
            wide = extra[at + 4 : at + 4 + size]
        at += 4 + size
    if len(wide) != 8 * fields.count(_32):
        return None
    values = iter(struct.unpack(f"<{len(wide) // 8}Q", wide))
    return [next(values) if field == _32 else field for field in fields]
