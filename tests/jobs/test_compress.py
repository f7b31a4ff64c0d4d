"""Compression: each recipe does what it says, is held against the model, and the best one is what an endpoint answers with."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest
from heliograph import project
from heliograph.cluster.keys import KeyStore
from heliograph.errors import HeliographError, ModelError, ProjectError, RunError
from heliograph.jobs import channels, export, shaping
from heliograph.jobs.engine import Engine
from heliograph.jobs.stages import Run
from heliograph.jobs.take_out import take_out
from heliograph.names import Format

from ..conftest import executed

LAYERS = keras.layers
FILE = """\
name: spots
data: {{source: "made:rows", target: kind, split: {{validation: 0.2, test: 0.2}}, shards: 2}}
model: {{hp: {{filters: 8}}}}
train: {{epochs: 6, batch_size: 16, optimizer: {{name: adam, learning_rate: 0.01}}, {train}}}
compress:
  require: {{{require}}}
  prefer: size
  recipes:
{recipes}
"""
MADE = '''\
import numpy as np
import ray.data


def rows():
    """Pictures of 8×8 with a bright spot, of three kinds by where it is."""
    draw = np.random.default_rng(1)
    kinds = draw.integers(0, 3, 300)
    images = draw.normal(0, 0.3, (300, 8, 8)).astype(np.float32)
    for image, kind in zip(images, kinds):
        image[2 * kind : 2 * kind + 2] += 1
    return ray.data.from_items([{"image": image, "kind": int(kind)} for image, kind in zip(images, kinds)])
'''
MODEL = """\
import keras
from keras import layers


def build(schema, hp):
    image = keras.Input(schema.input_shape, name="image")
    x = layers.Reshape((8, 8, 1))(image)
    x = layers.Conv2D(hp.filters, 3, activation="relu", name="conv")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(4 * hp.filters, activation="relu", name="hidden")(x)
    return keras.Model(image, layers.Dense(schema.outputs, activation="softmax", name="out")(x))
"""
RECIPES = """\
    dynamic: dynamic_range
    half: float16
    int8: int8
    int4: int4
    onnx: onnx_int8
    pruned: [{step: prune, sparsity: 0.9, epochs: 6}, int8]
    n-m: [{step: prune, pattern: "2:4", layers: [conv, hidden]}]
    narrow: [{step: channels, share: 0.5}]
    rounded: [qat, int8]
    chain: [{step: distil, hp: {filters: 3}, features: {hidden: hidden}}, {step: prune, sparsity: 0.5}, int8]
