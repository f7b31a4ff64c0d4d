"""The cluster file: one YAML from which a cluster is planned, priced, written for its provider, and reached.

    name: gpus
    provider: aws
    region: us-east-1
    head: {instance: m6i.large}
    nodes:
      l4: {instance: g6.2xlarge, max: 4, spot: true}
    storage: /mnt/shared
    limits: {nodes: 4, dollars_per_hour: 10}

What an instance is made of and what it costs stands in `prices.csv`, dated; a file of your own (`prices:`) goes before it, and
`dollars_per_hour` of a node before both. A Kubernetes cluster and a local one have no instances: their nodes say what they are
made of themselves.
"""

import csv
import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..errors import ProjectError
from ..project import NAME
from ..settings import Section, hint, read

CATALOGUE = Path(__file__).parent / "prices.csv"
COLUMNS = ("provider", "region", "instance", "cpus", "memory_gib", "gpus", "accelerator", "on_demand", "spot")
KIND = "heliograph-kind"
"""The label of a node that names its kind in the cluster file."""
VOLUME = "/mnt/heliograph"
"""Where the storage of a Kubernetes cluster is in its pods."""
SECONDS_TO_SAVE = 90
"""How long a job that is told to stop, or a pod that must go, may take to save a checkpoint."""
CLOUDS = ("aws", "gcp", "azure")


class Node(Section):
    """A kind of node: an instance of the provider, or its parts"""

    instance: str | None = None
    """the provider's name of it, such as `g6.2xlarge`"""
    cpus: Annotated[int, Field(ge=1)] | None = None
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None
    accelerator: str | None = None
    """Ray's name of the GPU, such as `L4` or `A100`"""
    dollars_per_hour: Annotated[float, Field(ge=0)] | None = None
    """what it costs you, whatever the table says"""


class Worker(Node):
    """A kind of node and how many there may be"""

    min: Annotated[int, Field(ge=0)] = 0
    """stay when idle"""
    max: Annotated[int, Field(ge=1)] = 1
    spot: bool = False
    """cheaper, and taken away when somebody pays more"""
    labels: dict[str, str] = {}
    """of Ray, to place actors by"""
    node_selector: dict[str, str] = {}
    """Kubernetes: labels of the machines that it may be on"""

    @model_validator(mode="after")
    def _in_order(self):
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, max is {self.max}: min must not be larger")
        return self


class Limits(Section):
    nodes: Annotated[int, Field(ge=1)] | None = None
    """beside the head, of all kinds together"""
    dollars_per_hour: Annotated[float, Field(gt=0)] | None = None
    dollars_per_run: Annotated[float, Field(gt=0)] | None = None
    """a run that has cost so much saves a checkpoint and stops"""
    runs: Annotated[int, Field(ge=1)] | None = None
    """at one time; the others wait, by priority"""
    runs_per_user: Annotated[int, Field(ge=1)] | None = None


class Network(Section):
    """Where the cluster lives; what is left out, the provider's tools choose."""

    subnets: list[str] = []
    """ids (AWS), names (GCP, Azure)"""
    security_groups: list[str] = []
    """ids; AWS alone"""
    from_namespaces: list[str] = []
    """Kubernetes: whose pods may ask the cluster; the cluster's own may always"""


class Secrets(Section):
    """Names of what is kept elsewhere: no secret stands in this file."""

    token: str = "ray-token"  # noqa: S105  the name of one
    """Kubernetes: the Secret whose key `auth_token` all who ask Ray must know"""
    ssh_key: str | None = None
    """a private key's file (default: one that Ray makes)"""
    redis_password: str | None = None
    """Kubernetes: the Secret whose key `password` opens Redis"""


