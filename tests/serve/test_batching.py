"""The batcher: who is run together, what a mistake of one does to others, and what is refused."""

import asyncio
import time

import numpy as np
import pytest
from heliograph.errors import Overloaded, RequestError
from heliograph.serve.batching import INLINE, Batcher, Pace


def rows(*values: float) -> dict:
    return {"x": np.array(values)}


class Engine:
    """Doubles; slow or not; remembers the size of each call; -1 is a mistake of the client's."""

    def __init__(self, seconds: float = 0.0, per_row: float = 0.0):
        self.seconds, self.per_row, self.calls = seconds, per_row, []

    def __call__(self, columns: dict) -> np.ndarray:
        x = columns["x"]
        self.calls.append(len(x))
        if (x < 0).any():
            raise RequestError("negative")
        time.sleep(self.seconds + self.per_row * len(x))
        return 2 * x[:, None]


def test_what_arrives_together_is_one_call_and_each_gets_its_own_rows():
    engine = Engine()
    seen = []

    async def work():
        batcher = Batcher(engine, 1.0, lambda *told: seen.append(told))
        return await asyncio.gather(*[batcher.submit(rows(*range(n)), n) for n in (1, 3, 2)])

    found = asyncio.run(work())
    assert engine.calls == [6]
    assert [f.ravel().tolist() for f in found] == [[0], [0, 2, 4], [0, 2]]
    ((requests, count, waited),) = seen
    assert (requests, count, len(waited)) == (3, 6, 3)


async def busy(engine: Engine) -> tuple[Batcher, asyncio.Future]:
    """A batcher whose engine works on a first request."""
    batcher = Batcher(engine, 10.0)
    batcher.pace.add(1, engine.seconds)
    first = batcher.submit(rows(1), 1)
    await asyncio.sleep(0.01)
    return batcher, first


def test_while_a_slow_engine_works_requests_gather():
    engine = Engine(0.05)

    async def work():
        batcher, first = await busy(engine)
        others = [batcher.submit(rows(i), 1) for i in range(5)]
        await asyncio.gather(first, *others)

    asyncio.run(work())
    assert engine.calls == [1, 5]


def test_the_event_loop_goes_on_while_a_slow_engine_works():
    async def work() -> int:
        batcher = Batcher(Engine(0.2), 10.0)
        batcher.pace.add(1, 0.2)
        future, turns = batcher.submit(rows(1), 1), 0
        while not future.done():
            await asyncio.sleep(0.01)
            turns += 1
        return turns

    assert asyncio.run(work()) > 5


def test_one_requests_mistake_is_no_others():
    async def work():
        batcher = Batcher(Engine(), 1.0)
        return await asyncio.gather(*[batcher.submit(rows(x), 1) for x in (1, -1, 3)], return_exceptions=True)

    first, second, third = asyncio.run(work())
    assert (first.item(), third.item()) == (2, 6)
    assert isinstance(second, RequestError)


def test_what_cannot_be_answered_in_time_is_refused_at_once_and_the_rest_is_answered():
    engine = Engine(0.02)

    async def work():
        batcher = Batcher(engine, 0.1)
        for size in (1, 2, 4):
            batcher.pace.add(size, 0.02 * size)  # no gain from batches: 50 rows/s
        futures, refused = [], 0
        for i in range(100):
            try:
                futures.append(batcher.submit(rows(i), 1))
            except Overloaded as error:
                assert (error.status, error.retry_after) == (503, 1)
                refused += 1
            await asyncio.sleep(0)
        answers = await asyncio.gather(*futures)
        return refused, len(answers)

    refused, answered = asyncio.run(work())
    assert refused + answered == 100
    assert 3 <= answered <= 30


def test_a_cancelled_request_is_not_run():
    engine = Engine(0.05)

    async def work():
        batcher, first = await busy(engine)
        second = batcher.submit(rows(2), 1)
        second.cancel()
        await first
        await batcher.submit(rows(3), 1)

    asyncio.run(work())
    assert engine.calls == [1, 1]


def test_a_size_that_was_not_seen_is_guessed_from_its_neighbour():
    pace = Pace()
    assert pace.seconds(8) == 0
    pace.add(4, 0.004)
    assert pace.seconds(16) == pytest.approx(0.016)
    assert pace.seconds(1) == pytest.approx(0.004)
    assert pace.most_rows(0.010) == 8
    pace.add(8, 0.5)
    assert pace.most_rows(0.010) == 4
    assert pace.seconds(4) > INLINE
