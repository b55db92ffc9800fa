"""All averages of the last n = 1, ..., N members under any number of weightings, in one pass from newest to oldest.

Counted from the newest member w_1, every average that is asked for grows by something known:

| weighting | after member w_n | divided by |
|---|---|---|
| `Polynomial(0)`, the mean | S0 += w_n | n |
| `Polynomial(1)`, linear | S1 += S0: w_1 was added n times, w_n once | n (n + 1) / 2 |
| `Polynomial(p)`, whole p | Sp += S(p-1) | C(n + p, p + 1) |
| `Exponential(d)` | E += d^(n-1) w_n | 1 + d + ... + d^(n-1) |
| explicit weights v | V += v_n w_n | v_1 + ... + v_n |

The sums of the first three rows are shared, so mean and linear together take two accumulators, not three. Each file is
read once: when the member itself is evaluated, each tensor is added up as it passes.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from streaming_polyak.errors import NonFiniteError
from streaming_polyak.files import pieces
from streaming_polyak.files.average import Paths
from streaming_polyak.files.checkpoint_set import CheckpointSet, as_floats
from streaming_polyak.files.checksums import crc32, crc32c
from streaming_polyak.files.descriptors import temporary_file
from streaming_polyak.files.formats.hdf5 import Parser
from streaming_polyak.files.inputs import check_no_averages, find_inputs
from streaming_polyak.files.meter import Meter, hidden
from streaming_polyak.files.summation import TILE, rounded
from streaming_polyak.files.sweep_result import SINGLE, SweepResult, SweepRow
from streaming_polyak.files.tensors import DTYPES, Tensor
from streaming_polyak.weighting import Exponential, Polynomial, Weighting

Array = NDArray[Any]
Tensors = Mapping[str, Array]
Evaluate = Callable[[Tensors], Mapping[str, float] | float]
MAX_POWER = 64
_Found = TypeVar("_Found")
Weightings = Mapping[str, "Weighting | Sequence[float]"] | Sequence["Weighting | Sequence[float]"]


def sweep_checkpoints(
    paths: Paths,
    weightings: Weightings,
    evaluate: Evaluate,
    *,
    last: int | None = None,
    sort: Literal["epoch"] | None = None,
    accumulators: Literal["memory", "disk"] = "memory",
    allow_nonfinite: bool = False,
    progress: bool = False,
) -> SweepResult:
    """Evaluates every member, and for n = 1, ..., N the average of the last n under every weighting.

    Each file is read once. Memory: one float64 a parameter for each accumulator (see the module's table), and what
    `evaluate` takes; a tensor at a time is made for it.

    Args:
        paths: the N members, oldest first, as for `average_checkpoints`.
        weightings: by name, or in a sequence (named by their text): `Polynomial` of a whole power, `Exponential`, or N
            explicit weights, oldest member first.
        evaluate: gets the tensors by name (a mapping that makes each when it is asked for, good during the call) and
            returns metrics by name, or one number, which is called "score". `KerasEvaluator` is one.
        last: only the newest so many members.
        sort: "epoch" orders the members by the epochs in their names.
        accumulators: "memory", or "disk" for temporary files (in TMPDIR) of which little is in memory at once.
        allow_nonfinite: whether members may hold NaN or infinity.
        progress: show a bar over the evaluations, if the error output is a terminal.

    Returns:
        A row for each member and each average.

    Raises:
        CheckpointError: as for `average_checkpoints`; all members are compared before the first evaluation.
        NonFiniteError: a member holds NaN or infinity.
        ValueError: a weighting cannot be swept, or two have one name.
    """
    started = time.perf_counter()
    given = find_inputs(paths, sort=sort, last=last)
    found = given.paths
    named = _named(weightings, len(found))
    if accumulators not in ("memory", "disk"):
        raise ValueError(f'Expected accumulators="memory" or "disk", got accumulators={accumulators!r}.')
    with ExitStack() as stack:
        parser = stack.enter_context(Parser())
        members = CheckpointSet(found, parser, stack)
        check_no_averages(given, members.are_averages)
        sums = _Sums(named, members.averaged, stack if accumulators == "disk" else None)
        bar = stack.enter_context(
            tqdm(total=len(found) * (1 + len(named)), unit="evaluation", disable=hidden(progress))
        )
        copied = {tensor.name: members.newest.read(tensor.name) for tensor in members.copied}
        singles: list[SweepRow] = []
        averages: dict[str, list[SweepRow]] = {name: [] for name in named}
        for n in range(1, len(found) + 1):
            member = _Member(members, len(found) - n, sums, n, allow_nonfinite)
            metrics = _metrics(evaluate(member), singles)
            member.finish()
            singles.append(SweepRow(SINGLE, 1, (found[-n],), metrics))
            bar.update()
            for name in named:
                # The average of one member is that member.
                average = _Average(sums, name, n, members.averaged, copied)
                scores = metrics if n == 1 else _metrics(evaluate(average), singles)
                averages[name].append(SweepRow(name, n, tuple(found[-n:]), scores))
                bar.update()
        rows = (*singles, *(row for name in named for row in averages[name]))
        return SweepResult(rows, named, tuple(found), time.perf_counter() - started, sum(members.sizes))


class _Sums:
    """The accumulators: arrays of float64 over all averaged elements, one a sum that is needed."""

    def __init__(
        self,
        weightings: Mapping[str, Weighting | tuple[float, ...]],
        averaged: Sequence[Tensor],
        on_disk: ExitStack | None,
    ) -> None:
        self._weightings = weightings
        powers = [int(w.power) for w in weightings.values() if isinstance(w, Polynomial)]
        self._levels = max(powers, default=-1) + 1
        self._of: dict[str, int] = {}
        number = self._levels
        for name, weighting in weightings.items():
            if isinstance(weighting, Polynomial):
                self._of[name] = int(weighting.power)
            else:
                self._of[name] = number
                number += 1
        size = sum(tensor.size for tensor in averaged)
        self._map: mmap.mmap | None = None
        if on_disk is None:
            self._sums = np.zeros((number, size))
        else:
            file = on_disk.enter_context(temporary_file())
            os.posix_fallocate(file.fileno(), 0, max(1, number * size * 8))  # a full disk is an error here
            self._map = mmap.mmap(file.fileno(), max(1, number * size * 8))
            self._sums = np.frombuffer(self._map, np.float64, number * size).reshape(number, size)
        self.places: dict[str, int] = {}
        at = 0
        for tensor in averaged:
            self.places[tensor.name] = at
            at += tensor.size
        self._scratch = np.empty(TILE)

    def add(self, name: str, w: Array, n: int) -> None:
        """Takes in a tensor of the n-th member counted from the newest; `w` is flat."""
        start = self.places[name]
        with np.errstate(all="ignore"):
            for lo in range(0, w.size, TILE):
                part = w[lo : lo + TILE]
                where = slice(start + lo, start + lo + part.size)
                for level in range(self._levels):
                    total = self._sums[level, where]
                    np.add(total, part, out=total)
                    part = total
                part = w[lo : lo + TILE]
                for weighting_name, weighting in self._weightings.items():
                    if isinstance(weighting, Polynomial):
                        continue
                    total, scratch = self._sums[self._of[weighting_name], where], self._scratch[: part.size]
                    np.multiply(part, self._weight(weighting, n), out=scratch, dtype=np.float64)
                    np.add(total, scratch, out=total)
        self._give_back()

    def average(self, weighting_name: str, tensor: Tensor, n: int) -> Array:
        """Returns the average of the last n members, in the dtype of the tensor."""
        start = self.places[tensor.name]
        total = self._sums[self._of[weighting_name], start : start + tensor.size]
        norm = self._norm(self._weightings[weighting_name], n)
        out = np.empty(tensor.size, DTYPES[tensor.dtype])
        bits = out.view(np.uint16) if tensor.dtype == "bfloat16" else out
        with np.errstate(all="ignore"):
            for lo in range(0, tensor.size, TILE):
                part = np.divide(total[lo : lo + TILE], norm, out=self._scratch[: min(TILE, tensor.size - lo)])
                bits[lo : lo + TILE] = rounded(part, tensor.dtype)
        self._give_back()
        return out.reshape(tensor.shape)

    @staticmethod
    @lru_cache(maxsize=64)  # the same for all tiles of all tensors
    def _weight(weighting: Weighting | tuple[float, ...], n: int) -> float:
        if isinstance(weighting, tuple):
            return weighting[-n]
        return float(weighting.raw_weights(n)[0])  # of the oldest, that of the newest being 1

    @staticmethod
    @lru_cache(maxsize=64)
    def _norm(weighting: Weighting | tuple[float, ...], n: int) -> float:
        if isinstance(weighting, tuple):
            return math.fsum(weighting[-n:])
        if isinstance(weighting, Polynomial):
            return float(math.comb(n + int(weighting.power), int(weighting.power) + 1))
        return math.fsum(weighting.raw_weights(n))

    def _give_back(self) -> None:
        """Lets go of the pages of a mapped file; what is in them is kept by the system."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class _Member(Mapping[str, Array]):
    """The tensors of one member; each is added up, or checked, the first time it is read."""

    def __init__(self, members: CheckpointSet, i: int, sums: _Sums, n: int, allow_nonfinite: bool) -> None:
        self._members, self._i, self._sums, self._n = members, i, sums, n
        self._allow_nonfinite = allow_nonfinite
        self._tensors = {tensor.name: (k, tensor) for k, tensor in enumerate([*members.averaged, *members.copied])}
        self._segments: dict[str, tuple[int, pieces.Segment]] = {}

    def __getitem__(self, name: str) -> Array:
        members, i = self._members, self._i
        k, tensor = _found(self._tensors, name)
        offset, number = int(members.offsets[i, k]), int(members.source_numbers[i, k])
        raw = np.empty(tensor.nbytes, np.uint8)
        members.tables[i].sources[number].read_into(raw.data, offset)
        big = bool(members.big_endian[i, k])
        dtype = DTYPES[tensor.dtype]
        values = raw.view(dtype.newbyteorder(">" if big else "<")).astype(dtype, copy=False)
        if name not in self._segments:
            members.check_crc32c(i, k, crc32c(raw) if i in members.crc32c else 0)
            self._segments[name] = number, pieces.Segment(offset, tensor.nbytes, crc32(raw))
            if name in self._sums.places:
                if not self._allow_nonfinite and not np.isfinite(values).all():
                    raise NonFiniteError(f"{members.paths[i]}, tensor {name!r}: it holds NaN or infinity.")
                floats = as_floats(
                    raw, tensor.dtype, big, np.empty(0 if tensor.nbytes == 0 else 8 * tensor.size, np.uint8)
                )
                self._sums.add(name, floats, self._n)
        return values.reshape(tensor.shape)

    def finish(self) -> None:
        """Adds up what the evaluation did not look at, and checks that the file is whole and unchanged."""
        for name in self._tensors:
            if name not in self._segments:
                self[name]
        table, kept = self._members.tables[self._i], self._members.checksums(self._i)
        for number, source in enumerate(table.sources):
            segments = [segment for where, segment in self._segments.values() if where == number]
            checksums = [checksum for checksum in kept if checksum.source == number]
            if checksums:
                pieces.digest(source, segments, checksums, Meter(None, "", False))
            source.check_unchanged()

    def __iter__(self) -> Iterator[str]:
        yield from self._tensors

    def __len__(self) -> int:
        return len(self._tensors)


class _Average(Mapping[str, Array]):
    """The tensors of the average of the last n, made one by one."""

    def __init__(self, sums: _Sums, weighting: str, n: int, averaged: Sequence[Tensor], copied: Tensors) -> None:
        self._sums, self._weighting, self._n, self._copied = sums, weighting, n, copied
        self._averaged = {tensor.name: tensor for tensor in averaged}

    def __getitem__(self, name: str) -> Array:
        if name in self._copied:
            return self._copied[name].copy()
        return self._sums.average(self._weighting, _found(self._averaged, name), self._n)

    def __iter__(self) -> Iterator[str]:
        yield from self._averaged
        yield from self._copied

    def __len__(self) -> int:
        return len(self._averaged) + len(self._copied)


def _found(tensors: Mapping[str, _Found], name: str) -> _Found:
    try:
        return tensors[name]
    except KeyError:
        raise KeyError(
            f"no tensor {name!r} in the checkpoints; they have {', '.join([*tensors][:5])}"
            f"{f' and {len(tensors) - 5} more' if len(tensors) > 5 else ''}"
        ) from None


def _named(weightings: Weightings, count: int) -> dict[str, Weighting | tuple[float, ...]]:
    if isinstance(weightings, Mapping):
        pairs = list(weightings.items())
    else:
        pairs = [(str(w) if isinstance(w, Weighting) else "weights", w) for w in weightings]
    named: dict[str, Weighting | tuple[float, ...]] = {}
    for name, weighting in pairs:
        if name in named or name == SINGLE:
            raise ValueError(f"Expected a name of its own for each weighting, got {name!r} twice or {SINGLE!r}.")
        if isinstance(weighting, Polynomial) and weighting.power != int(weighting.power):
            raise ValueError(f"Expected a whole power, as one pass needs it, got {weighting!r}.")
        if isinstance(weighting, Polynomial) and weighting.power > MAX_POWER:
            raise ValueError(f"Expected a power of at most {MAX_POWER}, as it takes power + 1 sums, got {weighting!r}.")
        if isinstance(weighting, (Polynomial, Exponential)):
            named[name] = weighting
            continue
        if isinstance(weighting, Weighting):
            raise ValueError(f"Expected a Polynomial, an Exponential or explicit weights, got {weighting!r}.")
        explicit = tuple(float(w) for w in weighting)
        if len(explicit) != count or not all(0 <= w < math.inf for w in explicit) or not explicit[-1:] > (0.0,):
            raise ValueError(
                f"Expected {count} finite weights >= 0, oldest member first, the newest above 0; got {explicit}."
            )
        named[name] = explicit
    if not named:
        raise ValueError("Expected at least one weighting, got none.")
    return named


def _metrics(returned: object, before: Sequence[SweepRow]) -> dict[str, float]:
    """Returns what an evaluation gave as metrics by name; those of all rows must be the same ones."""
    values: Mapping[Any, Any] = returned if isinstance(returned, Mapping) else {"score": returned}
    try:
        metrics = {str(name): float(value) for name, value in values.items()}
    except (TypeError, ValueError):
        raise ValueError(
            f"Expected evaluate to return numbers by name, or one number, got {returned!r:.200}."
        ) from None
    if not metrics:
        raise ValueError("Expected evaluate to return metrics by name, or a number, got an empty dict.")
    if before and metrics.keys() != before[0].metrics.keys():
        raise ValueError(
            f"Expected evaluate to return the same metrics each time, got {', '.join(metrics)} after "
            f"{', '.join(before[0].metrics)}."
        )
    return metrics
