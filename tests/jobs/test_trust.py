"""What a model must show before it goes out: slices, behaviour, attacks, explanations, gates; and every mistake is a line."""

import json
import shutil

import numpy as np
import pytest
from heliograph import project
from heliograph.cluster.keys import KeyStore
from heliograph.datasets.schema import Feature, Schema
from heliograph.errors import BundleError, DataError, ProjectError, RegistryError
from heliograph.jobs.attack import measure
from heliograph.jobs.bundle import verify
from heliograph.jobs.compare import compare, lines, paired, short_names
from heliograph.jobs.compare_report import write as write_page
from heliograph.jobs.evaluate import Sources, evaluate, membership, threshold
from heliograph.jobs.registry import PRODUCTION, Registry
from heliograph.jobs.slices import worst
from heliograph.jobs.suspects import SUSPECTS, issues, out_of_fold, suspects
from heliograph.jobs.validate import require_fits
from heliograph.serve import rollout
from heliograph.trust import Attack, Costs, Evaluate

from ..conftest import executed, iris_project

JUDGED = """\
evaluate:
  baseline: true
  slices: ["petal_length > 4"]
  attack: {epsilon: 0.1, steps: 5, restarts: 1}
  behaviour:
    - {name: steady, test: invariance, change: {length: noise 0.001}}
    - {name: longer petals, test: direction, change: {petal_length: "* 1.2"}, expect: down, of: setosa, where: petal_length < 3}
    - {name: a setosa, test: minimum, expect: setosa, rows: [{length: 5, width: 3.4, petal_length: 1.4, petal_width: 0.2}]}
  require: {accuracy: ">= 0.5 (ci low)", "slice:petal*.accuracy": ">= 0.5", behaviour: ">= 1", robust_accuracy: ">= 1.0"}
explain: {rows: 20, dependence: 1}
"""


@pytest.fixture(scope="module")
def run(cluster, tmp_path_factory):
    folder = iris_project(tmp_path_factory.mktemp("trust") / "iris", epochs=25)
    with (folder / "heliograph.yaml").open("a") as file:
        file.write(JUDGED)
    return executed(folder, cluster)


def asked(**sections) -> project.Project:
    return project.Project.model_validate({"name": "x", "data": {"source": "x.csv"}, **sections})


def read(run, stage: str, name: str):
    return json.loads((run[stage] / name).read_text())


def sources(run) -> Sources:
    keys = KeyStore(run.folder / "keys")
    return Sources(run["prepare"], run["train"], keys, keys)


def test_a_run_says_how_good_its_model_is_and_how_sure_that_is(run):
    test = read(run, "evaluate", "metrics.json")
    low, high = test["intervals"]["accuracy"]
    assert low <= test["accuracy"] <= high
    assert low < high
    (part,) = test["slices"]
    assert part["slice"] == "petal_length > 4"
    assert 0 < part["rows"] < test["rows"]
    assert 0 <= test["membership"]["advantage"] <= 1
    assert [c["class"] for c in test["curves"]] == ["setosa", "versicolor", "virginica"]


