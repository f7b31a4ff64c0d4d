"""The engine: a trained model as a runtime runs it, from raw features to outputs.

Evaluation and the endpoint use this same code, so a metric in the report is a metric of what answers.

    onnx        model.onnx in ONNX Runtime
    litert      model.tflite in LiteRT (where the model converts)
    tensorflow  model.keras as one concrete function
    keras       model.keras, as Keras calls it

Neither of the first two needs TensorFlow in the process. ONNX Runtime 1.29 and later report names, shapes and hashes of the
models that they load to their maker unless ORT_DISABLE_TELEMETRY is set when they are imported: here it is, before that
can happen.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..cluster.keys import KeyStore
from ..cluster.sealed import Seal, read
from ..cluster.storage import in_memory
from ..datasets.preprocess import Preprocessing
from ..datasets.schema import Columns, Schema, as_fed
from ..errors import BundleError
from .display import silenced

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
log = logging.getLogger("heliograph")
Kind = Literal["onnx", "litert", "tensorflow", "keras"]
Wanted = Literal[Kind, "auto", "compressed"]
Forward = Callable[[dict[str, np.ndarray]], np.ndarray]
TOLERANCE = 1e-4
"""How far an engine's outputs may be from ONNX Runtime's, of their largest."""
RUNTIMES: tuple[Kind, ...] = ("onnx", "litert")
COMPRESSED, TABLE = "compressed", "compress.json"
"""What the files of a bundle's compressed form are called, and what tells how it was chosen."""
MOST_PADDED = 1024
"""Rows of a call of an engine that is built anew for each size."""


