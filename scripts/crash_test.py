"""Kills a training run at random moments, again and again, and compares what it ends with to a run that nobody killed.

    python scripts/crash_test.py 20
    python scripts/crash_test.py 200 --fork
    python scripts/crash_test.py 100 --fork --signal TERM
    python scripts/crash_test.py 10 --fork --signal TERM --grace 0.02

The run is a small network with dropout and batch normalisation, Adam, averages of epochs and of steps, validation and
a callback with a memory, saved at every third step. A child process trains; it is sent SIGKILL after a random time, and
then the next child goes on with what is on the disk. In the end the SHA-256 of all weights, optimizer slots, averages,
counters, random states and the history are compared. Each child starts Python anew, so that imports are hit too; with
--fork it is a fork of a process that has imported TensorFlow but not used it, which is quicker. With --grace it is sent
SIGKILL when it has not come to its end so long after the first signal, as schedulers do.
"""

from __future__ import annotations

import collections
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import click

PHASES = ("import", "tracing", "step", "validation", "averaging", "save", "between")
_EXIT_SECONDS = 60.0  # a child that was sent SIGTERM has so long to save and end


def make(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Returns a trainer and the arguments of its fit, as `streaming-polyak train` wants them."""
    import keras
    import numpy as np

    import streaming_polyak as sp

    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(16),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(0.3),
            layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.003), loss, metrics=["accuracy"])
    averages = {
        "mean": sp.Average(sp.MEAN, start=2),
        "linear": sp.Average(sp.LINEAR),
        "ema": sp.Average(sp.Exponential(decay=0.99), unit="step"),
    }
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 6)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64) + (x[:, 1] > 0)
    trainer = sp.Trainer(model, averages, seed=5, run_dir=folder, save_every="3 steps")
    slower = keras.callbacks.ReduceLROnPlateau("val_loss[mean]", factor=0.9, patience=2)
    fit = {"x": x[:120], "y": y[:120], "batch_size": 16, "validation_data": (x[120:], y[120:]), "callbacks": [slower]}
    return trainer, fit


def digest(trainer: Any) -> str:
    """Returns the SHA-256 of everything that a run ends with."""
    import hashlib

    found = hashlib.sha256()
    for name, slot in {**trainer._slots(), **_random_slots()}.items():
        # Metrics are what the last validation left; TensorFlow begins its generator with another state in each process.
        if not name.startswith(("metrics/", "random/tensorflow")):
            found.update(name.encode() + slot.read().tobytes())
    found.update(json.dumps([trainer.history.epoch, trainer.history.history], sort_keys=True).encode())
    return found.hexdigest()


def _random_slots() -> dict[str, Any]:
    from streaming_polyak.training.state import random_slots

    return random_slots()


def child(folder: Path, epochs: int, phases: mmap.mmap) -> None:
    """Trains to the end, if nobody kills it; notes in which phase it is, and in the end the digest, in a file."""
    from streaming_polyak.training.run import Run
    from streaming_polyak.training.trainer import Trainer

    def noting(phase: str, owner: type, method: str) -> None:
        real = getattr(owner, method)

        def call(*args: Any, **options: Any) -> Any:
            before = phases[0]
            phases[0] = PHASES.index(phase)
            try:
                return real(*args, **options)
            finally:
                phases[0] = before

        setattr(owner, method, call)

    phases[0] = PHASES.index("tracing")
    noting("validation", Trainer, "_validate")
    noting("averaging", Trainer, "_average")
    noting("save", Run, "save")
    real = Run.after_steps

    def after_steps(self: Any, position: Any) -> None:
        phases[0] = PHASES.index("step")
        real(self, position)

    Run.after_steps = after_steps  # type: ignore[method-assign]
    trainer, fit = make(folder)
    trainer.fit(**fit, epochs=epochs, progress=False)
    (folder / "digest").write_text(digest(trainer))


class Children:
    """Starts children that train; by a fork of this process, or each with a Python of its own."""

    def __init__(self, fork: bool, epochs: int) -> None:
        self._fork, self._epochs = fork, epochs
        self._phases = mmap.mmap(-1, 1) if fork else None
        self._file = tempfile.NamedTemporaryFile(prefix="crash_test-")  # noqa: SIM115  # as long as this object
        self._file.write(b"\0")
        self._file.flush()
        self._shared = mmap.mmap(self._file.fileno(), 1)
        if fork:
            import keras  # noqa: F401
            import tensorflow  # noqa: F401

            import streaming_polyak.training.trainer  # noqa: F401

    @property
    def phase(self) -> str:
        """Where the child is, or was when it was killed."""
        return PHASES[self._shared[0]]

    def start(self, folder: Path) -> int:
        """Returns the number of a new process."""
        self._shared[0] = PHASES.index("import")
        if not self._fork:
            program = [sys.executable, __file__, "--child", str(folder), str(self._epochs), self._file.name]
            return subprocess.Popen(program, stderr=subprocess.DEVNULL).pid
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                child(folder, self._epochs, self._shared)
                status = 0
            except SystemExit as error:
                status = int(error.code or 0)
            finally:
                os._exit(status)
        return pid


def _wait(pid: int, seconds: float) -> int | None:
    """Returns how a child ended, as `subprocess` has it; `None` if it has not in so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


@click.command()
@click.argument("runs", type=click.IntRange(1), metavar="KILLS")
@click.option("--fork", is_flag=True, help="Fork the children from a process that has imported TensorFlow.")
@click.option("--signal", "name", type=click.Choice(["KILL", "TERM", "INT"]), default="KILL", show_default=True)
@click.option("--grace", type=click.FloatRange(0), metavar="SECONDS", help="From the signal to a SIGKILL.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the moments.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(runs: int, fork: bool, name: str, grace: float | None, seed: int, as_json: bool) -> None:
    """Kill a run KILLS times; exit status 1 if it does not end with the bits of one that nobody killed."""
    number, moments = signal.Signals[f"SIG{name}"], random.Random(seed)
    epochs = 20 + 7 * runs  # so much that it is not through before it has been killed so often
    children = Children(fork, epochs)
    hits: collections.Counter[str] = collections.Counter()
    bad: list[str] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="crash_test-") as made:
        whole, broken = Path(made) / "whole", Path(made) / "broken"
        began = time.monotonic()
        status = _wait(children.start(whole), 3600)
        longest = time.monotonic() - began
        if status != 0:
            raise click.ClickException(f"the run that nobody kills ended with the status {status}.")
        kills = starts = overdue = 0
        reached: list[int] = []
        status = None
        # A kill when little is left of the run would find it ended: the moment is chosen over what a start takes.
        seconds = longest if runs < 3 else min(longest, 2.2 if fork else 14.0)
        while True:
            pid = children.start(broken)
            starts += 1
            status = None if kills == runs else _wait(pid, moments.uniform(0, seconds))
            if kills == runs:
                status = _wait(pid, 3600)
            if status is not None:
                if status != 0:
                    bad.append(f"start {starts} ended with the status {status}")
                break
            hits[children.phase] += 1
            os.kill(pid, number)
            kills += 1
            ended = _wait(pid, _EXIT_SECONDS if grace is None else grace)
            expected = {-number} if name == "KILL" else {-number, 128 + number}
            if ended is None and grace is not None:
                os.kill(pid, signal.SIGKILL)
                ended = _wait(pid, _EXIT_SECONDS)
                expected = {*expected, -signal.SIGKILL}  # it may just have come to its end
                overdue += 1
            if ended not in expected:
                bad.append(f"kill {kills} in {children.phase}: status {ended}, expected one of {sorted(expected)}")
            saved = (broken / "checkpoints").glob("step-*.safetensors")
            reached.append(max((int(path.stem[5:]) for path in saved), default=0))
        digests = [
            (folder / "digest").read_text() if (folder / "digest").exists() else "none" for folder in (whole, broken)
        ]
        shutil.rmtree(broken, ignore_errors=True)
    if reached != sorted(reached):
        bad.append("the newest checkpoint went back")
    if digests[0] != digests[1]:
        bad.append("the bits differ")
    result = {
        "signal": f"SIG{name}",
        "kills": kills,
        "overdue": overdue,
        "starts": starts,
        "resumes": max(0, starts - 1),
        "hits": {phase: hits[phase] for phase in PHASES if hits[phase]},
        "epochs": epochs,
        "sha256": digests,
        "seconds": round(time.monotonic() - started, 1),
        "bad": bad,
    }
    _report(result, as_json, click.echo)
    if bad:
        sys.exit(1)


def _report(result: dict[str, Any], as_json: bool, echo: Callable[[str], None]) -> None:
    if as_json:
        echo(json.dumps(result, indent=1))
        return
    where = ", ".join(f"{phase} {count}" for phase, count in result["hits"].items())
    overdue = f" ({result['overdue']} not through in time: SIGKILL)" if result["overdue"] else ""
    echo(f"{result['kills']} times {result['signal']}{overdue}, {result['starts']} starts, {result['seconds']} s")
    echo(f"hit: {where}")
    echo(f"nobody killed it   SHA-256 {result['sha256'][0]}")
    echo(f"killed and resumed SHA-256 {result['sha256'][1]}")
    echo("the same bits" if not result["bad"] else "\n".join(["WRONG:", *result["bad"]]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        with open(sys.argv[4], "r+b") as shared:
            child(Path(sys.argv[2]), int(sys.argv[3]), mmap.mmap(shared.fileno(), 1))
    else:
        main()
