"""Commands of a project: make one, check it, run it, search it."""

import contextlib
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ProjectError, RunError
from ..names import FILE, Format, Verb
from . import AsJson, Port, ProjectFolder, RegistryPlace, RunFolder, app, load, run_folder


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    data: Annotated[
        str | None, typer.Option(help="A file or glob of rows, a folder of images (a folder a class), s3://… or sklearn://NAME.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The column to predict (default: asked for, or guessed by its name).")
    ] = None,
) -> None:
    """Write a project that runs: for a data file, what its columns suggest; without one, handwritten digits to start from.

    Example:  heliograph init my-project --data flowers.csv --target species
    """
    if (folder / FILE).exists() or (folder / "model.py").exists():
        raise ProjectError(f"{folder}: holds a project already: name another folder")
    name = ("".join(c if c.isalnum() else "-" for c in folder.resolve().name.lower()).strip("-") or "project")[:63]
    if data is None and sys.stdin.isatty():
        data = (
            typer.prompt("data (a file, a folder of images; empty: handwritten digits)", default="", show_default=False) or None
        )
    if data is None:
        template = Path(__file__).parent.parent / "examples" / "digits"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(template / "model.py", folder / "model.py")
        (folder / FILE).write_text((template / FILE).read_text().replace("name: digits\n", f"name: {name}\n"))
        typer.echo(f"{folder}: a project that classifies handwritten digits; next: heliograph run {folder}")
        return
    from ..jobs import propose
    from ..jobs.display import silenced

    source = propose.found(data)
    head = propose.columns_of(source)
    if target is None:
        target = propose.likely_target(head)
        if sys.stdin.isatty():
            target = typer.prompt(f"column to predict, of {', '.join(head.column_names)}", default=target)
    assert target
    with silenced():
        text = propose.propose(name, source, head, target, folder)
    propose.written(folder, text)
    typer.echo(text.splitlines()[0].split("`heliograph check`")[0].removeprefix("# ").strip())
    typer.echo(f"{folder / FILE}: next: heliograph run {folder}")


@app.command()
def check(folder: ProjectFolder) -> None:
    """Validate a project without starting anything: its file, its data's schema, its model on that schema.

    Example:  heliograph check examples/digits
    """
    loaded = load(folder)
    from ..jobs.check import check as check_project

    for line in check_project(loaded, folder.resolve()):
        typer.echo(line)


@app.command()
def run(
    folder: ProjectFolder,
    run: RunFolder = None,
    port: Port = None,
    registry: RegistryPlace = None,
    as_json: AsJson = False,
) -> None:
    """Run a project: prepare, train, evaluate, validate, bundle, then one sealed request to a real endpoint.

    A version that does not reach what the project requires (`evaluate.require`) is kept, not served, and the exit code is 2.

    What is done is kept: the same command goes on where it was stopped, and a change reruns only what depends on it.

    Example:  heliograph run examples/digits
    """
    from ..api import run as done
    from ..cluster.runtime import joined
    from ..jobs import report
    from ..jobs.display import Display, form_table, show, stage_table

    display = Display()
    made = done(folder, run, port=port, registry=registry, display=display)
    if as_json:
        typer.echo(json.dumps(made.report, indent=1))
    else:
        show(stage_table(made.report["stages"]))
        if made.report["compress"]:
            show(form_table(*report.forms(made.report["compress"], short=True)))
        for line in report.summary(made.report):
            typer.echo(line)
        typer.echo(f"model: {made.name}@{made.version} in {made.registry}")
        serving = "" if joined() else f"; to keep serving: heliograph serve {folder}"
        typer.echo(f"report: {made.folder / 'report.html'}{serving}")
    if made.failed:
        raise RunError(f"{made.name}@{made.version} is not for production: {'; '.join(made.failed)}")


