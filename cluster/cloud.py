"""Clusters in a cloud or on Kubernetes: started and ended by their own tools, `ray up` and `kubectl`.

Beside the cluster file, in `.NAME/`, lie what they were given and the token that all nodes share. Ending a cluster does not
believe the tool: what AWS still runs under the cluster's name is looked up and said.
"""

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ClusterError
from .render import launcher, manifest, text
from .spec import Capacity, Cluster, beside
from .storage import write_bytes


def start(spec: Cluster, file: Path, capacity: Capacity, say: Callable[[str], None]) -> None:
    """Raises ClusterError when the provider's tool is missing or fails."""
    folder = beside(spec, file)
    if spec.provider == "kuberay":
        _run(["kubectl", "apply", "-f", "-"], say, text(manifest(spec, capacity)))
        return
    token = folder / "auth_token"
    if not token.exists():
        write_bytes(token, secrets.token_hex(32).encode(), mode=0o600)
    made = folder / "ray-up.yaml"
    write_bytes(made, text(launcher(spec, capacity, token)).encode())
    _run([*_ray(), "up", "-y", "--no-config-cache", str(made)], say)


def stop(spec: Cluster, file: Path, say: Callable[[str], None]) -> None:
    """Raises ClusterError when the provider's tool fails, or something is left that costs money."""
    if spec.provider == "kuberay":
        _run(["kubectl", "delete", "raycluster", spec.name, "--ignore-not-found"], say)
        return
    made = beside(spec, file) / "ray-up.yaml"
    if not made.exists():
        raise ClusterError(f"{file}: {spec.name} was not started from here: {made} is missing")
    _run([*_ray(), "down", "-y", str(made)], say)
    left = still_running(spec)
    if left:
        raise ClusterError(f"{spec.name}: {len(left)} instances are still running, and cost: {', '.join(left)}")
    say(f"{spec.name}: is down" + (", nothing of it is left running" if spec.provider == "aws" else ""))


def still_running(spec: Cluster) -> list[str]:
    """Ids of a cluster's instances on AWS that are not gone; of other providers nothing is known."""
    if spec.provider != "aws":
        return []
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    filters: Any = [
        {"Name": "tag:ray-cluster-name", "Values": [spec.name]},
        {"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "stopped"]},
    ]
    try:
        pages = boto3.client("ec2", region_name=spec.region).get_paginator("describe_instances").paginate(Filters=filters)
        return [i["InstanceId"] for page in pages for r in page["Reservations"] for i in r["Instances"]]
    except (BotoCoreError, ClientError) as error:
        raise ClusterError(f"AWS does not say what runs in {spec.region}: {str(error).splitlines()[0][:200]}") from None


def _ray() -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts"]


def _run(command: list[str], say: Callable[[str], None], given: str = "") -> None:
    """Say what a tool says. Raises ClusterError when it is missing or fails."""
    if shutil.which(command[0]) is None:
        raise ClusterError(f"{command[0]}: is not installed: this provider's clusters are started with it")
    process = subprocess.Popen(  # noqa: S603  the provider's own tool
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"RAY_enable_autoscaler_v2": "1"},
    )  # fmt: skip
    assert process.stdin and process.stdout
    process.stdin.write(given)
    process.stdin.close()
    last = ""
    for line in process.stdout:
        say(line.rstrip())
        last = line.strip() or last
    if process.wait():
        raise ClusterError(f"`{' '.join(command[-3:])}` failed: {last[:300]}")
