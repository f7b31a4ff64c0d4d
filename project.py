"""The project file: `heliograph.yaml`, typed. Every section is a model; the text under a key says what belongs there."""

import ipaddress
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .errors import ProjectError
from .names import FILE
from .recipes import Compress, Trains
from .settings import Section, read
from .trust import Adversarial, Evaluate, Explain, Privacy


class Split(Section):
    """Shares of the rows, drawn by each row's content and the seed: never by its place or its file."""

    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    test: Annotated[float, Field(gt=0, lt=1)] = 0.1
    seed: int = 0

    @model_validator(mode="after")
    def _leaves_rows_to_train_on(self):
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together must leave rows to train on (their sum below 1)")
        return self


class Step(Section):
    """One preprocessing step. What it fits, it fits on the training split alone."""

    columns: list[str] | None = None
    """The columns that it changes (default: every one that it can)."""


class Impute(Step):
    """Fill empty cells; without this step, a row with an empty number is a bad row."""

    step: Literal["impute"]
    by: Literal["mean", "median", "most_frequent", "constant"] = "mean"
    """`most_frequent` or `constant` for text"""
    value: float | int | str | None = None
    """The constant."""

    @model_validator(mode="after")
    def _has_its_constant(self):
        if (self.by == "constant") != (self.value is not None):
            raise ValueError("`value` goes with `by: constant`, and `by: constant` needs it")
        return self


class Standardise(Step):
    """To mean 0 and deviation 1."""

    step: Literal["standardise"]


class MinMax(Step):
    """To the range 0 to 1."""

    step: Literal["min_max"]


class RobustScale(Step):
    """Median to 0, quartiles one apart: outliers do not move it."""

    step: Literal["robust_scale"]


class Log(Step):
    """sign(x) log(1 + |x|): long tails shorter, zero and negative numbers too."""

    step: Literal["log"]


class Clip(Step):
    """Between two numbers, or between two quantiles of the training rows."""

    step: Literal["clip"]
    low: float | None = None
    high: float | None = None
    quantiles: list[float] | None = None
    """`[0.01, 0.99]`: fitted bounds instead of `low` and `high`"""

    @model_validator(mode="after")
    def _has_bounds(self):
        if (self.quantiles is None) == (self.low is None and self.high is None):
            raise ValueError("clip needs `low` or `high` or both, or `quantiles: [low, high]`")
        if self.quantiles is not None and not (len(self.quantiles) == 2 and 0 <= self.quantiles[0] < self.quantiles[1] <= 1):
            raise ValueError("quantiles are [low, high], with 0 <= low < high <= 1")
        return self


class Bucketise(Step):
    """The number of the bucket that a value lies in."""

    step: Literal["bucketise"]
    edges: list[float] | None = None
    """Between the buckets, rising (default: quantiles, so that all buckets hold the same share of rows)."""
    buckets: Annotated[int, Field(ge=2, le=1000)] = 10

    @field_validator("edges")
    @classmethod
    def _rise(cls, edges: list[float] | None) -> list[float] | None:
        if edges is not None and (not edges or any(a >= b for a, b in itertools.pairwise(edges))):
            raise ValueError("edges should rise, one at least")
        return edges


class OneHot(Step):
    """A 0 or 1 a value; what training has not seen is all 0."""

    step: Literal["one_hot"]
    most: Annotated[int, Field(ge=1)] = 100
    """Values that get a place, the most frequent ones."""


class Ordinal(Step):
    """The number of a value in its order; what training has not seen is 0."""

    step: Literal["ordinal"]
    most: Annotated[int, Field(ge=1)] = 10_000


class Hash(Step):
    """A 0 or 1 a bucket that the value's hash falls into: for text with too many values to list."""

    step: Literal["hash"]
    buckets: Annotated[int, Field(ge=2, le=65536)] = 64


class DateParts(Step):
    """Numbers of a time (UTC): sine and cosine of what comes round, and `trend`, the years since 2000 over 25."""

    step: Literal["date_parts"]
    parts: list[Literal["trend", "month", "day", "weekday", "hour", "minute"]] = ["trend", "month", "weekday", "hour"]


