"""Transfer: what is frozen stays to the bit, layers train from their epoch on, and adapters merge into an ordinary model."""

import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from heliograph import project
from heliograph.cluster.keys import KeyStore
from heliograph.errors import HeliographError, ModelError
from heliograph.jobs import transfer
from heliograph.jobs.stages import Run

from ..conftest import executed

FILE = """\
name: {name}
data: {{source: "made:rows", target: kind, split: {{validation: 0.2, test: 0.2}}, shards: 2}}
model: {{start: {{model: {model}, {start}}}}}
train:
  epochs: {epochs}
  batch_size: 16
  checkpoint: {{keep: 3}}
  optimizer: {{name: adamw, learning_rate: 0.01, weight_decay: 0.1}}
"""
ROWS = '''\
import numpy as np
import ray.data


def rows():
    """Pictures of 8×8 with a bright spot, of three kinds by where it is."""
    draw = np.random.default_rng(1)
    kinds = draw.integers(0, {classes}, 240)
    images = draw.normal(0, 0.3, (240, 8, 8)).astype(np.float32)
    for image, kind in zip(images, kinds):
        image[2 * kind : 2 * kind + 2] += 1
    return ray.data.from_items([{{"image": image, "kind": int(kind)}} for image, kind in zip(images, kinds)])
'''


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A small network with batch normalisation, saved by Keras."""
    keras.utils.set_random_seed(3)
    layers = keras.layers
    model = keras.Sequential([
        keras.Input((8, 8), name="image"), layers.Reshape((8, 8, 1)), layers.Conv2D(4, 3, name="conv1"),
        layers.BatchNormalization(name="norm1"), layers.ReLU(), layers.Conv2D(4, 3, name="conv2"), layers.Flatten(),
        layers.Dense(12, activation="relu", name="dense1"), layers.Dense(7, activation="softmax", name="out"),
    ])  # fmt: skip
    file = tmp_path_factory.mktemp("source") / "source.keras"
    model.save(file)
    return file


def trained(folder: Path, cluster, source: Path | str, start: str, epochs: int = 2, classes: int = 3) -> Run:
    folder.mkdir(exist_ok=True)
    (folder / "made.py").write_text(ROWS.format(classes=classes))
    text = FILE.format(name="spots", model=source, start=start, epochs=epochs)
    (folder / "heliograph.yaml").write_text(text)
    return executed(folder, cluster)


def weights(file: Path) -> dict[str, list[np.ndarray]]:
    return {layer.name: layer.get_weights() for layer in keras.saving.load_model(file, compile=False).layers}


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_what_is_frozen_stays_to_the_bit_until_its_epoch(tmp_path, cluster, source):
    before = weights(source)
    run = trained(tmp_path / "spots", cluster, source, "freeze: [conv*, norm*], unfreeze: {3: [conv2]}", epochs=3)
    after = weights(run["train"] / "model.keras")
    assert all(same(before[name], after[name]) for name in ("conv1", "norm1"))
    assert not any(same(before[name], after[name]) for name in ("conv2", "dense1"))
    assert after["head"][0].shape == (12, 3)
    _, second, _ = sorted((run["train"] / "checkpoints").glob("step-*"))[-3:]
    arrays = list(np.load(second / "state.npz").values())
    assert any(np.array_equal(before["conv2"][0], array) for array in arrays)  # after two epochs
    assert not any(np.array_equal(before["dense1"][0], array) for array in arrays)
    note = json.loads((run["bundle"] / "bundle.json").read_text())
    assert note["lineage"]["ancestor"] == transfer.digest(source)


def test_adapters_are_kept_apart_and_merge(tmp_path, cluster, source):
    run = trained(tmp_path / "lora", cluster, source, "lora: {rank: 2, layers: [conv*, dense1]}")
    before, after = weights(source), weights(run["train"] / "model.keras")
    found = dict(np.load(run["train"] / "adapters.npz"))
    assert {key.split("/")[0] for key in found} == {"conv1", "conv2", "dense1"}
    assert same(before["norm1"], after["norm1"])
    for name in ("conv1", "conv2", "dense1"):
        assert same(before[name][1:], after[name][1:])  # biases
        assert not same(before[name][:1], after[name][:1])
    plain = keras.saving.load_model(run["train"] / "model.keras", compile=False)
    assert not any(getattr(layer, "lora_enabled", False) for layer in plain.layers)
    # The model that it started from, with the adapters added, is the one that was exported.
    again = keras.saving.load_model(source, compile=False)
    transfer.merge(again, found)
    for name in ("conv1", "conv2", "dense1"):
        assert np.abs(again.get_layer(name).get_weights()[0] - after[name][0]).max() < 1e-6
    with pytest.raises(ModelError, match="adapters: layer `dense1`: they are for a kernel of"):
        other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense1")])
        transfer.merge(other, {key: value for key, value in found.items() if key.startswith("dense1")})
    # A model of the registry is one to start from, too, and its descendant says so.
    shutil.copytree(tmp_path / "lora" / "registry", tmp_path / "next" / "registry")
    shutil.copytree(tmp_path / "lora" / "runs" / "default" / "keys", tmp_path / "next" / "runs" / "default" / "keys")
    child = trained(tmp_path / "next", cluster, "spots@1", "rates: {conv*: 0.1}", epochs=1, classes=2)
    note = json.loads((child["bundle"] / "bundle.json").read_text())["lineage"]
    assert note["ancestor"] == transfer.digest(source)
    assert note["start"]["lineage"]["ancestor"] == note["ancestor"]


def test_layers_have_their_own_rates(source):
    import tensorflow as tf
    from heliograph.datasets.schema import Feature, Schema

    start = project.Start(model=str(source), rates={"conv1": 0.5, "conv*": 0.25})
    feature = Feature(name="image", kind="tensor", shape=(8, 8))
    schema = Schema(task="classification", target="y", classes=(0, 1), features=(feature,), inputs={"image": (8, 8)})
    model = transfer.started(start, schema)
    optimizer = keras.optimizers.SGD(0.1)
    transfer.pace(optimizer, model, start, 10)
    optimizer.build(model.trainable_variables)
    before = [np.array(v) for v in model.trainable_variables]
    optimizer.apply([tf.ones(v.shape) for v in model.trainable_variables])
    for variable, old in zip(model.trainable_variables, before, strict=True):
        factor = {"conv1": 0.5, "conv2": 0.25}.get(variable.path.split("/")[0], 1.0)
        np.testing.assert_allclose(old - np.array(variable), 0.1 * factor, rtol=1e-5)


def test_every_mistake_is_a_line(tmp_path, source):
    from heliograph.datasets.schema import Feature, Schema
    from heliograph.jobs.registry import registry_at

    feature = Feature(name="image", kind="tensor", shape=(8, 8))
    schema = Schema(task="classification", target="y", classes=(0, 1), features=(feature,), inputs={"image": (8, 8)})
    wide = schema.model_copy(update={"inputs": {"image": (9, 9)}})
    wrong = [
        ({"freeze": ["konv*"]}, "model.start.freeze: `konv*` matches no layer with weights: there are conv1, norm1"),
        ({"freeze": ["conv1"], "unfreeze": {2: ["conv2"]}}, "unfreeze.2: of the frozen layers,: `conv2` matches no layer"),
        ({"rates": {"x": 0.1}}, "model.start.rates: `x` matches no layer"),
        ({"head": "top"}, "model.start.head: the model has no layer `top`: it has reshape"),
        ({"lora": project.Lora(rank=2, layers=["norm1"])}, "model.start.lora.layers: norm1: none of them can have adapters"),
    ]
    for given, said in wrong:
        with pytest.raises(ModelError) as caught:
            transfer.started(project.Start(model=str(source), **given), schema)
        assert said in str(caught.value)
    with pytest.raises(ModelError, match="input `image` has the shape"):
        transfer.started(project.Start(model=str(source)), wide)
    for model, said in (
        ("nothing.keras", "there is no such file"),
        ("digits", "no file, no folder, and no model"),
        (".", "holds"),
    ):
        with pytest.raises(HeliographError) as caught:
            transfer.find(model, tmp_path, KeyStore(tmp_path / "keys"), registry_at("registry", tmp_path))
        assert said in str(caught.value)
