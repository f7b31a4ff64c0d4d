"""heliograph: from raw data to a private prediction, on Ray."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Run, run
    from .serve.client import AsyncClient, Client
    from .serve.here import Served, serve

__all__ = ["AsyncClient", "Client", "Run", "Served", "__version__", "run", "serve"]
__version__ = "0.1.0"
_PLACES = {"AsyncClient": "serve.client", "Client": "serve.client", "Run": "api", "Served": "serve.here", "run": "api"}


def __getattr__(name: str) -> Any:
    """Loaded when asked for, so that `import heliograph` stays light."""
    if name == "serve":
        return importlib.import_module(".serve", __name__)
    if name not in _PLACES:
        raise AttributeError(f"module `heliograph` has no attribute `{name}`")
    return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
