"""`shoestring methods [NAME]`: the techniques and named recipes there are, or one of them whole."""

import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring import recipes
from shoestring.errors import SettingError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from shoestring.recipe import TechniqueInfo

EXAMPLES = """[bold]Examples[/]

[cyan]shoestring methods[/]   all techniques, by kind

[cyan]shoestring methods lora[/]   one, with its settings

[cyan]shoestring methods qlora[/]   a recipe by name, with what is in it

[cyan]shoestring methods --kind blocks[/]   those that change how a block runs

[cyan]shoestring methods --json[/]   for other programs"""

LABELS = ("Source", "Code", "Update", "Shapes", "Start", "Trains", "Costs", "Differs")


def methods(
    name: Annotated[
        str | None, typer.Argument(help="A technique, as in a recipe, or a recipe by name.", show_default=False)
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Only techniques of this kind.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List the techniques a recipe may hold, or show one whole."""
    from shoestring.recipe import known_techniques

    known = known_techniques()
    if kind is not None:
        kinds = {info.kind for info in known.values()}
        if kind not in kinds:
            raise SettingError(f"Unknown kind {kind!r}. {did_you_mean(kind, kinds)}")
        known = {key: info for key, info in known.items() if info.kind == kind}
    if name is None:
        _show_all(known, as_json)
        return
    named = recipes.names() if kind is None else []  # which are of no kind
    key = next((each for each in (*known, *named) if _plain(each) == _plain(name)), None)
    if key is None:
        of_kind = f" of kind {kind}" if kind else ""
        raise SettingError(f"Unknown method {name!r}{of_kind}. {did_you_mean(_plain(name), [*known, *named])}")
    if key in known:
        _show_one(known[key], as_json)
    else:
        _show_recipe(key, known, as_json)


def _plain(name: str) -> str:
    """A name in any case, with dashes or underscores, as one word."""
    return name.lower().replace("-", "_")


def read_labels(doc: str) -> dict[str, str]:
    r"""The labelled lines of a module docstring: `Source`, `Update` and so on, continuation lines joined.

    >>> read_labels("HUT: a title.\n\nSource   Zhang 2024\nCosts    one tensor,\n         kept for backward")
    {'Source': 'Zhang 2024', 'Costs': 'one tensor, kept for backward'}
    """
    labels: dict[str, str] = {}
    current = None
    for line in inspect.cleandoc(doc).splitlines():
        begun = re.match(rf"({'|'.join(LABELS)}) {{2,}}(\S.*)", line)
        if begun:
            current = begun[1]
            labels[current] = begun[2].rstrip()
        elif current and line.startswith(" ") and line.strip():
            labels[current] += f" {line.strip()}"
        else:
            current = None
    return labels


def read_settings(settings_class: type) -> list[dict[str, str | None]]:
    """Name, type, default (None where one must be given) and doc of each setting of a dataclass, as text."""
    from shoestring.adapters.as_technique import FILLED_BY_PEFT

    documented: dict[str, str] = {}
    for base in reversed(settings_class.__mro__):
        documented |= _documented_fields(base.__doc__ or "")
    try:
        hints = typing.get_type_hints(settings_class)
    except NameError:  # a type that is imported for checkers only
        hints = {}
    settings = []
    for item in dataclasses.fields(settings_class):
        if not item.init or item.name.startswith("_") or item.name in FILLED_BY_PEFT:
            continue
        help_text = item.metadata.get("help") or documented.get(item.name) or ""
        settings.append(
            {
                "name": item.name,
                "type": _type_name(hints.get(item.name, item.type)),
                "default": _default(item),
                "doc": " ".join(str(help_text).split()),
            }
        )
    return settings


def _documented_fields(doc: str) -> dict[str, str]:
    """Fields described in a class docstring as `name: what it is`, continuation lines indented further."""
    fields: dict[str, str] = {}
    current = None
    for line in inspect.cleandoc(doc).splitlines():
        begun = re.match(r"(\w+): (\S.*)", line)
        if begun:
            current = begun[1]
            fields[current] = begun[2].rstrip()
        elif current and line.startswith(" ") and line.strip():
            fields[current] += f" {line.strip()}"
        else:
            current = None
    return fields


def _type_name(hint: Any) -> str:
    """An annotation as one writes it today, `list[str] | None`, without module names."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in (None, type(None)):
        return "None"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(arm) for arm in sorted(inner, key=lambda arm: arm is type(None)))
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, inner))}]"
    name = getattr(origin or hint, "__name__", str(hint))
    return f"{name}[{', '.join(map(_type_name, inner))}]" if inner else name


def _default(item: dataclasses.Field) -> str | None:
    if item.default is not dataclasses.MISSING:
        return repr(item.default)
    if item.default_factory is dataclasses.MISSING:
        return None
    made = item.default_factory()
    return repr(made) if isinstance(made, list | dict | set | tuple) else f"{type(made).__name__}()"


