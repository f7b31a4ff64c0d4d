"""The command line: a command is a few lines; the rooms do the work.

Exit codes: 0 done, 1 a bug of ours (its traceback is in the run's log), 2 a mistake that the message explains,
130 Ctrl-C and 143 SIGTERM (the same command goes on from there).
"""

import contextlib
import getpass
import os
import re
import shutil
import signal
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from . import __version__, project
from .errors import ProjectError, RegistryError, RunError


class _Commands(TyperGroup):
    """Runs a command and turns what it raises into a line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        stopped: list[int] = []

        def stop(number: int, _: Any) -> None:
            stopped.append(number)
            raise KeyboardInterrupt

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, TyperException):
            raise
        except (KeyboardInterrupt, Exception) as error:
            # Ray may turn the interruption into an error of its own: an actor that died with it.
            if (stopped and not isinstance(error, RunError)) or isinstance(error, KeyboardInterrupt):
                typer.echo("interrupted: the same command goes on from here", err=True)
                code = 128 + (stopped or [signal.SIGINT])[0]
            else:
                code = _say(error)
        raise typer.Exit(code)


def _say(error: Exception) -> int:
    """Print an error as a person needs it; the exit code that goes with it."""
    from .cluster.runtime import explained

    mistake = explained(error)
    if mistake is not None:
        for line in str(mistake).splitlines():
            typer.echo(f"error: {line}", err=True)
        return 2
    text = (str(error).strip().splitlines() or [""])[-1]
    typer.echo(f"bug: {type(error).__name__}: {text[:300]}", err=True)
    typer.echo("this is heliograph's mistake, not yours: please report it with the traceback in the run's run.log", err=True)
    return 1


app = typer.Typer(
    cls=_Commands,
    name="heliograph",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From raw data to a private prediction: prepare, train, evaluate, sign and serve a Keras model on Ray.\n\n"
    "Start with:  heliograph init my-project && heliograph run my-project",
)
ProjectFolder = Annotated[Path, typer.Argument(help=f"A folder that holds a {project.FILE}.")]
RunFolder = Annotated[Path | None, typer.Option("--run", help="The run's folder (default: PROJECT/runs/default).")]
Trust = Annotated[Path | None, typer.Option(help="The public key (signing.pub) that must have signed the endpoint's keys.")]
Port = Annotated[int | None, typer.Option(help="Listen on this port instead of the project's serve.port.", min=1, max=65535)]


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="A new folder.")]) -> None:
    """Write a project that runs: a heliograph.yaml and a model.py to change.

    Example:  heliograph init my-project
    """
    if (folder / project.FILE).exists() or (folder / "model.py").exists():
        raise ProjectError(f"{folder}: holds a project already: name another folder")
    name = "".join(c if c.isalnum() else "-" for c in folder.resolve().name.lower()).strip("-") or "project"
    template = Path(__file__).parent / "examples" / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(template / "model.py", folder / "model.py")
    text = (template / project.FILE).read_text().replace("name: digits\n", f"name: {name[:63]}\n")
    (folder / project.FILE).write_text(text)
    typer.echo(f"{folder}: a project that classifies handwritten digits; next: heliograph run {folder}")


@app.command()
def check(folder: ProjectFolder) -> None:
    """Validate a project without starting anything: its file, its data's schema, its model on that schema.

    Example:  heliograph check examples/digits
    """
    loaded = project.load(folder)
    from .jobs.check import check as check_project

    for line in check_project(loaded, folder.resolve()):
        typer.echo(line)


@app.command()
def run(
    folder: ProjectFolder,
    run: RunFolder = None,
    port: Port = None,
    registry: Annotated[Path | None, typer.Option(help="Publish the model here instead of the project's `registry`.")] = None,
) -> None:
    """Run a project: prepare, train, evaluate, bundle, then one sealed request to a real endpoint.

    What is done is kept: the same command goes on where it was stopped, and a change reruns only what depends on it.

    Example:  heliograph run examples/digits
    """
    loaded = _with_port(project.load(folder), port)
    if registry:
        loaded = loaded.model_copy(update={"registry": str(registry.resolve())})
    from .cluster.runtime import joined
    from .jobs import report
    from .jobs.display import Display, stage_table
    from .jobs.run import execute, key_store, opened
    from .serve import first_request
    from .serve.access import require_role

    require_role(key_store(loaded, folder.resolve(), _run_folder(folder, run)), project.Verb.TRAIN, loaded.name)
    display = Display()
    with opened(_run_folder(folder, run), loaded.train.processes, display) as current:
        if not joined():
            first_request.require_port(loaded, current)
        version = execute(loaded, folder.resolve(), current)
        if not joined():  # a cluster's own endpoints are for what it serves
            first_request.execute(loaded, folder.resolve(), current)
        result = report.write(loaded, current)
    display.console.print(stage_table(result["stages"]))
    for line in report.summary(result):
        typer.echo(line)
    typer.echo(f"model: {loaded.name}@{version} in {folder / loaded.registry}")
    serving = "" if joined() else f"; to keep serving: heliograph serve {folder}"
    typer.echo(f"report: {_run_folder(folder, run) / 'report.html'}{serving}")


ClusterFile = Annotated[Path | None, typer.Option("--cluster", help="The cluster file (default: the project's `cluster`).")]


@app.command()
def plan(
    folder: ProjectFolder,
    cluster: ClusterFile = None,
    run: RunFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Show which nodes a run would launch on a cluster, stage by stage, and what they cost. Nothing is launched.

    Ray's own scheduler is asked, on paper. What can never be placed is said, with what would help (exit code 2); Ray itself
    would wait for it for ever. An earlier run in --run tells how long it takes.

    Example:  heliograph plan examples/digits --cluster gpus.yaml
    """
    import json
    from dataclasses import asdict

    from .jobs.plan import lines
    from .jobs.plan import plan as make

    loaded = project.load(folder)
    file = _cluster_file(loaded, folder, cluster)
    made = make(loaded, file, _run_folder(folder, run))
    if as_json:
        typer.echo(json.dumps(asdict(made)))
    else:
        for line in lines(made):
            typer.echo(line)
    if made.problems:
        raise ProjectError("\n".join(f"{file}: {problem}" for problem in made.problems))


