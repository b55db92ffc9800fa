"""The benchmark scripts run and print what they promise; sizes are small and nothing is timed."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from streaming_polyak import average_checkpoints

SCRIPTS = Path(__file__).parent.parent / "scripts" / "benchmarks"

pytestmark = [pytest.mark.tensorflow, pytest.mark.slow]


def script(name):
    """Imports a benchmark script, which finds its neighbours as it does when it is run."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))


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
    said = json.loads(done.stdout)
    rows = {row["way"]: row for row in said["rows"]}
    rivals = {"fairseq-style loop in torch", "mergekit linear"}
    left_out = {way for way in rivals for word in said["left_out"] if word.startswith(way)}
    assert rows.keys() | left_out == rivals | {
        "cat", "write", "ours", "ours, the command", "h5py, whole files", "load_model, one at a time",
        "tutorial: load all",
    }  # fmt: skip
    assert not rows.keys() & left_out
    assert rows["cat"]["times_cat"] == 1.0
    assert rows["ours"]["anonymous_mib"] < 80
    assert list(tmp_path.iterdir()) == []  # its files are gone


def test_a_rival_that_is_not_installed_is_left_out_with_a_word(tmp_path):
    options = ["--size", "0.2", "--count", "2", "--format", "safetensors", "--repeats", "1", "--folder", tmp_path]
    done = subprocess.run(
        [sys.executable, SCRIPTS / "average_checkpoints.py", *options, "--weighting", "linear"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Left out: fairseq-style loop in torch (" in done.stdout
    assert "mergekit linear (" in done.stdout


def test_the_rivals_average_the_same_arrays(tmp_path):
    rivals = script("average_rivals")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    rivals.make(ours, 0.1, 3, "safetensors")
    expected = {
        name: np.mean([dict(rivals.arrays(0.1, i))[name] for i in range(3)], axis=0, dtype=np.float64)
        for name, _ in rivals.arrays(0.1, 0)
    }
    average_checkpoints(sorted(ours.iterdir()), tmp_path / "average.safetensors")
    found = load_file(tmp_path / "average.safetensors")
    assert found.keys() == expected.keys()
    for name, w in expected.items():
        np.testing.assert_allclose(found[name], w, rtol=2**-23, atol=0)  # within one unit in the last place
    torch = pytest.importorskip("torch")
    rivals.make(theirs, 0.1, 3, "pt")
    rivals.fairseq_style(sorted(theirs.iterdir()), tmp_path / "rival.pt")
    state = torch.load(tmp_path / "rival.pt")["model"]
    assert state.keys() == expected.keys()
    for name, w in expected.items():  # three float32 roundings of sums of numbers of size 1
        np.testing.assert_allclose(state[name].numpy(), w, rtol=1e-6, atol=1e-6)


def test_the_benchmark_of_the_start_compares_with_numpy():
    done = subprocess.run(
        [sys.executable, SCRIPTS / "start.py", "--repeats", "1", "--json"], capture_output=True, text=True, check=True
    )
    rows = {row["what"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["import numpy"]["beyond_numpy"] == 0
    assert sum(what.startswith("streaming-polyak average, 10 x") for what in rows) == 2


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


def test_the_benchmark_of_growth_measures_each_point_and_writes_its_section(tmp_path):
    options = [
        "--parameters", "1e4", "--tensors", "20", "--averages", "3", "--members", "2", "--megabytes", "0.1",
        "--epochs", "2", "--folder", tmp_path,
    ]  # fmt: skip
    measured = tmp_path / "points.json"
    with measured.open("w") as file:
        only = ["--only", "updates", "--only", "files"]
        subprocess.run(
            [sys.executable, SCRIPTS / "growth.py", *options, *only, "--json"],
            stdout=file, stderr=subprocess.PIPE, check=True,
        )  # fmt: skip
    kinds = [point["kind"] for point in json.loads(measured.read_text())["points"]]
    assert kinds == ["updates", "files", "files"]
    results = tmp_path / "RESULTS.md"
    results.write_text("before\n<!-- growth -->\nwhat was there\n<!-- /growth -->\nafter\n")
    places = ["--results", results, "--figures", tmp_path / "docs"]
    subprocess.run(
        [sys.executable, SCRIPTS / "growth.py", "--points", measured, "--write", *places],
        capture_output=True, check=True,
    )  # fmt: skip
    text = results.read_text()
    assert text.startswith("before\n<!-- growth -->\n\n20")  # the date
    assert text.endswith("\n<!-- /growth -->\nafter\n")
    assert "what was there" not in text
    assert "![Averaging files: time and memory](docs/growth-files.png)" in text
    assert (tmp_path / "docs" / "growth-files.png").stat().st_size > 10_000


def test_the_fit_of_growth_finds_the_costs_that_made_the_times_and_reads_off_the_cache():
    growth = script("growth_report")
    costs = {"update": 1e-4, "tensor": 2e-6, "parameter": 1e-10, "parameter of each average": 3e-10}
    cases = (
        [(10**e, 20, 3) for e in range(4, 9)] + [(10**7, t, 3) for t in (10, 1000)] + [(10**7, 20, k) for k in (1, 8)]
    )
    points = []
    for parameters, tensors, averages in cases:
        point = {"kind": "updates", "parameters": parameters, "tensors": tensors, "averages": averages}
        amounts = growth.of_update(point)
        seconds = sum(costs[name] * amounts[name] for name in costs)
        if parameters == 10**6:
            seconds /= 2  # it fits into the cache
        memory = growth.state_bytes(point) / 2**20
        points.append({**point, "seconds": seconds, "least_seconds": seconds, "anonymous_mib": memory})
    found = growth.fit(points, "updates", last_cache=32 << 20)
    assert found.costs == pytest.approx(costs, rel=1e-6)
    (curve,) = [curve for curve in growth.curves(points) if curve.axis == "parameters"]
    assert curve.x == [1e4, 1e5, 1e6, 1e7, 1e8]
    said = growth.sentence(curve, found, {2: 1 << 20, 3: 32 << 20})
    assert "At 1e6 it takes 0.50 of the fit" in said
    assert "16 MB, fit into the L3 cache of 33.6 MB" in said
    assert "The curve bends near 1.4e5" in said  # where 1e-4 + 20 * 2e-6 is (1e-10 + 3 * 3e-10) P


def test_no_fitted_cost_is_negative():
    growth = script("growth_report")
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 4.0]])
    assert growth.least_squares(rows, np.array([4.0, 3.0, 2.0]))[1] == 0
    assert growth.least_squares(rows, np.array([3.0, 5.0, 9.0])) == pytest.approx([1.0, 2.0])
