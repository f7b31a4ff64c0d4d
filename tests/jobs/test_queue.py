"""Runs that wait for each other: processes as a cluster's head has them."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from heliograph.cluster.spec import Capacity, Group
from heliograph.jobs.queue import Place, turn

HEAD = Group("head", {"CPU": 0.0}, 1, 1, None, {})
RUN = """\
import json, sys, time
from pathlib import Path
from heliograph.cluster.spec import Capacity
from heliograph.jobs.queue import Place, turn
place = Place(**json.loads(sys.argv[2]))
with turn(Path(sys.argv[1]), place, Capacity.loads(sys.argv[3]), lambda line: None):
    with Path(sys.argv[1], "log").open("a") as log:
        log.write(f"{place.run} begins\\n")
    while not Path(sys.argv[1], f"{place.run}.end").exists():
        time.sleep(0.05)
"""


class Queue:
    def __init__(self, folder, capacity):
        self.folder, self.capacity, self.started = folder, capacity, []

    def start(self, run, user="a", priority=0):
        place = {"run": run, "user": user, "priority": priority, "since": time.time()}
        self.started.append(
            subprocess.Popen([sys.executable, "-c", RUN, str(self.folder), json.dumps(place), self.capacity.dumps()])
        )
        self.until((self.folder / f"{run}.json").exists)
        return self.started[-1]

    def begun(self):
        log = self.folder / "log"
        return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []

    def until(self, happened, seconds=20):
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end
            time.sleep(0.05)

    def end(self, run):
        (self.folder / f"{run}.end").touch()


@pytest.fixture
def queue(tmp_path):
    made = Queue(tmp_path, Capacity(HEAD, (), 1, runs=1))
    yield made
    for process in made.started:
        process.kill()
        process.wait()


def test_runs_wait_by_priority_and_a_killed_one_keeps_nobody_waiting(queue):
    first = queue.start("first")
    queue.until(lambda: queue.begun() == ["first"])
    for run, priority in (("low", 0), ("high", 5), ("middle", 1)):
        queue.start(run, priority=priority)
    time.sleep(2)
    assert queue.begun() == ["first"]
    first.send_signal(signal.SIGKILL)
    queue.until(lambda: queue.begun() == ["first", "high"])
    queue.started[1].send_signal(signal.SIGKILL)  # low gives up waiting
    queue.end("high")
    queue.until(lambda: queue.begun() == ["first", "high", "middle"])
    queue.end("middle")
    queue.start("next")
    queue.until(lambda: queue.begun() == ["first", "high", "middle", "next"])


def test_nobody_has_more_runs_at_a_time_than_he_may(queue):
    queue.capacity = replace(queue.capacity, runs=3, runs_per_user=1)
    queue.start("a1", "a")
    queue.start("a2", "a", priority=9)
    queue.start("b1", "b")
    queue.until(lambda: sorted(queue.begun()) == ["a1", "b1"])
    time.sleep(1.5)
    assert sorted(queue.begun()) == ["a1", "b1"]
    queue.end("a1")
    queue.until(lambda: queue.begun()[-1] == "a2")


def test_without_limits_nobody_waits(tmp_path):
    capacity, said = Capacity(HEAD, (), 1), []
    one, two = Place("one", "a", 0, 1.0), Place("two", "a", 0, 2.0)
    with turn(tmp_path, one, capacity, said.append), turn(tmp_path, two, capacity, said.append):
        assert json.loads((tmp_path / "one.json").read_text())["works"] is True
    assert said == [] and list(tmp_path.glob("*.json")) == []
