"""Feeds damaged checkpoints to the readers, which must read them right or refuse them.

Small files of every format are made, those of --seeds taken too, and damaged: bits flipped, ranges zeroed, filled with
garbage, cut off, repeated or moved, numbers replaced by extreme ones, two files joined; of archives also the members
alone, with checksums that are right again. A worker process opens each with `open_checkpoint`, reads all tensors in
chunks and checks what checksums there are. An input fails if the worker, reading it,

    crashes     dies of a signal, or of an error other than CheckpointError, or leaves a file open
    hangs       does not answer in --seconds-per-file
    grows       takes more than 256 MiB over what it took to start, or the process that parses HDF5 does
    wanders     opens a file that is no part of the input
    errs        gives other numbers than the undamaged file had, though the format has checksums that say so

Formats without checksums give other numbers for a flipped bit; that is counted, and no failure.

    python scripts/fuzz_files.py --inputs 20000 --keep failures
    python scripts/fuzz_files.py --seed 0 --only 1234 --keep failures    # one input again, and save it
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import h5py
import ml_dtypes
import numpy as np
from h5py import h5d, h5f, h5g, h5p, h5s, h5t
from tqdm import tqdm

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files import checksums, source
from streaming_polyak.files.formats import open_checkpoint, safetensors
from streaming_polyak.files.formats.hdf5 import Parser
from streaming_polyak.files.tensors import Tensor, TensorTable

MIB = 1 << 20
ALLOWANCE = 256 * MIB
CHUNK_BYTES = MIB
MAX_SEED_BYTES = 256 << 10
FAILURES = ("crash", "hang", "memory", "opened", "wrong")


# --- undamaged files ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Specimen:
    """A checkpoint: its files by name, and the name it is opened by.

    Args:
        kind: for the table.
        files: by name.
        entry: the name that is opened.
        checked: whether checksums cover all numbers in it.
        rebuild: makes it anew with other contents of its parts, with right checksums; `None` if there are none.
        parts: what `rebuild` takes.
    """

    kind: str
    files: dict[str, bytes]
    entry: str
    checked: bool = False
    rebuild: Callable[[dict[str, bytes]], Specimen] | None = field(default=None, repr=False)
    parts: dict[str, bytes] = field(default_factory=dict, repr=False)


def specimens(folder: Path | None) -> list[Specimen]:
    """Returns the small files that are damaged: made here, and those of a folder."""
    rng = np.random.default_rng(0)
    plain, latest = _hdf5(rng), _hdf5(rng, latest=True)
    packed, legacy = _hdf5(rng, packed=True), _hdf5(rng, legacy=True)
    arrays = {
        "dense/kernel:0": rng.normal(size=(3, 4)).astype("f4"),
        "dense/bias:0": np.zeros(4, ">f8"),
        "scalar": np.float32(1),
        "empty": np.zeros((0, 3), "f2"),
        "fortran": np.asfortranarray(rng.normal(size=(5, 6, 2)).astype("f4")),
        "steps": np.arange(9),
        "mask": np.array([True, False]),
    }
    made = [
        Specimen("weights.h5", {"a.weights.h5": plain}, "a.weights.h5"),
        Specimen("weights.h5 v3", {"a.weights.h5": latest}, "a.weights.h5"),
        Specimen("weights.h5 packed", {"a.weights.h5": packed}, "a.weights.h5"),
        Specimen("h5 legacy", {"a.h5": legacy}, "a.h5"),
        _archive("keras", ".keras", _members(plain), zipfile.ZIP_STORED),
        _archive("keras deflated", ".keras", _members(packed), zipfile.ZIP_DEFLATED),
        _archive("npz", ".npz", {f"{name}.npy": _npy(a) for name, a in arrays.items()}, zipfile.ZIP_STORED),
        _archive("npz deflated", ".npz", {f"{name}.npy": _npy(a) for name, a in arrays.items()}, zipfile.ZIP_DEFLATED),
        Specimen("safetensors", {"a.safetensors": _safetensors(arrays)}, "a.safetensors"),
        _store(rng),
        _bundle(arrays),
    ]
    return made + (_given(folder) if folder else [])


def _hdf5(rng: np.random.Generator, *, latest: bool = False, packed: bool = False, legacy: bool = False) -> bytes:
    root, count = "model_weights" if legacy else "layers", 3
    how: dict[str, Any] = {}
    if packed:
        how = {"chunks": (2, 3), "compression": "gzip", "shuffle": True, "fletcher32": True}

    def fill(file: h5py.File) -> None:
        if legacy:
            file.attrs["keras_version"], file.attrs["backend"] = "3.15.1", "tensorflow"
            file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": {"layers": [1] * 50}})
            _group(file, root).attrs["layer_names"] = [f"dense_{i}".encode() for i in range(count)]
        for i in range(count):
            group = _group(file, f"{root}/dense_{i}/vars")
            group.create_dataset("0", data=rng.normal(size=(4, 5)).astype("f4"), **how)
            group.create_dataset("1", data=rng.normal(size=5).astype(">f4" if i else "f8"))
        group = _group(file, f"{root}/others")
        group["half"] = np.ones(4, ml_dtypes.bfloat16).view("V2")
        group["half"].attrs["dtype"] = "bfloat16"
        group["mask"] = np.array([True, False, True])
        group["empty"] = np.zeros((0, 3), "f4")
        _group(file, "optimizer_weights" if legacy else "optimizer").create_dataset("0", (4, 5), "f4")
        if packed:
            properties = h5p.create(h5p.DATASET_CREATE)
            properties.set_layout(h5d.COMPACT)
            properties.set_obj_track_times(False)
            space = h5s.create_simple((6,))
            compact = h5d.create(group.id, b"compact", h5t.IEEE_F32LE, space, properties)
            compact.write(h5s.ALL, h5s.ALL, np.ones(6, "f4"))

    return _hdf5_bytes(fill, h5f.LIBVER_LATEST if latest else h5f.LIBVER_EARLIEST)


def _hdf5_bytes(fill: Callable[[h5py.File], None], libver: int = h5f.LIBVER_EARLIEST) -> bytes:
    """A file without times in it, so that the same seed always gives the same inputs."""
    access, creation = h5p.create(h5p.FILE_ACCESS), h5p.create(h5p.FILE_CREATE)
    access.set_libver_bounds(libver, h5f.LIBVER_LATEST)
    creation.set_obj_track_times(False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        with h5py.File(h5f.create(bytes(path), h5f.ACC_TRUNC, creation, access)) as file:
            fill(file)
        return path.read_bytes()


def _group(file: h5py.File, path: str) -> h5py.Group:
    properties = h5p.create(h5p.GROUP_CREATE)
    properties.set_obj_track_times(False)
    group = file
    for name in path.split("/"):
        group = group[name] if name in group else h5py.Group(h5g.create(group.id, name.encode(), gcpl=properties))
    return group


def _members(weights: bytes) -> dict[str, bytes]:
    config = json.dumps({"module": "keras", "class_name": "Sequential", "config": {"name": "sequential"}}).encode()
    return {
        "metadata.json": b'{"keras_version": "3.15.1"}',
        "config.json": config,
        "model.weights.h5": weights,
        "assets/vocabulary.txt": b"a b c",
        "streaming_polyak.json": b'{"weighting": "mean"}',
    }


def _archive(kind: str, suffix: str, parts: dict[str, bytes], method: int) -> Specimen:
    def rebuild(parts: dict[str, bytes]) -> Specimen:
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", method) as file:
            for name, part in parts.items():
                file.writestr(zipfile.ZipInfo(name), part, method)
        return Specimen(kind, {f"a{suffix}": data.getvalue()}, f"a{suffix}", True, rebuild, parts)

    return rebuild(parts)


def _npy(array: Any) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def _safetensors(arrays: dict[str, Any]) -> bytes:
    native = {name: np.asarray(a).astype(np.asarray(a).dtype.newbyteorder("<")) for name, a in arrays.items()}
    table = [Tensor(name, a.dtype.name, a.shape, 0, a.nbytes) for name, a in native.items()]
    beginning, places = safetensors.header(table, {"format": "pt", "streaming_polyak": "{}"})
    data = bytearray(beginning) + bytes(sum(a.nbytes for a in native.values()))
    for name, place in places.items():
        assert place.offset is not None
        data[place.offset : place.offset + place.nbytes] = native[name].tobytes("C")
    return bytes(data)


def _store(rng: np.random.Generator) -> Specimen:
    files, weight_map = {}, {}
    for number in range(2):
        name, path, array = f"a_{number:05}.weights.h5", f"layers/dense_{number}/vars", rng.normal(size=(4, 5))

        def fill(file: h5py.File, path: str = path, array: Any = array) -> None:
            _group(file, path)["0"] = array

        files[name] = _hdf5_bytes(fill)
        weight_map[f"/{path}"] = name if number else [name]
    files["a.weights.json"] = json.dumps({"metadata": {"total_size": 160.0}, "weight_map": weight_map}).encode()
    return Specimen("weights.json", files, "a.weights.json")


def _bundle(arrays: dict[str, Any]) -> Specimen:
    """A TensorFlow checkpoint; its parts are the entries of the index. See `formats.tf_checkpoint` for the layout."""
    codes = {"float32": 1, "float64": 2, "int64": 9, "bool": 10, "float16": 19}
    data, parts = b"", {}
    for name, array in sorted(arrays.items()):
        array = np.asarray(array).astype(np.asarray(array).dtype.newbyteorder("<"))
        dims = [b"\x08" + _varint(size) for size in array.shape]
        shape = b"".join(b"\x12" + _varint(len(dim)) + dim for dim in dims)
        numbers = b"\x08" + _varint(codes[array.dtype.name]) + b"\x12" + _varint(len(shape)) + shape
        place = b"\x20" + _varint(len(data)) + b"\x28" + _varint(array.nbytes)
        parts[name] = numbers + place + b"\x35" + _masked_crc32c(array.tobytes())
        data += array.tobytes()

    def rebuild(parts: dict[str, bytes]) -> Specimen:
        rows = [(b"", b"\x08\x01\x1a\x02\x08\x01"), *((name.encode(), part) for name, part in parts.items())]
        first, meta = _block(rows), _block([])
        last = _block([(rows[-1][0], _varint(0) + _varint(len(first) - 5))])
        footer = b"".join(map(_varint, (len(first), len(meta) - 5, len(first) + len(meta), len(last) - 5)))
        index = first + meta + last + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB47_7524_8B80_FB57)
        files = {"a.index": index, "a.data-00000-of-00001": data}
        return Specimen("tf checkpoint", files, "a.index", True, rebuild, parts)

    return rebuild(parts)


def _block(rows: list[tuple[bytes, bytes]]) -> bytes:
    data, restarts = b"", []
    for key, value in rows:
        restarts.append(len(data))
        data += _varint(0) + _varint(len(key)) + _varint(len(value)) + key + value
    restarts = restarts or [0]
    data += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts)) + b"\0"
    return data + _masked_crc32c(data)


def _masked_crc32c(data: bytes) -> bytes:
    return struct.pack("<I", checksums.mask_crc32c(checksums.crc32c(data)))


def _varint(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80]) + _varint(value >> 7) if value > 0x7F else bytes([value])


def _given(folder: Path) -> list[Specimen]:
    found = []
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.stat().st_size > MAX_SEED_BYTES or path.name.startswith("."):
            continue
        names = [path.name]
        if path.name.endswith(".weights.json"):
            names += sorted({n for v in json.loads(path.read_text())["weight_map"].values() for n in _as_list(v)})
        elif path.name.endswith(".index"):
            names += sorted(p.name for p in folder.glob(f"{path.name.removesuffix('.index')}.data-*"))
        elif not path.name.endswith((".keras", ".h5", ".safetensors", ".npz")) or "_0000" in path.name:
            continue
        files = {name: (folder / name).read_bytes() for name in names}
        specimen = Specimen(path.name, files, path.name, path.name.endswith((".keras", ".npz", ".index")))
        if path.name.endswith((".keras", ".npz")):
            with zipfile.ZipFile(path) as archive:
                method = archive.infolist()[0].compress_type
                parts = {info.filename: archive.read(info) for info in archive.infolist()}
            specimen = replace(_archive(path.name, path.suffix, parts, method), files=files, entry=path.name)
        found.append(specimen)
    return found


def _as_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


# --- damage -------------------------------------------------------------------------------------------------------

LANDMARKS = (b"PK", b"TREE", b"SNOD", b"HEAP", b"GCOL", b"OHDR", b"FRHP", b"BTHD", b"\x89HDF", b"NUMPY", b"{", b"[")
TOKENS = (
    b"-1", b"0", b"1", b"true", b"null", b"1e9", b"9" * 19, b"9" * 40, b"4294967296", b"[]", b"{}", b'""', b'"F64"',
    b"()", b'"../x"', b"'O'", b"'|V2'", b"[" * 3000, b"(" * 300, b"0x" + b"f" * 5000, b"18446744073709551615", b",",
    b"NaN",
)  # fmt: skip


def damage(all_of_them: list[Specimen], rng: random.Random) -> Specimen:
    """Returns a damaged checkpoint."""
    specimen = rng.choice(all_of_them)
    if specimen.rebuild and rng.random() < 0.4:
        parts = dict(specimen.parts)
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice([n for n in parts if n not in ("config.json", "assets/vocabulary.txt")])
            parts[name] = _hurt(parts[name], all_of_them, rng)
        return replace(specimen.rebuild(parts), checked=False)
    files = dict(specimen.files)
    name = rng.choice(list(files))
    files[name] = _hurt(files[name], all_of_them, rng)
    return replace(specimen, files=files)


def _hurt(data: bytes, others: list[Specimen], rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        hurt = rng.choice(DAMAGES)(data, others, rng)
        data = _fit(data, hurt) if rng.random() < 0.6 else hurt
    return data


def _fit(old: bytes, new: bytes) -> bytes:
    """Corrects the one number that a change of length makes wrong in any case, so that more than that is looked at."""
    change = len(new) - len(old)

    def corrected(at: int, code: str) -> bytes:
        width = struct.calcsize(code)
        if at < 0 or at + width > min(len(new), len(old)):
            return new
        value = struct.unpack_from(code, old, at)[0] + change
        return new[:at] + struct.pack(code, value % (1 << 8 * width)) + new[at + width :]

    if not change:
        return new
    if old.startswith(b"\x89HDF"):
        return corrected(40, "<Q") if old[8:9] == b"\0" else (new + bytes(len(old)))[: len(old)]
    if old.startswith(b"\x93NUMPY"):
        return corrected(8, "<H")
    if old[8:9] == b"{":
        return corrected(0, "<Q")
    if new[-22:-18] == b"PK\5\6":  # where the directory of an archive begins
        start = struct.unpack_from("<I", new, len(new) - 6)[0] + change
        return new[:-6] + struct.pack("<I", start % (1 << 32)) + new[-2:]
    return new


def _place(data: bytes, rng: random.Random) -> int:
    """Returns a byte, more often one near structures than one in the data."""
    if not data:
        return 0
    how = rng.random()
    if how < 0.25:
        return rng.randrange(min(len(data), 128))
    if how < 0.4:
        return max(0, len(data) - 1 - rng.randrange(128))
    if how < 0.8:
        found = data.find(rng.choice(LANDMARKS), rng.randrange(len(data)))
        if found >= 0:
            return min(len(data) - 1, found + rng.randrange(64))
    return rng.randrange(len(data))


def _flip(data: bytes, others: list[Specimen], rng: random.Random) -> bytes:
    hurt = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if hurt:
            hurt[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(hurt)


def _overwrite(data: bytes, others: list[Specimen], rng: random.Random) -> bytes:
    at, size = _place(data, rng), int(2 ** rng.uniform(0, 12))
    new = bytes(size) if rng.random() < 0.5 else rng.randbytes(size)
    return data[:at] + new[: len(data) - at] + data[at + size :]


def _cut(data: bytes, others: list[Specimen], rng: random.Random) -> bytes:
    return data[: _place(data, rng)]


def _remove(data: bytes, others: list[Specimen], rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + int(2 ** rng.uniform(0, 10)) :]


def _append(data: bytes, others: list[Specimen], rng: random.Random) -> bytes:
    return data + rng.randbytes(int(2 ** rng.uniform(0, 12)))


def _number(data: bytes, others: list[Specimen], rng: random.Random) -> bytes:
    at, width = _place(data, rng), rng.choice((1, 2, 4, 8))
    top = 1 << 8 * width
    size = len(data)
    value = rng.choice(
        (0, 1, 2, top - 1, top - 2, top // 2, top // 2 - 1, size, size - 1, size + 1, size * 2, rng.randrange(top), at)
    )
    return data[:at] + (value % top).to_bytes(width, rng.choice(("little", "little", "big"))) + data[at + width :]


def _token(data: bytes, others: list[Specimen], rng: random.Random) -> bytes:
    """Replaces a number or a word in text."""
    at = _place(data, rng)
    while at < len(data) and not data[at : at + 1].isalnum():
        at += 1
    end = at
    while end < len(data) and data[end : end + 1].isalnum():
        end += 1
    return data[:at] + rng.choice(TOKENS) + data[end:]


def _repeat(data: bytes, others: list[Specimen], rng: random.Random) -> bytes:
    """Copies a range to another place, over what is there or between."""
    start, at, size = _place(data, rng), _place(data, rng), int(2 ** rng.uniform(0, 10))
    piece = data[start : start + size]
    return data[:at] + piece + data[at + (len(piece) if rng.random() < 0.7 else 0) :]


def _join(data: bytes, others: list[Specimen], rng: random.Random) -> bytes:
    """Goes on with another file, from the same place or another one on."""
    other = rng.choice(list(rng.choice(others).files.values()))
    at = _place(data, rng)
    return data[:at] + other[at if rng.random() < 0.7 else _place(other, rng) :]


DAMAGES = (_flip, _flip, _overwrite, _cut, _remove, _append, _number, _number, _number, _token, _token, _repeat, _join)


# --- the worker ---------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Which files the reader may open, which it opened besides, and what else Python complained of."""

    folder: str = ""
    siblings: tuple[str, ...] = ()
    opened: list[str] = field(default_factory=list)
    unraisable: list[str] = field(default_factory=list)
    off: bool = True
    temporary: str = field(default_factory=tempfile.gettempdir)  # where files without a name are made

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Is told by Python of everything that may touch the world outside."""
        if self.off:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.fsdecode(arguments[0])
            if path not in (self.temporary, os.devnull) and not self._belongs(path):
                self.opened.append(path)
        elif event == "subprocess.Popen":
            if not str(arguments[1][2]).endswith("hdf5_child.py"):
                self.opened.append(f"program {arguments[0]}")
        elif event in ("os.system", "os.exec", "socket.connect", "pickle.find_class", "ctypes.dlopen"):
            self.opened.append(f"{event} {arguments!r}")

    def _belongs(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return folder == self.folder and name.startswith(self.siblings)


def work(seconds: float) -> None:
    """Answers on standard output, a line of JSON each, what becomes of the inputs named on standard input."""
    watch = Watch()
    sys.addaudithook(watch)
    warnings.simplefilter("error")  # a temporary file that nobody closed is told of by a warning
    sys.unraisablehook = lambda raised: watch.unraisable.append(repr(raised.exc_value))
    source._TICK_NS = 0  # nobody writes to the inputs
    base, limited = 0, False
    with Parser(0.8 * seconds) as parser:
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "limit":  # all is imported now
                base, limited = _status("self", "VmSize"), True
                resource.setrlimit(resource.RLIMIT_AS, (base + ALLOWANCE, base + ALLOWANCE))
                answer: dict[str, Any] = {"worker": base}
            else:
                path = Path(request["path"])
                watch.folder, watch.siblings = str(path.parent), tuple(request["siblings"])
                started = time.perf_counter()
                answer = _try(path, parser, watch) if limited else _try(path, parser, Watch())  # which is told nothing
                answer["seconds"] = time.perf_counter() - started
                answer["worker"] = _status("self", "VmPeak") - base
                process = parser._process
                answer["parser"] = _status(str(process.pid), "VmHWM") if process and process.poll() is None else 0
            print(json.dumps(answer), flush=True)


def _try(path: Path, parser: Parser, watch: Watch) -> dict[str, Any]:
    watch.opened.clear()
    watch.unraisable.clear()
    watch.off = False
    try:
        with open_checkpoint(path, parser) as table:
            answer = _read(table)
    except CheckpointError as error:
        mistake = error.code == "crash" and "ended with status" in error.reason  # and not a signal: that is libhdf5's
        answer = {"outcome": "crash" if mistake else "refused", "code": error.code, "detail": str(error)}
    except MemoryError:
        answer = {"outcome": "memory", "detail": traceback.format_exc()}
    except Exception:
        answer = {"outcome": "crash", "detail": traceback.format_exc()}
    watch.off = True
    if watch.opened:
        answer = {"outcome": "opened", "detail": str(watch.opened)}
    elif watch.unraisable:
        answer = {"outcome": "crash", "detail": str(watch.unraisable)}
    return answer


def _read(table: TensorTable) -> dict[str, Any]:
    """Reads all tensors in chunks; returns a digest of names, dtypes, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(table.tensors.items()):
        digest.update(repr((name, tensor.dtype, tensor.shape, tensor.big_endian, tensor.offset is None)).encode())
        crc = 0
        for data in _chunks(table, tensor.source, tensor.offset, tensor.nbytes):
            if tensor.dtype != "string":  # whose bytes no checksum covers, and which are no numbers
                digest.update(data)
            crc = checksums.crc32c(data, crc)
        if tensor.crc32c is not None and crc != tensor.crc32c:
            raise table.refuse("checksum", "its CRC-32C is another.", name)
    for checksum in table.checksums:
        crc = 0
        for data in _chunks(table, checksum.source, checksum.start, checksum.size):
            crc = zlib.crc32(data, crc)
        if crc != checksum.crc32:
            raise table.refuse("checksum", f"the CRC-32 of {checksum.what} is another.")
    table.check_unchanged()
    return {"outcome": "accepted", "digest": digest.hexdigest()}


