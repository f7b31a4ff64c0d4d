"""A Ray of our own on this machine, for local mode.

It is bound to 127.0.0.1, asks for a token that only its own processes know, stands beside any other Ray on the machine,
and leaves nothing behind: processes are ended by their pids and the temporary folder is removed, after success, failure
and Ctrl-C alike. (After SIGKILL the kernel ends the processes with their parent; the folder is swept by the next start.)

Ray on Linux binds every interface unless it believes that it cannot form clusters, which is what
RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 tells it. And under `uv run` Ray ships the working directory, whatever it is, to every
worker, and starts them through uv, unless RAY_ENABLE_UV_RUN_RUNTIME_ENV=0. Ray reads these and the kind of authentication
when it is imported, and keeps the first token that it used: so they are set here, at import, and a process has one token.
"""

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from .. import errors
from ..errors import HeliographError
from . import bytecode, haproxy
from .spec import Capacity

PREFIX = "heliograph-"
TEMP = Path(tempfile.gettempdir()) if len(tempfile.gettempdir()) < 12 else Path("/tmp")  # noqa: S108  folders in it are mkdtemp's
"""Short, since HAProxy's socket lies below it, under a folder named by a node's 56 hex digits, and 107 bytes are all
that a Unix socket's path may have."""
LOOPBACK = "127.0.0.1"
FIRST_PORT, PORTS, RANGES = 20_000, 100, 120
"""Of what Serve listens on, in ranges of which each Ray on this machine has one: below the ports that the system hands out, any
of which another process may have by the time that it is needed."""
TOKEN = secrets.token_hex(32)
READ_AT_IMPORT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_AUTH_MODE": "token",
}
JOINED = "HELIOGRAPH_JOINED"
"""Set for what `heliograph submit` runs, to what the cluster may grow to: it is there, and this process is its guest."""
if JOINED not in os.environ:
    os.environ.update(READ_AT_IMPORT)
log = logging.getLogger("heliograph")


class JoinedCluster:
    """The cluster that this process was sent to; it stays when the block ends. The same face as `LocalCluster`."""

    running = False

    def __enter__(self) -> "JoinedCluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        if self.running:
            return
        import ray

        with _signal_handlers_kept():
            ray.init(log_to_driver=False, configure_logging=False)
        self.running = True
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False
        quieten()

    def ask(self, bundles: Sequence[dict[str, float]]) -> None:
        """Let the cluster grow until it could hold them all at one time; with none, shrink again."""
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=list(bundles))

    def stop(self) -> None:
        if self.running:
            import ray

            ray.shutdown()
            self.running = False


def cluster_here(workers: int, logs: Path) -> "LocalCluster | JoinedCluster":
    """The cluster that this process was sent to, or one of its own."""
    return JoinedCluster() if joined() else LocalCluster(workers, logs)


def joined() -> Capacity | None:
    """What the cluster may grow to that this process was sent to; None for one of its own."""
    return Capacity.loads(os.environ[JOINED]) if JOINED in os.environ else None


class LocalCluster:
    """A context manager; `start` may be called often and starts Ray once, so a run that has nothing to do starts none.

    workers: how many processes work at the same time. logs: where Ray's logs go when the block ends with a bug.
    """

    def __init__(self, workers: int = 1, logs: Path | None = None, object_store_bytes: int | None = None):
        self.logs = logs
        self.object_store_bytes = object_store_bytes or min(psutil.virtual_memory().total * 3 // 10, 4 << 30)
        self.cpus = max(os.cpu_count() or 1, workers + 1)
        self.running = False

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _) -> None:
        if self.running and self.logs and isinstance(error, Exception) and not explained(error):
            shutil.rmtree(self.logs, ignore_errors=True)
            shutil.copytree(self.temp / "ray" / "session_latest" / "logs", self.logs, ignore=shutil.ignore_patterns("*.sock"))
        self.stop()

    def start(self) -> None:
        """Start Ray. Raises HeliographError when this process is already connected to one that is not ours."""
        if self.running:
            return
        sweep()
        first, self.reserved = reserve()
        self.temp = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=TEMP))
        self.environment = dict(os.environ)
        os.environ.update(environment(self.temp, TOKEN, first))
        os.environ.pop("RAY_ADDRESS", None)
        self.strangers = set(psutil.Process().children(recursive=True))
        self.running = True
        import ray

        if ray.is_initialized():
            raise HeliographError("this process is connected to a Ray already: run heliograph in a process of its own")
        with _signal_handlers_kept():
            context = self._init()
            if context is None:
                context = self._init(must=True)
        # Train's own helpers connect by themselves, and would meet another Ray of the machine.
        os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False
        quieten()

    def ask(self, bundles: Sequence[dict[str, float]]) -> None:
        """It has what this machine has."""

    def _init(self, must: bool = False) -> Any:
        """Start Ray's processes; None where a busy machine did not in the 30 seconds that Ray waits."""
        import ray

        try:
            return ray.init(
                address="local",
                num_cpus=self.cpus,
                object_store_memory=self.object_store_bytes,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=str(self.temp / "ray"),
                _node_ip_address=LOOPBACK,
            )
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            self._end_processes()
            if must:
                raise HeliographError(
                    "Ray did not start within 30 s, twice: this machine has too much to do now: try again"
                ) from None
            return None

    def _end_processes(self) -> None:
        import ray

        ours = set(psutil.Process().children(recursive=True)) - self.strangers
        ray.shutdown()
        _, alive = psutil.wait_procs(ours, timeout=5)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)

    def stop(self) -> None:
        """End every process of this Ray and remove its folder."""
        if not self.running:
            return
        with _uninterrupted():
            self._end_processes()
            shutil.rmtree(self.temp, ignore_errors=True)
            os.environ.clear()
            os.environ.update(self.environment)
            self.reserved.close()
            self.running = False


