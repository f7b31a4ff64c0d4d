"""What watches a cluster: a configuration for Prometheus, alerts, and a dashboard for Grafana.

The targets of a cluster are those of the file that Ray keeps for it; endpoints are named. All figures of training come through
Ray's exporter (`ray_heliograph_…`), those of serving from each endpoint's own `/metrics` (`heliograph_…`).
"""

import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from ...errors import ClusterError
from ..storage import write_bytes

HERE = Path(__file__).parent
PANELS = (
    ("Loss", "max by (model) (ray_heliograph_train_loss)", "{{model}}", "none"),
    ("Rows a second", "max by (model) (ray_heliograph_train_rows_per_second)", "{{model}}", "rowsps"),
    ("Gradient norm", "max by (model) (ray_heliograph_train_grad_norm)", "{{model}}", "none"),
    ("A step, by rank", "max by (model, rank) (ray_heliograph_train_step_seconds)", "{{model}} {{rank}}", "s"),
    ("Waiting for rows", "max by (model, rank) (ray_heliograph_train_input_wait)", "{{model}} {{rank}}", "percentunit"),
    ("Anomalies", "max by (model) (ray_heliograph_train_anomalies)", "{{model}}", "none"),
    ("Dollars of a run", "max by (run) (ray_heliograph_run_dollars)", "{{run}}", "currencyUSD"),
    ("Nodes", "sum by (kind) (max by (kind, run) (ray_heliograph_run_nodes))", "{{kind}}", "none"),
    ("GPUs in use", "sum(ray_node_gpus_utilization) / 100", "GPUs", "none"),
    (
        "Requests a second",
        "sum by (model, version, code) (rate(heliograph_requests_total[1m]))",
        "{{model}}@{{version}} {{code}}",
        "reqps",
    ),
    (
        "99 % of requests take less than",
        "histogram_quantile(0.99, sum by (model, le) (rate(heliograph_request_seconds_bucket[1m])))",
        "{{model}}",
        "s",
    ),
    (
        "A request's stages",
        "sum by (stage) (rate(heliograph_stage_seconds_sum[1m])) / sum by (stage) (rate(heliograph_stage_seconds_count[1m]))",
        "{{stage}}",
        "s",
    ),
    ("Replicas", "heliograph_replicas", "{{instance}}", "none"),
    ("Requests in flight", "heliograph_in_flight", "{{instance}}", "none"),
)
"""Title, query, legend, unit."""


def write(folder: Path, discovery: Path, endpoints: list[str]) -> list[str]:
    """Write prometheus.yml, rules.yml and dashboard.json into a folder; returns what to do with them.

    discovery: the file in which Ray keeps its targets. endpoints: URLs. Raises ClusterError for a URL that is none."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs: list[dict[str, Any]] = [{"job_name": "ray", "file_sd_configs": [{"files": [str(discovery)]}]}]
    for url in endpoints:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ClusterError(f"{url}: is no URL of an endpoint: write it with http:// or https://")
    for scheme in ("http", "https"):
        targets = [urlsplit(url).netloc for url in endpoints if urlsplit(url).scheme == scheme]
        if targets:
            found = {"targets": targets, "labels": {"job": "heliograph-endpoint"}}
            jobs.append({"job_name": f"endpoints by {scheme}", "scheme": scheme, "static_configs": [found]})
    every = {"scrape_interval": "5s", "evaluation_interval": "5s"}
    config = {"global": every, "rule_files": ["rules.yml"], "scrape_configs": jobs}
    write_bytes(folder / "prometheus.yml", yaml.safe_dump(config, sort_keys=False).encode())
    shutil.copyfile(HERE / "rules.yml", folder / "rules.yml")
    write_bytes(folder / "dashboard.json", json.dumps(dashboard(), indent=1).encode())
    return [
        f"prometheus --config.file={folder / 'prometheus.yml'} --web.listen-address=127.0.0.1:9090",
        f"Grafana: Dashboards, New, Import: {folder / 'dashboard.json'}",
    ]


def dashboard() -> dict[str, Any]:
    """For Grafana 10 and later; it asks for the Prometheus to read from."""
    source = {"type": "prometheus", "uid": "${source}"}
    panels = [
        {
            "id": i + 1,
            "type": "timeseries",
            "title": title,
            "datasource": source,
            "gridPos": {"x": 12 * (i % 2), "y": 8 * (i // 2), "w": 12, "h": 8},
            "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
            "options": {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}},
            "targets": [{"refId": "A", "expr": query, "legendFormat": legend, "datasource": source}],
        }
        for i, (title, query, legend, unit) in enumerate(PANELS)
    ]
    chosen = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    return {
        "uid": "heliograph",
        "title": "heliograph",
        "tags": ["heliograph"],
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [chosen]},
        "panels": panels,
    }
