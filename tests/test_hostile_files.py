"""Files that are damaged, lie, or want more than to be read: each kind is refused by a code, before data are read.

Every file is made here, byte by byte where no library makes such a thing. The data of all tensors hold `MARK`, and a
read that brings it into this process before the table is made fails the test. Legitimate files of unusual kinds stand
at the end of each part: a reader that refuses everything would pass the rest.
"""

import contextlib
import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import types
import zipfile
import zlib
from dataclasses import dataclass, field

import h5py
import ml_dtypes
import numpy as np
import pytest
from h5py import h5d, h5p, h5s, h5t

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files import source
from streaming_polyak.files.formats import hdf5, hdf5_child, npz, open_checkpoint
from streaming_polyak.files.formats.hdf5 import Parser
from streaming_polyak.files.source import Source

MARK = bytes.fromhex("5eed5eed")
DATA = np.frombuffer(MARK * 6, "<f4")
FF = 0xFFFF_FFFF


# A child that can be asked for more: to misbehave, and to have other limits until it ends.
CHILD = """
import contextlib, importlib.util, os, signal, sys
sys.path += sys.argv[2:]
spec = importlib.util.spec_from_file_location("hdf5_child", {path!r})
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)

def end(fd, signal):
    os.kill(os.getpid(), signal)

def chatter(fd):
    for _ in range(1000):
        print("noise " * 200, file=sys.stderr)
    return {{}}

def hang(fd):
    while True:
        pass

def stumble(fd):
    raise ZeroDivisionError("a mistake in the reader")

def lie(fd, size):
    os.write(int(child.sys.argv[1]), size.to_bytes(8, "little") + b"garbage")

def follow(fd, size):
    with child.h5py.File(child.Window(fd, 0, size), "r") as file:
        return {{"first": float(file["x"][0])}}

def peek(fd, name):
    return {{"fd": os.open(name, os.O_RDONLY)}}

def plugins(fd):
    return {{"folders": child.h5pl.size()}}

def unseal(fd):
    child._no_other_file = contextlib.nullcontext
    return {{}}

def limit(fd, **limits):
    vars(child).update(limits)
    return {{}}

for more in (end, chatter, hang, stumble, lie, follow, peek, plugins, unseal, limit):
    child._REQUESTS[more.__name__] = more
child.main()
"""


@pytest.fixture(scope="module")
def parser(tmp_path_factory):
    """One for all tests; if its child dies, the next request starts another."""
    folder = tmp_path_factory.mktemp("child")
    (folder / "hdf5_child.py").write_text(CHILD.format(path=hdf5_child.__file__))
    with pytest.MonkeyPatch.context() as patch, Parser() as parser:
        patch.setattr(hdf5, "__file__", str(folder / "hdf5.py"))
        yield parser


@pytest.fixture
def changed(parser):
    """The same, ended after the test, so that what was changed in its child is gone."""
    yield parser
    parser.close()


@pytest.fixture
def unread(monkeypatch):
    """Fails the test if tensor data are read."""
    read_into = Source.read_into

    def watched(self, buffer, offset):
        read_into(self, buffer, offset)
        assert MARK not in bytes(buffer), f"tensor data were read, at byte {offset + bytes(buffer).index(MARK)}"

    monkeypatch.setattr(Source, "read_into", watched)


@pytest.fixture(autouse=True)
def no_tick(monkeypatch):
    """Does without the pause in which a file that was just written is not told from one written once more."""
    monkeypatch.setattr(source, "_TICK_NS", 0)


def ask(parser, do, path, **request):
    with path.open("rb") as file:
        return parser.ask(path, do, [file.fileno()], **request)


def refused(path, parser, code, reason, tensor=None):
    """Asserts that a file is refused for this reason, in a message that names file and tensor."""
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(path, parser).close()
    error = caught.value
    assert error.code == code, str(error)
    assert error.tensor == tensor, str(error)
    assert str(error).startswith(f"{path}: " if tensor is None else f"{path}, tensor {tensor!r}: ")


def contents(path, parser):
    """Returns all tensors of a file; checks the checksums that it keeps."""
    with open_checkpoint(path, parser) as table:
        for checksum in table.checksums:
            assert zlib.crc32(table.sources[checksum.source].read(checksum.start, checksum.size)) == checksum.crc32
        found = {name: table.read(name) for name in table.tensors}
        table.check_unchanged()
    return found


def equal(found, expected):
    """Asserts that tensors have the names, dtypes, shapes and bytes that they should have."""
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        native = np.asarray(array).astype(np.asarray(array).dtype.newbyteorder("="))
        assert found[name].dtype == native.dtype, name
        assert found[name].shape == native.shape, name
        assert found[name].tobytes() == native.tobytes(), name


# --- HDF5 ---------------------------------------------------------------------------------------------------------

HDF5 = []


def hdf5_kind(code, reason, tensor=None, patch=None, **options):
    """A function that puts something into an HDF5 file; `patch` then gets its bytes, and what the function returned."""

    def add(make):
        name = make.__name__.replace("_", "-")
        HDF5.append(pytest.param(make, patch, options, code, reason, tensor, id=name))
        return make

    return add


def hdf5_file(path, make=lambda file: None, patch=None, **options):
    with h5py.File(path, "w", **options) as file:
        file["layers/dense/vars/0"] = DATA
        said = make(file)
    if patch:
        path.write_bytes(patch(path.read_bytes(), said))
    return path


def put(data, old, new):
    """Replaces the one place where `old` stands."""
    assert data.count(old) == 1
    return data.replace(old, new)


def at(number, new):
    """A patch of the bytes from `number` on."""
    return lambda data, _: data[:number] + new + data[number + len(new) :]


def typed(file, kind):
    h5d.create(file.id, b"x", kind, h5s.create_simple((6,)))


def filtered(file, *filters):
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_chunk((100,))
    for number, *values in filters:
        properties.set_filter(number, h5py.h5z.FLAG_OPTIONAL, tuple(values))
    dataset = h5d.create(file.id, b"x", h5t.IEEE_F32LE, h5s.create_simple((100,)), properties)
    dataset.write(h5s.ALL, h5s.ALL, np.zeros(100, "f4"))


def place(file):
    return file["layers/dense/vars/0"].id.get_offset()


def moved(offset, nbytes=24):
    """A patch of the place of the first dataset."""
    return lambda data, old: put(data, struct.pack("<2Q", old, 24), struct.pack("<2Q", offset, nbytes))


@pytest.mark.parametrize(("make", "patch", "options", "code", "reason", "tensor"), HDF5)
def test_hostile_hdf5_is_refused(make, patch, options, code, reason, tensor, tmp_path, parser, unread):
    other = hdf5_file(tmp_path / "other.h5")
    path = hdf5_file(tmp_path / "bad.weights.h5", lambda file: make(file, other), patch, **options)
    refused(path, parser, code, reason, tensor)


LINK = r"it is a link \(%s-link\); only data in the file itself are read"


@hdf5_kind("external-link", LINK % "external", "x")
def external_link_to_a_dataset(file, other):
    file["x"] = h5py.ExternalLink(str(other), "layers/dense/vars/0")


@hdf5_kind("external-link", LINK % "external", "layers/x")
def external_link_to_a_group(file, other):
    file["layers/x"] = h5py.ExternalLink(str(other), "layers")


@hdf5_kind("external-link", LINK % "external", "x", libver="latest")
def external_link_in_the_latest_version(file, other):
    file["x"] = h5py.ExternalLink(str(other), "layers/dense/vars/0")


@hdf5_kind("soft-link", LINK % "soft", "layers/x")
def soft_link(file, other):
    file["layers/x"] = h5py.SoftLink("/layers/dense/vars/0")


@hdf5_kind("soft-link", LINK % "soft", "x")
def soft_link_to_nothing(file, other):
    file["x"] = h5py.SoftLink("/nothing")


@hdf5_kind("hard-link", "the same object has two names", "layers/dense/vars/0")
def hard_link_twice(file, other):
    file["x"] = file["layers/dense/vars/0"]


@hdf5_kind("hard-link", "the same object has two names", "layers/dense/up")
def group_cycle(file, other):
    file["layers/dense/up"] = file["layers"]


@hdf5_kind("hard-link", "the same object has two names", "layers/root")
def group_cycle_to_the_root(file, other):
    file["layers/root"] = file["/"]


@hdf5_kind("hard-link", "the same object has two names", "layers/root", userblock_size=1024)
def group_cycle_to_the_root_behind_a_user_block(file, other):
    file["layers/root"] = file["/"]


@hdf5_kind("hard-link", "the same object has two names", "layers/root", libver="latest", userblock_size=512)
def group_cycle_to_the_root_behind_a_user_block_latest(file, other):
    file["layers/root"] = file["/"]


@hdf5_kind("hard-link", "the same object has two names", "layers/dense/vars/0", libver="latest", track_order=True)
def hard_link_twice_in_the_latest_version(file, other):
    file["x"] = file["layers/dense/vars/0"]


@hdf5_kind("depth", "groups are nested more than 64 deep", ("g/" * 65)[:100])
def deep_nesting(file, other):
    group = file
    for _ in range(70):
        group = group.create_group("g")


@hdf5_kind("external-storage", "its data are declared to stand in another file", "x")
def external_storage(file, other):
    file.create_dataset("x", (6,), "f4", external=[(str(other), 0, 24)])


@hdf5_kind("virtual", "it is a virtual dataset, made of other datasets", "x")
def virtual_dataset(file, other):
    layout = h5py.VirtualLayout((6,), "f4")
    layout[:] = h5py.VirtualSource(str(other), "layers/dense/vars/0", shape=(6,))
    file.create_virtual_dataset("x", layout)


@hdf5_kind("virtual", "it is a virtual dataset, made of other datasets", "x")
def virtual_dataset_of_itself_without_limit(file, other):
    layout = h5py.VirtualLayout((6,), "f4", maxshape=(None,))
    layout[: h5s.UNLIMITED] = h5py.VirtualSource(".", "x", shape=(6,), maxshape=(None,))[: h5s.UNLIMITED]
    file.create_virtual_dataset("x", layout)


@hdf5_kind("filter", r"packed with the filters \[31999\]; deflate, shuffle and Fletcher-32 are read", "x")
def chunked_with_a_filter_nobody_knows(file, other):
    filtered(file, (31999, 1, 2))


@hdf5_kind("filter", r"packed with the filters \[32000\]", "x")
def chunked_with_lzf(file, other):
    file.create_dataset("x", data=np.zeros(100, "f4"), compression="lzf")


@hdf5_kind("filter", r"packed with the filters \[5\]", "x")
def chunked_with_nbit(file, other):
    filtered(file, (5,))


@hdf5_kind("filter", r"packed with the filters \[6\]", "x")
def scale_offset(file, other):
    file.create_dataset("x", data=np.arange(100), scaleoffset=True)


@hdf5_kind("filter", r"packed with the filters \[1, 1\].*once each", "x")
def deflated_twice(file, other):
    filtered(file, (1, 9), (1, 9))


@hdf5_kind("no-data", "no stored data: it was declared and never written", "x")
def declared_and_never_written(file, other):
    file.create_dataset("x", (6,), "f4")


@hdf5_kind("no-data", "no stored data: it was declared and never written", "x")
def chunks_declared_and_never_written(file, other):
    file.create_dataset("x", (6,), "f4", chunks=(3,))


@hdf5_kind("no-data", "nothing is stored for it, and its fill value is not zero", "optimizer/vars/0")
def never_written_and_filled_with_threes(file, other):
    file.create_dataset("optimizer/vars/0", (6,), "f4", fillvalue=3)


@hdf5_kind("expansion", "4398046511104 bytes are declared, none stored, in [0-9]+ bytes in all", "optimizer/vars/0")
def shape_bomb_never_written(file, other):
    file.create_dataset("optimizer/vars/0", (1 << 40,), "f4")


