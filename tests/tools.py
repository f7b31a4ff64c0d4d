"""Programs of the system that some tests need; `.ci/run` puts them into `.ci/tools`."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from heliograph.cluster.runtime import free_port

from .conftest import ROOT

ASKS = httpx.Client()
"""One for all that waits: each that is made reads the certificates of the system, which takes longer than what it asks."""


def tool(name: str) -> str:
    """Its path; the test is skipped where it is not there."""
    found = shutil.which(name) or shutil.which(name, path=str(ROOT / ".ci" / "tools" / "usr" / "bin"))
    if found is None:
        pytest.skip(f"{name} is not installed: `.ci/run` fetches it from Debian")
    return found


class Prometheus:
    def __init__(self, url: str):
        self.url = url

    def targets(self) -> dict[str, str]:
        """URL to health."""
        data = ASKS.get(f"{self.url}/api/v1/targets").json()["data"]
        return {target["scrapeUrl"]: target["health"] for target in data["activeTargets"]}

    def value(self, query: str) -> float | None:
        found = ASKS.get(f"{self.url}/api/v1/query", params={"query": query}).json()["data"]["result"]
        return float(found[0]["value"][1]) if found else None

    def firing(self) -> set[str]:
        alerts = ASKS.get(f"{self.url}/api/v1/alerts").json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


@contextlib.contextmanager
def prometheus(folder: Path) -> Iterator[Prometheus]:
    """One that works by `folder/prometheus.yml`."""
    port = free_port()
    command = [tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*command, f"--storage.tsdb.path={folder / 'series'}"], stdout=log, stderr=log)
    try:
        made = Prometheus(f"http://127.0.0.1:{port}")
        until(lambda: ready(made.url), "Prometheus")
        yield made
    finally:
        process.terminate()
        process.wait()


def ready(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return ASKS.get(f"{url}/-/ready").status_code == 200
    return False


def answers(url: str) -> bool:
    """Whether an endpoint does."""
    with contextlib.suppress(httpx.HTTPError):
        return ASKS.get(f"{url}/v2/health/ready").status_code == 200
    return False


def until(happened: Callable[[], Any], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"{what} did not happen in {seconds} s"
        time.sleep(0.3)


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[str]:
    """One that keeps nothing; its host:port."""
    port, program = free_port(), Path(tool("redis-server"))
    libraries = program.parent.parent / "lib" / f"{os.uname().machine}-linux-gnu"  # where it was unpacked, not installed
    folder.mkdir()
    process = subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)],
        env=os.environ | {"LD_LIBRARY_PATH": str(libraries)},
        stdout=subprocess.DEVNULL,
    )
    try:
        until(lambda: listens(port), "Redis", 20)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
