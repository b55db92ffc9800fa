"""What a sweep over the last n checkpoints found: rows to look at, to write, to draw and to make a checkpoint of."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tabulate import tabulate

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files.average import AverageReport, average_checkpoints
from streaming_polyak.files.storage import Storage, same_file, write_csv
from streaming_polyak.files.tensors import printable, without_nan
from streaming_polyak.weighting import Weighting

SINGLE = "single"


@dataclass(frozen=True)
class SweepRow:
    """One average that was evaluated.

    Args:
        weighting: its name, or "single" for a member by itself.
        n: how many members are in it.
        members: their files, oldest first.
        metrics: what the evaluation gave, by name.
    """

    weighting: str
    n: int
    members: tuple[Path, ...]
    metrics: dict[str, float]


@dataclass(frozen=True)
class SweepResult:
    """All averages of the last n, and every member by itself.

    Args:
        rows: members by themselves, newest first; then each weighting for n = 1, ..., N.
        weightings: by name.
        paths: all members, oldest first.
        seconds: what it took.
        bytes_read: of the members.
    """

    rows: tuple[SweepRow, ...]
    weightings: dict[str, Weighting | tuple[float, ...]]
    paths: tuple[Path, ...]
    seconds: float
    bytes_read: int

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics."""
        return tuple(self.rows[0].metrics)

    def of(self, weighting: str) -> list[SweepRow]:
        """Returns the rows of one weighting in the order of n; of "single", newest member first."""
        return [row for row in self.rows if row.weighting == weighting]

    def best(
        self,
        metric: str | None = None,
        *,
        mode: Literal["auto", "min", "max"] = "auto",
        among: Sequence[str] | None = None,
    ) -> SweepRow:
        """Returns the best row by a metric; of equal ones the one with fewer members, then the first.

        Args:
            metric: its name; `None` for the first one.
            mode: whether less or more is better; "auto" tells by the name: less for a loss or an error.
            among: names of weightings; `None` for all, members by themselves too.

        Raises:
            ValueError: there is no such metric or weighting, or it is NaN everywhere.
        """
        metric = self._metric(metric)
        sign = 1.0 if _less_is_better(metric, mode) else -1.0
        rows = [row for row in self.rows if among is None or row.weighting in among]
        rows = [row for row in rows if not math.isnan(row.metrics[metric])]
        if not rows:
            raise ValueError(f"Expected a weighting with a score in {metric!r}, got {among or 'NaN in all rows'}.")
        return min(rows, key=lambda row: (sign * row.metrics[metric], row.n))

    def verdict(self, metric: str | None = None, *, mode: Literal["auto", "min", "max"] = "auto") -> str:
        """Says in a sentence or two what averaging gained by a metric."""
        metric = self._metric(metric)
        if all(math.isnan(row.metrics[metric]) for row in self.of(SINGLE)):
            return "No single member has a score."
        single = self.best(metric, mode=mode, among=[SINGLE])
        averages = [row for row in self.rows if row.weighting != SINGLE and row.n > 1]
        said = f"Best single member: {single.members[0].name} with {metric} {single.metrics[metric]:.6g}."
        if not averages:
            return said
        names = list(dict.fromkeys(row.weighting for row in averages))
        best = min(
            (row for row in averages if not math.isnan(row.metrics[metric])),
            key=lambda row: (row.metrics[metric] * (1 if _less_is_better(metric, mode) else -1), row.n),
            default=None,
        )
        if best is None:
            return f"{said} No average of two or more members has a score."
        gain = best.metrics[metric] - single.metrics[metric]
        better = gain < 0 if _less_is_better(metric, mode) else gain > 0
        if better:
            return (
                f"{said} The best average, {best.weighting} of the last {best.n}, has {best.metrics[metric]:.6g} "
                f"({gain:+.3g}). It was picked on the data it is scored on, which flatters it."
            )
        return (
            f"{said} No average of two or more members ({', '.join(names)}) beats it; the best of them, "
            f"{best.weighting} of the last {best.n}, has {best.metrics[metric]:.6g}."
        )

    def table(self, metric: str | None = None, *, mode: Literal["auto", "min", "max"] = "auto") -> str:
        """Returns all rows as an aligned table, the best one by a metric (`None`: the first) marked."""
        metric = self._metric(metric)
        scored = any(not math.isnan(row.metrics[metric]) for row in self.rows)
        best = self.best(metric, mode=mode) if scored else None
        rows = [
            [
                row.weighting,
                row.n,
                printable(row.members[-1].name),
                *row.metrics.values(),
                "best" if row is best else "",
            ]
            for row in self.rows
        ]
        header = ["weighting", "n", "newest member", *map(printable, self.metrics), ""]
        return tabulate(rows, header, tablefmt="plain", floatfmt=".6g", disable_numparse=[0, 2])

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes all rows as CSV: weighting, n, oldest and newest member, metrics; replaces a file `path`."""
        write_csv(
            Path(path),
            ["weighting", "n", "oldest_member", "newest_member", *self.metrics],
            [
                [row.weighting, row.n, row.members[0], row.members[-1], *(row.metrics[name] for name in self.metrics)]
                for row in self.rows
            ],
        )

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON values; metrics that are NaN or infinite are `None`."""
        return {
            "rows": [
                {
                    "weighting": row.weighting,
                    "n": row.n,
                    "members": [str(path) for path in row.members],
                    "metrics": without_nan(row.metrics),
                }
                for row in self.rows
            ],
            "weightings": {
                name: w.to_json() if isinstance(w, Weighting) else list(w) for name, w in self.weightings.items()
            },
            "members": [str(path) for path in self.paths],
            "seconds": self.seconds,
            "bytes_read": self.bytes_read,
        }

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json()` to a file, replaced if it exists."""
        text = json.dumps(self.to_json(), indent=1)
        Storage().commit(
            Path(path), lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"), overwrite=True
        )

    def export(
        self, row: SweepRow, output: str | os.PathLike[str], *, overwrite: bool = False, **options: Any
    ) -> AverageReport:
        """Writes the average of a row as a checkpoint; options are those of `average_checkpoints`.

        Raises:
            CheckpointError: `output` is one of the members that were swept, also one that is not in the row.
        """
        for path in self.paths:
            if same_file(path, Path(output)):
                raise CheckpointError("output-is-input", output, f"it is the member {path}. Choose another name.")
        weighting = None if row.weighting == SINGLE else self.weightings[row.weighting]
        if isinstance(weighting, Weighting):
            return average_checkpoints(row.members, output, weighting, overwrite=overwrite, **options)
        weights = [1.0] if weighting is None else weighting[-row.n :]
        return average_checkpoints(row.members, output, weights=weights, overwrite=overwrite, **options)

    def plot(self, path: str | os.PathLike[str], metric: str | None = None, *, title: str | None = None) -> None:
        """Draws single members as dots and averages of the last n as lines into a PNG (needs the extra "plots")."""
        from streaming_polyak import plots

        metric = self._metric(metric)
        plots.last_n(
            Path(path),
            [row.metrics[metric] for row in self.of(SINGLE)],
            {name: [row.metrics[metric] for row in self.of(name)] for name in self.weightings},
            title or f"Single members and averages of the last n of {len(self.paths)}",
            metric,
        )

    def _metric(self, metric: str | None) -> str:
        if metric is not None and metric not in self.metrics:
            raise ValueError(f"Expected a metric of {', '.join(self.metrics)}; got {metric!r}.")
        return metric or self.metrics[0]


def _less_is_better(metric: str, mode: str) -> bool:
    if mode not in ("auto", "min", "max"):
        raise ValueError(f'Expected mode="auto", "min" or "max", got mode={mode!r}.')
    signs = ("loss", "error", "mse", "mae", "perplexity", "entropy", "divergence", "hinge")
    return mode == "min" or (mode == "auto" and any(sign in metric.lower() for sign in signs))