@hdf5_kind("no-data", "only 1 of its 4 chunks were ever written", "x")
def partly_written_chunks(file, other):
    file.create_dataset("x", (400,), "f4", chunks=(100,))[:100] = 1


@hdf5_kind("dtype", "class compound, not plain numbers", "x")
def compound(file, other):
    file["x"] = np.zeros(6, [("r", "f4"), ("i", "f4")])


@hdf5_kind("dtype", "class compound, not plain numbers", "x")
def complex_numbers(file, other):
    file["x"] = np.zeros(6, "c8")


@hdf5_kind("dtype", "class enumeration, not plain numbers", "x")
def enum_that_is_no_bool(file, other):
    file.create_dataset("x", (6,), h5py.enum_dtype({"RED": 0, "GREEN": 1}, "i1"))


@hdf5_kind("dtype", "class enumeration, not plain numbers", "x")
def bool_of_eight_bytes(file, other):
    kind = h5t.enum_create(h5t.STD_I64LE)
    kind.enum_insert(b"FALSE", 0)
    kind.enum_insert(b"TRUE", 1)
    typed(file, kind)


@hdf5_kind("dtype", "class variable-length, not plain numbers", "x")
def vlen(file, other):
    file.create_dataset("x", (6,), h5py.vlen_dtype("f4"))


@hdf5_kind("dtype", "class string, not plain numbers", "x")
def fixed_string(file, other):
    file["x"] = np.array([b"abc"])


@hdf5_kind("dtype", "class string, not plain numbers", "x")
def string_of_any_length(file, other):
    file["x"] = "abc"


@hdf5_kind("dtype", "class reference, not plain numbers", "x")
def object_reference(file, other):
    file.create_dataset("x", data=file["layers"].ref, dtype=h5py.ref_dtype)


@hdf5_kind("dtype", "class reference, not plain numbers", "x")
def region_reference(file, other):
    file.create_dataset("x", data=file["layers/dense/vars/0"].regionref[:2], dtype=h5py.regionref_dtype)


@hdf5_kind("dtype", "class opaque, not plain numbers", "x")
def opaque_v4(file, other):
    file["x"] = np.zeros(6, "V4")


@hdf5_kind("dtype", "class opaque, not plain numbers", "x")
def opaque_v2_without_a_dtype(file, other):
    file["x"] = np.zeros(6, "V2")


@hdf5_kind("dtype", "class opaque, not plain numbers", "x")
def opaque_v2_of_another_dtype(file, other):
    file["x"] = np.zeros(6, "V2")
    file["x"].attrs["dtype"] = "float16"


@hdf5_kind("dtype", "class opaque, not plain numbers", "x")
def opaque_v2_with_a_number_for_a_dtype(file, other):
    file["x"] = np.zeros(6, "V2")
    file["x"].attrs["dtype"] = 16


@hdf5_kind("dtype", "class array, not plain numbers", "x")
def array_type(file, other):
    typed(file, h5t.array_create(h5t.IEEE_F32LE, (3,)))


@hdf5_kind("dtype", "class bit field, not plain numbers", "x")
def bit_field(file, other):
    typed(file, h5t.STD_B32LE)


@hdf5_kind("dtype", "its numbers of 4 bytes are not IEEE floats or plain integers", "x")
def float_with_eleven_bits_of_exponent_in_four_bytes(file, other):
    kind = h5t.IEEE_F32LE.copy()
    kind.set_fields(31, 20, 11, 0, 20)
    kind.set_ebias(1023)
    typed(file, kind)


@hdf5_kind("dtype", "its numbers of 4 bytes are not IEEE floats or plain integers", "x")
def integer_of_24_bits(file, other):
    kind = h5t.STD_I32LE.copy()
    kind.set_precision(24)
    typed(file, kind)


@hdf5_kind("dtype", "its numbers of 16 bytes are not IEEE floats or plain integers", "x")
def long_double(file, other):
    typed(file, h5t.NATIVE_LDOUBLE)


@hdf5_kind("null-space", "it has no extent at all", "x")
def null_space(file, other):
    file["x"] = h5py.Empty("f4")


@hdf5_kind("object", "it is neither a group nor a dataset", "x")
def named_type(file, other):
    file["x"] = np.dtype("f4")


@hdf5_kind("expansion", "4398046511104 bytes are declared, but only [0-9]+ stored: more than 1000 times", "x")
def shape_bomb(file, other):
    file.create_dataset("x", (1 << 20, 1 << 20), "f4", chunks=(64, 64), compression="gzip")[:10, :10] = 1


@hdf5_kind(
    "hdf5", "libhdf5 cannot read it: .*(checksum|filter)", "x", lambda d, _: put(d, MARK * 8, MARK * 7 + b"5eed")
)
def wrong_fletcher32(file, other):
    file.create_dataset("x", data=np.frombuffer(MARK * 8, "<f4"), chunks=(8,), fletcher32=True)
    file["layers/dense/vars/0"][...] = 0


@hdf5_kind("hdf5", "libhdf5 cannot read it: .*filter", "x")
def deflated_garbage(file, other):
    dataset = file.create_dataset("x", (100,), "f4", chunks=(100,), compression="gzip")
    dataset.id.write_direct_chunk((0,), b"garbage")


@hdf5_kind("hdf5", "libhdf5 cannot read it", "x", lambda d, _: put(d, b"\1\3\1" + bytes(5), b"\1\x21\1" + bytes(5)))
def rank_of_33(file, other):
    file["x"] = np.zeros((1, 1, 1), "f4")


@hdf5_kind("expansion", "4194304 bytes are declared, but only [0-9]+ stored", "x")
def bomb_of_zeros(file, other):
    zeros = np.zeros(1 << 22, "u1")
    file.create_dataset("x", data=zeros, chunks=zeros.shape, compression="gzip", compression_opts=9)


@hdf5_kind("chunk", r"a chunk of shape \(134217728,\) is larger than 67108864 bytes", "x")
def huge_chunk(file, other):
    dataset = file.create_dataset("x", (1 << 27,), "u1", chunks=(1 << 27,))
    dataset.id.write_direct_chunk((0,), b"packed")


@hdf5_kind(
    "overlap",
    "the stored parts take 2147483648 bytes in a file of [0-9]+",
    "x",
    lambda data, _: data.replace(struct.pack("<2I", 400, 0), struct.pack("<2I", 1 << 30, 0)),
)
def chunks_that_share_bytes(file, other):
    file.create_dataset("x", data=np.ones(200, "f4"), chunks=(100,))


@hdf5_kind("shape", r"its shape \(0, 4611686018427387904\) is impossible", "x")
def empty_with_a_huge_other_dimension(file, other):
    file.create_dataset("x", (0, 1 << 62), "f4")


@hdf5_kind("bounds", "bytes 8 to 32 are outside of the HDF5 file, which has", "layers/dense/vars/0", moved(8))
def data_in_the_superblock(file, other):
    return place(file)


@hdf5_kind("hdf5", "libhdf5 cannot read it: .*invalid dataset size", "layers/dense/vars/0", moved(1 << 40))
def data_behind_the_end(file, other):
    return place(file)


@hdf5_kind("hdf5", "libhdf5 cannot read it: .*invalid dataset size", "layers/dense/vars/0", moved(2**64 - 8))
def data_around_the_end_of_all_addresses(file, other):
    return place(file)


@hdf5_kind("size", "24 bytes are declared, 20 are stored", "layers/dense/vars/0", moved(2048, 20))
def fewer_bytes_than_the_shape_takes(file, other):
    return place(file)


@hdf5_kind(
    "overlap",
    "its data overlap those of 'x'",
    "layers/dense/vars/0",
    lambda data, old: put(data, struct.pack("<2Q", old[1], 24), struct.pack("<2Q", old[0] + 4, 24)),
)
def two_datasets_that_share_bytes(file, other):
    file["x"] = DATA
    return place(file), file["x"].id.get_offset()


@hdf5_kind("name", r"an empty part, '\.', '\.\.' or a NUL", "layers/../x")
def name_with_dots(file, other):
    file.create_dataset("layers/../x", data=DATA)


@hdf5_kind("name", r"the name b'\\xff' is not valid UTF-8")
def name_that_is_not_text(file, other):
    file.create_dataset(b"\xff", data=DATA)


@hdf5_kind("name", "its name has more than 1024 bytes", "y" * 60 + "...")
def long_name(file, other):
    file.create_dataset("y" * 1025, data=DATA)


@hdf5_kind("name", "its name stands there twice", "\u00e9")
def two_names_that_look_the_same(file, other):
    file["e\u0301"] = DATA
    file["\u00e9"] = DATA


@hdf5_kind("name", "its name has a slash in it", "a/b", lambda data, _: put(data, b"aXb\0", b"a/b\0"))
def name_that_is_a_path(file, other):
    file["aXb"] = DATA


@hdf5_kind("hard-link", "the same object has two names", "kernel", lambda d, _: put(d, b"kerneX\0", b"kernel\0"))
def one_name_twice(file, other):
    file["kernel"] = DATA
    file["kerneX"] = DATA


def nothing_more(file, other):
    pass


ENDS = "it has [0-9]+ bytes, but says that it ends at byte"
for name, patch, options, code, reason in (
    ("appended-garbage", lambda data, _: data + b"garbage", {}, "trailing", ENDS),
    ("truncation-by-one-byte", lambda data, _: data[:-1], {}, "truncated", ENDS),
    ("superblock-of-unknown-version", at(8, b"\x09"), {}, "hdf5", "has the version 9; versions 0 to 3 are read"),
    ("addresses-of-4-bytes", at(13, b"\x04"), {}, "hdf5", "its addresses are not of 8 bytes"),
    ("addresses-of-4-bytes-latest", at(9, b"\x04"), {"libver": "latest"}, "hdf5", "its addresses are not of 8 bytes"),
    ("consistency-flag", at(20, b"\x01"), {}, "not-closed", "it is open for writing, or its writer died"),
    ("driver-information", at(48, struct.pack("<Q", 96)), {}, "driver", "it is one of a family of files"),
    ("superblock-with-a-wrong-checksum", at(30, b"\x01"), {"libver": "latest"}, "truncated", ENDS),
    ("root-elsewhere", at(36, b"\x01"), {"libver": "latest"}, "hdf5", "incorrect metadata checksum"),
    ("no-signature", lambda data, _: data[8:1500], {}, "hdf5", "it is not an HDF5 file, or its beginning is damaged"),
):
    HDF5.append(pytest.param(nothing_more, patch, options, code, reason, None, id=name))


def test_a_file_that_is_being_written_is_refused(tmp_path, parser):
    for number, options in enumerate(({}, {"libver": "latest"})):
        path, writing = tmp_path / f"{number}.weights.h5", tmp_path / f"{number}.writing"
        with h5py.File(writing, "w", **options) as file:
            file["x"] = DATA
            file.flush()
            path.write_bytes(writing.read_bytes())
        refused(path, parser, "not-closed", "it is open for writing, or its writer died before closing it")


@pytest.mark.parametrize(("libver", "code"), [("earliest", "driver"), ("latest", "hdf5")])
def test_one_file_of_a_family_is_refused(libver, code, tmp_path, parser):
    with h5py.File(tmp_path / "%d.h5", "w", driver="family", memb_size=1 << 20, libver=libver) as file:
        file["x"] = DATA
    refused(tmp_path / "0.h5", parser, code, "family")


