"""The command line: a command is a few lines; the rooms do the work. Each file of `commands` has those of one concern."""

from .commands import app, runs, serving, clusters, keys  # noqa: I001  the help shows them in this order

__all__ = ["app", "clusters", "keys", "runs", "serving"]


def main() -> None:
    app()
