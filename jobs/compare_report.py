"""Two models side by side, as a page: which is better, on which rows they differ, and what they were made of."""

import html
from pathlib import Path
from typing import Any

from ..cluster.storage import read_json, write_bytes
from .compare import lines
from .drawing import BLUE, by_epoch, confusion, page, svg, table
from .watch import METRICS, read_lines

MOST_CLASSES = 30
MOST_SHOWN = 32
"""Characters of a setting: enough to tell two apart."""


def write(file: Path, names: tuple[str, str], places: tuple[Path, Path], found: dict[str, Any]) -> None:
    """names: by which both were asked for. places: of their bundles. found: what `compare.compare` found."""
    first, second = (html.escape(name) for name in names)
    rows = [tuple(cell.replace(" ", "\u00a0") for cell in line) for line in lines(found)]
    parts = [
        f"<h1>{first} and {second}</h1>",
        f"<p class=lead>{found['rows']:,} test rows: {html.escape(found['verdict'])}.</p><p>{html.escape(found['test'])}.</p>",
        f"<h2>Figures</h2>{_differences(found, names[1])}",
        table(("figure", first, second, "difference (95 %)", "better"), rows),
    ]
    if len(found.get("classes", ())) in range(1, MOST_CLASSES + 1):
        parts.append(f"<h2>Confusion</h2>{confusion(found['classes'], dict(zip(names, found['confusion'], strict=True)))}")
    courses = [read_lines(place.parent / "train" / METRICS) for place in places]
    if all(courses):
        parts.append(f"<h2>Training</h2>{_courses(courses, names)}")
    notes = [_flat(_about(place)) for place in places]
    keys = dict.fromkeys([*notes[0], *notes[1]])
    other = [(key, *(note.get(key, "–") for note in notes)) for key in keys if notes[0].get(key) != notes[1].get(key)]
    same = len(keys) - len(other)
    parts.append(f"<h2>What differs</h2>{table(('', first, second), other) if other else '<p>Nothing.</p>'}")
    parts.append(f"<p>{same} other settings are the same.</p>")
    write_bytes(file, page(f"{names[0]} and {names[1]}", "".join(parts)).encode())


def _about(place: Path) -> dict[str, Any]:
    """Of a bundle: where it comes from, and how large it is."""
    note = place / "bundle.json"
    lineage = dict(read_json(note)["lineage"]) if note.exists() else {}
    settings = lineage.pop("settings", {})
    size = (place / "model.keras").stat().st_size
    return {**settings, **lineage, "model.keras": f"{size / 1024:.0f} KiB"}


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Leaves by their dotted names."""
    if isinstance(value, dict) and value:
        return {key: leaf for each, inner in value.items() for key, leaf in _flat(inner, f"{name}.{each}".lstrip(".")).items()}
    return {name: str(value)[:MOST_SHOWN]}


def _differences(found: dict[str, Any], second: str) -> str:
    """Each figure's difference and its interval, on a scale of its own."""
    values = [{"figure": name.replace("_", " "), "gap": f["b"] - f["a"], **f} for name, f in found["figures"].items()]
    y = {"field": "figure", "type": "nominal", "title": None, "axis": None}
    layers = [
        {"mark": {"type": "rule", "color": "#888", "strokeDash": [3, 3]}, "encoding": {"x": {"datum": 0}}},
        {"mark": {"type": "rule", "color": BLUE, "strokeWidth": 3, "opacity": 0.6},
         "encoding": {"x": {"field": "low", "type": "quantitative", "title": None, "axis": {"tickCount": 3}},
                      "x2": {"field": "high"}, "y": y}},
        {"mark": {"type": "point", "filled": True, "size": 70, "color": BLUE},
         "encoding": {"x": {"field": "gap", "type": "quantitative"}, "y": y}},
    ]  # fmt: skip
    return svg({
        "facet": {"field": "figure", "type": "nominal", "title": f"{second} less the other, with its 95 % interval"},
        "spec": {"layer": layers, "width": 170, "height": 40}, "columns": 3,
        "resolve": {"scale": {"x": "independent"}}, "data": {"values": values},
    })  # fmt: skip


def _courses(courses: list[list[dict[str, Any]]], names: tuple[str, str]) -> str:
    """Validation figures by epoch."""
    values = [
        {"epoch": line["epoch"], "value": line[key], "metric": key.removeprefix("val_"), "model": name}
        for name, course in zip(names, courses, strict=True)
        for line in course
        for key in ("val_loss", "val_accuracy", "val_mae")
        if key in line
    ]
    return by_epoch(values, "model", "of validation rows")