class Tokenise(Step):
    """Text to the ids of its words, `length` of them: 0 fills up, 1 is a word that training has not seen."""

    step: Literal["tokenise"]
    length: Annotated[int, Field(ge=1)] = 64
    vocabulary: Annotated[int, Field(ge=3)] = 20_000
    """Ids, the most frequent words"""
    lower: bool = True


class Pad(Step):
    """Lists of numbers, each of its own length, to one length: cut, or filled up with `value`."""

    step: Literal["pad"]
    length: Annotated[int, Field(ge=1)]
    value: float = 0.0


class Resize(Step):
    """Decode images, and bring them to one size; shards keep bytes, the model gets numbers from 0 to 1."""

    step: Literal["resize"]
    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    channels: Literal[1, 3] = 3
    how: Literal["stretch", "crop", "pad"] = "stretch"
    """`crop` keeps the proportions and the middle; `pad` keeps all and adds black"""


class Normalise(Step):
    """(x - mean) / deviation by numbers that are given, one or one a channel: what a pretrained model expects."""

    step: Literal["normalise"]
    mean: list[float]
    deviation: list[float]


class Function(Step):
    """A column of your own: `def call(a, b) -> values`, given the columns as arrays, in order, and any number of rows."""

    step: Literal["function"]
    call: Annotated[str, Field(pattern=r"^\w+:\w+$")]
    """`file:function` in the project; its file imports NumPy and the standard library at most"""
    name: str
    """of the new column, which other steps may then change"""
    columns: list[str]  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    keep: bool = True
    """Whether the columns that it reads are features still."""


AnyStep = Annotated[
    Impute
    | Standardise
    | MinMax
    | RobustScale
    | Log
    | Clip
    | Bucketise
    | OneHot
    | Ordinal
    | Hash
    | DateParts
    | Tokenise
    | Pad
    | Resize
    | Normalise
    | Function,
    Field(discriminator="step"),
]
Kind = Literal["number", "text", "time", "image", "tensor", "list"]


class Augment(Section):
    """How training rows are varied, anew each epoch. Images are inputs of two or three dimensions."""

    flip: Literal["horizontal", "vertical", "both"] | None = None
    """Mirror every other image."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0
    """Degrees, at most, either way."""
    scale: Annotated[float, Field(ge=0, lt=1)] = 0
    """Larger or smaller by this share, at most."""
    translate: Annotated[float, Field(ge=0, lt=1)] = 0
    """Of the image's height and width, at most."""
    crop: Annotated[float, Field(gt=0, le=1)] = 1
    """The smallest share of height and width that a random window keeps."""
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0
    """More or less by this share, at most."""
    noise: Annotated[float, Field(ge=0)] = 0
    """Deviation of what is added to numbers (which are standardised by default)."""
    mixup: Annotated[float, Field(ge=0)] = 0
    """Alpha of Zhang et al., mixup (2018): each row is blended with another of its step, and so are their losses."""


