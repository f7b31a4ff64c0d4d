"""Private training: how much noise a budget needs, and what a training has spent of it.

A training tells whoever sees the model little of any one row: the budget (epsilon, delta) bounds it (Dwork and Roth, The
algorithmic foundations of differential privacy, 2014). Each step is one Poisson-sampled Gaussian mechanism on the sum of clipped
gradients, and Google's dp-accounting composes them by privacy loss distributions (Koskela et al., 2020). What is fitted before
the training (`data.preprocess`, the schema's classes) and what is chosen by validation rows is not in the budget.
"""

from typing import Any

from ..datasets.shards import Manifest
from ..errors import ModelError
from ..project import FILE, Train
from .layers import leaves

MOST_NOISE = 200.0
CLOSE = 1e-3
"""Of the budget, that the noise may leave unused."""


def delta_of(train: Train, rows: int) -> float:
    return (train.privacy and train.privacy.delta) or 1 / (1.1 * rows)


def spent(noise: float, share: float, steps: int, delta: float) -> float:
    """The epsilon of `steps` steps that each row is in with the probability `share`. noise: deviation over the clip."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    if not steps:
        return 0.0
    mechanism: Any = dp_accounting.GaussianDpEvent(noise)
    if share < 1:
        mechanism = dp_accounting.PoissonSampledDpEvent(share, mechanism)
    return float(PLDAccountant().compose(dp_accounting.SelfComposedDpEvent(mechanism, steps)).get_epsilon(delta))


def noise_of(train: Train, manifest: Manifest, batch_size: int, steps: int) -> float:
    """The noise of a training, in clips: as it is written, or the least that keeps its budget. Raises ModelError."""
    assert train.privacy
    if train.privacy.noise is not None:
        return train.privacy.noise
    rows = manifest.rows("train")
    share, delta, budget = min(1.0, batch_size / rows), delta_of(train, rows), train.privacy.epsilon or 0.0
    low, high = 0.0, 1.0
    while spent(high, share, steps, delta) > budget:
        low, high = high, 2 * high
        if high > MOST_NOISE:
            raise ModelError(
                f"{FILE}: train.privacy.epsilon: {budget:g} cannot be kept in {steps} steps over {rows:,} rows: train for fewer "
                "epochs, take smaller steps, or allow more"
            )
    while high - low > CLOSE * high:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle, share, steps, delta) > budget else (low, middle)
    return high


def require_private(model: Any) -> None:
    """Raises ModelError for a model whose rows are not on their own."""
    mixes = next((layer.name for layer in leaves(model) if type(layer).__name__ == "BatchNormalization"), None)
    if mixes:
        raise ModelError(
            f"train.privacy: the layer `{mixes}` (batch normalisation) lets rows of a step see each other, so no row's gradient "
            "is its own: use LayerNormalization or GroupNormalization"
        )
    if model.losses:
        raise ModelError("train.privacy: the model adds losses of its own (regularizers): use `optimizer: {weight_decay: ...}`")
