"""Write the tables of docs/results/README.md, and that of README.md, from the results.

    python benchmarks/tables.py            # after results have changed
    python benchmarks/tables.py --check    # exits with 1 where a page and the results differ

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; its names are those of `TABLES`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from result import Row, read_rows
from shoestring.compare.comparison import Difference
from shoestring.compare.wording import FIRST_COSTS, difference_text, value_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = (ROOT / "README.md", RESULTS / "README.md")
TRAINED = re.compile(
    r"(?P<part>[^,]+)(?P<longer>, longer)?, (?P<name>.+) beside (?P<base>.+), "
    r"(?P<seeds>\d+) of (?P<all>\d+) seeds: (?P<what>.+)"
)
COST = re.compile(r"(?P<model>[^,]+), (?P<name>[^,]+) beside LoRA r=(?P<r>\d+): (?P<what>.+)")
IN_PLACE = re.compile(r"\w+ (?P<variant>in [^,]+), (?P<name>[^,]+) beside (?P<base>.+): (?P<what>.+)")
Found = dict[str, dict[str, tuple[re.Match[str], Row]]]
"""By name of the method, and by what was measured."""


def found(rows: Iterable[Row], pattern: re.Pattern[str], **wanted: str | None) -> Found:
    """The rows whose names fit the pattern with these parts, in their order; a second baseline is part of the name."""
    table: Found = {}
    first: dict[str, str | None] = {}
    for row in rows:
        if (match := pattern.fullmatch(row.name)) and all(match[key] == value for key, value in wanted.items()):
            name, base = match["name"], match.groupdict().get("base")
            name = name if first.setdefault(name, base) == base else f"{name} beside {base}"
            table.setdefault(name, {})[match["what"]] = match, row
    return table


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    head = list(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def quality(file: str, parts: Mapping[str, str], longer: bool = False) -> str:
    """Mean and spread of trainings beside their baselines, and learning rates; how many goals hold.

    parts: what a reader is told of each part of the file. longer: of the longer trainings, with what their last quarter
    still took off the held-out loss.
    """
    rows = read_rows(RESULTS / file)
    of_parts = [found(rows, TRAINED, part=part, longer=", longer" if longer else None) for part in parts]
    head, columns = ["method"], 4 if longer else 3
    for part, some in zip(parts.values(), of_parts, strict=True):
        measure = _measure(some)
        head += [f"{part}: {measure}", "beside", *(["last quarter"] if longer else []), "rates"]
    names = list(dict.fromkeys(name for some in of_parts for name in some))
    lines = []
    for name in names:
        cells = [_trained(some[name], _measure(some)) if name in some else [""] * columns for some in of_parts]
        lines.append([f"`{name}`", *(cell for part in cells for cell in part)])
    goals = [row.holds for some in of_parts for one in some.values() for _, row in one.values() if row.goal]
    held = f"\n\n{sum(map(bool, goals))} of {len(goals)} goals hold." if goals else ""
    return f"{markdown(head, lines)}{held}"


def _measure(some: Found) -> str:
    """What most rows are of: the first row of the first method."""
    return next((what for one in some.values() for what in one), "")


def _trained(one: Mapping[str, tuple[re.Match[str], Row]], measure: str) -> list[str]:
    """The cells of one method in one part. measure: that of the column; where the method has another one, it is named.

    A share that a technique reports beside its quality, such as the density of activations, stands after it.
    """
    (match, row), *others = one.values()
    rest = {other.name.rsplit(": ", 1)[1]: other for _, other in others}
    spread = rest.get(f"standard deviation of {match['what']}")
    ours, base = (f"{value:.3f}" for value in (row.ours, row.baseline))
    if spread:
        ours, base = f"{ours} ± {spread.ours:.3f}", f"{base} ± {spread.baseline:.3f}"
    seeds = "" if match["seeds"] == match["all"] else f" ({match['seeds']} of {match['all']} seeds)"
    if match["what"] != measure:
        ours, base = f"{ours} ({match['what']})", f"{base} ({match['what']})"
    missed = " **missed**" if any(each.holds is False for each in (row, *rest.values())) else ""
    if also := rest.get("density"):
        ours, base = f"{ours}, density {also.ours:.3f}", f"{base}, density {also.baseline:.3f}"
    cells = [f"{ours}{seeds}{missed}", f"{base} ({match['base']})"]
    if taken := rest.get("share of the held-out loss that the last quarter took"):
        cells.append(f"{100 * taken.ours:.1f} %, {100 * taken.baseline:.1f} %")
    rates = rest["learning rate"]
    return [*cells, f"{rates.ours:g}, {rates.baseline:g}"]


def costs(file: str, models: Mapping[str, str]) -> str:
    """Trained parameters beside those of the nearest LoRA, and shares of its bytes kept, peak and seconds."""
    rows = read_rows(RESULTS / file)
    of_models = [found(rows, COST, model=model) for model in models]
    head = ["method"]
    for model in models.values():
        head += [f"{model}: trained, LoRA (r)", "kept", "peak", "time"]
    lines = []
    for name in dict.fromkeys(name for some in of_models for name in some):
        cells = [f"`{name}`"]
        for some in of_models:
            cells += _cost(some[name]) if name in some else [""] * 4
        lines.append(cells)
    return markdown(head, lines)


def _cost(one: Mapping[str, tuple[re.Match[str], Row]]) -> list[str]:
    match, trained = one["trained parameters"]
    kept, peak, seconds = (one[what][1].ratio for what in ("bytes kept", "peak above the weights", "seconds"))
    return [
        f"{trained.ours:,}, {trained.baseline:,} ({match['r']})",
        f"{kept:.3f}",
        f"{peak:.3f}",
        f"{seconds:.2f}",
    ]


def in_place(file: str, variants: Mapping[str, str]) -> str:
    """Shares of each baseline's bytes kept, peak and seconds, and how many goals hold; a miss is marked.

    variants: what a reader is told of each.
    """
    matches = ((IN_PLACE.fullmatch(row.name), row) for row in read_rows(RESULTS / file))
    measures = {"bytes kept": "kept", "peak above the weights": "peak", "seconds": "time"}
    others = {"peak, weights and states included": "peak above the weights"}
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    goals = []
    for match, row in matches:
        if match is None:
            continue
        if row.goal:
            goals.append(row.holds)
        what = others.get(match["what"], match["what"])
        missed = " **missed**" if row.holds is False else ""
        cells.setdefault((match["name"], match["base"]), {})[match["variant"], what] = f"{row.ratio:.3f}{missed}"
    columns = [(variant, what) for variant in variants for what in measures]
    head = ["method", "beside", *(f"{variants[variant]}: {measures[what]}" for variant, what in columns)]
    lines = [[f"`{name}`", base, *(some.get(at, "") for at in columns)] for (name, base), some in cells.items()]
    return f"{markdown(head, lines)}\n\n{sum(map(bool, goals))} of {len(goals)} goals hold."


def plain(file: str, without: Iterable[str] = ()) -> str:
    """Rows as they are, but for those whose names begin with one of `without`; bytes in MB."""
    rows = [row for row in read_rows(RESULTS / file) if not row.name.startswith(tuple(without))]
    words = {True: "yes", False: "**no**", None: ""}
    lines = []
    for row in rows:
        scale = 1e6 if "bytes" in row.name else 1
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
        values = (_number(value / scale) for value in (row.ours, row.baseline))
        goal = row.goal.removeprefix("ratio ")
        lines.append([row.name.replace("bytes", "MB"), *values, ratio, goal, words[row.holds]])
    return markdown(["", "ours", "beside", "ratio", "goal", "holds"], lines)


def fronts(name: str, also: Iterable[str] = ()) -> str:
    """Of a suite: full tuning, the baseline, and the recipes that none beats in both quality and memory or time.

    also: other recipes of which something is said.
    """
    comparison = json.loads((RESULTS / name / "comparison.json").read_text(encoding="utf-8"))
    units = {measure["name"]: measure["unit"] for measure in comparison["measures"]}
    quality, baseline = comparison["quality"], comparison["baseline"]
    wanted = {"full tuning", baseline, *also}
    columns = {
        quality: quality.replace("_", " "),
        **dict(zip(FIRST_COSTS, ("memory of a step", "median step"), strict=True)),
        "trained_parameters": "trained",
    }
    lines = []
    for recipe in comparison["recipes"]:
        if recipe["name"] not in wanted and not {*FIRST_COSTS} & {*recipe["front"]}:
            continue
        spreads = {column: recipe["values"][column] for column in columns}
        cells = [value_text(found["mean"], units[column], found["std"]) for column, found in spreads.items()]
        apart = recipe["difference"]
        cells.insert(1, difference_text(Difference(**apart), units[quality]) if apart else "")
        lines.append([f"`{recipe['name']}`", *cells])
    head = ["recipe", *columns.values()]
    head.insert(2, f"minus {baseline}")
    return markdown(head, lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


ON_TEXTS = {"classification": "reviews", "decoder": "word problems"}
TABLES: dict[str, Callable[[], str]] = {
    "costs of weight adapters": lambda: costs("adapters.json", {"minilm": "encoder", "smollm2": "decoder"}),
    "costs in place": lambda: in_place(
        "in_place.json",
        {"in float32": "float32", "in bfloat16": "bfloat16", "in bfloat16 with chunked_loss": "with chunked loss"},
    ),
    "starts": lambda: plain("rounding_start.json"),
    "costs of selections": lambda: plain("selection.json", ["quality", "forwards"]),
    "quality of selections": lambda: quality("selection.json", {"quality": "reviews"}),
    "equal forwards": lambda: quality("selection.json", {"forwards": "reviews"}),
    "quality of weight adapters": lambda: quality("adapters.json", ON_TEXTS),
    "quality in place": lambda: quality("in_place.json", ON_TEXTS | {"rounded": "2-bit decoder"}),
    "longer trainings of weight adapters": lambda: quality("adapters.json", ON_TEXTS, longer=True),
    "suite encoder": lambda: fronts("encoder", ["recompute", "embedding_pruning"]),
    "suite encoder in short": lambda: fronts("encoder"),
    "suite decoder": lambda: fronts(
        "decoder", ["token_windows", "qlora", "dora", "norm_tuning", "token_tune", "bilevel_zofo"]
    ),
    "suite image": lambda: fronts("image", ["spt", "low_bit_activations"]),
    "suite pretraining": lambda: fronts("pretraining"),
    "suite choices": lambda: fronts("choices", ["t-few"]),
}


def filled(page: str) -> str:
    """The page with every table made again.

    Raises KeyError for a table that is not in TABLES.
    """
    block = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
    return block.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    for page in PAGES:
        there = page.read_text(encoding="utf-8")
        if (made := filled(there)) == there:
            continue
        if options.check:
            sys.exit(f"{page.relative_to(ROOT)} differs from the results: python benchmarks/tables.py writes it again")
        page.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
