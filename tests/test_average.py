"""Averages of saved checkpoints, out of core: files of every format against fractions, and all that can go wrong."""

import contextlib
import errno
import functools
import gc
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import tracemalloc
import zipfile
import zlib
from contextlib import ExitStack
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import test_tf_checkpoint
from reference import FLOAT_FORMATS, rational_average, ulps

from streaming_polyak import LINEAR, MEAN, Exponential, Polynomial, __version__
from streaming_polyak.errors import CheckpointError, NonFiniteError
from streaming_polyak.files import average as average_module
from streaming_polyak.files import average_pass, checkpoint_set, inspection, source, verify
from streaming_polyak.files.average import average_checkpoints
from streaming_polyak.files.checkpoint_set import CheckpointSet
from streaming_polyak.files.disk import NewFile
from streaming_polyak.files.formats import hdf5, open_checkpoint
from streaming_polyak.files.formats.hdf5 import Parser
from streaming_polyak.files.inspection import inspect_checkpoints
from streaming_polyak.files.meter import cpus
from streaming_polyak.files.source import Source
from streaming_polyak.files.storage import TEMPORARY
from streaming_polyak.files.summation import TILE
from streaming_polyak.files.sweep import sweep_checkpoints
from streaming_polyak.files.tensors import DTYPES
from streaming_polyak.files.verify import verify_checkpoint

FLOATS = tuple(FLOAT_FORMATS)
OTHERS = ("int32", "uint8", "bool")
SHAPES = [(), (0,), (1,), (3, 5), (TILE + 4465,)]  # the last of floating tensors only
WEIGHTINGS = {
    "mean": {},
    "linear": {"weighting": LINEAR},
    "cubic": {"weighting": Polynomial(3)},
    "exponential": {"weighting": Exponential(alpha=2)},
    "explicit": {"weights": [0.5, 0.3, 0.2]},
}
RAW = {
    name: np.array(options["weights"]) if "weights" in options else options.get("weighting", MEAN).raw_weights(3)
    for name, options in WEIGHTINGS.items()
}


@pytest.fixture(scope="module", autouse=True)
def _one_parser():
    """One process parses the HDF5 files of all these tests, where a job has one of its own: to start it takes time."""
    with hdf5.Parser() as parser, pytest.MonkeyPatch.context() as patch:
        for module in (average_module, inspection, verify):
            patch.setattr(module, "Parser", lambda: contextlib.nullcontext(parser))
        yield


@pytest.fixture(autouse=True)
def _no_waiting_for_the_clock(monkeypatch):
    """A table of a file just written waits for the next tick of the clock; few tests here change a file meanwhile."""
    monkeypatch.setattr(source, "_TICK_NS", 0)


# Files of every format, as Keras, NumPy and the safetensors library write them.

CONFIG = b'{"module": "keras", "class_name": "Sequential", "config": {"name": "\xc3\xa9"}}'
METADATA = b'{"keras_version": "3.15.0", "date_saved": "2026-01-01@00:00:00"}'


def write_hdf5(path, arrays, **options):
    """`path` is a file or a name; bfloat16 is stored as Keras stores it; `options` say how a dataset is stored."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            kind = array.dtype
            data = array.view("V2") if kind == ml_dtypes.bfloat16 else array
            if options.get("big_endian") and kind.kind in "fiu" and kind.itemsize > 1:
                data = data.astype(data.dtype.newbyteorder(">"))
            if options.get("compact") and 0 < array.nbytes < 60_000:
                properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                properties.set_layout(h5py.h5d.COMPACT)
                space = h5py.h5s.create_simple(data.shape) if data.shape else h5py.h5s.create(h5py.h5s.SCALAR)
                group = file.require_group(name.rpartition("/")[0])
                made = h5py.h5d.create(
                    group.id, name.rpartition("/")[2].encode(), h5py.h5t.py_create(data.dtype), space, properties
                )
                dataset = h5py.Dataset(made)
                dataset[()] = data
            else:
                packing = {k: v for k, v in options.items() if k not in ("big_endian", "compact")}
                dataset = file.create_dataset(name, data=data, **(packing if array.size and array.shape else {}))
            if kind == ml_dtypes.bfloat16:
                dataset.attrs["dtype"] = "bfloat16"
    return path


def write_keras(path, arrays, method=zipfile.ZIP_STORED, **options):
    inside = io.BytesIO()
    write_hdf5(inside, arrays, **options)
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("metadata.json", METADATA)
        archive.writestr("config.json", CONFIG)
        archive.writestr("model.weights.h5", inside.getvalue())
    return path


def write_legacy(path, arrays, **options):
    write_hdf5(path, arrays, **options)
    with h5py.File(path, "r+") as file:
        file.attrs["backend"] = "tensorflow"
        file.attrs["layer_names"] = [b"dense"]
    return path


def write_sharded(path, arrays, **options):
    base, groups = path.name.removesuffix(".weights.json"), {}
    for shard in range(2):
        name = f"{base}_{shard:05}.weights.h5"
        part = dict(list(arrays.items())[shard::2])
        write_hdf5(path.with_name(name), part, **options)
        for tensor in part:
            groups.setdefault(f"/{tensor.rpartition('/')[0]}", []).append(name)
    weight_map = {group: sorted(set(names)) for group, names in groups.items()}
    path.write_text(json.dumps({"metadata": {"total_size": 1.0}, "weight_map": weight_map}))
    return path


def write_safetensors(path, arrays, **metadata):
    safetensors.numpy.save_file({k: np.array(v) for k, v in arrays.items()}, path, metadata=metadata or None)
    return path


def write_npz(path, arrays, big_endian=False, fortran=False, save=np.savez):
    def stored(array):
        if big_endian and array.dtype.itemsize > 1:
            array = array.astype(array.dtype.newbyteorder(">"))
        return np.asarray(array, order="F") if fortran else array

    save(path, **{name: stored(array) for name, array in arrays.items()})
    return path


def write_bundle(prefix, arrays):
    """A TensorFlow checkpoint; returns its index."""
    data, entries = b"", []
    for name, array in sorted(arrays.items()):
        dtype, sizes = {"float32": 1, "uint32": 22}[array.dtype.name], test_tf_checkpoint.shape(*array.shape)
        place = {
            "offset": len(data),
            "size": array.nbytes,
            "checksum": ("fixed32", test_tf_checkpoint.crc(array.tobytes())),
        }
        entries.append((name.encode(), test_tf_checkpoint.tensor(dtype, sizes, **place)))
        data += array.tobytes()
    test_tf_checkpoint.write(prefix.parent, test_tf_checkpoint.rows(*entries), data, prefix.name)
    return prefix.with_name(f"{prefix.name}.index")


VARIANTS = {
    "keras": (".keras", write_keras),
    "deflated keras": (".keras", functools.partial(write_keras, method=zipfile.ZIP_DEFLATED)),
    "keras, chunked inside": (".keras", functools.partial(write_keras, chunks=True)),
    "hdf5": (".weights.h5", write_hdf5),
    "chunked hdf5": (".weights.h5", functools.partial(write_hdf5, chunks=True)),
    "deflated hdf5": (".weights.h5", functools.partial(write_hdf5, compression=1, shuffle=True, fletcher32=True)),
    "compact hdf5": (".weights.h5", functools.partial(write_hdf5, compact=True)),
    "big-endian hdf5": (".weights.h5", functools.partial(write_hdf5, big_endian=True)),
    "big-endian deflated hdf5": (".weights.h5", functools.partial(write_hdf5, big_endian=True, compression=1)),
    "legacy": (".h5", write_legacy),
    "sharded": (".weights.json", write_sharded),
    "deflated sharded": (".weights.json", functools.partial(write_sharded, compression=1)),
    "safetensors": (".safetensors", write_safetensors),
    "npz": (".npz", write_npz),
    "deflated npz": (".npz", functools.partial(write_npz, save=np.savez_compressed)),
    "big-endian npz": (".npz", functools.partial(write_npz, big_endian=True)),
    "column-major npz": (".npz", functools.partial(write_npz, fortran=True)),
}
FORMATS = ("keras", "hdf5", "legacy", "sharded", "safetensors", "npz")
WRITERS = {VARIANTS[variant][0]: VARIANTS[variant][1] for variant in FORMATS}


@functools.cache
def members():
    """Three members with all dtypes and shapes, oldest first."""
    made = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        member = {}
        for dtype, (number, shape) in itertools.product((*FLOATS, *OTHERS), enumerate(SHAPES)):
            if dtype in OTHERS and shape == SHAPES[-1]:
                continue
            normal = np.asarray(rng.normal(size=shape) * 100)
            array = normal > 0 if dtype == "bool" else np.abs(normal) if dtype == "uint8" else normal
            member[f"layers/{dtype}/vars/{number}"] = np.asarray(array).astype(DTYPES[dtype])
        made.append(member)
    return made


def small(seed, **more):
    """A member of a small model."""
    rng = np.random.default_rng(seed)
    return {
        "layers/dense/vars/0": rng.normal(size=(3, 5)).astype(np.float32),
        "layers/dense/vars/1": rng.normal(size=5).astype(np.float32),
        "layers/dropout/vars/0": np.array([seed, 7], np.uint32),
        **more,
    }


@functools.cache
def expected(weighting, name):
    """The exact average of a tensor: fractions, or np.longdouble where there are many elements."""
    raw, arrays = RAW[weighting], [member[name].reshape(-1) for member in members()]
    if arrays[0].size < 100:
        return rational_average(raw, arrays)
    wide = np.asarray(raw, np.longdouble)
    return sum(a * w.astype(np.longdouble) for a, w in zip(wide, arrays, strict=True)) / wide.sum()


def error(array, weighting, name):
    """The largest error of an average in units in the last place."""
    exact, dtype = expected(weighting, name), array.dtype.name
    if array.size < 100:
        return ulps(array.reshape(-1), exact, dtype) if array.size else 0
    precision, least = FLOAT_FORMATS[dtype]
    unit = np.ldexp(1.0, np.maximum(np.frexp(exact)[1] - precision, least))
    biggest = max(np.abs(member[name].astype(np.float64)).max() for member in members())
    slack = 8 * float(np.finfo(np.longdouble).eps) * biggest  # what the exact values themselves are off
    return ((np.abs(array.astype(np.longdouble) - exact) - slack) / unit).max()


CHECKED = {}


def check_average(got, weighting, names):
    """Compares all tensors that were read from an output with what they should be."""
    assert sorted(got) == sorted(names)
    for name, array in got.items():
        newest = members()[-1][name]
        assert (array.shape, array.dtype) == (newest.shape, newest.dtype), name
        if array.dtype.name in OTHERS:
            assert array.tobytes() == newest.tobytes(), name
            continue
        if (weighting, name) not in CHECKED:  # the same bits need not be looked at twice
            assert error(array, weighting, name) <= 0.5 + 1e-6, name
            CHECKED[weighting, name] = array.tobytes()
        assert array.tobytes() == CHECKED[weighting, name], name


def read(path):
    """All tensors of a file by name, as libraries of others read them."""
    if path.name.endswith(".keras"):
        with zipfile.ZipFile(path) as archive:
            return read_hdf5(io.BytesIO(archive.read("model.weights.h5")))
    if path.name.endswith(".weights.json"):
        shards = itertools.chain.from_iterable(json.loads(path.read_text())["weight_map"].values())
        return {k: v for shard in set(shards) for k, v in read_hdf5(path.with_name(shard)).items()}
    if path.name.endswith(".safetensors"):
        return safetensors.numpy.load_file(path)
    if path.name.endswith(".npz"):
        with np.load(path) as archive:
            return dict(archive)
    return read_hdf5(path)


def read_hdf5(path):
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            bfloat16 = item.attrs.get("dtype") == "bfloat16"
            found[name] = item[()].view(ml_dtypes.bfloat16) if bfloat16 else np.asarray(item[()])

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def same_bits(got, wanted):
    return got.keys() == wanted.keys() and all(
        (got[name].dtype, got[name].shape, got[name].tobytes()) == (array.dtype, array.shape, array.tobytes())
        for name, array in wanted.items()
    )


# Every format, dtype, shape and weighting.


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Writes the members once in each variant; returns paths and the names of their tensors."""

    @functools.cache
    def make(variant):
        suffix, write = VARIANTS[variant]
        folder = tmp_path_factory.mktemp("members")
        kept = [n for n in members()[0] if suffix != ".npz" or "bfloat16" not in n]  # NumPy has no name for it
        arrays = [{name: member[name] for name in kept} for member in members()]
        return [write(folder / f"epoch-{k}{suffix}", member) for k, member in enumerate(arrays)], kept

    return make


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("variant", FORMATS)
def test_every_dtype_and_shape_is_averaged_to_half_a_unit_in_the_last_place(files, tmp_path, variant, weighting):
    paths, names = files(variant)
    output = tmp_path / f"average{VARIANTS[variant][0]}"
    report = average_checkpoints(paths, output, **WEIGHTINGS[weighting])
    check_average(read(output), weighting, names)
    assert report.tensors == sum(name.split("/")[1] in FLOATS for name in names)
    assert report.copied == len(names) - report.tensors


