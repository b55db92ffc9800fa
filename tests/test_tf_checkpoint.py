"""TensorFlow's checkpoints, read without it and compared with what it says; hostile ones, built here by hand."""

import contextlib
import doctest
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files import checksums, source
from streaming_polyak.files.formats.tf_checkpoint import (
    check_strings,
    index_bytes,
    open_saved_model,
    open_tf_checkpoint,
)
from streaming_polyak.files.source import Source

DTYPES = [
    *("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64", "bool", "string"),
]
SHAPES = [(), (0,), (1,), (3, 5)]


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_clock():
    """A table of a file just written waits for the next tick of the clock; nothing here changes a file meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_TICK_NS", 0)
        yield


# An index by hand, as the docstring of the module says; TensorFlow reads it too (below).

MAGIC = bytes.fromhex("57fb808b247547db")


def crc(data):
    """A masked CRC-32C."""
    value = google_crc32c.value(data)
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def varint(value):
    value %= 1 << 64
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])


def field(number, value):
    """A field of a message: a whole number, bytes, or ("fixed32", bytes)."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3 | 5) + value[1]


def shape(*sizes):
    return b"".join(field(2, field(1, size)) for size in sizes)


PRODUCER = field(1, 1)
SHAPE = shape(2, 3)
CRC = ("fixed32", crc(bytes(24)))


def header(num_shards=1, endianness=0, version=PRODUCER):
    return field(1, num_shards) + field(2, endianness) + field(3, version)


def tensor(dtype=1, sizes=SHAPE, shard=0, offset=0, size=24, checksum=CRC, more=b""):
    values = [dtype, sizes, shard, offset, size, checksum]
    return b"".join(field(number, value) for number, value in enumerate(values, start=1) if value is not None) + more


def entry(key, value, common=0, further=None, size=None):
    further, size = len(key) if further is None else further, len(value) if size is None else size
    return varint(common) + varint(further) + varint(size) + key + value


def block(*entries, restarts=(0,), count=None):
    count = len(restarts) if count is None else count
    return b"".join(entries) + struct.pack(f"<{len(restarts) + 1}I", *restarts, count)


def sealed(contents, compression=0, trailer=None):
    contents += bytes([compression])
    return contents + (crc(contents) if trailer is None else trailer)


def table(blocks, *, index=None, between=b"", footer=None, magic=MAGIC, seal=sealed):
    """A table of (block, separator) pairs."""
    data, places = b"", []
    for contents, separator in blocks:
        places.append(entry(separator, varint(len(data)) + varint(len(contents))))
        data += seal(contents)
    data += between
    meta = varint(len(data)) + varint(8)
    data += sealed(block())
    index = block(*places) if index is None else index
    place = varint(len(data)) + varint(len(index))
    data += seal(index)
    return data + ((meta + place).ljust(40, b"\0") if footer is None else footer) + magic


def single(*entries, restarts=(0,), count=None, **options):
    """A table of one block."""
    return table([(block(*entries, restarts=restarts, count=count), b"z")], **options)


def pointing(*places, between=b""):
    """A table whose index block has these places."""
    return table([], index=block(*(entry(bytes([ord("a") + i]), p) for i, p in enumerate(places))), between=between)


def rows(*pairs, head=None):
    """A table of one block with the tensors (key, value) behind the header."""
    entries = [entry(b"", header() if head is None else head), *(entry(*pair) for pair in pairs)]
    return table([(block(*entries), max((pair[0] for pair in pairs), default=b"") + b"z")])


GOOD = rows((b"a", tensor()), (b"b", tensor(dtype=9, sizes=shape(), offset=24, size=8, checksum=None)))
HEADER = entry(b"", header())
A, B = entry(b"a", tensor()), entry(b"b", tensor(dtype=9, sizes=shape(), offset=24, size=8))


def write(folder, index, data=bytes(32), name="ckpt"):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / f"{name}.index").write_bytes(index)
    if data is not None:
        (folder / f"{name}.data-00000-of-00001").write_bytes(data)
    return folder / name


