"""ExPLoRA at small scale: the benchmark of it, at one seed."""

import json
import subprocess
import sys

import pytest

from shoestring.testing.assets import need


@pytest.mark.slow
def test_a_linear_probe_is_better_after_the_encoder_has_seen_the_new_domain(tmp_path):
    need("fashion-mnist")
    written = tmp_path / "new_domain.json"
    command = [sys.executable, "benchmarks/new_domain.py", "--seeds", "0", "--json", str(written)]
    subprocess.run(command, check=True, capture_output=True)
    rows = [row for row in json.loads(written.read_text())["rows"] if row["name"].startswith("explora")]
    assert len(rows) == 2
    assert all(row["ours"] > row["baseline"] + 0.01 for row in rows), rows
