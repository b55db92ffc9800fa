"""All averages of the last n in one pass equal the obvious way: numpy.average over all members, for every n."""

import csv
import itertools
import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_average import write_bundle

from streaming_polyak import LINEAR, MEAN, CheckpointError, Exponential, NonFiniteError, Polynomial, sweep_checkpoints
from streaming_polyak.files import source
from streaming_polyak.files.source import Source
from streaming_polyak.files.sweep_result import SINGLE

WEIGHTINGS = {
    "mean": MEAN,
    "linear": LINEAR,
    "cubic": Polynomial(3),
    "alpha 2": Exponential(alpha=2),
    "alpha 30": Exponential(alpha=30),
    "decay": Exponential(decay=0.9),
}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_clock(monkeypatch):
    monkeypatch.setattr(source, "_TICK_NS", 0)


def members(folder, count, seed=0, shape=(7, 11)):
    """Writes `count` members and returns their paths and tensors, oldest first."""
    rng = np.random.default_rng(seed)
    paths, contents = [], []
    for i in range(count):
        contents.append(
            {
                "kernel": rng.normal(size=shape).astype(np.float32),
                "bias": rng.normal(size=3),
                "scalar": np.array(rng.normal(), np.float32),
                "none": np.zeros((0,), np.float32),
                "steps": np.array([i], np.int64),
            }
        )
        paths.append(folder / f"member-{i}.safetensors")
        save_file(contents[-1], paths[-1])
    return paths, contents


class Recorder:
    """Keeps all that it is given, and scores the mean of the kernel."""

    def __init__(self):
        self.seen = []

    def __call__(self, tensors):
        self.seen.append({name: tensors[name] for name in tensors})
        return {"loss": abs(float(self.seen[-1]["kernel"].mean())), "accuracy": float(self.seen[-1]["bias"].max())}


def obvious(contents, weighting, n, name):
    last = [content[name].astype(np.float64) for content in contents[-n:]]
    weights = weighting.weights(n) if hasattr(weighting, "weights") else np.asarray(weighting)[-n:]
    return np.average(last, axis=0, weights=weights)


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("accumulators", ["memory", "disk"])
def test_every_average_equals_numpy_average_over_all_members(tmp_path, count, accumulators):
    paths, contents = members(tmp_path, count)
    explicit = np.random.default_rng(1).uniform(0.5, 2, count)
    weightings = {**WEIGHTINGS, "explicit": explicit.tolist()}
    record = Recorder()
    result = sweep_checkpoints(paths, weightings, record, accumulators=accumulators)
    seen = iter(record.seen)
    for n in range(1, count + 1):
        single = next(seen)
        assert all(single[name].tobytes() == contents[-n][name].tobytes() for name in contents[-n])
        for weighting in weightings.values() if n > 1 else ():
            average = next(seen)
            assert average["steps"].tolist() == [count - 1]  # integers are the newest's
            assert average["none"].shape == (0,)
            for name in ("kernel", "bias", "scalar"):
                expected = obvious(contents, weighting, n, name)
                assert average[name].shape == contents[0][name].shape
                assert average[name].dtype == contents[0][name].dtype
                scale = np.abs(contents[0][name]).max()  # near zero, terms cancel: relative to what was added
                np.testing.assert_allclose(average[name], expected, rtol=1e-6, atol=1e-6 * scale)
    assert next(seen, None) is None
    assert len(result.rows) == count * (1 + len(weightings))
    for name in weightings:
        assert [row.n for row in result.of(name)] == list(range(1, count + 1))
        assert result.of(name)[4].members == tuple(paths[-5:])
    assert [row.members for row in result.of(SINGLE)] == [(path,) for path in reversed(paths)]


