"""A small convolutional network for images of one channel."""

import keras
from keras import layers


def build(schema, hp):
    image = keras.Input(schema.input_shape, name="image")
    x = layers.Reshape((*schema.input_shape, 1))(image)
    x = layers.Conv2D(hp.filters, 3, padding="same", activation="relu")(x)
    x = layers.Conv2D(2 * hp.filters, 3, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    x = layers.Dense(hp.units, activation="relu")(x)
    x = layers.Dropout(hp.dropout)(x)
    return keras.Model(image, layers.Dense(schema.outputs, activation="softmax")(x))
