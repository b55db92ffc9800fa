"""What a run has reached, told from its folder without TensorFlow."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files.meter import format_bytes
from streaming_polyak.files.run_folder import RunFolder, holder
from streaming_polyak.files.tensors import printable


@dataclass(frozen=True)
class RunStatus:
    """What is in a run folder.

    Args:
        folder: of the run.
        checkpoints: oldest first: step, epoch and batch to go on with, save, bytes, path, and what is wrong with it.
        holder: who is at work in the folder, in words.
        scores: the last row of its history, by name.
    """

    folder: Path
    checkpoints: tuple[dict[str, Any], ...]
    holder: str | None
    scores: dict[str, str]

    @property
    def usable(self) -> bool:
        """Whether there is something to go on with."""
        return any(checkpoint["wrong"] is None for checkpoint in self.checkpoints)

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        return {
            "folder": str(self.folder),
            "checkpoints": list(self.checkpoints),
            "holder": self.holder,
            "scores": self.scores,
        }

    def __str__(self) -> str:
        at_work = f"in use by {self.holder}" if self.holder else "nobody is at work in it"
        lines = [f"{printable(str(self.folder))}: {len(self.checkpoints)} checkpoints; {at_work}"]
        rows = [
            [c["step"], c["epoch"], c["batch"], c["save"], format_bytes(c["bytes"]), c["wrong"] or "whole"]
            for c in self.checkpoints
        ]
        if rows:
            header = ["step", "goes on with epoch", "after batch", "save", "size", ""]
            lines.append(tabulate(rows, header, tablefmt="plain"))
        if self.scores:
            lines.append("last scores: " + ", ".join(f"{k}={v}" for k, v in self.scores.items()))
        return "\n".join(lines)


def run_status(folder: Path) -> RunStatus:
    """Looks at the folder of a run, and reads each of its checkpoints once.

    Raises:
        CheckpointError: there is no such folder.
    """
    if not folder.is_dir():
        raise CheckpointError("missing", folder, "there is no such folder.")
    run = RunFolder(folder)
    found = []
    for saved in run.saved():
        row: dict[str, Any] = {"step": saved.step, "epoch": None, "batch": None, "save": None, "wrong": None}
        row |= {"path": str(saved.path), "bytes": saved.path.stat().st_size}
        try:
            checkpoint = run.open(saved)
        except CheckpointError as error:
            row["wrong"] = error.reason
        else:
            where = dict(checkpoint.state.get("position", {}).get("$dict", []))
            row |= {"epoch": where.get("epoch"), "batch": where.get("done"), "save": checkpoint.save}
        found.append(row)
    scores: dict[str, str] = {}
    history = folder / "history.csv"
    if history.is_file():
        with history.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                scores = row
    return RunStatus(folder, tuple(found), holder(folder), scores)
