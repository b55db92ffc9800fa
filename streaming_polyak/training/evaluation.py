"""Scores sets of tensors, such as averages of checkpoints, on a Keras model: set in place, compiled once."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
from numpy.typing import NDArray

from streaming_polyak.files.tensors import DTYPES, is_optimizer
from streaming_polyak.training.accumulators import view
from streaming_polyak.training.averages import unchanged
from streaming_polyak.training.state import put
from streaming_polyak.training.trainer import Trainer

Tensors = Mapping[str, NDArray[Any]]


class KerasEvaluator:
    """Evaluates tensors by name as the weights of a model, with its compiled loss and metrics; for `sweep_checkpoints`.

    The tensors stay in the model afterwards. All of them are in memory while they are put there.

    Args:
        model: compiled and built; which of its variables each tensor is follows from how Keras 3 itself names them in
            `.keras`, `.weights.h5` and `.h5` files. Names of Keras 2, of TensorFlow checkpoints and of SavedModels are
            others, and are refused.
        x: arrays, a `tf.data.Dataset` or a PyDataset, as for `Trainer.evaluate`.
        y: targets, if `x` has none.
        sample_weight: weights of samples, if `x` has none.
        batch_size: samples a step, for arrays. More than Keras' 32 by default, as nothing is kept for a gradient here.

    Raises:
        ValueError: the model is not built.
    """

    def __init__(
        self,
        model: keras.Model,
        x: Any,
        y: Any = None,
        *,
        sample_weight: Any = None,
        batch_size: int = 256,
    ) -> None:
        if not model.built:
            raise ValueError(f"Expected a built model, but {model.name!r} has no variables yet. Call it on data first.")
        self._trainer = Trainer(model)
        self._data = {"x": x, "y": y, "sample_weight": sample_weight, "batch_size": batch_size}
        self._variables: dict[str, keras.Variable] = {}

    @property
    def model(self) -> keras.Model:
        """The model, which holds the tensors evaluated last."""
        return self._trainer.model

    def __call__(self, tensors: Tensors) -> dict[str, float]:
        """Returns "loss" and each metric by name.

        Args:
            tensors: all those of the model by name, in any floating dtype.

        Raises:
            ValueError: a tensor of the model is missing or does not fit its variable, or there are others.
        """
        self.assign(tensors)
        return self._trainer.evaluate(**self._data)

    def assign(self, tensors: Tensors) -> None:
        """Puts tensors into the model.

        Raises:
            ValueError: as for a call; the model is as it was.
        """
        if self._variables.keys() != set(tensors):
            self._variables = self._locate(set(tensors))
        # All are read and checked before the first is assigned.
        values = {name: np.asarray(tensors[name]) for name in self._variables}
        for name, variable in self._variables.items():
            dtype, shape = values[name].dtype.name, values[name].shape
            is_float = keras.backend.is_float_dtype
            if shape != tuple(variable.shape) or is_float(dtype) != is_float(variable.dtype):
                raise ValueError(
                    f"Expected {name!r} as {variable.dtype} of shape {tuple(variable.shape)}, got {dtype} of shape "
                    f"{shape}. Evaluate checkpoints on the model they were saved from."
                )
        with np.errstate(all="ignore"):  # a narrower dtype may have no such number
            for name, variable in self._variables.items():
                # A copy: the variable must not get hold of the caller's memory.
                put(variable.value, np.array(values[name], dtype=view(variable).dtype))

    def _locate(self, names: set[str]) -> dict[str, keras.Variable]:
        """Finds which variable has which name, by letting Keras save the model with a number of its own in each."""
        found = self._probe(".weights.h5")
        if found.keys() == names:
            return found
        if all(name.startswith("model_weights/") for name in names):
            found = self._probe(".h5")
            by_layer = {_without_model(name): variable for name, variable in found.items()}
            if by_layer.keys() == {_without_model(name) for name in names} and len(by_layer) == len(names):
                return {name: by_layer[_without_model(name)] for name in names}
        missing, extra = sorted(found.keys() - names), sorted(names - found.keys())
        raise ValueError(
            f"Expected the tensors of model {self.model.name!r} under the names Keras gives them in files, but "
            + "; ".join(
                f"{what}: {', '.join(some[:5])}{' ...' if some[5:] else ''}"
                for what, some in (("missing are", missing), ("not of the model are", extra))
                if some
            )
            + ". Evaluate checkpoints on the model they were saved from. Names of Keras 2, of TensorFlow checkpoints "
            "and of SavedModels are others."
        )

    def _probe(self, suffix: str) -> dict[str, keras.Variable]:
        model = self.model
        kinds: dict[tuple[str, tuple[int, ...]], list[keras.Variable]] = {}
        for variable in model.variables:
            kinds.setdefault((variable.dtype, tuple(variable.shape)), []).append(variable)
        with tempfile.TemporaryDirectory(prefix="streaming_polyak-") as folder:
            path = Path(folder) / f"probe{suffix}"
            with unchanged(model.variables):
                for (dtype, shape), alike in kinds.items():
                    for number, variable in enumerate(alike):
                        variable.assign(_marked(dtype, shape, number))
                if suffix == ".h5":
                    model.save(path)
                else:
                    model.save_weights(path)
            found: dict[str, keras.Variable] = {}

            def look(name: str, stored: Any) -> None:
                if not isinstance(stored, h5py.Dataset) or is_optimizer(name, suffix.removeprefix(".")):
                    return
                dtype = "bfloat16" if stored.attrs.get("dtype") == "bfloat16" else stored.dtype.name
                alike = kinds.get((dtype, stored.shape), [])
                number = _mark(stored[()]) if len(alike) > 1 else 0
                if number < len(alike):
                    found[name] = alike[number]

            with h5py.File(path) as file:  # written by Keras a moment ago, so no child process is needed
                file.visititems(look)
        return found


def _without_model(name: str) -> str:
    """Drops from a name in the legacy format what Keras calls a model by itself, such as "sequential_3"."""
    return re.sub(r"^(model_weights/[^/]+)/(sequential|functional|model)(_\d+)?/", r"\1/", name)


def _marked(dtype: str, shape: tuple[int, ...], number: int) -> NDArray[Any]:
    """Returns an array whose bits are a number; of floats these are tiny ones, so that nothing overflows."""
    if dtype == "bool":
        return np.full(shape, bool(number))
    kind = DTYPES[dtype]
    marked: NDArray[Any] = np.full(shape, number, np.dtype(f"u{kind.itemsize}")).view(kind).reshape(shape)
    return marked


def _mark(value: Any) -> int:
    flat = np.asarray(value).reshape(-1)
    return int(flat[:1].view(f"u{flat.itemsize}")[0]) if flat.size else 0
