"""Reads the checkpoints of a run and averages them while the run saves new ones as fast as it can and removes old ones.

    python scripts/read_while_saving.py 60

One process saves; every number in the checkpoint of step k is k. Others take the latest checkpoint, or average the
three newest. Each must get a whole checkpoint, or the mean of whole ones, or be told by name that a file is gone or
was touched meanwhile; numbers of two checkpoints in one result would be a mixed read.
"""

from __future__ import annotations

import collections
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import click
import numpy as np
from safetensors.numpy import load_file

from streaming_polyak import CheckpointError, average_checkpoints
from streaming_polyak.files.run_checkpoint import Part
from streaming_polyak.files.run_folder import RunFolder

SHAPES = {"model/kernel": (300, 40), "model/bias": (40,), "average/mean/kernel": (300, 40)}


def save(folder: Path, stop: Event, counts: multiprocessing.Queue[dict[str, int]]) -> None:
    """Saves checkpoint after checkpoint; the older ones are removed."""
    run, step = RunFolder(folder, keep=10), 0
    with run.lock():
        while not stop.is_set():
            step += 1
            parts = [Part.of(name, np.full(shape, step, np.float32)) for name, shape in SHAPES.items()]
            run.commit(step, parts, {"epoch": step}, save=step)
    counts.put({"saves": step})


def latest(run: RunFolder, scratch: Path) -> str:
    """Takes the latest checkpoint; says what became of it."""
    newest = run.saved()[-1].step
    checkpoint = run.latest()
    if checkpoint is None:
        return "none"
    try:
        with checkpoint:
            found = {float(value) for name in SHAPES for value in np.unique(checkpoint.read(name))}
    except CheckpointError as error:
        return _refusal(error, run)
    if found != {float(checkpoint.step)}:
        return "MIXED"
    return "whole" if checkpoint.step >= newest else "older"


def _refusal(error: CheckpointError, run: RunFolder) -> str:
    named = Path(error.path).parent == run.checkpoints_folder
    return "gone" if error.code in ("missing", "changed") and named else f"UNEXPECTED {error.code}"


def average(run: RunFolder, scratch: Path) -> str:
    """Averages the newest checkpoints; says what became of it."""
    saved = run.saved()[-3:]
    try:
        average_checkpoints([entry.path for entry in saved], scratch / "mean.safetensors", overwrite=True)
    except CheckpointError as error:
        return _refusal(error, run)
    mean = np.float32(np.mean([entry.step for entry in saved]))
    whole = all((array == mean).all() for array in load_file(scratch / "mean.safetensors").values())
    return "whole" if whole else "MIXED"


def read(
    folder: Path,
    how: Callable[[RunFolder, Path], str],
    stop: Event,
    counts: multiprocessing.Queue[dict[str, int]],
) -> None:
    """Reads again and again, and counts what became of it."""
    run, found = RunFolder(folder), collections.Counter[str]()
    with tempfile.TemporaryDirectory(prefix="read_while_saving-") as scratch:
        while not stop.is_set():
            found[f"{how.__name__}: {how(run, Path(scratch))}"] += 1
    counts.put(dict(found))


@click.command()
@click.argument("seconds", type=click.FloatRange(0, min_open=True))
@click.option("--readers", type=click.IntRange(1), default=2, show_default=True, help="Of each of the two kinds.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def main(seconds: float, readers: int, as_json: bool) -> None:
    """Read for SECONDS while checkpoints come and go; exit status 1 if anything but whole ones was read."""
    context = multiprocessing.get_context("spawn")
    stop, counts = context.Event(), context.Queue()
    found: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="read_while_saving-") as made:
        folder = Path(made)
        processes = [context.Process(target=save, args=(folder, stop, counts))]
        processes += [
            context.Process(target=read, args=(folder, how, stop, counts))
            for how in (latest, average)
            for _ in range(readers)
        ]
        processes[0].start()
        while not RunFolder(folder).saved():
            if not processes[0].is_alive():
                raise click.ClickException("the process that saves has ended.")
            time.sleep(0.01)
        for process in processes[1:]:
            process.start()
        time.sleep(seconds)
        stop.set()
        failed = 0
        for process in processes:
            process.join()
            failed += process.exitcode != 0
        for _ in range(len(processes) - failed):
            found.update(counts.get(timeout=10))  # few names: what they are fits in the pipe
    bad = failed + sum(count for name, count in found.items() if not name.endswith(("saves", "whole", "older", "gone")))
    if as_json:
        click.echo(json.dumps({"counts": dict(found), "failed": failed, "bad": bad}, indent=1))
    else:
        click.echo("\n".join(f"{count:8,} {name}" for name, count in sorted(found.items())))
        click.echo("nothing but whole checkpoints was read" if not bad else f"WRONG: {bad}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
