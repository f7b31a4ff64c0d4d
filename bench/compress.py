"""Compression: what each recipe makes of a digits CNN, a breast cancer MLP and a small transformer on text, and what distillation
is good for.

    uv run --group bench python bench/compress.py [--seeds 3] [--only digits|labels|cancer|text]

Controls of the same run: the narrow network and the small student trained from scratch for as many epochs; `keras.distillation`
with its defaults; with 150 labels, a teacher that was trained on these 150 alone, and one trained on labels of all other rows.
The text is the standard library's documentation, and the task, which package a piece of it is from.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from statistics import mean, median

from common import cluster, finish, ran, test_accuracy

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
DIGITS = """\
name: digits
data:
  {data}
  split: {{validation: {validation}, test: {test}, seed: {seed}}}
  preprocess: [{{step: standardise}}]
model: {{hp: {{filters: {filters}, units: {units}, dropout: 0.3}}}}
train: {{epochs: {epochs}, batch_size: 64, optimizer: {{name: adam, learning_rate: 0.002}}, seed: {seed}}}
"""
TABLE = """\
compress:
  recipes:
    dynamic-range: dynamic_range
    float16: float16
    int8: int8
    int4: int4
    onnx-int8: onnx_int8
    pruned-90: [{{step: prune, sparsity: 0.9, epochs: {more}}}, int8]
    pruned-2-4: [{{step: prune, pattern: "2:4", epochs: {more}}}, dynamic_range]
    narrow-50: [{{step: channels, share: 0.5, epochs: {more}}}]
    rounded: [{{step: qat, epochs: {more}}}, int8]
    student: [{{step: distil, hp: {small}, epochs: {long}}}]
    chain: [{{step: distil, hp: {small}, epochs: {long}}}, {{step: prune, sparsity: 0.5, epochs: {more}}}, int8]
"""
POOL = '''\
import numpy as np
import pandas as pd
import ray.data
from sklearn.datasets import load_digits


def rows(part):
    """540 rows with labels, of which about 150 are to train on, and the other 1,257, without; or those alone, with."""
    found = load_digits()
    order = np.random.default_rng({seed}).permutation(1797)
    labelled, pool = order[:540], order[540:]
    taken = {{"pool": pool, "alone": labelled, "few": order}}[part]
    target = found.target.astype(float)
    if part == "few":
        target[pool] = np.nan
    return ray.data.from_pandas(pd.DataFrame({{"image": list(found.images[taken].astype("f4")), "target": target[taken]}}))


def few():
    return rows("few")


def alone():
    return rows("alone")


def pool():
    return rows("pool")
'''
CANCER = """\
name: cancer
data: {{source: "sklearn://breast_cancer", target: target, split: {{validation: 0.15, test: 0.3, seed: {seed}}}}}
model: {{hp: {{units: 64}}}}
train: {{epochs: 30, batch_size: 32, optimizer: {{name: adam, learning_rate: 0.002}}, seed: {seed}}}
"""
MLP = """\
import keras
from keras import layers


def build(schema, hp):
    given = keras.Input(schema.input_shape)
    x = layers.Dense(hp.units, activation="relu", name="first")(given)
    x = layers.Dense(hp.units, activation="relu", name="second")(x)
    return keras.Model(given, layers.Dense(schema.outputs, activation="softmax", name="out")(x))
"""
TEXT = """\
name: words
data:
  source: texts.csv
  target: package
  split: {{validation: 0.15, test: 0.25, seed: {seed}}}
  preprocess: [{{step: tokenise, length: 48, vocabulary: 4000}}]
model: {{hp: {{width: 64, hidden: 128}}}}
train: {{epochs: 8, batch_size: 64, optimizer: {{name: adam, learning_rate: 0.001}}, seed: {seed}}}
"""
TRANSFORMER = """\
import keras
from keras import layers