@pytest.fixture(scope="module")
def linear(files, tmp_path_factory):
    """The linear average, of files that are all read in place."""
    output = tmp_path_factory.mktemp("linear") / "out.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_TICK_NS", 0)
        average_checkpoints(files("safetensors")[0], output, LINEAR)
    return read(output)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_however_the_inputs_are_stored_the_average_has_the_same_bits(files, linear, tmp_path, variant):
    paths, names = files(variant)
    wanted = {name: array for name, array in linear.items() if name in names}
    own = [tmp_path / f"average{VARIANTS[variant][0]}"] if variant not in FORMATS else []  # those are above
    for output in [*own, tmp_path / "average.safetensors"]:
        report = average_checkpoints(paths, output, LINEAR)
        assert same_bits(read(output), wanted)
        assert report.bytes_read == sum(sum(part.stat().st_size for part in parts(path)) for path in paths)
        whole = [b"".join(part.read_bytes() for part in parts(path)) for path in paths]
        assert report.crc32 == tuple(f"{zlib.crc32(data):08x}" for data in whole)


def parts(path):
    """The files of a checkpoint."""
    if not path.name.endswith(".weights.json"):
        return [path]
    shards = itertools.chain.from_iterable(json.loads(path.read_text())["weight_map"].values())
    return [path, *(path.with_name(name) for name in dict.fromkeys(shards))]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Three files with a tensor of more than one piece of work for a thread."""
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    size = (1 << 20) + 70_001
    made = []
    for k in range(3):
        arrays = {"a": rng.normal(size=size).astype(np.float32), "b": rng.normal(size=100_001).astype(np.float64)}
        arrays |= {"c": rng.normal(size=100_001).astype(ml_dtypes.bfloat16)}
        made.append(write_safetensors(folder / f"{k}.safetensors", arrays))
    return made


def test_budget_and_threads_do_not_change_a_bit(large, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Expected a budget") as refused:
        average_checkpoints(large, tmp_path / "average.safetensors", memory=0)
    least = re.search(r"Give (\d+MiB) or more", str(refused.value))[1]
    outputs = set()
    for threads, memory in itertools.product((1, 2, 5), (least, "64MiB", "1GiB")):
        monkeypatch.setattr(average_module, "cpus", lambda threads=threads: threads)
        output = tmp_path / "average.safetensors"
        report = average_checkpoints(large, output, weights=[3, 1, 1], memory=memory, overwrite=True)
        assert report.threads == (1 if memory == least else threads)
        outputs.add(output.read_bytes())
    assert len(outputs) == 1
    arrays = [read(path) for path in large]
    got = read(output)["a"]
    mean = np.average([a["a"].astype(np.float64) for a in arrays], axis=0, weights=[3, 1, 1])
    np.testing.assert_array_max_ulp(got, mean.astype(np.float32), 1)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_bundle, "ckpt-{}"),
        (write_npz, "{}.npz"),
        (write_safetensors, "{}.safetensors"),
        (write_keras, "{}.keras"),
    ],
)
def test_what_is_kept_of_an_input_is_a_few_bytes_a_tensor(tmp_path, write, name):
    arrays = {f"layer/{k:03}": np.float32([k]) for k in range(60)}
    paths = [Path(write(tmp_path / name.format(k), arrays)) for k in range(9)]
    kept = []
    for count in (3, 9):
        with ExitStack() as stack:
            parser = stack.enter_context(Parser())
            tracemalloc.start()
            inputs = CheckpointSet(paths[:count], parser, stack)
            gc.collect()
            kept.append(tracemalloc.get_traced_memory()[0])
            tracemalloc.stop()
            assert inputs.kept_bytes < kept[-1]
    of_each_file = (kept[1] - kept[0]) / 6
    assert of_each_file < 60 * 40 + 8_000


def test_an_error_that_the_disk_tells_while_the_rest_is_computed_is_not_lost(large, tmp_path, monkeypatch):
    monkeypatch.setattr(average_pass, "_SYNC_BYTES", 1)
    calls, sync = [], NewFile.sync

    def once(self):
        calls.append(self)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        sync(self)

    monkeypatch.setattr(NewFile, "sync", once)
    with pytest.raises(OSError, match=r"Input/output error: '.*out.safetensors'"):
        average_checkpoints(large, tmp_path / "out.safetensors")
    assert len(calls) > 1
    assert not list(tmp_path.iterdir())


def test_a_saved_model_with_a_linked_folder_is_refused_before_a_half_copy_is_made(tmp_path):
    folders = []
    for k in range(2):
        folders.append(tmp_path / str(k))
        write_bundle(folders[k] / "variables/variables", {"w": np.full(3, k, np.float32)})
        (folders[k] / "saved_model.pb").touch()
        (tmp_path / "assets").mkdir(exist_ok=True)
        (folders[k] / "assets").symlink_to(tmp_path / "assets")
    refused(tmp_path, "folder", "1: its folder assets is a link", folders, tmp_path / "out")
    for folder in folders:
        (folder / "assets").unlink()
    average_checkpoints(folders, tmp_path / "out")
    (tmp_path / "file").touch()
    message = "file is a file, which no folder replaces"
    refused(tmp_path, None, message, folders, tmp_path / "file", error=FileExistsError, overwrite=True)


def test_an_average_made_earlier_is_not_averaged_again_with_its_folder(run):
    average_checkpoints(["run"], "run/average.safetensors")
    for given in ("run", "run/*.safetensors"):
        with pytest.raises(CheckpointError, match=r"run/average\.safetensors: it is an average itself"):
            average_checkpoints(given, "out.safetensors")
        with pytest.raises(CheckpointError, match=r"run/average\.safetensors: it is an average itself"):
            sweep_checkpoints(given, [MEAN], lambda tensors: 0.0)
    report = average_checkpoints(["run/epoch-?.safetensors", "run/average.safetensors"], "out.safetensors")
    assert len(report.inputs) == 11


# Which inputs, and how much each weighs.


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The current folder, with twelve small members."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for epoch in range(12):
        write_safetensors(tmp_path / f"run/epoch-{epoch}.safetensors", small(epoch))
    return tmp_path


def averaged(paths, **options):
    """The tensors of an average, and the names of its inputs."""
    output = Path("out.safetensors")
    report = average_checkpoints(paths, output, overwrite=True, **options)
    return read(output), [path.stem for path in report.inputs]


def names(*epochs):
    return [f"epoch-{epoch}" for epoch in epochs]


def test_inputs_are_named_by_patterns_folders_and_lists_in_the_order_of_their_numbers(run):
    Path("list.txt").write_text("".join(f"run/epoch-{epoch}.safetensors\n" for epoch in range(12)))
    all_of_them = averaged([f"run/epoch-{epoch}.safetensors" for epoch in range(12)], weighting=LINEAR)
    assert all_of_them[1] == names(*range(12))
    for given in ("run", "run/*.safetensors", "@list.txt", ["@list.txt"], Path("run")):
        arrays, inputs = averaged(given, weighting=LINEAR)
        assert inputs == names(*range(12))
        assert same_bits(arrays, all_of_them[0])


def test_the_last_ones_and_the_order_by_epoch_decide_what_is_averaged(run):
    assert averaged("run", last=3)[1] == names(9, 10, 11)
    given = [f"run/epoch-{epoch}.safetensors" for epoch in (10, 9, 11)]
    assert averaged(given)[1] == names(10, 9, 11)
    assert averaged(given, sort="epoch", last=2)[1] == names(10, 11)
    newest = averaged(given, weighting=LINEAR)[0]["layers/dropout/vars/0"]
    assert newest.tolist() == [11, 7]
    assert averaged([*given, "run/epoch-2.safetensors"])[0]["layers/dropout/vars/0"].tolist() == [2, 7]


def test_one_input_is_its_own_average(run):
    assert same_bits(averaged("run/epoch-5.safetensors")[0], small(5))


def test_explicit_weights_are_divided_by_their_sum(run):
    linear, _ = averaged("run", weighting=LINEAR, last=3)
    assert same_bits(averaged("run", last=3, weights=[1, 2, 3])[0], linear)
    assert same_bits(averaged("run", last=3, weights=(0.25, 0.5, 0.75))[0], linear)
    assert same_bits(averaged("run", last=3, weights=np.array([2e300, 4e300, 6e300]))[0], linear)
    first, _ = averaged("run", last=3, weights=[1, 0, 0])
    assert same_bits(first, small(9) | {"layers/dropout/vars/0": small(11)["layers/dropout/vars/0"]})


def test_the_report_says_what_was_done(run, capsys):
    paths = [f"run/epoch-{epoch}.safetensors" for epoch in range(4)]
    report = average_checkpoints(paths, "deep/er/out.safetensors", LINEAR, progress=True)
    assert report.output == Path("deep/er/out.safetensors")
    assert report.inputs == tuple(map(Path, paths))
    assert report.weights == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=1e-15)
    assert (report.weighting, report.tensors, report.copied, report.parameters) == ("linear", 2, 1, 20)
    assert report.bytes_read == sum(Path(path).stat().st_size for path in paths)
    assert report.bytes_written == report.output.stat().st_size
    assert report.memory_bytes == 64 << 20
    assert report.seconds > 0
    assert 10 << 20 < report.peak_memory_bytes < 1 << 30
    said = json.loads(json.dumps(report.to_json()))
    assert said["inputs"] == paths
    assert said["gigabytes_per_second"] == pytest.approx(report.bytes_read / report.seconds / 1e9)
    assert "linear average of 4 checkpoints, 2 tensors with 20 numbers, 1 more from the newest" in str(report)
    assert capsys.readouterr() == ("", "")  # no bar where there is no terminal


@pytest.mark.slow
def test_many_inputs_and_a_long_record_of_them_fit(tmp_path):
    paths = [write_safetensors(tmp_path / f"member-{k:04}.safetensors", small(k)) for k in range(1000)]
    template = write_hdf5(tmp_path / "template.weights.h5", small(0))
    output = tmp_path / "out.weights.h5"
    report = average_checkpoints(paths, output, template=template)
    assert len(report.inputs) == 1000
    arrays = [small(k)["layers/dense/vars/0"].astype(np.float64).reshape(-1) for k in range(1000)]
    got = read(output)["layers/dense/vars/0"].reshape(-1)
    assert ulps(got, rational_average(np.ones(1000), arrays), "float32") <= 0.5 + 1e-9
    said = provenance(output)  # longer than an attribute of HDF5 may be
    assert [entry["name"] for entry in said["inputs"]] == [path.name for path in paths]
    assert verify_checkpoint(output).provenance == said


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "count"), [(".keras", 200), (".safetensors", 1_100), (".npz", 1_100)])
def test_many_tensors_are_averaged(tmp_path, suffix, count):
    paths = []
    for k in range(2):
        arrays = {f"layers/l{i}/vars/0": np.array([k, i + k], np.float32) for i in range(count)}
        paths.append(WRITERS[suffix](tmp_path / f"{k}{suffix}", arrays))
    report = average_checkpoints(paths, tmp_path / f"out{suffix}")
    assert report.tensors == count
    got = read(tmp_path / f"out{suffix}")
    assert all(got[f"layers/l{i}/vars/0"].tolist() == [0.5, i + 0.5] for i in range(count))


# Outputs of another format, and what they keep of the newest.

OPTIMIZER = {
    "optimizer/vars/0": np.array(30, np.int64),
    "optimizer/vars/1": np.array(0.25, np.float32),
    "optimizer/vars/2": np.arange(15, dtype=np.float32).reshape(3, 5) + 1,
}


def provenance(path):
    """What an output says of its making, read with the libraries of others."""
    if path.name.endswith(".keras"):
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("streaming_polyak.json"))
    if path.name.endswith(".weights.json"):
        return json.loads(path.read_text())["metadata"]["streaming_polyak"]
    if path.name.endswith(".safetensors"):
        with safetensors.safe_open(path, "numpy") as file:
            return json.loads(file.metadata()["streaming_polyak"])
    with h5py.File(path) as file:
        pieces = [name for name in file.attrs if name.startswith("streaming_polyak")]
        pieces.sort(key=lambda name: int(name.partition(".")[2] or 0))
        return json.loads(b"".join(file.attrs[name] for name in pieces))


@pytest.mark.parametrize("variant", [v for v in FORMATS if v != "npz"])
def test_an_output_says_how_it_was_made(tmp_path, variant):
    suffix, write = VARIANTS[variant]
    paths = [write(tmp_path / f"epoch-{k}{suffix}", small(k)) for k in range(3)]
    output = tmp_path / f"out{suffix}"
    average_checkpoints(paths, output, Exponential(half_life=1))
    said = provenance(output)
    assert said["made_by"] == f"streaming_polyak {__version__}"
    assert said["weighting"] == "exponential:half_life=1.0"
    assert "float64" in said["accumulated_in"]
    assert said["optimizer"] == "drop"
    for path, weight, entry in zip(paths, [1 / 7, 2 / 7, 4 / 7], said["inputs"], strict=True):
        data = b"".join(part.read_bytes() for part in parts(path))
        assert entry["name"] == path.name
        assert (entry["bytes"], entry["crc32"]) == (len(data), f"{zlib.crc32(data):08x}")
        assert entry["weight"] == pytest.approx(weight)
    assert verify_checkpoint(output).provenance == said
    again = tmp_path / f"again{suffix}"  # an average of averages says so of itself alone
    average_checkpoints([output, paths[0]], again)
    assert [entry["name"] for entry in provenance(again)["inputs"]] == [output.name, paths[0].name]


@pytest.mark.parametrize("optimizer", ["drop", "newest"])
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".safetensors", ".npz"])
def test_a_keras_file_gives_outputs_of_the_other_formats(tmp_path, suffix, optimizer):
    older = {name: array * 3 for name, array in OPTIMIZER.items()}
    paths = [write_keras(tmp_path / f"{k}.keras", small(k) | (OPTIMIZER if k else older)) for k in range(2)]
    output = tmp_path / f"out{suffix}"
    report = average_checkpoints(paths, output, optimizer=optimizer)
    got = read(output)
    mean = (small(0)["layers/dense/vars/0"].astype(np.float64) + small(1)["layers/dense/vars/0"]) / 2
    np.testing.assert_array_equal(got["layers/dense/vars/0"], mean.astype(np.float32))
    assert (report.tensors, report.copied) == (2, 1)
    kept = {name: array for name, array in got.items() if name.startswith("optimizer")}
    if optimizer == "newest":
        assert same_bits(kept, OPTIMIZER)
    elif suffix == ".keras":  # Keras insists on the entries: those of a new optimizer with the same learning rate
        zeros = {name: np.zeros_like(array) for name, array in OPTIMIZER.items()}
        assert same_bits(kept, zeros | {"optimizer/vars/1": OPTIMIZER["optimizer/vars/1"]})
        with zipfile.ZipFile(output) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
            assert file["optimizer/vars/2"].id.get_storage_size() == 0  # zeros take no room
    else:
        assert not kept


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_keras_output_keeps_the_config_and_metadata_of_the_newest_byte_for_byte(tmp_path, method):
    paths = [write_keras(tmp_path / f"{k}.keras", small(k)) for k in range(2)]
    with zipfile.ZipFile(paths[1], "w", method) as archive:
        archive.writestr("metadata.json", METADATA + b" ")
        archive.writestr("config.json", CONFIG + b"\n\n")
        archive.writestr("assets/vocabulary.txt", b"a\nb\n" * 50)
        archive.writestr("model.weights.h5", write_hdf5(io.BytesIO(), small(1)).getvalue())
    average_checkpoints(paths, tmp_path / "out.keras")
    with zipfile.ZipFile(tmp_path / "out.keras") as archive, zipfile.ZipFile(paths[1]) as newest:
        assert archive.testzip() is None
        for name in newest.namelist():
            if name != "model.weights.h5":
                assert archive.read(name) == newest.read(name)
        assert set(archive.namelist()) == {*newest.namelist(), "streaming_polyak.json"}
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())


@pytest.mark.parametrize(
    ("suffix", "template", "output"),
    [
        (".weights.h5", "model.keras", "out.keras"),
        (".safetensors", "model.keras", "out.keras"),
        (".safetensors", "model.weights.h5", "out.weights.h5"),
        (".npz", "model.keras", "out.weights.h5"),
        (".safetensors", "model.weights.json", "out.weights.json"),
        (".safetensors", "model.h5", "out.h5"),
        (".keras", "model.keras", "out.keras"),
    ],
)
def test_a_template_gives_the_structure_that_the_inputs_lack(tmp_path, suffix, template, output):
    paths = [WRITERS[suffix](tmp_path / f"{k}{suffix}", small(k)) for k in range(2)]
    (tmp_path / "templates").mkdir()
    group = "optimizer_weights" if template == "model.h5" else "optimizer"
    entries = {name.replace("optimizer", group, 1): array for name, array in OPTIMIZER.items()}
    written = WRITERS[template.removeprefix("model")](tmp_path / "templates" / template, small(77) | entries)
    average_checkpoints(paths, tmp_path / output, template=written)
    got = {name: array for name, array in read(tmp_path / output).items() if not name.startswith("optimizer")}
    average_checkpoints(paths, tmp_path / "plain.safetensors")
    assert same_bits(got, read(tmp_path / "plain.safetensors"))
    assert got["layers/dropout/vars/0"].tolist() == [1, 7]  # of the newest, not of the template
    if output.endswith(".keras"):
        with zipfile.ZipFile(tmp_path / output) as archive:
            assert archive.read("config.json") == CONFIG


def test_a_safetensors_output_keeps_the_metadata_of_the_newest(tmp_path):
    paths = [write_safetensors(tmp_path / f"{k}.safetensors", small(k), format="np", note=f"{k}") for k in range(2)]
    average_checkpoints(paths, tmp_path / "out.safetensors")
    with safetensors.safe_open(tmp_path / "out.safetensors", "numpy") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["note"]) == ("np", "1")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_weights_that_tensorflow_keeps_under_the_optimizer_stay_weights_in_other_formats(tmp_path, suffix):
    end = ".ATTRIBUTES/VARIABLE_VALUE"
    kept, slot = f"optimizer/_trainable_variables/0/{end}", f"optimizer/_variables/2/{end}"
    paths = [
        WRITERS[suffix](tmp_path / f"{k}{suffix}", {kept: np.full(3, k, np.float32), slot: np.ones(3, np.float32)})
        for k in (1, 3)
    ]
    average_checkpoints(paths, tmp_path / f"once{suffix}")
    average_checkpoints([tmp_path / f"once{suffix}"], tmp_path / f"twice{suffix}")
    for name in ("once", "twice"):
        got = read(tmp_path / f"{name}{suffix}")
        assert {key: value.tolist() for key, value in got.items()} == {kept: [2, 2, 2]}
    verify_checkpoint(tmp_path / f"twice{suffix}")


def test_an_output_that_would_replace_the_shard_of_an_input_is_refused(tmp_path):
    WRITERS[".weights.json"](tmp_path / "in.weights.json", small(0))
    shard = next(tmp_path.glob("in_*.weights.h5"))
    shard.rename(tmp_path / "out_00000.weights.h5")
    index = tmp_path / "in.weights.json"
    index.write_text(index.read_text().replace(shard.name, "out_00000.weights.h5"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"out\.weights\.json: it is the input") as refused:
        average_checkpoints([index], tmp_path / "out.weights.json", overwrite=True)
    assert refused.value.code == "output-is-input"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_hdf5_output_keeps_attributes_and_empty_groups_of_the_newest(tmp_path):
    paths = [write_legacy(tmp_path / f"{k}.h5", small(k)) for k in range(2)]
    with h5py.File(paths[1], "r+") as file:
        file.create_group("top_level_model_weights").attrs["weight_names"] = np.array([], "S1")
        file["layers/dense"].attrs["weight_names"] = [b"kernel:0", b"bias:0"]
        file["layers/dense/vars/0"].attrs["unit"] = np.float32(1.5)
        file.attrs["keras_version"] = "3.15.0"
    average_checkpoints(paths, tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        assert file.attrs["keras_version"] == "3.15.0"
        assert list(file.attrs["layer_names"]) == ["dense"]
        assert file["top_level_model_weights"].attrs["weight_names"].shape == (0,)
        assert file["layers/dense"].attrs["weight_names"].tolist() == ["kernel:0", "bias:0"]
        assert file["layers/dense/vars/0"].attrs["unit"] == np.float32(1.5)


@pytest.mark.parametrize("variant", FORMATS)
def test_two_runs_give_the_same_bytes(tmp_path, variant):
    suffix, write = VARIANTS[variant]
    paths = [write(tmp_path / f"{k}{suffix}", small(k) | OPTIMIZER) for k in range(2)]
    outputs = []
    for folder in ("a", "b"):
        average_checkpoints(paths, tmp_path / folder / f"out{suffix}")
        outputs.append({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()})
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_no_time_of_day_is_written(tmp_path, suffix):
    paths = [WRITERS[suffix](tmp_path / f"{k}{suffix}", small(k)) for k in range(2)]
    before = int(time.time())
    average_checkpoints(paths, tmp_path / f"out{suffix}")
    data = (tmp_path / f"out{suffix}").read_bytes()
    assert not [second for second in range(before, int(time.time()) + 1) if struct.pack("<I", second) in data]


# What is refused: nothing may be written then.


def listing(folder):
    """Every file below a folder with its contents, links as links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def refused(folder, code, match, paths, output="out.safetensors", *, error=CheckpointError, **options):
    """Asserts that an average is refused for the given reason and that nothing in the folder has changed."""
    before = listing(folder)
    with pytest.raises(error, match=match) as caught:
        average_checkpoints(paths, output, **options)
    if code is not None:
        assert caught.value.code == code
    assert listing(folder) == before
    return caught.value