class Data(Section):
    source: str
    """`sklearn://digits`, a path or glob or `s3://` address of files or of images in folders, or `file:function`"""
    target: str | Annotated[list[str], Field(min_length=2)] = "label"
    """the column to predict (of images: `label`, the folder); several, `[digit, parity]`, make a model of several tasks; a row
    may lack some"""
    features: list[str] | None = None
    """The columns to predict from (default: all others)."""
    weight: str | None = None
    """A column of the rows' weights in the loss, no feature."""
    types: dict[str, Kind] = {}
    """What a column holds, where its file does not say it right; `image` for a column of paths of image files."""
    task: Literal["classification", "regression"] | None = None
    """default: classification for text and for up to 100 whole numbers, else regression"""
    split: Split = Split()
    preprocess: list[AnyStep] | None = None
    """In order (default: what the kinds of the columns suggest; `heliograph check` shows it)."""
    augment: Augment | None = None
    inputs: dict[str, list[str]] | None = None
    """The model's inputs and the columns of each (default: all numbers are `features`, everything else is its own)."""
    unlabelled: bool = False
    """Keep rows without a target, all in the training split: a student (`compress`, a step `distil`) learns there too."""
    max_bad_rows: Annotated[float, Field(ge=0, le=1)] = 0.001
    """The share of rows that may be unusable before the run stops; they go to `quarantine.jsonl`."""
    shards: Annotated[int, Field(ge=1, le=4096)] = 8
    """Files a split is cut into, and so the most workers that can train on it."""
    encrypt: bool = True
    """Encrypt shards at rest (Parquet Modular Encryption, AES-GCM)."""

    @property
    def one(self) -> str:
        """The target, where there is one."""
        assert isinstance(self.target, str)
        return self.target

    @property
    def several(self) -> bool:
        """Whether there are several targets."""
        return not isinstance(self.target, str)

    @property
    def targets(self) -> list[str]:
        return [self.target] if isinstance(self.target, str) else self.target

    @property
    def of_targets(self) -> "list[Data]":
        """The same for each target alone; of several, each may be empty."""
        if not self.several:
            return [self]
        return [self.model_copy(update={"target": name, "unlabelled": True}) for name in self.targets]

    @model_validator(mode="after")
    def _several_targets_are_plain(self):
        if self.several:
            if len(set(self.targets)) < len(self.targets):
                raise ValueError("target names a column twice")
            if self.task or self.unlabelled or (self.augment and self.augment.mixup):
                raise ValueError("several targets go without `task`, `unlabelled` and mixup")
        return self


class Lora(Section):
    """Low-rank adapters (Hu et al., LoRA, 2022) train instead of the layers that they are added to."""

    rank: Annotated[int, Field(ge=1)]
    layers: list[str] = ["*"]
    """patterns of names; of these, the layers that can have adapters: dense, convolution, embedding"""


class Start(Section):
    """A trained model that this one starts from."""

    model: str
    """`NAME` (its production version), `NAME@3` or `NAME@ALIAS` of the registry, the folder of a bundle or of a run, or a
    `.keras` file, such as one that Keras Applications or Keras Hub has saved"""
    head: str | None = None
    """the layer that is replaced by a new one for this task, with all that comes after it (default: the last one with weights)"""
    keep_head: bool = False
    """nothing is replaced: the same classes, more training"""
    freeze: list[str] = []
    """patterns of names, such as `conv*`: these layers stay as they are (batch normalisation among them always does)"""
    unfreeze: dict[Annotated[int, Field(ge=1, strict=False)], list[str]] = {}
    """epoch (from 1 on) to patterns: frozen layers that train from it on"""
    rates: dict[str, Annotated[float, Field(gt=0)]] = {}
    """pattern to factor of the learning rate; the first that matches counts"""
    lora: Lora | None = None
    """trains adapters and the head; everything else stays as it is"""

    @model_validator(mode="after")
    def _lora_freezes(self):
        if self.lora and (self.freeze or self.unfreeze):
            raise ValueError("lora freezes everything but adapters and head: leave `freeze` and `unfreeze` out")
        if self.head and self.keep_head:
            raise ValueError("head names the layer that is replaced, keep_head replaces none: write one of them")
        return self


class Fuse(Section):
    """Models that become one, without training."""

    members: Annotated[list[str], Field(min_length=2)]
    """as in `model.start.model`: `NAME@VERSION`, the folder of a run or a bundle, a `.keras` file"""
    by: Literal["mean", "weighted", "stacking", "soup", "greedy_soup"] = "mean"
    """of the answers: their mean, one weighted by the validation rows, or what a model of them makes of it (`stacking`); of the
    weights, where all members come from one ancestor: their mean (`soup`), or that of those that help (`greedy_soup`)"""


