"""MLServer, without parallel workers (its quicker way for a small model): FOLDER PORT."""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    folder = Path(sys.argv[1]) / "mlserver"
    folder.mkdir(exist_ok=True)
    settings = {"host": "127.0.0.1", "http_port": int(sys.argv[2]), "grpc_port": int(sys.argv[2]) + 1, "parallel_workers": 0}
    settings |= {"metrics_port": int(sys.argv[2]) + 2, "debug": False}
    (folder / "settings.json").write_text(json.dumps(settings))
    model = {"name": "mlp", "implementation": "mlserver_peer.Mlp", "parameters": {"uri": f"{sys.argv[1]}/model.onnx"}}
    (folder / "model-settings.json").write_text(json.dumps(model))
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    os.execvp("mlserver", ["mlserver", "start", str(folder)])

import numpy as np
import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Mlp(MLModel):
    async def load(self) -> bool:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(self.settings.parameters.uri, options)
        return True

    async def predict(self, payload):
        rows = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32)
        output = NumpyCodec.encode_output("y", self.session.run(None, {"x": rows})[0])
        return InferenceResponse(model_name=self.name, outputs=[output])
