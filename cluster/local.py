"""A rehearsal of a cluster on this machine: `provider: local`.

The head and Ray's own autoscaler run here as they would in a cloud, and start nodes as processes with the CPUs and GPUs that the
cluster file says (logical ones: nothing checks that they are there). All of it listens on 127.0.0.1 alone.

What is known of a cluster that is up lies beside its file, in `.NAME/`: the pid of its head, its addresses, its token (for its
owner's eyes alone). Where the cluster file names a Redis, a head that was lost is started again in its place, and finds its nodes
and endpoints as they are.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from ..errors import ClusterError
from .runtime import LOOPBACK, PREFIX, TEMP, environment, free_port, reserve
from .spec import SECONDS_TO_SAVE, Capacity, Cluster, beside, fault_tolerance
from .storage import read_json, write_bytes

HEAD_TYPE = "ray.head.default"
"""The name that Ray's fake provider knows."""
SECONDS_TO_START = 120
MOST_STARTS = 5


@dataclass(frozen=True)
class Up:
    """A cluster that was started."""

    pid: int
    temp: str
    gcs: str
    """host:port of Ray itself."""
    jobs: str
    """The URL of its job API."""
    token: str
    since: float

    @property
    def alive(self) -> bool:
        return psutil.pid_exists(self.pid) and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE


def found(spec: Cluster, file: Path) -> Up | None:
    """The cluster of a file, if it is up."""
    up = _known(_state(spec, file))
    return up if up and up.alive else None


def start(spec: Cluster, file: Path, capacity: Capacity, update: Callable[[str], None]) -> Up:
    """Start the head, or start it again where it was lost; nodes follow by themselves when there is work for them.

    Raises ClusterError when it is up already, or does not come up."""
    state = _state(spec, file)
    lost = _known(state)
    if lost and lost.alive:
        raise ClusterError(f"{file}: {spec.name} is up already: `heliograph cluster status {file}` shows it")
    if lost and not spec.redis:
        end(lost)  # its nodes have nothing to come back to
        lost = None
    state.parent.mkdir(parents=True, exist_ok=True)
    if lost:
        temp, gcs, dashboard, token, since = Path(lost.temp), _port(lost.gcs), _port(lost.jobs), lost.token, lost.since
    else:
        temp = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{spec.name[:8]}-", dir=TEMP))
        gcs, dashboard, token, since = free_port(), free_port(), secrets.token_hex(32), time.time()
    update(f"starting the head of {spec.name}{' again' if lost else ''}")
    left = MOST_STARTS
    while True:
        left -= 1
        up, process, node = _launch(spec, capacity, temp, (gcs, dashboard), token, since)
        write_bytes(state, json.dumps(asdict(up)).encode(), mode=0o600)
        try:
            _wait(up, process, node)
            return up
        except BaseException as error:
            # Ray gives its own processes 15 and 30 seconds, which a busy machine may pass; it then ends all of them.
            if isinstance(error, ClusterError) and left and not up.alive:
                update("the head did not come up in the time that Ray gives it: starting it once more")
                continue
            if not lost:
                end(up)
                state.unlink(missing_ok=True)
            raise


def _launch(
    spec: Cluster, capacity: Capacity, temp: Path, ports: tuple[int, int], token: str, since: float
) -> tuple[Up, subprocess.Popen, str]:
    """(the cluster, its head's process, the head's id), of a head that is on its way. ports: of Ray itself and of the job API."""
    gcs, dashboard = ports
    head = secrets.token_hex(28)
    (temp / "autoscaling.yaml").write_text(yaml.safe_dump(_autoscaling(spec, capacity, gcs, head)))
    (temp / "ray" / "ray_current_cluster").unlink(missing_ok=True)  # Ray would take an earlier head's nodes for its own
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--node-ip-address={LOOPBACK}",
        f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-host={LOOPBACK}", "--include-dashboard=true",
        f"--dashboard-agent-listen-port={free_port()}", f"--dashboard-agent-grpc-port={free_port()}",
        f"--ray-client-server-port={free_port()}", f"--temp-dir={temp / 'ray'}", "--num-cpus=0", "--num-gpus=0",
        f"--autoscaling-config={temp / 'autoscaling.yaml'}", "--disable-usage-stats",
    ]  # fmt: skip
    with (temp / "head.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603  our own command
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            cwd=temp,
            env=_variables(spec, temp, token, head),
        )
    up = Up(process.pid, str(temp), f"{LOOPBACK}:{gcs}", f"http://{LOOPBACK}:{dashboard}", token, since)
    return up, process, head


