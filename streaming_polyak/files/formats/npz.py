"""NumPy's `.npz`: a zip archive with a `.npy` file for each tensor.

A `.npy` is a magic, a version, the length of a header, and the header: a Python dict literal of exactly descr,
fortran_order and shape; raw data follow. Only plain numbers are read; nothing is unpickled.

Source: NEP 1, and the docstring of numpy.lib.format.
"""

from __future__ import annotations

import ast
import os
import struct
from dataclasses import replace

import numpy as np

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files.formats.archive import STORED, Member, checksum, in_place, read_directory
from streaming_polyak.files.source import Source, UnpackedSource, check_room, closed_on_error, last_unpacked, unpacking
from streaming_polyak.files.tensors import DTYPES, Tensor, TensorTable, is_possible

MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 10_000
_BLOCK_BYTES = 4 << 20
_DESCRS = {
    **{dtype.str: name for name, dtype in DTYPES.items() if name != "bfloat16"},
    **{dtype.newbyteorder(">").str: name for name, dtype in DTYPES.items() if dtype.itemsize > 1 and dtype.kind != "V"},
}


def open_npz(source: Source) -> TensorTable:
    """Returns the table of an `.npz`; deflated members are inflated into a temporary file."""
    members = read_directory(source, lambda name: name.endswith(".npy"))
    sources: list[Source] = [source]  # and at most one more, for all that has to be unpacked
    tensors = {}
    with closed_on_error(sources):
        check_room(source.path, sum(member.size for member in members.values() if member.method != STORED))
        for member in members.values():
            into = None if member.method == STORED else last_unpacked(sources, source)
            inside, start, mapped = in_place(source, member, into)
            name = member.name.removesuffix(".npy")
            tensor, fortran = _tensor(name, inside, start, member, 0 if mapped else 1, mapped)
            if fortran and len(tensor.shape) > 1 and tensor.size:
                start = _row_major(inside, tensor, last_unpacked(sources, source))
                tensor = replace(tensor, offset=start, source=1, mapped=False)
            tensors[name] = tensor
        checksums = tuple(checksum(member, 0) for member in members.values() if member.method == STORED)
        return TensorTable(source.path, "npz", sources, tensors, checksums).validate()


def header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Returns magic and header of a `.npy` of version 1.0, padded so that the data begin at a multiple of 64 bytes."""
    text = f"{{'descr': '{DTYPES[dtype].str}', 'fortran_order': False, 'shape': {shape!r}, }}"
    padded = text.ljust(-(-(len(text) + 11) // 64) * 64 - 11) + "\n"
    return MAGIC + b"\x01\x00" + struct.pack("<H", len(padded)) + padded.encode("latin1")


def _tensor(name: str, inside: Source, start: int, member: Member, number: int, mapped: bool) -> tuple[Tensor, bool]:
    def refuse(code: str, reason: str) -> CheckpointError:
        return CheckpointError(code, inside.path, reason, tensor=name)

    beginning = inside.read(start, min(12, member.size))
    version = beginning[6:8]
    if beginning[:6] != MAGIC or version not in (b"\x01\x00", b"\x02\x00", b"\x03\x00") or len(beginning) < 12:
        raise refuse("npy", "it does not begin like a .npy file of version 1 to 3.")
    fixed = 10 if version == b"\x01\x00" else 12
    (length,) = struct.unpack_from("<H" if fixed == 10 else "<I", beginning, 8)
    if length > _MAX_HEADER_BYTES or fixed + length > member.size:
        raise refuse("npy", f"its header of {length} bytes is longer than {_MAX_HEADER_BYTES}, or than the file.")
    try:
        said = ast.literal_eval(inside.read(start + fixed, length).decode("latin1").strip())
        repr(said)  # a number in hexadecimal may have too many digits for the messages below
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        raise refuse("npy", "its header is not a Python literal.") from None
    if not isinstance(said, dict) or sorted(map(str, said)) != ["descr", "fortran_order", "shape"]:
        raise refuse("npy", "its header has other keys than descr, fortran_order and shape.")
    descr, fortran, shape = said["descr"], said["fortran_order"], said["shape"]
    if not isinstance(descr, str) or descr not in _DESCRS:
        raise refuse(
            "dtype", f"its dtype {descr!r:.100} is not plain numbers; nothing else is read, least of all pickles."
        )
    if not isinstance(fortran, bool):
        raise refuse("npy", f"its fortran_order is {fortran!r:.100}.")
    dtype = _DESCRS[descr]
    whole = isinstance(shape, tuple) and all(type(size) is int for size in shape)
    if not whole or not is_possible(shape, DTYPES[dtype].itemsize):
        raise refuse("shape", f"its shape {shape!r:.100} is not a tuple of whole numbers, or impossible.")
    nbytes = member.size - fixed - length
    tensor = Tensor(
        name, dtype, shape, start + fixed + length, nbytes, number, big_endian=descr.startswith(">"), mapped=mapped
    )
    if nbytes != tensor.size * DTYPES[dtype].itemsize:
        raise refuse("size", f"{tensor.describe()} does not take the {nbytes} bytes there are.")
    return tensor, fortran


def _row_major(inside: Source, tensor: Tensor, unpacked: UnpackedSource) -> int:
    """Appends the data with the last index running fastest, moved a block at a time; returns where they begin."""
    start, dtype = unpacked.size, tensor.stored_dtype
    assert unpacked.unpacked is not None
    assert tensor.offset is not None
    check_room(unpacked.path, tensor.nbytes)
    with unpacking(unpacked.path):  # a full disk: an error here, no SIGBUS below
        os.posix_fallocate(unpacked.unpacked.fileno(), start, tensor.nbytes)
    unpacked.size += tensor.nbytes
    target = np.memmap(unpacked.unpacked, dtype, "r+", start, tensor.shape).T.flat
    step = _BLOCK_BYTES // dtype.itemsize
    for begin in range(0, tensor.size, step):
        data = np.empty(min(step, tensor.size - begin), dtype)
        inside.read_into(data.view(np.uint8).data, tensor.offset + begin * dtype.itemsize)
        target[begin : begin + data.size] = data
    return start
