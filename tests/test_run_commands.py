"""Runs from the shell: killed for real, resumed, looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from streaming_polyak.cli import main

SCRIPT = Path(__file__).parent.parent / "scripts" / "crash_test.py"


@pytest.mark.slow
@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("kills", "name", "more"), [(20, "KILL", ()), (10, "TERM", ()), (10, "TERM", ("--grace", "0.02"))]
)
def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_bits(kills, name, more):
    program = [sys.executable, SCRIPT, str(kills), "--fork", "--signal", name, *more, "--json"]
    run = subprocess.run(program, capture_output=True, text=True)
    result = json.loads(run.stdout[run.stdout.index("{") :])
    assert result["bad"] == []
    assert run.returncode == 0
    assert result["kills"] > kills // 2  # the run may end before
    assert bool(result["overdue"]) is bool(more)
    assert result["sha256"][0] == result["sha256"][1]


JOB = """
import os, signal
import numpy as np, keras, streaming_polyak as sp

class KillMe(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1 and os.environ.get("KILL_ME"):
            os.kill(os.getpid(), getattr(signal, os.environ["KILL_ME"]))
    def get_state(self):
        return {}
    def set_state(self, state):
        pass

def make(run_dir):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    x = np.ones((8, 3), np.float32)
    trainer = sp.Trainer(model, {"mean": sp.Average(sp.MEAN)}, run_dir=run_dir, save_every="1 epoch")
    return trainer, {"x": x, "y": x[:, :2], "epochs": 9, "validation_data": (x, x[:, :2]), "callbacks": [KillMe()]}

def nothing(run_dir):
    return None

def elsewhere(run_dir):
    return make(run_dir / "other")
"""


def command(*arguments, kill=None):
    program = [sys.executable, "-m", "streaming_polyak", *map(str, arguments)]
    environment = {"PATH": "", "KILL_ME": kill or "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(program, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.tensorflow
def test_the_same_command_goes_on_after_a_kill_and_status_tells_how_far_it_came(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    run_dir = tmp_path / "run"
    train = ["train", f"{tmp_path / 'job.py'}:make", "--run-dir", run_dir, "--epochs", 4]
    assert command(*train, kill="SIGKILL").returncode == -9
    shown = CliRunner().invoke(main, ["status", str(run_dir), "--json"])
    assert shown.exit_code == 0
    found = json.loads(shown.stdout)
    assert found["holder"] is None
    assert [(c["step"], c["epoch"], c["wrong"]) for c in found["checkpoints"]] == [(1, 1, None)]
    ended = command(*train, "--resume", "must", kill="SIGTERM")
    assert ended.returncode == 143
    assert f"SIGTERM: the run in {run_dir} is saved; the same call goes on with it." in ended.stderr
    done = command(*train)
    assert done.returncode == 0
    assert f"{run_dir}: 4 epochs; loss=" in done.stdout
    shown = CliRunner().invoke(main, ["status", str(run_dir)])
    assert shown.exit_code == 0
    assert "3 checkpoints; nobody is at work in it" in shown.stdout
    assert "last scores: epoch=3, loss=" in shown.stdout
    assert CliRunner().invoke(main, ["verify", str(run_dir)]).exit_code == 0
    newest = sorted((run_dir / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    shown = CliRunner().invoke(main, ["verify", str(run_dir)])
    assert shown.exit_code == 1
    assert f"{newest}: " in shown.stderr
    assert CliRunner().invoke(main, ["status", str(run_dir)]).exit_code == 0
    for name, message in (
        ("nothing", "must return a Trainer and a dict of arguments for its fit, got None"),
        ("elsewhere", "must return a Trainer whose run_dir is the one that it got"),
    ):
        refused = CliRunner().invoke(main, ["train", f"{tmp_path / 'job.py'}:{name}", "--run-dir", str(run_dir)])
        assert refused.exit_code == 2
        assert message in refused.stderr


def test_a_folder_without_a_run_is_told(tmp_path):
    shown = CliRunner().invoke(main, ["status", str(tmp_path / "none")])
    assert shown.exit_code == 1
    assert "there is no such folder" in shown.stderr
    shown = CliRunner().invoke(main, ["status", str(tmp_path)])
    assert shown.exit_code == 1
    assert "0 checkpoints; nobody is at work in it" in shown.stdout
