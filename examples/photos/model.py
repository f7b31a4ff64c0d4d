"""A small convolutional network for colour images."""

import keras
from keras import layers


def build(schema, hp):
    image = keras.Input(schema.input_shape)
    x = image
    for filters in (16, 32, 64):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(schema.outputs, activation="softmax")(x))
