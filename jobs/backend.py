"""Ray Train, told about our workers: TF_CONFIG on each of them, what to do when one is lost, which helpers to leave out.

`KerasConfig` is like Ray's TensorflowConfig, without its import of TensorFlow in the driver and its switch to legacy Keras.
`Trainer` leaves out two of Ray Train's helpers that are of no use here, each a process that takes four seconds of a core
to start: the one that deals out datasets (our workers read their own) and the one that removes the placement group of a
controller that died (it would die with our Ray).

A lost worker or node is no failure of the training: the group starts again, with as many workers as there are resources
for, and goes on from the last checkpoint. A mistake in the project, which would only happen again, ends it at once.
"""

import json
import os
from typing import Any

import ray
from ray.train import FailureConfig
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from ..cluster.runtime import explained

MOST_LOSSES = 100
"""Lost workers that a training survives: spot machines come and go."""
MOST_ERRORS = 1
"""Errors of the code that it is tried again after: the other ranks' broken exchange looks like one, too."""


LOSSES = ("ActorDied", "ActorUnavailable", "RayActorError", "NodeDied", "UnavailableError", "AbortedError", "CancelledError")
"""In the text of a worker's failure: its process or node died, or its exchange broke because a peer did."""


class Trainer(DataParallelTrainer):
    def _create_default_callbacks(self) -> list:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, unused)]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        return super()._initialize_and_run_controller(**given | {"failure_policy": _Policy()})


class _Policy(DefaultFailurePolicy):
    def __init__(self):
        super().__init__(FailureConfig(max_failures=MOST_LOSSES, controller_failure_limit=-1))
        self._errors = 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        failures = getattr(training_failed_error, "worker_failures", {}).values()
        if explained(training_failed_error):
            return FailureDecision.RAISE
        if failures and not any(_is_a_loss(error) for error in failures):
            self._errors += 1
            if self._errors > MOST_ERRORS:
                return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


def _is_a_loss(error: BaseException) -> bool:
    text = f"{type(error).__name__} {getattr(error, 'cause', '')} {error}"
    return any(name in text for name in LOSSES)


class KerasConfig(BackendConfig):
    @property
    def backend_cls(self):
        return _KerasBackend


class _KerasBackend(Backend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        addresses = ["{}:{}".format(*found) for found in worker_group.execute(get_address_and_port)]
        ray.get([worker_group.execute_single_async(i, set_tf_config, addresses, i) for i in range(len(addresses))])


def set_tf_config(addresses: list[str], rank: int) -> None:
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})
