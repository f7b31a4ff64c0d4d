"""Rollouts: a new version takes a share of the requests, is judged against the old one, and takes over or goes.

The judge runs beside the endpoint and needs nothing but the registry's state and the replicas' counts. It rolls back as
soon as the new version cannot be loaded or fails clearly more often, and decides for good once it has been judged long
enough and by enough requests: promoted where its share of 5xx is no higher than the old one's by more than a hundredth, and
its 99th percentile no more than half as long again (or 10 ms longer, if that is more); otherwise rolled back.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import HeliographError, RegistryError, RolledBack
from ..jobs.registry import PRODUCTION, Registry, Rollout, State
from .metrics import Stats, empty, quantile

log = logging.getLogger("heliograph")
REQUESTS = "request_seconds"
LOOK_SECONDS = 1.0
EARLY = 10
"""Requests after which a version that mostly fails needs no more of them."""


@dataclass(frozen=True)
class Share:
    """How a version did since the rollout began."""

    requests: int
    failures: int
    p99: float
    """Seconds."""

    @property
    def failing(self) -> float:
        return self.failures / max(1, self.requests)


def begin(
    registry: Registry, name: str, version: int, percent: float, seconds: float, requests: int, force: bool = False
) -> State:
    """Start a rollout. 100 percent: the version takes over at once, as soon as replicas have loaded it.

    While nothing is in production, the newest other version that reached what it had to is what it is judged against. force: also
    one that did not. Raises RegistryError for such a version without force, for one that is not there or in production already,
    and when another change came between.
    """
    registry.bundle(name, version)
    if not force and (failed := registry.failed(name, version)):
        raise RegistryError(
            f"{name}@{version} is not put into production: {'; '.join(failed)}: make it better, or use --force, which is written "
            "to the audit log"
        )
    seen = state = registry.state(name)
    others = (v for v in registry.versions(name) if v != version and not registry.failed(name, v))
    current = state.aliases.get(PRODUCTION) or max(others, default=version)
    if state.aliases.get(PRODUCTION) == version:
        raise RegistryError(f"{name}@{version} is in production already")
    if current == version:
        percent = 100.0  # there is no other to be judged against
    state = state if PRODUCTION in state.aliases else state.moved(PRODUCTION, current)
    rollout = Rollout(version=version, percent=percent, started=time.time(), seconds=seconds, requests=requests)
    if percent >= 100:
        state = state.moved(PRODUCTION, version)
        rollout = rollout.model_copy(update={"verdict": "promoted: at once, as asked"})
    state = state.model_copy(update={"rollout": rollout})
    registry.replace(name, seen, state)
    return state


def forced_past(registry: Registry, name: str, version: int) -> dict[str, Any]:
    """What the audit log says of a version that is deployed by force: what it failed."""
    failed = registry.failed(name, version)
    return {"forced": "; ".join(failed)} if failed else {}


def follow(look: Callable[[], State], name: str, state: State, wait: bool, say: Callable[[str], None]) -> None:
    """Tell how a rollout goes until its verdict. look: reads the model's state anew. Raises RolledBack."""
    rollout = state.rollout
    assert rollout is not None
    known = f"{name}@{rollout.version}"
    if rollout.verdict:
        say(f"{known} is in production: a running endpoint follows within seconds")
        return
    say(f"{known} gets {rollout.percent:g} % of the requests beside {name}@{state.aliases[PRODUCTION]}")
    while wait:
        time.sleep(LOOK_SECONDS)
        now = look().rollout
        if now is None or now.started != rollout.started:
            raise RolledBack(f"{known}: another rollout began: this one is no longer judged")
        if now.verdict:
            if not now.verdict.startswith("promoted"):
                raise RolledBack(f"{known} {now.verdict}")
            say(f"{known} {now.verdict}")
            return


def judge(rollout: Rollout, old: Share, new: Share, failure: str | None, seconds: float) -> str:
    """The verdict, or an empty text where it is too early. failure: why the new version cannot be loaded."""
    if failure:
        return f"rolled back: it cannot be loaded: {failure}"
    told = f"{new.failures} of {new.requests} requests failed (old: {old.failures} of {old.requests})"
    if new.requests >= EARLY and new.failing > old.failing + 0.2:
        return f"rolled back: {told}"
    if seconds < rollout.seconds or new.requests < rollout.requests:
        return ""
    if new.failing > old.failing + 0.01:
        return f"rolled back: {told}"
    times = f"p99 {1000 * new.p99:.1f} ms (old: {1000 * old.p99:.1f} ms)"
    if old.requests and new.p99 > max(1.5 * old.p99, old.p99 + 0.01):
        return f"rolled back: {times}"
    return f"promoted: {told}, {times}"


class Judge(threading.Thread):
    """Watches all rollouts of a registry. say: told each verdict."""

    def __init__(self, registry: Registry, tally: Any, say: Callable[[str], None]):
        super().__init__(name="rollouts", daemon=True)
        self._registry, self._tally, self._say = registry, tally, say
        self._base: dict[str, tuple[float, Stats]] = {}
        """The counts at the beginning of a model's rollout."""

    def run(self) -> None:
        import ray

        while ray.is_initialized():
            time.sleep(max(LOOK_SECONDS, self._registry.seconds))
            try:
                for name in self._registry.names():
                    self._look(name)
            except HeliographError as error:
                log.error("%s", error)
            except Exception:
                if ray.is_initialized():
                    log.exception("a rollout cannot be judged")

    def _look(self, name: str) -> None:
        import ray

        state = self._registry.state(name)
        rollout = state.rollout
        if rollout is None or not rollout.active:
            self._base.pop(name, None)
            return
        stats: Stats = ray.get(self._tally.read.remote())
        if self._base.get(name, (0.0,))[0] != rollout.started:
            self._base[name] = (rollout.started, stats)
        base = self._base[name][1]
        old, new = (share(stats, base, name, v) for v in (state.aliases[PRODUCTION], rollout.version))
        failure = stats.failures.get((name, str(rollout.version)))
        verdict = judge(rollout, old, new, failure, time.time() - rollout.started)
        if not verdict:
            return
        after = state.moved(PRODUCTION, rollout.version) if verdict.startswith("promoted") else state
        judged = rollout.model_copy(update={"verdict": verdict})
        self._registry.replace(name, state, after.model_copy(update={"rollout": judged}))
        self._say(f"{name}@{rollout.version} {verdict}")


def share(now: Stats, base: Stats, name: str, version: int) -> Share:
    key = (name, str(version))

    def count(stats: Stats, failed: bool) -> int:
        return sum(n for k, n in stats.requests.items() if k[:2] == key and (not failed or k[3].startswith("5")))

    after, before = (s.histograms[REQUESTS].get(key) or empty(REQUESTS) for s in (now, base))
    counts = [a - b for a, b in zip(after, before, strict=True)]
    return Share(count(now, False) - count(base, False), count(now, True) - count(base, True), quantile(counts, 0.99))
