"""Transfer: a model that starts from another one, with a new head for its own task.

    RUN/start/model.keras      the model that it starts from, as it was
              start.json       where it came from, and the SHA-256 that its descendants have in common

The body is the other model without its head: the layer that is replaced, and all after it. Layers are named by patterns, as
files are (`conv*`). A layer that stays as it is has weights that no step touches, so they are the same to the bit; one that
trains from a later epoch on has a learning rate of zero until then.

With LoRA the adapters and the head train. They are kept apart (`adapters.npz` in the run's `train`), and merged into the weights
of the model that is exported, which is an ordinary one.
"""

import fnmatch
import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.keys import KeyStore
from ..cluster.sealed import KEY_FILE
from ..cluster.storage import read_json, write_json
from ..datasets.preprocess import Preprocessing
from ..datasets.schema import Schema
from ..errors import ModelError
from ..project import FILE, NAME, Start
from .bundle import verify
from .layers import free, leaves, matched, named
from .model import check_shapes, shapes
from .registry import Registry

SOURCE, NOTE, ADAPTERS = "model.keras", "start.json", "adapters.npz"
HEAD = "head"


# Where it comes from


def find(address: str, base: Path, keys: KeyStore, models: Registry, where: str = f"{FILE}: model.start.model") -> Path:
    """The folder that holds the model of that address, or the `.keras` file. Raises ModelError, RegistryError, SignatureError."""
    place = (base / Path(address).expanduser()).resolve()
    if place.suffix == ".keras":
        if not place.is_file():
            raise ModelError(f"{where}: {place}: there is no such file")
        return place
    if place.is_dir():
        found = next((p for p in (place, place / "bundle") if (p / SOURCE).is_file()), None)
        if found is None:
            raise ModelError(f"{where}: {place}: holds no {SOURCE}, and no run that has a bundle")
    else:
        found = _registered(address, models, where)
        verify(found, keys.public_key())
    if (found / KEY_FILE).exists():
        raise ModelError(f"{where}: {found}: is sealed (`train.encrypt`): start from a model that is not")
    return found


def _registered(address: str, models: Registry, where: str) -> Path:
    name, _, which = address.partition("@")
    versions = models.versions(name) if re.fullmatch(NAME, name) else []
    if not versions:
        raise ModelError(f"{where}: `{address}`: no file, no folder, and no model of the registry {models}")
    version = int(which) if which.isdecimal() else models.state(name).aliases.get(which) if which else models.resolve(name)
    if version not in versions:
        raise ModelError(f"{where}: `{address}`: {name} has the versions {', '.join(map(str, versions))}")
    return models.bundle(name, version)


def digest(found: Path) -> str:
    """SHA-256 of the model that was found."""
    return hashlib.sha256(_file(found).read_bytes()).hexdigest()


def _file(place: Path) -> Path:
    return place / SOURCE if place.is_dir() else place


def take(found: Path, prepared: Path, folder: Path) -> list[str]:
    """Fill the stage's folder; what a person should know of how the two models' inputs differ. Raises ModelError where the
    inputs have other shapes."""
    shutil.copyfile(_file(found), folder / SOURCE)
    note: dict[str, Any] = {"from": str(found), "ancestor": digest(found)}
    said = compared(found, prepared, "model.start")
    if (found / "bundle.json").exists():
        note["lineage"] = read_json(found / "bundle.json")["lineage"]
        note["ancestor"] = note["lineage"].get("ancestor") or note["ancestor"]
    write_json(folder / NOTE, note)
    return said


def compared(found: Path, prepared: Path, where: str) -> list[str]:
    """What a person should know of how another model's inputs and this project's differ. Raises ModelError where shapes do."""
    if not (found / "schema.json").exists():
        return []
    theirs, ours = (Schema.read(p) for p in (found, prepared))
    if list(theirs.inputs.values()) != list(ours.inputs.values()):
        raise ModelError(f"{FILE}: {where}: its inputs are {shapes(theirs.inputs)}, the data's {shapes(ours.inputs)}")
    kinds = [[step.step for step in Preprocessing.read(p).steps] for p in (found, prepared)]
    if kinds[0] == kinds[1]:
        return []
    there, here = (", ".join(k) or "nothing" for k in kinds)
    return [f"{where}: it was trained on inputs prepared by {there}, and now gets them by {here}"]


