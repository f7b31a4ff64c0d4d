"""Commands of models: serve them, put versions into production, ask them."""

import contextlib
import re
import signal
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RegistryError, RunError
from ..names import FILE, Verb
from . import Port, ProjectFolder, RegistryPlace, RunFolder, Trust, app, keys_of, load, run_folder, with_port, with_registry

LOCAL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option(help="Where the endpoint is.")]
Plain = Annotated[bool, typer.Option("--plain", help="Send in clear instead of sealed.")]


@app.command()
def serve(folder: ProjectFolder, run: RunFolder = None, port: Port = None, registry: RegistryPlace = None) -> None:
    """Serve the project's registry until Ctrl-C: TensorFlow Serving's REST, Open Inference Protocol, sealed.

    The version in production answers (`heliograph deploy`), or the newest while none was deployed. Try it at /docs.

    Example:  heliograph serve examples/digits --port 8000
    """
    loaded = with_registry(with_port(load(folder), port), registry)
    from ..cluster.runtime import cluster_here, joined
    from ..jobs.run import key_store
    from ..jobs.run import registry as registry_of_project
    from ..jobs.traffic_report import LOG
    from ..serve.endpoint import Endpoint, start, stop

    held, models = run_folder(folder, run), registry_of_project(loaded, folder.resolve())
    if loaded.name not in models.names():
        raise RunError(f"{models}: has no {loaded.name} yet: run `heliograph run {folder}` first")
    keys = key_store(loaded, folder.resolve(), held)
    endpoint = Endpoint(loaded.name, models, keys, loaded.serve, held / LOG)
    with cluster_here(loaded.serve.most_replicas, held / "ray-logs") as cluster:
        typer.echo(f"starting {endpoint.url} (about 20 s)", err=True)
        try:
            url = start(endpoint, cluster, typer.echo)
            typer.echo(f"serving {loaded.name}@{models.resolve(loaded.name)} on {url}, see {url}/docs (Ctrl-C ends it)")
            typer.echo(f"try: heliograph predict rows.json --url {url} --model {loaded.name} --trust {keys.public_key()}")
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
        finally:
            if joined() and cluster.running:
                stop(endpoint)
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
    from ..errors import EndpointError
    from ..project import Serve
    from ..serve.endpoint import check_port
    from ..serve.relay import run as relay_to

    if not to.startswith(("http://", "https://")):
        raise EndpointError(f"{to}: is no URL of an endpoint: write it with http:// or https://")
    check_port(Serve(port=port))
    typer.echo(f"relaying http://127.0.0.1:{port} to {to} (Ctrl-C ends it)")
    with contextlib.suppress(KeyboardInterrupt):
        relay_to(to, "127.0.0.1", port)
    typer.echo("stopped", err=True)


@app.command()
def deploy(
    model: Annotated[str, typer.Argument(help="NAME@VERSION, or NAME for its newest version.")],
    project_folder: Annotated[Path, typer.Option("--project", help=f"The folder that holds the {FILE}.")] = Path(),
    percent: Annotated[float, typer.Option(help="Of the requests that the new version gets.", min=0.1, max=100)] = 10.0,
    seconds: Annotated[float, typer.Option(help="It is judged for at least so long,", min=0)] = 60.0,
    requests: Annotated[int, typer.Option(help="and by at least so many requests.", min=1)] = 100,
    force: Annotated[bool, typer.Option("--force", help="Also a version that failed its gates; goes to the audit log.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Stay until the verdict (exit code 2: rolled back).")] = True,
    run: RunFolder = None,
    url: Annotated[str | None, typer.Option(help="Ask this endpoint to, with HELIOGRAPH_TOKEN; no project is needed.")] = None,
    trust: Trust = None,
) -> None:
    """Put a version into production: a share of the requests first, all of them once it has proved itself.

    A version that did not reach what the project's `evaluate.require` asks for is refused without --force.
    It is rolled back when it cannot be loaded, fails more often or is slower than the version in production. With
    --percent 100 it takes over at once. A running `heliograph serve` of the project does the work.

    Example:  heliograph deploy digits@2 --project examples/digits --percent 20
              heliograph deploy digits@2 --url https://models.example:8000 --trust signing.pub
    """
    from ..cluster.audit import Audit
    from ..jobs.registry import State, parse
    from ..serve import rollout

    name, version = parse(model)
    if url:
        from ..serve.client import Client

        with Client(url, name, trust=trust) as client:
            begun = client.deploy(version=version, percent=percent, seconds=seconds, requests=requests, force=force)
            rollout.follow(lambda: State.model_validate(client.rollout()), name, State.model_validate(begun), wait, typer.echo)
        return
    from ..jobs.run import key_store, registry
    from ..serve.access import require_role

    loaded = load(project_folder)
    models = registry(loaded, project_folder.resolve())
    keys = key_store(loaded, project_folder.resolve(), run_folder(project_folder, run))
    who = require_role(keys, Verb.PROMOTE if percent >= 100 or force else Verb.DEPLOY, name)
    version = version or max(models.versions(name), default=1)
    state = rollout.begin(models, name, version, percent, seconds, requests, force)
    forced = rollout.forced_past(models, name, version) if force else {}
    Audit(keys).write("deploy", f"{name}@{version}", percent=percent, token=who, **forced)
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
    for name in (registry := registry_of(folder)).names():
        for line in registry.describe(name):
            if search in line:
                typer.echo(line)


