"""What all commands share: how they end, the options that mean the same everywhere, where a run lies.

Exit codes: 0 done, 1 a bug of ours (its traceback is in the run's log), 2 a mistake that the message explains,
130 Ctrl-C and 143 SIGTERM (the same command goes on from there).
"""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from .. import __version__
from ..errors import RunError
from ..names import FILE

if TYPE_CHECKING:
    from ..project import Project


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
    from ..cluster.runtime import explained

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
ProjectFolder = Annotated[Path, typer.Argument(help=f"A folder that holds a {FILE}.")]
RunFolder = Annotated[
    str | None, typer.Option("--run", help="The run's folder, or its home s3://BUCKET/FOLDER (default: PROJECT/runs/default).")
]
Trust = Annotated[Path | None, typer.Option(help="The public key (signing.pub) that must have signed the endpoint's keys.")]
Port = Annotated[int | None, typer.Option(help="Listen on this port instead of the project's serve.port.", min=1, max=65535)]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
RegistryPlace = Annotated[str | None, typer.Option("--registry", help="This one instead of the project's `registry`.")]


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"heliograph {__version__}")
        raise typer.Exit


def load(folder: Path) -> "Project":
    """The project of a folder. Raises ProjectError. Not loaded before it is asked for, so that `--help` is quick."""
    from .. import project

    return project.load(folder)


def run_folder(folder: Path, run: str | None) -> Path:
    """Where the run is on this machine; what is stored elsewhere is fetched first, once a command."""
    from ..cluster.mirror import placed

    if run is None:
        return (folder / "runs" / "default").resolve()
    if run not in _placed:
        _placed[run] = placed(run)
    return _placed[run]


_placed: dict[str, Path] = {}


def with_port(loaded: "Project", port: int | None) -> "Project":
    return loaded.model_copy(update={"serve": loaded.serve.model_copy(update={"port": port})}) if port else loaded


def with_registry(loaded: "Project", place: str | None) -> "Project":
    from ..jobs.registry import registry_at

    return loaded.model_copy(update={"registry": str(registry_at(place, Path.cwd()))}) if place else loaded


def keys_of(folder: Path, run: str | None) -> Any:
    from ..jobs.run import key_store

    return key_store(load(folder), folder.resolve(), run_folder(folder, run))