def _exact(info: "TechniqueInfo") -> str:
    return {True: "yes", False: "no", None: ""}[info.exact]


def _composes(info: "TechniqueInfo") -> str:
    """What a recipe must or must not have beside it; empty where anything goes."""
    rules = []
    if info.kind == "prompts" or getattr(info.settings_class, "alone_in_phase", False):
        rules.append(f"no other {info.kind}")
    rules += [f"no other on {claim}" for claim in sorted(getattr(info.settings_class, "claims", ()))]
    rules += [f"nothing that changes {what} on the way" for what in sorted(getattr(info.settings_class, "holds", ()))]
    if needs := getattr(info.settings_class, "needs", None):
        rules.append(f"needs {' or '.join(sorted(phase.name.lower() for phase in needs))}")
    return "; ".join(rules)


def _summary(info: "TechniqueInfo") -> dict[str, Any]:
    labels = read_labels(info.doc or "")
    return {
        "name": info.name,
        "kind": info.kind,
        "origin": info.origin,
        "summary": info.summary,
        "source": labels.get("Source", info.origin),
        "trains": labels.get("Trains"),
        "exact": info.exact,
        "composes": _composes(info),
    }


def _console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)  # a file or pipe has no width of its own


def _show_all(known: "dict[str, TechniqueInfo]", as_json: bool) -> None:
    order = sorted(known.values(), key=lambda info: (info.kind, info.origin != "shoestring", info.name))
    if as_json:
        typer.echo(json.dumps([_summary(info) for info in order], indent=2))
        return
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method", style="cyan", no_wrap=True)
    for column in ("kind", "source", "trains", "exact", "composes"):
        table.add_column(column)
    for info in order:
        row = _summary(info)
        table.add_row(info.name, info.kind, row["source"], row["trains"] or "", _exact(info), row["composes"])
    console = _console()
    console.print(table)
    console.print(f"\n{len(order)} methods; `shoestring methods NAME` shows one with its settings.", highlight=False)
    console.print(
        "\nRecipes by name, `recipe: NAME` in a run file; `shoestring methods NAME` shows one:", highlight=False
    )
    for name in recipes.names():
        console.print(f"  [cyan]{name}[/]  {recipes.summary(name)}", highlight=False)


def _show_one(info: "TechniqueInfo", as_json: bool) -> None:
    settings = read_settings(info.settings_class)
    doc = inspect.cleandoc(info.doc or "")
    if as_json:
        typer.echo(
            json.dumps(_summary(info) | {"labels": read_labels(doc), "doc": doc, "settings": settings}, indent=2)
        )
        return
    from rich.table import Table
    from rich.text import Text

    console = _console()
    exact = {True: "; exact: gradients unchanged", False: "", None: ""}[info.exact]
    console.print(Text.assemble((info.name, "bold cyan"), f"   {info.kind}, from {info.origin}{exact}\n"))
    console.print(Text(doc), highlight=False)
    if not settings:
        return
    table = Table(
        title="Settings", title_justify="left", title_style="bold", box=None, header_style="bold", pad_edge=False
    )
    table.add_column("setting", style="cyan", no_wrap=True)
    for column in ("type", "default", "what it is"):
        table.add_column(column, overflow="fold")
    for item in settings:
        default = "required" if item["default"] is None else item["default"]
        table.add_row(Text(item["name"] or ""), Text(item["type"] or ""), Text(default), Text(item["doc"] or ""))
    console.print()
    console.print(table)


def _show_recipe(name: str, known: "dict[str, TechniqueInfo]", as_json: bool) -> None:
    from shoestring.recipe import Recipe

    recipe = Recipe.named(name)
    purpose, text = recipes.parts(name)
    inside = [_summary(known[technique.name]) for technique in recipe.techniques]
    if as_json:
        values: dict[str, Any] = {"name": name, "kind": "recipe", "summary": recipes.summary(name), "doc": purpose}
        values |= {"exact": recipe.exact, "yaml": text, "recipe": recipe.to_list(), "techniques": inside}
        typer.echo(json.dumps(values, indent=2))
        return
    from rich.table import Table
    from rich.text import Text

    console = _console()
    exact = "; exact: gradients unchanged" if recipe.exact else ""
    console.print(Text.assemble((name, "bold cyan"), f"   a recipe, `recipe: {name}` in a run file{exact}\n"))
    console.print(Text(f"{purpose}\n\n{text}\n"), highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("technique", style="cyan", no_wrap=True)
    for column in ("kind", "what it does"):
        table.add_column(column)
    for row in inside:
        table.add_row(row["name"], row["kind"], Text(row["summary"]))
    console.print(table)
