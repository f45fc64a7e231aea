"""The page of a comparison in a real browser, from a file: charts, sorting, filter, copying, dark, on a phone."""

import random
import re
import shutil
import time
from dataclasses import replace

import comparisons
import pytest

from shoestring.compare.comparison import Spread
from shoestring.compare.measures import front
from shoestring.compare.page import page
from shoestring.compare.wording import costs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip(
        "pages are shown in Chromium, which is not installed (Debian: apt-get install chromium)",
        allow_module_level=True,
    )
playwright = pytest.importorskip("playwright.sync_api", reason="pages are shown by playwright: pip install playwright")
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def shown(browser, tmp_path):
    """Open the page of a comparison; afterwards, nothing was said on the console and nothing was asked for."""
    contexts, said, asked = [], [], []

    def show(compared, width=1280, **settings):
        file = tmp_path / f"{len(contexts)} é #.html"
        file.write_text(page(compared), encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **settings))
        opened = contexts[-1].new_page()
        opened.on("console", lambda message: said.append(message.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("dialog", lambda dialog: said.append(dialog.message))
        opened.goto(file.as_uri())
        return opened

    yield show
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith("file:")] == []
    assert len(asked) == len(contexts)


def names(opened):
    """Recipes in the table, as they stand there."""
    return opened.eval_on_selector_all(
        "#table tbody tr", "rows => rows.filter(row => !row.hidden).map(row => row.querySelector('bdi').textContent)"
    )


def column(opened, label):
    heads = opened.eval_on_selector_all("#table thead th", "heads => heads.map(head => head.innerText.trim())")
    place = next(k for k, head in enumerate(heads) if head.rstrip(" ▲▼") == label)
    return opened.locator("#table thead th").nth(place), place


def front_names(opened):
    """Recipes whose marks in the chart are those of the front, from left to right."""
    return opened.eval_on_selector_all(
        "#front-chart g.on-front", "marks => marks.map(mark => Number(mark.dataset.recipe)).sort((a, b) => a - b)"
    )


def wait_until(opened, condition):
    """Playwright's own waiting evaluates a string on the page, which the page's policy forbids."""
    for _ in range(200):
        if opened.evaluate(condition):
            return
        opened.wait_for_timeout(25)
    raise AssertionError(f"{condition} has not come true in five seconds")


class TestLoading:
    def test_a_hundred_recipes_are_there_at_once(self, shown):
        compared = comparisons.make(100, seeds=3, steps=300)
        start = time.perf_counter()
        opened = shown(compared)
        assert len(names(opened)) == 100
        took = time.perf_counter() - start
        loaded = opened.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        print(f"100 recipes of 3 seeds: loaded in {loaded / 1000:.2f} s; made, loaded and read in {took:.2f} s")
        assert loaded < 10_000  # far above what it takes: a machine may be busy

    @pytest.mark.parametrize("recipes", [0, 1, 2])
    def test_few_recipes_are_no_error(self, shown, recipes):
        opened = shown(comparisons.make(recipes, seeds=1, failures=1))
        assert opened.locator("#front-chart circle, #front-chart path").count() >= recipes
        assert opened.locator(".failures tbody tr").count() == 1

    def test_a_quality_without_a_cost_is_no_error(self, shown):
        compared = comparisons.make(4)
        bare = [replace(each, values={"accuracy": each.values["accuracy"]}, front=()) for each in compared.recipes]
        opened = shown(replace(compared, measures=compared.measures[:1], recipes=tuple(bare)))
        opened.fill("#where", "accuracy > 0")
        opened.get_by_role("button", name="front of the chart above").click()
        assert len(names(opened)) == 4

    def test_hostile_names_are_read_as_they_are(self, shown):
        compared = comparisons.make(8, names=comparisons.HOSTILE)
        opened = shown(compared)
        assert names(opened) == [recipe.name for recipe in compared.recipes]
        opened.locator("#front-chart g.on-front").first.focus()
        assert opened.locator("#tip b").inner_text().strip() in {r.name.strip() for r in compared.recipes} | {
            f"{r.name} (baseline)" for r in compared.recipes
        }

    def test_without_a_script_table_memory_and_recipes_are_there(self, shown):
        compared = comparisons.make(5)
        opened = shown(compared, java_script_enabled=False)
        assert opened.locator("#table tbody tr").count() == 5
        assert opened.locator("#table").is_visible()
        assert opened.locator(".bar").first.is_visible()
        assert not opened.locator("#where").is_visible()
        assert not opened.locator("button.copy").first.is_visible()
        assert opened.get_by_text("need JavaScript").is_visible()
        opened.locator("#recipe-0 summary").click()
        assert compared.recipes[0].recipe in opened.locator("#recipe-0 code").first.inner_text() + "\n"


class TestSorting:
    def test_a_click_puts_the_best_first_and_another_the_worst(self, shown):
        compared = comparisons.make(20)
        opened = shown(compared)
        for measure in (
            compared.measure("step_seconds"),
            compared.measure("tokens_a_second"),
            compared.measure("accuracy"),
        ):
            head, _ = column(opened, measure.label)
            best_first = sorted(
                compared.recipes, key=lambda r, m=measure: r.values[m.name].mean, reverse=measure.better == "higher"
            )
            head.locator("button").click()
            assert names(opened) == [recipe.name for recipe in best_first]
            assert head.get_attribute("aria-sort") == ("descending" if measure.better == "higher" else "ascending")
            head.locator("button").click()
            assert names(opened) == [recipe.name for recipe in reversed(best_first)]
        assert opened.locator("#table th[aria-sort]:not([aria-sort=none])").count() == 1

    def test_the_keyboard_sorts(self, shown):
        compared = comparisons.make(6)
        opened = shown(compared)
        head, _ = column(opened, "recipe")
        head.locator("button").focus()
        opened.keyboard.press("Enter")
        assert names(opened) == sorted((recipe.name for recipe in compared.recipes), key=str.lower)
        opened.keyboard.press("Space")
        assert names(opened) == sorted((recipe.name for recipe in compared.recipes), key=str.lower, reverse=True)

    def test_what_is_missing_stays_last(self, shown):
        compared = comparisons.make(6)
        values = {key: value for key, value in compared.recipes[0].values.items() if key != "step_seconds"}
        bare = replace(compared.recipes[0], values=values)
        opened = shown(replace(compared, recipes=(bare, *compared.recipes[1:])))
        head, _ = column(opened, "median step")
        for _ in range(2):
            head.locator("button").click()
            assert names(opened)[-1] == bare.name


class TestFilter:
    def test_names_are_searched_in_any_case(self, shown):
        compared = comparisons.make(25)
        opened = shown(compared)
        opened.fill("#name", "LoRA")
        assert names(opened) == [recipe.name for recipe in compared.recipes if "lora" in recipe.name]
        assert re.match(r"\d+ of 25 recipes", opened.inner_text("#shown"))
        assert opened.locator("#front-chart .faded.mark, #front-chart .mark.faded").count() == 25 - len(names(opened))
        assert opened.locator(".bar:visible").count() == len(names(opened))

    def test_expressions_mean_what_they_mean_elsewhere(self, shown):
        compared = comparisons.make(25)
        values = {key: value for key, value in compared.recipes[3].values.items() if key != "accuracy"}
        bare = replace(compared.recipes[3], values=values, difference=None)
        compared = replace(compared, recipes=tuple(bare if r.name == bare.name else r for r in compared.recipes))
        opened = shown(compared)
        chance = random.Random(5)
        for _ in range(60):
            text, holds = _expression(chance, compared, 3)
            opened.fill("#where", text)
            assert opened.inner_text("#wrong") == "", text
            assert names(opened) == [recipe.name for recipe in compared.recipes if holds(recipe)], text

    def test_numbers_may_have_units(self, shown):
        compared = comparisons.make(25)
        opened = shown(compared)
        for text, holds in (
            ("peak_bytes < 200MiB", lambda v: v["peak_bytes"].mean < 200 * 2**20),
            ("accuracy >= 84.5%", lambda v: v["accuracy"].mean >= 0.845),
            (
                "trained_parameters<1e5 AND NOT accuracy<.8",
                lambda v: v["trained_parameters"].mean < 1e5 and v["accuracy"].mean >= 0.8,
            ),
            ("-1 < forgetting", lambda v: True),
            ("checkpoint_bytes > 1_000", lambda v: v["checkpoint_bytes"].mean > 1000),
        ):
            opened.fill("#where", text)
            assert names(opened) == [recipe.name for recipe in compared.recipes if holds(recipe.values)]

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("a.b()", "“.” at character 2 cannot stand here"),
            ("x[0]", "“[” at character 2 cannot stand here"),
            ("alert(1)", "There is no measure “alert”"),
            ("accuracy(1)", "Here should stand one of <, <=, ==, !=, >=, >, not “(” at character 9"),
            ("accuracy", "At the end one of <"),
            ("accuracy >", "At the end a measure or a number is missing"),
            ("accuracy = 1", "Write == for equal"),
            ("accuracy > 1 && accuracy < 2", "Write and, or"),
            ("0 < accuracy < 1", "two at a time"),
            ("(accuracy > 0", "At the end “and”, “or” or “)” is missing"),
            ("accuracy > 0)", "Here should stand “and” or “or”, not “)” at character 13"),
            ("accuracy > 'a'", "“'” at character 12 cannot stand here"),
            ("accuracy > 1; 2", "“;” at character 13"),
            ("accuracy > 1e", "“1” at character 12"),
            ("accuracy > 12abc", "“1” at character 12"),
            ("accuracy + 1 > 2", "“+” at character 10"),
            ("constructor > 0", "There is no measure “constructor”"),
            ("__proto__ == 0", "There is no measure “__proto__”"),
            ("not", "At the end a measure or a number is missing"),
            ("accuracy > 0 or", "At the end a measure or a number is missing"),
            ("🧵 > 0", "“🧵” at character 1 cannot stand here"),
            ("(" * 5000, "At most 100"),
            ("not " * 5000, "At most 100"),
        ],
    )
    def test_anything_else_is_refused_with_the_reason(self, shared, text, reason):
        before = names(shared)
        shared.fill("#where", text)
        assert reason in shared.inner_text("#wrong")
        assert shared.get_attribute("#where", "aria-invalid") == "true"
        assert names(shared) == before
        shared.fill("#where", "")
        assert shared.inner_text("#wrong") == ""
        assert shared.get_attribute("#where", "aria-invalid") is None

    def test_the_front_alone_follows_the_cost(self, shown):
        compared = comparisons.make(25)
        opened = shown(compared)
        opened.check("#only-front")
        for place, cost in list(enumerate(costs(compared), 1))[:4]:
            opened.select_option("#cost", str(place))
            assert names(opened) == [recipe.name for recipe in compared.recipes if cost.name in recipe.front]
        opened.fill("#where", "accuracy >")  # no expression yet: the last ones stay, and the chart follows all the same
        opened.select_option("#cost", "2")
        assert costs(compared)[1].label in opened.get_attribute("#front-chart svg", "aria-label")

    @pytest.fixture(scope="class")
    def shared(self, browser, tmp_path_factory):
        file = tmp_path_factory.mktemp("filter") / "page.html"
        file.write_text(page(comparisons.make(5)), encoding="utf-8")
        opened = browser.new_page()
        opened.goto(file.as_uri())
        yield opened
        opened.close()