class Cluster(Section):
    name: Annotated[str, Field(pattern=rf"^{NAME}$")]
    """lower-case letters, digits, `-` and `_`"""
    provider: Literal["aws", "gcp", "azure", "kuberay", "local"]
    """`local` rehearses on this machine, with nodes that are processes"""
    region: str | None = None
    """such as us-east-1"""
    zones: list[str] = []
    """of the region, in the order to try them (default: the provider chooses)"""
    project: str | None = None
    """GCP: the project's id; Azure: the resource group"""
    head: Node = Node(cpus=1)
    nodes: Annotated[dict[str, Worker], Field(min_length=1)]
    """a name for each kind of node"""
    image: str | None = None
    """a machine image (AWS: its id), or on Kubernetes a container image"""
    storage: str = "storage"
    """what all nodes share, for runs and the registry: a folder, from / on; of a local cluster relative to this file; on
    Kubernetes the name of a PersistentVolumeClaim"""
    network: Network = Network()
    secrets: Secrets = Secrets()
    redis: str | None = None
    """host:port; with it the head may be lost, and `heliograph cluster up` brings it back: nodes and endpoints wait for it"""
    limits: Limits = Limits()
    idle_minutes: Annotated[float, Field(gt=0)] = 5
    """a node that nobody needs goes after so many"""
    prices: str | None = None
    """a table of your own, relative to this file: its lines go before those that ship with heliograph"""

    @model_validator(mode="after")
    def _has_what_its_provider_needs(self):
        for where, node in (("head", self.head), *((f"nodes.{name}", node) for name, node in self.nodes.items())):
            if self.provider in CLOUDS and not node.instance:
                raise ValueError(f"{where}.instance: is missing: name what {self.provider} shall start")
            if self.provider not in CLOUDS and node.instance:
                raise ValueError(f"{where}.instance: {self.provider} has no instances: say cpus, memory_gib and gpus instead")
            if self.provider not in CLOUDS and not node.cpus:
                raise ValueError(f"{where}.cpus: is missing: a node of {self.provider} is what this file says")
        if self.provider in CLOUDS and not self.region:
            raise ValueError(f"region: is missing: where shall {self.provider} start nodes?")
        if self.provider in ("gcp", "azure") and not self.project:
            raise ValueError(f"project: is missing: {'the project’s id' if self.provider == 'gcp' else 'the resource group'}")
        return self

    @property
    def most_nodes(self) -> int:
        """Beside the head."""
        return self.limits.nodes or sum(node.max for node in self.nodes.values())


@dataclass(frozen=True)
class Instance:
    """A line of a price table."""

    name: str
    cpus: int
    memory_gib: float
    gpus: int
    accelerator: str
    on_demand: float | None
    """Dollars an hour."""
    spot: float | None


@dataclass(frozen=True)
class Group:
    """A kind of node as the scheduler and the bill see it."""

    name: str
    resources: dict[str, float]
    """By Ray's names: CPU, GPU, accelerator_type:L4."""
    least: int
    most: int
    dollars: float | None
    """An hour; None where nothing says what it costs."""
    labels: dict[str, str]
    spot: bool = False
    at_most: bool = False
    """Whether `dollars` is only a bound: a spot node whose price is not known."""


@dataclass(frozen=True)
class Capacity:
    """What a cluster may grow to, and what that costs: all that a plan needs, and a run that was sent there."""

    head: Group
    groups: tuple[Group, ...]
    most_nodes: int
    """Beside the head, of all kinds together."""
    dollars_per_run: float | None = None
    runs: int | None = None
    runs_per_user: int | None = None

    @property
    def gpus(self) -> float:
        return sum(g.resources.get("GPU", 0) * g.most for g in self.groups)

    def price(self, nodes: dict[str, int]) -> float | None:
        """Dollars an hour of nodes, by their kinds' names, and the head; None where one of them has no price."""
        dollars = {g.name: g.dollars for g in self.groups}
        parts = [self.head.dollars, *(dollars[name] for name, count in nodes.items() for _ in range(count))]
        return None if None in parts else sum(p for p in parts if p is not None)

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str) -> "Capacity":
        said = json.loads(text)
        groups = tuple(Group(**g) for g in said["groups"])
        return Capacity(**{**said, "head": Group(**said["head"]), "groups": groups})


def load(file: Path) -> tuple[Cluster, Capacity]:
    """Read a cluster file.

    Raises ProjectError, a line for each mistake: of the file, an instance that the provider's region does not have, a table of
    prices that is none.
    """
    if not file.is_file():
        raise ProjectError(f"{file}: not found: name a cluster file (docs/clusters.md shows one)")
    spec = read(file, Cluster)
    table = _table(spec, file)
    head = Group("head", {"CPU": 0.0}, 1, 1, _price(spec, spec.head, table, f"{file}: head", spot=False)[0], {})
    groups = []
    for name, node in spec.nodes.items():
        dollars, at_most = _price(spec, node, table, f"{file}: nodes.{name}", node.spot)
        resources = _resources(node, table.get(node.instance or ""))
        groups.append(Group(name, resources, node.min, node.max, dollars, {**node.labels, KIND: name}, node.spot, at_most))
    limits = spec.limits
    return spec, Capacity(head, tuple(groups), spec.most_nodes, limits.dollars_per_run, limits.runs, limits.runs_per_user)


