"""Every two techniques together: the page that the docs show is what the code gives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.activations import LowBitActivations, Offload
from shoestring.blocks import Reversible
from shoestring.pruning import EmbeddingPruning
from shoestring.recipe import Recipe
from shoestring.technique import Technique
from shoestring.testing import composition
from shoestring.testing.composition import MODELS, Outcome, alone, page, together, tried
from shoestring.testing.tiny_models import CLASSIFIER, DECODER, Step, TinyModel, seeded, step

PAGE = Path(__file__).parents[1] / "docs" / "composition.md"


@pytest.mark.slow
def test_the_page_is_what_the_code_gives():
    made = page()
    assert PAGE.read_text(encoding="utf-8").splitlines() == made.splitlines(), (
        "run: python -m shoestring.testing.composition > docs/composition.md"
    )


def test_every_technique_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    assert [cls.name for cls in tried() if f"`{cls.name}`" not in text] == []


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_an_exact_technique_is_exact_beside_lora(model):
    for cls in tried():
        outcome = alone(model, cls.name)
        if cls.exact and not outcome.refused:
            assert str(outcome) == "exact", f"{cls.name} is off by {outcome.error:.1e}"


def test_a_refusal_is_one_line_and_names_a_partner_or_the_model():
    outcome = together(DECODER, "reversible", "token_tune")
    assert outcome.refused == (
        "reversible and token_tune cannot be combined: at most one of them may act in the block phase."
    )


def test_a_technique_without_effect_is_found(monkeypatch):
    def step_of(model: TinyModel, *names: str, **_: float) -> Step:
        return Step(torch.ones(1), {"a": torch.full((1,), 2.0 if names == ("step_activation",) else 1.0)})

    monkeypatch.setattr(composition, "_step", step_of)
    with pytest.raises(AssertionError, match="step_activation has no effect beside recompute"):
        together(DECODER, "recompute", "step_activation")


def test_a_gradient_that_two_exact_techniques_lose_is_found(monkeypatch):
    def step_of(model: TinyModel, *names: str, **_: float) -> Step:
        return Step(torch.ones(1), {name: torch.ones(1) for name in (["a"] if names else ["a", "b"])})

    monkeypatch.setattr(composition, "_step", step_of)
    with pytest.raises(AssertionError, match=r"b has no gradient \(chunked_loss and recompute on the decoder\)"):
        together(DECODER, "chunked_loss", "recompute")


@pytest.mark.parametrize("name", ["bitfit", "id3", "speft"])
def test_wrong_gradients_of_what_a_selection_trains_are_found_beside_others(name, monkeypatch):
    right = composition._step

    def step_of(model: TinyModel, *names: str, **settings: Any) -> Step:
        found = right(model, *names, **settings)
        chosen = [n for n in found.gradients if "lora_" not in n and "classifier" not in n]
        assert chosen or "recompute" in names or not names
        wrong = dict.fromkeys(chosen, 1.1) if names == (name, "recompute") and not settings else {}
        return replace(found, gradients={n: g * wrong.get(n, 1.0) for n, g in found.gradients.items()})

    assert str(together(CLASSIFIER, name, "recompute")) == "exact"
    monkeypatch.setattr(composition, "_step", step_of)
    assert 1e-3 < together(CLASSIFIER, name, "recompute").error < 0.1


def test_after_a_change_of_the_model_an_exact_partner_gives_the_gradients_it_has_alone(monkeypatch):
    right = composition._step

    def step_of(model: TinyModel, *names: str, **settings: Any) -> Step:
        found = right(model, *names, **settings)
        factor = 1.1 if names == ("light_peft", "recompute") and settings.get("at") else 1.0
        return replace(found, gradients={n: g * factor for n, g in found.gradients.items()})

    before, after = (right(CLASSIFIER, "light_peft", at=at).gradients for at in (1, 2))
    assert any(after[name].shape != before[name].shape for name in after)
    assert str(together(CLASSIFIER, "light_peft", "recompute")) == "exact"
    monkeypatch.setattr(composition, "_step", step_of)
    with pytest.raises(AssertionError, match=r"recompute on the encoder after 2 steps are off by 1\.0e-01"):
        together(CLASSIFIER, "light_peft", "recompute")


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_floating_streams_are_not_rounded_on_their_way_back(model):
    of_streams = step_with(model, Reversible(mode="float"))
    error = step_with(model, Reversible(mode="float"), LowBitActivations(min_bytes=0)).error(of_streams)
    assert 0 < error < 0.05
    assert step_with(model, Reversible(mode="float"), Offload(to="disk", min_bytes=0)).error(of_streams) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_words_that_are_ruled_out_do_no_harm_to_rounding(dtype):
    restricted = EmbeddingPruning(restricted_softmax=True)
    expected = step_with(DECODER, restricted, dtype=dtype)
    assert step_with(DECODER, restricted, LowBitActivations(min_bytes=0), dtype=dtype).error(expected) < 0.05


def step_with(model: TinyModel, *techniques: Technique, dtype: torch.dtype = torch.float64) -> Step:
    with seeded(7):
        attached = Recipe(model.lora(), *techniques).apply(model.make().to(dtype), data=model.data())
    return step(attached, model.batch())


@pytest.mark.parametrize(("error", "word"), [(0.0, "exact"), (1e-3, "< 5 %"), (0.1, "< 20 %"), (2.0, "more")])
def test_errors_are_shown_as_classes(error, word):
    assert str(Outcome(error)) == word
