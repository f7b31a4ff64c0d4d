"""Shared by all tests: one Ray in this process, one finished run of the digits example, and commands as a user types them."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from heliograph.cluster.runtime import LocalCluster, free_port
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parent.parent
VECTORS = Path(__file__).parent / "vectors"
CLUSTERS = {"test_documents.py", "test_head_loss.py", "test_plan.py", "test_submit.py"}


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(2) as running:
        running.start()
        yield running


def scope(nodeid: str) -> str:
    """What one worker tests: a file, or all that start clusters of their own. Two of those at once are more than Ray's fixed
    limits for the start of its processes allow on two cores."""
    file = nodeid.split("::", maxsplit=1)[0]
    return "clusters" if Path(file).name in CLUSTERS else file


class Scopes(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Scopes(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Clusters, which take longest, from the beginning; whole programs before their parts, so that no long file is the last."""
    items.sort(key=lambda item: (scope(item.nodeid) == "clusters", item.location[0]), reverse=True)


@pytest.fixture(scope="session")
def served(cluster) -> Callable[..., contextlib.AbstractContextManager[str]]:
    """Start an endpoint and stop it again, its proxy too, so that the next one may have another port."""

    @contextlib.contextmanager
    def serving(endpoint) -> Iterator[str]:
        from heliograph.serve.endpoint import start
        from ray import serve

        try:
            yield start(endpoint, cluster)
        finally:
            serve.shutdown()

    return serving


@pytest.fixture
def silent() -> Callable[..., None]:
    """Where a job's progress goes when nobody looks."""
    return lambda *_: None


class Command:
    """A heliograph command in a process of its own, with all that it starts."""

    def __init__(self, temp: Path, *arguments: str | Path):
        self.seen: set[psutil.Process] = set()
        self.temp = temp
        self.process = subprocess.Popen(
            [sys.executable, "-m", "heliograph", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            cwd="/",
            env=os.environ | {"TMPDIR": str(self.temp)},
        )

    def look(self) -> set[psutil.Process]:
        """Every process that it is known to have started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        return self.seen

    def wait_for(self, happened: Callable[[], bool], what: str, timeout: float = 400) -> None:
        end = time.monotonic() + timeout
        while not happened():
            self.look()
            assert self.process.poll() is None, f"ended before {what}:\n{self.process.stdout.read()}"
            assert time.monotonic() < end, f"{what} did not happen in {timeout} s"
            time.sleep(0.05)

    def end(self, signal: int) -> tuple[int, str]:
        """Send a signal to the process itself, as Ctrl-C, `kill` or the system would."""
        self.look()
        self.process.send_signal(signal)
        return self.finish()

    def finish(self, timeout: float = 800) -> tuple[int, str]:
        """(exit code, all that it printed). Ends the whole tree when it takes longer."""
        try:
            while self.process.poll() is None:
                self.look()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    output = self.process.communicate(timeout=min(timeout, 1))[0]
                    return self.process.returncode, output
                timeout -= 1
                if timeout <= 0:
                    self.kill()
                    raise AssertionError(f"the command did not end:\n{self.process.communicate()[0]}")
            return self.process.returncode, self.process.communicate()[0]
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL to it and to all that it started, by their pids."""
        everyone = self.look()
        self.process.kill()
        self.process.wait()
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everyone, timeout=10)

    def left_running(self) -> list[str]:
        return [" ".join(p.cmdline()) for p in psutil.wait_procs(self.seen, timeout=3)[1] if p.is_running()]

    def left_behind(self) -> list[Path]:
        """What it has in temporary folders: those that it was told to use, and its own."""
        return [*self.temp.iterdir(), *Path("/tmp").glob(f"heliograph-{self.process.pid}-*")]


@pytest.fixture
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Command]]:
    """Start commands; whatever still runs when the test ends, however it ends, is ended by its pid."""
    started: list[Command] = []

    def start(*arguments: str | Path) -> Command:
        started.append(Command(tmp_path_factory.mktemp("temp"), *arguments))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.kill()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits example, run to its end by the command line: the project's folder."""
    folder = tmp_path_factory.mktemp("digits") / "digits"
    shutil.copytree(ROOT / "examples" / "digits", folder, ignore=shutil.ignore_patterns("runs", "registry", "__pycache__"))
    set_port(folder, free_port())
    running = Command(tmp_path_factory.mktemp("temp"), "run", folder)
    code, output = running.finish()
    assert code == 0, output
    assert running.left_running() == []
    assert running.left_behind() == []
    print(output)
    return folder


@pytest.fixture(scope="session")
def report(digits: Path) -> dict:
    return json.loads((digits / "runs" / "default" / "report.json").read_text())


def aws_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let boto3 find AWS at a server of the test's."""
    import boto3

    for name, value in (
        ("AWS_ENDPOINT_URL", url),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it would keep what it found before


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Object storage that boto3 finds: a bucket `runs`."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    aws_at(f"http://{host}:{port}", monkeypatch)
    client = boto3.client("s3")
    client.create_bucket(Bucket="runs")
    yield
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="runs")
    for page in pages:  # another server of this process would have them still
        for found in page.get("Contents", ()):
            client.delete_object(Bucket="runs", Key=found["Key"])
    server.stop()


def set_port(folder: Path, port: int) -> None:
    file = folder / "heliograph.yaml"
    file.write_text(file.read_text().replace("port: 8000", f"port: {port}"))


def executed(folder: Path, cluster) -> Any:
    """What `heliograph run` does with a project, without a process of its own and a request: the run."""
    from heliograph import project
    from heliograph.jobs.display import Display
    from heliograph.jobs.run import execute
    from heliograph.jobs.stages import Run
    from rich.console import Console

    run = Run(folder / "runs" / "default", cluster, Display(Console(quiet=True)))
    execute(project.load(folder), folder, run)
    return run


def iris_project(folder: Path, epochs: int = 6) -> Path:
    """A small project on a CSV file with text classes."""
    from sklearn import datasets

    folder.mkdir(parents=True)
    iris = datasets.load_iris()
    lines = ["length,width,petal_length,petal_width,species"]
    lines += [",".join([*map(str, row), str(iris.target_names[kind])]) for row, kind in zip(iris.data, iris.target, strict=True)]
    (folder / "iris.csv").write_text("\n".join(lines) + "\n")
    (folder / "heliograph.yaml").write_text(
        f"""\
name: iris
data: {{source: iris.csv, target: species, split: {{validation: 0.2, test: 0.2, seed: 3}}, shards: 2}}
train: {{epochs: {epochs}, batch_size: 16, optimizer: {{name: adam, learning_rate: 0.02}}}}
serve: {{port: {free_port()}}}
"""
    )
    (folder / "model.py").write_text(
        """\
import keras


def build(schema, hp):
    inputs = keras.Input(schema.input_shape)
    hidden = keras.layers.Dense(16, activation="relu")(inputs)
    return keras.Model(inputs, keras.layers.Dense(schema.outputs, activation="softmax")(hidden))
"""
    )
    return folder


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
