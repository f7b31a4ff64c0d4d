"""What a person sees while a run works: a bar a stage on a terminal, a line a stage in a pipe."""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

log = logging.getLogger("heliograph")


class Display:
    """`stage` opens a bar; `update` moves it."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=24, table_column=Column(min_width=10)),
            TimeElapsedColumn(table_column=Column(min_width=7)),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=self.console,
            expand=True,
            disable=not self.console.is_terminal,
        )
        self._task = None
        self._note = ""

    @contextmanager
    def open(self) -> Iterator[None]:
        with self._progress:
            yield

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._task = self._progress.add_task(name, total=None, note="")
        started = time.monotonic()
        yield
        self._progress.update(self._task, total=1, completed=1)
        if not self.console.is_terminal:
            self.console.print(f"{name}: done in {time.monotonic() - started:.1f} s")

    def update(self, note: str, done: float | None = None, total: float | None = None) -> None:
        """note: what is being done; done of total: how far the stage is."""
        if note != self._note:
            log.info("%s", note)
            self._note = note
        if self._task is not None:
            self._progress.update(self._task, note=note, completed=done, total=total)

    def say(self, text: str) -> None:
        """A line that stays."""
        log.warning("%s", text)
        self.console.print(f"[yellow]![/] {text}", highlight=False)

    def reused(self, name: str) -> None:
        self._progress.update(self._progress.add_task(name, total=1, note="reused"), completed=1)
        if not self.console.is_terminal:
            self.console.print(f"{name}: reused")


@contextmanager
def silenced() -> Iterator[None]:
    """TensorFlow's and LiteRT's C++ print to the terminal when they are loaded, whatever their log level."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def form_table(head: tuple[str, ...], rows: list[list[str]]) -> Table:
    made = Table(*head, box=None, pad_edge=False)
    for row in rows:
        made.add_row(*row, style="bold" if row[-1] == "chosen" else None)
    return made


def show(what: Any) -> None:
    """Print a result: to stdout, where progress does not go, and as wide as it is where nobody looks."""
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(what, soft_wrap=isinstance(what, str))


def plain_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    made = Table(*head, box=None, pad_edge=False)
    for row in rows:
        made.add_row(*row)
    return made


def stage_table(stages: list[dict]) -> Table:
    table = Table("stage", "seconds", "", box=None, pad_edge=False)
    for stage in stages:
        table.add_row(stage["name"], f"{stage['seconds']:.1f}", "reused" if stage["reused"] else "")
    table.add_row("[bold]total", f"[bold]{sum(s['seconds'] for s in stages if not s['reused']):.1f}", "")
    return table
