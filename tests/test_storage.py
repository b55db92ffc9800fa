"""A file is there whole or not at all, whatever fails on the way."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from streaming_polyak.files.disk import Disk
from streaming_polyak.files.storage import REPLACED, TEMPORARY, Storage


def test_a_commit_makes_the_file_and_its_folders_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    Storage().commit(path, lambda temporary: temporary.write_bytes(b"new"))
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_of_two_names_names_the_file_that_was_to_be_made(tmp_path, monkeypatch):
    def link(old, new):
        raise OSError(5, "Input/output error", str(old), None, str(new))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match=r"Input/output error: '.*/file'$"):
        Storage().commit(tmp_path / "file", lambda temporary: temporary.touch())


def test_the_temporary_file_has_the_suffixes_and_the_folder_of_the_final_one(tmp_path):
    seen = []
    Storage().commit(tmp_path / "x.weights.h5", lambda temporary: seen.append(temporary) or temporary.touch())
    assert seen[0].name.endswith(".weights.h5")
    assert seen[0].name.startswith(TEMPORARY)
    assert seen[0].parent == tmp_path


def test_an_existing_file_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError, match=r"file exists already\. Choose another name, or pass overwrite=True"):
        Storage().commit(path, lambda temporary: temporary.write_bytes(b"new"))
    assert path.read_bytes() == b"old"
    Storage().commit(path, lambda temporary: temporary.write_bytes(b"new"), overwrite=True)
    assert path.read_bytes() == b"new"


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "file"

    def write(temporary):
        temporary.write_bytes(b"ours")
        path.write_bytes(b"theirs")

    with pytest.raises(FileExistsError, match="exists already"):
        Storage().commit(path, write)
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_without_hard_links_a_commit_replaces_nothing_either(tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "file"
    Storage().commit(path, lambda temporary: temporary.write_bytes(b"new"))
    assert path.read_bytes() == b"new"

    def write(temporary):
        temporary.write_bytes(b"ours")
        (tmp_path / "other").write_bytes(b"theirs")

    with pytest.raises(FileExistsError, match="exists already"):
        Storage().commit(tmp_path / "other", write)
    assert (tmp_path / "other").read_bytes() == b"theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "other"]


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    for path in (tmp_path / ("n" * 247 + ".weights"), tmp_path / ("\u540d" * 80 + ".h5")):
        Storage().commit(path, lambda temporary: temporary.write_bytes(b"new"))
        Storage().commit_group(path, lambda folder, name=path.name: (folder / name).touch(), overwrite=True)
        assert path.read_bytes() == b""


def test_an_error_names_the_file_that_was_to_be_made(tmp_path):
    (tmp_path / "file").touch()
    for commit in (Storage().commit, Storage().commit_group):
        with pytest.raises(OSError, match=r"Not a directory: '.*/file/out'|File exists: '.*/file'"):
            commit(tmp_path / "file" / "out", lambda temporary: None)

        def write(temporary):
            (temporary / "none" / "x").touch()

        with pytest.raises(OSError, match=r"(No such file or|Not a) directory: '.*/out'$"):
            commit(tmp_path / "out", write)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_write_leaves_what_was_there(tmp_path, overwrite):
    path = tmp_path / "file"
    if overwrite:
        path.write_bytes(b"old")

    def write(temporary):
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*file'$"):
        Storage().commit(path, write, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == (["file"] if overwrite else [])
    assert not overwrite or path.read_bytes() == b"old"


def test_a_failed_sync_fails_the_commit_and_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fsync(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        Storage().commit(path, lambda temporary: temporary.write_bytes(b"new"), overwrite=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_and_folder_are_synced_in_the_right_order(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        real_fsync(descriptor)

    def replace(source, target):
        calls.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    Storage().commit(tmp_path / "file", lambda temporary: temporary.write_bytes(b"x"), overwrite=True)
    assert calls == ["file", "rename", "folder"]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    program = f"""
import os, pathlib, signal
from streaming_polyak.files.storage import Storage
def write(temporary):
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
Storage().commit(pathlib.Path({str(path)!r}), write, overwrite=True)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert path.read_bytes() == b"old"
    left = [p.name for p in tmp_path.iterdir() if p != path]
    assert all(name.startswith(TEMPORARY) for name in left)


def group(folder, files, overwrite=False):
    """Commits the group of files by name, whose record "r" has the names of the others in it."""
    files = {**files, "r": " ".join(files).encode()}

    def write(temporary):
        for name, data in files.items():
            (temporary / name).write_bytes(data)

    Storage().commit_group(folder / "r", write, overwrite=overwrite, parts=lambda record: record.read_text().split())
    return files


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_group_replaces_all_of_an_older_one_and_nothing_else(tmp_path):
    group(tmp_path, {"a": b"1", "b": b"1", "c": b"1"})
    (tmp_path / "d").write_bytes(b"a stranger's")
    with pytest.raises(FileExistsError, match="r exists already"):
        group(tmp_path, {"a": b"2"})
    new = group(tmp_path, {"a": b"2"}, overwrite=True)
    assert contents(tmp_path) == {**new, "d": b"a stranger's"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_group_never_replaces_a_file_that_its_old_record_does_not_name(tmp_path, overwrite):
    if overwrite:
        group(tmp_path, {"a": b"1"})
    (tmp_path / "b").write_bytes(b"a stranger's")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="b is in the way"):
        group(tmp_path, {"a": b"2", "b": b"2"}, overwrite=overwrite)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("call", ["link", "replace", "fsync"])
