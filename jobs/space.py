"""What a project's `tune` section says: the space, what is best, and the settings of a trial.

A trial's *settings* are all of `data`, `train` and `model` by their keys, such as `train.optimizer.learning_rate` or
`data.preprocess.0.buckets`. A *configuration* is what the space chooses of them.
"""

import itertools
from typing import Any

from pydantic import ValidationError

from ..errors import ProjectError
from ..project import FILE, Project, Range, Tune
from .course import falls
from .schedule import FACTOR, MUTABLE, mutable
from .search import Config, Dimension, Space

SEARCHED = ("train.", "model.hp.", "data.")
SHARED = ("train.workers", "train.resources", "train.pipeline", "train.encrypt", "data.source", "data.target", "data.split")
SHARED += ("data.features", "data.task", "data.encrypt", "data.shards")
"""Of all trials: what they run on, and what would make their values incomparable."""
UNRELATED = ("train.resources.", "train.checkpoint.", "train.watch.", "train.encrypt", "train.export", "data.encrypt")
"""Settings that change no value of a trial; and where the data comes from is known by its identity."""
MEASURED = ("parameters", "latency_ms", "seconds")
"""What a trial may be measured for besides its metrics: the model's size, the milliseconds of one prediction, and those that
it took to train."""


def space_of(project: Project) -> Space:
    """The space that a project names. Raises ProjectError with a line for each mistake."""
    tune = tune_of(project)
    problems = [*_keys(project), *_metrics(project), *_schedule(project)]
    try:
        space = Space({key: _dimension(given) for key, given in tune.space.items()}, tuple(tune.constraints))
    except ValueError as error:
        problems.append(f"{FILE}: tune.constraints: {error}")
    if not tune.space:
        problems.append(f"{FILE}: tune.space: is empty: name a key, such as train.optimizer.learning_rate, and its range")
    if project.train.batch_size == "auto" and "train.batch_size" not in tune.space:
        problems.append(f"{FILE}: train.batch_size: auto is found for one model at a time: name a number to tune with")
    if problems:
        raise ProjectError("\n".join(problems))
    return space  # pyright: ignore[reportPossiblyUnboundVariable]


def _keys(project: Project) -> list[str]:
    tune, problems = tune_of(project), []
    for key, given in tune.space.items():
        where = f"{FILE}: tune.space.{key}"
        if not key.startswith(SEARCHED):
            problems.append(f"{where}: cannot be searched: keys of train, model.hp and data can")
        elif shared := next((name for name in SHARED if f"{key}.".startswith(f"{name}.")), None):
            problems.append(f"{where}: cannot be searched: all trials share {shared}")
        elif key.startswith("model.hp.") and key.removeprefix("model.hp.") not in project.model.hp:
            have = ", ".join(project.model.hp) or "none"
            problems.append(f"{where}: model.hp has no such parameter: it has {have}")
        for other in given.when:
            if other not in itertools.takewhile(lambda name, key=key: name != key, tune.space):
                problems.append(f"{where}: when: `{other}` is not searched before it")
        ends = given.choice or given.uniform or given.log_uniform or given.integer or []
        for value in ends if not problems else ():
            try:
                configured(project, {key: value})
            except ValidationError as error:
                said = error.errors()[0]["msg"].removeprefix("Value error, ").removeprefix("Input ")
                problems.append(f"{where}: {value!r}: {said}")
                break
            except (KeyError, IndexError, ValueError, TypeError):
                problems.append(f"{where}: the project has nothing there: write it out, so that it can be changed")
                break
    return problems


def _metrics(project: Project) -> list[str]:
    measured, metrics = _measured(project), metrics_of(project)
    wrong = [name for name in metrics if name not in (*measured, *(MEASURED if metrics[0] != name else ()))]
    also = f", and after the first {', '.join(MEASURED)}" if len(metrics) > 1 else ""
    problems = [f"{FILE}: tune.metric: {name} is not measured: {', '.join(measured)} are{also}" for name in wrong]
    if len(set(metrics)) < len(metrics):
        problems.append(f"{FILE}: tune.metric: names one metric twice")
    return problems


