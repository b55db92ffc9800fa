"""What saving a run costs: how long training waits for one save, how much memory that takes, what part of a run it is.

Each case runs in a child process of its own, which this one samples every 2 ms (RssAnon of /proc/PID/status). "stall"
is how long one save keeps the training waiting: with memory="low" it is written meanwhile, with memory="high" it is
copied and written while the training goes on. "write" is a file of the same bytes written and synced in blocks of
4 MiB, which no save can be quicker than. "of a run" is the stall every minute, which is how often a run is saved at
most if nobody says how often. All seconds are medians. With --whole, each size is trained for so many minutes at the
default, and then for as many epochs without a run folder: "in saves" is what part of the first run its saves took,
"longer" how much longer it took than the second.

    python scripts/benchmarks/save_run.py
    python scripts/benchmarks/save_run.py --whole 3
    python scripts/benchmarks/save_run.py --parameters 1e8 --repeats 3 --json
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
from measuring import MIB, SAMPLE_SECONDS, resident
from tabulate import tabulate

BLOCK_BYTES = 4 << 20
MINUTE = 60.0


def network(parameters: int) -> Any:
    """Returns a compiled network of four square layers with about so many parameters, and its width."""
    import keras

    width = max(2, int((parameters / 4) ** 0.5))
    model = keras.Sequential([keras.Input((width,)), *(keras.layers.Dense(width) for _ in range(4))])
    model.compile("adam", "mse")
    return model, width


def child(parameters: int, memory: str, repeats: int, folder: Path) -> None:
    """Trains a step, saves the run so many times, and prints what that took, after each line that it reads."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import numpy as np

    import streaming_polyak as sp
    from streaming_polyak.training.run import Run

    model, width = network(parameters)
    averages = {"mean": sp.Average(sp.MEAN), "linear": sp.Average(sp.LINEAR)}
    trainer = sp.Trainer(model, averages, run_dir=folder / "run", save_every="1 step", memory=memory)  # type: ignore[arg-type]
    x = np.zeros((repeats + 2, width), np.float32)
    stalls: list[float] = []
    save = Run.save

    def timed(self: Run, position: Any) -> None:
        if self._writing is not None:  # the last one: its own time is not this one's
            self._writing.result()
        if position.steps == 2:  # what comes first makes things
            print("before", resident(os.getpid())[0], flush=True)
            sys.stdin.readline()
        started = time.perf_counter()
        save(self, position)
        stalls.append(time.perf_counter() - started)
        if self._writing is not None:
            self._writing.result()

    Run.save = timed  # type: ignore[method-assign]
    trainer.fit(x, x, batch_size=1, epochs=1, progress=False)
    newest = sorted((folder / "run" / "checkpoints").iterdir())[-1]
    data = memoryview(bytes(BLOCK_BYTES))
    writes = []
    for _ in range(3):
        started = time.perf_counter()
        with (folder / "plain").open("wb", buffering=0) as file:
            left = newest.stat().st_size
            while left:
                left -= file.write(data[: min(left, BLOCK_BYTES)])
            os.fsync(file.fileno())
        writes.append(time.perf_counter() - started)
        (folder / "plain").unlink()
    print(
        "after",
        json.dumps([statistics.median(stalls[2:]), newest.stat().st_size, statistics.median(writes)]),
        flush=True,
    )


