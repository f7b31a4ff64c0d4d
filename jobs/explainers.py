"""Local explanations by the libraries `shap` and `lime` (the extra `explain`), as `explain.py` wants them."""

import contextlib
import importlib
import io
from typing import Any

import numpy as np

from .engine import Forward

SAMPLES = 1000
"""Answers that `lime` asks for, a row."""
ANSWERS = 10
"""Times the fewest that `shap` asks for, a row, by permutation."""


def by_shap(kind: str, model: Any, forward: Forward, name: str, rows: np.ndarray, background: np.ndarray, outputs: np.ndarray,
            seed: int) -> np.ndarray:  # fmt: skip
    """`[rows, …]`, the shape of the rows of the model's one input. kind: `shap` asks for answers alone (its permutation
    explainer), `shap_deep` (DeepLIFT: Lundberg and Lee, 2017) and `shap_gradient` need the Keras model."""
    shap: Any = importlib.import_module("shap")
    if kind == "shap":
        shape, flat = rows.shape[1:], rows.reshape(len(rows), -1).astype(np.float64)

        def asked(values: np.ndarray) -> np.ndarray:
            return forward({name: values.reshape(-1, *shape).astype(np.float32)})

        explainer = shap.PermutationExplainer(asked, background.reshape(len(background), -1).astype(np.float64), seed=seed)
        values = explainer(flat, max_evals=ANSWERS * (2 * flat.shape[1] + 1), silent=True).values
    elif kind == "shap_deep":
        values = shap.DeepExplainer(model, background).shap_values(rows, check_additivity=False)
    else:
        values = shap.GradientExplainer(model, background).shap_values(rows, rseed=seed)
    values = np.asarray(values)
    if values.size > rows.size:  # of each output
        values = values.reshape(*rows.shape, -1)
        values = np.stack([v[..., output] for v, output in zip(values, outputs, strict=True)])
    return values.reshape(rows.shape)


def by_lime(forward: Forward, name: str, rows: np.ndarray, background: np.ndarray, outputs: np.ndarray, seed: int) -> np.ndarray:
    """`[rows, numbers]`, by LIME for tables (Ribeiro, Singh and Guestrin, 2016): weights of a linear model around each row, times
    how far the row's number is from the usual one, in deviations."""
    made: Any = importlib.import_module("lime.lime_tabular")
    flat, others = (x.reshape(len(x), -1).astype(np.float64) for x in (rows, background))

    def asked(values: np.ndarray) -> np.ndarray:
        return forward({name: values.reshape(-1, *rows.shape[1:]).astype(np.float32)})

    lime = made.LimeTabularExplainer(others, discretize_continuous=False, random_state=seed, mode="classification")
    values = np.zeros(flat.shape)
    for i, row in enumerate(flat):
        label = int(outputs[i])
        said = lime.explain_instance(row, asked, labels=(label,), num_features=len(row), num_samples=SAMPLES)
        scaled = (row - others.mean(axis=0)) / np.maximum(others.std(axis=0), 1e-9)
        for number, weight in said.local_exp[label]:
            values[i, number] = weight * scaled[number]
    return values


def by_lime_of_images(
    forward: Forward, name: str, rows: np.ndarray, background: np.ndarray, outputs: np.ndarray, patches: np.ndarray, seed: int
) -> np.ndarray:
    """`[rows, patches]`, by LIME for images: weights of a linear model of which patches are seen; the others show the mean of the
    background. patches: `[height, width]`, the number of the patch that each pixel is in."""
    made: Any = importlib.import_module("lime.lime_image")
    grey = rows.ndim == 3 or rows.shape[-1] != 3

    def asked(images: np.ndarray) -> np.ndarray:
        shown = images[..., :1] if grey else images
        return forward({name: shown.reshape(-1, *rows.shape[1:]).astype(np.float32)})

    values = np.zeros((len(rows), patches.max() + 1))
    for i, row in enumerate(rows.astype(np.float64)):
        image = np.repeat(row.reshape(*patches.shape, 1), 3, axis=2) if grey else row
        label = int(outputs[i])
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar, a row
            said = made.LimeImageExplainer(random_state=seed + i).explain_instance(
                image, asked, labels=(label,), hide_color=float(background.mean()), num_samples=SAMPLES,
                num_features=values.shape[1], segmentation_fn=lambda _: patches,
            )  # fmt: skip
        for number, weight in said.local_exp[label]:
            values[i, number] = weight
    return values
