"""Averages of what Keras and TensorFlow saved, against numpy.average of their weights, loaded by plain Keras."""

import contextlib
import functools
import json
import shutil
import warnings
import zipfile

import h5py
import numpy as np
import pytest
from reference import nearest, rational_average

from streaming_polyak import LINEAR, MEAN, CheckpointError
from streaming_polyak.files import average as average_module
from streaming_polyak.files import source, verify
from streaming_polyak.files.average import average_checkpoints
from streaming_polyak.files.formats import hdf5
from streaming_polyak.files.verify import verify_checkpoint

pytestmark = pytest.mark.tensorflow
keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")


@pytest.fixture(scope="module", autouse=True)
def _one_parser():
    """One process parses the HDF5 files of all these tests, where a job has one of its own: to start it takes time."""
    with hdf5.Parser() as parser, pytest.MonkeyPatch.context() as patch:
        for module in (average_module, verify):
            patch.setattr(module, "Parser", lambda: contextlib.nullcontext(parser))
        yield


@pytest.fixture(autouse=True)
def _no_waiting_for_the_clock(monkeypatch):
    """A table of a file just written waits for the next tick of the clock; nothing here changes a file meanwhile."""
    monkeypatch.setattr(source, "_TICK_NS", 0)


# Models. Each takes what `inputs` gives for it.


def nested():
    """A Sequential model in a functional one, moving statistics, a counter, and dtypes of two and four bytes."""
    inputs = keras.Input((4,))
    inner = keras.Sequential([
        keras.layers.Dense(6, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5, seed=3),
    ])  # fmt: skip
    x = inner(keras.layers.Normalization()(inputs))
    x = keras.layers.Dense(5, dtype="bfloat16")(x)
    x = keras.layers.Dense(5, dtype="float16")(x)
    x = keras.layers.Dense(5, dtype="mixed_bfloat16")(x)
    x = keras.layers.Dropout(0.1)(x)
    return keras.Model(inputs, keras.layers.Dense(3, dtype="float32")(x))


def shared():
    """An embedding whose weights are used three times, once as the output layer, and a layer used twice."""
    first, second = keras.Input((3,), dtype="int32"), keras.Input((3,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(7, 4)
    dense = keras.layers.Dense(4, activation="tanh")
    x = keras.layers.Add()([dense(embedding(first)), dense(embedding(second))])
    return keras.Model([first, second], embedding(x, reverse=True))


def plain():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)])


def recurrent():
    """Layers with cells and branches, whose weights stand deeper in the file."""
    inputs = keras.Input((5, 4))
    x = keras.layers.Bidirectional(keras.layers.LSTM(3, return_sequences=True))(inputs)
    x = keras.layers.MultiHeadAttention(2, 3)(x, x)
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling1D()(x)))


def inputs(build):
    rng = np.random.default_rng(9)
    if build is shared:
        return [rng.integers(0, 7, (6, 3)), rng.integers(0, 7, (6, 3))]
    return rng.normal(size=(6, 5, 4) if build is recurrent else (6, 4)).astype(np.float32)


OPTIMIZERS = {
    "Adam": lambda: keras.optimizers.Adam(0.02),
    "SGD with momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "Adam with a schedule and scaled loss": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9))
    ),
    "not built": lambda: keras.optimizers.Adam(0.02),
    "not compiled": None,
}


