"""Averages saved checkpoints out of core: any number of any size, in memory that depends on neither.

All inputs are open at once and none is ever loaded: the tensors pass in tiles of 131,072 elements, for each tile the
same range of every file is read and added up, and the tile of the average goes to its place in the new file. The result
is within one unit in the last place of the exact weighted average (see `summation`), and has the same bits whatever the
budget and the number of threads.

Before the first byte of output the inputs are compared, and after the last one they are compared with what they were;
the new file is read back, and then gets its name.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files import pieces, summation
from streaming_polyak.files.average_pass import AveragePass
from streaming_polyak.files.checkpoint_set import CheckpointSet
from streaming_polyak.files.formats import open_checkpoint
from streaming_polyak.files.formats.drafts import (
    GROUPS,
    Plan,
    check_structure,
    format_of,
    old_parts,
    part_names,
    record,
)
from streaming_polyak.files.formats.hdf5 import Parser
from streaming_polyak.files.inputs import check_no_averages, find_inputs
from streaming_polyak.files.meter import Meter, cpus, format_bytes, parse_bytes
from streaming_polyak.files.storage import Storage, same_file
from streaming_polyak.files.summation import TILE
from streaming_polyak.files.tensors import Tensor, TensorTable, differences, is_optimizer
from streaming_polyak.weighting import MEAN, Weighting

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

_THREAD_BYTES = 3 << 19  # of a thread, besides its tiles
_KEPT_BYTES = 2 << 20


@dataclass(frozen=True)
class AverageReport:
    """What was averaged, and what it took.

    Args:
        output: the new checkpoint.
        inputs: the checkpoints averaged, oldest first.
        weights: of the inputs, summing to 1.
        weighting: in words.
        tensors: how many tensors were averaged.
        copied: how many were taken from the newest input: integers, booleans, seeds, strings.
        parameters: how many numbers were averaged.
        bytes_read: of the inputs.
        bytes_written: the size of the output.
        seconds: from the call to the end.
        peak_memory_bytes: the most anonymous memory that this process had meanwhile, interpreter and imports included.
        memory_bytes: the budget.
        threads: how many worked.
        crc32: of each input file, in hexadecimal.
    """

    output: Path
    inputs: tuple[Path, ...]
    weights: tuple[float, ...]
    weighting: str
    tensors: int
    copied: int
    parameters: int
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_memory_bytes: int
    memory_bytes: int
    threads: int
    crc32: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        values = dataclasses.asdict(self)
        return values | {
            "output": str(self.output),
            "inputs": [str(path) for path in self.inputs],
            "gigabytes_per_second": self.bytes_read / 1e9 / self.seconds,
        }

    def __str__(self) -> str:
        copied = f", {self.copied} more from the newest" if self.copied else ""
        return (
            f"{self.output}: {self.weighting} average of {len(self.inputs)} checkpoints, {self.tensors} tensors with "
            f"{self.parameters:,} numbers{copied}\n"
            f"{format_bytes(self.bytes_read)} read, {format_bytes(self.bytes_written)} written in {self.seconds:.2f} s "
            f"({self.bytes_read / 1e9 / self.seconds:.2f} GB/s), peak memory {format_bytes(self.peak_memory_bytes)}"
        )


def average_checkpoints(
    paths: Paths,
    output: str | os.PathLike[str],
    weighting: Weighting = MEAN,
    *,
    weights: Sequence[float] | None = None,
    last: int | None = None,
    sort: Literal["epoch"] | None = None,
    optimizer: Literal["drop", "newest"] = "drop",
    template: str | os.PathLike[str] | None = None,
    allow_nonfinite: bool = False,
    memory: int | str = "64MiB",
    overwrite: bool = False,
    progress: bool = False,
) -> AverageReport:
    """Averages saved checkpoints of one model into a new one.

    Floating tensors are averaged; integers, booleans, seeds and strings are those of the newest input. The result is
    within one unit in the last place of the exact weighted average, for any number of inputs.

    Args:
        paths: the checkpoints, oldest first: paths, patterns, folders and "@FILE" lists, see `find_checkpoints`. Of the
            formats `.keras`, `.weights.h5`, `.h5`, `.weights.json`, `.safetensors`, `.npz`, TensorFlow checkpoints and
            SavedModel folders.
        output: the new checkpoint; its suffix says the format. A format that holds more than tensors has that from the
            newest input, or from `template`.
        weighting: how much each input weighs, by its place.
        weights: instead of a weighting: a weight >= 0 for each input, oldest first; divided by their sum.
        last: average only the newest so many.
        sort: "epoch" orders the inputs by the epochs in their names; `None` leaves them as given.
        optimizer: "drop" leaves the optimizer's entries out (where Keras or TensorFlow insist on them, they are those
            of a new optimizer), "newest" keeps those of the newest input.
        template: a checkpoint with the structure that the inputs lack, such as a `.keras` file where they are
            `.weights.h5`.
        allow_nonfinite: average NaN and infinity too, instead of refusing them.
        memory: the budget, in bytes or as text such as "64MiB": the anonymous memory taken is at most 16 MiB more.
        overwrite: whether to replace an existing `output`.
        progress: show a bar, if the error output is a terminal.

    Returns:
        What was done and what it took.

    Raises:
        CheckpointError: an input is damaged, hostile, of an unknown format, changed while it was read, or not of the
            same model as the others; or the output cannot be made of them.
        NonFiniteError: an input holds NaN or infinity.
        FileExistsError: `output` exists and `overwrite` is false.
        ValueError: a number is out of range, or the budget too small.
        OSError: the disk refused.

    In every case of an error, and if the process is killed at any moment, `output` is as it was before, or whole and
    new. Where it is several files (`.weights.json`, a TensorFlow checkpoint) that replace older ones, it may be gone if
    the process is killed in the moment when they are renamed; the older ones are then in a folder `.writing-*/replaced`
    beside it, until the same call has been made again.
    """
    output = Path(output)
    given = find_inputs(paths, sort=sort, last=last)
    found = given.paths
    raw, words = _raw_weights(found, weighting, weights)
    if optimizer not in ("drop", "newest"):
        raise ValueError(f'Expected optimizer="drop" or "newest", got optimizer={optimizer!r}.')
    budget = parse_bytes(memory)
    with ExitStack() as stack:
        parser = stack.enter_context(Parser())
        meter = stack.enter_context(Meter(None, "averaging", progress))
        inputs = CheckpointSet(found, parser, stack)
        check_no_averages(given, inputs.are_averages)
        structure = inputs.newest if template is None else _template(Path(template), inputs.newest, parser, stack)
        format = format_of(output, inputs.newest)
        if template is not None and format in ("safetensors", "npz"):
            raise ValueError(f"{output} will hold tensors alone, so template={template} has no use. Leave it out.")
        wanted = _wanted(inputs.newest, format, optimizer)
        check_structure(format, output, wanted, structure)
        _check_output(output, format, inputs, structure, overwrite)
        threads = _threads(budget, inputs)
        job = AveragePass(inputs, raw, threads, allow_nonfinite, meter)
        said: dict[str, Any] = {
            "made_by": f"streaming_polyak {version('streaming_polyak')}",
            "weighting": words,
            "accumulated_in": "float64, within 1 unit in the last place",
            "optimizer": optimizer,
            "content_crc32": "0" * 8,
            "inputs": [
                {"name": path.name, "bytes": size, "crc32": "0" * 8, "weight": weight}
                for path, size, weight in zip(found, inputs.sizes, (raw / raw.sum()).tolist(), strict=True)
            ],
        }
        counts: dict[str, int] = {}

        def write(temporary: Path) -> None:
            plan = Plan(temporary, output, format, structure, wanted, optimizer, said, parser)
            counts.update(job.write(plan))

        meter.expect(sum(inputs.sizes))
        if format in GROUPS:
            Storage().commit_group(record(output, format), write, overwrite=overwrite, parts=old_parts)
        else:
            Storage().commit(output, write, overwrite=overwrite)
        return AverageReport(
            output,
            tuple(found),
            tuple((raw / raw.sum()).tolist()),
            words,
            counts["averaged"],
            counts["copied"],
            counts["parameters"],
            sum(inputs.sizes),
            counts["written"],
            meter.seconds,
            meter.peak_bytes,
            budget,
            threads,
            tuple(entry["crc32"] for entry in said["inputs"]),
        )


def _raw_weights(
    found: list[Path], weighting: Weighting, weights: Sequence[float] | None
) -> tuple[NDArray[np.float64], str]:
    if weights is None:
        if not isinstance(weighting, Weighting):
            raise TypeError(
                f"Expected a weighting such as MEAN or LINEAR, got {weighting!r}. Give numbers as weights=."
            )
        return weighting.raw_weights(len(found)), str(weighting)
    if weighting is not MEAN:
        raise ValueError("Expected a weighting or weights, got both.")
    raw = np.asarray(weights, dtype=np.float64)
    if raw.shape != (len(found),):
        raise ValueError(f"Expected a weight for each of the {len(found)} checkpoints, got {raw.size} weights.")
    with np.errstate(over="ignore"):
        total = raw.sum()
    if not (np.all(np.isfinite(raw)) and np.all(raw >= 0) and 0 < total < np.inf):
        raise ValueError(f"Expected finite weights >= 0 that are not all zero, got {list(weights)}.")
    return raw, "weights"


def _template(path: Path, newest: TensorTable, parser: Parser, stack: ExitStack) -> TensorTable:
    table = open_checkpoint(path, parser)
    stack.callback(table.close)
    averaged = {n: t for n, t in newest.tensors.items() if not is_optimizer(n, newest.format)}
    different = differences(newest, table, averaged)
    if different:
        raise CheckpointError(
            "different-models",
            path,
            f"expected a template with the same tensors as {newest.path}, but they differ:\n"
            + "\n".join(different[:20]),
        )
    return table


def _wanted(newest: TensorTable, format: str, optimizer: str) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in newest.tensors.items()
        if optimizer == "newest" or not is_optimizer(name, newest.format)
        if tensor.dtype != "string" or format in ("tf_checkpoint", "saved_model")
    }


def _check_output(output: Path, format: str, inputs: CheckpointSet, structure: TensorTable, overwrite: bool) -> None:
    final = record(output, format)
    names = {final.name, *part_names(output, format, structure)}
    if format in GROUPS and overwrite and final.exists():
        names.update(old_parts(final))  # they go
    written = [final.with_name(name) for name in sorted(names)]
    resolved = {path.resolve() for path in written}
    for kind, table in [*(("input", table) for table in inputs.tables), ("template", structure)]:
        for path in (table.path, *(source.path for source in table.sources)):
            if path.resolve() in resolved or any(same_file(path, new) for new in written):
                raise CheckpointError("output-is-input", output, f"it is the {kind} {table.path}. Choose another name.")
    if not final.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists already. Choose another name, or pass overwrite=True to replace it.")
    if final.is_dir() or format == "saved_model":
        why = "is a folder, which is not replaced" if final.is_dir() else "is a file, which no folder replaces"
        raise FileExistsError(f"{output} {why}. Remove it yourself, or choose another name.")
    if format in GROUPS:
        known = old_parts(final)
        for name in part_names(output, format, structure):
            if name not in known and (path := final.with_name(name)).exists():
                raise FileExistsError(
                    f"{path} is in the way: the new {final.name} needs the name, and the old one does not name this "
                    "file, or is damaged. Move it away, or choose another name."
                )


def _threads(budget: int, inputs: CheckpointSet) -> int:
    checksums_kept = 4 * (2 if inputs.crc32c else 1) * len(inputs.paths) * len(pieces.cut(inputs.averaged))
    fixed = _KEPT_BYTES + inputs.kept_bytes + checksums_kept
    itemsize = max(tensor.stored_dtype.itemsize for tensor in inputs.averaged)
    converted = any(tensor.dtype != "float32" for tensor in inputs.averaged) or bool(inputs.big_endian.any())
    sums = 2 + (len(inputs.paths) > summation.GROUP)
    each = TILE * (8 * sums + 8 * converted + 2 * itemsize) + _THREAD_BYTES
    least = fixed + each
    if budget < least:
        raise ValueError(
            f"Expected a budget of at least {format_bytes(least)} for {len(inputs.paths)} checkpoints of "
            f"{len(inputs.averaged)} tensors, got memory={format_bytes(budget)}. Give {-(-least // 2**20)}MiB or more."
        )
    return max(1, min(cpus(), (budget - fixed) // each))