def test_an_index_built_by_hand_is_read(tmp_path):
    data = np.arange(6, dtype="<f4").tobytes() + struct.pack("<q", -7)
    with open_tf_checkpoint(write(tmp_path, GOOD, data)) as opened:
        assert (opened.path, opened.format) == (tmp_path / "ckpt", "tf_checkpoint")
        assert [source.path.name for source in opened.sources] == ["ckpt.index", "ckpt.data-00000-of-00001"]
        assert [t.describe() for t in opened.tensors.values()] == ["float32 (2, 3)", "int64 ()"]
        np.testing.assert_array_equal(opened.read("a"), [[0, 1, 2], [3, 4, 5]])
        assert opened.read("b") == -7
        assert opened.tensors["a"].crc32c == google_crc32c.value(bytes(24))
        assert opened.layout.prefix == tmp_path / "ckpt"
        assert opened.layout.header == header()
        assert [e.name for e in opened.layout.entries] == ["a", "b"]
        assert opened.layout.shards == (".data-00000-of-00001",)


def test_keys_in_several_blocks_and_with_common_beginnings_are_read(tmp_path):
    values = [tensor(sizes=shape(), offset=4 * i, size=4) for i in range(4)]
    first = block(HEADER, entry(b"layer/0", values[0]), entry(b"1", values[1], common=6))
    second = block(entry(b"layer/2", values[2]), entry(b"3", values[3], common=6), restarts=(0,))
    index = table([(first, b"layer/1x"), (second, b"m")])
    with open_tf_checkpoint(write(tmp_path, index)) as opened:
        assert {name: t.offset for name, t in opened.tensors.items()} == {f"layer/{i}": 4 * i for i in range(4)}


def test_a_big_endian_bundle_is_read_as_such(tmp_path):
    index = rows((b"a", tensor()), head=header(endianness=1))
    with open_tf_checkpoint(write(tmp_path, index, np.arange(6, dtype=">f4").tobytes())) as opened:
        assert opened.tensors["a"].big_endian
        np.testing.assert_array_equal(opened.read("a"), [[0, 1, 2], [3, 4, 5]])


def test_unknown_fields_are_skipped_and_kept(tmp_path):
    unknown = field(8, 5) + field(9, b"text") + field(10, ("fixed32", bytes(4))) + varint(11 << 3 | 1) + bytes(8)
    with open_tf_checkpoint(write(tmp_path, rows((b"a", tensor(more=unknown))))) as opened:
        assert opened.tensors["a"].shape == (2, 3)
        prefix = write(tmp_path / "new", index_bytes(opened.layout, {"a": 5}))
    with open_tf_checkpoint(prefix) as opened:
        assert unknown in opened.layout.entries[0].proto
        assert opened.tensors["a"].crc32c == 5


def test_data_files_without_a_tensor_need_not_be_there(tmp_path):
    index = rows((b"a", tensor(shard=3)), head=header(num_shards=5))
    prefix = write(tmp_path, index, data=None)
    (tmp_path / "ckpt.data-00003-of-00005").write_bytes(bytes(24))
    with open_tf_checkpoint(prefix) as opened:
        assert opened.layout.shards == (".data-00003-of-00005",)
        assert opened.sources[opened.tensors["a"].source].path.name == "ckpt.data-00003-of-00005"


def test_making_a_table_reads_the_index_only(tmp_path, monkeypatch):
    read, real = set(), Source.read_into
    monkeypatch.setattr(
        Source, "read_into", lambda self, *rest: read.add(self.path.name) or real(self, *rest), raising=True
    )
    prefix = write(tmp_path, GOOD)
    with open_tf_checkpoint(prefix) as opened:
        assert read == {"ckpt.index"}
        opened.read("a")
        assert read == {"ckpt.index", "ckpt.data-00000-of-00001"}


