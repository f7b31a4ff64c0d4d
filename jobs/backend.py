"""Ray Train's view of our workers: TF_CONFIG on each of them.

Like Ray's TensorflowConfig, without its import of TensorFlow in the driver and its switch to legacy Keras.
"""

import json
import os
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig


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
