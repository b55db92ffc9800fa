"""The demo, run as a user runs it: its report, its files, its pictures."""

import csv
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.tensorflow, pytest.mark.slow]


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "streaming_polyak", "demo", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, run("--output", str(folder), "--epochs", "12", "--members", "5", "--repeats", "2", "--seed", "3")


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_all_files_are_there_and_named_at_the_end(both):
    folder, report = both
    named = report.partition("Files written:\n")[2].split()
    assert sorted(named) == sorted(str(path) for path in folder.rglob("*.*"))
    names = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    assert names == {
        *(f"blobs/{name}" for name in ("data.png", "learning_curves.png", "last_n.png", "scores.csv", "history.csv")),
        *(f"blobs/members/epoch-000{epoch:02d}.keras" for epoch in range(7, 12)),
        "digits/validation_curves.png",
        "digits/scores.csv",
    }


def test_pictures_are_pictures_of_readable_size_with_something_on_them(both):
    for path in both[0].rglob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) >= 600, path
            pixels = np.asarray(picture.convert("L"), dtype=float)
        assert 0.005 < (pixels < 200).mean() < 0.5, path


def test_streaming_averages_agree_with_the_saved_members(both):
    assert re.search(r"agree: no weight differs by more than \d\.\de-0[678]\.", both[1])
    scores = rows_of(both[0] / "blobs" / "scores.csv")
    for name in ("mean", "linear", "exponential (alpha=2)"):
        of = [row for row in scores if row["weighting"] == name]
        (streaming,) = (row for row in of if row["source"] == "streaming")
        saved = [row for row in of if row["source"] == "saved members"]
        assert [int(row["n"]) for row in saved] == [1, 2, 3, 4, 5]
        assert streaming["n"] == "5"
        assert float(streaming["test_loss"]) == pytest.approx(float(saved[-1]["test_loss"]), rel=1e-5)


def test_averages_of_the_last_n_are_those_of_the_weightings(both):
    keras = pytest.importorskip("keras")
    from streaming_polyak import LINEAR, MEAN, Exponential, KerasEvaluator, sweep_checkpoints
    from streaming_polyak.demo import blobs

    oldest_first = sorted((both[0] / "blobs" / "members").iterdir())
    model = blobs.network("sgd")
    put, seen = KerasEvaluator(model, np.zeros((1, 2)), np.zeros((1, 3))).assign, []

    def evaluate(tensors):
        put(tensors)
        seen.append(model.get_weights())
        return 0.0

    weightings = (MEAN, LINEAR, Exponential(alpha=3))
    sweep_checkpoints(oldest_first, weightings, evaluate)
    members = [keras.models.load_model(path).get_weights() for path in reversed(oldest_first)]
    evaluated = iter(seen)
    for n in range(1, len(members) + 1):
        for member, single in zip(members[n - 1], next(evaluated), strict=True):
            assert member.tobytes() == single.tobytes()
        for weighting in weightings if n > 1 else ():  # the average of one member is that member
            newest_weights = weighting.weights(n)[::-1]
            for k, average in enumerate(next(evaluated)):
                stack = [member[k].astype(np.float64) for member in members[:n]]
                expected = np.average(stack, axis=0, weights=newest_weights)
                np.testing.assert_allclose(average, expected, rtol=1e-7, atol=1e-9)  # rounded to float32
    assert next(evaluated, None) is None


def test_the_history_and_the_curves_have_every_epoch(both):
    history = rows_of(both[0] / "blobs" / "history.csv")
    assert len(history) == 12
    assert {"loss", "val_accuracy", "val_accuracy[mean]", "val_loss[exponential (alpha=2)]"} <= set(history[0])
    curves = rows_of(both[0] / "digits" / "scores.csv")
    assert len(curves) == 4 * 2 * 12
    assert {row["seed"] for row in curves} == {"3", "4"}


def test_the_report_says_where_averaging_helps(both):
    report = both[1]
    for score in ("accuracy", "loss"):
        block = report.partition(f"Does averaging help the test {score}?\n")[2].splitlines()[:3]
        assert all(
            re.match(r"  .*: (helps|HURTS|no clear difference) \([+-]0\.\d{4} against raw", line) for line in block
        )
    assert re.search(r"raw +0\.\d{4} ± 0\.\d{4} +\d\.\d{4} ± ", report)


def test_the_same_seed_gives_the_same_report_and_adam_another(tmp_path):
    arguments = ["--data", "blobs", "--epochs", "6", "--members", "2", "--output", str(tmp_path)]
    first = run(*arguments)
    assert run(*arguments) == first
    adam = run(*arguments, "--optimizer", "adam", "--alpha", "1")
    assert "adam" in adam
    assert "exponential (alpha=1)" in adam
    assert (tmp_path / "data.png").exists()  # one data set needs no folder of its own