class Engine:
    """models: a folder that holds the model's files. prepared: one with `schema.json` and `preprocess.json` (both are in a
    bundle). keys: opens what is sealed, in memory. Raises BundleError when the model is not there in the form that this kind
    needs, KeyStoreError and SealError when it cannot be opened."""

    def __init__(
        self,
        models: Path,
        prepared: Path,
        threads: int | None = None,
        kind: Kind = "onnx",
        keys: KeyStore | None = None,
        form: str = "model",
    ):
        self.kind, self.form = kind, form
        described = Seal.of(prepared, keys)
        self.schema = Schema.model_validate_json(read(prepared / "schema.json", described))
        self.preprocessing = Preprocessing.model_validate_json(read(prepared / "preprocess.json", described))
        file = models / FILES[kind].replace("model", form)
        if not file.is_file():
            raise BundleError(f"{models}: holds no {file.name}, which the engine `{kind}` needs")
        opens = {"onnx": _onnx, "litert": _litert, "tensorflow": _tensorflow, "keras": _keras}
        self._forward = opens[kind](read(file, Seal.of(models, keys)), threads or os.cpu_count() or 1, self.schema)

    @classmethod
    def fastest(cls, bundle: Path, threads: int, wanted: Wanted = "auto", keys: KeyStore | None = None) -> "Engine":
        """Whichever of `allowed` answers one row soonest, here and now."""
        seconds = {engine: engine.measure() for engine in cls.allowed(bundle, threads, wanted, keys)}
        log.info("engines: %s", ", ".join(f"{e} {1e6 * s:.0f} µs a row" for e, s in seconds.items()))
        return min(seconds, key=seconds.__getitem__)

    @classmethod
    def allowed(cls, bundle: Path, threads: int, wanted: Wanted = "auto", keys: KeyStore | None = None) -> list["Engine"]:
        """The engines that may answer for a bundle. `auto`: ONNX Runtime, LiteRT where it answers the same, and the compressed
        form, which was held against the model and `compress.require` when it was made; that one alone where the original does
        not meet those. `compressed`: that one."""
        if wanted == "auto" or wanted == "compressed":  # noqa: PLR1714  pyright narrows it so
            small: Kind | None = next((k for k in RUNTIMES if (bundle / FILES[k].replace("model", COMPRESSED)).is_file()), None)
            if wanted == "compressed" and small is None:
                raise BundleError(
                    f"{bundle}: holds no compressed form: write `compress:` into the project file, or `engine: auto`"
                )
            if small is None:
                return cls._agreeing(bundle, threads, keys)
            table = json.loads(read(bundle / TABLE, Seal.of(bundle, keys)))
            others = cls._agreeing(bundle, threads, keys) if wanted == "auto" and table["original_serves"] else []
            return [cls(bundle, bundle, threads, small, keys, COMPRESSED), *others]
        return [cls(bundle, bundle, threads, wanted, keys)]

    @classmethod
    def _agreeing(cls, bundle: Path, threads: int, keys: KeyStore | None) -> list["Engine"]:
        """ONNX Runtime, and LiteRT where it answers the same."""
        reference = cls(bundle, bundle, threads, keys=keys)
        if not (bundle / FILES["litert"]).is_file():
            return [reference]
        other = cls(bundle, bundle, threads, "litert", keys)
        sample = reference.zeros(32, random=True)
        expected, found = reference.forward(sample), other.forward(sample)
        gap = float(np.abs(expected - found).max() / max(1.0, np.abs(expected).max()))
        log.info("onnx and litert differ by %.1e", gap)
        return [reference, other] if gap <= TOLERANCE else [reference]

    def __str__(self) -> str:
        return f"{self.kind} (compressed)" if self.form == COMPRESSED else self.kind

    def predict(self, features: Columns) -> np.ndarray:
        """Features by name, as the schema's kinds have them, to outputs `[rows, schema.outputs]`."""
        return self.forward(self.preprocessing.apply(features))

    def forward(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The model's inputs by name (after preprocessing), to its outputs."""
        return self._forward({name: as_fed(values) for name, values in inputs.items()})

    def zeros(self, rows: int, random: bool = False) -> dict[str, np.ndarray]:
        """Inputs of the right shapes."""
        draw = np.random.default_rng(0)
        return {
            name: draw.normal(size=(rows, *shape)).astype(np.float32) if random and name not in self.schema.ids
            else np.zeros((rows, *shape), np.float32)
            for name, shape in self.schema.inputs.items()
        }  # fmt: skip

    def measure(self, rows: int = 1, calls: int = 30) -> float:
        """The median seconds of a call."""
        inputs, times = self.zeros(rows), []
        for _ in range(calls):
            began = time.perf_counter()
            self.forward(inputs)
            times.append(time.perf_counter() - began)
        return float(np.median(times))


FILES = {"onnx": "model.onnx", "litert": "model.tflite", "tensorflow": "model.keras", "keras": "model.keras"}


def _onnx(content: bytes, threads: int, schema: Schema) -> Forward:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a replica that waits leaves its core to others
    session = ort.InferenceSession(content, options, providers=ort.get_available_providers())
    names = [i.name for i in session.get_inputs()]

    def forward(inputs: dict[str, np.ndarray]) -> np.ndarray:
        fed = {names[0]: next(iter(inputs.values()))} if len(inputs) == 1 else {name: inputs[name] for name in names}
        return np.asarray(session.run(None, fed)[0])

    return forward


def _litert(content: bytes, threads: int, schema: Schema) -> Forward:
    from ai_edge_litert.interpreter import Interpreter

    names = sorted(schema.inputs)
    ready: dict[int, Any] = {}

    def interpreter(rows: int) -> Any:
        """Memory is laid out for one size: so there is one for each power of two."""
        if rows not in ready:
            found = Interpreter(model_content=content, num_threads=threads)
            details = found.get_input_details()
            order = [0] if len(names) == 1 else [next(i for i, d in enumerate(details) if _means(d["name"], n)) for n in names]
            for i, name in zip(order, names, strict=True):
                found.resize_tensor_input(details[i]["index"], [rows, *schema.inputs[name]])
            with silenced():  # that it has a delegate
                found.allocate_tensors()
            ready[rows] = found, [details[i]["index"] for i in order], found.get_output_details()[0]["index"]
        return ready[rows]

    def forward(inputs: dict[str, np.ndarray]) -> np.ndarray:
        rows = len(next(iter(inputs.values())))
        if rows > MOST_PADDED:
            pieces = [{n: v[at : at + MOST_PADDED] for n, v in inputs.items()} for at in range(0, rows, MOST_PADDED)]
            return np.concatenate([forward(piece) for piece in pieces])
        size = padded(rows)
        found, indices, output = interpreter(size)
        for index, name in zip(indices, names, strict=True):
            values = inputs[name]
            if size != rows:
                values = np.concatenate([values, np.zeros((size - rows, *values.shape[1:]), values.dtype)])
            found.set_tensor(index, values)
        found.invoke()
        return found.get_tensor(output)[:rows]

    return forward


def _means(tensor: str, name: str) -> bool:
    """Whether a converted model's tensor, such as `serving_default_image:0`, is the input of that name."""
    return tensor.removeprefix("serving_default_").partition(":")[0] == name


def _keras(content: bytes, threads: int, schema: Schema) -> Forward:
    model = loaded(content)

    def forward(inputs: dict[str, np.ndarray]) -> np.ndarray:
        return np.asarray(model(next(iter(inputs.values())) if len(inputs) == 1 else inputs, training=False))

    return forward


def _tensorflow(content: bytes, threads: int, schema: Schema) -> Forward:
    import tensorflow as tf

    model = loaded(content)
    specs = {name: tf.TensorSpec([None, *shape], tf.float32) for name, shape in schema.inputs.items()}
    alone = len(specs) == 1
    function: Any = tf.function(
        lambda inputs: model(next(iter(inputs.values())) if alone else inputs, training=False), autograph=False
    )
    concrete = function.get_concrete_function(specs)
    order = list(concrete.structured_input_signature[0][0])

    def forward(inputs: dict[str, np.ndarray]) -> np.ndarray:
        rows = len(next(iter(inputs.values())))
        size = padded(rows)  # a shape that was seen before finds its buffers again
        full = {n: v if size == rows else np.resize(v, (size, *v.shape[1:])) for n, v in inputs.items()}
        return np.asarray(concrete({n: tf.constant(full[n]) for n in order}))[:rows]

    return forward


def keras_model(place: Path, keys: KeyStore | None) -> Any:
    """The Keras model of a folder, or in a `.keras` file. Raises BundleError, SealError."""
    file = place / FILES["keras"] if place.is_dir() else place
    return called(loaded(read(file, Seal.of(file.parent, keys))))


def called(model: Any) -> Any:
    """The same: Keras exports no model that was never called."""
    rows = {tensor.name: np.zeros((1, *tensor.shape[1:]), np.float32) for tensor in model.inputs}
    model(rows if len(rows) > 1 else next(iter(rows.values())), training=False)
    return model


def loaded(content: bytes) -> Any:
    import keras

    try:
        with in_memory(content, FILES["keras"]) as file:
            return keras.saving.load_model(file, compile=False, safe_mode=True)
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        raise BundleError(
            f"{FILES['keras']}: Keras cannot load it alone ({text[:160]}): serve it with the engine `onnx`"
        ) from None


def padded(rows: int) -> int:
    """The next power of two."""
    return 1 << (rows - 1).bit_length()
