"""How long a shell waits: for Python, for the import of the library, and for the command on ten small files.

Each row is a whole process from its start to its end; they take turns, and shown is the median. Every figure is also
given less that of `import numpy`, which the library cannot do without. The ten files are of the tutorial's network in
every format that is written without TensorFlow; their contents do not matter here.

    python scripts/benchmarks/start.py
    python scripts/benchmarks/start.py --repeats 21 --json
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from average_rivals import write_safetensors
from measuring import machine, seconds_of
from tabulate import tabulate

FILES = 10
SMALL_MB = 0.02


def make_hdf5(path: Path, number: int) -> None:
    """Writes the weights of a small network as Keras does: a group a layer, a data set a variable."""
    import h5py
    import numpy as np

    rng = np.random.default_rng(number)
    with h5py.File(path, "w") as file:
        for layer, (inputs, units) in enumerate(((2, 25), (25, 3))):
            for place, shape in enumerate(((inputs, units), (units,))):
                file[f"layers/dense_{layer}/vars/{place}"] = rng.standard_normal(shape, dtype=np.float32)


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--repeats", type=click.IntRange(1), default=11, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(repeats: int, as_json: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        members: dict[str, list[str]] = {"weights.h5": [], "safetensors": []}
        for number in range(FILES):
            for suffix, paths in members.items():
                path = Path(folder, f"member-{number}.{suffix}")
                if suffix == "safetensors":
                    write_safetensors(path, SMALL_MB, number)
                else:
                    make_hdf5(path, number)
                paths.append(str(path))
        python, average = [sys.executable], [sys.executable, "-m", "streaming_polyak", "average", "--overwrite"]
        ways = {
            "python -c pass": [*python, "-c", "pass"],
            "import numpy": [*python, "-c", "import numpy"],
            "import streaming_polyak": [*python, "-c", "import streaming_polyak"],
            "... import average_checkpoints": [*python, "-c", "from streaming_polyak import average_checkpoints"],
            "streaming-polyak --help": [*python, "-m", "streaming_polyak", "--help"],
            **{
                f"streaming-polyak average, {FILES} x .{suffix}": [
                    *average, *paths, "-o", str(Path(folder, f"average.{suffix}")),
                ]
                for suffix, paths in members.items()
            },
        }  # fmt: skip

        def run(command: list[str]) -> None:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, command in ways.items():
                seconds[way].append(seconds_of(lambda command=command: run(command)))
    median = {way: statistics.median(times) for way, times in seconds.items()}
    rows = [
        {
            "what": way,
            "seconds": median[way],
            "least": min(seconds[way]),
            "beyond_numpy": median[way] - median["import numpy"],
        }
        for way in ways
    ]
    if as_json:
        click.echo(json.dumps({"machine": machine("numpy", "h5py", "click"), "rows": rows}, indent=1))
        return
    click.echo(f"{machine('numpy', 'h5py', 'click')}; whole processes, median of {repeats}\n")
    header = ["process", "seconds", "least", "beyond import numpy"]
    click.echo(tabulate([list(row.values()) for row in rows], header, tablefmt="github", floatfmt=".3f"))


if __name__ == "__main__":
    main()
