"""Attacks stay where they may, private steps are what they say, guards know what is strange."""

import io
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import itertools
from pathlib import Path

import numpy as np
import pytest
from heliograph.cluster.keys import KeyStore
from heliograph.datasets.ingest import SECRET, Block, Part, drawn
from heliograph.datasets.schema import Feature, Schema
from heliograph.datasets.shards import Manifest
from heliograph.errors import DataError, ModelError
from heliograph.jobs import explain, guard, private
from heliograph.jobs.attack import Box, by_gradient, by_search, margin
from heliograph.jobs.steps import HOST, Feed, Objective, Steps
from heliograph.project import Train
from heliograph.trust import Attack

from ..conftest import executed, iris_project


@pytest.fixture(scope="module")
def classified():
    """(a network that knows three clusters, rows, targets, a box whose third number is fixed)."""
    import keras

    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    target = rng.integers(0, 3, 600)
    rows = (rng.normal(0, 0.25, (600, 3)) + np.stack([target == 0, target == 1, 0 * target], axis=1)).astype("f4")
    given = keras.Input((3,), name="features")
    model = keras.Model(given, keras.layers.Dense(3, "softmax")(keras.layers.Dense(16, "relu")(given)))
    model.compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy")
    model.fit(rows, target, epochs=15, verbose=0)
    low, high = ({"features": f(axis=0)} for f in (rows.min, rows.max))
    span = {"features": (high["features"] - low["features"]) * np.array([1, 1, 0], "f4")}
    return model, rows, target, Box(low, high, span)


def test_an_attack_moves_no_further_than_it_may_and_nothing_that_is_fixed(classified):
    import tensorflow as tf
    from heliograph.jobs.attack import ascend

    model, rows, target, box = classified
    given = {"features": tf.constant(rows)}
    moved = ascend(lambda x: model(x["features"]), given, tf.constant(target), box, 0.2, 10, tf.constant([0, 1]))
    gap = moved["features"].numpy() - rows
    assert (np.abs(gap) <= 0.2 * box.span["features"] + 1e-5).all()
    assert (gap[:, 2] == 0).all()
    assert np.abs(gap[:, 0]).mean() > 0.1 * box.span["features"][0]
    assert (moved["features"].numpy() <= box.high["features"] + 1e-6).all()


def test_attacks_by_gradients_and_by_answers_alone_find_what_is_wrong(classified):
    model, rows, target, box = classified
    clean = float((np.asarray(model(rows)).argmax(axis=1) == target).mean())
    inputs = {"features": rows}
    pgd = by_gradient(model, inputs, target, box, Attack(epsilon=0.2, steps=10, restarts=2)).mean()
    fgsm = by_gradient(model, inputs, target, box, Attack(method="fgsm", epsilon=0.2)).mean()
    settings = Attack(method="random", epsilon=0.2, steps=10, restarts=1)
    search = by_search(lambda x: np.asarray(model(x["features"])), inputs, target, box, settings).mean()
    assert pgd <= fgsm + 0.01 < clean
    assert pgd <= search + 0.02
    assert search < clean - 0.1


def test_the_margin_has_a_gradient_where_a_model_is_sure():
    import tensorflow as tf

    logits = tf.Variable([[40.0, 0.0, -3.0]])
    with tf.GradientTape() as tape:
        value = margin(tf.nn.softmax(logits), tf.constant([0], tf.int64))
    assert float(value[0]) == pytest.approx(-40, abs=0.1)
    np.testing.assert_allclose(tape.gradient(value, logits)[0], [-1, 1, 0], atol=1e-5)


@pytest.fixture(scope="module")
def prepared(cluster, tmp_path_factory) -> tuple[Path, KeyStore]:
    """The rows of a private training on two workers' shards, and the run that they are of."""
    folder = iris_project(tmp_path_factory.mktemp("private") / "iris", epochs=6)
    text = (folder / "heliograph.yaml").read_text().replace("epochs: 6,", "epochs: 6, privacy: {epsilon: 5},")
    (folder / "heliograph.yaml").write_text(text + "evaluate: {resamples: 0, require: {epsilon: '<= 5'}}\n")
    run = executed(folder, cluster)
    return run.folder, KeyStore(run.folder / "keys")


