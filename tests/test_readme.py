"""What the README shows runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

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
