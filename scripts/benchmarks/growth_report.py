"""What the points of `growth.py` say: costs fitted by least squares, why curves bend, figures, and larger models.

Every time is taken for a sum of costs, each in proportion to something:

    an update   fixed + tensor * T + parameter * P + average * k P
    files       fixed + file * N + tensor * T + tensor of a file * N T + byte read * N B + byte written * B
    training    fixed + epoch * E

with T tensors, P parameters, k averages, N files of B bytes. The squares are those of relative errors, so that short
times count as much as long ones, and no cost is negative. Fitted is the least time of the repeats, as whatever else the
machine does can only add to it. Updates are fitted to the points that lie beyond the processor's caches, and to the
smallest model, for the fixed cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

Point = dict[str, Any]
MIB = 2**20
BEGIN, END = "<!-- growth -->", "<!-- /growth -->"
LARGE = (10**9, 10**11)
LARGE_TENSORS, LARGE_AVERAGES, LARGE_MEMBERS = 1000, 3, 10
NETWORK_BITS_PER_SECOND = 10e9
_ITEM_BYTES = 4
_BEND = 0.15  # a deviation from the fit that is spoken of


class Curve(NamedTuple):
    """Points along one axis while the others stay."""

    kind: str
    axis: str
    label: str
    points: list[Point]

    @property
    def x(self) -> list[float]:
        """Where the points stand."""
        return [point[self.axis] for point in self.points]


class Fit(NamedTuple):
    """Costs by name, in seconds, and what they are for each point."""

    costs: dict[str, float]
    features: Callable[[Point], dict[str, float]]
    used: int

    def seconds(self, point: Point) -> float:
        """Returns what the fit gives for a point, measured or not."""
        return sum(self.costs[name] * amount for name, amount in self.features(point).items())

    def share(self, name: str, point: Point) -> float:
        """Returns which part of that one cost is."""
        return self.costs[name] * self.features(point)[name] / (self.seconds(point) or math.inf)


def of_update(point: Point) -> dict[str, float]:
    """Returns how much of each cost an update has."""
    p, t, k = point["parameters"], point["tensors"], point["averages"]
    return {"update": 1, "tensor": t, "parameter": p, "parameter of each average": k * p}


def of_files(point: Point) -> dict[str, float]:
    """Returns how much of each cost averaging files has."""
    n, t, b = point["members"], point["tensors"], point["bytes"]
    return {"call": 1, "file": n, "tensor": t, "tensor of a file": n * t, "byte read": n * b, "byte written": b}


def of_training(point: Point) -> dict[str, float]:
    """Returns how much of each cost training has."""
    return {"call": 1, "epoch": point["epochs"]}


_WHAT = {
    (
        "files",
        "call",
    ): "what a call costs: starting the process that parses HDF5, making, syncing and checking the output",
    ("epochs", "call"): "what a call costs: tracing and compiling the step",
}
_FEATURES = {"updates": of_update, "files": of_files, "epochs": of_training}


def least_squares(rows: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns costs >= 0 with the least squares of relative errors: what would be negative is left out, one by one."""
    scaled = rows / seconds[:, None]
    norms = np.linalg.norm(scaled, axis=0)
    costs, left = np.zeros(rows.shape[1]), list(np.flatnonzero(norms))
    while left:
        found = np.linalg.lstsq(scaled[:, left] / norms[left], np.ones(len(seconds)), rcond=None)[0] / norms[left]
        if found.min() >= 0:
            costs[left] = found
            break
        del left[int(np.argmin(found * norms[left]))]
    return costs


def state_bytes(point: Point) -> int:
    """Returns the bytes that an update goes over: the weights and their averages."""
    return _ITEM_BYTES * point["parameters"] * (1 + point["averages"])


def fit(points: Sequence[Point], kind: str, last_cache: int) -> Fit:
    """Fits the costs of one kind of work."""
    features, mine = _FEATURES[kind], [point for point in points if point["kind"] == kind]
    if kind == "updates":
        smallest = min(point["parameters"] for point in mine)
        beyond = [p for p in mine if state_bytes(p) > last_cache or p["parameters"] == smallest]
        mine = beyond if len({p["parameters"] for p in beyond}) > 1 else mine
    names = list(features(mine[0]))
    rows = np.array([[features(point)[name] for name in names] for point in mine], np.float64)
    costs = least_squares(rows, np.array([point["least_seconds"] for point in mine]))
    return Fit(dict(zip(names, costs.tolist(), strict=True)), features, len(mine))


