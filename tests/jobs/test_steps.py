"""What a step is made of, without a cluster."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import numpy as np
import pytest
from heliograph.datasets import augment
from heliograph.datasets.ingest import Block
from heliograph.jobs.steps import HOST, LOSS, Feed, Objective, Steps
from heliograph.project import Augment


def stepped(
    inputs: np.ndarray, target: np.ndarray, weight: np.ndarray, how: Augment | None = None, labelled: float = 1.0
) -> tuple[float, np.ndarray]:
    """(the loss of one step of SGD on a linear model that begins at 0.5, its weights after it)."""
    import keras
    import tensorflow as tf

    rows, width = len(target), int(np.prod(inputs.shape[1:]))
    given = keras.Input(inputs.shape[1:])
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer=keras.initializers.Constant(0.5))
    model = keras.Model(given, layer(keras.layers.Flatten()(given)))
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    shapes = {"x": inputs.shape[1:]}
    steps = Steps(
        model, Objective(keras.losses.mean_squared_error, labelled=labelled), optimizer, [keras.metrics.Mean("loss")],
        tf.distribute.get_strategy(), (shapes, tf.TensorSpec((None,))), 0, 1, augment=(how, ()),
    )  # fmt: skip
    draws = augment.draw(how, shapes, [np.arange(rows)], 1, (0, 1)) if how else {}
    block = Block({"x": inputs}, target, weight, np.array([0, rows], np.int32), np.array([rows], np.float32), draws)
    found = steps.train(next(Feed(iter([block]), "CPU:0")), 0, 1, np.zeros(HOST, np.float32))
    assert model.count_params() == width
    return float(found.steps[0, LOSS]), np.asarray(layer.kernel)[:, 0]


def test_rows_without_a_target_have_no_loss_and_the_others_stand_for_them():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 3)).astype("f4"), rng.normal(size=16).astype("f4")
    y[4:] = np.nan
    ones = np.ones(16, "f4")
    loss, kernel = stepped(x, y, ones, labelled=0.25)
    alone, own = stepped(x[:4], y[:4], ones[:4])
    assert loss == pytest.approx(alone, rel=1e-5)
    np.testing.assert_allclose(kernel, own, rtol=1e-5)


def test_a_rows_weight_multiplies_its_loss_and_its_gradient():
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(16, 3)).astype("f4"), rng.normal(size=16).astype("f4"), rng.random(16).astype("f4")
    loss, kernel = stepped(x, y, w)
    error = x.sum(1) * 0.5 - y
    assert loss == pytest.approx((w * error**2).mean(), rel=1e-5)
    assert kernel == pytest.approx(0.5 - 0.1 * (2 * (w * error)[:, None] * x).mean(0), rel=1e-4)


def test_the_bytes_of_images_are_given_to_the_model_from_0_to_1():
    x = np.full((4, 2, 2, 3), 255, np.uint8)
    loss, _ = stepped(x, np.zeros(4, "f4"), np.ones(4, "f4"))
    assert loss == pytest.approx((12 * 0.5) ** 2, rel=1e-5)


def test_blended_rows_have_the_blended_loss_of_both_targets():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(16, 3)).astype("f4"), rng.normal(size=16).astype("f4")
    loss, _ = stepped(x, y, np.ones(16, "f4"), Augment(mixup=1.0))
    draws = augment.draw(Augment(mixup=1.0), {"x": (3,)}, [np.arange(16)], 1, (0, 1))
    share, other = draws["share"].astype(float), np.arange(16) + draws["partner"]
    made = (share[:, None] * x + (1 - share[:, None]) * x[other]).sum(1) * 0.5
    expected = share * (made - y) ** 2 + (1 - share) * (made - y[other]) ** 2
    assert loss == pytest.approx(expected.mean(), rel=1e-5)
