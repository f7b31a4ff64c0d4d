"""Ready-made models, what is proposed for a data file, and scikit-learn beside them."""

import numpy as np
import pytest
from heliograph import project
from heliograph.datasets.schema import Feature, Schema, Task
from heliograph.errors import DataError, ModelError
from heliograph.jobs import presets, propose
from heliograph.jobs.compare import paired
from heliograph.jobs.model import build
from heliograph.project import Model

MIXED = Schema(
    task="several", target="kind, price", features=(Feature(name="x"),), vocabulary={"words": 40},
    inputs={"features": (3,), "photo": (9, 7, 3), "words": (6,)},
    tasks=(Task(name="kind", classes=("a", "b")), Task(name="price")),
)  # fmt: skip


def test_a_preset_has_an_encoder_for_each_input_and_an_answer_for_each_target(tmp_path):
    model = build(Model(preset="image"), MIXED, tmp_path)
    rng = np.random.default_rng(0)
    rows = {n: rng.integers(0, 40, (5, *s)).astype("f4") for n, s in MIXED.inputs.items()}
    answers = np.asarray(model(rows))
    assert answers.shape == (5, 3)
    np.testing.assert_allclose(answers[:, :2].sum(axis=1), 1, atol=1e-5)


def test_padding_changes_no_answer_and_an_empty_text_has_one():
    import keras

    keras.utils.set_random_seed(0)
    answers, weights = [], []
    for length in (6, 11):
        schema = MIXED.model_copy(update={"inputs": {"words": (length,)}, "task": "classification", "target": "kind",
                                          "classes": ("a", "b"), "tasks": ()})  # fmt: skip
        model = presets.preset("text", schema, {})
        if weights:
            for new, old in zip(model.weights, weights, strict=True):
                value = new.numpy()
                value[tuple(map(slice, old.shape))] = old
                new.assign(value)
        weights = [w.numpy() for w in model.weights]
        ids = np.zeros((2, length), "f4")
        ids[0, :4] = [7, 3, 9, 1]
        answers.append(np.asarray(model(ids)))
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-5)
    assert np.isfinite(answers[0]).all()


def test_a_preset_that_does_not_fit_is_a_line(tmp_path):
    table = Schema(task="regression", target="y", features=(Feature(name="x"),), inputs={"features": (3,)})
    with pytest.raises(ModelError, match=r"preset: `image` needs an input .* `features` \(tabular\): write `tabular`"):
        build(Model(preset="image"), table, tmp_path)
    with pytest.raises(ModelError, match=r"model.hp.widht: the preset `tabular` has width, depth"):
        build(Model(preset="tabular", hp={"widht": 3}), table, tmp_path)


@pytest.mark.parametrize("name", ["breast_cancer", "wine", "diabetes", "digits"])
def test_a_preset_is_no_worse_than_scikit_learn(name):
    """Trained by Keras as `heliograph init` proposes; `bench/presets.py` does it by whole runs."""
    import keras
    import yaml
    from sklearn import datasets, ensemble, linear_model

    found = getattr(datasets, f"load_{name}")()
    order = np.random.default_rng(1).permutation(len(found.target))
    rows, target = found.data[order].astype("f4"), found.target[order]
    kind, shape = ("image", (8, 8)) if name == "digits" else ("tabular", rows.shape[1:])
    cut = int(0.75 * len(rows))
    rows = (rows - rows[:cut].mean(axis=0)) / (rows[:cut].std(axis=0) + 1e-6)
    classes = () if name == "diabetes" else tuple(range(target.max() + 1))
    schema = Schema(
        task="classification" if classes else "regression", target="y", classes=classes, features=(Feature(name="x"),),
        inputs={"features": shape}, scale=(float(target[:cut].mean()), float(target[:cut].std())),
    )  # fmt: skip
    train = yaml.safe_load("\n".join(propose._training(kind, len(rows))))["train"]
    keras.utils.set_random_seed(0)
    model, fed = presets.preset(kind, schema, {}), rows.reshape(-1, *shape)
    steps = train["epochs"] * -(-cut // train["batch_size"])
    optimizer = train["optimizer"]
    rate = keras.optimizers.schedules.CosineDecay(optimizer["learning_rate"], steps)
    loss = "sparse_categorical_crossentropy" if classes else "mse"
    model.compile(keras.optimizers.AdamW(rate, optimizer["weight_decay"]), loss)
    model.fit(fed[:cut], target[:cut], batch_size=train["batch_size"], epochs=train["epochs"], verbose=0)
    ours = np.asarray(model.predict(fed[cut:], verbose=0))
    if classes:
        others = [linear_model.LogisticRegression(max_iter=1000), ensemble.HistGradientBoostingClassifier(random_state=0)]
    else:
        others = [linear_model.RidgeCV(np.logspace(-3, 3, 13)), ensemble.HistGradientBoostingRegressor(random_state=0)]
    for other in others:
        other.fit(rows[:cut], target[:cut])
        theirs = other.predict_proba(rows[cut:]) if classes else other.predict(rows[cut:])[:, None]
        said = paired(target[cut:], theirs.astype("f4"), ours, schema)
        assert said["verdict"] != "the first is better", (type(other).__name__, said["figures"])


ROWS = "\n".join(f"{i},{18 + i % 50},{'north' if i % 3 else 'south'},always,{3.5 * (i % 50) + (i % 3) + 0.5}" for i in range(60))


def test_what_is_proposed_for_a_file_leaves_out_what_says_nothing(tmp_path):
    (tmp_path / "rents.csv").write_text(f"number,age,region,state,price\n{ROWS}\n")
    source = propose.found(str(tmp_path / "rents.csv"))
    head = propose.columns_of(source)
    assert propose.likely_target(head) == "price"
    text = propose.propose("rents", source, head, "price", tmp_path / "project")
    propose.written(tmp_path / "project", text)
    made = project.load(tmp_path / "project")
    assert (made.data.source, made.data.features, made.model.preset) == ("../rents.csv", ["age", "region"], "tabular")
    assert "`number` numbers the rows" in text
    assert "`state` never changes" in text
    assert "Predicts `price` (a number) from 2 columns of 60 rows" in text
    with pytest.raises(DataError, match="has no column `prize`: its columns are `number`"):
        propose.propose("rents", source, head, "prize", tmp_path / "project")
    with pytest.raises(DataError, match=r"nowhere.csv: not found: name a file"):
        propose.found(str(tmp_path / "nowhere.csv"))


def test_images_in_folders_get_the_image_preset(tmp_path):
    from PIL import Image

    for kind, grey in (("dark", 20), ("light", 230)):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20, 20), (grey, grey, grey + i)).save(tmp_path / "photos" / kind / f"{i}.png")
    source = str(tmp_path / "photos")
    text = propose.propose("photos", source, propose.columns_of(source), "label", tmp_path)
    assert "preset: image" in text
    assert "step: resize" in text
    propose.written(tmp_path, text)
    assert project.load(tmp_path).data.source == "photos"