def test_a_private_run_tells_what_it_spent(prepared):
    import json

    run, _ = prepared
    spent = json.loads((run / "train" / "result.json").read_text())["privacy"]
    assert 4.9 < spent["epsilon"] <= 5
    again = private.spent(spent["noise"], spent["share"], spent["steps"], spent["delta"])
    assert again == pytest.approx(spent["epsilon"], abs=1e-3)
    assert json.loads((run / "validate" / "validation.json").read_text())["failed"] == []
    assert "differential privacy" in (run / "bundle" / "README.md").read_text()


def test_steps_are_drawn_by_poisson_sampling_and_every_row_of_every_worker_counts(prepared):
    run, keys = prepared
    manifest = Manifest.read(run / "prepare")
    rows = manifest.rows("train")
    sizes, seeds = np.zeros(400), []
    for rank in range(2):
        part = Part(run / "prepare", manifest, "train", keys, rank, 2, 30, 0)
        at = 0
        for block in drawn(part, 0, 400, 1):
            for a, b in itertools.pairwise(block.edges):
                assert (b - a) % 8 == 0  # filled up with rows of no weight
                sizes[at] += (block.weight[a:b] > 0).sum()
                seeds.append(tuple(block.draws[SECRET][a]))
                at += 1
            assert (block.everyone == 30).all()
    assert sizes.mean() == pytest.approx(30, abs=1)
    assert sizes.var() == pytest.approx(30 * (1 - 30 / rows), rel=0.3)
    assert len(set(seeds)) == 800


def test_a_private_step_clips_each_row_and_divides_by_the_expected_number():
    import keras
    import tensorflow as tf

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)).astype("f4"), rng.normal(0, 3, size=20).astype("f4")
    weight = np.append(np.ones(19, "f4"), np.float32(0))

    def kernels_after(noise: float, weight: np.ndarray, count: int) -> np.ndarray:
        """`[count + 1, 3]`: the kernel before and after steps of all rows, each with seeds of its own."""
        given = keras.Input((3,))
        layer = keras.layers.Dense(1, use_bias=False, kernel_initializer=keras.initializers.Constant(0.5))
        model = keras.Model(given, layer(given))
        optimizer = keras.optimizers.SGD(1.0)
        optimizer.build(model.trainable_variables)
        steps = Steps(
            model, Objective(keras.losses.mean_squared_error, private=(0.7, noise)), optimizer, [keras.metrics.Mean("loss")],
            tf.distribute.get_strategy(), ({"x": (3,)}, tf.TensorSpec((None,))), 0, 1,
        )  # fmt: skip
        found = [np.asarray(layer.kernel)[:, 0]]
        for secret in range(count):
            draws = {SECRET: np.full((20, 2), secret, np.int32)}
            block = Block({"x": x}, y, weight, np.array([0, 20], np.int32), np.array([32], np.float32), draws)
            steps.train(next(Feed(iter([block]), "CPU:0")), 0, 1, np.zeros(HOST, np.float32))
            found.append(np.asarray(layer.kernel)[:, 0])
        return np.stack(found)

    each = 2 * (x.sum(axis=1) * 0.5 - y)[:19, None] * x[:19]
    clipped = each * np.minimum(1, 0.7 / np.linalg.norm(each, axis=1))[:, None]
    np.testing.assert_allclose(kernels_after(1e-9, weight, 1)[1], 0.5 - clipped.sum(axis=0) / 32, rtol=1e-4)
    noise = np.diff(kernels_after(2.0, np.zeros(20, "f4"), 60), axis=0)
    assert noise.std() == pytest.approx(2.0 * 0.7 / 32, rel=0.2)


def test_a_budget_that_cannot_be_kept_and_a_model_that_mixes_rows_are_lines():
    import keras

    train = Train.model_validate({"privacy": {"epsilon": 1e-4}})
    with pytest.raises(ModelError, match=r"train.privacy.epsilon: 0.0001 cannot be kept in 500 steps over 100 rows"):
        private.noise_of(train, Manifest(splits={"train": [_shard(100)]}, window=1, row_bytes=1, encrypted=False), 50, 500)
    model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization(name="norm")])
    with pytest.raises(ModelError, match=r"the layer `norm` \(batch normalisation\) lets rows"):
        private.require_private(model)


def _shard(rows: int):
    from heliograph.datasets.shards import Shard

    return Shard(file="a", rows=rows, sha256="")