def _expression(chance, compared, depth):
    """A random expression, and whether it holds for a recipe."""
    if depth and chance.random() < 0.7:
        kind = chance.choice(("and", "or", "not"))
        one, holds = _expression(chance, compared, depth - 1)
        if kind == "not":
            return f"not ({one})", lambda recipe: not holds(recipe)
        other, also = _expression(chance, compared, depth - 1)
        # `and` binds closer than `or`: without parentheses only where that is what is meant
        one, other = (f"({each})" if kind == "and" and " or " in each else each for each in (one, other))
        if kind == "and":
            return f"{one} and {other}", lambda recipe: holds(recipe) and also(recipe)
        return f"{one} or  {other}", lambda recipe: holds(recipe) or also(recipe)
    measure = chance.choice(("accuracy", "step_seconds", "trained_parameters", "peak_bytes"))
    bound = chance.choice(compared.recipes[4:]).values[measure].mean
    sign, compare = chance.choice(
        [
            ("<", lambda a, b: a < b), ("<=", lambda a, b: a <= b), (">", lambda a, b: a > b),
            (">=", lambda a, b: a >= b), ("==", lambda a, b: a == b), ("!=", lambda a, b: a != b),
        ]
    )  # fmt: skip

    def holds(recipe):
        return measure in recipe.values and compare(recipe.values[measure].mean, bound)

    if chance.random() < 0.3:
        turned = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}.get(sign, sign)
        return f"{bound!r} {turned} {measure}", holds
    return f"{measure} {sign} {bound!r}", holds


