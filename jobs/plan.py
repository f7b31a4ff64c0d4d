"""The plan: which nodes a run would launch, stage by stage, and what they cost. Nothing is launched.

How long a stage takes is known from an earlier run of the project alone: a training's seconds are scaled to the epochs and the
workers of the plan, everything else is taken as it was. Without one there is a price for the hour and none for the run.
"""

import html
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..cluster.bill import COST
from ..cluster.fit import Fit, fit, holds, why_not
from ..cluster.runtime import joined
from ..cluster.spec import Capacity, Instance, instances, load
from ..cluster.storage import read_json, write_json
from ..project import Project
from .demand import Asked, asked
from .drawing import table
from .stages import Run

PLANNED = "plan.json"
"""In a run's folder: what was expected of it when it began."""


@dataclass(frozen=True)
class Alternative:
    """Nodes of other kinds that a stage would fit on, were they the only ones."""

    nodes: dict[str, int]
    dollars_per_hour: float


@dataclass(frozen=True)
class StagePlan:
    stage: str
    who: str
    nodes: dict[str, int]
    """By the kind's name; what the stages before left is used again."""
    dollars_per_hour: float | None
    """With the head; None where a price is not known."""
    hours: float | None
    impossible: str
    """Why it can never be placed; empty where it can."""
    cheaper: tuple[Alternative, ...]


@dataclass(frozen=True)
class Plan:
    stages: tuple[StagePlan, ...]
    dollars: float | None
    """For the whole run, without the minutes in which idle nodes wait to go."""
    basis: str
    """What the hours are from."""
    actual: dict[str, Any] | None
    """What an earlier run really had: `cost.json`."""
    problems: tuple[str, ...]
    """What forbids the run: demands that cannot be placed, limits that it would pass."""


def plan(project: Project, file: Path, run: Path) -> Plan:
    """file: the cluster's. run: a folder in which an earlier run may lie.

    Raises ProjectError for a cluster file that says something that cannot be."""
    spec, capacity = load(file)
    hours, basis = _hours(project, run)
    stages: list[StagePlan] = []
    problems: list[str] = []
    up: dict[str, int] = {}
    for stage in asked(project, capacity):
        found = fit(capacity, stage.demands, up)
        impossible = _impossible(stage, found, capacity)
        if impossible:
            problems.append(f"{stage.stage}: {impossible}{_instance_for(stage, capacity, instances(spec, file), spec.region)}")
        rate, cheaper = capacity.price(found.nodes), () if impossible else _cheaper(stage, capacity)
        stages.append(StagePlan(stage.stage, stage.who, found.nodes, rate, hours.get(stage.stage), impossible, cheaper))
        up = found.nodes
    problems += _over(stages, spec.limits.dollars_per_hour)
    run_stages = [s for s in stages if s.stage in ("prepare", "train")]
    costs = [s.dollars_per_hour * s.hours for s in run_stages if s.dollars_per_hour is not None and s.hours is not None]
    dollars = sum(costs) if len(costs) == len(run_stages) else None
    if dollars is not None and spec.limits.dollars_per_run and dollars > spec.limits.dollars_per_run:
        problems.append(
            f"the run would cost ${dollars:.2f}, more than limits.dollars_per_run, ${spec.limits.dollars_per_run:.2f}"
        )
    actual = read_json(run / COST) if (run / COST).exists() else None
    return Plan(tuple(stages), dollars, basis, actual, tuple(problems))


def _impossible(stage: Asked, found: Fit, capacity: Capacity) -> str:
    """Why a stage can never be placed; trials that have no room at one time take turns."""
    alone = (d for d in stage.demands if found.unplaced and fit(capacity, [d]).unplaced)
    return next((why_not(capacity, demand) for demand in alone), "")


def _instance_for(stage: Asked, capacity: Capacity, table: list[Instance], region: str | None) -> str:
    """The cheapest instance of the region that would hold what no node holds."""
    bundle = stage.demands[0].bundles[0]
    accelerator = next((n.split(":")[1] for n in bundle if n.startswith("accelerator_type:")), None)
    fitting = [
        i
        for i in table
        if i.on_demand is not None
        and i.cpus >= bundle.get("CPU", 0)
        and i.gpus >= bundle.get("GPU", 0)
        and accelerator in (None, i.accelerator)
    ]
    best = min(fitting, key=lambda i: i.on_demand or 0, default=None)
    if best is None or any(holds(g, bundle) for g in capacity.groups):
        return ""
    return f" (the cheapest in {region}: {best.name}, ${best.on_demand:.2f}/h)"


