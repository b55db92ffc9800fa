"""The file formats, one module each behind `open_checkpoint`; a format is told by its contents, not by its name."""

from __future__ import annotations

from pathlib import Path

from streaming_polyak.errors import CheckpointError
from streaming_polyak.files.formats import archive, hdf5
from streaming_polyak.files.formats.hdf5 import Parser, open_hdf5
from streaming_polyak.files.formats.keras_archive import open_keras
from streaming_polyak.files.formats.npz import open_npz
from streaming_polyak.files.formats.safetensors import open_safetensors
from streaming_polyak.files.formats.sharded import SUFFIX, open_sharded
from streaming_polyak.files.formats.tf_checkpoint import INDEX, open_saved_model, open_tf_checkpoint
from streaming_polyak.files.source import Source
from streaming_polyak.files.tensors import TensorTable


def open_checkpoint(path: Path, parser: Parser) -> TensorTable:
    """Returns the table of a checkpoint of any format.

    Args:
        path: a `.keras`, `.weights.h5`, `.h5`, `.weights.json`, `.safetensors` or `.npz` file; the prefix or the
            `.index` of a TensorFlow checkpoint; a SavedModel folder.
        parser: what HDF5 metadata are parsed with.

    Raises:
        CheckpointError: it is none of these, damaged, or not to be trusted.
    """
    if path.is_dir():
        return open_saved_model(path)
    if path.name.endswith(INDEX):
        return open_tf_checkpoint(path.with_name(path.name.removesuffix(INDEX)))
    if not path.exists() and path.with_name(path.name + INDEX).is_file():
        return open_tf_checkpoint(path)
    source = Source(path)
    source.keep_open()
    try:
        return _by_contents(source, parser)
    except BaseException:
        source.close()
        raise


def _by_contents(source: Source, parser: Parser) -> TensorTable:
    if source.path.name.endswith(SUFFIX):
        return open_sharded(source, parser)
    if source.path.name.endswith(".safetensors"):
        return open_safetensors(source)
    beginning = source.read(0, min(9, source.size))
    if beginning.startswith(archive.MAGIC) or source.path.name.endswith((".keras", ".npz")):
        is_npz = source.path.name.endswith(".npz")
        return open_npz(source) if is_npz else open_keras(source, parser)
    if beginning.startswith(hdf5.SIGNATURE) or source.path.name.endswith((".h5", ".hdf5")):
        return open_hdf5(source, parser)
    if beginning[8:9] == b"{":
        return open_safetensors(source)
    if not source.size:
        raise CheckpointError("empty", source.path, "it is empty.")
    raise CheckpointError(
        "unknown",
        source.path,
        "it is no checkpoint of a known format. Known are .keras, .weights.h5, .h5, .weights.json, .safetensors, .npz, "
        "TensorFlow checkpoints and SavedModel folders.",
    )
