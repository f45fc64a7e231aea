"""What every test runs under: no network, fixed seeds and threads, and shape annotations that are checked."""

import gc
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping
import pytest
import torch
from transformers import set_seed

torch.set_num_threads(1)

CHECKED = [f"shoestring.{kind}" for kind in ("adapters", "blocks", "objectives", "pruning", "quantisation")]
CHECKED += [f"shoestring.activations.{method}" for method in ("shared_norm", "step_activation")]
if early := sorted(set(CHECKED) & set(sys.modules)):
    raise RuntimeError(f"{early[0]} was imported before its shape checks could be switched on; see tests/conftest.py.")
jaxtyping.install_import_hook(CHECKED, "shape_checks.check_shapes")


@pytest.fixture(scope="module", autouse=True)
def what_is_there_is_not_searched_for_garbage() -> None:
    """Ledgers and trainers collect garbage often, which takes a second where all imports are searched each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def fixtures_draw_the_same_whatever_ran_before() -> None:
    """What fixtures of a module draw depends on no other module."""
    set_seed(0)


@pytest.fixture(autouse=True)
def tests_draw_the_same_whatever_ran_before() -> None:
    """What a test draws depends on no other test, so that a failure comes again when it is run alone."""
    set_seed(0)


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep what datasets caches out of the user's cache folder."""
    import datasets

    folder = tmp_path_factory.mktemp("datasets-cache")
    datasets.config.HF_DATASETS_CACHE = folder
    return folder