class Model(Section):
    build: Annotated[str, Field(pattern=r"^\w+:\w+$")] = "model:build"
    """`file:function` in the project, such as `model:build`: `def build(schema, hp) -> keras.Model`"""
    preset: Literal["tabular", "image", "text"] | None = None
    """a ready-made model in the place of one's own: a perceptron beside a straight way, a small ResNet, a small transformer"""
    hp: dict[str, bool | int | float | str] = {}
    """handed to `build` as `hp`; of a preset: width, depth, dropout, filters, blocks, heads"""
    start: Start | None = None
    """Begin with the weights of another model, a new head on them."""
    fuse: Fuse | None = None
    """Be made of other models, in the place of a training."""

    @model_validator(mode="after")
    def _is_made_one_way(self):
        made = [name for name in ("preset", "start", "fuse") if getattr(self, name)]
        if len(made) > 1:
            raise ValueError(
                f"a model is a preset, starts from another or is fused of others: write {' or '.join(f'`{n}`' for n in made)}"
            )
        return self

    def started_from(self, place: Path) -> "Model":
        """The same, where what it starts from was found in a place; as it is, where it starts from nothing."""
        return self.model_copy(update={"start": self.start.model_copy(update={"model": str(place)})}) if self.start else self


class Optimizer(BaseModel):
    """A Keras optimizer by its name; every other key is one of its parameters."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str = "adam"
    learning_rate: Annotated[float, Field(gt=0)] = 0.001


class Schedule(BaseModel):
    """A Keras learning-rate schedule by its name, or `OneCycle` or `ReduceLROnPlateau`; every other key is one of its
    parameters. What is left out comes from the run: `decay_steps` are all steps, the initial rate is the optimizer's."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str = "Constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate first rises from zero, before the schedule begins."""


class Resources(Section):
    """What each worker of a training gets."""

    cpus: Annotated[float, Field(ge=0)] = 1
    """CPUs a worker; a fraction lets workers share one"""
    gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs a worker, all mirrored inside it (default: 1 where the cluster has one for each worker)"""
    accelerator: str | None = None
    """A Ray accelerator type, such as `A100`."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"


class Stop(Section):
    """What ends a training before its last epoch."""

    steps: Annotated[int, Field(ge=1)] | None = None
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Of training, over all its interruptions."""
    when: Annotated[str, Field(pattern=r"^\w+ *(>=|<=|>|<) *-?[\d.]+(e-?\d+)?$")] | None = None
    """a metric's threshold, such as `val_accuracy >= 0.98`"""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Epochs without a better `monitor`."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """What counts as better."""


class Checkpoint(Section):
    seconds: Annotated[float, Field(gt=0)] = 60
    """At least this often, besides the end of each epoch."""
    keep: Annotated[int, Field(ge=1)] = 2
    """The newest ones that are kept, besides the best."""


class Watch(Section):
    """What training writes about itself, besides the scalars that it always writes."""

    histograms: bool = False
    """Weights, once an epoch, to TensorBoard."""
    profile: Annotated[int, Field(ge=0)] = 0
    """Steps to profile for TensorBoard, from the twentieth on."""


class Pipeline(Section):
    """Cuts the model into sub-networks, a process (and a device) each; `train.workers` counts the replicas of the whole."""

    stages: Annotated[int, Field(ge=2)]
    micro_batches: Annotated[int, Field(ge=1)] = 8
    """Pieces of a step; the idle share is (stages - 1) / (micro_batches + stages - 1)"""
    recompute: Literal["auto", "always", "never"] = "auto"
    """Whether activations are computed again for the backward pass instead of kept (auto: by the memory there is)."""
    cuts: list[str] | None = None
    """Names of the layers that each stage but the last ends with (default: by measured cost and memory)."""


