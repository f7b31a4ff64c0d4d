"""What a cluster costs while it runs: nodes times hours times their price, as they come and go.

Providers' invoices come days later; this is what a budget can be held to now. Nodes are known by the label that every cluster
file's nodes carry.
"""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from .spec import KIND, Capacity
from .storage import read_json, write_json

COST = "cost.json"
SECONDS_BETWEEN = 2.0
SECONDS_TO_STOP = 30
"""A run is stopped so long before its money is used up, since it saves a checkpoint first."""


class Meter(threading.Thread):
    """Counts what a run's cluster costs into `RUN/cost.json`, over all its interruptions, and ends the run in time.

    It is ended as by SIGTERM, with a checkpoint; `over` then says why."""

    def __init__(self, capacity: Capacity, folder: Path):
        super().__init__(daemon=True, name="meter")
        self.capacity, self.file = capacity, folder / COST
        self.over = ""
        self._ended = threading.Event()
        self._seconds: dict[str, float] = {"head": 0.0}
        with contextlib.suppress(OSError, ValueError):
            self._seconds |= read_json(self.file)["node_seconds"]
        self._most: dict[str, int] = {}
        self._gauges: dict[str, Any] = {}

    def run(self) -> None:
        import ray

        before = time.monotonic()
        while not self._ended.wait(SECONDS_BETWEEN):
            now = time.monotonic()
            passed, before = now - before, now
            with contextlib.suppress(Exception):  # a head that is away for a while
                if ray.is_initialized():
                    self._count([n["Labels"].get(KIND, "head") for n in ray.nodes() if n["Alive"]], passed)

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def _count(self, kinds: list[str], passed: float) -> None:
        there: dict[str, int] = {}
        for kind in kinds:
            there[kind] = there.get(kind, 0) + 1
            self._seconds[kind] = self._seconds.get(kind, 0.0) + passed
        workers = {kind: count for kind, count in there.items() if kind != "head"}
        self._most = {kind: max(count, self._most.get(kind, 0)) for kind, count in {**self._most, **workers}.items()}
        dollars, rate = bill(self.capacity, self._seconds), self.capacity.price(workers)
        self._tell(dollars, there)
        seconds = {kind: round(s, 1) for kind, s in self._seconds.items()}
        write_json(self.file, {"dollars": dollars, "node_seconds": seconds, "most_nodes": self._most})
        limit = self.capacity.dollars_per_run
        if limit and dollars is not None and rate is not None and dollars + rate * SECONDS_TO_STOP / 3600 >= limit:
            if not self.over:
                os.kill(os.getpid(), signal.SIGTERM)
            self.over = f"the run has cost ${dollars:.2f}, and limits.dollars_per_run of the cluster is ${limit:.2f}"

    def _tell(self, dollars: float | None, there: dict[str, int]) -> None:
        """Prometheus, through Ray's exporter."""
        from ray.util.metrics import Gauge

        run = self.file.parent.name
        if not self._gauges:
            for name, text, tags in (
                ("dollars", "What a run has cost.", ("run",)),
                ("budget_dollars", "What it may cost.", ("run",)),
                ("nodes", "Of its cluster, by kind.", ("run", "kind")),
            ):
                self._gauges[name] = Gauge(f"heliograph_run_{name}", text, tags)
        if dollars is not None:
            self._gauges["dollars"].set(dollars, {"run": run})
        if self.capacity.dollars_per_run:
            self._gauges["budget_dollars"].set(self.capacity.dollars_per_run, {"run": run})
        for kind in self._seconds:
            self._gauges["nodes"].set(there.get(kind, 0), {"run": run, "kind": kind})


def bill(capacity: Capacity, seconds: dict[str, float]) -> float | None:
    """Dollars for seconds of nodes, by kind; None where a kind has no price."""
    prices = {"head": capacity.head.dollars, **{g.name: g.dollars for g in capacity.groups}}
    parts = [(prices.get(kind), spent / 3600) for kind, spent in seconds.items()]
    return None if any(price is None for price, _ in parts) else sum((price or 0.0) * hours for price, hours in parts)
