"""The page of results says what the results say."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_tables_of_the_page_are_those_of_the_results():
    command = [sys.executable, "tables.py", "--check"]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_table_that_differs_is_made_again(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import tables

    page = (tables.RESULTS / "README.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| `hut` |"))
    stale = page.replace(row, row.replace("0.9", "0.8"))
    assert stale != page
    assert tables.filled(stale) == page


def test_a_table_that_nobody_makes_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import tables

    with pytest.raises(KeyError, match="unknown"):
        tables.filled("<!-- table: unknown -->\n<!-- end of table -->")