@app.command()
def doctor(
    folder: Annotated[Path | None, typer.Argument(help="A project, whose port, keys and storage are looked at too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, and say what to do where something is missing; the exit code is 2 where a run could not work.

    Example:  heliograph doctor examples/digits
    """
    loaded = load(folder) if folder else None
    from dataclasses import asdict

    from ..jobs.display import Display, show
    from ..jobs.doctor import examine

    display, found = Display(), []
    with display.open():
        for each in examine(loaded, (folder or Path()).resolve(), display.update):
            found.append(each)
            if not as_json:
                mark = {"ok": "[green]✓[/]", "warn": "[yellow]![/]", "bad": "[red]✗[/]"}[each.state]
                show(f"{mark} {each.name:<14} {each.found}")
                if each.do:
                    show(f"  {'':<14} do: {each.do}")
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=1))
    if any(each.state == "bad" for each in found):
        raise typer.Exit(2)


@app.command()
def ui(
    folder: ProjectFolder,
    run: RunFolder = None,
    port: Annotated[int, typer.Option(help="Listen on this port of 127.0.0.1.", min=1, max=65535)] = 8002,
) -> None:
    """Show a run in the browser while it works, and its report when it has ended; until Ctrl-C.

    Example:  heliograph ui examples/digits
    """
    load(folder)
    from ..jobs.live import served

    held = run_folder(folder, run)
    if not held.is_dir():
        raise RunError(f"{held}: there is no such run yet: `heliograph run {folder}` makes it")
    with served(held, port) as url:
        typer.echo(f"{url} shows {held} (Ctrl-C ends it)")
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    typer.echo("stopped", err=True)


@app.command()
def export(
    folder: ProjectFolder,
    to: Annotated[Path, typer.Argument(help="A new folder.")],
    format: Annotated[Format, typer.Option(help="What other programs load.")] = Format.SAVEDMODEL,
    form: Annotated[str | None, typer.Option(help="A compressed form, by the name of its recipe.")] = None,
    run: RunFolder = None,
) -> None:
    """Write a run's model for other programs: a SavedModel for TensorFlow Serving, ONNX, LiteRT or Keras.

    It is held against the Keras model on real rows, and what it differs by is told.

    Example:  heliograph export examples/digits digits-saved --format savedmodel
    """
    loaded = load(folder)
    from ..jobs.display import silenced
    from ..jobs.run import key_store
    from ..jobs.take_out import take_out
    from ..serve.access import require_role

    held = run_folder(folder, run)
    require_role(key_store(loaded, folder.resolve(), held), Verb.READ, loaded.name)
    with silenced():
        said = take_out(loaded, folder.resolve(), held, to, form, format)
    typer.echo(said)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="NAME@VERSION of the registry, or the folder of a run or a bundle.")],
    second: Annotated[str, typer.Argument(help="The other one.")],
    folder: Annotated[Path, typer.Option("--project", help=f"The folder that holds the {FILE}.")] = Path(),
    run: RunFolder = None,
    page: Annotated[Path | None, typer.Option(help="Write both side by side to this HTML file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tell whether one model is really better than another, on the run's test rows, by paired tests.

    Example:  heliograph compare digits@1 digits@2 --project examples/digits --page compared.html
    """
    loaded = load(folder)
    from ..jobs.compare import compare as compare_models
    from ..jobs.compare import lines, short_names
    from ..jobs.display import plain_table, show, silenced
    from ..jobs.run import key_store, registry
    from ..jobs.transfer import find
    from ..serve.access import require_role

    held = run_folder(folder, run)
    keys = key_store(loaded, folder.resolve(), held)
    require_role(keys, Verb.READ, loaded.name)
    require_prepared(held, folder)
    models = registry(loaded, folder.resolve())
    places = (find(first, Path.cwd(), keys, models, "compare"), find(second, Path.cwd(), keys, models, "compare"))
    with silenced():
        found = compare_models(places, held / "prepare", keys if loaded.data.encrypt else None, keys)
    if page:
        from ..jobs.compare_report import write

        write(page, short_names(first, second), places, found)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    show(plain_table(("figure", *short_names(first, second), "difference (95 %)", "better"), lines(found)))
    typer.echo(f"{found['rows']:,} test rows; {found['test']}: {found['verdict']}")


@app.command()
def suspects(folder: ProjectFolder, run: RunFolder = None) -> None:
    """Name training rows whose label is probably wrong, by confident learning; needs a run that prepared its data.

    Example:  heliograph suspects examples/digits
    """
    loaded = load(folder)
    from ..jobs.display import Display
    from ..jobs.run import key_store
    from ..jobs.suspects import suspects as look
    from ..serve.access import require_role

    held = run_folder(folder, run)
    keys = key_store(loaded, folder.resolve(), held)
    require_role(keys, Verb.READ, loaded.name)
    require_prepared(held, folder)
    display = Display()
    with display.open(), display.stage("suspects"):
        said = look(held / "prepare", keys if loaded.data.encrypt else None, held, display.update)
    typer.echo(said)


def require_prepared(held: Path, folder: Path) -> None:
    if not (held / "prepare" / "manifest.json").exists():
        raise RunError(f"{held}: has no prepared rows yet: run `heliograph run {folder}` first")


@app.command()
def tune(folder: ProjectFolder, run: RunFolder = None) -> None:
    """Search the keys that the project's `tune.space` names: Bayesian by default, each trial a training.

    What is done is kept: the same command goes on where it was stopped, and more `trials` add to those there are. The best
    configuration is written as a project that `heliograph run` trains to the end.

    Example:  heliograph tune examples/digits
    """
    loaded = load(folder)
    from ..jobs.display import Display
    from ..jobs.run import key_store, opened
    from ..jobs.space import space_of
    from ..jobs.tune import tune as search
    from ..serve.access import require_role

    space_of(loaded)
    held = run_folder(folder, run)
    require_role(key_store(loaded, folder.resolve(), held), Verb.TRAIN, loaded.name)
    with opened(held, loaded.train.processes, Display()) as current:
        lines = search(loaded, folder.resolve(), current)
    for line in lines:
        typer.echo(line)