class TestFrontChart:
    def test_every_cost_redraws_the_front_that_nothing_beats(self, shown):
        compared = comparisons.make(30)
        opened = shown(compared)
        points = [{name: spread.mean for name, spread in recipe.values.items()} for recipe in compared.recipes]
        for place, cost in enumerate(costs(compared), 1):
            opened.select_option("#cost", str(place))
            wanted = [k for k, on in enumerate(front(points, {"accuracy": "higher", cost.name: cost.better})) if on]
            assert front_names(opened) == wanted
            listed = opened.eval_on_selector_all(
                ".front:not([hidden]) tbody tr",
                "rows => rows.filter(row => /^\\d/.test(row.innerText)).map(row => Number(row.dataset.recipe))",
            )
            assert sorted(listed) == wanted
            marked = opened.eval_on_selector_all(
                "#table tbody tr",
                "rows => rows.filter(row => !row.querySelector('.mark').hidden).map(row => Number(row.dataset.recipe))",
            )
            assert sorted(marked) == wanted

    @pytest.mark.parametrize("better", ["higher", "lower"])
    def test_marks_stand_where_their_figures_are(self, shown, better):
        compared = comparisons.make(20, seeds=1, names=["a", *(f"b{k}" for k in range(19))])
        quality = "accuracy" if better == "higher" else "eval_loss"
        compared = replace(compared, quality=quality)
        opened = shown(compared)
        for place, cost in list(enumerate(costs(compared), 1))[:3]:
            opened.select_option("#cost", str(place))
            marks = opened.eval_on_selector_all(
                "#front-chart g.mark:not(.on-front) circle",
                "all => all.map(c => [Number(c.parentNode.dataset.recipe), c.cx.baseVal.value, c.cy.baseVal.value])",
            )
            assert len(marks) >= 5
            across = sorted(marks, key=lambda mark: mark[1])
            up = sorted(marks, key=lambda mark: -mark[2])
            paid = [compared.recipes[k].values[cost.name].mean for k, _, _ in across]
            known = [compared.recipes[k].values[quality].mean for k, _, _ in up]
            assert paid == sorted(paid)
            assert known == sorted(known)
        title = " ".join(opened.locator("#front-chart text.title").all_text_contents())
        assert ("more is better ↑" if better == "higher" else "less is better ↓") in title

    def test_axes_of_all_units_have_readable_ends(self, shown):
        opened = shown(comparisons.make(25))
        for place in range(1, len(costs(comparisons.make(2))) + 1):
            opened.select_option("#cost", str(place))
            texts = opened.locator("#front-chart > svg > text:not(.title):not(.name)").all_text_contents()
            assert len(texts) >= 5
            assert not [text for text in texts if re.search(r"NaN|Infinity|undefined|e[+-]", text)]
            assert len(set(texts)) >= len(texts) - 1  # one zero on each axis

    def test_a_cost_of_zero_has_a_place_on_a_logarithmic_axis(self, shown):
        compared = comparisons.make(12)
        last = compared.recipes[-1]
        nothing = {**last.values, "trained_parameters": Spread(0.0, 0.0, (0.0,) * 3)}
        compared = replace(compared, recipes=(*compared.recipes[:-1], replace(last, values=nothing)))
        opened = shown(compared)
        place = [cost.name for cost in costs(compared)].index("trained_parameters") + 1
        opened.select_option("#cost", str(place))
        assert "logarithmic" in " ".join(opened.locator("#front-chart text.title").all_text_contents())
        assert "NaN" not in opened.inner_html("#front-chart")
        assert opened.locator("#front-chart text", has_text=re.compile("^0$")).count() == 1

    def test_marks_of_the_front_tell_their_figures_to_keyboard_and_pointer(self, shown):
        compared = comparisons.make(10)
        opened = shown(compared)
        opened.focus("#cost")
        opened.keyboard.press("Tab")
        best = opened.evaluate("document.activeElement.getAttribute('aria-label')")
        assert re.search(r"accuracy: .* %, memory of a step: .* MiB", best)
        opened.evaluate(
            "() => { scrollBy(0, 40); return new Promise(done => requestAnimationFrame(() => setTimeout(done))) }"
        )
        assert opened.inner_text("#tip").splitlines()[0] == best.split(", accuracy")[0]
        opened.keyboard.press("Escape")
        assert not opened.is_visible("#tip")
        mark = opened.locator("#front-chart g.mark circle").first
        mark.hover(force=True)
        assert "accuracy: " in opened.inner_text("#tip")

    def test_names_in_the_chart_do_not_cover_each_other(self, shown):
        for recipes in (12, 60):
            opened = shown(comparisons.make(recipes))
            for place in range(1, 5):
                opened.select_option("#cost", str(place))
                boxes = opened.eval_on_selector_all(
                    "#front-chart text.name",
                    "all => all.map(text => text.getBBox()).map(b => [b.x, b.y, b.width, b.height])",
                )
                assert boxes
                for k, (x, y, width, height) in enumerate(boxes):
                    for a, b, w, h in boxes[:k]:
                        assert x + width <= a + 1 or a + w <= x + 1 or y + height <= b + 2 or b + h <= y + 2


