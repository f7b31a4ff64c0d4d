"""The report: `report.json` for machines, `report.html` for people (one file, no network, light and dark)."""

import html
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..cluster.storage import read_json, write_bytes, write_json
from ..project import FILE, Project
from ..recipes import FIGURES
from . import trust_report
from .baseline import BASELINE
from .drawing import INK, confusion, page, svg, table
from .engine import TABLE
from .explain import EXPLAINED
from .plan import section as plan_section
from .run import ATTACK, code_of, has_baseline
from .stages import Run
from .traffic_report import traffic
from .training_report import training
from .tune_report import SEARCH
from .validate import VERDICT


def write(project: Project, base: Path, run: Run) -> dict[str, Any]:
    """Write both from what the stages left; returns what `report.json` holds. base: the project's folder."""
    trained = read_json(run["train"] / "result.json")
    report = {
        "name": project.name,
        "stages": run.stages,
        "seconds": round(sum(s["seconds"] for s in run.stages if not s["reused"]), 2),
        "test": read_json(run["evaluate"] / "metrics.json"),
        "validation": read_json(run["validate"] / VERDICT),
        "baseline": read_json(run["baseline"] / BASELINE) if has_baseline(project) else None,
        "attack": read_json(run["attack"] / ATTACK) if project.evaluate.attack else None,
        "train": {**trained, "ranks_identical": len(set(trained["weights_sha256"])) <= 1},
        "explain": read_json(run["explain"] / EXPLAINED) if project.explain else None,
        "compress": read_json(run["compress"] / TABLE) if project.compress else None,
        "request": read_json(asked) if (asked := run["predict"] / "request.json").exists() else None,
        "files": {name: str(run[name].resolve()) for name in ("prepare", "train", "bundle")},
    }
    write_json(run.folder / "report.json", report)
    profile = read_json(run["prepare"] / "profile.json")
    # A search is told of in the report of what it searched, and in that of the project which it made.
    search = next((f.read_text() for f in (run.folder / "tune" / SEARCH, base / SEARCH) if f.exists()), "")
    more = {
        "training": training(run["train"]),
        "search": search,
        "after": plan_section(project, run) + f"<section id=traffic>{traffic(run.folder)}</section>" + _again(project, base, run),
    }
    write_bytes(run.folder / "report.html", _page(report, profile, more).encode())
    return report


def summary(report: dict[str, Any]) -> list[str]:
    """What a person wants to know at once."""
    test, request = report["test"], report["request"]
    figures = [f"{name.replace('_', ' ')} {value}" for name, value in _figures(test)]
    said = [f"test ({test['rows']:,} rows): {', '.join(figures)}"]
    if attack := report["attack"]:
        said.append(
            f"attacked ({attack['method']}, {attack['epsilon']:g} of the range, {attack['rows']:,} rows): "
            f"accuracy {attack['robust_accuracy']:.4f}"
        )
    if report["baseline"]:
        told = "; ".join(f"{m['verdict']} than {m['name']}" if "model" in m["verdict"] else f"{m['verdict']} from {m['name']}"
                         for m in report["baseline"]["models"])  # fmt: skip
        said.append(f"beside scikit-learn: {told}")
    if "privacy" in report["train"]:
        spent = report["train"]["privacy"]
        said.append(f"private: epsilon {spent['epsilon']:.2f} at delta {spent['delta']:.1e}")
    gates = report["validation"]["gates"]
    if gates:
        said.append(f"required: {sum(gate['passed'] for gate in gates)} of {len(gates)} reached")
    if request:
        sure = f" (probability {request['probability']:.3f})" if "probability" in request else ""
        said.append(
            f"sealed request: predicted {request['prediction']}{sure}, truth {request['truth']}; "
            f"differs from the local model by {request['gap_to_local_model']:.1e}"
        )
        if not any(stage["reused"] for stage in report["stages"]):
            said.append(f"from raw data to this first private prediction: {report['seconds']:.0f} s")
    if report["compress"]:
        said.append(_chosen(report["compress"]))
    return said


def _figures(test: dict[str, Any]) -> list[tuple[str, str]]:
    """With their intervals."""
    out = []
    for name in FIGURES:
        if test.get(name) is not None:
            ends = test.get("intervals", {}).get(name)
            out.append((name, f"{test[name]:.4f}" + (f" ({ends[0]:.4f} to {ends[1]:.4f})" if ends else "")))
    return out


