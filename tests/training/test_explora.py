"""ExPLoRA at small scale: the benchmark of it, at one seed."""

import json
import subprocess
import sys

import pytest

from shoestring.testing.assets import need


@pytest.mark.slow
def test_an_encoder_is_better_after_the_new_domain_than_before_and_than_after_more_of_the_first(tmp_path):
    need("fashion-mnist")
    written = tmp_path / "new_domain.json"
    command = [sys.executable, "benchmarks/new_domain.py", "--seeds", "0", "--json", str(written)]
    subprocess.run(command, check=True, capture_output=True)
    rows = [row for row in json.loads(written.read_text())["rows"] if row["name"].startswith("explora beside")]
    assert len(rows) == 4
    apart = {"before": 0.01, "explora on drawings": 0.0}
    bases = [row["name"].removeprefix("explora beside ").partition(",")[0] for row in rows]
    assert all(row["ours"] > row["baseline"] + apart[base] for row, base in zip(rows, bases, strict=True)), rows