A, B = "run/epoch-1.safetensors", "run/epoch-2.safetensors"


def test_an_empty_list_and_files_that_are_not_there_are_refused(run):
    refused(run, "empty-list", "expected at least one checkpoint", [])
    error = refused(run, "missing", "no such file", [A, "run/epoch-99.safetensors"])
    assert error.path == "run/epoch-99.safetensors"


@pytest.mark.parametrize("how", ["named twice", "symbolic link", "hard link", "by two names of the folder", "pattern"])
def test_the_same_file_twice_is_refused(run, how):
    other = run / "other.safetensors"
    if how == "symbolic link":
        other.symlink_to(run / A)
    elif how == "hard link":
        os.link(run / A, other)
    elif how == "by two names of the folder":
        (run / "elsewhere").symlink_to(run / "run")
        other = run / "elsewhere/epoch-1.safetensors"
    given = {"named twice": [A, B, A], "pattern": [A, "run/*"]}.get(how, [A, B, other])
    refused(run, "same-file", "it is the same file as run/epoch-1.safetensors, which is in the list already", given)


def test_the_same_shard_in_two_stores_is_refused(tmp_path):
    paths = [write_sharded(tmp_path / f"{k}.weights.json", small(k)) for k in range(2)]
    paths[1].write_text(paths[1].read_text().replace("1_00000", "0_00000"))
    refused(tmp_path, "same-file", "it is the same file as", paths, tmp_path / "out.safetensors")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("how", ["the name", "a symbolic link", "a hard link", "another way to the name"])
