"""What a model with attention looks at: the weights of its attention layers on given rows."""

import io
import zipfile
from typing import Any

import numpy as np

FILE = "attention.npz"
"""Of each layer by its name `[rows, heads, queries, keys]`, of the first rows; `rollout`, where one can be told."""
MOST_ROWS = 200
MOST_PLACES = 64
"""That a map shows, of each side."""


def has_attention(content: bytes) -> bool:
    """Of a `.keras` file, without loading it."""
    config = zipfile.ZipFile(io.BytesIO(content)).read("config.json")
    return any(kind in config for kind in (b"MultiHeadAttention", b"GroupedQueryAttention"))


def weights_of(model: Any, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`[rows, heads, queries, keys]` of each attention layer of Keras, by its name; empty for a model without one.

    The layers are asked for their scores while the model answers; nothing of the model is changed when this returns."""
    import keras

    from .steps import fed

    kinds = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
    layers = [layer for layer in model._flatten_layers(include_self=False) if isinstance(layer, kinds)]
    found: dict[str, np.ndarray] = {}

    def noting(layer: Any) -> Any:
        plain = layer.call

        def call(*given: Any, **named: Any) -> Any:
            out, scores = plain(*given, **named | {"return_attention_scores": True})
            found[layer.name] = np.asarray(scores, np.float32)
            return out

        return call

    for layer in layers:
        layer.call = noting(layer)
    try:
        if layers:
            model(fed(rows), training=False)
    finally:
        for layer in layers:
            del layer.call
    square = {w.shape[-2:] for w in found.values()}
    if len(square) == 1 and len(set(*square)) == 1:
        found["rollout"] = rollout(list(found.values()))
    return found


def rollout(weights: list[np.ndarray]) -> np.ndarray:
    """`[rows, places]`: how much of each place reaches the last layer, on average over its places (Abnar and Zuidema, Quantifying
    attention flow in transformers, 2020). weights: of self-attention layers in their order, `[rows, heads, places, places]`."""
    flow = np.eye(weights[0].shape[-1], dtype=np.float32)[None]
    for layer in weights:
        mixed = (layer.mean(axis=1) + np.eye(layer.shape[-1], dtype=np.float32)) / 2
        flow = mixed / mixed.sum(axis=-1, keepdims=True) @ flow
    return flow.mean(axis=1)


def maps(weights: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """For the report: each layer's mean over rows and heads, `[queries, keys]`, of the first places."""
    return [
        {"layer": name, "heads": w.shape[1], "map": w.mean(axis=(0, 1))[:MOST_PLACES, :MOST_PLACES].tolist()}
        for name, w in weights.items()
        if name != "rollout"
    ]