def member(build, seed, optimizer="Adam"):
    """A model as after some training: every variable has values of its own."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = build()
    if OPTIMIZERS[optimizer]:
        model.compile(OPTIMIZERS[optimizer](), keras.losses.MeanSquaredError())
    if optimizer not in ("not built", "not compiled"):
        model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(seed)
    variables = model.variables + (model.optimizer.variables if model.compiled else [])
    for variable in variables:
        name = variable.path.rpartition("/")[2]
        if name in ("iteration", "step_counter", "count"):
            variable.assign(seed + 30)
        elif "int" not in variable.dtype and len(variable.shape) and "metrics" not in variable.path:
            values = rng.normal(size=variable.shape)
            variable.assign(np.abs(values) if "variance" in name or "velocity" in name else values)
    return model


@functools.cache
def members(build, optimizer="Adam", count=3):
    return [member(build, seed, optimizer) for seed in range(count)]


def saved(models, path):
    """Saves models under names with their number put in."""
    paths = []
    for number, model in enumerate(models):
        paths.append(path.with_name(path.name.format(number)))
        if path.name.endswith(".weights.json"):
            model.save_weights(paths[-1], max_shard_size=2e-7)  # 200 bytes
        elif path.name.endswith(".weights.h5"):
            model.save_weights(paths[-1])
        else:
            model.save(paths[-1])
    return paths


def averages(models, weighting=MEAN):
    """What the weights of the average should be, exactly rounded."""
    raw = weighting.raw_weights(len(models))
    made = []
    for arrays in zip(*(model.get_weights() for model in models), strict=True):
        dtype = arrays[0].dtype
        if dtype.kind == "i":
            made.append(arrays[-1])
            continue
        exact = rational_average(raw, [array.reshape(-1).astype(np.float64) for array in arrays])
        rounded = np.array([nearest(x, dtype.name) for x in exact]).reshape(arrays[0].shape).astype(dtype)
        mean = np.average([array.astype(np.float64) for array in arrays], axis=0, weights=raw)
        np.testing.assert_allclose(rounded.astype(np.float64), mean, rtol=2.0**-7)  # bfloat16 has 8 bits
        made.append(rounded)
    return made


def by_hand(build, models, weighting=MEAN):
    """A model whose weights are set to the average."""
    model = member(build, 77)
    model.set_weights(averages(models, weighting))
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()
    return model


def loaded(path):
    """A model as plain Keras loads it; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return keras.models.load_model(path)


def check_weights(model, wanted):
    got = model.get_weights()
    assert len(got) == len(wanted)
    for array, expected in zip(got, wanted, strict=True):
        assert (array.dtype, array.tobytes()) == (expected.dtype, expected.tobytes())


def state(optimizer):
    """Slots and counters, and the single floats such as the learning rate; both in the order of the variables."""
    variables = [(v.path.rpartition("/")[2], v.numpy()) for v in optimizer.variables]
    single = [(name, float(v)) for name, v in variables if not v.shape and v.dtype.kind == "f"]
    return [v for _, v in variables if v.shape or v.dtype.kind != "f"], single


@pytest.mark.parametrize(
    ("build", "optimizer"),
    [(nested, "drop"), (nested, "newest"), (shared, "drop"), (plain, "drop"), (recurrent, "drop")],
)
def test_an_averaged_keras_file_loads_without_a_warning_and_predicts_as_weights_set_by_hand(tmp_path, build, optimizer):
    models = members(build)
    paths = saved(models, tmp_path / "{}.keras")
    report = average_checkpoints(paths, tmp_path / "out.keras", LINEAR, optimizer=optimizer)
    model = loaded(tmp_path / "out.keras")
    check_weights(model, averages(models, LINEAR))
    floats = [v for v in models[0].weights if "float" in v.dtype]
    assert (report.tensors, report.copied) == (len(floats), len(models[0].weights) - len(floats))  # tied ones once
    reference = by_hand(build, models, LINEAR)
    x = inputs(build)
    np.testing.assert_array_equal(model(x), reference(x))
    if build is plain:
        np.testing.assert_array_equal(model.predict(x, verbose=0), reference.predict(x, verbose=0))
    with zipfile.ZipFile(paths[-1]) as newest, zipfile.ZipFile(tmp_path / "out.keras") as archive:
        for name in ("config.json", "metadata.json"):
            assert archive.read(name) == newest.read(name)
    assert verify_checkpoint(tmp_path / "out.keras").provenance["weighting"] == "linear"


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if not kind.startswith("not")])
def test_the_optimizer_is_a_fresh_one_or_that_of_the_newest(tmp_path, kind):
    models = members(plain, kind, 2)
    paths = saved(models, tmp_path / "{}.keras")
    average_checkpoints(paths, tmp_path / "fresh.keras")
    average_checkpoints(paths, tmp_path / "newest.keras", optimizer="newest")
    wanted, single = state(models[-1].optimizer)
    assert all(value.any() for value in wanted)
    for name in ("fresh", "newest"):
        model = loaded(tmp_path / f"{name}.keras")
        check_weights(model, averages(models))
        values, others = state(model.optimizer)
        assert others == single
        for value, expected in zip(values, wanted, strict=True):
            np.testing.assert_array_equal(value, expected if name == "newest" else np.zeros_like(expected))


