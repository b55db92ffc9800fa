"""Checkpoints of a run survive kills, power cuts, flipped bits and failing disks; none of it needs TensorFlow."""

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from simulated_disk import CutShort, FailingDisk, PowerCut, RecordingDisk, materialize

from streaming_polyak.errors import CheckpointError, RunLockedError
from streaming_polyak.files import run_checkpoint, source
from streaming_polyak.files.disk import Disk
from streaming_polyak.files.run_checkpoint import Part, RunCheckpoint, write_run_checkpoint
from streaming_polyak.files.run_folder import RunFolder, Saved, holder
from streaming_polyak.files.storage import TEMPORARY


@pytest.fixture(autouse=True)
def _no_waiting_for_the_clock(monkeypatch):
    monkeypatch.setattr(source, "_TICK_NS", 0)


def arrays(step):
    rng = np.random.default_rng(step)
    return {
        "model/kernel": rng.normal(size=(25, 9)).astype(np.float32),
        "model/half": rng.normal(size=7).astype(ml_dtypes.bfloat16),
        "seed": rng.integers(0, 9, 2).astype(np.uint32),
        "average/m": rng.normal(size=()),
        "none": np.zeros((0, 2), np.float32),
    }


def parts(step):
    return [Part.of(name, array) for name, array in arrays(step).items()]


def commit(folder, step, save=1):
    return folder.commit(step, parts(step), {"epoch": step // 10, "history": {"loss": [1.5, 0.25]}}, save=save)


def is_of(checkpoint, step):
    """Whether a checkpoint is that of a step, to the bit."""
    same = all(checkpoint.read(name).tobytes() == array.tobytes() for name, array in arrays(step).items())
    return same and checkpoint.step == step and checkpoint.state["epoch"] == step // 10


def files(folder):
    return {path.name: path.read_bytes() for path in folder.checkpoints_folder.iterdir()}


def copied(source, path):
    """A run folder with the checkpoints of another."""
    shutil.copytree(source.path, path)
    return RunFolder(path)


# What a checkpoint is.


def test_a_checkpoint_is_a_safetensors_file_with_all_that_was_given(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.latest() is None
    path = commit(folder, 1200, save=3)
    assert path == tmp_path / "run/checkpoints/step-000000001200.safetensors"
    found = folder.latest()
    assert is_of(found, 1200)
    assert (found.save, found.state["history"]) == (3, {"loss": [1.5, 0.25]})
    for name, array in load_file(path).items():  # anybody's reader
        assert array.tobytes() == arrays(1200)[name].tobytes(), name


def test_one_part_at_a_time_is_looked_at(tmp_path):
    alive, most = [], []

    class Watched(np.ndarray):
        def __del__(self):
            if self.base is None:
                alive.pop()

    def read():
        alive.append(1)
        most.append(len(alive))
        return np.zeros(1000, np.float32).view(Watched).copy()

    watched = [Part(f"p{k}", "float32", (1000,), read) for k in range(5)]
    write_run_checkpoint(tmp_path / "x", watched, {}, step=1, save=1)
    assert len(most) == 5
    assert max(most) <= 2  # the new one while the last is still bound to a name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([Part.of("a", np.zeros(2)), Part.of("a", np.zeros(2))], "two parts called .a."),
        ([Part("a", "float32", (2,), lambda: np.zeros(3, np.float32))], r"'a' is float32 \(3,\), not float32 \(2,\)"),
        ([Part("a", "float32", (2,), lambda: np.zeros(2))], r"'a' is float64 \(2,\), not float32 \(2,\)"),
    ],
)
def test_parts_that_are_not_what_they_say_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        RunFolder(tmp_path).commit(1, given, {}, save=1)
    assert RunFolder(tmp_path).saved() == []


def test_a_checkpoint_of_a_later_version_or_of_something_else_is_told(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    monkeypatch.setattr(run_checkpoint, "VERSION", 2)
    path = commit(folder, 5)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="it has version 2 of this format; this library reads 1"):
        RunCheckpoint(path)
    (tmp_path / "other.safetensors").write_bytes(path.read_bytes().replace(b"header_crc32", b"header_crc33"))
    with pytest.raises(CheckpointError, match="it is no checkpoint of a run"):
        RunCheckpoint(tmp_path / "other.safetensors")


# Which are kept.


def test_the_newest_are_kept_and_every_so_many(tmp_path):
    folder = RunFolder(tmp_path, keep=2, keep_every=3)
    stranger = tmp_path / "checkpoints/step-1.safetensors"
    for save in range(1, 9):
        commit(folder, save * 10, save)
        stranger.touch()
    assert [saved.step for saved in folder.saved()] == [30, 60, 70, 80]
    assert stranger.exists()
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file() and p != stranger) == [
        f"step-{step:012d}.safetensors" for step in (30, 60, 70, 80)
    ]


