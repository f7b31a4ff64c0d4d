"""A model in stages trains what the whole model trains, and its checkpoints are the whole model's."""

import itertools
import shutil

import keras
import numpy as np
import pytest
from heliograph.errors import ModelError
from heliograph.jobs.checkpoint import newest, read
from heliograph.jobs.cut import choose, nodes, split
from heliograph.jobs.pipeline import order
from heliograph.project import Optimizer, Pipeline, Resources, Schedule, Stop
from keras import layers

from .test_train import interrupted, job, result, trained  # noqa: F401  job is a fixture

STRATEGY = {
    "optimizer": Optimizer(learning_rate=0.004, global_clipnorm=0.5),
    "schedule": Schedule(name="CosineDecay", warmup=5),
    "stop": Stop(steps=60),
}


def branched() -> keras.Model:
    """A skip connection over several layers."""
    inputs = keras.Input((16,), name="x")
    first = layers.Dense(32, activation="relu", name="first")(inputs)
    second = layers.Dense(32, activation="relu", name="second")(first)
    third = layers.Dense(32, activation="relu", name="third")(second)
    joined = layers.Add(name="joined")([first, third])
    return keras.Model(inputs, layers.Dense(4, activation="softmax", name="last")(joined))


ROWS = np.random.default_rng(0).normal(size=(8, 16)).astype("float32")


@pytest.mark.parametrize("places", [places for n in (1, 2, 3, 4) for places in itertools.combinations((1, 2, 3, 4), n)])
def test_stages_one_after_the_other_are_the_whole_model(places):
    """Also where a skip connection passes straight through a whole stage."""
    model, passed = branched(), [ROWS]
    for stage in split(model, places):
        passed = keras.tree.flatten(stage(passed))
    assert np.allclose(passed[0], model(ROWS), atol=1e-7)


@pytest.mark.parametrize("stages", [2, 3])
def test_each_stage_is_measured_and_weighed(stages):
    model = branched()
    cut = choose(model, stages, ROWS)
    assert len(cut.seconds) == stages and min(cut.seconds) > 0
    assert sum(cut.bytes) == 4 * 4 * model.count_params()


def test_a_cut_can_be_named_and_a_wrong_one_is_refused():
    model, rows = branched(), np.zeros((2, 16), "float32")
    assert choose(model, 2, rows, ["second"]).places == (2,)
    with pytest.raises(ModelError, match="no layer `secund`: it has first, second"):
        choose(model, 2, rows, ["secund"])
    with pytest.raises(ModelError, match="different cuts"):
        choose(model, 3, rows, ["second"])


def test_a_model_that_cannot_be_cut_says_why():
    inputs = keras.Input((4,))
    shared = layers.Dense(4)
    twice = keras.Model(inputs, shared(shared(inputs)))
    with pytest.raises(ModelError, match="cannot be cut into 2 stages: it has 2 operations in a row and 0 places"):
        choose(twice, 2, np.zeros((2, 4), "float32"))

    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ModelError, match="only functional and sequential"):
        nodes(Own())


def test_a_stage_holds_no_more_micro_batches_than_there_are_stages():
    for stages in (2, 3, 4):
        for stage in range(stages):
            held, most = set(), 0
            for kind, micro in order(stage, stages, 8):
                held = held | {micro} if kind == "forward" else held - {micro}
                most = max(most, len(held))
            assert not held
            assert most == stages - stage


def test_a_pipeline_trains_what_one_process_trains_and_either_goes_on_with_the_others_checkpoint(job, tmp_path):  # noqa: F811
    whole = trained(job, tmp_path / "whole", 1, **STRATEGY)
    pipelines = {
        "kept": (1, Pipeline(stages=2, micro_batches=4, recompute="never")),
        "replicas": (2, Pipeline(stages=2, micro_batches=3, recompute="always")),
    }
    for name, (workers, pipeline) in pipelines.items():
        lines = trained(job, tmp_path / name, workers, pipeline=pipeline, resources=Resources(cpus=0.5), **STRATEGY)
        for line, one in zip(lines, whole, strict=True):
            for figure in ("loss", "val_loss", "accuracy", "val_accuracy"):
                assert line[figure] == pytest.approx(one[figure], rel=1e-4), (name, figure)
        assert result(tmp_path / name)["onnx_gap"] < 1e-5
    # The state is the same one, so it can change hands in the middle of an epoch.
    states = [read(newest(tmp_path / name / "checkpoints")[0], None)[1] for name in ("whole", "kept")]
    assert [v.shape for v in states[0]] == [v.shape for v in states[1]]
    assert max(float(np.abs(a - b).max()) for a, b in zip(*states, strict=True) if a.ndim) < 1e-3
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-00000046", tmp_path / "on" / "checkpoints" / "step-00000046")
    lines = trained(job, tmp_path / "on", 1, pipeline=pipelines["kept"][1], **STRATEGY)
    assert lines[-1]["loss"] == pytest.approx(whole[-1]["loss"], rel=1e-4)
