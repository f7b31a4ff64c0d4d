"""What an endpoint counts, from each replica to one page for Prometheus.

A replica counts in plain numbers (an observation costs half a microsecond) and pushes them twice a second to one actor,
`Tally`, which adds them up over the cluster, over dead replicas too; every replica's `/metrics` shows that sum. A replica
that is killed takes at most its last half second with it.

    heliograph_requests_total{model,version,protocol,code}
    heliograph_request_seconds{model,version}              from the first byte of the body to the answer
    heliograph_stage_seconds{model,version,stage}          open, read, queue, preprocess, model, write, seal
    heliograph_batch_rows, heliograph_batch_requests{model,version}   of each call of an engine
    heliograph_load_seconds{model,version}                 the last cold start of a model
    heliograph_drift_psi, heliograph_drift_ks{model,version,feature}   of requests against training (`jobs.guard`)
    heliograph_unfamiliar_rows_total{model,version}        where `serve.guard` is on
    heliograph_replicas, heliograph_in_flight
"""

import time
from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..jobs.guard import Counts

Key = tuple[str, ...]
SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
COUNTS = tuple(float(2**i) for i in range(11))
PUSH_SECONDS = 0.5
GONE_SECONDS = 10.0
"""A replica that has been silent for so long is dead: what it counted stays, its gauges go."""
HISTOGRAMS = {
    "request_seconds": ("From the first byte of the body to the answer.", ("model", "version"), SECONDS),
    "stage_seconds": ("Of each stage of a request.", ("model", "version", "stage"), SECONDS),
    "batch_rows": ("Rows of a call of the engine.", ("model", "version"), COUNTS),
    "batch_requests": ("Requests of a call of the engine.", ("model", "version"), COUNTS),
}


class Stats:
    """The counts of one replica, or a sum of several."""

    def __init__(self) -> None:
        self.requests: dict[Key, int] = {}
        self.histograms: dict[str, dict[Key, list[float]]] = {name: {} for name in HISTOGRAMS}
        """For each key: a count per bucket, one of what is above them, and the sum."""
        self.loads: dict[Key, float] = {}
        self.failures: dict[Key, str] = {}
        """Why a model's version could not be loaded."""
        self.drift: dict[Key, Counts] = {}
        """What rows brought and were answered, by model and version; histograms, and no row."""
        self.unfamiliar: dict[Key, int] = {}
        """Rows that were unlike the training rows."""
        self.in_flight = 0
        self.replicas = 1

    def request(self, model: str, version: str, protocol: str, code: str, seconds: float) -> None:
        key = (model, version, protocol, code)
        self.requests[key] = self.requests.get(key, 0) + 1
        self.observe("request_seconds", (model, version), seconds)

    def observe(self, name: str, key: Key, value: float) -> None:
        found = self.histograms[name].get(key)
        if found is None:
            found = self.histograms[name][key] = empty(name)
        found[bisect_left(HISTOGRAMS[name][2], value)] += 1
        found[-1] += value

    def add(self, other: "Stats", gauges: bool = True) -> None:
        for key, count in other.requests.items():
            self.requests[key] = self.requests.get(key, 0) + count
        for name, keys in other.histograms.items():
            mine = self.histograms[name]
            for key, counts in keys.items():
                mine[key] = [a + b for a, b in zip(mine[key], counts, strict=True)] if key in mine else list(counts)
        for key, counts in other.drift.items():
            self.drift[key] = self.drift[key].merge(counts) if key in self.drift else counts
        for key, rows in other.unfamiliar.items():
            self.unfamiliar[key] = self.unfamiliar.get(key, 0) + rows
        if gauges:
            self.loads |= other.loads
            self.failures |= other.failures
            self.in_flight += other.in_flight
            self.replicas += other.replicas

    # prometheus_client's protocol of a collector
    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        labels = ["model", "version", "protocol", "code"]
        requests = CounterMetricFamily("heliograph_requests", "Requests answered.", labels=labels)
        for key, count in sorted(self.requests.items()):
            requests.add_metric(key, count)
        yield requests
        for name, (text, labels, bounds) in HISTOGRAMS.items():
            family = HistogramMetricFamily(f"heliograph_{name}", text, labels=labels)
            for key, counts in sorted(self.histograms[name].items()):
                total, buckets = 0.0, []
                for bound, count in zip((*map(str, bounds), "+Inf"), counts, strict=False):
                    total += count
                    buckets.append((bound, total))
                family.add_metric(key, buckets, counts[-1])
            yield family
        loads = GaugeMetricFamily("heliograph_load_seconds", "The last cold start of a model.", labels=["model", "version"])
        for key, seconds in sorted(self.loads.items()):
            loads.add_metric(key, seconds)
        yield loads
        labels = ["model", "version", "feature"]
        psi = GaugeMetricFamily("heliograph_drift_psi", "Population stability index against training.", labels=labels)
        ks = GaugeMetricFamily("heliograph_drift_ks", "Kolmogorov and Smirnov's distance from training.", labels=labels)
        for key, counts in sorted(self.drift.items()):
            for found in counts.shifts():
                psi.add_metric((*key, found.name), found.psi)
                ks.add_metric((*key, found.name), found.ks)
        yield psi
        yield ks
        strange = CounterMetricFamily("heliograph_unfamiliar_rows", "Rows unlike the training rows.", labels=["model", "version"])
        for key, rows in sorted(self.unfamiliar.items()):
            strange.add_metric(key, rows)
        yield strange
        yield GaugeMetricFamily("heliograph_in_flight", "Requests being answered.", value=self.in_flight)
        yield GaugeMetricFamily("heliograph_replicas", "Replicas that are alive.", value=self.replicas)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)