def test_what_no_attacker_can_change_is_a_line(prepared):
    run, keys = prepared
    box = Box.of(run / "prepare", keys, ["length"], "evaluate.attack")
    assert (box.span["features"] > 0).tolist() == [False, True, True, True]
    with pytest.raises(DataError, match="no feature is called `lenght`: did you mean `length`"):
        Box.of(run / "prepare", keys, ["lenght"], "evaluate.attack")
    with pytest.raises(DataError, match="nothing of a row can be changed by a little"):
        Box.of(run / "prepare", keys, ["length", "width", "petal_length", "petal_width"], "evaluate.attack")


# Explanations


def test_shapley_values_are_those_of_all_orders():
    rng = np.random.default_rng(0)
    row, reference = {"x": rng.normal(size=(1, 4)).astype("f4")}, {"x": np.zeros((1, 4), "f4")}

    def forward(inputs):
        x = inputs["x"].astype(np.float64)
        return (x[:, :1] * x[:, 1:2] + np.tanh(x[:, 2:3]) + x[:, 3:4] ** 2 * x[:, :1]).astype(np.float64)

    who = [explain.Player(f"c{i}", "x", np.arange(4) == i) for i in range(4)]
    exact = np.zeros(4)
    for order in itertools.permutations(range(4)):
        x = reference["x"].copy()
        for player in order:
            before = forward({"x": x})[0, 0]
            x[0, player] = row["x"][0, player]
            exact[player] += (forward({"x": x})[0, 0] - before) / 24
    found = explain.shapley(forward, row, reference, who, 0, 400, 0)
    np.testing.assert_allclose(found, exact, atol=0.05)
    assert found.sum() == pytest.approx(float(forward(row)[0, 0] - forward(reference)[0, 0]), abs=1e-6)


def test_expected_gradients_add_up_and_do_not_depend_on_the_rows_beside(classified):
    model, rows, _, _ = classified
    background = {"features": rows[:50]}
    which = np.asarray(model(rows[100:130])).argmax(axis=1)
    found = explain.gradients(model, {"features": rows[100:130]}, background, which)["features"]
    alone = explain.gradients(model, {"features": rows[105:106]}, background, which[5:6])["features"]
    np.testing.assert_allclose(found[5], alone[0], atol=1e-5)
    answers = np.asarray(model(rows[100:130]))[np.arange(30), which]
    usual = np.asarray(model(rows[:50])).mean(axis=0)[which]
    np.testing.assert_allclose(found.sum(axis=1), answers - usual, atol=0.02)


# Familiarity and drift


def test_strange_digits_are_told_from_digits():
    from sklearn.datasets import load_digits
    from sklearn.metrics import roc_auc_score

    images = (load_digits().images[np.random.default_rng(0).permutation(1797)] / 16).astype("f4")
    rng = np.random.default_rng(1)
    made = guard.Guard.fit({"image": images[:1200]}, {"image": images[1200:1400]})
    with np.load(io.BytesIO(made.dump()), allow_pickle=False) as found:
        again = guard.Guard({name: found[name] for name in found.files})
    test = images[1400:]
    usual = again.scores({"image": test})
    np.testing.assert_allclose(usual, made.scores({"image": test}))
    assert (usual > 1).mean() < 0.05
    shuffled = rng.permuted(test.reshape(len(test), -1), axis=1).reshape(test.shape)
    for strange in (1 - test, shuffled, rng.random(test.shape).astype("f4")):
        scores = again.scores({"image": strange})
        assert roc_auc_score(np.repeat([0, 1], len(test)), np.concatenate([usual, scores])) >= 0.95


def test_an_isolation_forest_as_arrays_scores_as_scikit_learns():
    from sklearn.ensemble import IsolationForest

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(500, 4)).astype("f4")
    made = guard.Guard.fit({"x": rows[:400]}, {"x": rows[400:]})
    seen = guard._seen(rows, made.a)
    forest = IsolationForest(n_estimators=guard.TREES, max_samples=256, random_state=0).fit(guard._seen(rows[:400], made.a))
    np.testing.assert_allclose(made._each(rows)[:, 0], -forest.score_samples(seen), rtol=1e-5)


