"""The command line: a command is a few lines; the rooms do the work. Each file of `commands` has those of one concern."""

from .cluster import bytecode

bytecode.keep()  # before the rest is imported

from .commands import app, runs, serving, clusters, keys  # noqa: E402, I001  the help shows them in this order

__all__ = ["app", "clusters", "keys", "runs", "serving"]


def main() -> None:
    app()
