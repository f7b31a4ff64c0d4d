"""A project's run and its endpoint as KubeRay's own objects; the project lies in the storage, under projects/NAME."""

from typing import Any

from ..cluster.render import job_manifest, service_manifest
from ..cluster.runtime import JOINED
from ..cluster.spec import VOLUME, Capacity, Cluster
from ..project import Project
from .submit import What, entrypoint


def job(project: Project, spec: Cluster, capacity: Capacity) -> dict[str, Any]:
    """A `RayJob` that runs the project; run again under the same name, it goes on."""
    command = entrypoint(f"{VOLUME}/projects/{project.name}", VOLUME, project.name, What.RUN)
    return job_manifest(spec, capacity, project.name, command, {JOINED: capacity.dumps()})


def service(project: Project, spec: Cluster, capacity: Capacity) -> dict[str, Any]:
    """A `RayService` that answers with the project's model from the registry in the storage."""
    arguments = {
        "name": project.name,
        "registry": f"{VOLUME}/registry",
        "keys": project.keys or f"{VOLUME}/runs/{project.name}/keys",
        "serve": project.serve.model_dump(mode="json"),
    }
    application = {"name": project.name, "import_path": "heliograph.serve.endpoint:build", "route_prefix": "/", "args": arguments}
    return service_manifest(spec, capacity, project.name, application)
