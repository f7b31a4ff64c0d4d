"""A cluster file in the words of its provider: Ray's own launcher (`ray up`) for clouds, KubeRay for Kubernetes.

What comes out is checked before anybody sees it: a launcher's file by Ray's own validation, a manifest against KubeRay's schemas
(`kuberay.json`, made from its CRDs of 2026-11: types and names without texts, of pods what a manifest of ours may hold). They
are strict here: a field that is not known is refused, where Kubernetes would drop it without a word.
"""

import functools
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import yaml

from ..errors import ClusterError
from .spec import SECONDS_TO_SAVE, VOLUME, Capacity, Cluster, Group, Worker, fault_tolerance

SCHEMAS = Path(__file__).parent / "kuberay.json"
HOME = "~/heliograph"
"""The virtual environment on a cloud's nodes."""


def launcher(spec: Cluster, capacity: Capacity, token: Path) -> dict[str, Any]:
    """The file for `ray up`. token: a file that all nodes are given, so that nobody else may ask Ray.

    Raises ClusterError when Ray would refuse it."""
    types = {
        "head": {"resources": {"CPU": 0}, "min_workers": 0, "max_workers": 0, "node_config": _instance(spec, spec.head.instance)}
    }
    for group in capacity.groups:
        node = spec.nodes[group.name]
        types[group.name] = {
            "resources": {name: int(amount) for name, amount in group.resources.items()},
            "labels": group.labels,
            "min_workers": node.min,
            "max_workers": node.max,
            "node_config": _instance(spec, node.instance, node),
        }
    auth: dict[str, Any] = {"ssh_user": "ubuntu"}
    if spec.secrets.ssh_key:
        auth["ssh_private_key"] = spec.secrets.ssh_key
    variables = {"RAY_AUTH_MODE": "token", "RAY_JOB_STOP_WAIT_TIME_S": str(SECONDS_TO_SAVE), **fault_tolerance(spec, spec.name)}
    exports = " ".join(f"{name}={value}" for name, value in variables.items())
    ray = f"source {HOME}/bin/activate && ulimit -n 65536 && export {exports} && ray start"
    config = {
        "cluster_name": spec.name,
        "max_workers": spec.most_nodes,
        "idle_timeout_minutes": spec.idle_minutes,
        "provider": _provider(spec),
        "auth": auth,
        "head_node_type": "head",
        "available_node_types": types,
        "file_mounts": {"~/.ray/auth_token": str(token)},
        "setup_commands": [
            "which uv || curl -LsSf https://astral.sh/uv/install.sh | sh",
            f"~/.local/bin/uv venv --seed --allow-existing --python {_python()} {HOME}",
            f"~/.local/bin/uv pip install --python {HOME} {' '.join(_quoted(pins(gpus=capacity.gpus > 0)))}",
        ],
        "head_start_ray_commands": [
            f"source {HOME}/bin/activate && ray stop",
            f"{ray} --head --port=6379 --num-cpus=0 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [f"source {HOME}/bin/activate && ray stop", f"{ray} --address=$RAY_HEAD_IP:6379"],
    }
    _validate(config)
    return config


def _provider(spec: Cluster) -> dict[str, Any]:
    zones = {"availability_zone": ",".join(spec.zones)} if spec.zones else {}
    match spec.provider:
        case "aws":
            return {"type": "aws", "region": spec.region, "cache_stopped_nodes": False, **zones}
        case "gcp":
            return {"type": "gcp", "region": spec.region, "project_id": spec.project, **(zones or _zone(spec))}
        case _:
            return {"type": "azure", "location": spec.region, "resource_group": spec.project, **zones}


def _zone(spec: Cluster) -> dict[str, str]:
    return {"availability_zone": f"{spec.region}-a"}


def _instance(spec: Cluster, name: str | None, node: Worker | None = None) -> dict[str, Any]:
    """What the provider is asked for."""
    spot = bool(node and node.spot)
    match spec.provider:
        case "aws":
            out: dict[str, Any] = {"InstanceType": name}
            if spec.image:
                out["ImageId"] = spec.image
            if spec.network.subnets:
                out["SubnetIds"] = spec.network.subnets
            if spec.network.security_groups:
                out["SecurityGroupIds"] = spec.network.security_groups
            if spot:
                out["InstanceMarketOptions"] = {"MarketType": "spot"}
            return out
        case "gcp":
            image = spec.image or "projects/ubuntu-os-cloud/global/images/family/ubuntu-2204-lts"
            disk = {"diskSizeGb": 100, "sourceImage": image}
            out = {"machineType": name, "disks": [{"boot": True, "autoDelete": True, "initializeParams": disk}]}
            if spec.network.subnets:
                out["networkInterfaces"] = [{"subnetwork": subnet} for subnet in spec.network.subnets]
            scheduling = [{"provisioningModel": "SPOT"}] if spot else []
            if node and (node.gpus or (name and name.startswith(("a2-", "a3-", "g2-")))):
                scheduling.append({"onHostMaintenance": "TERMINATE"})
            return {**out, "scheduling": scheduling} if scheduling else out
        case _:
            publisher, offer, sku = (spec.image or "Canonical:0001-com-ubuntu-server-jammy:22_04-lts-gen2").split(":")[:3]
            parameters = {"vmSize": name, "imagePublisher": publisher, "imageOffer": offer, "imageSku": sku}
            parameters |= {"imageVersion": "latest"} | ({"priority": "Spot"} if spot else {})
            return {"azure_arm_parameters": parameters}


def _validate(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(json.loads(json.dumps(config))))
    except Exception as error:
        raise ClusterError(f"Ray refuses this cluster: {str(error).splitlines()[0][:300]}") from None


def manifest(spec: Cluster, capacity: Capacity) -> dict[str, Any]:
    """A `RayCluster`. Raises ClusterError when KubeRay's schema would not have it."""
    return checked(_kind(spec, "RayCluster", spec.name, _ray_cluster(spec, capacity)))


def job_manifest(spec: Cluster, capacity: Capacity, name: str, entrypoint: str, variables: dict[str, str]) -> dict[str, Any]:
    """A `RayJob`: a cluster for one run, which ends with it. variables: of its environment."""
    return checked(
        _kind(
            spec,
            "RayJob",
            name,
            {
                "entrypoint": entrypoint,
                "runtimeEnvYAML": text({"env_vars": variables}),
                "submissionMode": "K8sJobMode",
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": 600,
                "backoffLimit": 2,  # a run goes on from its folder
                "rayClusterSpec": _ray_cluster(spec, capacity),
            },
        )
    )


def service_manifest(spec: Cluster, capacity: Capacity, name: str, application: dict[str, Any]) -> dict[str, Any]:
    """A `RayService`: an endpoint whose cluster Kubernetes keeps. application: as Ray Serve's configuration has it."""
    serve = {"http_options": {"host": "0.0.0.0", "port": 8000}, "applications": [application]}  # noqa: S104  of a pod; the policy guards it
    return checked(
        _kind(
            spec,
            "RayService",
            name,
            {
                "serveConfigV2": text(serve),
                "rayClusterConfig": _ray_cluster(spec, capacity),
                "upgradeStrategy": {"type": "NewCluster"},
            },
        )
    )


def checked(manifest: dict[str, Any]) -> dict[str, Any]:
    """The same manifest. Raises ClusterError with where it is wrong."""
    import jsonschema

    schemas = _schemas()
    kind = manifest.get("kind")
    if kind not in schemas["kinds"]:
        raise ClusterError(f"kind: found {kind!r}: KubeRay has {', '.join(schemas['kinds'])}")
    validator = jsonschema.Draft202012Validator({**schemas["kinds"][kind], "$defs": schemas["$defs"]})
    errors = sorted(validator.iter_errors(manifest), key=lambda e: list(map(str, e.absolute_path)))
    if errors:
        where = ".".join(map(str, errors[0].absolute_path)) or kind
        raise ClusterError(f"{where}: {errors[0].message[:300]}")
    return manifest


@functools.cache
def _schemas() -> dict[str, Any]:
    return json.loads(SCHEMAS.read_text())


def _kind(spec: Cluster, kind: str, name: str, inside: dict[str, Any]) -> dict[str, Any]:
    labels = {"app.kubernetes.io/managed-by": "heliograph", "app.kubernetes.io/part-of": spec.name}
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": name, "labels": labels}, "spec": inside}


def _ray_cluster(spec: Cluster, capacity: Capacity) -> dict[str, Any]:
    out: dict[str, Any] = {
        "rayVersion": importlib.metadata.version("ray"),
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": round(60 * spec.idle_minutes), "upscalingMode": "Default"},
        "authOptions": {"mode": "token", "secretName": spec.secrets.token},
        "networkPolicy": _policy(spec),
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},  # noqa: S104  of a pod; the policy guards it
            "template": _pod(spec, "ray-head", spec.head.cpus or 1, spec.head.memory_gib or 4, 0),
        },
        "workerGroupSpecs": [_group(spec, group) for group in capacity.groups],
    }
    if spec.redis:
        tolerance: dict[str, Any] = {"redisAddress": spec.redis, "externalStorageNamespace": spec.name}
        if secret := spec.secrets.redis_password:
            tolerance["redisPassword"] = {"valueFrom": {"secretKeyRef": {"name": secret, "key": "password"}}}
        out["gcsFaultToleranceOptions"] = tolerance
    return out


