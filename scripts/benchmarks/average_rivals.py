"""What users of torch average checkpoints with, for `average_checkpoints.py`, and the files that they read.

This program runs in the interpreter that has the rivals, which need not be the one that has TensorFlow, so it imports
nothing but the standard library before it knows what to do. All files of one number hold the same arrays.

    python scripts/benchmarks/average_rivals.py --make FOLDER SIZE_MB COUNT SUFFIX
    python scripts/benchmarks/average_rivals.py WAY OUTPUT INPUT...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from measuring import child, seconds_of

if TYPE_CHECKING:
    import numpy as np

LAYERS = 10
_ITEM_BYTES = 4


def width(size_mb: float) -> int:
    """Returns the width of dense layers that have so many megabytes of weights together."""
    return max(2, int((size_mb * 1e6 / _ITEM_BYTES / LAYERS) ** 0.5))


def arrays(size_mb: float, number: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, float32 array) of the kernels and biases of the checkpoint with a number, one at a time."""
    import numpy as np

    rng, size = np.random.default_rng(number), width(size_mb)
    for layer in range(LAYERS):
        for place, shape in enumerate(((size, size), (size,))):
            yield f"layers/dense_{layer}/vars/{place}", rng.standard_normal(shape, dtype=np.float32)


def make(folder: Path, size_mb: float, count: int, suffix: str) -> None:
    """Writes checkpoints as `.safetensors`, or as `.pt` the way fairseq has them."""
    for number in range(count):
        path = folder / f"member-{number:03}.{suffix}"
        if suffix == "pt":
            import torch

            torch.save({"model": {name: torch.from_numpy(w) for name, w in arrays(size_mb, number)}}, path)
        else:
            write_safetensors(path, size_mb, number)


def write_safetensors(path: Path, size_mb: float, number: int) -> None:
    """Writes one checkpoint by the format's own definition: length of the header, header, raw tensors."""
    size, header, at = width(size_mb), {}, 0
    for layer in range(LAYERS):
        for place, shape in enumerate(((size, size), (size,))):
            end = at + _ITEM_BYTES * (size if place else size * size)
            header[f"layers/dense_{layer}/vars/{place}"] = {
                "dtype": "F32", "shape": shape, "data_offsets": [at, end],
            }  # fmt: skip
            at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, w in arrays(size_mb, number):
            file.write(w.data)


def fairseq_style(paths: list[Path], output: Path) -> None:
    """A loop like that of fairseq's scripts/average_checkpoints.py: whole files, a sum, a division, torch.save."""
    import torch

    total: dict[str, Any] = {}
    for path in paths:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, w in state["model"].items():
            if name in total:
                total[name] += w
            else:
                total[name] = w.clone()
    for w in total.values():
        w.div_(len(paths))
    state["model"] = total
    torch.save(state, output)


def mergekit_linear(paths: list[Path], output: Path) -> None:
    """What `mergekit-pytorch` does with merge_method: linear and equal weights."""
    from mergekit.scripts.merge_raw_pytorch import main

    output.mkdir()
    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in paths]
    config = output / "config.yml"  # JSON is YAML
    config.write_text(json.dumps({"merge_method": "linear", "models": models}))
    main.main([str(config), str(output)], standalone_mode=False)


class Rival(NamedTuple):
    """A way, what must be installed for it, and what it reads and writes; an output without a suffix is a folder."""

    work: Callable[[list[Path], Path], None]
    modules: tuple[str, ...]
    imports: tuple[str, ...]
    inputs: str
    output: str


RIVALS = {
    "fairseq-style loop in torch": Rival(fairseq_style, ("torch", "numpy"), ("torch",), "pt", "rival.pt"),
    "mergekit linear": Rival(
        mergekit_linear, ("torch", "mergekit"), ("mergekit.scripts.merge_raw_pytorch",), "safetensors", "rival"
    ),
}


def main() -> None:
    """See the module."""
    first, *rest = sys.argv[1:]
    if first == "--make":
        make(Path(rest[0]), float(rest[1]), int(rest[2]), rest[3])
        return
    output, *paths = map(Path, rest)
    rival = RIVALS[first]
    child(lambda: {"seconds": seconds_of(lambda: rival.work(paths, output))}, rival.imports)


if __name__ == "__main__":
    main()