def test_the_feature_that_moved_is_named_and_no_other():
    import pyarrow as pa

    rng = np.random.default_rng(0)
    counts = np.histogram(rng.normal(size=5000), guard.BINS, (-4, 4))[0]
    known = [guard._shared(n, np.array([0, *counts, 0, 0]), 5000, low=-4.0, high=4.0) for n in ("a", "b")]
    known.append(guard._shared("city", np.array([300, 200, 0, 0]), 500, values=("Rome", "Oslo")))
    reference = guard.Reference(mean={}, features=tuple(known), answers=())

    def shifts(rows: int, gap: float, share: float) -> dict[str, bool]:
        parts = []
        for _ in range(2):
            found = guard.Counts(reference)
            for _ in range(5):
                columns = {"a": rng.normal(size=rows), "b": rng.normal(gap, 1, rows)}
                columns["city"] = pa.array(rng.choice(["Rome", "Oslo"], rows, p=[share, 1 - share]))
                found.add(columns, np.zeros((rows, 1)))
            parts.append(found)
        return {s.name: s.moved for s in parts[0].merge(parts[1]).shifts()}

    assert shifts(100, 0.0, 0.6) == {"a": False, "b": False, "city": False}
    assert shifts(100, 1.0, 0.6) == {"a": False, "b": True, "city": False}
    assert shifts(100, 0.0, 0.2) == {"a": False, "b": False, "city": True}
    assert shifts(5, 3.0, 0.0) == {}  # too few rows to say anything


def test_a_reference_holds_no_row(prepared):
    import json

    run, _ = prepared
    found = guard.Reference.model_validate(json.loads((run / "bundle" / "reference.json").read_text()))
    schema = Schema.read(run / "prepare")
    assert [d.name for d in found.features] == [f.name for f in schema.features]
    assert all(abs(sum(d.shares) - 1) < 1e-9 for d in (*found.features, *found.answers))
    assert len(found.mean["features"]) == 4
    assert isinstance(schema.features[0], Feature)


# Attention and the libraries


def test_attention_is_what_the_layer_computes_and_the_model_stays_as_it_was():
    import keras
    from heliograph.jobs import attention

    keras.utils.set_random_seed(0)
    words = keras.Input((6, 8), name="words")
    x = keras.layers.MultiHeadAttention(2, 4, name="looks")(words, words)
    model = keras.Model(words, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling1D()(x)))
    rows = np.random.default_rng(0).normal(size=(5, 6, 8)).astype(np.float32)
    before = model(rows).numpy()
    found = attention.weights_of(model, {"words": rows})
    np.testing.assert_array_equal(model(rows).numpy(), before)
    assert "call" not in vars(model.get_layer("looks"))
    query, key = (np.einsum("rpd,dhk->rhpk", rows, np.asarray(part.kernel)) + np.asarray(part.bias)[:, None]
                  for part in (model.get_layer("looks")._query_dense, model.get_layer("looks")._key_dense))  # fmt: skip
    scores = np.einsum("rhqk,rhpk->rhqp", query, key) / 2
    expected = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found["looks"], expected, atol=1e-5)
    np.testing.assert_allclose(found["rollout"], (expected.mean(axis=1) + np.eye(6)).mean(axis=1) / 2, atol=1e-5)
    (shown,) = attention.maps(found)
    assert (shown["layer"], shown["heads"], np.shape(shown["map"])) == ("looks", 2, (6, 6))


@pytest.mark.parametrize("kind", ["shap", "shap_deep", "shap_gradient", "lime"])
def test_the_libraries_agree_with_expected_gradients(classified, kind):
    from heliograph.jobs import explainers

    model, rows, _, _ = classified
    rows, background = rows[100:108], rows[:40]
    outputs = np.asarray(model(rows)).argmax(axis=1)

    def forward(inputs):
        return np.asarray(model(inputs["features"]))

    given = (forward, "features", rows, background, outputs, 0)
    found = explainers.by_lime(*given) if kind == "lime" else explainers.by_shap(kind, model, *given)
    ours = explain.gradients(model, {"features": rows}, {"features": background}, outputs)["features"]
    assert found.shape == rows.shape
    assert np.corrcoef(found.ravel(), ours.ravel())[0, 1] > (0.5 if kind == "lime" else 0.85)


def test_lime_finds_the_patch_that_an_image_is_told_by():
    from heliograph.jobs import explainers

    patches = np.repeat(np.repeat(np.arange(4).reshape(2, 2), 4, axis=0), 4, axis=1)
    rows = np.random.default_rng(0).random((3, 8, 8)).astype(np.float32)

    def forward(inputs):
        sure = inputs["image"][:, :4, 4:].mean(axis=(1, 2))
        return np.stack([1 - sure, sure], axis=1)

    found = explainers.by_lime_of_images(forward, "image", rows + 1, rows, np.ones(3, int), patches, 0)
    assert (found.argmax(axis=1) == 1).all()
    assert np.abs(found[:, [0, 2, 3]]).max() < 0.02 < found[:, 1].min()