@pytest.mark.parametrize(("keep", "every"), [(1, None), (0, None), (3, 0)])
def test_too_few_kept_are_refused(tmp_path, keep, every):
    with pytest.raises(ValueError, match="Expected keep"):
        RunFolder(tmp_path, keep=keep, keep_every=every)


def test_what_a_killed_process_was_writing_is_removed_by_the_next_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path)
    commit(folder, 1)
    left = tmp_path / f"checkpoints/{TEMPORARY}0123456789ab-step-000000000002.safetensors"
    others = [left.with_name(f"{TEMPORARY}0123456789ab-mine.safetensors"), left.with_name("notes.txt")]
    for path in (left, *others):
        path.touch()
    folder.clean()
    assert not left.exists()
    assert all(path.exists() for path in others)


# Kills and power cuts.


def trace_of(path, disk, folder_class=RunFolder, saves=4):
    folder = folder_class(path, keep=2, disk=disk)
    for save in range(1, saves + 1):
        commit(folder, save * 10, save)
        disk.acknowledge(save * 10)
    return disk.trace


def outcome(path, acknowledged):
    """What a run that starts on a disk in some state would find: "good", or how it would be wrong."""
    folder = RunFolder(path)
    try:
        found = folder.latest()
    except CheckpointError:
        return "refused"
    if found is None:
        return "good" if acknowledged is None else "lost"
    if not is_of(found, found.step):
        return "silently wrong"
    return "good" if acknowledged is None or found.step >= acknowledged else "lost"


