"""What an endpoint was asked, from the log that it writes into the run's folder: a line a request, without its content."""

import contextlib
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from .drawing import svg, table

LOG = "serve.log"
MOST_BYTES = 8 << 20
"""Of the log's end, which is some 50,000 requests."""
MOST_POINTS = 60
SPANS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 86_400)
"""Seconds of a point of the chart."""


def traffic(folder: Path) -> str:
    """Of a run's folder; empty where its endpoint was asked nothing yet."""
    lines, cut = _lines(folder / LOG)
    if not lines:
        return ""
    times = np.array([line["time"] for line in lines])
    span = next((s for s in SPANS if (times[-1] - times[0]) / s <= MOST_POINTS), SPANS[-1])
    points: dict[float, list[dict[str, Any]]] = {}
    for line in lines:
        points.setdefault(line["time"] // span * span, []).append(line)
    chart = []
    for at, some in sorted(points.items()):
        when = {"time": 1000 * at}
        for kind, count in Counter(_kind(line["status"]) for line in some).items():
            chart.append({**when, "what": "requests a second", "line": kind, "value": count / span})
        for name, value in zip(("median", "99th percentile"), _times(some), strict=True):
            chart.append({**when, "what": "milliseconds", "line": name, "value": value})
    drawn = svg({
        "facet": {"field": "what", "type": "nominal", "title": None, "sort": ["requests a second", "milliseconds"]},
        "spec": {
            "mark": {"type": "line", "point": {"size": 20}},
            "encoding": {
                "x": {"field": "time", "type": "temporal", "title": None},
                "y": {"field": "value", "type": "quantitative", "title": None},
                "color": {"field": "line", "type": "nominal", "title": None},
            },
            "width": 270, "height": 150,
        },
        "resolve": {"scale": {"y": "independent"}}, "data": {"values": chart},
    })  # fmt: skip
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines:
        name = "other paths" if line["model"] == "-" else f"{line['model']}@{line['version']}"
        groups.setdefault((name, line["protocol"], str(line["status"])), []).append(line)
    rows = [
        (*key, f"{len(some):,}", f"{sum(line['rows'] for line in some):,}", *(f"{ms:.2f}" for ms in _times(some)))
        for key, some in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    head = ("model", "protocol", "status", "requests", "rows", "p50 ms", "p99 ms")
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(times[0]))
    said = f"{'The last ' if cut else ''}{len(lines):,} requests since {since}; a point is {span} s."
    return f"<h2>Endpoint</h2><p>{said}</p>{drawn}{table(head, rows)}"


def _lines(file: Path) -> tuple[list[dict[str, Any]], bool]:
    """By time, and whether there are older ones. Replicas append by turns."""
    if not file.exists():
        return [], False
    with file.open("rb") as log:
        left = max(0, log.seek(0, os.SEEK_END) - MOST_BYTES)
        log.seek(left)
        whole = log.read().split(b"\n")[1 if left else 0 : -1]
    found = []
    for line in whole:
        with contextlib.suppress(orjson.JSONDecodeError):  # cut short by a full disk
            found.append(orjson.loads(line))
    return sorted(found, key=lambda line: line["time"]), left > 0


def _kind(status: int) -> str:
    return "answered" if status < 400 else "refused" if status < 500 else "failed"


def _times(lines: list[dict[str, Any]]) -> tuple[float, float]:
    """Milliseconds: (median, 99th percentile)."""
    median, high = np.quantile([line["ms"] for line in lines], [0.5, 0.99])
    return float(median), float(high)