Name = Annotated[str, typer.Argument(help="The run's name.")]
Address = Annotated[str | None, typer.Option(help="Of the cluster's job API, http://HOST:8265 (token: RAY_AUTH_TOKEN).")]


@app.command()
def submit(
    folder: ProjectFolder,
    cluster: ClusterFile = None,
    name: Annotated[str | None, typer.Option(help="Of the run (default: the project's name).")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Search (`heliograph tune`) instead of a run.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the run; its exit code is then this command's.")] = True,
    priority: Annotated[int, typer.Option(help="The higher, the sooner, where the cluster's `limits.runs` lets runs wait.")] = 0,
    address: Address = None,
) -> None:
    """Run a project on a cluster: what `heliograph run` does here, it does there.

    The project and heliograph's code are sent; the run and the model come to lie in the cluster's storage. Ctrl-C or a lost
    connection leave the run alone (`heliograph attach`); the same command after its end goes on where it was.

    Example:  heliograph submit examples/digits --cluster gpus.yaml --name digits-1
    """
    from .cluster import spec
    from .jobs.plan import plan as make
    from .jobs.queue import Place
    from .jobs.submit import reach, run_name

    loaded = project.load(folder)
    file, called = _cluster_file(loaded, folder, cluster), run_name(loaded, name)
    described, capacity = spec.load(file)
    made = make(loaded, file, _run_folder(folder, None))
    if made.problems:
        raise ProjectError("\n".join(f"{file}: {problem}" for problem in made.problems))
    jobs = reach(described, file, address, os.environ.get("RAY_AUTH_TOKEN"))
    place = Place(called, getpass.getuser(), priority, time.time())
    jobs.submit(loaded, folder.resolve(), capacity, spec.storage(described, file), place, tune)
    typer.echo(f"{called}: submitted; `heliograph attach {called} --cluster {file}` follows it", err=True)
    if wait:
        _follow(jobs, called)


@app.command()
def attach(name: Name, cluster: Annotated[Path, typer.Option(help="The cluster file.")], address: Address = None) -> None:
    """Follow a run that was submitted, from its first line to its end; its exit code is this command's.

    Example:  heliograph attach digits-1 --cluster gpus.yaml
    """
    _follow(_jobs(cluster, address), name)


@app.command()
def cancel(name: Name, cluster: Annotated[Path, typer.Option(help="The cluster file.")], address: Address = None) -> None:
    """Stop a run that was submitted, after it has saved a checkpoint.

    Example:  heliograph cancel digits-1 --cluster gpus.yaml
    """
    typer.echo(_jobs(cluster, address).cancel(name))


def _jobs(file: Path, address: str | None) -> Any:
    from .cluster import spec
    from .jobs.submit import reach

    described, _ = spec.load(file)
    return reach(described, file, address, os.environ.get("RAY_AUTH_TOKEN"))


def _follow(jobs: Any, name: str) -> None:
    try:
        code = jobs.follow(name, typer.echo)
    except KeyboardInterrupt:
        typer.echo(
            f"{name}: goes on without us; `heliograph attach {name}` follows it, `heliograph cancel {name}` stops it", err=True
        )
        raise typer.Exit(128 + signal.SIGINT) from None
    if code:
        raise typer.Exit(code)


clusters = typer.Typer(no_args_is_help=True, help="Start, look at and end the cluster that a cluster file describes.")
app.add_typer(clusters, name="cluster")
ClusterArgument = Annotated[Path, typer.Argument(help="The cluster file.")]


@clusters.command("up")
def cluster_up(file: ClusterArgument) -> None:
    """Start a cluster: its head; nodes follow by themselves when there is work for them.

    Clouds are reached by `ray up`, Kubernetes by `kubectl`, with the credentials that these find; `provider: local` needs none.

    Example:  heliograph cluster up rehearsal.yaml
    """
    from .cluster import cloud, local, spec

    described, capacity = spec.load(file)
    if described.provider != "local":
        cloud.start(described, file, capacity, typer.echo)
        return
    up = local.start(described, file, capacity, lambda line: typer.echo(line, err=True))
    typer.echo(f"{described.name} is up: jobs at {up.jobs}; next: heliograph submit PROJECT --cluster {file}")


class _Target(StrEnum):
    AWS = "aws"
    GCP = "gcp"
    AZURE = "azure"
    KUBERAY = "kuberay"


@clusters.command("render")
def cluster_render(
    file: ClusterArgument,
    target: Annotated[_Target | None, typer.Option("--for", help="Must be the file's provider, which it is by default.")] = None,
    run: Annotated[Path | None, typer.Option(help="Kubernetes: a RayJob that runs this project, alone.")] = None,
    serve: Annotated[Path | None, typer.Option(help="Kubernetes: a RayService that serves this project's model.")] = None,
    image: Annotated[bool, typer.Option("--dockerfile", help="A Dockerfile with what is installed here.")] = False,
) -> None:
    """Print a cluster in its provider's words: a file for `ray up`, or a KubeRay manifest. All are checked first.

    Example:  heliograph cluster render gpus.yaml > ray-up.yaml
              heliograph cluster render kube.yaml --run examples/digits | kubectl apply -f -
    """
    from .cluster import render, spec
    from .errors import ClusterError

    described, capacity = spec.load(file)
    if target and target.value != described.provider:
        raise ClusterError(f"{file}: its provider is {described.provider}, and so are its instances and prices")
    if image:
        typer.echo(render.dockerfile(capacity.gpus > 0), nl=False)
    elif described.provider == "local":
        raise ClusterError(f"{file}: a local cluster is in nobody else's words: `heliograph cluster up {file}` starts it")
    elif described.provider == "kuberay":
        from .jobs import kube

        if run:
            made = kube.job(project.load(run), described, capacity)
        elif serve:
            made = kube.service(project.load(serve), described, capacity)
        else:
            made = render.manifest(described, capacity)
        typer.echo(render.text(made), nl=False)
    else:
        token = file.resolve().parent / f".{described.name}" / "auth_token"
        typer.echo(render.text(render.launcher(described, capacity, token)), nl=False)


@clusters.command("status")
def cluster_status(file: ClusterArgument, address: Address = None) -> None:
    """Show a cluster's nodes, GPUs, what they have cost so far, and the runs that were sent to it.

    Example:  heliograph cluster status gpus.yaml
    """
    from .cluster import spec

    described, capacity = spec.load(file)
    for line in _jobs(file, address).overview(described.name, capacity):
        typer.echo(line)


@clusters.command("logs")
def cluster_logs(file: ClusterArgument) -> None:
    """Show what the head of a local cluster and its autoscaler said.

    Example:  heliograph cluster logs rehearsal.yaml
    """
    from .cluster import local, spec

    described, _ = spec.load(file)
    for line in local.logs(described, file):
        typer.echo(line)


@clusters.command("watch")
def cluster_watch(
    file: ClusterArgument,
    out: Annotated[Path, typer.Option(help="A folder for prometheus.yml, rules.yml and dashboard.json.")] = Path("watching"),
    endpoint: Annotated[list[str] | None, typer.Option(help="The URL of an endpoint to watch too; again for more.")] = None,
) -> None:
    """Write what watches a cluster and endpoints: a configuration and alerts for Prometheus, a dashboard for Grafana.

    Example:  heliograph cluster watch gpus.yaml --endpoint http://127.0.0.1:8000 --out watching
    """
    from .cluster import local, spec, watching

    described, _ = spec.load(file)
    for line in watching.write(out, local.discovery(described, file), endpoint or []):
        typer.echo(line)


@clusters.command("down")
def cluster_down(file: ClusterArgument) -> None:
    """End a cluster, and say what it has cost.

    Example:  heliograph cluster down rehearsal.yaml
    """
    from .cluster import cloud, local, spec

    described, capacity = spec.load(file)
    if described.provider != "local":
        cloud.stop(described, file, typer.echo)
        return
    up = local.found(described, file)
    lines = _jobs(file, None).overview(described.name, capacity)[:2] if up else [f"{described.name}: was not up"]
    local.stop(described, file)
    for line in lines:
        typer.echo(line)
    if up:
        typer.echo(f"{described.name}: is down, nothing of it is left running")


@app.command()
def tune(folder: ProjectFolder, run: RunFolder = None) -> None:
    """Search the keys that the project's `tune.space` names: Bayesian by default, each trial a training.

    What is done is kept: the same command goes on where it was stopped, and more `trials` add to those there are. The best
    configuration is written as a project that `heliograph run` trains to the end.

    Example:  heliograph tune examples/digits
    """
    loaded = project.load(folder)
    from .jobs.display import Display
    from .jobs.run import key_store, opened
    from .jobs.tune import space_of
    from .jobs.tune import tune as search
    from .serve.access import require_role

    space_of(loaded)
    held = _run_folder(folder, run)
    require_role(key_store(loaded, folder.resolve(), held), project.Verb.TRAIN, loaded.name)
    with opened(held, loaded.train.processes, Display()) as current:
        lines = search(loaded, folder.resolve(), current)
    for line in lines:
        typer.echo(line)


@app.command()
def serve(folder: ProjectFolder, run: RunFolder = None, port: Port = None) -> None:
    """Serve the project's registry until Ctrl-C: TensorFlow Serving's REST, Open Inference Protocol, sealed.

    The version in production answers (`heliograph deploy`), or the newest while none was deployed. Try it at /docs.

    Example:  heliograph serve examples/digits --port 8000
    """
    loaded = _with_port(project.load(folder), port)
    from .cluster.runtime import LocalCluster
    from .errors import RunError
    from .jobs.run import key_store, registry
    from .serve.endpoint import Endpoint, start

    held, models = _run_folder(folder, run), registry(loaded, folder.resolve())
    if loaded.name not in models.names():
        raise RunError(f"{models.folder}: has no {loaded.name} yet: run `heliograph run {folder}` first")
    keys = key_store(loaded, folder.resolve(), held)
    endpoint = Endpoint(loaded.name, models, keys, loaded.serve, held / "serve.log")
    with LocalCluster(loaded.serve.most_replicas, logs=held / "ray-logs") as cluster:
        typer.echo(f"starting {endpoint.url} (about 20 s)", err=True)
        url = start(endpoint, cluster, typer.echo)
        typer.echo(f"serving {loaded.name}@{models.resolve(loaded.name)} on {url}, see {url}/docs (Ctrl-C ends it)")
        typer.echo(f"try: heliograph predict rows.json --url {url} --model {loaded.name} --trust {endpoint.keys.public_key()}")
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    typer.echo("stopped", err=True)


@app.command()
def relay(
    to: Annotated[str, typer.Argument(help="The endpoint's URL, such as http://127.0.0.1:8000.")],
    port: Annotated[int, typer.Option(help="Listen on this port.", min=1, max=65535)] = 8080,
) -> None:
    """Hand sealed requests on to an endpoint, so that it does not learn who asks; until Ctrl-C.

    Clients take the relay's URL for the endpoint's. It reads no request, passes on no address and no header, and logs nothing.
    Run it apart from the endpoint: who runs both sees both.

    Example:  heliograph relay http://127.0.0.1:8000 --port 8080
    """
    from .errors import EndpointError
    from .serve.endpoint import check_port
    from .serve.relay import run as relay_to

    if not to.startswith(("http://", "https://")):
        raise EndpointError(f"{to}: is no URL of an endpoint: write it with http:// or https://")
    check_port(project.Serve(port=port))
    typer.echo(f"relaying http://127.0.0.1:{port} to {to} (Ctrl-C ends it)")
    with contextlib.suppress(KeyboardInterrupt):
        relay_to(to, "127.0.0.1", port)
    typer.echo("stopped", err=True)


@app.command()
def deploy(
    model: Annotated[str, typer.Argument(help="NAME@VERSION, or NAME for its newest version.")],
    project_folder: Annotated[Path, typer.Option("--project", help=f"The folder that holds the {project.FILE}.")] = Path(),
    percent: Annotated[float, typer.Option(help="Of the requests that the new version gets.", min=0.1, max=100)] = 10.0,
    seconds: Annotated[float, typer.Option(help="It is judged for at least so long,", min=0)] = 60.0,
    requests: Annotated[int, typer.Option(help="and by at least so many requests.", min=1)] = 100,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Stay until the verdict (exit code 2: rolled back).")] = True,
    run: RunFolder = None,
    url: Annotated[str | None, typer.Option(help="Ask this endpoint to, with HELIOGRAPH_TOKEN; no project is needed.")] = None,
    trust: Trust = None,
) -> None:
    """Put a version into production: a share of the requests first, all of them once it has proved itself.

    It is rolled back when it cannot be loaded, fails more often or is slower than the version in production. With
    --percent 100 it takes over at once. A running `heliograph serve` of the project does the work.

    Example:  heliograph deploy digits@2 --project examples/digits --percent 20
              heliograph deploy digits@2 --url https://models.example:8000 --trust signing.pub
    """
    from .cluster.audit import Audit
    from .jobs.registry import State, parse
    from .serve import rollout

    name, version = parse(model)
    if url:
        from .serve.client import Client

        with Client(url, name, trust=trust) as client:
            begun = client.deploy(version=version, percent=percent, seconds=seconds, requests=requests)
            rollout.follow(lambda: State.model_validate(client.rollout()), name, State.model_validate(begun), wait, typer.echo)
        return
    from .jobs.run import key_store, registry
    from .serve.access import require_role

    loaded = project.load(project_folder)
    models = registry(loaded, project_folder.resolve())
    keys = key_store(loaded, project_folder.resolve(), _run_folder(project_folder, run))
    who = require_role(keys, project.Verb.PROMOTE if percent >= 100 else project.Verb.DEPLOY, name)
    version = version or max(models.versions(name), default=1)
    state = rollout.begin(models, name, version, percent, seconds, requests)
    Audit(keys).write("deploy", f"{name}@{version}", percent=percent, token=who)
    rollout.follow(lambda: models.state(name), name, state, wait, typer.echo)


models = typer.Typer(no_args_is_help=True, help="Look at a project's registry, move aliases, remove old versions.")
app.add_typer(models, name="models")


@models.command("list")
def models_list(
    folder: ProjectFolder, search: Annotated[str, typer.Option(help="Only lines with this text, such as `production`.")] = ""
) -> None:
    """Show every version of every model: when and from what it was made, how it did, which aliases name it.

    Example:  heliograph models list examples/digits --search production
    """
    for name in (registry := _registry(folder)).names():
        for line in registry.describe(name):
            if search in line:
                typer.echo(line)


@models.command("history")
def models_history(folder: ProjectFolder, name: Annotated[str, typer.Argument(help="Of the model.")]) -> None:
    """Show which alias named which version since when, the newest last.

    Example:  heliograph models history examples/digits digits
    """
    for change in _registry(folder).state(name).history:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(change.time))
        typer.echo(f"{when}  {change.alias}: {name}@{change.before or '-'} -> {name}@{change.version}")


