"""Prometheus watches an endpoint: its figures, and an alert when it fails and when it is gone."""

from heliograph.cluster import watching
from heliograph.cluster.runtime import free_port
from heliograph.project import Serve
from heliograph.serve.endpoint import Endpoint

from ..tools import ASKS, prometheus, until
from .served import TENSOR, Room

NAN = [[float("nan"), 0], [0, 1]]


def test_alerts_fire_when_a_model_fails_and_when_the_endpoint_is_gone(served, tmp_path):
    room = Room(tmp_path / "room")
    room.add("pets", TENSOR, NAN)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    (tmp_path / "targets.json").write_text("[]")
    watching.write(tmp_path / "watching", tmp_path / "targets.json", [url])
    with prometheus(tmp_path / "watching") as seen:
        with served(Endpoint("pets", room.registry, room.keys, Serve(port=port))):
            until(lambda: seen.targets() == {f"{url}/metrics": "up"}, "a target that is up")
            assert seen.firing() == set()

            def fails() -> bool:
                answer = ASKS.post(f"{url}/v1/models/pets:predict", json={"instances": [[1, 1]]})
                assert answer.status_code == 500
                return "EndpointFails" in seen.firing()

            until(fails, "the alert that it fails")
            assert seen.value('sum(heliograph_requests_total{model="pets",code="500"})') > 10
        until(lambda: "EndpointDown" in seen.firing(), "the alert that it is gone")
