"""Runs that are sent to a cluster that grows and shrinks: real nodes of the fake provider, with logical GPUs."""

import contextlib
import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from heliograph.cluster import local, spec
from heliograph.jobs.registry import Registry
from heliograph.jobs.submit import Jobs, reach
from heliograph.jobs.watch import EVENTS, STEPS, read_lines
from heliograph.project import load
from heliograph.serve.client import Client

from ..conftest import iris_project
from ..tools import answers, prometheus, until
from . import traced

FILE = """\
name: rehearsal
provider: local
head: {cpus: 1}
nodes:
  gpu: {cpus: 2, gpus: 1, max: 2, dollars_per_hour: 3.6}
idle_minutes: 0.1
"""


class Rehearsal:
    def __init__(self, file: Path):
        self.file, self.storage = file, file.parent / "storage"
        self.spec, self.capacity = spec.load(file)

    @property
    def jobs(self) -> Jobs:
        return reach(self.spec, self.file, None, None)

    def nodes(self) -> int:
        return sum(kind == "gpu" and not end for kind, _, end in self.jobs.nodes())


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> Iterator[Rehearsal]:
    file = tmp_path_factory.mktemp("rehearsal") / "cluster.yaml"
    file.write_text(FILE)
    made = Rehearsal(file)
    up = local.start(made.spec, file, made.capacity, lambda line: None)
    try:
        yield made
    finally:
        local.stop(made.spec, file)
    left = [p for p in psutil.process_iter(["cmdline"]) if up.temp in " ".join(p.info["cmdline"] or [])]
    assert left == []
    assert not Path(up.temp).exists()


def test_a_run_takes_the_cluster_from_no_node_to_two_and_back_to_none(rehearsal, command, tmp_path):
    folder = iris_project(tmp_path / "iris")
    file = folder / "heliograph.yaml"
    file.write_text(file.read_text().replace("train: {", "train: {workers: 2, resources: {gpus: 1}, "))
    assert rehearsal.nodes() == 0
    code, output = command("cluster", "watch", rehearsal.file, "--out", tmp_path / "watching").finish()
    assert code == 0, output
    running = command("submit", folder, "--cluster", rehearsal.file)
    with prometheus(tmp_path / "watching") as seen:
        up = ["up"] * 4  # the head, its autoscaler and its dashboard, and a node at least
        until(lambda: [*seen.targets().values()][:4] == up and {*seen.targets().values()} == {"up"}, "targets that are all up")
        code, output = running.finish()
    assert code == 0, output
    assert "train: done in" in output and f"model: iris@1 in {rehearsal.storage / 'registry'}" in output
    assert "INFO" not in output
    run = rehearsal.storage / "runs" / "iris"
    cost = json.loads((run / "cost.json").read_text())
    assert cost["most_nodes"] == {"gpu": 2}
    assert cost["dollars"] == pytest.approx(cost["node_seconds"]["gpu"] / 1000, rel=0.05)
    assert json.loads((run / "train" / "result.json").read_text())["workers"] == 2
    assert Registry(rehearsal.storage / "registry").versions("iris") == [1]
    code, output = command("plan", folder, "--cluster", rehearsal.file, "--run", run).finish()
    assert code == 0, output
    assert re.search(r"^the run: \$0\.\d\d$", output, re.MULTILINE) and f"the run in {run}: 6 epochs on 2 workers" in output
    assert f"and it was: 2 gpu, ${cost['dollars']:.2f}" in output
    until(lambda: rehearsal.nodes() == 0, "the end of idle nodes")
    code, output = command("cluster", "status", rehearsal.file).finish()
    assert code == 0 and "0 gpu of 2; 0 GPUs" in output and "iris: succeeded" in output


def test_an_endpoint_takes_nodes_for_its_replicas_until_it_is_cancelled(rehearsal, command, tmp_path):
    folder = iris_project(tmp_path / "iris")
    file = folder / "heliograph.yaml"
    file.write_text(file.read_text().replace("serve: {", "serve: {cpus: 2, replicas: 2, "))
    if not (rehearsal.storage / "registry").exists():  # where this test runs alone
        code, output = command("submit", folder, "--cluster", rehearsal.file).finish()
        assert code == 0, output
    until(lambda: rehearsal.nodes() == 0, "the end of idle nodes")
    serving = command("submit", folder, "--cluster", rehearsal.file, "--serve")
    url = f"http://127.0.0.1:{load(folder).serve.port}"
    serving.wait_for(lambda: answers(url), "the endpoint")  # which may be before its replicas are all there
    assert rehearsal.nodes() == 2
    with Client(url, "iris", trust=rehearsal.storage / "runs" / "iris" / "keys" / "signing.pub") as client:
        assert len(client.predict([{"length": 5.1, "width": 3.5, "petal_length": 1.4, "petal_width": 0.2}])[0]) == 3
    code, output = command("cancel", "iris-endpoint", "--cluster", rehearsal.file).finish()
    assert code == 0, output
    code, output = serving.finish()
    assert code == 143, output
    assert not answers(url)
    until(lambda: rehearsal.nodes() == 0, "the end of idle nodes")


def raylets() -> list[psutil.Process]:
    """Of the rehearsal's nodes, the head's aside."""
    found = []
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error):
            if process.info["name"] == "raylet" and process.environ().get("RAY_NODE_TYPE_NAME") == "gpu":
                found.append(process)
    return found