@models.command("alias")
def models_alias(
    folder: ProjectFolder,
    model: Annotated[str, typer.Argument(help="NAME@VERSION.")],
    alias: Annotated[str, typer.Argument(help="Such as staging; `heliograph deploy` moves `production`.")],
    run: RunFolder = None,
) -> None:
    """Let an alias name a version: requests may then ask for the alias (/v1/models/NAME/labels/ALIAS:predict).

    Example:  heliograph models alias examples/digits digits@2 staging
    """
    from .jobs.registry import ALIAS, PRODUCTION, parse
    from .serve.access import require_role

    name, version = parse(model)
    if alias == PRODUCTION or not re.fullmatch(ALIAS, alias) or version is None:
        raise RegistryError(f"`{model} {alias}`: name NAME@VERSION and an alias; `production` is moved by `heliograph deploy`")
    require_role(_keys(folder, run), project.Verb.DEPLOY, name)
    registry = _registry(folder)
    registry.bundle(name, version)
    seen = registry.state(name)
    registry.replace(name, seen, seen.moved(alias, version))
    typer.echo(f"{alias} is {name}@{version} now")


@models.command("collect")
def models_collect(
    folder: ProjectFolder,
    keep: Annotated[int, typer.Option(help="The newest versions that stay in any case.", min=1)] = 5,
    run: RunFolder = None,
) -> None:
    """Remove old versions; never one that an alias or a rollout names, or that an endpoint of this registry holds.

    Example:  heliograph models collect examples/digits --keep 3
    """
    from .serve.access import require_role

    for name in (registry := _registry(folder)).names():
        require_role(_keys(folder, run), project.Verb.PROMOTE, name)
        removed = registry.collect(name, keep)
        typer.echo(f"{name}: removed {', '.join(map(str, removed)) or 'nothing'}, {len(registry.versions(name))} versions stay")