class Task(Section):
    """Of a model of several tasks, how one of them trains."""

    loss: str | None = None
    """A Keras loss (default: sparse categorical cross-entropy, or mean squared error for a number)."""
    metrics: list[str] | None = None
    """Keras metrics (default: accuracy, or mean absolute error)."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """of its loss in the sum"""


class Train(Section):
    epochs: Annotated[int, Field(ge=1)] = 10
    batch_size: int | Literal["auto"] = 64
    """Rows of one step, over all workers together; `auto`: the largest that fits, found by trial"""
    workers: int | list[int] = 1
    """a number, or `[min, max]` for elastic training"""
    resources: Resources = Resources()
    pipeline: Pipeline | None = None
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    loss: str | None = None
    """A Keras loss (default: sparse categorical cross-entropy, or mean squared error for regression)."""
    metrics: list[str] | None = None
    """Keras metrics (default: accuracy, or mean absolute error)."""
    tasks: dict[str, Task] = {}
    """of several targets, by their names"""
    balance: Literal["weights", "uncertainty"] = "weights"
    """how losses of several targets are summed: by the tasks' weights, or by weights that are learnt with the model (Kendall, Gal
    and Cipolla, 2018)"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    """A weight a class, or `balanced`: the rarer, the heavier."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Pieces that a worker's rows of a step are computed in, to save memory."""
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    xla: bool = False
    """Compile forward and backward with XLA (never the exchange between workers)."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Momentum of a moving average of the weights, which is what is validated and exported."""
    swa: Annotated[int, Field(ge=1)] | None = None
    """The epoch from which on the weights that each epoch ends with are averaged; the mean is what is validated and exported."""
    stop: Stop = Stop()
    monitor: str | None = None
    """The metric that says which checkpoint is best (default: `val_loss`, or `loss` without a validation split)."""
    export: Literal["last", "best"] = "last"
    """Which weights become the bundle."""
    checkpoint: Checkpoint = Checkpoint()
    encrypt: bool = False
    """Seal checkpoints, models and the bundle at rest (AES-256-GCM); replicas open them in memory."""
    adversarial: Adversarial | None = None
    privacy: Privacy | None = None
    """DP-SGD: `{epsilon: 3}` bounds what the model tells of any one row"""
    on_anomaly: Literal["warn", "stop", "rollback"] = "warn"
    """`rollback` goes back to the last good checkpoint and lowers the learning rate."""
    watch: Watch = Watch()
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _averages_one_way(self):
        if self.swa and (self.ema or self.export == "best"):
            raise ValueError("swa averages the last epochs: it goes with neither `ema` nor `export: best`")
        if self.swa and self.swa > self.epochs:
            raise ValueError(f"swa begins with epoch {self.swa}, but there are {self.epochs} epochs")
        return self

    @model_validator(mode="after")
    def _guards_go_together(self):
        if self.pipeline and (self.adversarial or self.privacy):
            raise ValueError("pipeline: goes with neither `adversarial` nor `privacy`")
        if self.privacy and (self.adversarial or self.precision != "float32" or self.xla):
            raise ValueError("privacy: goes with neither `adversarial`, `xla` nor mixed precision")
        if self.privacy and self.class_weights == "balanced":
            raise ValueError("privacy: weights of classes that are counted tell of rows: write them as numbers")
        if self.privacy and self.on_anomaly == "rollback":
            raise ValueError("privacy: steps that are done again are not in the budget: set `on_anomaly` to warn or stop")
        return self

    @field_validator("batch_size", "workers")
    @classmethod
    def _is_at_least_one(cls, given: Any) -> Any:
        if isinstance(given, int) and given < 1:
            raise ValueError("should be greater than or equal to 1")
        return given

    @field_validator("workers")
    @classmethod
    def _is_a_range(cls, workers: int | list[int]) -> int | list[int]:
        if isinstance(workers, list) and not (len(workers) == 2 and 1 <= workers[0] <= workers[1]):
            raise ValueError("a range of workers is [min, max], with 1 <= min <= max")
        return workers

    @property
    def processes(self) -> int:
        """How many work at the same time, at most."""
        return self.most_workers * (self.pipeline.stages if self.pipeline else 1)

    @property
    def fewest_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Replicas(Section):
    """a number, or a section with `min` and `max`"""

    min: Annotated[int, Field(ge=0)]
    """0: none while nobody asks; the first request then waits for a cold start"""
    max: Annotated[int, Field(ge=1)]
    target: Annotated[float, Field(gt=0)] = 16.0
    """requests in flight that a replica shall have on average; one that computes half of the time has as many at least"""
    up_seconds: Annotated[float, Field(ge=0)] = 2.0
    down_seconds: Annotated[float, Field(ge=0)] = 60.0

    @model_validator(mode="after")
    def _in_order(self):
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, max is {self.max}: min must not be larger")
        return self


