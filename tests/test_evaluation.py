"""Tensors by their names in files become the weights of a model, whatever file Keras put them in."""

import keras
import models
import numpy as np
import pytest

from streaming_polyak import LINEAR, MEAN, KerasEvaluator, Trainer, sweep_checkpoints
from streaming_polyak.files import source

pytestmark = pytest.mark.tensorflow


@pytest.fixture(autouse=True)
def _no_waiting_for_the_clock(monkeypatch):
    monkeypatch.setattr(source, "_TICK_NS", 0)


def saved(model, path):
    model.save_weights(path) if path.name.endswith(".weights.h5") else model.save(path)
    return path


def built(seed, *, afresh=True, **options):
    if afresh:
        keras.utils.clear_session()  # members of one run have one name, such as "sequential"
    model = models.mlp(seed=seed, **options)
    model(np.zeros((1, 4), np.float32))
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        *(
            (suffix, kind)
            for suffix in (".keras", ".weights.h5")
            for kind in ("sequential", "functional", "subclassed")
        ),
        (".h5", "sequential"),
        (".h5", "functional"),  # Keras' legacy format holds no subclassed models
    ],
)
def test_members_score_as_the_models_they_were_saved_from(tmp_path, suffix, kind):
    x, y = models.data()
    scores, paths = [], []
    for seed in range(3):
        model = built(seed, dropout=0.5, batch_norm=True, kind=kind)
        scores.append(Trainer(model).evaluate(x, y))
        paths.append(saved(model, tmp_path / f"{seed}{suffix}"))
    # The evaluated one is called something else, such as "sequential_1".
    model = built(9, afresh=False, dropout=0.5, batch_norm=True, kind=kind)
    evaluator = KerasEvaluator(model, x, y, batch_size=32)  # as Trainer.evaluate, so that the sums are the same
    result = sweep_checkpoints(paths, [MEAN], evaluator)
    for row, score in zip(result.of("single"), reversed(scores), strict=True):
        assert row.metrics == score


def test_averages_score_as_the_weights_set_by_hand(tmp_path):
    x, y = models.data()
    members = [built(seed, batch_norm=True) for seed in range(3)]
    paths = [saved(model, tmp_path / f"{i}.keras") for i, model in enumerate(members)]
    result = sweep_checkpoints(paths, [LINEAR], KerasEvaluator(built(9, batch_norm=True), x, y))
    by_hand = built(9, batch_norm=True)
    stacks = zip(*(member.get_weights() for member in members), strict=True)
    by_hand.set_weights([np.average(np.asarray(s, np.float64), axis=0, weights=[1, 2, 3]) for s in stacks])
    for name, value in Trainer(by_hand).evaluate(x, y).items():
        assert result.of("linear")[-1].metrics[name] == pytest.approx(value, rel=1e-6)  # rounded to float32 twice


def test_layers_of_one_shape_and_mixed_dtypes_are_told_apart(tmp_path):
    def network(seed):
        keras.utils.set_random_seed(seed)
        layers = [keras.layers.Dense(4, dtype="bfloat16") for _ in range(3)] + [keras.layers.Dense(4) for _ in range(3)]
        model = keras.Sequential([keras.Input((4,)), *layers])
        model.compile("sgd", "mse")
        return model

    member, evaluated = network(0), network(1)
    path = saved(member, tmp_path / "member.keras")
    x = np.zeros((2, 4), np.float32)
    evaluator = KerasEvaluator(evaluated, x, x)
    sweep_checkpoints([path], [MEAN], evaluator)
    for ours, theirs in zip(evaluated.weights, member.weights, strict=True):
        assert ours.numpy().tobytes() == theirs.numpy().tobytes()


def test_finding_the_names_leaves_the_model_as_it_was(tmp_path):
    model = built(0, dropout=0.5, batch_norm=True)
    before = models.state(model)
    path = saved(model, tmp_path / "member.keras")
    x, y = models.data()
    seen = []

    class Watching(KerasEvaluator):
        def _locate(self, names):
            found = super()._locate(names)
            seen.append(models.state(model))
            return found

    sweep_checkpoints([path], [MEAN], Watching(model, x, y))
    assert seen == [before]  # found once


def test_a_checkpoint_of_another_model_and_an_unbuilt_model_are_refused(tmp_path):
    x, y = models.data()
    path = saved(built(0), tmp_path / "member.keras")
    with pytest.raises(ValueError, match=r"missing are: layers/batch_normalization/vars/0.*saved from"):
        sweep_checkpoints([path], [MEAN], KerasEvaluator(built(0, batch_norm=True), x, y))
    path = saved(built(0, batch_norm=True), tmp_path / "other.keras")
    with pytest.raises(ValueError, match=r"not of the model are: layers/batch_normalization/vars/0"):
        sweep_checkpoints([path], [MEAN], KerasEvaluator(built(0), x, y))
    with pytest.raises(ValueError, match="Expected a built model"):
        KerasEvaluator(models.mlp(), x, y)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda kernel: kernel[:-1], r"kernel.* as float32 of shape \(4, 8\), got float32 of shape \(3, 8\)"),
        (lambda kernel: kernel.T, r"got float32 of shape \(8, 4\)"),
        (lambda kernel: kernel.astype(np.int32), r"got int32 of shape \(4, 8\)"),
    ],
)
def test_tensors_that_do_not_fit_leave_the_whole_model_as_it_was(wrong, message):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    evaluator = KerasEvaluator(model, *models.data())
    names = evaluator._probe(".h5")
    kernel = next(name for name in names if names[name] is model.layers[0].kernel)
    others = {name: np.full(variable.shape, 5.0, np.float32) for name, variable in names.items() if name != kernel}
    before = models.state(model)
    with pytest.raises(ValueError, match=message):
        evaluator.assign({**others, kernel: wrong(np.zeros((4, 8), np.float32))})
    assert models.state(model) == before

    class Unreadable(dict):
        def __getitem__(self, name):
            if name == kernel:
                raise OSError("the disk is gone")
            return super().__getitem__(name)

    with pytest.raises(OSError, match="the disk is gone"):
        evaluator.assign(Unreadable({**others, kernel: None}))
    assert models.state(model) == before
    evaluator.assign({**others, kernel: np.zeros((4, 8), np.float16)})  # narrower floats fit


@pytest.mark.parametrize(
    "name",
    ["model_weights/dense/dense/kernel:0", "layer_with_weights-0/kernel/.ATTRIBUTES/VARIABLE_VALUE", "dense.weight"],
)
def test_names_that_keras_3_does_not_give_are_refused_with_the_reason(name):
    evaluator = KerasEvaluator(built(0), *models.data())
    with pytest.raises(ValueError, match="Names of Keras 2, of TensorFlow checkpoints and of SavedModels are others"):
        evaluator.assign({name: np.zeros(3, np.float32)})