def _registry(folder: Path) -> Any:
    from .jobs.run import registry

    return registry(project.load(folder), folder.resolve())


@app.command()
def predict(
    rows: Annotated[Path, typer.Argument(help=".json (or -), .jsonl, .csv or .parquet; columns as the source has them.")],
    model: Annotated[str, typer.Option(help="The model: NAME, or NAME@VERSION.")],
    url: Annotated[str, typer.Option(help="Where the endpoint is.")] = "http://127.0.0.1:8000",
    out: Annotated[Path | None, typer.Option(help="Write predictions to this .csv or .jsonl; run again to go on.")] = None,
    batch: Annotated[int, typer.Option(help="Rows of a request, of a file that is streamed.", min=1)] = 256,
    trust: Trust = None,
    plain: Annotated[bool, typer.Option("--plain", help="Send in clear instead of sealed.")] = False,
) -> None:
    """Send rows to an endpoint, sealed so that only the model's replica can read them, and print a line for each.

    A .jsonl, .csv or .parquet of any size is streamed; with --out what was answered is kept, and the same command goes on
    where it was stopped.

    Example:  heliograph predict rows.json --model digits --trust runs/default/keys/signing.pub
    """
    from .jobs.registry import parse
    from .serve import bulk
    from .serve.client import Client

    name, version = parse(model)
    with Client(url, name, version=version, encrypt=not plain, trust=trust) as client:
        bulk.predict(client, rows, out, batch)


