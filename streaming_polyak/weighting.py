"""Weightings: how much the n-th member moves a running average.

Every average of this library is one recursion over its members w_1, w_2, ... (sets of weights):

    m_n = m_{n-1} + c_n (w_n - m_{n-1}),        c_n = a_n / (a_1 + ... + a_n),

where a_k >= 0 is the raw weight of the k-th member. A weighting is the pure function n -> c_n; it knows neither
arrays of weights nor which weights are fed in (see `schedule`). c_1 is exactly 1, so a first step needs no branch and
the state of an average is only (n, m).

| weighting                | a_k                                | c_n                   |
|--------------------------|------------------------------------|-----------------------|
| `Polynomial(p)`          | k (k+1) ... (k+p-1), about k^p     | (p + 1) / (p + n)     |
| `MEAN = Polynomial(0)`   | 1                                  | 1 / n                 |
| `LINEAR = Polynomial(1)` | k                                  | 2 / (n + 1)           |
| `Exponential(decay=d)`   | d^-k                               | (1 - d) / (1 - d^n)   |
"""

from __future__ import annotations

import abc
import functools
import math
import sys
from dataclasses import dataclass
from typing import Any, TypeAlias, cast, overload

import numpy as np
from numpy.typing import NDArray

Float64Array: TypeAlias = NDArray[np.float64]

_ALLOWED = (
    '"mean", "linear", "polynomial:POWER", "exponential:decay=D", "exponential:alpha=A" or "exponential:half_life=H"'
)


_NAMED = {("polynomial", "power"), *(("exponential", name) for name in ("decay", "alpha", "half_life"))}


def _as_float(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"Expected {name} as a number, got {name}={value!r}.")
    return float(value)