def test_the_table_of_an_hdf5_file_is_made_without_its_data(tmp_path, monkeypatch):
    path = hdf5_file(tmp_path / "a.weights.h5", lambda file: file.create_dataset("x", data=np.ones(1 << 18)) and None)
    read = []
    readinto = hdf5_child.Window.readinto

    def recorded(self, buffer):
        begin, count = self.tell(), readinto(self, buffer)
        read.extend(range(begin, begin + count))
        return count

    monkeypatch.setattr(hdf5_child.Window, "readinto", recorded)
    with path.open("rb") as file:
        rows = hdf5_child.table(file.fileno(), 0, path.stat().st_size)["tensors"]
    offset, nbytes = next(row[4:6] for row in rows if row[0] == "x")
    assert path.read_bytes()[offset : offset + nbytes] == np.ones(1 << 18).tobytes()
    assert read
    assert len(set(read) & set(range(offset, offset + nbytes))) <= 512  # what it reads ahead for a header before them


BOOLS = np.array([True, False, True])
WIDE = np.arange(5000, dtype="f4").reshape(50, 100)
PACKED = {"compression": "gzip", "shuffle": True, "fletcher32": True}


@pytest.mark.parametrize(
    ("array", "how", "options"),
    [
        pytest.param(WIDE, {"chunks": (7, 9)}, {}, id="chunked"),
        pytest.param(WIDE, {"chunks": (9, 7), "compression": "gzip"}, {}, id="gzip"),
        pytest.param(WIDE, {"chunks": (9, 7), "shuffle": True}, {}, id="shuffle"),
        pytest.param(WIDE, {"chunks": (50, 1), **PACKED}, {}, id="gzip-shuffle-fletcher32"),
        pytest.param(WIDE, {"fletcher32": True}, {"libver": "latest"}, id="fletcher32-latest"),
        pytest.param(WIDE.astype(">f4"), {}, {}, id="big-endian"),
        pytest.param(WIDE.astype(">f8"), {"chunks": (7, 9)}, {}, id="big-endian-chunks"),
        pytest.param(WIDE, {}, {"userblock_size": 1024}, id="user-block"),
        pytest.param(WIDE, {}, {"userblock_size": 512, "libver": "latest"}, id="user-block-latest"),
        pytest.param(WIDE, {}, {"libver": "latest"}, id="latest"),
        pytest.param(WIDE, {}, {"fs_strategy": "page"}, id="superblock-2"),
        pytest.param(WIDE, {}, {"track_order": True}, id="track-order"),
        pytest.param(np.zeros((3, 0), "f4"), {}, {}, id="empty"),
        pytest.param(np.zeros((3, 0), "f4"), {"chunks": (1, 1), "maxshape": (3, None)}, {}, id="empty-chunks"),
        pytest.param(np.float32(7), {}, {}, id="scalar"),
        pytest.param(BOOLS, {}, {}, id="bool"),
        pytest.param(np.ones((1,) * 32, "f4"), {}, {}, id="rank-32"),
    ],
)
def test_legitimate_hdf5_is_read(array, how, options, tmp_path, parser):
    path = hdf5_file(tmp_path / "a.h5", lambda file: file.create_dataset("x", data=array, **how) and None, **options)
    with open_checkpoint(path, parser) as table:
        assert table.tensors["x"].mapped == (not array.size or not how.keys() & {"chunks", "fletcher32"})
    equal(contents(path, parser), {"x": array, "layers/dense/vars/0": DATA})


def test_compact_hdf5_is_read(tmp_path, parser):
    def make(file):
        properties = h5p.create(h5p.DATASET_CREATE)
        properties.set_layout(h5d.COMPACT)
        h5d.create(file.id, b"x", h5t.IEEE_F32LE, h5s.create_simple((6,)), properties).write(h5s.ALL, h5s.ALL, DATA)

    path = hdf5_file(tmp_path / "a.weights.h5", make)
    equal(contents(path, parser), {"x": DATA, "layers/dense/vars/0": DATA})


def test_an_entry_of_the_optimizer_that_was_never_written_reads_as_zeros(tmp_path, parser):
    def make(file):
        file.create_dataset("optimizer/vars/0", (3,), "f4")

    path = hdf5_file(tmp_path / "a.weights.h5", make)
    equal(contents(path, parser), {"optimizer/vars/0": np.zeros(3, "f4"), "layers/dense/vars/0": DATA})


def test_bfloat16_as_keras_keeps_it_is_read(tmp_path, parser):
    values = np.arange(6).astype(ml_dtypes.bfloat16)

    def make(file):
        file["x"] = values.view("V2")
        file["x"].attrs["dtype"] = "bfloat16"

    equal(contents(hdf5_file(tmp_path / "a.weights.h5", make), parser), {"x": values, "layers/dense/vars/0": DATA})


# --- the process that parses HDF5 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL"])
def test_a_crash_of_the_parser_is_an_error_and_the_next_file_is_read(name, tmp_path, parser):
    path = hdf5_file(tmp_path / "a.weights.h5")
    contents(path, parser)
    first = parser._process.pid
    with pytest.raises(CheckpointError, match=rf"a\.weights\.h5: libhdf5 crashed on it \({name}\)") as caught:
        ask(parser, "end", path, signal=getattr(signal, name))
    assert caught.value.code == "crash"
    equal(contents(path, parser), {"layers/dense/vars/0": DATA})
    assert parser._process.pid != first


KILLED = (
    r"a\.weights\.h5: the process that parses it was killed \(%s\), perhaps by the system for want of memory; that is "
    r"not necessarily the file's fault\. Run it again"
)


def test_a_parser_killed_while_it_works_is_an_error_and_the_next_file_is_read(tmp_path, parser, monkeypatch):
    path = hdf5_file(tmp_path / "a.weights.h5")
    contents(path, parser)
    receive = parser._receive

    def killed(count, deadline):
        os.kill(parser._process.pid, signal.SIGKILL)
        return receive(count, deadline)

    with monkeypatch.context() as patch:
        patch.setattr(parser, "_receive", killed)
        os.kill(parser._process.pid, signal.SIGSTOP)  # so that it has not answered before
        refused(path, parser, "killed", KILLED % "SIGKILL")
    equal(contents(path, parser), {"layers/dense/vars/0": DATA})


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGRTMIN + 3, "signal 37")])
def test_a_parser_ended_from_outside_is_told_from_a_crash(number, name, tmp_path, parser):
    with pytest.raises(CheckpointError, match=KILLED % name) as caught:
        ask(parser, "end", hdf5_file(tmp_path / "a.weights.h5"), signal=number)
    assert caught.value.code == "killed"


@pytest.mark.parametrize(
    ("program", "seconds", "reason"),
    [
        ("import sys; print('noise ' * 50_000, file=sys.stderr); import no_h5py", 60,
         "ended with status 1 before it was ready to read .*: ModuleNotFoundError: No module named 'no_h5py'"),
        ("import os; os.kill(os.getpid(), 9)", 60, r"was killed \(SIGKILL\) before it was ready to read .*h5\.$"),
        ("import time; time.sleep(60)", 0.1, r"was not ready to read .* in 0\.1 s"),
    ],
    ids=["an import that fails", "killed", "slow"],
)  # fmt: skip
def test_a_parser_that_does_not_start_is_not_blamed_on_the_file(program, seconds, reason, tmp_path, monkeypatch):
    path = hdf5_file(tmp_path / "a.weights.h5")
    (tmp_path / "hdf5_child.py").write_text(program)
    monkeypatch.setattr(hdf5, "__file__", str(tmp_path / "hdf5.py"))
    monkeypatch.setattr(hdf5, "_START_SECONDS", seconds)
    with Parser() as parser, pytest.raises(ChildProcessError, match=f"^the process that parses HDF5 {reason}"):
        open_checkpoint(path, parser)


def test_a_parser_for_which_there_is_no_program_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    path = hdf5_file(tmp_path / "a.weights.h5")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with Parser() as parser:
        for _ in range(2):
            with pytest.raises(ChildProcessError, match=r"HDF5 cannot be started: .*No such file"):
                open_checkpoint(path, parser)


def test_a_parser_that_says_much_on_standard_error_is_not_stopped_by_it(tmp_path, parser):
    assert ask(parser, "chatter", hdf5_file(tmp_path / "a.weights.h5")) == {}


def test_a_parser_killed_between_two_files_costs_neither(tmp_path, parser):
    path = hdf5_file(tmp_path / "a.weights.h5")
    contents(path, parser)
    parser._process.kill()
    parser._process.wait()
    equal(contents(path, parser), {"layers/dense/vars/0": DATA})


def test_a_parser_that_hangs_is_an_error_and_the_next_file_is_read(tmp_path, parser):
    path = hdf5_file(tmp_path / "a.weights.h5")
    with pytest.raises(CheckpointError, match=r"libhdf5 did not read it in 0\.1 s; it may be damaged") as caught:
        ask(parser, "hang", path, seconds=0.1)
    assert caught.value.code == "too-slow"
    equal(contents(path, parser), {"layers/dense/vars/0": DATA})


def test_the_time_for_one_file_is_that_of_the_parser(tmp_path):
    path = hdf5_file(tmp_path / "a.weights.h5")
    with Parser(seconds=0.1) as parser:
        parser.start()
        os.kill(parser._process.pid, signal.SIGSTOP)
        parser._ready = True
        refused(path, parser, "too-slow", r"libhdf5 did not read it in 0\.1 s")


def test_a_parser_that_hangs_ends_itself_when_its_parent_is_gone(tmp_path, parser, monkeypatch):
    path = hdf5_file(tmp_path / "a.weights.h5")
    ask(parser, "limit", path, GRACE_SECONDS=0.1)
    receive = parser._receive
    monkeypatch.setattr(parser, "_receive", lambda count, deadline: receive(count, deadline + 60))
    with pytest.raises(CheckpointError, match=r"libhdf5 did not read it in 0\.1 s") as caught:
        ask(parser, "hang", path, seconds=0.1)
    assert caught.value.code == "too-slow"


@pytest.mark.parametrize("sent", [8, 3, 20], ids=["the header", "half of it", "half of the request"])
def test_the_parser_returns_when_its_parent_dies_in_the_middle_of_a_request(sent, tmp_path):
    script = f"import os, runpy; runpy.run_path({hdf5_child.__file__!r})['main']()\nos.system('ls -l /proc/$PPID/fd')"
    path = hdf5_file(tmp_path / "a.weights.h5")
    ours, theirs = socket.socketpair()
    with theirs, path.open("rb") as file:
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdout=subprocess.PIPE
        )
        socket.send_fds(ours, [(struct.pack("<Q", 100) + bytes(50))[:sent]], [file.fileno()])
        assert ours.recv(1) == b"!"
    ours.close()
    try:
        said, _ = child.communicate(timeout=20)
    finally:
        child.kill()
    assert child.returncode == 0
    assert b" 0 -> " in said
    assert path.name.encode() not in said


def test_a_mistake_in_the_parser_is_an_error(tmp_path, parser):
    path = hdf5_file(tmp_path / "a.weights.h5")
    with pytest.raises(CheckpointError, match="ended with status 1: ZeroDivisionError: a mistake in the reader"):
        ask(parser, "stumble", path)


@pytest.mark.parametrize(
    ("size", "reason"), [(7, "Expecting value"), (1 << 40, "an answer of 1099511627776 bytes")], ids=["text", "long"]
)
def test_an_answer_that_is_no_answer_is_an_error(size, reason, tmp_path, parser):
    path = hdf5_file(tmp_path / "a.weights.h5")
    with pytest.raises(CheckpointError, match=f"what libhdf5 made of it is nonsense: {reason}") as caught:
        ask(parser, "lie", path, size=size)
    assert caught.value.code == "crash"