@pytest.mark.parametrize("kind", ["not built", "not compiled"])
@pytest.mark.parametrize("optimizer", ["drop", "newest"])
def test_without_the_state_of_an_optimizer_an_average_loads_as_its_newest_input_does(tmp_path, kind, optimizer):
    models = members(plain, kind, 2)
    paths = saved(models, tmp_path / "{}.keras")
    average_checkpoints(paths, tmp_path / "out.keras", optimizer=optimizer)
    said = []
    for path in (paths[-1], tmp_path / "out.keras"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = keras.models.load_model(path)
        said.append([str(warning.message) for warning in caught])
    check_weights(model, averages(models))
    assert model.compiled == (kind == "not built")
    assert said[0] == said[1]  # Keras itself warns of an optimizer that was never built
    assert kind == "not built" or not said[0]


@pytest.mark.parametrize("kind", ["Adam", "SGD with momentum"])
def test_training_goes_on_from_an_average_as_from_weights_set_by_hand(tmp_path, kind):
    models = members(plain, kind, 2)
    average_checkpoints(saved(models, tmp_path / "{}.keras"), tmp_path / "out.keras")
    model, reference = loaded(tmp_path / "out.keras"), plain()
    reference.set_weights(averages(models))
    reference.compile(OPTIMIZERS[kind](), keras.losses.MeanSquaredError())
    x, y = inputs(plain), np.ones((6, 3), np.float32)
    for _ in range(2):
        model.train_on_batch(x, y)
        reference.train_on_batch(x, y)
    assert model.optimizer.iterations == 2
    check_weights(model, reference.get_weights())
    assert not np.array_equal(model.get_weights()[0], averages(models)[0])


@pytest.mark.parametrize(
    ("build", "suffix"), [(nested, ".weights.h5"), (nested, ".weights.json"), (shared, ".weights.json")]
)
def test_averaged_weights_files_are_loaded_by_the_model_itself(tmp_path, build, suffix):
    models = members(build)
    paths = saved(models, tmp_path / f"{{}}{suffix}")
    average_checkpoints(paths, tmp_path / f"out{suffix}", optimizer="newest")
    average_checkpoints(paths, tmp_path / f"dropped{suffix}")
    for name, optimizer in (("out", "Adam"), ("dropped", "not compiled")):
        model = member(build, 88, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.load_weights(tmp_path / f"{name}{suffix}")
        check_weights(model, averages(models))
        if name == "out":
            for value, expected in zip(*(state(m.optimizer)[0] for m in (model, models[-1])), strict=True):
                np.testing.assert_array_equal(value, expected)
    if suffix == ".weights.json":
        assert len(list(tmp_path.glob("out_*.weights.h5"))) > 2


def test_weights_files_become_a_keras_file_with_a_template(tmp_path):
    models = members(nested)
    weights = saved(models, tmp_path / "{}.weights.h5")
    (template,) = saved([member(nested, 66)], tmp_path / "template{}.keras")
    average_checkpoints(weights, tmp_path / "out.keras", template=template)
    check_weights(loaded(tmp_path / "out.keras"), averages(models))
    average_checkpoints(weights, tmp_path / "out.safetensors")
    average_checkpoints([tmp_path / "out.safetensors"], tmp_path / "again.keras", template=template)
    model = loaded(tmp_path / "again.keras")
    check_weights(model, averages(models))
    np.testing.assert_array_equal(model(inputs(nested)), by_hand(nested, models)(inputs(nested)))


@pytest.mark.parametrize("build", [shared, plain])
@pytest.mark.parametrize("optimizer", ["drop", "newest"])
def test_a_legacy_file_of_a_whole_model_is_averaged(tmp_path, build, optimizer):
    models = members(build)
    paths = saved(models, tmp_path / "{}.h5")
    average_checkpoints(paths, tmp_path / "out.h5", optimizer=optimizer)
    model = loaded(tmp_path / "out.h5")
    check_weights(model, averages(models))
    np.testing.assert_array_equal(model(inputs(build)), by_hand(build, models)(inputs(build)))
    with h5py.File(paths[-1]) as newest, h5py.File(tmp_path / "out.h5") as file:
        assert len(newest["optimizer_weights"]) > 0
        assert ("optimizer_weights" in file) == (optimizer == "newest")
        newest["optimizer_weights"].visititems(
            lambda name, item: (
                np.testing.assert_array_equal(item[()], file["optimizer_weights"][name][()])
                if optimizer == "newest" and isinstance(item, h5py.Dataset)
                else None
            )
        )


@pytest.mark.parametrize("whole", [False, True])
def test_a_file_of_keras_2_is_averaged(tmp_path, whole):
    """Written by hand, as `save_weights("x.h5")` and `save("x.h5")` of Keras 2 did, with ":0" in the names."""
    models = members(plain)
    for number, model in enumerate(models):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            root = file.create_group("model_weights") if whole else file
            if whole:
                file.attrs["model_config"] = json.dumps({"class_name": "Sequential"})
                file.create_group("optimizer_weights").create_dataset("Adam/iter:0", data=np.int64(7))
            root.attrs["layer_names"] = [b"dense", b"dense_1"]
            root.attrs["backend"], root.attrs["keras_version"] = b"tensorflow", b"2.12.0"
            for layer, kernel, bias in zip(("dense", "dense_1"), *[iter(model.get_weights())] * 2, strict=True):
                group = root.create_group(layer)
                group.attrs["weight_names"] = [f"{layer}/kernel:0".encode(), f"{layer}/bias:0".encode()]
                group.create_dataset(f"{layer}/kernel:0", data=kernel)
                group.create_dataset(f"{layer}/bias:0", data=bias)
    average_checkpoints([tmp_path / f"{number}.h5" for number in range(3)], tmp_path / "out.h5", LINEAR)
    model = plain()
    model.load_weights(tmp_path / "out.h5")
    check_weights(model, averages(models, LINEAR))


@pytest.mark.parametrize("optimizer", ["drop", "newest"])
def test_a_tensorflow_checkpoint_is_averaged_and_restored_whole(tmp_path, optimizer):
    models = members(nested)
    prefixes = [tf.train.Checkpoint(model=m).write(str(tmp_path / f"ckpt-{k}")) for k, m in enumerate(models)]
    average_checkpoints(prefixes, tmp_path / "out.index", LINEAR, optimizer=optimizer)
    model = member(nested, 55)
    tf.train.Checkpoint(model=model).read(str(tmp_path / "out")).assert_consumed()
    check_weights(model, averages(models, LINEAR))
    for value, expected in zip(*(state(m.optimizer)[0] for m in (model, models[-1])), strict=True):
        np.testing.assert_array_equal(value, expected if optimizer == "newest" else np.zeros_like(expected))
    for name, _ in tf.train.list_variables(str(tmp_path / "out")):
        tf.train.load_variable(str(tmp_path / "out"), name)  # checks its CRC-32C
    assert verify_checkpoint(tmp_path / "out.index").checksums > 10


def test_a_saved_model_is_averaged_and_serves(tmp_path):
    models = members(plain)
    for number, model in enumerate(models):
        model.export(tmp_path / str(number), verbose=False)
    average_checkpoints([tmp_path / str(number) for number in range(3)], tmp_path / "out")
    by_hand(plain, models).export(tmp_path / "reference", verbose=False)
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("0", "out")]
    assert names[0] - names[1] == {"fingerprint.pb"}  # which has a hash of the variables
    served, wanted = (tf.saved_model.load(tmp_path / name) for name in ("out", "reference"))
    np.testing.assert_array_equal(served.serve(inputs(plain)), wanted.serve(inputs(plain)))
    said = json.loads((tmp_path / "out/assets.extra/streaming_polyak.json").read_text())
    assert [entry["name"] for entry in said["inputs"]] == ["0", "1", "2"]
    with pytest.raises(FileExistsError, match="is a folder, which is not replaced"):
        average_checkpoints([tmp_path / "0"], tmp_path / "out", overwrite=True)
    shutil.rmtree(tmp_path / "reference")
    with pytest.raises(CheckpointError, match="out: it is an average itself"):
        average_checkpoints(tmp_path, tmp_path / "again")
    data = tmp_path / "2/variables/variables.data-00000-of-00001"
    data.write_bytes(data.read_bytes().replace(b"/.ATTRIBUTES", b"/.attributes", 1))  # in the object graph
    with pytest.raises(CheckpointError, match=r"_CHECKPOINTABLE_OBJECT_GRAPH.*damaged"):
        verify_checkpoint(tmp_path / "2")
    with pytest.raises(CheckpointError, match=r"_CHECKPOINTABLE_OBJECT_GRAPH.*damaged"):
        average_checkpoints([tmp_path / "1", tmp_path / "2"], tmp_path / "damaged")
