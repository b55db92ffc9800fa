"""Weighted averages of many arrays, element by element, within one unit in the last place of the exact ones.

The exact average of an element is sum(a_i w_i) / sum(a_i) over the rationals. It is found in three steps, each for the
few elements that the one before cannot vouch for:

1. Weights narrower than float64 are summed in float64, 32 inputs at a time. The error is at most
   (32 + n / 32 + 3) 2^-53 max|w| (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2); where
   that is more than a quarter of a unit in the last place of the result, because terms cancelled, the element goes to
   step 2. Of ten normally distributed inputs, one element in a million does.
2. Sums with error terms: two-sum and two-product keep what each operation rounds away, so that the result is as if
   computed with 106 bits, and the sum of the error terms bounds what is still missing (Ogita, Rump and Oishi, Accurate
   Sum and Dot Product, SIAM J. Sci. Comput. 26, 2005). float64 weights begin here.
3. Fractions: exact, a microsecond a term.

Each operation is on one element alone and in the order of the inputs, and the maximum is taken over tiles that begin at
fixed places, so the bits do not depend on how the work is cut up or how many threads do it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE = 1 << 17
"""Elements in a tile: few enough to stay in a second-level cache with their sums, or nearly so, and so many that what
Python does for each tile, one thread at a time, takes a small part of the time (with 2^16 two threads need 15 % more).
"""

GROUP = 32
"""How many inputs are added up before their sum is added to that of the others."""

_SUBTILE = 1 << 13
_U = 2.0**-53
_SPLITTER = 2.0**27 + 1.0
_SMALLEST = 2.0**-900  # below it, error terms may underflow
_PRECISION = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}
_TINY = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 0.0}

Array = NDArray[Any]
Float64Array = NDArray[np.float64]
Load = Callable[[int], Array]
Reload = Callable[[int, int, int], Array]


class NonFiniteInput(Exception):
    """An input holds NaN or infinity; its number is the argument."""


class TileAverager:
    """Averages tiles of tensors of one kind; has buffers, so each thread needs one of its own.

    Args:
        raw: weights of the inputs up to a common factor, float64 of shape (n,), >= 0, with a positive sum.
        allow_nonfinite: whether NaN and infinity may be averaged, by the rules of IEEE arithmetic.
    """

    def __init__(self, raw: Float64Array, allow_nonfinite: bool = False) -> None:
        self._fractions = [Fraction(a) for a in raw]
        self._exact_total = sum(self._fractions, Fraction())
        # A power of two makes the largest weight 1 or a bit more, so that sums of float32 cannot overflow or vanish.
        exponent = math.frexp(max(raw))[1] - 1
        self._raw = [math.ldexp(a, -exponent) for a in raw]
        total = self._exact_total / Fraction(2) ** exponent
        self._total = float(total)
        self._total_rest = float(total - Fraction(self._total))
        self._allow = allow_nonfinite
        n = len(self._raw)
        self._error = (min(n, GROUP) + -(-n // GROUP) + 3) * _U * 1.01
        self._sum, self._group, self._scratch = (np.empty(TILE) for _ in range(3))

    def average(self, dtype: str, size: int, load: Load, reload: Reload) -> Array:
        """Returns the average of one tile, in a buffer that the next call overwrites or in a new array.

        Args:
            dtype: of the tensor.
            size: elements in the tile, at most `TILE`.
            load: gives the tile of the i-th input as floats of shape (size,): of the tensor's dtype, or wider with the
                same values; called once for each input, in order.
            reload: gives elements lo to hi of the tile of the i-th input again: reload(i, lo, hi).

        Returns:
            Of shape (size,); dtype of the tensor, uint16 bits for bfloat16.

        Raises:
            NonFiniteInput: an input is not finite and that is not allowed.
        """
        with np.errstate(all="ignore"):
            average = (
                self._doubled(size, load, reload) if dtype == "float64" else self._plain(dtype, size, load, reload)
            )
            return rounded(average, dtype)

    def _plain(self, dtype: str, size: int, load: Load, reload: Reload) -> Float64Array:
        total, group, scratch = self._sum[:size], self._group[:size], self._scratch[:size]
        biggest, finite = 0.0, True
        for i, a in enumerate(self._raw):
            w = load(i)
            low, high = float(np.minimum.reduce(w)), float(np.maximum.reduce(w))
            if not (low - low == 0.0 and high - high == 0.0):
                finite = self._nonfinite(i)
            biggest = max(biggest, -low, high)
            into = total if i < GROUP else group
            if i % GROUP == 0:
                if i > GROUP:
                    np.add(total, group, out=total)
                np.multiply(w, a, out=into, dtype=np.float64)
            elif a == 1.0:
                np.add(into, w, out=into)
            else:
                np.multiply(w, a, out=scratch, dtype=np.float64)
                np.add(into, scratch, out=into)
        if len(self._raw) > GROUP:
            np.add(total, group, out=total)
        if not finite:
            return self._with_nonfinite(dtype, size, reload)
        np.divide(total, self._total, out=total)

        error = self._error * biggest
        if error > _TINY[dtype] / 4:
            np.abs(total, out=scratch)
            least = error * 2.0 ** (_PRECISION[dtype] + 2)
            if float(scratch.min()) < least:
                self._redo(dtype, total, np.flatnonzero(scratch < least), reload, summed=True)
        return total

    def _doubled(self, size: int, load: Load, reload: Reload) -> Float64Array:
        """Averages float64 weights, a part of the tile at a time after all have been looked at."""
        total, finite = self._sum[:size], True
        for i in range(len(self._raw)):
            w = load(i)
            low, high = float(np.minimum.reduce(w)), float(np.maximum.reduce(w))
            if not (low - low == 0.0 and high - high == 0.0):
                finite = self._nonfinite(i)
        if not finite:
            return self._with_nonfinite("float64", size, reload)
        for start in range(0, size, _SUBTILE):
            self._redo("float64", total, np.arange(start, min(start + _SUBTILE, size)), reload)
        return total

    def _redo(
        self, dtype: str, total: Float64Array, where: NDArray[np.intp], reload: Reload, summed: bool = False
    ) -> None:
        """Computes the elements `where` of `total` with error terms, and what that cannot vouch for with fractions.

        If they are sums already, those that are zero in all inputs, as in a layer that was pruned, are soon done.
        """
        for start in range(0, len(where), _SUBTILE):
            part = where[start : start + _SUBTILE]
            if summed and 2 * np.count_nonzero(total[part]) < len(part):
                part = self._without_zeros(total, part, reload)
                if not part.size:
                    continue
            low, high = int(part[0]), int(part[-1]) + 1
            dense = len(part) == high - low

            def values(i: int, part: NDArray[np.intp] = part, low: int = low, dense: bool = dense) -> Float64Array:
                loaded = reload(i, low, int(part[-1]) + 1)
                return (loaded if dense else loaded[part - low]).astype(np.float64)

            total[part], vouched = self._with_error_terms(dtype, values, len(part))
            rest = np.flatnonzero(~vouched)
            if rest.size:
                exact = [Fraction()] * rest.size
                for i, a in enumerate(self._fractions):
                    exact = [s + a * Fraction(w) for s, w in zip(exact, values(i)[rest].tolist(), strict=True)]
                total[part[rest]] = [float(s / self._exact_total) for s in exact]

    def _without_zeros(self, total: Float64Array, where: NDArray[np.intp], reload: Reload) -> NDArray[np.intp]:
        """Sets the elements that are zero in all inputs, and returns the others of `where`."""
        low, high = int(where[0]), int(where[-1]) + 1
        alive = total[low:high] != 0
        for i in range(len(self._raw)):
            alive |= reload(i, low, high) != 0
        here: NDArray[np.bool_] = alive[where - low]
        total[where[~here]] = 0.0
        rest: NDArray[np.intp] = where[here]
        return rest

    def _with_error_terms(
        self, dtype: str, values: Callable[[int], Float64Array], size: int
    ) -> tuple[Float64Array, NDArray[np.bool_]]:
        high, low, lost = np.zeros(size), np.zeros(size), np.zeros(size)
        missing = np.zeros(size)  # at most what underflow took away unseen
        for i, a in enumerate(self._raw):
            product = w = values(i)
            if a != 1.0:
                product, error = _two_product(w, a)
                if self._fractions[i]:
                    tiny = ((np.abs(product) < _SMALLEST) | (a < _SMALLEST)) & (w != 0)
                    missing += np.where(tiny, np.abs(product) * 2.0**-50 + np.abs(w) * 2.0**-1074 + 2.0**-953, 0.0)
                low += error
                lost += np.abs(error)
            high, error = _two_sum(high, product)
            low += error
            lost += np.abs(error)
        high, low = _two_sum(high, low)
        quotient = high / self._total
        back, error = _two_product(quotient, self._total)
        average = quotient + (((high - back) - error) + low - quotient * self._total_rest) / self._total
        # 2 n terms were added up in `low`, each addition with a rounding of at most u of what was lost so far.
        bound = ((2 * len(self._raw) + 4) * _U * 1.01 * lost + missing) / self._total
        vouched = bound * 2.0 ** (_PRECISION[dtype] + 2) <= np.abs(average)
        vouched &= (high == 0) | (np.abs(high) >= _SMALLEST)
        vouched |= (lost == 0) & (high == 0) & (missing == 0)
        return average, vouched & np.isfinite(average)

    def _with_nonfinite(self, dtype: str, size: int, reload: Reload) -> Float64Array:
        total, spoiled = self._sum[:size], np.zeros(size, bool)
        total.fill(0)
        for i, a in enumerate(self._raw):
            w = reload(i, 0, size)
            spoiled |= ~np.isfinite(w)
            total += a * w.astype(np.float64)
        total /= self._total
        self._redo(dtype, total, np.flatnonzero(~spoiled), reload)
        return total

    def _nonfinite(self, i: int) -> bool:
        if not self._allow:
            raise NonFiniteInput(i)
        return False


def _two_sum(a: Float64Array, b: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Returns the rounded sum, and exactly what the rounding lost (Knuth, The Art of Computer Programming, 4.2.2)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _two_product(a: Float64Array, b: float) -> tuple[Float64Array, Float64Array]:
    """Returns the rounded product, and exactly what the rounding lost, barring underflow (Dekker 1971)."""
    p = a * b
    c = _SPLITTER * a
    a1 = c - (c - a)
    a2 = a - a1
    b1 = _SPLITTER * b - (_SPLITTER * b - b)
    b2 = b - b1
    return p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2


def rounded(average: Float64Array, dtype: str) -> Array:
    """Rounds float64 to the dtype, once; bfloat16 as its bits."""
    if dtype != "bfloat16":
        return average.astype(dtype, copy=False)
    # By way of float32 rounded to odd: of the two neighbours of an inexact value the one with the last bit set, so that
    # the second rounding cannot meet a false tie (Boldo and Melquiond, IEEE Trans. Computers 57, 2008).
    single = average.astype(np.float32)
    bits = single.view(np.uint32)
    even = (single != average) & (bits & 1 == 0) & np.isfinite(single)
    larger = np.abs(single) > np.abs(average)  # before `bits`, a view of `single`, is changed
    bits[even & larger] -= 1
    bits[even & ~larger] += 1
    nan = np.isnan(single)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    rounded[nan] = 0x7FC0
    return rounded
