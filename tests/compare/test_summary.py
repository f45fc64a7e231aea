"""From results to a comparison: ranks, spreads, fronts, differences, and what needs several runs."""

import math
from dataclasses import replace

import pytest
from results_made import made_result, of_peft, of_peft_in_2025, of_peft_on_images

from shoestring.cli.compare_tables import terminal_table
from shoestring.compare.comparison import Failure
from shoestring.compare.export import markdown
from shoestring.compare.measures import Measure, pme, ppe, ppt
from shoestring.compare.page import page
from shoestring.compare.results import Result
from shoestring.compare.summary import Asked, compare_results
from shoestring.compare.wording import about_differences
from shoestring.errors import SettingError

ASKED = Asked("suite", "text-classification", "tiny", ("full", "lora", "small"), "accuracy", "lora")


def runs_of(
    name: str, accuracies: list[float], peak: float, seconds: float, recipe: str = "- lora: {}\n"
) -> list[Result]:
    return [
        made_result(
            name,
            seed,
            recipe,
            values={"accuracy": accuracy, "peak_bytes": peak, "step_seconds": seconds},
            scores=[1.0] * round(100 * accuracy) + [0.0] * round(100 - 100 * accuracy),
        )
        for seed, accuracy in enumerate(accuracies)
    ]


RESULTS = [
    *runs_of("lora", [0.80, 0.82, 0.78], 500.0, 0.5),
    *runs_of("full", [0.90, 0.91, 0.92], 1000.0, 1.0, "[]\n"),
    *runs_of("small", [0.70, 0.70, 0.70], 600.0, 0.4),
]


def test_recipes_are_ranked_by_their_mean() -> None:
    found = compare_results(ASKED, RESULTS)
    assert [recipe.name for recipe in found.recipes] == ["full", "lora", "small"]
    lora = found.recipes[1].values["accuracy"]
    assert lora.mean == pytest.approx(0.8)
    assert lora.std == pytest.approx(0.02)
    assert lora.values == (0.80, 0.82, 0.78)
    assert found.recipes[1].seeds == (0, 1, 2)


def test_lower_is_first_where_lower_is_better() -> None:
    asked = replace(ASKED, task="causal-lm", quality="loss")
    results = [
        made_result(name, task="causal-lm", values={"loss": loss})
        for name, loss in (("full", 1.2), ("lora", 1.1), ("small", 1.3))
    ]
    assert [recipe.name for recipe in compare_results(asked, results).recipes] == ["lora", "full", "small"]


def test_a_recipe_is_on_the_front_of_the_costs_at_which_none_is_better() -> None:
    fronts = {recipe.name: recipe.front for recipe in compare_results(ASKED, RESULTS).recipes}
    assert fronts["full"] == ("peak_bytes", "step_seconds", "pme")
    assert fronts["lora"] == ("peak_bytes", "step_seconds")
    assert fronts["small"] == ("step_seconds",)


def test_differences_are_to_the_baseline_in_units_of_the_quality() -> None:
    found = {recipe.name: recipe.difference for recipe in compare_results(ASKED, RESULTS).recipes}
    assert found["lora"] is None
    assert found["full"].mean == pytest.approx(0.11)
    assert found["full"].clear
    assert found["small"].mean == pytest.approx(-0.10)


def test_a_difference_of_losses_is_that_of_losses() -> None:
    asked = replace(ASKED, task="causal-lm", quality="loss", names=("lora", "other"))
    results = [
        made_result("lora", task="causal-lm", values={"loss": 1.0}, scores=[-1.0] * 20),
        made_result("other", task="causal-lm", values={"loss": 1.5}, scores=[-1.5] * 20),
    ]
    other = compare_results(asked, results).recipes[1]
    assert other.difference.mean == other.difference.low == other.difference.high == pytest.approx(0.5)


def test_a_difference_of_losses_counts_the_rows_of_each_batch() -> None:
    asked = replace(ASKED, task="causal-lm", quality="loss", names=("lora", "other"))
    losses = {"lora": [1.0, 1.0], "other": [0.95, 1.2]}  # of eight rows, and of one
    results = [
        made_result(
            name, task="causal-lm", values={"loss": (8 * a + b) / 9}, scores=[-a, -b], weights=[8, 1], rows="some"
        )
        for name, (a, b) in losses.items()
    ]
    found = {recipe.name: recipe for recipe in compare_results(asked, results).recipes}
    shown = found["other"].values["loss"].mean - found["lora"].values["loss"].mean
    assert found["other"].difference.mean == pytest.approx(shown)
    assert shown < 0


