"""The package from outside: what importing it costs, the command line, the examples in docstrings."""

import doctest
import json
import subprocess
import sys
import types
from importlib.metadata import entry_points, metadata

import pytest
from click.testing import CliRunner

import streaming_polyak
from streaming_polyak import cli, weighting

# Prints seconds and modules of a statement run in a fresh interpreter, which starts before the clock.
PROBE = """
import json, sys, time
started = time.perf_counter()
try:
    {statement}
except SystemExit as end:
    assert not end.code, end.code
seconds = time.perf_counter() - started
print(json.dumps({{"seconds": seconds, "modules": sorted(sys.modules)}}), file=sys.stderr)
"""


def probe(statement):
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(statement=statement)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    "statement",
    [
        "import streaming_polyak",
        "from streaming_polyak.cli import main; main(['--help'], prog_name='streaming-polyak')",
        "from streaming_polyak.cli import main; main(['demo', '--help'], prog_name='streaming-polyak')",
    ],
    ids=["import", "help", "demo help"],
)
def test_importing_and_help_leave_tensorflow_out_and_take_half_a_second_at_most(statement):
    seen = [probe(statement) for _ in range(3)]
    assert not {"tensorflow", "keras", "matplotlib", "sklearn"} & set(seen[0]["modules"])
    assert "streaming_polyak" in seen[0]["modules"]
    assert min(run["seconds"] for run in seen) <= 0.5  # the best of three: the machine may be busy


def test_public_names_exist_and_are_listed():
    assert set(streaming_polyak.__all__) <= set(dir(streaming_polyak))
    lazy = {"Trainer", "History", "KerasEvaluator"}  # these import TensorFlow
    for name in set(streaming_polyak.__all__) - lazy:
        assert getattr(streaming_polyak, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Trianer'"):
        streaming_polyak.Trianer  # noqa: B018


def test_the_metadata_name_the_command_and_the_version():
    (script,) = entry_points(group="console_scripts", name="streaming-polyak")
    assert script.value == "streaming_polyak.cli:main"
    assert metadata("streaming_polyak")["Version"] == streaming_polyak.__version__
    assert metadata("streaming_polyak")["Requires-Python"] == ">=3.11"


def test_docstring_examples_run():
    results = doctest.testmod(weighting)
    assert results.attempted >= 2
    assert results.failed == 0


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "streaming_polyak", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"streaming-polyak, version {streaming_polyak.__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["demo", "--help"]])
def test_help_teaches_with_examples(arguments):
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0
    assert "demo" in result.output
    if arguments[0] == "demo":
        assert "Examples:\n    streaming-polyak demo\n" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--data", "iris"], "'iris' is not one of 'blobs', 'digits'"),
        (["demo", "--epochs", "0"], "0 is not in the range x>=1"),
        (["demo", "--alpha", "0"], "0.0 is not in the range x>0"),
        (["demo", "--data", "digits", "--members", "3"], "--members is for --data blobs, not for --data digits"),
        (["demo", "--data", "blobs", "--repeats", "3"], "--repeats is for --data digits, not for --data blobs"),
        (["demo", "--epochs", "5", "--members", "6"], "--members 6 is more than the 5 epochs"),
        (["dmeo"], "No such command 'dmeo'"),
    ],
)
def test_wrong_usage_ends_with_status_two_and_says_why(arguments, message):
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_an_error_of_the_work_ends_with_status_one_and_no_traceback(tmp_path, monkeypatch):
    def run(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(sys.modules, "streaming_polyak.demo.blobs", types.SimpleNamespace(run=run))
    monkeypatch.setattr(sys.modules["streaming_polyak"], "demo", types.SimpleNamespace(), raising=False)
    monkeypatch.setitem(
        sys.modules, "streaming_polyak.demo", types.SimpleNamespace(blobs=types.SimpleNamespace(run=run))
    )
    result = CliRunner().invoke(cli.main, ["demo", "--data", "blobs", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output == "Error: [Errno 28] No space left on device\n"
