"""A cluster whose head is lost: endpoints go on answering without it, and it finds them again; runs go on where they were."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from heliograph.cluster import local, spec
from heliograph.jobs.submit import reach
from heliograph.jobs.watch import STEPS, read_lines
from heliograph.project import load as load_project
from heliograph.serve.client import Client

from ..conftest import iris_project
from ..jobs import traced
from ..tools import answers, redis, until

FILE = """\
name: headless
provider: local
head: {cpus: 1}
nodes:
  cpu: {cpus: 2, max: 2}
idle_minutes: 0.1
redis: %s
"""
ROW = {"length": 5.1, "width": 3.5, "petal_length": 1.4, "petal_width": 0.2}


class Load(threading.Thread):
    """Requests one after the other, each on a connection of its own."""

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self.url, self.answers, self.ended = url, [], threading.Event()

    def run(self) -> None:
        each_anew = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(timeout=10, limits=each_anew) as client:
            while not self.ended.wait(0.1):
                try:
                    status = client.post(f"{self.url}/v1/models/iris:predict", json={"instances": [ROW]}).status_code
                except httpx.HTTPError as error:
                    status = repr(error)
                self.answers.append((time.monotonic(), status))

    def count(self, begin: float) -> int:
        return self.between(begin, float("inf"))[0]

    def between(self, begin: float, end: float) -> tuple[int, list]:
        found = [status for at, status in self.answers if begin <= at < end]
        return len(found), [status for status in found if status != 200]


@pytest.fixture
def file(tmp_path) -> Iterator[Path]:
    with redis(tmp_path / "redis") as address:
        made = tmp_path / "cluster.yaml"
        made.write_text(FILE % address)
        described, capacity = spec.load(made)
        local.start(described, made, capacity, lambda line: None)
        try:
            yield made
        finally:
            local.stop(described, made)


def kill_head(file: Path) -> None:
    """Every process of the head, at once; none of its nodes'."""
    up = local.found(spec.load(file)[0], file)
    head = []
    for process in local._processes(up):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RAY_NODE_TYPE_NAME") != "cpu":
                head.append(process)
    for number in (signal.SIGSTOP, signal.SIGKILL):  # so that none of them sees another end
        for process in head:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
    psutil.wait_procs(head, timeout=10)


def test_an_endpoint_answers_while_the_head_is_away_and_a_run_goes_on_when_it_is_back(file, command, tmp_path):
    folder, storage = iris_project(tmp_path / "iris", epochs=4), tmp_path / "storage"
    project = folder / "heliograph.yaml"
    project.write_text(project.read_text().replace("serve: {", "serve: {cpus: 1, "))
    code, output = command("submit", folder, "--cluster", file).finish()
    assert code == 0, output
    serving = command("submit", folder, "--cluster", file, "--serve")
    url = f"http://127.0.0.1:{load_project(folder).serve.port}"
    serving.wait_for(lambda: answers(url), "the endpoint")
    long = traced.project(tmp_path / "long", "1", epochs=8, pause=0.2)
    training = command("submit", long, "--cluster", file)

    def steps() -> int:
        work = next((storage / "runs" / "traced" / ".work").glob("train-*"), None)
        return sum(line["steps"] for line in read_lines(work / STEPS)) if work else 0

    until(lambda: steps() > 10, "some steps", 400)
    load = Load(url)
    load.start()
    until(lambda: len(load.answers) > 50, "some answers")
    killed = time.monotonic()
    kill_head(file)
    trust = storage / "runs" / "iris" / "keys" / "signing.pub"
    with Client(url, "iris", trust=trust) as client:
        assert len(client.predict([ROW])[0]) == 3  # sealed
    until(lambda: load.count(killed) > 200, "answers without a head")
    back = time.monotonic()
    code, output = command("cluster", "up", file).finish()
    assert code == 0 and "starting the head of headless again" in output, output
    code, output = training.finish()
    assert code == 0 and "traced: was lost with the head of the cluster, which is back: it is sent again" in output, output
    assert "going on after step" in (storage / "runs" / "traced" / "run.log").read_text()
    traced.check(long, storage / "runs" / "traced" / "prepare", storage / "runs" / "traced" / "train")
    up = time.monotonic()
    until(lambda: load.count(up) > 100, "answers under the new head")
    ended = time.monotonic()
    print(f"nodes that the new head found, or started: {len(nodes(file))}")
    load.ended.set()
    load.join()
    away, lost = load.between(killed, back)
    print(f"while the head was away: {away} requests, lost: {lost}")
    assert len(lost) <= 0.01 * away
    after, lost = load.between(back, ended)
    print(f"after it: {after} requests, lost: {lost}")
    assert lost == []
    code, output = command("cancel", "iris-endpoint", "--cluster", file).finish()
    assert code == 0, output
    until(lambda: not answers(url), "the end of the endpoint")


def nodes(file: Path) -> list[str]:
    described, _ = spec.load(file)
    return [kind for kind, _, end in reach(described, file, None, None).nodes() if kind == "cpu" and not end]
