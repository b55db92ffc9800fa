"""The command line: thin over the library; TensorFlow is imported only by commands that train or evaluate.

Exit status: 0 done; 1 the work could not be done, with the reason on the error output; 2 wrong usage; 143 ended
by SIGTERM.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import click

from streaming_polyak import __version__
from streaming_polyak.errors import CheckpointError, StreamingPolyakError
from streaming_polyak.files.average import average_checkpoints
from streaming_polyak.files.formats import open_checkpoint
from streaming_polyak.files.formats.drafts import check_structure, format_of, record
from streaming_polyak.files.formats.hdf5 import Parser
from streaming_polyak.files.inputs import find_checkpoints
from streaming_polyak.files.inspection import inspect_checkpoints
from streaming_polyak.files.meter import parse_bytes
from streaming_polyak.files.run_folder import RunFolder
from streaming_polyak.files.run_status import run_status
from streaming_polyak.files.storage import same_file
from streaming_polyak.files.sweep import MAX_POWER, sweep_checkpoints
from streaming_polyak.files.tensors import TensorTable, is_optimizer
from streaming_polyak.files.verify import verify_checkpoint
from streaming_polyak.user_code import Error, load, safe, told
from streaming_polyak.weighting import LINEAR, MEAN, Exponential, Polynomial, Weighting, parse_weighting


def _say(text: str, *, err: bool = False) -> None:
    click.echo(safe(text), err=err)


def _words(error: Exception) -> str:
    return (
        str(error).replace("pass overwrite=True", "give --overwrite").replace("Pass overwrite=True", "Give --overwrite")
    )


@contextlib.contextmanager
def _cleaning_up_when_terminated() -> Iterator[None]:
    """Lets SIGTERM end the block as an exception does, so that no temporary file stays."""
    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # a second one must not end the cleaning up
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Group(click.Group):
    """Turns the library's errors into one line and exit status 1."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            with _cleaning_up_when_terminated():
                return super().invoke(ctx)
        except (StreamingPolyakError, ValueError, OSError, ImportError) as error:
            raise Error(_words(error)) from error
        except RecursionError as error:
            raise Error("What is said in one of the files is nested too deeply to be shown.") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def main() -> None:
    """Averages of a network's weights: of saved checkpoints here, and kept up to date while it trains.

    \b
    Average what is saved:   streaming-polyak average run/*.keras --output average.keras
    Find out what to average: streaming-polyak sweep run/*.keras --evaluate score.py:evaluate
    Look at a file:          streaming-polyak inspect average.keras

    Train, killed or not:    streaming-polyak train job.py:make --run-dir runs/1

    To train in a script of your own, import the loop: from streaming_polyak import Trainer.
    """  # noqa: D301  # \b is a backspace here: click then keeps the lines as they are


def _parsed(parse: Callable[[str], Any]) -> Callable[..., Any]:
    """Returns a callback for an option that reads its text, or each of its texts; a ValueError is wrong usage."""

    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        try:
            if isinstance(value, tuple):
                return tuple(parse(text) for text in value)
            return None if value is None else parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from error

    return callback


def _sweepable(text: str) -> Weighting:
    weighting = parse_weighting(text)
    if isinstance(weighting, Polynomial) and weighting.power > MAX_POWER:
        raise ValueError(f"Expected a power of at most {MAX_POWER}, as each takes memory; got {text}.")
    return weighting


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is not a list of numbers such as 0.5,0.3,0.2") from None
    if not all(0 <= number < math.inf for number in numbers):
        raise ValueError(f"{text!r} has a number that is no weight: negative, infinite or NaN")
    if not any(numbers):
        raise ValueError(f"{text!r} has no weight above 0")
    return numbers


def _check_count(weights: tuple[float, ...], checkpoints: tuple[str, ...], last: int | None) -> None:
    count = len(find_checkpoints(checkpoints, last=last))
    if len(weights) != count:
        numbers = "1 number" if len(weights) == 1 else f"{len(weights)} numbers"
        there = "1 checkpoint" if count == 1 else f"{count} checkpoints"
        raise click.UsageError(f"--weights has {numbers} for {there}. Give one for each, oldest first.")


_PATH = click.Path(path_type=Path)
_checkpoints = click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...")
_last = click.option("--last", type=click.IntRange(1), metavar="N", help="Only the newest N.")
_sort = click.option(
    "--sort", type=click.Choice(["epoch"]), help="Order by the epochs in the names. [default: as given]"
)
_allow_nonfinite = click.option("--allow-nonfinite", is_flag=True, help="Take NaN and infinity too.")
_WEIGHTINGS = "mean, linear, polynomial:POWER, exponential:decay=D, exponential:alpha=A or exponential:half_life=H"


