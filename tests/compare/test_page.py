"""The page of a comparison: what stands in it, no text that leaves its place, nothing that is asked of a network."""

import base64
import hashlib
import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import comparisons
import pytest

from shoestring.compare.comparison import Difference, Failure, Spread
from shoestring.compare.measures import Measure, front
from shoestring.compare.page import page
from shoestring.compare.page_data import POINTS, on_one_grid, page_data
from shoestring.compare.wording import costs, difference_text, frugal, spread_text, value_text, verdict

VOID = {"meta", "input", "br"}
LARGEST = 3_000_000


class Read(HTMLParser):
    """Tags, attributes and texts; closing tags must match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts, self.scripts = [], [], [], {}, []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *each) for each in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    @property
    def data(self):
        return json.loads(self.texts["script"][0])


@pytest.fixture(scope="module")
def hostile():
    return comparisons.make(9, names=comparisons.HOSTILE)


class TestWhatStandsInIt:
    def test_heading_says_what_was_compared_and_on_what(self):
        text = page(comparisons.make(5, failures=2, missing=1))
        for told in ("encoder classification", "text-classification", "packaged:minilm", "2 cores, x86_64", "2.13.0"):
            assert told in text
        assert "5 recipes in 15 runs, 2 runs failed, 1 run to come" in text
        assert "shoestring compare benchmarks/suites/encoder.yaml" in text
        assert "ranked by <b>accuracy</b> (more is better)" in text

    def test_rows_are_in_the_order_of_the_ranking_and_hold_all_measures(self):
        compared = comparisons.make(12)
        rows = re.findall(r'<tr data-recipe="(\d+)"><td data-v="(\d+)">.*?</tr>', page(compared))
        assert [int(place) for place, _ in rows] == list(range(12))
        table = page(compared).split('id="table"')[1].split("</table>")[0]
        for recipe in compared.recipes:
            for measure in compared.measures:
                assert spread_text(recipe.values[measure.name], measure.unit) in table
        for measure in compared.measures:
            assert f'<button type="button">{measure.label}</button>' in table

    def test_the_best_of_each_column_is_marked_in_the_direction_of_its_measure(self):
        compared = comparisons.make(12)
        table = page(compared).split('id="table"')[1].split("</table>")[0]
        marked = set(re.findall(r'<td data-v="([^"]+)" title="[^"]*"><b><span aria-hidden="true">★', table))
        best = set()
        for measure in compared.measures:
            means = [recipe.values[measure.name].mean for recipe in compared.recipes]
            best |= {repr(max(means) if measure.better == "higher" else min(means))} if len(set(means)) > 1 else set()
        assert marked == best

    def test_every_recipe_and_run_file_can_be_copied(self, hostile):
        shown = Read(page(hostile)).texts["code"]
        for recipe in hostile.recipes:
            assert recipe.recipe in shown
            assert recipe.run_file in shown

    def test_failures_have_their_reasons(self):
        reason = "CUDA out of memory\nTried to allocate <2 GiB>"
        text = page(replace(comparisons.make(2), failures=(Failure("lora", 0, reason),)))
        assert "CUDA out of memory\nTried to allocate &lt;2 GiB&gt;" in text
        assert 'href="#failures"' in text

    def test_without_a_finished_run_it_says_so(self):
        text = page(comparisons.make(0, failures=3, missing=2))
        Read(text)
        assert "No run has finished yet." in text
        assert "0 recipes in 0 runs, 3 runs failed, 2 runs to come" in text
        assert text.count("out of memory") == 1
        assert 'id="table"' not in text

    def test_one_recipe_of_one_seed_and_no_baseline_is_a_page_too(self):
        text = page(comparisons.make(1, seeds=1, failures=0, missing=0, baseline=None))
        Read(text)
        assert "±" not in text.split('id="table"')[1].split("</table>")[0]
        assert "minus None" not in text
        assert "(baseline)</td>" not in text

    def test_measures_and_curves_that_are_missing_or_no_number_are_left_out(self):
        compared = comparisons.make(3)
        first, *rest = compared.recipes
        values = {
            "accuracy": Spread(math.nan, None, (math.nan,)),
            "peak_bytes": Spread(math.inf, math.nan, (math.inf,)),
        }
        bare = replace(
            first, values=values, memory={}, losses={0: [(1, math.nan)]}, curve={}, front=(), difference=None
        )
        text = page(replace(compared, recipes=(*rest, bare)))
        data = Read(text).data
        assert data["recipes"][2]["means"] == [None] * len(compared.measures)
        assert data["recipes"][2]["losses"]["y"] == [[None]]
        assert "no number" in text
        assert "infinite" in text

    def test_without_memory_or_curves_there_is_no_empty_section(self):
        compared = comparisons.make(3)
        bare = [replace(recipe, memory={}, losses={}, curve={}) for recipe in compared.recipes]
        text = page(replace(compared, recipes=tuple(bare)))
        assert 'id="memory"' not in text
        assert 'id="curves"' not in text

    def test_what_is_evaluated_on_the_way_has_its_own_name(self):
        compared = comparisons.make(3, on_the_way=comparisons.LOSS)
        assert "<h3>Held-out loss by seconds of training</h3>" in page(compared)
        assert page_data(compared)["onTheWay"]["label"] == "held-out loss"
        assert 'id="time-chart"' not in page(replace(compared, on_the_way=None))

    def test_bars_are_sorted_and_their_pieces_add_up(self):
        compared = comparisons.make(10)
        bars = re.findall(r'<div class="bar" data-recipe="(\d+)">(.*?)</div>', page(compared))
        totals = [sum(compared.recipes[int(place)].memory.values()) for place, _ in bars]
        assert totals == sorted(totals)
        for total, (_, bar) in zip(totals, bars, strict=True):
            widths = [float(width) for width in re.findall(r"width:([\d.]+)%", bar)]
            assert sum(widths) == pytest.approx(100 * total / max(totals), abs=0.05)

    def test_of_many_recipes_those_that_stand_out_have_their_bars_first(self):
        compared = comparisons.make(60)
        text = page(compared)
        first, folded = text.split('<div class="bars">')[1].split("<details><summary>The other ")
        early = {int(place) for place in re.findall(r'data-recipe="(\d+)"', first)}
        wanted = {
            place
            for place, recipe in enumerate(compared.recipes)
            if recipe.name == compared.baseline or {"peak_bytes", "step_seconds"} & set(recipe.front)
        }
        assert early == wanted
        assert folded.startswith(f"{60 - len(wanted)} recipes")

    def test_it_advises_the_cheapest_that_is_not_clearly_worse(self):
        compared = comparisons.make(25)
        cost = costs(compared)[0]
        good = [r for r in compared.recipes if r.difference and (r.difference.mean > 0 or not r.difference.clear)]
        found = min(good, key=lambda recipe: recipe.values["peak_bytes"].mean)
        assert frugal(compared, cost) is found
        advice = page(compared).split('class="advice">')[1].split("</p>")[0]
        assert found.name in advice
        assert difference_text(found.difference, "share") in advice

    def test_where_the_baseline_needs_least_it_says_so(self):
        compared = comparisons.make(25)
        cheap = {"peak_bytes": Spread(1.0, None, (1.0,))}
        recipes = [replace(r, values=r.values | cheap) if r.name == compared.baseline else r for r in compared.recipes]
        compared = replace(compared, recipes=tuple(recipes))
        assert frugal(compared, costs(compared)[0]).name == compared.baseline
        advice = page(compared).split('class="advice">')[1].split("</p>")[0]
        name = f"<b><bdi>{compared.baseline}</bdi></b>"
        assert advice.startswith(f"Nothing that is not clearly worse than {name} takes less")


class TestHostileText:
    def test_names_make_no_elements(self, hostile):
        plain, read = Read(page(comparisons.make(9))), Read(page(hostile))
        assert read.tags.count("script") == 2
        assert set(read.tags) == set(plain.tags)
        assert "img" not in read.tags
        assert not [attribute for attribute in read.attributes if attribute[1].startswith("on")]

    def test_names_come_back_as_they_were(self, hostile):
        read = Read(page(hostile))
        names = [recipe.name for recipe in hostile.recipes]
        assert [recipe["name"] for recipe in read.data["recipes"]] == names
        assert set(names) <= set(read.texts["bdi"])

    def test_every_text_of_a_comparison_is_escaped(self):
        mark = "</script></style></code></title><b onclick='x'>\"&amp;\u2028"
        compared = comparisons.make(3, failures=0)
        measures = tuple(replace(each, label=each.label + mark) for each in compared.measures)
        recipes = [
            replace(each, recipe=mark, run_file=mark, notes=(mark,), memory={"weights" + mark: 5, **each.memory})
            for each in compared.recipes
        ]
        texts = dict.fromkeys(("name", "task", "model", "command", "made_at"), mark)
        changed = replace(
            compared, measures=measures, recipes=tuple(recipes), failures=(Failure(mark, 0, mark),),
            machine={mark: mark}, versions={"a": mark}, **texts,
        )  # fmt: skip
        read = Read(page(changed))
        assert read.tags.count("script") == 2
        assert not [attribute for attribute in read.attributes if attribute[1] == "onclick"]

    def test_the_data_holds_nothing_that_ends_a_script(self, hostile):
        data = page(hostile).split('id="data">')[1].split("</script>")[0]
        assert not set("<>&\u2028\u2029") & set(data)


class TestNothingFromTheNetwork:
    def test_no_address_leads_out(self, hostile):
        for text in (page(comparisons.make(9)), page(hostile), page(comparisons.make(0))):
            read = Read(text)
            where = {"src", "href", "srcset", "action", "formaction", "data", "poster", "background", "ping", "style"}
            for _, name, value in read.attributes:
                assert name not in where or value.startswith(("#", "width:"))
            assert not {"link", "iframe", "object", "embed", "base", "form", "audio", "video"} & set(read.tags)

    def test_neither_style_nor_script_loads_anything(self):
        read = Read(page(comparisons.make(2)))
        code = " ".join([*read.texts["style"], read.texts["script"][1]])
        wanted = r"https?:|//\w|url\(|@import|\bimport\b|fetch\(|XMLHttp|WebSocket|EventSource|sendBeacon|Worker|eval\("
        assert not re.search(wanted, code)
        assert not re.search(r"Function\(|innerHTML|outerHTML|insertAdjacentHTML|document\.write", code)

    def test_the_policy_allows_this_script_alone(self):
        text = page(comparisons.make(2))
        script = Read(text).texts["script"][1]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
        assert policy.startswith("default-src 'none'; ")
        assert f"script-src 'sha256-{digest}';" in policy

    def test_a_hundred_recipes_of_three_seeds_stay_small(self):
        size = len(page(comparisons.make(100, seeds=3, steps=300)).encode())
        print(f"{size / 1e6:.2f} MB")
        assert size < LARGEST


class TestFronts:
    @pytest.mark.parametrize("seed", range(8))
    def test_fronts_are_those_that_nothing_beats(self, seed):
        compared = _scattered(seed)
        data = page_data(compared)
        for measure, found in zip(data["measures"], data["fronts"], strict=True):
            if measure["name"] != compared.quality:
                points = [{name: spread.mean for name, spread in recipe.values.items()} for recipe in compared.recipes]
                way = {compared.quality: data["measures"][0]["better"], measure["name"]: measure["better"]}
                assert sorted(found) == [place for place, on in enumerate(front(points, way)) if on]

    @pytest.mark.parametrize("seed", range(8))
    def test_a_front_begins_with_the_cheapest_and_gets_better_with_cost(self, seed):
        compared = _scattered(seed)
        data = page_data(compared)
        for column, (measure, found) in enumerate(zip(data["measures"], data["fronts"], strict=True)):
            sign = -1 if measure["better"] == "higher" else 1
            means = [data["recipes"][place]["means"] for place in found]
            if column:
                for mine, theirs in pairwise(means):
                    assert sign * mine[column] <= sign * theirs[column]
                    assert mine[0] >= theirs[0] if data["measures"][0]["better"] == "lower" else mine[0] <= theirs[0]


def _scattered(seed):
    """Ties, figures that are missing or no number, and both directions of the quality."""
    chance = random.Random(seed)
    quality = Measure("quality", "quality", "share", chance.choice(("higher", "lower")))
    measures = (quality, Measure("cost", "cost"), Measure("speed", "speed", "tokens a second", "higher"))
    compared = comparisons.make(15, seed=seed, failures=0)
    recipes = []
    for recipe in compared.recipes:
        drawn = {each.name: chance.choice((0.1, 0.2, 0.3, 0.4, 0.5, math.nan, None)) for each in measures}
        values = {name: Spread(value, None, (value,)) for name, value in drawn.items() if value is not None}
        recipes.append(replace(recipe, values=values, difference=None))
    points = [{name: spread.mean for name, spread in recipe.values.items()} for recipe in recipes]
    on = {each.name: front(points, {"quality": quality.better, each.name: each.better}) for each in measures[1:]}
    fronts = [tuple(name for name in on if on[name][place]) for place in range(len(recipes))]
    recipes = [replace(recipe, front=found) for recipe, found in zip(recipes, fronts, strict=True)]
    return replace(compared, quality="quality", measures=measures, recipes=tuple(recipes))


class TestCurves:
    def test_short_curves_stay_as_they_are(self):
        found = on_one_grid({0: [(1, 0.5), (3, 0.25)], 7: [(1, 0.75), (2, 0.125)]})
        assert found == {"x": [1, 2, 3], "y": [[0.5, None, 0.25], [0.75, 0.125, None]]}

    def test_points_of_long_curves_are_means_of_a_stretch(self):
        found = on_one_grid({0: [(step, float(step)) for step in range(1, 10 * POINTS + 1)]})
        assert found["x"] == [5.5 + 10 * k for k in range(POINTS)]
        assert found["y"] == [found["x"]]

    def test_steps_far_apart_and_of_different_lengths_keep_their_places(self):
        long = [(step, 1.0) for step in range(0, 5000, 7)]
        found = on_one_grid({0: long, 1: long[:20]})
        assert len(found["x"]) <= POINTS
        assert found["x"] == sorted(found["x"])
        assert [value is not None for value in found["y"][1]] == [True] * 3 + [False] * (len(found["x"]) - 3)

    def test_a_stretch_with_no_number_is_left_out(self):
        found = on_one_grid({0: [(1, 1.0), (2, math.inf), (3, 3.0)]})
        assert found["y"] == [[1, None, 3]]
        assert on_one_grid({}) == on_one_grid({0: []}) == {"x": [], "y": []}


class TestWords:
    @pytest.mark.parametrize(
        ("value", "unit", "std", "text"),
        [
            (0.8713, "share", 0.0042, "87.1 ± 0.4 %"),
            (0.8713, "share", 0.00001, "87.1 %"),
            (0.000123, "share", None, "0.012 %"),
            (1.0, "share", 0.0, "100.0 %"),
            (0, "bytes", None, "0 B"),
            (1023, "bytes", None, "1,023 B"),
            (150 * 2**20, "bytes", 3 * 2**20, "150.0 ± 3.0 MiB"),
            (0.01234, "seconds", 0.0005, "12.3 ± 0.5 ms"),
            (0.0000045, "seconds", None, "4.50 µs"),
            (0.0, "seconds", None, "0 µs"),
            (74.04, "seconds", None, "74.0 s"),
            (3600.0, "seconds", None, "60 min"),
            (9000.0, "seconds", None, "2.50 h"),
            (4643, "numbers", None, "4,643"),
            (4643.5, "numbers", None, "4,643.5"),
            (294912, "numbers", None, "295 k"),
            (66.4e6, "numbers", None, "66.4 M"),
            (0.69314, "", 0.0021, "0.6931 ± 0.0021"),
            (-0.0123, "", None, "−0.01230"),
            (5120.0, "tokens a second", 12.0, "5,120 ± 12"),
            (math.nan, "share", None, "no number"),
            (-math.inf, "", None, "infinite"),
        ],
    )
    def test_values_read_as_people_write_them(self, value, unit, std, text):
        assert value_text(value, unit, std) == text

    def test_what_is_not_there_is_a_dash(self):
        assert spread_text(None, "bytes") == "-"

    def test_an_interval_away_from_zero_never_reads_as_zero(self):
        assert difference_text(Difference(-0.018, -0.036, -0.0004, 0.04, True), "share").endswith("(−3.60 to −0.04)")
        assert difference_text(Difference(-0.018, -0.036, 0.0004, 0.06, False), "share").endswith("(−3.6 to 0.0)")
        assert difference_text(Difference(0, 0, 0, 1.0, False), "") == "0.0 (0.0 to 0.0)"
        assert difference_text(Difference(-0.5, -1.25, 0.25, 1.0, False), "") == "−0.50 (−1.25 to +0.25)"

    def test_a_difference_is_judged_in_the_direction_of_the_quality(self):
        less = Difference(-0.1, -0.2, -0.05, 0.01, True)
        assert verdict(less, comparisons.ACCURACY) == "worse"
        assert verdict(less, comparisons.LOSS) == "better"
        assert verdict(replace(less, clear=False), comparisons.LOSS) == "within noise"
