"""Time and memory against what grows: parameters, tensors and averages; members, tensors and size of files; epochs.

Each point is a child process of its own (see `measuring`). Updates of averages: one `update_epoch` on a built Keras
model, after the first. Files: `average_checkpoints` of `.weights.h5` files in the page cache into a new one, which is
synced; three times. Epochs: one `Trainer.fit` of the tutorial's network from its call to its return,
compiling included, with three averages of epochs. Memory is the highest anonymous memory above the imports.

Costs per parameter, per tensor, per file and so on are fitted by least squares, and what they say of 1e9 and 1e11
parameters is written down beside what the disk of the folder and a network can do. `growth_report` has the arithmetic.

    python scripts/benchmarks/growth.py
    python scripts/benchmarks/growth.py --write                  # into RESULTS.md, with the figures in docs/
    python scripts/benchmarks/growth.py --json > points.json
    python scripts/benchmarks/growth.py --points points.json --write
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from measuring import ChildFailedError, caches, child, machine, model_of_vectors, seconds_of, watch

ROOT = Path(__file__).parents[2]
UPDATES, FILES, EPOCHS = "updates", "files", "epochs"
KINDS = (UPDATES, FILES, EPOCHS)
USUAL_PARAMETERS, USUAL_TENSORS, USUAL_AVERAGES = 10**7, 20, 3
USUAL_MEMBERS, USUAL_MEGABYTES = 10, 10.0
_LONG_ENOUGH_SECONDS = 0.5
_MOST_REPEATS = 300
_BLOCK_BYTES = 1 << 20


def summary(seconds: list[float]) -> dict[str, Any]:
    """Returns the median of some times, and the least."""
    return {"seconds": statistics.median(seconds), "least_seconds": min(seconds)}


def update(parameters: int, tensors: int, averages: int) -> dict[str, Any]:
    """Builds a model of vectors and its averages, and updates them until the median stands."""
    from streaming_polyak import LINEAR, MEAN, Average, Exponential
    from streaming_polyak.training.averages import Averages
    from streaming_polyak.training.kernels import finish_compiling

    model = model_of_vectors(parameters, tensors)
    kinds = (MEAN, LINEAR, Exponential(decay=0.999))
    running = Averages(model, {f"average{i}": Average(kinds[i % len(kinds)]) for i in range(averages)})
    seconds: list[float] = []
    while len(seconds) < 6 or (sum(seconds) < _LONG_ENOUGH_SECONDS and len(seconds) < _MOST_REPEATS):
        seconds.append(seconds_of(lambda: running.update_epoch(len(seconds), len(seconds))))
        finish_compiling()
    return {**summary(seconds[1:]), "first_seconds": seconds[0]}


def average(paths: Sequence[str], output: str) -> dict[str, Any]:
    """Averages files three times."""
    from streaming_polyak import average_checkpoints

    seconds = []
    for _ in range(3):
        Path(output).unlink(missing_ok=True)
        seconds.append(seconds_of(lambda: average_checkpoints(paths, output)))
    return summary(seconds)


def train(epochs: int) -> dict[str, Any]:
    """Trains the tutorial's network on as many rows as the tutorial."""
    import keras
    import numpy as np

    from streaming_polyak import LINEAR, MEAN, Average, Exponential, Trainer

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(25, activation="relu"), keras.layers.Dense(3, activation="softmax")]
    )
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "categorical_crossentropy", metrics=["accuracy"])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 2)).astype(np.float32), np.eye(3, dtype=np.float32)[rng.integers(0, 3, 100)]
    kinds = {"mean": MEAN, "linear": LINEAR, "exponential": Exponential(decay=0.99)}
    trainer = Trainer(model, {name: Average(kind) for name, kind in kinds.items()})
    return summary([seconds_of(lambda: trainer.fit(x, y, batch_size=32, epochs=epochs, progress=False))])


