"""The example of a long run, as it is called: it trains, goes on, and shows its end again."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.tensorflow, pytest.mark.slow]

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_text.py"
SMALL = ("--width", "16", "--layers", "1", "--context", "16", "--steps", "4", "--start", "1")


def run(folder, *arguments):
    command = [sys.executable, str(SCRIPT), "--run-dir", str(folder), *SMALL, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def epochs_of(folder):
    with (folder / "history.csv").open() as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


def test_it_trains_shows_its_end_again_and_goes_on(tmp_path):
    folder = tmp_path / "run"
    first = run(folder, "--epochs", "3")
    assert epochs_of(folder) == [0, 1, 2]
    for name, members in (("raw", ""), ("mean", "2 +"), ("linear", "2 +"), ("ema", "12 +")):
        assert re.search(rf"^{name} +{members}\d\.\d{{3}} +\d\.\d{{3}} +0\.\d{{3}}$", first, re.MULTILINE), name
    assert re.search(r"averaging (gained|lost) \d\.\d{3} bits", first)
    assert len(re.findall(r"--- sample, \w+ weights ---\nclass Reader:\n", first)) == 2
    with Image.open(folder / "curves.png") as picture:
        assert min(picture.size) >= 600
    model = keras.models.load_model(folder / "text.keras")  # no layer of the script's own
    assert model.predict(np.zeros((1, 16), np.int32), verbose=0).shape == (1, 16, 128)

    again = run(folder, "--minutes", "0.001")  # the time is used up
    assert "Going on with the run" in again
    assert epochs_of(folder) == [0, 1, 2]
    report = slice(first.index("\nAfter 3 epochs"), first.index("\nTo see this again"))
    assert first[report] in again

    more = run(folder, "--epochs", "4")
    assert epochs_of(folder) == [0, 1, 2, 3]
    assert [line[:8] for line in more.splitlines() if line.startswith("epoch ")] == ["epoch 3,"]
