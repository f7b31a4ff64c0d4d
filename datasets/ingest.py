"""Ingest: prepared shards to batches, the same global batches for any number of workers.

An epoch has `N` positions. Position `p` lies in shard `p % n` at place `p // n`; worker `r` of `W` reads the shards
`r, r + W, …` and nobody else does. Step `g` of `S = ceil(N / batch_size)` covers the positions from `g·N/S` to
`(g + 1)·N/S`, so all steps of an epoch are of one size (±1 row), every row is used exactly once, and what a step trains
on does not depend on `W`: two workers make the batches that one makes, each its own part of them.

Shuffling: a shard's row groups are drawn in an order of their own, and the rows inside each, by (seed, epoch, shard).

Ray Data reads: a task takes a window (a row group of each of the worker's shards), or several where they are small;
decrypts, shuffles and interleaves; and hands over one Arrow block in the order of consumption, of which the worker takes
zero-copy views. A dataset spans many epochs, so reading ahead goes on over their borders. This is the block-level path that
was measured at 8–10 times Ray's `to_tf`; with a task for each epoch of the 1,431 digits, planning took 0.9 s of each 1.5 s
epoch, with many epochs in a task an epoch takes 0.55 s.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..cluster.keys import KeyStore
from . import shards
from .schema import tensor_column, to_numpy
from .shards import TARGET, Manifest, SplitName


@dataclass(frozen=True)
class Part:
    """The part of a split that one worker reads."""

    folder: Path
    manifest: Manifest
    split: SplitName
    keys: KeyStore | None
    rank: int
    workers: int
    batch_size: int
    seed: int | None
    """Of the shuffling; None leaves the rows in their order."""

    @property
    def rows(self) -> int:
        return self.manifest.rows(self.split)

    @property
    def steps(self) -> int:
        """Steps of an epoch, the same for every worker."""
        return -(-self.rows // self.batch_size)

    @property
    def windows(self) -> int:
        return -(-self._shards[0].rows // self.manifest.window)

    @property
    def _shards(self) -> list[shards.Shard]:
        return self.manifest.splits[self.split]

    @property
    def _mine(self) -> range:
        return range(self.rank, len(self._shards), self.workers)

    def rows_before(self, position: int) -> int:
        """How many of the positions before `position` are this worker's."""
        whole, rest = divmod(position, len(self._shards))
        return whole * len(self._mine) + sum(1 for lane in self._mine if lane < rest)

    def step_sizes(self) -> list[tuple[int, int]]:
        """For each step: (this worker's rows, all workers' rows)."""
        edges = [g * self.rows // self.steps for g in range(self.steps + 1)]
        return [(self.rows_before(b) - self.rows_before(a), b - a) for a, b in itertools.pairwise(edges)]

    def read_window(self, window: int, epoch: int) -> dict[str, np.ndarray]:
        """This worker's rows of one window of an epoch, in the order of their positions."""
        pieces, positions = [], []
        for lane in self._mine:
            file = self.folder / self._shards[lane].file
            with shards.open_shard(file, self.keys) as shard:
                groups = shard.num_row_groups
                if window >= groups:
                    continue
                group, order = window, None
                if self.seed is not None:
                    # The last group may be shorter: it stays last, so that positions hold.
                    order_of_groups = np.random.default_rng((self.seed, epoch, lane)).permutation(groups - 1)
                    group = int(order_of_groups[window]) if window < groups - 1 else window
                    count = shard.metadata.row_group(group).num_rows
                    order = np.random.default_rng((self.seed, epoch, lane, group + 1)).permutation(count)
                columns = shards.read_rows(shard, file, [group])
            if order is not None:
                columns = {name: values[order] for name, values in columns.items()}
            pieces.append(columns)
            places = window * self.manifest.window + np.arange(len(columns[TARGET]))
            positions.append(places * len(self._shards) + lane)
        if not pieces:
            return {}
        order = np.argsort(np.concatenate(positions))
        return {name: np.concatenate([p[name] for p in pieces])[order] for name in pieces[0]}


Batch = tuple[dict[str, np.ndarray], np.ndarray, np.float32]
"""(inputs `[rows, …]` by name, targets `[rows]`, rows of the whole step over all workers)."""
TASK_BYTES = 8 << 20
"""What a task reads at least: small windows, of several epochs where an epoch is small, share one."""
TASKS_OF_A_DATASET = 256
"""Ray Data plans every task before the first one runs, which takes minutes for a hundred thousand."""


def batches(part: Part, epochs: range) -> Iterator[Batch]:
    """This worker's batches, step by step, for all of `epochs` in turn."""
    views = _views(part, epochs)
    sizes = part.step_sizes()
    held: list[dict[str, np.ndarray]] = []
    for _ in epochs:
        for mine, everyone in sizes:
            while sum(len(h[TARGET]) for h in held) < mine:
                held.append(next(views))
            taken, held = _take(held, mine)
            target = taken.pop(TARGET)
            yield taken, target, np.float32(everyone)


def _take(held: list[dict[str, np.ndarray]], rows: int) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """The first `rows` rows of what is held (a view where one block has them all), and the rest."""
    parts = []
    while rows:
        head = held[0]
        count = min(rows, len(head[TARGET]))
        parts.append({n: v[:count] for n, v in head.items()})
        rest = {n: v[count:] for n, v in head.items()}
        held = [rest, *held[1:]] if len(rest[TARGET]) else held[1:]
        rows -= count
    if len(parts) == 1:
        return parts[0], held
    return {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}, held


def _views(part: Part, epochs: range) -> Iterator[dict[str, np.ndarray]]:
    """Columns of this worker's windows, for all of `epochs` in turn, as views of what Ray Data read."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    units = part.windows * len(epochs)
    lanes = len(part.manifest.splits[part.split]) // part.workers + 1
    unit_bytes = min(part.manifest.window, part.rows) * part.manifest.row_bytes * lanes
    units_of_a_task = max(1, TASK_BYTES // unit_bytes)
    for first in range(0, units, TASKS_OF_A_DATASET * units_of_a_task):
        count = min(TASKS_OF_A_DATASET * units_of_a_task, units - first)
        read: Any = functools.partial(_read, part=part, first=epochs.start * part.windows + first)
        numbers = ray.data.range(count, override_num_blocks=-(-count // units_of_a_task))
        dataset = numbers.map_batches(read, batch_format="numpy", batch_size=None)
        blocks: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
        for block in blocks:
            if len(block):
                yield {name: to_numpy(block.column(name)) for name in block.column_names}


def _read(batch: dict[str, np.ndarray], part: Part, first: int) -> pa.Table:
    read = [part.read_window((first + int(i)) % part.windows, (first + int(i)) // part.windows) for i in batch["id"]]
    found = [columns for columns in read if columns]
    names = found[0] if found else ()
    return pa.table({name: tensor_column(np.concatenate([columns[name] for columns in found])) for name in names})
