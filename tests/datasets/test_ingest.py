"""Every row once an epoch, the same steps for any number of workers."""

import numpy as np
import pytest
from heliograph.cluster.storage import write_json
from heliograph.datasets import shards
from heliograph.datasets.ingest import Part, blocks
from heliograph.datasets.schema import Schema
from heliograph.datasets.shards import TARGET, Manifest


def prepared(folder, rows: int, pieces: int, window: int) -> Manifest:
    """Shards whose target is the row's number."""
    lengths = [n for n in shards.shard_lengths(rows, pieces) if n]
    starts = np.cumsum([0, *lengths])
    written = []
    for i, length in enumerate(lengths):
        numbers = np.arange(starts[i], starts[i] + length)
        columns = {"x": numbers.astype("f4")[:, None], TARGET: numbers}
        written.append(shards.write_shard(folder / f"{i}.parquet", columns, window, None))
    schema = Schema(task="classification", target="number", classes=(0, 1), features=(), inputs={"x": (1,)})
    write_json(folder / "schema.json", schema.model_dump())
    return Manifest(splits={"train": written}, window=window, row_bytes=12, encrypted=False)


def steps(folder, manifest: Manifest, workers: int, batch_size: int, epoch: int, seed: int | None = 0) -> list[list[np.ndarray]]:
    """For each worker, for each step, the numbers of the rows it trains on (read here, without Ray)."""
    out = []
    for rank in range(workers):
        part = Part(folder, manifest, "train", None, rank, workers, batch_size, seed)
        windows = [part.read_window(w, epoch) for w in range(part.windows)]
        mine = np.concatenate([w[TARGET] for w in windows if w])
        out.append(np.split(mine, np.cumsum([m for m, _ in part.step_sizes()])[:-1]))
    return out


@pytest.mark.parametrize(("rows", "pieces", "window"), [(97, 8, 4), (64, 8, 100), (1000, 7, 16), (33, 3, 11), (9, 8, 1)])
@pytest.mark.parametrize("batch_size", [8, 13, 500])
def test_any_number_of_workers_trains_on_the_same_steps_and_every_row_once(tmp_path, rows, pieces, window, batch_size):
    manifest = prepared(tmp_path, rows, pieces, window)
    alone = [set(step) for step in steps(tmp_path, manifest, 1, batch_size, epoch=1)[0]]
    assert len(alone) == -(-rows // batch_size)
    assert set.union(*alone) == set(range(rows))
    assert sum(map(len, alone)) == rows
    assert max(map(len, alone)) - min(map(len, alone)) <= 1
    for workers in range(2, min(pieces, 4) + 1):
        parts = steps(tmp_path, manifest, workers, batch_size, epoch=1)
        assert len({len(part) for part in parts}) == 1
        for number, step in enumerate(alone):
            together = np.concatenate([part[number] for part in parts])
            assert len(together) == len(step)
            assert set(together) == step


def test_an_epoch_has_an_order_of_its_own_and_a_seed_repeats_it(tmp_path):
    manifest = prepared(tmp_path, 200, 4, 10)
    first, again, second = (np.concatenate(steps(tmp_path, manifest, 1, 32, epoch)[0]) for epoch in (1, 1, 2))
    unshuffled = np.concatenate(steps(tmp_path, manifest, 1, 32, 1, seed=None)[0])
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, unshuffled)
    assert sorted(first) == sorted(second)


def through_ray(part: Part, first: int, end: int) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """For each step: its inputs, its rows' numbers, and the rows of all workers."""
    found = []
    for block in blocks(part, first, end):
        for i, everyone in enumerate(block.everyone):
            rows = slice(block.edges[i], block.edges[i + 1])
            found.append((block.inputs["x"][rows], block.target[rows], everyone))
    return found


def test_blocks_through_ray_data_are_those_steps_from_wherever_they_start(cluster, tmp_path):
    manifest = prepared(tmp_path, 101, 4, 8)
    expected = [step for epoch in (1, 2, 3) for step in steps(tmp_path, manifest, 2, 16, epoch)[1]]
    part = Part(tmp_path, manifest, "train", None, 1, 2, 16, 0)
    for first in (0, 3, 2 * part.steps - 1, len(expected) - 1):
        found = through_ray(part, first, len(expected))
        assert len(found) == len(expected) - first
        for (inputs, numbers, everyone), wanted in zip(found, expected[first:], strict=True):
            assert np.array_equal(numbers, wanted)
            assert np.array_equal(inputs[:, 0], numbers.astype("f4"))
            assert everyone in (14, 15)


def test_a_worker_without_a_row_of_a_small_split_still_has_every_step(cluster, tmp_path):
    manifest = prepared(tmp_path, 1, 1, 1)
    part = Part(tmp_path, manifest, "train", None, 1, 2, 16, None)
    found = through_ray(part, 0, 3)
    assert [(inputs.shape, len(numbers), everyone) for inputs, numbers, everyone in found] == [((0, 1), 0, 1.0)] * 3
