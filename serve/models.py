"""The models that a replica holds: found in the registry, verified, loaded, measured, and let go.

What answers requests without a version is loaded at the start and followed: when the registry says another version, that
one is loaded beside the old one, and takes over when it is warm; if it cannot be loaded, the old one stays. Any other
version or model is loaded when it is first asked for; the least recently used goes when there are more than
`serve.models`.
"""

import asyncio
import logging
import random
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.keys import KeyStore
from ..cluster.sealed import Seal
from ..datasets.schema import Columns, as_fed
from ..errors import HeliographError, RequestError
from ..jobs import bundle
from ..jobs.engine import Engine
from ..jobs.explain import explained
from ..jobs.guard import GUARD, REFERENCE, Counts, Guard, Reference
from ..jobs.registry import PRODUCTION, Held, Registry, State
from ..project import Serve
from .batching import Batcher
from .door import Door
from .messages import Identity
from .metrics import Stats

log = logging.getLogger("heliograph")
RETRY_SECONDS = 30.0
"""After which a version that could not be loaded is tried again."""
MOST_EXPLAINED = 16
"""Rows of a request."""
Place = tuple[str, int]


class NotLoaded(Exception):
    """place: what `Models.load` must load before it can be picked."""

    def __init__(self, place: Place):
        self.place = place