def test_an_interrupted_request_is_not_answered_to_the_next_one(tmp_path, parser, monkeypatch):
    one = hdf5_file(tmp_path / "a.weights.h5")
    two = hdf5_file(tmp_path / "b.weights.h5", lambda file: file.create_dataset("x", data=DATA) and None)

    def interrupted(count, deadline):
        raise KeyboardInterrupt

    contents(one, parser)
    with monkeypatch.context() as patch:
        patch.setattr(parser, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_checkpoint(one, parser)
    assert sorted(contents(two, parser)) == ["layers/dense/vars/0", "x"]


# Whatever is printed, by any library, at any time: none of it may reach a file that is open for averaging.
NOISY = """
import contextlib, os, sys
from pathlib import Path
from streaming_polyak import average_checkpoints
from streaming_polyak.files.tensors import Source

read_into = Source.read_into

def noisy(self, buffer, offset):
    for fd in (1, 2):
        with contextlib.suppress(OSError):
            os.write(fd, b"noise")
    read_into(self, buffer, offset)

Source.read_into = noisy
average_checkpoints([Path(name) for name in sys.argv[2:]], Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "<&- >&- 2>&-", "2>&-"])
def test_a_program_with_closed_standard_streams_averages_all_the_same(closed, tmp_path, parser):
    paths = [tmp_path / f"{number}.weights.h5" for number in range(2)]
    for number, path in enumerate(paths):
        hdf5_file(path, lambda file, n=number: file.create_dataset("x", data=WIDE + 2 * n, chunks=(7, 9)) and None)
    output = tmp_path / "average.weights.h5"
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", NOISY, output, *paths]
    subprocess.run(shell, check=True, timeout=60, stdout=subprocess.DEVNULL)
    equal(contents(output, parser), {"x": WIDE + 1, "layers/dense/vars/0": DATA})


def test_the_parser_imports_nothing_of_the_user(tmp_path, monkeypatch):
    folder = tmp_path / "beside score.py"
    folder.mkdir()
    for name in ("json", "codecs", "resource", "socket", "contextlib", "h5py", "numpy", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('this is the {name}.py of the user')")
    monkeypatch.syspath_prepend(folder)
    for name in ("PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE"):
        monkeypatch.setenv(name, str(folder))
    path = hdf5_file(tmp_path / "a.weights.h5")
    with contextlib.chdir(folder), Parser() as parser:
        equal(contents(path, parser), {"layers/dense/vars/0": DATA})


def test_the_packages_of_the_parser_are_those_beside_numpy_then_those_along_the_path(tmp_path, monkeypatch):
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    for package in (one / "numpy", two / "json", three / "h5py", three / "mpi4py"):
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    (two / "h5py.py").touch()
    monkeypatch.setattr(hdf5, "np", types.SimpleNamespace(__file__=str(one / "numpy/__init__.py")))
    monkeypatch.setattr(sys, "path", ["", str(two), str(three), *sys.path])
    assert hdf5._packages() == [str(one), str(three)]
    (one / "h5py").mkdir()
    (one / "h5py/__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(two)])
    assert hdf5._packages() == [str(one)]


def test_the_parser_looks_for_no_plugins(tmp_path, parser):
    assert ask(parser, "plugins", hdf5_file(tmp_path / "a.weights.h5")) == {"folders": 0}


def test_the_parser_can_open_no_other_file(tmp_path, changed):
    path = hdf5_file(tmp_path / "a.weights.h5")
    with pytest.raises(OSError, match="Too many open files"):
        ask(changed, "peek", path, name=str(path))
    ask(changed, "unseal", path)
    assert ask(changed, "peek", path, name=str(path))["fd"] > 2


@pytest.mark.parametrize("kind", ["link", "virtual", "external storage"])
def test_the_parser_does_not_read_another_file_even_if_no_link_is_refused(kind, tmp_path, changed):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["layers/dense/vars/0"] = np.full(6, 7, "f4")
    raw = other.read_bytes().index(np.full(6, 7, "f4").tobytes())

    def make(file):
        if kind == "link":
            file["x"] = h5py.ExternalLink(str(other), "layers/dense/vars/0")
        elif kind == "virtual":
            virtual_dataset(file, other)
        else:
            file.create_dataset("x", (6,), "f4", external=[(str(other), raw, 24)])

    path = hdf5_file(tmp_path / "a.weights.h5", make)
    with h5py.File(path) as file:
        assert file["x"][0] == 7  # which is what must not come out
    request = {"size": path.stat().st_size}
    if kind == "external storage":
        with pytest.raises((CheckpointError, OSError), match=r"Can't .*open|Too many open files"):
            ask(changed, "follow", path, **request)
        ask(changed, "unseal", path)
        assert ask(changed, "follow", path, **request) == {"first": 7}  # so it was the seal that stopped it
    else:  # libhdf5 takes the other name for the same file, as it can open no other through a window
        assert ask(changed, "follow", path, **request) == {"first": DATA[0]}
        ask(changed, "unseal", path)
        assert ask(changed, "follow", path, **request) == {"first": DATA[0]}


def test_the_parser_has_a_limit_of_memory(tmp_path, parser):
    deflate = zlib.compressobj(9)
    first = deflate.compress(bytes(1 << 20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    again = deflate.compress(bytes(1 << 20)) + deflate.flush(zlib.Z_FULL_FLUSH)

    def make(file):
        dataset = file.create_dataset("x", (1 << 20,), "u1", chunks=(1 << 20,), compression="gzip")
        dataset.id.write_direct_chunk((0,), first + 600 * again)  # 601 MiB where 1 MiB is declared

    path = hdf5_file(tmp_path / "a.weights.h5", make)
    refused(path, parser, "hdf5", "libhdf5 cannot read it: ", "x")
    with open(f"/proc/{parser._process.pid}/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) << 10
    assert peak < hdf5_child.ADDRESS_SPACE + (64 << 20)


def test_the_number_of_objects_is_limited(tmp_path, changed):
    path = hdf5_file(tmp_path / "a.weights.h5", lambda file: file.create_dataset("y/x", data=DATA) and None)
    ask(changed, "limit", path, MAX_OBJECTS=5)
    refused(path, changed, "too-many", "the file has more than 5 groups and datasets")


# --- zip ----------------------------------------------------------------------------------------------------------


def npy(array=DATA, text=None, version=1, length=None, data=None):
    """Bytes of a .npy file; `text` replaces its header, `length` what it says of that, `data` the rest."""
    array = np.asarray(array)
    if text is None:
        fortran = array.flags.f_contiguous and not array.flags.c_contiguous
        text = repr({"descr": array.dtype.str, "fortran_order": fortran, "shape": array.shape})
    text = text.encode("latin1") + b"\n"
    said = struct.pack("<H" if version == 1 else "<I", len(text) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + said + text + (array.tobytes("A") if data is None else data)


@dataclass
class Entry:
    """One member; `local` and `central` replace fields of the local header and of the entry in the directory."""

    name: bytes = b"x.npy"
    data: bytes = field(default_factory=npy)
    method: int = 0
    flags: int = 0
    local: dict = field(default_factory=dict)
    central: dict = field(default_factory=dict)
    before: bytes = b""


SIZES = ("version", "flags", "method", "time", "date", "crc", "packed", "size")


def zipped(*entries, behind=b"", comment=b"", last=b"", **end):
    """Bytes of an archive, which may lie; `end` replaces fields of the end record."""
    body, directory = b"", b""
    for entry in entries:
        packed = entry.data
        if entry.method == 8:
            deflate = zlib.compressobj(wbits=-15)
            packed = deflate.compress(packed) + deflate.flush()
        common = {
            "version": 20, "flags": entry.flags, "method": entry.method, "time": 0, "date": 33,
            "crc": zlib.crc32(entry.data), "packed": len(packed), "size": len(entry.data), "name": entry.name,
            "extra": b"", "data": packed,
        }  # fmt: skip
        local = common | entry.local
        body += entry.before
        central = {"made": 20, "comment": b"", "disk": 0, "mode": 0, "header": len(body)} | common | entry.central
        body += struct.pack("<4s5H3I", b"PK\3\4", *(local[key] for key in SIZES))
        body += struct.pack("<2H", len(local["name"]), len(local["extra"]))
        body += local["name"] + local["extra"] + local["data"]
        directory += struct.pack("<4s6H3I", b"PK\1\2", *(central[key] for key in ("made", *SIZES)))
        directory += struct.pack("<3H", *(len(central[key]) for key in ("name", "extra", "comment")))
        directory += struct.pack("<2H2I", central["disk"], 0, central["mode"], central["header"])
        directory += central["name"] + central["extra"] + central["comment"]
    body += behind
    end = {
        "disk": 0, "of": 0, "here": len(entries), "count": len(entries), "size": len(directory), "start": len(body),
    } | end  # fmt: skip
    return body + directory + last + struct.pack("<4s4H2IH", b"PK\5\6", *end.values(), len(comment)) + comment


GOOD = zipped(Entry())
BODY = 30 + 5 + len(npy())  # where the directory of GOOD begins
ENTRY = len(GOOD) - BODY - 22  # bytes of that
ANOTHER = Entry(b"y.npy")
DEFLATED = zlib.compress(npy())[2:-4]


def zip64(*values):
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)


def end64(place=BODY + ENTRY, **fields):
    """A ZIP64 end record and its locator, for GOOD."""
    said = {"size": 44, "made": 45, "version": 45, "disk": 0, "of": 0, "here": 1, "count": 1, "bytes": ENTRY}
    said |= {"start": BODY} | fields
    return struct.pack("<4sQ2H2I4Q", b"PK\6\6", *said.values()) + struct.pack("<4sIQI", b"PK\6\7", 0, place, 1)


def both(**fields):
    return {"local": fields, "central": fields}


def named(name, **fields):
    return zipped(Entry(name, **fields))


TWICE = "there are two members of this name"
ABSOLUTE = r"the name is absolute, or has '\.\.', a drive, a backslash or a NUL in it"
LOCAL = "its local header says something else than the directory"
STREAMED = r"it is encrypted, patched or streamed \(flags"
END = "it does not end with the end record of a zip archive without a comment"
EXTRA = "its extra fields are of an unknown kind, or not those that its sizes ask for"
UNEQUAL = "member 'x.npy' does not inflate to the size and CRC-32 it declares"

ZIP = {
    "two members of one name": (zipped(Entry(), Entry()), "zip-twice", f"member 'x.npy': {TWICE}"),
    "a member inside another": (
        zipped(Entry(data=zipped(ANOTHER)), Entry(b"y.npy", central={"header": 35})),
        "zip-overlap", "member 'x.npy': it shares bytes with 'y.npy'"),
    "two members at one place": (
        zipped(Entry(), Entry(central={"header": 0, "name": b"y.npy"})), "zip-local", f"member 'y.npy': {LOCAL}"),
    "a lying local size": (zipped(Entry(local={"size": 9})), "zip-local", LOCAL),
    "a lying local packed size": (zipped(Entry(local={"packed": 9})), "zip-local", LOCAL),
    "a lying local checksum": (zipped(Entry(local={"crc": 9})), "zip-local", LOCAL),
    "a lying local name": (zipped(Entry(local={"name": b"y.npy"})), "zip-local", LOCAL),
    "a lying local method": (zipped(Entry(local={"method": 8})), "zip-local", LOCAL),
    "lying local flags": (zipped(Entry(local={"flags": 1})), "zip-local", LOCAL),
    "a local header that is none": (GOOD[:2] + b"\0" + GOOD[3:], "zip-local", LOCAL),
    "a local name that is longer": (GOOD[:26] + b"\xff\xff" + GOOD[28:], "zip-bounds", "its data reach into the dir"),
    "encryption": (zipped(Entry(flags=1)), "zip-flags", f"{STREAMED} 0x1"),
    "a data descriptor": (zipped(Entry(flags=8)), "zip-flags", f"{STREAMED} 0x8"),
    "strong encryption": (zipped(Entry(flags=0x40)), "zip-flags", f"{STREAMED} 0x40"),
    "patched data": (zipped(Entry(flags=0x20)), "zip-flags", f"{STREAMED} 0x20"),
    "bytes before": (zipped(Entry(before=b"#!/bin/sh\n")), "zip-before", "there is something before its first member"),
    "bytes between": (
        zipped(Entry(), Entry(b"y.npy", before=b"hidden")), "zip-hole", "'x.npy': 6 bytes behind it belong to no"),
    "bytes before the directory": (
        zipped(Entry(), behind=b"hidden"), "zip-hole", "'x.npy': 6 bytes behind it belong to no member"),
    "bytes behind": (GOOD + b"behind", "zip-end", END),
    "a comment": (zipped(Entry(), comment=b"comment"), "zip-end", END),
    "a comment that is announced only": (GOOD[:-2] + b"\x07\0", "zip-end", END),
    "a comment of a member": (zipped(Entry(central={"comment": b"c"})), "zip-comment", "'x.npy': it has a comment"),
    "an archive in a comment": (
        GOOD[:-2] + struct.pack("<H", len(GOOD)) + GOOD, "zip-end", "its directory does not lie between"),
    "a symbolic link": (zipped(Entry(central={"mode": 0o120777 << 16})), "zip-link", "'x.npy': it is a symbolic link"),
    "an absolute path": (named(b"/x.npy"), "zip-name", f"member '/x.npy': {ABSOLUTE}"),
    "a drive": (named(b"C:/x.npy"), "zip-name", f"member 'C:/x.npy': {ABSOLUTE}"),
    "a backslash": (named(b"a\\x.npy"), "zip-name", ABSOLUTE),
    "two dots": (named(b"../x.npy"), "zip-name", rf"member '\.\./x\.npy': {ABSOLUTE}"),
    "one dot": (named(b"a/./x.npy"), "zip-name", ABSOLUTE),
    "an empty part": (named(b"a//x.npy"), "zip-name", ABSOLUTE),
    "a NUL": (named(b"x.npy\0.npy"), "zip-name", ABSOLUTE),
    "no name": (named(b""), "zip-name", ABSOLUTE),
    "a name that is not ASCII": (named(b"\xe9.npy"), "zip-name", r"the name b'\\xe9\.npy' is neither ASCII nor marked"),
    "a name that is not UTF-8": (named(b"\xe9.npy", flags=0x800), "zip-name", "neither ASCII nor marked as UTF-8"),
    "an unknown member": (zipped(Entry(), Entry(b"x.pkl")), "zip-name", "member 'x.pkl': no file of this kind has"),
    "another method": (zipped(Entry(method=12)), "zip-method", "it is packed with method 12; stored and deflated"),
    "stored with unequal sizes": (zipped(Entry(**both(size=999))), "zip-size", "it is stored, but its sizes are"),
    "stored and short": (zipped(Entry(**both(size=9, packed=9))), "zip-hole", "bytes behind it belong to no member"),
    "stored beyond the directory": (
        zipped(Entry(**both(size=999, packed=999))), "zip-bounds", "its data reach into the directory"),
    "an expansion bomb": (zipped(Entry(method=8, **both(size=1 << 30))), "expansion", "1073741824 bytes are declared"),
    "an expansion bomb of nothing": (
        zipped(Entry(method=8, **both(size=9, packed=0))), "expansion", "9 bytes are declared, but only 0 stored"),
    "a header beyond the directory": (
        zipped(Entry(central={"header": 1 << 20})), "zip-bounds", "its header is outside of the archive"),
    "a member on another disk": (zipped(Entry(central={"disk": 1})), "zip-bounds", "its header is outside"),
    "fewer members than said": (
        zipped(Entry(), here=2, count=2), "zip-directory", "its directory is shorter than the number of members"),
    "more members than said": (
        zipped(Entry(), ANOTHER, here=1, count=1), "zip-directory", "its directory has more in it than the members"),
    "two counts of members": (zipped(Entry(), here=2), "zip-disks", "split over several files"),
    "several disks": (zipped(Entry(), disk=1, of=1), "zip-disks", "split over several files"),
    "a damaged directory": (
        GOOD[:BODY] + b"XX" + GOOD[BODY + 2 :], "zip-directory", "an entry of its directory is damaged"),
    "a name that reaches out of the directory": (
        GOOD[: BODY + 28] + b"\xff\xff" + GOOD[BODY + 30 :], "zip-directory", "an entry of its directory is damaged"),
    "a directory elsewhere": (zipped(Entry(), start=0), "zip-end", "its directory does not lie between"),
    "a directory of another size": (zipped(Entry(), size=9), "zip-end", "its directory does not lie between"),
    "too many members": (
        zipped(Entry(), last=end64(here=200_000, count=200_000), count=0xFFFF, here=0xFFFF),
        "too-many", "it has 200000 members, more than 100000"),
    "a ZIP64 end that is missing": (zipped(Entry(), start=FF), "zip-end", "its ZIP64 end record is not where it says"),
    "a ZIP64 end elsewhere": (zipped(Entry(), last=end64(place=0), start=FF), "zip-end", "is not where it says"),
    "a damaged ZIP64 end": (
        zipped(Entry(), last=end64(size=99), start=FF), "zip-end", "its ZIP64 end record is damaged"),
    "two ends that contradict each other": (
        zipped(Entry(), last=end64(here=2, count=2), start=FF), "zip-end", "its two end records contradict each other"),
    "a ZIP64 end that nothing asks for": (
        zipped(Entry(central={"extra": struct.pack("<2H", 0x5455, 76) + end64()})),
        "zip-end", "it has a ZIP64 end record, though nothing in it asks for one"),
    "ZIP64 sizes that lie": (
        zipped(Entry(central={"size": FF, "packed": FF, "extra": zip64(9, 9)})), "zip-local", LOCAL),
    "local ZIP64 sizes that lie": (
        zipped(Entry(local={"size": FF, "packed": FF, "extra": zip64(9, 9)})), "zip-local", LOCAL),
    "ZIP64 sizes that are missing": (zipped(Entry(central={"size": FF, "packed": FF})), "zip-extra", EXTRA),
    "ZIP64 sizes that nothing asks for": (zipped(Entry(central={"extra": zip64(9, 9)})), "zip-extra", EXTRA),
    "a ZIP64 place beyond the end": (
        zipped(Entry(central={"header": FF, "extra": zip64(1 << 62)})), "zip-bounds", "its header is outside"),
    "two ZIP64 fields": (zipped(Entry(central={"header": FF, "extra": zip64(0) * 2})), "zip-extra", EXTRA),
    "an extra field with another name": (
        zipped(Entry(central={"extra": struct.pack("<2HB", 0x7075, 9, 1) + b"1234evil"})), "zip-extra", EXTRA),
    "an extra field that is cut off": (
        zipped(Entry(central={"extra": struct.pack("<2H", 0x5455, 9)})), "zip-extra", EXTRA),
    "a wrong checksum of a deflated member": (zipped(Entry(method=8, **both(crc=9))), "damaged", UNEQUAL),
    "a deflated member that is shorter": (zipped(Entry(method=8, **both(size=9))), "damaged", UNEQUAL),
    "a deflated member that is longer": (zipped(Entry(method=8, **both(size=160))), "damaged", UNEQUAL),
    "deflated data that are none": (
        zipped(Entry(method=8, **both(data=b"\xff" * 40, packed=40))), "damaged", "member 'x.npy': Error -3"),
    "deflated data that end too soon": (
        zipped(Entry(method=8, **both(data=DEFLATED[:20], packed=20))), "damaged", "'x.npy': it ends too soon"),
    "something behind deflated data": (
        zipped(Entry(method=8, **both(data=DEFLATED + b"hidden", packed=len(DEFLATED) + 6))),
        "damaged", "member 'x.npy': there is something behind its data"),
    "no archive": (b"PK\3\4" + bytes(100), "zip-end", END),
    "too short": (b"PK\3\4", "zip", "it is too short for a zip archive"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ZIP)
def test_hostile_zip_is_refused(kind, tmp_path, parser, unread):
    data, code, reason = ZIP[kind]
    path = tmp_path / "bad.npz"
    path.write_bytes(data)
    refused(path, parser, code, reason)


def keras(weights, *more, method=0):
    return zipped(
        Entry(b"metadata.json", b"{}", method),
        Entry(b"config.json", b'{"a": 1}', method),
        Entry(b"model.weights.h5", weights, method),
        *more,
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Bytes of a small .weights.h5."""
    return hdf5_file(tmp_path_factory.mktemp("weights") / "a.weights.h5").read_bytes()


INCOMPLETE = r"it has no model\.weights\.h5 or no config\.json in it"


def damaged(data):
    """Zeros in the middle of the data of the last member."""
    middle = data.index(b"model.weights.h5") + 200
    return data[:middle] + bytes(9) + data[middle + 9 :]


@pytest.mark.parametrize(
    ("make", "code", "reason", "tensor"),
    [
        pytest.param(lambda w: keras(w, Entry(b"evil.py", b"")), "zip-name", "member 'evil.py': no file of this", None,
                     id="an unknown member"),
        pytest.param(lambda w: keras(w, Entry(b"assets/../x", b"")), "zip-name", "member 'assets/../x'", None,
                     id="an asset elsewhere"),
        pytest.param(lambda w: zipped(Entry(b"model.weights.h5", w)), "keras", INCOMPLETE, None, id="no config"),
        pytest.param(lambda w: zipped(Entry(b"config.json", b"{}")), "keras", INCOMPLETE, None, id="no weights"),
        pytest.param(lambda w: zipped(), "keras", INCOMPLETE, None, id="no member"),
        pytest.param(lambda w: keras(w[:-1]), "truncated", ENDS, None, id="weights cut off"),
        pytest.param(lambda w: keras(w + b"!"), "trailing", ENDS, None, id="weights longer"),
        pytest.param(lambda w: keras(b"PK" + w[:1000]), "hdf5", "it is not an HDF5 file", None, id="weights of a kind"),
        pytest.param(lambda w: keras(moved(8)(w, w.index(MARK))), "bounds", "bytes 8 to 32 are outside of the HDF5",
                     "layers/dense/vars/0", id="data in the superblock"),
        pytest.param(lambda w: damaged(keras(w, method=8)), "damaged", "member 'model.weights.h5'", None,
                     id="deflated weights damaged"),
    ],
)  # fmt: skip
def test_hostile_keras_archives_are_refused(make, code, reason, tensor, tmp_path, parser, weights, unread):
    path = tmp_path / "bad.keras"
    path.write_bytes(make(weights))
    refused(path, parser, code, reason, tensor)


def test_a_link_in_the_weights_of_an_archive_is_refused(tmp_path, parser, unread):
    inside = hdf5_file(tmp_path / "a.h5", lambda file: file.__setitem__("x", h5py.ExternalLink("/etc/passwd", "y")))
    path = tmp_path / "bad.keras"
    path.write_bytes(keras(inside.read_bytes()))
    refused(path, parser, "external-link", LINK % "external", "x")


@pytest.mark.parametrize("method", [0, 8], ids=["stored", "deflated"])
def test_a_legitimate_keras_archive_is_read(method, tmp_path, parser):
    inside = hdf5_file(tmp_path / "a.h5", lambda file: file.create_dataset("x", data=WIDE, chunks=(7, 9)) and None)
    assets = Entry(b"assets/", b""), Entry(b"assets/vocabulary.txt", b"a")
    said = Entry(b"streaming_polyak.json", b'{"n": 3}', method)
    path = tmp_path / "good.keras"
    path.write_bytes(keras(inside.read_bytes(), *assets, said, method=method))
    equal(contents(path, parser), {"x": WIDE, "layers/dense/vars/0": DATA})
    with open_checkpoint(path, parser) as table:
        assert table.provenance == {"n": 3}
        assert table.tensors["layers/dense/vars/0"].mapped == (method == 0)


@pytest.mark.parametrize("suffix", [".keras", ".npz"])
def test_a_flipped_bit_of_stored_data_is_told_by_a_checksum(suffix, small, parser):
    path = small(suffix)
    data = path.read_bytes()
    path.write_bytes(data.replace(MARK, bytes([MARK[0] ^ 1]) + MARK[1:], 1))
    with open_checkpoint(path, parser) as table:
        sums = [(c.what, zlib.crc32(table.sources[c.source].read(c.start, c.size)) == c.crc32) for c in table.checksums]
    assert len(sums) >= 2
    assert [what for what, holds in sums if not holds] == [
        "member 'model.weights.h5'" if suffix == ".keras" else "member 'x.npy'"
    ]


@pytest.mark.parametrize("method", [0, 8], ids=["stored", "deflated"])
def test_what_was_unpacked_of_a_file_that_is_refused_is_closed(method, tmp_path, parser):
    path = tmp_path / "bad.npz"
    path.write_bytes(zipped(Entry(method=8), Entry(b"y.npy", b"not npy at all", method)))
    before = len(os.listdir("/proc/self/fd"))
    refused(path, parser, "npy", BEGIN, "y")
    assert len(os.listdir("/proc/self/fd")) == before


# --- npy ----------------------------------------------------------------------------------------------------------


def header(**fields):
    return repr({"descr": "<f4", "fortran_order": False, "shape": (6,)} | fields)


def pickled():
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}, print], dtype=object), allow_pickle=True)
    return file.getvalue()


