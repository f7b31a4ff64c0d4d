"""Ready-made models: `model: {preset: tabular}`, `image` or `text`.

Every input of the schema gets the encoder that its kind needs, and what they make is joined before the answer:

    numbers   their product with learnt weights (for a column that was one-hot encoded, that is an embedding), then a multilayer
              perceptron, and a straight way to the answer beside it (Cheng et al., Wide and deep learning, 2016): with few rows
              the model is nearly linear, and with many the deep part does the rest
    images    a small residual network (He et al., Identity mappings in deep residual networks, 2016)
    words     a small transformer (Vaswani et al., 2017; normalised before each part, as Xiong et al., 2020, advise), which looks
              at no padding

A preset's name says which of them there must be. `model.hp` changes what `DEFAULTS` says.
"""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..datasets.schema import Schema
from ..errors import ModelError

if TYPE_CHECKING:
    import keras

DEFAULTS: dict[str, dict[str, Any]] = {
    "tabular": {"width": 64, "depth": 1, "dropout": 0.3, "filters": 16, "blocks": 1, "heads": 2},
    "image": {"width": 64, "depth": 1, "dropout": 0.3, "filters": 16, "blocks": 1, "heads": 2},
    "text": {"width": 64, "depth": 1, "dropout": 0.3, "filters": 16, "blocks": 1, "heads": 4},
}
"""width: of hidden layers and of words. depth: of the perceptron. blocks: of a stage of the residual network, or of the
transformer."""


def kind_of(schema: Schema, name: str) -> str:
    """Of an input: `text`, `image` or `tabular`."""
    return "text" if name in schema.vocabulary else "image" if len(schema.inputs[name]) in (2, 3) else "tabular"


def proposed(schema: Schema) -> str:
    """The preset that suits a schema."""
    kinds = {kind_of(schema, name) for name in schema.inputs}
    return next(kind for kind in ("image", "text", "tabular") if kind in kinds)


def preset(name: str, schema: Schema, hp: dict[str, Any]) -> "keras.Model":
    """The model. Raises ModelError where the schema has no input of that kind, and for a parameter that there is not."""
    import keras
    from keras import layers

    if name not in (kinds := {n: kind_of(schema, n) for n in schema.inputs}).values():
        has = ", ".join(f"`{n}` ({kind})" for n, kind in kinds.items())
        raise ModelError(f"model.preset: `{name}` needs an input of its kind, but there is {has}: write `{proposed(schema)}`")
    if unknown := next((key for key in hp if key not in DEFAULTS[name]), None):
        raise ModelError(f"model.hp.{unknown}: the preset `{name}` has {', '.join(DEFAULTS[name])}")
    known = SimpleNamespace(**(DEFAULTS[name] | hp))
    inputs, deep, wide = {}, [], []
    for title, shape in schema.inputs.items():
        inputs[title] = given = keras.Input(shape, name=title)
        kind = kinds[title]
        if kind == "tabular":
            flat = layers.Flatten()(given) if len(shape) > 1 else given
            wide.append(flat)
            deep.append(_perceptron(flat, known))
        else:
            deep.append(
                _words(given, schema.vocabulary[title], shape[0], known) if kind == "text" else _image(given, shape, known)
            )
    joined = layers.Concatenate()(deep) if len(deep) > 1 else deep[0]
    joined = layers.Dropout(known.dropout)(joined)

    outputs = {}
    for alone, _ in schema.parts:
        answer = layers.Dense(alone.outputs)(joined)
        for numbers in wide:
            answer = layers.Add()([answer, layers.Dense(alone.outputs)(numbers)])
        last = layers.Activation("softmax") if alone.classes else layers.Rescaling(alone.scale[1], alone.scale[0])
        outputs[alone.target] = last(answer)
    answers = outputs if schema.tasks else outputs[schema.target]
    return keras.Model(inputs if len(inputs) > 1 else next(iter(inputs.values())), answers, name=name)


def _perceptron(x: Any, hp: Any) -> Any:
    from keras import layers

    for _ in range(hp.depth):
        x = layers.Dense(hp.width, activation="relu")(x)
        x = layers.Dropout(hp.dropout)(x)
    return x


def _image(x: Any, shape: tuple[int, ...], hp: Any) -> Any:
    """Stages of residual blocks, half as high and wide each, until four pixels are left."""
    from keras import layers

    if len(shape) == 2:
        x = layers.Reshape((*shape, 1))(x)
    side, filters = min(shape[:2]), hp.filters
    x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
    stride = 1
    while True:
        for _ in range(hp.blocks):
            y = layers.Activation("relu")(layers.BatchNormalization(momentum=0.9)(x))
            short = layers.Conv2D(filters, 1, strides=stride, use_bias=False)(y) if x.shape[-1] != filters or stride > 1 else x
            y = layers.Conv2D(filters, 3, strides=stride, padding="same", use_bias=False)(y)
            y = layers.Activation("relu")(layers.BatchNormalization(momentum=0.9)(y))
            x = layers.Add()([short, layers.Conv2D(filters, 3, padding="same", use_bias=False)(y)])
            stride = 1
        if side <= 4:
            break
        side, filters, stride = (side + 1) // 2, min(2 * filters, 16 * hp.filters), 2
    x = layers.Activation("relu")(layers.BatchNormalization(momentum=0.9)(x))
    return layers.GlobalAveragePooling2D()(x)


def _words(ids: Any, vocabulary: int, length: int, hp: Any) -> Any:
    """The mean of what the transformer makes of the words that are there."""
    from keras import layers, ops

    there: Any = ops.cast(ops.not_equal(ids, 0), "float32")
    place = layers.Embedding(length, hp.width)(ops.cumsum(there, axis=1) * there - there)  # 0 for the first word, and for padding
    x = layers.Dropout(hp.dropout)(layers.Add()([layers.Embedding(vocabulary, hp.width)(ids), place]))
    for _ in range(hp.blocks):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(hp.heads, max(1, hp.width // hp.heads))(y, y, attention_mask=there[:, None])
        x = layers.Add()([x, layers.Dropout(hp.dropout)(y)])
        y = layers.Dense(4 * hp.width, activation="relu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dropout(hp.dropout)(layers.Dense(hp.width)(y))])
    x = layers.LayerNormalization()(x)
    total: Any = ops.maximum(ops.sum(there, axis=1), 1.0)
    return ops.sum(x * there[:, :, None], axis=1) / total[:, None]
