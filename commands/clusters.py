"""Commands of a cluster: what a run would cost there, start and end it, send runs to it."""

import getpass
import os
import signal
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ProjectError
from ..names import FILE
from . import ProjectFolder, RunFolder, app, load, run_folder

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

    from ..jobs.plan import lines
    from ..jobs.plan import plan as make

    loaded = load(folder)
    file = _cluster_file(loaded, folder, cluster)
    made = make(loaded, file, run_folder(folder, run))
    if as_json:
        typer.echo(json.dumps(asdict(made)))
    else:
        for line in lines(made):
            typer.echo(line)
    _require_possible(made, file)


Name = Annotated[str, typer.Argument(help="The run's name.")]
Address = Annotated[str | None, typer.Option(help="Of the cluster's job API, http://HOST:8265 (token: RAY_AUTH_TOKEN).")]


@app.command()
def submit(
    folder: ProjectFolder,
    cluster: ClusterFile = None,
    name: Annotated[str | None, typer.Option(help="Of the run (default: the project's name).")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Search (`heliograph tune`) instead of a run.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the model instead, as NAME-endpoint, until `cancel`.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the run; its exit code is then this command's.")] = True,
    priority: Annotated[int, typer.Option(help="The higher, the sooner, where the cluster's `limits.runs` lets runs wait.")] = 0,
    address: Address = None,
) -> None:
    """Run a project on a cluster: what `heliograph run` does here, it does there.

    The project and heliograph's code are sent; the run and the model come to lie in the cluster's storage. Ctrl-C or a lost
    connection leave the run alone (`heliograph attach`); the same command after its end goes on where it was. When the cluster
    loses its head, the run is sent again by itself.

    Example:  heliograph submit examples/digits --cluster gpus.yaml --name digits-1
    """
    from ..cluster import spec
    from ..jobs.plan import plan as make
    from ..jobs.queue import Place
    from ..jobs.submit import What, reach, run_name

    if tune and serve:
        raise ProjectError("--tune --serve: one at a time")
    what = What.TUNE if tune else What.SERVE if serve else What.RUN
    loaded = load(folder)
    file, run = _cluster_file(loaded, folder, cluster), run_name(loaded, name)
    called = what.job(run)
    described, capacity = spec.load(file)
    made = make(loaded, file, run_folder(folder, None))
    _require_possible(made, file)
    jobs = reach(described, file, address, os.environ.get("RAY_AUTH_TOKEN"))
    place = Place(called, getpass.getuser(), priority, time.time())

    def send() -> None:
        jobs.submit(loaded, folder.resolve(), capacity, spec.storage(described, file), place, what, run)

    send()
    typer.echo(f"{called}: submitted; `heliograph attach {called} --cluster {file}` follows it", err=True)
    if wait:
        _follow(jobs, called, send)


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


def _require_possible(made: Any, file: Path) -> None:
    if made.problems:
        raise ProjectError("\n".join(f"{file}: {problem}" for problem in made.problems))


def _jobs(file: Path, address: str | None) -> Any:
    from ..cluster import spec
    from ..jobs.submit import reach

    described, _ = spec.load(file)
    return reach(described, file, address, os.environ.get("RAY_AUTH_TOKEN"))


def _follow(jobs: Any, name: str, again: Callable[[], None] | None = None) -> None:
    """again: sends it anew, where a head that was lost took it along."""
    try:
        code = jobs.follow(name, typer.echo, again)
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
    from ..cluster import cloud, local, spec

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
    from ..cluster import render, spec
    from ..errors import ClusterError

    described, capacity = spec.load(file)
    if target and target.value != described.provider:
        raise ClusterError(f"{file}: its provider is {described.provider}, and so are its instances and prices")
    if image:
        typer.echo(render.dockerfile(capacity.gpus > 0), nl=False)
    elif described.provider == "local":
        raise ClusterError(f"{file}: a local cluster is in nobody else's words: `heliograph cluster up {file}` starts it")
    elif described.provider == "kuberay":
        from ..jobs import kube

        if run:
            made = kube.job(load(run), described, capacity)
        elif serve:
            made = kube.service(load(serve), described, capacity)
        else:
            made = render.manifest(described, capacity)
        typer.echo(render.text(made), nl=False)
    else:
        token = spec.beside(described, file) / "auth_token"
        typer.echo(render.text(render.launcher(described, capacity, token)), nl=False)


@clusters.command("status")
def cluster_status(file: ClusterArgument, address: Address = None) -> None:
    """Show a cluster's nodes, GPUs, what they have cost so far, and the runs that were sent to it.

    Example:  heliograph cluster status gpus.yaml
    """
    from ..cluster import spec

    described, capacity = spec.load(file)
    for line in _jobs(file, address).overview(described.name, capacity):
        typer.echo(line)


app.command("status")(cluster_status)


@clusters.command("logs")
def cluster_logs(file: ClusterArgument) -> None:
    """Show what the head of a local cluster and its autoscaler said.

    Example:  heliograph cluster logs rehearsal.yaml
    """
    from ..cluster import local, spec

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
    from ..cluster import local, spec, watching

    described, _ = spec.load(file)
    for line in watching.write(out, local.discovery(described, file), endpoint or []):
        typer.echo(line)


@clusters.command("down")
def cluster_down(file: ClusterArgument) -> None:
    """End a cluster, and say what it has cost.

    Example:  heliograph cluster down rehearsal.yaml
    """
    from ..cluster import cloud, local, spec

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


def _cluster_file(loaded: Any, folder: Path, cluster: Path | None) -> Path:
    if cluster is None and loaded.cluster is None:
        raise ProjectError(f"{folder / FILE}: names no cluster: add `cluster: FILE` or give --cluster FILE")
    return cluster or folder / Path(str(loaded.cluster)).expanduser()