def test_gates_and_behaviour_stand_in_the_signed_bundle(run):
    verdict = read(run, "validate", "validation.json")
    gates = {g["gate"]: g for g in verdict["gates"]}
    assert [t["ok"] for t in verdict["behaviour"]] == [True, True, True]
    assert [t["rows"] for t in verdict["behaviour"]][2] == 1
    assert gates["accuracy"]["passed"]
    assert gates["behaviour"]["value"] == 1.0
    assert gates["robust_accuracy"]["value"] == read(run, "attack", "attack.json")["robust_accuracy"] < 1
    assert verdict["reload_gap"] <= 1e-6
    note = verify(run["bundle"], KeyStore(run.folder / "keys").public_key())
    assert note["failed"] == verdict["failed"]
    assert len(note["failed"]) == 1
    card = (run["bundle"] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: heliograph")
    assert "**no**" in card
    assert "petal_length > 4" in card


def test_scikit_learn_stands_beside_the_model_and_nothing_is_hidden(run):
    said = read(run, "baseline", "baseline.json")
    assert [m["name"] for m in said["models"]] == ["logistic regression", "gradient boosting"]
    accuracy = read(run, "evaluate", "metrics.json")["accuracy"]
    for model in said["models"]:
        gap, low, high = model["gap"]["accuracy"]
        assert gap == pytest.approx(accuracy - model["figures"]["accuracy"])
        assert low <= gap <= high
        assert model["verdict"] in ("no difference is shown", "the model is better", "the model is worse")


def test_mlflow_reads_a_run_back(run, tmp_path, monkeypatch):
    from heliograph.jobs import plan, report
    from heliograph.jobs.track import track

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    base = run.folder.parent.parent
    loaded = project.load(base).model_copy(update={"mlflow": str(tmp_path / "mlruns")})
    plan.note(loaded, run.folder)
    made = report.write(loaded, base, run)
    for _ in range(2):  # the second finds that it is logged
        track(loaded, tmp_path, run, made)
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("iris").experiment_id])
    assert found.data.metrics["test_accuracy"] == made["test"]["accuracy"]
    assert found.data.params["train.epochs"] == "25"
    assert [m.step for m in client.get_metric_history(found.info.run_id, "loss")] == list(range(1, 26))
    assert {a.path for a in client.list_artifacts(found.info.run_id)} == {"report.html", "README.md"}
    assert found.info.status == "FAILED"  # one gate is not reached, and the version is not for production


def test_explanations_add_up_and_name_what_counts(run):
    said = read(run, "explain", "explain.json")
    assert said["additivity_gap"] < 0.05
    assert said["mean_size"][0]["column"].startswith("petal")
    assert said["surrogate"]["fidelity"] > 0.8
    assert len(said["dependence"][0]["values"]) > 2
    import pyarrow.parquet as pq

    table = pq.read_table(run["explain"] / "local.parquet")
    assert table.column_names == ["prediction", "length", "width", "petal_length", "petal_width"]
    assert len(table) == 20


def test_a_version_that_failed_goes_into_production_by_force_alone(run, tmp_path):
    models = Registry(tmp_path / "registry")
    assert models.add("iris", run["bundle"]) == 1
    assert models.failed("iris", 1)
    with pytest.raises(RegistryError, match=r"robust_accuracy is .* is required.*--force"):
        models.resolve("iris")
    for percent in (10, 100):
        with pytest.raises(RegistryError, match="not put into production: robust_accuracy"):
            rollout.begin(models, "iris", 1, percent, 0, 1)
    assert PRODUCTION not in models.state("iris").aliases
    assert "failed: robust_accuracy" in models.describe("iris")[0]
    assert rollout.begin(models, "iris", 1, 100, 0, 1, force=True).aliases == {PRODUCTION: 1}
    assert rollout.forced_past(models, "iris", 1)["forced"].startswith("robust_accuracy")
    assert models.resolve("iris") == 1


def test_force_is_written_to_the_audit_log(run, command):
    base = run.folder.parent.parent
    code, output = command("deploy", "iris@1", "--project", base, "--no-wait").finish()
    assert code == 2
    assert output.count("error:") == 1
    assert "not put into production" in output
    code, output = command("deploy", "iris@1", "--project", base, "--no-wait", "--force").finish()
    assert code == 0, output
    log = (run.folder / "keys" / "audit.jsonl").read_text().splitlines()
    last = json.loads(log[-1])
    assert last["what"] == "deploy"
    assert "robust_accuracy" in last["forced"]


def test_a_bundle_whose_verdict_was_changed_is_refused(run, tmp_path):
    from heliograph.errors import SignatureError

    forged = tmp_path / "bundle"
    shutil.copytree(run["bundle"], forged)
    note = json.loads((forged / "bundle.json").read_text())
    (forged / "bundle.json").write_text(json.dumps({**note, "failed": []}))
    with pytest.raises(SignatureError):
        verify(forged, KeyStore(run.folder / "keys").public_key())