def test_tensors_larger_than_a_tile_and_narrow_floats_are_averaged_too(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    stacks = {"half": np.float16, "brain": ml_dtypes.bfloat16, "single": np.float32}
    contents, paths = [], []
    for i in range(4):
        contents.append({name: rng.normal(size=70_001).astype(dtype) for name, dtype in stacks.items()})
        paths.append(tmp_path / f"{i}.safetensors")
        save_file(contents[-1], paths[-1])
    seen = []
    sweep_checkpoints(paths, [LINEAR], lambda given: float(len(seen.append(dict(given)) or seen)))
    last = seen[-1]
    for name, dtype in stacks.items():
        stack = [content[name].astype(np.float64) for content in contents]
        expected = np.average(stack, axis=0, weights=[1, 2, 3, 4])
        assert last[name].dtype == dtype
        epsilon = float(ml_dtypes.finfo(dtype).eps)
        assert np.abs(last[name].astype(np.float64) - expected).max() <= epsilon * np.abs(expected).max()


def test_each_file_is_read_once_however_many_weightings(tmp_path, monkeypatch):
    paths, contents = members(tmp_path, 5)
    bytes_of = sum(array.nbytes for name, array in contents[0].items() if name != "steps")
    read = []
    original = Source.read_into

    def counting(self, buffer, offset):
        read.append((self.path, len(buffer)))
        return original(self, buffer, offset)

    def evaluate(given):
        return float(given["kernel"][0, 0])  # looks at one tensor only

    monkeypatch.setattr(Source, "read_into", counting)
    sweep_checkpoints(paths, WEIGHTINGS, evaluate)
    for path in paths:
        data = [size for where, size in read if where == path and size in {7 * 11 * 4, 3 * 8, 4}]
        assert sum(data) == bytes_of, path


def test_a_damaged_tensorflow_checkpoint_is_an_error_in_a_sweep_too(tmp_path):
    paths = [write_bundle(tmp_path / f"{i}/ckpt", {"w": np.full(8, i, np.float32)}) for i in range(3)]
    data = tmp_path / "1/ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match=r"1.ckpt, tensor 'w': its CRC-32C is"):
        sweep_checkpoints(paths, [MEAN], lambda given: float(given["w"][0]))


def test_a_tensor_that_is_not_there_is_named_with_some_that_are(tmp_path):
    paths, _ = members(tmp_path, 3)
    with pytest.raises(KeyError, match="no tensor 'kernels' in the checkpoints; they have bias, kernel, "):
        sweep_checkpoints(paths, [MEAN], lambda given: float(given["kernels"].sum()))
    calls = itertools.count()
    with pytest.raises(KeyError, match="no tensor 'kernels'"):  # of an average, after those of two members
        sweep_checkpoints(paths, [MEAN], lambda given: float(given["kernels" if next(calls) == 2 else "kernel"].sum()))


def test_an_evaluation_may_look_at_a_tensor_twice(tmp_path):
    paths, contents = members(tmp_path, 3)
    twice = []

    def evaluate(given):
        twice.append(np.array_equal(given["kernel"], given["kernel"]))
        return {"score": float(given["kernel"].sum())}

    result = sweep_checkpoints(paths, [MEAN], evaluate)
    assert all(twice)
    expected = obvious(contents, MEAN, 3, "kernel").sum()
    assert result.of("mean")[-1].metrics["score"] == pytest.approx(expected, rel=1e-5)


def test_the_result_is_csv_json_a_table_and_names_the_best(tmp_path):
    paths, _ = members(tmp_path, 4)
    result = sweep_checkpoints(paths, [MEAN, LINEAR], Recorder())
    assert result.metrics == ("loss", "accuracy")
    assert result.best().metrics["loss"] == min(row.metrics["loss"] for row in result.rows)
    assert result.best("accuracy").metrics["accuracy"] == max(row.metrics["accuracy"] for row in result.rows)
    assert result.best("accuracy", mode="min").metrics["accuracy"] == min(r.metrics["accuracy"] for r in result.rows)
    result.to_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert rows[0]["weighting"] == SINGLE
    assert rows[-1] == {
        "weighting": "linear", "n": "4", "oldest_member": str(paths[0]), "newest_member": str(paths[-1]),
        **{name: str(value) for name, value in result.rows[-1].metrics.items()},
    }  # fmt: skip
    result.write_json(tmp_path / "rows.json")
    said = json.loads((tmp_path / "rows.json").read_text())
    assert said["rows"][-1]["metrics"] == result.rows[-1].metrics
    assert said["weightings"]["linear"] == LINEAR.to_json()
    lines = result.table().splitlines()
    assert lines[0].split() == ["weighting", "n", "newest", "member", "loss", "accuracy"]
    assert len({line.find("member-") for line in lines[1:]}) == 1  # aligned
    for metric, mode in ((None, "auto"), ("accuracy", "auto"), ("accuracy", "min")):
        marked = [line.split() for line in result.table(metric, mode=mode).splitlines() if line.endswith("best")]
        best = result.best(metric, mode=mode)
        assert [line[:3] for line in marked] == [[best.weighting, str(best.n), best.members[-1].name]]


def test_the_plot_is_a_picture(tmp_path):
    image = pytest.importorskip("PIL.Image")
    paths, _ = members(tmp_path, 4)
    sweep_checkpoints(paths, [MEAN, LINEAR], Recorder()).plot(tmp_path / "sweep.png", "accuracy")
    with image.open(tmp_path / "sweep.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ([1.0, 3.0, 2.0], "No average of two or more members (mean) beats it; the best of them, mean of the last 3"),
        ([1.0, 0.9, 5.0], "The best average, mean of the last 3, has 2.3 (-1"),
    ],
    ids=["averages lose", "averages win"],
)
def test_the_verdict_says_plainly_whether_averaging_helps(tmp_path, scores, sentence):
    paths = []
    for i, score in enumerate(scores):
        paths.append(tmp_path / f"{i}.safetensors")
        save_file({"w": np.array([score], np.float32)}, paths[-1])

    def evaluate(given):
        # In the second case the distance to the mean, so that only averages come near.
        value = float(given["w"][0])
        return {"loss": value if scores[2] == 2.0 else 2.3 + abs(value - 2.3)}

    result = sweep_checkpoints(paths, [MEAN], evaluate)
    assert sentence in result.verdict()