def test_the_module_needs_no_tensorflow(tmp_path):
    program = (
        "import sys, pathlib; from streaming_polyak.files.formats.tf_checkpoint import open_tf_checkpoint as o;"
        f"assert len(o(pathlib.Path({str(write(tmp_path, GOOD))!r})).tensors) == 2;"
        "assert not {'tensorflow', 'keras', 'google.protobuf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def bad_entry(**options):
    return rows((b"a", tensor(**options)))


ALONE = block(HEADER)
PLACE = varint(0) + varint(len(ALONE))

HOSTILE = {
    # the table
    "empty": (b"", "tf-index", r"it has 0 bytes; an index has 48 to"),
    "no-magic": (single(HEADER, magic=bytes(8)), "tf-index", "does not end with the magic number"),
    "cut": (GOOD[:-1], "tf-index", "does not end with the magic number"),
    "beginning-cut": (GOOD[1:], "tf-index", "do not lie one behind the other before the footer"),
    "footer-damaged": (single(HEADER, footer=b"\xff" * 40), "tf-index", "a number ends outside of it, or has more"),
    "footer-elsewhere": (single(HEADER, footer=varint(1 << 62) * 4 + bytes(4)), "tf-index", "do not lie one behind"),
    "something-between": (single(HEADER, between=b"x"), "tf-index", "something between its blocks"),
    "compressed": (single(HEADER, seal=lambda data: sealed(data, 1)), "tf-index", r"compressed \(type 1\)"),
    "wrong-crc": (single(HEADER, seal=lambda data: sealed(data, trailer=bytes(4))), "crc", "the CRC-32C it should"),
    "no-blocks": (pointing(), "tf-index", "has 1 restarts for 0 entries"),
    "empty-block": (single(), "tf-index", "has 1 restarts for 0 entries"),
    "tiny-block": (table([(bytes(4), b"z")]), "tf-index", "the block at byte 0 has 4 bytes"),
    "block-twice": (pointing(PLACE, PLACE, between=sealed(ALONE)), "tf-index", "at byte 0 should begin at byte"),
    "huge-block": (pointing(varint(0) + varint(1 << 40)), "tf-index", "block at byte 0 has 1099511627776 bytes"),
    "block-outside": (pointing(varint(0) + varint(10_000)), "truncated", "bytes 0 to 10005 are wanted"),
    "place-with-more": (pointing(PLACE + b"x", between=sealed(ALONE)), "tf-index", "at byte 0 should begin"),
    "place-cut": (pointing(varint(0)), "tf-index", "a number ends outside of it"),
    "many-restarts": (single(HEADER, count=1 << 30), "tf-index", "more than it has room for"),
    "no-restarts": (single(HEADER, restarts=()), "tf-index", "has 0 restarts for 1 entries"),
    "restart-elsewhere": (single(HEADER, A, restarts=(0, 5)), "tf-index", "has restarts where no entry"),
    "restart-not-first": (single(HEADER, A, restarts=(len(HEADER),)), "tf-index", "has restarts where no entry"),
    "restart-twice": (single(HEADER, A, restarts=(0, 0)), "tf-index", "has restarts where no entry"),
    "restart-in-a-key": (
        single(HEADER, A, entry(b"x", tensor(), common=1), B, restarts=(0, len(HEADER + A))),
        "tf-index", "has restarts where no entry with a whole key begins",
    ),
    "common-too-long": (single(HEADER, entry(b"a", tensor(), common=1)), "tf-index", "reaches outside of what there"),
    "key-too-long": (single(HEADER, entry(b"a", tensor(), further=1 << 60)), "tf-index", "reaches outside of what"),
    "value-too-long": (single(HEADER, entry(b"a", tensor(), size=1 << 60)), "tf-index", "reaches outside of what"),
    "entry-cut": (single(HEADER, b"\x80" * 5), "tf-index", "a number ends outside of it"),
    "number-of-65-bits": (single(HEADER, b"\xff" * 9 + b"\x02\0\0"), "tf-index", "or has more than 64 bits"),
    "number-of-11-bytes": (single(HEADER, b"\x80" * 10 + b"\0\0\0"), "tf-index", "or has more than 64 bits"),
    "enormous-key": (rows((b"a" * 5000, tensor())), "tf-index", "is unreasonably long"),
    "enormous-value": (rows((b"a", tensor(more=field(99, bytes(70_000))))), "tf-index", "is unreasonably long"),
    "keys-unordered": (single(HEADER, B, A), "tf-index", "the key b'a' does not come after b'b'"),
    "key-twice": (single(HEADER, A, A), "tf-index", "the key b'a' does not come after b'a'"),
    "blocks-unordered": (table([(block(HEADER, B), b"b"), (block(A), b"c")]), "tf-index", "not in the order that"),
    "key-in-two-blocks": (table([(block(HEADER, A), b"a"), (block(A), b"c")]), "tf-index", "not in the order that"),
    "separator-too-low": (table([(block(HEADER, B), b"a")]), "tf-index", "not in the order that its index gives"),
    "separators-unordered": (
        table([(block(HEADER, A), b"z"), (block(B), b"y")]), "tf-index", "the key b'y' does not come after b'z'",
    ),
    # the header
    "no-header": (single(A), "tf-index", "does not begin with the header of a bundle"),
    "header-empty": (rows(head=b""), "tf-header", "it has 0 data files and byte order 0"),
    "header-damaged": (rows(head=b"\x08"), "tf-header", "header of the bundle is damaged: a number ends outside of it"),
    "header-version-damaged": (rows(head=header(version=b"\x10")), "tf-header", "header of the bundle is damaged"),
    "many-shards": (rows(head=header(num_shards=10_001)), "tf-header", "it has 10001 data files"),
    "negative-shards": (rows(head=header(num_shards=-1)), "tf-header", "it has -1 data files"),
    "byte-order": (rows(head=header(endianness=2)), "tf-header", "byte order 2"),
    "newer": (rows(head=header(version=field(2, 9))), "tf-header", "needs a reader of version 9; this is 1"),
    # entries
    "name-not-text": (rows((b"\xff", tensor())), "name", r"the name b'\\xff' of a tensor is not UTF-8"),
    "name-with-dots": (rows((b"a/../b", tensor())), "name", "its name has an empty part"),
    "name-long": (rows((b"a" * 1025, tensor())), "name", "more than 1024 bytes"),
    "slice": (rows((b"\0a\0\1\1", tensor())), "slices", r"key b'\\x00a.*a partitioned variable, stored in slices"),
    "in-slices": (bad_entry(more=field(7, b"")), "slices", "tensor 'a': it is a partitioned variable"),
    "complex": (bad_entry(dtype=8), "dtype", "tensor 'a': its dtype complex64 is not one"),
    "variant": (bad_entry(dtype=21), "dtype", "its dtype variant is not one"),
    "float8": (bad_entry(dtype=24), "dtype", "its dtype float8_e5m2 is not one"),
    "no-dtype": (bad_entry(dtype=None), "dtype", "its dtype number 0 of TensorFlow is not one"),
    "future-dtype": (bad_entry(dtype=77), "dtype", "its dtype number 77 of TensorFlow is not one"),
    "unknown-rank": (bad_entry(sizes=field(3, 1)), "shape", "impossible, or not known"),
    "negative-size": (bad_entry(sizes=shape(-1, 6)), "shape", r"its shape \(-1, 6\) is impossible"),
    "high-rank": (bad_entry(sizes=shape(*[1] * 33)), "shape", "is impossible"),
    "enormous-shape": (bad_entry(sizes=shape(1 << 62, 1 << 62)), "shape", "is impossible"),
    "shard-outside": (bad_entry(shard=1), "tf-entry", "it is said to be in data file 1 of 1"),
    "shard-negative": (bad_entry(shard=-1), "tf-entry", "it is said to be in data file -1 of 1"),
    "bytes-negative": (bad_entry(size=-24), "size", "does not take -24 bytes"),
    "too-few-bytes": (bad_entry(size=20), "size", "takes 24 bytes, but 20 are stored"),
    "offset-negative": (bad_entry(offset=-1), "bounds", "bytes -1 to 23 are outside"),
    "outside": (bad_entry(offset=9), "bounds", "bytes 9 to 33 are outside of the 32 bytes"),
    "far-outside": (bad_entry(offset=(1 << 63) - 1), "bounds", "are outside of the 32 bytes"),
    "overlap": (rows((b"a", tensor()), (b"b", tensor(offset=8))), "overlap", "overlap those of 'b'"),
    "strings-short": (bad_entry(dtype=7, size=9), "size", r"string \(2, 3\) does not take 9 bytes"),
    "strings-negative": (bad_entry(dtype=7, sizes=shape(), size=-8), "size", r"string \(\) does not take -8 bytes"),
    "strings-outside": (bad_entry(dtype=7, sizes=shape(), size=99), "bounds", "are outside of the 32 bytes"),
    "strings-many": (bad_entry(dtype=7, sizes=shape(1 << 50)), "size", "does not take 24 bytes"),
    # messages
    "field-twice": (bad_entry(more=field(5, 24)), "tf-entry", "field 5 is there 2 times"),
    "wrong-wire-type": (bad_entry(checksum=5), "tf-entry", "field 6 has wire type 0, expected 5"),
    "field-zero": (bad_entry(more=field(0, 1)), "tf-entry", "a field of number 0"),
    "field-enormous": (bad_entry(more=field(1 << 30, 1)), "tf-entry", "a field of number 1073741824"),
    "group": (bad_entry(more=varint(9 << 3 | 3)), "tf-entry", "field 9 has the unknown wire type 3"),
    "wire-type-seven": (bad_entry(more=varint(9 << 3 | 7)), "tf-entry", "field 9 has the unknown wire type 7"),
    "bytes-without-end": (bad_entry(more=varint(9 << 3 | 2) + varint(9) + b"x"), "tf-entry", "field 9 ends outside"),
    "fixed32-without-end": (bad_entry(more=varint(9 << 3 | 5) + b"xyz"), "tf-entry", "field 9 ends outside of it"),
    "fixed64-without-end": (bad_entry(more=varint(9 << 3 | 1) + b"xyz"), "tf-entry", "field 9 ends outside of it"),
    "tag-without-value": (bad_entry(more=varint(9 << 3)), "tf-entry", "a number ends outside of it"),
    "damaged-shape": (bad_entry(sizes=b"\x12\x05"), "tf-entry", "field 2 ends outside of it"),
    "damaged-dim": (bad_entry(sizes=field(2, b"\x08")), "tf-entry", "a number ends outside of it"),
}  # fmt: skip


@pytest.mark.parametrize(("index", "code", "match"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_index_is_refused(tmp_path, index, code, match):
    prefix = write(tmp_path, index)
    with pytest.raises(CheckpointError, match=match) as caught:
        open_tf_checkpoint(prefix)
    assert caught.value.code == code
    assert caught.value.path.startswith(str(prefix))


def test_an_enormous_index_is_refused_unread(tmp_path):
    prefix = write(tmp_path, GOOD)
    with open(f"{prefix}.index", "r+b") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(CheckpointError, match="it has 268435457 bytes") as caught:
        open_tf_checkpoint(prefix)
    assert caught.value.code == "tf-index"


def test_too_many_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("streaming_polyak.files.formats.tf_checkpoint.MAX_TENSORS", 1)
    with pytest.raises(CheckpointError, match="more than 1 tensors") as caught:
        open_tf_checkpoint(write(tmp_path, GOOD))
    assert caught.value.code == "too-many"


def test_a_missing_index_or_data_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"ckpt\.index: there is no such file"):
        open_tf_checkpoint(tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match=r"ckpt\.data-00000-of-00001: there is no such file") as caught:
        open_tf_checkpoint(write(tmp_path, GOOD, data=None))
    assert caught.value.code == "missing"


def test_a_truncated_data_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="tensor 'b': bytes 24 to 32 are outside of the 31 bytes") as caught:
        open_tf_checkpoint(write(tmp_path, GOOD, bytes(31)))
    assert caught.value.code == "bounds"


def test_a_folder_must_be_a_saved_model(tmp_path):
    folder = tmp_path / "export"
    write(folder / "variables", GOOD, name="variables")
    with pytest.raises(CheckpointError, match=r"neither a SavedModel .* nor a checkpoint.*give the prefix") as caught:
        open_saved_model(folder)
    assert (caught.value.code, caught.value.path) == ("folder", str(folder))
    (folder / "saved_model.pb").touch()
    with open_saved_model(folder) as opened:
        assert (opened.path, opened.format, sorted(opened.tensors)) == (folder, "saved_model", ["a", "b"])


@given(at=st.integers(0, len(GOOD) - 1), flipped=st.integers(1, 255))
def test_an_index_with_a_changed_byte_is_refused_or_means_the_same(tmp_path_factory, at, flipped):
    folder = tmp_path_factory.getbasetemp() / "changed"
    with open_tf_checkpoint(write(folder, GOOD)) as opened:
        expected = opened.tensors
    prefix = write(folder, GOOD[:at] + bytes([GOOD[at] ^ flipped]) + GOOD[at + 1 :])
    with contextlib.suppress(CheckpointError), open_tf_checkpoint(prefix) as opened:
        assert opened.tensors == expected


@given(
    st.one_of(
        st.binary(max_size=60).map(lambda value: rows((b"a", value))),
        st.binary(max_size=60).map(lambda value: rows((b"a", tensor(sizes=value)))),
        st.binary(max_size=60).map(lambda value: rows(head=value)),
        st.binary(max_size=80).map(lambda value: single(HEADER, value)),
        st.binary(max_size=80).map(lambda value: pointing(value)),
    )
)
def test_whatever_stands_in_an_index_there_is_a_table_or_a_reason(tmp_path_factory, index):
    prefix = write(tmp_path_factory.getbasetemp() / "any", index)
    with contextlib.suppress(CheckpointError):
        open_tf_checkpoint(prefix).close()


def test_an_index_written_again_means_the_same_but_for_the_checksums(tmp_path):
    names = [f"layer_{i % 7}/kernel_{i:04}".encode() for i in range(700)]
    values = [tensor(sizes=shape(), offset=4 * i, size=4) for i in range(700)]
    index = rows(*sorted(zip(names, values, strict=True)))
    with open_tf_checkpoint(write(tmp_path, index, bytes(2800))) as old:
        written = index_bytes(old.layout, {"layer_3/kernel_0003": 0, "layer_0/kernel_0693": 0xFFFFFFFF})
    assert len(written) < len(index)  # keys with a common beginning take less
    with open_tf_checkpoint(write(tmp_path / "new", written, bytes(2800))) as new:
        assert list(new.tensors) == list(old.tensors)
        changed = {name for name in old.tensors if old.tensors[name] != new.tensors[name]}
        assert changed == {"layer_3/kernel_0003", "layer_0/kernel_0693"}
        assert new.tensors["layer_3/kernel_0003"].crc32c == 0
        assert new.tensors["layer_0/kernel_0693"].crc32c == 0xFFFFFFFF
        assert new.layout.header == old.layout.header


@pytest.mark.parametrize("name", ["c", "text"])
def test_only_checksums_of_tensors_of_numbers_are_replaced(tmp_path, name):
    index = rows((b"a", tensor()), (b"text", tensor(dtype=7, sizes=shape(), offset=24, size=8)))
    message = f"'{name}' is not a tensor of numbers in .*ckpt; strings keep"
    with open_tf_checkpoint(write(tmp_path, index)) as opened, pytest.raises(ValueError, match=message):
        index_bytes(opened.layout, {name: 1})


# Checksums


@given(first=st.binary(), second=st.binary())
def test_combined_checksums_are_those_of_the_concatenation(first, second):
    for plain, combine in (
        (checksums.crc32, checksums.crc32_combine),
        (checksums.crc32c, checksums.crc32c_combine),
    ):
        whole = plain(first + second)
        assert plain(second, plain(first)) == whole
        assert combine(plain(first), plain(second), len(second)) == whole


@given(first=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(0, 2**50), min_size=2, max_size=2))
def test_checksums_of_ranges_too_large_to_try_combine_in_either_order(first, sizes):
    for combine in (checksums.crc32_combine, checksums.crc32c_combine):
        one_by_one = combine(combine(first, 0, sizes[0]), 0, sizes[1])
        assert one_by_one == combine(first, 0, sum(sizes))