def curves(points: Sequence[Point]) -> list[Curve]:
    """Returns the curves that the points lie on: those that differ along one axis, for the most usual of the others."""
    axes = {
        "updates": {"parameters": "parameters", "tensors": "tensors", "averages": "averages"},
        "files": {"members": "files averaged", "bytes": "bytes a file", "tensors": "tensors a file"},
        "epochs": {"epochs": "epochs"},
    }
    found = []
    for kind, labels in axes.items():
        mine = [point for point in points if point["kind"] == kind]
        for axis, label in labels.items():
            groups: dict[tuple[Any, ...], list[Point]] = {}
            for point in mine:
                groups.setdefault(tuple(point[other] for other in labels if other != axis), []).append(point)
            if groups:
                longest = max(groups.values(), key=len)
                found.append(Curve(kind, axis, label, sorted(longest, key=lambda point: point[axis])))
    return found


def number(value: float) -> str:
    """Returns a count for people: 300, 10,000, 1e+08 as 1e8."""
    return f"{value:,.0f}" if value < 1e5 else f"{value:.3g}".replace("e+0", "e").replace("e+", "e")


def duration(seconds: float) -> str:
    """Returns seconds in the unit that suits them."""
    for unit, factor in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)):
        if seconds >= (3 if factor >= 60 else 1) * factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-12:.3g} ps" if seconds else "0"