def test_the_best_row_is_exported_as_the_exact_average(tmp_path):
    paths, contents = members(tmp_path, 6)
    result = sweep_checkpoints(paths, {"mean": MEAN, "own": [1, 1, 2, 3, 5, 8]}, Recorder())
    for name, weights in (("mean", [1, 1, 1]), ("own", [3, 5, 8])):
        row = result.of(name)[2]
        report = result.export(row, tmp_path / f"{name}.safetensors")
        assert report.inputs == tuple(paths[-3:])
        expected = np.average([c["bias"] for c in contents[-3:]], axis=0, weights=weights)
        np.testing.assert_allclose(load_file(report.output)["bias"], expected, rtol=1e-15, atol=1e-15)
    single = result.of(SINGLE)[1]
    report = result.export(single, tmp_path / "single.safetensors")
    assert load_file(report.output)["kernel"].tobytes() == contents[-2]["kernel"].tobytes()


def test_an_export_never_replaces_a_member_even_one_that_is_not_in_the_row(tmp_path):
    paths, _ = members(tmp_path, 3)
    result = sweep_checkpoints(paths, [MEAN], Recorder())
    before = paths[2].read_bytes()
    with pytest.raises(CheckpointError, match="it is the member"):
        result.export(result.of(SINGLE)[2], paths[2], overwrite=True)
    assert paths[2].read_bytes() == before


def test_all_members_are_compared_before_the_first_evaluation(tmp_path):
    paths, _ = members(tmp_path, 3)
    save_file({"kernel": np.zeros((7, 12), np.float32)}, paths[0])
    record = Recorder()
    with pytest.raises(CheckpointError, match=r"kernel: float32 \(7, 12\) in .*member-0"):
        sweep_checkpoints(paths, [MEAN], record)
    assert record.seen == []


def test_a_member_that_is_not_finite_is_refused_by_name(tmp_path):
    paths, contents = members(tmp_path, 3)
    contents[1]["bias"][1] = np.nan
    save_file(contents[1], paths[1])
    with pytest.raises(NonFiniteError, match=r"member-1.safetensors, tensor 'bias': it holds NaN"):
        sweep_checkpoints(paths, [MEAN], lambda given: 0.0)
    result = sweep_checkpoints(paths, [MEAN], lambda given: float(given["bias"][0]), allow_nonfinite=True)
    assert len(result.rows) == 6


def test_a_member_that_changes_meanwhile_is_an_error(tmp_path):
    paths, _ = members(tmp_path, 3)

    def evaluate(given):
        os.utime(paths[2], ns=(1, 1))
        return 0.0

    with pytest.raises(CheckpointError, match=r"member-2.safetensors: it was written to or replaced"):
        sweep_checkpoints(paths, [MEAN], evaluate)


@pytest.mark.parametrize(
    ("weightings", "message"),
    [
        ([Polynomial(0.5)], "Expected a whole power"),
        ([[1.0, 2.0]], "Expected 3 finite weights >= 0"),
        ([[1.0, 2.0, 0.0]], "the newest above 0"),
        ([[1.0, -2.0, 1.0]], "Expected 3 finite weights >= 0"),
        ([Polynomial(65)], "Expected a power of at most 64"),
        ([MEAN, MEAN], "Expected a name of its own for each weighting, got 'mean' twice"),
        ({"single": MEAN}, "or 'single'"),
        ([], "Expected at least one weighting"),
    ],
)
def test_weightings_that_cannot_be_swept_are_refused(tmp_path, weightings, message):
    paths, _ = members(tmp_path, 3)
    with pytest.raises(ValueError, match=message):
        sweep_checkpoints(paths, weightings, lambda given: 0.0)


def test_other_wrong_arguments_are_refused(tmp_path):
    paths, _ = members(tmp_path, 2)
    with pytest.raises(ValueError, match='Expected accumulators="memory" or "disk"'):
        sweep_checkpoints(paths, [MEAN], lambda given: 0.0, accumulators="tape")
    with pytest.raises(ValueError, match="Expected evaluate to return metrics by name"):
        sweep_checkpoints(paths, [MEAN], lambda given: {})
    for nonsense in (None, np.zeros(3), {"loss": None}, {"loss": [1.0]}, "good"):
        with pytest.raises(ValueError, match="Expected evaluate to return numbers by name, or one number, got"):
            sweep_checkpoints(paths, [MEAN], lambda given, nonsense=nonsense: nonsense)
    turn = iter("ab" * 4)
    with pytest.raises(ValueError, match="the same metrics each time, got b after a"):
        sweep_checkpoints(paths, [MEAN], lambda given: {next(turn): 0.0})
    result = sweep_checkpoints(paths, [MEAN], lambda given: {"loss": float("nan")})
    with pytest.raises(ValueError, match="NaN in all rows"):
        result.best()
    with pytest.raises(ValueError, match="Expected a metric of loss; got 'los'"):
        result.best("los")
    with pytest.raises(ValueError, match='Expected mode="auto", "min" or "max"'):
        result.best("loss", mode="less")
