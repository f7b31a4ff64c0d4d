"""The model card: what a bundle says of itself to people, in Hugging Face's format (Markdown under YAML), of measured facts alone
(Mitchell et al., Model cards for model reporting, 2019)."""

from typing import Any

import yaml

from ..datasets.schema import Schema
from ..trust import FIGURES

CARD = "README.md"


Json = dict[str, Any]


def card(name: str, schema: Schema, lineage: Json, test: Json, verdict: Json, more: Json) -> str:
    """more: `train` (result.json), `attack`, `explain`, where there are such."""
    kind = {"classification": "tabular-classification", "regression": "tabular-regression"}.get(schema.task, "other")
    if any(f.kind in ("image", "tensor") for f in schema.features):
        kind = "image-classification" if schema.classes else "other"
    known = [n for n in FIGURES if isinstance(test.get(n), float)]
    metrics = [{"type": n, "value": round(test[n], 6)} for n in known]
    head = {
        "library_name": "heliograph",
        "tags": ["heliograph", "keras", kind],
        "model-index": [{
            "name": name,
            "results": [{
                "task": {"type": kind}, "dataset": {"type": "own", "name": lineage.get("source", "")}, "metrics": metrics,
            }],
        }],
    }  # fmt: skip
    train, parts = more.get("train", {}), [f"# {name}"]
    answers = f"one of {', '.join(map(str, schema.classes))}" if schema.classes else "a number"
    features = ", ".join(f"{f.name} ({f.kind})" for f in schema.features[:12]) + (" …" if len(schema.features) > 12 else "")
    parts.append(
        f"Predicts `{schema.target}` ({answers}) from {features}. {train.get('parameters', 0):,} parameters, trained on "
        f"`{lineage.get('source', '')}` (data {str(lineage.get('data', ''))[:12]}, code {str(lineage.get('code', ''))[:12]})."
    )
    rows = []
    for n in known:
        ends = test.get("intervals", {}).get(n)
        rows.append((n.replace("_", " "), f"{test[n]:.4f}", f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else ""))
    percent = f"{test.get('confidence', 0.95):.0%}"
    figures = table(("figure", "value", percent), rows)
    parts.append(f"## How good it is\n\nOn {test['rows']:,} rows that nothing was fitted on.\n\n{figures}")
    slices = [*test.get("slices", []), *test.get("worst", [])]
    if slices:
        shown = [(s["slice"], f"{s['rows']:,}", f"{s.get('accuracy', s.get('rmse', 0)):.4f}") for s in slices]
        figure = "accuracy" if schema.classes else "RMSE"
        parts.append("## Where it differs\n\n" + table(("rows with", "number", figure), shown))
    limits = []
    if "membership" in test:
        told = test["membership"]["advantage"]
        limits.append(f"Membership inference by losses has an advantage of {told:.3f} (0: nothing leaks).")
    if "privacy" in train:
        p = train["privacy"]
        limits.append(f"Trained with differential privacy: epsilon {p['epsilon']:.2f}, delta {p['delta']:.1e} (DP-SGD).")
    if attack := more.get("attack"):
        limits.append(
            f"Under attack ({attack['method']}, {attack['epsilon']:g} of each number's range) its accuracy is "
            f"{attack['robust_accuracy']:.4f}."
        )
    if explained := more.get("explain"):
        first = ", ".join(line["column"] for line in explained["mean_size"][:5])
        limits.append(f"What counts most: {first} (by {explained['method'].replace('_', ' ')}).")
    for test_ in verdict.get("behaviour", []):
        limits.append(f"Test `{test_['name']}`: {test_['passed']:.1%} of {test_['rows']:,} rows pass.")
    if limits:
        parts.append("## What else was measured\n\n" + "\n".join(f"- {line}" for line in limits))
    gates = [(g["gate"], g["limit"], "–" if g["value"] is None else f"{g['value']:.4g}", "yes" if g["passed"] else "**no**")
             for g in verdict["gates"]]  # fmt: skip
    if gates:
        parts.append("## What it had to reach\n\n" + table(("figure", "required", "measured", "reached"), gates))
    parts.append(
        f'## Use\n\n```python\nimport heliograph\n\nheliograph.Client("http://127.0.0.1:8000", "{name}").predict(rows)\n```'
    )
    return "---\n" + yaml.safe_dump(head, sort_keys=False, allow_unicode=True) + "---\n\n" + "\n\n".join(parts) + "\n"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
