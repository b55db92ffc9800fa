"""Measures the anonymous memory of one update of three averages: before it, at its peak, and after it.

Each case runs in a child process of its own, which this one samples every 2 ms (RssAnon of /proc/PID/status: memory
that is not backed by files). The first update, in which the averages' memory is written for the first time and compiled
functions are built, is shown apart from the second, which stands for all later ones. Seconds are the median of the
updates after it, and are given next to one numpy.copyto of the model in the same process. What Numba and its loop take,
once, whatever the model (units of epochs, where it is installed), is told by itself.

    python scripts/benchmarks/update_memory.py
    python scripts/benchmarks/update_memory.py --case 1e6x10 --unit epoch --json
"""

from __future__ import annotations

import json
import os
import platform
import select
import statistics
import subprocess
import sys
import time

import click
from measuring import MIB, SAMPLE_SECONDS, model_of_vectors, resident
from tabulate import tabulate


def run_child(parameters: int, tensors: int, unit: str, repeats: int) -> None:
    """Builds a model and its averages, then makes one update for each line it reads."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras
    import numpy as np
    import tensorflow as tf

    from streaming_polyak import LINEAR, MEAN, Average, Exponential
    from streaming_polyak.training.accumulators import view
    from streaming_polyak.training.averages import Averages
    from streaming_polyak.training.kernels import compiled_loop, finish_compiling

    model = model_of_vectors(parameters, tensors)
    before = resident(os.getpid())[0]
    if unit == "epoch":
        single = np.dtype(np.float32)
        for loop in (("check", single), ("plain", single, single)):
            compiled_loop(*loop)
        finish_compiling()
    numba_bytes = resident(os.getpid())[0] - before
    weightings = {"mean": MEAN, "linear": LINEAR, "exponential": Exponential(decay=0.999)}
    averages = Averages(model, {name: Average(weighting, unit=unit) for name, weighting in weightings.items()})
    compiled = tf.function(averages.step_update, autograph=False) if unit == "step" else None
    number = 0

    def update() -> float:
        nonlocal number
        started = time.perf_counter()
        if compiled is None:
            averages.update_epoch(number, number)
        else:
            compiled(tf.constant(number, tf.int64))
        number += 1
        return time.perf_counter() - started

    seconds = []
    for _ in range(2):
        print("ready", flush=True)
        sys.stdin.readline()
        seconds.append(update())
        print("done", flush=True)
        sys.stdin.readline()
    later = [update() for _ in range(repeats)]
    copies = []
    sources = [view(v) for v in model.variables]
    targets = [np.empty_like(source) for source in sources]
    for _ in range(repeats):
        started = time.perf_counter()
        for target, source in zip(targets, sources, strict=True):
            np.copyto(target, source)
        copies.append(time.perf_counter() - started)
    print(
        json.dumps(
            {
                "first_seconds": seconds[0],
                "seconds": statistics.median(later),
                "copy_seconds": statistics.median(copies),
                "numba_mib": numba_bytes / MIB,
                "versions": {"tensorflow": tf.__version__, "keras": keras.__version__, "numpy": np.__version__},
            }
        ),
        flush=True,
    )


def measure(parameters: int, tensors: int, unit: str, repeats: int) -> dict[str, object]:
    """Runs one case and returns its row; memory in MiB."""
    arguments = [sys.executable, __file__, "--child", f"{parameters}x{tensors}", "--unit", unit]
    process = subprocess.Popen(
        [*arguments, "--repeats", str(repeats)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def line() -> str:
        text = process.stdout.readline().strip()
        if not text:
            raise click.ClickException(f"the measured process ended early, status {process.wait()}")
        return text

    row: dict[str, object] = {"parameters": parameters, "tensors": tensors, "unit": unit}
    for prefix in ("first_", ""):
        assert line() == "ready"
        before = peak = resident(process.pid)[0]
        samples = 0
        process.stdin.write("\n")
        while not select.select([process.stdout], [], [], SAMPLE_SECONDS)[0]:
            peak = max(peak, resident(process.pid)[0])
            samples += 1
        assert line() == "done"
        after = resident(process.pid)[0]
        peak = max(peak, after)
        row |= {
            f"{prefix}before_mib": before / MIB,
            f"{prefix}peak_mib": peak / MIB,
            f"{prefix}after_mib": after / MIB,
            f"{prefix}passing_mib": (peak - max(before, after)) / MIB,
            f"{prefix}samples": samples,
        }
        process.stdin.write("\n")
    row |= json.loads(line())
    process.wait()
    return row


@click.command(help=__doc__)
@click.option("--case", "cases", multiple=True, help="PARAMETERSxTENSORS. [default: 1e8x20 and 1e7x1000]")
@click.option("--unit", "units", multiple=True, type=click.Choice(["epoch", "step"]), help="[default: both]")
@click.option("--repeats", default=5, show_default=True, help="Updates timed after the first two.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
@click.option("--child", hidden=True)
def main(cases: tuple[str, ...], units: tuple[str, ...], repeats: int, as_json: bool, child: str | None) -> None:
    """See the module."""

    def sizes(case: str) -> tuple[int, int]:
        parameters, _, tensors = case.partition("x")
        return int(float(parameters)), int(tensors)

    if child is not None:
        run_child(*sizes(child), units[0], repeats)
        return
    rows = [
        measure(*sizes(case), unit, repeats)
        for case in cases or ("1e8x20", "1e7x1000")
        for unit in units or ("epoch", "step")
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    click.echo(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items())
        + "; three averages (mean, linear, exponential), float32\n"
    )
    click.echo("Anonymous memory in MiB; 'passing' is the peak above what was there before and after.")
    click.echo(f"Numba and its loop, in what was there before: {max(row['numba_mib'] for row in rows):.1f} MiB.\n")
    click.echo(
        tabulate(
            [
                [
                    f"{row['parameters']:.0e}", row["tensors"], row["unit"], which or "later",
                    row[f"{which}before_mib"], row[f"{which}peak_mib"], row[f"{which}after_mib"],
                    row[f"{which}passing_mib"], f"{row['first_seconds' if which else 'seconds']:.3f}",
                    "" if which else f"{row['seconds'] / row['copy_seconds']:.1f}",
                ]
                for row in rows
                for which in ("first_", "")
            ],
            ["parameters", "tensors", "unit", "update", "before", "peak", "after", "passing", "seconds", "x copy"],
            floatfmt=".1f",
        ).replace("first_", "first ")
    )  # fmt: skip


if __name__ == "__main__":
    main()
