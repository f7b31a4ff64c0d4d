"""Requests a second of one replica, beside other servers, on the same machine and in turn.

    uv run --group bench python bench/serve.py [repeats] [seconds]

An MLP 784→128→10 in ONNX Runtime, one row a request, 16 connections (`hey`), one replica or worker each. Every server
answers TensorFlow Serving's JSON, MLServer its own (version 2); heliograph answers that too, and its binary form. The peers
run in environments of their own, with the versions that `uv` finds. `batch64` are 64 rows a request.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
from common import end, finish, in_turn, publish

PEERS = Path(__file__).parent / "serve_peers"
WITH = {
    "fastapi": ["fastapi", "uvicorn[standard]", "orjson"],
    "litserve": ["litserve"],
    "bentoml": ["bentoml"],
    "mlserver": ["mlserver"],
    "ray": ["ray[serve]", "orjson"],
}
CONNECTIONS = 16


def write_model(folder: Path) -> None:
    """model.onnx: input `x` [n, 784], output [n, 10]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    shapes = {"w1": (784, 128), "b1": (128,), "w2": (128, 10), "b2": (10,)}
    constants = [numpy_helper.from_array((draw.normal(size=s) / 20).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["o"]),
        helper.make_node("Softmax", ["o"], ["y"]),
    ]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 784])]
    made = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])]
    graph = helper.make_graph(nodes, "mlp", given, made, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "model.onnx")


def write_project(folder: Path, port: int) -> None:
    """A project whose registry holds that model, signed."""
    publish(folder, "mlp", 10, 784, (folder / "model.onnx").read_bytes())
    (folder / "heliograph.yaml").write_text(
        f"name: mlp\ndata: {{source: x.csv, target: y}}\nserve: {{port: {port}, engine: onnx}}\n"
    )


def free_port() -> int:
    from heliograph.cluster.runtime import free_port as find

    return find()


class Server:
    """A server in a process group of its own, ended by its pid."""

    def __init__(self, name: str, folder: Path):
        self.name, self.port = name, free_port()
        if name == "heliograph":
            write_project(folder, self.port)
            command = [sys.executable, "-m", "heliograph", "serve", str(folder)]
        else:
            extra = [a for package in [*WITH[name], "onnxruntime", "numpy"] for a in ("--with", package)]
            script = str(PEERS / f"{name}_peer.py")
            command = ["uv", "run", "--no-project", "--python", "3.11", *extra, "python", script, str(folder), str(self.port)]
        self.log = (folder / f"{name}.log").open("w")
        env = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
        env.pop("VIRTUAL_ENV", None)
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder, env=env
        )

    @property
    def path(self) -> str:
        return {"heliograph": "/v1/models/mlp:predict", "mlserver": "/v2/models/mlp/infer"}.get(self.name, "/predict")

    def wait(self, body: bytes) -> None:
        end = time.monotonic() + 180
        while time.monotonic() < end:
            assert self.process.poll() is None, f"{self.name} ended: see {self.log.name}"
            with contextlib.suppress(httpx.TransportError):
                if httpx.post(f"http://127.0.0.1:{self.port}{self.path}", content=body, headers=JSON).status_code == 200:
                    return
            time.sleep(0.5)
        raise SystemExit(f"{self.name} does not answer: see {self.log.name}")

    def stop(self) -> None:
        end(self.process, 20)


JSON = {"content-type": "application/json"}


def hey(
    url: str, body: Path, seconds: float, kind: str = "application/json", headers: tuple[str, ...] = ()
) -> tuple[float, float]:
    """(requests a second, p99 in milliseconds); every answer must be 200."""
    extra = [a for h in headers for a in ("-H", h)]
    command = ["hey", "-z", f"{seconds}s", "-c", str(CONNECTIONS), "-m", "POST", "-D", str(body), "-T", kind, *extra, url]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    codes = re.findall(r"\[(\d+)\]\s+\d+ responses", out)
    assert codes == ["200"], out[-600:]
    late = re.search(r"99%+ in ([\d.]+)", out) or re.search(r"Slowest:\s+([\d.]+)", out)  # too few for a percentile
    return float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1]), 1000 * float(late[1])


