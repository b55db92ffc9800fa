"""Checkpoints being written: where each tensor goes, and what stands around them.

A draft is made before the first tensor is averaged. It has the final sizes and places already, so that tensors are
written in any order, a tile at a time, by several threads. `finish` then adds what depends on the contents: checksums
and how the average was made. The structure - groups, attributes, configuration - is that of the newest input, or of a
template, copied byte for byte where it is not HDF5 metadata.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files.checksums import crc32, crc32_combine, crc32c
from streaming_polyak.files.disk import NewFile
from streaming_polyak.files.formats import archive, npz, safetensors
from streaming_polyak.files.formats.archive import NewMember
from streaming_polyak.files.formats.hdf5 import Hdf5Part, Parser
from streaming_polyak.files.formats.keras_archive import PROVENANCE_MEMBER, WEIGHTS, KerasArchive
from streaming_polyak.files.formats.sharded import SUFFIX, Shards, shard_names
from streaming_polyak.files.formats.tf_checkpoint import INDEX, PROVENANCE_PLACE, Bundle, data_names, index_bytes
from streaming_polyak.files.source import Source
from streaming_polyak.files.tensors import PROVENANCE, Tensor, TensorTable, is_optimizer

FORMATS = {
    ".keras": "keras",
    SUFFIX: "weights.json",
    ".weights.h5": "weights.h5",
    ".h5": "h5",
    ".safetensors": "safetensors",
    ".npz": "npz",
    INDEX: "tf_checkpoint",
}
GROUPS = ("weights.json", "tf_checkpoint")  # several files in one folder, of which one stands for all
_COPY_BYTES = 1 << 20
_UNALLOCATED_BYTES = 1 << 32  # Keras takes a larger dataset without stored data for an attack
_WRITE_SECONDS = 120.0

Digests = Mapping[str, int]
Optimizer = Literal["drop", "newest"]


@dataclass
class Draft:
    """A checkpoint that has its structure and room for its tensors.

    Args:
        places: every tensor of the new checkpoint that has to be written: where it goes; `source` counts `files`.
        files: the new files.
        finish: completes them, given the CRC-32 (or, if `castagnoli`, the CRC-32C) of each written tensor by name, and
            how the average was made.
        castagnoli: whether the format keeps CRC-32C.
    """

    places: dict[str, Tensor]
    files: list[NewFile]
    finish: Callable[[Digests, dict[str, Any]], None]
    castagnoli: bool = False

    def sync(self) -> None:
        """Waits until the disk has all that was written."""
        for file in self.files:
            file.sync()

    def close(self) -> None:
        """Closes the files."""
        for file in self.files:
            file.close()


@dataclass
class Plan:
    """What is to be written.

    Args:
        path: the temporary file, or the folder for formats of several files.
        output: the final name.
        format: a value of `FORMATS`, or "saved_model".
        structure: the newest input or the template.
        wanted: the tensors of the newest input that the new checkpoint has.
        optimizer: "drop" the optimizer's entries, or keep those of the "newest".
        provenance: how the average is made, with digests of the final length.
        parser: what HDF5 is read and written with.
    """

    path: Path
    output: Path
    format: str
    structure: TensorTable
    wanted: dict[str, Tensor]
    optimizer: Optimizer
    provenance: dict[str, Any]
    parser: Parser


def format_of(output: Path, newest: TensorTable) -> str:
    """Returns the format that a file name asks for.

    Raises:
        CheckpointError: none, or one that cannot be made of this input.
    """
    for suffix, format in FORMATS.items():
        if output.name.endswith(suffix):
            return format
    if newest.format in ("saved_model", "tf_checkpoint") and not output.suffix:
        return newest.format
    raise CheckpointError(
        "output-format",
        output,
        f"its name must end in {', '.join(FORMATS)}, or have no suffix where a TensorFlow checkpoint or a SavedModel "
        "is averaged.",
    )


def record(output: Path, format: str) -> Path:
    """Returns the file that stands for a checkpoint: the index of a TensorFlow checkpoint, else the file itself."""
    return output.with_name(output.name.removesuffix(".index") + ".index") if format == "tf_checkpoint" else output


def part_names(output: Path, format: str, structure: TensorTable) -> list[str]:
    """Returns the names that the other files of a new checkpoint may get, beside the one that stands for it."""
    if format == "weights.json":
        return [_shard_name(output, number) for number in range(len(structure.layout.parts))]
    if format == "tf_checkpoint":
        return [f"{output.name.removesuffix(INDEX)}{shard}" for shard in structure.layout.shards]
    return []


def old_parts(record: Path) -> list[str]:
    """Returns the names of the other files of an old checkpoint, from the file that stands for it.

    A damaged one names none, and none that could belong to something else.
    """
    suffix, names, pattern = (
        (INDEX, data_names, r"\.data-\d{5}-of-\d{5}") if record.name.endswith(INDEX)
        else (SUFFIX, shard_names, r"_\d{5}\.weights\.h5")
    )  # fmt: skip
    whole = re.compile(re.escape(record.name.removesuffix(suffix)) + pattern)
    try:
        return [name for name in names(Source(record)) if whole.fullmatch(name)]
    except CheckpointError:
        return []


def _shard_name(output: Path, number: int) -> str:
    return f"{output.name.removesuffix(SUFFIX)}_{number:05}.weights.h5"


def check_structure(format: str, output: Path, wanted: Mapping[str, Tensor], structure: TensorTable) -> None:
    """Checks that `structure` has what a file of this format needs besides tensors, and that it can hold those.

    Raises:
        CheckpointError: it has not; the message says what to give as a template.
    """
    layout = structure.layout
    in_keras, in_hdf5 = isinstance(layout, KerasArchive), isinstance(layout, Hdf5Part)
    # Keras tells its two layouts of HDF5 by the name of the file alone.
    of_new_layout = in_hdf5 and (structure.format != "h5" or structure.path.name.endswith(".weights.h5"))
    of_old_layout = in_hdf5 and (structure.format == "h5" or not structure.path.name.endswith(".weights.h5"))
    needs = {
        "keras": (in_keras, "a .keras file of the model"),
        "weights.h5": (in_keras or of_new_layout, "a .keras or .weights.h5 file of the model"),
        "h5": (of_old_layout, "an .h5 file of the model"),
        "weights.json": (isinstance(layout, Shards), "a .weights.json store of the model"),
        "tf_checkpoint": (structure.format == "tf_checkpoint", "a TensorFlow checkpoint of the model"),
        "saved_model": (structure.format == "saved_model", "a SavedModel folder of the model"),
    }
    fits, template = needs.get(format, (True, ""))
    if not fits:
        raise CheckpointError(
            "template",
            output,
            f"a file of this kind holds more than tensors, and {structure.path} ({structure.format}) does not have the "
            f"rest. Give {template} as the template.",
        )
    if format == "npz" and any(tensor.dtype == "bfloat16" for tensor in wanted.values()):
        raise CheckpointError("output-format", output, "npz cannot hold bfloat16. Use .safetensors.")


def begin(plan: Plan) -> Draft:
    """Makes the files of a draft, with room for the tensors.

    Raises:
        OSError: the disk refused.
    """
    makers: dict[str, Callable[[Plan], Draft]] = {
        "keras": _keras,
        "weights.h5": _hdf5,
        "h5": _hdf5,
        "weights.json": _sharded,
        "safetensors": _safetensors,
        "npz": _npz,
        "tf_checkpoint": _tf_checkpoint,
        "saved_model": _saved_model,
    }
    return makers[plan.format](plan)


def _keras(plan: Plan) -> Draft:
    structure: KerasArchive = plan.structure.layout
    file = NewFile(plan.path)
    members: list[NewMember] = []
    at = 0
    for old in structure.members.values():
        if old.name in (WEIGHTS, PROVENANCE_MEMBER):
            continue
        header = archive.local_header(old.name, old.size, old.crc32, old.modified, old.size >= 1 << 32)
        members.append(NewMember(old.name, at, old.size, old.crc32, old.modified, old.size >= 1 << 32))
        source, start, mapped = archive.in_place(structure.source, old)
        begin = file.write(header, at)
        at = _copy(source, start, old.size, file, begin)
        if _digest(file, begin, old.size, {}, {}) != old.crc32:
            raise plan.structure.refuse("damaged", f"member {old.name!r} does not have the CRC-32 that it declares.")
        if not mapped:
            source.close()
    # Room for metadata; whether the sizes take eight bytes has to be known before the size is.
    zip64 = sum(tensor.nbytes for tensor in plan.structure.tensors.values()) + (256 << 20) >= 1 << 32
    modified = structure.members[WEIGHTS].modified
    start = at + len(archive.local_header(WEIGHTS, 0, 0, modified, zip64))
    places, size = _skeleton(plan, structure.weights, file, start, keep_entries=True)

    def finish(digests: Digests, provenance: dict[str, Any]) -> None:
        crc = _digest(file, start, size, places, digests)
        file.write(archive.local_header(WEIGHTS, size, crc, modified, zip64), at)
        said = _said(provenance, indent=1)
        last = NewMember(PROVENANCE_MEMBER, start + size, len(said), crc32(said))
        everything = [*members, NewMember(WEIGHTS, at, size, crc, modified, zip64), last]
        end = file.write(
            archive.local_header(last.name, last.size, last.crc32, last.modified, False) + said, last.header
        )
        file.truncate(file.write(archive.directory(everything, end), end))

    return Draft(places, [file], finish)


def _hdf5(plan: Plan) -> Draft:
    layout = plan.structure.layout
    part = layout.weights if isinstance(layout, KerasArchive) else layout
    file = NewFile(plan.path)
    places, size = _skeleton(plan, part, file, 0)

    def finish(digests: Digests, provenance: dict[str, Any]) -> None:
        plan.parser.ask(
            plan.output, "annotate", [file.fd], _WRITE_SECONDS, at=0, size=size, text=_said(provenance).decode()
        )

    return Draft(places, [file], finish)


def _sharded(plan: Plan) -> Draft:
    structure: Shards = plan.structure.layout
    files: list[NewFile] = []
    places: dict[str, Tensor] = {}
    renamed: dict[str, str] = {}
    for name, part in structure.parts.items():
        renamed[name] = _shard_name(plan.output, len(files))
        file = NewFile(plan.path / renamed[name])
        found, _ = _skeleton(plan, part, file, 0, number=len(files))
        if not found and files:  # nothing in it but what is dropped; Keras opens the first one in any case
            file.close()
            file.path.unlink()
            del renamed[name]
            continue
        places |= found
        files.append(file)
    kept: dict[str, list[str]] = {}
    for group, names in structure.map["weight_map"].items():
        inside = {renamed[name] for name in ([names] if isinstance(names, str) else names) if name in renamed}
        holding = {
            Path(files[t.source].path).name for name, t in places.items() if name.rpartition("/")[0] == group.strip("/")
        }
        if inside & holding:
            kept[group] = sorted(inside & holding)

    def finish(digests: Digests, provenance: dict[str, Any]) -> None:
        metadata = {
            **structure.map.get("metadata", {}),
            "total_size": float(sum(tensor.nbytes for tensor in places.values())),
            PROVENANCE: provenance,
        }
        record = NewFile(plan.path / plan.output.name)
        files.append(record)
        record.write(json.dumps({"metadata": metadata, "weight_map": kept}, indent=4).encode(), 0)

    return Draft(places, files, finish)


def _safetensors(plan: Plan) -> Draft:
    kept = plan.structure.layout if plan.structure.format == "safetensors" else {}

    def header(provenance: dict[str, Any]) -> tuple[bytes, dict[str, Tensor]]:
        return safetensors.header(plan.wanted.values(), {**kept, PROVENANCE: _said(provenance).decode()})

    beginning, places = header(plan.provenance)
    file = NewFile(plan.path)
    file.truncate(len(beginning) + sum(tensor.nbytes for tensor in places.values()))

    def finish(digests: Digests, provenance: dict[str, Any]) -> None:
        said, _ = header(provenance)
        assert len(said) == len(beginning), "digests are of one length"
        file.write(said, 0)

    return Draft(places, [file], finish)


def _npz(plan: Plan) -> Draft:
    file = NewFile(plan.path)
    places: dict[str, Tensor] = {}
    headers: dict[str, tuple[int, bytes, bool]] = {}
    at = 0
    for name, tensor in plan.wanted.items():
        said = npz.header(tensor.dtype, tensor.shape)
        zip64 = len(said) + tensor.nbytes >= 1 << 32
        start = at + len(archive.local_header(f"{name}.npy", 0, 0, (0, 0x21), zip64))
        headers[name] = (at, said, zip64)
        places[name] = Tensor(name, tensor.dtype, tensor.shape, file.write(said, start), tensor.nbytes)
        at = start + len(said) + tensor.nbytes

    def finish(digests: Digests, provenance: dict[str, Any]) -> None:
        members = []
        for name, (header, said, zip64) in headers.items():
            crc = crc32_combine(crc32(said), digests[name], places[name].nbytes)
            member = NewMember(f"{name}.npy", header, len(said) + places[name].nbytes, crc, zip64=zip64)
            file.write(archive.local_header(member.name, member.size, crc, member.modified, zip64), header)
            members.append(member)
        file.truncate(file.write(archive.directory(members, at), at))

    return Draft(places, [file], finish)


def _tf_checkpoint(plan: Plan) -> Draft:
    return _bundle(plan, plan.path, plan.output.name.removesuffix(INDEX))


def _saved_model(plan: Plan) -> Draft:
    plan.path.mkdir()
    root = plan.structure.path
    for folder, folders, names in os.walk(root):
        below = Path(folder).relative_to(root)
        for name in folders:
            if (Path(folder) / name).is_symlink():
                raise plan.structure.refuse(
                    "folder", f"its folder {below / name} is a link. Average a copy without links."
                )
            (plan.path / below / name).mkdir()
        for name in names:
            # A fingerprint has a hash of the variables in it, which will be others; TensorFlow does without one.
            if below == Path("variables") or below / name == Path("fingerprint.pb"):
                continue
            source = Source(Path(folder) / name)
            file = NewFile(plan.path / below / name)
            _copy(source, 0, source.size, file, 0)
            file.close()
            source.check_unchanged()
    draft = _bundle(plan, plan.path / "variables", "variables")
    place = plan.path / PROVENANCE_PLACE

    def finish(digests: Digests, provenance: dict[str, Any]) -> None:
        draft.finish(digests, provenance)
        place.parent.mkdir(exist_ok=True)
        place.unlink(missing_ok=True)
        file = NewFile(place)
        draft.files.append(file)
        file.write(_said(provenance, indent=1), 0)

    return Draft(draft.places, draft.files, finish, castagnoli=True)


def _bundle(plan: Plan, folder: Path, prefix: str) -> Draft:
    """Copies the data files of a TensorFlow checkpoint but for the tensors that will be written."""
    table = plan.structure
    bundle: Bundle = table.layout
    places: dict[str, Tensor] = {}
    files: list[NewFile] = []
    zeroed: dict[str, int] = {}
    for number, source in enumerate(table.sources[1:], start=1):
        end = source.path.name.rpartition(".data-")[2]
        file = NewFile(folder / f"{prefix}.data-{end}")
        file.truncate(source.size)
        files.append(file)
        at = 0
        here = [tensor for tensor in table.tensors.values() if tensor.source == number and tensor.nbytes]
        for tensor in sorted(here, key=lambda t: t.offset or 0):
            assert tensor.offset is not None
            if is_reset(plan, tensor) and tensor.dtype != "string":
                zeroed[tensor.name] = _zeros_crc32c(tensor.nbytes)
            elif tensor.name in plan.wanted and tensor.dtype != "string":
                places[tensor.name] = replace(tensor, source=len(files) - 1)
            else:
                continue
            _copy(source, at, tensor.offset - at, file, at)
            at = tensor.offset + tensor.nbytes
        _copy(source, at, source.size - at, file, at)
        for tensor in table.tensors.values():
            if tensor.source == number and not tensor.nbytes and tensor.name in plan.wanted:
                places[tensor.name] = replace(tensor, source=len(files) - 1)

    def finish(digests: Digests, provenance: dict[str, Any]) -> None:
        record = NewFile(folder / f"{prefix}{INDEX}")
        files.append(record)
        record.write(index_bytes(bundle, {**digests, **zeroed}), 0)

    return Draft(places, files, finish, castagnoli=True)


def is_reset(plan: Plan, tensor: Tensor) -> bool:
    """Tells whether an optimizer's entry that readers insist on is set to what a new optimizer has.

    Slots and counters of steps are zeros then; single floats, such as the learning rate and the loss scale, stay.
    """
    single_float = tensor.size == 1 and "float" in tensor.dtype
    return plan.optimizer == "drop" and is_optimizer(tensor.name, plan.structure.format) and not single_float


def _skeleton(
    plan: Plan, part: Hdf5Part, file: NewFile, start: int, *, number: int = 0, keep_entries: bool = False
) -> tuple[dict[str, Tensor], int]:
    """Makes the groups and datasets of an HDF5 file in `file` from `start` on; returns places and size."""
    entries = [tensor for name, tensor in plan.structure.tensors.items() if is_optimizer(name, plan.structure.format)]
    group = "optimizer_weights" if plan.structure.format == "h5" else "optimizer"
    drop = [group] if plan.optimizer == "drop" and not keep_entries else []
    reset = {tensor.name for tensor in entries if is_reset(plan, tensor)} if keep_entries else set()
    hollow = {tensor.name for tensor in entries if tensor.offset is None}  # nothing stored for it before either
    unallocated = [t.name for t in entries if t.name in reset | hollow and t.nbytes <= _UNALLOCATED_BYTES]
    source = part.source.duplicate()
    try:
        answer = plan.parser.ask(
            plan.structure.path, "skeleton", [source, file.fd], _WRITE_SECONDS,
            offset=part.start, size=part.size, at=start, drop=drop, reset=unallocated,
        )  # fmt: skip
    except OSError as error:  # of writing; what is wrong with the file read is a CheckpointError
        error.filename = str(plan.output)
        raise
    finally:
        os.close(source)
    places = {}
    for name, dtype, _, shape, offset, nbytes in answer["tensors"]:
        if name in reset | hollow:
            continue
        places[name] = Tensor(name, dtype, tuple(shape), start + offset, nbytes, number)
    return places, answer["size"]


def _digest(file: NewFile, start: int, size: int, places: Mapping[str, Tensor], digests: Digests) -> int:
    """Returns the CRC-32 of a range of a file, using the known ones of the tensors in it and reading the rest."""
    crc, at = 0, start

    def read_to(end: int) -> None:
        nonlocal crc, at
        while at < end:
            data = file.read(at, min(_COPY_BYTES, end - at))
            crc, at = crc32(data, crc), at + len(data)

    for tensor in sorted(places.values(), key=lambda t: t.offset or 0):
        if tensor.name in digests and tensor.nbytes:
            assert tensor.offset is not None
            read_to(tensor.offset)
            crc, at = crc32_combine(crc, digests[tensor.name], tensor.nbytes), at + tensor.nbytes
    read_to(start + size)
    return crc


def _copy(source: Source, start: int, size: int, file: NewFile, at: int) -> int:
    """Copies a range of a source to a new file; returns the byte after it there."""
    for offset in range(start, start + size, _COPY_BYTES):
        at = file.write(source.read(offset, min(_COPY_BYTES, start + size - offset)), at)
    return at


def _zeros_crc32c(count: int) -> int:
    zeros, crc = bytes(_COPY_BYTES), 0
    for at in range(0, count, _COPY_BYTES):
        crc = crc32c(memoryview(zeros)[: min(_COPY_BYTES, count - at)], crc)
    return crc


def _said(provenance: dict[str, Any], indent: int | None = None) -> bytes:
    return json.dumps(provenance, indent=indent).encode("ascii")