def test_checksums_are_the_published_ones():
    assert checksums.crc32(b"123456789") == 0xCBF43926
    assert checksums.crc32c(b"123456789") == 0xE3069283
    assert checksums.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


@pytest.mark.parametrize(
    "kind", [bytes, bytearray, lambda b: memoryview(bytearray(b)), lambda b: np.frombuffer(b, "<f4")]
)
def test_checksums_take_any_contiguous_memory(kind):
    data = np.random.default_rng(0).bytes(4096)
    assert checksums.crc32c(kind(data)) == google_crc32c.value(data)
    assert checksums.crc32(kind(data)) == checksums.crc32(data)


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(checksums) == (0, 1)


def test_a_range_has_no_negative_size():
    with pytest.raises(ValueError, match="second_size must not be negative, got -1"):
        checksums.crc32c_combine(1, 2, -1)


@given(st.integers(0, 2**32 - 1))
def test_masking_can_be_undone(value):
    assert checksums.unmask_crc32c(checksums.mask_crc32c(value)) == value


# Against TensorFlow


def network(tf, seed):
    keras = tf.keras
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(8, name="hidden"), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(3)])
    model.compile(keras.optimizers.Adam(), "mse")
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(seed)
    for variable in [*model.weights, *model.optimizer.variables]:
        if "float" in variable.dtype:
            variable.assign(rng.random(variable.shape))
    return model