"""


def written(folder: Path, recipes: str = RECIPES, require: str = '"drop": "<= 0.05"', train: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "made.py").write_text(MADE)
    (folder / "model.py").write_text(MODEL)
    (folder / "heliograph.yaml").write_text(FILE.format(recipes=recipes, require=require, train=train))
    return folder


def table(run: Run) -> dict:
    return json.loads((run["compress"] / "compress.json").read_text())


def rows(run: Run) -> dict[str, dict]:
    return {row["name"]: row for row in table(run)["candidates"]}


def loaded(run: Run, name: str) -> keras.Model:
    """The Keras model that a candidate was converted from."""
    place = run.folder / rows(run)[name]["place"]
    return keras.saving.load_model(sorted(place.glob("[0-9]-*"))[-1] / "model.keras", compile=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory, cluster) -> Run:
    return executed(written(tmp_path_factory.mktemp("compress") / "spots"), cluster)


# What was made


def test_every_form_is_smaller_and_described(made):
    found = rows(made)
    assert found["original"]["figures"]["size"] == 1
    limits = {"dynamic": 0.45, "half": 0.6, "int8": 0.45, "int4": 0.35, "onnx": 0.6, "pruned": 0.45, "narrow": 0.6, "chain": 0.3}
    for name, limit in limits.items():
        assert found[name]["figures"]["size"] < limit, name
    for name, row in found.items():
        assert row["validation"]["accuracy"] > 0.9, name
        assert 0 < row["latency_ms"]["p50_1"] <= row["latency_ms"]["p99_1"]
        assert row["latency_ms"]["p50_1"] < row["latency_ms"]["p50_32"]
        assert row["gap"] < (1e-5 if name in ("original", "narrow", "n-m") else 0.3)


def test_a_global_threshold_prunes_and_a_pattern_keeps_n_of_m(made):
    found = rows(made)
    assert found["pruned"]["sparsity"] == pytest.approx(0.9, abs=0.002)
    assert found["pruned"]["figures"]["gzip"] < 0.6 * found["int8"]["figures"]["gzip"]
    shares = [float((k == 0).mean()) for layer in loaded(made, "pruned").layers for k in layer.get_weights()[:1]]
    assert max(shares) - min(shares) > 0.1  # not alike in all layers
    of_pattern = loaded(made, "n-m")
    for name in ("conv", "hidden"):
        kernel = of_pattern.get_layer(name).get_weights()[0]
        inputs = kernel.reshape(-1, kernel.shape[-1]).T
        groups = inputs[:, : inputs.shape[1] // 4 * 4].reshape(-1, 4)
        assert ((groups != 0).sum(axis=1) == 2).all()
    assert (of_pattern.get_layer("out").get_weights()[0] != 0).all()


def test_structured_pruning_and_distillation_make_other_networks(made):
    narrow, student = loaded(made, "narrow"), loaded(made, "chain")
    assert narrow.get_layer("conv").filters == 4
    assert narrow.get_layer("hidden").units == 16
    assert narrow.get_layer("out").units == 3
    assert student.get_layer("conv").filters == 3
    assert rows(made)["chain"]["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_the_chosen_form_is_the_smallest_that_meets_what_is_required_and_it_answers(made):
    note, found = table(made), rows(made)
    good = [row for name, row in found.items() if row["meets"] and name != "original"]
    assert note["chosen"] == min(good, key=lambda row: row["bytes"])["name"]
    assert note["original_serves"]
    keys = KeyStore(made.folder / "keys")
    engines = {str(engine): engine for engine in Engine.allowed(made["bundle"], 1, "auto", keys)}
    kind = found[note["chosen"]]["engine"]
    assert set(engines) == {"onnx", "litert", f"{kind} (compressed)"}
    only = Engine.fastest(made["bundle"], 1, "compressed", keys)
    inputs, target = export.sample(made["prepare"], keys, "validation", 50)
    assert (only.forward(inputs).argmax(1) == target).mean() > 0.9
    assert np.abs(only.forward(inputs) - engines["onnx"].forward(inputs)).max() > 0  # another model it is


def test_a_changed_recipe_is_the_only_one_that_is_made_again(made, tmp_path, cluster):
    folder = tmp_path / "again"
    shutil.copytree(made.folder.parent.parent, folder)
    before = {name: row["place"] for name, row in rows(made).items()}
    recipes = RECIPES.replace("int8: int8\n", "int8: {step: int8, rows: 20}\n").replace("    half: float16\n", "")
    written(folder, recipes, '"size": "<= 0.0001"')
    run = executed(folder, cluster)
    after = {name: row["place"] for name, row in rows(run).items()}
    assert {name for name in after if after[name] != before[name]} == {"int8"}
    for name in after.keys() - {"int8", "original"}:
        at = [(place / before[name] / "candidate.json").stat().st_mtime for place in (run.folder, made.folder)]
        assert at[0] == at[1]
    assert not (run.folder / before["half"]).exists()
    # Nothing is so small: the bundle has the original alone.
    assert table(run)["chosen"] is None
    assert not list(run["bundle"].glob("compressed.*"))
    assert [str(e) for e in Engine.allowed(run["bundle"], 1)] == ["onnx", "litert"]


LOADED = """\
import json, sys
import numpy as np

rows = np.load(sys.argv[1])
import tensorflow as tf
import onnxruntime as ort

