"""Names that the command line and the project file share; here the command line finds them without loading all of that file's
sections."""

from enum import StrEnum

FILE = "heliograph.yaml"
"""The project file."""


class Verb(StrEnum):
    """What an access token is for: to ask a model; to read what there is (models, metadata, the pages); to read the counts; to
    train and publish versions; to put a version into production by a rollout that is judged; to do so at once."""

    PREDICT = "predict"
    READ = "read"
    METRICS = "metrics"
    TRAIN = "train"
    DEPLOY = "deploy"
    PROMOTE = "promote"


class Format(StrEnum):
    """What a model is written as for other programs."""

    KERAS = "keras"
    SAVEDMODEL = "savedmodel"
    ONNX = "onnx"
    LITERT = "litert"