@main.command()
@_checkpoints
@click.option("-o", "--output", type=_PATH, required=True, help="The new checkpoint; its suffix says the format.")
@click.option(
    "-w", "--weighting", metavar="W", callback=_parsed(parse_weighting), help=f"{_WEIGHTINGS}. [default: mean]"
)
@click.option(
    "--weights",
    metavar="A,B,...",
    callback=_parsed(_numbers),
    help="A weight for each, oldest first, such as 0.5,0.3,0.2.",
)
@_last
@_sort
@click.option(
    "--optimizer",
    type=click.Choice(["drop", "newest"]),
    default="drop",
    show_default=True,
    help="Leave the optimizer's state out, or keep that of the newest.",
)
@click.option("--template", type=_PATH, help="A file with the structure the inputs lack, such as a .keras.")
@_allow_nonfinite
@click.option(
    "--memory", metavar="SIZE", callback=_parsed(parse_bytes), default="64MiB", show_default=True, help="The budget."
)
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def average(
    checkpoints: tuple[str, ...], output: Path, weighting: Weighting | None, as_json: bool, **options: Any
) -> None:
    """Average saved checkpoints into a new one, exactly, in little memory.

    CHECKPOINT... are the inputs from the oldest to the newest: .keras, .weights.h5, .h5, .weights.json, .safetensors or
    .npz files, TensorFlow checkpoints or SavedModel folders of one model. A quoted pattern or a folder stands for what
    is in it, in the order of the numbers in the names; @FILE for a list with one on each line.

    The result is within one unit in the last place of the exact average. Killed at any moment, there is no output or
    the whole output.

    \b
    Examples:
      streaming-polyak average a.keras b.keras c.keras --output average.keras
      streaming-polyak average run/members --last 10 --weighting linear -o average.keras
      streaming-polyak average old.weights.h5 new.weights.h5 --weights 0.3,0.7 -o average.safetensors
      streaming-polyak average 'run/*.weights.h5' --template model.keras -o average.keras
    """  # noqa: D301
    if weighting is not None and options["weights"] is not None:
        raise click.UsageError("--weighting and --weights say the same thing in two ways; give one of them.")
    if options["weights"] is not None:
        _check_count(options["weights"], checkpoints, options["last"])
    report = average_checkpoints(checkpoints, output, weighting or MEAN, progress=True, **options)
    _say(json.dumps(report.to_json(), indent=1) if as_json else str(report))


