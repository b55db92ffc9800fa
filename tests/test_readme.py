"""What the README shows runs as it stands."""

import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_two_commands_stand_at_the_top_and_exist():
    top = README.splitlines()[:25]
    for script in ("scripts/demo.sh", "scripts/test.sh"):
        assert any(f"bash {script}" in line for line in top)
        assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0


def test_pictures_and_files_it_links_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


@pytest.mark.tensorflow
@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=lambda block: block[:30])
def test_python_examples_run_as_they_stand(block, tmp_path):
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_example_of_the_loop_is_fifteen_lines():
    first = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in first.splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("command", re.findall(r"^streaming-polyak .*--help$", README, re.MULTILINE))
def test_help_commands_run(command):
    done = subprocess.run([sys.executable, "-m", "streaming_polyak", *command.split()[1:]], capture_output=True)
    assert done.returncode == 0


@pytest.mark.slow
def test_the_commands_on_checkpoints_run_as_they_stand(tmp_path):
    section = README.partition("## Averaging saved checkpoints")[2].partition("\n## ")[0]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1]
    commands = [line for line in block.splitlines() if line.startswith("streaming-polyak ")]
    assert len(commands) >= 5
    (tmp_path / "run").mkdir()
    for epoch in range(3):
        weights = io.BytesIO()
        with h5py.File(weights, "w") as file:
            file["layers/dense/vars/0"] = np.full((2, 3), epoch, np.float32)
        with zipfile.ZipFile(tmp_path / "run" / f"epoch-{epoch}.keras", "w") as archive:
            archive.writestr("metadata.json", "{}")
            archive.writestr("config.json", "{}")
            archive.writestr("model.weights.h5", weights.getvalue())
    (tmp_path / "score.py").write_text("def evaluate(given):\n    return float(given['layers/dense/vars/0'][0, 0])\n")
    command = Path(sys.executable).with_name("streaming-polyak")
    for line in commands:
        shell = line.replace("streaming-polyak", str(command), 1)
        done = subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stderr)
        assert done.stdout, line
    assert {"average.keras", "average.safetensors", "sweep.csv", "best.keras"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.slow
@pytest.mark.tensorflow
def test_the_example_of_a_run_runs_twice_and_the_commands_on_it(tmp_path):
    section = README.partition("## Runs that are killed")[2].partition("\n## ")[0]
    example, block = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)[1] for kind in ("python", "sh"))
    shown = [
        subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert shown[0] == shown[1]
    for line in block.splitlines():
        arguments = [sys.executable, "-m", *line.replace("streaming-polyak", "streaming_polyak", 1).split()]
        assert subprocess.run(arguments, cwd=tmp_path, capture_output=True, check=False).returncode == 0, line


def test_the_tests_that_it_names_exist():
    named = set(re.findall(r"`(?:test_\w+\.py: )?(test_\w+)`", README))
    assert len(named) >= 10
    there = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert not [name for name in named if f"def {name}(" not in there]