def _metric(note: dict[str, Any]) -> str:
    """What forms are compared by."""
    return "accuracy" if "accuracy" in note["candidates"][0]["test"] else "r2"


def forms(note: dict[str, Any], short: bool = False) -> tuple[tuple[str, ...], list[list[str]]]:
    """(head, rows) of the forms that a model was compressed to. short: for a terminal."""
    metric = _metric(note)
    head = (
        "form",
        "KiB",
        "size",
        "gzip",
        f"{metric} ({note['judged_by']})",
        "test",
        "1 row p50 / p99 ms",
        "32 rows",
        "",
        "verdict",
    )
    rows = []
    for row in note["candidates"]:
        times, figures = row["latency_ms"], row["figures"]
        verdict = "chosen" if row["name"] == note["chosen"] else "meets it" if row["meets"] else "; ".join(row["missed"])
        rows.append([
            row["name"], f"{row['bytes'] / 1024:.0f}", f"{figures['size']:.2f}×", f"{figures['gzip']:.2f}×",
            f"{figures[metric]:.4f}", f"{row['test'][metric]:.4f}", f"{times['p50_1']:.3f} / {times['p99_1']:.3f}",
            f"{times['p50_32']:.3f} / {times['p99_32']:.3f}", row["engine"], verdict,
        ])  # fmt: skip
    if short:
        head = ("form", "KiB", "size", metric, "test", "ms a row", "verdict")
        rows = [[*row[:3], *row[4:6], row[6].split()[0], row[-1]] for row in rows]
    return head, rows


def _chosen(note: dict[str, Any]) -> str:
    if note["chosen"] is None:
        return "compressed: no form meets compress.require, so the bundle has the original alone"
    row = next(row for row in note["candidates"] if row["name"] == note["chosen"])
    figures, metric = row["figures"], _metric(note)
    return (
        f"compressed: `{row['name']}` has {figures['size']:.2f} of the size and {figures['latency']:.2f} of the time, "
        f"test {metric} {row['test'][metric]:.4f}"
    )


def _compression(note: dict[str, Any]) -> str:
    head, rows = forms(note)
    metric = _metric(note)
    values = [
        {"form": row["name"], "KiB": row["bytes"] / 1024, metric: row["test"][metric], "milliseconds": row["latency_ms"]["p50_1"]}
        for row in note["candidates"]
    ]
    place = {
        "x": {"field": "KiB", "type": "quantitative", "scale": {"type": "log"}},
        "y": {"field": metric, "type": "quantitative", "scale": {"zero": False}, "title": f"test {metric}"},
    }
    size = {"field": "milliseconds", "type": "quantitative", "title": "ms a row"}
    points = {"mark": {"type": "circle", "color": "#4c86c6", "opacity": 0.7}, "encoding": {**place, "size": size}}
    names = {"mark": {"type": "text", "dy": -12, "color": INK}, "encoding": {**place, "text": {"field": "form"}}}
    drawn = svg({"layer": [points, names], "data": {"values": values}, "width": 560, "height": 260})
    required = ", ".join(f"{name} {limit}" for name, limit in note["require"].items())
    return (
        f"<h2>Compression</h2><p>{html.escape(_chosen(note))}. Required: {html.escape(required)}.</p>{drawn}{table(head, rows)}"
    )


