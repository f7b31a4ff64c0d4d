"""What watches: alerts that Prometheus takes, a dashboard that Grafana's own types take, queries for figures that there are."""

import json
import re
import subprocess

import pytest
import yaml
from heliograph.cluster import watching
from heliograph.errors import ClusterError

from ..tools import tool


@pytest.fixture
def written(tmp_path):
    watching.write(tmp_path, tmp_path / "targets.json", ["http://127.0.0.1:8000", "https://models.example:443"])
    return tmp_path


def test_prometheus_takes_the_configuration_and_the_alerts(written):
    (written / "targets.json").write_text("[]")
    checked = subprocess.run(
        [tool("promtool"), "check", "config", written / "prometheus.yml"], check=False, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
    assert "SUCCESS: 8 rules found" in checked.stdout


def test_grafanas_own_types_take_the_dashboard_and_lose_nothing_of_it(written):
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    given = json.loads((written / "dashboard.json").read_text())
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(given)))

    def kept(before, after, where=""):
        for key, value in before.items() if isinstance(before, dict) else enumerate(before):
            assert key in after if isinstance(before, dict) else key < len(after), f"{where}.{key}"
            if isinstance(value, (dict, list)):
                kept(value, after[key], f"{where}.{key}")
            else:
                assert after[key] == value, f"{where}.{key}"

    kept(given, again)
    assert len({panel["id"] for panel in given["panels"]}) == len(given["panels"]) == len(watching.PANELS)


def test_alerts_and_panels_ask_for_figures_that_heliograph_has(written):
    from heliograph.jobs.watch import OF_ALL
    from heliograph.serve.metrics import HISTOGRAMS

    train = {f"ray_heliograph_train_{n}" for n in (*OF_ALL, "step", "left", "anomalies", "input_wait", "step_seconds")}
    runs = {f"ray_heliograph_run_{n}" for n in ("dollars", "budget_dollars", "nodes")}
    serving = {"heliograph_requests_total", "heliograph_replicas", "heliograph_in_flight"}
    serving |= {f"heliograph_{name}{end}" for name in HISTOGRAMS for end in ("_bucket", "_sum", "_count")}
    rules = yaml.safe_load((written / "rules.yml").read_text())
    queries = [rule["expr"] for group in rules["groups"] for rule in group["rules"]] + [panel[1] for panel in watching.PANELS]
    asked = {name for query in queries for name in re.findall(r"\b(?:ray_)?heliograph_\w+", query)}
    assert asked <= train | runs | serving
    assert len(asked) > 12


def test_a_url_that_is_none_is_refused(tmp_path):
    with pytest.raises(ClusterError, match="localhost:8000: is no URL of an endpoint"):
        watching.write(tmp_path, tmp_path, ["localhost:8000"])
