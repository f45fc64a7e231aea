"""Recipes that come with the package: each loads by name, in Python and in a run file, and trains a tiny model."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shoestring import Recipe, recipes
from shoestring.errors import SettingError
from shoestring.planning import predict
from shoestring.recipe import attached_to
from shoestring.testing.tiny_models import IMAGES, step
from shoestring.training import RunSettings

DATA = {"train": "packaged:gsm8k-test"}


def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).train()


def gradients(recipe: Recipe) -> dict[str, torch.Tensor]:
    if any(technique.brings_loss for technique in recipe.techniques):
        return step(recipe.apply(IMAGES.make()), IMAGES.batch()).gradients
    model = recipe.apply(decoder()).train()
    ids = torch.randint(0, 101, (2, 37), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", recipes.names())
def test_a_named_recipe_is_the_list_of_its_file(name):
    settings = RunSettings.from_dict({"model": "m", "task": "causal-lm", "data": DATA, "recipe": name})
    assert settings.build_recipe() == Recipe.named(name)
    assert not recipes.summary(name).startswith("#")


@pytest.mark.parametrize("name", recipes.names())
def test_a_named_recipe_trains_a_model_it_is_for(name):
    recipe = Recipe.named(name)
    found = gradients(recipe)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    if recipe.exact:
        plain = gradients(Recipe(*(t for t in recipe.techniques if t.name == "lora")))
        for key, gradient in plain.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-7)


def test_those_called_exact_are_exact():
    assert all(Recipe.named(name).exact for name in recipes.names() if name.startswith("exact"))
    assert {name for name in recipes.names() if not Recipe.named(name).exact} == {"explora", "few_tokens", "t-few"}


def test_qlora_trains_all_linear_layers_of_a_base_in_four_bit():
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'shoestring[quant]'")
    run = RunSettings.load("examples/qlora.yaml", ["model.name=known:smollm2-135m"])
    assert run.model.quantization == "nf4"
    assert run.build_recipe() == Recipe.named("qlora")
    found = predict(run, batch=1, length=32, depth=1)
    assert found.trained_parameters == 16 * (4 * 576 + 2 * (576 + 192) + 3 * (576 + 1536))
    assert found.parts["weights"] < 2 * 49152 * 576 + 0.55 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536) + 2**16


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(SettingError, match="exact_smal"):
        Recipe.named("exact_smal")


def test_a_named_recipe_is_undone():
    base = decoder()
    model = Recipe.named("exact_small").apply(base)
    assert attached_to(model).techniques
    assert Recipe.remove(model) is base
