"""The report of a search: one file, no network."""

import html
from pathlib import Path

import numpy as np

from ..cluster.storage import write_bytes
from .choice import Choice, figure
from .drawing import page, svg, table
from .record import FAILED, STOPPED, Trial
from .search import Space, surrogate

SEARCH = "search.html"
"""The search without the page around it, for other reports."""
MOST = 400
"""Draws at which the surrogate is asked what a parameter does."""


def write(folder: Path, name: str, space: Space, trials: list[Trial], choice: Choice) -> None:
    """Write `report.html` into the search's folder, and its content as SEARCH beside it and beside the best project."""
    metric, sign, best = choice.metrics[0], float(choice.signs[0]), choice.best
    done = [t for t in trials if t.status != FAILED]
    short = {key: key.rpartition(".")[2] for key in space.dimensions}
    parts = [
        f"<p class=lead>{html.escape(choice.said)}: {choice.values(best)}, trial {best.number} of {len(trials)}.</p>",
        f"<h2>History</h2>{_history(done, metric, sign)}",
    ]
    if len(choice.metrics) > 1:
        parts.append(f"<h2>Pareto front</h2>{_front(done, choice)}")
    if len({len(t.curve) for t in done}) > 1:
        parts.append(f"<h2>Courses</h2>{_courses(done, metric)}")
    if len(done) > 2:
        parts.append(f"<h2>Trials</h2>{_parallel(space, done, short, metric, sign)}")
        parts.append(_what_matters(space, done, short, metric, sign))
    rows = [
        [t.number, t.status, len(t.curve), *(figure(t.values[m]) if m in t.values else "–" for m in choice.metrics),
         *(t.config.get(k, "–") for k in short)]
        for t in [*choice.ranked, *(t for t in trials if t.status == FAILED)]
    ]  # fmt: skip
    parts.append(f"<h2>All</h2>{table(('trial', 'ended', 'levels', *choice.metrics, *short.values()), rows)}")
    if told := [(t.number, t.status, t.why) for t in trials if t.why and t.status in (FAILED, STOPPED)]:
        parts.append(f"<h2>Stopped and failed</h2>{table(('trial', 'ended', 'why'), told)}")
    if taken := [(t.number, t.from_) for t in trials if t.from_ is not None]:
        parts.append(f"<h2>Population</h2>{table(('trial', 'took over last'), taken)}")
    title, content = html.escape(f"{name}: search"), "".join(parts)
    write_bytes(folder / "report.html", page(f"{name}: search", f"<h1>{title}</h1>{content}").encode())
    inside = content.replace("<h2>", "<h3>").replace("</h2>", "</h3>").replace(" class=lead", "")
    for place in (folder, folder / "best"):
        write_bytes(place / SEARCH, f"<h2>Search</h2>{inside}".encode())


def _front(done: list[Trial], choice: Choice) -> str:
    """The first metric against each of the others."""
    first, on, charts = choice.metrics[0], {t.number for t in choice.front}, []
    for other in choice.metrics[1:]:
        values = [
            {"x": t.values[other], "y": t.values[first], "trial": t.number,
             "kind": "chosen" if t is choice.best else "front" if t.number in on else "other"}
            for t in done
        ]  # fmt: skip
        scale = {"zero": False}
        colours = {"domain": ["chosen", "front", "other"], "range": ["#d2691e", "#4c86c6", "#c4c4c4"]}
        charts.append(svg({
            "layer": [
                {"mark": {"type": "line", "color": "#4c86c6", "opacity": 0.5},
                 "transform": [{"filter": "datum.kind != 'other'"}],
                 "encoding": {"x": {"field": "x", "type": "quantitative", "scale": scale},
                              "y": {"field": "y", "type": "quantitative", "scale": scale}, "order": {"field": "x"}}},
                {"mark": {"type": "point", "filled": True, "size": 60},
                 "encoding": {"x": {"field": "x", "type": "quantitative", "title": other, "scale": scale},
                              "y": {"field": "y", "type": "quantitative", "title": first, "scale": scale},
                              "color": {"field": "kind", "type": "nominal", "scale": colours, "title": None}}},
            ],
            "width": 480, "height": 240, "data": {"values": values},
        }))  # fmt: skip
    return "".join(charts)


def _courses(done: list[Trial], metric: str) -> str:
    """What trials came to, level by level: those that end early were stopped."""
    values = [{"trial": t.number, "level": i, "value": v} for t in done for i, v in enumerate(t.curve, 1)]
    return svg({
        "mark": {"type": "line", "opacity": 0.6, "point": True, "color": "#4c86c6"},
        "encoding": {"x": {"field": "level", "type": "quantitative", "axis": {"tickMinStep": 1}},
                     "y": {"field": "value", "type": "quantitative", "title": metric, "scale": {"zero": False}},
                     "detail": {"field": "trial"}},
        "width": 560, "height": 200, "data": {"values": values},
    })  # fmt: skip


