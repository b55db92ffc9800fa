"""Which checkpoints are meant, oldest first: paths, patterns, folders and lists of them.

Order is meaning here, since newer members may weigh more. Paths given one by one stay as they are given. What a pattern
or a folder stands for is ordered by the numbers in the names, so that `epoch-9` comes before `epoch-10`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from streaming_polyak.errors import CheckpointError

SUFFIXES = (".keras", ".weights.h5", ".h5", ".hdf5", ".weights.json", ".safetensors", ".npz", ".index")
_EPOCH = re.compile(r"(?:epoch|(?<![a-z])ep)\D?(\d+)", re.IGNORECASE)
_STEP = re.compile(r"(?<![a-z])(?:step|iter|iteration|ckpt|checkpoint)\D?(\d+)", re.IGNORECASE)
_WHOLE_NUMBER = re.compile(r"(?<!\d)(?<!\d\.)(\d+)(?!\d)(?!\.\d)")  # not the digits of a score such as 0.25
_SCORE = re.compile(r"\d+\.\d+")
_SHARD = re.compile(r"_\d{5}\.weights\.h5$")


class Inputs(NamedTuple):
    """The checkpoints that are meant.

    Args:
        paths: oldest first.
        taken_in: those of them that nobody named: a folder or a pattern stood for them.
    """

    paths: list[Path]
    taken_in: frozenset[Path]


def find_checkpoints(
    given: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    sort: Literal["epoch"] | None = None,
    last: int | None = None,
) -> list[Path]:
    """Returns the checkpoints that are meant, oldest first.

    Args:
        given: paths; patterns with `*`, `?` or `[...]`; folders, which stand for the checkpoints in them; "@FILE" for
            a file with one of these on each line (empty lines and lines that begin with "#" are passed over).
        sort: "epoch" orders all of them by a number in their names: that behind "epoch" or "ep", or else behind "step",
            "iter" or "ckpt", or else the only whole number, or else the only one in which the names differ (scores
            apart). `None` leaves them as given.
        last: only the newest so many.

    Raises:
        CheckpointError: nothing is there, or not what was asked for.
        ValueError: `last` is below 1.
    """
    return find_inputs(given, sort=sort, last=last).paths


def find_inputs(
    given: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    sort: Literal["epoch"] | None = None,
    last: int | None = None,
) -> Inputs:
    """Does as `find_checkpoints`, and tells which paths stood in a folder or matched a pattern."""
    items = [given] if isinstance(given, (str, os.PathLike)) else given
    paths: list[Path] = []
    taken_in: set[Path] = set()
    for named in (named for item in items for named in _listed(os.fspath(item))):
        meant = _expand(named)
        paths += meant
        if meant != [Path(named)]:
            taken_in.update(meant)
    if not paths:
        raise CheckpointError("empty-list", "no input", "expected at least one checkpoint to average, got none.")
    if sort == "epoch":
        paths = _by_epoch(paths)
    elif sort is not None:
        raise ValueError(f'Expected sort="epoch" or None, got sort={sort!r}.')
    if last is not None:
        if last < 1:
            raise ValueError(f"Expected last >= 1, got last={last}.")
        if last > len(paths):
            raise CheckpointError(
                "too-few", paths[-1], f"the last {last} checkpoints are asked for, but there are only {len(paths)}."
            )
        paths = paths[-last:]
    return Inputs(paths, frozenset(taken_in.intersection(paths)))


def check_no_averages(inputs: Inputs, are_averages: Iterable[bool]) -> None:
    """Refuses averages made earlier into a folder whose checkpoints are averaged, as they would be averaged again.

    Args:
        inputs: as found.
        are_averages: of `inputs.paths`, in that order, whether it says that it is an average.

    Raises:
        CheckpointError: one is an average and was taken in by a folder or a pattern.
    """
    for path, is_average in zip(inputs.paths, are_averages, strict=True):
        if is_average and path in inputs.taken_in:
            raise CheckpointError(
                "average-among-inputs",
                path,
                "it is an average itself, and was taken in with a folder or by a pattern. Name the files that are "
                "meant one by one, or move it out of the way.",
            )


def natural(path: Path) -> tuple[tuple[int, int | str], ...]:
    """Returns a key that orders names with the numbers in them as numbers."""
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", str(path)) if part)


def _listed(item: str) -> list[str]:
    """Returns what stands in the list that an item names, or else the item."""
    if not item.startswith("@"):
        return [item]
    try:
        lines = Path(item[1:]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError("list", item[1:], f"the list cannot be read: {error}.") from error
    found = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if any(line.startswith("@") for line in found):
        raise CheckpointError("list", item[1:], "a list cannot name another list.")
    return found


def _expand(item: str) -> list[Path]:
    path = Path(item)
    if path.is_dir():
        return [path] if (path / "saved_model.pb").exists() else _in_folder(path)
    if glob.has_magic(item) and not path.exists():
        matches = sorted((Path(match) for match in glob.glob(item)), key=natural)
        if not matches:
            raise CheckpointError("missing", item, "no file matches this pattern.")
        return matches
    return [path]


def _in_folder(folder: Path) -> list[Path]:
    stores = {path.name.removesuffix(".weights.json") for path in folder.glob("*.weights.json")}
    found = [
        path
        for path in folder.iterdir()
        if not path.name.startswith(".")
        and (path.name.endswith(SUFFIXES) or (path.is_dir() and (path / "saved_model.pb").exists()))
        and not (_SHARD.search(path.name) and _SHARD.sub("", path.name) in stores)
    ]
    if not found:
        raise CheckpointError("empty-list", folder, f"no checkpoint ({', '.join(SUFFIXES)}) is in this folder.")
    kinds = {next((s for s in SUFFIXES if path.name.endswith(s)), "SavedModel") for path in found}
    if len(kinds) > 1:
        raise CheckpointError(
            "mixed-folder",
            folder,
            f"it has checkpoints of several kinds in it ({', '.join(sorted(kinds))}). Say which with a pattern, such "
            f"as '{folder}/*{sorted(kinds)[0]}'.",
        )
    return sorted(found, key=natural)


def _by_epoch(paths: list[Path]) -> list[Path]:
    numbers: dict[int, Path] = {}
    for path, number in zip(paths, _epochs(paths), strict=True):
        if number in numbers:
            raise CheckpointError("sort", path, f"its name has the number {number}, as {numbers[number]} has.")
        numbers[number] = path
    return [numbers[number] for number in sorted(numbers)]


def _epochs(paths: list[Path]) -> list[int]:
    """Returns the number of each by the first rule that gives one for all."""
    names = [next((path.name.removesuffix(s) for s in SUFFIXES if path.name.endswith(s)), path.name) for path in paths]
    found: list[list[int]] = []
    for pattern in (_EPOCH, _STEP, _WHOLE_NUMBER):
        found = [[int(number) for number in pattern.findall(name)] for name in names]
        if all(len(numbers) == 1 for numbers in found):
            return [number for (number,) in found]
    for path, numbers in zip(paths, found, strict=True):
        if not numbers:
            raise CheckpointError("sort", path, "its name has no number to sort by.")
    if len({_WHOLE_NUMBER.sub("#", _SCORE.sub("", name)) for name in names}) == 1:
        places = list(zip(*found, strict=True))
        differing = [numbers for numbers in places if len(set(numbers)) > 1]
        if len(differing) <= 1:
            return list((differing or places)[0])
    path, numbers = next((p, n) for p, n in zip(paths, found, strict=True) if len(n) > 1)
    raise CheckpointError(
        "sort",
        path,
        f"its name has several numbers ({', '.join(map(str, numbers))}), and which is the epoch cannot be told. "
        "Name the files in their order instead, oldest first.",
    )
