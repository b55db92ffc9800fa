"""The command line: thin over the library; TensorFlow is imported only by commands that train or evaluate.

Exit status: 0 done; 1 the work could not be done, with the reason on the error output; 2 wrong usage.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from streaming_polyak import __version__
from streaming_polyak.errors import StreamingPolyakError


class _Group(click.Group):
    """Turns the library's errors into one line and exit status 1."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (StreamingPolyakError, ValueError, OSError, ImportError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def main() -> None:
    """Running averages of a network's weights, kept up to date while it trains.

    To train a model of your own, import the loop: from streaming_polyak import Trainer.
    """


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


def _paragraph(text: str) -> None:
    click.echo(f"{text}\n")
