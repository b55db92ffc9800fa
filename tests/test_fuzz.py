"""Damaged files do no harm: some hundred of them here, and that the tool that finds more would tell."""

import importlib.util
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from streaming_polyak.errors import CheckpointError

SCRIPT = Path(__file__).parent.parent / "scripts" / "fuzz_files.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_files", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_files"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fuzz_files"]


@pytest.fixture(scope="module")
def undamaged(fuzz):
    return fuzz.specimens(None)


@pytest.mark.slow
def test_500_damaged_files_are_read_right_or_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--inputs", "500", "--seconds-per-file", "5", "--keep", tmp_path / "kept"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "kept").exists()
    rows = {
        m[1]: [int(n) for n in m[2].split()] for m in re.finditer(r"^(\w[\w. ]*?) {2,}([\d ]+)$", done.stdout, re.M)
    }
    assert len(rows) == 12, done.stdout  # every format, and all together
    for inputs, *counts in rows.values():
        assert inputs == sum(counts)
    inputs, refused, _, _, failed = rows.pop("all")
    assert (inputs, failed) == (500, 0)
    assert inputs == sum(row[0] for row in rows.values())
    assert all(row[0] > 20 and row[1] > 10 for row in rows.values()), done.stdout
    codes = re.search(r"^refused by code: (.*)$", done.stdout, re.M)[1].split(", ")
    assert len(codes) > 20
    assert sum(int(code.split()[-1]) for code in codes) == refused
    assert (
        "failures: crashes 0, hangs 0, over memory 0, other files opened 0, wrong in spite of checksums 0"
        in done.stdout
    )


def test_the_same_seed_gives_the_same_files(fuzz, undamaged):
    def files(seed):
        return [fuzz.damage(undamaged, random.Random(f"{seed} {n}")).files for n in range(50)]

    assert [specimen.files for specimen in fuzz.specimens(None)] == [specimen.files for specimen in undamaged]
    assert files(0) == files(0)
    assert files(0) != files(1)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (CheckpointError("truncated", "x", "it is."), "refused"),
        (CheckpointError("crash", "x", "libhdf5 crashed on it (SIGSEGV)."), "refused"),
        (CheckpointError("crash", "x", "the process that parses HDF5 ended with status 1: KeyError"), "crash"),
        (ZeroDivisionError(), "crash"),
        (MemoryError(), "memory"),
    ],
    ids=["refused", "crash of libhdf5", "mistake in the parser", "mistake in a reader", "memory"],
)
def test_errors_are_told_apart(error, outcome, fuzz, monkeypatch):
    def fail(path, parser):
        raise error

    monkeypatch.setattr(fuzz, "open_checkpoint", fail)
    assert fuzz._try(Path("x"), None, fuzz.Watch())["outcome"] == outcome


def test_a_file_opened_beside_the_input_is_told(fuzz, monkeypatch):
    watch = fuzz.Watch(folder="/inputs", siblings=("a.index", "a.data-"))

    def open_others(path, parser):
        for name in ("/inputs/a.index", "/inputs/a.data-00000-of-00001", "/dev/null", watch.temporary, 7):
            watch("open", (name, "r", 0))
        assert not watch.opened
        for name in ("/inputs/b.index", "/inputs/sub/a.index", "/etc/passwd", b"/etc/hosts"):
            watch("open", (name, "r", 0))
        watch("socket.connect", (None, "somewhere"))
        watch("subprocess.Popen", ("python", ["python", "-P", "/else.py"], None, None))
        raise CheckpointError("truncated", "x", "it is.")

    monkeypatch.setattr(fuzz, "open_checkpoint", open_others)
    answer = fuzz._try(Path("x"), None, watch)
    assert answer["outcome"] == "opened"
    assert len(watch.opened) == 6


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ({"outcome": "accepted", "digest": "as before"}, None),
        ({"outcome": "accepted", "digest": "another"}, "wrong"),
        ({"outcome": "refused", "code": "zip"}, None),
        ({"outcome": "refused", "code": "zip", "parser": 1 << 30}, "memory"),
        ({"outcome": "hang"}, "hang"),
    ],
)
def test_outcomes_count_as_failures_where_they_should(answer, failure, fuzz, undamaged, capsys):
    report = fuzz.Report({"as before"})
    archive = next(specimen for specimen in undamaged if specimen.kind == "keras")
    assert report.add(0, archive, dict(answer)) == failure
    report.show(0, 1.0)
    assert sum(report.failed.values()) == (failure is not None)
    assert re.search(rf"^keras +1 .* {int(failure is not None)}$", capsys.readouterr().out, re.M)


def test_the_help_explains(fuzz):
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    for word in ("crashes", "hangs", "grows", "wanders", "errs", "--inputs", "--seed", "--keep", "--seconds-per-file"):
        assert word in done.stdout
