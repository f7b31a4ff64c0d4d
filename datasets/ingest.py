"""Ingest: prepared shards to batches, the same global batches for any number of workers.

An epoch has `N` positions. Position `p` lies in shard `p % n` at place `p // n`; worker `r` of `W` reads the shards
`r, r + W, …` and nobody else does. Step `g` of `S = ceil(N / batch_size)` covers the positions from `g·N/S` to
`(g + 1)·N/S`, so all steps of an epoch are of one size (±1 row), every row is used exactly once, and what a step trains
on does not depend on `W`: two workers make the batches that one makes, each its own part of them.

Shuffling: a shard's row groups are drawn in an order of their own, and the rows inside each, by (seed, epoch, shard).

Where a worker's part is small, the worker reads it once, keeps it in memory and shuffles it there. Else a Ray task reads a
window (a row group of each of the worker's shards), or several where they are small; decrypts, shuffles
and interleaves; and hands over arrays in the order of consumption, of which the worker takes zero-copy views. Three tasks
are ahead of it, over the borders of epochs. They are plain tasks and not a Ray Dataset: that would plan every task before
the first one runs (minutes for a hundred thousand), ask for CPUs that the workers may hold already, and book them with the
autoscaler in a way that an elastic training takes for lost room.
"""

import collections
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..cluster.keys import KeyStore
from ..project import Augment
from . import augment, shards
from .schema import Schema
from .shards import TARGET, WEIGHT, Manifest, SplitName