def bodies(folder: Path) -> dict[str, Path]:
    rows = np.random.default_rng(1).random((64, 784)).astype(np.float32).round(4)
    made = {}

    def write(name: str, content: bytes) -> None:
        made[name] = folder / f"{name}.body"
        made[name].write_bytes(content)

    for name, some in (("json", rows[:1]), ("batch64", rows)):
        listed = [[round(float(v), 4) for v in r] for r in some]
        write(name, json.dumps({"instances": listed}).encode())
        tensor = {"name": "x", "shape": [len(some), 784], "datatype": "FP32"}
        write(f"{name}-v2", json.dumps({"inputs": [tensor | {"data": [v for r in listed for v in r]}]}).encode())
    head = tensor | {"shape": [1, 784], "parameters": {"binary_data_size": 784 * 4}}
    wanted = [{"name": "probabilities", "parameters": {"binary_data": True}}]
    text = json.dumps({"inputs": [head], "outputs": wanted}).encode()
    write("binary", text + rows[0].tobytes())
    made["binary-length"] = Path(str(len(text)))
    return made


def main(repeats: int, seconds: float) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as temp:
        folder = Path(temp)
        write_model(folder)
        body = bodies(folder)
        names = ["heliograph", "fastapi", "litserve", "bentoml", "mlserver", "ray"]
        p99: dict[str, list[float]] = {}
        servers: dict[str, Server] = {}

        def run(name: str, which: str = "json", kind: str = "application/json", headers: tuple[str, ...] = ()) -> float:
            server = servers[name]
            path = "/v2/models/mlp/infer" if which in ("binary", "json-v2") else server.path
            if name == "mlserver":
                which = f"{which}-v2"
            hey(f"http://127.0.0.1:{server.port}{path}", body[which], 1, kind, headers)
            rate, late = hey(f"http://127.0.0.1:{server.port}{path}", body[which], seconds, kind, headers)
            p99.setdefault(f"{name} {which}", []).append(late)
            return rate

        try:
            for name in names:
                servers[name] = Server(name, folder)
                servers[name].wait(body["json-v2" if name == "mlserver" else "json"].read_bytes())
            length = (f"Inference-Header-Content-Length: {body['binary-length']}",)
            contenders = {name: lambda name=name: run(name) for name in names}
            contenders["heliograph, binary"] = lambda: run("heliograph", "binary", "application/octet-stream", length)
            contenders["heliograph, version 2"] = lambda: run("heliograph", "json-v2")
            contenders["heliograph, 64 rows"] = lambda: run("heliograph", "batch64")
            contenders["fastapi, 64 rows"] = lambda: run("fastapi", "batch64")
            found = {name: float(np.median(rates)) for name, rates in in_turn(repeats, contenders, "requests/s").items()}
        finally:
            for server in servers.values():
                server.stop()
        for name, late in p99.items():
            print(f"p99 {name:<24} {np.median(late):8.1f} ms")
        ours = found["heliograph"]
        finish(
            {
                "json_vs_ray_default": ours / found["ray"],
                "json_vs_litserve": ours / found["litserve"],
                "json_vs_bentoml": ours / found["bentoml"],
                "json_vs_mlserver": ours / found["mlserver"],
                "v2_json_vs_mlserver": found["heliograph, version 2"] / found["mlserver"],
                "json_vs_fastapi": ours / found["fastapi"],
                "binary_vs_fastapi_json": found["heliograph, binary"] / found["fastapi"],
                "batch64_vs_fastapi": found["heliograph, 64 rows"] / found["fastapi, 64 rows"],
                "p99_vs_litserve": float(np.median(p99["heliograph json"]) / np.median(p99["litserve json"])),
            }
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, float(sys.argv[2]) if len(sys.argv) > 2 else 8)