def outcomes(tmp_path, trace, states):
    """How often each outcome comes of killing, and of cutting the power, after every event of a trace."""
    root, killed, cut = tmp_path / "run", [], []
    numbers = random.Random(0)
    each = -(-states // (len(trace) + 1))
    for end in range(len(trace) + 1):
        power = PowerCut(trace[:end])
        seen = {}
        for number in range(each + 2):
            choice = ("killed", "lost")[number] if number < 2 else numbers
            state = power.state(choice)
            key = tuple(sorted(state.items()))
            if key not in seen:
                there = tmp_path / "state"
                materialize(state, root, there)
                seen[key] = outcome(there, power.acknowledged)
                shutil.rmtree(there, ignore_errors=True)
            (killed if number == 0 else cut).append(seen[key])
    return killed, cut


@pytest.mark.slow
def test_no_commit_is_lost_by_a_kill_or_a_power_cut_at_any_moment(tmp_path):
    trace = trace_of(tmp_path / "run", RecordingDisk())
    assert len(trace) > 40
    killed, cut = outcomes(tmp_path, trace, 10_000)
    assert len(cut) >= 10_000
    assert set(killed) == {"good"}
    assert set(cut) == {"good"}


class NoFileSync(RecordingDisk):
    def sync(self, fd):
        pass

    def sync_file(self, path):
        pass


class NoFolderSync(RecordingDisk):
    def sync_folder(self, path):
        pass


class SyncBeforeTheLastWrite(RecordingDisk):
    """What was written last comes to the system when the file is closed, after the sync."""

    _waiting = None

    def write(self, fd, data, offset):
        if self._waiting:
            super().write(*self._waiting)
        self._waiting = (fd, memoryview(bytes(data)), offset)
        return len(data)

    def close(self, fd):
        if self._waiting:
            super().write(*self._waiting)
        self._waiting = None
        super().close(fd)

    def sync_file(self, path):
        pass


class InPlace(RunFolder):
    """One file, rewritten."""

    def commit(self, step, given, state, *, save):
        path = self.checkpoints_folder / f"step-{step:012d}.safetensors"
        old = self.saved()
        if not old:
            return super().commit(step, given, state, save=save)
        fresh = self.path / "fresh"
        write_run_checkpoint(fresh, given, state, step=step, save=save)
        data = fresh.read_bytes()
        fresh.unlink()
        fd = os.open(old[0].path, os.O_RDWR)
        self._disk._files[fd] = self._disk._names[old[0].path]
        for at in range(0, len(data), 256):
            self._disk.write(fd, memoryview(data)[at : at + 256], at)
        self._disk.sync(fd)
        self._disk.close(fd)
        self._disk.rename(old[0].path, path)
        self._disk.sync_folder(path.parent)
        return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("disk", "folder_class", "checked"),
    [
        (NoFileSync, RunFolder, True),
        (NoFolderSync, RunFolder, True),
        (SyncBeforeTheLastWrite, RunFolder, True),
        (NoFileSync, RunFolder, False),
        (RecordingDisk, InPlace, True),
    ],
    ids=["no file sync", "no folder sync", "sync before the last write", "no sync, no checksum", "in place"],
)
def test_every_weaker_way_of_saving_is_caught_by_the_same_states(tmp_path, monkeypatch, disk, folder_class, checked):
    if not checked:
        monkeypatch.setattr(run_checkpoint, "crc32", lambda data, value=0: 0)
        monkeypatch.setattr(RunCheckpoint, "verify", lambda self: None)
    killed, cut = outcomes(tmp_path, trace_of(tmp_path / "run", disk(), folder_class), 1_000)
    assert {"lost", "refused"} & set(cut)
    if not checked:
        assert "silently wrong" in cut
    if folder_class is RunFolder:
        assert set(killed) == {"good"}  # which is why kills alone prove little


@pytest.mark.slow
def test_a_process_killed_at_every_call_of_a_save_leaves_the_last_checkpoint_or_the_new_one(tmp_path):
    program = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from streaming_polyak.files.disk import Disk
from test_run_folder import commit, RunFolder
from simulated_disk import CALLS
calls = 0
def deadly(name):
    real = getattr(Disk, name)
    def method(self, *args):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args)
    return method
for name in CALLS:
    setattr(Disk, name, deadly(name))