LITERAL = "its header is not a Python literal"
KEYS = "its header has other keys than descr, fortran_order and shape"
PLAIN = "is not plain numbers; nothing else is read, least of all pickles"
WHOLE = "is not a tuple of whole numbers, or impossible"
BEGIN = r"it does not begin like a \.npy file of version 1 to 3"
LONG = "0x1" + "0" * 5000  # which cannot be printed in decimal

NPY = {
    "a pickle": (pickled(), "dtype", rf"its dtype '\|O' {PLAIN}"),
    "a structured array": (npy(np.zeros(3, [("a", "f4")])), "dtype", PLAIN),
    "a structured dtype": (npy(text=header(descr=[("a", "<f4")])), "dtype", PLAIN),
    "a subarray": (npy(text=header(descr=("<f4", (2,)))), "dtype", PLAIN),
    "text": (npy(np.array(["abcd"])), "dtype", rf"its dtype '<U4' {PLAIN}"),
    "bytes": (npy(np.array([b"abcd"])), "dtype", rf"its dtype '\|S4' {PLAIN}"),
    "void": (npy(np.zeros(3, "V4")), "dtype", rf"its dtype '\|V4' {PLAIN}"),
    "bfloat16 as NumPy writes it": (
        npy(np.zeros(3, ml_dtypes.bfloat16)), "dtype", rf"its dtype '[<|]V2' {PLAIN}"),
    "two bytes of void": (npy(np.zeros(3, "V2")), "dtype", rf"its dtype '\|V2' {PLAIN}"),
    "complex numbers": (npy(np.zeros(3, "c8")), "dtype", rf"its dtype '<c8' {PLAIN}"),
    "times": (npy(np.zeros(3, "M8[s]")), "dtype", PLAIN),
    "long double": (npy(np.zeros(3, "g")), "dtype", PLAIN),
    "a dtype without byte order": (npy(text=header(descr="f4")), "dtype", PLAIN),
    "a dtype of thousands of digits": (
        npy(text=f"{{'descr': {LONG}, 'fortran_order': 0, 'shape': ()}}"), "npy", LITERAL),
    "a bool for a dimension": (npy(text=header(shape=(True,))), "shape", rf"its shape \(True,\) {WHOLE}"),
    "a negative dimension": (npy(text=header(shape=(-1, -6))), "shape", rf"its shape \(-1, -6\) {WHOLE}"),
    "a fraction for a dimension": (npy(text=header(shape=(6.0,))), "shape", WHOLE),
    "a list for a shape": (npy(text=header(shape=[6])), "shape", WHOLE),
    "a number for a shape": (npy(text=header(shape=6)), "shape", WHOLE),
    "a dimension that is too large": (npy(text=header(shape=(1 << 64,))), "shape", WHOLE),
    "a product that overflows": (npy(text=header(shape=(1 << 40, 1 << 40))), "shape", WHOLE),
    "empty, with a huge other dimension": (npy(text=header(shape=(0, 1 << 62)), data=b""), "shape", WHOLE),
    "a dimension of thousands of digits": (
        npy(text=f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({LONG},)}}"), "npy", LITERAL),
    "a rank bomb": (npy(text=header(shape=(1,) * 33)), "shape", WHOLE),
    "a rank bomb in Fortran order": (
        npy(text=header(shape=(1,) * 99, fortran_order=True), data=bytes(4)), "shape", WHOLE),
    "a size bomb": (npy(text=header(shape=(1 << 40,))), "size", r"float32 \(1099511627776,\) does not take the 24"),
    "too few data": (npy(data=DATA.tobytes()[:-1]), "size", r"float32 \(6,\) does not take the 23 bytes there are"),
    "too many data": (npy(data=DATA.tobytes() + b"!"), "size", r"float32 \(6,\) does not take the 25 bytes there are"),
    "a fortran_order that is no bool": (npy(text=header(fortran_order=1)), "npy", "its fortran_order is 1"),
    "a header that is too long": (npy(text=header() + " " * 10_000), "npy", "its header of [0-9]+ bytes is longer"),
    "a header longer than the file": (npy(length=5000), "npy", "its header of 5000 bytes is longer than"),
    "a header of 4 GiB": (npy(length=FF, version=2), "npy", "its header of 4294967295 bytes is longer than"),
    "a call": (npy(text="{'descr': open('x'), 'fortran_order': False, 'shape': ()}"), "npy", LITERAL),
    "code that is no expression": (npy(text="import os"), "npy", LITERAL),
    "a header that is no text": (npy(text="\xff\0\x80"), "npy", LITERAL),
    "an empty header": (npy(text=""), "npy", LITERAL),
    "nested too deep": (npy(text="[" * 4000), "npy", LITERAL),
    "negated too often": (npy(text="-" * 9000 + "1"), "npy", LITERAL),
    "a list for a header": (npy(text="['descr', 'fortran_order', 'shape']"), "npy", KEYS),
    "another kind of key": (npy(text="{(): 1, 'fortran_order': False, 'shape': ()}"), "npy", KEYS),
    "one key more": (npy(text=header(more=1)), "npy", KEYS),
    "a missing key": (npy(text="{'descr': '<f4', 'shape': (6,)}"), "npy", KEYS),
    "version 9": (npy(version=9), "npy", BEGIN),
    "version 0": (npy(version=0), "npy", BEGIN),
    "another magic": (b"\x93NUMPX" + npy()[6:], "npy", BEGIN),
    "nothing": (b"", "npy", BEGIN),
    "the magic only": (b"\x93NUMPY\1\0", "npy", BEGIN),
}  # fmt: skip


