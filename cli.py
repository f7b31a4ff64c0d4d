"""The command line: a command is a few lines; the rooms do the work.

Exit codes: 0 done, 1 a bug of ours (its traceback is in the run's log), 2 a mistake that the message explains,
130 Ctrl-C and 143 SIGTERM (the same command goes on from there).
"""

import contextlib
import shutil
import signal
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from . import __version__, project
from .errors import ProjectError


class _Terminated(KeyboardInterrupt):
    """SIGTERM, on the same way out as Ctrl-C."""


class _Commands(TyperGroup):
    """Runs a command and turns what it raises into a line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        def terminate(*_: Any) -> None:
            raise _Terminated

        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            typer.echo("interrupted: the same command goes on from here", err=True)
            code = 143 if isinstance(stop, _Terminated) else 130
        except (typer.Exit, typer.Abort, TyperException):
            raise
        except Exception as error:
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
def run(folder: ProjectFolder, run: RunFolder = None, port: Port = None) -> None:
    """Run a project: prepare, train, evaluate, bundle, then one sealed request to a real endpoint.

    What is done is kept: the same command goes on where it was stopped, and a change reruns only what depends on it.

    Example:  heliograph run examples/digits
    """
    loaded = _with_port(project.load(folder), port)
    from .jobs import report
    from .jobs.display import Display, stage_table
    from .jobs.run import execute, opened
    from .serve import first_request

    display = Display()
    with opened(_run_folder(folder, run), loaded.train.processes, display) as current:
        first_request.require_port(loaded, current)
        version = execute(loaded, folder.resolve(), current)
        first_request.execute(loaded, folder.resolve(), current)
        result = report.write(loaded, current)
    display.console.print(stage_table(result["stages"]))
    for line in report.summary(result):
        typer.echo(line)
    typer.echo(f"model: {loaded.name}@{version} in {folder / loaded.registry}")
    typer.echo(f"report: {_run_folder(folder, run) / 'report.html'}; to keep serving: heliograph serve {folder}")


@app.command()
def serve(folder: ProjectFolder, run: RunFolder = None, port: Port = None) -> None:
    """Serve the project's registry on 127.0.0.1 until Ctrl-C: TensorFlow Serving's REST, Open Inference Protocol, sealed.

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
def deploy(
    model: Annotated[str, typer.Argument(help="NAME@VERSION, or NAME for its newest version.")],
    project_folder: Annotated[Path, typer.Option("--project", help=f"The folder that holds the {project.FILE}.")] = Path(),
    percent: Annotated[float, typer.Option(help="Of the requests that the new version gets.", min=0.1, max=100)] = 10.0,
    seconds: Annotated[float, typer.Option(help="It is judged for at least so long,", min=0)] = 60.0,
    requests: Annotated[int, typer.Option(help="and by at least so many requests.", min=1)] = 100,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Stay until the verdict (exit code 2: rolled back).")] = True,
) -> None:
    """Put a version into production: a share of the requests first, all of them once it has proved itself.

    It is rolled back when it cannot be loaded, fails more often or is slower than the version in production. With
    --percent 100 it takes over at once. A running `heliograph serve` of the project does the work.

    Example:  heliograph deploy digits@2 --project examples/digits --percent 20
    """
    loaded = project.load(project_folder)
    from .jobs.registry import parse
    from .jobs.run import registry
    from .serve import rollout

    models = registry(loaded, project_folder.resolve())
    name, version = parse(model)
    version = version or max(models.versions(name), default=1)
    state = rollout.begin(models, name, version, percent, seconds, requests)
    rollout.follow(models, name, state, wait, typer.echo)


@app.command()
def predict(
    rows: Annotated[Path, typer.Argument(help=".json (or -), .jsonl, .csv or .parquet; columns as the source has them.")],
    model: Annotated[str, typer.Option(help="The model: NAME, or NAME@VERSION.")],
    url: Annotated[str, typer.Option(help="Where the endpoint is.")] = "http://127.0.0.1:8000",
    out: Annotated[Path | None, typer.Option(help="Write predictions to this .csv or .jsonl; run again to go on.")] = None,
    batch: Annotated[int, typer.Option(help="Rows of a request, of a file that is streamed.", min=1)] = 256,
    trust: Annotated[
        Path | None, typer.Option(help="The public key (signing.pub) that must have signed the endpoint's keys.")
    ] = None,
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
) -> None:
    """Make a new key, and wrap the data keys of a run's shards with it: no data is written again.

    Example:  heliograph rotate-keys examples/digits --retire
    """
    loaded = project.load(folder)
    from .errors import RunError
    from .jobs.run import rotate_keys as rotate

    held = _run_folder(folder, run)
    if not held.is_dir():
        raise RunError(f"{held}: no such run: run `heliograph run {folder}` first")
    typer.echo(rotate(loaded, folder.resolve(), held, retire))


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"heliograph {__version__}")
        raise typer.Exit


def _run_folder(folder: Path, run: Path | None) -> Path:
    return (run or folder / "runs" / "default").resolve()


def _with_port(loaded: project.Project, port: int | None) -> project.Project:
    return loaded.model_copy(update={"serve": loaded.serve.model_copy(update={"port": port})}) if port else loaded


def main() -> None:
    app()