class Weighting(abc.ABC):
    """A pure function n -> c_n; immutable, hashable, compared by value.

    `str(weighting)` is the form that `parse_weighting` reads, `to_json` one for files.
    """

    @abc.abstractmethod
    def _coefficient(self, n: Any, xp: Any) -> Any:
        """c_n for a float64 `n` >= 1; `xp` is the namespace (numpy or tf.math) that has its functions."""

    @abc.abstractmethod
    def _ratios(self, n: int) -> Float64Array:
        """a_k / a_{k+1} for k = n-1, n-2, ..., 1: each member's raw weight relative to the next newer one."""

    @overload
    def __call__(self, n: int) -> float: ...
    @overload
    def __call__(self, n: NDArray[Any]) -> Float64Array: ...
    def __call__(self, n: Any) -> Any:
        """Returns c_n, by how much the n-th member moves the average.

        Args:
            n: how many members have been averaged with this one, from 1 on: an int, an integer array of any shape, or
                a TensorFlow tensor or variable of any numeric dtype (inside a `tf.function` too).

        Returns:
            c_n in float64, 0 < c_n <= 1, as a float, an array or a tensor like `n`.

        Raises:
            ValueError: `n` is below 1 or not a whole number (not checked for tensors).
            TypeError: `n` holds no numbers.
        """
        if type(n) is int and n >= 1:  # the common case, without what it takes to look at arrays
            return float(self._coefficient(np.float64(n), np))
        tf = sys.modules.get("tensorflow")  # a tensor exists only where TensorFlow is imported already
        if tf is not None and tf.is_tensor(n):
            return self._coefficient(tf.cast(n, tf.float64), tf.math)
        exact = np.asarray(n)
        if not (np.issubdtype(exact.dtype, np.integer) or np.issubdtype(exact.dtype, np.floating)):
            raise TypeError(f"Expected the number of members as whole numbers, got n={n!r}.")
        n64 = exact.astype(np.float64)
        if not (np.all(n64 >= 1) and np.all(n64 == np.floor(n64))):
            raise ValueError(f"Expected the number of members as whole numbers from 1 on, got n={n}.")
        coefficient = self._coefficient(n64, np)
        return float(coefficient) if exact.ndim == 0 else coefficient

    def weights(self, n: int) -> Float64Array:
        """Returns the weight of each of `n` members in their average, in closed form.

        Args:
            n: number of members, at least 1.

        Returns:
            float64 array of shape (n,), oldest member first, summing to 1 (to rounding).

        Raises:
            ValueError: `n` is not a whole number from 1 on.
        """
        raw = self.raw_weights(n)
        weights: Float64Array = raw / raw.sum()
        return weights

    def raw_weights(self, n: int) -> Float64Array:
        """Returns the raw weights a_1, ..., a_n up to a common factor, so that an exact average can be made of them.

        Args:
            n: number of members, at least 1.

        Returns:
            float64 array of shape (n,), oldest member first, > 0: whole numbers (exact) for a whole `Polynomial` as
            long as they are below 2^53; else relative to the newest member, whose weight is 1.

        Raises:
            ValueError: `n` is not a whole number from 1 on.
        """
        if not isinstance(n, (int, np.integer)) or n < 1:
            raise ValueError(f"Expected the number of members as a whole number from 1 on, got n={n!r}.")
        return self._raw_weights(int(n))

    def _raw_weights(self, n: int) -> Float64Array:
        return np.concatenate([[1.0], np.cumprod(self._ratios(n))])[::-1]  # newest is 1: no overflow

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Returns a dict of JSON values from which `from_json` makes an equal weighting."""

    @staticmethod
    def from_json(form: dict[str, Any]) -> Weighting:
        """Makes the weighting that `to_json` described.

        Raises:
            ValueError: `form` is no such description.
        """
        kinds: dict[str, type[Weighting]] = {"polynomial": Polynomial, "exponential": Exponential}
        try:
            arguments = dict(form)
            return kinds[arguments.pop("kind")](**arguments)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f'Expected {{"kind": "polynomial", "power": P}} or {{"kind": "exponential", "decay" or "alpha" or '
                f'"half_life": X}}, got {form!r}.'
            ) from error


@dataclass(frozen=True)
class Polynomial(Weighting):
    """Polynomial-decay averaging: c_n = (p + 1) / (p + n), raw weights that grow like k^p.

    `Polynomial(0)` is the arithmetic mean, `Polynomial(1)` linear weights; a larger power forgets the start faster
    and needs no horizon: the newest (p + 1) / n of the members always carry most of the weight.

    Args:
        power: p >= 0, finite.

    Raises:
        ValueError: `power` is negative or not finite.

    Source: O. Shamir and T. Zhang, Stochastic Gradient Descent for Non-smooth Optimization, ICML 2013, section 4.
    """

    power: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "power", _as_float("power", self.power))
        if not 0 <= self.power < math.inf:
            raise ValueError(f"Expected a finite power >= 0, got power={self.power!r}.")

    def _coefficient(self, n: Any, xp: Any) -> Any:
        return (self.power + 1.0) / (self.power + n)

    def _ratios(self, n: int) -> Float64Array:
        k = np.arange(n - 1, 0, -1, dtype=np.float64)
        ratios: Float64Array = k / (k + self.power)
        return ratios

    def _raw_weights(self, n: int) -> Float64Array:
        power = int(self.power)
        if power == self.power and math.comb(n + power - 1, power) < 2**53:
            return np.array([math.comb(k + power - 1, power) for k in range(1, n + 1)], dtype=np.float64)
        return super()._raw_weights(n)

    def __str__(self) -> str:
        if self.power in (0, 1):
            return "linear" if self.power else "mean"
        return f"polynomial:{self.power!r}"

    def to_json(self) -> dict[str, Any]:
        """Returns `{"kind": "polynomial", "power": p}`."""
        return {"kind": "polynomial", "power": self.power}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Exponential(Weighting):
    """Exponential weights d^0, d^1, d^2, ... from the newest member back, normalised (debiased) for every n.

    c_n = (1 - d) / (1 - d^n): the first members are averaged evenly, and c_n falls to 1 - d, the coefficient of the
    usual exponential moving average. Exactly one argument is given; two weightings are equal if their decays are.

    Args:
        decay: d, inside (0, 1); often called momentum.
        alpha: time constant in members, d = exp(-1 / alpha): the tutorial's `exp(-i / alpha)`.
        half_life: members after which a weight has halved, d = 2^(-1 / half_life).

    Raises:
        ValueError: none or several are given, or the decay that results is not inside (0, 1).
        TypeError: the value is not a number.

    Source: the division by 1 - d^n is the bias correction of D. Kingma and J. Ba, Adam, ICLR 2015, section 3,
    applied to weights instead of gradients.
    """

    decay: float | None = None
    alpha: float | None = None
    half_life: float | None = None

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            raise ValueError(
                f"Expected exactly one of decay, alpha and half_life, got {given or 'none of them'}. "
                "Say the decay in one way only."
            )
        ((name, value),) = given.items()
        value = _as_float(name, value)
        object.__setattr__(self, name, value)
        if not (0 < value < 1 if name == "decay" else 0 < value < math.inf and 0 < self._decay < 1):
            in_members = "" if name == "decay" else f"{name} > 0 (in members) that gives "
            raise ValueError(f"Expected {in_members}a decay inside (0, 1), got {name}={value!r}.")

    def _given(self) -> dict[str, float]:
        said = {"decay": self.decay, "alpha": self.alpha, "half_life": self.half_life}
        return {name: value for name, value in said.items() if value is not None}

    @functools.cached_property
    def _log_decay(self) -> float:
        # 1 - d is taken from log d by expm1, so that it stays exact for decays near 1.
        if self.decay is not None:
            return math.log(self.decay)
        return -1.0 / self.alpha if self.alpha is not None else -math.log(2.0) / cast(float, self.half_life)

    @functools.cached_property
    def _decay(self) -> float:
        return self.decay if self.decay is not None else math.exp(self._log_decay)

    def _coefficient(self, n: Any, xp: Any) -> Any:
        # The same function above and below the line, so that c_1 is exactly 1.
        return xp.expm1(n**0 * self._log_decay) / xp.expm1(n * self._log_decay)

    def _ratios(self, n: int) -> Float64Array:
        return np.full(n - 1, self._decay)

    def __eq__(self, other: object) -> bool:
        return self._decay == other._decay if isinstance(other, Exponential) else NotImplemented

    def __hash__(self) -> int:
        return hash((Exponential, self._decay))

    def __repr__(self) -> str:
        ((name, value),) = self._given().items()
        return f"Exponential({name}={value!r})"

    def __str__(self) -> str:
        ((name, value),) = self._given().items()
        return f"exponential:{name}={value!r}"

    def to_json(self) -> dict[str, Any]:
        """Returns `{"kind": "exponential", NAME: value}` with the argument it was made with."""
        return {"kind": "exponential", **self._given()}


MEAN = Polynomial(0)
LINEAR = Polynomial(1)


def parse_weighting(text: str) -> Weighting:
    """Reads a weighting from the form used on command lines.

    >>> parse_weighting("linear") == LINEAR
    True
    >>> parse_weighting("exponential:alpha=2")
    Exponential(alpha=2.0)

    Args:
        text: "mean", "linear", "polynomial:POWER", or "exponential:" and one of decay=D, alpha=A, half_life=H.

    Raises:
        ValueError: `text` is none of these, or its number is out of range; the message lists what is allowed.
    """
    kind, _, argument = text.strip().partition(":")
    if not argument and kind in ("mean", "linear"):
        return {"mean": MEAN, "linear": LINEAR}[kind]
    name, _, number = argument.partition("=") if kind == "exponential" else ("power", "", argument)
    try:
        value = float(number)
    except ValueError:
        value = None
    if value is None or (kind, name) not in _NAMED:
        raise ValueError(f"Expected a weighting, one of {_ALLOWED}; got {text!r}.")
    try:
        return Polynomial(value) if kind == "polynomial" else Exponential(**{name: value})
    except ValueError as error:
        raise ValueError(f"{error} In the weighting {text!r}; allowed are {_ALLOWED}.") from None