def _chunks(table: TensorTable, source: int, start: int | None, size: int) -> Iterator[bytearray]:
    for at in range(0, size if start is not None else 0, CHUNK_BYTES):
        data = bytearray(min(CHUNK_BYTES, size - at))
        table.sources[source].read_into(memoryview(data), (start or 0) + at)
        yield data


def _status(process: str, field: str) -> int:
    with open(f"/proc/{process}/status") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:")), 0)


# --- the outer loop -----------------------------------------------------------------------------------------------


class Worker:
    """The process that reads; started anew when it has died."""

    def __init__(self, seconds: float, folder: Path, undamaged: list[Specimen]) -> None:
        self._seconds, self._folder, self._undamaged = seconds, folder, undamaged
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # as long as this
        self.digests: set[str] = set()
        self.parser_base = 0

    def send(self, path: Path, siblings: list[str]) -> None:
        """Hands over an input, of which `receive` then tells."""
        if self._process is None:
            self._start()
        self._send({"do": "read", "path": str(path), "siblings": siblings})

    def receive(self) -> dict[str, Any]:
        """Returns what became of the input that was handed over."""
        return self._receive(self._seconds)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        """Starts it, and lets it read everything undamaged, so that all is imported before opening is watched."""
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", "--seconds-per-file", str(self._seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        for number, specimen in enumerate(self._undamaged):
            path = put(specimen, self._folder / f"undamaged-{number}")
            self._send({"do": "read", "path": str(path), "siblings": siblings(specimen)})
            answer = self._receive(60 + self._seconds)
            if answer["outcome"] != "accepted":
                raise click.ClickException(f"the undamaged {specimen.kind} is not read: {answer}")
            self.digests.add(answer["digest"])
            self.parser_base = max(self.parser_base, answer["parser"])
        self._send({"do": "limit"})
        self._receive(60)

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self, seconds: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            self.close()
            return {"outcome": "hang", "detail": f"no answer in {seconds:g} s"}
        line = self._process.stdout.readline()
        if line:
            return dict(json.loads(line))
        status = self._process.wait()
        self.close()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")[-2000:]
        return {
            "outcome": "crash",
            "detail": signal.Signals(-status).name if status < 0 else f"status {status}: {said}",
        }