@models.command("history")
def models_history(folder: ProjectFolder, name: Annotated[str, typer.Argument(help="Of the model.")]) -> None:
    """Show which alias named which version since when, the newest last.

    Example:  heliograph models history examples/digits digits
    """
    for change in registry_of(folder).state(name).history:
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
    from ..jobs.registry import ALIAS, PRODUCTION, parse
    from ..serve.access import require_role

    name, version = parse(model)
    if alias == PRODUCTION or not re.fullmatch(ALIAS, alias) or version is None:
        raise RegistryError(f"`{model} {alias}`: name NAME@VERSION and an alias; `production` is moved by `heliograph deploy`")
    require_role(keys_of(folder, run), Verb.DEPLOY, name)
    registry = registry_of(folder)
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
    from ..serve.access import require_role

    for name in (registry := registry_of(folder)).names():
        require_role(keys_of(folder, run), Verb.PROMOTE, name)
        removed = registry.collect(name, keep)
        typer.echo(f"{name}: removed {', '.join(map(str, removed)) or 'nothing'}, {len(registry.versions(name))} versions stay")


def registry_of(folder: Path) -> Any:
    from ..jobs.run import registry

    return registry(load(folder), folder.resolve())


@app.command()
def predict(
    rows: Annotated[Path, typer.Argument(help=".json (or -), .jsonl, .csv or .parquet; columns as the source has them.")],
    model: Annotated[str, typer.Option(help="The model: NAME, or NAME@VERSION.")],
    url: Url = LOCAL,
    out: Annotated[Path | None, typer.Option(help="Write predictions to this .csv or .jsonl; run again to go on.")] = None,
    batch: Annotated[int, typer.Option(help="Rows of a request, of a file that is streamed.", min=1)] = 256,
    trust: Trust = None,
    plain: Plain = False,
) -> None:
    """Send rows to an endpoint, sealed so that only the model's replica can read them, and print a line for each.

    A .jsonl, .csv or .parquet of any size is streamed; with --out what was answered is kept, and the same command goes on
    where it was stopped.

    Example:  heliograph predict rows.json --model digits --trust runs/default/keys/signing.pub
    """
    from ..jobs.registry import parse
    from ..serve import bulk
    from ..serve.client import Client

    name, version = parse(model)
    with Client(url, name, version=version, encrypt=not plain, trust=trust) as client:
        bulk.predict(client, rows, out, batch)


@app.command()
def explain(
    rows: Annotated[Path, typer.Argument(help=".json: a list of rows, 16 at most (or - for standard input).")],
    model: Annotated[str, typer.Option(help="The model: NAME, or NAME@VERSION.")],
    url: Url = LOCAL,
    trust: Trust = None,
    plain: Plain = False,
) -> None:
    """Ask an endpoint why it answers so: a JSON line for each row, what each feature added to the answer.

    Example:  heliograph explain rows.json --model digits --trust runs/default/keys/signing.pub
    """
    import json

    from ..jobs.registry import parse
    from ..serve.client import Client, read_rows

    name, version = parse(model)
    with Client(url, name, version=version, encrypt=not plain, trust=trust) as client:
        for line in client.explain(read_rows(rows)):
            typer.echo(json.dumps(line))


@app.command()
def drift(
    model: Annotated[str, typer.Argument(help="The model: NAME, or NAME@VERSION.")],
    url: Url = LOCAL,
    trust: Trust = None,
    plain: Plain = False,
) -> None:
    """Show which features of the requests moved away from the training rows, the worst first.

    The endpoint counts what comes in bins and keeps no row. PSI: 0.1 is a little, 0.2 counts as moved.

    Example:  heliograph drift digits --trust runs/default/keys/signing.pub
    """
    from ..jobs.display import plain_table, show
    from ..jobs.registry import parse
    from ..serve.client import Client

    name, version = parse(model)
    with Client(url, name, version=version, encrypt=not plain, trust=trust) as client:
        found = client.drift()
    if not found:
        typer.echo(f"{model}: fewer than 100 rows were asked about: nothing can be said yet")
        return
    rows = [(f["name"], f"{f['psi']:.3f}", f"{f['ks']:.3f}", f"{f['rows']:,}", "moved" if f["moved"] else "") for f in found]
    show(plain_table(("feature", "PSI", "KS", "rows", ""), rows))
    moved = [line["name"] for line in found if line["moved"]]
    typer.echo(f"moved: {', '.join(moved)}" if moved else "nothing moved")


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
    loaded = load(folder)
    from ..jobs.display import Display
    from ..jobs.predict import predict_source

    typer.echo(predict_source(loaded, folder.resolve(), run_folder(folder, run), source, out, version, Display()))
