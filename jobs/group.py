"""The ranks of trainings that follow each other in the same processes: they load TensorFlow and find each other once.

The process that makes a group is rank 0; a trainer of Ray Train's for each training would take a minute to start.
"""

from collections.abc import Callable
from typing import Any

from ..cluster.fit import Bundle
from ..cluster.sealed import Seal
from .backend import set_tf_config
from .worker import STOP_FILE, Job, work_as


def ready(job: Job) -> None:
    """Make a job's folder what a training expects to find."""
    job.folder.mkdir(parents=True, exist_ok=True)
    if job.train.encrypt and job.sealing:
        Seal.make(job.folder, job.sealing)
    (job.folder / STOP_FILE).unlink(missing_ok=True)


class Ranks:
    """Trains one job after the other: in this process, and of several workers in those beside it, which stay for the next.

    here: how many workers of such trainings are on a machine at the same time; each: what a worker takes."""

    def __init__(self, here: int, each: Bundle):
        self.here, self.each = here, each
        self.group: Group | None = None

    def train(self, job: Job, goes_on: Callable[[int], bool] | None = None) -> None:
        """Train, to the end or until it is told to stop. goes_on: as in `work_as`."""
        import keras

        keras.backend.clear_session()
        ranks = job.train.fewest_workers
        if ranks == 1:
            work_as(job, 0, 1, self.here, goes_on)
            return
        if self.group is None:
            self.group = Group(ranks, self.each)
        self.group.begin(job, self.here)
        work_as(job, 0, ranks, self.here, goes_on)
        self.group.join()


class Group:
    """The ranks after rank 0, in actors that live as long as this one, in its placement group."""

    def __init__(self, ranks: int, each: Bundle):
        import ray
        from ray.train._internal.utils import get_address_and_port

        actor: Any = ray.remote(_Rank).options(**options(each))
        self.actors = [actor.remote() for _ in range(ranks - 1)]
        self.working: list[Any] = []
        found = [get_address_and_port(), *ray.get([a.address.remote() for a in self.actors])]
        addresses = [f"{host}:{port}" for host, port in found]
        ray.get([a.join.remote(addresses, rank) for rank, a in enumerate(self.actors, 1)])
        set_tf_config(addresses, 0)

    def begin(self, job: Job, here: int) -> None:
        self.working = [a.work.remote(job, rank, len(self.actors) + 1, here) for rank, a in enumerate(self.actors, 1)]

    def check(self) -> None:
        """Raises what another rank failed of: then rank 0, which waits for it in an exchange, would wait for ever."""
        import ray

        failed, _ = ray.wait(self.working, num_returns=len(self.working), timeout=0) if self.working else ([], [])
        if failed:
            ray.get(failed)

    def join(self) -> None:
        import ray

        ray.get(self.working)


class _Rank:
    def address(self) -> tuple[str, int]:
        from ray.train._internal.utils import get_address_and_port

        return get_address_and_port()

    def join(self, addresses: list[str], rank: int) -> None:
        set_tf_config(addresses, rank)

    def work(self, job: Job, rank: int, ranks: int, here: int) -> None:
        import keras

        keras.backend.clear_session()
        work_as(job, rank, ranks, here)


def options(each: Bundle) -> dict[str, Any]:
    """A bundle as Ray's options of an actor."""
    rest = {name: amount for name, amount in each.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": each.get("CPU", 0), "num_gpus": each.get("GPU", 0), "resources": rest}