commit(RunFolder(sys.argv[1], keep=2), 30, 3)
"""
    whole = RunFolder(tmp_path / "whole", keep=2)
    for save in (1, 2):
        commit(whole, save * 10, save)
    seen = []
    for call in itertools.count(1):
        folder = copied(whole, tmp_path / str(call))
        tests = os.path.dirname(__file__)
        status = subprocess.run([sys.executable, "-c", program, str(folder.path), str(call), tests]).returncode
        found = folder.latest()
        assert is_of(found, found.step)
        seen.append(found.step)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        folder.clean()
        assert not list(folder.checkpoints_folder.glob(f"{TEMPORARY}*"))
    assert len(seen) > 8
    assert seen == sorted(seen)
    assert set(seen) == {20, 30}


# Damage.


@pytest.fixture
def two(tmp_path):
    folder = RunFolder(tmp_path / "run")
    commit(folder, 10)
    commit(folder, 20)
    return folder


def refused(folder, saved):
    with pytest.raises(CheckpointError):
        folder.open(saved)


@pytest.mark.slow
def test_a_checkpoint_truncated_at_any_byte_is_passed_over(two, caplog):
    two.commit(20, [*parts(20), Part.of("more", np.ones((80, 64), np.float32))], {"epoch": 2}, save=2)
    newest = two.saved()[-1]
    data = newest.path.read_bytes()
    assert len(data) > 20_000
    for size in reversed(range(len(data))):
        os.truncate(newest.path, size)
        refused(two, newest)
    for _ in range(3):
        assert is_of(two.latest(), 10)
    assert [record.message.count("step-000000000020") for record in caplog.records] == [1]  # told once, by name
    assert newest.path.exists()
    newest.path.write_bytes(data)
    assert is_of(two.latest(), 20)


@pytest.mark.slow
def test_no_flipped_bit_goes_unseen(two):
    newest = two.saved()[-1]
    data = bytearray(newest.path.read_bytes())
    assert 8 * len(data) >= 10_000
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        newest.path.write_bytes(data)
        refused(two, newest)
        data[bit // 8] ^= 1 << bit % 8
    newest.path.write_bytes(data)
    assert is_of(two.open(newest), 20)


@pytest.mark.slow
def test_zeroed_appended_joined_and_exchanged_files_are_passed_over(two):
    older, newest = two.saved()
    data, other = newest.path.read_bytes(), older.path.read_bytes()
    rng = random.Random(0)
    cases = [data + rng.randbytes(rng.randrange(1, 4096)) for _ in range(100)]
    for _ in range(800):
        size = rng.randrange(1, len(data))
        at = rng.randrange(len(data) - size + 1)
        rubbish = rng.choice([bytes(size), rng.randbytes(size)])
        cases.append(data[:at] + rubbish + data[at + size :])
    cases += [data[:at] + other[at:] for at in rng.sample(range(1, min(len(data), len(other))), 100)]
    cases = [case for case in cases if case != data]
    assert len(cases) > 950
    for case in cases:
        newest.path.write_bytes(case)
        refused(two, newest)
    newest.path.write_bytes(other)
    with pytest.raises(CheckpointError, match="it is that of step 10, and has the name of another"):
        two.open(newest)
    assert is_of(two.latest(), 10)


def test_a_link_to_nowhere_is_a_damaged_checkpoint(two, caplog):
    (two.checkpoints_folder / "step-000000000030.safetensors").symlink_to("nowhere")
    assert is_of(two.latest(), 20)
    assert "step-000000000030" in caplog.text


def test_when_all_are_damaged_that_is_an_error_and_no_fresh_start(two):
    for saved in two.saved():
        saved.path.write_bytes(saved.path.read_bytes()[:-1])
    before = files(two)
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole") as caught:
        two.latest()
    assert caught.value.code == "all-damaged"
    assert files(two) == before


# Disks that fail.


@pytest.mark.parametrize("forever", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EDQUOT", "EROFS", "EMFILE", "EINTR"])
def test_whatever_call_fails_the_save_has_failed_and_nothing_is_lost(tmp_path, name, forever):
    for n in itertools.count(1):
        folder = RunFolder(tmp_path / str(n), keep=2)
        for save in (1, 2):
            commit(folder, save * 10, save)
        before = files(folder)
        disk = FailingDisk(n, getattr(errno, name), forever)
        failing = RunFolder(folder.path, keep=2, disk=disk)
        failed = None
        with contextlib.suppress(OSError):
            failed = True
            commit(failing, 30, 3)
            failed = False
        done = disk.calls < n
        assert failed is not done
        retiring = failed and folder.saved()[-1].step == 30
        left = files(folder)
        if done or retiring:  # it is safe, and what failed is the removal of older ones
            assert is_of(folder.latest(), 30)
            assert {k: v for k, v in left.items() if k in before} == {k: before[k] for k in left if k in before}
        else:
            assert is_of(folder.latest(), 20)
            assert {k: v for k, v in left.items() if not k.startswith(TEMPORARY)} == before
            assert forever or left == before  # a disk that does not remove either leaves its temporary file
            folder.clean()
            commit(folder, 30, 3)
            assert is_of(folder.latest(), 30)
        if done:
            break
    assert n > 10


def test_a_disk_that_writes_less_than_it_is_asked_to_gets_the_rest_again(tmp_path):
    folder = RunFolder(tmp_path, disk=CutShort())
    commit(folder, 10)
    assert is_of(folder.latest(), 10)


def test_a_sync_that_failed_is_not_tried_again_on_the_same_descriptor(tmp_path):
    tried = []

    class Once(Disk):
        def sync(self, fd):
            tried.append(fd)
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        commit(RunFolder(tmp_path, disk=Once()), 10)
    assert len(tried) == 1
    assert RunFolder(tmp_path).saved() == []


def test_a_folder_that_is_gone_or_read_only_is_an_error(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(OSError, match="Not a directory"):
        commit(RunFolder(tmp_path / "run"), 10)


@pytest.mark.parametrize("how", ["removed", "renamed", "exchanged", "linked elsewhere"])
def test_a_folder_that_goes_away_under_a_run_is_told_before_anything_is_written(tmp_path, how):
    if how == "linked elsewhere":
        (tmp_path / "first").mkdir()
        (tmp_path / "run").symlink_to("first")
    folder = RunFolder(tmp_path / "run")
    with folder.lock() as lock:
        commit(folder, 10)
        lock.check()
        os.rename(tmp_path / "run", tmp_path / "elsewhere")
        if how == "linked elsewhere":
            (tmp_path / "second").mkdir()
            (tmp_path / "run").symlink_to("second")
        if how == "removed":
            shutil.rmtree(tmp_path / "elsewhere")
        if how == "exchanged":
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "LOCK").touch()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(
            FileNotFoundError, match=r"run \(or LOCK in it\) was removed, renamed or exchanged while the run"
        ):
            lock.check()
        assert sorted(tmp_path.rglob("*")) == before


# Who is at work.

_HOLD = """
import sys, os, time
from streaming_polyak.files.run_folder import RunFolder
lock = RunFolder(sys.argv[1]).lock()
child = os.fork() if sys.argv[2] == "fork" else 1
if child:
    print(child, flush=True)