def test_a_quality_without_scores_of_rows_differs_by_those_of_seeds() -> None:
    results = [
        made_result(name, seed, values={"f1_macro": f1, "accuracy": 0.5}, scores=[1.0, 0.0] * 20)
        for name, of_seeds in (("lora", [0.70, 0.71, 0.72]), ("full", [0.90, 0.93, 0.91]), ("small", [0.6, 0.9, 0.7]))
        for seed, f1 in enumerate(of_seeds)
    ]
    asked = replace(ASKED, quality="f1_macro")
    found = {recipe.name: recipe.difference for recipe in compare_results(asked, results).recipes}
    assert found["full"].noise == found["small"].noise == "seeds"
    assert found["full"].mean == pytest.approx(0.2033, abs=1e-4)
    assert found["full"].clear
    assert not found["small"].clear
    of_one = compare_results(asked, [result for result in results if result.shoestring.seed == 0])
    assert all(recipe.difference is None for recipe in of_one.recipes)


def test_a_difference_is_of_the_seeds_that_the_baseline_has_as_well() -> None:
    results = [result for result in RESULTS if (result.name, result.shoestring.seed) != ("lora", 2)]
    failures = [Failure("lora", 2, "out of memory")]
    found = {recipe.name: recipe for recipe in compare_results(ASKED, results, failures).recipes}
    assert found["full"].difference.mean == pytest.approx((0.90 - 0.80 + 0.91 - 0.82) / 2)
    assert found["full"].notes == ("its difference is of 2 of 3 seeds, those that lora has as well",)
    assert found["lora"].notes == ("1 of 3 seeds failed",)


def test_a_baseline_without_a_result_is_told_of() -> None:
    results = [result for result in RESULTS if result.name != "lora"]
    found = compare_results(ASKED, results, [Failure("lora", seed, "out of memory") for seed in range(3)])
    assert all(recipe.difference is None for recipe in found.recipes)
    assert about_differences(found) == "The baseline, lora, has no result, so there are no differences to it."


@pytest.mark.parametrize(
    ("seeds", "said"),
    [(1, "of held-out rows alone: one seed does not tell how much seeds differ"), (3, "of held-out rows and of seeds")],
)
def test_it_is_said_which_noise_differences_are_told_by(seeds: int, said: str) -> None:
    found = compare_results(ASKED, [result for result in RESULTS if result.shoestring.seed < seeds])
    assert about_differences(found) == f"Differences have 95 % intervals by the noise {said}."


def test_memory_is_weighed_against_that_of_full_tuning() -> None:
    found = {recipe.name: recipe for recipe in compare_results(ASKED, RESULTS).recipes}
    assert found["lora"].values["pme"].values[0] == pytest.approx(pme(0.80, 500, 1000))
    without = compare_results(ASKED, [result for result in RESULTS if result.name != "full"])
    assert all("pme" not in recipe.values for recipe in without.recipes)


def test_time_to_the_target_is_that_of_the_first_evaluation_that_reaches_it() -> None:
    curve = [(5, 1.0, 0.5), (10, 2.0, 0.75), (15, 3.0, 0.72), (20, 4.0, 0.8)]
    results = [made_result("lora", 0, curve=curve), made_result("lora", 1, curve=curve[:1])]
    (lora,) = compare_results(replace(ASKED, target=0.74), results).recipes
    assert lora.values["seconds_to_target"].values == (2.0,)
    assert lora.notes == ("the target was not reached by 1 of 2 seeds",)


def test_measures_are_the_quality_then_others_of_the_task_then_costs() -> None:
    extra = Measure("latency_seconds", "a forward of 4 rows", "seconds")
    values = {"f1_macro": 0.7, "accuracy": 0.8, "density": 0.3, "step_seconds": 0.5, "latency_seconds": 0.1}
    found = compare_results(replace(ASKED, extras=(extra,)), [made_result(values=values)])
    assert [measure.name for measure in found.measures] == [
        "accuracy",
        "f1_macro",
        "density",
        "latency_seconds",
        "step_seconds",
    ]
    assert found.measure("latency_seconds").label == "a forward of 4 rows"
    assert found.measure("density").better is None


