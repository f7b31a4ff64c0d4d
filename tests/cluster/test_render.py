"""A cluster file in its provider's words: checked by Ray's launcher, its AWS provider against moto, and KubeRay's schemas."""

import copy
import json
import os
import subprocess
import sys

import boto3
import pytest
import yaml
from heliograph.cluster import cloud, render, spec
from heliograph.cluster.runtime import free_port
from heliograph.errors import ClusterError

from ..conftest import aws_at
from ..tools import listens, until
from .test_spec import AWS, LOCAL, loaded

KUBE = """\
name: kube
provider: kuberay
head: {cpus: 2, memory_gib: 8}
nodes:
  l4: {cpus: 8, memory_gib: 32, gpus: 1, accelerator: L4, max: 4, spot: true, node_selector: {pool: l4}, labels: {team: a}}
  cpu: {cpus: 4, max: 2}
storage: heliograph-storage
redis: redis:6379
secrets: {redis_password: redis-password}
network: {from_namespaces: [team-a]}
idle_minutes: 2
"""


@pytest.fixture
def aws(monkeypatch, tmp_path):
    """A server that is AWS as far as Ray sees; keys and home of this test alone. In a process of its own, since moto knows AWS's
    policies only where it is told to before its first request."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    variables = os.environ | {"MOTO_IAM_LOAD_MANAGED_POLICIES": "true"}
    server = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    monkeypatch.setenv("HOME", str(tmp_path))
    aws_at(f"http://127.0.0.1:{port}", monkeypatch)
    try:
        until(lambda: listens(port), "moto's server")
        yield
    finally:
        server.kill()
        server.wait()


def test_rays_own_aws_code_starts_tags_and_ends_what_the_file_says(aws, tmp_path, monkeypatch):
    from ray.autoscaler._private.aws import config as bootstrap
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler._private.util import prepare_config

    monkeypatch.setattr(bootstrap.time, "sleep", lambda seconds: None)  # for IAM, which needs time
    described, capacity = loaded(tmp_path, AWS + "  cpu: {instance: c6i.2xlarge, max: 2}\n")
    made = yaml.safe_load(render.text(render.launcher(described, capacity, tmp_path / "token")))
    config = bootstrap.bootstrap_aws(prepare_config(copy.deepcopy(made)))
    types = config["available_node_types"]
    assert types["l4"]["resources"] == {"CPU": 8, "GPU": 1, "accelerator_type:L4": 1}
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    for kind in ("head", "l4", "cpu"):
        node = types[kind]["node_config"]
        tags = {"ray-node-name": kind, "ray-user-node-type": kind, "ray-node-kind": "head" if kind == "head" else "worker"}
        provider.create_node(node, tags, 1)
    client = boto3.client("ec2")
    found = {}
    for reservation in client.describe_instances()["Reservations"]:
        for instance in reservation["Instances"]:
            tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
            assert tags["ray-cluster-name"] == "gpus"
            found[tags["ray-user-node-type"]] = (instance["InstanceType"], instance.get("InstanceLifecycle", "on demand"))
    assert found == {"head": ("m6i.large", "on demand"), "l4": ("g6.2xlarge", "spot"), "cpu": ("c6i.2xlarge", "on demand")}
    assert len(cloud.still_running(described)) == 3
    provider.terminate_nodes(provider.non_terminated_nodes({}))
    assert cloud.still_running(described) == []


def test_wrong_credentials_are_one_line(aws, tmp_path, monkeypatch):
    described, _ = loaded(tmp_path, AWS)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ClusterError, match="AWS does not say what runs in us-east-1: Unable to locate credentials"):
        cloud.still_running(described)


@pytest.mark.parametrize(
    "text",
    [
        AWS + "image: ami-1234\nnetwork: {subnets: [subnet-1], security_groups: [sg-1]}\nsecrets: {ssh_key: ~/.ssh/key.pem}\n",
        AWS.replace("aws", "gcp")
        .replace("us-east-1", "us-central1\nproject: mine\nzones: [us-central1-a]")
        .replace("m6i.large", "n2-standard-2")
        .replace("g6.2xlarge", "g2-standard-8"),
        AWS.replace("aws", "azure")
        .replace("us-east-1", "eastus\nproject: group")
        .replace("m6i.large", "Standard_D2s_v5")
        .replace("g6.2xlarge", "Standard_NC4as_T4_v3"),
    ],
    ids=["aws", "gcp", "azure"],
)
def test_a_cloud_is_told_what_the_file_says(tmp_path, text):
    described, capacity = loaded(tmp_path, text)
    made = yaml.safe_load(render.text(render.launcher(described, capacity, tmp_path / "token")))
    assert made["max_workers"] == 4
    assert made["available_node_types"]["l4"]["resources"]["GPU"] == 1
    assert any("ray[data,train,tune,serve]==" in command for command in made["setup_commands"])
    assert "spot" in json.dumps(made["available_node_types"]["l4"]["node_config"]).lower()
    assert "spot" not in json.dumps(made["available_node_types"]["head"]).lower()
    assert all("RAY_AUTH_MODE=token" in made[f"{who}_start_ray_commands"][1] for who in ("head", "worker"))


def test_kuberays_three_kinds_are_as_its_schemas_want_them(tmp_path):
    from heliograph import project
    from heliograph.jobs import kube

    from ..conftest import ROOT

    described, capacity = loaded(tmp_path, KUBE)
    digits = project.load(ROOT / "examples" / "digits")
    for made, kind in (
        (render.manifest(described, capacity), "RayCluster"),
        (kube.job(digits, described, capacity), "RayJob"),
        (kube.service(digits, described, capacity), "RayService"),
    ):
        again = yaml.safe_load(render.text(made))
        assert render.checked(again)["kind"] == kind
    cluster = render.manifest(described, capacity)["spec"]
    l4, cpu = cluster["workerGroupSpecs"]
    assert (l4["minReplicas"], l4["maxReplicas"], cpu["maxReplicas"]) == (0, 4, 2)
    assert json.loads(json.loads(l4["rayStartParams"]["resources"])) == {"accelerator_type:L4": 1}
    assert l4["labels"] == {"team": "a", spec.KIND: "l4"}
    container = l4["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "1"}
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379"
    assert cluster["networkPolicy"]["mode"] == "DenyAllIngress"
    job = kube.job(digits, described, capacity)["spec"]
    assert job["entrypoint"].startswith(f"python -m heliograph run {spec.VOLUME}/projects/digits ")
    assert spec.Capacity.loads(yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["HELIOGRAPH_JOINED"]) == capacity


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (("spec", "autoscalerOptions"), "idleTimeoutSecond", 3),
        (("spec", "autoscalerOptions"), "upscalingMode", "Fast"),
        (("spec", "workerGroupSpecs", 0), "maxReplica", 3),
        (("spec", "workerGroupSpecs", 0), "maxReplicas", "many"),
        (("spec", "workerGroupSpecs", 0, "template", "spec"), "tolerationss", []),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0), "imag", "x"),
        (("spec", "authOptions"), "mode", "open"),
        (("spec",), "headGroup", {}),
    ],
)
def test_a_manifest_with_a_field_or_a_value_that_kuberay_does_not_know_is_refused(tmp_path, path, name, value):
    made = copy.deepcopy(render.manifest(*loaded(tmp_path, KUBE)))
    inside = made
    for part in path:
        inside = inside[part]
    inside[name] = value
    with pytest.raises(ClusterError, match=name if value not in ("Fast", "many", "open") else f"'{value}' is not"):
        render.checked(made)


def test_the_command_prints_what_the_provider_reads_and_refuses_what_it_cannot(command, tmp_path):
    for name, text in (("kube", KUBE), ("aws", AWS), ("here", LOCAL)):
        (tmp_path / f"{name}.yaml").write_text(text)
    code, output = command("cluster", "render", tmp_path / "kube.yaml").finish()
    assert code == 0 and yaml.safe_load(output)["kind"] == "RayCluster"
    code, output = command("cluster", "render", tmp_path / "aws.yaml", "--dockerfile").finish()
    assert code == 0 and "'tensorflow[and-cuda]==" in output and "heliograph==" not in output
    for arguments, said in (
        (("aws.yaml", "--for", "gcp"), "its provider is aws"),
        (("here.yaml",), "a local cluster is in nobody else's words"),
    ):
        code, output = command("cluster", "render", tmp_path / arguments[0], *arguments[1:]).finish()
        assert code == 2 and said in output and "Traceback" not in output, output