class Jwt(Section):
    """of an identity provider, beside tokens of our own"""

    issuer: str
    audience: str
    keys: str
    """its public keys (JWKS): an https:// URL, or a file, relative to the key store's folder"""


class Serve(Section):
    host: str = "127.0.0.1"
    """an address of another interface, or 0.0.0.0 for all, needs `tls` and `access: tokens`"""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    replicas: Annotated[int, Field(ge=1)] | Replicas = 1
    per_node: Annotated[int, Field(ge=1)] | None = None
    """replicas on one node at most"""
    cpus: Annotated[float, Field(ge=0)] = 0.0
    """CPUs that a replica reserves, and threads of its engine; below 1 the replicas share the machine's cores"""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that a replica reserves; a fraction shares one"""
    engine: Literal["auto", "compressed", "onnx", "litert", "tensorflow", "keras"] = "auto"
    """`auto` measures ONNX Runtime, LiteRT and the compressed form when a model is loaded and takes the fastest"""
    latency_ms: Annotated[float, Field(gt=0)] = 250.0
    """what a request may take; more requests than can be answered within it are refused with 503"""
    models: Annotated[int, Field(ge=1)] = 4
    """models and versions that a replica holds; the least recently used goes"""
    encrypted: Literal["accepted", "required", "off"] = "accepted"
    """`required` refuses every request in clear, `off` every sealed one"""
    tls: bool = False
    """https, with `tls.crt` and `tls.key` of the key store's folder, taken up again whenever they change"""
    access: Literal["open", "tokens"] = "open"
    """`tokens`: each request needs one that `heliograph token add` made"""
    jwt: Jwt | None = None
    """JSON web tokens of this issuer count as tokens, too"""
    guard: Literal["off", "report", "refuse"] = "off"
    """rows that are unlike the training rows: `report` counts them, and says in the header `unfamiliar-rows` which they are;
    `refuse` answers 422 (a quarter of a millisecond a row)"""
    replays: Literal["answered", "refused"] = "answered"
    """`refused`: a sealed request is answered once, by whichever replica; clients' clocks must be right to a minute"""
    key_grace_seconds: Annotated[float, Field(gt=0)] = 86_400.0
    """how long a key still opens requests after `rotate-keys --requests` made a newer one"""

    @property
    def most_replicas(self) -> int:
        return self.replicas if isinstance(self.replicas, int) else self.replicas.max

    @model_validator(mode="after")
    def _tokens_for_jwt(self):
        if self.jwt and self.access != "tokens":
            raise ValueError("jwt: is read where access is `tokens` only")
        return self

    @field_validator("host")
    @classmethod
    def _is_an_address(cls, host: str) -> str:
        host = "127.0.0.1" if host == "localhost" else host
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise ValueError("should be an IPv4 address of this machine, such as 127.0.0.1, or 0.0.0.0 for all") from None

    @model_validator(mode="after")
    def _public_is_guarded(self):
        lacks = [name for name, there in (("tls: true", self.tls), ("access: tokens", self.access == "tokens")) if not there]
        if lacks and self.host != "127.0.0.1":
            raise ValueError(f"host is {self.host}, which others can reach: that needs {' and '.join(lacks)} beside it")
        if self.access == "tokens" and self.encrypted == "off" and not self.tls:
            raise ValueError("access is tokens, encrypted is off and tls is off: tokens would travel in clear: set `tls: true`")
        return self


Value = bool | int | float | str


