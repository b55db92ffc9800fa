"""What is in checkpoints, told from their metadata alone, and in what several of them differ."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from streaming_polyak.files.formats import open_checkpoint
from streaming_polyak.files.formats.hdf5 import Parser
from streaming_polyak.files.inputs import find_checkpoints
from streaming_polyak.files.meter import format_bytes
from streaming_polyak.files.source import UnpackedSource
from streaming_polyak.files.tensors import FLOATS, TensorTable, differences, is_optimizer, printable, without_nan


@dataclass(frozen=True)
class Inspection:
    """What is in some checkpoints.

    Args:
        files: of each one path, format, bytes, tensors (rows of name, dtype, shape, bytes, whether in place, whether of
            the optimizer), totals, and how it was made if it is an average.
        differing: for each but the first, in what it differs from the first.
    """

    files: tuple[dict[str, Any], ...]
    differing: tuple[tuple[str, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        return {
            "files": without_nan(list(self.files)),
            "differences": [
                {"path": file["path"], "lines": [line.strip() for line in lines]}
                for file, lines in zip(self.files[1:], self.differing, strict=True)
            ],
        }

    def __str__(self) -> str:
        paragraphs = [_paragraph(file) for file in self.files]
        for file, lines in zip(self.files[1:], self.differing, strict=True):
            first, path = printable(self.files[0]["path"]), printable(file["path"])
            if lines:
                paragraphs.append(f"{path} differs from {first}:\n" + "\n".join(lines))
            else:
                paragraphs.append(f"{path} has the same tensors as {first}, so they can be averaged.")
        return "\n\n".join(paragraphs)


def inspect_checkpoints(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Inspection:
    """Looks at checkpoints of any format without reading their data.

    Args:
        paths: as for `average_checkpoints`.

    Raises:
        CheckpointError: one cannot be read or is not to be trusted.
    """
    found = find_checkpoints(paths)
    with Parser() as parser:
        first = open_checkpoint(found[0], parser)
        with first:
            files, differing = [_row(first)], []
            compared = {n: t for n, t in first.tensors.items() if not is_optimizer(n, first.format)}
            for path in found[1:]:
                with open_checkpoint(Path(path), parser) as table:
                    files.append(_row(table))
                    differing.append(tuple(differences(first, table, compared)))
    return Inspection(tuple(files), tuple(differing))


def _row(table: TensorTable) -> dict[str, Any]:
    tensors = [
        {
            "name": name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes if tensor.offset is not None else 0,
            "in_place": tensor.mapped,
            "optimizer": is_optimizer(name, table.format),
        }
        for name, tensor in table.tensors.items()
    ]
    of_model = [t for n, t in table.tensors.items() if not is_optimizer(n, table.format)]
    return {
        "path": str(table.path),
        "format": table.format,
        "bytes": sum(source.size for source in table.sources if not isinstance(source, UnpackedSource)),
        "tensors": tensors,
        "parameters": sum(tensor.size for tensor in of_model if tensor.dtype in FLOATS),
        "model_bytes": sum(tensor.nbytes for tensor in of_model),
        "provenance": table.provenance,
    }


def _paragraph(file: dict[str, Any]) -> str:
    rows = [
        [
            printable(tensor["name"]),
            tensor["dtype"],
            "x".join(map(str, tensor["shape"])) or "scalar",
            f"{tensor['bytes']:,}",
            "in place" if tensor["in_place"] else "unpacked",
            "optimizer" if tensor["optimizer"] else "",
        ]
        for tensor in file["tensors"]
    ]
    in_place = sum(tensor["in_place"] for tensor in file["tensors"])
    lines = [
        f"{printable(file['path'])}: {file['format']}, {format_bytes(file['bytes'])}; {len(rows)} tensors, {in_place} "
        f"of them read in place; {file['parameters']:,} floating parameters of the model",
        tabulate(
            rows,
            ["tensor", "dtype", "shape", "bytes", "read", ""],
            tablefmt="plain",
            disable_numparse=True,
            colalign=("left", "left", "left", "right", "left", "left"),
        ),
    ]
    if file["provenance"] is not None:
        said = dict(file["provenance"])
        inputs = said.pop("inputs") if isinstance(said.get("inputs"), list) else []  # it is what a stranger wrote
        lines += [f"  made by: {json.dumps(said)}", *(f"    {json.dumps(entry)}" for entry in inputs)]
    return "\n".join(lines)
