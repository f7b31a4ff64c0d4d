"""The endpoint: a registry of models behind HTTP, on Ray Serve in HAProxy mode.

HAProxy hands each connection to a replica's own HTTP port, so an encapsulated request is opened in the process that runs
the model and nowhere before it. A replica is told where the registry and the key store are; it checks signatures and reads
private keys itself, so neither travels through Ray.
"""

import asyncio
import contextlib
import errno
import importlib
import json
import logging
import os
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cluster import haproxy
from ..cluster.audit import Audit
from ..cluster.keys import KeyStore
from ..cluster.runtime import LOOPBACK, JoinedCluster, LocalCluster, quieten
from ..cluster.storage import read_json, write_json
from ..cluster.tls import endpoint_pem
from ..errors import EndpointError, PortInUse, RequestError
from ..jobs.registry import Registry, registry_at
from ..project import Serve
from .application import Application
from .door import Door
from .front import Front
from .metrics import PUSH_SECONDS, TALLY, Stats, Tally
from .models import Models
from .rollout import Judge

log = logging.getLogger("heliograph")
SECONDS_TO_RECOVER = 30
"""Which an endpoint may need to be found again by a head that is back."""
TALLY_SECONDS = 2.0
"""A request waits so long at most for what all replicas know together."""
REFRESH_SECONDS = 300
"""Between two looks at an identity provider's keys."""