def assorted(tf):
    found = {}
    for dtype in DTYPES:
        for i, size in enumerate(SHAPES):
            values = np.arange(np.prod(size, dtype=int)).reshape(size)
            cast = values.astype(str) if dtype == "string" else tf.as_dtype(dtype).as_numpy_dtype(values)
            found[f"{dtype}_{i}"] = tf.constant(cast, dtype=dtype, shape=size)
    return found


def save(tf, prefix, values, slices=None):
    names = list(values)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=names,
        shape_and_slices=slices or [""] * len(names),
        tensors=list(values.values()),
    )
    return prefix


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


@pytest.fixture(scope="module")
def written(tf, tmp_path_factory):
    """Prefixes of checkpoints that TensorFlow wrote, by kind."""
    folder = tmp_path_factory.mktemp("written")
    model = network(tf, 0)
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(folder / "keras"))
    model.export(str(folder / "export"), verbose=False)
    save(tf, folder / "dtypes", assorted(tf))
    names = [f"{i * 7919 % 5000:04}/" + "x" * (i % 80 + 1) for i in range(5000)]
    save(tf, folder / "many", dict(zip(names, tf.unstack(tf.range(5000)), strict=True)))
    save(tf, folder / "first", {"a": tf.range(3), "c": tf.range(4.0)})
    save(tf, folder / "second", {"b": tf.range(5)})
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(folder / "first"), str(folder / "second")], destination_prefix=str(folder / "merged")
    )
    return {kind: folder / kind for kind in ("keras", "dtypes", "many", "merged")} | {
        "export": folder / "export/variables/variables"
    }


