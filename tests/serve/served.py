"""What the serving tests share: models to serve that were not trained, but written."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from heliograph.cluster.keys import KeyStore
from heliograph.cluster.sealed import Seal, create
from heliograph.datasets.preprocess import Preprocessing
from heliograph.datasets.schema import Feature, Schema
from heliograph.jobs import bundle
from heliograph.jobs.registry import Registry
from heliograph.project import Serve
from heliograph.serve.application import Application, Seen
from heliograph.serve.messages import Answer, Request
from heliograph.serve.metrics import Stats, Tally
from heliograph.serve.models import Models
from onnx import TensorProto, helper, numpy_helper

TENSOR = Schema(
    task="classification",
    target="kind",
    classes=("cat", "dog"),
    features=(Feature(name="x", kind="tensor", shape=(2,)),),
    inputs={"x": (2,)},
)
TABLE = Schema(
    task="regression",
    target="price",
    features=(Feature(name="size"), Feature(name="age", optional=True)),
    inputs={"features": (2,)},
)


def write_bundle(
    folder: Path, keys: KeyStore, name: str, schema: Schema, weights: list[list[float]], sealed: bool = False,
    failed: tuple[str, ...] = (), guard: bytes = b"",
) -> Path:  # fmt: skip
    """A signed bundle whose model is `inputs @ weights`, NaN as 0. failed: what it had to reach. guard: its `guard.npz`."""
    parts = folder.with_name(f"{folder.name}-parts")
    parts.mkdir(parents=True)
    (parts / "schema.json").write_text(schema.model_dump_json())
    ((given, shape),) = schema.inputs.items()
    made = Preprocessing(inputs={given: tuple(f.name for f in schema.features)})
    (parts / "preprocess.json").write_text(made.model_dump_json())
    (parts / "metrics.json").write_text("{}")
    if guard:
        (parts / "guard.npz").write_bytes(guard)
    matrix = np.array(weights, np.float32)
    zero = np.zeros(1, np.float32)
    nodes = [
        helper.make_node("IsNaN", ["in"], ["nan"]),
        helper.make_node("Where", ["nan", "zero", "in"], ["clean"]),
        helper.make_node("MatMul", ["clean", "w"], ["out"]),
    ]
    inputs = [helper.make_tensor_value_info("in", TensorProto.FLOAT, ["n", *shape])]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", matrix.shape[1]])]
    constants = [numpy_helper.from_array(matrix, "w"), numpy_helper.from_array(zero, "zero")]
    graph = helper.make_graph(nodes, "m", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, parts / "model.onnx")
    files = sorted(parts.iterdir())
    if sealed:
        trained = parts / "sealed"  # as a training leaves its models
        trained.mkdir()
        with create(trained / "model.onnx", Seal.make(trained, keys)) as out:
            out.write((parts / "model.onnx").read_bytes())
        files = [*(f for f in files if f.name != "model.onnx"), trained / "model.onnx"]
    folder.mkdir()
    bundle.make(folder, name, {}, files, keys, failed)
    return folder


class Room:
    """An application in this process, without Ray: requests in, answers out."""

    def __init__(self, folder: Path, **options):
        self.folder, self.keys = folder, KeyStore(folder / "keys")
        self.registry = Registry(folder / "registry")
        self.stats, self.options, self.count = Stats(), Serve(**options), 0
        self.tally = Tally()
        self.models = Models(self.registry, self.keys, self.options, 1, self.stats)
        self.application = Application(self.models, self._total, self._first)

    async def _first(self, name: bytes) -> bool:
        return self.tally.first(name)

    async def _total(self) -> Stats:
        return self.stats

    def add(self, name: str, schema: Schema, weights: list[list[float]], sealed: bool = False, **how: Any) -> int:
        self.count += 1
        made = write_bundle(self.folder / f"bundle-{self.count}", self.keys, name, schema, weights, sealed, **how)
        return self.registry.add(name, made)

    def follow(self) -> None:
        asyncio.run(self.models.follow())

    def ask(self, method: str, path: str, body: bytes = b"", kind: str = "application/json", json_length=None) -> Answer:
        return self.request(Request(method, path, kind, body, json_length))

    def request(self, request: Request, seen: Seen | None = None) -> Answer:
        return asyncio.run(self.application.answer(request, seen or Seen()))