def _history(done: list[Trial], metric: str, sign: float) -> str:
    so_far = sign * np.minimum.accumulate([sign * t.values[metric] for t in done])
    values = [{"trial": t.number, "value": t.values[metric], "best": float(b)} for t, b in zip(done, so_far, strict=True)]
    x = {"field": "trial", "type": "quantitative", "axis": {"tickMinStep": 1}}
    scale = {"zero": False}
    return svg({
        "layer": [
            {"mark": {"type": "point", "filled": True, "color": "#4c86c6"},
             "encoding": {"x": x, "y": {"field": "value", "type": "quantitative", "title": metric, "scale": scale}}},
            {"mark": {"type": "line", "interpolate": "step-after", "color": "#d2691e"},
             "encoding": {"x": x, "y": {"field": "best", "type": "quantitative", "title": metric, "scale": scale}}},
        ],
        "width": 560, "height": 200, "data": {"values": values},
    })  # fmt: skip


def _parallel(space: Space, done: list[Trial], short: dict[str, str], metric: str, sign: float) -> str:
    """Parallel coordinates: a line a trial, each parameter from its lowest to its highest."""
    order = np.argsort(np.argsort([sign * t.values[metric] for t in done])) / max(1, len(done) - 1)
    places = {key: dimension.place for key, dimension in space.dimensions.items()}
    values = [
        {"trial": t.number, "parameter": short[key], "place": places[key](t.config[key]), "rank": float(rank)}
        for t, rank in zip(done, order, strict=True) for key in short if key in t.config
    ]  # fmt: skip
    values += [
        {"trial": t.number, "parameter": metric, "place": 1 - float(rank), "rank": float(rank)}
        for t, rank in zip(done, order, strict=True)
    ]
    no_title, colours = {"title": None, "axis": {"labelAngle": -30}}, {"scheme": "viridis", "reverse": True}
    return svg({
        "mark": {"type": "line", "opacity": 0.7},
        "encoding": {
            "x": {"field": "parameter", "type": "nominal", "sort": [*short.values(), metric], **no_title},
            "y": {"field": "place", "type": "quantitative", "title": "lowest to highest, best", "axis": {"labels": False}},
            "detail": {"field": "trial"},
            "color": {"field": "rank", "type": "quantitative", "scale": colours, "legend": None},
        },
        "width": 560, "height": 220, "data": {"values": values},
    })  # fmt: skip


def _what_matters(space: Space, done: list[Trial], short: dict[str, str], metric: str, sign: float) -> str:
    """The surrogate's own view: how much its prediction varies with each parameter alone, and in which way."""
    past = [(t.config, sign * t.values[metric]) for t in done]
    found = surrogate(space, past, (), 0)
    if found is None:
        return ""
    draw = np.random.default_rng(0)
    base = draw.random((MOST, len(space.dimensions)))
    weights, slices = [], []
    for i, key in enumerate(space.dimensions):
        places = np.linspace(0.02, 0.98, 15)
        means = []
        for place in places:
            points = base[:60].copy()
            points[:, i] = place
            mean, deviation = found.predict(space.features([space.config(p) for p in points]))
            means.append(mean.mean())
            middle, spread = -float(mean.mean()), float(deviation.mean())
            ends = {"better": middle, "low": middle - spread, "high": middle + spread}
            slices.append({"parameter": short[key], "place": float(place), **ends})
        weights.append((short[key], float(np.var(means))))
    total = sum(w for _, w in weights) or 1.0
    importance = [{"parameter": name, "share": weight / total} for name, weight in weights]
    bars = svg({
        "mark": {"type": "bar", "color": "#4c86c6"},
        "encoding": {"y": {"field": "parameter", "type": "nominal", "sort": "-x", "title": None},
                     "x": {"field": "share", "type": "quantitative", "axis": {"format": "%"}, "title": None}},
        "width": 420, "data": {"values": importance},
    })  # fmt: skip
    curves = svg({
        "facet": {"field": "parameter", "type": "nominal", "title": None, "sort": list(short.values())}, "columns": 3,
        "spec": {"layer": [
            {"mark": {"type": "area", "opacity": 0.2, "color": "#4c86c6"},
             "encoding": {"x": {"field": "place", "type": "quantitative", "title": None, "axis": {"labels": False}},
                          "y": {"field": "low", "type": "quantitative", "title": "better"}, "y2": {"field": "high"}}},
            {"mark": {"type": "line", "color": "#4c86c6"},
             "encoding": {"x": {"field": "place", "type": "quantitative"}, "y": {"field": "better", "type": "quantitative"}}},
        ], "width": 170, "height": 90},
        "data": {"values": slices},
    })  # fmt: skip
    said = "What the surrogate expects along each parameter, lowest to highest, the others drawn at random; with one deviation."
    return f"<h2>What matters</h2><p>Shares of what the parameters do, each alone.</p>{bars}<p>{said}</p>{curves}"
