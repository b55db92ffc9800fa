"""Keras files of a model, whole or not at all, and the members that a run keeps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import keras

from streaming_polyak.files.storage import Storage
from streaming_polyak.schedule import SUFFIXES, Members


def save(model: keras.Model, path: Path, *, overwrite: bool) -> None:
    """Saves what the model holds now as a Keras file.

    Args:
        model: built.
        path: ".keras", ".weights.h5" or ".h5".
        overwrite: whether to replace an existing file.

    Raises:
        ValueError: another suffix, or one that cannot hold the model.
        FileExistsError: the file exists and `overwrite` is false.
        OSError: the disk refused; what was under `path` still is.
    """
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"Expected a path that ends in {', '.join(SUFFIXES)}; got {str(path)!r}.")
    weights_only = path.name.endswith(".weights.h5")
    if path.name.endswith(".h5") and not weights_only and any(v.dtype == "bfloat16" for v in model.variables):
        raise ValueError(
            f"Expected a suffix that can hold bfloat16, got {str(path)!r}. Keras' legacy format cannot; use .keras or "
            ".weights.h5."
        )
    Storage().commit(path, model.save_weights if weights_only else model.save, overwrite=overwrite)


class MemberFiles:
    """The files of the members that one Trainer keeps; others in the same folder are left alone.

    Args:
        members: which epochs are kept, and where; `None` for none.
    """

    def __init__(self, members: Members | None) -> None:
        self._members = members
        self._kept: list[Path] = []
        self._resumed = False

    @property
    def paths(self) -> list[Path]:
        """What was written and not deleted since, oldest first."""
        return list(self._kept)

    def check(self, epochs: Iterable[int]) -> None:
        """Checks that no file is in the way of the members among `epochs`.

        Raises:
            FileExistsError: one is, and may not be replaced.
        """
        members = self._members
        if members is None or members.overwrite:
            return
        for path in (members.path(epoch) for epoch in epochs if members.due(epoch)):
            if path.exists():
                raise FileExistsError(
                    f"{path} exists already, and would be a member of this run. Choose another folder, or pass "
                    "Members(..., overwrite=True) to replace it."
                )

    def resume(self, epoch: int) -> None:
        """Takes over the members that this run kept before `epoch`; later ones are of work that was lost, and go."""
        members = self._members
        if members is None:
            return
        kept = [path for k in range(epoch) if members.due(k) and (path := members.path(k)).exists()]
        self._kept, self._resumed = kept[-(members.newest or len(kept)) :], True

    def keep(self, model: keras.Model, epoch: int) -> None:
        """Saves what the model holds if `epoch` is due, then deletes those that are no longer among the newest."""
        members = self._members
        if members is None or not members.due(epoch):
            return
        path = members.path(epoch)
        save(model, path, overwrite=members.overwrite or self._resumed)
        self._kept = [*(kept for kept in self._kept if kept != path), path]
        while members.newest is not None and len(self._kept) > members.newest:
            Storage().remove(self._kept.pop(0))
