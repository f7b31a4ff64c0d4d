"""Ray Serve as it comes, one replica, the body read by hand: FOLDER PORT."""

import os
import sys

os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
import numpy as np
import onnxruntime as ort
import orjson
import ray
from ray import serve
from ray.serve.config import HTTPOptions
from starlette.responses import Response


@serve.deployment(num_replicas=1, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0})
class Mlp:
    def __init__(self, file: str):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(file, options)

    async def __call__(self, request):
        rows = np.array(orjson.loads(await request.body())["instances"], dtype=np.float32)
        found = self.session.run(None, {"x": rows})[0].tolist()
        return Response(orjson.dumps({"predictions": found}), media_type="application/json")


ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
serve.start(http_options=HTTPOptions(host="127.0.0.1", port=int(sys.argv[2])))
serve.run(Mlp.bind(f"{sys.argv[1]}/model.onnx"), route_prefix="/predict", blocking=True)
