"""The commands on saved checkpoints: what they print, what they leave, how they end; without TensorFlow."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import test_average
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from streaming_polyak.cli import main
from streaming_polyak.files import source, sweep_result
from streaming_polyak.files.formats import hdf5

SCORES = """
import math

def closeness(given):
    return {"loss": abs(float(given["w"][0]) - 2.0), "accuracy": 1.0 / (1.0 + float(given["w"][1]) ** 2)}

def plain(given):
    return float(given["w"][0])

def nothing(given):
    return float("nan")

def broken(given):
    raise ValueError("no data to score on")

number = 3
"""


@pytest.fixture(autouse=True)
def _no_waiting_for_the_clock(monkeypatch):
    monkeypatch.setattr(source, "_TICK_NS", 0)


@pytest.fixture
def members(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "score", raising=False)
    for epoch, value in ((9, 1.0), (10, 2.0), (11, 6.0)):
        save_file(
            {"w": np.array([value, value / 2, -value], np.float32), "step": np.array([epoch])},
            f"epoch-{epoch}.safetensors",
        )
    (tmp_path / "score.py").write_text(SCORES)
    return ["epoch-9.safetensors", "epoch-10.safetensors", "epoch-11.safetensors"]


def run(*arguments, status=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    if result.exception is not None:
        assert isinstance(result.exception, SystemExit)
    return result


def test_a_parser_of_hdf5_that_does_not_start_is_one_line_and_status_1(tmp_path, monkeypatch):
    path = tmp_path / "a.weights.h5"
    h5py.File(path, "w").close()
    (tmp_path / "hdf5_child.py").write_text("import no_h5py")
    monkeypatch.setattr(hdf5, "__file__", str(tmp_path / "hdf5.py"))
    assert re.fullmatch(
        "Error: the process that parses HDF5 ended with .* ModuleNotFoundError: No module named 'no_h5py'\n",
        run("inspect", path, status=1).stderr,
    )


def test_average_writes_the_average_and_says_what_it_took(members):
    said = run("average", *members, "--output", "out.safetensors").stdout
    np.testing.assert_array_equal(load_file("out.safetensors")["w"], np.array([3, 1.5, -3], np.float32))
    assert load_file("out.safetensors")["step"] == 11
    assert re.match(
        r"out.safetensors: mean average of 3 checkpoints, 1 tensors with 3 numbers, 1 more from the newest\n"
        r"\d+ B read, \d+ B written in \d\.\d\d s \(\d\.\d\d GB/s\), peak memory \d+\.\d MiB\n$",
        said,
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--weighting", "linear"], (1 + 2 * 2 + 3 * 6) / 6),
        (["-w", "exponential:decay=0.5"], (0.25 * 1 + 0.5 * 2 + 6) / 1.75),
        (["--weights", "0.5,0.3,0.2"], 0.5 * 1 + 0.3 * 2 + 0.2 * 6),
        (["--last", "2"], 4.0),
        (["--last", "2", "--weights", "3,1"], 3.0),
        (["--memory", "8MiB"], 3.0),
    ],
)
def test_average_takes_weightings_weights_and_the_newest(members, options, expected):
    run("average", *members, "-o", "out.safetensors", *options)
    assert load_file("out.safetensors")["w"][0] == np.float32(expected)


def test_patterns_folders_and_lists_are_in_the_order_of_their_numbers(members, tmp_path):
    (tmp_path / "list.txt").write_text("# oldest first\nepoch-9.safetensors\n\nepoch-10.safetensors\n")
    for given, last in (("*.safetensors", 6.0), (".", 6.0), ("@list.txt", 2.0)):
        run("average", given, "-o", "x/out.safetensors", "--last", "1", "--overwrite")
        assert load_file("x/out.safetensors")["w"][0] == last
    run("average", *sorted(members), "-o", "x/out.safetensors", "--last", "1", "--overwrite")
    assert load_file("x/out.safetensors")["w"][0] == 1.0  # as given: epoch-9 is the last
    run("average", *sorted(members), "-o", "x/out.safetensors", "--last", "1", "--overwrite", "--sort", "epoch")
    assert load_file("x/out.safetensors")["w"][0] == 6.0


def test_average_as_json_has_all_figures(members):
    said = json.loads(run("average", *members, "-o", "out.safetensors", "--json").stdout)
    assert said["output"] == "out.safetensors"
    assert said["inputs"] == members
    assert said["weights"] == pytest.approx([1 / 3] * 3)
    assert {"bytes_read", "bytes_written", "seconds", "gigabytes_per_second", "peak_memory_bytes"} <= said.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["epoch-9.safetensors", "epoch-9.safetensors", "-o", "o.safetensors"], "it is the same file as"),
        (["epoch-9.safetensors", "gone.safetensors", "-o", "o.safetensors"], "gone.safetensors: there is no such file"),
        (["epoch-9.safetensors", "-o", "epoch-9.safetensors", "--overwrite"], "it is the input"),
        (["epoch-9.safetensors", "-o", "epoch-10.safetensors"], "exists already. Choose another name, or give --over"),
        (["epoch-9.safetensors", "-o", "o.pt"], "its name must end in .keras"),
        (["epoch-9.safetensors", "-o", "o.keras"], "Give a .keras file of the model as the template"),
        (["epoch-9.safetensors", "-o", "o.safetensors", "--memory", "1KiB"], r"a budget of at least .* Give \d+MiB"),
        (["epoch-9.safetensors", "-o", "o.safetensors", "--last", "2"], "there are only 1"),
        (["score.py", "-o", "o.safetensors"], "score.py: it is no checkpoint of a known format"),
    ],
)
def test_work_that_cannot_be_done_ends_with_one_and_leaves_everything(members, tmp_path, arguments, message):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = run("average", *arguments, status=1)
    assert result.stdout == ""
    assert re.search(message, result.stderr)
    assert result.stderr.startswith("Error: ")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["average", "-o", "o.safetensors"], "Missing argument 'CHECKPOINT...'"),
        (["average", "a.keras"], "Missing option '-o' / '--output'"),
        (["average", "a.keras", "-o", "b.keras", "-w", "cubic"], "Expected a weighting, one of"),
        (["average", "a.keras", "-o", "b.keras", "--weights", "1;2"], "is not a list of numbers"),
        (["average", "a.keras", "-o", "b.keras", "--weights", "1,2", "-w", "mean"], "give one of them"),
        (["average", "*.safetensors", "-o", "b.npz", "--weights", "1,2"], "--weights has 2 numbers for 3 checkpoints"),
        (["average", "a", "b", "-o", "b.npz", "--last", "1", "--weights", "1,2"], "2 numbers for 1 checkpoint"),
        (["sweep", ".", "--evaluate", "score.py:plain", "--weights", "1"], "--weights has 1 number for 3 checkpoints"),
        *(
            ([*command, f"--weights={numbers}"], f"'--weights': {numbers!r} has a number that is no weight")
            for command in (
                ["average", "a.keras", "-o", "b.keras"],
                ["sweep", "a.keras", "--evaluate", "score.py:plain"],
            )
            for numbers in ("-1", "nan", "inf", "1,-0.5", "1e999")
        ),
        (["average", "a.keras", "-o", "b.keras", "--weights", "0"], "'--weights': '0' has no weight above 0"),
        (["sweep", "a.keras", "--evaluate", "score.py:plain", "--weights", "0,0.0"], "'0,0.0' has no weight above 0"),
        (["average", "a.keras", "-o", "b.keras", "--memory", "lots"], "Expected a size in bytes"),
        (["sweep", "a.keras", "--evaluate", "nothing"], "is not of the form MODULE:FUNCTION"),
        (["sweep", "a.keras", "--evaluate", "score.py:gone"], "cannot be loaded"),
        (["sweep", "a.keras", "--evaluate", "no_such_module:f"], "cannot be loaded"),
        (["sweep", "a.keras", "--evaluate", "score.py:number"], "is not callable"),
        (["sweep", "a.keras", "--evaluate", "gone.py:f"], "gone.py cannot be loaded: there is no such file"),
        (["inspect"], "Missing argument 'FILE...'"),
    ],
)
def test_wrong_usage_ends_with_two(members, arguments, message):
    result = run(*arguments, status=2)
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("command", ["average", "sweep", "inspect", "verify"])
def test_help_shows_examples(command):
    said = run(command, "--help").stdout
    assert f"Examples:\n    streaming-polyak {command} " in said


def test_sweep_prints_a_table_and_a_verdict_and_writes_what_is_asked_for(members, tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--csv", "rows.csv", "--plot", "rows.png", "--export-best", "best.safetensors"]
    result = run("sweep", *members, "--evaluate", "score.py:closeness", "-w", "mean", "-w", "linear", *options)
    assert result.stdout.splitlines()[0].split() == ["weighting", "n", "newest", "member", "loss", "accuracy"]
    assert "Best single member: epoch-10.safetensors with loss 0." in result.stdout
    assert "No average of two or more members (mean, linear) beats it" in result.stdout
    with (tmp_path / "rows.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 9
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert load_file("best.safetensors")["w"][0] == 2.0
    assert "best.safetensors: weights average of 1 checkpoints" in result.stdout


def test_sweep_by_another_metric_as_json(members):
    arguments = ["--evaluate", "score:closeness", "--metric", "accuracy", "--weights", "1,1,2", "--json"]
    said = json.loads(run("sweep", *members, *arguments, "--export-best", "best.safetensors").stdout)
    assert len(said["rows"]) == 6
    assert said["weightings"] == {"weights": [1, 1, 2]}
    assert "with accuracy 0.8" in said["verdict"]
    assert load_file("best.safetensors")["w"][0] == 1.0


def test_an_error_of_the_evaluation_is_told_with_the_lines_that_led_to_it(members, tmp_path):
    (tmp_path / "score.py").write_text(
        "def first(given):\n    return {'loss': len(bool)}\n\n"
        "def helped(given):\n    return [1].index(second(given))\n\n"
        "def second(given):\n    return {}['loss']\n\n"
        "class Full:\n    def __call__(self, given):\n        import json\n        json.loads('{')\n"
        "full = Full()\n"
    )
    for function, frames, error, line in (
        ("first", [2], "TypeError: object of type 'type' has no len()", 2),
        ("helped", [5, 8], "KeyError: 'loss'", 8),
        ("full", [13, None, None, None], "JSONDecodeError: Expecting property name", 13),
    ):
        shown = run("sweep", *members, "--evaluate", f"score.py:{function}", status=1).stderr
        assert len(re.findall(r"^  File", shown, re.MULTILINE)) == len(frames)
        for number in filter(None, frames):
            assert re.search(rf'^  File ".*score\.py", line {number}, in ', shown, re.MULTILINE)
        last = shown.splitlines()[-1]
        assert last.startswith(f"Error: score.py:{function} raised {error}")
        assert last.endswith(f"score.py:{line})")


def test_errors_of_the_library_in_an_evaluation_are_told_as_they_are(members):
    save_file({"w": np.array([1, 2, np.nan], np.float32)}, members[2])
    result = run("sweep", *members[2:], "--evaluate", "score.py:closeness", status=1)
    assert result.stderr.startswith("Error: epoch-11.safetensors, tensor 'w': it holds NaN or infinity.")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("def f(:\n", r"SyntaxError: invalid syntax \(score.py, line 1\)"),
        ("x = 1\nopen('gone')\n", r"FileNotFoundError: .* \(.*score\.py:2\)"),
        ("import no_such_module\n", r"ModuleNotFoundError: No module named 'no_such_module' \(.*score\.py:1\)"),
    ],
)
@pytest.mark.parametrize("module", ["score.py", "score"])
def test_an_error_of_the_module_is_told_with_the_lines_that_led_to_it(members, tmp_path, module, code, error):
    (tmp_path / "score.py").write_text(code)
    shown = run("sweep", *members, "--evaluate", f"{module}:f", status=1).stderr
    assert re.search(rf"^Error: {module}:f raised {error}\n$", shown, re.MULTILINE)
    assert "importlib" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("name", ["json.py", "random.py", "click.py", "a-b.py", "my.score.py"])
def test_a_path_is_that_file_whatever_it_is_called(members, tmp_path, name):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / name).write_text("from beside import score\nevaluate = score\n")
    (tmp_path / "lib" / "beside.py").write_text("score = lambda given: float(given['w'][0])\n")
    (tmp_path / "lib" / "statistics.py").write_text("raise ImportError('not this one')\n")
    program = "import sys\nfrom streaming_polyak.cli import main\nmain(sys.argv[1:])\nimport statistics"
    arguments = [sys.executable, "-c", program, "sweep", *members, "--evaluate", f"lib/{name}:evaluate"]
    done = subprocess.run([*arguments, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["metrics"] == {"score": 6.0}


def test_a_power_that_would_take_all_memory_is_wrong_usage(members):
    arguments = ["sweep", *members, "--evaluate", "score.py:closeness", "-w"]
    assert "a power of at most 64" in run(*arguments, "polynomial:100000", status=2).stderr
    run(*arguments, "polynomial:64")


def test_a_metric_that_does_not_exist_is_told_at_the_first_evaluation(members):
    for function, names in (("closeness", "loss, accuracy"), ("plain", "score")):
        result = run("sweep", *members, "--evaluate", f"score.py:{function}", "--metric", "acuracy", status=1)
        assert f"Expected a metric of {names}; got --metric acuracy" in result.stderr


def test_a_plot_without_matplotlib_is_refused_before_the_work(members, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("sweep", *members, "--evaluate", "score.py:broken", "--plot", "rows.png", status=1)
    assert "--plot needs matplotlib. Install streaming_polyak[plots]" in result.stderr


def test_what_fails_after_a_sweep_does_not_take_its_results(members, tmp_path, monkeypatch):
    def write_csv(*_):
        raise OSError(28, "No space left on device", "rows.csv")

    monkeypatch.setattr(sweep_result, "write_csv", write_csv)
    arguments = ["sweep", *members, "--evaluate", "score.py:closeness", "--csv", "rows.csv"]
    result = run(*arguments, status=1)
    assert "No average of two or more members" in result.stdout
    assert "No space left on device" in result.stderr
    result = run(*arguments, "--json", "--export-best", "best.safetensors", status=1)
    assert len(json.loads(result.stdout)["rows"]) == 12
    assert "No space left on device" in result.stderr
    (tmp_path / "best.safetensors").unlink()
    result = run("sweep", *members, "--evaluate", "score.py:nothing", "--export-best", "best.safetensors", status=1)
    assert "No single member has a score." in result.stdout
    assert "NaN in all rows" in result.stderr
    assert not (tmp_path / "best.safetensors").exists()


def test_every_output_that_failed_is_told_and_the_others_are_written(members, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def full(*_):
        raise OSError(28, "No space left on device", "rows.csv")

    def refused(*_, **__):
        raise FileExistsError("best.safetensors exists already")

    monkeypatch.setattr(sweep_result, "write_csv", full)
    monkeypatch.setattr(sweep_result, "average_checkpoints", refused)
    arguments = ["--csv", "rows.csv", "--plot", "rows.png", "--export-best", "best.safetensors"]
    shown = run("sweep", *members, "--evaluate", "score.py:closeness", *arguments, status=1).stderr
    assert "Error: [Errno 28] No space left on device" in shown
    assert "Error: best.safetensors exists already" in shown
    assert (tmp_path / "rows.png").exists()


def test_outputs_go_where_the_command_was_given_though_the_evaluation_leaves(members, tmp_path):
    (tmp_path / "leaving.py").write_text("import os\ndef f(t):\n    os.chdir('/')\n    return 0.0\n")
    run("sweep", *members, "--evaluate", "leaving.py:f", "--csv", "rows.csv", "--export-best", "best.safetensors")
    assert {"rows.csv", "best.safetensors"} <= {path.name for path in tmp_path.iterdir()}


def test_no_output_is_a_part_of_an_input_of_several_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score.py").write_text("def f(tensors):\n    return 0.0\n")
    for k in range(2):
        test_average.write_sharded(tmp_path / f"s{k}.weights.json", test_average.small(k))
        test_average.write_bundle(tmp_path / f"t{k}", {"w": np.full(2, k, np.float32)})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for inputs, output in (
        (["s0.weights.json", "s1.weights.json"], "s0_00000.weights.h5"),
        (["t0", "t1"], "t0.data-00000-of-00001"),
        (["t0", "t1"], "t0.index"),
    ):
        shown = run("sweep", *inputs, "--evaluate", "score.py:f", "--csv", output, status=1).stderr
        assert f"--csv {output} is the input {inputs[0]}, or a file of it" in shown
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_commands_work_without_an_error_output(members):
    program = f"{sys.executable} -m streaming_polyak average {' '.join(members)} -o out.safetensors 2>&-"
    assert subprocess.run(program, shell=True, stdout=subprocess.DEVNULL).returncode == 0
    program = f"{sys.executable} -m streaming_polyak verify out.safetensors 2>&-"
    assert b"good" in subprocess.run(program, shell=True, stdout=subprocess.PIPE).stdout


def test_results_are_written_though_nobody_reads_what_is_printed(members, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["sweep", *members, "--evaluate", "score.py:closeness", "--csv", "rows.csv", "--plot", "rows.png"]
    program = [sys.executable, "-m", "streaming_polyak", *arguments, "--export-best", "best.safetensors"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as "| head" does
        assert b"Broken pipe" in process.stderr.read()
    assert process.returncode == 1
    assert {"rows.csv", "rows.png", "best.safetensors"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--export-best", "old.safetensors"], "old.safetensors exists already. Choose another name, or give --over"),
        (["--export-best", "epoch-9.safetensors"], "--export-best epoch-9.safetensors is the input"),
        (["--export-best", "epoch-9.safetensors", "--overwrite"], "--export-best epoch-9.safetensors is the input"),
        (["--csv", "./epoch-9.safetensors"], "--csv epoch-9.safetensors is the input epoch-9.safetensors"),
        (["--plot", "link.png"], "--plot link.png is the input epoch-10.safetensors"),
        (["--csv", "score.py"], "--csv score.py is the evaluation, or a file of it"),
        (["--csv", "folder"], "--csv folder is a folder"),
        (["--export-best", "folder", "--overwrite"], "--export-best folder is a folder"),
        (["--csv", "score.py/rows.csv"], "--csv score.py/rows.csv cannot be written: "),
        (["--plot", "new/a.png", "--csv", "new/../new/a.png"], "--plot new/a.png and --csv new/../new/a.png are one"),
        (["--export-best", "best.pt"], "its name must end in .keras"),
        (["--export-best", "best"], "its name must end in .keras"),
        (["--export-best", "best.keras"], "cannot be made of"),
    ],
)
def test_a_sweep_does_not_begin_when_its_results_could_not_be_written(members, tmp_path, arguments, message):
    pytest.importorskip("matplotlib")
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.safetensors").touch()
    (tmp_path / "link.png").symlink_to(members[1])
    before = {path.name for path in tmp_path.iterdir()}
    result = run("sweep", *members, "--evaluate", "score.py:broken", "--last", "1", *arguments, status=1)
    assert message in result.stderr
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == before


def test_a_folder_that_cannot_be_written_to_is_told_before_the_sweep(members, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path / "locked")
    (tmp_path / "locked").mkdir()
    arguments = ["--evaluate", "score.py:broken", "--csv", tmp_path / "locked" / "new" / "rows.csv"]
    result = run("sweep", *members, *arguments, status=1)
    assert f"cannot be written: {tmp_path / 'locked'} is not a folder that may be written to" in result.stderr


def test_a_plot_has_exactly_the_name_that_was_asked_for(members, tmp_path):
    pytest.importorskip("matplotlib")
    run("sweep", *members, "--evaluate", "score.py:closeness", "--plot", "out/picture")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["picture"]
    assert (tmp_path / "out" / "picture").read_bytes().startswith(b"\x89PNG")


def test_what_may_be_swept_with_nan_in_it_may_be_exported_too(members):
    save_file({"w": np.array([2, 1, np.nan], np.float32)}, "epoch-10.safetensors")
    save_file({"w": np.array([9, 1, 1], np.float32)}, "epoch-11.safetensors")
    arguments = [*members[1:], "--evaluate", "score.py:closeness", "--export-best", "best.safetensors"]
    run("sweep", *arguments, "--allow-nonfinite")
    np.testing.assert_array_equal(load_file("best.safetensors")["w"], np.array([2, 1, np.nan], np.float32))


def test_inspect_shows_tensors_and_what_differs(members):
    said = run("inspect", members[0]).stdout
    assert "epoch-9.safetensors: safetensors, " in said
    assert re.search(r"^w +float32 +3 +12 +in place$", said, re.MULTILINE)
    assert re.search(r"^step +int64 +1 +8 +in place$", said, re.MULTILINE)
    save_file({"w": np.zeros((2, 2)), "extra": np.zeros(1)}, "other.safetensors")
    said = run("inspect", *members[:2], "other.safetensors").stdout
    assert "epoch-10.safetensors has the same tensors as epoch-9.safetensors" in said
    assert "w: float64 (2, 2) in other.safetensors, float32 (3,) in epoch-9.safetensors" in said
    assert "step: missing in other.safetensors" in said
    assert "extra: only in other.safetensors" in said
    said = json.loads(run("inspect", *members[:2], "--json").stdout)
    assert said["files"][0]["tensors"][0].keys() == {"name", "dtype", "shape", "bytes", "in_place", "optimizer"}
    assert said["differences"] == [{"path": members[1], "lines": []}]


@pytest.mark.parametrize(
    ("provenance", "shown"),
    [
        ({"inputs": 5}, '  made by: {"inputs": 5}'),
        ({"inputs": None, "made_by": ["\x1b[2J"]}, r'  made by: {"inputs": null, "made_by": ["\u001b[2J"]}'),
        ({"inputs": {"0": 1}}, '  made by: {"inputs": {"0": 1}}'),
        ({"inputs": [1, {"x": [2]}]}, '  made by: {}\n    1\n    {"x": [2]}'),
    ],
)
def test_what_a_file_says_of_its_making_may_be_anything(members, provenance, shown):
    save_file({"w": np.zeros(1)}, "odd.safetensors", {"streaming_polyak": json.dumps(provenance)})
    assert f"\n{shown}\n" in run("inspect", "odd.safetensors").stdout
    assert json.loads(run("inspect", "odd.safetensors", "--json").stdout)["files"][0]["provenance"] == provenance
    assert json.loads(run("verify", "odd.safetensors", "--json").stdout)[0]["provenance"] == provenance
    run("verify", "odd.safetensors")


@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "--json"], ["verify", "--json"]])
def test_what_a_file_says_may_be_nested_deeply(members, arguments):
    said = '{"inputs": ' + "[" * 700 + "]" * 700 + "}"
    save_file({"w": np.zeros(1)}, "odd.safetensors", {"streaming_polyak": said})
    result = CliRunner().invoke(main, [*arguments, "odd.safetensors"])
    assert isinstance(result.exception, SystemExit | None)


def test_nothing_that_a_stranger_named_controls_the_terminal(members, tmp_path):
    evil = "\x1b[2J\x9b8m\r\u202e\nevil: good"
    escaped = r"\x1b[2J\x9b8m\r\u202e\nevil: good"
    name = f"{evil}\udcff.safetensors"  # ends in a byte that is not UTF-8
    for weight in ("w", evil):
        save_file({weight: np.ones(1, np.float32)}, tmp_path / "x", {"streaming_polyak": json.dumps({"a": evil})})
        (tmp_path / "x").rename(tmp_path / (name if weight == evil else "plain.safetensors"))
    save_file({evil: np.array([np.nan])}, "nan.safetensors")
    (tmp_path / "score.py").write_text(
        f"evaluate = lambda given: 1.0\ndef broken(given):\n    raise OSError({evil!r})\n"
    )
    sweep = ["sweep", name, "--evaluate"]
    for arguments, status in (
        (["inspect", name, "plain.safetensors"], 0),
        (["verify", name], 0),
        (["verify", "nan.safetensors", name + "gone"], 1),
        (["average", name, "plain.safetensors", "-o", "out.npz"], 1),
        (["average", name, "-o", f"{evil}.npz"], 0),
        ([*sweep, "score.py:evaluate"], 0),
        ([*sweep, "score.py:broken"], 1),
    ):
        result = run(*arguments, status=status)
        shown = (result.stdout + result.stderr).replace("\n", "")
        assert shown.isprintable(), shown
        assert r"\x1b[2J\x9b8m\r\u202e" in shown
    said = run("inspect", name, "plain.safetensors").stdout
    assert f"\n{escaped} " in said
    assert f"\n  {escaped}: missing in plain.safetensors\n" in said
    assert said.startswith(rf"{escaped}\udcff.safetensors: safetensors, ")


def test_json_has_null_for_what_json_cannot_say(members):
    def read(*arguments):
        def refuse(constant):
            raise AssertionError(constant)

        return json.loads(run(*arguments, "--json").stdout, parse_constant=refuse)

    save_file({"w": np.ones(1)}, "odd.safetensors", {"streaming_polyak": '{"a": [NaN, {"b": -Infinity}], "c": 1.5}'})
    plain = {"a": [None, {"b": None}], "c": 1.5}
    assert read("inspect", "odd.safetensors")["files"][0]["provenance"] == plain
    assert read("verify", "odd.safetensors")[0]["provenance"] == plain
    Path("score.py").write_text("evaluate = lambda given: {'a': float('inf'), 'b': 1.0, 'c': float('nan')}\n")
    for row in read("sweep", *members, "--evaluate", "score.py:evaluate", "--metric", "b")["rows"]:
        assert row["metrics"] == {"a": None, "b": 1.0, "c": None}


def test_verify_tells_good_from_damaged(members, tmp_path):
    run("average", *members, "-o", "out.safetensors")
    said = run("verify", *members, "out.safetensors").stdout
    assert "epoch-9.safetensors: good. safetensors, 2 tensors" in said
    assert "the format has no checksums" in said
    assert re.search(r"out.safetensors: good.* 1 checksums hold; mean average of 3 checkpoints", said)
    damaged = bytearray((tmp_path / "out.safetensors").read_bytes())
    damaged[-3] ^= 4
    (tmp_path / "bad.safetensors").write_bytes(damaged)
    save_file({"w": np.array([np.inf], np.float32)}, "inf.safetensors")
    result = run("verify", members[0], "bad.safetensors", "inf.safetensors", "score.py", status=1)
    assert "epoch-9.safetensors: good" in result.stdout
    assert "bad.safetensors: the CRC-32 of its tensors and" in result.stderr
    assert "inf.safetensors, tensor 'w': it holds NaN or infinity" in result.stderr
    assert "score.py: it is no checkpoint of a known format" in result.stderr
    said = json.loads(run("verify", members[0], "bad.safetensors", "--json", status=1).stdout)
    assert [entry["ok"] for entry in said] == [True, False]


def test_terminated_an_average_leaves_nothing_behind(tmp_path):
    for name in ("a", "b"):
        save_file({str(i): np.ones(9, np.float32) for i in range(200)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "tmp").mkdir()
    program = (
        "import sys, time\nfrom streaming_polyak.cli import main\n"
        "from streaming_polyak.files.average_pass import AveragePass\n"
        "done = AveragePass._average\n"
        "def slowly(*job):\n    print('averaging', flush=True)\n    time.sleep(0.5)\n    done(*job)\n"
        "AveragePass._average = slowly\nmain(sys.argv[1:])"
    )
    arguments = ["average", "a.safetensors", "b.safetensors", "-o", "out.safetensors"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    ) as process:  # fmt: skip
        assert process.stdout.readline().startswith(b"averaging")  # by several threads at once
        assert any(path.name.startswith(".writing-") for path in tmp_path.iterdir())
        process.terminate()
        _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert said == b""
    assert {path.name for path in tmp_path.rglob("*")} == {"a.safetensors", "b.safetensors", "tmp"}


def test_none_of_these_commands_imports_tensorflow(members):
    program = (
        "import sys\nfrom streaming_polyak.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'tensorflow', 'keras', 'matplotlib', 'h5py'} & set(sys.modules)\n"
    )
    for arguments in (
        ["average", *members, "-o", "out.safetensors"],
        ["sweep", *members, "--evaluate", "score.py:closeness"],
        ["inspect", *members],
        ["verify", "out.safetensors"],
    ):
        subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)
