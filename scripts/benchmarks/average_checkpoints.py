"""Averages checkpoints of a Keras model in several ways, next to what reading and writing the files takes at least.

Each way runs in a child process of its own; this one samples its memory every 2 ms (RssAnon and RssFile of
/proc/PID/status). Imports come before the clock starts and before the memory that is counted from, except for the
command, which is timed as a whole process. All ways take turns; shown is the median. "cat + write" is the time of
`cat FILES > /dev/null` plus that of writing one such file and syncing it, as every way of ours syncs what it writes.

    python scripts/benchmarks/average_checkpoints.py
    python scripts/benchmarks/average_checkpoints.py --size 400 --count 10 --repeats 5 --slow
    python scripts/benchmarks/average_checkpoints.py --size 400 --format weights.h5 --weighting linear --json
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
from tabulate import tabulate

MIB = 2**20
SAMPLE_SECONDS = 0.002
LAYERS = 10
WIDTH_BYTES = 4


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
    import keras
    import numpy as np

    width = max(2, int((size_mb * 1e6 / WIDTH_BYTES / LAYERS) ** 0.5))
    model = keras.Sequential([keras.Input((width,)), *(keras.layers.Dense(width) for _ in range(LAYERS))])
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        for variable in model.variables:
            variable.assign(rng.standard_normal(variable.shape, dtype=np.float32))
        path = folder / f"member-{i:03}.{suffix}"
        model.save_weights(path) if suffix == "weights.h5" else model.save(path)
        paths.append(path)
    return paths


def memory(pid: int) -> tuple[int, int]:
    """Returns anonymous and file-backed resident bytes of a process; zeros when it is gone."""
    try:
        with open(f"/proc/{pid}/status") as status:
            rows = {line.split()[0]: line.split() for line in status}
        return int(rows["RssAnon:"][1]) * 1024, int(rows["RssFile:"][1]) * 1024
    except (OSError, KeyError):
        return 0, 0


def run_child(way: str, paths: list[Path], output: Path, weighting: str) -> None:
    """Imports, waits for a line, works, prints the seconds."""
    work, modules = WAYS[way]
    for module in modules:
        importlib.import_module(module)
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    work(paths, output, weighting)
    print(time.perf_counter() - started, flush=True)


def measure(way: str, paths: list[Path], output: Path, weighting: str) -> dict[str, float]:
    """Runs a way in a child process; returns seconds and MiB of memory above what its imports took."""
    arguments = [sys.executable, __file__, "--child", way, "--weighting", weighting, "--output", output, *paths]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise click.ClickException(f"{way!r} ended early with status {process.wait()}")
        before, samples = memory(process.pid), []
        process.stdin.write("go\n")
        process.stdin.flush()
        os.set_blocking(process.stdout.fileno(), False)
        while not (said := process.stdout.readline()) and process.poll() is None:
            samples.append(memory(process.pid))
            time.sleep(SAMPLE_SECONDS)
        if not said:
            raise click.ClickException(f"{way!r} failed with status {process.wait()}")
    peaks = [max(values) - start for values, start in zip(zip(*samples, strict=True), before, strict=True)]
    return {"seconds": float(said), "anonymous_mib": peaks[0] / MIB, "file_mib": max(0, peaks[1]) / MIB}


def timed(command: list[str] | str) -> dict[str, float]:
    """Times a command as a whole process."""
    started = time.perf_counter()
    subprocess.run(command, shell=isinstance(command, str), check=True, stdout=subprocess.DEVNULL)
    return {"seconds": time.perf_counter() - started}


def compare(
    size_mb: float, count: int, suffix: str, weighting: str, repeats: int, slow: bool, folder: Path
) -> list[dict[str, object]]:
    """Returns a row for each way; the files are made and removed here."""
    making = [sys.executable, __file__, "--make", str(folder), "--size", str(size_mb), "--count", str(count)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([*making, "--format", suffix], check=True, env=environment, stderr=subprocess.DEVNULL)
    paths = sorted(folder.glob(f"member-*.{suffix}"))
    output = folder / f"average.{suffix}"
    copy = folder / "copy"
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "cat": lambda: timed(f"cat {shlex.join(map(str, paths))} > /dev/null"),
        "write": lambda: timed("cat {0} > {1} && sync {1}".format(*map(shlex.quote, (str(paths[0]), str(copy))))),
        "ours": lambda: measure("ours", paths, output, weighting),
        "ours, the command": lambda: timed(
            [sys.executable, "-m", "streaming_polyak", "average", *map(str, paths), "-o", str(output), "-w", weighting]
        ),
        "h5py, whole files": lambda: measure("h5py, whole files", paths, output, weighting),
    }
    if slow and suffix == "keras":
        ways |= {way: lambda way=way: measure(way, paths, output, weighting) for way in SLOW}
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn in range(repeats):
        for way, work in ways.items():
            if way not in SLOW or turn == 0:
                copy.unlink(missing_ok=True)
                output.unlink(missing_ok=True)  # removing an old file takes time that is not the average's
                runs[way].append(work())
    copy.unlink(missing_ok=True)
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
            row[name] = max(run[name] for run in of) if name in of[0] else None
        rows.append(row)
    for path in [*paths, output]:
        path.unlink(missing_ok=True)
    return rows


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", "sizes", type=float, multiple=True, default=(10, 400), show_default=True, help="MB a file.")
@click.option("--count", "counts", type=int, multiple=True, default=(10,), show_default=True, help="Files.")
@click.option(
    "--format", "formats", type=click.Choice(["keras", "weights.h5"]), multiple=True, default=("keras", "weights.h5")
)
@click.option("--weighting", default="mean", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--slow", is_flag=True, help="The ways that load models too (6 GB and minutes at 400 MB); once each.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the files go. [default: a temporary folder]")
@click.option("--json", "as_json", is_flag=True)
@click.option("--child", hidden=True)
@click.option("--make", type=click.Path(path_type=Path), hidden=True)
@click.option("--output", type=click.Path(path_type=Path), hidden=True)
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="")
def main(
    sizes: tuple[float, ...],
    counts: tuple[int, ...],
    formats: tuple[str, ...],
    weighting: str,
    repeats: int,
    slow: bool,
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
    base = Path(tempfile.mkdtemp(prefix="average-", dir=folder))
    try:
        rows = [
            row
            for size in sizes
            for count in counts
            for suffix in formats
            for row in compare(size, count, suffix, weighting, repeats, slow, base)
        ]
    finally:
        shutil.rmtree(base)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    import h5py
    import numpy as np

    click.echo(
        f"{platform.platform()}, {os.cpu_count()} processors, Python {platform.python_version()}, NumPy "
        f"{np.__version__}, h5py {h5py.__version__}; page cache warm; memory above imports, at its highest\n"
    )
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