def test_an_output_that_is_an_input_is_refused(run, how, overwrite):
    output = {"the name": A, "another way to the name": f"run/../{A}"}.get(how, "out.safetensors")
    if how == "a symbolic link":
        Path(output).symlink_to(A)
    elif how == "a hard link":
        os.link(A, output)
    message = r"it is the input run/epoch-1\.safetensors\. Choose another name"
    refused(run, "output-is-input", message, [A, B], output, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_a_shard_of_an_input_is_refused(tmp_path, overwrite):
    paths = [write_sharded(tmp_path / f"{k}.weights.json", small(k)) for k in range(2)]
    template = write_hdf5(tmp_path / "template.weights.h5", small(0))
    output = tmp_path / "0_00001.weights.h5"
    refused(tmp_path, "output-is-input", "Choose another", paths, output, template=template, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_of_several_files_never_takes_the_place_of_inputs_templates_or_strangers(tmp_path, overwrite):
    paths = [write_hdf5(tmp_path / f"run_0000{k}.weights.h5", small(k)) for k in range(2)]
    template = write_sharded(tmp_path / "template.weights.json", small(0))
    output, options = tmp_path / "run.weights.json", {"template": template, "overwrite": overwrite}
    refused(tmp_path, "output-is-input", "it is the input .*run_00000", paths, output, **options)
    refused(tmp_path, "output-is-input", "it is the template .*template.weights.json", paths, template, **options)
    strangers = [write_hdf5(tmp_path / f"out_0000{k}.weights.h5", small(k)) for k in range(3)]
    before = [path.read_bytes() for path in strangers]
    refused(
        tmp_path, None, "out_00000.weights.h5 is in the way", paths, tmp_path / "out.weights.json",
        error=FileExistsError, **options,
    )  # fmt: skip
    assert [path.read_bytes() for path in strangers] == before


def test_what_is_in_the_way_of_a_replaced_store_is_told_before_anything_is_read(tmp_path):
    paths = [write_sharded(tmp_path / f"{k}.weights.json", small(k)) for k in range(2)]
    out = tmp_path / "out.weights.json"
    average_checkpoints(paths, out)
    damaged = out.read_text()[:-5]
    out.write_text(damaged)
    message = "out_00000.weights.h5 is in the way: .* or is damaged. Move it away"
    refused(tmp_path, None, message, paths, out, error=FileExistsError, overwrite=True)
    assert out.read_text() == damaged


def test_a_store_that_replaces_one_of_more_shards_leaves_none_of_them(tmp_path):
    paths = [write_sharded(tmp_path / f"{k}.weights.json", small(k)) for k in range(2)]
    out = tmp_path / "out"
    average_checkpoints(paths, out / "x.weights.json")
    shutil.copy(out / "x_00001.weights.h5", out / "x_00002.weights.h5")
    said = json.loads((out / "x.weights.json").read_text())
    said["weight_map"]["/more"] = ["x_00002.weights.h5", "../0_00000.weights.h5", "y_00000.weights.h5"]
    (out / "x.weights.json").write_text(json.dumps(said).replace("../0", "0"))
    (out / "y_00000.weights.h5").write_bytes(b"of another store")
    average_checkpoints(paths, out / "x.weights.json", overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "x.weights.json", "x_00000.weights.h5", "x_00001.weights.h5", "y_00000.weights.h5",
    ]  # fmt: skip


def test_an_output_that_exists_is_replaced_only_when_asked(run):
    Path("out.safetensors").write_bytes(b"old")
    refused(run, None, "out.safetensors exists already", [A, B], error=FileExistsError)
    average_checkpoints([A, B], "out.safetensors", overwrite=True)
    assert read(Path("out.safetensors")).keys() == small(0).keys()


def test_a_link_in_place_of_the_output_is_replaced_and_not_followed(run):
    Path("precious").write_bytes(b"old")
    Path("out.safetensors").symlink_to("precious")
    refused(run, None, "exists already", [A, B], error=FileExistsError)
    average_checkpoints([A, B], "out.safetensors", overwrite=True)
    assert Path("precious").read_bytes() == b"old"
    assert not Path("out.safetensors").is_symlink()
    Path("dangling.safetensors").symlink_to("nowhere")
    refused(run, None, "exists already", [A, B], "dangling.safetensors", error=FileExistsError)


def test_a_folder_in_place_of_the_output_is_refused(run):
    Path("out.safetensors").mkdir()
    for overwrite in (False, True):
        refused(run, None, "out.safetensors", [A, B], error=FileExistsError, overwrite=overwrite)


CHANGED = {
    "missing": ({"layers/dense/vars/1": None}, r"layers/dense/vars/1: missing in {other}"),
    "extra": ({"layers/more/vars/0": np.zeros(2, np.float32)}, r"layers/more/vars/0: only in {other}"),
    "shape": (
        {"layers/dense/vars/0": np.zeros((5, 3), np.float32)},
        r"layers/dense/vars/0: float32 \(5, 3\) in {other}, float32 \(3, 5\) in {newest}",
    ),
    "dtype": (
        {"layers/dense/vars/0": np.zeros((3, 5), np.float64)},
        r"layers/dense/vars/0: float64 \(3, 5\) in {other}, float32 \(3, 5\) in {newest}",
    ),
    "integers": (
        {"layers/dropout/vars/0": np.zeros(2, np.int32)},
        r"layers/dropout/vars/0: int32 \(2,\) in {other}, uint32 \(2,\) in {newest}",
    ),
    "another name": (
        {"layers/dense/vars/1": None, "layers/dense/vars/2": np.zeros(5, np.float32)},
        r"layers/dense/vars/1: missing in {other}\n.*layers/dense/vars/2: only in {other}",
    ),
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("kind", CHANGED)
def test_tensors_that_differ_are_refused_with_the_difference(tmp_path, kind, suffix):
    changes, message = CHANGED[kind]
    arrays = {k: v for k, v in (small(1) | changes).items() if v is not None}
    paths = [WRITERS[suffix](tmp_path / f"{name}{suffix}", small(0)) for name in "ac"]
    paths.insert(1, WRITERS[suffix](tmp_path / f"b{suffix}", arrays))
    message = message.format(other=paths[1], newest=paths[2])
    message = rf"b{suffix}: expected the same tensors as in .*c{suffix}, but they differ:\n.*{message}"
    error = refused(tmp_path, "different-models", message, paths, tmp_path / "out.safetensors")
    assert str(error).endswith("Average checkpoints of one model only.")
    assert error.path == str(paths[1])


def test_a_long_list_of_differences_is_cut(tmp_path):
    many = {f"t{i}": np.zeros(1, np.float32) for i in range(30)}
    paths = [write_npz(tmp_path / "a.npz", {"x": np.zeros(1, np.float32)}), write_npz(tmp_path / "b.npz", many)]
    error = refused(tmp_path, "different-models", r"\.\.\. and 11 more", paths, tmp_path / "out.npz")
    assert str(error).count("missing in") == 20


def test_entries_of_the_optimizer_may_differ_and_the_order_of_the_tensors_too(tmp_path):
    reordered = dict(reversed(small(0).items())) | {"optimizer/vars/0": np.zeros(7, np.float32)}
    paths = [write_hdf5(tmp_path / f"{k}.weights.h5", a) for k, a in enumerate([reordered, small(1) | OPTIMIZER])]
    average_checkpoints(paths, tmp_path / "out.npz")
    mean = (small(0)["layers/dense/vars/1"].astype(np.float64) + small(1)["layers/dense/vars/1"]) / 2
    np.testing.assert_array_equal(read(tmp_path / "out.npz")["layers/dense/vars/1"], mean.astype(np.float32))


def test_files_of_several_formats_are_averaged_if_their_tensors_are_the_same(tmp_path):
    paths = [WRITERS[suffix](tmp_path / f"{k}{suffix}", small(k)) for k, suffix in enumerate(WRITERS)]
    average_checkpoints(paths, tmp_path / "out.npz", LINEAR)
    arrays = [small(k)["layers/dense/vars/1"] for k in range(len(paths))]
    got = read(tmp_path / "out.npz")["layers/dense/vars/1"]
    assert ulps(got, rational_average(LINEAR.raw_weights(len(paths)), arrays), "float32") <= 0.5 + 1e-9


def test_a_file_without_floats_is_refused(tmp_path):
    path = write_npz(tmp_path / "a.npz", {"x": np.arange(3)})
    refused(tmp_path, "no-floats", "no floating tensor that could be averaged", [path], tmp_path / "out.npz")
    with pytest.raises(CheckpointError, match="no floating tensor"):
        verify_checkpoint(path)


def test_fewer_files_than_asked_for_are_refused(run):
    refused(run, "too-few", "the last 13 checkpoints are asked for, but there are only 12", "run", last=13)
    refused(run, None, "last >= 1", "run", last=0, error=ValueError)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_are_refused_by_file_and_tensor_or_averaged_if_allowed(tmp_path, dtype, value):
    member = np.ones(70_001).astype(DTYPES[dtype])
    spoiled = member.copy()
    spoiled[70_000] = value
    paths = [
        write_safetensors(tmp_path / f"{k}.safetensors", {"a": member, "b": array})
        for k, array in enumerate([member, spoiled, member])
    ]
    output = tmp_path / "out.safetensors"
    message = r"1\.safetensors, tensor 'b': it holds NaN or infinity\. .*--allow-nonfinite"
    refused(tmp_path, None, message, paths, output, error=NonFiniteError)
    average_checkpoints(paths, output, allow_nonfinite=True)
    np.testing.assert_array_equal(read(output)["b"].astype(np.float64), [*[1.0] * 70_000, value])
    np.testing.assert_array_equal(read(output)["a"], member)


def test_nan_in_the_optimizer_does_not_matter(tmp_path):
    spoiled = OPTIMIZER | {"optimizer/vars/2": np.full((3, 5), np.nan, np.float32)}
    paths = [write_keras(tmp_path / f"{k}.keras", small(k) | spoiled) for k in range(2)]
    average_checkpoints(paths, tmp_path / "out.keras")
    average_checkpoints(paths, tmp_path / "kept.keras", optimizer="newest")
    assert np.isnan(read(tmp_path / "kept.keras")["optimizer/vars/2"]).all()


def test_a_budget_that_is_too_small_is_refused_and_the_least_possible_one_works(run):
    error = refused(run, None, r"Expected a budget of at least", [A, B], memory="1MiB", error=ValueError)
    least = re.search(r"Give (\d+MiB) or more", str(error))[1]
    report = average_checkpoints([A, B], "out.safetensors", memory=least)
    assert report.memory_bytes < 16 << 20
    one_less = f"{int(least.removesuffix('MiB')) - 1}MiB"
    refused(run, None, "for 2 checkpoints of 2 tensors", [A, B], "b.npz", memory=one_less, error=ValueError)
    refused(run, None, "Expected a size in bytes", [A, B], "b.npz", memory="much", error=ValueError)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": [1.0]}, ValueError, "a weight for each of the 2 checkpoints, got 1 weights"),
        ({"weights": [1, 2, 3]}, ValueError, "a weight for each of the 2 checkpoints, got 3 weights"),
        ({"weights": [1, -1]}, ValueError, "finite weights >= 0 that are not all zero"),
        ({"weights": [0, 0]}, ValueError, "finite weights >= 0 that are not all zero"),
        ({"weights": [1, np.nan]}, ValueError, "finite weights >= 0"),
        ({"weights": [1, np.inf]}, ValueError, "finite weights >= 0"),
        ({"weights": [1e308, 1e308]}, ValueError, "finite weights >= 0"),
        ({"weights": [1, 2], "weighting": LINEAR}, ValueError, "a weighting or weights, got both"),
        ({"weighting": "linear"}, TypeError, "Expected a weighting such as MEAN or LINEAR, got 'linear'"),
        ({"optimizer": "keep"}, ValueError, 'Expected optimizer="drop" or "newest", got optimizer=\'keep\''),
        ({"sort": "name"}, ValueError, "Expected sort="),
        ({"memory": -1}, ValueError, "Expected a budget of at least"),
    ],
)
def test_wrong_options_are_refused(run, options, error, message):
    refused(run, None, message, [A, B], error=error, **options)


@pytest.mark.parametrize("output", ["out", "out.pt", "out.hdf5", "out.keras.bak"])
def test_a_name_that_says_no_format_is_refused(run, output):
    refused(run, "output-format", r"its name must end in \.keras, .*\.npz", [A, B], output)


def test_a_template_that_is_damaged_changes_or_has_no_use_is_refused(tmp_path, monkeypatch):
    paths = [write_hdf5(tmp_path / f"{k}.weights.h5", small(k)) for k in range(2)]
    template = write_keras(tmp_path / "template.keras", small(0))
    whole = template.read_bytes()
    template.write_bytes(whole.replace(CONFIG[:20], CONFIG[:19] + b"!", 1))
    message = "template.keras: member 'config.json' does not have the CRC-32"
    refused(tmp_path, "damaged", message, paths, tmp_path / "out.keras", template=template)
    template.write_bytes(whole)
    refused(
        tmp_path, None, "will hold tensors alone, so template=.*template.keras has no use", paths,
        tmp_path / "out.npz", error=ValueError, template=template,
    )  # fmt: skip
    finish = average_pass.AveragePass._finish_input

    def touch(self, i):
        os.utime(template, ns=(1, 1))
        return finish(self, i)

    monkeypatch.setattr(average_pass.AveragePass, "_finish_input", touch)
    message = "template.keras: it was written to or replaced while it was read"
    average = functools.partial(average_checkpoints, paths, tmp_path / "out.keras", template=template)
    with pytest.raises(CheckpointError, match=message):
        average()
    assert not (tmp_path / "out.keras").exists()


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    paths = [write_safetensors(tmp_path / "a.safetensors", {"x": np.ones(2, ml_dtypes.bfloat16)})]
    refused(tmp_path, "output-format", "npz cannot hold bfloat16. Use .safetensors", paths, tmp_path / "out.npz")


@pytest.mark.parametrize(
    ("suffix", "output", "wanted"),
    [
        (".safetensors", "out.keras", r"a \.keras file"),
        (".weights.h5", "out.keras", r"a \.keras file"),
        (".npz", "out.weights.h5", r"a \.keras or \.weights\.h5 file"),
        (".h5", "out.weights.h5", r"a \.keras or \.weights\.h5 file"),  # Keras would look for another layout in it
        (".weights.h5", "out.h5", r"an \.h5 file"),
        (".keras", "out.h5", r"an \.h5 file"),
        (".keras", "out.weights.json", r"a \.weights\.json store"),
        (".npz", "out.index", "a TensorFlow checkpoint"),
    ],
)
def test_a_structure_that_the_inputs_lack_is_asked_for_as_a_template(tmp_path, suffix, output, wanted):
    paths = [WRITERS[suffix](tmp_path / f"a{suffix}", small(0))]
    refused(tmp_path, "template", f"Give {wanted} of the model as the template", paths, tmp_path / output)


@pytest.mark.parametrize("kind", CHANGED)
def test_a_template_of_another_model_is_refused(run, kind):
    changes, _ = CHANGED[kind]
    arrays = {k: v for k, v in (small(1) | changes).items() if v is not None}
    template = write_keras(run / "model.keras", arrays)
    message = r"expected a template with the same tensors as run/epoch-2\.safetensors, but they differ:\n  layers"
    refused(run, "different-models", message, [A, B], "out.keras", template=template)
    refused(run, "missing", "no such file", [A, B], "out.keras", template="none.keras")


def test_the_optimizer_of_the_newest_is_kept_whole_or_not_at_all(tmp_path):
    with_it = [write_hdf5(tmp_path / f"with-{k}.weights.h5", small(k) | OPTIMIZER) for k in range(2)]
    without = [write_hdf5(tmp_path / f"without-{k}.weights.h5", small(k)) for k in range(2)]
    full = write_keras(tmp_path / "full.keras", small(7) | {name: array * 2 for name, array in OPTIMIZER.items()})
    bare = write_keras(tmp_path / "bare.keras", small(7))
    output, keep = tmp_path / "out.keras", {"optimizer": "newest"}
    refused(tmp_path, "template", r"'optimizer/vars/0': .* does not have", with_it, output, template=bare, **keep)
    refused(tmp_path, "template", "'optimizer/vars/0': .* the newest has not", without, output, template=full, **keep)
    average_checkpoints(with_it, output, template=full, **keep)
    assert same_bits({k: v for k, v in read(output).items() if k.startswith("optimizer")}, OPTIMIZER)


def test_a_full_disk_is_said_to_be_one_and_leaves_nothing(run, monkeypatch):
    def write(self, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(NewFile, "write", write)
    refused(run, None, r"No space left on device: 'out\.safetensors'", [A, B], error=OSError)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".keras", ".weights.h5", ".weights.json"])