def size(nbytes: float) -> str:
    """Returns bytes in the unit that suits them, in powers of ten."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.3g} B"


def costs_table(fits: dict[str, Fit], points: Sequence[Point]) -> str:
    """Returns the fitted costs, and how far the points are from them."""
    rows = []
    for kind, found in fits.items():
        errors = [
            abs(p["least_seconds"] / found.seconds(p) - 1) for p in points if p["kind"] == kind and found.seconds(p)
        ]
        text = ", ".join(f"{duration(cost)} per {name}" for name, cost in found.costs.items())
        rows.append([kind, text, f"{found.used}", f"{np.median(errors):.0%}", f"{max(errors):.0%}"])
    header = ["", "fitted cost", "points", "median error of all", "largest"]
    return str(tabulate(rows, header, tablefmt="github", disable_numparse=True))


def points_table(curve: Curve, found: Fit) -> str:
    """Returns the points of one curve beside the fit."""
    rows = [
        [
            size(x) if curve.axis == "bytes" else number(x),
            duration(point["seconds"]),
            duration(point["least_seconds"]),
            f"{point['least_seconds'] / found.seconds(point):.2f}",
            f"{point['anonymous_mib']:,.1f}",
        ]
        for x, point in zip(curve.x, curve.points, strict=True)
    ]
    header = [curve.label, "median time", "least", "least / fit", "anonymous MiB"]
    align = ("right",) * 5
    return str(tabulate(rows, header, tablefmt="github", colalign=align, disable_numparse=True))


def sentence(curve: Curve, found: Fit, cache: dict[int, int]) -> str:
    """Says where a curve bends and why, by the costs that make up its ends; only what these points show."""
    if len(curve.points) < 2:
        return ""
    first, last = curve.points[0], curve.points[-1]
    growth, steps = last["least_seconds"] / first["least_seconds"], curve.x[-1] / curve.x[0]
    name = {"bytes": "bytes a file"}.get(curve.axis, curve.label)
    said = [f"{number(steps)} times the {name} take {growth:.3g} times as long."]
    fixed = [cost for cost in found.costs if found.features(first)[cost] == found.features(last)[cost]]
    share = [sum(found.share(cost, point) for cost in fixed) for point in (first, last)]
    if share[0] > 0.5 > share[1]:
        moving = found.seconds(last) * (1 - share[1]) / curve.x[-1]
        bend = found.seconds(last) * share[1] / moving if moving else math.inf
        what = size(bend) if curve.axis == "bytes" else number(bend)
        biggest = max(fixed, key=lambda cost: found.share(cost, first))
        said.append(
            f"The curve bends near {what}: below it, what does not depend on them is most of the time ({share[0]:.0%} "
            f"at the first point by the fit, {share[1]:.0%} at the last), above all "
            f"{_WHAT.get((curve.kind, biggest), f'the cost of each {biggest}')}."
        )
    elif share[1] > 0.5:
        said.append(f"What does not depend on them is most of the time at every point ({share[1]:.0%} at the last).")
    elif share[0] > 0.1:
        said.append(f"It starts flatter, as {share[0]:.0%} of the first point is what does not depend on them.")
    if curve.kind == "updates":
        said += caching(curve, found, cache)
    return " ".join(said)


def caching(curve: Curve, found: Fit, cache: dict[int, int]) -> list[str]:
    """Says which points are faster or slower than the costs beyond the caches, and which cache they fit into."""
    said, unexplained = [], []
    for point, x in zip(curve.points, curve.x, strict=True):
        times, state = point["least_seconds"] / found.seconds(point), state_bytes(point)
        fitting = [level for level, nbytes in sorted(cache.items()) if state <= nbytes]
        moving = found.share("parameter", point) + found.share("parameter of each average", point)
        if times < 1 - _BEND and fitting and moving > 0.5:
            said.append(
                f"At {number(x)} it takes {times:.2f} of the fit, whose costs are those of main memory: weights and "
                f"averages, {size(state)}, fit into the L{fitting[0]} cache of {size(cache[fitting[0]])}."
            )
        elif abs(times - 1) > _BEND:
            unexplained.append(f"{number(x)} ({times:.2f})")
    if unexplained:
        said.append(f"Neither these costs nor a cache explain the ratio to the fit at {', '.join(unexplained)}.")
    return said


def memory_sentence(curve: Curve) -> str:
    """Says what memory grows with, by its ends."""
    first, last = (max(point["anonymous_mib"], 0.1) for point in (curve.points[0], curve.points[-1]))
    if curve.kind == "updates":
        expected = state_bytes(curve.points[-1]) / MIB
        return (
            f"Memory at the last point: {last:,.0f} MiB, of which weights and averages are {expected:,.0f} "
            f"({last / expected:.2f} times)."
        )
    if last < 1.5 * first + 4:
        return f"Memory does not grow: {first:,.1f} MiB at the first point, {last:,.1f} at the last."
    why = ", as the tables of the files do, here and in the process that parses HDF5" if curve.axis == "tensors" else ""
    return f"Memory grows from {first:,.1f} to {last:,.1f} MiB{why}."


def estimates(measured: dict[str, Any], fits: dict[str, Fit]) -> str:
    """Returns on paper, for models that do not fit here: seconds of each limit, and which is the largest."""
    memory, disk, parts = measured["memory_bytes"], measured["disk_bytes_per_second"], []
    if "updates" in fits:
        rows = []
        for p in LARGE:
            point = {"parameters": p, "tensors": LARGE_TENSORS, "averages": LARGE_AVERAGES}
            training = _ITEM_BYTES * p * (4 + LARGE_AVERAGES)  # weights, gradients, two slots of Adam, averages
            hosts = math.ceil(training / memory)
            on_one = fits["updates"].seconds({**point, "parameters": p / hosts})
            moved = _ITEM_BYTES * p / hosts * (1 + 2 * LARGE_AVERAGES)
            bus = moved / measured["copy_bytes_per_second"]
            pace = "the bus" if bus > on_one / 2 else "the work on each number"
            rows.append(
                [
                    number(p), size(_ITEM_BYTES * p * LARGE_AVERAGES), size(training), f"{hosts:,}", duration(on_one),
                    duration(bus), f"memory, then {pace}" if hosts > 1 else pace,
                ]
            )  # fmt: skip
        header = [
            "parameters", f"{LARGE_AVERAGES} averages", "with weights, gradients, Adam", "hosts like this one",
            "an update, each host its part", "its bytes at the speed of a copy", "bound",
        ]  # fmt: skip
        parts += [
            "Averages while training: each number is averaged by itself, so hosts that hold a part of the weights hold "
            "the same part of the averages, and nothing goes over the network.",
            str(tabulate(rows, header, tablefmt="github", disable_numparse=True)),
        ]
    if "files" in fits:
        rows = []
        for p in LARGE:
            nbytes = _ITEM_BYTES * p
            point = {"members": LARGE_MEMBERS, "tensors": LARGE_TENSORS, "bytes": nbytes}
            limits = {
                "processor and bus": fits["files"].seconds(point),
                "disk": LARGE_MEMBERS * nbytes / disk["read"] + nbytes / disk["write"],
                "network": 8 * (LARGE_MEMBERS + 1) * nbytes / NETWORK_BITS_PER_SECOND,
            }
            cached = (LARGE_MEMBERS + 1) * nbytes < memory
            local = "processor and bus" if cached else max(("processor and bus", "disk"), key=lambda k: limits[k])
            rows.append(
                [number(p), size(nbytes), *map(duration, limits.values()), local, max(limits, key=lambda k: limits[k])]
            )
        header = [
            "parameters", "a checkpoint", "by the fit, from the page cache", "this disk, read and written",
            f"{NETWORK_BITS_PER_SECOND / 1e9:g} Gbit/s, likewise", "bound with a local disk", "slowest of all three",
        ]  # fmt: skip
        parts += [
            f"{LARGE_MEMBERS} checkpoints of {number(LARGE_TENSORS)} tensors into one, tile by tile in memory that "
            f"does not grow. {LARGE_MEMBERS} of 1e9 parameters are {size(LARGE_MEMBERS * _ITEM_BYTES * 1e9)}; the page "
            f"cache here has at most {size(memory)}. This disk read {size(disk['read'])} a second and wrote "
            f"{size(disk['write'])}, synced; the network's speed is assumed.",
            str(tabulate(rows, header, tablefmt="github", disable_numparse=True)),
        ]
    return "\n\n".join(parts)


def report(measured: dict[str, Any], figures: Sequence[str] = ()) -> str:
    """Returns the section in Markdown."""
    points, cache = measured["points"], {int(level): nbytes for level, nbytes in measured["caches"].items()}
    kinds = [kind for kind in _FEATURES if any(point["kind"] == kind for point in points)]
    fits = {kind: fit(points, kind, max(cache.values(), default=0)) for kind in kinds}
    parts = [f"{measured['machine']}; measured in {measured['minutes']:.1f} minutes.", *figures]
    parts += [costs_table(fits, points)]
    for curve in curves(points):
        found = fits[curve.kind]
        title = {"updates": "Updates", "files": "Files", "epochs": "Training"}[curve.kind]
        usual = ", ".join(
            f"{size(value) if name == 'bytes' else number(value)} {'a file' if name == 'bytes' else name}"
            for name, value in curve.points[0].items()
            if name in ("parameters", "tensors", "averages", "members", "bytes") and name != curve.axis
        )
        parts += [
            f"**{title} against {curve.label}**{f' ({usual})' if usual else ''}. "
            f"{sentence(curve, found, cache)} {memory_sentence(curve)}",
            points_table(curve, found),
        ]
    parts += ["**Larger models, on paper**", estimates(measured, fits)]
    return "\n\n".join(part for part in parts if part)


def replace_section(text: str, section: str) -> str:
    """Returns the text with another section between the markers.

    Raises:
        ValueError: it does not have each marker once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"Expected one {BEGIN} and one {END} after it.")
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n\n{section}\n\n{END}{text.partition(END)[2]}"


