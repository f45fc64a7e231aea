"""YAML read safely, together with the line on which each value stands, so that an error can name it."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from shoestring.errors import SettingError

KeyPath = tuple[str | int, ...]  # ("recipe", 0, "lora", "r")

MOST_NODES = 100_000  # a run file has some dozens; aliases of aliases could otherwise grow without end
PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}
MERGE_TAG = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Place:
    """Where a value was written: a line of a file, or an argument of the command line.

    where: as an error begins, "first.yaml, line 3" or "command line, train.seed=x".
    line: from 1; 0 on the command line.
    text: a scalar as it was written ("no", where YAML reads false); None for mappings and lists.
    """

    where: str
    line: int = 0
    text: str | None = None


@dataclass
class MarkedYaml:
    """Plain values (dict, list, str, int, float, bool, None) and the place of each, by key path."""

    source: str
    values: Any
    places: dict[KeyPath, Place] = field(default_factory=dict)

    def place(self, path: KeyPath) -> Place:
        """Where `path` was written, or the nearest enclosing value that has a place."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, Place(self.source))

    def below(self, *path: str | int) -> "MarkedYaml":
        """What stands at `path`, which must exist, on its own."""
        values = self.values
        for key in path:
            values = values[key]
        places = {known[len(path) :]: place for known, place in self.places.items() if known[: len(path)] == path}
        return MarkedYaml(self.source, values, places)

    def replace(self, path: KeyPath, part: "MarkedYaml") -> None:
        """Put `part` at `path`, whose parent must exist, with its places instead of those known below `path`."""
        parent = self.values
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = part.values
        self.places = {known: place for known, place in self.places.items() if known[: len(path)] != path}
        self.places |= {(*path, *known): place for known, place in part.places.items()}


def read_marked_yaml(path: Path) -> MarkedYaml:
    """The one document in the file at `path`; None as value where the file is empty.

    Raises SettingError, naming file and line, if it cannot be read or is not plain YAML.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        beside = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = f" Beside it: {', '.join(sorted(beside)[:10])}." if beside else ""
        raise SettingError(f"There is no file {path}.{hint}") from None
    except IsADirectoryError:
        raise SettingError(f"{path} is a folder; name the YAML file in it.") from None
    except NotADirectoryError:
        raise SettingError(f"There is no file {path}: {path.parent} is not a folder.") from None
    except PermissionError:
        raise SettingError(f"{path} may not be read: no permission.") from None
    except UnicodeDecodeError:
        raise SettingError(f"{path} is not a text file in UTF-8.") from None
    return parse_marked_yaml(text, str(path))


def parse_marked_yaml(text: str, source: str, *, lines: bool = True) -> MarkedYaml:
    """The one document in `text`.

    source: how errors name it; with `lines` followed by the line number.

    Raises SettingError if it is not YAML, repeats a key, or holds anything but plain values.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        marked = MarkedYaml(source, None)
        if node is not None:
            marked.values = _Build(loader, marked, lines).value(node, (), frozenset())
        return marked
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}" if lines and mark else source
        raise SettingError(f"{where}: {_explain(error)}") from None
    except yaml.reader.ReaderError:
        raise SettingError(f"{source} is not YAML: it holds characters that no text file has.") from None
    except RecursionError:
        raise SettingError(f"{source} nests its values too deeply.") from None
    finally:
        if loader is not None:
            loader.dispose()


def dump_yaml(values: Any) -> str:
    """Plain values as YAML that `parse_marked_yaml` reads back as they were.

    Raises SettingError if a value is of another kind, such as a set or an object.
    """
    try:
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    except yaml.representer.RepresenterError as error:
        kind = type(error.args[1]).__name__
        raise SettingError(f"A run file holds text, numbers, lists and mappings only, got a {kind}.") from None


def _explain(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or str(error)
    if "'\\t'" in problem:
        return "a tab is in the indentation; YAML indents with spaces only."
    if "expected a single document" in (error.context or ""):
        return "a second document begins ('---'); a run file holds one."
    context = f" {error.context}" if error.context else ""
    return f"this is not YAML:{context} {problem}.".replace("  ", " ")


class _Loader(yaml.SafeLoader):
    """SafeLoader, but `1e-3` is a number, as in YAML 1.2, and dates stay text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes wherever `_Loader` would read something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


@dataclass
class _Build:
    """Turns nodes into values and notes the place of each in `marked`."""

    loader: _Loader
    marked: MarkedYaml
    lines: bool
    count: int = 0

    def value(self, node: yaml.Node, path: KeyPath, parents: frozenset[int]) -> Any:
        self.count += 1
        if id(node) in parents or self.count > MOST_NODES:
            raise SettingError(
                f"{self.where(node)}: an alias (*name) makes the file refer to itself or grow too large."
            )
        if node.tag not in PLAIN_TAGS:
            raise SettingError(
                f"{self.where(node)}: the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not read."
            )
        parents = parents | {id(node)}
        if isinstance(node, yaml.MappingNode):
            self.mark(node, path)
            return self.mapping(node, path, parents)
        if isinstance(node, yaml.SequenceNode):
            self.mark(node, path)
            return [self.value(item, (*path, index), parents) for index, item in enumerate(node.value)]
        self.mark(node, path, text=node.value)
        try:
            return self.loader.construct_object(node)
        except ValueError as error:
            raise SettingError(f"{self.where(node)}: {node.value[:40]!r} is not a value: {error}.") from None

    def mapping(self, node: yaml.MappingNode, path: KeyPath, parents: frozenset[int]) -> dict:
        first_line: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == MERGE_TAG:
                continue
            key = self.key(key_node)
            if key in first_line:
                name = ".".join(map(str, (*path, key)))
                before = f", first on line {first_line[key]}" if self.lines else ""
                raise SettingError(f"{self.where(key_node)}: {name} is given twice{before}; keep one.")
            first_line[key] = key_node.start_mark.line + 1
        self.loader.flatten_mapping(node)  # puts what `<<: *name` brings before the node's own keys
        values = {}
        for key_node, value_node in node.value:
            key = self.key(key_node)
            values[key] = self.value(value_node, (*path, key), parents)
            # A key's line is where users look, also when its value begins further down.
            known = self.marked.places[(*path, key)]
            line = key_node.start_mark.line + 1
            self.marked.places[(*path, key)] = Place(self.where(key_node), line if self.lines else 0, known.text)
        return values

    def key(self, node: yaml.Node) -> str | int:
        key = self.loader.construct_object(node) if isinstance(node, yaml.ScalarNode) else None
        if isinstance(key, bool) or not isinstance(key, str | int):
            written = node.value if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            raise SettingError(f"{self.where(node)}: a key must be text, got {written!r}; put it in quotes if meant.")
        return key

    def where(self, node: yaml.Node) -> str:
        return f"{self.marked.source}, line {node.start_mark.line + 1}" if self.lines else self.marked.source

    def mark(self, node: yaml.Node, path: KeyPath, text: str | None = None) -> None:
        self.marked.places[path] = Place(self.where(node), node.start_mark.line + 1 if self.lines else 0, text)