class Loaded:
    """One version of one model, ready to answer. Raises SignatureError, BundleError, KeyStoreError."""

    held: Held | None = None
    """Keeps the version in the registry."""

    def __init__(self, folder: Path, name: str, version: int, keys: KeyStore, options: Serve, threads: int, stats: Stats):
        started = time.perf_counter()
        bundle.verify(folder, keys.public_key())
        self.engine = Engine.fastest(folder, threads, options.engine, keys)
        self.identity = Identity(name, version, self.engine.schema)
        self.key = (name, str(version))
        self._stats = stats
        seal = Seal.of(folder, keys)
        self.reference = Reference.read(folder, seal) if (folder / REFERENCE).exists() else None  # what older ones lack
        self.guard = Guard.read(folder, seal) if options.guard != "off" and (folder / GUARD).exists() else None
        self.refuses = options.guard == "refuse"
        if self.reference:
            stats.drift.setdefault(self.key, Counts(self.reference))
        self.batcher = Batcher(self._run, options.latency_ms / 1000, self._seen)
        for rows in (1, 32):
            self.batcher.pace.add(rows, self.engine.measure(rows, calls=3))
        stats.loads[self.key] = time.perf_counter() - started

    def close(self) -> None:
        self.batcher.close()
        if self.held:
            self.held.close()

    def _run(self, columns: Columns) -> np.ndarray:
        begun = time.perf_counter()
        inputs = self.engine.preprocessing.apply(columns)
        middle = time.perf_counter()
        outputs = self.engine.forward(inputs)
        self._stats.observe("stage_seconds", (*self.key, "preprocess"), middle - begun)
        self._stats.observe("stage_seconds", (*self.key, "model"), time.perf_counter() - middle)
        if not np.isfinite(outputs).all():
            raise RequestError("the model answered with a number that is not finite", 500)
        if self.reference:
            self._stats.drift[self.key].add(columns, outputs)
        if self.guard:  # beside the outputs, so that each request of a batch gets those of its rows
            return np.column_stack([outputs, self.guard.scores({n: as_fed(v) for n, v in inputs.items()})])
        return outputs

    def judged(self, outputs: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """(the model's outputs, which rows are unlike the training rows) of what a batch answered. Raises RequestError (422)."""
        if self.guard is None:
            return outputs, []
        strange = np.flatnonzero(outputs[:, -1] > 1).tolist()
        if strange:
            self._stats.unfamiliar[self.key] = self._stats.unfamiliar.get(self.key, 0) + len(strange)
            if self.refuses:
                rows = ", ".join(map(str, strange[:20]))
                raise RequestError(f"unlike what this model has learnt from: rows {rows} (counted from 0)", 422)
        return outputs[:, :-1], strange

    def explain(self, columns: Columns, outputs: np.ndarray) -> list[dict[str, Any]]:
        """Of each row, what each feature added to the answer, from the mean training row on: `base` and the features' values add
        up to `value`. Raises RequestError."""
        if self.reference is None or self.identity.schema.tasks:
            raise RequestError("this version cannot be explained: it has several targets, or is an older one", 501)
        if len(outputs) > MOST_EXPLAINED:
            raise RequestError(f"{len(outputs)} rows: {MOST_EXPLAINED} at most are explained at once", 413)
        rows = {n: as_fed(v) for n, v in self.engine.preprocessing.apply(columns).items()}
        return explained(self.engine, columns, rows, outputs, self.reference.mean)

    def _seen(self, requests: int, rows: int, waited: list[float]) -> None:
        self._stats.observe("batch_requests", self.key, requests)
        self._stats.observe("batch_rows", self.key, rows)
        for seconds in waited:
            self._stats.observe("stage_seconds", (*self.key, "queue"), seconds)


class Models:
    def __init__(self, registry: Registry, keys: KeyStore, options: Serve, threads: int, stats: Stats):
        self.registry, self.keys, self.options, self.threads, self.stats = registry, keys, options, threads, stats
        self.states: dict[str, State] = {}
        self._default: dict[str, int] = {}
        self._loaded: OrderedDict[Place, Loaded] = OrderedDict()
        self._loading: dict[Place, asyncio.Future] = {}
        self._failed: dict[Place, float] = {}
        self._doors: dict[tuple[str, int | None], Door] = {}

    def pick(self, name: str, version: int | None = None, label: str | None = None) -> Loaded:
        """The model that shall answer. Raises RequestError (404), or NotLoaded."""
        self._require(name)
        state = self.states[name]
        if version is None:
            version = self._default[name]
            if label is not None and label != PRODUCTION:
                if label not in state.aliases:
                    raise RequestError(f"`{name}` has no version with this label: it has {', '.join(sorted(state.aliases))}", 404)
                version = state.aliases[label]
            rollout = state.rollout
            if label is None and rollout and rollout.active and random.random() * 100 < rollout.percent:  # noqa: S311  a share
                candidate = self._loaded.get((name, rollout.version))
                if candidate is not None:
                    return candidate
        found = self._loaded.get((name, version))
        if found is None:
            if version not in self.registry.versions(name):
                raise RequestError(f"`{name}` has no such version", 404)
            raise NotLoaded((name, version))
        self._loaded.move_to_end((name, version))
        return found

    def door(self, name: str, version: int | None) -> Door:
        """Raises RequestError (404)."""
        self._require(name)
        if (name, version) not in self._doors:
            if version is not None and version not in self.registry.versions(name):
                raise RequestError(f"`{name}` has no such version", 404)
            self._doors[name, version] = Door(self.keys, name, version, self.options.key_grace_seconds)
        return self._doors[name, version]

    def versions(self, name: str) -> dict[int, str]:
        """The state of each version, in TensorFlow Serving's words. Raises RequestError (404)."""
        self._require(name)
        return {v: "AVAILABLE" if (name, v) in self._loaded else "START" for v in self.registry.versions(name)}

    def _require(self, name: str) -> None:
        if name not in self._default:
            raise RequestError(f"no such model: this endpoint has {', '.join(self.names) or 'none'}", 404)

    @property
    def names(self) -> list[str]:
        return sorted(self._default)

    @property
    def ready(self) -> bool:
        """Whether each model's default version can answer."""
        return bool(self._default) and all(place in self._loaded for place in self._default.items())

    async def load(self, place: Place) -> None:
        """Load a version, once however many ask; raises HeliographError when it cannot be."""
        if place in self._loaded:
            return
        running = self._loading.get(place)
        if running is None:
            loop = asyncio.get_running_loop()
            running = self._loading[place] = asyncio.ensure_future(loop.run_in_executor(None, self.open, place))
            running.add_done_callback(lambda _: self._loading.pop(place, None))
        found = await asyncio.shield(running)
        self._loaded[place] = found
        self.stats.failures.pop((place[0], str(place[1])), None)
        self._let_go()

    def open(self, place: Place) -> Loaded:
        """Raises what `Loaded` raises, and RegistryError."""
        name, version = place
        held = self.registry.hold(name, version)
        folder = self.registry.bundle(name, version)
        loaded = Loaded(folder, name, version, self.keys, self.options, self.threads, self.stats)
        loaded.held = held
        return loaded

    def _let_go(self) -> None:
        kept = set(self._default.items())
        kept |= {(n, s.rollout.version) for n, s in self.states.items() if s.rollout and s.rollout.active}
        for place in list(self._loaded):
            if len(self._loaded) <= max(self.options.models, len(kept)):
                return
            if place not in kept:
                self._loaded.pop(place).close()

    async def follow(self) -> None:
        """Look once whether the registry or the key store says something new, and do it."""
        for door in self._doors.values():
            door.look()
        for name, state, wanted in await asyncio.to_thread(self._look):
            if await self._try((name, wanted)):
                self._default[name] = wanted
            self.states[name] = state
            if state.rollout and state.rollout.active:
                await self._try((name, state.rollout.version))

    def _look(self) -> list[tuple[str, State, int]]:
        """(name, state, version that answers) of each model."""
        out = []
        for name in self.registry.names():
            try:
                state = self.registry.state(name)
                out.append((name, state, self.registry.resolve(name, state)))
            except HeliographError as error:
                log.error("%s", error)
        return out

    async def _try(self, place: Place) -> bool:
        if place in self._loaded:
            return True
        if time.monotonic() - self._failed.get(place, -RETRY_SECONDS) < RETRY_SECONDS:
            return False
        try:
            await self.load(place)
        except Exception as error:
            self._failed[place] = time.monotonic()
            self.stats.failures[place[0], str(place[1])] = str(error)
            log.error("%s@%d cannot be loaded: %s", *place, error)
            return False
        return True