# The model


def started(start: Start, schema: Schema, lora: bool = True) -> Any:
    """The other model with a new head; frozen as `start` says, and with its adapters where `lora`. `start.model` is a folder
    with the model, or its file. Raises ModelError."""
    import keras

    where = f"{FILE}: model.start"
    source = _loaded(Path(start.model))
    output = source.outputs[0] if start.keep_head else _new_head(source, start.head, schema, where)
    model = keras.Model(source.inputs if len(source.inputs) > 1 else source.inputs[0], output, name=source.name)
    check_shapes(model, schema, where)
    layers = {layer.name: layer for layer in leaves(model)}
    known = {layer.name for layer in leaves(source)} - ({model.layers[-1].name} if start.keep_head else set())
    body = {name: layer for name, layer in layers.items() if name in known}
    if start.lora:
        _adapt(start, body, where, lora)
    frozen, later = matched(start.freeze, body, f"{where}.freeze"), set[str]()
    for epoch, patterns in start.unfreeze.items():
        later |= matched(patterns, {name: body[name] for name in frozen}, f"{where}.unfreeze.{epoch}: of the frozen layers,")
    matched(list(start.rates), layers, f"{where}.rates")
    for name in frozen:
        if name not in later or isinstance(body[name], keras.layers.BatchNormalization):
            body[name].trainable = False
    return model


def _new_head(source: Any, name: str | None, schema: Schema, where: str) -> Any:
    """What a new last layer gives, on what the old one was given."""
    import keras

    head = _head(source, name, where)
    features = head.input
    if isinstance(features, (list, tuple)):
        raise ModelError(f"{where}.head: `{head.name}` has several inputs: name a layer after it")
    if len(features.shape) > 2:
        features = keras.layers.Flatten(name=free(source, "flatten_to_head"))(features)
    made = []
    for alone, _ in schema.parts:
        name = f"{HEAD}_{alone.target}" if schema.tasks else HEAD
        activation = "softmax" if alone.classes else None
        made.append(keras.layers.Dense(alone.outputs, activation=activation, name=free(source, name))(features))
    return keras.layers.Concatenate(name=free(source, "targets"))(made) if schema.tasks else made[0]


def _loaded(place: Path) -> Any:
    import keras

    file = _file(place)
    try:
        model = keras.saving.load_model(file, compile=False, safe_mode=True)
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(f"{FILE}: model.start: Keras cannot load {file}: {text[:200]}") from None
    if not getattr(model, "inputs", None) or not getattr(model, "layers", None):
        raise ModelError(f"{FILE}: model.start: {file}: is no functional or sequential Keras model")
    return model


def _head(source: Any, name: str | None, where: str) -> Any:
    with_weights = [layer for layer in source.layers if layer.weights]
    if not with_weights:
        raise ModelError(f"{where}: the model has no layer with weights")
    if name is None:
        return with_weights[-1]
    found = next((layer for layer in source.layers if layer.name == name), None)
    if found is None:
        raise ModelError(f"{where}.head: the model has no layer `{name}`: it has {named(each.name for each in source.layers)}")
    return found


# LoRA


def _adapt(start: Start, body: dict[str, Any], where: str, lora: bool) -> None:
    assert start.lora
    wanted = matched(start.lora.layers, body, f"{where}.lora.layers")
    able = [name for name in wanted if hasattr(body[name], "enable_lora")]
    if not able:
        raise ModelError(f"{where}.lora.layers: {named(sorted(wanted))}: none of them can have adapters")
    for name, layer in body.items():
        if name in able and lora:
            layer.enable_lora(start.lora.rank)
            if getattr(layer, "bias", None) is not None:
                layer.bias.trainable = False
        else:
            layer.trainable = False


