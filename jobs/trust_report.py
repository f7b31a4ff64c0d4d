"""The parts of the report that say how far a model can be trusted: curves, calibration, slices, explanations, gates."""

import html
from typing import Any

from .drawing import BLUE, ORANGE, svg, table

MOST_BARS = 15
GREY = "#888"


def evaluation(test: dict[str, Any]) -> str:
    """Of one target: curves, calibration, slices."""
    parts = []
    if test.get("curves"):
        parts.append(_curves(test["curves"]) + _calibration(test))
    for key, title in (("slices", "Slices"), ("worst", "Where it does worst")):
        if rows := test.get(key):
            parts.append(f"<h3>{title}</h3>{_slices(rows, test)}")
    if key := test.get("costs"):
        parts.append(
            f"<p>Cheapest: <code>{html.escape(key['positive'])}</code> from a probability of {key['threshold']:.4f} on, chosen "
            f"by {key['chosen_by']} rows: {key['cost']:.4f} a row on the test rows, {key['cost_at_half']:.4f} at one half.</p>"
        )
    if told := test.get("membership"):
        parts.append(
            f"<p>Membership inference by losses: advantage {told['advantage']:.3f}, area {told['auc']:.3f} (0 and 0.5 where "
            "nothing of the training rows shows).</p>"
        )
    return "".join(parts)


def _curves(curves: list[dict[str, Any]]) -> str:
    roc, pr = [], []
    for curve in curves[:12]:
        name = str(curve["class"])
        for i, (x, y, p) in enumerate(zip(curve["false_positive_rate"], curve["recall"], curve["precision"], strict=True)):
            roc.append({"x": x, "y": y, "class": name, "order": i})
            pr.append({"x": y, "y": p, "class": name, "order": i})

    def chart(values: list[dict], x: str, y: str) -> dict[str, Any]:
        colour = {"field": "class", "type": "nominal", "scale": {"scheme": "tableau20"}, "legend": {"title": "class"}}
        if len(curves) == 1:
            colour = {"value": BLUE}
        line = {
            "mark": {"type": "line", "strokeWidth": 1.5, "interpolate": "linear"},
            "encoding": {
                "x": {"field": "x", "type": "quantitative", "title": x, "scale": {"domain": [0, 1]}},
                "y": {"field": "y", "type": "quantitative", "title": y, "scale": {"domain": [0, 1]}},
                "color": colour,
                "order": {"field": "order"},
            },
        }
        return {"data": {"values": values}, "width": 250, "height": 250, **line}

    both = {"hconcat": [
        {**chart(roc, "false positive rate", "recall"), "title": "ROC"},
        {**chart(pr, "recall", "precision"), "title": "Precision and recall"},
    ]}  # fmt: skip
    return svg(both)


def _calibration(test: dict[str, Any]) -> str:
    axis = {"type": "quantitative", "scale": {"domain": [0, 1]}}
    at = {"x": {"field": "confidence", **axis}, "y": {"field": "accuracy", **axis}}
    size = {"field": "rows", "type": "quantitative", "legend": {"title": "rows"}, "scale": {"range": [20, 400]}}
    diagonal = {"data": {"values": [{"confidence": 0, "accuracy": 0}, {"confidence": 1, "accuracy": 1}]},
                "mark": {"type": "line", "strokeDash": [4, 4], "color": GREY}, "encoding": at}  # fmt: skip
    points = {"mark": {"type": "circle", "color": BLUE, "opacity": 0.8}, "encoding": {**at, "size": size}}
    drawn = {"layer": [diagonal, points], "data": {"values": test["calibration"]}, "width": 250, "height": 250}
    return svg({**drawn, "title": f"Calibration (ECE {test['ece']:.3f})"})


def _slices(rows: list[dict[str, Any]], test: dict[str, Any]) -> str:
    names = [n for n in ("accuracy", "recall", "precision", "f1", "mae", "rmse", "r2") if n in test and n in rows[0]]
    whole = ("all", f"{test['rows']:,}", *(f"{test[n]:.4f}" for n in names))
    body = [(r["slice"], f"{r['rows']:,}", *(f"{r[n]:.4f}" if r.get(n) is not None else "–" for n in names)) for r in rows]
    return table(("rows with", "rows", *names), [whole, *body])


def explanation(said: dict[str, Any]) -> str:
    """Of `explain.json`."""
    parts = [f"<h2>Explanation</h2><p>Of {said['rows']:,} test rows, by {html.escape(said['method'].replace('_', ' '))}.</p>"]
    sizes = [{"column": line["column"], "value": line["value"]} for line in said["mean_size"][:MOST_BARS]]
    drops = [
        {"column": line["column"], "value": line["drop"], "low": line["drop"] - line["deviation"],
         "high": line["drop"] + line["deviation"]}
        for line in said["importance"][:MOST_BARS]
    ]  # fmt: skip
    if len(sizes) > 1:
        parts.append(svg({"hconcat": [_bars(sizes, "mean absolute value", False), _bars(drops, "drop when permuted", True)]}))
    if said.get("map"):
        parts.append(_map(said["map"]))
    if said.get("attention"):
        parts.append(_attention(said["attention"]))
    if said["dependence"]:
        parts.append(_dependence(said["dependence"]))
    tree = said["surrogate"]
    how = "agrees with the model in" if tree["measured_by"] == "agreement" else "has an R² of"
    value = f"{tree['fidelity']:.1%} of the rows" if tree["measured_by"] == "agreement" else f"{tree['fidelity']:.3f}"
    parts.append(
        f"<details><summary>A tree of depth {tree['depth']} that stands in for the model: {how} {value}</summary>"
        f"<pre>{html.escape(tree['tree'])}</pre></details>"
    )
    return "".join(parts)