@main.command()
@_checkpoints
@click.option(
    "--evaluate",
    "function",
    required=True,
    metavar="MODULE:FUNCTION",
    help="Gets tensors by name, returns metrics by name. MODULE is a name or a path ending in .py.",
)
@click.option(
    "-w",
    "--weighting",
    "weightings",
    metavar="W",
    callback=_parsed(_sweepable),
    multiple=True,
    help=f"{_WEIGHTINGS}; several times. A whole power p takes p + 1 accumulators. "
    "[default: mean, linear and exponential:alpha=2]",
)
@click.option(
    "--weights", metavar="A,B,...", callback=_parsed(_numbers), help="Explicit weights too, one for each, oldest first."
)
@_last
@_sort
@_allow_nonfinite
@click.option("--metric", help="The metric that tells what is best. [default: the first]")
@click.option(
    "--mode",
    type=click.Choice(["auto", "min", "max"]),
    default="auto",
    show_default=True,
    help="Whether less or more of the metric is better; auto tells by its name.",
)
@click.option(
    "--accumulators",
    type=click.Choice(["memory", "disk"]),
    default="memory",
    show_default=True,
    help="Where the sums are kept: eight bytes a parameter and sum.",
)
@click.option("--csv", "csv_path", type=_PATH, help="Write all rows there; replaced if it exists.")
@click.option("--plot", "plot_path", type=_PATH, help="Draw them there (PNG); replaced if it exists.")
@click.option("--export-best", type=_PATH, help="Write the best average, or member, there as a checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace the file of --export-best if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print all rows as JSON.")
def sweep(
    checkpoints: tuple[str, ...],
    function: str,
    weightings: tuple[Weighting, ...],
    weights: tuple[float, ...] | None,
    metric: str | None,
    mode: Literal["auto", "min", "max"],
    csv_path: Path | None,
    plot_path: Path | None,
    export_best: Path | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Find out how many of the last checkpoints to average, and how.

    Evaluates each CHECKPOINT (given from the oldest to the newest, as for "average") and the averages of the last n of
    them for every n and every weighting, reading each file once.

    FUNCTION gets a mapping from names to arrays. For a Keras model, make it with the library:

    \b
      # score.py
      import keras, streaming_polyak as sp
      model = keras.models.load_model("run/epoch-00499.keras")
      x, y = ...
      evaluate = sp.KerasEvaluator(model, x, y)

    \b
    Examples:
      streaming-polyak sweep run/*.keras --evaluate score.py:evaluate
      streaming-polyak sweep run/members -w mean -w exponential:alpha=2 -w exponential:alpha=5 \\
          --evaluate score.py:evaluate --metric accuracy --csv sweep.csv --plot sweep.png --export-best best.keras
    """  # noqa: D301
    chosen: list[Weighting | tuple[float, ...]] = list(weightings)
    if weights is not None:
        _check_count(weights, checkpoints, options["last"])
        chosen.append(weights)
    evaluate = load(function, "--evaluate")
    # What can be seen to fail is told before, not after, hours of work.
    outputs = {"--csv": csv_path, "--plot": plot_path, "--export-best": export_best}
    module = function.rpartition(":")[0]
    script = Path(module) if module.endswith(".py") else None
    given = {option: path for option, path in outputs.items() if path is not None}
    _check_outputs(given, checkpoints, script, overwrite)
    here = os.getcwd()

    def checked(tensors: Any) -> Any:
        metrics = evaluate(tensors)
        names = [str(name) for name in metrics] if isinstance(metrics, Mapping) else ["score"]
        if metric is not None and metrics is not None and metric not in names:
            raise ValueError(f"Expected a metric of {', '.join(names)}; got --metric {metric}.")
        return metrics

    result = sweep_checkpoints(
        checkpoints, chosen or [MEAN, LINEAR, Exponential(alpha=2)], checked, progress=True, **options
    )
    verdict = result.verdict(metric, mode=mode)

    def show() -> None:
        _say(
            json.dumps({**result.to_json(), "verdict": verdict}, indent=1)
            if as_json
            else f"{result.table(metric, mode=mode)}\n\n{verdict}"
        )

    def export() -> None:
        best = result.best(metric, mode=mode)
        if export_best is not None:
            allow = options["allow_nonfinite"]
            report = result.export(best, export_best, overwrite=overwrite, allow_nonfinite=allow)
            _say(str(report), err=as_json)

    steps: list[Callable[[], object]] = [show]
    if csv_path is not None:
        steps.append(lambda: result.to_csv(csv_path))
    if plot_path is not None:
        steps.append(lambda: result.plot(plot_path, metric))
    failed = []
    with contextlib.chdir(here):  # the evaluation may have left it
        for step in [*steps, export]:  # each though another failed: the results took long
            try:
                step()
            except (StreamingPolyakError, ValueError, OSError, ImportError) as error:
                failed.append(error)
    if failed:
        raise Error("\nError: ".join(map(_words, failed))) from failed[0]


@main.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def inspect(files: tuple[str, ...], as_json: bool) -> None:
    """Show what is in checkpoints: tensors, dtypes, shapes, bytes, and what differs between several.

    Reads no tensor data. "in place" means that the data are read where the file has them; the rest is unpacked first.

    \b
    Examples:
      streaming-polyak inspect model.keras
      streaming-polyak inspect a.safetensors b.safetensors
    """  # noqa: D301
    found = inspect_checkpoints(files)
    _say(json.dumps(found.to_json(), indent=1) if as_json else str(found))


@main.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE|RUN_DIR...")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def verify(files: tuple[str, ...], as_json: bool) -> None:
    """Read checkpoints whole and tell whether they can be trusted and averaged.

    Checks the structure, the checksums that the format has, those that an average made by this program carries, and
    that all floating tensors of the model are finite; of the folder of a run all checkpoints. Exit status 1 names what
    is damaged.

    \b
    Examples:
      streaming-polyak verify average.keras
      streaming-polyak verify run/members/*.keras
    """  # noqa: D301
    reports: list[dict[str, Any]] = []
    failed = False
    runs = [file for file in files if RunFolder(file).saved()]
    for folder in runs:
        found = run_status(Path(folder))
        wrong = [f"{c['path']}: {c['wrong']}" for c in found.checkpoints if c["wrong"] is not None]
        failed = failed or bool(wrong)
        reports.append({"ok": not wrong, **found.to_json()})
        if not as_json:
            _say(str(found))
        for reason in wrong:
            _say(f"Error: {reason}", err=True)
    others = [file for file in files if file not in runs]
    for path in find_checkpoints(others) if others else []:
        try:
            report = verify_checkpoint(path, progress=True)
        except (StreamingPolyakError, OSError) as error:
            failed = True
            _say(f"Error: {error}", err=True)
            reports.append({"path": str(path), "ok": False, "reason": str(error)})
        else:
            reports.append({"path": str(path), "ok": True, **report.to_json()})
            if not as_json:
                _say(str(report))
    if as_json:
        _say(json.dumps(reports, indent=1))
    if failed:
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("function", metavar="MODULE:FUNCTION")
@click.option("--run-dir", type=_PATH, required=True, help="The folder of the run.")
@click.option("--epochs", type=click.IntRange(1), help="The epoch to train to, instead of what FUNCTION says.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "must", "never"]),
    default="auto",
    show_default=True,
    help="Go on with the run in the folder if there is one; insist on one; refuse a folder that has one.",
)
def train(function: str, run_dir: Path, epochs: int | None, resume: str) -> None:
    """Train as FUNCTION says, in a run folder; the same command goes on where a killed one stopped.

    FUNCTION gets the run folder as a Path and returns a Trainer and the arguments of its fit, as a dict. MODULE is a
    name or a path ending in .py.

    \b
      # job.py
      import keras, streaming_polyak as sp
      def make(run_dir):
          keras.utils.set_random_seed(0)
          model = ...                                        # compiled
          averages = {"mean": sp.Average(sp.MEAN, start=5)}
          trainer = sp.Trainer(model, averages, run_dir=run_dir, save_every="5 min")
          return trainer, {"x": x, "y": y, "epochs": 20, "validation_data": (x_val, y_val)}

    SIGTERM and Ctrl-C end it saved, with the status 143 or 130; a second one ends it at once.

    \b
    Examples:
      streaming-polyak train job.py:make --run-dir runs/1
      streaming-polyak train jobs.text:make --run-dir runs/2 --epochs 50 --resume must
    """  # noqa: D301
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    made = load(function, "MODULE:FUNCTION")(run_dir)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], Mapping)):
        raise click.UsageError(
            f"{function} must return a Trainer and a dict of arguments for its fit, got {made!r:.100}."
        )
    trainer, arguments = made
    if getattr(trainer, "run_dir", None) is None or trainer.run_dir.resolve() != run_dir.resolve():
        raise click.UsageError(f"{function} must return a Trainer whose run_dir is the one that it got, {run_dir}.")
    chosen = {"resume": resume} if epochs is None else {"resume": resume, "epochs": epochs}
    with told(function):
        history = trainer.fit(**{**arguments, **chosen})
    last = {name: values[-1] for name, values in history.history.items()}
    scores = ", ".join(f"{name}={value:.4g}" for name, value in last.items() if isinstance(value, float))
    _say(f"{run_dir}: {len(history.epoch)} epochs; {scores}")


@main.command()
@click.argument("folder", type=_PATH, metavar="RUN_DIR")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def status(folder: Path, as_json: bool) -> None:
    """Show what a run has reached: its checkpoints, whether they are whole, and who is at work in it.

    Exit status 1 if there is no run, or none of its checkpoints is whole.

    \b
    Example:
      streaming-polyak status runs/1
    """  # noqa: D301
    found = run_status(folder)
    _say(json.dumps(found.to_json(), indent=1) if as_json else str(found))
    if not found.usable:
        raise click.exceptions.Exit(1)


# Options of one data set only; given with the other alone they are wrong usage, not ignored.
_ONLY = {"blobs": ("members", "optimizer"), "digits": ("repeats",)}


@main.command()
@click.option(
    "--data", type=click.Choice(["blobs", "digits"]), help="The data set. [default: both, one after the other]"
)
@click.option("--epochs", type=click.IntRange(1), help="Epochs to train. [default: 500 for blobs, 40 for digits]")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo_output"),
    show_default=True,
    help="Folder for figures, tables and members; with both data sets, each has a folder in it. Files of the same "
    "names are replaced.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of weights and sample order.")
@click.option(
    "--alpha",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    help="Of the exponential weights exp(-i/alpha), in epochs.",
)
@click.option(
    "--optimizer",
    type=click.Choice(["sgd", "adam"]),
    default="sgd",
    show_default=True,
    help="Blobs: SGD(0.01, momentum 0.9) or Adam.",
)
@click.option(
    "--members", type=click.IntRange(1), default=10, show_default=True, help="Blobs: how many last epochs are averaged."
)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Digits: number of seeds.")
@click.pass_context
def demo(
    ctx: click.Context,
    data: str | None,
    epochs: int | None,
    output: Path,
    seed: int,
    alpha: float,
    optimizer: str,
    members: int,
    repeats: int,
) -> None:
    """Train on two data sets with streaming averages and show what they are worth.

    blobs: three classes of points in the plane, 500 epochs; the last ten models, their averages under three
    weightings, read back from files, and the same averages kept while training.

    digits: 1,797 handwritten digits and a convolutional network with batch normalisation, over several seeds; raw
    weights against averages from mid-run on.

    \b
    Examples:
      streaming-polyak demo
      streaming-polyak demo --data blobs --optimizer adam --output adam_demo
      streaming-polyak demo --data digits --repeats 10
    """  # noqa: D301  # \b is a backspace here: click then keeps the lines as they are
    for other, options in _ONLY.items():
        for option in options:
            given = ctx.get_parameter_source(option) == click.core.ParameterSource.COMMANDLINE
            if data not in (None, other) and given:
                raise click.UsageError(f"--{option} is for --data {other}, not for --data {data}.")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's notes on its own build
    files: list[Path] = []
    if data in (None, "blobs"):
        epochs_of_blobs = epochs or 500
        if members > epochs_of_blobs:
            raise click.UsageError(f"--members {members} is more than the {epochs_of_blobs} epochs.")
        from streaming_polyak.demo import blobs

        folder = output / "blobs" if data is None else output
        files += blobs.run(
            folder, _paragraph, epochs=epochs_of_blobs, members=members, optimizer=optimizer, alpha=alpha, seed=seed
        )
    if data in (None, "digits"):
        from streaming_polyak.demo import digits

        folder = output / "digits" if data is None else output
        files += digits.run(folder, _paragraph, epochs=epochs or 40, repeats=repeats, alpha=alpha, seed=seed)
    _paragraph("\n".join(["Files written:", *(f"  {path}" for path in files)]))


def _check_outputs(
    outputs: Mapping[str, Path], checkpoints: tuple[str, ...], script: Path | None, overwrite: bool
) -> None:
    """Refuses, before a sweep, what could not be written after it; and what would replace something that it reads."""
    if "--plot" in outputs and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib. Install streaming_polyak[plots].")
    inputs = find_checkpoints(checkpoints)
    kept = {"the evaluation": [script]} if script is not None else {}
    with Parser() as parser:
        for path in inputs:
            with open_checkpoint(path, parser) as table:
                kept[f"the input {path}"] = [table.path, *(source.path for source in table.sources)]
    taken: dict[Path, str] = {}
    for option, path in outputs.items():
        said = f"{option} {path}"
        if (other := taken.setdefault(path.resolve(), said)) != said:
            raise ValueError(f"{said} and {other} are one file. Choose another name.")
        if path.is_dir():
            raise IsADirectoryError(f"{said} is a folder. Choose another name.")
        for what, files in kept.items():
            if any(same_file(path, file) for file in files):
                raise ValueError(f"{said} is {what}, or a file of it. Choose another name.")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise PermissionError(f"{said} cannot be written: {folder} is not a folder that may be written to.")
    if (best := outputs.get("--export-best")) is not None:
        _check_export(best, table, overwrite)  # of the newest; closed, as only what it has is asked


def _check_export(best: Path, newest: TensorTable, overwrite: bool) -> None:
    format = format_of(best, newest)
    model = {name: tensor for name, tensor in newest.tensors.items() if not is_optimizer(name, newest.format)}
    try:
        check_structure(format, best, model, newest)
    except CheckpointError as error:
        if error.code != "template":
            raise
        raise ValueError(
            f"--export-best {best} cannot be made of {newest.path}, which does not hold all that such a file has. Give "
            "it the suffix of the checkpoints, or .safetensors."
        ) from None
    if record(best, format).exists() and not overwrite:
        raise FileExistsError(f"{best} exists already. Choose another name, or give --overwrite to replace it.")


def _paragraph(text: str) -> None:
    _say(f"{text}\n")