def _cheaper(stage: Asked, capacity: Capacity) -> tuple[Alternative, ...]:
    """Ray takes the nodes that a demand fills best; others may cost less. Each kind alone, the cheapest first."""
    own = capacity.price(fit(capacity, stage.demands).nodes)
    out = []
    for group in capacity.groups if own is not None else ():
        only = replace(capacity, groups=tuple(g if g is group else replace(g, most=g.least) for g in capacity.groups))
        alone = fit(only, stage.demands)
        rate = capacity.price(alone.nodes)
        if not alone.unplaced and rate is not None and own is not None and rate < own - 1e-9:
            out.append(Alternative(alone.nodes, rate))
    return tuple(sorted(out, key=lambda a: a.dollars_per_hour))


def note(project: Project, run: Path) -> None:
    """Keep what is expected of a run that begins; where one goes on, what was expected when it began stays."""
    file, over = run / PLANNED, run / "report.json"
    if file.exists() and (not over.exists() or over.stat().st_mtime < file.stat().st_mtime):
        return
    hours, basis = _hours(project, run)
    write_json(file, {"seconds": {stage: round(3600 * h, 2) for stage, h in hours.items()}, "basis": basis})


def section(project: Project, run: Run) -> str:
    """Of the report: how long each stage was expected to take, and took; on a cluster, what it asked for and what all cost."""
    capacity = joined()
    wanted = {each.stage: each for each in asked(project, capacity)} if capacity else {}
    planned = read_json(run.folder / PLANNED)
    said = f"Planned from {planned['basis']}" if "train" in planned["seconds"] else "No earlier run told what to expect"
    rows, up = [], {}
    for stage in run.stages:
        name, who, nodes = stage["name"], "", ""
        if capacity and name in wanted:
            up = fit(capacity, wanted[name].demands, up).nodes
            who, nodes = wanted[name].who, _nodes(up)
        expected = planned["seconds"].get(name)
        took = f"{stage['seconds']:.1f} s" + (" (reused)" if stage["reused"] else "")
        rows.append((name, "–" if expected is None else f"{expected:.1f} s", took, who, nodes))
    head = ("stage", "planned", "actual", *(("asked for", "nodes") if capacity else ("", "")))
    file = run.folder / COST
    cost = f" {_actual(read_json(file)).capitalize()}." if file.exists() else ""
    return f"<h2>Plan and actual</h2><p>{html.escape(said)}.{cost}</p>{table(head, rows)}"


def _actual(cost: dict[str, Any]) -> str:
    """Of `cost.json`: nodes and dollars."""
    dollars = cost["dollars"]
    return f"it was: {_nodes(cost['most_nodes'])}, {'?' if dollars is None else f'${dollars:.2f}'}"


def _over(stages: list[StagePlan], limit: float | None) -> list[str]:
    return [
        f"{s.stage}: its nodes cost ${s.dollars_per_hour:.2f}/h, more than limits.dollars_per_hour, ${limit:.2f}"
        for s in stages
        if limit and s.dollars_per_hour is not None and s.dollars_per_hour > limit
    ]


def _hours(project: Project, run: Path) -> tuple[dict[str, float], str]:
    """Of each stage, from an earlier run."""
    found = {record.stem: read_json(record)["seconds"] / 3600 for record in (run / "stages").glob("*.json")}
    if "train" not in found:
        return found, f"no earlier run in {run}: prices are for an hour (a run of few epochs tells how long one takes)"
    trained = read_json(run / "train" / "result.json")
    workers = trained.get("workers") or project.train.most_workers
    scale = project.train.epochs / trained["epoch"] * workers / project.train.most_workers
    found["train"] *= scale
    if project.tune:
        share = -(-project.tune.trials // min(project.tune.trials, project.tune.parallel or 4))
        found["tune"] = found["train"] * share
    basis = f"the run in {run}: {trained['epoch']} epochs on {workers} worker{'s' if workers > 1 else ''}"
    return found, basis + ("" if abs(scale - 1) < 1e-9 else f", scaled by {scale:.2f}")


def lines(plan: Plan) -> list[str]:
    """For people."""
    width = max(len(s.who) for s in plan.stages)
    out = [f"{'stage':<8} {'asked for':<{width}}  {'per hour':>9}  {'takes':>8}  nodes"]
    for s in plan.stages:
        nodes = "cannot be placed" if s.impossible else _nodes(s.nodes)
        rate = "?" if s.dollars_per_hour is None else f"${s.dollars_per_hour:.2f}"
        out.append(f"{s.stage:<8} {s.who:<{width}}  {rate:>9}  {_time(s.hours):>8}  {nodes}")
        out += [f"{'':<8} cheaper: {_nodes(a.nodes)} for ${a.dollars_per_hour:.2f} per hour" for a in s.cheaper]
    if plan.dollars is not None:
        out.append(f"the run: ${plan.dollars:.2f}")
    if plan.actual:
        out.append(f"and {_actual(plan.actual)}")
    out.append(f"how long: from {plan.basis}" if not plan.basis.startswith("no ") else f"how long: {plan.basis}")
    return out


def _nodes(nodes: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(nodes.items()) if count) or "the head alone"


def _time(hours: float | None) -> str:
    if hours is None:
        return "?"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.0f} s"