class TestCurves:
    def test_lines_can_be_chosen(self, shown):
        opened = shown(comparisons.make(12))
        assert opened.locator("#loss-chart g.line").count() == opened.locator("#time-chart g.line").count() == 6
        assert opened.locator("#loss-chart g.line").first.locator("path.seed").count() == 3
        opened.locator("#time-chart").scroll_into_view_if_needed()
        x, y = opened.locator("#time-chart path.mean").first.evaluate(
            "p => [p.getPointAtLength(0), p.ownerSVGElement.getBoundingClientRect()]"
            ".reduce((at, box) => [at.x + box.x, at.y + box.y])"
        )
        opened.mouse.move(x, y)
        assert re.search(r"time of training [\d.]+ s\naccuracy [\d.]+ %$", opened.inner_text("#tip"))
        other = shown(comparisons.make(3, on_the_way=comparisons.LOSS))
        assert other.get_attribute("#time-chart svg", "aria-label") == "held-out loss by time of training"
        assert "%" not in other.text_content("#time-chart svg")
        opened.get_by_role("button", name="none", exact=True).click()
        assert opened.locator("#loss-chart g.line").count() == 0
        opened.locator("#lines input").nth(4).check()
        opened.locator("#lines input").nth(7).check()
        assert opened.locator("#loss-chart g.line").evaluate_all("all => all.map(g => g.dataset.recipe)") == ["4", "7"]
        opened.fill("#name", "lora")
        opened.click("text=all that pass the filter")
        assert opened.locator("#time-chart g.line").count() == len(names(opened))

    def test_no_two_of_thirty_two_lines_look_the_same(self, shown):
        opened = shown(comparisons.make(32))
        opened.click("text=all that pass the filter")
        looks = opened.eval_on_selector_all(
            "#loss-chart path.mean",
            "all => all.map(p => getComputedStyle(p).stroke + getComputedStyle(p).strokeDasharray)",
        )
        assert len(set(looks)) == len(looks) == 32