def test_whatever_fails_an_old_group_is_whole_again(tmp_path, monkeypatch, call):
    real, count = getattr(os, call), 0
    for fatal in range(1, 30):
        folder = tmp_path / str(fatal)
        folder.mkdir()
        old = group(folder, {"a": b"1", "b": b"1"})
        count = 0

        def fail(*args, fatal=fatal):
            nonlocal count
            count += 1
            if count == fatal:
                raise OSError(5, "Input/output error")
            return real(*args)

        monkeypatch.setattr(os, call, fail)
        new = None
        with contextlib.suppress(OSError):
            new = group(folder, {"a": b"2", "c": b"2"}, overwrite=True)
        monkeypatch.undo()
        assert contents(folder) == (new or old)
        if count < fatal:
            assert new is not None
            break
    assert 3 < fatal < 29


def test_what_a_killed_run_moved_aside_is_used_and_removed_for_its_own_record_alone(tmp_path):
    aside = tmp_path / f"{TEMPORARY}0123456789ab-my-r" / REPLACED
    aside.mkdir(parents=True)
    (aside / "my-r").write_bytes(b"a")
    (aside / "a").write_bytes(b"the only copy")
    group(tmp_path, {"b": b"1"})
    group(tmp_path, {"b": b"2"}, overwrite=True)
    assert contents(aside) == {"my-r": b"a", "a": b"the only copy"}
    own = tmp_path / f"{TEMPORARY}0123456789ab-r" / REPLACED
    own.mkdir(parents=True)
    (tmp_path / "r").rename(own / "r")  # killed when the record was moved and the rest not yet
    with pytest.raises(
        FileExistsError, match=rf"b is in the way: a run that was to replace r was killed .* is in {own}"
    ):
        group(tmp_path, {"b": b"3"})
    new = group(tmp_path, {"b": b"3"}, overwrite=True)
    assert not own.parent.exists()
    shutil.rmtree(aside.parent)
    assert contents(tmp_path) == new


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_runs_at_once_one_wins_and_what_it_made_is_whole(tmp_path, overwrite):
    for number in range(40):
        folder = tmp_path / str(number)
        folder.mkdir()
        if overwrite:
            group(folder, {"a": b"0", "b": b"0"})
        outcomes = []

        def run(data, folder=folder, outcomes=outcomes):
            try:
                group(folder, {"a": data, "b": data}, overwrite=overwrite)
                outcomes.append("made")
            except FileExistsError:
                outcomes.append("refused")

        threads = [threading.Thread(target=run, args=(data,)) for data in (b"1", b"1", b"2")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == (["made"] * 3 if overwrite else ["made", "refused", "refused"])
        found = contents(folder)
        assert found in [{"r": b"a b", "a": data, "b": data} for data in (b"1", b"2")]


def test_a_child_forked_in_the_middle_keeps_nobody_waiting(tmp_path):
    class Forking(Disk):
        child = None

        def link(self, old, new):
            if Forking.child is None and (pid := os.fork()) == 0:
                time.sleep(30)
                os._exit(0)
            elif Forking.child is None:
                Forking.child = pid
            super().link(old, new)

    Storage(Forking()).commit(tmp_path / "a", lambda temporary: temporary.touch())
    try:
        started = time.monotonic()
        Storage().commit(tmp_path / "b", lambda temporary: temporary.touch())
        assert time.monotonic() - started < 10
    finally:
        os.kill(Forking.child, signal.SIGKILL)
        os.waitpid(Forking.child, 0)


def test_without_hard_links_a_failed_rename_leaves_no_empty_file(tmp_path, monkeypatch):
    def broken(number):
        def call(*_):
            raise OSError(number, os.strerror(number))

        return call

    monkeypatch.setattr(os, "link", broken(errno.EPERM))
    monkeypatch.setattr(os, "replace", broken(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        Storage().commit(tmp_path / "file", lambda temporary: temporary.write_bytes(b"new"))
    with pytest.raises(OSError, match="Input/output error"):
        group(tmp_path, {"a": b"1"})
    assert not list(tmp_path.iterdir())


def test_that_the_old_one_cannot_be_removed_is_no_failure_of_the_new_one(tmp_path, monkeypatch, caplog):
    group(tmp_path, {"a": b"1"})
    real = os.unlink

    def unlink(path):
        if REPLACED in str(path):
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    monkeypatch.setattr(os, "unlink", unlink)
    new = group(tmp_path, {"a": b"2"}, overwrite=True)
    assert "What was replaced could not be removed" in caplog.text
    assert contents_of_files(tmp_path) == new


def contents_of_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_cannot_be_moved_back_is_kept(tmp_path, monkeypatch):
    group(tmp_path, {"a": b"1"})

    def broken(*_):
        raise OSError(5, "Input/output error")

    real = os.replace

    def replace(source, target):
        if os.path.basename(source) == "a":
            monkeypatch.setattr(os, "replace", broken)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "link", broken)
    with pytest.raises(OSError, match="Input/output error"):
        group(tmp_path, {"a": b"2"}, overwrite=True)
    (aside,) = tmp_path.glob(f"{TEMPORARY}*/{REPLACED}")
    assert contents(aside) == {"r": b"a", "a": b"1"}


def test_removing_what_is_gone_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    Storage().remove(tmp_path / "file")
    Storage().remove(tmp_path / "file")
    assert not list(tmp_path.iterdir())
