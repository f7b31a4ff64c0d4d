"""What each stage of a run asks of a cluster: what a plan places on paper, and what a run is refused for before it waits."""

from dataclasses import dataclass

from ..cluster.fit import Bundle, Demand, fit, most
from ..cluster.runtime import joined
from ..cluster.spec import Capacity
from ..project import Data, Project, Serve, Train

MOST_PARALLEL = 4
"""Trials or recipes at a time, where the project does not say."""


@dataclass(frozen=True)
class Asked:
    """A stage's demands, at one time, and who makes them."""

    stage: str
    who: str
    demands: tuple[Demand, ...]


def worker_bundle(train: Train, gpus: float) -> Bundle:
    """What a worker takes. gpus: that the cluster has; each worker gets one where the project does not say and they suffice."""
    wanted = train.resources
    each = wanted.gpus if wanted.gpus is not None else 1.0 if gpus >= train.most_workers else 0.0
    bundle = {name: amount for name, amount in (("CPU", wanted.cpus), ("GPU", each)) if amount}
    if wanted.accelerator:
        bundle[f"accelerator_type:{wanted.accelerator}"] = 0.001
    return bundle


def room(train: Train, wanted: int | None) -> tuple[Bundle, int, int]:
    """For trainings side by side on the cluster that is there: (what a worker takes, workers of one, how many at a time)."""
    import ray

    capacity = joined()
    workers = train.fewest_workers * (train.pipeline.stages if train.pipeline else 1)
    gpus = capacity.gpus if capacity else ray.cluster_resources().get("GPU", 0)
    each = worker_bundle(train.model_copy(update={"workers": train.fewest_workers}), gpus)
    most_wanted = wanted or MOST_PARALLEL
    if capacity:
        gang = Demand((each,) * workers, train.resources.placement)
        fits = (n for n in range(most_wanted, 0, -1) if not fit(capacity, [gang] * n).unplaced)
        return each, workers, next(fits, 1)
    there = ray.cluster_resources()
    fitting = min((int(there.get(name, 0) / (workers * amount)) for name, amount in each.items()), default=most_wanted)
    return each, workers, max(1, min(most_wanted, fitting))


def asked(project: Project, capacity: Capacity) -> list[Asked]:
    """By stage, in the order of the run. What can shrink to the cluster (preparation, elastic training) asks for what fits."""
    train, found = project.train, []
    tasks = preparation(project.data, capacity)
    found.append(Asked("prepare", _count(len(tasks.bundles), "task"), (tasks,)))
    bundle = worker_bundle(train, capacity.gpus)
    training, who = _training(train, bundle, capacity)
    one = worker_bundle(train.model_copy(update={"workers": train.fewest_workers}), capacity.gpus)
    trial, of = Demand((one,) * train.fewest_workers, train.resources.placement), _count(train.fewest_workers, "worker")
    if project.tune:
        trials = min(project.tune.parallel or MOST_PARALLEL, project.tune.trials)
        found.append(Asked("tune", f"{trials} trials of {of}", (trial,) * trials))
    found.append(Asked("train", who, (training,)))
    if project.compress:
        recipes = min(project.compress.parallel or MOST_PARALLEL, len(project.compress.recipes))
        found.append(Asked("compress", f"{_count(recipes, 'recipe')} of {of}", (trial,) * recipes))
    if replica := replica_bundle(project.serve):
        replicas = project.serve.most_replicas
        found.append(Asked("serve", _count(replicas, "replica"), (Demand((replica,) * replicas),)))
    return found


def preparation(data: Data, capacity: Capacity) -> Demand:
    """A task a shard, as many at a time as there may be CPUs for."""
    return Demand(({"CPU": 1.0},) * max(1, most(capacity, {"CPU": 1.0}, data.shards)))


def replica_bundle(serve: Serve) -> Bundle:
    return {name: amount for name, amount in (("CPU", serve.cpus), ("GPU", serve.gpus)) if amount}


def _training(train: Train, bundle: Bundle, capacity: Capacity) -> tuple[Demand, str]:
    if train.pipeline:
        parts = train.most_workers * train.pipeline.stages
        return Demand((bundle,) * parts), f"{_count(train.most_workers, 'replica')} of {train.pipeline.stages} stages"
    workers, placement = train.most_workers, train.resources.placement
    if train.fewest_workers < workers:
        workers = max(train.fewest_workers, most(capacity, bundle, workers, placement))
    return Demand((bundle,) * workers, placement), _count(workers, "worker")


def _count(number: int, of: str) -> str:
    return f"{number} {of}{'s' if number > 1 else ''}"