@app.command("predict-dataset")
def predict_dataset(
    folder: ProjectFolder,
    source: Annotated[str, typer.Argument(help="Rows as data.source has them: a path, a glob, s3://…")],
    out: Annotated[Path, typer.Argument(help="A folder for Parquet files: the rows, with predictions beside them.")],
    run: RunFolder = None,
    version: Annotated[int | None, typer.Option(help="Of the model (default: the one in production, or the newest).")] = None,
) -> None:
    """Predict a whole dataset with a model of the registry, across the cluster by Ray Data; no endpoint is needed.

    What is done stays: the same command goes on where it was stopped.

    Example:  heliograph predict-dataset examples/wine wine-2026.parquet predictions
    """
    loaded = project.load(folder)
    from .jobs.display import Display
    from .jobs.predict import predict_source

    typer.echo(predict_source(loaded, folder.resolve(), _run_folder(folder, run), source, out, version, Display()))


@app.command("rotate-keys")
def rotate_keys(
    folder: ProjectFolder,
    run: RunFolder = None,
    retire: Annotated[
        bool, typer.Option("--retire", help="Then remove the older keys. Other runs that share the store would lose theirs.")
    ] = False,
    requests: Annotated[
        bool, typer.Option("--requests", help="Make a new key for sealed requests instead; endpoints that run take it up.")
    ] = False,
) -> None:
    """Make a new key, and wrap the data keys of a run's shards with it: no data is written again.

    Example:  heliograph rotate-keys examples/digits --retire
              heliograph rotate-keys examples/digits --requests
    """
    loaded = project.load(folder)
    from .errors import RunError
    from .jobs.run import rotate_keys as rotate
    from .jobs.run import rotate_request_key

    held = _run_folder(folder, run)
    if not held.is_dir():
        raise RunError(f"{held}: no such run: run `heliograph run {folder}` first")
    typer.echo((rotate_request_key if requests else rotate)(loaded, folder.resolve(), held, retire))