def test_a_slice_that_matches_nothing_is_a_line(run, tmp_path):
    settings = Evaluate(slices=["petal_length > 400"])
    with pytest.raises(DataError, match=r"heliograph.yaml: evaluate.slices\[0\]: `petal_length > 400` is true of none of the"):
        evaluate(sources(run), settings, tmp_path, lambda *_: None)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"slices": ["petal > 4"]}, "no feature is called `petal`: did you mean"),
        ({"slices": ["length > long"]}, "is a number, and `long` is none"),
        ({"require": {"rmse": "<= 1"}}, "`rmse` is for numbers, and `species` has classes"),
        ({"require": {"slice:*.recall": ">= 1"}}, "needs slices"),
        ({"costs": {"positive": "setosa"}}, "a threshold is for two classes, and there is 3 classes"),
        ({"behaviour": [{"name": "a", "test": "invariance", "change": {"lenght": "+ 1"}}]}, "did you mean `length`"),
        ({"behaviour": [{"name": "a", "test": "invariance", "change": {"length": "longer"}}]}, "becomes a number, `\\+ 5`"),
        ({"behaviour": [{"name": "a", "test": "direction", "change": {"length": 1}, "expect": "up"}]}, "name the class"),
        ({"behaviour": [{"name": "a", "test": "minimum", "expect": "rose", "rows": [{}]}]}, "`rose` is no class"),
        ({"behaviour": [{"name": "a", "test": "minimum", "expect": "setosa", "rows": [{}]}]}, r"behaviour\[0\].rows"),
    ],
)
def test_what_does_not_fit_the_data_is_a_line_before_anything_is_trained(run, settings, says):
    with pytest.raises(DataError, match=says) as error:
        require_fits(asked(evaluate=settings), Schema.read(run["prepare"]))
    assert str(error.value).startswith("heliograph.yaml: evaluate.")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("evaluate: {require: {acuracy: '>= 1'}}", "`acuracy` is no figure"),
        ("evaluate: {require: {accuracy: 'about 1'}}", "evaluate.require.accuracy: found 'about 1'"),
        ("evaluate: {require: {robust_accuracy: '>= 0.5'}}", "robust_accuracy is measured by an attack"),
        ("evaluate: {require: {latency_p99_ms: '<= 5 (ci high)'}}", "has no interval"),
        ("train: {privacy: {epsilon: 1, noise: 1}}", "`epsilon`, the budget, or `noise`"),
        ("train: {privacy: {epsilon: 1}, xla: true}", "privacy: goes with neither"),
        ("train: {adversarial: {epsilon: 2}}", "less than or equal to 1"),
    ],
)
def test_a_mistake_in_the_project_file_is_a_line(tmp_path, text, says):
    folder = iris_project(tmp_path / "iris")
    lines_ = [line for line in (folder / "heliograph.yaml").read_text().splitlines() if not line.startswith(text[:5])]
    (folder / "heliograph.yaml").write_text("\n".join([*lines_, text]) + "\n")
    with pytest.raises(ProjectError, match=says):
        project.load(folder)


def test_a_regression_has_no_robust_accuracy():
    schema = Schema(task="regression", target="y", features=(Feature(name="x"),))
    with pytest.raises(DataError, match="needs one target with classes"):
        require_fits(asked(evaluate={"attack": {}}), schema)
    with pytest.raises(DataError, match="`accuracy` is for classes, and `y` is a number"):
        require_fits(asked(evaluate={"require": {"accuracy": ">= 1"}}), schema)


def test_a_method_that_cannot_explain_the_data_is_a_line():
    words = Schema(
        task="classification", target="y", classes=(0, 1), features=(Feature(name="x"),), inputs={"x": (9,)}, ids=("x",)
    )
    for method in ("expected_gradients", "lime"):
        with pytest.raises(ProjectError, match=f"explain.method: `{method}` .*: write `permutation`"):
            require_fits(asked(explain={"method": method}), words)
    require_fits(asked(explain={}), words)


def test_an_attack_that_needs_gradients_on_a_model_without_them_is_a_line(run, tmp_path):
    shutil.copy(run["train"] / "model.onnx", tmp_path)
    given = Sources(run["prepare"], tmp_path, sources(run).keys, sources(run).sealing)
    with pytest.raises(BundleError, match=r"evaluate.attack.method: `pgd` needs gradients.*write `method: random`"):
        measure(given, Attack())
    assert measure(given, Attack(method="random", steps=2, restarts=1, rows=10))["rows"] == 10


