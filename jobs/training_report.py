"""A training's part of a report, and of a live page: its curves, what was odd, what happened."""

from pathlib import Path
from typing import Any

from .drawing import BLUE, ORANGE, by_epoch, svg, table
from .watch import EVENTS, METRICS, STEPS, read_lines

MOST_STEPS = 400
"""Points of the curve of single steps."""
MOST_EVENTS = 12


def training(place: Path) -> str:
    """Of a `train` stage's folder, finished or at work; empty where nothing was trained."""
    history, steps, events = (read_lines(place / name) for name in (METRICS, STEPS, EVENTS))
    if not history and not steps:
        return ""
    parts = [_curves(history) if history else ""]
    if steps:
        odd = {line["step"] for line in events if line["kind"] == "anomaly"}
        parts.append(_steps(steps, odd))
        last = steps[-1]
        parts.append(
            f"<p>Step {last['step']:,} of {last['end']:,}, epoch {last['epoch']}: loss {last['loss']:.4g}, "
            f"{last['rows_per_second']:,.0f} rows a second. Anomalies: {len(odd) or 'none'}{', marked above' if odd else ''}.</p>"
        )
    if events:
        rows = [(line.get("step", ""), line["text"]) for line in events[-MOST_EVENTS:]]
        parts.append(table(("step", "what happened"), rows))
    return "".join(parts)


def _curves(history: list[dict[str, Any]]) -> str:
    """Loss and metrics by epoch, of training and validation rows."""
    values = [
        {
            "epoch": line["epoch"],
            "value": line[key],
            "rows": "validation" if key.startswith("val_") else "training",
            "metric": name,
        }
        for line in history
        for key in line
        if (name := key.removeprefix("val_")) in ("loss", "accuracy", "mae")
    ]
    return by_epoch(values, "rows")


def _steps(steps: list[dict[str, Any]], odd: set[int]) -> str:
    """The loss of single steps; where something was odd, a mark."""
    some = steps[:: max(1, len(steps) // MOST_STEPS)]
    values = [{"step": s["step"], "loss": s["loss"]} for s in some if s["loss"] is not None]
    x = {"field": "step", "type": "quantitative"}
    line = {
        "mark": {"type": "line", "color": BLUE},
        "encoding": {"x": x, "y": {"field": "loss", "type": "quantitative", "scale": {"zero": False}}},
        "data": {"values": values},
    }
    marks = {"mark": {"type": "rule", "color": ORANGE, "strokeDash": [4, 3]}, "encoding": {"x": x},
             "data": {"values": [{"step": step} for step in sorted(odd)]}}  # fmt: skip
    return svg({"layer": [line, marks] if odd else [line], "width": 600, "height": 140, "title": "Loss by step"})
