"""What an update on the host does to its arrays: are all weights finite, and m += c * (w - m) for several m at once.

The second is done in one of two ways that give the same bits. NumPy goes block by block, so that a block of weights is
in the cache for all averages; that is ready at once. A loop compiled by Numba (the extra "fast") reads and writes
everything once; it takes a second to come up, so it is for large models. Neither fuses a multiplication with an
addition or changes their order, so that compensation stays what it is.

Compensated (A. Neumaier, Rundungsfehleranalyse einiger Verfahren zur Summation endlicher Summen, ZAMM 54, 1974; the
exact error of an addition by D. Knuth, The Art of Computer Programming 2, 4.2.2), an average is m + e, where m is
the nearest number of its dtype, and e what it lacks:

    y = c * ((w - m) - e) + e;   m, e = the two parts of m + y
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# w (n,), m (k, at least first + n), e as m or None, first, rows of m to move, their c in the dtype of m
Move = Callable[[Array, Array, "Array | None", int, Array, Array], None]
# w (n,), limit
Check = Callable[[Array, float], bool]

_BLOCK = 2**15  # numbers: with two more arrays of that size in the cache of one core
_KNOWN = (np.dtype("float32"), np.dtype("float64"))  # to BLAS and Numba
_WORTH_COMPILING = 2**19  # numbers of all averages
_WORTH_THREADS = 2**22
_CALL = 2**16  # numbers of a tensor, on average


def kernels(numbers: int) -> tuple[Check, Move]:
    """Returns how to check weights, and how to move averages that have so many numbers in all."""
    return (_compiled() if numbers >= _WORTH_COMPILING else None) or (check_blocks, move_blocks)


def check_blocks(w: Array, limit: float) -> bool:
    """Whether no number of `w` is NaN, infinite or of a magnitude beyond the limit.

    The sum of squares is one quick pass; it is finite only if all is well, or too large although all is well.
    """
    with np.errstate(all="ignore"):
        if w.dtype in _KNOWN and math.isfinite(np.dot(w, w)):
            return True
        blocks = (w[lo : lo + _BLOCK] for lo in range(0, w.size, _BLOCK))
        return all(-limit <= float(block.min()) and float(block.max()) <= limit for block in blocks)


def move_blocks(w: Array, m: Array, e: Array | None, first: int, rows: Array, c: Array) -> None:
    """Moves rows of `m` from column `first` on by NumPy; each block of `w` is read and converted once."""
    size = max(1, _BLOCK // len(rows))
    factors = c[:, np.newaxis]
    buffer = np.empty((len(rows), min(size, w.size)), m.dtype)
    for lo in range(0, w.size, size):
        block = w[lo : lo + size].astype(m.dtype, copy=False)
        y, columns = buffer[:, : block.size], slice(first + lo, first + lo + block.size)
        if len(rows) == len(m):
            _move_block(block, m[:, columns], None if e is None else e[:, columns], factors, y)
            continue
        for i, j in enumerate(rows.tolist()):
            part = slice(j, j + 1), columns
            _move_block(block, m[part], None if e is None else e[part], factors[i : i + 1], y[i : i + 1])


def _move_block(w: Array, m: Array, e: Array | None, c: Array, y: Array) -> None:
    np.subtract(w, m, out=y)
    if e is None:
        np.multiply(y, c, out=y)
        np.add(m, y, out=m)
        return
    np.subtract(y, e, out=y)
    np.multiply(y, c, out=y)
    np.add(y, e, out=y)
    total = m + y
    added = total - m
    np.subtract(m, total - added, out=e)
    np.subtract(y, added, out=y)
    np.add(e, y, out=e)
    m[:] = total


@functools.cache
def _compiled() -> tuple[Check, Move] | None:
    """Returns both by Numba; `None` where it is not installed."""
    try:
        import numba
    except ImportError:
        return None

    # Magnitudes of floating-point numbers are in the order of their bits, and NaN comes last; integers are compared
    # several at once.
    def largest(bits: Array, mask: int) -> Any:
        found = bits[0] & mask
        for i in range(bits.size):
            found = max(found, bits[i] & mask)
        return found

    # Columns by slices of whole arrays: what Numba knows to be contiguous it computes several at once.
    def plain(w: Array, m: Array, first: int, rows: Array, c: Array) -> None:
        for lo in range(0, w.size, 4096):
            block = w[lo : lo + 4096]
            for r in range(rows.size):
                part, factor = m[rows[r], first + lo : first + lo + block.size], c[r]
                for i in range(block.size):
                    part[i] += factor * (block[i] - part[i])

    def compensated(w: Array, m: Array, e: Array, first: int, rows: Array, c: Array) -> None:
        for lo in range(0, w.size, 4096):
            block = w[lo : lo + 4096]
            for r in range(rows.size):
                columns = slice(first + lo, first + lo + block.size)
                part, rest, factor = m[rows[r], columns], e[rows[r], columns], c[r]
                for i in range(block.size):
                    y = factor * ((block[i] - part[i]) - rest[i]) + rest[i]
                    total = part[i] + y
                    added = total - part[i]
                    rest[i] = (part[i] - (total - added)) + (y - added)
                    part[i] = total

    # Not cached on the disk: a full disk, or a file that a power cut left half-written, would end the run.
    jit = numba.njit(nogil=True)
    largest, plain, compensated = jit(largest), jit(plain), jit(compensated)

    def check(w: Array, limit: float) -> bool:
        if w.dtype not in _KNOWN or not w.size:
            return check_blocks(w, limit)
        mask, most = _bits(w.dtype, limit)
        return bool(largest(w.view(mask.dtype), mask) <= most)

    def move(w: Array, m: Array, e: Array | None, first: int, rows: Array, c: Array) -> None:
        if w.dtype not in _KNOWN:
            move_blocks(w, m, e, first, rows, c)
        elif e is None:
            plain(w, m, first, rows, c)
        else:
            compensated(w, m, e, first, rows, c)

    return check, move


@functools.cache
def _bits(dtype: np.dtype[Any], limit: float) -> tuple[Any, int]:
    """Returns the bits of a magnitude, all set, and those of the limit, both as integers."""
    integer = np.dtype(f"int{8 * dtype.itemsize}")
    return integer.type(np.iinfo(integer).max), int(np.array(limit, dtype).view(integer))


def shares(sizes: Sequence[int], count: int) -> Iterator[list[tuple[int, int, int]]]:
    """Deals out tensors of so many numbers into `count` shares of about as many, as (tensor, first, end)."""
    total, bounds = sum(sizes), np.cumsum([0, *sizes]).tolist()
    cuts = [total * k // count // 16 * 16 for k in range(count)] + [total]
    for low, high in itertools.pairwise(cuts):
        yield [
            (k, max(low - begin, 0), min(high, end) - begin)
            for k, (begin, end) in enumerate(itertools.pairwise(bounds))
            if begin < high and end > low
        ]


def in_threads(sizes: Sequence[int], averages: int, work: Callable[[int, int, int], None]) -> None:
    """Calls `work(tensor, first, end)` for parts that make up all tensors, in several threads if that is worth it."""

    def several(parts: Iterable[tuple[int, int, int]]) -> None:
        for part in parts:
            work(*part)

    # Between calls that take less than some ten microseconds, threads wait for Python's lock more than they work.
    worth = sum(sizes) * averages >= _WORTH_THREADS and sum(sizes) >= _CALL * len(sizes)
    threads = min(8, len(os.sched_getaffinity(0))) if worth else 1
    if threads == 1:
        several((k, 0, size) for k, size in enumerate(sizes) if size)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(several, share) for share in shares(sizes, threads)]:
            done.result()