def test_results_of_peft_stand_in_the_same_table() -> None:
    found = compare_results(ASKED, [*RESULTS, Result.model_validate(of_peft("theirs", 0.95))])
    theirs = found.recipes[0]
    assert (theirs.name, theirs.values["accuracy"].mean) == ("theirs", 0.95)
    assert theirs.values["gpu_peak_bytes"].mean == 22e9
    assert theirs.difference is None


def test_memory_of_older_results_of_peft_is_read_and_a_missing_one_is_no_memory_of_zero() -> None:
    without = of_peft("without", 0.9)
    without["train_info"]["accelerator_memory_max"] = 0
    results = [Result.model_validate(values) for values in (of_peft("now"), of_peft_in_2025("then"), without)]
    found = {recipe.name: recipe for recipe in compare_results(ASKED, results).recipes}
    assert found["now"].values["gpu_peak_bytes"].mean == found["then"].values["gpu_peak_bytes"].mean == 22e9
    assert "gpu_peak_bytes" not in found["without"].values
    assert "gpu_peak_bytes" not in found["without"].front


def test_what_peft_measured_on_test_rows_counts_under_its_name() -> None:
    results = [Result.model_validate(of_peft_on_images(name, value)) for name, value in (("low", 0.6), ("high", 0.7))]
    found = compare_results(replace(ASKED, task="", quality="dino_similarity", baseline=None), results)
    assert [recipe.name for recipe in found.recipes] == ["high", "low"]
    assert found.recipes[0].values["drift"].mean == 0.26


def test_scores_of_other_rows_are_not_paired() -> None:
    scores = {"lora": [0.0] * 20, "same": [1.0] * 20, "other": [1.0] * 20}
    results = [made_result(name, rows="a" if name != "other" else "b", scores=some) for name, some in scores.items()]
    found = {recipe.name: recipe for recipe in compare_results(ASKED, results).recipes}
    assert found["same"].difference.mean == 1.0
    assert found["same"].notes == ()
    assert found["other"].difference is None
    assert found["other"].notes == ("held-out rows of 1 of 1 seeds, or their batches, are not those of lora",)


def test_scores_of_other_batches_are_not_paired_and_qualities_of_whole_runs_are() -> None:
    asked = replace(ASKED, task="causal-lm", names=("lora", "other"))
    results = [
        made_result(
            name,
            seed,
            task="causal-lm",
            values={"loss": 1.0, "perplexity": 2.0 + seed},
            scores=[-1.0] * 3,
            batches=name,
        )
        for name in ("lora", "other")
        for seed in (0, 1)
    ]
    found = {quality: compare_results(replace(asked, quality=quality), results) for quality in ("loss", "perplexity")}
    of_loss, of_perplexity = (found[quality].recipes[1] for quality in ("loss", "perplexity"))
    assert of_loss.difference is None
    assert "or their batches" in of_loss.notes[0]
    assert of_perplexity.difference.mean == 0
    assert of_perplexity.notes == ()


def test_another_model_is_said_and_its_memory_weighed_against_its_own() -> None:
    values = {"accuracy": 0.8, "peak_bytes": 500.0}
    results = [
        made_result("lora", values=values),
        made_result("full", recipe="[]\n", values=values | {"peak_bytes": 1000.0}),
        made_result("large", model="large", values=values),
        made_result("full large", model="large", recipe="[]\n", values=values | {"peak_bytes": 9000.0}),
    ]
    found = {recipe.name: recipe for recipe in compare_results(ASKED, results).recipes}
    assert found["lora"].values["pme"].mean == pytest.approx(pme(0.8, 500, 1000))
    assert found["large"].values["pme"].mean == pytest.approx(pme(0.8, 500, 9000))
    assert found["large"].notes == ("its model is large, not tiny",)
    assert found["full"].notes == ()


