"""The nodes of a local cluster, as Ray's autoscaler sees them: processes of this machine.

Ray's own provider for such nodes forgets them with its head. This one finds those that an earlier head of the cluster started,
as a cloud's would, so that a head which comes back keeps its nodes.
"""

import contextlib
import os
import secrets
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

NODE, KIND = "RAY_CLOUD_INSTANCE_ID", "RAY_NODE_TYPE_NAME"


class Processes(FakeMultiNodeProvider):
    def __init__(self, provider_config: dict[str, Any], cluster_name: str):
        os.environ["RAY_FAKE_CLUSTER"] = "1"  # not for the head itself: it would take the same id each time
        super().__init__(provider_config, cluster_name)
        for raylet in _raylets():
            with contextlib.suppress(psutil.Error):
                variables = raylet.environ()
                if variables.get(NODE, self._head_node_id) != self._head_node_id and KIND in variables:
                    known: dict[str, Any] = {"tags": _tags(variables[NODE], variables[KIND]), "node": _Found(raylet)}
                    self._nodes[variables[NODE]] = known

    def _next_hex_node_id(self) -> str:
        return secrets.token_hex(28)  # of another head's nodes none has it


class _Found:
    """A node that another process started."""

    def __init__(self, raylet: psutil.Process):
        self._raylet = raylet

    def kill_all_processes(self, **_: Any) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._raylet.terminate()  # it takes its workers and agents along


def _raylets() -> list[psutil.Process]:
    """Of this cluster: all its processes were given its temporary folder."""
    out = []
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error):
            if process.info["name"] == "raylet" and process.environ().get("TMPDIR") == os.environ["TMPDIR"]:
                out.append(process)
    return out


def _tags(node: str, kind: str) -> dict[str, str]:
    return {
        TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
        TAG_RAY_USER_NODE_TYPE: kind,
        TAG_RAY_NODE_NAME: node,
        TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
    }
