"""heliograph: from raw data to a private prediction, on Ray."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .serve.client import Client

__all__ = ["Client", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`Client` is loaded when it is asked for, so that `import heliograph` stays light."""
    if name == "Client":
        from .serve.client import Client

        return Client
    raise AttributeError(f"module `heliograph` has no attribute `{name}`")
