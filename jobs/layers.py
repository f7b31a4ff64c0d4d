"""The layers of a Keras model by their names, and what patterns of names mean, as of files (`conv*`)."""

import fnmatch
from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import ModelError

MOST_NAMED = 12


def leaves(model: Any) -> Iterator[Any]:
    """The layers that hold no others, in their order."""
    for layer in model.layers:
        if getattr(layer, "layers", None):
            yield from leaves(layer)
        else:
            yield layer


def free(model: Any, name: str) -> str:
    """That name, or one like it that no layer of the model has."""
    taken = {layer.name for layer in leaves(model)} | {layer.name for layer in model.layers}
    return next(n for n in (name, *(f"{name}_{i}" for i in range(1, len(taken) + 2))) if n not in taken)


def matched(patterns: list[str], layers: dict[str, Any], where: str) -> set[str]:
    """The names of layers with weights that the patterns mean. Raises ModelError for a pattern that means none."""
    names = [name for name, layer in layers.items() if layer.weights]
    found: set[str] = set()
    for pattern in patterns:
        new = fnmatch.filter(names, pattern)
        if not new:
            raise ModelError(f"{where}: `{pattern}` matches no layer with weights: there are {named(names)}")
        found |= set(new)
    return found


def named(names: Iterable[str]) -> str:
    """The first of them, and how many more there are."""
    every = list(names)
    return ", ".join(every[:MOST_NAMED]) + (f" and {len(every) - MOST_NAMED} more" if len(every) > MOST_NAMED else "")