def whole_child(parameters: int, minutes: float, folder: Path) -> None:
    """Trains with a run folder at the default and then as long without; prints what the saves took."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras
    import numpy as np

    import streaming_polyak as sp
    from streaming_polyak.training.run import Run

    saves: list[float] = []
    save = Run.save

    def timed(self: Run, position: Any) -> None:
        started = time.perf_counter()
        save(self, position)
        saves.append(time.perf_counter() - started)

    Run.save = timed  # type: ignore[method-assign]

    class Until(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.epochs = epoch + 1
            if time.perf_counter() > started + MINUTE * minutes:
                self.model.stop_training = True

    seconds, until, epochs, first = [], Until(), 10**6, 2  # the first epochs trace and compile
    for run_dir in (folder / "run", None):
        keras.utils.set_random_seed(0)
        model, width = network(parameters)
        averages = {"mean": sp.Average(sp.MEAN), "linear": sp.Average(sp.LINEAR)}
        x = np.random.default_rng(0).normal(size=(3200, width)).astype(np.float32)
        trainer = sp.Trainer(model, averages, run_dir=run_dir)
        options = {"batch_size": 32, "callbacks": [until], "progress": False}
        started = math.inf  # so that nothing is stopped by the clock
        trainer.fit(x, x, epochs=first, **options)
        saves.clear()
        began = time.perf_counter()
        started = began if run_dir else math.inf
        trainer.fit(x, x, epochs=epochs, initial_epoch=0 if run_dir else first, **options)
        seconds.append(time.perf_counter() - began)
        if run_dir:
            epochs, counted, in_saves = until.epochs, len(saves), sum(saves)
    print(json.dumps([seconds, counted, in_saves, epochs]), flush=True)


def measure(parameters: int, memory: str, repeats: int) -> dict[str, Any]:
    """Runs a child and samples its memory while it saves."""
    with tempfile.TemporaryDirectory(prefix="save_run-", dir=".") as folder:
        program = [sys.executable, __file__, "--child", str(parameters), memory, str(repeats), folder]
        with subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            before = int(process.stdout.readline().split()[1])
            peak, answer = before, [""]
            reader = threading.Thread(target=lambda: answer.__setitem__(0, process.stdout.readline()))  # type: ignore[union-attr]
            reader.start()
            process.stdin.write("\n")
            process.stdin.flush()
            while reader.is_alive():
                peak = max(peak, resident(process.pid)[0])
                time.sleep(SAMPLE_SECONDS)
        stall, size, write = json.loads(answer[0].partition(" ")[2])
    return {
        "parameters": parameters,
        "memory": memory,
        "saved_mib": size / MIB,
        "write_seconds": write,
        "stall_seconds": stall,
        "times_write": stall / write,
        "percent_of_a_run": 100 * stall / MINUTE,
        "passing_mib": max(0, peak - before) / MIB,
    }


def measure_whole(parameters: int, minutes: float) -> dict[str, Any]:
    """Trains with and without a run folder in a child."""
    with tempfile.TemporaryDirectory(prefix="save_run-", dir=".") as folder:
        program = [sys.executable, __file__, "--whole-child", str(parameters), str(minutes), folder]
        run = subprocess.run(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    (with_folder, without), saves, in_saves, epochs = json.loads(run.stdout)
    return {
        "parameters": parameters,
        "epochs": epochs,
        "saves": saves,
        "seconds": with_folder,
        "percent_in_saves": 100 * in_saves / with_folder,
        "percent_longer": 100 * (with_folder / without - 1),
    }


def _report_whole(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    click.echo(
        f"{platform.platform()}, {os.cpu_count()} processors; Adam and two averages of epochs, default save_every\n"
    )
    table = [
        [f"{row['parameters']:,}", f"{row['epochs']:,}", row["saves"], f"{row['seconds']:.1f}",
         f"{row['percent_in_saves']:.2f}", f"{row['percent_longer']:.2f}"]
        for row in rows
    ]  # fmt: skip
    header = ["parameters", "epochs", "saves", "seconds", "% in saves", "% longer"]
    click.echo(tabulate(table, header, tablefmt="github", disable_numparse=True))


@click.command()
@click.option("--parameters", "sizes", multiple=True, default=("1e3", "1e7"), show_default=True, help="Of the model.")
@click.option("--repeats", type=click.IntRange(1), default=7, show_default=True, help="Saves in each case.")
@click.option("--whole", type=click.FloatRange(0, min_open=True), metavar="MINUTES", help="Measure whole runs instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def main(sizes: tuple[str, ...], repeats: int, whole: float | None, as_json: bool) -> None:
    """Measure what saving a run costs."""
    if whole is not None:
        _report_whole([measure_whole(int(float(size)), whole) for size in sizes], as_json)
        return
    rows = [measure(int(float(size)), memory, repeats) for size in sizes for memory in ("low", "high")]
    foreground = {row["parameters"]: row["stall_seconds"] for row in rows if row["memory"] == "low"}
    for row in rows:
        row["times_low"] = row["stall_seconds"] / foreground[row["parameters"]]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    click.echo(f"{platform.platform()}, {os.cpu_count()} processors; Adam and two averages of epochs\n")
    table = [
        [
            f"{row['parameters']:,}", row["memory"], f"{row['saved_mib']:.1f}", f"{row['write_seconds']:.4f}",
            f"{row['stall_seconds']:.4f}", f"{row['times_write']:.2f}", f"{row['times_low']:.2f}",
            f"{row['percent_of_a_run']:.2f}", f"{row['passing_mib']:.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    header = [
        "parameters",
        "memory",
        "MiB saved",
        "write s",
        "stall s",
        "x write",
        "x low",
        "% of a run",
        "passing MiB",
    ]
    click.echo(tabulate(table, header, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--whole-child"]:
        whole_child(int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]))
    elif sys.argv[1:2] == ["--child"]:
        child(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))
    else:
        main()
