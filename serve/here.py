"""A bundle behind HTTP on this machine, from Python: `heliograph.serve(bundle)`."""

import contextlib
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

from ..cluster.keys import KeyStore
from ..cluster.runtime import LocalCluster, free_port
from ..errors import KeyStoreError
from ..jobs.bundle import verify
from ..jobs.registry import alone
from ..project import Serve
from .client import Client
from .endpoint import Endpoint, start


class Served:
    """A bundle behind HTTP on this machine, until `stop` or the end of its `with`."""

    def __init__(self, url: str, name: str, trust: Path, ends: contextlib.ExitStack):
        self.url, self.name, self.trust, self._ends = url, name, trust, ends

    @cached_property
    def client(self) -> Client:
        """Sends sealed requests, and believes the bundle's signer alone."""
        return self._ends.enter_context(Client(self.url, self.name, trust=self.trust))

    def predict(self, rows: Any) -> list[Any]:
        """`Client.predict`: one prediction for each row."""
        return self.client.predict(rows)

    def explain(self, rows: Any) -> list[dict[str, Any]]:
        """`Client.explain`: why each row is answered so."""
        return self.client.explain(rows)

    def stop(self) -> None:
        self._ends.close()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"Served({self.name!r} on {self.url}; a page to try it: {self.url}/docs)"


def serve(bundle: str | Path, *, keys: str | Path | None = None, port: int | None = None) -> Served:
    """Serve a bundle on 127.0.0.1, in about 20 seconds. Its page is at `/docs`.

    bundle: a run's (`run.bundle`), or any folder of one. keys: the key store that signed it (default: `keys` beside the bundle,
    where a run has it). port: default: a free one. Raises BundleError, SignatureError, KeyStoreError, PortInUse.
    """
    place = Path(bundle).expanduser().resolve()
    store = Path(keys).expanduser() if keys else place.parent / "keys"
    if not store.is_dir():
        raise KeyStoreError(f"{store}: there is no key store: name the one that signed {place}: serve(..., keys=FOLDER)")
    held = KeyStore(store)
    name = verify(place, held.public_key())["name"]
    with contextlib.ExitStack() as opening:
        models = alone(Path(opening.enter_context(tempfile.TemporaryDirectory(prefix="heliograph-"))) / "registry", name, place)
        options = Serve(port=port or free_port())
        cluster = opening.enter_context(LocalCluster())
        url = start(Endpoint(name, models, held, options), cluster)
        return Served(url, name, held.public_key(), opening.pop_all())
