"""Augmentation: how each row of each epoch is varied, and the variation itself.

Drawn on the host (`draw`) from a hash of the seed, the epoch and the row's position, so a resumed run, or one on more
workers, draws what it would have drawn; done where the model is (`vary`), an image's whole geometry in one resampling.

A row is blended with another row of its shard and step (a random rotation of them), since those are always on one worker.
"""

from typing import Any

import numpy as np

from ..project import Augment
from .shards import mixed

FLIP, ANGLE, SCALE, DOWN, RIGHT, KEPT, TOP, LEFT, CONTRAST, MIX, NOISE = range(11)
"""Which uniform number of a row is for what; from NOISE on one a number."""


def draw(
    how: Augment, shapes: dict[str, tuple[int, ...]], spans: list[np.ndarray], lanes: int, seed: tuple[int, int]
) -> dict[str, np.ndarray]:
    """spans: the positions of a worker's rows, step by step. lanes: shards of the split. seed: and epoch.

    Returns, by name, `[rows, …]`: "geometry NAME" projective transforms `[rows, 8]`, "contrast" factors, "noise NAME"
    `[rows, n]`, and "share" and "partner": the row's own share, and where the other row is, counted from this one.
    """
    key = mixed(np.array([seed[0] * 2654435761 + seed[1]], np.uint64))
    rows = mixed(np.concatenate(spans).astype(np.uint64) ^ key)[:, None]
    found: dict[str, np.ndarray] = {}

    def uniform(which: int, count: int = 1) -> np.ndarray:
        return (mixed(rows + np.arange(which, which + count, dtype=np.uint64)) >> np.uint64(11)) * 2.0**-53

    moves = how.flip or how.rotate or how.scale or how.translate or how.crop < 1
    for name, shape in shapes.items():
        if len(shape) in (2, 3) and moves:
            found[f"geometry {name}"] = _geometry(how, shape[0], shape[1], uniform)
        if len(shape) == 1 and how.noise:
            from scipy.special import ndtri

            tiny = 2.0**-54
            found[f"noise {name}"] = (how.noise * ndtri(uniform(NOISE, shape[0]).clip(tiny, 1 - tiny))).astype(np.float32)
    if how.contrast and any(len(shape) in (2, 3) for shape in shapes.values()):
        found["contrast"] = (1 + how.contrast * (2 * uniform(CONTRAST)[:, 0] - 1)).astype(np.float32)
    if how.mixup:
        from scipy.special import betaincinv

        found["share"] = betaincinv(how.mixup, how.mixup, uniform(MIX)[:, 0]).astype(np.float32)
        found["partner"] = np.concatenate([_partners(span, lanes, seed) for span in spans]).astype(np.int32)
    return found


def _geometry(how: Augment, height: int, width: int, uniform: Any) -> np.ndarray:
    """From places of the new image to places of the old one: what `ImageProjectiveTransformV3` takes."""
    u = uniform(0, CONTRAST)
    flips = u[:, FLIP]
    mirror = np.where(flips < 0.5, -1.0, 1.0)
    both = np.where(flips * 2 % 1 < 0.5, -1.0, 1.0)
    across = {"horizontal": mirror, "both": mirror}.get(how.flip or "", np.ones(len(u)))
    down = {"vertical": mirror, "both": both}.get(how.flip or "", np.ones(len(u)))
    angle = np.deg2rad(how.rotate) * (2 * u[:, ANGLE] - 1)
    kept = how.crop + (1 - how.crop) * u[:, KEPT]
    zoom = kept / (1 + how.scale * (2 * u[:, SCALE] - 1))
    x0 = (width - 1) / 2 + width * (how.translate * (2 * u[:, RIGHT] - 1) + (1 - kept) * (u[:, LEFT] - 0.5))
    y0 = (height - 1) / 2 + height * (how.translate * (2 * u[:, DOWN] - 1) + (1 - kept) * (u[:, TOP] - 0.5))
    a, b = zoom * np.cos(angle) * across, -zoom * np.sin(angle) * down
    c, d = zoom * np.sin(angle) * across, zoom * np.cos(angle) * down
    x, y = (width - 1) / 2, (height - 1) / 2
    zero = np.zeros(len(u))
    return np.stack([a, b, x0 - a * x - b * y, c, d, y0 - c * x - d * y, zero, zero], axis=1).astype(np.float32)


def _partners(span: np.ndarray, lanes: int, seed: tuple[int, int]) -> np.ndarray:
    """For each row of a step, how far off the row is that it is blended with."""
    out = np.zeros(len(span), np.int64)
    for lane in np.unique(span % lanes):
        rows = np.flatnonzero(span % lanes == lane)
        if len(rows) > 1:
            key = np.array([int(span[rows[0]]) * 40503 + seed[0] * 2654435761 + seed[1]], np.uint64)
            turn = 1 + int(mixed(key)[0] % np.uint64(len(rows) - 1))
            out[rows] = np.roll(rows, -turn) - rows
    return out


def specs(how: Augment | None, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """TensorFlow's types of what `draw` gives."""
    import tensorflow as tf

    if how is None:
        return {}
    drawn = draw(how, shapes, [np.zeros(1, np.int64)], 1, (0, 0))
    return {name: tf.TensorSpec((None, *v.shape[1:]), tf.as_dtype(v.dtype)) for name, v in drawn.items()}


def vary(inputs: dict[str, Any], target: Any, draws: dict[str, Any], ids: tuple[str, ...]) -> tuple[dict[str, Any], Any]:
    """A step's inputs, varied, and the target of the row that each is blended with."""
    import tensorflow as tf

    out = dict(inputs)
    for name, values in inputs.items():
        if (geometry := draws.get(f"geometry {name}")) is not None:
            flat = values if values.shape.rank == 4 else values[..., None]
            moved = tf.raw_ops.ImageProjectiveTransformV3(
                images=flat, transforms=geometry, output_shape=tf.shape(flat)[1:3], fill_value=0.0,
                interpolation="BILINEAR", fill_mode="REFLECT",
            )  # fmt: skip
            out[name] = tf.reshape(moved, tf.shape(values))
        if "contrast" in draws and values.shape.rank in (3, 4):
            mean = tf.reduce_mean(out[name], axis=(1, 2), keepdims=True)
            factor = tf.reshape(draws["contrast"], [-1, *[1] * (values.shape.rank - 1)])
            out[name] = (out[name] - mean) * factor + mean
        if (noise := draws.get(f"noise {name}")) is not None and name not in ids:
            out[name] = out[name] + noise
    if "share" not in draws:
        return out, target
    partner = tf.range(tf.shape(target)[0]) + draws["partner"]
    for name, values in out.items():
        if name not in ids:
            share = tf.reshape(draws["share"], [-1, *[1] * (values.shape.rank - 1)])
            out[name] = share * values + (1 - share) * tf.gather(values, partner)
    return out, tf.gather(target, partner)