def empty(name: str) -> list[float]:
    """The counts of a histogram that has seen nothing."""
    return [0.0] * (len(HISTOGRAMS[name][2]) + 2)


def quantile(counts: list[float], q: float) -> float:
    """Seconds below which a share `q` of a histogram lies, as far as its buckets tell; 0 when it is empty."""
    total = sum(counts[:-1])
    below = 0.0
    for i, count in enumerate(counts[:-1]):
        if count and below + count >= q * total:
            low = SECONDS[i - 1] if i else 0.0
            high = SECONDS[i] if i < len(SECONDS) else 2 * SECONDS[-1]
            return low + (high - low) * (q * total - below) / count
        below += count
    return 0.0


class Tally:
    """The sum over all replicas; a Ray actor, `TALLY` by name."""

    def __init__(self) -> None:
        self._live: dict[str, tuple[float, Stats]] = {}
        self._dead = Stats()
        self._answered: dict[bytes, float] = {}
        """Sealed requests, oldest first, and when each was answered."""

    def first(self, request: bytes) -> bool:
        """Whether a sealed request is answered for the first time; the time to ask is when it is. Kept for `REMEMBERED` s."""
        now = time.monotonic()
        while self._answered and next(iter(self._answered.values())) < now - REMEMBERED:
            del self._answered[next(iter(self._answered))]
        return self._answered.setdefault(request, now) is now

    def push(self, replica: str, stats: Stats) -> None:
        self._live[replica] = (time.monotonic(), stats)

    def read(self) -> Stats:
        now = time.monotonic()
        for replica, (seen, stats) in list(self._live.items()):
            if now - seen > GONE_SECONDS:
                self._dead.add(stats, gauges=False)
                del self._live[replica]
        total = Stats()
        total.replicas = 0
        total.add(self._dead, gauges=False)
        for _, stats in self._live.values():
            total.add(stats)
        return total


TALLY = "heliograph-tally"
CLOCK_SECONDS = 60.0
"""How far the date of a request may be from the endpoint's clock, where repeated ones are refused."""
REMEMBERED = 2 * CLOCK_SECONDS + 5