def _policy(spec: Cluster) -> dict[str, Any]:
    """Who may reach the pods: each other, and the namespaces that are named."""
    rules = [
        {"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}]}
        for name in spec.network.from_namespaces
    ]
    return {"mode": "DenyAllIngress", **({"head": {"ingressRules": rules}} if rules else {})}


def _group(spec: Cluster, group: Group) -> dict[str, Any]:
    node = spec.nodes[group.name]
    resources = {name: int(amount) for name, amount in group.resources.items() if name not in ("CPU", "GPU")}
    start = {"num-cpus": str(node.cpus)} | ({"resources": json.dumps(json.dumps(resources))} if resources else {})
    return {
        "groupName": group.name,
        "replicas": node.min,
        "minReplicas": node.min,
        "maxReplicas": node.max,
        "labels": group.labels,
        "rayStartParams": start,
        "template": _pod(spec, "ray-worker", node.cpus or 1, node.memory_gib or 4 * (node.cpus or 1), node.gpus or 0, node),
    }


def _pod(spec: Cluster, name: str, cpus: int, memory: float, gpus: int, node: Worker | None = None) -> dict[str, Any]:
    amounts: dict[str, Any] = {"cpu": str(cpus), "memory": f"{memory:g}Gi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(SECONDS_TO_SAVE), "TF_CPP_MIN_LOG_LEVEL": "3"}
    container = {
        "name": name,
        "image": spec.image or f"heliograph:{importlib.metadata.version('heliograph')}",
        "env": [{"name": key, "value": value} for key, value in variables.items()],
        "resources": {"requests": amounts, "limits": amounts},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "storage", "mountPath": VOLUME}, {"name": "shm", "mountPath": "/dev/shm"}],  # noqa: S108
    }
    inside: dict[str, Any] = {
        "containers": [container],
        "terminationGracePeriodSeconds": SECONDS_TO_SAVE,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000},
        "volumes": [
            {"name": "storage", "persistentVolumeClaim": {"claimName": spec.storage}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    if gpus:
        inside["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if node and node.spot:
        inside.setdefault("tolerations", []).append({"key": "heliograph/spot", "operator": "Exists", "effect": "NoSchedule"})
    if node and node.node_selector:
        inside["nodeSelector"] = node.node_selector
    return {"metadata": {"labels": {"app.kubernetes.io/part-of": spec.name}}, "spec": inside}


def dockerfile(gpus: bool) -> str:
    """An image that has what this process has, each package at its version; heliograph itself comes from the folder beside it."""
    lines = " \\\n    ".join(_quoted(pins(gpus)))
    return f"""\
FROM python:{platform.python_version()}-slim
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home ray
RUN pip install --no-cache-dir \\
    {lines}
COPY heliograph /opt/heliograph/heliograph
ENV PYTHONPATH=/opt/heliograph
USER ray
WORKDIR /home/ray
"""


def pins(gpus: bool) -> list[str]:
    """Every package that heliograph needs, at the version that is installed here."""
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    waiting = [("heliograph", frozenset[str]())]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        for text in distribution.requires or ():
            need = Requirement(text)
            if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                continue
            with_extras = (need.name.lower(), frozenset(need.extras))
            if with_extras not in seen:
                seen.add(with_extras)
                waiting.append(with_extras)
        if name != "heliograph":
            found[distribution.metadata["Name"].lower().replace("_", "-")] = distribution.version
    tensorflow = "tensorflow[and-cuda]" if gpus else "tensorflow"
    ray = "ray[data,train,tune,serve]"
    return sorted(f"{ {'tensorflow': tensorflow, 'ray': ray}.get(name, name) }=={version}" for name, version in found.items())


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def text(document: dict[str, Any]) -> str:
    """YAML for people: keys in our order, nothing that points elsewhere."""
    return yaml.dump(document, Dumper=_Plain, sort_keys=False, width=130)


def _quoted(names: list[str]) -> list[str]:
    return [f"'{name}'" if "[" in name else name for name in names]


def _python() -> str:
    return ".".join(platform.python_version_tuple()[:2])