def build(schema, hp):
    (name, shape), = schema.inputs.items()
    ids = keras.Input(shape, name=name)
    x = layers.Embedding(4000, hp.width, name="words")(ids)
    x = layers.Dropout(0.2)(x)
    a = layers.MultiHeadAttention(4, hp.width // 4, name="attention")(x, x)
    x = layers.LayerNormalization(name="norm1")(layers.Add()([x, a]))
    y = layers.Dense(hp.hidden, activation="relu", name="up")(x)
    y = layers.Dense(hp.width, name="down")(y)
    x = layers.LayerNormalization(name="norm2")(layers.Add()([x, y]))
    x = layers.Dropout(0.3)(layers.GlobalAveragePooling1D()(x))
    return keras.Model(ids, layers.Dense(schema.outputs, activation="softmax", name="out")(x))
"""
PACKAGES = ("tkinter", "idlelib", "asyncio", "email", "importlib", "logging", "xml", "multiprocessing")


def texts(file: Path) -> None:
    import ast
    import csv
    import sysconfig

    library = Path(sysconfig.get_paths()["stdlib"])
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["text", "package"])
        for package in PACKAGES:
            for source in sorted((library / package).rglob("*.py")):
                if "test" in str(source.relative_to(library)):
                    continue
                for node in ast.walk(ast.parse(source.read_text(errors="replace"))):
                    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module | ast.AsyncFunctionDef):
                        said = ast.get_docstring(node) or ""
                        if len(said.split()) >= 4:
                            writer.writerow([" ".join(said.split()), package])


def rows(run) -> dict[str, dict]:
    note = json.loads((run["compress"] / "compress.json").read_text())
    return {row["name"]: row for row in note["candidates"]}


CNN = Path(__file__).parent.parent / "examples" / "digits" / "model.py"


def described(seed: int, found: dict[str, dict]) -> None:
    for name, row in found.items():
        print(
            f"seed {seed}  {name:<14} {row['bytes'] / 1024:7.1f} KiB  {row['figures']['size']:.3f}×"
            f"  gzip {row['figures']['gzip']:.3f}×"
            f"  test {row['test']['accuracy']:.4f}  1 row {row['latency_ms']['p50_1']:.4f} / {row['latency_ms']['p99_1']:.4f} ms"
            f"  32 rows {row['latency_ms']['p50_32']:.4f} / {row['latency_ms']['p99_32']:.4f} ms  {row['engine']}"
            f"  {row['parameters']:,} parameters  zeros {row['sparsity']:.2f}  off by {row['gap']:.1e}",
            flush=True,
        )


def summed(prefix: str, seeds: list[dict[str, dict]]) -> dict[str, float]:
    out: dict[str, float] = {}
    for name in seeds[0]:
        of = [found[name] for found in seeds]
        out[f"{prefix}.{name}.size"] = median(r["figures"]["size"] for r in of)
        out[f"{prefix}.{name}.gzip"] = median(r["figures"]["gzip"] for r in of)
        out[f"{prefix}.{name}.accuracy"] = median(r["test"]["accuracy"] for r in of)
        out[f"{prefix}.{name}.latency"] = median(r["figures"]["latency"] for r in of)
    return out


def digits(root: Path, running, seeds: int) -> dict[str, float]:
    tables, scratch, student, default = [], [], [], []
    where = {"data": 'source: "sklearn://digits"\n  target: target', "validation": 0.1, "test": 0.3}
    for seed in range(seeds):
        text = DIGITS.format(**where, seed=seed, filters=32, units=128, epochs=12)
        text += TABLE.format(more=10, long=24, small="{filters: 9, units: 32}")
        run = ran(root / f"digits-{seed}", running, text, CNN)
        tables.append(rows(run))
        described(seed, tables[-1])
        for name, filters, units, epochs, out in (("narrow", 16, 64, 22, scratch), ("student", 9, 32, 24, student)):
            text = DIGITS.format(**where, seed=seed, filters=filters, units=units, epochs=epochs)
            out.append(test_accuracy(ran(root / f"{name}-{seed}", running, text, CNN)))
            print(f"seed {seed}  {name} from scratch, {epochs} epochs: test {out[-1]:.4f}", flush=True)
        default.append(keras_default(run, seed))
        print(f"seed {seed}  keras.distillation with its defaults, the same student: test {default[-1]:.4f}", flush=True)
    figures = summed("digits", tables)
    dense = [t["int8"]["gzip"] for t in tables]
    return figures | {
        "digits.pruned-90.gzip_of_int8": median(t["pruned-90"]["gzip"] / d for t, d in zip(tables, dense, strict=True)),
        "digits.narrow_from_scratch.accuracy": median(scratch),
        "digits.student_from_scratch.accuracy": median(student),
        "digits.keras_distillation_default.accuracy": median(default),
    }


def keras_default(run, seed: int) -> float:
    """The small student taught by Keras' Distiller as its documentation shows, 24 epochs; the accuracy on the test rows."""
    import ray
    from heliograph.cluster.keys import KeyStore

    return ray.get(
        ray.remote(max_calls=1)(_keras_default).remote(run["prepare"], run["train"], KeyStore(run.folder / "keys"), seed)
    )


def _keras_default(prepared: Path, trained: Path, keys, seed: int) -> float:
    import importlib.util
    from types import SimpleNamespace

    import keras
    from heliograph.datasets import shards
    from heliograph.datasets.schema import Schema, to_numpy
    from heliograph.datasets.shards import TARGET, Manifest
    from heliograph.jobs.engine import Engine
    from heliograph.jobs.export import sample

    keras.utils.set_random_seed(seed)
    spec = importlib.util.spec_from_file_location("cnn", CNN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    inputs, target = sample(prepared, keys, "train", 10_000)
    teacher = keras.saving.load_model(trained / "model.keras", compile=False)
    student = module.build(Schema.read(prepared), SimpleNamespace(filters=9, units=32, dropout=0.3))
    distiller = keras.distillation.Distiller(
        teacher=teacher, student=student, distillation_losses=keras.distillation.LogitsDistillation(temperature=3.0)
    )
    distiller.compile(optimizer=keras.optimizers.Adam(0.002), loss="sparse_categorical_crossentropy")
    distiller.fit(next(iter(inputs.values())), target, batch_size=64, epochs=24, verbose=0)
    engine, right, count = Engine(trained, prepared), 0, 0
    for shard in Manifest.read(prepared).splits["test"]:
        with shards.open_shard(prepared / shard.file, keys) as opened:
            table = shards.read_table(opened, prepared / shard.file)
        made = engine.preprocessing.apply(engine.schema.columns(table))
        guess = student.predict(next(iter(made.values())), verbose=0).argmax(1)
        right, count = right + int((guess == to_numpy(table.column(TARGET))).sum()), count + len(guess)
    return right / count


def labels(root: Path, running, seeds: int) -> dict[str, float]:
    """150 labels, and 1,257 rows without. `alone` trains on the labelled rows in batches of their own, `plain` on batches of all
    rows, of which the labelled ones have a loss: more steps, and the better baseline."""
    found: dict[str, list[float]] = {"alone": [], "plain": [], "teacher_of_150": [], "teacher_of_all": []}
    for seed in range(seeds):
        data = 'source: "made:{}"\n  target: target\n  unlabelled: true'
        made = POOL.format(seed=seed)
        text = DIGITS.format(data=data.format("pool"), validation=0.1, test=0.1, seed=seed, filters=32, units=128, epochs=12)
        teacher = ran(root / f"teacher-{seed}", running, text, CNN, made=made)
        text = DIGITS.format(data=data.format("few"), validation=0.12, test=0.6, seed=seed, filters=9, units=32, epochs=40)
        text += (
            f"compress:\n  recipes:\n    own: [{{step: distil}}]\n    all: [{{step: distil, teachers: ['{teacher.folder}']}}]\n"
        )
        run = ran(root / f"few-{seed}", running, text, CNN, made=made)
        table = rows(run)
        manifest = json.loads((run["prepare"] / "manifest.json").read_text())
        few = sum(manifest["class_rows"])
        text = DIGITS.format(data=data.format("alone"), validation=0.12, test=0.6, seed=seed, filters=9, units=32, epochs=40)
        found["alone"].append(test_accuracy(ran(root / f"alone-{seed}", running, text, CNN, made=made)))
        for name, form in (("plain", "original"), ("teacher_of_150", "own"), ("teacher_of_all", "all")):
            found[name].append(table[form]["test"]["accuracy"])
        print(f"seed {seed}  {few} labels, {manifest['unlabelled']} rows without: "
              + ", ".join(f"{name} {values[-1]:.4f}" for name, values in found.items() if values), flush=True)  # fmt: skip
    pairs = (("alone", "teacher_of_all"), ("plain", "teacher_of_all"), ("alone", "teacher_of_150"))
    gains = {f"labels.{b}_over_{a}": mean(y - x for x, y in zip(found[a], found[b], strict=True)) for a, b in pairs}
    return {f"labels.{name}": mean(values) for name, values in found.items()} | gains


def cancer(root: Path, running, seeds: int) -> dict[str, float]:
    tables = []
    for seed in range(seeds):
        text = CANCER.format(seed=seed) + TABLE.format(more=10, long=30, small="{units: 16}")
        tables.append(rows(ran(root / f"cancer-{seed}", running, text, MLP)))
        described(seed, tables[-1])
    return summed("cancer", tables)


def text(root: Path, running, seeds: int) -> dict[str, float]:
    tables = []
    for seed in range(seeds):
        file = TEXT.format(seed=seed) + TABLE.format(more=4, long=8, small="{width: 16, hidden: 32}")
        folder = root / f"text-{seed}"
        folder.mkdir()
        texts(folder / "texts.csv")
        tables.append(rows(ran(folder, running, file, TRANSFORMER)))
        described(seed, tables[-1])
    return summed("text", tables)


PARTS = {"digits": digits, "labels": labels, "cancer": cancer, "text": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=PARTS)
    options = parser.parse_args()
    root, figures = Path(tempfile.mkdtemp()), {}
    try:
        with cluster() as running:
            for name, part in PARTS.items():
                if options.only in (None, name):
                    print(f"— {name}", flush=True)
                    figures |= part(root, running, options.seeds)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    finish(figures)


if __name__ == "__main__":
    main()
