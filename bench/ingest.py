"""Rows into a training, beside the ways that people use.

    uv run python bench/ingest.py [repeats]

100,000 rows of 784 float32 in Parquet, in batches of 256, each batch summed up where a model would use it: heliograph's
blocks (plain and encrypted shards, shuffled), Ray Data's `to_tf` and `iter_tf_batches`, and `tf.data` from rows that are in
memory already. Then 2,000 JPEG files of 128×128 at 96×96: heliograph's shards against `image_dataset_from_directory`, which
decodes them each epoch; preparing the shards is timed apart. Rates are of whole epochs after a first one.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import finish, in_turn

ROWS, WIDTH, BATCH, EPOCHS = 100_000, 784, 256, 3
IMAGES, SIZE, IMAGE_BATCH = 2000, 96, 32


def make(folder: Path) -> None:
    from PIL import Image
    from ray.data.extensions import ArrowTensorArray
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    (folder / "rows").mkdir()
    (folder / "theirs").mkdir()
    for i in range(8):
        x = rng.normal(size=(ROWS // 8, WIDTH)).astype("float32")
        table = pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(x), "y": rng.integers(0, 10, len(x))})
        pq.write_table(table, folder / "rows" / f"{i}.parquet")
        # `to_tf` does not know Arrow's own tensors, only Ray's.
        table = table.set_column(0, "x", ArrowTensorArray.from_numpy(x))
        pq.write_table(table, folder / "theirs" / f"{i}.parquet")
    for kind, photo in enumerate(load_sample_images().images):
        (folder / "images" / str(kind)).mkdir(parents=True)
        for i in range(IMAGES // 2):
            y, x = rng.integers(0, photo.shape[0] - 128), rng.integers(0, photo.shape[1] - 128)
            Image.fromarray(photo[y : y + 128, x : x + 128]).save(folder / "images" / str(kind) / f"{i}.jpg", quality=90)


def prepared(folder: Path, name: str, encrypt: bool, **data: Any) -> Any:
    """Everything that was prepared, as one worker's part of it; and the seconds that it took."""
    from heliograph.cluster.keys import DATA_KEY, KeyStore
    from heliograph.datasets.ingest import Part
    from heliograph.datasets.shards import Manifest
    from heliograph.jobs.prepare import prepare
    from heliograph.project import Data, Split

    keys = KeyStore(folder / "keys")
    if not keys.versions(DATA_KEY):
        keys.rotate(DATA_KEY)
    out = folder / name
    out.mkdir()
    started = time.perf_counter()
    split = Split(validation=0.0, test=0.001)
    given = keys if encrypt else None
    prepare(Data.model_validate({"split": split, "preprocess": [], **data}), folder, given, out, lambda *_: None)
    batch = IMAGE_BATCH if name == "photos" else BATCH
    return Part(out, Manifest.read(out), "train", given, 0, 1, batch, 0), time.perf_counter() - started


def ours(part: Any, epochs: int = EPOCHS) -> float:
    """Rows a second of some epochs after the first."""
    import tensorflow as tf
    from heliograph.datasets.ingest import blocks
    from heliograph.jobs.steps import Feed

    @tf.function(reduce_retracing=True)
    def used(values: Any, edges: Any) -> Any:
        total = tf.zeros(())
        for i in tf.range(tf.shape(edges)[0] - 1):
            total += tf.reduce_sum(values[edges[i] : edges[i + 1]])
        return total

    feed = Feed(blocks(part, 0, (1 + epochs) * part.steps), "CPU:0")
    done, started, rows = 0, 0.0, 0
    while done < (1 + epochs) * part.steps:
        block = next(feed)
        used(next(iter(block.rows[0].values())), block.edges)
        done += block.steps
        if done >= part.steps:
            started = started or time.perf_counter()
            rows += int(block.edges[-1])
    return rows / (time.perf_counter() - started)


def theirs(epoch: Callable[[], Iterable[Any]], rows: int) -> float:
    import tensorflow as tf

    @tf.function(reduce_retracing=True)
    def used(values: Any) -> Any:
        return tf.reduce_sum(values)

    for _ in range(2):
        for values in epoch():
            used(values)
        if _ == 0:
            started = time.perf_counter()
    return rows / (time.perf_counter() - started)


def main(repeats: int) -> None:
    from heliograph.cluster.runtime import LocalCluster

    base = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        make(base)
        with LocalCluster(1) as cluster:
            cluster.start()
            import keras
            import ray.data
            import tensorflow as tf

            tf.config.threading.set_intra_op_parallelism_threads(2)
            tf.config.threading.set_inter_op_parallelism_threads(2)
            plain, seconds = prepared(base, "plain", False, source="rows", target="y")
            print(f"prepared {ROWS:,} rows in {seconds:.1f} s", flush=True)
            sealed, _ = prepared(base, "sealed", True, source="rows", target="y")
            size = {"preprocess": [{"step": "resize", "height": SIZE, "width": SIZE}]}
            photos, seconds = prepared(base, "photos", True, source="images", **size)
            print(f"prepared {IMAGES:,} images in {seconds:.1f} s", flush=True)

            rows = ray.data.read_parquet(str(base / "theirs"))
            whole = pq.read_table(base / "rows")
            x = np.concatenate([c.to_numpy_ndarray() for c in whole["x"].chunks])
            y = whole["y"].to_numpy()

            def memory() -> Iterable[Any]:
                return (a for a, _ in tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).prefetch(tf.data.AUTOTUNE))

            def folder() -> Iterable[Any]:
                made = keras.utils.image_dataset_from_directory(
                    base / "images", image_size=(SIZE, SIZE), batch_size=IMAGE_BATCH, verbose=False
                )
                return (a for a, _ in made)

            speeds = in_turn(
                repeats,
                {
                    "heliograph, plain": lambda: ours(plain),
                    "heliograph, encrypted": lambda: ours(sealed),
                    "to_tf": lambda: theirs(lambda: (a for a, _ in rows.to_tf("x", "y", batch_size=BATCH)), ROWS),
                    "iter_tf_batches": lambda: theirs(lambda: (b["x"] for b in rows.iter_tf_batches(batch_size=BATCH)), ROWS),
                    "tf.data in memory": lambda: theirs(memory, ROWS),
                    "heliograph, images": lambda: ours(photos, 20),
                    "image_dataset_from_directory": lambda: theirs(folder, IMAGES),
                },
                "rows/s",
            )
    finally:
        shutil.rmtree(base, ignore_errors=True)
    fast = {name: median(found) for name, found in speeds.items()}
    own = fast["heliograph, encrypted"]
    finish(
        {
            "vs_to_tf": own / fast["to_tf"],
            "vs_iter_tf_batches": own / fast["iter_tf_batches"],
            "vs_tfdata_memory": own / fast["tf.data in memory"],
            "encrypted_vs_plain": own / fast["heliograph, plain"],
            "images_vs_keras": fast["heliograph, images"] / fast["image_dataset_from_directory"],
        }
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