@dataclass(frozen=True)
class Endpoint:
    """What to serve; folders only, no keys. log: a file that gets a JSON line for each request."""

    name: str
    """Of the model that the endpoint is started for; it answers for all others of the registry too."""
    registry: Registry
    keys: KeyStore
    options: Serve
    log: Path | None = None

    @property
    def url(self) -> str:
        host = LOOPBACK if self.options.host == "0.0.0.0" else self.options.host  # noqa: S104  what is asked about
        return f"{'https' if self.options.tls else 'http'}://{host}:{self.options.port}"

    def models(self, stats: Stats) -> Models:
        threads = int(self.options.cpus) or max(1, (os.cpu_count() or 1) // self.options.most_replicas)
        return Models(self.registry, self.keys, self.options, threads, stats)


def start(endpoint: Endpoint, cluster: LocalCluster | JoinedCluster, say: Callable[[str], None] = lambda line: None) -> str:
    """Serve until the cluster stops; on a cluster of others, until `stop`. Returns the URL. say: told what becomes of rollouts.

    Raises EndpointError, PortInUse, and before Ray starts what loading the model raises: SignatureError, BundleError,
    KeyStoreError, RegistryError.
    """
    if isinstance(cluster, LocalCluster):
        check_port(endpoint.options)
        if endpoint.options.tls:
            endpoint_pem(endpoint.keys)
    elif endpoint.options.tls:
        raise EndpointError("serve.tls is for endpoints of one machine: let what stands before a cluster's nodes end TLS")
    Door(endpoint.keys, endpoint.name, None, endpoint.options.key_grace_seconds)
    version = endpoint.registry.resolve(endpoint.name)
    endpoint.models(Stats()).open((endpoint.name, version)).close()
    cluster.start()
    from ray import serve
    from ray.serve.config import HTTPOptions

    quieten()
    options = endpoint.options
    tally = _tally()
    if isinstance(cluster, LocalCluster):
        public = cluster.temp / haproxy.PUBLIC
        public.unlink(missing_ok=True)
        if options.tls:
            write_json(public, {"host": options.host, "keys": str(endpoint.keys.folder)})
    try:
        serve.start(proxy_location="EveryNode", http_options=HTTPOptions(host=LOOPBACK, port=options.port))
    except TimeoutError as error:
        raise EndpointError(f"{endpoint.url}: {error} This machine has too much to do now: try again") from None
    if not _found(endpoint, cluster):
        serve.run(_bound(endpoint), name=endpoint.name, route_prefix="/")
    audit = Audit(endpoint.keys)

    def told(line: str) -> None:
        audit.write("rollout", line, must=False)
        say(line)

    audit.write("serve", endpoint.name, must=False, url=endpoint.url)
    Judge(endpoint.registry, tally, told).start()
    return endpoint.url


def _found(endpoint: Endpoint, cluster: LocalCluster | JoinedCluster) -> bool:
    """Whether the cluster has this very endpoint already: it outlived the head, and the job that had started it."""
    if isinstance(cluster, LocalCluster) or endpoint.log is None:
        return False
    import ray
    from ray import serve

    sent = ray.get_runtime_context().runtime_env.get("py_modules")  # named by what is in it
    now = {"code": sent, "serve": endpoint.options.model_dump(mode="json"), "registry": str(endpoint.registry)}
    note = endpoint.log.with_name("endpoint.json")
    with contextlib.suppress(OSError, ValueError):
        if read_json(note) == now:
            for _ in range(SECONDS_TO_RECOVER):
                known = serve.status().applications.get(endpoint.name)
                if known is None or known.status == "RUNNING":
                    return known is not None
                time.sleep(1)
    write_json(note, now)
    return False


def stop(endpoint: Endpoint) -> None:
    """End an endpoint that was started on a cluster of others, and what it leaves there if it was the last."""
    import ray
    from ray import serve

    serve.delete(endpoint.name)
    if not serve.status().applications:
        ray.kill(_tally())  # where it is, a node would stay


def _tally() -> Any:
    """Outlives who made it, and every replica finds it, whichever job started that one. It is where this process is, if that is
    possible: an actor keeps its node from being idle, and a job's own process is at the head."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"name": TALLY, "namespace": TALLY, "lifetime": "detached", "get_if_exists": True}
    return ray.remote(Tally).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here, **options).remote()


def build(arguments: dict[str, Any]) -> Any:
    """The application for a cluster that others keep (KubeRay's `RayService`), from its configuration's `args`: name, registry,
    keys (places that all nodes have) and serve, as in a project file."""
    _tally()
    return _bound(
        Endpoint(
            arguments["name"],
            registry_at(arguments["registry"], Path()),
            KeyStore(Path(arguments["keys"])),
            Serve.model_validate_json(json.dumps(arguments["serve"])),
        )
    )


def _bound(endpoint: Endpoint) -> Any:
    from ray import serve

    options = endpoint.options
    settings: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": options.cpus, "num_gpus": options.gpus},
        "max_ongoing_requests": 1_000_000,  # the replica refuses what it cannot answer in time, by what it measures
        "graceful_shutdown_timeout_s": 20,
        "health_check_period_s": 2,
        "logging_config": {"enable_access_log": False, "log_level": "ERROR"},
        **_scaling(options),
    }
    if options.per_node:
        settings["max_replicas_per_node"] = options.per_node
    replica: Any = serve.deployment(Replica, name=endpoint.name, **settings)
    return replica.bind(endpoint)


def _scaling(options: Serve) -> dict[str, Any]:
    if isinstance(options.replicas, int):
        return {"num_replicas": options.replicas}
    wanted = options.replicas
    return {
        "autoscaling_config": {
            "min_replicas": wanted.min,
            "max_replicas": wanted.max,
            "target_ongoing_requests": wanted.target,
            "upscale_delay_s": wanted.up_seconds,
            "downscale_delay_s": wanted.down_seconds,
            "look_back_period_s": max(2.0, wanted.up_seconds),
            "metrics_interval_s": 1.0,
        }
    }


def check_port(options: Serve) -> None:
    """Raises PortInUse when something listens where the endpoint is to."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise EndpointError(f"{options.host}: is no address of this machine: set another `serve.host`") from None
            if error.errno == errno.EACCES:
                raise EndpointError(f"port {options.port}: this user may not listen there: set another `serve.port`") from None
            raise PortInUse(
                f"{options.host}:{options.port} is in use: stop what listens there, or set another `serve.port` (or --port)"
            ) from None


class Replica:
    """Ray Serve's side of a `Front`."""

    async def __init__(self, endpoint: Endpoint):
        import ray
        from ray import serve

        _keep_on_loopback()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # keys and inputs are in this memory
        self._stats = Stats()
        self._models = endpoint.models(self._stats)
        await self._models.follow()
        if not self._models.ready:
            raise EndpointError(f"no model can be loaded: {'; '.join(self._stats.failures.values()) or 'the registry is empty'}")
        self._tally: Any = ray.get_actor(TALLY, namespace=TALLY)
        self._id = serve.get_replica_context().replica_id.unique_id
        self._application, self._audit = Application(self._models, self._total, self._first), Audit(endpoint.keys)
        self._front = Front(self._application, self._stats, endpoint.options.latency_ms / 1000, endpoint.log)
        wanted = endpoint.options.replicas
        self._front.take_over(1.0 if isinstance(wanted, int) else wanted.target)
        self._tasks = [asyncio.create_task(work()) for work in (self._follow, self._push, self._refresh)]

    async def __call__(self, request: Any) -> Any:
        """A request that came through Serve's own proxy, as those do that wake an endpoint without replicas."""
        from starlette.responses import Response

        headers = {name.lower(): value for name, value in request.headers.raw}
        answer = await self._front.respond(request.method, request.url.path, headers, request.receive)
        return Response(answer.body, answer.status, answer.headers, answer.type)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._models.registry.seconds)
            try:
                await self._models.follow()
            except Exception:
                log.exception("the registry cannot be followed")

    async def _refresh(self) -> None:
        guard = self._application.guard
        while guard and guard.issuer:
            await asyncio.sleep(REFRESH_SECONDS)
            await asyncio.to_thread(guard.issuer.refresh)

    async def _push(self) -> None:
        while True:
            await asyncio.sleep(PUSH_SECONDS)
            self._front.write_log()
            self._tally.push.remote(self._id, self._stats)
            refused, self._application.refused = self._application.refused, Counter()
            for (status, of), count in refused.items():
                await asyncio.to_thread(self._audit.write, "refused", of, must=False, status=status, count=count)

    async def _first(self, name: bytes) -> bool:
        try:
            return await asyncio.wait_for(self._tally.first.remote(name), TALLY_SECONDS)
        except Exception:  # its node was lost, or the cluster's head, without which it cannot be started elsewhere
            raise RequestError("whether this request was answered before cannot be told now: try again", 503) from None

    async def _total(self) -> Stats:
        try:
            await asyncio.wait_for(self._tally.push.remote(self._id, self._stats), TALLY_SECONDS)
            return await asyncio.wait_for(self._tally.read.remote(), TALLY_SECONDS)
        except Exception:
            return self._stats  # this replica's own, until there is a sum again


def _keep_on_loopback() -> None:
    """Ray opens one more port for each replica, after the replica's constructor, on every interface; the address is not a
    setting, so the function that binds it is wrapped."""
    replica: Any = importlib.import_module("ray.serve._private.replica")

    bind = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", LOOPBACK))