_IMPORTS = {
    UPDATES: ("keras", "streaming_polyak.training.averages"),
    FILES: ("streaming_polyak.files.average",),
    EPOCHS: ("keras", "streaming_polyak.training.trainer"),
}


def run_child(kind: str, arguments: Sequence[Any]) -> None:
    """Measures one point."""
    work = {UPDATES: update, FILES: average, EPOCHS: train}[kind]
    child(lambda: work(*arguments), _IMPORTS[kind])


def measure(kind: str, point: dict[str, Any], arguments: Sequence[Any]) -> dict[str, Any]:
    """Returns a point with its seconds and MiB."""
    try:
        found = watch([sys.executable, __file__, "--child", kind, "--arguments", json.dumps(arguments)])
    except ChildFailedError as error:
        raise click.ClickException(f"{kind} {point}: {error}") from None
    click.echo(f"{kind} {point}: {found.answer['seconds']:.3g} s, {found.anonymous_mib:.1f} MiB", err=True)
    return {"kind": kind, **point, **found.answer, "anonymous_mib": found.anonymous_mib}


def make_files(folder: Path, members: int, megabytes: float, tensors: int) -> list[str]:
    """Writes `.weights.h5` files as Keras does, of `tensors` vectors in layers of two, and all of them different."""
    import h5py
    import numpy as np

    size = max(1, int(megabytes * 1e6 / 4 / tensors))
    block = np.resize(np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32), size)
    paths = []
    for number in range(members):
        path = folder / f"member-{number:03}.weights.h5"
        with h5py.File(path, "w") as file:
            for k in range(tensors):
                file[f"layers/dense_{k // 2}/vars/{k % 2}"] = block * np.float32(1 + number / 100)
        paths.append(str(path))
    return paths


def disk_rates(folder: Path, megabytes: float) -> dict[str, float]:
    """Returns bytes a second of writing a file with a sync, and of reading it when it is in the page cache no more."""
    path, block = folder / "disk", os.urandom(_BLOCK_BYTES)
    blocks = max(1, int(megabytes * 1e6 / _BLOCK_BYTES))

    def write() -> None:
        with path.open("wb") as file:
            for _ in range(blocks):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            while file.read(_BLOCK_BYTES):
                pass

    written = seconds_of(write)
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    return {"write": blocks * _BLOCK_BYTES / written, "read": blocks * _BLOCK_BYTES / seconds_of(read)}


def copy_rate(parameters: float) -> float:
    """Returns the bytes a second that one `numpy.copyto` of so many float32 moves, read and written."""
    import numpy as np

    source = np.ones(int(parameters), np.float32)
    target = np.empty_like(source)
    copies = [seconds_of(lambda: np.copyto(target, source)) for _ in range(6)]
    return 2 * source.nbytes / statistics.median(copies[1:])


def measure_updates(
    parameters: Sequence[float], tensors: Sequence[int], averages: Sequence[int]
) -> list[dict[str, Any]]:
    """Returns the points of the three curves of updates; one that lies on several curves is measured once."""
    cases = {(int(p), USUAL_TENSORS, USUAL_AVERAGES) for p in parameters}
    usual = min(USUAL_PARAMETERS, int(max(parameters)))
    cases |= {(usual, t, USUAL_AVERAGES) for t in tensors} | {(usual, USUAL_TENSORS, k) for k in averages}
    return [measure(UPDATES, {"parameters": p, "tensors": t, "averages": k}, [p, t, k]) for p, t, k in sorted(cases)]