def adapters(model: Any) -> dict[str, np.ndarray]:
    """What LoRA has trained, by layer: `NAME/a`, `NAME/b` and `NAME/scale`, such that it adds scale × a·b to the kernel."""
    found: dict[str, np.ndarray] = {}
    for layer in leaves(model):
        if getattr(layer, "lora_enabled", False):
            a, b = (np.asarray(w) for w in _pair(layer))
            found |= {f"{layer.name}/a": a, f"{layer.name}/b": b, f"{layer.name}/scale": np.array(_scale(layer), np.float32)}
    return found


def merge(model: Any, found: dict[str, np.ndarray]) -> None:
    """Add adapters to the kernels of a model without any. Raises ModelError where it has no such layer, or another shape."""
    layers = {layer.name: layer for layer in leaves(model)}
    for name in {key.rpartition("/")[0] for key in found}:
        a, b, scale = (found[f"{name}/{part}"] for part in ("a", "b", "scale"))
        shape, kernel = (*a.shape[:-1], b.shape[-1]), _kernel(layers.get(name))
        if kernel is None or tuple(kernel.shape) != shape:
            has = "none" if kernel is None else tuple(kernel.shape)
            raise ModelError(f"adapters: layer `{name}`: they are for a kernel of {shape}, the model has {has}")
        kernel.assign(np.asarray(kernel) + scale * (a @ b))


def merged(start: Start, schema: Schema, trained: Any) -> Any:
    """A model without adapters that answers as one with them does."""
    plain = started(start, schema, lora=False)
    others = {layer.name: layer for layer in leaves(trained)}
    for layer in leaves(plain):
        own = others[layer.name]
        if getattr(own, "lora_enabled", False):
            kernel, bias = _kernel(layer), getattr(layer, "bias", None)
            kernel.assign(np.asarray(getattr(own, _kernel_name(own))))
            if bias is not None:
                bias.assign(np.asarray(own.bias))
        else:
            layer.set_weights(own.get_weights())
    return plain


def _pair(layer: Any) -> tuple[Any, Any]:
    kind = _kernel_name(layer)
    return getattr(layer, f"lora_{kind}_a"), getattr(layer, f"lora_{kind}_b")


def _kernel_name(layer: Any) -> str:
    return "embeddings" if hasattr(layer, "lora_embeddings_a") or hasattr(layer, "_embeddings") else "kernel"


def _kernel(layer: Any) -> Any:
    return getattr(layer, f"_{_kernel_name(layer)}", None)


def _scale(layer: Any) -> float:
    return layer.lora_alpha / layer.lora_rank


# Learning rates


def pace(optimizer: Any, model: Any, start: Start, steps_of_epoch: int) -> None:
    """Give each layer's weights their own factor of the learning rate, and none before the epoch that unfreezes them. For an
    optimizer that is not built yet."""
    import tensorflow as tf

    layers = {layer.name: layer for layer in leaves(model)}
    first: dict[str, int] = {}
    for epoch, patterns in sorted(start.unfreeze.items(), reverse=True):
        first |= dict.fromkeys(matched(patterns, layers, "model.start.unfreeze"), epoch)
    frozen = matched(start.freeze, layers, "model.start.freeze")
    held: dict[Any, tuple[int, float]] = {}
    for name, layer in layers.items():
        factor = next((f for pattern, f in start.rates.items() if fnmatch.fnmatch(name, pattern)), 1.0)
        epoch = first.get(name, 1) if name in frozen else 1
        if epoch > 1:
            optimizer.exclude_from_weight_decay(var_list=layer.trainable_variables)
        held |= {optimizer._var_key(variable): (epoch, factor) for variable in layer.trainable_variables}
    if all(value == (1, 1.0) for value in held.values()):
        return
    update = optimizer.update_step

    def paced(gradient: Any, variable: Any, learning_rate: Any) -> Any:
        epoch, factor = held.get(optimizer._var_key(variable), (1, 1.0))
        rate = tf.cast(learning_rate, tf.float32) * factor
        if epoch > 1:
            begun = tf.cast(optimizer.iterations.value, tf.int64) >= (epoch - 1) * steps_of_epoch
            rate = tf.where(begun, rate, 0.0)
        return update(gradient, variable, rate)

    optimizer.update_step = paced
