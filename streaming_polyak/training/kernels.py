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

# w (n,), m (k, n), e (k, n) or None, rows of m to move, their c in the dtype of m
Move = Callable[[Array, Array, "Array | None", Array, Array], None]

_BLOCK = 2**15  # numbers: with two more arrays of that size in the cache of one core
_BLAS = (np.dtype("float32"), np.dtype("float64"))  # what BLAS and Numba know
_LARGE = 2**20  # numbers of all averages from which compiling is worth it, and threads are


def can_be_averaged(w: Array, limit: float) -> bool:
    """Whether no number of `w` (n,) is NaN, infinite or of a magnitude beyond the limit.

    The sum of squares is one quick pass; it is finite only if all is well, or too large although all is well. Call it
    where floating-point errors are ignored.
    """
    if w.dtype in _BLAS and math.isfinite(np.dot(w, w)):
        return True
    blocks = (w[lo : lo + _BLOCK] for lo in range(0, w.size, _BLOCK))
    return all(-limit <= float(block.min()) and float(block.max()) <= limit for block in blocks)


def mover(numbers: int) -> Move:
    """Returns the way to move averages that have so many numbers in all."""
    return (_compiled() if numbers >= _LARGE else None) or move_blocks


def move_blocks(w: Array, m: Array, e: Array | None, rows: Array, c: Array) -> None:
    """Moves rows of `m` by NumPy, block by block; each block of `w` is read and converted once."""
    size = max(1, _BLOCK // len(rows))
    picked: Any = slice(None) if len(rows) == len(m) else None
    factors = c[:, np.newaxis]
    buffer = np.empty((len(rows), min(size, w.size)), m.dtype)
    for lo in range(0, w.size, size):
        block = w[lo : lo + size].astype(m.dtype, copy=False)
        y = buffer[:, : block.size]
        if picked is not None:
            _move_block(block, m[:, lo : lo + size], None if e is None else e[:, lo : lo + size], factors, y)
            continue
        for i, j in enumerate(rows.tolist()):
            part = slice(j, j + 1), slice(lo, lo + size)
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
def _compiled() -> Move | None:
    """Returns the way by Numba; `None` where it is not installed."""
    try:
        import numba
    except ImportError:
        return None

    def plain(w: Array, m: Array, rows: Array, c: Array) -> None:
        for lo in range(0, w.size, 4096):
            block = w[lo : lo + 4096]
            for r in range(rows.size):
                part, factor = m[rows[r], lo : lo + 4096], c[r]
                for i in range(block.size):
                    part[i] += factor * (block[i] - part[i])

    def compensated(w: Array, m: Array, e: Array, rows: Array, c: Array) -> None:
        for lo in range(0, w.size, 4096):
            block = w[lo : lo + 4096]
            for r in range(rows.size):
                part, rest, factor = m[rows[r], lo : lo + 4096], e[rows[r], lo : lo + 4096], c[r]
                for i in range(block.size):
                    y = factor * ((block[i] - part[i]) - rest[i]) + rest[i]
                    total = part[i] + y
                    added = total - part[i]
                    rest[i] = (part[i] - (total - added)) + (y - added)
                    part[i] = total

    jit = numba.njit(nogil=True, cache=True)
    plain, compensated = jit(plain), jit(compensated)

    def move(w: Array, m: Array, e: Array | None, rows: Array, c: Array) -> None:
        if w.dtype not in _BLAS:
            move_blocks(w, m, e, rows, c)
        elif e is None:
            plain(w, m, rows, c)
        else:
            compensated(w, m, e, rows, c)

    return move


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

    threads = min(8, len(os.sched_getaffinity(0))) if sum(sizes) * averages >= _LARGE else 1
    if threads == 1:
        several((k, 0, size) for k, size in enumerate(sizes) if size)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(several, share) for share in shares(sizes, threads)]:
            done.result()