def test_what_a_failing_disk_changes_is_found_by_reading_it_back(tmp_path, suffix, monkeypatch):
    paths = [WRITERS[suffix](tmp_path / f"{k}{suffix}", small(k)) for k in range(2)]
    written = []
    real = NewFile.write

    def write(self, data, offset):
        data = bytearray(memoryview(data).cast("B"))
        if len(data) == 60 and not written:  # the kernel of the dense layer
            written.append(offset)
            data[13] ^= 1
        return real(self, data, offset)

    monkeypatch.setattr(NewFile, "write", write)
    refused(tmp_path, None, "the disk may be failing|damaged", paths, tmp_path / f"out{suffix}")
    assert written


# Files that change while they are read.


def tamper(monkeypatch, change, at=2):
    """Lets something happen to a file when, with the output begun, a file is read for the `at`-th time."""
    begin, read_into, calls = average_pass.begin, Source.read_into, itertools.count(1)

    def hooked(*arguments):
        if next(calls) == at:
            change()
        read_into(*arguments)

    def begin_and_hook(plan):
        draft = begin(plan)
        monkeypatch.setattr(Source, "read_into", hooked)
        return draft

    monkeypatch.setattr(source, "_TICK_NS", 10_000_000)  # what tells a file from one written just before
    monkeypatch.setattr(average_pass, "begin", begin_and_hook)


