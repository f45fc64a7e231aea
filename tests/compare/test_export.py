"""A comparison as Markdown, CSV and a table in a terminal: one ranking, hostile names, raw numbers."""

import csv
import io
import itertools
import re
from dataclasses import replace

import comparisons
import pytest
from rich.console import Console

from shoestring.cli.compare_tables import terminal_table
from shoestring.compare.comparison import Spread
from shoestring.compare.export import csv_text, markdown
from shoestring.compare.page import page
from shoestring.compare.wording import spread_text


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def printed(comparison, width=100):
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=False).print(terminal_table(comparison, width))
    return file.getvalue()


class TestOneRanking:
    def test_all_forms_have_the_recipes_in_the_same_order(self):
        compared = comparisons.make(25)
        names = [recipe.name for recipe in compared.recipes]
        assert [row["recipe"] for row in rows_of(csv_text(compared))] == names
        assert [line.split(" | ")[2].replace("\\", "") for line in markdown(compared).splitlines()[6:31]] == names
        table = page(compared).split('id="table"')[1].split("</table>")[0]
        assert re.findall(r"<bdi>(.*?)</bdi>", table) == names
        found = [line for line in printed(compared).splitlines() if re.match(r" +\d+ ", line)]
        for name, line in zip(names, found, strict=True):
            assert f"  {name}  " in line or "…" in line

    def test_all_forms_mark_the_same_front(self):
        compared = comparisons.make(25)
        front = [recipe.name for recipe in compared.recipes if "peak_bytes" in recipe.front]
        marked = [line.split(" | ")[2].replace("\\", "") for line in markdown(compared).splitlines() if "| ◆ |" in line]
        assert marked == front
        assert [row["recipe"] for row in rows_of(csv_text(compared)) if "peak_bytes" in row["fronts"].split()] == front
        assert sum(" ◆ " in line for line in printed(compared).splitlines()[3:-2]) == len(front)
        table = page(compared).split('id="table"')[1].split("</table>")[0]
        rows = re.findall(r'<span class="mark">.*?<bdi>(.*?)</bdi>', table)
        assert rows == front


class TestMarkdown:
    def test_it_names_failures_machine_and_versions(self):
        text = markdown(comparisons.make(4, failures=2))
        for told in (
            "reversible-1, seed 1: out of memory",
            "- torch: 2.13.0",
            "- cpu: 2 cores, x86\\_64",
            "◆ on the front",
        ):
            assert told in text

    def test_names_stay_in_their_cell(self):
        compared = comparisons.make(6, names=comparisons.HOSTILE)
        rows = markdown(compared).split("\n\n")[2].splitlines()
        assert len(rows) == 6 + 2
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
        assert not re.search(r"(?<!\\)[<`*_\[]", markdown(compared))

    def test_without_recipes_there_is_no_table(self):
        text = markdown(comparisons.make(0, failures=1))
        assert "|" not in text
        assert "0 recipes in 0 runs, 1 run failed, 4 runs to come" in text

    def test_without_a_baseline_there_is_no_difference(self):
        compared = comparisons.make(3, baseline=None)
        assert "less" not in markdown(
            replace(compared, recipes=tuple(replace(r, difference=None) for r in compared.recipes))
        )


class TestCSV:
    def test_numbers_are_those_that_were_measured(self):
        compared = comparisons.make(7)
        for recipe, row in zip(compared.recipes, rows_of(csv_text(compared)), strict=True):
            for measure in compared.measures:
                assert float(row[measure.name]) == recipe.values[measure.name].mean
                assert float(row[f"{measure.name}_std"]) == recipe.values[measure.name].std
            if recipe.difference:
                assert float(row["difference_low"]) == recipe.difference.low

    def test_what_is_missing_is_empty(self):
        compared = comparisons.make(2, seeds=1)
        bare = replace(compared.recipes[0], values={}, difference=None)
        row = rows_of(csv_text(replace(compared, recipes=(bare,))))[0]
        assert row["peak_bytes"] == row["difference"] == row["p"] == ""
        assert rows_of(csv_text(compared))[0]["peak_bytes_std"] == ""

    def test_names_come_back_and_those_that_would_be_computed_do_not_begin_as_formulas(self):
        compared = comparisons.make(6, names=(*comparisons.HOSTILE[:4], "+1", 'a,"b"\nc'))
        found = {row["recipe"] for row in rows_of(csv_text(compared))}
        for recipe in compared.recipes:
            assert {recipe.name, "'" + recipe.name} & found
        assert not [name for name in found if name.lstrip()[0] in "=+-@\t\r＝＋－＠"]

    def test_without_recipes_there_is_the_head_alone(self):
        assert csv_text(comparisons.make(0)).count("\n") == 1


class TestTerminal:
    @pytest.mark.parametrize("names", [(), comparisons.HOSTILE, ("n" * 200, "lora " * 30)])
    def test_it_fits_a_hundred_columns_and_cuts_no_figure(self, names):
        compared = comparisons.make(25, names=names)
        text = printed(compared)
        assert max(map(len, text.splitlines())) <= 100
        for recipe in compared.recipes:
            assert spread_text(recipe.values["accuracy"], "share") in text
            assert spread_text(recipe.values["peak_bytes"], "bytes") in text
            assert spread_text(recipe.values["step_seconds"], "seconds") in text

    def test_what_is_wide_takes_the_room_of_names_and_then_of_the_last_costs(self):
        wide = {"peak_bytes": Spread(2.343e8, 4.2e7, (2.343e8,) * 3)}
        compared = comparisons.make(8, names=("bottleneck adaptformer",))
        recipes = tuple(replace(recipe, values={**recipe.values, **wide}) for recipe in compared.recipes)
        units = {"accuracy": "share", "peak_bytes": "bytes", "step_seconds": "seconds", "trained_parameters": "numbers"}
        counts = []
        for width in range(100, 44, -2):
            lines = printed(replace(compared, recipes=recipes), width).splitlines()
            assert max(map(len, lines)) <= width
            rows = [line for line in lines if re.match(r" +\d+ ", line)]
            counts.append(set())
            for recipe, row in zip(recipes, rows, strict=True):
                figures = [spread_text(recipe.values[name], unit) for name, unit in units.items()]
                shown = [figure for figure in figures if figure in row]
                assert shown == figures[: len(shown)]
                counts[-1].add(len(shown))
        assert [count for count, _ in itertools.groupby(counts)] == [{4}, {3}, {2}, {1}]

    def test_names_are_no_markup_and_move_no_cursor(self):
        text = printed(comparisons.make(3, names=("[red]x[/]", "a\x1b[2Jb\u202ec", "c\nd")))
        assert "[red]x[/]" in text
        assert "\x1b" not in text
        assert "a�[2Jb�c" in text
        assert "c d" in text

    def test_differences_within_noise_are_in_parentheses(self):
        compared = comparisons.make(25)
        noise = sum(bool(recipe.difference and not recipe.difference.clear) for recipe in compared.recipes)
        assert noise
        assert len(re.findall(r"\([−+]?\d+\.\d+\)", printed(compared))) == noise

    def test_it_is_there_before_a_run_has_finished(self):
        assert "3 runs failed, 4 runs to come" in printed(comparisons.make(0, failures=3))