def beside(spec: Cluster, file: Path) -> Path:
    """The folder in which what is known of a cluster that was started lies."""
    return file.resolve().parent / f".{spec.name}"


def storage(spec: Cluster, file: Path) -> Path:
    """Where runs and the registry lie, on the nodes. Raises ProjectError for a folder that a cloud's nodes cannot share."""
    if spec.provider == "kuberay":
        return Path(VOLUME)
    if spec.provider != "local" and not Path(spec.storage).is_absolute():
        raise ProjectError(f"{file}: storage: `{spec.storage}` is a folder of this machine: name one that all nodes share")
    return (file.resolve().parent / Path(spec.storage).expanduser()).resolve()


def fault_tolerance(spec: Cluster, namespace: str) -> dict[str, str]:
    """The variables with which a head finds its state again, and nodes wait for it."""
    if not spec.redis:
        return {}
    return {
        "RAY_REDIS_ADDRESS": spec.redis,
        "RAY_external_storage_namespace": namespace,
        "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    }


def instances(spec: Cluster, file: Path) -> list[Instance]:
    """What the region has, by the tables."""
    return list(_table(spec, file).values())


def _resources(node: Node, instance: Instance | None) -> dict[str, float]:
    cpus = node.cpus or (instance.cpus if instance else 0)
    gpus = node.gpus if node.gpus is not None else instance.gpus if instance else 0
    accelerator = node.accelerator or (instance.accelerator if instance else "")
    out = {"CPU": float(cpus)}
    if gpus:
        out["GPU"] = float(gpus)
    if gpus and accelerator:
        out[f"accelerator_type:{accelerator}"] = 1.0
    return out


def _price(spec: Cluster, node: Node, table: dict[str, Instance], where: str, spot: bool) -> tuple[float | None, bool]:
    """(dollars an hour, whether that is only a bound). Raises ProjectError for an instance that is in no table."""
    found = table.get(node.instance or "")
    if spec.provider in CLOUDS and not found and not (node.cpus and node.dollars_per_hour is not None):
        if not table:
            raise ProjectError(
                f"{where}: no prices for {spec.provider} in {spec.region}: give a table of your own (`prices: FILE.csv` with the "
                f"columns {','.join(COLUMNS)}), or say `cpus`, `gpus` and `dollars_per_hour` of each node"
            )
        said = hint(str(node.instance), sorted(table))
        raise ProjectError(f"{where}.instance: {spec.region} has no `{node.instance}`, by the table of prices: {said}")
    if node.dollars_per_hour is not None or not found:
        return node.dollars_per_hour if spec.provider != "local" else node.dollars_per_hour or 0.0, False
    return (found.spot, False) if spot and found.spot is not None else (found.on_demand, spot)


def _table(spec: Cluster, file: Path) -> dict[str, Instance]:
    """The instances of the cluster's region; the user's lines go before ours."""
    own = _lines(file.parent / Path(spec.prices).expanduser()) if spec.prices else ()
    wanted = [line for line in (*_lines(CATALOGUE), *own) if (line[0], line[1]) == (spec.provider, spec.region)]
    return {instance.name: instance for *_, instance in wanted}


@functools.cache
def _lines(file: Path) -> tuple[tuple[str, str, Instance], ...]:
    """(provider, region, instance) of each line."""
    try:
        rows = list(csv.reader(line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")))
    except (OSError, UnicodeDecodeError) as error:
        raise ProjectError(f"{file}: cannot be read ({type(error).__name__}): `prices` names a table (CSV)") from None
    if not rows or tuple(rows[0]) != COLUMNS:
        raise ProjectError(f"{file}: is no table of prices: its first line should be {','.join(COLUMNS)}")
    out = []
    for number, row in enumerate(rows[1:], 2):
        try:
            provider, region, name, cpus, memory, gpus, accelerator, on_demand, spot = row
            price, less = (float(p) if p else None for p in (on_demand, spot))
            out.append((provider, region, Instance(name, int(cpus), float(memory), int(gpus), accelerator, price, less)))
        except ValueError:
            raise ProjectError(
                f"{file}: line {number} of the table, `{','.join(row)[:60]}`, is no instance with prices"
            ) from None
    return tuple(out)