class TestRecipes:
    def test_a_link_opens_the_recipe_and_the_button_copies_it(self, shown):
        compared = comparisons.make(6, names=comparisons.HOSTILE)
        opened = shown(compared)
        opened.locator("#table tbody tr a").nth(3).click()
        place = int(opened.evaluate("location.hash").removeprefix("#recipe-"))
        details = opened.locator(f"#recipe-{place}")
        for _ in range(2):
            opened.wait_for_function("place => document.getElementById(`recipe-${place}`).open", arg=place)
            details.locator("summary").click()
            opened.locator("#table tbody tr a").nth(3).click()  # the same link opens it again
        opened.wait_for_function("place => document.getElementById(`recipe-${place}`).open", arg=place)
        for button, wanted in enumerate((compared.recipes[place].recipe, compared.recipes[place].run_file)):
            details.locator("button.copy").nth(button).click()
            details.locator("button.copy", has_text="Copied").nth(0).wait_for()
            opened.evaluate("document.body.append(Object.assign(document.createElement('textarea'), {id: 'paste'}))")
            opened.focus("#paste")
            opened.keyboard.press("Control+V")
            assert opened.input_value("#paste") == wanted
            opened.evaluate("document.getElementById('paste').remove()")

    def test_where_the_clipboard_is_closed_the_text_is_copied_another_way(self, shown):
        compared = comparisons.make(2)
        opened = shown(compared)
        opened.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('closed')) }")
        opened.locator("#recipe-0 > summary").click()
        opened.locator("#recipe-0 button.copy").first.click()
        opened.locator("#recipe-0 button.copy", has_text=re.compile("Copied|Selected")).wait_for()
        assert opened.evaluate("getSelection().toString()").strip() == compared.recipes[0].recipe.strip()