def rewrite_in_place(path):
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")


CHANGES = {
    "truncated": lambda path: os.truncate(path, 300),
    "rewritten in place": rewrite_in_place,
    "appended to": lambda path: os.truncate(path, path.stat().st_size + 4),
    "replaced by a copy": lambda path: os.replace(shutil.copy(path, f"{path}.copy"), path),
    "removed": Path.unlink,
}


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("number", [0, 2])
def test_an_input_that_changes_while_it_is_read_is_an_error_and_leaves_the_output_as_it_was(
    tmp_path, monkeypatch, change, number, old
):
    paths = [write_safetensors(tmp_path / f"{k}.safetensors", small(k)) for k in range(3)]
    output = tmp_path / "out.safetensors"
    if old:
        output.write_bytes(old)
    tamper(monkeypatch, lambda: CHANGES[change](paths[number]))
    with pytest.raises(CheckpointError, match=f"{number}.safetensors: .*(Do not write|written to|is gone)") as caught:
        average_checkpoints(paths, output, overwrite=old is not None)
    assert caught.value.code == ("truncated" if change == "truncated" else "changed")
    assert (output.read_bytes() if output.exists() else None) == old
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(TEMPORARY)]


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".npz", ".weights.json"])
def test_in_every_format_a_change_is_noticed(tmp_path, monkeypatch, suffix):
    paths = [WRITERS[suffix](tmp_path / f"{k}{suffix}", small(k)) for k in range(2)]
    shard = parts(paths[0])[-1]
    tamper(monkeypatch, lambda: rewrite_in_place(shard), at=4)
    with pytest.raises(CheckpointError) as caught:
        average_checkpoints(paths, tmp_path / f"out{suffix}")
    assert caught.value.code in ("changed", "damaged")  # an archive has a checksum that shows it before
    assert not (tmp_path / f"out{suffix}").exists()