def put(specimen: Specimen, folder: Path) -> Path:
    """Writes the files of a checkpoint; returns the path that is opened."""
    folder.mkdir(exist_ok=True)
    for name, data in specimen.files.items():
        (folder / name).write_bytes(data)
    return folder / specimen.entry


def siblings(specimen: Specimen) -> list[str]:
    """Returns beginnings of the names of the files beside it that a reader may open."""
    if specimen.entry.endswith(".weights.json"):
        return [""]  # whichever shard is named, as long as it is in the same folder
    if specimen.entry.endswith(".index"):
        return [specimen.entry, specimen.entry.removesuffix("index") + "data-"]
    return [specimen.entry]


@dataclass
class Report:
    """What became of the inputs."""

    undamaged: set[str]
    inputs: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    same: Counter[str] = field(default_factory=Counter)
    other: Counter[str] = field(default_factory=Counter)
    failed: Counter[tuple[str, str]] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    seconds: list[tuple[float, int]] = field(default_factory=list)
    worker: int = 0
    parser: int = 0
    base: int = 0

    def add(self, index: int, specimen: Specimen, answer: dict[str, Any]) -> str | None:
        """Counts an answer; returns how it failed."""
        kind, outcome = specimen.kind, answer["outcome"]
        self.inputs[kind] += 1
        self.seconds.append((answer.get("seconds", 0.0), index))
        self.worker = max(self.worker, answer.get("worker", 0))
        if answer.get("parser", 0) > self.parser:
            self.parser = answer["parser"]
            if outcome in ("refused", "accepted") and self.parser > ALLOWANCE + self.base:
                outcome = "memory"
                answer["detail"] = f"the process that parses HDF5 took {self.parser / MIB:.0f} MiB"
        if outcome == "refused":
            self.refused[kind] += 1
            self.codes[answer["code"]] += 1
            return None
        if outcome == "accepted":
            if answer["digest"] in self.undamaged:
                self.same[kind] += 1
                return None
            if not specimen.checked:
                self.other[kind] += 1
                return None
            outcome = "wrong"
            answer["detail"] = "other numbers than before, in spite of checksums"
        self.failed[kind, outcome] += 1
        return str(outcome)

    def show(self, seed: int, elapsed: float) -> None:
        """Prints the tables."""
        times = sorted(self.seconds)
        print(
            f"seed {seed}: {sum(self.inputs.values())} inputs in {elapsed:.1f} s; "
            f"median {1000 * statistics.median(s for s, _ in times):.1f} ms, longest {times[-1][0]:.2f} s "
            f"(input {times[-1][1]})"
        )
        print(f"\n{'format':<20}{'inputs':>8}{'refused':>9}{'same':>7}{'other numbers':>15}{'failed':>8}")
        rows = [*sorted(self.inputs), ""]
        for kind in rows:
            failed = sum(n for (of, _), n in self.failed.items() if kind in (of, ""))
            counts = [
                sum(c.values()) if not kind else c[kind] for c in (self.inputs, self.refused, self.same, self.other)
            ]
            print("{:<20}{:>8}{:>9}{:>7}{:>15}{:>8}".format(kind or "all", *counts, failed))
        print("\nrefused by code: " + ", ".join(f"{code} {n}" for code, n in self.codes.most_common()))
        print(
            f"memory over that of the start, {ALLOWANCE // MIB} MiB allowed: reader {self.worker / MIB:.0f} MiB of "
            f"addresses, parser of HDF5 {max(0, self.parser - self.base) / MIB:.0f} MiB"
        )
        names = ("crashes", "hangs", "over memory", "other files opened", "wrong in spite of checksums")
        failures = [sum(n for (_, how), n in self.failed.items() if how == failure) for failure in FAILURES]
        print("failures: " + ", ".join(f"{name} {n}" for name, n in zip(names, failures, strict=True)))


