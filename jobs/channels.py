"""Structured pruning: a narrower model, made of a trained one's channels and units that weigh most.

Only this makes a model faster: zeros that are strewn over a kernel are multiplied like other numbers by every engine here, and
shrink nothing but a compressed file. A channel that goes takes a filter of its layer with it, and its input in each layer that
reads it; so the graph is walked twice. First, which layers' channels arrive where: what is added to something else, or read by a
layer that cannot do with fewer inputs (attention, recurrence, a reshape), keeps all its channels. Then the kept ones are chosen,
layer by layer, by the L1 norm of their weights (Li et al., Pruning Filters for Efficient ConvNets, 2017), and the layers are made
anew with what is left of their weights.
"""

import math
from typing import Any

import numpy as np

from ..errors import ModelError
from .layers import matched

WIDTH = {"Dense": "units", "Conv1D": "filters", "Conv2D": "filters", "Conv3D": "filters"}
"""Layers whose channels can go, and the key of their configuration that counts them."""
THROUGH = {
    "Activation", "ReLU", "LeakyReLU", "ELU", "Dropout", "SpatialDropout1D", "SpatialDropout2D", "GaussianNoise",
    "GaussianDropout", "MaxPooling1D", "MaxPooling2D", "MaxPooling3D", "AveragePooling1D", "AveragePooling2D", "AveragePooling3D",
    "GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D", "GlobalMaxPooling1D", "GlobalMaxPooling2D",
    "GlobalMaxPooling3D", "ZeroPadding1D", "ZeroPadding2D", "Cropping1D", "Cropping2D", "UpSampling1D", "UpSampling2D",
}  # fmt: skip
"""What treats each channel alike and alone, and has no weights of it."""
OWN_WEIGHTS = {"BatchNormalization", "DepthwiseConv1D", "DepthwiseConv2D"}
"""What treats each channel alone, with weights of it."""


def narrowed(model: Any, share: float, patterns: list[str], where: str) -> Any:
    """The model without a share of the channels of the layers that patterns mean. Raises ModelError where none can go."""
    import keras

    nodes = _nodes(model)
    layers = {layer.name: layer for layer, *_ in nodes}
    free = matched(patterns, layers, f"{where}.layers") & (_producers(nodes) - _bound(model, nodes))
    if not free:
        kinds = ", ".join(f"{layer.name} ({type(layer).__name__})" for layer in layers.values() if layer.weights)
        raise ModelError(
            f"{where}: of no layer can channels be taken out: the last one and what is added to others keep theirs: {kinds}"
        )
    kept: dict[int, np.ndarray] = {id(t): np.ones(t.shape[-1], bool) for t in model.inputs}
    weights: dict[str, list[np.ndarray]] = {}
    widths: dict[str, int] = {}
    for layer, inputs, output in nodes:
        arriving = [kept[id(t)] for t in inputs]
        leaving = np.ones(output.shape[-1], bool)
        kind = type(layer).__name__
        if layer.name in free:
            leaving = _strongest(layer, share)
            widths[layer.name] = int(leaving.sum())
        elif _passes(layer, kind, inputs):
            if kind == "Concatenate":
                leaving = np.concatenate(arriving)
            elif kind == "Flatten":
                leaving = np.tile(arriving[0], leaving.size // arriving[0].size)
            else:
                leaving = np.repeat(arriving[0], getattr(layer, "depth_multiplier", 1))
        kept[id(output)] = leaving
        weights.setdefault(layer.name, _sliced(layer, arriving[0] if arriving else leaving, leaving))

    def again(layer: Any) -> Any:
        config = layer.get_config()
        if layer.name in widths:
            config[WIDTH[type(layer).__name__]] = widths[layer.name]
        return type(layer).from_config(config)

    made = keras.models.clone_model(model, clone_function=again)
    for layer in made.layers:
        if layer.weights:
            layer.set_weights(weights[layer.name])
    return made


Node = tuple[Any, list[Any], Any]
"""A layer, what it is called with, and what it gives."""


def _nodes(model: Any) -> list[Node]:
    """The calls of a functional or sequential model, in their order."""
    model = getattr(model, "_functional", model)
    found: list[Node] = []
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            if not node.is_input:
                found.append((node.operation, list(node.input_tensors), node.outputs[0]))
    return found


def _producers(nodes: list[Node]) -> set[str]:
    return {layer.name for layer, *_ in nodes if type(layer).__name__ in WIDTH}


def _bound(model: Any, nodes: list[Node]) -> set[str]:
    """Layers whose channels must stay."""
    sources: dict[int, set[str]] = {id(t): set() for t in model.inputs}
    """Of each tensor, the layers that its channels come from."""
    bound: set[str] = set()
    called: set[str] = set()
    for layer, inputs, output in nodes:
        kind, arriving = type(layer).__name__, set().union(*(sources[id(t)] for t in inputs))
        if layer.name in called:  # twice with the same weights: both would have to agree
            bound |= {layer.name} | arriving
        called.add(layer.name)
        if kind in WIDTH:
            grouped = getattr(layer, "groups", 1) > 1
            bound |= arriving | {layer.name} if grouped else set()
            sources[id(output)] = {layer.name}
        elif _passes(layer, kind, inputs):
            sources[id(output)] = arriving
        else:
            bound |= arriving
            sources[id(output)] = set()
    for tensor in model.outputs:
        bound |= sources[id(tensor)]
    return bound


def _passes(layer: Any, kind: str, inputs: list[Any]) -> bool:
    """Whether a layer hands on channels, each for itself."""
    if kind in ("Concatenate", "BatchNormalization"):
        return layer.axis in (-1, len(inputs[0].shape) - 1)
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return False
    if kind == "Activation":
        return getattr(layer.activation, "__name__", "") not in ("softmax", "log_softmax")
    return kind in THROUGH or kind in OWN_WEIGHTS or kind == "Flatten"


def _strongest(layer: Any, share: float) -> np.ndarray:
    """Which channels stay: bool `[channels]`."""
    kernel = np.asarray(layer.kernel)
    norms = np.abs(kernel).reshape(-1, kernel.shape[-1]).sum(axis=0)
    count = max(1, math.ceil(norms.size * (1 - share) - 1e-9))
    stays = np.zeros(norms.size, bool)
    stays[np.argsort(-norms, kind="stable")[:count]] = True
    return stays


def _sliced(layer: Any, arriving: np.ndarray, leaving: np.ndarray) -> list[np.ndarray]:
    """A layer's weights for the channels that arrive and leave."""
    kind, values = type(layer).__name__, layer.get_weights()
    if kind in WIDTH:
        kernel, *rest = values
        return [kernel[..., arriving, :][..., leaving], *(v[leaving] for v in rest)]
    if kind == "BatchNormalization":
        return [v[leaving] for v in values]
    if kind in OWN_WEIGHTS:
        kernel, *rest = values
        return [kernel[..., arriving, :], *(v[leaving] for v in rest)]
    return values
