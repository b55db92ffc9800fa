"""What a checkpoint holds: a table of named tensors, validated from metadata alone, then read in place by byte ranges.

A `TensorTable` says for each tensor its dtype, shape and where its bytes stand: (file, offset, nbytes). Making one
reads no tensor data; `validate` refuses whatever points outside of its file or overlaps.
"""

from __future__ import annotations

import itertools
import json
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files.source import Source

PROVENANCE = "streaming_polyak"

MAX_RANK = 32
MAX_TENSORS = 100_000
_MAX_NAME_BYTES = 1024
_MAX_BYTES = 2**63 - 1  # what a file offset holds
_MAX_HOLLOW = 8  # a slot of an optimizer has up to eight bytes where its weight has one

DTYPES: dict[str, np.dtype[Any]] = {
    **{name: np.dtype(name) for name in ("float16", "float32", "float64", "bool")},
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where the data of one tensor stand.

    Args:
        name: unique in its table, such as "layers/dense/vars/0".
        dtype: a key of `DTYPES`, or "string" (which is only ever copied as it is).
        shape: of the tensor.
        offset: of its first byte in its source; `None` if nothing is stored for it (then all of it is zeros).
        nbytes: how many bytes.
        source: number of its source in the table.
        big_endian: the byte order of the stored data.
        mapped: whether the bytes are read where the file has them; false for what had to be unpacked first.
        crc32c: CRC-32C of the bytes, where the format keeps one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int | None
    nbytes: int
    source: int = 0
    big_endian: bool = False
    mapped: bool = True
    crc32c: int | None = None

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of the stored data, byte order included."""
        dtype = DTYPES[self.dtype]
        return dtype.newbyteorder(">") if self.big_endian else dtype

    def describe(self) -> str:
        """Returns dtype and shape for messages, as "float32 (3, 4)"."""
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True, slots=True)
class Checksum:
    """A CRC-32 that a format keeps over a range of a source."""

    source: int
    start: int
    size: int
    crc32: int
    what: str


@dataclass
class TensorTable:
    """All tensors of one checkpoint, by name.

    Args:
        path: the checkpoint as the user named it.
        format: "keras", "weights.h5", "h5" (Keras' legacy format), "weights.json", "safetensors", "npz",
            "tf_checkpoint" or "saved_model".
        sources: the files the data stand in.
        tensors: by name.
        checksums: over ranges of the sources.
        layout: what the module of the format needs to write another file of the same structure.
        provenance: what an average says of its making, if this is one.
    """

    path: Path
    format: str
    sources: list[Source]
    tensors: dict[str, Tensor]
    checksums: tuple[Checksum, ...] = ()
    layout: Any = None
    provenance: dict[str, Any] | None = None

    def __enter__(self) -> TensorTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        for source in self.sources:
            source.close()

    def validate(self) -> TensorTable:
        """Checks names, dtypes, sizes, and that all data lie in their files without overlapping; returns the table.

        Raises:
            CheckpointError: something is not so; no data have been read.
        """
        if len(self.tensors) > MAX_TENSORS:
            raise self.refuse("too-many", f"it has {len(self.tensors)} tensors, more than {MAX_TENSORS}.")
        seen: set[str] = set()
        ranges: list[tuple[int, int, int, str]] = []
        for name, tensor in self.tensors.items():
            self._check_name(name, seen)
            if tensor.dtype != "string":
                if tensor.dtype not in DTYPES:
                    raise self.refuse("dtype", f"its dtype {tensor.dtype} is not one that is averaged or copied.", name)
                if not is_possible(tensor.shape, DTYPES[tensor.dtype].itemsize):
                    raise self.refuse("shape", f"its shape {tensor.shape} is impossible.", name)
                expected = tensor.size * DTYPES[tensor.dtype].itemsize
                if tensor.nbytes != expected:
                    raise self.refuse(
                        "size", f"{tensor.describe()} takes {expected} bytes, but {tensor.nbytes} are stored.", name
                    )
            if tensor.offset is None:
                if not is_optimizer(name, self.format):
                    raise self.refuse("no-data", "no stored data: it was declared and never written.", name)
                stored = sum(source.size for source in self.sources)
                if tensor.nbytes > _MAX_HOLLOW * stored:
                    raise self.refuse(
                        "expansion", f"{tensor.nbytes} bytes are declared, none stored, in {stored} bytes in all.", name
                    )
                continue
            end = tensor.offset + tensor.nbytes
            if tensor.offset < 0 or tensor.nbytes < 0 or end > self.sources[tensor.source].size:
                raise self.refuse(
                    "bounds",
                    f"bytes {tensor.offset} to {end} are outside of the {self.sources[tensor.source].size} bytes there "
                    "are.",
                    name,
                )
            if tensor.nbytes:
                ranges.append((tensor.source, tensor.offset, end, name))
        ranges.sort()
        for (source, _, end, name), (next_source, start, _, next_name) in itertools.pairwise(ranges):
            if source == next_source and start < end:
                raise self.refuse("overlap", f"its data overlap those of {next_name!r}.", name)
        return self

    def refuse(self, code: str, reason: str, tensor: str | None = None) -> CheckpointError:
        """Returns the error that refuses this file."""
        return CheckpointError(code, self.path, reason, tensor=tensor)

    def read(self, name: str) -> NDArray[Any]:
        """Returns one tensor as a new array of shape and dtype of the tensor, native byte order."""
        tensor = self.tensors[name]
        dtype = DTYPES[tensor.dtype]
        if tensor.offset is None:
            return np.zeros(tensor.shape, dtype)
        stored = np.empty(tensor.size, tensor.stored_dtype)
        if tensor.nbytes:
            self.sources[tensor.source].read_into(stored.view(np.uint8).data, tensor.offset)
        return stored.astype(dtype, copy=False).reshape(tensor.shape)

    def check_crc32c(self, name: str, got: int, wanted: int | None = None) -> None:
        """Checks the CRC-32C of the bytes of a tensor, where the format keeps one.

        Args:
            name: of the tensor.
            got: of what was read.
            wanted: what the format says; `None` for what the table has.

        Raises:
            CheckpointError: they differ.
        """
        wanted = self.tensors[name].crc32c if wanted is None else wanted
        if wanted is not None and got != wanted:
            raise self.refuse(
                "damaged",
                f"its CRC-32C is {got:08x}, not {wanted:08x} as the index says: the file is damaged.",
                name,
            )

    def check_unchanged(self) -> None:
        """Checks that nobody wrote to any file of the checkpoint since the table was made."""
        for source in self.sources:
            source.check_unchanged()

    def _check_name(self, name: str, seen: set[str]) -> None:
        parts = name.split("/")
        if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise self.refuse("name", "its name has an empty part, '.', '..' or a NUL character in it.", name)
        try:
            encoded = name.encode()
        except UnicodeEncodeError:
            raise self.refuse("name", "its name is not valid UTF-8.", name) from None
        if len(encoded) > _MAX_NAME_BYTES:
            raise self.refuse("name", f"its name has more than {_MAX_NAME_BYTES} bytes.", name[:60] + "...")
        normal = unicodedata.normalize("NFC", name)
        if normal in seen:
            raise self.refuse("name", "its name stands there twice.", name)
        seen.add(normal)


def is_possible(shape: tuple[int, ...], itemsize: int) -> bool:
    """Tells whether NumPy can have an array of this shape, empty ones with a huge other dimension left out too."""
    if len(shape) > MAX_RANK or any(not 0 <= size <= _MAX_BYTES for size in shape):
        return False
    return math.prod(size or 1 for size in shape) * itemsize <= _MAX_BYTES


def is_optimizer(name: str, format: str) -> bool:
    """Tells whether a tensor belongs to the optimizer, not to the model.

    In TensorFlow's checkpoints Keras 3 keeps a model's trainable weights under "optimizer/_trainable_variables"; their
    names stay the same when an average of them is written in another format.
    """
    parts = name.split("/")
    if format in ("tf_checkpoint", "saved_model") or name.endswith("/.ATTRIBUTES/VARIABLE_VALUE"):
        if ".OPTIMIZER_SLOT" in parts:
            return True
        for part, following in itertools.pairwise(parts):
            if part in ("optimizer", "_optimizer"):
                return following != "_trainable_variables"
        return False
    if format in ("keras", "weights.h5", "weights.json"):
        return parts[0] == "optimizer"
    return parts[0] == "optimizer_weights" or (parts[0] == "optimizer" and format != "h5")


def read_json(source: Source, data: bytes, what: str) -> Any:
    """Reads JSON that must have no key twice; `what` is for the message."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise CheckpointError("json", source.path, f"{what} has a key twice.")
        return found

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError("json", source.path, f"{what} is not valid JSON in UTF-8: {error}.") from None


def read_provenance(path: Path, text: str | bytes | None) -> dict[str, Any] | None:
    """Returns what an average says of its making; `None` if there is nothing.

    Raises:
        CheckpointError: it is not readable, so bits of it, and perhaps others, have been flipped.
    """
    if not text:
        return None
    try:
        said = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise CheckpointError(
            "provenance", path, "what it says of its making as an average is not readable: the file is damaged."
        )
    return said


def printable(text: str) -> str:
    """Returns a text with backslash escapes for what is not printed as a character: control characters, line ends."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def without_nan(value: Any) -> Any:
    """Returns JSON values with `None` for NaN and infinity, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def differences(expected: TensorTable, got: TensorTable, names: Mapping[str, Any]) -> list[str]:
    """Returns in words, a line a tensor, in what the tensors of two checkpoints differ."""
    lines = []
    for name in names:
        if name not in got.tensors:
            lines.append(f"  {printable(name)}: missing in {got.path}")
        elif got.tensors[name].describe() != expected.tensors[name].describe():
            here, there = got.tensors[name].describe(), expected.tensors[name].describe()
            lines.append(f"  {printable(name)}: {here} in {got.path}, {there} in {expected.path}")
    lines += [
        f"  {printable(name)}: only in {got.path}"
        for name in got.tensors
        if name not in expected.tensors and not is_optimizer(name, got.format)
    ]
    return lines