def draw(measured: dict[str, Any], folder: Path, seen_from: Path) -> list[str]:
    """Draws time and memory of all curves, a figure for each kind of work; returns them as Markdown images."""
    import os

    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    points, cache = measured["points"], {int(level): nbytes for level, nbytes in measured["caches"].items()}
    links = []
    folder.mkdir(exist_ok=True)
    for kind in _FEATURES:
        mine = [curve for curve in curves(points) if curve.kind == kind and len(curve.points) > 1]
        if not mine:
            continue
        found = fit(points, kind, max(cache.values(), default=0))
        figure, axes = plt.subplots(2, len(mine), figsize=(3.8 * len(mine), 6), squeeze=False, layout="constrained")
        for curve, (above, below) in zip(mine, axes.T, strict=True):
            seconds = [point["least_seconds"] for point in curve.points]
            above.loglog(curve.x, seconds, "o", color="#0072B2", label="measured")
            grid = np.geomspace(curve.x[0], curve.x[-1], 100)
            fitted = [found.seconds({**curve.points[0], curve.axis: x}) for x in grid]
            above.loglog(grid, fitted, "-", color="#D55E00", linewidth=1, label="fit")
            memories = [max(point["anonymous_mib"], 0.1) for point in curve.points]
            below.semilogx(curve.x, memories, "s-", color="#009E73", label="measured", linewidth=1)
            if kind == "updates":
                states = [state_bytes(point) / MIB for point in curve.points]
                below.semilogx(curve.x, states, "--", color="0.4", linewidth=1, label="weights and averages")
            if max(memories) > 10 * min(memories):
                below.set_yscale("log")
            else:
                below.set_ylim(0, 1.15 * max(memories))
            above.set(ylabel="seconds")
            below.set(xlabel=curve.label, ylabel="anonymous memory, MiB")
            for axis in (above, below):
                axis.grid(visible=True, which="major", linewidth=0.4, alpha=0.6)
                axis.legend(frameon=False, fontsize="small")
                if curve.x[-1] < 10 * curve.x[0]:  # too short for powers of ten
                    axis.set_xticks(curve.x, [number(x) for x in curve.x])
                    axis.xaxis.set_minor_locator(NullLocator())
        title = {
            "updates": "One update of the averages", "files": "Averaging files", "epochs": "Training a small network",
        }[kind]  # fmt: skip
        figure.suptitle(title)
        path = folder / f"growth-{kind}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
        links.append(f"![{title}: time and memory]({Path(os.path.relpath(path, seen_from)).as_posix()})")
    return links
