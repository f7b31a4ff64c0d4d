"""The command line: a command is a few lines; the rooms do the work. Each file of `commands` has those of one concern."""

import logging
import sys
from typing import Any

from .cluster import bytecode

bytecode.keep()  # before the rest is imported

from .commands import app, runs, serving, clusters, keys  # noqa: E402, I001  the help shows them in this order

__all__ = ["app", "clusters", "keys", "runs", "serving"]


def main() -> None:
    sys.unraisablehook = _logged
    app()


def _logged(said: Any) -> None:
    """What a library's callback or destructor raises, where nobody can catch it, is for the run's log."""
    logging.getLogger("heliograph").info(
        "ignored in %r", said.object, exc_info=(said.exc_type, said.exc_value, said.exc_traceback)
    )