serve = tf.saved_model.load(sys.argv[2]).signatures["serving_default"]
saved = next(iter(serve(image=tf.constant(rows)).values())).numpy()
session = ort.InferenceSession(sys.argv[3])
onnx = session.run(None, {session.get_inputs()[0].name: rows})[0]
assert not any(name.startswith("heliograph") for name in sys.modules)
print(json.dumps([saved.tolist(), onnx.tolist()]))
"""


def test_other_programs_load_what_is_taken_out_and_answer_the_same(made, tmp_path):
    folder = made.folder.parent.parent
    loaded_project = project.load(folder)
    for wanted in (Format.SAVEDMODEL, Format.ONNX, Format.KERAS, Format.LITERT):
        said = take_out(loaded_project, folder, made.folder, tmp_path / wanted, None, wanted)
        assert "differs from the Keras model by" in said
    inputs, _ = export.sample(made["prepare"], KeyStore(made.folder / "keys"), "test", 20)
    np.save(tmp_path / "rows.npy", inputs["image"])
    arguments = [tmp_path / "rows.npy", tmp_path / "savedmodel" / "1", tmp_path / "onnx" / "model.onnx"]
    out = subprocess.run([sys.executable, "-c", LOADED, *arguments], capture_output=True, text=True, check=True, cwd=tmp_path)
    saved, onnx = np.array(json.loads(out.stdout.splitlines()[-1]))
    own = keras.saving.load_model(made["bundle"] / "model.keras", compile=False)(inputs["image"])
    np.testing.assert_allclose(saved, own, atol=1e-5)
    np.testing.assert_allclose(onnx, own, atol=1e-5)
    take_out(loaded_project, folder, made.folder, tmp_path / "small", "int8", Format.LITERT)
    assert (tmp_path / "small" / "model.tflite").stat().st_size == rows(made)["int8"]["bytes"]
    take_out(loaded_project, folder, made.folder, tmp_path / "narrow", "narrow", Format.SAVEDMODEL)
    for form, wanted, said in (
        ("int8", Format.ONNX, "int8: is there as litert alone, not as onnx"),
        ("int9", Format.ONNX, "has no compressed form `int9`: it has original, dynamic"),
        (None, Format.ONNX, "is there already"),
    ):
        with pytest.raises(RunError, match=said):
            take_out(loaded_project, folder, made.folder, tmp_path / ("new" if form else "onnx"), form, wanted)


# Interrupted, sealed, and with several workers


def test_what_was_interrupted_goes_on_from_its_checkpoint(tmp_path, command):
    folder = written(tmp_path / "spots", "    long: [{step: prune, epochs: 150}, int8]\n")
    running = command("run", folder)
    steps = folder / "runs" / "default" / "candidates"
    running.wait_for(lambda: any(len(p.read_text().splitlines()) > 60 for p in steps.glob("*/1-prune/steps.jsonl")), 240)
    code, output = running.end(2)
    assert code == 130, output
    kept = [int(p.name.split("-")[1]) for p in steps.glob("*/1-prune/checkpoints/step-*")]
    assert max(kept) > 40
    code, output = command("run", folder).finish()
    assert code == 0, output
    events = [json.loads(line) for line in next(steps.glob("*/1-prune/events.jsonl")).read_text().splitlines()]
    assert any("going on" in e["text"] and e["step"] >= max(kept) for e in events)
    assert "chosen" in output
    note = json.loads((folder / "runs" / "default" / "compress" / "compress.json").read_text())
    assert note["candidates"][1]["sparsity"] == pytest.approx(0.8, abs=0.01)


def test_two_workers_make_one_model_and_what_is_sealed_stays_sealed(tmp_path, cluster):
    recipes = "    pruned: [{step: prune, sparsity: 0.7}, int8]\n    taught: [{step: distil, hp: {filters: 4}}]\n"
    run = executed(written(tmp_path / "spots", recipes, train="workers: 2, encrypt: true"), cluster)
    for file in run.folder.glob("candidates/*/**/model.*"):
        assert file.read_bytes()[:8] == b"hgseal1\n", file
    keys, found = KeyStore(run.folder / "keys"), rows(run)
    assert found["pruned"]["sparsity"] == pytest.approx(0.7, abs=0.01)
    only = Engine.fastest(run["bundle"], 1, "compressed", keys)
    inputs, target = export.sample(run["prepare"], keys, "validation", 50)
    assert (only.forward(inputs).argmax(1) == target).mean() > 0.9
    for name in ("pruned", "taught"):
        trained = json.loads(next((run.folder / found[name]["place"]).glob("1-*/result.json")).read_text())
        assert trained["workers"] == 2
        assert len(set(trained["weights_sha256"])) == 1


# The parts


def test_masks():
    draw = np.random.default_rng(0)
    values = [draw.normal(size=(10, 20)), 3 * draw.normal(size=(3, 3, 4, 8))]
    masks = shaping.largest(values, 0.6)
    kept = np.concatenate([np.abs(v)[m == 1] for v, m in zip(values, masks, strict=True)])
    gone = np.concatenate([np.abs(v)[m == 0] for v, m in zip(values, masks, strict=True)])
    assert kept.min() > gone.max()
    assert len(gone) == round(0.6 * (200 + 288))
    half = shaping.of_pattern(values, "1:4", 0.5)
    assert [round(float((m == 0).mean()), 2) for m in half] == [0.3, 0.38]  # of 10 inputs, 2 are left over
    whole = shaping.of_pattern(values, "1:4")[1].reshape(-1, 8).T.reshape(-1, 4)
    assert (whole.sum(axis=1) == 1).all()


def test_the_loss_of_distillation_is_the_divergence_of_softened_probabilities():
    draw = np.random.default_rng(0)
    wanted, given = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in draw.normal(size=(2, 6, 4)).astype(np.float32))
    soft = [p ** (1 / 3) / (p ** (1 / 3)).sum(1, keepdims=True) for p in (wanted, given)]
    expected = 9 * (soft[0] * np.log(soft[0] / soft[1])).sum(1)
    np.testing.assert_allclose(shaping.distance(wanted, given, 3.0), expected, rtol=1e-3)
    np.testing.assert_allclose(shaping.distance(wanted, wanted, 3.0), 0, atol=1e-6)
    np.testing.assert_allclose(shaping.distance(wanted, given, 0.0), ((wanted - given) ** 2).mean(1), rtol=1e-5)


def test_rounding_reaches_layers_inside_of_others_and_lets_gradients_through():
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    words = keras.Input((6, 8))
    x = LAYERS.MultiHeadAttention(2, 4, name="attention")(words, words)
    model = keras.Model(words, LAYERS.Dense(2)(LAYERS.Flatten()(x)))
    rows = np.random.default_rng(0).normal(size=(5, 6, 8)).astype(np.float32)
    before = model(rows).numpy()
    shaping._round_in(model)
    after = model(rows).numpy()
    assert 0 < np.abs(after - before).max() < 0.1
    query = model.get_layer("attention")._query_dense
    assert len(np.unique(np.round(np.asarray(query.kernel)[..., 0] / np.abs(query.kernel[..., 0]).max() * 127, 4) % 1)) == 1
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(rows) ** 2)
    assert all(g is not None and np.abs(g).max() > 0 for g in tape.gradient(loss, model.trainable_variables)[:2])


def residual() -> keras.Model:
    image = keras.Input((8, 8, 1))
    x = LAYERS.Conv2D(8, 3, padding="same", name="stem")(image)
    y = LAYERS.Conv2D(8, 3, padding="same", name="inner")(x)
    y = LAYERS.ReLU()(LAYERS.BatchNormalization(name="norm")(y))
    y = LAYERS.DepthwiseConv2D(3, padding="same", name="deep")(y)
    y = LAYERS.Conv2D(8, 3, padding="same", name="outer")(y)
    x = LAYERS.Flatten()(LAYERS.MaxPooling2D()(LAYERS.Add()([x, y])))
    x = LAYERS.Dense(12, activation="relu", name="hidden")(x)
    return keras.Model(image, LAYERS.Dense(3, name="out")(x))


def test_channels_without_weight_can_go_and_nothing_changes():
    keras.utils.set_random_seed(0)
    model = residual()
    for name in ("inner", "hidden"):
        kernel, bias = model.get_layer(name).get_weights()
        gone = ~channels._strongest(model.get_layer(name), 0.5)
        kernel[..., gone], bias[gone] = 0, 0
        model.get_layer(name).set_weights([kernel, bias])
    narrow = channels.narrowed(model, 0.5, ["*"], "here")
    assert [narrow.get_layer(n).weights[0].shape[-1] for n in ("stem", "inner", "outer", "hidden", "out")] == [8, 4, 8, 6, 3]
    assert narrow.get_layer("norm").weights[0].shape == (4,)
    rows = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    np.testing.assert_allclose(model(rows), narrow(rows), atol=1e-5)


def test_what_is_joined_along_another_axis_keeps_its_channels():
    keras.utils.set_random_seed(0)
    words = keras.Input((6, 4))
    both = LAYERS.Concatenate(axis=1)([LAYERS.Dense(8, name="a")(words), LAYERS.Dense(8, name="b")(words)])
    hidden = LAYERS.Dense(8, name="hidden")(LAYERS.GlobalAveragePooling1D()(both))
    narrow = channels.narrowed(keras.Model(words, LAYERS.Dense(2, name="out")(hidden)), 0.5, ["*"], "here")
    assert [narrow.get_layer(name).units for name in ("a", "b", "hidden", "out")] == [8, 8, 4, 2]


# Mistakes


class Odd(LAYERS.Layer):
    def call(self, x):
        import tensorflow as tf

        return tf.math.bessel_i0e(x)


def test_every_mistake_is_a_line(tmp_path, made):
    model, where = residual(), "compress.recipes.x[0]"
    calls = [
        (
            lambda: channels.narrowed(model, 0.5, ["konv*"], where),
            "x[0].layers: `konv*` matches no layer with weights: there are stem",
        ),
        (lambda: channels.narrowed(model, 0.5, ["stem", "out"], where), "of no layer can channels be taken out"),
        (lambda: shaping.kernels(model, ["norm"], where), "x[0].layers: norm: have no kernels"),
        (lambda: shaping._layer(model, "x", where), "no layer `x`: the model has"),
    ]
    narrow = keras.Sequential([keras.Input((3,)), LAYERS.Dense(2, name="a")], name="narrow")
    prune = shaping.Prune(step="prune", pattern="2:4")
    calls.append(
        (lambda: shaping._Pruning(prune, narrow, 10, where), "x[0].pattern: `narrow/a/kernel` has 3 inputs, fewer than 4")
    )
    schema = shaping.Schema.read(made["prepare"])
    distil = shaping.Distil(step="distil")
    calls.append((lambda: shaping._Taught(distil, model, [narrow], schema, where), "one of them answers (2,), the student (3,)"))
    odd = keras.Sequential([keras.Input((4,)), LAYERS.Dense(4, name="first"), Odd(name="my_odd"), LAYERS.Dense(3)])
    for form, step in (("LiteRT", "int8"), ("ONNX", "onnx_int8")):
        recipe = project.Compress(recipes={"x": step}).recipes["x"][0]
        calls.append((
            lambda recipe=recipe: export.quantised(odd, recipe, made["prepare"], KeyStore(made.folder / "keys"), tmp_path, None),
            f"{form} cannot express `BesselI0e` of the layer `my_odd`",
        ))  # fmt: skip
    for call, said in calls:
        with pytest.raises(ModelError) as caught:
            call()
        assert said in str(caught.value)
    assert not list(tmp_path.glob("model.*"))


def test_calibration_data_that_is_gone_is_named(made, tmp_path):
    prepared = tmp_path / "prepare"
    shutil.copytree(made["prepare"], prepared)
    for file in prepared.glob("train*"):
        file.unlink()
    recipe = project.Compress(recipes={"x": "int8"}).recipes["x"][0]
    model = keras.saving.load_model(made["bundle"] / "model.keras", compile=False)
    with pytest.raises(HeliographError, match=r"train.*prepare it again"):
        export.quantised(model, recipe, prepared, KeyStore(made.folder / "keys"), tmp_path, None)


def test_the_project_file_is_checked(tmp_path):
    for recipes, require, said in (
        (
            "    a: {step: prune, sparsitty: 0.9}\n",
            '"drop": "<= 0.1"',
            "compress.recipes.a.sparsitty: unknown key: did you mean `sparsity`?",
        ),
        ("    a: [prun]\n", '"drop": "<= 0.1"', "compress.recipes.a[0].step: found 'prun': did you mean `prune`?"),
        ("    a: [int8, prune]\n", '"drop": "<= 0.1"', "int8 says how numbers are kept, so it can only be the last step"),
        ("    a: int8\n", '"sise": "<= 0.1"', "`sise` is no figure of a candidate"),
        ("    a: int8\n", '"drop": "< 0.1"', "compress.require.drop: found '< 0.1'"),
        ('    a: {step: prune, pattern: "4:2"}\n', '"drop": "<= 0.1"', "N must be smaller than M"),
    ):
        with pytest.raises(ProjectError) as caught:
            project.load(written(tmp_path / "bad", recipes, require))
        assert said in str(caught.value), textwrap.indent(str(caught.value), "  ")


def test_a_recipe_that_fails_keeps_the_others(tmp_path, cluster, made):
    folder = tmp_path / "bad"
    shutil.copytree(made.folder.parent.parent, folder)
    written(folder, RECIPES + "    bad: {step: prune, layers: [konv]}\n    too: {step: distil, features: {hidden: x}}\n")
    with pytest.raises(ModelError) as caught:
        executed(folder, cluster)
    first, second = sorted(str(caught.value).splitlines())
    assert first.startswith("heliograph.yaml: compress.recipes.bad[0].layers: `konv` matches no layer")
    assert second.startswith("heliograph.yaml: compress.recipes.too[0].features: no layer `x`: the model has")
    assert len(list((folder / "runs" / "default" / "candidates").glob("*/candidate.json"))) == 10
