"""The endpoint: a bundle behind HTTP, on Ray Serve in HAProxy mode.

HAProxy hands each connection to a replica's own HTTP port, so an encapsulated request is opened in the process that runs
the model and nowhere before it. A replica is told where the bundle and the key store are; it checks the signature and
reads the private key itself, so neither travels through Ray.
"""

import base64
import importlib
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cluster.keys import KeyStore
from ..cluster.runtime import LOOPBACK, LocalCluster, quieten
from ..errors import PortInUse, RequestError
from ..jobs import bundle
from ..jobs.engine import Engine
from ..project import Serve
from . import ohttp
from .client import signed_text
from .protocol import MAX_BODY, Application

KEY_ID = 1


@dataclass(frozen=True)
class Endpoint:
    """What to serve; folders only, no keys."""

    name: str
    bundle: Path
    keys: KeyStore
    options: Serve

    @property
    def url(self) -> str:
        return f"http://{self.options.host}:{self.options.port}"


def open_application(endpoint: Endpoint) -> Application:
    """Verify the bundle, load the model and the private key. Raises SignatureError, BundleError, KeyStoreError."""
    bundle.verify(endpoint.bundle, endpoint.keys.public_key())
    private = endpoint.keys.secret(hpke_key(endpoint.name))
    configs = ohttp.encode_configs([ohttp.KeyConfig(KEY_ID, ohttp.public_key(private))])
    return Application(
        name=endpoint.name,
        engine=Engine(endpoint.bundle / "model.onnx", endpoint.bundle),
        gateway=ohttp.Gateway({KEY_ID: private}),
        key_configs=configs,
        key_signature=_sign(endpoint.keys, signed_text(endpoint.name, configs)),
        encrypted=endpoint.options.encrypted,
    )


def hpke_key(name: str) -> str:
    """The key store's id of the key that opens requests for the model `name`."""
    return f"{name}-hpke-{KEY_ID}"


def start(endpoint: Endpoint, cluster: LocalCluster) -> str:
    """Serve until the cluster stops; returns the URL. Raises PortInUse, and what `open_application` raises, before Ray starts."""
    check_port(endpoint.options)
    endpoint.keys.secret(hpke_key(endpoint.name), create=True)
    open_application(endpoint)
    cluster.start()
    from ray import serve
    from ray.serve.config import HTTPOptions

    quieten()
    serve.start(http_options=HTTPOptions(host=endpoint.options.host, port=endpoint.options.port))
    replica: Any = serve.deployment(
        _Replica,
        name=endpoint.name,
        num_replicas=endpoint.options.replicas,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=5,
        logging_config={"enable_access_log": False, "log_level": "ERROR"},
    )
    serve.run(replica.bind(endpoint), name=endpoint.name, route_prefix="/")
    return endpoint.url


def check_port(options: Serve) -> None:
    """Raises PortInUse when something listens where the endpoint is to."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError:
            raise PortInUse(
                f"{options.host}:{options.port} is in use: stop what listens there, or set another `serve.port` (or --port)"
            ) from None


class _Replica:
    """Ray Serve's side of an Application: a request's bytes in, an answer's bytes out."""

    def __init__(self, endpoint: Endpoint):
        _keep_on_loopback()
        self._application = open_application(endpoint)

    async def __call__(self, request):
        from starlette.responses import Response

        try:
            body = await _read(request)
        except RequestError as error:
            return Response(f'{{"error": "{error}"}}', error.status, media_type="application/json")
        answer = self._application.answer(request.method, request.url.path, request.headers.get("content-type", ""), body)
        return Response(answer.body, answer.status, answer.headers, answer.type)


def _keep_on_loopback() -> None:
    """Ray opens one more port for each replica, after the replica's constructor, on every interface; the address is not a
    setting, so the function that binds it is wrapped."""
    replica: Any = importlib.import_module("ray.serve._private.replica")

    bind = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", LOOPBACK))


async def _read(request) -> bytes:
    """The body, or RequestError 413 as soon as it is known to be too large."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise RequestError(f"the body is larger than {MAX_BODY >> 20} MiB", 413)
    return bytes(body)


def _sign(keys: KeyStore, text: bytes) -> str:
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = serialization.load_pem_private_key(keys.signing_key().read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    return base64.b64encode(private.sign(text, ec.ECDSA(hashes.SHA256()))).decode()