@pytest.mark.parametrize("kind", NPY)
def test_hostile_npy_is_refused(kind, tmp_path, parser, unread):
    data, code, reason = NPY[kind]
    path = tmp_path / "bad.npz"
    path.write_bytes(zipped(Entry(b"good.npy"), Entry(b"layer/x.npy", data)))
    refused(path, parser, code, reason, "layer/x")


@pytest.fixture
def unpacked(monkeypatch):
    """How many bytes were inflated into temporary files."""
    sizes, write = [], source.UnpackedSource.write

    def recorded(self, data):
        sizes.append(len(data))
        write(self, data)

    monkeypatch.setattr(source.UnpackedSource, "write", recorded)
    return sizes


@pytest.mark.parametrize(
    ("make", "code", "reason"),
    [
        (lambda weights: bytes(16 << 20), "hdf5", "it is not an HDF5 file"),
        (lambda weights: weights + bytes(16 << 20), "trailing", "but says that it ends at byte"),
        (lambda weights: bytes(2 << 20) + weights + bytes(2 << 20), "hdf5", "it is not an HDF5 file"),
    ],
    ids=["zeros", "more than it declares", "far behind the beginning"],
)
def test_deflated_weights_that_are_none_are_refused_before_all_is_inflated(
    make, code, reason, tmp_path, parser, weights, unpacked
):
    path = tmp_path / "a.keras"
    path.write_bytes(keras(make(weights), method=8))
    refused(path, parser, code, reason)
    assert sum(unpacked) <= 1 << 20


def chunked(file):
    file.create_dataset("x", data=WIDE, chunks=(50, 100))
    file.create_dataset("y", data=WIDE, chunks=(50, 100), compression="gzip")


@pytest.mark.parametrize(
    ("name", "make", "needed"),
    [
        ("a.npz", lambda path, weights: np.savez_compressed(path, x=WIDE, y=WIDE), 2 * (128 + WIDE.nbytes)),
        ("a.npz", lambda path, weights: np.savez(path, x=np.asfortranarray(WIDE)), WIDE.nbytes),
        ("a.weights.h5", lambda path, weights: hdf5_file(path, chunked), 2 * WIDE.nbytes),
        ("a.keras", lambda path, weights: path.write_bytes(keras(weights, method=8)), None),
        ("a.keras", lambda path, _: path.write_bytes(keras(hdf5_file(path, chunked).read_bytes())), 2 * WIDE.nbytes),
    ],
    ids=["deflated npz", "Fortran order", "chunks", "deflated keras", "chunks in keras"],
)
def test_what_has_to_be_unpacked_is_refused_where_there_is_no_room(
    name, make, needed, tmp_path, parser, weights, unpacked, monkeypatch
):
    path, folder, ask, asked = tmp_path / name, tmp_path / "temporary", parser.ask, []
    needed = needed or len(weights)
    make(path, weights)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))

    def free(count):
        monkeypatch.setattr(shutil, "disk_usage", lambda at: types.SimpleNamespace(free=count * (at == str(folder))))

    def recorded(path, do, *more, **request):
        asked.append(do)
        return ask(path, do, *more, **request)

    monkeypatch.setattr(parser, "ask", recorded)
    free(needed)
    with pytest.raises(OSError, match=f"takes {needed} bytes in .*, where {needed} are free; set TMPDIR to") as caught:
        open_checkpoint(path, parser)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert str(folder) in str(caught.value)
    assert not unpacked
    assert "unpack" not in asked
    free(2 * needed)
    with open_checkpoint(path, parser) as table:
        assert len(table.sources) == 2


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("kind", ["deflated npz", "Fortran order", "chunks"])
def test_a_disk_that_fills_up_while_it_is_unpacked_is_told_with_what_helps(kind, tmp_path, parser, monkeypatch):
    path = tmp_path / ("a.weights.h5" if kind == "chunks" else "a.npz")
    if kind == "deflated npz":
        np.savez_compressed(path, x=WIDE)
        monkeypatch.setattr(source, "os", types.SimpleNamespace(**vars(os) | {"pwrite": full}))
    elif kind == "Fortran order":
        np.savez(path, x=np.asfortranarray(WIDE))
        monkeypatch.setattr(npz, "os", types.SimpleNamespace(**vars(os) | {"posix_fallocate": full}))
    else:
        hdf5_file(path, chunked)
        monkeypatch.setattr(source.UnpackedSource, "duplicate", lambda self: os.open("/dev/full", os.O_RDWR))
    said = f"No space left on device in {tempfile.gettempdir()}, into which it is unpacked; set TMPDIR to a folder with"
    with pytest.raises(OSError, match=re.escape(said)) as caught:
        open_checkpoint(path, parser)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))


def test_what_is_read_in_place_needs_no_room(tmp_path, parser, weights, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=0))
    for name, data in (("a.npz", GOOD), ("a.keras", keras(weights)), ("a.weights.h5", weights)):
        (tmp_path / name).write_bytes(data)
        contents(tmp_path / name, parser)


def test_names_of_npy_files_that_look_the_same_are_refused(tmp_path, parser, unread):
    path = tmp_path / "bad.npz"
    path.write_bytes(zipped(*(Entry(f"{name}.npy".encode(), flags=0x800) for name in ("\u00e9", "e\u0301"))))
    refused(path, parser, "name", "its name stands there twice", "e\u0301")