Kept = dict[tuple[int, int], dict[str, np.ndarray]]
"""The columns of row groups, by (shard, group)."""


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
        return -(-self._shards[0].rows // self.manifest.window) if self._shards else 0

    @property
    def window_positions(self) -> int:
        """Positions of an epoch that a window covers, over all workers."""
        return self.manifest.window * self.lanes

    @property
    def row_bytes(self) -> int:
        return self.manifest.row_bytes

    @property
    def _shards(self) -> list[shards.Shard]:
        return self.manifest.splits[self.split]

    @property
    def _mine(self) -> range:
        return range(self.rank, self.lanes, self.workers)

    def rows_before(self, position: int) -> int:
        """How many of the positions before `position` are this worker's."""
        whole, rest = divmod(position, self.lanes)
        return whole * len(self._mine) + sum(1 for lane in self._mine if lane < rest)

    def edge(self, step: int) -> int:
        """The position that a step of an epoch begins at."""
        return step * self.rows // self.steps

    @property
    def lanes(self) -> int:
        return len(self._shards)

    def positions(self, step: int) -> np.ndarray:
        """The positions of this worker's rows in a step of an epoch, in their order."""
        every = np.arange(self.edge(step), self.edge(step + 1))
        return every[every % self.lanes % self.workers == self.rank]

    def no_rows(self) -> dict[str, np.ndarray]:
        """What `read_window` gives, without a row: for a worker whose part of a small split is empty."""
        schema = Schema.read(self.folder)
        empty = {name: np.empty((0, *shape), np.float32) for name, shape in schema.inputs.items()}
        several = (0, len(schema.tasks)) if schema.tasks else 0
        return empty | {TARGET: np.empty(several, np.int64 if schema.classes else np.float32)}

    def step_sizes(self) -> list[tuple[int, int]]:
        """For each step of an epoch: (this worker's rows, all workers' rows)."""
        edges = [self.edge(step) for step in range(self.steps + 1)]
        return [(self.rows_before(b) - self.rows_before(a), b - a) for a, b in itertools.pairwise(edges)]

    def read_window(self, window: int, epoch: int) -> dict[str, np.ndarray]:
        """This worker's rows of one window of an epoch, in the order of their positions."""
        return self.read_windows([(window, epoch)])

    def read_windows(self, windows: list[tuple[int, int]], kept: Kept | None = None) -> dict[str, np.ndarray]:
        """The same of several (window, epoch), one after the other. Each row is copied once, to where it belongs.

        kept: row groups that were read before, and where those read now are put."""
        found: list[tuple[dict[str, np.ndarray], np.ndarray]] = []
        """For each row group its columns, and the place of each of its rows among all that are read."""
        total = 0
        for window, epoch in windows:
            lanes, positions = [], []
            for lane in self._mine:
                columns, order = self._read_group(lane, window, epoch, kept)
                if columns:
                    place = np.empty(len(order), np.int64)
                    place[order] = np.arange(len(order))
                    positions.append(place * self.lanes + lane)
                    lanes.append(columns)
            # A row's place is the rank of its position, since positions of one worker are not without gaps.
            starts = np.cumsum([0, *map(len, positions)])
            ranks = np.empty(starts[-1], np.int64)
            if positions:
                ranks[np.argsort(np.concatenate(positions))] = np.arange(starts[-1])
            found += [(c, total + ranks[a:b]) for c, a, b in zip(lanes, starts, starts[1:], strict=False)]
            total += int(starts[-1])
        out: dict[str, np.ndarray] = {}
        for name in found[0][0] if found else ():
            first = found[0][0][name]
            out[name] = np.empty((total, *first.shape[1:]), first.dtype)
            for columns, places in found:
                out[name][places] = columns[name]
        return out

    def _read_group(self, lane: int, window: int, epoch: int, kept: Kept | None) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """A row group of a shard, and the order that its rows are taken in; nothing where the shard has no such window."""
        groups = -(-self._shards[lane].rows // self.manifest.window)
        if window >= groups:
            return {}, np.empty(0, np.int64)
        group = window
        if self.seed is not None and window < groups - 1:
            # The last group may be shorter: it stays last, so that positions hold.
            group = int(np.random.default_rng((self.seed, epoch, lane)).permutation(groups - 1)[window])
        columns = kept.get((lane, group)) if kept is not None else None
        if columns is None:
            file = self.folder / self._shards[lane].file
            with shards.open_shard(file, self.keys) as shard:
                columns = shards.read_rows(shard, file, [group])
            if kept is not None:
                kept[lane, group] = columns
        order = np.arange(len(columns[TARGET]))
        if self.seed is not None:
            order = np.random.default_rng((self.seed, epoch, lane, group + 1)).permutation(order)
        return columns, order


@dataclass(frozen=True)
class Block:
    """This worker's rows of several steps that follow each other in one epoch."""

    inputs: dict[str, np.ndarray]
    """`[rows, …]` by name."""
    target: np.ndarray
    """`[rows]`."""
    weight: np.ndarray
    """float32 `[rows]`, of each row in the loss."""
    edges: np.ndarray
    """int32 `[steps + 1]`: step `i` has the rows from `edges[i]` to `edges[i + 1]`."""
    everyone: np.ndarray
    """float32 `[steps]`: rows of each step over all workers."""
    draws: dict[str, np.ndarray]
    """`[rows, …]`: how each row is varied (`augment.draw`)."""


SECRET = "seeds"  # noqa: S105  the name of a column
"""Of `draws`: int32 `[rows, 2]`, seeds of the noise of a private training."""
BLOCK_STEPS = 32
BLOCK_BYTES = 4 << 20
"""The most that one block spans: so that many small steps cost one call, and large ones little memory."""
KEPT_BYTES = 128 << 20
"""The largest part of a split that a worker keeps in its memory."""
TASK_BYTES = 32 << 20
"""What a task reads at least: small windows, of several epochs where an epoch is small, share one."""
TASKS_AHEAD = 3


def blocks(part: Part, first: int, end: int, vary: Augment | None = None) -> Iterator[Block]:
    """This worker's rows of the steps from `first` to before `end`, counted from 0 over all epochs; epochs count from 1.

    vary: how rows are to be varied, which is drawn here and done where the model is."""
    shapes = Schema.read(part.folder).inputs if vary else {}
    sizes = part.step_sizes()
    span = max(1, min(BLOCK_STEPS, BLOCK_BYTES // (part.row_bytes * max(mine for mine, _ in sizes) + 1)))
    held: list[dict[str, np.ndarray]] = [part.no_rows()]
    views = _views(part, first, end)
    step = first
    while step < end:
        place = step % part.steps
        some = sizes[place : place + min(span, end - step)]
        rows = sum(mine for mine, _ in some)
        while sum(len(h[TARGET]) for h in held) < rows:
            held.append(next(views))
        taken, held = _take(held, rows)
        target = taken.pop(TARGET)
        weight = taken.pop(WEIGHT, None)
        weight = np.ones(len(target), np.float32) if weight is None else weight
        edges = np.cumsum([0, *(mine for mine, _ in some)], dtype=np.int32)
        draws = {}
        if vary:
            spans = [part.positions(place + i) for i in range(len(some))]
            draws = augment.draw(vary, shapes, spans, part.lanes, (part.seed or 0, step // part.steps + 1))
        yield Block(taken, target, weight, edges, np.array([everyone for _, everyone in some], np.float32), draws)
        step += len(some)


def drawn(part: Part, first: int, end: int, parts: int) -> Iterator[Block]:
    """Steps that are drawn by Poisson sampling: each of this worker's rows is in a step with the probability `batch_size` / rows,
    on its own, so a step may have any number of them, and none is left out. `everyone` is the expected number.

    The draws are the system's, not the seed's: who knew them would know what the noise of a private training hides. For the same
    reason a block brings the seeds of the noise (`SECRET`). Rows of no weight fill each step up to a whole number of `room`s, one
    nearly always, since what computes a row's gradient is compiled for a number of rows. parts: that a step is cut into."""
    nothing = part.no_rows()
    columns = part.read_windows([(window, 1) for window in range(part.windows)]) or dict(nothing)
    target = columns.pop(TARGET)
    weight = np.append(columns.pop(WEIGHT, np.ones(len(target), np.float32)), np.float32(0))
    columns = {n: np.concatenate([v, np.zeros((1, *v.shape[1:]), v.dtype)]) for n, v in columns.items()}
    target = np.append(target, target.dtype.type(0))
    share, rng = part.batch_size / part.rows, np.random.default_rng()
    usual = share * (len(target) - 1)
    room = -(-int(usual + 5 * usual**0.5 + 1) // (8 * parts)) * 8 * parts
    while first < end:
        count = min(BLOCK_STEPS, end - first, part.steps - first % part.steps)
        steps = []
        for _ in range(count):
            taken = np.flatnonzero(rng.random(len(target) - 1) < share)
            steps.append(np.append(taken, np.full(max(1, -(-len(taken) // room)) * room - len(taken), len(target) - 1)))
        rows = np.concatenate(steps)
        edges = np.cumsum([0, *map(len, steps)], dtype=np.int32)
        secret = rng.integers(-(2**31), 2**31, (len(rows), 2), np.int32)
        everyone = np.full(count, part.batch_size, np.float32)
        yield Block({n: v[rows] for n, v in columns.items()}, target[rows], weight[rows], edges, everyone, {SECRET: secret})
        first += count


def _take(held: list[dict[str, np.ndarray]], rows: int) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """The first `rows` rows of what is held (a view where one block has them all), and the rest, which is never empty."""
    parts = []
    while True:
        head = held[0]
        count = min(rows, len(head[TARGET]))
        if count or not rows:
            parts.append({n: v[:count] for n, v in head.items()})
        rows -= count
        if not rows:
            held = [{n: v[count:] for n, v in head.items()}, *held[1:]]
            break
        held = held[1:]
    if len(parts) == 1:
        return parts[0], held
    return {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}, held


def _views(part: Part, first: int, end: int) -> Iterator[dict[str, np.ndarray]]:
    """Columns of this worker's rows from step `first` to `end`, as views of what was read."""
    epoch, position = first // part.steps, part.edge(first % part.steps)
    window = position // part.window_positions
    skipped = part.rows_before(position) - part.rows_before(window * part.window_positions)
    units = range(epoch * part.windows + window, -(-end // part.steps) * part.windows)
    small = part.rows * part.row_bytes // part.workers <= KEPT_BYTES
    for columns in (_from_memory if small else _by_tasks)(part, units):
        if columns:
            yield {name: values[skipped:] for name, values in columns.items()}
            skipped = 0


def _from_memory(part: Part, units: range) -> Iterator[dict[str, np.ndarray]]:
    """The windows `units`, counted over all epochs, each read in the first one only."""
    kept: Kept = {}
    for unit in units:
        yield _read(part, range(unit, unit + 1), kept)


def _by_tasks(part: Part, units: range) -> Iterator[dict[str, np.ndarray]]:
    """The same, read by Ray tasks."""
    import ray

    each = max(1, TASK_BYTES // max(1, min(part.window_positions, part.rows) * part.row_bytes // part.workers))
    # No CPU is asked for: the workers may hold all there are, and would wait for ever for rows.
    read = ray.remote(_read).options(num_cpus=0)
    tasks = (read.remote(part, units[at : at + each]) for at in range(0, len(units), each))
    ahead = collections.deque(itertools.islice(tasks, TASKS_AHEAD))
    while ahead:
        columns = ray.get(ahead.popleft())
        ahead.extend(itertools.islice(tasks, 1))
        yield columns


def _read(part: Part, units: range, kept: Kept | None = None) -> dict[str, np.ndarray]:
    return part.read_windows([(unit % part.windows, unit // part.windows + 1) for unit in units], kept)