def stop(spec: Cluster, file: Path) -> Up | None:
    """End every process of the cluster and remove its folder; None where there was none."""
    state = _state(spec, file)
    up = _known(state)
    if up is None:
        return None
    end(up)
    shutil.rmtree(state.parent)
    return up


def logs(spec: Cluster, file: Path) -> Iterator[str]:
    """Raises ClusterError when it is not up."""
    up = found(spec, file)
    if up is None:
        raise ClusterError(f"{file}: {spec.name} is not up: `heliograph cluster up {file}` starts it")
    for path in (Path(up.temp) / "head.log", Path(up.temp) / "ray" / "session_latest" / "logs" / "monitor.log"):
        yield from path.read_text(errors="replace").splitlines() if path.exists() else ()


def discovery(spec: Cluster, file: Path) -> Path:
    """Where Ray keeps Prometheus's targets: of a cluster that is up here, else where it is on a head."""
    up = found(spec, file)
    return Path(up.temp if up else "/tmp") / "ray" / "prom_metrics_service_discovery.json"  # noqa: S108  Ray's place


def end(up: Up) -> None:
    processes = _processes(up)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=5)
    for process in {*alive, *_processes(up)}:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
    shutil.rmtree(up.temp, ignore_errors=True)


def _processes(up: Up) -> list[psutil.Process]:
    """The cluster's, wherever the autoscaler or a lost parent left them: all were given its temporary folder."""
    out = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == up.pid or process.environ().get("TMPDIR") == up.temp:
                out.append(process)
    return [p for p in out if p.pid != os.getpid()]


def _state(spec: Cluster, file: Path) -> Path:
    return beside(spec, file) / "cluster.json"


def _known(state: Path) -> Up | None:
    """A cluster that was started, whether or not its head is there still."""
    try:
        return Up(**read_json(state))
    except (OSError, ValueError, TypeError):
        return None


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _variables(spec: Cluster, temp: Path, token: str, head: str) -> dict[str, str]:
    given = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    first, reserved = reserve()
    reserved.close()  # its Ray outlives this process
    return given | environment(temp, token, first) | {
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": str(free_port()),
        "DASHBOARD_METRIC_PORT": str(free_port()),
        "RAY_CLOUD_INSTANCE_ID": head,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head,
        **fault_tolerance(spec, temp.name),
        "RAY_JOB_STOP_WAIT_TIME_S": str(SECONDS_TO_SAVE),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # a job's `python` is this one
        "SERVE_SOCKET_REUSE_PORT_ENABLED": "1",  # all nodes have one address, and share an endpoint's port
    }  # fmt: skip


def _autoscaling(spec: Cluster, capacity: Capacity, gcs: int, head: str) -> dict[str, Any]:
    """Ray's autoscaler file for nodes that are processes. head: its id."""
    types: dict[str, Any] = {HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
    for group in capacity.groups:
        resources = {name: int(amount) for name, amount in group.resources.items()}
        types[group.name] = {
            "resources": resources, "node_config": {}, "min_workers": group.least, "max_workers": group.most,
            "labels": group.labels,
        }  # fmt: skip
    return {
        "cluster_name": spec.name,
        "max_workers": spec.most_nodes,
        "idle_timeout_minutes": spec.idle_minutes,
        "provider": {
            "type": "external",
            "module": "heliograph.cluster.processes.Processes",
            "head_node_id": head,
            "gcs_address": f"{LOOPBACK}:{gcs}",
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {"ssh_user": "none"},
        "available_node_types": types,
        "head_node_type": HEAD_TYPE,
        **{f"{who}setup_commands": [] for who in ("", "head_", "worker_")},
        **{f"{who}_start_ray_commands": [] for who in ("head", "worker")},
        "initialization_commands": [],
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "upscaling_speed": 1.0,
        "docker": {},
    }


def _wait(up: Up, process: subprocess.Popen, head: str) -> None:
    """Until the job API answers, and the head's own node is there: the API may answer before Ray gives that node up.

    head: its id."""
    import httpx

    token = {"Authorization": f"Bearer {up.token}"}
    of_head = {"filter_keys": "node_id", "filter_predicates": "=", "filter_values": head}
    end_at = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end_at:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError), httpx.Client(base_url=up.jobs, headers=token, timeout=5) as client:
            nodes = client.get("/api/v0/nodes", params=of_head)
            if nodes.status_code == 200 and '"ALIVE"' in nodes.text and client.get("/api/jobs/").status_code == 200:
                return
        time.sleep(0.2)
    said = [line for line in (Path(up.temp) / "head.log").read_text(errors="replace").splitlines() if line.strip()]
    raise ClusterError(f"the head did not come up: {said[-1][:200] if said else 'it said nothing'}")
