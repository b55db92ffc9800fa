"""A pass over the tensors of checkpoints, cut into pieces for several threads, that yields checksums on the way.

A piece is a range of elements of one tensor, long enough to make the bookkeeping cheap. Each byte of a file is read
once: tensors as pieces, then what lies between them; the CRC-32 of the parts are combined into that of the file and of
every range that the format keeps a checksum of.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files.checksums import crc32, crc32_combine
from streaming_polyak.files.meter import Meter
from streaming_polyak.files.source import Source, UnpackedSource
from streaming_polyak.files.summation import TILE
from streaming_polyak.files.tensors import Checksum, Tensor

PIECE = 16 * TILE
_GAP_BYTES = 256 << 10

Job = TypeVar("Job")


class Piece(NamedTuple):
    """Elements lo to hi of the tensor with a number."""

    tensor: int
    lo: int
    hi: int


class Segment(NamedTuple):
    """A range of a source, and its CRC-32."""

    start: int
    size: int
    crc32: int


def cut(tensors: Sequence[Tensor]) -> list[Piece]:
    """Returns the pieces of tensors, in order; tensors without elements have none."""
    total = sum(tensor.size for tensor in tensors)
    # Few pieces for huge models: what is kept per piece must not grow with them.
    length = PIECE * max(1, total // (PIECE * 4096))
    return [
        Piece(number, lo, min(lo + length, tensor.size))
        for number, tensor in enumerate(tensors)
        for lo in range(0, tensor.size, length)
    ]


def run(jobs: Iterable[Job], work: Callable[[Job], None], threads: int) -> None:
    """Does `work` on each job in order of arrival, with several threads; the first error ends it all and is raised."""
    queue, lock, stop = iter(jobs), threading.Lock(), threading.Event()

    def worker() -> None:
        try:
            while not stop.is_set():
                with lock:
                    job = next(queue, None)
                if job is None:
                    return
                work(job)
        except BaseException:
            stop.set()
            raise

    if threads == 1:
        worker()
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            for future in [pool.submit(worker) for _ in range(threads)]:
                future.result()
        except BaseException:  # Ctrl-C too: do not wait for all of the files
            stop.set()
            raise


def digest(source: Source, segments: Iterable[Segment], checksums: Iterable[Checksum], meter: Meter) -> int:
    """Returns the CRC-32 of a whole file, reading only what is in none of the segments.

    Args:
        source: the file; of one that was unpacked, only what was unpacked is known by segments, so nothing is read.
        segments: ranges that have been read, which do not overlap.
        checksums: ranges whose CRC-32 the format gives; each segment lies in one of them or outside of all.
        meter: is told of the bytes read.

    Raises:
        CheckpointError: a checksum does not hold.
    """
    if isinstance(source, UnpackedSource):
        return 0
    buffer = np.empty(_GAP_BYTES, np.uint8).data
    whole, at = 0, 0
    marks = sorted(checksums, key=lambda c: c.start)
    ends = [*((c.start, c.start + c.size, c) for c in marks), (source.size, source.size, None)]
    known = sorted(segment for segment in segments if segment.size)
    number = 0
    for begin, end, checksum in ends:
        for stop, checked in ((begin, None), (end, checksum)):
            part = 0
            while at < stop:
                if number < len(known) and known[number].start == at:
                    size, crc = known[number].size, known[number].crc32
                    number += 1
                else:
                    limit = known[number].start if number < len(known) else stop
                    size = min(limit, stop, at + len(buffer)) - at
                    source.read_into(buffer[:size], at)
                    crc = crc32(buffer[:size])
                    meter.add(size)
                whole = crc32_combine(whole, crc, size)
                part = crc32_combine(part, crc, size)
                at += size
            if checked is not None and part != checked.crc32:
                raise CheckpointError(
                    "damaged",
                    source.path,
                    f"the CRC-32 of {checked.what} is {part:08x}, not {checked.crc32:08x} as it says: the file is "
                    "damaged.",
                )
    return whole
