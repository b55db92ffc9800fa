"""Small compiled models and data for the tests of training."""

import keras
import numpy as np


def data(rows=70, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 4)).astype(np.float32)
    y = np.eye(3, dtype=np.float32)[(x[:, 0] > 0).astype(int) + (x[:, 1] > 0.5)]
    return x, y


def mlp(optimizer=None, *, dropout=0.0, batch_norm=False, seed=0, kind="sequential", **compiled):
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(8, activation="relu", name="hidden")]
    layers += [keras.layers.BatchNormalization(name="norm")] if batch_norm else []
    layers += [keras.layers.Dropout(dropout, name="dropout")] if dropout else []
    layers += [keras.layers.Dense(3, activation="softmax", name="classes")]
    if kind == "sequential":
        model = keras.Sequential(layers)  # built by the first batch
    elif kind == "functional":
        model = keras.Sequential([keras.Input((4,)), *layers])
        model = keras.Model(model.inputs[0], model.outputs[0])
    else:
        model = Stack(layers)
    options = {"loss": "categorical_crossentropy", "metrics": ["accuracy"]} | compiled
    if compiled.pop("uncompiled", False):
        return model
    model.compile(optimizer=optimizer or keras.optimizers.SGD(0.1, momentum=0.9), **options)
    return model


@keras.saving.register_keras_serializable("tests")
class Stack(keras.Model):
    """A subclassed model, not built before it is called."""

    def __init__(self, layers, **options):
        super().__init__(**options)
        self.stack = layers

    def call(self, x, training=None):
        for layer in self.stack:
            x = layer(x, training=training) if isinstance(layer, keras.layers.Dropout) else layer(x)
        return x

    def get_config(self):
        return super().get_config() | {"layers": [keras.saving.serialize_keras_object(layer) for layer in self.stack]}

    @classmethod
    def from_config(cls, config):
        layers = [keras.saving.deserialize_keras_object(layer) for layer in config.pop("layers")]
        return cls(layers, **config)


def weights(model):
    """All weights as one float64 vector."""
    return np.concatenate([v.numpy().astype(np.float64).ravel() for v in model.weights])


def bits(variables):
    """The exact contents of Keras variables, by path."""
    return {v.path: v.numpy().tobytes() for v in variables}


def state(model):
    """The exact contents of the whole training state."""
    return bits(model.variables) | bits(model.optimizer.variables)
