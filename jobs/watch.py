"""What a training writes about itself, on rank 0 and off its main thread.

    steps.jsonl      a line every half second at most: the steps since the last line, their mean loss, gradient norm, …
    metrics.jsonl    a line an epoch
    tensorboard/     the same as scalars, keyed by step
    events.jsonl     what happened: workers that began, anomalies, a checkpoint that could not be written

Metrics are keyed by their step. A training that goes on from a checkpoint first drops what lies after it, so a step that is
done again replaces what stood there and is never there twice. Events stay. Prometheus gets the newest figures through
Ray's own exporter.
"""

import contextlib
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.storage import write_bytes
from .steps import FINITE, LOSS, MEMORY, NORM, OWN, RATE, ROWS, WAIT, Signals

METRICS, STEPS, EVENTS, BOARD = "metrics.jsonl", "steps.jsonl", "events.jsonl", "tensorboard"
OF_ALL = ("loss", "grad_norm", "learning_rate", "rows_per_second")
"""What Prometheus gets of all ranks together."""
EVERY_SECONDS = 0.5
TAIL_BYTES = 64 << 10


def read_lines(file: Path) -> list[dict]:
    """The whole lines of a JSON-lines file; none when it is not there."""
    found = []
    for line in file.read_bytes().split(b"\n")[:-1] if file.exists() else []:
        with contextlib.suppress(ValueError):  # cut short by a full disk
            found.append(json.loads(line))
    return found


def last_line(file: Path) -> dict:
    """The last whole line of a JSON-lines file, however long the file is; empty when there is none."""
    if not file.exists():
        return {}
    with file.open("rb") as lines:
        lines.seek(max(0, lines.seek(0, os.SEEK_END) - TAIL_BYTES))
        last = lines.read().split(b"\n")[-2:-1]
    with contextlib.suppress(ValueError):  # cut short by a full disk
        return json.loads(last[0]) if last else {}
    return {}


def write_lines(file: Path, lines: list[dict]) -> None:
    write_bytes(file, b"".join(json.dumps(line).encode() + b"\n" for line in lines))


