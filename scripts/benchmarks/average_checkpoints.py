"""Averages checkpoints of a Keras model in several ways, next to what reading and writing the files takes at least.

Each way runs in a child process of its own. In a first turn its memory is sampled every 2 ms, that of processes it
starts included (see `measuring`); the turns after that are timed, as sampling takes a tenth of a processor. Imports
come before the clock starts and before the memory that is counted from, except for the command, which is timed and
weighed as a whole process. All ways take turns; shown is the median. "cat + write" is the
time of `cat FILES > /dev/null` plus that of writing one such file and syncing it, as every way of ours syncs what it
writes; the others do not.

What users of torch have runs too, on files with the same arrays, where some interpreter has it: this one, or one that
is named by --python. The README beside this file says how to install it.

    python scripts/benchmarks/average_checkpoints.py
    python scripts/benchmarks/average_checkpoints.py --size 400 --repeats 5 --slow --python ../rivals/bin/python
    python scripts/benchmarks/average_checkpoints.py --size 400 --format weights.h5 --weighting linear --json
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
from average_rivals import LAYERS, RIVALS, arrays, width, write_safetensors
from measuring import MIB, SAMPLE_SECONDS, ChildFailedError, child, has_modules, machine, memory, seconds_of, watch
from tabulate import tabulate

FORMATS = ("keras", "weights.h5", "safetensors")
HUGE_MB = 4000
RIVALS_SCRIPT = Path(__file__).with_name("average_rivals.py")


def ours(paths: list[Path], output: Path, weighting: str) -> None:
    """streaming_polyak, into a file."""
    from streaming_polyak import average_checkpoints, parse_weighting

    average_checkpoints(paths, output, parse_weighting(weighting), overwrite=True)


def h5py_whole_files(paths: list[Path], output: Path, weighting: str) -> None:
    """One whole file at a time through h5py, running mean in float32, result in memory."""
    import io
    import zipfile

    import h5py
    import numpy as np

    mean: dict[str, np.ndarray] = {}
    for n, path in enumerate(paths, start=1):
        inside = io.BytesIO(zipfile.ZipFile(path).read("model.weights.h5")) if path.suffix == ".keras" else path

        def add(name: str, found: object, n: int = n) -> None:
            if isinstance(found, h5py.Dataset) and not name.startswith("optimizer"):
                w = found[()]
                mean[name] = w if n == 1 else mean[name] + (w - mean[name]) / n

        with h5py.File(inside) as file:
            file.visititems(add)


def one_at_a_time(paths: list[Path], output: Path, weighting: str) -> None:
    """keras.models.load_model one at a time, running mean in float32, set into the last."""
    import keras
    import numpy as np

    mean: list[np.ndarray] = []
    for n, path in enumerate(paths, start=1):
        model = keras.models.load_model(path)
        weights = model.get_weights()
        mean = [m + (w - m) / n for m, w in zip(mean, weights, strict=True)] if n > 1 else weights
    model.set_weights(mean)


def tutorial(paths: list[Path], output: Path, weighting: str) -> None:
    """The tutorial way: load all models, numpy.average a layer, clone, set."""
    import keras
    import numpy as np

    members = [keras.models.load_model(path) for path in paths]
    averaged = [
        np.average(np.array([model.get_weights()[layer] for model in members]), axis=0)
        for layer in range(len(members[0].get_weights()))
    ]
    model = keras.models.clone_model(members[0])
    model.set_weights(averaged)


WAYS: dict[str, tuple[Callable[[list[Path], Path, str], None], tuple[str, ...]]] = {
    "ours": (ours, ("streaming_polyak.files.average",)),
    "h5py, whole files": (h5py_whole_files, ("h5py",)),
    "load_model, one at a time": (one_at_a_time, ("keras",)),
    "tutorial: load all": (tutorial, ("keras",)),
}
SLOW = ("load_model, one at a time", "tutorial: load all")


def make_members(folder: Path, size_mb: float, count: int, suffix: str) -> list[Path]:
    """Saves `count` models with Dense layers that have `size_mb` megabytes of weights together; plain Keras."""
    paths = [folder / f"member-{number:03}.{suffix}" for number in range(count)]
    if suffix == "safetensors":
        for number, path in enumerate(paths):
            write_safetensors(path, size_mb, number)
        return paths
    import keras

    size = width(size_mb)
    model = keras.Sequential([keras.Input((size,)), *(keras.layers.Dense(size) for _ in range(LAYERS))])
    for number, path in enumerate(paths):
        for variable, (_, w) in zip(model.variables, arrays(size_mb, number), strict=True):
            variable.assign(w)
        model.save_weights(path) if suffix == "weights.h5" else model.save(path)
    return paths


def run_child(way: str, paths: list[Path], output: Path, weighting: str) -> None:
    """Imports, waits for a line, works, prints the seconds."""
    work, modules = WAYS[way]
    child(lambda: {"seconds": seconds_of(lambda: work(paths, output, weighting))}, modules)


def measure(way: str, paths: list[Path], output: Path, weighting: str, weigh: bool) -> dict[str, float]:
    """Runs a way in a child process; returns seconds, or MiB of memory above what its imports took."""
    options = ["--weighting", weighting, "--output", output]
    return watched(way, [sys.executable, __file__, "--child", way, *options, *paths], weigh)


def watched(way: str, command: list[str | Path], weigh: bool) -> dict[str, float]:
    """Runs a child; returns its seconds, or MiB of memory above what its imports took."""
    try:
        found = watch(command, sample=weigh)
    except ChildFailedError as error:
        raise click.ClickException(f"{way!r} {error}") from None
    if not weigh:
        return found.answer
    return {"anonymous_mib": found.anonymous_mib, "file_mib": max(0.0, found.file_mib)}


def timed(command: list[str] | str) -> dict[str, float]:
    """Times a command as a whole process."""
    started = time.perf_counter()
    subprocess.run(command, shell=isinstance(command, str), check=True, stdout=subprocess.DEVNULL)
    return {"seconds": time.perf_counter() - started}


def weighed(command: list[str]) -> dict[str, float]:
    """Returns all the memory that a command had, interpreter and imports included."""
    peaks = (0, 0)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peaks = tuple(map(max, zip(peaks, memory(process.pid), strict=True)))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise click.ClickException(f"{shlex.join(command[:4])} ... ended with status {process.returncode}")
    return {"anonymous_mib": peaks[0] / MIB, "file_mib": peaks[1] / MIB}


def interpreters(pythons: tuple[str, ...], weighting: str) -> tuple[dict[str, str], list[str]]:
    """Returns which interpreter has each rival, and a word on each that is left out."""
    found, left_out = {}, []
    for way, rival in RIVALS.items():
        python = next((python for python in (sys.executable, *pythons) if has_modules(python, rival.modules)), None)
        if python is None:
            left_out.append(f"{way} (not installed: {' and '.join(rival.modules)})")
        elif weighting != "mean":
            left_out.append(f"{way} (written for the mean alone)")
        else:
            found[way] = python
    return found, left_out


def make_rival_inputs(folder: Path, size_mb: float, count: int, rivals: dict[str, str]) -> dict[str, list[Path]]:
    """Writes what each rival reads into a folder of its own, where the same files serve all that can read them."""
    paths: dict[str, list[Path]] = {}
    for way, python in rivals.items():
        suffix = RIVALS[way].inputs
        into = folder / suffix
        if not into.exists():
            into.mkdir()
            subprocess.run([python, RIVALS_SCRIPT, "--make", into, str(size_mb), str(count), suffix], check=True)
        paths[way] = sorted(into.iterdir())
    return paths


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def compare(
    size_mb: float,
    count: int,
    suffix: str,
    weighting: str,
    repeats: int,
    slow: bool,
    rivals: dict[str, str],
    rival_inputs: dict[str, list[Path]],
    folder: Path,
) -> list[dict[str, object]]:
    """Returns a row for each way; the files are made and removed here, those of the rivals are the caller's."""
    making = [sys.executable, __file__, "--make", str(folder), "--size", str(size_mb), "--count", str(count)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([*making, "--format", suffix], check=True, env=environment, stderr=subprocess.DEVNULL)
    paths = sorted(folder.glob(f"member-*.{suffix}"))
    output = folder / f"average.{suffix}"
    copy = folder / "copy"
    outputs = [output, copy, *(folder / RIVALS[way].output for way in rivals)]
    average = [sys.executable, "-m", "streaming_polyak", "average"]
    command = [*average, *map(str, paths), "-o", str(output), "-w", weighting]
    # Each is called with whether its memory is sampled.
    ways: dict[str, Callable[[bool], dict[str, float]]] = {
        "cat": lambda weigh: timed(f"cat {shlex.join(map(str, paths))} > /dev/null"),
        "write": lambda weigh: timed("cat {0} > {1} && sync {1}".format(*map(shlex.quote, (str(paths[0]), str(copy))))),
        "ours": partial(measure, "ours", paths, output, weighting),
        "ours, the command": lambda weigh: weighed(command) if weigh else timed(command),
    }
    if suffix != "safetensors":
        ways["h5py, whole files"] = partial(measure, "h5py, whole files", paths, output, weighting)
    for way, python in rivals.items():
        program = [python, RIVALS_SCRIPT, way, folder / RIVALS[way].output, *rival_inputs[way]]
        ways[way] = partial(watched, way, program)
    if slow and suffix == "keras":
        ways |= {way: partial(measure, way, paths, output, weighting) for way in SLOW}
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    weights: dict[str, dict[str, float]] = {}
    for turn in range(repeats + 1):
        for way, work in ways.items():
            if way not in SLOW or turn <= 1:
                for path in outputs:  # removing an old file takes time that is not the average's
                    remove(path)
                os.sync()  # so that none waits for what another has left to be written
                if turn:
                    runs[way].append(work(False))
                else:
                    weights[way] = work(True)
    read = sum(path.stat().st_size for path in paths)
    median = {way: statistics.median(run["seconds"] for run in of) for way, of in runs.items()}
    rows: list[dict[str, object]] = []
    for way, of in runs.items():
        row: dict[str, object] = {
            "format": suffix,
            "size_mb": size_mb,
            "count": count,
            "weighting": weighting,
            "way": way,
            "seconds": median[way],
            "gb_per_second": read / 1e9 / median[way] if way != "write" else None,
            "times_cat": median[way] / median["cat"],
            "times_cat_and_write": median[way] / (median["cat"] + median["write"]),
            "runs": len(of),
        }
        for name in ("anonymous_mib", "file_mib"):
            row[name] = weights[way].get(name)
        rows.append(row)
    for path in [*paths, *outputs]:
        remove(path)
    return rows


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", "sizes", type=float, multiple=True, default=(10, 400), show_default=True, help="MB a file.")
@click.option("--huge", is_flag=True, help=f"Files of {HUGE_MB} MB too, without the rivals; they need 48 GB of disk.")
@click.option("--count", "counts", type=int, multiple=True, default=(10,), show_default=True, help="Files.")
@click.option(
    "--format", "formats", type=click.Choice(FORMATS), multiple=True, default=FORMATS, show_default="all of them"
)
@click.option("--weighting", default="mean", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--slow", is_flag=True, help="The ways that load models too (6 GB and minutes at 400 MB); once each.")
@click.option("--rivals/--no-rivals", "with_rivals", default=True, help="Run what other libraries have.")
@click.option("--python", "pythons", multiple=True, help="An interpreter that has torch or mergekit.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the files go. [default: a temporary folder]")
@click.option("--json", "as_json", is_flag=True)
@click.option("--child", hidden=True)
@click.option("--make", type=click.Path(path_type=Path), hidden=True)
@click.option("--output", type=click.Path(path_type=Path), hidden=True)
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="")
def main(
    sizes: tuple[float, ...],
    huge: bool,
    counts: tuple[int, ...],
    formats: tuple[str, ...],
    weighting: str,
    repeats: int,
    slow: bool,
    with_rivals: bool,
    pythons: tuple[str, ...],
    folder: Path | None,
    as_json: bool,
    child: str | None,
    make: Path | None,
    output: Path | None,
    paths: tuple[Path, ...],
) -> None:
    if child is not None and output is not None:
        run_child(child, list(paths), output, weighting)
        return
    if make is not None:
        make_members(make, sizes[0], counts[0], formats[0])
        return
    rivals, left_out = interpreters(pythons, weighting) if with_rivals else ({}, [])
    rows: list[dict[str, object]] = []
    for size in (*sizes, *(HUGE_MB,) * huge):
        for count in counts:
            base = Path(tempfile.mkdtemp(prefix="average-", dir=folder))
            try:
                here = rivals if size < HUGE_MB else {}
                inputs = make_rival_inputs(base, size, count, here)
                for suffix in formats:
                    rows += compare(size, count, suffix, weighting, repeats, slow, here, inputs, base)
            finally:
                shutil.rmtree(base)
    if as_json:
        click.echo(json.dumps({"machine": machine("numpy", "h5py"), "left_out": left_out, "rows": rows}, indent=1))
        return
    click.echo(
        f"{machine('numpy', 'h5py')}; files in the page cache, as far as they fit. Memory is the highest above the "
        "imports, that of the command all it had\n"
    )
    if left_out:
        click.echo(f"Left out: {', '.join(left_out)}.\n")
    header = {
        "format": "format", "size_mb": "MB a file", "count": "files", "way": "way", "seconds": "seconds",
        "gb_per_second": "GB/s", "times_cat": "x cat", "times_cat_and_write": "x (cat + write)",
        "anonymous_mib": "anonymous MiB", "file_mib": "file-backed MiB",
    }  # fmt: skip
    click.echo(
        tabulate(
            [[row[key] for key in header] for row in rows],
            list(header.values()),
            tablefmt="github",
            floatfmt=("", "g", "d", "", ".3f", ".2f", ".2f", ".2f", ".1f", ".1f"),
        )
    )


if __name__ == "__main__":
    main()
