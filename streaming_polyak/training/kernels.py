"""What an update on the host does to its arrays: are all weights finite, and m += c * (w - m) for several m at once.

The second is done in one of two ways that give the same bits. NumPy goes block by block, so that a block of weights is
in the cache for all averages; that is ready at once. A loop compiled by Numba (the extra "fast") reads and writes
everything once, and all tensors in one call; it is for large models, and as it takes a second to come up, a thread
compiles it while NumPy does the first updates. Neither fuses a multiplication with an addition or changes their order,
so that compensation stays what it is.

Compensated (A. Neumaier, Rundungsfehleranalyse einiger Verfahren zur Summation endlicher Summen, ZAMM 54, 1974; the
exact error of an addition by D. Knuth, The Art of Computer Programming 2, 4.2.2), an average is m + e, where m is
the nearest number of its dtype, and e what it lacks:

    y = c * ((w - m) - e) + e;   m, e = the two parts of m + y
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger("streaming_polyak")

Array = NDArray[Any]

_BLOCK = 2**15  # numbers: with two more arrays of that size in the cache of one core
_KNOWN = (np.dtype("float32"), np.dtype("float64"))  # to BLAS and Numba
_WORTH_COMPILING = 2**19  # numbers of all averages
_WORTH_THREADS = 2**22
_CALL = 2**16  # numbers of a tensor, on average; in smaller ones NumPy's threads wait for Python's lock


@dataclass(frozen=True)
class Weights:
    """The weights of a model.

    Args:
        arrays: the tensors, C-contiguous; a list if all are in memory and stay there.
    """

    arrays: Sequence[Array]

    @functools.cached_property
    def addresses(self) -> Array:
        """Where in memory they are, int64."""
        return np.array([a.ctypes.data for a in self.arrays], np.int64)


@dataclass(frozen=True)
class Share:
    """Parts of tensors of one dtype, for one thread.

    Args:
        dtype: of them all.
        tensors: which, int64 of shape (parts,).
        firsts: their first numbers.
        counts: how many numbers.
    """

    dtype: np.dtype[Any]
    tensors: Array
    firsts: Array
    counts: Array

    def parts(self) -> Iterator[tuple[int, slice]]:
        """Returns (tensor, numbers) for each part."""
        for k, first, count in zip(self.tensors.tolist(), self.firsts.tolist(), self.counts.tolist(), strict=True):
            yield k, slice(first, first + count)


class Kernel:
    """Checks tensors of one model again and again, and moves averages of them.

    Args:
        sizes: numbers of each tensor.
        dtypes: of each.
        averages: how many are moved, at the most.
    """

    def __init__(self, sizes: Sequence[int], dtypes: Sequence[np.dtype[Any]], averages: int) -> None:
        numbers = sum(sizes) * averages
        self._worth_compiling = numbers >= _WORTH_COMPILING
        threads = min(8, len(os.sched_getaffinity(0))) if numbers >= _WORTH_THREADS else 1
        self._threads = list(shares(sizes, dtypes, threads))
        small = sum(sizes) < _CALL * len(sizes)
        self._threads_of_numpy = list(shares(sizes, dtypes, 1)) if small else self._threads

    def check(self, weights: Weights, limit: Callable[[np.dtype[Any]], float]) -> int | None:
        """Returns the first tensor with a number that is NaN, infinite or of a magnitude beyond its limit, or `None`.

        Args:
            weights: of the sizes and dtypes.
            limit: for each dtype.
        """

        def bad(share: Share, loop: Callable[..., int] | None) -> int | None:
            most = limit(share.dtype)
            if loop is not None:
                k = loop(weights.addresses[share.tensors], share, most)
                return None if k < 0 else int(share.tensors[k])
            parts = ((k, weights.arrays[k].reshape(-1)[numbers]) for k, numbers in share.parts())
            return next((k for k, part in parts if not check_blocks(part, most)), None)

        return min((k for k in self._each(bad, weights, "check") if k is not None), default=None)

    def move(self, weights: Weights, m: Array, e: Array | None, columns: Array, rows: Array, c: Array) -> None:
        """Moves averages.

        Args:
            weights: of the sizes and dtypes.
            m: the averages, of shape (k, numbers).
            e: what they lack, if they are compensated.
            columns: where in `m` each tensor begins, int64; -1 for tensors that are not in it.
            rows: which averages.
            c: their coefficients, in the dtype of `m`.
        """

        def moved(share: Share, loop: Callable[..., None] | None) -> None:
            here = columns[share.tensors] >= 0
            if not here.all():
                share = Share(share.dtype, share.tensors[here], share.firsts[here], share.counts[here])
            if loop is not None:
                loop(weights.addresses[share.tensors], share, m, e, columns[share.tensors] + share.firsts, rows, c)
                return
            for k, numbers in share.parts():
                part = weights.arrays[k].reshape(-1)[numbers]
                move_blocks(part, m, e, int(columns[k]) + numbers.start, rows, c)

        self._each(moved, weights, "plain" if e is None else "compensated", m.dtype, where=columns >= 0)

    def _each(
        self,
        work: Callable[..., Any],
        weights: Weights,
        kind: str,
        *averages: np.dtype[Any],
        where: Array | None = None,
    ) -> list[Any]:
        """Calls `work` for each share, with the compiled loop of that kind if there is one for its dtype.

        `where` tells of which tensors there is work to do; loops for the dtypes of others are not compiled.
        """
        shares = [share for thread in self._threads for share in thread]
        dtypes = {share.dtype for share in shares if where is None or where[share.tensors].any()}
        loops: dict[np.dtype[Any], Any] = {}
        if self._worth_compiling and isinstance(weights.arrays, list):
            loops = {dtype: compiled_loop(kind, dtype, *averages) for dtype in dtypes if dtype in _KNOWN}

        def several(thread: list[Share]) -> list[Any]:
            return [work(share, loops.get(share.dtype)) for share in thread]

        if not any(loops.values()):
            first, *others = self._threads_of_numpy
        else:
            first, *others = self._threads
            len(weights.addresses)  # found before the threads need them
        begun = [(thread, _begin(several, thread)) for thread in others]
        try:
            found = several(first)
        finally:  # nobody writes any more when an error is told
            wait([job for _, job in begun if job is not None])
        for thread, job in begun:
            found += several(thread) if job is None else job.result()
        return found


def _begin(work: Callable[..., Any], *arguments: Any) -> Future[Any] | None:
    """Begins work in a thread of its own, which ends with it: threads that wait would be missing after a fork.

    Returns:
        What comes of it; `None`, with nothing begun, if the process can have no more threads or Python is ending.
    """
    executor = ThreadPoolExecutor(1)
    try:
        return executor.submit(work, *arguments)
    except RuntimeError:
        return None
    finally:
        executor.shutdown(wait=False)


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


_jobs: dict[tuple[Any, ...], Future[Any] | None] = {}
_one_compiler = threading.Lock()


def compiled_loop(kind: str, *dtypes: np.dtype[Any]) -> Callable[..., Any] | None:
    """Returns a loop compiled by Numba; `None` while it is being compiled, which this begins, and without Numba.

    Args:
        kind: "check", "plain" or "compensated".
        dtypes: of the weights, and of the averages if they are moved.
    """
    if (kind, *dtypes) not in _jobs:
        _jobs[kind, *dtypes] = _begin(_compile, kind, *dtypes)
    job = _jobs[kind, *dtypes]
    return job.result() if job is not None and job.done() else None


def finish_compiling() -> None:
    """Waits for the loops that are being compiled; for tests and measurements."""
    wait([job for job in _jobs.values() if job is not None])


def _compile(kind: str, weights: np.dtype[Any], averages: np.dtype[Any] | None = None) -> Callable[..., Any] | None:
    none, nowhere = np.empty(0, np.int64), Share(weights, *[np.empty(0, np.int64)] * 3)
    try:
        with _one_compiler:
            loops = _loops()
        if loops is None:
            return None
        if kind == "check":
            loops[kind](none, nowhere, 1.0)
        else:
            m = np.empty((0, 0), averages)
            loops[kind](none, nowhere, m, None if kind == "plain" else m, none, none, np.empty(0, averages))
        return loops[kind]
    except Exception:  # whatever it is in Numba or LLVM, it must not end a training that NumPy can go on with
        logger.warning("Numba cannot compile updates of averages here; NumPy makes them, slower.", exc_info=True)
        return None


@functools.cache
def _loops() -> dict[str, Callable[..., Any]] | None:
    """Returns all loops, over the tensors of a share at given addresses; compiled for the dtypes they meet."""
    try:
        numba: Any = importlib.import_module("numba")  # its types are those of its compiler
        pointer_type: Any = importlib.import_module("numba.core.cgutils").voidptr_t
    except ImportError:
        return None
    if numba.config.DISABLE_JIT:
        return None

    @numba.extending.intrinsic  # type: ignore[untyped-decorator]
    def pointer(typing: Any, address: Any) -> Any:
        return numba.types.voidptr(address), lambda context, builder, signature, values: builder.inttoptr(
            values[0], pointer_type
        )

    # Magnitudes of floating-point numbers are in the order of their bits, and NaN comes last; integers are compared
    # several at once.
    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def check(addresses: Array, counts: Array, like: Array, mask: Any, most: Any) -> int:
        for k in range(addresses.size):
            bits = numba.carray(pointer(addresses[k]), (counts[k],), like.dtype)
            found = mask & 0
            for i in range(bits.size):
                found = max(found, bits[i] & mask)
            if found > most:
                return k
        return -1

    # Columns by slices of whole arrays: what Numba knows to be contiguous it computes several at once.
    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def plain(addresses: Array, counts: Array, like: Array, m: Array, firsts: Array, rows: Array, c: Array) -> None:
        for k in range(addresses.size):
            w = numba.carray(pointer(addresses[k]), (counts[k],), like.dtype)
            for lo in range(0, w.size, 4096):
                block, begin, r = w[lo : lo + 4096], firsts[k] + lo, 0
                columns = slice(begin, begin + block.size)
                while r + 3 <= rows.size:  # three at once take a tenth less time than one by one
                    m0, m1, m2 = m[rows[r], columns], m[rows[r + 1], columns], m[rows[r + 2], columns]
                    c0, c1, c2 = c[r], c[r + 1], c[r + 2]
                    for i in range(block.size):
                        m0[i] += c0 * (block[i] - m0[i])
                        m1[i] += c1 * (block[i] - m1[i])
                        m2[i] += c2 * (block[i] - m2[i])
                    r += 3
                while r < rows.size:
                    part, factor = m[rows[r], columns], c[r]
                    for i in range(block.size):
                        part[i] += factor * (block[i] - part[i])
                    r += 1

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def compensated(
        addresses: Array, counts: Array, like: Array, m: Array, e: Array, firsts: Array, rows: Array, c: Array
    ) -> None:
        for k in range(addresses.size):
            w = numba.carray(pointer(addresses[k]), (counts[k],), like.dtype)
            for lo in range(0, w.size, 4096):
                block = w[lo : lo + 4096]
                columns = slice(firsts[k] + lo, firsts[k] + lo + block.size)
                for r in range(rows.size):
                    part, rest, factor = m[rows[r], columns], e[rows[r], columns], c[r]
                    for i in range(block.size):
                        y = factor * ((block[i] - part[i]) - rest[i]) + rest[i]
                        total = part[i] + y
                        added = total - part[i]
                        rest[i] = (part[i] - (total - added)) + (y - added)
                        part[i] = total

    # Not cached on the disk: a full disk, or a file that a power cut left half-written, would end the run.
    def check_share(addresses: Array, share: Share, limit: float) -> int:
        integer = np.dtype(f"int{8 * share.dtype.itemsize}")
        mask, most = integer.type(np.iinfo(integer).max), np.array(limit, share.dtype).view(integer)[()]
        addresses = addresses + share.firsts * share.dtype.itemsize
        return int(check(addresses, share.counts, np.empty(0, integer), mask, most))

    def move_share(
        addresses: Array, share: Share, m: Array, e: Array | None, firsts: Array, rows: Array, c: Array
    ) -> None:
        addresses, like = addresses + share.firsts * share.dtype.itemsize, np.empty(0, share.dtype)
        if e is None:
            plain(addresses, share.counts, like, m, firsts, rows, c)
        else:
            compensated(addresses, share.counts, like, m, e, firsts, rows, c)

    return {"check": check_share, "plain": move_share, "compensated": move_share}


def shares(sizes: Sequence[int], dtypes: Sequence[np.dtype[Any]], count: int) -> Iterator[list[Share]]:
    """Deals out tensors of so many numbers to `count` threads, about as many to each."""
    total, bounds = sum(sizes), np.cumsum([0, *sizes]).tolist()
    cuts = [total * k // count // 16 * 16 for k in range(count)] + [total]
    for low, high in itertools.pairwise(cuts):
        parts: dict[np.dtype[Any], list[tuple[int, int, int]]] = {}
        for k, (begin, end) in enumerate(itertools.pairwise(bounds)):
            if max(begin, low) < min(end, high):
                first = max(low - begin, 0)
                parts.setdefault(dtypes[k], []).append((k, first, min(high, end) - begin - first))
        yield [Share(dtype, *map(np.ascontiguousarray, np.array(found, np.int64).T)) for dtype, found in parts.items()]