ARRAYS = {
    "scalar": np.float32(7),
    "empty": np.zeros((3, 0), "f4"),
    "one": np.ones(1, "f8"),
    "big-endian": np.arange(6, dtype=">f4"),
    "fortran": np.asfortranarray(WIDE),
    "fortran-3d": np.asfortranarray(np.arange(24, dtype=">i2").reshape(2, 3, 4)),
    "bool": BOOLS,
    "half": np.arange(5, dtype="f2"),
    "layers/dense/kernel:0": np.arange(3, dtype="u8"),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_legitimate_npz_is_read(save, tmp_path, parser):
    save(tmp_path / "good.npz", **ARRAYS)
    equal(contents(tmp_path / "good.npz", parser), ARRAYS)


def test_npy_of_versions_2_and_3_is_read(tmp_path, parser):
    (tmp_path / "a.npz").write_bytes(zipped(Entry(b"2.npy", npy(version=2)), Entry(b"3.npy", npy(version=3))))
    equal(contents(tmp_path / "a.npz", parser), {"2": DATA, "3": DATA})


def test_an_archive_with_zip64_records_is_read(tmp_path, parser):
    wide = {"size": FF, "packed": FF, "extra": zip64(len(npy()), len(npy()))}
    end = end64(BODY + 20 + ENTRY + 20, bytes=ENTRY + 20, start=BODY + 20)
    data = zipped(Entry(**both(**wide)), last=end, start=FF)
    (tmp_path / "a.npz").write_bytes(data)
    equal(contents(tmp_path / "a.npz", parser), {"x": DATA})


def test_an_archive_of_two_thousand_deflated_members_takes_one_temporary_file(tmp_path, parser):
    (tmp_path / "a.npz").write_bytes(zipped(*(Entry(f"{n}.npy".encode(), method=8) for n in range(2000))))
    before = len(os.listdir("/proc/self/fd"))
    with open_checkpoint(tmp_path / "a.npz", parser) as table:
        assert len(table.tensors) == 2000
        assert len(os.listdir("/proc/self/fd")) <= before + 2


# Zeros deflate to so little that all of it is taken in before the last of the 1 MiB blocks comes out.
@pytest.mark.parametrize("size", range((1 << 20) - 1, (1 << 20) + 4))
def test_a_member_that_ends_beside_a_block_of_inflating_is_read(size, tmp_path, parser):
    header_size = len(npy(np.zeros(1 << 20, "u1"))) - (1 << 20)
    array = np.zeros(size - header_size, "u1")
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("x.npy", npy(array))
    equal(contents(tmp_path / "a.npz", parser), {"x": array})


# --- safetensors --------------------------------------------------------------------------------------------------


def safe(text, data=None, length=None):
    """Bytes of a safetensors file with this header, given as JSON or as what JSON is made of."""
    data = DATA.tobytes() if data is None else data
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def said(dtype="F32", shape=(6,), offsets=(0, 24), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


SAID = json.dumps(said()).encode()
OUTSIDE = "ends outside of the file, or is unreasonably long"
OFFSETS = r"its data_offsets are not two whole numbers below 2\*\*63, begin and end"
SHAPE = r"its shape is not a list of whole numbers below 2\*\*63"
HOLE = "its data do not begin where those before it end"
KEYS_OF_ONE = "it has other keys than dtype, shape and data_offsets"
JSON = "its header is not valid JSON in UTF-8"
HUGE = 10**4000

SAFETENSORS = {
    "a short file": (b"\x08\0\0\0", "safetensors", "it has 4 bytes; a safetensors file has at least 8", None),
    "a header beyond the file": (safe({"x": said()}, length=999), "safetensors", f"of 999 bytes {OUTSIDE}", None),
    "a header of 2**64 bytes": (safe({}, length=2**64 - 1), "safetensors", OUTSIDE, None),
    "a header that is too long": (safe(b" " * (9 << 20)), "safetensors", OUTSIDE, None),
    "not UTF-8": (safe(b'{"\xff": 1}'), "json", JSON, None),
    "not JSON": (safe(b"{x: 1}"), "json", JSON, None),
    "an empty header": (safe(b"", b""), "json", JSON, None),
    "nested too deep": (safe(b'{"x":' * 99_999), "json", JSON, None),
    "a number of 5000 digits": (safe(b'{"x": 1%s}' % (b"0" * 5000)), "json", JSON, None),
    "duplicate keys": (safe(b'{"x": %s, "x": %s}' % (SAID, SAID)), "json", "its header has a key twice", None),
    "duplicate keys inside": (
        safe(b'{"x": {"shape": [6], "shape": [6]}}'), "json", "its header has a key twice", None),
    "a list for a header": (safe([1]), "safetensors", "its header is not a JSON object", None),
    "a header that begins with a space": (safe(b' {"x": %s}' % SAID), "safetensors", "is not a JSON object", None),
    "a hole": (safe({"x": said(offsets=(4, 28))}, bytes(28)), "hole", HOLE, "x"),
    "a hole between two": (safe({"x": said(), "y": said(offsets=(28, 52))}, bytes(52)), "hole", HOLE, "y"),
    "an overlap": (safe({"x": said(), "y": said(offsets=(20, 44))}, bytes(44)), "hole", HOLE, "y"),
    "two names for one place": (safe({"x": said(), "y": said()}), "hole", HOLE, "y"),
    "a product that overflows": (safe({"x": said(shape=(1 << 62, 1 << 62))}), "shape", "shape .* is impossible", "x"),
    "a product that overflows to 24 bytes": (
        safe({"x": said(shape=(1 << 62, 2, (1 << 61) + 3))}), "shape", "its shape .* is impossible", "x"),
    "a dimension of 4000 digits": (safe({"x": said(shape=(HUGE, HUGE))}), "shape", SHAPE, "x"),
    "an end before the start": (safe({"x": said(offsets=(24, 0))}), "offsets", OFFSETS, "x"),
    "an end beyond the file": (safe({"x": said(offsets=(0, 28), shape=(7,))}), "truncated", "data end at byte", None),
    "an end of 4000 digits": (safe({"x": said(offsets=(0, HUGE))}), "offsets", OFFSETS, "x"),
    "a size that is not that of the shape": (safe({"x": said(shape=(5,))}), "size", "takes 20 bytes, but 24 are", "x"),
    "trailing bytes": (safe({"x": said()}, bytes(25)), "trailing", "data end at byte [0-9]+ of [0-9]+", None),
    "data of no tensor": (safe({}), "trailing", "data end at byte", None),
    "an unknown dtype": (safe({"x": said("F31")}), "dtype", "its dtype 'F31' is not one of F64, F32", "x"),
    "a dtype in small letters": (safe({"x": said("f32")}), "dtype", "its dtype 'f32' is not one of", "x"),
    "a dtype of eight bits": (safe({"x": said("F8_E4M3", (24,))}), "dtype", "its dtype 'F8_E4M3' is not one of", "x"),
    "a dtype of four bits": (safe({"x": said("F4", (48,))}), "dtype", "its dtype 'F4' is not one of", "x"),
    "a number for a dtype": (safe({"x": said(32)}), "dtype", "its dtype 32 is not one of", "x"),
    "an unknown key": (safe({"x": said(more=1)}), "safetensors", KEYS_OF_ONE, "x"),
    "a missing key": (safe({"x": {"dtype": "F32", "shape": [6]}}), "safetensors", KEYS_OF_ONE, "x"),
    "a number for a tensor": (safe({"x": 1}), "safetensors", KEYS_OF_ONE, "x"),
    "metadata that are no strings": (
        safe({"__metadata__": {"a": 1}, "x": said()}), "safetensors", "__metadata__ does not map strings to", None),
    "a list of metadata": (
        safe({"__metadata__": ["a"], "x": said()}), "safetensors", "__metadata__ does not map strings to", None),
    "an empty tensor in the wrong place": (
        safe({"x": said(), "y": said(shape=(0,), offsets=(7, 7))}), "hole", HOLE, "y"),
    "an empty tensor behind the end": (
        safe({"x": said(), "y": said(shape=(0,), offsets=(99, 99))}), "hole", HOLE, "y"),
    "an empty tensor with data": (safe({"x": said(shape=(0,))}), "size", "takes 0 bytes, but 24 are stored", "x"),
    "an empty tensor with a huge other dimension": (
        safe({"x": said(), "y": said(shape=(0, 1 << 62), offsets=(24, 24))}), "shape", "is impossible", "y"),
    "a rank bomb": (safe({"x": said(shape=(6, *(1,) * 32))}), "shape", "is impossible", "x"),
    "a negative dimension": (safe({"x": said(shape=(-2, -3))}), "shape", SHAPE, "x"),
    "a negative place": (safe({"x": said(offsets=(-24, 0))}), "offsets", OFFSETS, "x"),
    "a bool for a dimension": (safe({"x": said(shape=(6, True))}), "shape", SHAPE, "x"),
    "a bool for a place": (safe({"x": said("U8", (1,), (False, True))}, b"1"), "offsets", OFFSETS, "x"),
    "a fraction for a dimension": (safe({"x": said(shape=(6.0,))}), "shape", SHAPE, "x"),
    "infinity for a dimension": (
        safe(b'{"x":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,24]}}'), "shape", SHAPE, "x"),
    "text for a dimension": (safe({"x": said(shape=("6",))}), "shape", SHAPE, "x"),
    "a number for a shape": (safe({"x": said() | {"shape": 6}}), "shape", SHAPE, "x"),
    "three places": (safe({"x": said(offsets=(0, 12, 24))}), "offsets", OFFSETS, "x"),
    "a name with dots": (safe({"../x": said()}), "name", r"an empty part, '\.', '\.\.' or a NUL", "../x"),
    "a name with a NUL": (safe({"x\0y": said()}), "name", r"an empty part, '\.', '\.\.' or a NUL", "x\0y"),
    "half a surrogate pair": (safe(b'{"\\ud800": %s}' % SAID), "name", "its name is not valid UTF-8", "\ud800"),
    "an empty name": (safe({"": said()}), "name", "an empty part", ""),
    "a long name": (safe({"y" * 1025: said()}), "name", "more than 1024 bytes", "y" * 60 + "..."),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_hostile_safetensors_is_refused(kind, tmp_path, parser, unread):
    data, code, reason, tensor = SAFETENSORS[kind]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    refused(path, parser, code, reason, tensor)


@pytest.mark.parametrize("suffix", [".safetensors", ""])  # without it, it is told by its contents
def test_legitimate_safetensors_is_read(suffix, tmp_path, parser):
    arrays = {
        "scalar": ("F32", np.float32(7)),
        "empty": ("F32", np.zeros((3, 0), "f4")),
        "bool": ("BOOL", BOOLS),
        "x": ("F32", WIDE),
        "brain": ("BF16", np.arange(5).astype(ml_dtypes.bfloat16)),
    }
    header, data = {"__metadata__": {"format": "pt", "streaming_polyak": '{"n": 3}'}}, b""
    for name, (code, array) in arrays.items():
        header[name] = said(code, array.shape, (len(data), len(data) + array.nbytes))
        data += array.tobytes()
    path = tmp_path / f"good{suffix}"
    path.write_bytes(safe(json.dumps(header).encode() + b"   ", data))
    equal(contents(path, parser), {name: array for name, (_, array) in arrays.items()})
    with open_checkpoint(path, parser) as table:
        assert table.provenance == {"n": 3}


# --- sharded stores -----------------------------------------------------------------------------------------------


def store(folder, weight_map, shards, text=None):
    """Makes a store; `shards` gives by number the groups that each has."""
    for number, groups in shards.items():
        with h5py.File(folder / f"a_{number:05}.weights.h5", "w") as file:
            for group in groups:
                file[f"{group}/0"] = DATA
    path = folder / "a.weights.json"
    path.write_bytes(text or json.dumps({"metadata": {}, "weight_map": weight_map}).encode())
    return path


ZERO, FIRST = "a_00000.weights.h5", "a_00001.weights.h5"
FOLDER = r"is not a \.weights\.h5 file in its own folder"
NUL, HALF, LONG_NAME = "\0.weights.h5", "\ud800.weights.h5", "y" * 300 + ".weights.h5"


@pytest.mark.parametrize(
    ("weight_map", "shards", "code", "reason", "file", "tensor"),
    [
        pytest.param({"/x": f"../{ZERO}"}, {0: "x"}, "sharded", FOLDER, None, None, id="another folder"),
        pytest.param({"/x": f"/tmp/{ZERO}"}, {0: "x"}, "sharded", FOLDER, None, None, id="an absolute path"),
        pytest.param({"/x": f"y/{ZERO}"}, {0: "x"}, "sharded", FOLDER, None, None, id="a folder below"),
        pytest.param({"/x": ".."}, {0: "x"}, "sharded", FOLDER, None, None, id="two dots"),
        pytest.param({"/x": "a.pkl"}, {0: "x"}, "sharded", FOLDER, None, None, id="another suffix"),
        pytest.param({"/x": 1}, {0: "x"}, "sharded", FOLDER, None, None, id="a number for a name"),
        pytest.param({"/x": {}}, {0: "x"}, "sharded", FOLDER, None, None, id="an object for a name"),
        pytest.param({"/x": NUL}, {}, "unreadable", "no file can have this name", NUL, None, id="a NUL in a name"),
        pytest.param({"/x": HALF}, {}, "unreadable", "no file can have this name", HALF, None, id="half a pair"),
        pytest.param({"/x": LONG_NAME}, {}, "unreadable", "File name too long", LONG_NAME, None, id="a long name"),
        pytest.param({"/x": ZERO}, {}, "missing", "there is no such file", ZERO, None, id="a missing shard"),
        pytest.param(
            {"/x": ZERO, "/y": FIRST}, {0: "x"}, "missing", "there is no such file", FIRST, None, id="a missing second"
        ),
        pytest.param(
            {"/x": [ZERO, FIRST]}, {0: "x", 1: "x"}, "sharded", "another shard has it too", FIRST, "x/0", id="in two"
        ),
        pytest.param({"/x": ZERO}, {0: "xy"}, "sharded", "does not list it", ZERO, "y/0", id="a tensor in no list"),
        pytest.param(
            {"/x": ZERO, "/y": ZERO}, {0: "x"}, "sharded", "no shard has anything of 'y'", None, None, id="in no shard"
        ),
        pytest.param([ZERO], {0: "x"}, "sharded", "it has no weight_map", None, None, id="a list for a map"),
        pytest.param(None, {0: "x"}, "sharded", "it has no weight_map", None, None, id="no map"),
    ],
)
def test_hostile_stores_are_refused(weight_map, shards, code, reason, file, tensor, tmp_path, parser, unread):
    path = store(tmp_path, weight_map, shards)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(path, parser)
    assert (caught.value.code, caught.value.tensor) == (code, tensor)
    assert caught.value.path == str(tmp_path / file if file else path)


@pytest.mark.parametrize(
    ("text", "code", "reason"),
    [
        pytest.param(b'{"weight_map": {"/x": "y", "/x": "z"}}', "json", "it has a key twice", id="a key twice"),
        pytest.param(b"[]", "sharded", "it has no weight_map", id="a list"),
        pytest.param(b"{", "json", "it is not valid JSON in UTF-8", id="no JSON"),
        pytest.param(b"\xff", "json", "it is not valid JSON in UTF-8", id="no UTF-8"),
        pytest.param(b"[" * 100_000, "json", "it is not valid JSON in UTF-8", id="nested too deep"),
        pytest.param(b" " * (9 << 20), "sharded", "it is unreasonably long", id="too long"),
    ],
)
def test_hostile_maps_of_stores_are_refused(text, code, reason, tmp_path, parser, unread):
    refused(store(tmp_path, {}, {0: "x"}, text), parser, code, reason)


def test_a_shard_with_a_link_is_refused(tmp_path, parser, unread):
    path = store(tmp_path, {"/x": ZERO}, {0: "x"})
    with h5py.File(tmp_path / ZERO, "a") as file:
        file["x/1"] = h5py.ExternalLink("/etc/passwd", "y")
    with pytest.raises(CheckpointError, match=r"a_00000\.weights\.h5, tensor 'x/1': it is a link") as caught:
        open_checkpoint(path, parser)
    assert caught.value.code == "external-link"


def test_a_legitimate_store_is_read(tmp_path, parser):
    path = store(tmp_path, {"/x": ZERO, "/y": [FIRST]}, {0: "x", 1: "y"})
    with h5py.File(tmp_path / FIRST, "a") as file:
        file["y/1"] = WIDE
        file.create_dataset("y/2", data=WIDE, chunks=(7, 9))
    equal(contents(path, parser), {"x/0": DATA, "y/0": DATA, "y/1": WIDE, "y/2": WIDE})


# --- any format ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".h5", ".weights.json", ".safetensors", ".npz", ""])
def test_what_is_no_regular_file_is_refused_without_waiting(suffix, tmp_path, parser):
    path = tmp_path / f"a{suffix}"
    refused(path, parser, "missing", "there is no such file")
    path.symlink_to(tmp_path / "nothing")
    refused(path, parser, "missing", "there is no such file")
    path.unlink()
    path.symlink_to(path)
    refused(path, parser, "unreadable", "it cannot be opened: Too many levels of symbolic links")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(path, parser, "not-a-file", "it is not a regular file")
    path.unlink()
    os.mkfifo(path)
    refused(path, parser, "not-a-file", "it is not a regular file")
    path.unlink()
    with contextlib.chdir(tmp_path), socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path.name)
    refused(path, parser, "unreadable", "it cannot be opened: No such device or address")
    path.unlink()
    path.mkdir()
    refused(path, parser, "folder", "it is a folder")
    with pytest.raises(CheckpointError, match="it is not a regular file"):
        Source(path)


@pytest.mark.parametrize(
    ("suffix", "code", "reason"),
    [
        (".keras", "zip", "it is too short for a zip archive"),
        (".weights.h5", "hdf5", "it is not an HDF5 file"),
        (".weights.json", "json", "it is not valid JSON"),
        (".safetensors", "safetensors", "it has 0 bytes"),
        (".npz", "zip", "it is too short for a zip archive"),
        ("", "empty", "it is empty"),
    ],
)
def test_an_empty_file_is_refused(suffix, code, reason, tmp_path, parser):
    path = tmp_path / f"a{suffix}"
    path.touch()
    refused(path, parser, code, reason)


@pytest.mark.parametrize("data", [b"hello", b"\x80\4\x95pickle", bytes(1000), b"%PDF-1.7", npy()], ids=repr)
def test_a_file_of_another_kind_is_refused(data, tmp_path, parser):
    path = tmp_path / "a"
    path.write_bytes(data)
    refused(path, parser, "unknown", "it is no checkpoint of a known format")


FORMATS = [".keras", ".weights.h5", ".npz", "-deflated.npz", ".safetensors"]


@pytest.fixture
def small(tmp_path, weights):
    """Makes a small legitimate file of a format."""

    def make(suffix):
        if suffix == ".weights.json":
            return store(tmp_path, {"/x": ZERO}, {0: "x"})
        path = tmp_path / f"small{suffix}"
        path.write_bytes({
            ".keras": keras(weights), ".weights.h5": weights, ".npz": zipped(Entry(), ANOTHER),
            "-deflated.npz": zipped(Entry(method=8), ANOTHER),
            ".safetensors": safe({"x": said(), "y": said(offsets=(24, 48))}, DATA.tobytes() * 2),
        }[suffix])  # fmt: skip
        return path

    return make


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_cut_off_at_any_byte_is_refused(suffix, small, parser):
    path = small(suffix)
    with open_checkpoint(path, parser) as table:
        assert table.tensors
    for size in reversed(range(path.stat().st_size)):
        os.truncate(path, size)
        with pytest.raises(CheckpointError):
            open_checkpoint(path, parser)


def test_an_hdf5_file_cut_off_is_refused_by_libhdf5_too(small, parser, monkeypatch):
    monkeypatch.setattr(hdf5, "check_superblock", lambda part: 0)
    path = small(".weights.h5")
    for size in reversed(range(0, path.stat().st_size, 61)):
        os.truncate(path, size)
        refused(path, parser, "hdf5", "libhdf5 cannot read it")


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".npz", ".safetensors", ".weights.json"])
def test_a_file_truncated_after_its_table_was_made_is_an_error(suffix, small, parser):
    path = small(suffix)
    with open_checkpoint(path, parser) as table:
        name, tensor = next(iter(table.tensors.items()))
        assert np.array_equal(table.read(name), DATA)
        os.truncate(table.sources[tensor.source].path, tensor.offset + 10)
        with pytest.raises(CheckpointError, match=r"the file ended at byte|it was written to or replaced") as caught:
            table.read(name)
        assert caught.value.code == ("changed" if suffix == ".weights.json" else "truncated")
        with pytest.raises(CheckpointError, match="it was written to or replaced while it was read") as caught:
            table.check_unchanged()
        assert caught.value.code == "changed"


