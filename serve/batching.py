"""Adaptive batching: rows of several requests in one call of the engine, with no request kept waiting for company.

A request that comes while the engine is idle is run at the end of the same turn of the event loop, together with whatever
else arrived in that turn. While the engine works, requests gather, and the next call takes as many as the latency budget
allows. A call that is quicker than a thread's hand-over runs in the loop itself, a longer one beside it.

What could not be answered within the budget is refused at once (`Overloaded`), from the measured time of calls.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

from ..datasets.schema import Columns
from ..errors import Overloaded

INLINE = 0.002
"""Seconds: a call that takes no longer blocks the event loop less than handing it to a thread costs."""
MOST_ROWS = 1024
"""Of one call, however quick they are."""
MOST_SIZE = MOST_ROWS.bit_length() - 1


@dataclass
class _Waiting:
    columns: Columns
    rows: int
    future: asyncio.Future
    since: float


class Pace:
    """How long a call takes by its rows: an average for each power of two, guessed from its neighbour until it was seen."""

    def __init__(self) -> None:
        self._seconds = [0.0] * (MOST_SIZE + 1)
        self._seen: set[int] = set()

    def add(self, rows: int, seconds: float) -> None:
        size = self._size(rows)
        if size in self._seen:
            self._seconds[size] += 0.2 * (seconds - self._seconds[size])
            return
        self._seen.add(size)
        self._seconds[size] = seconds
        for i in range(len(self._seconds)):
            if i not in self._seen:
                near = min(self._seen, key=lambda s: abs(s - i))
                self._seconds[i] = self._seconds[near] * max(1.0, 2.0 ** (i - near))

    def seconds(self, rows: int) -> float:
        """Of a call; 0 before the first."""
        return self._seconds[self._size(rows)] * max(1.0, rows / MOST_ROWS)

    def most_rows(self, budget: float) -> int:
        """The largest power of two of rows whose call is done within a budget (at least 1)."""
        size = 0
        while size < MOST_SIZE and self._seconds[size + 1] <= budget:
            size += 1
        return 1 << size

    def _size(self, rows: int) -> int:
        return min((rows - 1).bit_length(), MOST_SIZE)


class Batcher:
    """run: columns to outputs `[rows, …]`, and may raise RequestError. budget: seconds that a request may take in here.
    seen: told of every call: (requests, rows, seconds that each waited)."""

    def __init__(
        self,
        run: Callable[[Columns], np.ndarray],
        budget: float,
        seen: Callable[[int, int, list[float]], None] = lambda *_: None,
    ):
        self.run, self.budget, self.seen = run, budget, seen
        self.pace = Pace()
        self._queue: deque[_Waiting] = deque()
        self._rows = 0
        self._busy = self._due = False
        self._ends = 0.0
        """When the call that runs should be done."""
        self._thread = ThreadPoolExecutor(1, "engine")

    def submit(self, columns: Columns, rows: int) -> "asyncio.Future[np.ndarray]":
        """The outputs of some rows, in a while. Raises Overloaded at once where that while would be longer than the budget."""
        self.admit()
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._queue.append(_Waiting(columns, rows, future, time.perf_counter()))
        self._rows += rows
        if not self._busy and not self._due:
            self._due = True
            loop.call_soon(self._flush)
        return future

    def admit(self) -> None:
        """Raises Overloaded where one more request would wait longer than the budget; to be asked before it is read."""
        if self._queue and self.waiting_seconds() > self.budget:
            raise Overloaded

    def waiting_seconds(self) -> float:
        """How long what runs and what waits now will take."""
        rows = min(max(self._rows, 1), self.pace.most_rows(self.budget / 2))
        running = max(0.0, self._ends - time.perf_counter()) if self._busy else 0.0
        return running + self._rows / rows * self.pace.seconds(rows)

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    def _flush(self) -> None:
        self._due = False
        loop = asyncio.get_running_loop()
        while self._queue and not self._busy:
            batch = self._take()
            if not batch:
                return
            rows = sum(w.rows for w in batch)
            now = time.perf_counter()
            self.seen(len(batch), rows, [now - w.since for w in batch])
            seconds = self.pace.seconds(rows)
            if seconds > INLINE:
                self._busy, self._ends = True, now + seconds
                running = loop.run_in_executor(self._thread, self._call, batch, rows)
                running.add_done_callback(lambda done, batch=batch: self._finish(batch, done))
                return
            self._answer(batch, self._call(batch, rows))
            if self._queue:
                self._due = True
                loop.call_soon(self._flush)
                return

    def _finish(self, batch: list[_Waiting], done: asyncio.Future) -> None:
        self._busy = False
        self._answer(batch, done.result())
        self._flush()

    def _take(self) -> list[_Waiting]:
        """The next requests: what fits half the budget, so that a request waits for one call and is in the next."""
        most, batch, rows = self.pace.most_rows(self.budget / 2), [], 0
        while self._queue and (not batch or rows + self._queue[0].rows <= most):
            waiting = self._queue.popleft()
            self._rows -= waiting.rows
            if waiting.future.cancelled():
                continue
            batch.append(waiting)
            rows += waiting.rows
        return batch

    def _call(self, batch: list[_Waiting], rows: int) -> list[Any]:
        """What each request gets: its outputs, or the exception that they came to."""
        started = time.perf_counter()
        try:
            outputs = self.run(batch[0].columns if len(batch) == 1 else _joined([w.columns for w in batch]))
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [self._call([w], w.rows)[0] for w in batch]  # one request's mistake is no other's
        self.pace.add(rows, time.perf_counter() - started)
        ends = list(accumulate(w.rows for w in batch))
        return [outputs[end - w.rows : end] for w, end in zip(batch, ends, strict=True)]

    @staticmethod
    def _answer(batch: list[_Waiting], results: list[Any]) -> None:
        for waiting, result in zip(batch, results, strict=True):
            if waiting.future.done():
                continue
            if isinstance(result, Exception):
                waiting.future.set_exception(result)
            else:
                waiting.future.set_result(result)


def _joined(many: list[Columns]) -> Columns:
    return {
        name: np.concatenate([c[name] for c in many])
        if isinstance(value, np.ndarray)
        else pa.concat_arrays([c[name] for c in many])
        for name, value in many[0].items()
    }
