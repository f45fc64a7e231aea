"""Problems of a settings file in words: what pydantic found, where it is written, what is allowed, what is near."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel

from ..errors import did_you_mean
from .marked_yaml import KeyPath, MarkedYaml, Place
from .train_fields import shown

Problem = tuple[Place, str]
Sections = Mapping[KeyPath, type[BaseModel]]


def explain(
    found: Any, marked: MarkedYaml, sections: Sections, elsewhere: Callable[[KeyPath], str] = lambda path: ""
) -> Problem:
    """One of pydantic's findings in our words, with its place.

    sections: the models by the path they stand at; descriptions of their fields say what is missing. elsewhere: where
    an unknown key belongs, as a sentence, if it is known in another place.
    """
    path: KeyPath = tuple(part for part in found["loc"] if part != "[key]")
    key = ".".join(map(str, path))
    kind, allowed = found["type"], found.get("ctx", {})
    place = marked.place(path)
    if kind == "missing":
        section = sections[path[:-1]]
        return marked.place(path[:-1]), f"{key} is missing: {section.model_fields[str(path[-1])].description}."
    if kind == "extra_forbidden":
        known = elsewhere(path) or did_you_mean(str(path[-1]), sections[path[:-1]].model_fields)
        return place, f"Unknown key {key}. {known}"
    words = {
        "string_type": "text",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "model_type": "a mapping (key: value)",
        "model_attributes_type": "a mapping (key: value)",
        "dict_type": "a mapping (key: value)",
        "list_type": "a list, each entry begun with '- '",
        "greater_than_equal": f"at least {allowed.get('ge')}",
        "literal_error": f"one of {allowed.get('expected', '')}".replace("'", "").replace(" or ", ", "),
        "string_too_short": "not empty",
    }
    if kind not in words:
        return place, f"{key}: {found['msg'].removeprefix('Value error, ')}, got {shown(found['input'])}."
    if kind == "string_type" and place.text and found["input"] is not None:
        return (
            place,
            f"{key} must be text, got {place.text}, which YAML reads as {_yaml_kind(found['input'])}; quote it.",
        )
    return place, f"{key} must be {words[kind]}, got {shown(found['input'])}."


def _yaml_kind(value: Any) -> str:
    return "true or false" if isinstance(value, bool) else "a number"


def told(problems: list[Problem], source: str) -> str:
    """One message of all problems, in the order of the file."""
    problems = sorted(problems, key=lambda problem: problem[0].line)
    lines = [f"{place.where}: {message}" for place, message in problems]
    if len(lines) == 1:
        return lines[0]
    return "\n".join([f"{len(lines)} problems in {source}:", *(f"  {line}" for line in lines)])