def _page(report: dict[str, Any], profile: dict[str, Any], more: dict[str, str]) -> str:
    """more: parts of the page that are drawn already."""
    test, request, train = report["test"], report["request"], report["train"]
    main = ("accuracy", f"{test['accuracy']:.2%}") if "accuracy" in test else ("RMSE", f"{test['rmse']:.4g}")
    sentence = f"Test {main[0]} {main[1]} on {test['rows']:,} rows"
    if request:
        predicted, truth = (html.escape(str(request[k])) for k in ("prediction", "truth"))
        sentence += f"; one sealed request was answered {predicted}, the truth is {truth}"
    figures = _figures(test)
    figures += [(f"{k} (macro)", f"{v:.4f}") for k, v in test.get("macro", {}).items()]
    facts = [
        ("parameters", f"{train['parameters']:,}"),
        ("workers", f"{train['workers']}, weights {'identical' if train['ranks_identical'] else 'DIFFERENT'}"),
        *(
            (f"{name} against Keras", f"differs by {train[key]:.1e} at most, on real rows")
            for name, key in (("ONNX", "onnx_gap"), ("LiteRT", "litert_gap"))
            if key in train
        ),
    ]
    if request:
        facts.append(("endpoint against local model", f"differs by {request['gap_to_local_model']:.1e}"))
    parts = [f"<h1>{html.escape(report['name'])}</h1><p class=lead>{sentence}.</p>"]
    parts.append(_data(profile))
    if fusion := train.get("fusion"):
        parts.append(_fusion(fusion, main[0]))
    parts.append(f"<h2>Training</h2>{more['training']}{table(('what', 'value'), facts)}{more['search']}")
    parts.append(f"<h2>Test</h2>{table(('metric', 'value'), figures)}")
    if report["baseline"]:
        parts.append(_beside(report["baseline"], test))
    for name, found in test.get("tasks", {"": test}).items():
        parts.append(_of_target(name, found))
    parts.append(trust_report.gates(report["validation"], report["attack"]))
    if report["explain"]:
        parts.append(trust_report.explanation(report["explain"]))
    if report["compress"]:
        parts.append(_compression(report["compress"]))
    parts.append(more["after"])
    return page(report["name"], "".join(parts))


