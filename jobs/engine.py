"""The engine: a trained model as ONNX Runtime runs it, from raw features to outputs.

Evaluation and the endpoint use this same code, so a metric in the report is a metric of what answers.

ONNX Runtime 1.29 and later report names, shapes and hashes of the models that they load to their maker unless
ORT_DISABLE_TELEMETRY is set when they are imported: here it is, before that can happen.
"""

import os
from pathlib import Path

import numpy as np

from ..cluster.storage import read_json
from ..datasets.preprocess import Preprocessing
from ..datasets.schema import Columns, Schema, as_fed

os.environ["ORT_DISABLE_TELEMETRY"] = "1"


class Engine:
    """folder: holds `model.onnx`, `schema.json` and `preprocess.json`."""

    def __init__(self, model: Path, prepared: Path, threads: int | None = None):
        import onnxruntime as ort

        self.schema = Schema.read(prepared)
        self.preprocessing = Preprocessing.model_validate(read_json(prepared / "preprocess.json"))
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or os.cpu_count() or 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(model.read_bytes(), options, providers=ort.get_available_providers())
        self._names = [i.name for i in self._session.get_inputs()]

    def predict(self, features: Columns) -> np.ndarray:
        """Features by name, as the schema's kinds have them, to outputs `[rows, schema.outputs]`."""
        return self.forward(self.preprocessing.apply(features))

    def forward(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The model's inputs by name (after preprocessing), to its outputs."""
        inputs = {name: as_fed(values) for name, values in inputs.items()}
        if len(inputs) == 1:
            inputs = {self._names[0]: next(iter(inputs.values()))}
        return np.asarray(self._session.run(None, {name: inputs[name] for name in self._names})[0])