def _schedule(project: Project) -> list[str]:
    tune = tune_of(project)
    if tune.scheduler == "none":
        return []
    problems = []
    if tune.fidelity == "data":
        if tune.scheduler == "pbt":
            problems.append(f"{FILE}: tune.fidelity: pbt trains on all of the data: leave `fidelity` out")
        elif len(shares(project)) == 1:
            least = FACTOR * project.train.fewest_workers
            problems.append(f"{FILE}: tune.fidelity: data.shards is {project.data.shards}: fractions need {least} or more")
    elif tune.grace >= project.train.epochs:
        problems.append(
            f"{FILE}: tune.grace: is {tune.grace}, and trials have {project.train.epochs} epochs: {tune.scheduler} has "
            "nothing to decide: lower `grace` or raise `train.epochs`"
        )
    if tune.scheduler == "pbt" and not any(map(mutable, tune.space)):
        which = ", ".join(f"{name}*" if name.endswith(".") else name for name in MUTABLE)
        problems.append(f"{FILE}: tune.scheduler: pbt changes what can change while a model trains ({which}): search one of them")
    if tune.scheduler == "pbt" and "train.epochs" in tune.space:
        problems.append(f"{FILE}: tune.space.train.epochs: members of a population train for the same epochs")
    return problems


def tune_of(project: Project) -> Tune:
    if project.tune is None:
        raise ProjectError(f"{FILE}: tune: is missing: a section with at least `space`, key to range")
    return project.tune


def shares(project: Project) -> list[float]:
    """Of the training rows (whole shards), that a trial trains on one after the other; the last is all."""
    shards, found = project.data.shards, [project.data.shards]
    while tune_of(project).fidelity == "data" and found[0] >= FACTOR * project.train.fewest_workers and len(found) < 3:
        found.insert(0, max(project.train.fewest_workers, round(found[0] / FACTOR)))
    return [count / shards for count in found]


def _dimension(given: Range) -> Dimension:
    when = tuple((key, tuple(values)) for key, values in given.when.items())
    if given.choice is not None:
        return Dimension(choices=tuple(given.choice), when=when)
    low, high = given.uniform or given.log_uniform or given.integer or [0, 1]
    return Dimension(low, high, given.log or given.log_uniform is not None, given.integer is not None, given.step, (), when)


def metrics_of(project: Project) -> list[str]:
    """What is best; the first counts most."""
    metric = tune_of(project).metric
    regression = project.data.task == "regression" or (project.train.loss or "").startswith("mean")
    return metric if isinstance(metric, list) else [metric or ("val_loss" if regression else "val_accuracy")]


def signs_of(project: Project) -> list[float]:
    """For each metric 1, or -1 where more is better: times its sign, less is better."""
    metrics, mode = metrics_of(project), tune_of(project).mode
    signs = [1.0 if falls(name) or name in MEASURED else -1.0 for name in metrics]
    return [1.0 if mode == "min" else -1.0, *signs[1:]] if mode else signs


def _measured(project: Project) -> list[str]:
    metrics = project.train.metrics or ["accuracy", "mean_absolute_error", "mae"]
    names = ["loss", *metrics]
    return [*names, *(f"val_{name}" for name in names if project.data.split.validation)]


def configured(project: Project, config: Config) -> Project:
    """A project with some of its keys set. Raises pydantic's ValidationError; KeyError, IndexError, ValueError or TypeError for
    a key that leads nowhere."""
    value = project.model_dump(exclude_unset=True, exclude={"tune"})
    for key, given in config.items():
        *path, last = key.split(".")
        here: Any = value
        for part, inner in itertools.pairwise([*path, last]):
            new: Any = [] if inner.isdecimal() else {}
            here = here[int(part)] if isinstance(here, list) else here.setdefault(part, new)
        if isinstance(here, list):
            here[int(last)] = given
        else:
            here[last] = given
    return Project.model_validate(value)


def settings_of(project: Project) -> dict[str, Any]:
    """All that a trial's value depends on, by key, but for the data itself and the code."""
    value = project.model_dump(mode="json", include={"data", "train", "model"})
    value["data"].pop("source")
    found: dict[str, Any] = {}

    def put(key: str, here: Any) -> None:
        inner = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
        for name, each in inner:
            put(f"{key}.{name}" if key else str(name), each)
        if not isinstance(here, (dict, list)) and not key.startswith(UNRELATED):
            found[key] = here

    put("", value)
    return found


def chosen(space: Space, own: dict[str, Any], settings: dict[str, Any]) -> Config | None:
    """The configuration that a trial's settings are in a space, whatever was searched then; None where they are outside, or
    differ from the project's own in what the space does not choose."""
    config: Config = {}
    for key, dimension in space.dimensions.items():
        if all(config.get(other) in values for other, values in dimension.when):
            if key not in settings:
                return None
            config[key] = settings[key]
    rest = (settings.keys() | own.keys()) - config.keys()
    same = all(settings.get(key) == own.get(key) for key in rest)
    return config if same and space.holds(config) else None