def _again(project: Project, base: Path, run: Run) -> str:
    """What is where, and what the same run needs."""
    files = {
        "bundle": "the signed model, with its card: bundle/README.md",
        "report.json": "these figures, for programs",
        "run.log": "what happened, with the traceback of every error",
        "train/tensorboard": "tensorboard --logdir",
        "prepare": "rows in shards, the fitted preprocessing, profile.json",
        "evaluate": "every figure, interval and slice",
        "explain": "explanations, as files",
        "tune": "trials.jsonl and the best project",
    }
    there = [(name, said) for name, said in files.items() if (run.folder / name).exists()]
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "tensorflow", "keras"))
    facts = [
        ("command", f"heliograph run {base}"),
        ("with", f"heliograph {__version__}, {versions}, Python {platform.python_version()}"),
        ("data", f"{project.data.source}, fingerprint {run.fingerprints['prepare'][:16]}"),
        ("code", f"SHA-256 {code_of(base)[:16]}"),
        ("training", f"fingerprint {run.fingerprints['train'][:16]}, seed {project.train.seed}"),
    ]
    text = yaml.safe_dump(project.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    return (
        f"<h2>Files and how to do it again</h2><p>In <code>{html.escape(str(run.folder))}</code>:</p>"
        f"{table(('file', ''), there)}{table(('what', 'value'), facts)}"
        f"<details><summary>{FILE}</summary><pre tabindex=0>{html.escape(text)}</pre></details>"
    )


def _beside(said: dict[str, Any], test: dict[str, Any]) -> str:
    """The model and scikit-learn's, on the same rows."""
    shown = [n for n in ("accuracy", "balanced_accuracy", "roc_auc", "log_loss", "r2", "rmse", "mae") if n in test][:4]
    shown = [n for n in shown if all(n in m["figures"] for m in said["models"])]
    main = shown[0]
    rows = [("this model", *(f"{test[n]:.4f}" for n in shown), "", "")]
    for m in said["models"]:
        gap, low, high = m["gap"][main]
        rows.append(
            (m["name"], *(f"{m['figures'][n]:.4f}" for n in shown), f"{gap:+.4f} ({low:+.4f} to {high:+.4f})", m["verdict"])
        )
    head = ("", *(n.replace("_", " ") for n in shown), f"this model's {main.replace('_', ' ')} less its", "")
    return f"<h3>Beside scikit-learn, which learnt {said['learnt_from']:,} of the same rows</h3>{table(head, rows)}"


def _fusion(said: dict[str, Any], metric: str) -> str:
    """What was fused, what each member is worth on the validation rows, and how much of it there is."""
    members, figures = said["members"], said["validation"] or [None] * len(said["members"])
    part = said.get("weights") or [1.0 if m in said.get("taken", members) else 0.0 for m in members]
    rows = [(m, "–" if v is None else f"{abs(v):.4f}", f"{w:g}") for m, v, w in zip(members, figures, part, strict=True)]
    rows += [("all together", f"{abs(said['fused']):.4f}", "")] if "fused" in said else []
    rows += [("out of fold", f"{abs(said['out_of_fold']):.4f}", "")] if "out_of_fold" in said else []
    kind = metric if metric == "accuracy" else "mean squared error"
    return f"<h2>Fusion by {html.escape(said['by'])}</h2>{table(('member', f'{kind}, validation', 'part'), rows)}"


def _of_target(name: str, test: dict[str, Any]) -> str:
    """name: of one of several targets."""
    parts = []
    if name:
        figures = [("rows", f"{test['rows']:,}"), *_figures(test)]
        parts.append(f"<h3>{html.escape(name)}</h3>{table(('metric', 'value'), figures)}")
    if "confusion" in test:
        classes = [c["class"] for c in test["classes"]]
        parts.append(confusion(classes, {"Confusion: rows of each truth": test["confusion"]}))
        rows = [
            [
                c["class"],
                *(f"{c[k]:.3f}" if c[k] is not None else "–" for k in ("precision", "recall", "f1", "roc_auc")),
                c["rows"],
            ]
            for c in test["classes"]
        ]
        parts.append(table(("class", "precision", "recall", "F1", "ROC-AUC", "rows"), rows))
    return "".join(parts) + trust_report.evaluation(test)


MOST_COLUMNS = 24
"""That are shown; all are in `prepare/profile.json`."""


def _data(profile: dict[str, Any]) -> str:
    """What the rows are like: their splits, what is odd about them, and each column."""
    rows = profile["rows"]
    said = ", ".join(f"{rows[s]:,} {s}" for s in ("train", "validation", "test") if rows[s])
    bad = f"{profile['bad_rows']:,} unusable rows are in <code>prepare/quarantine.jsonl</code>." if profile["bad_rows"] else ""
    warnings = "".join(f"<li>{html.escape(w)}</li>" for w in profile["warnings"])
    described = [
        (
            c["name"],
            c["kind"],
            f"{c['missing']:.1%}" if c["missing"] else "–",
            _range(c),
            f"{c['mean']:.4g} ± {c['deviation']:.3g}" if c["mean"] is not None else "–",
            f"{c['drift']:.3f}" if c["drift"] is not None else "–",
        )
        for c in profile["columns"][:MOST_COLUMNS]
    ]
    shown = table(("column", "kind", "empty", "range or most frequent", "mean ± deviation", "drift to test"), described)
    more = len(profile["columns"]) - MOST_COLUMNS
    left = f"<p>… and {more} more columns in <code>prepare/profile.json</code>.</p>" if more > 0 else ""
    return f"<h2>Data</h2><p>{said} rows. {bad}</p>{f'<ul>{warnings}</ul>' if warnings else ''}{_bars(profile)}{shown}{left}"


def _range(column: dict[str, Any]) -> str:
    if column["low"] is not None:
        return f"{column['low']:.4g} to {column['high']:.4g}"
    return ", ".join(value for value, _ in column["top"][:3]) or "–"


def _bars(profile: dict[str, Any]) -> str:
    """The classes, and the distribution of each column, of the training rows."""
    values = [{"column": "classes", "value": name, "rows": count} for name, count in profile["classes"].items()]
    for column in profile["columns"][:11]:
        if column["histogram"]:
            edges = column["edges"]
            values += [
                {"column": column["name"], "value": f"{edges[i]:.3g}", "rows": count, "place": i}
                for i, count in enumerate(column["histogram"])
            ]
        values += [{"column": column["name"], "value": name, "rows": count} for name, count in column["top"]]
    if not values:
        return ""
    bars = {
        "mark": {"type": "bar", "color": "#4c86c6"},
        "encoding": {
            "x": {"field": "value", "type": "nominal", "sort": None, "title": None, "axis": {"labelOverlap": True}},
            "y": {"field": "rows", "type": "quantitative", "title": None, "axis": {"tickCount": 3}},
        },
        "width": 180,
        "height": 70,
    }
    facet = {"field": "column", "type": "nominal", "title": None, "sort": None}
    shared = {"scale": {"x": "independent", "y": "independent"}}
    return svg({"facet": facet, "columns": 3, "spec": bars, "resolve": shared, "data": {"values": values}})