class Watch:
    """step: what is done already; end: the last step there will be."""

    def __init__(self, folder: Path, name: str, step: int, end: int):
        import tensorflow as tf
        from ray.util.metrics import Gauge

        self.folder, self.end = folder, end
        self._thread = ThreadPoolExecutor(1)
        self._pending: list[Signals] = []
        self.has_graph = False
        self._unwritten: list[tuple[str, bytes]] = []
        self._at = (step, 0)
        self._since = time.monotonic()
        shutil.rmtree(folder / BOARD, ignore_errors=True)
        self._board: Any = tf.summary.create_file_writer(str(folder / BOARD))
        for file in (METRICS, STEPS):
            kept = [line for line in read_lines(folder / file) if line["step"] <= step]
            write_lines(folder / file, kept)
            for line in kept:
                self._scalars(line, "epoch" if file == METRICS else "step")
        names = ("step", "left", "anomalies", *OF_ALL, "input_wait", "step_seconds", "memory_mb")
        self._gauges = {
            n: Gauge(f"heliograph_train_{n}", f"{n} of the training, at its newest step", ("model", "rank")) for n in names
        }
        self._model = name
        self._anomalies = sum(line["kind"] == "anomaly" for line in read_lines(folder / EVENTS))

    def see(self, step: int, epoch: int, signals: Signals) -> None:
        """A call that ended at `step`."""
        self._pending.append(signals)
        self._at = (step, epoch)
        if time.monotonic() - self._since >= EVERY_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the line of what was seen since the last one; before a checkpoint too, so that no line lies across it."""
        if not self._pending:
            return
        seconds, signals, (step, epoch) = time.monotonic() - self._since, self._pending[-1], self._at
        steps, hosts = np.concatenate([s.steps for s in self._pending]), signals.hosts
        self._pending, self._since = [], time.monotonic()
        finite = steps[steps[:, FINITE] > 0]
        loss, norm = (float(finite[:, i].mean()) if len(finite) else None for i in (LOSS, NORM))
        line = {
            "step": step,
            "epoch": epoch,
            "end": self.end,
            "steps": len(steps),
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": float(steps[-1, RATE]),
            "not_finite": int(len(steps) - len(finite)),
            "rows_per_second": round(float(steps[:, ROWS].sum()) / seconds, 1),
            "compute_ms": [round(1000 * float(s), 3) for s in np.median(steps[:, OWN:], axis=0)],
            "input_wait": [round(float(w), 4) for w in hosts[:, WAIT]],
            "memory_mb": [round(float(m), 1) for m in hosts[:, MEMORY]],
        }
        self._thread.submit(self._line, STEPS, line, "step")

    def epoch(self, figures: dict, weights: list[tuple[str, np.ndarray]]) -> None:
        """The figures of an epoch; weights: (name, values) of which to draw histograms."""
        self._thread.submit(self._line, METRICS, figures, "epoch")
        for name, values in weights:
            self._thread.submit(self._histogram, name, values, figures["step"])

    def event(self, step: int, kind: str, text: str) -> None:
        self._anomalies += kind == "anomaly"
        line = {"time": round(time.time(), 3), "step": step, "kind": kind, "text": text}
        self._thread.submit(self._line, EVENTS, line, None)

    def graph(self, graph: Any) -> None:
        import tensorflow as tf

        self.has_graph = True
        with self._board.as_default(step=0):
            tf.summary.graph(graph)

    def back_to(self, step: int) -> None:
        """Drop what was written after `step`, which will be done again."""
        self._pending = []
        self.close()
        self.__init__(self.folder, self._model, step, self.end)

    def close(self) -> None:
        self.flush()
        self._thread.shutdown(wait=True)
        self._board.close()

    def _line(self, file: str, line: dict, kind: str | None) -> None:
        self._unwritten.append((file, json.dumps(line).encode() + b"\n"))
        with contextlib.suppress(OSError):  # a full disk: they are written with the next line
            while self._unwritten:
                name, text = self._unwritten[0]
                with (self.folder / name).open("ab", buffering=0) as out:
                    size = out.tell()
                    if out.write(text) < len(text):
                        out.truncate(size)
                        break
                self._unwritten.pop(0)
        if kind:
            self._scalars(line, kind)
            self._board.flush()
        if kind == "step":
            self._prometheus(line)

    def _scalars(self, line: dict, kind: str) -> None:
        import tensorflow as tf

        with self._board.as_default(step=line["step"]):
            for name, value in line.items():
                if name not in ("epoch", "step", "end", "steps", "workers", "seconds") and value is not None:
                    for rank, one in enumerate(value) if isinstance(value, list) else ((None, value),):
                        tf.summary.scalar(f"{kind}/{name}" + (f"/rank {rank}" if rank is not None else ""), one)

    def _histogram(self, name: str, values: np.ndarray, step: int) -> None:
        import tensorflow as tf

        with self._board.as_default(step=step):
            tf.summary.histogram(name, values)

    def _prometheus(self, line: dict) -> None:
        own = {"model": self._model, "rank": "all"}
        for name, value in (("step", line["step"]), ("left", line["end"] - line["step"]), ("anomalies", self._anomalies)):
            self._gauges[name].set(value, own)
        for name in OF_ALL:
            if line[name] is not None:
                self._gauges[name].set(line[name], own)
        for rank, ms in enumerate(line["compute_ms"]):
            tags = {"model": self._model, "rank": str(rank)}
            self._gauges["step_seconds"].set(ms / 1000, tags)
            self._gauges["input_wait"].set(line["input_wait"][rank], tags)
            self._gauges["memory_mb"].set(line["memory_mb"][rank], tags)