@pytest.mark.parametrize("suffix", [".keras", ".npz"])
def test_a_checksum_in_an_archive_that_does_not_hold_is_an_error(tmp_path, suffix):
    paths = [WRITERS[suffix](tmp_path / f"{k}{suffix}", small(k)) for k in range(2)]
    data = paths[0].read_bytes()
    kernel = data.index(small(0)["layers/dense/vars/0"].tobytes())
    paths[0].write_bytes(data[: kernel + 9] + bytes([data[kernel + 9] ^ 1]) + data[kernel + 10 :])
    for given in (paths, paths[::-1]):
        error = refused(tmp_path, "damaged", "the CRC-32 of member .* the file is damaged", given, tmp_path / "o.npz")
        assert error.path == str(paths[0])


def test_an_archive_damaged_outside_of_its_tensors_is_found_too(tmp_path):
    paths = [write_keras(tmp_path / f"{k}.keras", small(k)) for k in range(2)]
    data = paths[0].read_bytes()
    paths[0].write_bytes(data.replace(b'"Sequential"', b'"Sequentiam"'))
    refused(tmp_path, "damaged", "the CRC-32 of member 'config.json'", paths, tmp_path / "out.npz")


def test_a_checksum_of_tensorflow_that_does_not_hold_is_an_error(tmp_path):
    paths = [write_bundle(tmp_path / f"{k}/ckpt", small(k)) for k in range(2)]
    data = tmp_path / "0/ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:9] + b"\x01" + data.read_bytes()[10:])
    for given in (paths, paths[::-1]):
        refused(tmp_path, "damaged", "tensor 'layers/dense/vars/0': its CRC-32C is", given, tmp_path / "out.npz")


def test_a_tensorflow_checkpoint_is_averaged_in_its_own_format(tmp_path):
    paths = [write_bundle(tmp_path / f"{k}/ckpt", small(k, empty=np.zeros((2, 0), np.float32))) for k in range(3)]
    report = average_checkpoints(paths, tmp_path / "out/ckpt", LINEAR)
    assert (report.tensors, report.copied) == (3, 1)
    average_checkpoints(paths, tmp_path / "plain.safetensors", LINEAR)
    wanted = read(tmp_path / "plain.safetensors")
    with average_module.Parser() as parser, open_checkpoint(tmp_path / "out/ckpt.index", parser) as table:
        assert same_bits({name: table.read(name) for name in table.tensors}, wanted)
    assert verify_checkpoint(tmp_path / "out/ckpt").checksums == 4


# More files than may be open, and more memory than there is.


def in_a_child(work):
    """Runs a function in a fork of this process; returns the signal that killed it, or None."""
    child = os.fork()
    if child == 0:
        try:
            average_module.Parser = hdf5.Parser  # the one of all tests is the parent's
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".keras", ".weights.json"])
def test_more_files_than_may_be_open_at_once_are_opened_anew_for_each_read(tmp_path, suffix):
    paths = [WRITERS[suffix](tmp_path / f"{k}{suffix}", small(k)) for k in range(40)]
    average_checkpoints(paths, tmp_path / "wanted.npz")

    def work():
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
        average_checkpoints(paths, tmp_path / "out.npz")

    assert in_a_child(work) is None
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "wanted.npz").read_bytes()


def test_inputs_to_unpack_may_be_as_many_as_files_may_be_open(tmp_path, monkeypatch):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    plain, packed = [], []
    for k in range(14):
        (packed if k % 2 else plain).append(tmp_path / f"{k}.npz")
        (np.savez_compressed if k % 2 else np.savez)(tmp_path / f"{k}.npz", **small(k))
    average_checkpoints([*plain, *packed[:6]], tmp_path / "wanted.npz")
    monkeypatch.setattr(checkpoint_set, "_free_descriptors", lambda: 6)
    before = len(os.listdir("/proc/self/fd"))

    def work():
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 6 + 14, hard))
        average_checkpoints([*plain, *packed[:6]], tmp_path / "out.npz")

    assert in_a_child(work) is None
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "wanted.npz").read_bytes()
    said = r"it has to be unpacked, and so had 6 before it: more do not fit, .*allow more open files \(ulimit -n\)"
    with pytest.raises(OSError, match=said) as caught:
        average_checkpoints([*plain, *packed], tmp_path / "more.npz")
    assert (caught.value.errno, caught.value.filename) == (errno.EMFILE, str(packed[6]))
    assert len(os.listdir("/proc/self/fd")) == before


MEMORY = """
import json, re, sys, threading
from contextlib import ExitStack
from pathlib import Path
from streaming_polyak.files.average import average_checkpoints

def resident():
    status = Path("/proc/self/status").read_text()
    return [int(re.search(rf"{kind}:\\s+(\\d+)", status)[1]) * 1024 for kind in ("RssAnon", "RssFile")]

before, peaks, done = resident(), [0, 0], threading.Event()

def sample():
    while not done.wait(0.001):
        peaks[:] = map(max, peaks, resident())

thread = threading.Thread(target=sample)
thread.start()
report = average_checkpoints(sys.argv[2:], sys.argv[1])
done.set()
thread.join()
print(json.dumps([before, peaks, report.peak_memory_bytes, report.memory_bytes, report.threads]))
"""


@pytest.fixture(scope="module")
def forty_megabytes(tmp_path_factory):
    """Thirty files of 40 MB; all but three have no blocks on the disk but their first ones."""
    folder = tmp_path_factory.mktemp("sparse")
    rng = np.random.default_rng(0)
    paths = []
    for k in range(30):
        rows = 2_500 if k < 3 else 1
        first = rng.normal(size=(rows, 2000)).astype(np.float32)
        header = json.dumps({
            "a": {"dtype": "F32", "shape": [2500, 2000], "data_offsets": [0, 20_000_000]},
            "b": {"dtype": "F32", "shape": [2500, 2000], "data_offsets": [20_000_000, 40_000_000]},
        }).encode()  # fmt: skip
        path = folder / f"{k}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + first.tobytes())
        os.truncate(path, 8 + len(header) + 40_000_000)
        paths.append(path)
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 10, 30])
def test_memory_stays_within_the_budget_and_16_mib_for_any_number_of_files(forty_megabytes, tmp_path, count):
    command = [sys.executable, "-c", MEMORY, tmp_path / "out.safetensors", *forty_megabytes[:count]]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    before, peaks, reported, budget, threads = json.loads(run.stdout)
    anonymous = max(peaks[0], reported) - before[0]
    assert budget == 64 << 20
    assert threads == cpus()
    assert 1 << 20 < anonymous <= budget + (16 << 20)
    assert abs(peaks[0] - reported) < 8 << 20
    assert peaks[1] - before[1] < 32 << 20  # code that was loaded; none of the 40 MB each


# Killed at any moment.


