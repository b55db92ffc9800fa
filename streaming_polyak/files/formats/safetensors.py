"""safetensors: eight bytes that give the length of a JSON header, the header, and raw tensors without holes.

The header maps each name to {"dtype", "shape", "data_offsets": [begin, end]}, counted from the end of the header, and
"__metadata__" to a dict of strings, where an average keeps how it was made under "streaming_polyak".

Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from typing import Any

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files.source import Source
from streaming_polyak.files.tensors import DTYPES, PROVENANCE, Tensor, TensorTable, read_json, read_provenance

MAX_HEADER_BYTES = 8 << 20  # some 50,000 tensors; parsed JSON takes up to 25 times its bytes
_MAX_NUMBER = 2**63 - 1
_CODES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    **{f"{code}{bits}": f"{kind}{bits}" for code, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}  # fmt: skip
_NAMES = {dtype: code for code, dtype in _CODES.items()}


def open_safetensors(source: Source) -> TensorTable:
    """Returns the table of a safetensors file."""

    def refuse(code: str, reason: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(code, source.path, reason, tensor=tensor)

    if source.size < 8:
        raise refuse("safetensors", f"it has {source.size} bytes; a safetensors file has at least 8.")
    (length,) = struct.unpack("<Q", source.read(0, 8))
    if length > min(MAX_HEADER_BYTES, source.size - 8):
        raise refuse("safetensors", f"its header of {length} bytes ends outside of the file, or is unreasonably long.")
    text = source.read(8, length)
    header = read_json(source, text, "its header")
    if not isinstance(header, dict) or not text.startswith(b"{"):
        raise refuse("safetensors", "its header is not a JSON object.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refuse("safetensors", "its __metadata__ does not map strings to strings.")

    tensors = {}
    for name, said in header.items():
        if not isinstance(said, dict) or sorted(said) != ["data_offsets", "dtype", "shape"]:
            raise refuse("safetensors", "it has other keys than dtype, shape and data_offsets.", name)
        dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _CODES:
            raise refuse("dtype", f"its dtype {dtype!r:.100} is not one of {', '.join(_CODES)}.", name)
        if not _whole_numbers(shape):
            raise refuse("shape", "its shape is not a list of whole numbers below 2**63.", name)
        if not (_whole_numbers(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
            raise refuse("offsets", "its data_offsets are not two whole numbers below 2**63, begin and end.", name)
        begin, end = offsets
        tensors[name] = Tensor(name, _CODES[dtype], tuple(shape), 8 + length + begin, end - begin)
    at = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != at:
            raise refuse("hole", "its data do not begin where those before it end.", tensor.name)
        at += tensor.nbytes
    if at != source.size:
        raise refuse("trailing" if at < source.size else "truncated", f"data end at byte {at} of {source.size}.")
    return TensorTable(
        source.path,
        "safetensors",
        [source],
        tensors,
        layout=metadata,
        provenance=read_provenance(source.path, metadata.get(PROVENANCE)),
    ).validate()


def header(tensors: Iterable[Tensor], metadata: dict[str, str]) -> tuple[bytes, dict[str, Tensor]]:
    """Returns the beginning of a file and where each tensor then stands; larger elements first, for alignment."""
    said: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at, places = 0, []
    for tensor in sorted(tensors, key=lambda t: (-DTYPES[t.dtype].itemsize, t.name)):
        end = at + tensor.nbytes
        said[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [at, end]}
        places.append((tensor, at))
        at = end
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {
        t.name: Tensor(t.name, t.dtype, t.shape, begin + place, t.nbytes) for t, place in places
    }


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _MAX_NUMBER for value in values)