KINDS = ["keras", "export", "dtypes", "many", "merged"]
TF = pytest.mark.tensorflow


@TF
@pytest.mark.parametrize("kind", KINDS)
def test_the_table_says_what_tensorflow_says(tf, written, kind):
    reader = tf.train.load_checkpoint(str(written[kind]))
    dtypes = reader.get_variable_to_dtype_map()
    names = {name: (dtypes[name].name, tuple(size)) for name, size in tf.train.list_variables(str(written[kind]))}
    assert len(names) >= 3
    with open_tf_checkpoint(written[kind]) as opened:
        assert {t.name: (t.dtype, t.shape) for t in opened.tensors.values()} == names
        for name, tensor in opened.tensors.items():
            if tensor.dtype == "string":
                continue
            got, expected = opened.read(name), np.asarray(reader.get_tensor(name))
            assert (got.dtype, got.shape, got.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
            assert tensor.crc32c == google_crc32c.value(expected.tobytes())
        assert check_strings(opened) == sum(tensor.dtype == "string" for tensor in opened.tensors.values())


@TF
def test_every_flipped_bit_in_strings_is_refused(tf, tmp_path):
    texts = {"one": "streaming", "many": ["", "a", "b" * 300], "none": np.zeros((0,), str)}
    tf.train.Checkpoint(**{name: tf.Variable(text, dtype=tf.string) for name, text in texts.items()}).write(
        str(tmp_path / "ckpt")
    )
    with open_tf_checkpoint(tmp_path / "ckpt") as opened:
        assert check_strings(opened) == 4  # the object graph too
        tensors = [tensor for tensor in opened.tensors.values() if tensor.name != "_CHECKPOINTABLE_OBJECT_GRAPH"]
        places = [k for t in tensors for k in range(t.offset, t.offset + t.nbytes)]
    assert len(places) > 300
    data = tmp_path / "ckpt.data-00000-of-00001"
    whole = bytearray(data.read_bytes())
    for place in places:
        for bit in range(8):
            whole[place] ^= 1 << bit
            data.write_bytes(whole)
            with open_tf_checkpoint(tmp_path / "ckpt") as opened, pytest.raises(CheckpointError) as refused:
                check_strings(opened)
            assert refused.value.code == "damaged"
            whole[place] ^= 1 << bit


@TF
def test_the_kinds_that_tensorflow_wrote_are_what_they_are_meant_to_be(written):
    with open_tf_checkpoint(written["merged"]) as opened:
        assert opened.layout.shards == (".data-00000-of-00002", ".data-00001-of-00002")
        assert [t.source for t in opened.tensors.values()] == [1, 2, 1]
    with open_tf_checkpoint(written["dtypes"]) as opened:
        assert len(opened.tensors) == len(DTYPES) * len(SHAPES)
    with open_saved_model(written["export"].parent.parent) as opened:
        assert opened.format == "saved_model"
    # more than 256 KiB, which is when TensorFlow begins another block
    assert Path(f"{written['many']}.index").stat().st_size > (256 << 10) + 4096


@TF
@pytest.mark.parametrize("kind", KINDS)
def test_tensorflow_reads_patched_tensors_by_the_index_written_for_them(tf, written, kind, tmp_path):
    prefix = patched(written[kind], tmp_path / "patched")
    old, new = tf.train.load_checkpoint(str(written[kind])), tf.train.load_checkpoint(str(prefix))
    with open_tf_checkpoint(written[kind]) as opened:
        assert new.get_variable_to_shape_map() == old.get_variable_to_shape_map()
        for name, tensor in opened.tensors.items():
            before, after = np.asarray(old.get_tensor(name)), np.asarray(new.get_tensor(name))
            if tensor.dtype in ("string", "bool"):
                np.testing.assert_array_equal(after, before)
            else:
                assert after.tobytes() == (before + 1).astype(before.dtype).tobytes()


@TF
def test_tensorflow_refuses_a_tensor_whose_checksum_is_wrong(tf, written, tmp_path):
    prefix = patched(written["keras"], tmp_path / "patched", off_by=1)
    name = "optimizer/_iterations/.ATTRIBUTES/VARIABLE_VALUE"
    assert tf.train.load_checkpoint(str(patched(written["keras"], tmp_path / "good"))).get_tensor(name) == 1
    with pytest.raises(tf.errors.OpError, match="Checksum does not match"):
        tf.train.load_checkpoint(str(prefix)).get_tensor(name)


@TF
def test_a_patched_checkpoint_is_restored_into_a_model(tf, written, tmp_path):
    prefix = patched(written["keras"], tmp_path / "patched")
    expected, model = network(tf, 0), network(tf, 1)
    assert not np.allclose(model.weights[0], expected.weights[0] + 1)
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).read(str(prefix)).assert_consumed()
    for got, before in zip(model.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(got, (before.numpy() + 1).astype(before.dtype))


@TF
def test_a_patched_saved_model_is_loaded(tf, written, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(written["export"].parent.parent, folder)
    shutil.rmtree(folder / "variables")
    patched(written["export"], folder / "variables" / "variables")
    x = np.ones((2, 4), np.float32)
    loaded, expected = tf.saved_model.load(str(folder)), network(tf, 0)
    before = expected(x).numpy()
    for variable in expected.weights:
        variable.assign((variable.numpy() + 1).astype(variable.dtype))
    assert not np.allclose(expected(x), before)
    np.testing.assert_allclose(loaded.serve(x), expected(x), rtol=1e-5)  # two compilations of the same sums


@TF
def test_tensorflow_reads_the_index_built_by_hand(tf, tmp_path):
    reader = tf.train.load_checkpoint(str(write(tmp_path, GOOD)))
    np.testing.assert_array_equal(reader.get_tensor("a"), np.zeros((2, 3)))


@TF
@pytest.mark.parametrize(
    ("dtype", "slices", "code", "match"),
    [
        ("complex64", "", "dtype", "tensor 'a': its dtype complex64 is not one"),
        ("float32", "4 0,2", "slices", "a partitioned variable, stored in slices"),
    ],
)
def test_what_tensorflow_can_write_and_is_not_read_here_is_refused(tf, tmp_path, dtype, slices, code, match):
    prefix = save(tf, tmp_path / "ckpt", {"a": tf.zeros(2, dtype)}, [slices])
    with pytest.raises(CheckpointError, match=match) as caught:
        open_tf_checkpoint(prefix)
    assert caught.value.code == code


def patched(prefix, target, off_by=0):
    """Copies a bundle with one added to every number of it; `off_by` is added to the checksums."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_tf_checkpoint(prefix) as opened:
        crcs = {}
        data = {n: bytearray(source.path.read_bytes()) for n, source in enumerate(opened.sources) if n}
        for tensor in opened.tensors.values():
            if tensor.dtype in ("string", "bool"):
                continue
            values = opened.read(tensor.name)
            new = (values + np.ones((), values.dtype)).astype(values.dtype).tobytes()
            data[tensor.source][tensor.offset : tensor.offset + tensor.nbytes] = new
            crcs[tensor.name] = checksums.crc32c(new) + off_by
        for n, shard in enumerate(opened.layout.shards, start=1):
            Path(f"{target}{shard}").write_bytes(data[n])
        Path(f"{target}.index").write_bytes(index_bytes(opened.layout, crcs))
    return target
