"""Schedules: which epochs or steps are averaged, and after which epochs weights are kept on disk.

A schedule is a predicate on numbers counted from 0; how much a member then weighs is the weighting's matter alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from streaming_polyak.weighting import Weighting

SUFFIXES = (".keras", ".weights.h5", ".h5")


@dataclass(frozen=True)
class Average:
    """One running average: a weighting, and which weights are its members.

    The members are the weights after `start`, `start + every`, `start + 2 * every`, ... Epochs and steps are counted
    from 0, so `Average(MEAN, start=490)` in a run of 500 epochs averages the weights after the last ten.

    Args:
        weighting: how much each member weighs, as a function of how many there are.
        start: the first epoch or step whose weights are averaged, >= 0.
        every: the distance between members, >= 1.
        unit: "epoch", or "step" for optimizer updates as counted by `optimizer.iterations`: with gradient accumulation
            or loss scaling only updates that were really made.
        dtype: "float64" keeps the average in float64, in twice the memory; `None` in float32 (float64 for float64
            weights).
        compensated: keep what each addition lost in a second number (Neumaier's summation), in twice the memory: as
            good as exact after any number of updates, also where float64 is slow or missing, as on many GPUs.

    After n updates, plain float32 is off by at most n/4 + 3 units in the last place (of the largest magnitude among the
    members) for `MEAN`, n/(2 (p + 2)) + 3 for `Polynomial(p)`, 1/(2 (1 - decay)) + 3 for an `Exponential`: half a unit
    an update, of which later updates forget what they forget of the member, and 3 for differences and products.

    Raises:
        ValueError: `start`, `every`, `unit` or `dtype` is out of range.
        TypeError: `weighting` is no `Weighting`, or a number is not whole.
    """

    weighting: Weighting
    start: int = 0
    every: int = 1
    unit: Literal["epoch", "step"] = "epoch"
    dtype: Literal["float64"] | None = None
    compensated: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.weighting, Weighting):
            raise TypeError(
                f"Expected a weighting such as MEAN, LINEAR or Exponential(decay=0.999), got {self.weighting!r}. "
                "Read one from text with parse_weighting."
            )
        _check_every(self.start, self.every)
        if self.unit not in ("epoch", "step"):
            raise ValueError(f'Expected unit="epoch" or unit="step", got unit={self.unit!r}.')
        if self.dtype not in (None, "float64"):
            raise ValueError(f'Expected dtype=None or dtype="float64", got dtype={self.dtype!r}.')
        if not isinstance(self.compensated, bool):
            raise TypeError(f"Expected compensated=True or False, got compensated={self.compensated!r}.")

    def due(self, k: Any) -> Any:
        """Tells whether the weights after epoch or step `k` (an int, or an integer tensor) are a member."""
        return _due(self, k)


@dataclass(frozen=True)
class Members:
    """Which raw weights are kept as files while training, ready to be averaged later.

    The weights after epoch k go to `folder/epoch-0000k.keras` (five digits at least, so that the names sort by epoch).

    Args:
        folder: where the files go; made if missing.
        start: the first epoch (counted from 0) whose weights are kept.
        every: the distance in epochs between kept ones.
        newest: keep only the newest so many, at least 1; older ones that the same Trainer wrote are deleted, once the
            newer one is safely on disk. `None` keeps all. Files of other runs are never deleted.
        suffix: ".keras" (the whole model), ".weights.h5" (weights and optimizer) or ".h5" (Keras' legacy format).
        overwrite: replace files of an earlier run; without it `fit` refuses to start where one is in the way.

    Raises:
        ValueError: a number or the suffix is out of range.
        TypeError: a number is not whole.
    """

    folder: str | os.PathLike[str]
    start: int = 0
    every: int = 1
    newest: int | None = None
    suffix: str = ".keras"
    overwrite: bool = False

    def __post_init__(self) -> None:
        _check_every(self.start, self.every)
        if self.newest is not None and _whole("newest", self.newest) < 1:
            raise ValueError(f"Expected newest >= 1 or None for all, got newest={self.newest!r}.")
        if self.suffix not in SUFFIXES:
            raise ValueError(f"Expected a suffix of {', '.join(SUFFIXES)}; got suffix={self.suffix!r}.")

    def due(self, epoch: int) -> bool:
        """Tells whether the weights after `epoch` are kept."""
        return bool(_due(self, epoch))

    def path(self, epoch: int) -> Path:
        """Returns the file for the weights after `epoch`."""
        return Path(self.folder) / f"epoch-{epoch:05d}{self.suffix}"


def check_averages(averages: Mapping[str, Average]) -> dict[str, Average]:
    """Returns `averages` as a dict after checking names and types.

    Raises:
        ValueError: a name is empty or holds a bracket (it stands in brackets in names like "val_loss[mean]").
        TypeError: a value is no `Average`.
    """
    if not isinstance(averages, Mapping):
        raise TypeError(f'Expected averages as a dict such as {{"mean": Average(MEAN)}}, got {averages!r}.')
    for name, average in averages.items():
        if not isinstance(name, str) or not name or set(name) & set("[]"):
            raise ValueError(f"Expected averages to have non-empty names without brackets, got {name!r}.")
        if not isinstance(average, Average):
            raise TypeError(
                f"Expected an Average under the name {name!r}, got {average!r}. Wrap a weighting: Average(MEAN)."
            )
    return dict(averages)


def _due(schedule: Average | Members, k: Any) -> Any:
    return (k >= schedule.start) & ((k - schedule.start) % schedule.every == 0)


def _check_every(start: int, every: int) -> None:
    if _whole("start", start) < 0:
        raise ValueError(f"Expected start >= 0 (epochs and steps count from 0), got start={start!r}.")
    if _whole("every", every) < 1:
        raise ValueError(f"Expected every >= 1, got every={every!r}.")


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected {name} as an int, got {name}={value!r}.")
    return value
