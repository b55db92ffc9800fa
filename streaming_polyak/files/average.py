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
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from streaming_polyak.errors import CheckpointError, NonFiniteError
from streaming_polyak.files import pieces, summation
from streaming_polyak.files.checkpoint_set import CheckpointSet, as_floats
from streaming_polyak.files.checksums import crc32, crc32_combine, crc32c, crc32c_combine
from streaming_polyak.files.formats import open_checkpoint
from streaming_polyak.files.formats.drafts import Draft, Plan, begin, check_structure, format_of, is_reset
from streaming_polyak.files.formats.hdf5 import Parser
from streaming_polyak.files.inputs import find_checkpoints
from streaming_polyak.files.meter import Meter, cpus, format_bytes, parse_bytes
from streaming_polyak.files.pieces import Piece, Segment
from streaming_polyak.files.storage import Storage
from streaming_polyak.files.summation import TILE, NonFiniteInput, TileAverager
from streaming_polyak.files.tensors import Tensor, TensorTable, UnpackedSource, differences, is_optimizer
from streaming_polyak.files.verify import content_crc32, read_all
from streaming_polyak.weighting import MEAN, Weighting

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

_THREAD_BYTES = 3 << 19  # of a thread, besides its tiles
_KEPT_BYTES = 2 << 20
_COPY_BYTES = 1 << 20


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
        sort: "epoch" orders the inputs by the last number in their names; `None` leaves them as given.
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

    In every case of an error, and if the process is killed at any moment, `output` is as it was before.
    """
    output = Path(output)
    found = find_checkpoints(paths, sort=sort, last=last)
    raw, words = _raw_weights(found, weighting, weights)
    if optimizer not in ("drop", "newest"):
        raise ValueError(f'Expected optimizer="drop" or "newest", got optimizer={optimizer!r}.')
    budget = parse_bytes(memory)
    with ExitStack() as stack:
        parser = stack.enter_context(Parser())
        meter = stack.enter_context(Meter(None, "averaging", progress))
        inputs = CheckpointSet(found, parser, stack)
        structure = inputs.newest if template is None else _template(Path(template), inputs.newest, parser, stack)
        format = format_of(output, inputs.newest)
        check_structure(format, output, inputs.newest, structure)
        _check_output(output, format, inputs, overwrite)
        threads = _threads(budget, inputs)
        job = _Job(inputs, raw, threads, allow_nonfinite, meter)
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
            plan = Plan(
                temporary, output, format, structure, _wanted(inputs.newest, format, optimizer), optimizer, said, parser
            )
            counts.update(job.write(plan))

        meter.expect(sum(inputs.sizes))
        if format in ("weights.json", "tf_checkpoint"):
            Storage().commit_group(record(output, format), write, overwrite=overwrite)
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


def record(output: Path, format: str) -> Path:
    """Returns the file that stands for a checkpoint: the index of a TensorFlow checkpoint, else the file itself."""
    return output.with_name(output.name.removesuffix(".index") + ".index") if format == "tf_checkpoint" else output


class _Worker:
    """What a thread needs of its own."""

    def __init__(self, raw: NDArray[np.float64], allow_nonfinite: bool) -> None:
        self.averager = TileAverager(raw, allow_nonfinite)
        self.stored = np.empty(8 * TILE, np.uint8)
        self.converted = np.empty(8 * TILE, np.uint8)


class _Job:
    """The pass over all inputs."""

    def __init__(
        self, inputs: CheckpointSet, raw: NDArray[np.float64], threads: int, allow_nonfinite: bool, meter: Meter
    ) -> None:
        self._inputs, self._threads, self._meter = inputs, threads, meter
        self._local = threading.local()
        self._new_worker: Callable[[], _Worker] = lambda: _Worker(raw, allow_nonfinite)
        self._pieces = pieces.cut(inputs.averaged)
        self._crcs = np.zeros((len(inputs.paths), len(self._pieces)), np.uint32)
        self._has_castagnoli = any(t.crc32c is not None for t in inputs.averaged)
        self._castagnoli = np.zeros(self._crcs.shape if self._has_castagnoli else (0, 0), np.uint32)
        self._written = np.zeros(len(self._pieces), np.uint32)

    def write(self, plan: Plan) -> dict[str, int]:
        """Makes the new checkpoint under a temporary name, reads it back, and returns counts."""
        inputs = self._inputs
        if plan.format in ("weights.json", "tf_checkpoint"):
            final = record(plan.path / plan.output.name, plan.format)
        else:
            final = plan.path
        draft = begin(plan)
        try:
            missing = [tensor.name for tensor in inputs.averaged if tensor.name not in draft.places]
            if missing:
                raise plan.structure.refuse("template", "the template does not have this tensor.", missing[0])
            work = list(enumerate(self._pieces))
            pieces.run(work, lambda job: self._average(*job, draft), self._threads)
            digests = self._digests(draft)
            copied = 0
            for name, place in draft.places.items():
                if name not in digests:
                    digests[name] = self._copy(plan, place, draft)
                    copied += name in inputs.newest.tensors and not is_optimizer(name, inputs.newest.format)
            crcs: dict[int, int] = {}
            pieces.run(range(len(inputs.paths)), lambda i: crcs.update({i: self._finish_input(i)}), self._threads)
            inputs.check_unchanged()
            for i, entry in enumerate(plan.provenance["inputs"]):
                entry["crc32"] = f"{crcs[i]:08x}"
            if not draft.castagnoli:
                crc = content_crc32(plan.provenance, draft.places.values(), digests, plan.structure.format)
                plan.provenance["content_crc32"] = f"{crc:08x}"
            draft.finish(digests, plan.provenance)
            with ThreadPoolExecutor(1) as pool:
                synced = pool.submit(draft.sync)  # takes as long as reading back, and waits for another device
                self._read_back(final, plan, draft, digests)
                synced.result()
        finally:
            draft.close()
        return {
            "averaged": len(inputs.averaged),
            "copied": copied,
            "parameters": sum(tensor.size for tensor in inputs.averaged),
            "written": sum(os.stat(file.path).st_size for file in draft.files),
        }

    def _average(self, number: int, piece: Piece, draft: Draft) -> None:
        if not hasattr(self._local, "worker"):
            self._local.worker = self._new_worker()
        worker: _Worker = self._local.worker
        inputs, (k, lo, hi) = self._inputs, piece
        tensor = inputs.averaged[k]
        place = draft.places[tensor.name]
        itemsize, file = inputs.itemsize(k), draft.files[place.source]
        assert place.offset is not None
        # This loop runs for every 256 KB of every input, and Python's share of it is done by one thread at a time: what
        # does not change is looked up before.
        where = inputs.places(k)
        crcs, castagnoli = [0] * len(where), [0] * len(where)
        stored, converted, plain = worker.stored, worker.converted, tensor.dtype == "float32"
        as_float32 = stored.view(np.float32)
        checksum, written = (crc32c if draft.castagnoli else crc32), 0
        for begin_at in range(lo, hi, TILE):
            size = min(TILE, hi - begin_at)

            def load(i: int, begin_at: int = begin_at, size: int = size) -> NDArray[Any]:
                source, offset, big_endian = where[i]
                raw = stored[: size * itemsize]
                view = raw.data
                source.read_into(view, offset + begin_at * itemsize)
                crcs[i] = crc32(view, crcs[i])
                if self._has_castagnoli:
                    castagnoli[i] = crc32c(view, castagnoli[i])
                if plain and not big_endian:
                    return as_float32[:size]
                return as_floats(raw, tensor.dtype, big_endian, converted)

            def reload(i: int, first: int, end: int, begin_at: int = begin_at) -> NDArray[Any]:
                raw = np.empty((end - first) * itemsize, np.uint8)
                inputs.read_into(i, k, raw.data, begin_at + first)
                return as_floats(
                    raw, tensor.dtype, bool(inputs.big_endian[i, k]), np.empty(8 * (end - first), np.uint8)
                )

            try:
                average = worker.averager.average(tensor.dtype, size, load, reload)
            except NonFiniteInput as error:
                raise NonFiniteError(
                    f"{inputs.paths[error.args[0]]}, tensor {tensor.name!r}: it holds NaN or infinity. Leave this "
                    "checkpoint out, or allow it (--allow-nonfinite, allow_nonfinite=True)."
                ) from None
            if place.big_endian:
                average = average.byteswap()
            data = average.view(np.uint8).data
            file.write(data, place.offset + begin_at * itemsize)
            written = checksum(data, written)
        self._written[number] = written
        self._crcs[:, number] = crcs
        if self._has_castagnoli:
            self._castagnoli[:, number] = castagnoli
        self._meter.add((hi - lo) * itemsize * len(inputs.paths))

    def _digests(self, draft: Draft) -> dict[str, int]:
        """Returns the checksum of each averaged tensor as written."""
        combine = crc32c_combine if draft.castagnoli else crc32_combine
        digests = {tensor.name: 0 for tensor in self._inputs.averaged}
        for (k, lo, hi), crc in zip(self._pieces, self._written.tolist(), strict=True):
            name = self._inputs.averaged[k].name
            digests[name] = combine(digests[name], crc, (hi - lo) * self._inputs.itemsize(k))
        return digests

    def _copy(self, plan: Plan, place: Tensor, draft: Draft) -> int:
        """Takes a tensor that is not averaged from the newest input or the template; returns its checksum."""
        table = self._inputs.newest if place.name in self._inputs.newest.tensors else plan.structure
        tensor, file = table.tensors[place.name], draft.files[place.source]
        if tensor.describe() != place.describe():
            raise plan.structure.refuse("template", f"{place.describe()} there, {tensor.describe()} here.", place.name)
        checksum, crc = (crc32c if draft.castagnoli else crc32), 0
        assert place.offset is not None
        zero = is_reset(plan, place) or tensor.offset is None
        itemsize = place.stored_dtype.itemsize
        step = _COPY_BYTES - _COPY_BYTES % itemsize
        for at in range(0, place.nbytes, step):
            count = min(step, place.nbytes - at)
            data = np.zeros(count, np.uint8)
            if not zero:
                table.sources[tensor.source].read_into(data.data, (tensor.offset or 0) + at)
                if tensor.big_endian != place.big_endian:
                    data = data.reshape(-1, itemsize)[:, ::-1].reshape(-1).copy()
            file.write(data, place.offset + at)
            crc = checksum(data, crc)
        return crc

    def _finish_input(self, i: int) -> int:
        """Reads what lies between the tensors of an input, checks its checksums, returns its CRC-32."""
        inputs, table = self._inputs, self._inputs.tables[i]
        segments: dict[int, list[Segment]] = {number: [] for number in range(len(table.sources))}
        castagnoli: dict[int, int] = {}
        for number, (k, lo, hi) in enumerate(self._pieces):
            itemsize = inputs.itemsize(k)
            start, size = int(inputs.offsets[i, k]) + lo * itemsize, (hi - lo) * itemsize
            segments[int(inputs.source_numbers[i, k])].append(Segment(start, size, int(self._crcs[i, number])))
            if self._has_castagnoli:
                castagnoli[k] = crc32c_combine(castagnoli.get(k, 0), int(self._castagnoli[i, number]), size)
        for k, crc in castagnoli.items():
            name = inputs.averaged[k].name
            wanted = table.tensors[name].crc32c
            if wanted is not None and crc != wanted:
                raise table.refuse(
                    "damaged",
                    f"its CRC-32C is {crc:08x}, not {wanted:08x} as the index says: the file is damaged.",
                    name,
                )
        whole = 0
        for number, source in enumerate(table.sources):
            checksums = [c for c in table.checksums if c.source == number]
            crc = pieces.digest(source, segments[number], checksums, self._meter)
            if not isinstance(source, UnpackedSource):
                whole = crc32_combine(whole, crc, source.size)
        return whole

    def _read_back(self, final: Path, plan: Plan, draft: Draft, digests: dict[str, int]) -> None:
        """Reads the new checkpoint as any other, and compares its structure and its bytes with what was meant."""
        with open_checkpoint(final, plan.parser) as table:
            found = read_all(table, self._threads, castagnoli=draft.castagnoli)
            wrong = [
                name
                for name, place in draft.places.items()
                if name not in table.tensors
                or table.tensors[name].describe() != place.describe()
                or found.digests[name] != digests[name]
            ]
            if wrong:
                raise CheckpointError(
                    "read-back", plan.output, "what was read back is not what was written; the disk may be failing.",
                    tensor=wrong[0],
                )  # fmt: skip


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


def _check_output(output: Path, format: str, inputs: CheckpointSet, overwrite: bool) -> None:
    final = record(output, format)
    if not final.exists():
        return
    now = os.stat(final)
    for table in inputs.tables:
        for source in table.sources:
            if source.identity[:2] == (now.st_dev, now.st_ino) or table.path.resolve() == final.resolve():
                raise CheckpointError("output-is-input", output, f"it is the input {table.path}. Choose another name.")
    if not overwrite:
        raise FileExistsError(f"{output} exists already. Choose another name, or pass overwrite=True to replace it.")
    if final.is_dir():
        raise FileExistsError(
            f"{output} is a folder, which is not replaced. Remove it yourself, or choose another name."
        )


def _threads(budget: int, inputs: CheckpointSet) -> int:
    pieces_kept = 4 * len(inputs.paths) * max(1, sum(t.size for t in inputs.averaged) // pieces.PIECE)
    fixed = _KEPT_BYTES + inputs.kept_bytes + pieces_kept
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