class TestLook:
    @pytest.mark.parametrize("names", [(), comparisons.HOSTILE, ("n" * 300, "lora " * 40)])
    @pytest.mark.parametrize("width", [360, 800])
    def test_the_page_itself_never_scrolls_sideways(self, shown, names, width):
        opened = shown(comparisons.make(25, names=names), width=width)
        opened.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        for place in ("1", "2", "3", "4"):
            opened.select_option("#cost", place)
            assert opened.evaluate("document.documentElement.scrollWidth") == width
        assert opened.evaluate(
            "[...document.querySelectorAll('.figures')].every(box => box.scrollWidth > box.clientWidth)"
        )

    def test_a_narrower_window_redraws_the_charts(self, shown):
        opened = shown(comparisons.make(5))
        opened.set_viewport_size({"width": 360, "height": 700})
        wait_until(opened, "document.querySelector('#front-chart svg').clientWidth < 360")
        assert opened.evaluate("document.documentElement.scrollWidth") == 360

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_text_stands_out_in_light_and_dark(self, shown, scheme):
        opened = shown(comparisons.make(4), color_scheme=scheme)
        paper = _brightness(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert paper > 0.9 if scheme == "light" else paper < 0.1
        for selector, attribute in (
            ("h1", "color"), (".note", "color"), ("#table a", "color"), ("#front-chart text", "fill"),
            ("#front-chart text.title", "fill"), ("button", "color"), (".front b", "color"), ("pre", "color"),
            ("#wrong", "color"),
        ):  # fmt: skip
            ink = _brightness(opened.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{attribute}"))
            assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5, selector
        for k in range(8):
            inks = opened.evaluate(
                f"""() => {{ const box = document.body.appendChild(document.createElement('i'));
                box.className = 'part-{k}'; box.style.cssText = 'background: var(--part); color: var(--on)';
                const style = getComputedStyle(box);
                return [style.backgroundColor, style.color]; }}"""
            )
            light, dark = sorted(map(_brightness, inks), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, k


def _brightness(color):
    """Relative luminance of `rgb(…)`, as WCAG defines it."""
    parts = [int(each) / 255 for each in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
