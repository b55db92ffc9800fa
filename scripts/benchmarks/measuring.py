"""What benchmarks have in common: a child process that is watched while it works, and a line about the machine.

A child imports what it needs, prints "ready", waits for a line, works, and prints one line of JSON. Meanwhile the
parent adds up RssAnon and RssFile of the child and of all processes that it started, every 2 ms. RssAnon of
/proc/PID/status is memory that no file stands behind: what a process has allocated and touched.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import platform
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MIB = 2**20
SAMPLE_SECONDS = 0.002


class ChildFailedError(Exception):
    """A measured process ended before it had answered."""


@dataclass(frozen=True)
class Measured:
    """What a child process answered and what memory it took, its own children's included.

    Args:
        answer: the JSON object it printed.
        before_mib: anonymous memory when it was ready, its imports done.
        peak_mib: the most that it had from then on.
        anonymous_mib: how much of that was new: the difference.
        file_mib: the same difference for file-backed memory, such as mapped files.
        samples: how often it was looked at.
    """

    answer: dict[str, Any]
    before_mib: float
    peak_mib: float
    anonymous_mib: float
    file_mib: float
    samples: int


def resident(pid: int) -> tuple[int, int]:
    """Returns anonymous and file-backed resident bytes of one process; zeros when it is gone."""
    with contextlib.suppress(OSError, KeyError), open(f"/proc/{pid}/status") as status:
        rows = {line.split()[0]: line.split() for line in status}
        return int(rows["RssAnon:"][1]) * 1024, int(rows["RssFile:"][1]) * 1024
    return 0, 0


def memory(pid: int) -> tuple[int, int]:
    """Returns anonymous and file-backed resident bytes of a process and those it started; zeros when it is gone."""
    anonymous, backed = resident(pid)
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        for children in Path(f"/proc/{pid}/task").glob("*/children"):  # a thread's children, where the kernel tells
            for child in children.read_text().split():
                # One that has not begun its own program yet has the memory of its parent, which would count twice.
                if Path(f"/proc/{child}/cmdline").read_bytes() != command:
                    more = memory(int(child))
                    anonymous, backed = anonymous + more[0], backed + more[1]
    return anonymous, backed


def watch(
    command: Sequence[str | Path], environment: Mapping[str, str] | None = None, *, sample: bool = True
) -> Measured:
    """Runs a child that keeps to the protocol of this module.

    Args:
        command: that starts it.
        environment: more variables.
        sample: look at its memory all the time, which takes a tenth of a processor; else it is looked at once.

    Raises:
        ChildFailedError: it ended before it had answered; with the last line of what it said.
    """
    with subprocess.Popen(
        list(map(str, command)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **(environment or {})},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        errors = b""

        def line(look: Callable[[], object] = lambda: None) -> bytes:
            nonlocal errors
            said = b""
            while not said.endswith(b"\n"):
                look()
                ready, _, _ = select.select([process.stdout, process.stderr], [], [], SAMPLE_SECONDS)
                if process.stderr in ready:  # read on, or the child would wait for us; the end is enough
                    errors = (errors + os.read(process.stderr.fileno(), 1 << 16))[-(1 << 16) :]
                if process.stdout in ready:
                    part = os.read(process.stdout.fileno(), 1 << 16)
                    if not part:
                        errors += process.stderr.read()
                        last = errors.decode(errors="replace").strip().rpartition("\n")[2]
                        raise ChildFailedError(f"ended early with status {process.wait()}: {last}")
                    said += part
            return said.rpartition(b"\n")[0].rpartition(b"\n")[2]

        while line() != b"ready":  # a library may print something when it is imported
            pass
        before = memory(process.pid)
        samples = [before]
        process.stdin.write(b"go\n")
        process.stdin.flush()
        answer = json.loads(line(lambda: samples.append(memory(process.pid))) if sample else line())
        process.stdin.close()
    anonymous, backed = (max(values) for values in zip(*samples, strict=True))
    return Measured(
        answer,
        before[0] / MIB,
        anonymous / MIB,
        (anonymous - before[0]) / MIB,
        (backed - before[1]) / MIB,
        len(samples),
    )


def child(work: Callable[[], dict[str, Any]], modules: Iterable[str] = ()) -> None:
    """Is the other side of `watch`: imports modules, waits for the word, works, and prints what came of it."""
    for module in modules:
        importlib.import_module(module)
    print("ready", flush=True)
    sys.stdin.readline()
    answer = work()
    print(json.dumps(answer), flush=True)


def model_of_vectors(parameters: int, tensors: int) -> Any:
    """Returns a Keras model that is only its variables: so many parameters in vectors of one length."""
    import keras

    class Bag(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for i in range(tensors):
                self.add_weight(shape=(parameters // tensors,), initializer="random_normal", name=f"w{i}")

    return Bag()


def seconds_of(work: Callable[[], object]) -> float:
    """Returns how long a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def has_modules(python: str, modules: Iterable[str]) -> bool:
    """Tells whether an interpreter finds all these modules, without importing them."""
    looking = f"import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, {list(modules)!r})))"
    try:
        return subprocess.run([python, "-c", looking], stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def processor() -> str:
    """Returns the name of the processor, and its second- and third-level caches where the system tells them."""
    name = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    levels = ", ".join(f"L{level} {nbytes // 2**10:,} KiB" for level, nbytes in caches().items() if level > 1)
    return f"{name} ({levels})" if levels else name


def caches() -> dict[int, int]:
    """Returns the bytes of the first processor's data caches by level; empty where the system does not tell."""
    found: dict[int, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
            if (cache / "type").read_text().strip() != "Instruction":
                size = (cache / "size").read_text().strip()
                found[int((cache / "level").read_text())] = int(size.removesuffix("K")) * 1024
    return found


def machine(*packages: str) -> str:
    """Returns a line: date, processor, cores, memory, system, Python, and versions of the packages that are there."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"Python {platform.python_version()}"]
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return (
        f"{datetime.date.today().isoformat()}; {processor()}, {os.cpu_count()} cores, {ram:.0f} GiB; "
        f"Linux {platform.release()}; {', '.join(versions)}"
    )