def measure_files(
    members: Sequence[int], megabytes: Sequence[float], tensors: Sequence[int], folder: Path
) -> list[dict[str, Any]]:
    """Returns the points of the three curves of files; files of one size and number of tensors are made once."""
    usual = min(USUAL_MEGABYTES, max(megabytes))
    cases: dict[tuple[float, int], set[int]] = {(usual, USUAL_TENSORS): {*members}}
    for size, number in [*((size, USUAL_TENSORS) for size in megabytes), *((usual, number) for number in tensors)]:
        cases.setdefault((size, number), set()).add(USUAL_MEMBERS)
    points = []
    for (size, number), counts in sorted(cases.items()):
        base = Path(tempfile.mkdtemp(prefix="growth-", dir=folder))
        try:
            paths = make_files(base, max(counts), size, number)
            for count in sorted(counts):
                point = {"members": count, "bytes": int(size * 1e6), "tensors": number}
                points.append(measure(FILES, point, [paths[:count], str(base / "average.weights.h5")]))
        finally:
            shutil.rmtree(base)
    return points


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", "kinds", type=click.Choice(KINDS), multiple=True, default=KINDS, show_default="all three")
@click.option(
    "--parameters", type=float, multiple=True, default=(1e4, 1e5, 1e6, 1e7, 1e8), show_default=True, help="Of a model."
)
@click.option("--tensors", type=int, multiple=True, default=(10, 30, 100, 300, 1000, 3000), show_default=True)
@click.option("--averages", type=int, multiple=True, default=(1, 2, 4, 8), show_default=True)
@click.option("--members", type=int, multiple=True, default=(2, 5, 10, 20, 50, 100), show_default=True, help="Files.")
@click.option("--megabytes", type=float, multiple=True, default=(1, 4, 10, 40, 100, 400), show_default=True)
@click.option("--epochs", type=int, multiple=True, default=(10, 30, 100, 300, 1000, 3000), show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where the files go. [default: a temporary folder]")
@click.option("--points", type=click.Path(path_type=Path), help="Take what --json printed, instead of measuring.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--write", is_flag=True, help="Into --results, between its two markers, with figures in --figures.")
@click.option(
    "--results", type=click.Path(path_type=Path), default=Path(__file__).with_name("RESULTS.md"), show_default=False
)
@click.option("--figures", type=click.Path(path_type=Path), default=ROOT / "docs", show_default=False)
@click.option("--child", "child_kind", hidden=True)
@click.option("--arguments", hidden=True)
def main(
    kinds: tuple[str, ...],
    parameters: tuple[float, ...],
    tensors: tuple[int, ...],
    averages: tuple[int, ...],
    members: tuple[int, ...],
    megabytes: tuple[float, ...],
    epochs: tuple[int, ...],
    folder: Path | None,
    points: Path | None,
    as_json: bool,
    write: bool,
    results: Path,
    figures: Path,
    child_kind: str | None,
    arguments: str | None,
) -> None:
    if child_kind is not None:
        run_child(child_kind, json.loads(arguments or "[]"))
        return
    if points is not None:
        measured = json.loads(points.read_text())
    else:
        started = time.perf_counter()
        rows: list[dict[str, Any]] = []
        if UPDATES in kinds:
            rows += measure_updates(parameters, tensors, averages)
        if FILES in kinds:
            rows += measure_files(members, megabytes, tensors, folder or Path(tempfile.gettempdir()))
        if EPOCHS in kinds:
            rows += [measure(EPOCHS, {"epochs": number}, [number]) for number in epochs]
        with tempfile.TemporaryDirectory(prefix="growth-", dir=folder) as base:
            disk = disk_rates(Path(base), max(megabytes))
        measured = {
            "machine": machine("tensorflow", "keras", "numpy", "h5py"),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "caches": caches(),
            "disk_bytes_per_second": disk,
            "copy_bytes_per_second": copy_rate(max(parameters)),
            "minutes": (time.perf_counter() - started) / 60,
            "points": rows,
        }
    if as_json:
        click.echo(json.dumps(measured, indent=1))
        return
    from growth_report import draw, replace_section, report

    if not write:
        click.echo(report(measured))
        return
    links = draw(measured, figures, results.parent)
    results.write_text(replace_section(results.read_text(), report(measured, links)))
    click.echo(f"{results} has them, {figures} the figures.")


if __name__ == "__main__":
    main()