def test_a_run_survives_its_client_a_node_and_a_cancel_and_trains_each_row_once_an_epoch(rehearsal, command, tmp_path):
    folder = traced.project(tmp_path / "project", "2", epochs=6, pause=0.2, train="resources: {gpus: 1}")
    code, output = command("submit", folder, "--cluster", rehearsal.file, "--name", "long", "--no-wait").finish()
    assert code == 0, output
    run = rehearsal.storage / "runs" / "long"
    code, output = command("submit", folder, "--cluster", rehearsal.file, "--name", "long").finish()
    assert code == 2 and "long: is under way (" in output and "Traceback" not in output
    following = command("attach", "long", "--cluster", rehearsal.file)
    leaving = command("attach", "long", "--cluster", rehearsal.file)

    def training() -> Path | None:
        return next((run / ".work").glob("train-*"), None)

    def steps() -> int:
        return sum(line["steps"] for line in read_lines(training() / STEPS)) if training() else 0

    until(lambda: steps() > 10, "some steps", 400)
    following.end(signal.SIGKILL)
    code, output = leaving.end(signal.SIGINT)
    assert code == 130 and "long: goes on without us" in output and "Traceback" not in output, output
    node, before = raylets()[0], steps()
    killed = time.monotonic()
    node.kill()
    until(lambda: any(e["text"].endswith("going on") for e in read_lines(training() / EVENTS)), "going on", 400)
    print(f"a killed node: going on after {time.monotonic() - killed:.1f} s")
    until(lambda: steps() > before + 10, "more steps")
    code, output = command("cancel", "long", "--cluster", rehearsal.file).finish()
    assert code == 0 and "long: stopped" in output, output
    reached = steps()
    code, output = command("submit", folder, "--cluster", rehearsal.file, "--name", "long").finish()
    assert code == 0 and "prepare: reused" in output, output
    last = [e for e in read_lines(run / "train" / EVENTS) if e["kind"] == "workers"][-1]
    assert last["text"] == "2 workers, going on" and reached - 1 <= last["step"] <= reached + 1
    traced.check(folder, run / "prepare", run / "train")


def test_a_run_that_would_cost_too_much_is_stopped_with_a_checkpoint_and_goes_on_when_more_is_allowed(
    rehearsal, command, tmp_path
):
    file = tmp_path / "cluster.yaml"
    file.write_text(FILE + f"storage: {rehearsal.storage}\nlimits: {{dollars_per_run: 0.2}}\n")
    (tmp_path / ".rehearsal").symlink_to(rehearsal.file.parent / ".rehearsal")
    until(lambda: rehearsal.nodes() == 0, "the end of idle nodes")
    folder = traced.project(tmp_path / "project", "1", epochs=400, pause=0.2, train="resources: {gpus: 1}")
    (folder / "heliograph.yaml").write_text((folder / "heliograph.yaml").read_text().replace("name: traced", "name: dear"))
    code, output = command("cluster", "watch", file, "--out", tmp_path / "watching").finish()
    assert code == 0, output
    running = command("submit", folder, "--cluster", file, "--name", "dear")
    with prometheus(tmp_path / "watching") as seen:
        # Figures of the runs before are there still.
        until(lambda: (seen.value('ray_heliograph_train_step{model="dear"}') or 0) > 10, "steps that Prometheus sees", 400)
        until(lambda: 0 < (seen.value('ray_heliograph_run_dollars{run="dear"}') or 0) < 0.2, "what it cost so far")
        assert seen.value('max(ray_heliograph_run_nodes{run="dear",kind="gpu"})') >= 1
        code, output = running.finish()
    assert code == 2, output
    assert "limits.dollars_per_run of the cluster is $0.20: raise it, and the same command goes on" in output
    run = rehearsal.storage / "runs" / "dear"
    cost = json.loads((run / "cost.json").read_text())
    assert cost["dollars"] < 0.2
    assert any((next((run / ".work").glob("train-*")) / "checkpoints").iterdir())


def test_what_can_never_be_is_refused_at_once(rehearsal, command, tmp_path):
    folder = iris_project(tmp_path / "iris")
    file = folder / "heliograph.yaml"
    plain = file.read_text()
    for train, said in (
        ("workers: 2, resources: {gpus: 2}", "train: no node has 1 CPU and 2 GPU (`gpu` has 2 CPU, 1 GPU)"),
        ("workers: 2, resources: {gpus: 1, cpus: 2, placement: STRICT_PACK}", "cannot be placed with STRICT_PACK"),
    ):
        file.write_text(plain.replace("train: {", f"train: {{{train}, "))
        began = time.monotonic()
        code, output = command("submit", folder, "--cluster", rehearsal.file, "--name", "never").finish()
        print(f"refused after {time.monotonic() - began:.1f} s")
        assert code == 2 and said in output and "Traceback" not in output, output
    file.write_text(plain)
    for arguments, said in (
        (("submit", folder), "names no cluster"),
        (("submit", folder, "--cluster", rehearsal.file, "--name", "Not A Name"), "a run's name is made of"),
        (("submit", folder, "--cluster", tmp_path / "none.yaml"), "none.yaml: not found"),
        (("submit", folder, "--cluster", rehearsal.file, "--address", "http://127.0.0.1:1"), "cannot be reached"),
        (("attach", "nobody", "--cluster", rehearsal.file), "nobody: no such run"),
        (("cancel", "iris", "--cluster", rehearsal.file), "has ended already (succeeded)"),
        (("cluster", "up", rehearsal.file), "is up already"),
    ):
        code, output = command(*arguments).finish()
        assert code == 2 and said in output and "Traceback" not in output, output


def test_the_exit_code_of_a_run_is_that_of_the_command(rehearsal, command, tmp_path):
    folder = iris_project(tmp_path / "iris")
    (folder / "model.py").write_text("def build(schema, hp):\n    raise ValueError('no model today')\n")
    code, output = command("submit", folder, "--cluster", rehearsal.file, "--name", "broken").finish()
    assert code == 2 and "no model today" in output and "Traceback" not in output, output
