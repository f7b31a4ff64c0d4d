"""Mutual TLS between the processes of a Ray cluster. In a process of its own: Ray reads its settings when it is imported."""

import json
import subprocess
import sys

from heliograph.cluster.keys import KeyStore
from heliograph.cluster.tls import node_certificate

SCRIPT = """
import json, os, sys
os.environ.update(json.loads(sys.argv[1]))
from heliograph.cluster.runtime import LocalCluster
with LocalCluster(1) as cluster:
    cluster.start()
    import grpc, ray
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    said = {"task": ray.get(ray.remote(lambda: "done").remote())}
    address = ray.get_runtime_context().gcs_address

    def status(channel):
        try:
            gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=5)
        except grpc.RpcError as error:
            return error.code().name

    def file(name):
        return open(os.environ[name], "rb").read()

    ca, key, own = (file(f"RAY_TLS_{name}") for name in ("CA_CERT", "SERVER_KEY", "SERVER_CERT"))
    said["in clear"] = status(grpc.insecure_channel(address))
    said["without a certificate"] = status(grpc.secure_channel(address, grpc.ssl_channel_credentials(ca)))
    said["with one, without a token"] = status(grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, own)))
print(json.dumps(said))
"""


def test_only_who_has_a_certificate_of_the_cluster_talks_to_its_nodes(tmp_path):
    environment = node_certificate(KeyStore(tmp_path), "127.0.0.1")
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(environment)], check=False, capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == {
        "task": "done",
        "in clear": "UNAVAILABLE",
        "without a certificate": "UNAVAILABLE",
        "with one, without a token": "UNAUTHENTICATED",
    }
    assert oct((tmp_path / "nodes" / "ca.key").stat().st_mode)[-3:] == "600"
