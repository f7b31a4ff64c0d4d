"""Ray Train's view of our workers: TF_CONFIG on each of them.

`KerasConfig` is like Ray's TensorflowConfig, without its import of TensorFlow in the driver and its switch to legacy Keras.
`Trainer` leaves out two of Ray Train's helpers that are of no use here, each a process that takes four seconds of a core
to start: the one that deals out datasets (our workers read their own) and the one that removes the placement group of a
controller that died (it would die with our Ray).
"""

import json
import os
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class Trainer(DataParallelTrainer):
    def _create_default_callbacks(self) -> list:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, unused)]


class KerasConfig(BackendConfig):
    @property
    def backend_cls(self):
        return _KerasBackend


class _KerasBackend(Backend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        addresses = ["{}:{}".format(*found) for found in worker_group.execute(get_address_and_port)]
        ray.get([worker_group.execute_single_async(i, _set_tf_config, addresses, i) for i in range(len(addresses))])


def _set_tf_config(addresses: list[str], rank: int) -> None:
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})