def rewrite(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(4))


def lengthen(path, offset):
    os.truncate(path, path.stat().st_size + 1)


def replace(path, offset):
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").rename(path)


def remove(path, offset):
    path.unlink()


def make_a_folder(path, offset):
    path.unlink()
    path.mkdir()


def make_a_pipe(path, offset):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("suffix", [*FORMATS, ".weights.json"])
@pytest.mark.parametrize("change", [rewrite, lengthen, replace, remove, make_a_folder, make_a_pipe])
def test_a_file_changed_after_its_table_was_made_is_an_error(suffix, change, small, parser, monkeypatch):
    monkeypatch.setattr(source, "_TICK_NS", 20_000_000)
    with open_checkpoint(small(suffix), parser) as table:
        table.check_unchanged()
        tensor = table.tensors[next(iter(table.tensors))]
        change(table.sources[tensor.source].path, tensor.offset)
        with pytest.raises(CheckpointError, match=r"it was written to or replaced|it is gone") as caught:
            table.check_unchanged()
    assert caught.value.code == "changed"


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_an_hdf5_file_truncated_while_it_is_parsed_is_an_error(suffix, small, parser, monkeypatch):
    path, check = small(suffix), hdf5.check_superblock

    def then_truncate(part):
        begin = check(part)
        os.truncate(path, 800)
        return begin

    monkeypatch.setattr(hdf5, "check_superblock", then_truncate)
    refused(path, parser, "hdf5", "libhdf5 cannot read it")


@pytest.mark.parametrize("writes", [0, 1, 3])
def test_a_disk_that_fills_up_under_the_structure_is_told_as_a_full_disk(tmp_path, monkeypatch, writes):
    with h5py.File(tmp_path / "model.weights.h5", "w") as file:
        file["layers/dense/vars/0"] = np.zeros((3, 4), np.float32)
    calls = itertools.count()

    def pwrite(fd, data, offset):
        if next(calls) >= writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.pwrite(fd, data, offset)

    fake = types.SimpleNamespace(**{name: getattr(os, name) for name in dir(os)} | {"pwrite": pwrite})
    monkeypatch.setattr(hdf5_child, "os", fake)
    with (tmp_path / "model.weights.h5").open("rb") as source, (tmp_path / "new").open("w+b") as target:
        size = os.fstat(source.fileno()).st_size
        with pytest.raises(OSError, match="No space left on device") as failed:
            hdf5_child.skeleton(source.fileno(), 0, size, target.fileno(), 0, [], [])
    assert failed.value.errno == errno.ENOSPC
