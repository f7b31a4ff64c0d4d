"""A YAML file as a typed model: `heliograph.yaml`, a cluster file.

In: a file, and the model that it shall be. Out: the model, frozen, or one ProjectError that lists every mistake with its line,
its key, what was found and what fits.

YAML is composed to nodes first, not loaded straight to a dict, because only nodes know their lines; pydantic then says
which key is wrong and the node map says where it stands.
"""

import difflib
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from .errors import ProjectError

Key = tuple[str | int, ...]


class Section(BaseModel):
    """A mapping of the file: its keys are the fields, and the texts under them say what belongs there."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


Settings = TypeVar("Settings", bound=Section)


def read(file: Path, model: type[Settings]) -> Settings:
    """Read and validate a file that is there.

    Raises ProjectError with a line for every mistake.
    """
    try:
        node = yaml.compose(file.read_text(), yaml.SafeLoader)
    except UnicodeDecodeError:
        raise ProjectError(f"{file}: is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "is not YAML"
        raise ProjectError(f"{file}{line}: {reason} (indent with spaces, one `key: value` a line)") from None
    if not isinstance(node, yaml.MappingNode):
        raise ProjectError(f"{file}:1: should be a mapping with these keys: {', '.join(model.model_fields)}")
    lines: dict[Key, int] = {}
    problems: list[tuple[int, str]] = []
    value = _plain(node, (), lines, problems)
    settings = None
    try:
        settings = model.model_validate(value)
    except ValidationError as error:
        explained: dict[Key, tuple[int, str]] = {}
        for item in error.errors():  # of a union, what its first member says
            explained.setdefault(_key(item, value), _explain(item, model, value, lines))
        problems += explained.values()
    if problems or settings is None:
        raise ProjectError("\n".join(f"{file}:{line}: {text}" for line, text in sorted(set(problems))))
    return settings


def hint(found: str, known: list[str]) -> str:
    """What a name that is not known may have been meant for."""
    near = difflib.get_close_matches(found, known, 1)
    return f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"


def _plain(node: yaml.Node, key: Key, lines: dict[Key, int], problems: list[tuple[int, str]]) -> Any:
    """A node as plain Python; notes the line of every key, and every key that stands twice."""
    lines.setdefault(key, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        out = {}
        for name_node, child in node.value:
            name = str(name_node.value)
            line = name_node.start_mark.line + 1
            if name in out:
                problems.append((line, f"{_dotted((*key, name))}: stands here a second time: keep one"))
            lines[(*key, name)] = line
            out[name] = _plain(child, (*key, name), lines, problems)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*key, i), lines, problems) for i, child in enumerate(node.value)]
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError):
        problems.append((node.start_mark.line + 1, f"{_dotted(key)}: found {node.value!r}: not a plain value"))
        return None


def _explain(item: Any, model: type[Section], value: Any, lines: dict[Key, int]) -> tuple[int, str]:
    """One pydantic error as (line, text); the line of the nearest key that the file really has."""
    key = _key(item, value)
    where = key
    while where and where not in lines:
        where = where[:-1]
    line = lines.get(where, 1)
    match item["type"]:
        case "union_tag_invalid" | "union_tag_not_found":
            by = item["ctx"]["discriminator"].strip("'")
            found, known = item["ctx"].get("tag"), [str(tag) for tag in _members(_annotation(model, key, value))]
            said = hint(str(found), known)
            line = lines.get((*key, by), line)
            return line, f"{_dotted((*key, by))}: " + (f"found {found!r}: {said}" if found else f"is missing: {said}")
        case "extra_forbidden":
            return line, f"{_dotted(key)}: unknown key: {hint(str(key[-1]), _known_keys(model, key[:-1], value))}"
        case "missing":
            return line, f"{_dotted(key)}: is missing: {_says(model, key, value)}"
        case "string_pattern_mismatch":
            return line, f"{_dotted(key)}: found {item['input']!r}: should be {_says(model, key, value)}"
    fits = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not key:
        return line, fits
    found = item["input"]
    found = "nothing" if found is None else repr(found)
    return line, f"{_dotted(key)}: found {found[:60]}: {fits}"


def _key(item: Any, value: Any) -> Key:
    """Where an error is, in the file: pydantic also names the member of a union that it tried, by its type or its tag, and the
    place in a list of one that stands without a list."""
    out: list[str | int] = []
    before: str | int = ""
    for part in item["loc"]:
        tag = isinstance(before, int) and isinstance(value, dict) and part in value.values()
        before = part
        if tag or _is_union_member(part) or (isinstance(part, int) and not isinstance(value, list)):
            continue
        out.append(part)
        value = _at(value, part)
    return tuple(out)


def _is_union_member(part: str | int) -> bool:
    """No key of ours has these names."""
    return part in ("bool", "int", "float", "str") or (isinstance(part, str) and "[" in part)


def _at(value: Any, part: str | int) -> Any:
    try:
        return value[part]
    except (KeyError, IndexError, TypeError):
        return None


def _annotation(model: type[Section], key: Key, value: Any) -> Any:
    """The type that belongs at `key` of a file that holds `value`; None where nothing does."""
    here: Any = model
    for part in key:
        value_here, value = value, _at(value, part)
        here = _member(here, value_here)
        if get_origin(here) in (list, dict):
            here = get_args(here)[-1]
        elif isinstance(here, type) and issubclass(here, BaseModel) and part in here.model_fields:
            here = here.model_fields[str(part)].annotation
        else:
            return None
    return here


def _member(annotation: Any, value: Any) -> Any:
    """Of a union, the member that has keys of its own; of a tagged one, that of `value`."""
    if get_origin(annotation) is Annotated and not _members(annotation):
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is list and isinstance(value, dict):
        annotation = get_args(annotation)[0]  # one that stands without a list
    tagged = _members(annotation)
    if tagged:
        return next((m for tag, m in tagged.items() if isinstance(value, dict) and tag in value.values()), None)
    while get_origin(annotation) in (Union, UnionType):
        members = get_args(annotation)
        keyed = [m for m in members if get_origin(m) in (list, dict) or (isinstance(m, type) and issubclass(m, BaseModel))]
        annotation = (keyed or members)[0]
    return annotation


def _members(annotation: Any) -> dict[Any, Any]:
    """Tag to member, of a union with a discriminator."""
    if get_origin(annotation) is not Annotated:
        return {}
    union, *metadata = get_args(annotation)
    by = next((m.discriminator for m in metadata if isinstance(m, FieldInfo) and m.discriminator), None)
    return {get_args(m.model_fields[by].annotation)[0]: m for m in get_args(union)} if isinstance(by, str) else {}


def _section(model: type[Section], key: Key, value: Any) -> type[BaseModel] | None:
    at = value
    for part in key:
        at = _at(at, part)
    found = _member(_annotation(model, key, value), at)
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def _known_keys(model: type[Section], key: Key, value: Any) -> list[str]:
    section = _section(model, key, value)
    return list(section.model_fields) if section else []


def _says(model: type[Section], key: Key, value: Any) -> str:
    """What belongs at `key`: the text under its field."""
    section = _section(model, key[:-1], value)
    field = section.model_fields.get(str(key[-1])) if section else None
    return (field and field.description) or "it has no default"


def _dotted(key: Key) -> str:
    out = ""
    for part in key:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else part
    return out
