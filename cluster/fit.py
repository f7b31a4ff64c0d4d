"""Which nodes a demand launches, found with Ray's own scheduler, on paper: no cluster, some milliseconds.

Ray's autoscaler takes the nodes that a demand uses best and knows no prices; the choice is its own, so what is found here is
what it launches. It also waits without a word for what can never be placed; here that comes out at once.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .spec import Capacity, Group

Bundle = dict[str, float]


@dataclass(frozen=True)
class Demand:
    """What is asked for at one time."""

    bundles: tuple[Bundle, ...]
    """What each process takes, by Ray's names."""
    strategy: str | None = None
    """Of a placement group, all or nothing (PACK, SPREAD, STRICT_PACK, STRICT_SPREAD); None: each bundle for itself."""


@dataclass(frozen=True)
class Fit:
    nodes: dict[str, int]
    """By the group's name, those that were there too."""
    unplaced: int
    """Bundles that have no place."""


def fit(capacity: Capacity, demands: Sequence[Demand], there: dict[str, int] | None = None) -> Fit:
    """Nodes that the autoscaler has once the demands are met as far as they can be. there: nodes that are up and idle."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.schema import AutoscalerInstance
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated import autoscaler_pb2, instance_manager_pb2

    messages: Any = autoscaler_pb2
    instances: Any = instance_manager_pb2
    Instance, NodeKind = instances.Instance, instances.NodeKind
    logging.getLogger("ray.autoscaler.v2.scheduler").setLevel(logging.WARNING)
    types = {g.name: NodeTypeConfig(g.name, g.least, g.most, resources=g.resources, labels=g.labels) for g in capacity.groups}
    types["head"] = NodeTypeConfig("head", 0, 1, resources={"CPU": 0.0})
    head = AutoscalerInstance(
        im_instance=Instance(
            instance_type="head", status=Instance.RAY_RUNNING, node_kind=NodeKind.HEAD, instance_id="0", node_id="head"
        ),
        ray_node=messages.NodeState(
            node_id=b"head", ray_node_type_name="head", instance_id="0", status=messages.NodeStatus.RUNNING
        ),
        cloud_instance_id="0",
    )
    there = there or {}
    up = [
        AutoscalerInstance(im_instance=Instance(instance_type=name, status=Instance.REQUESTED, node_kind=NodeKind.WORKER))
        for name, count in there.items()
        for _ in range(count)
    ]
    single = [b for d in demands if d.strategy is None for b in d.bundles]
    gangs = []
    for number, demand in enumerate(d for d in demands if d.strategy):
        kinds = ResourceRequestUtil.PlacementConstraintType
        kind = {"STRICT_PACK": kinds.AFFINITY, "STRICT_SPREAD": kinds.ANTI_AFFINITY}.get(demand.strategy or "")
        constraints = [(kind, f"_PG_{number}", "")] if kind else None
        gang = messages.GangResourceRequest()
        gang.requests.extend([ResourceRequestUtil.make(bundle, constraints) for bundle in demand.bundles])
        gangs.append(gang)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=types,
        max_num_nodes=capacity.most_nodes + 1,
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(b) for b in single]),
        gang_resource_requests=gangs,
        current_instances=[head, *up],
    )
    reply: Any = ResourceDemandScheduler().schedule(request)
    launched = {launch.instance_type: launch.count for launch in reply.to_launch}
    unplaced = len(reply.infeasible_resource_requests) + sum(len(g.requests) for g in reply.infeasible_gang_resource_requests)
    return Fit(dict(Counter(there) + Counter(launched)), unplaced)


def most(capacity: Capacity, bundle: Bundle, wanted: int, strategy: str | None = None) -> int:
    """How many of `bundle`, up to `wanted`, have a place at one time."""
    low, high = 0, wanted
    while low < high:
        middle = (low + high + 1) // 2
        placed = not fit(capacity, [Demand((bundle,) * middle, strategy)]).unplaced
        low, high = (middle, high) if placed else (low, middle - 1)
    return low


def holds(group: Group, bundle: Bundle) -> bool:
    """Whether an empty node of a kind has room for a bundle."""
    return all(group.resources.get(name, 0) >= amount for name, amount in bundle.items())


def why_not(capacity: Capacity, demand: Demand) -> str:
    """What keeps a demand from ever being placed, and the least change of the cluster file that would place it."""
    bundle, count, groups = demand.bundles[0], len(demand.bundles), capacity.groups
    asked = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    if not any(holds(g, bundle) for g in groups):
        best = max(groups, key=lambda g: sum(min(1.0, g.resources.get(n, 0) / a) for n, a in bundle.items()))
        has = ", ".join(f"{amount:g} {name}" for name, amount in best.resources.items())
        return f"no node has {asked} (`{best.name}` has {has}): ask for less, or add nodes that do"
    more = replace(capacity, groups=tuple(replace(g, most=max(g.most, count)) for g in groups))
    needed = fit(more, [demand])
    if unlimited := bool(needed.unplaced):
        needed = fit(replace(more, most_nodes=count * len(groups)), [demand])
    if needed.unplaced:
        return f"{count} times {asked} cannot be placed with {demand.strategy}: no node is large enough for it"
    raised = [f"nodes.{g.name}.max to {needed.nodes[g.name]}" for g in groups if needed.nodes.get(g.name, 0) > g.most]
    if unlimited:
        raised.append(f"limits.nodes to {sum(needed.nodes.values())}")
    return f"{count} times {asked} is more than its nodes hold: raise {' and '.join(raised)}"
