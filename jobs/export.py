"""A Keras model as other programs run it: ONNX, LiteRT, SavedModel; in 32-bit numbers or fewer.

Whatever is written is held against the Keras model on real rows of the project's data before it counts: in full precision it must
agree; where numbers were rounded, it must be finite, and how far it is off is told.

Keras exports a SavedModel, from which LiteRT is made; ONNX is made by tf2onnx (whose own `from_keras` fails on Keras 3).
"""

import contextlib
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.keys import KeyStore
from ..cluster.sealed import Seal, create
from ..cluster.storage import IN_MEMORY
from ..datasets.ingest import Part
from ..datasets.schema import Schema, as_fed
from ..datasets.shards import TARGET, Manifest, SplitName
from ..errors import ModelError
from ..recipes import Calibrated, DynamicRange, Float16, Int4, Int8, Numbers, OnnxInt8
from .engine import FILES, Engine, called
from .steps import fed
from .tasks import named

ROWS = 256
"""On which an export is held against the Keras model."""
GAP = 1e-4
"""How far an export in full precision may be from Keras: of 1, or of the largest value where that is more."""


def sample(prepared: Path, keys: KeyStore | None, split: SplitName, rows: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The first rows of a split as the model gets them, and their targets; of the training rows where the split has none.
    Raises DataError where they are not there any more."""
    manifest = Manifest.read(prepared)
    split = split if manifest.rows(split) else "train"
    part, found = Part(prepared, manifest, split, keys, 0, 1, rows, None), []
    for window in range(part.windows):
        found.append(part.read_window(window, 1))
        if sum(len(columns[TARGET]) for columns in found) >= rows:
            break
    columns = {name: np.concatenate([f[name] for f in found])[:rows] for name in found[0]}
    return {name: as_fed(columns[name]) for name in Schema.read(prepared).inputs}, columns[TARGET]


def answers(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(model(fed(inputs), training=False))


def export(model: Any, prepared: Path, keys: KeyStore | None, folder: Path, seal: Seal | None) -> dict[str, float]:
    """Write `model.keras`, `model.onnx` and, where the model converts and then answers the same, `model.tflite`; `onnx_gap` and
    `litert_gap`, the largest differences from the first on real rows. Raises ModelError."""
    inputs, _ = sample(prepared, keys, "validation", ROWS)
    with _written(folder, seal) as made:
        model.save(made / FILES["keras"], include_optimizer=False)
        _onnx(model, made / FILES["onnx"])
        gaps = {"onnx_gap": difference(model, Engine(made, prepared), inputs)}
        try:
            (made / FILES["litert"]).write_bytes(_litert(model, made))
            gaps["litert_gap"] = difference(model, Engine(made, prepared, kind="litert"), inputs)
        except ModelError:  # operations that LiteRT does not have, or has otherwise: ONNX Runtime serves such a model
            (made / FILES["litert"]).unlink(missing_ok=True)
    return gaps


def difference(model: Any, engine: Engine, inputs: dict[str, np.ndarray]) -> float:
    """Of an export in full precision, the largest on some rows. Raises ModelError where it is too large."""
    return _gap(answers(model, inputs), engine.forward(inputs), FILES[engine.kind])


def _gap(own: np.ndarray, found: np.ndarray, what: str) -> float:
    gap = float(np.abs(own - found).max())
    if not gap <= GAP * max(1.0, float(np.abs(own).max())):
        raise ModelError(f"{what} answers differently from the Keras model, by {gap:.2g}")
    return gap


def quantised(model: Any, numbers: Numbers, prepared: Path, keys: KeyStore | None, folder: Path, seal: Seal | None) -> None:
    """Write the model with fewer bits a number, as `model.onnx` or as `model.tflite`. Raises ModelError, and DataError where
    rows for the calibration are missing."""
    rows, _ = sample(prepared, keys, "train", numbers.rows) if isinstance(numbers, Calibrated) else ({}, None)
    with _written(folder, seal) as made:
        if isinstance(numbers, OnnxInt8):
            _onnx_int8(model, rows, made)
        else:
            four = isinstance(numbers, Int4)
            content = _four_bits(_litert(model, made)) if four else _litert(model, made, numbers, rows)
            (made / FILES["litert"]).write_bytes(content)


def saved_model(model: Any, prepared: Path, keys: KeyStore | None, folder: Path) -> float:
    """Write a SavedModel, as TensorFlow Serving loads it; the largest difference from the Keras model on real rows."""
    import tensorflow as tf

    schema = Schema.read(prepared)
    with _quiet():
        exported = called(named(model, schema)) if schema.tasks else model
        exported.export(folder, format="tf_saved_model", verbose=False)
        inputs, _ = sample(prepared, keys, "validation", ROWS)
        serve = _signature(folder)
        given = _by_name(inputs, serve.structured_input_signature[1])
        answered = serve(**{name: tf.constant(values) for name, values in given.items()})
        if schema.tasks:
            found = np.concatenate([answered[alone.target].numpy() for alone, _ in schema.parts], axis=1)
        else:
            found = next(iter(answered.values())).numpy()
    return _gap(answers(model, inputs), found, f"{folder}:")


def _signature(folder: Path | str) -> Any:
    """What a SavedModel answers with."""
    import tensorflow as tf

    loaded: Any = tf.saved_model.load(str(folder))
    serve = loaded.signatures["serving_default"]
    serve.kept = loaded  # else its variables would go
    return serve


@contextlib.contextmanager
def _written(folder: Path, seal: Seal | None) -> Iterator[Path]:
    """A folder to write models to, which are then put in their place, sealed where there is a seal."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if seal else None) as aside, _quiet():
        yield Path(aside)
        for file in Path(aside).iterdir():
            with create(folder / file.name, seal) as out:
                out.write(file.read_bytes())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Converters say much."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


# ONNX


class _Heard(logging.Handler):
    """tf2onnx leaves out what it cannot express, and says so in its log alone."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found += re.findall(r"op \[(\S+): (\w+)\] is not supported", record.getMessage())


def _onnx(model: Any, file: Path) -> None:
    heard, log = _Heard(), logging.getLogger("tf2onnx.tfonnx")
    log.addHandler(heard)
    log.propagate = False
    try:
        model.export(file, format="onnx", verbose=False)
    finally:
        log.removeHandler(heard)
        log.propagate = True
    if heard.found:
        raise _inexpressible("ONNX", [(op, node) for node, op in heard.found], model, "write the layer with other operations")


def _onnx_int8(model: Any, rows: dict[str, np.ndarray], made: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    whole, ready = made / "whole.onnx", made / "ready.onnx"
    _onnx(model, whole)
    try:
        quant_pre_process(str(whole), str(ready), skip_symbolic_shape=True)
        given = _by_name(rows, [tensor.name for tensor in _session(ready).get_inputs()])

        class Rows(CalibrationDataReader):
            def __init__(self) -> None:
                self.left = _each(given)

            def get_next(self) -> Any:
                return next(self.left, None)

        quantize_static(
            str(ready), str(made / FILES["onnx"]), Rows(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    except Exception as error:
        raise ModelError(
            f"onnx_int8: ONNX Runtime cannot round this model ({_first(error)}): use `int8` or `dynamic_range`"
        ) from None
    finally:
        whole.unlink(missing_ok=True)
        ready.unlink(missing_ok=True)


def _session(file: Path) -> Any:
    import onnxruntime as ort

    return ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def _by_name(inputs: dict[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Inputs as an exported model calls them; one alone may have another name there."""
    return {name: inputs[name] if name in inputs else next(iter(inputs.values())) for name in names}


def _each(inputs: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """One row after the other."""
    for i in range(len(next(iter(inputs.values())))):
        yield {name: values[i : i + 1] for name, values in inputs.items()}


# LiteRT


def _litert(model: Any, made: Path, numbers: Numbers | None = None, rows: dict[str, np.ndarray] | None = None) -> bytes:
    import tensorflow as tf

    with tempfile.TemporaryDirectory(dir=made) as folder:
        model.export(folder, format="tf_saved_model", verbose=False)
        converter: Any = tf.lite.TFLiteConverter.from_saved_model(folder)
        if numbers:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        match numbers:
            case Float16():
                converter.target_spec.supported_types = [tf.float16]
            case Int8():
                given = _by_name(rows or {}, _signature(folder).structured_input_signature[1])
                converter.representative_dataset = lambda: _each(given)
                converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            case DynamicRange() | None:
                pass
        try:
            return converter.convert()
        except Exception as error:
            ops = re.findall(r'fused\["\w+:", "([^"@]+)[^"]*"\][^\n]*: \'tf\.(\w+)\' op is neither', str(error))
            if ops:
                raise _inexpressible(
                    "LiteRT", [(op, node) for node, op in ops], model, "use `onnx_int8`, or write the layer with other operations"
                ) from None
            said = numbers.step if numbers else "float32"
            raise ModelError(f"{said}: LiteRT cannot convert this model ({_first(error)}): use `onnx_int8`") from None


def _four_bits(content: bytes) -> bytes:
    from ai_edge_quantizer import quantizer, recipe

    try:
        found = quantizer.Quantizer(bytearray(content), recipe.dynamic_wi4_afp32())
        return bytes(found.quantize(enable_progress_report=False).quantized_model or b"")
    except Exception as error:
        raise ModelError(f"int4: ai-edge-quantizer cannot round this model ({_first(error)}): use `dynamic_range`") from None


def _inexpressible(form: str, ops: list[tuple[str, str]], model: Any, instead: str) -> ModelError:
    """ops: operation and the node that it is."""
    names = {layer.name for layer in model._flatten_layers(include_self=False)}
    said = []
    for op, node in ops:
        parts = [re.sub(r"_\d+$", "", part) if part not in names else part for part in node.split("/")]
        layer = next((part for part in parts if part in names), parts[0])
        said.append(f"`{op}` of the layer `{layer}`")
    return ModelError(f"{form} cannot express {' and '.join(dict.fromkeys(said))}: {instead}")


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