@app.command()
def seal(folder: ProjectFolder, run: RunFolder = None) -> None:
    """Put a finished run away: its folder becomes one sealed file (AES-256-GCM), its key store stays.

    Example:  heliograph seal examples/digits; heliograph unseal examples/digits
    """
    from .jobs.archive import seal as put_away

    typer.echo(put_away(_run_folder(folder, run), _keys(folder, run), _progress))


@app.command()
def unseal(folder: ProjectFolder, run: RunFolder = None) -> None:
    """Take a run that was put away by `heliograph seal` out again.

    Example:  heliograph unseal examples/digits
    """
    from .jobs.archive import unseal as take_out

    typer.echo(take_out(_run_folder(folder, run), _keys(folder, run), _progress))


@contextlib.contextmanager
def _progress(what: str, total: int) -> Any:
    """A bar of bytes on a terminal; yields what takes how many more are done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    bar = Progress(TextColumn(what), BarColumn(), DownloadColumn(), console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


@app.command("guard-keys")
def guard_keys(
    folder: ProjectFolder,
    run: RunFolder = None,
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="By a passphrase, in the file that HELIOGRAPH_PASSPHRASE_FILE names.")
    ] = False,
    kms: Annotated[str | None, typer.Option(help="By this key of AWS KMS: its id, ARN or alias/NAME.")] = None,
    none: Annotated[bool, typer.Option("--none", help="By the system's permissions alone, as in the beginning.")] = False,
) -> None:
    """Lock the files of the key store by more than the system's permissions. Whoever uses a key then needs that too.

    Example:  HELIOGRAPH_PASSPHRASE_FILE=/run/secrets/passphrase heliograph guard-keys . --passphrase
              heliograph guard-keys . --kms alias/heliograph
    """
    import secrets

    from .cluster.audit import Audit
    from .errors import KeyStoreError

    if sum((passphrase, kms is not None, none)) != 1:
        raise KeyStoreError("guard-keys: name one of --passphrase, --kms KEY, --none")
    keys = _keys(folder, run)
    by = {"by": "kms", "key": kms} if kms else {"by": "passphrase", "salt": secrets.token_hex(16)} if passphrase else None
    count = keys.guard_by(by)
    Audit(keys).write("guard", by["by"] if by else "none")
    typer.echo(
        f"{keys.folder}: {count} keys are locked by {f'AWS KMS ({kms})' if kms else 'a passphrase' if by else 'permissions'}"
    )


tokens = typer.Typer(no_args_is_help=True, help="Who may ask an endpoint whose `serve.access` is `tokens`.")
app.add_typer(tokens, name="token")


@tokens.command("add")
def token_add(
    folder: ProjectFolder,
    name: Annotated[str, typer.Option(help="Whose it is.")],
    model: Annotated[list[str] | None, typer.Option(help="A model that it is for; again for more (default: all).")] = None,
    verb: Annotated[list[project.Verb] | None, typer.Option(help="Of what; again for more (default: predict, read).")] = None,
    days: Annotated[float | None, typer.Option(help="How long it is good for (default: until it is revoked).", min=0.001)] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second, of each replica (default: any).", min=0.001)] = None,
    run: RunFolder = None,
) -> None:
    """Make a token and print it: this once, for only its hash is kept. Endpoints that run take it at once.

    Example:  export HELIOGRAPH_TOKEN=$(heliograph token add . --name alice --days 30)
    """
    made = _tokens(folder, run).add(name, model or [], verb or [project.Verb.PREDICT, project.Verb.READ], days, rate)
    typer.echo(made)


@tokens.command("list")
def token_list(folder: ProjectFolder, run: RunFolder = None) -> None:
    """Show the tokens there are, a JSON object a line; the tokens themselves are nowhere."""
    for token in _tokens(folder, run).all():
        typer.echo(token.model_dump_json(exclude={"sha256"}))


@tokens.command("revoke")
def token_revoke(
    folder: ProjectFolder,
    identity: Annotated[str, typer.Argument(help="Its id: what stands between the `_` of hg_ID_…")],
    run: RunFolder = None,
) -> None:
    """Remove a token: the next request with it is refused."""
    typer.echo(f"revoked: {_tokens(folder, run).revoke(identity).name}'s token {identity}")


def _tokens(folder: Path, run: Path | None) -> Any:
    from .serve.access import Tokens

    return Tokens(_keys(folder, run))


def _keys(folder: Path, run: Path | None) -> Any:
    from .jobs.run import key_store

    return key_store(project.load(folder), folder.resolve(), _run_folder(folder, run))


@app.command("node-certificate")
def node_certificate(
    folder: ProjectFolder,
    address: Annotated[str, typer.Argument(help="The node's IP address or host name.")],
    run: RunFolder = None,
) -> None:
    """Make the certificate that a node of a Ray cluster shows to the others, and print what Ray on it needs (mutual TLS).

    The authority that signs is made once, in the key store; a process without a certificate of it talks to no node.

    Example:  heliograph node-certificate . 10.0.0.7 > node.env
    """
    from .cluster.tls import node_certificate as certificate

    for name, value in certificate(_keys(folder, run), address).items():
        typer.echo(f"{name}={value}")


@app.command("verify-audit")
def verify_audit(
    folder: ProjectFolder,
    run: RunFolder = None,
    count: Annotated[int, typer.Option(help="Lines that were noted before: the log must still begin with them.", min=0)] = 0,
    mac: Annotated[str, typer.Option(help="The last one's mac that was noted with them.")] = "",
) -> None:
    """Check that nobody changed the audit log: who deployed, served, rotated keys, made and revoked tokens, was refused.

    Note what it prints somewhere else: with it, a log that was cut or written anew is found out too.

    Example:  heliograph verify-audit . --count 12 --mac 5c0f…
    """
    from .cluster.audit import Audit

    audit = Audit(_keys(folder, run))
    lines, last = audit.verify(count, mac)
    typer.echo(f"{audit.file}: {lines} lines, none changed" + (f"; to note: --count {lines} --mac {last}" if lines else ""))


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"heliograph {__version__}")
        raise typer.Exit


def _cluster_file(loaded: project.Project, folder: Path, cluster: Path | None) -> Path:
    if cluster is None and loaded.cluster is None:
        raise ProjectError(f"{folder / project.FILE}: names no cluster: add `cluster: FILE` or give --cluster FILE")
    return cluster or folder / Path(str(loaded.cluster)).expanduser()


def _run_folder(folder: Path, run: Path | None) -> Path:
    return (run or folder / "runs" / "default").resolve()


def _with_port(loaded: project.Project, port: int | None) -> project.Project:
    return loaded.model_copy(update={"serve": loaded.serve.model_copy(update={"port": port})}) if port else loaded


def main() -> None:
    app()