time.sleep(60)
"""


def holding(path, how="alone"):
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(path), how], stdout=subprocess.PIPE, text=True)
    with process.stdout as said:
        return process, int(said.readline())


def test_a_second_process_is_refused_within_a_second_and_told_who_is_there(tmp_path):
    process, _ = holding(tmp_path / "run")
    started = time.monotonic()
    with pytest.raises(RunLockedError, match=rf"run is in use by process {process.pid} on {os.uname().nodename} since"):
        RunFolder(tmp_path / "run").lock()
    assert time.monotonic() - started < 1
    assert f"process {process.pid} " in holder(tmp_path / "run")
    process.kill()
    process.wait()
    assert holder(tmp_path / "run") is None
    RunFolder(tmp_path / "run").lock().close()


def test_the_lock_dies_with_its_holder_though_a_forked_child_lives_on(tmp_path):
    process, child = holding(tmp_path / "run", "fork")
    try:
        process.kill()
        process.wait()
        os.kill(child, 0)  # it is alive
        with RunFolder(tmp_path / "run").lock():
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_two_runs_of_one_process_do_not_share_a_folder(tmp_path):
    with RunFolder(tmp_path).lock() as lock:
        with pytest.raises(RunLockedError, match="in use by another run of this process"):
            RunFolder(tmp_path).lock()
        assert holder(tmp_path) == "this process"
        assert f'"pid": {os.getpid()}' in (tmp_path / "LOCK").read_text()
    lock.close()
    assert holder(tmp_path) is None
    assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()
    RunFolder(tmp_path).lock().close()


def test_saved_is_told_by_names_alone(two):
    assert two.saved() == [Saved(step, two.checkpoints_folder / f"step-{step:012d}.safetensors") for step in (10, 20)]


@pytest.mark.slow
def test_readers_get_whole_checkpoints_or_are_told_while_new_ones_come_and_old_ones_go():
    script = Path(__file__).parent.parent / "scripts" / "read_while_saving.py"
    run = subprocess.run([sys.executable, script, "3", "--json"], capture_output=True, text=True)
    result = json.loads(run.stdout)
    assert (run.returncode, result["bad"], run.stderr) == (0, 0, "")
    assert result["counts"]["saves"] > 50
    assert result["counts"]["latest: whole"] > 10
    assert result["counts"]["average: whole"] > 0
