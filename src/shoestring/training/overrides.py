"""`key=value` arguments of the command line, put over the values of a run file."""

from typing import Any

from shoestring.errors import SettingError, did_you_mean

from .marked_yaml import KeyPath, MarkedYaml, Place, parse_marked_yaml


def apply_override(run: MarkedYaml, override: str) -> None:
    """Set one value of `run` in place.

    override: `train.learning_rate=1e-4`; the value is YAML: `[q_proj, v_proj]` is a list, and `data.test=` empties it.
        An entry of a list is named by its number from 0, or by its only key: `recipe.0.lora.r=4`, `recipe.lora.r=4`.

    Keys that do not exist yet are made; whether they are known is for the checks of the run file to say.
    Raises SettingError if it has no `=`, names an entry that a list lacks, or goes below a single value.
    """
    name, equals, text = override.partition("=")
    where = f"command line, {override}"
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise SettingError(f"{where}: write overrides as key=value, for example train.learning_rate=1e-4.")
    path: KeyPath = ()
    inside: Any = run.values
    for depth, key in enumerate(keys):
        above = ".".join(keys[:depth])
        if isinstance(inside, list):
            step = _entry(inside, key, above, where)
        elif isinstance(inside, dict):
            step = (key,)
            if inside.get(key) is None and depth < len(keys) - 1:
                inside[key] = {}
                run.places[*path, key] = Place(where)
        else:
            raise SettingError(f"{where}: {above} is a single value ({inside!r}); nothing is below it.")
        for part in step:
            inside = inside.get(part) if isinstance(inside, dict) else inside[part]
        path += step
    run.replace(path, parse_marked_yaml(text.strip() or "null", where, lines=False))


def _entry(entries: list, key: str, list_name: str, where: str) -> KeyPath:
    """The path below a list that `key` names: (number,), or (number, key) where the key of the entry is given."""
    named = [index for index, entry in enumerate(entries) if isinstance(entry, dict) and list(entry) == [key]]
    if len(named) == 1:
        return (named[0], key)
    if len(named) > 1:
        raise SettingError(f"{where}: {list_name} has {key} {len(named)} times; give the entry's number, from 0.")
    if key.isdecimal() and int(key) < len(entries):
        return (int(key),)
    if key.lstrip("-").isdecimal() or not entries:
        held = f"{len(entries)} entries, numbered from 0" if entries else "no entries"
        raise SettingError(f"{where}: {list_name} has {held}; there is no {list_name}.{key}.")
    names = [str(next(iter(entry))) for entry in entries if isinstance(entry, dict) and entry]
    raise SettingError(f"{where}: {list_name} has no entry {key!r}. {did_you_mean(key, names)}")