def reserve() -> tuple[int, socket.socket]:
    """The first of `PORTS` ports that no other heliograph has and nobody listens on, and what keeps them: a name in the kernel,
    free again when it is closed, and when this process ends, however it ends. Raises HeliographError when there are none.

    Two Rays with one port between them would each be sent what is for the other.
    """
    listening = {c.laddr.port for c in psutil.net_connections("inet") if c.laddr and c.status == psutil.CONN_LISTEN}
    for number in range(os.getpid(), os.getpid() + RANGES):
        first = FIRST_PORT + number % RANGES * PORTS
        held = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):
            held.bind(f"\0heliograph-ports-{first}")
            if listening.isdisjoint(range(first, first + PORTS)):
                return first, held
        held.close()
    raise HeliographError(f"{RANGES} ranges of ports from {FIRST_PORT} on are all in use on this machine: stop what uses them")


def environment(temp: Path, token: str, first: int) -> dict[str, str]:
    """What the processes of a Ray on this machine need, so that it stays by itself. temp: its folder. first: of its ports."""
    launcher = temp / "haproxy"
    haproxy.write_launcher(launcher)
    return {
        **READ_AT_IMPORT,
        **bytecode.variables(),
        "RAY_AUTH_TOKEN": token,
        "TMPDIR": str(temp),  # TensorFlow leaves a file there for each function that it compiles
        "ORT_DISABLE_TELEMETRY": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DEFAULT_HTTP_HOST": LOOPBACK,
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(launcher),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(temp / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(temp / "s"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(temp / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(temp),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(temp / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(first + PORTS - 1),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(first + PORTS - 2),
        # Of the proxy that is asked while no replica is ready. All have 8500 by default, and share it.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(first + PORTS - 3),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(first + PORTS - 4),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        # A log line of each request, read by a Python process, costs a tenth of the throughput; replicas count themselves.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        # A replica that dies with a request in hand: the proxy sends the request to another one.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response response-timeout",
        "RAY_SERVE_HAPROXY_RETRIES": "5",
        # How long a proxy may take to start. With Ray's 5 s, one that a busy machine starts slowly is killed and started anew.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + PORTS - 5),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def quieten() -> None:
    """Ray's own words belong in the run's log, not between our lines on the terminal. Called after each of its parts is
    imported, since each sets up its loggers then."""
    from ray._private import worker

    for name in ["ray", *logging.root.manager.loggerDict]:
        if name == "ray" or name.startswith("ray."):
            logger = logging.getLogger(name)
            kept = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
            logger.handlers = [logging.NullHandler(), *kept] if name == "ray" else []
            logger.propagate = name != "ray"
    worker.print_to_stdstream = _logged  # it prints to stdout, where our results are, whatever `log_to_driver` says


def _logged(said: dict[str, Any], ignore_prefix: bool) -> None:
    for line in said["lines"]:
        logging.getLogger("ray").warning("%s", line)


def free_port() -> int:
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        return s.getsockname()[1]


def keep_on_loopback() -> None:
    """Tie what this process listens on at every interface to the loopback device.

    For TensorFlow's collective service, which has no setting for its address and does what any caller asks. The sockets
    are ours, so the kernel lets us (Linux 5.7, or root before).
    """
    for connection in psutil.Process().net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.ip in ("0.0.0.0", "::"):  # noqa: S104  what is looked for, to refuse it
            with socket.socket(fileno=os.dup(connection.fd)) as listening:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")


def sweep() -> None:
    """Remove temporary folders of heliographs that were killed before they could."""
    for folder in TEMP.glob(f"{PREFIX}*-*"):
        pid = folder.name.removeprefix(PREFIX).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """`ray.init` puts a SIGTERM handler of its own in place; ours must stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not stop the cleaning up after the first."""
    with _signal_handlers_kept():
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        yield


NOT_WRITTEN = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: "it can only be read",
    errno.EACCES: "let this account write there",
}
"""Why a disk takes no more, and what to do."""


def explained(error: BaseException) -> HeliographError | None:
    """The HeliographError that lies inside what Ray raised, if a worker raised one.

    Some of Ray's wrappers keep the error itself, some (Ray Data's) only its traceback as text; its last line is enough,
    since our errors are made of one message.
    """
    seen: list[BaseException] = [error]
    for current in seen:
        if isinstance(current, HeliographError):
            return current
        inner = [current.__cause__, current.__context__, getattr(current, "cause", None)]
        inner += getattr(current, "worker_failures", {}).values()
        seen += [e for e in inner if isinstance(e, BaseException) and e not in seen]
    said = re.findall(rf"^{errors.__name__}\.(\w+): (.+)$", str(error), re.MULTILINE)
    if said:
        return getattr(errors, said[-1][0])(said[-1][1])
    full = re.search(rf"\[Errno ({'|'.join(map(str, NOT_WRITTEN))})\][^\n]*", "\n".join(map(str, seen)))
    if full is None:
        return None
    what = NOT_WRITTEN[int(full[1])]
    return errors.StorageError(f"{full[0]}: {what}, or name another --run: the same command goes on from there")


def project_imports(folder: Path) -> None:
    """Make the project's own modules importable in this process."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