def test_other_settings_of_one_name_are_another_recipe_and_the_same_run_counts_once() -> None:
    results = [
        *runs_of("lora", [0.8, 0.82], 500.0, 0.5),
        made_result("lora", 0, digest="earlier", of_all_seeds="other settings", values={"accuracy": 0.6}),
        *runs_of("lora", [0.8], 500.0, 0.5),
    ]
    found = compare_results(ASKED, results)
    assert [(recipe.name, recipe.values["accuracy"].values) for recipe in found.recipes] == [
        ("lora", (0.8, 0.82)),
        ("lora (2)", (0.6,)),
    ]
    theirs = of_peft("theirs", 0.95)
    theirs["run_info"]["train_config"]["max_steps"] = 10
    results = [Result.model_validate(values) for values in (of_peft("theirs", 0.9), theirs)]
    assert {recipe.name for recipe in compare_results(ASKED, results).recipes} == {"theirs", "theirs (2)"}


def test_results_of_another_task_are_refused() -> None:
    with pytest.raises(SettingError, match="Results of causal-lm cannot stand in one table with those of text-class"):
        compare_results(ASKED, [*RESULTS, made_result("other", task="causal-lm")])


def test_a_seed_without_a_finite_quality_is_told() -> None:
    results = [made_result("lora", 0), made_result("lora", 1, values={"peak_bytes": 1000.0})]
    (lora,) = compare_results(ASKED, results).recipes
    assert lora.notes == ("1 of 2 seeds came to no finite accuracy and are not in its mean",)


@pytest.mark.parametrize(("quality", "first"), [("exact_match", "good"), ("forgetting", "bad")])
def test_without_a_suite_the_direction_of_a_measure_is_known(quality: str, first: str) -> None:
    results = [made_result("good", values={quality: 0.9}), made_result("bad", values={quality: 0.1})]
    found = compare_results(replace(ASKED, names=(), quality=quality, baseline=None), results)
    assert found.recipes[0].name == first


def test_what_has_no_direction_ranks_nothing() -> None:
    with pytest.raises(SettingError, match="Which way of 'density' is better is not known here"):
        compare_results(replace(ASKED, quality="density"), [made_result(values={"density": 0.3})])


def test_runs_that_came_to_nothing_are_told_and_not_ranked() -> None:
    theirs = Result.model_validate(of_peft("theirs"))
    theirs.train_info.status, theirs.run_info.error_msg = "failed", "out of memory"
    found = compare_results(ASKED, [*RESULTS, theirs])
    assert [failure.reason for failure in found.failures] == ["out of memory"]
    assert "theirs" not in [recipe.name for recipe in found.recipes]


def test_versions_that_differ_are_all_named() -> None:
    other = made_result("full")
    other.meta_info.package_info["torch-version"] = "2.14.0"
    assert compare_results(ASKED, [made_result(), other]).versions == {"torch": "2.13.0 and 2.14.0"}


def test_a_quality_that_no_result_has_is_refused_of_files_and_told_of_a_suite() -> None:
    asked = replace(ASKED, quality="f1_macro")
    with pytest.raises(
        SettingError, match=r"No result has the measure 'f1_macro' to rank by\. They have accuracy, peak"
    ):
        compare_results(replace(asked, names=()), RESULTS)
    found = compare_results(asked, RESULTS)
    assert {recipe.notes for recipe in found.recipes} == {
        ("3 of 3 seeds came to no finite f1_macro and are not in its mean",)
    }
    assert "f1 macro" in markdown(found)
    assert "f1 macro" in page(found)
    terminal_table(found)


def test_trade_offs_are_of_the_quality_that_is_ranked_by() -> None:
    values = {"accuracy": 0.9, "f1_macro": 0.8, "trained_in_backbone": 1e6, "trained_share": 0.02, "peak_bytes": 500.0}
    (recipe,) = compare_results(replace(ASKED, quality="f1_macro"), [made_result("lora", values=values)]).recipes
    assert recipe.values["ppt"].mean == pytest.approx(ppt(0.8, 1e6))
    assert recipe.values["ppe"].mean == pytest.approx(ppe(0.8, 2.0))


def test_a_recipe_without_the_quality_comes_last_and_on_no_front() -> None:
    found = compare_results(ASKED, [made_result("small", values={"peak_bytes": 1.0}), *RESULTS[:1]])
    assert [recipe.name for recipe in found.recipes] == ["lora", "small"]
    assert found.recipes[1].front == ()
    assert not any(math.isnan(v.mean) for recipe in found.recipes for v in recipe.values.values())


def test_nothing_finished_is_a_comparison_too() -> None:
    found = compare_results(ASKED, [], missing=6)
    assert (found.recipes, found.measures, found.missing) == ((), (), 6)