def kill_at(number):
    """Has this process killed when it is about to touch the disk for the so-manieth time; a write is done by half."""
    calls = itertools.count(1)

    def fatal(real, last=lambda *arguments: None):
        def call(*arguments, **options):
            if next(calls) == number:
                last(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    def half(file, data, offset):
        view = memoryview(data).cast("B")
        os.pwrite(file.fd, view[: len(view) // 2], offset)

    NewFile.write = fatal(NewFile.write, half)
    NewFile.truncate = fatal(NewFile.truncate)
    for name in ("fsync", "link", "replace", "rename", "unlink", "mkdir", "rmdir"):
        setattr(os, name, fatal(getattr(os, name)))
    average_module.cpus = lambda: 1  # so that the order of the calls is always the same


def whole_files(folder):
    """The files of a folder by name, those that were being written left out."""
    if not folder.exists():
        return {}
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(TEMPORARY)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "inputs", "output", "overwrite"),
    [
        (write_safetensors, "{}.safetensors", "out.safetensors", False),
        (write_safetensors, "{}.safetensors", "out.safetensors", True),
        (write_keras, "{}.keras", "out.keras", False),
        (write_bundle, "{}/ckpt", "ckpt.index", False),
        (write_bundle, "{}/ckpt", "ckpt.index", True),
        (write_sharded, "{}.weights.json", "out.weights.json", False),
        (write_sharded, "{}.weights.json", "out.weights.json", True),
    ],
)
def test_killed_at_any_moment_there_is_no_output_or_the_whole_one_and_a_rerun_gives_the_same_bytes(
    tmp_path, write, inputs, output, overwrite
):
    paths = [write(tmp_path / inputs.format(k), small(k)) for k in range(3)]
    average_checkpoints(paths, tmp_path / "wanted" / output)
    average_checkpoints(paths[:1], tmp_path / "old" / output)
    wanted, old = whole_files(tmp_path / "wanted"), whole_files(tmp_path / "old")
    inputs_before = [path.read_bytes() for path in paths]
    seen = []
    for number in itertools.count(1):
        folder = tmp_path / f"killed-{number}"
        if overwrite:
            shutil.copytree(tmp_path / "old", folder)

        def work(number=number, folder=folder):
            kill_at(number)
            average_checkpoints(paths, folder / output, overwrite=overwrite)

        killed = in_a_child(work)
        left = whole_files(folder)
        seen.append("nothing" if output not in left else "new" if left == wanted else "old" if left == old else "mixed")
        if killed is None:
            break
        assert killed == signal.SIGKILL
        if seen[-1] != "new" or overwrite:
            average_checkpoints(paths, folder / output, overwrite=overwrite)
            assert whole_files(folder) == wanted
    assert len(seen) > 8
    assert "mixed" not in seen
    assert seen[-1] == "new"
    order = ["old", "nothing", "new"] if overwrite else ["nothing", "new"]
    assert seen == sorted(seen, key=order.index)
    if overwrite and write not in (write_bundle, write_sharded):  # whose record goes first and comes last
        assert "nothing" not in seen
    assert [path.read_bytes() for path in paths] == inputs_before


# Looking at files.


@pytest.mark.parametrize("variant", VARIANTS)
def test_good_files_of_every_kind_are_verified(files, variant):
    paths, names = files(variant)
    found = verify_checkpoint(paths[0])
    data = b"".join(part.read_bytes() for part in parts(paths[0]))
    assert (found.path, found.tensors, found.bytes, found.crc32) == (paths[0], len(names), len(data), zlib.crc32(data))
    assert found.format in (VARIANTS[variant][0].removeprefix("."), "weights.h5", "h5")
    assert (found.checksums > 0) == (VARIANTS[variant][0] in (".keras", ".npz"))
    assert found.provenance is None
    assert json.loads(json.dumps(found.to_json()))["crc32"] == f"{zlib.crc32(data):08x}"
    assert f"{paths[0]}: good." in str(found)
    assert ("no checksums, so a flipped bit would not show" in str(found)) == (found.checksums == 0)


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".safetensors", ".weights.json"])
def test_an_average_carries_checksums_and_how_it_was_made(tmp_path, suffix):
    paths = [WRITERS[suffix](tmp_path / f"{k}{suffix}", small(k)) for k in range(2)]
    average_checkpoints(paths, tmp_path / f"out{suffix}", LINEAR)
    found = verify_checkpoint(tmp_path / f"out{suffix}")
    assert found.checksums > 0
    assert "linear average of 2 checkpoints" in str(found)
    assert "checksums hold" in str(found)


def contents(path):
    """Names, dtypes, shapes and data of all tensors, as the library reads them."""
    with average_module.Parser() as parser, open_checkpoint(path, parser) as table:
        return {name: (tensor.describe(), table.read(name).tobytes()) for name, tensor in table.tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "every"),
    [(".keras", 151), (".weights.h5", 151), (".safetensors", 3), (".npz", 3), (".weights.json", 151)],
)
def test_no_flipped_bit_of_an_average_changes_a_tensor_unnoticed(tmp_path, suffix, every):
    paths = [WRITERS[suffix](tmp_path / f"{k}{suffix}", small(k)) for k in range(2)]
    output = tmp_path / f"out{suffix}"
    average_checkpoints(paths, output)
    part = parts(output)[-1]
    good, before, found = part.read_bytes(), contents(output), 0
    for offset in range(0, len(good), every):
        part.write_bytes(good[:offset] + bytes([good[offset] ^ 1 << offset % 8]) + good[offset + 1 :])
        try:
            verify_checkpoint(output)
        except (CheckpointError, NonFiniteError):
            found += 1
        else:
            assert contents(output) == before, f"bit {offset % 8} of byte {offset}"  # a gap, a date, a note
    assert found > len(good) // every // 20
    for name, array in read_hdf5(part).items() if suffix.endswith(("5", "json")) else before.items():
        data = array.tobytes() if isinstance(array, np.ndarray) else array[1]
        offset = good.index(data) + 1
        part.write_bytes(good[:offset] + bytes([good[offset] ^ 4]) + good[offset + 1 :])
        with pytest.raises(CheckpointError, match="damaged") as caught:
            verify_checkpoint(output)
        assert caught.value.code == "damaged", name


def test_a_deflated_member_without_tensors_is_checked_too(tmp_path):
    path = write_keras(tmp_path / "a.keras", small(0), method=zipfile.ZIP_DEFLATED)
    assert verify_checkpoint(path).checksums == 3
    with zipfile.ZipFile(path) as archive:
        config = archive.getinfo("config.json")
    with path.open("r+b") as file:  # in the middle of its data, which come behind a header of 30 bytes and the name
        file.seek(config.header_offset + 30 + len("config.json") + config.compress_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CheckpointError, match=r"member 'config\.json'") as caught:
        verify_checkpoint(path)
    assert caught.value.code == "damaged"


def test_nan_is_found_when_a_file_is_verified(tmp_path):
    arrays = small(0) | {name: np.full(3, np.nan, np.float32) for name in ("x", "y", "optimizer/vars/0")}
    path = write_safetensors(tmp_path / "a.safetensors", arrays)
    with pytest.raises(
        NonFiniteError, match=r"a\.safetensors, tensor 'x': it holds NaN or infinity, and so do 1 others"
    ):
        verify_checkpoint(path)
    write_safetensors(path, small(0) | {"z": np.array(np.inf, ml_dtypes.bfloat16)})
    with pytest.raises(NonFiniteError, match=r"tensor 'z': it holds NaN or infinity\."):
        verify_checkpoint(path)


def test_a_file_that_changes_while_it_is_verified_is_an_error(tmp_path, monkeypatch):
    path = write_safetensors(tmp_path / "a.safetensors", small(0))
    monkeypatch.setattr(source, "_TICK_NS", 10_000_000)
    real = verify.read_all

    def read_all(*arguments, **options):
        rewrite_in_place(path)
        return real(*arguments, **options)

    monkeypatch.setattr(verify, "read_all", read_all)
    with pytest.raises(CheckpointError, match="written to or replaced while it was read"):
        verify_checkpoint(path)


def test_a_file_of_no_known_kind_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing in particular")
    for look in (verify_checkpoint, inspect_checkpoints):
        with pytest.raises(CheckpointError, match="no checkpoint of a known format") as caught:
            look(tmp_path / "notes.txt")
        assert caught.value.code == "unknown"


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_in_a_file_is_told(files, variant):
    paths, names = files(variant)
    looked = inspect_checkpoints([paths[0]])
    (file,) = looked.files
    assert (file["path"], file["bytes"]) == (str(paths[0]), sum(part.stat().st_size for part in parts(paths[0])))
    assert sorted(tensor["name"] for tensor in file["tensors"]) == sorted(names)
    for tensor in file["tensors"]:
        array = members()[0][tensor["name"]]
        assert (tensor["dtype"], tuple(tensor["shape"])) == (array.dtype.name, array.shape)
        assert (tensor["bytes"], tensor["optimizer"]) == (array.nbytes, False)
    packed = {"deflated", "chunked", "compact", "column-major", "inside"} & set(re.findall(r"[\w-]+", variant))
    assert all(tensor["in_place"] for tensor in file["tensors"]) == (not packed)
    of_model = [members()[0][name] for name in names]
    assert file["parameters"] == sum(array.size for array in of_model if array.dtype.name in FLOATS)
    assert file["model_bytes"] == sum(array.nbytes for array in of_model)
    assert looked.differing == ()
    assert json.loads(json.dumps(looked.to_json()))["differences"] == []
    assert re.search(r"layers/float64/vars/3 +float64 +3x5 +120 ", str(looked))
    assert re.search(r"layers/float32/vars/0 +float32 +scalar +4 ", str(looked))


def test_the_differences_of_several_files_are_told(tmp_path):
    paths = [write_npz(tmp_path / "a.npz", small(0)), write_npz(tmp_path / "b.npz", small(1))]
    other = small(2) | {"layers/dense/vars/0": np.zeros((5, 3), np.float32), "optimizer/vars/0": np.zeros(3)}
    paths.append(write_npz(tmp_path / "c.npz", other))
    looked = inspect_checkpoints(paths)
    assert looked.differing[0] == ()
    (line,) = looked.differing[1]
    assert line.strip() == f"layers/dense/vars/0: float32 (5, 3) in {paths[2]}, float32 (3, 5) in {paths[0]}"
    assert looked.to_json()["differences"][1] == {"path": str(paths[2]), "lines": [line.strip()]}
    assert f"{paths[1]} has the same tensors as {paths[0]}, so they can be averaged." in str(looked)
    assert f"{paths[2]} differs from {paths[0]}:\n{line}" in str(looked)
    assert [tensor["name"] for tensor in looked.files[2]["tensors"] if tensor["optimizer"]] == ["optimizer/vars/0"]


def test_of_an_average_it_is_told_how_it_was_made(tmp_path):
    paths = [write_safetensors(tmp_path / f"{k}.safetensors", small(k)) for k in range(2)]
    average_checkpoints(paths, tmp_path / "out.safetensors", LINEAR)
    looked = inspect_checkpoints(tmp_path / "out.safetensors")
    assert looked.files[0]["provenance"] == provenance(tmp_path / "out.safetensors")
    assert '"weighting": "linear"' in str(looked)
    assert '"name": "1.safetensors"' in str(looked)
