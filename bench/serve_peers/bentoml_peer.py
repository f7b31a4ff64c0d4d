"""BentoML, one worker: FOLDER PORT."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["MODEL"] = f"{sys.argv[1]}/model.onnx"
    os.environ["BENTOML_DO_NOT_TRACK"] = "1"
    os.chdir(Path(__file__).parent)
    serve = ["bentoml", "serve", "bentoml_peer:Mlp", "--host", "127.0.0.1", "--port", sys.argv[2], "--api-workers", "1"]
    os.execvp(serve[0], serve)

import bentoml
import numpy as np
import onnxruntime as ort


@bentoml.service(workers=1, logging={"access": {"enabled": False}}, metrics={"enabled": False})
class Mlp:
    def __init__(self):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["MODEL"], options)

    @bentoml.api
    def predict(self, instances: list) -> dict:
        return {"predictions": self.session.run(None, {"x": np.array(instances, dtype=np.float32)})[0].tolist()}
