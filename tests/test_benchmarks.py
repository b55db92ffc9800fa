"""The benchmark scripts run and print what they promise; sizes are small and nothing is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts" / "benchmarks"

pytestmark = [pytest.mark.tensorflow, pytest.mark.slow]


def test_the_benchmark_of_the_loop_compares_with_keras():
    done = subprocess.run(
        [sys.executable, SCRIPTS / "train_loop.py", "--case", "tiny", "--repeats", "1", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(done.stdout)
    ways = ["fit", "fit, steps_per_execution=4", "Trainer"]
    assert [(row["validated"], row["way"]) for row in rows] == [
        *((False, way) for way in ways),
        *((True, way) for way in [*ways, "Trainer, 3 averages"]),
    ]
    assert min(row["epoch_times_best_fit"] for row in rows[:2]) == 1.0
    assert all(row["seconds"] > row["epoch"] > 0 and row["mib"] > 100 for row in rows)


def test_an_update_at_the_end_of_an_epoch_needs_little_passing_memory_and_leaves_none_behind():
    done = subprocess.run(
        [sys.executable, SCRIPTS / "update_memory.py", "--case", "3e7x30", "--unit", "epoch", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    (row,) = json.loads(done.stdout)
    model = 3e7 * 4 / 2**20
    assert row["before_mib"] > 4 * model  # the weights and three averages are there
    assert row["samples"] >= 3
    for update in ("first_", ""):
        assert row[f"{update}passing_mib"] <= 64  # the bound that is promised
        assert row[f"{update}after_mib"] - row[f"{update}before_mib"] <= 8  # Python's own, not a tensor of 4 MB x 30


def test_the_benchmark_of_updates_compares_the_ways_that_are_asked_for():
    ways = ["streaming_polyak", "streaming_polyak without Numba", "NumPy"]
    options = ["--case", "1e5x4", "--averages", "3", "--rounds", "1", *(o for way in ways for o in ("--way", way))]
    done = subprocess.run(
        [sys.executable, SCRIPTS / "update_averages.py", *options, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = {row["way"]: row for row in json.loads(done.stdout)}
    assert list(rows) == ways
    assert min(row["copies"] for row in rows.values()) > 0
    assert rows["streaming_polyak without Numba"]["lasting_mib"] >= 3 * 4e5 / 2**20
    assert rows["NumPy"]["times_best_rival"] == 1.0


def test_the_benchmark_of_averaging_compares_with_cat_and_the_usual_ways(tmp_path):
    sizes = ["--size", "0.2", "--count", "3", "--format", "keras", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, SCRIPTS / "average_checkpoints.py", *sizes, "--slow", "--folder", tmp_path, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = {row["way"]: row for row in json.loads(done.stdout)}
    assert rows.keys() == {
        "cat", "write", "ours", "ours, the command", "h5py, whole files", "load_model, one at a time",
        "tutorial: load all",
    }  # fmt: skip
    assert rows["cat"]["times_cat"] == 1.0
    assert rows["ours"]["anonymous_mib"] < 80
    assert list(tmp_path.iterdir()) == []  # its files are gone


def test_the_benchmark_of_the_sweep_finds_the_same_accuracies_the_tutorial_way():
    done = subprocess.run(
        [sys.executable, SCRIPTS / "sweep.py", "--members", "3", "--epochs", "6", "--repeats", "1", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout)
    assert [row["way"] for row in said["rows"]] == ["ours", "tutorial"]
    assert [row["evaluations"] for row in said["rows"]] == [12, 12]
    assert said["largest_difference"] <= 0.0015


def test_the_benchmark_of_saving_shows_what_a_save_costs():
    done = subprocess.run(
        [sys.executable, SCRIPTS / "save_run.py", "--parameters", "4e6", "--repeats", "2", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    low, high = json.loads(done.stdout)
    assert (low["memory"], high["memory"]) == ("low", "high")
    assert low["saved_mib"] > 4e6 * 5 * 4 / 2**20  # weights, two slots, two averages
    assert low["passing_mib"] <= 64  # the bound that is promised
    assert low["times_low"] == 1.0
