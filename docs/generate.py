"""Writes the reference from the code, each time the documents are built: the project file, the commands, Python, the errors."""

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic_core import PydanticUndefined


def on_files(files: Files, config: Any) -> Files:
    """mkdocs' hook."""
    pages = {"project": project_page, "commands": commands_page, "python": python_page, "errors": errors_page}
    for name, made in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=made()))
    return files


def project_page() -> str:
    from heliograph import project

    parts = ["# Project file\n\n`heliograph.yaml`: every key, what belongs there, and its default. No other key is taken."]
    done: list[type[BaseModel]] = []
    waiting: list[tuple[str, type[BaseModel]]] = [("", project.Project)]
    while waiting:
        where, section = waiting.pop(0)
        if section in done:
            continue
        done.append(section)
        title = f"`{where}`" if where else "The file"
        text = [f"## {title}", inspect.cleandoc(section.__doc__ or "")] if where else [f"## {title}"]
        text.append("| key | type | default | |\n|---|---|---|---|")
        rows, said = [], docstrings(section)
        for name, field in section.model_fields.items():
            inner = list(sections(field.annotation))
            place = f"{where}.{name}".lstrip(".")
            waiting += [(place if len(inner) == 1 else f"{place}: {each.__name__}", each) for each in inner]
            default = "required" if field.default is PydanticUndefined and field.default_factory is None else shown(field.default)
            rows.append(f"| `{name}` | {kind(field.annotation)} | {default} | {cell(said.get(name, ''))} |")
        parts.append("\n\n".join(text) + "\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The text under each key, of the class and of those that it comes from."""
    found = {}
    for each in reversed([c for c in section.__mro__ if issubclass(c, BaseModel) and c is not BaseModel]):
        source = inspect.getsource(each)
        for name, text in re.findall(r'^    (\w+): .*?\n    """(.+?)"""', source, re.MULTILINE | re.DOTALL):
            found[name] = text
    return found


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from sections(inner)


def kind(annotation: Any) -> str:  # noqa: PLR0911
    if annotation is type(None):
        return "nothing"
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(dict.fromkeys(kind(a) for a in get_args(annotation) if a is not type(None)))
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{a}`" for a in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {kind(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    if get_args(annotation):
        return kind(get_args(annotation)[0])
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return f"section `{annotation.__name__}`"
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "`true`, `false`"}
    return names.get(getattr(annotation, "__name__", ""), "anything")


def shown(default: Any) -> str:
    if default is None or default is PydanticUndefined:
        return ""
    if isinstance(default, BaseModel):
        return "section"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def commands_page() -> str:
    from heliograph.cli import app
    from typer.main import get_command

    group: Any = get_command(app)
    exits = "0: done. 1: a mistake of heliograph's own. 2: a mistake that the message explains. 130: Ctrl-C, 143: SIGTERM."
    parts = [f"# Commands\n\nExit codes: {exits} `heliograph --install-completion` completes commands in bash, zsh and fish."]

    def add(name: str, command: Any) -> None:
        if inner := getattr(command, "commands", None):
            for each, sub in inner.items():
                add(f"{name} {each}".strip(), sub)
            return
        text, _, example = inspect.cleandoc(command.help or "").partition("Example:")
        lines = [f"## {name}\n\n{text.strip()}"]
        if example:
            lines.append("```console\n" + "\n".join(f"$ {line.strip()}" for line in example.strip().splitlines()) + "\n```")
        rows = [
            f"| {', '.join(f'`{o}`' for o in p.opts) if p.param_type_name == 'option' else f'`{p.name}`'} | "
            f"{cell(getattr(p, 'help', None) or '')} |"
            for p in command.params if p.name != "help"
        ]  # fmt: skip
        if rows:
            lines.append("| option | |\n|---|---|\n" + "\n".join(rows))
        parts.append("\n\n".join(lines))

    add("", group)
    return "\n\n".join(parts) + "\n"


def python_page() -> str:
    import heliograph

    parts = ["# Python\n\n`import heliograph` loads neither Ray nor TensorFlow; what is here is loaded when it is asked for."]
    for name in ("run", "Run", "serve", "Served", "Client", "AsyncClient"):
        found = sys.modules["heliograph.serve.here"].serve if name == "serve" else getattr(heliograph, name)
        if name == "Run":
            import heliograph.serve.here
        if inspect.isclass(found):
            text = [f"## {name}\n\n{prose(found)}"]
            for method, value in vars(found).items():
                plain = getattr(value, "func", getattr(value, "fget", value))
                if not method.startswith("_") and inspect.isfunction(plain) and plain.__doc__:
                    signature = inspect.signature(plain) if inspect.isfunction(value) else ""
                    text.append(f"### {method}\n\n`{name}.{method}{signature}`\n\n{prose(plain)}")
            parts.append("\n\n".join(text))
        else:
            parts.append(f"## {name}\n\n`heliograph.{name}{inspect.signature(found)}`\n\n{prose(found)}")
    return "\n\n".join(parts) + "\n"


def prose(what: Any) -> str:
    return inspect.cleandoc(what.__doc__ or "")


def errors_page() -> str:
    from heliograph import errors

    kinds = [e for e in vars(errors).values() if inspect.isclass(e) and issubclass(e, errors.HeliographError)]
    rows = [f"| `{e.__name__}` | {f'`{e.__base__.__name__}`' if e.__base__ in kinds else ''} | {cell(prose(e))} |" for e in kinds]
    return (
        "# Errors\n\nEach error is one line that says what was found, where, and what to do. The command line prints it and ends "
        "with exit code 2; the Python functions raise it, and `heliograph.errors.HeliographError` catches all of them.\n\n"
        "| class | is a | when, and what to do |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


sys.path.insert(0, str(Path(__file__).parent.parent))