class Range(Section):
    """one of `uniform`, `log_uniform`, `integer`: [low, high], or `choice`: [...]"""

    uniform: list[float] | None = None
    log_uniform: list[float] | None = None
    integer: list[int] | None = None
    choice: list[Value] | None = None
    log: bool = False
    """Of whole numbers: as many trials between 1 and 10 as between 10 and 100."""
    step: Annotated[float, Field(gt=0)] | None = None
    """Between values, from the lowest on."""
    when: dict[str, list[Value]] = {}
    """Values of other searched keys that this one is searched for; otherwise it stays as the project has it."""

    @model_validator(mode="after")
    def _is_one_range(self):
        given = [name for name in ("uniform", "log_uniform", "integer", "choice") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("a range is one of uniform, log_uniform, integer (each [low, high]) or choice")
        if self.choice is not None:
            if len(set(map(repr, self.choice))) < max(1, len(self.choice)):
                raise ValueError("choice: name values, each once")
            return self
        ends = self.uniform or self.log_uniform or self.integer or []
        if len(ends) != 2 or not ends[0] < ends[1]:
            raise ValueError(f"{given[0]}: a range is [low, high] with low < high: this one is empty")
        if (self.log_uniform or self.log) and ends[0] <= 0:
            raise ValueError(f"{given[0]}: starts at {ends[0]:g}, which has no logarithm: start above 0")
        if self.step and self.step > ends[1] - ends[0]:
            raise ValueError(f"step is {self.step:g}, more than the range is long")
        return self


class Tune(Section):
    """What `heliograph tune` searches, and how."""

    space: dict[str, Range]
    """key of the project file, such as `train.optimizer.learning_rate` or `model.hp.units`, to its range"""
    constraints: list[str] = []
    """such as `model.hp.units >= model.hp.units2`; every trial keeps them"""
    search: Literal["bayesian", "tpe", "random", "grid"] = "bayesian"
    metric: str | Annotated[list[str], Field(min_length=1)] | None = None
    """what is best (default: `val_accuracy`, or `val_loss` for regression); of several, such as `[val_accuracy, parameters]`, the
    Pareto front is searched (`parameters`, `latency_ms` and `seconds` are measured where they are named)"""
    mode: Literal["max", "min"] | None = None
    """of the first metric (default: min for losses and errors, max for everything else)"""
    tolerance: Annotated[float, Field(ge=0)] = 0.01
    """of several metrics: how much worse than the best one the first may be in the chosen trial, for the sake of the others"""
    trials: Annotated[int, Field(ge=1)] = 20
    hours: Annotated[float, Field(gt=0)] | None = None
    """no trial begins after so many, over all interruptions"""
    dollars: Annotated[float, Field(gt=0)] | None = None
    """no trial begins that would make the run cost more, by the prices of the cluster file"""
    improvement: Annotated[float, Field(ge=0)] = 0.0
    """ends when no more is expected, in deviations of what was found (0.01 is little); 0 does not end it"""
    warm_start: list[str] = []
    """folders of earlier runs that were tuned: their best configurations, moved into this space, are tried first"""
    parallel: Annotated[int, Field(ge=1)] | None = None
    """trials at a time (default: what the cluster holds, 4 at most)"""
    scheduler: Literal["none", "asha", "hyperband", "median", "pbt"] = "none"
    """stops or holds trials that are behind, or (`pbt`) trains a population that takes over what is best"""
    fidelity: Literal["epochs", "data"] = "epochs"
    """what a scheduler saves: epochs, or data (a trial trains on a ninth of the rows, on a third, on all)"""
    grace: Annotated[int, Field(ge=1)] = 3
    """epochs that a trial has before a scheduler judges it; with `pbt`, and between two judgements"""
    keep: Annotated[int, Field(ge=1)] = 3
    """trials whose checkpoints stay, the best"""
    seed: Annotated[int, Field(ge=0)] = 0


NAME = r"[a-z0-9][a-z0-9_-]{0,62}"
"""Of a model."""


class Project(Section):
    name: Annotated[str, Field(pattern=rf"^{NAME}$")]
    """the model's name in URLs: lower-case letters, digits, `-` and `_`"""
    data: Data
    """a section with at least `source` and `target`"""
    model: Model = Model()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    explain: Explain | None = None
    """a section; `explain: {}` is a good beginning"""
    serve: Serve = Serve()
    tune: Tune | None = None
    compress: Compress | None = None
    """a section; `compress: {}` is a good beginning"""
    keys: str | None = None
    """A folder of keys (default: `keys` in the run's folder)."""
    cluster: str | None = None
    """A cluster file, relative to the project, for `heliograph plan` and `heliograph submit`."""
    mlflow: str | None = None
    """where runs are logged for MLflow, too: a folder, relative to the project, such as `mlruns`, or a tracking server's URL"""
    registry: str = "registry"
    """Bundles by name and version: a folder, relative to the project, or `s3://BUCKET/FOLDER`."""

    @model_validator(mode="after")
    def _guards_have_what_they_need(self):
        recipes = self.compress.recipes.values() if self.compress else ()
        if (self.train.adversarial or self.train.privacy) and (self.data.several or self.data.unlabelled):
            raise ValueError("train: `adversarial` and `privacy` need one target that every row has")
        if self.train.privacy and self.data.augment:
            raise ValueError("train.privacy: rows are not varied in a private training: leave `data.augment` out")
        if self.train.privacy and any(isinstance(step, Trains) for steps in recipes for step in steps):
            raise ValueError("compress: a recipe that trains would spend more than train.privacy allows: leave such steps out")
        return self

    @model_validator(mode="after")
    def _workers_have_shards(self):
        workers, batch = self.train.most_workers, self.train.batch_size
        if self.model.start and self.train.pipeline:
            raise ValueError("model.start: a pipeline cannot start from another model: leave `train.pipeline` out")
        if self.model.fuse and (self.train.pipeline or self.tune):
            raise ValueError("model.fuse: trains nothing: leave `train.pipeline` and `tune` out")
        recipes = self.compress.recipes.values() if self.compress else ()
        if self.train.pipeline and any(isinstance(step, Trains) for steps in recipes for step in steps):
            raise ValueError("compress: a recipe cannot train the model of a pipeline: leave such steps out, or `train.pipeline`")
        if self.data.unlabelled and (self.train.pipeline or (self.data.augment and self.data.augment.mixup)):
            raise ValueError("data.unlabelled: neither a pipeline nor mixup can do with rows that have no target")
        if self.data.several:
            if (
                self.train.pipeline
                or self.train.loss
                or self.train.metrics
                or self.train.label_smoothing
                or self.train.class_weights
            ):
                raise ValueError(
                    "data.target: several targets go without `train.pipeline`, `loss`, `metrics`, `label_smoothing` and "
                    "`class_weights`: write loss, metrics and weight of each under `train.tasks`"
                )
            if unknown := [name for name in self.train.tasks if name not in self.data.target]:
                raise ValueError(f"train.tasks: `{unknown[0]}` is no target: there are {', '.join(self.data.target)}")
        elif self.train.tasks or self.train.balance != "weights":
            raise ValueError("train.tasks and train.balance are for several targets: `data: {target: [a, b]}`")
        if workers > self.data.shards:
            raise ValueError(
                f"train.workers is {workers}, but data.shards is {self.data.shards}: "
                "each worker reads shards of its own, so raise data.shards or lower train.workers"
            )
        if isinstance(batch, int) and batch < 2 * workers:
            raise ValueError(f"train.batch_size is {batch}, but {workers} workers need at least {2 * workers} rows a step")
        return self


def load(folder: Path) -> Project:
    """Read and validate `folder/heliograph.yaml`.

    Raises ProjectError with a line for every mistake.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise ProjectError(f"{file}: not found: name a folder that holds a {FILE}, or make one with `heliograph init`")
    return read(file, Project)
