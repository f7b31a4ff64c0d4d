"""The command line: a command is a few lines; the rooms do the work. Each file of `commands` has those of one concern."""

from .commands import (
    app,
    runs,  # isort: split  the help shows them in this order
    serving,  # isort: split
)

from .commands import clusters  # isort: split

from .commands import keys

__all__ = ["app", "clusters", "keys", "runs", "serving"]


def main() -> None:
    app()