def _bars(values: list[dict], title: str, spread: bool) -> dict[str, Any]:
    y = {"field": "column", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 140}}
    x = {"field": "value", "type": "quantitative", "title": title}
    layers: list[dict] = [{"mark": {"type": "bar", "color": BLUE}, "encoding": {"x": x, "y": y}}]
    if spread:
        ends = {"x": {"field": "low", "type": "quantitative", "title": title}, "x2": {"field": "high"}, "y": y}
        layers.append({"mark": {"type": "rule", "color": ORANGE}, "encoding": ends})
    return {"layer": layers, "data": {"values": values}, "width": 210, "height": {"step": 17}}


def _map(places: list[dict[str, Any]]) -> str:
    values = [{"row": p["place"][0], "column": p["place"][1], "value": p["value"]} for p in places]
    axis = {"type": "ordinal", "axis": None}
    colour = {"field": "value", "type": "quantitative", "scale": {"range": ["#4c86c608", BLUE]}, "legend": {"title": "mean size"}}
    at = {"x": {"field": "column", **axis}, "y": {"field": "row", **axis}, "color": colour}
    return svg({"mark": "rect", "encoding": at, "data": {"values": values}, "width": 240, "height": 240,
                "title": "Where answers come from"})  # fmt: skip


def _attention(layers: list[dict[str, Any]]) -> str:
    values = [
        {"layer": f"{line['layer']} ({line['heads']} heads)", "from": i, "to": j, "value": value}
        for line in layers
        for i, row in enumerate(line["map"])
        for j, value in enumerate(row)
    ]
    at = {
        "x": {"field": "to", "type": "ordinal", "title": "place looked at", "axis": {"labelOverlap": True, "labelAngle": 0}},
        "y": {"field": "from", "type": "ordinal", "title": "place that looks", "axis": {"labelOverlap": True}},
        "color": {"field": "value", "type": "quantitative", "title": "weight", "scale": {"range": ["#4c86c608", BLUE]}},
    }
    facet = {"field": "layer", "type": "nominal", "title": "Attention, mean of rows and heads", "sort": None}
    drawn = {"mark": "rect", "encoding": at, "width": 240, "height": 240}
    return svg({"facet": facet, "columns": 2, "spec": drawn, "data": {"values": values}})


def _dependence(found: list[dict[str, Any]]) -> str:
    several = len(found[0]["answers"][0])
    values = [
        {"column": line["column"], "value": x, "answer": a, "output": str(i)}
        for line in found
        for x, answers in zip(line["values"], line["answers"], strict=True)
        for i, a in enumerate(answers)
        if several != 2 or i == 1
    ]
    colour: dict[str, Any] = {"value": BLUE}
    if several > 2:
        colour = {"field": "output", "type": "nominal", "scale": {"scheme": "tableau20"}}
    line = {
        "mark": {"type": "line", "strokeWidth": 2},
        "encoding": {
            "x": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
            "y": {"field": "answer", "type": "quantitative", "title": "mean answer", "scale": {"zero": False}},
            "color": colour,
        },
        "width": 260,
        "height": 130,
    }
    facet = {"field": "column", "type": "nominal", "title": None, "sort": None}
    apart = {"scale": {"x": "independent"}}
    return svg({"facet": facet, "columns": 2, "spec": line, "resolve": apart, "data": {"values": values}})


def gates(verdict: dict[str, Any], attack: dict[str, Any] | None) -> str:
    """What had to be reached, tests of behaviour, and the attack."""
    parts = []
    if verdict["gates"]:
        rows = [
            (g["gate"], g["limit"], "–" if g["value"] is None else f"{g['value']:.4g}", "reached" if g["passed"] else "FAILED")
            for g in verdict["gates"]
        ]
        parts.append(table(("required", "limit", "measured", ""), rows))
    if verdict.get("behaviour"):
        rows = [
            (t["name"], t["test"], f"{t['rows']:,}", f"{t['passed']:.1%}", "passed" if t["ok"] else "FAILED")
            for t in verdict["behaviour"]
        ]
        parts.append(table(("behaviour", "test", "rows", "passed", ""), rows))
    if attack:
        parts.append(
            f"<p>Attacked by {attack['method']} with {attack['epsilon']:g} of each number's range, {attack['steps']} steps, "
            f"{attack['restarts']} restarts: {attack['robust_accuracy']:.2%} of {attack['rows']:,} rows stay right (without: "
            f"{attack['accuracy']:.2%}).</p>"
        )
    times, size = verdict["latency_ms"], verdict["size_mb"]
    parts.append(
        f"<p>A row takes {times['p50']:.3f} ms (99th percentile {times['p99']:.3f}), the model's file {size:g} MB; a new process "
        f"that has the files alone answers the same (to {verdict['reload_gap']:.0e}).</p>"
    )
    return f"<h2>Validation</h2>{''.join(parts)}"