def test_the_part_that_a_model_does_badly_on_is_found_and_chance_is_not():
    import pyarrow as pa

    rng = np.random.default_rng(0)
    age, region = rng.uniform(20, 80, 2000), rng.choice(["north", "south"], 2000)
    bad = (age > 65) & (region == "north")
    losses = (rng.random(2000) < np.where(bad, 0.5, 0.05)).astype(float)
    columns = {"age": pa.array(age), "region": pa.array(region)}
    found = worst(columns, losses, 3)
    assert "region == north" in found[0]["slice"]
    assert "<= age <=" in found[0]["slice"]
    assert worst(columns, (rng.random(2000) < 0.1).astype(float), 3) == []


def test_the_cheapest_threshold_is_chosen_by_other_rows():
    rng = np.random.default_rng(0)
    schema = Schema(task="classification", target="y", classes=("no", "yes"), features=(Feature(name="x"),))

    def rows(n: int):
        p = rng.random(n)
        return (rng.random(n) < p).astype(int), np.stack([1 - p, p], axis=1).astype("f4")

    found = threshold(Costs(positive="yes", false_negative=4.0), schema, rows(20_000), rows(20_000))
    assert found["threshold"] == pytest.approx(0.2, abs=0.05)  # 1 / (1 + 4), since these probabilities are perfect
    assert found["cost"] < found["cost_at_half"]


def test_membership_shows_where_losses_tell_training_rows():
    rng = np.random.default_rng(0)
    same = membership(rng.exponential(1, 4000), rng.exponential(1, 4000))
    told = membership(rng.exponential(0.1, 4000), rng.exponential(1, 4000))
    assert same["advantage"] < 0.05
    assert told["advantage"] > 0.5
    assert told["auc"] > 0.8


def test_a_better_model_is_told_from_chance():
    rng = np.random.default_rng(0)
    schema = Schema(task="classification", target="y", classes=(0, 1), features=(Feature(name="x"),))
    target = rng.integers(0, 2, 1500)

    def outputs(noise: float) -> np.ndarray:
        p = 1 / (1 + np.exp(-(2 * target - 1 + rng.normal(0, noise, len(target)))))
        return np.stack([1 - p, p], axis=1).astype("f4")

    found = paired(target, outputs(2.0), outputs(1.0), schema)
    assert found["verdict"] == "the second is better"
    assert {row[0]: row[-1] for row in lines(found)}["roc_auc"] == "second"
    assert paired(target, outputs(1.0), outputs(1.0), schema)["verdict"] == "no difference is shown"


def test_a_bundle_is_no_better_than_itself(run, tmp_path):
    keys = KeyStore(run.folder / "keys")
    found = compare((run["bundle"], run["bundle"]), run["prepare"], keys, keys)
    assert found["verdict"] == "no difference is shown"
    assert all(f["low"] == f["high"] == 0 for f in found["figures"].values())
    assert np.sum(found["confusion"], axis=(1, 2)).tolist() == [found["rows"]] * 2
    assert short_names("a/runs/default", "a/runs/<b>") == ("default", "<b>")
    write_page(tmp_path / "page.html", ("default", "<b>"), (run["bundle"], run["bundle"]), found)
    page = (tmp_path / "page.html").read_text()
    assert "<h1>default and &lt;b&gt;</h1>" in page
    assert page.count("<svg") == 3  # differences, confusion, courses
    assert "<h2>What differs</h2><p>Nothing.</p>" in page


def test_wrong_labels_are_found(run, tmp_path):
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(0)
    target = digits.target.copy()
    bad = rng.choice(len(target), len(target) // 20, replace=False)
    target[bad] = (target[bad] + rng.integers(1, 10, len(bad))) % 10
    found = issues(target, out_of_fold(digits.data, target, 10))
    assert np.isin(found, bad).mean() >= 0.7
    said = suspects(run["prepare"], KeyStore(run.folder / "keys"), tmp_path, lambda *_: None)
    lines_ = (tmp_path / SUSPECTS).read_text().splitlines()
    assert said.startswith(f"{len(lines_)} of ")
    assert all(json.loads(line)["label"] != json.loads(line)["suggested"] for line in lines_)