HELP = (__doc__ or "").replace("\n\n    ", "\n\n\b\n    ")  # click leaves such paragraphs as they are


@click.command(help=HELP, context_settings={"max_content_width": 100})
@click.option("--inputs", default=500, show_default=True, help="How many damaged files.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same files.")
@click.option("--seconds-per-file", default=10.0, show_default=True, help="After which an input counts as hanging.")
@click.option("--seeds", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="A folder of small checkpoints that are damaged too.")  # fmt: skip
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Where inputs that fail are saved.")
@click.option("--only", type=int, help="Read and keep only the input of this number.")
@click.option("--worker", is_flag=True, hidden=True)
def main(
    inputs: int,
    seed: int,
    seconds_per_file: float,
    seeds: Path | None,
    keep: Path | None,
    only: int | None,
    worker: bool,
) -> None:
    if worker:
        work(seconds_per_file)
        return
    undamaged = specimens(seeds)
    numbers = range(inputs) if only is None else [only]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        folder = Path(os.path.realpath(temporary))
        reader = Worker(seconds_per_file, folder, undamaged)
        report = Report(reader.digests)

        def make(index: int) -> tuple[int, Specimen, Path]:
            specimen = damage(undamaged, random.Random(f"{seed} {index}"))
            return index, specimen, put(specimen, folder / str(index))

        try:
            following: tuple[int, Specimen, Path] | None = make(numbers[0])
            for position in tqdm(range(len(numbers)), unit="input", disable=None):
                assert following is not None
                index, specimen, path = following
                reader.send(path, siblings(specimen))
                following = make(numbers[position + 1]) if position + 1 < len(numbers) else None
                answer = reader.receive()
                report.base = reader.parser_base
                failure = report.add(index, specimen, answer)
                if failure or only is not None:
                    tqdm.write(
                        f"input {index} ({specimen.kind}): {failure or answer['outcome']}: {answer.get('detail')}"
                    )
                    if keep is not None:
                        kept = keep / f"{seed}-{index}-{failure or answer['outcome']}"
                        shutil.copytree(path.parent, kept, dirs_exist_ok=True)
                shutil.rmtree(path.parent)
        finally:
            reader.close()
    report.show(seed, time.perf_counter() - started)
    if report.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
