"""What reports are drawn with: tables, Vega-Lite charts as SVG, and the page around them; light and dark, without a network."""

import html
from typing import Any

BLUE, ORANGE = "#4c86c6", "#d9822b"
INK = "#010203"
"""Drawn by Vega as a colour that nothing else has, and then replaced by the page's own text colour, light or dark."""


def table(head: tuple[str, ...], rows: list[Any]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table tabindex=0><tr>{''.join(f'<th scope=col>{h}</th>' if h else '<td></td>' for h in head)}</tr>{body}</table>"


def svg(spec: dict[str, Any]) -> str:
    import vl_convert

    ink = {"labelColor": INK, "titleColor": INK}
    config = {
        "background": None,
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "axis": {**ink, "gridOpacity": 0.25, "domainColor": "#888", "tickColor": "#888"},
        "legend": ink,
        "header": ink,
        "title": {"color": INK},
    }
    drawn = vl_convert.vegalite_to_svg({**spec, "config": config})
    return f"<figure>{drawn.replace(INK, 'currentColor')}</figure>"


def by_epoch(values: list[dict[str, Any]], by: str, title: str | None = None) -> str:
    """Courses of a training: `epoch`, `value`, `metric` (a chart each), and what tells the lines apart, by that name."""
    return svg({
        "facet": {"field": "metric", "type": "nominal", "title": title},
        "spec": {
            "mark": {"type": "line", "point": {"size": 20}, "strokeWidth": 2},
            "encoding": {
                "x": {"field": "epoch", "type": "quantitative", "axis": {"tickMinStep": 1, "format": "d"}},
                "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
                "color": {"field": by, "type": "nominal", "title": None, "sort": None, "scale": {"range": [BLUE, ORANGE]}},
            },
            "width": 280, "height": 180,
        },
        "resolve": {"scale": {"y": "independent"}}, "data": {"values": values},
    })  # fmt: skip


def confusion(classes: list[Any], matrices: dict[str, list[list[int]]]) -> str:
    """Rows of each truth (down) and prediction (across), side by side by their titles."""
    order = [str(c) for c in classes]
    values = [
        {"title": title, "truth": order[i], "prediction": order[j], "rows": count}
        for title, matrix in matrices.items()
        for i, row in enumerate(matrix)
        for j, count in enumerate(row)
    ]
    axes = {
        "x": {"field": "prediction", "type": "nominal", "sort": order, "axis": {"labelAngle": 0}},
        "y": {"field": "truth", "type": "nominal", "sort": order},
    }
    colour = {"field": "rows", "type": "quantitative", "legend": None, "scale": {"range": [f"{BLUE}10", BLUE]}}
    text = {
        "text": {"field": "rows", "type": "quantitative"},
        "opacity": {"condition": {"test": "datum.rows > 0", "value": 1}, "value": 0.25},
    }
    layers = [
        {"mark": "rect", "encoding": {**axes, "color": colour}},
        {"mark": {"type": "text", "color": INK}, "encoding": {**axes, **text}},
    ]
    size = max(200, 30 * len(order))
    facet = {"field": "title", "type": "nominal", "title": None, "sort": list(matrices)}
    return svg({"facet": facet, "spec": {"layer": layers, "width": size, "height": size}, "data": {"values": values}})


def page(title: str, body: str) -> str:
    """A whole document."""
    return _HTML.format(title=html.escape(title), body=body)


_HTML = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem }}
.lead {{ font-size: 1.15rem }}
table {{ border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }}
th, td {{ text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid #8883 }}
td {{ font-variant-numeric: tabular-nums }}
figure {{ margin: 1rem 0; overflow-x: auto }}
svg {{ max-width: 100%; height: auto; overflow: visible }}
pre {{ overflow-x: auto }}
@media print {{ figure, tr, details {{ break-inside: avoid }} table {{ display: table }} }}
</style>
<body><main>{body}</main></body></html>
"""
