"""What `shoestring compare` takes beside the runs themselves.

    python benchmarks/compare_overhead.py --json docs/results/compare_overhead.json

Overhead is the time of a suite less that of its runs, each from loading to its last evaluation: a server process that
imports once, the check of every recipe, and the start of every run. And the report: its size, and how long it opens.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from result import Row, at_most, print_table, write
from shoestring import assets
from shoestring.compare.page import page
from shoestring.compare.runner import run_suite, state_of
from shoestring.compare.suite import Suite
from shoestring.compare.summary import Asked, compare_results

RECIPES_OF_REPORT = 100
RECIPES: dict[str, Any] = {
    "full tuning": [],
    "lora": [{"lora": {"r": 8, "target_modules": ["query", "value"]}}],
    "bitfit": ["bitfit"],
}


def suite_of(steps: int, folder: Path, seeds: list[int]) -> Suite:
    base = {
        "model": "packaged:minilm",
        "task": "text-classification",
        "data": {"train": "packaged:rotten-tomatoes", "max_length": 40, "max_eval_rows": 200},
        "train": {
            "per_device_train_batch_size": 32,
            "eval_strategy": "no",
            "save_strategy": "no",
            "logging_steps": 1,  # curves as long as a report draws them
        },
    }
    made = {"base": base, "recipes": RECIPES, "seeds": seeds, "budget": {"steps": steps}, "output_dir": str(folder)}
    return Suite.from_dict(made)


def of_suite(suite: Suite) -> list[Row]:
    """Run the suite."""
    began = time.perf_counter()
    run_suite(suite)
    whole = time.perf_counter() - began
    results = state_of(suite).results.values()
    inside = sum(result.run_info.total_time for result in results)
    steps = sum(result.train_info.train_time for result in results)
    runs = f"{len(suite.cases)} runs"
    return [
        Row(f"{runs}: seconds of the suite beside those of its runs", whole, inside),
        at_most(f"{runs}: seconds of overhead beside those of training steps", whole - inside, steps, 0.05),
    ]


def of_report(suite: Suite) -> list[Row]:
    """Size and loading time of a report of a hundred recipes in three runs each, made of copies of the suite's."""
    results = list(state_of(suite).results.values())
    copies = []
    for number in range(RECIPES_OF_REPORT):
        own = results[number % len(results)].shoestring
        assert own is not None
        for seed in range(3):
            copy = own.model_copy(update={"name": f"{own.name} {number}", "seed": seed})
            copies.append(results[number % len(results)].model_copy(update={"shoestring": copy}))
    names = tuple(dict.fromkeys(copy.name for copy in copies))
    made = page(compare_results(Asked("copies", suite.task, "minilm", names, suite.quality, names[0]), copies))
    rows = [at_most(f"bytes of a report of {len(names)} recipes beside 3 MB", len(made.encode()), 3e6, 1.0)]
    if (browser := shutil.which("chromium")) is None:
        print("No Chromium here: how long the report takes to open is left out.")
        return rows
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "report.html"
        path.write_text(made)
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        tab = opened.new_page()
        tab.goto(path.as_uri())
        milliseconds = tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        opened.close()
    return [*rows, at_most("seconds until it is open beside 1", milliseconds / 1000, 1.0, 1.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", metavar="FILE", default="compare_overhead.json")
    options = parser.parse_args()
    assets.install(["minilm", "rotten-tomatoes"])
    with tempfile.TemporaryDirectory() as name:
        suite = suite_of(options.steps, Path(name), options.seeds)
        rows = [*of_suite(suite), *of_report(suite)]
    write(rows, options.json, options.seeds, {}, steps=options.steps)
    print_table(rows, "What comparing takes")


if __name__ == "__main__":
    main()
