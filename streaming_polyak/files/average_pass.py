"""The pass over all inputs of an average: tile by tile, by several threads, into the places of a draft.

Each byte of every input is read once: the checksums that its format has are checked on the way, and its own is found.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_polyak.errors import CheckpointError, NonFiniteError
from streaming_polyak.files import pieces
from streaming_polyak.files.checkpoint_set import CheckpointSet, as_floats
from streaming_polyak.files.checksums import crc32, crc32_combine, crc32c, crc32c_combine
from streaming_polyak.files.disk import NewFile
from streaming_polyak.files.formats import open_checkpoint
from streaming_polyak.files.formats.drafts import GROUPS, Draft, Plan, begin, is_reset, record
from streaming_polyak.files.formats.tf_checkpoint import check_strings
from streaming_polyak.files.meter import Meter
from streaming_polyak.files.pieces import Piece, Segment
from streaming_polyak.files.source import UnpackedSource
from streaming_polyak.files.summation import TILE, NonFiniteInput, TileAverager
from streaming_polyak.files.tensors import Tensor, is_optimizer
from streaming_polyak.files.verify import content_crc32, read_all

_COPY_BYTES = 1 << 20
_SYNC_BYTES = 32 << 20


class _Worker:
    """What a thread needs of its own."""

    def __init__(self, raw: NDArray[np.float64], allow_nonfinite: bool) -> None:
        self.averager = TileAverager(raw, allow_nonfinite)
        self.stored = np.empty(8 * TILE, np.uint8)
        self.converted = np.empty(8 * TILE, np.uint8)


class AveragePass:
    """One pass over checkpoints that writes their average.

    Args:
        inputs: what is averaged.
        raw: their weights up to a common factor, oldest first.
        threads: how many work.
        allow_nonfinite: whether NaN and infinity may be averaged.
        meter: is told of the bytes read.
    """

    def __init__(
        self, inputs: CheckpointSet, raw: NDArray[np.float64], threads: int, allow_nonfinite: bool, meter: Meter
    ) -> None:
        self._inputs, self._threads, self._meter = inputs, threads, meter
        self._local = threading.local()
        self._new_worker: Callable[[], _Worker] = lambda: _Worker(raw, allow_nonfinite)
        self._pieces = pieces.cut(inputs.averaged)
        self._crcs = np.zeros((len(inputs.paths), len(self._pieces)), np.uint32)
        self._has_castagnoli = bool(inputs.crc32c)
        self._castagnoli = np.zeros(self._crcs.shape if self._has_castagnoli else (0, 0), np.uint32)
        self._written = np.zeros(len(self._pieces), np.uint32)
        self._unsynced = 0
        self._lock = threading.Lock()
        self._syncs: list[Future[None]] = []

    def write(self, plan: Plan) -> dict[str, int]:
        """Makes the new checkpoint under a temporary name and reads it back.

        Returns:
            How many tensors were "averaged" and "copied", how many "parameters" averaged, bytes "written".

        Raises:
            CheckpointError: an input is damaged or changed, or what was read back is not what was written.
            NonFiniteError: an input holds NaN or infinity, and that is not allowed.
            OSError: the disk refused.
        """
        inputs = self._inputs
        final = record(plan.path / plan.output.name, plan.format) if plan.format in GROUPS else plan.path
        draft = begin(plan)
        disk = ThreadPoolExecutor(1)
        try:
            missing = [
                name
                for name, tensor in plan.wanted.items()
                if name not in draft.places and tensor.offset is not None and tensor.dtype != "string"
            ]
            if missing:
                raise plan.structure.refuse("template", "the template does not have this tensor.", missing[0])
            work = list(enumerate(self._pieces))
            pieces.run(work, lambda job: self._average(*job, draft, disk), self._threads)
            digests = self._digests(draft)
            copied = 0
            for name, place in draft.places.items():
                if name not in digests:
                    digests[name] = self._copy(plan, place, draft)
                    copied += name in inputs.newest.tensors and not is_optimizer(name, inputs.newest.format)
            crcs: dict[int, int] = {}
            pieces.run(range(len(inputs.paths)), lambda i: crcs.update({i: self._finish_input(i)}), self._threads)
            inputs.check_unchanged()
            plan.structure.check_unchanged()
            for i, entry in enumerate(plan.provenance["inputs"]):
                entry["crc32"] = f"{crcs[i]:08x}"
            if not draft.castagnoli:
                crc = content_crc32(plan.provenance, draft.places.values(), digests, plan.structure.format)
                plan.provenance["content_crc32"] = f"{crc:08x}"
            if plan.format in ("tf_checkpoint", "saved_model"):
                check_strings(plan.structure)  # which are copied
            draft.finish(digests, plan.provenance)
            self._syncs.append(disk.submit(draft.sync))  # while it is read back, which waits for nothing
            self._read_back(final, plan, draft, digests)
            for sync in self._syncs:  # the system tells an error once, perhaps to an early one
                sync.result()
        finally:
            disk.shutdown(cancel_futures=True)
            draft.close()
        return {
            "averaged": len(inputs.averaged),
            "copied": copied,
            "parameters": sum(tensor.size for tensor in inputs.averaged),
            "written": sum(os.stat(file.path).st_size for file in draft.files),
        }

    def _sync_meanwhile(self, file: NewFile, written: int, disk: ThreadPoolExecutor) -> None:
        """Has the disk write what there is while the rest is computed, instead of all of it in the end."""
        with self._lock:
            self._unsynced += written
            if self._unsynced < _SYNC_BYTES or not all(sync.done() for sync in self._syncs):
                return
            self._unsynced = 0
            self._syncs.append(disk.submit(file.sync))

    def _average(self, number: int, piece: Piece, draft: Draft, disk: ThreadPoolExecutor) -> None:
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
        self._sync_meanwhile(file, (hi - lo) * itemsize, disk)
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
        newest = self._inputs.newest
        table = newest if place.name in newest.tensors else plan.structure
        if table is not newest and plan.optimizer == "newest":
            raise newest.refuse(
                "template", "the template has this entry of an optimizer, the newest has not.", place.name
            )
        tensor, file = table.tensors[place.name], draft.files[place.source]
        if tensor.describe() != place.describe():
            raise plan.structure.refuse("template", f"{place.describe()} there, {tensor.describe()} here.", place.name)
        checksum, crc, stored = (crc32c if draft.castagnoli else crc32), 0, 0
        assert place.offset is not None
        zero = is_reset(plan, place) or tensor.offset is None
        itemsize = place.stored_dtype.itemsize
        step = _COPY_BYTES - _COPY_BYTES % itemsize
        for at in range(0, place.nbytes, step):
            count = min(step, place.nbytes - at)
            data = np.zeros(count, np.uint8)
            if not zero:
                table.sources[tensor.source].read_into(data.data, (tensor.offset or 0) + at)
                stored = crc32c(data, stored) if tensor.crc32c is not None else 0
                if tensor.big_endian != place.big_endian:
                    data = data.reshape(-1, itemsize)[:, ::-1].reshape(-1).copy()
            file.write(data, place.offset + at)
            crc = checksum(data, crc)
        if not zero:
            table.check_crc32c(tensor.name, stored)
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
            inputs.check_crc32c(i, k, crc)
        kept, whole = inputs.checksums(i), 0
        for number, source in enumerate(table.sources):
            crc = pieces.digest(source, segments[number], (c for c in kept if c.source == number), self._meter)
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
