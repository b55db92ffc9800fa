"""The history of a run: Keras' own, with lists of equal length, and as a CSV file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import keras

from streaming_polyak.files.storage import write_csv


class History(keras.callbacks.History):  # type: ignore[misc]  # Keras has no types
    """Keras' history with lists of equal length: NaN where there was no value in an epoch."""

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Adds the values of an epoch."""
        logs = logs or {}
        for name in logs:
            self.history.setdefault(name, [math.nan] * len(self.epoch))
        self.epoch.append(epoch)
        for name, values in self.history.items():
            values.append(logs.get(name, math.nan))

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Writes a CSV file: a column "epoch" (from 0), then one a name; a row an epoch. Replaces a file `path`."""
        write_csv(Path(path), *self.rows())

    def rows(self) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Returns the header and the rows of `to_csv`."""
        return ["epoch", *self.history], list(zip(self.epoch, *self.history.values(), strict=True))
