"""Unfreeze, and ExPLoRA made of it: exactly the named weights train, others stay to the bit, and merging is exact."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from shoestring import Recipe, recipes
from shoestring.adapters import HUTConfig, L4QConfig, PaCAConfig, S2FTConfig
from shoestring.errors import SettingError
from shoestring.objectives import MaskedAutoencoder
from shoestring.planning import predict_model
from shoestring.recipe import attached_to
from shoestring.selection import Unfreeze
from shoestring.testing.tiny_models import CLASSIFIER, classifier, seeded

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 15, "patch_size": 5}
DECODER = {"decoder_width": 16, "decoder_blocks": 1, "decoder_heads": 2}
QUERY_AND_VALUE = r".*\.(q_proj|v_proj)"


def vit(cls: type = ViTModel, **settings) -> nn.Module:
    with seeded(0):
        return cls(ViTConfig(**{**SIZES, "intermediate_size": 96, "qkv_bias": True, **settings}))


def dinov2() -> nn.Module:
    with seeded(0):
        return Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2))


def explora(blocks=(-1,), rank: int = 3) -> Recipe:
    lora = LoraConfig(r=rank, lora_alpha=6, target_modules=QUERY_AND_VALUE)
    return Recipe(lora, Unfreeze(blocks=list(blocks), norms=True), MaskedAutoencoder(**DECODER))


def images(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 3, 15, 15, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    """After some steps of Adam."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        model(pixel_values=images(step, next(model.parameters()).dtype)).loss.backward()
        optimizer.step()
    return model


def plain_name(name: str) -> str:
    return name.replace("model.base_model.model.", "").replace(".base_layer", "")


@pytest.mark.parametrize("make", [vit, dinov2])
@pytest.mark.parametrize("blocks", [[-1], [0, -1], [1]])
def test_what_trains_is_the_blocks_the_norms_lora_elsewhere_and_the_decoder(make, blocks):
    base = make()
    model = explora(blocks).apply(base)
    whole = {index % 3 for index in blocks}
    for name, parameter in model.named_parameters():
        parts = plain_name(name).split(".")
        block = next((int(part) for part in parts if part.isdigit()), None) if parts[0] != "decoder" else None
        lora, norm = "lora" in name, "norm" in name
        wanted = parts[0] == "decoder" or (norm and not lora)
        if block is not None:
            wanted |= (block in whole and not lora) or (lora and block not in whole)
        assert parameter.requires_grad == wanted, name


def test_the_number_of_trained_weights_is_that_of_the_formula():
    """For ViT-L/16, U of one block and r = 64: 12 596 224 + 23 * 2 * 64 * 2048 and the norms, 18.7 M in all."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        model = ViTModel(ViTConfig(**sizes), add_pooling_layer=False)
        lora = LoraConfig(r=64, target_modules=QUERY_AND_VALUE)
        attached = Recipe(lora, Unfreeze(norms=True)).apply(model)
    found = sum(p.numel() for p in attached.parameters() if p.requires_grad)
    norms = 23 * 2 * 2 * 1024 + 2 * 1024
    assert found == 12_596_224 + 23 * 2 * 64 * 2048 + norms
    assert abs(found - 18.7e6) < 0.01 * 18.7e6
    total = sum(p.numel() for p in model.parameters())
    assert 0.05 < found / total < 0.10


def test_a_vit_of_full_size_takes_less_than_two_fifths_of_full_pretraining():
    """Weights, gradients and Adam's moments, as the planner predicts them, with the decoder on both sides."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    config = ViTConfig(**sizes, architectures=["ViTModel"])

    def kept(recipe: Recipe) -> int:
        parts = predict_model(config, recipe).parts
        return sum(parts[name] for name in ("weights", "adapters", "gradients", "optimizer_state"))

    ours, full = kept(Recipe.named("explora")), kept(Recipe(MaskedAutoencoder()))
    assert ours <= 0.4 * full
    assert full > 16 * 303e6


@pytest.mark.parametrize("make", [vit, dinov2])
def test_features_start_as_those_of_the_source(make):
    base = make().eval()
    wanted = base(pixel_values=images(9)).last_hidden_state
    model = explora().apply(base).eval()
    assert torch.equal(model(pixel_values=images(9)).last_hidden_state, wanted)


@pytest.mark.parametrize("make", [vit, dinov2])
def test_frozen_weights_stay_to_the_bit_and_trained_ones_move(make):
    source, base = make(), make()
    model = trained(explora([0]).apply(base))
    trains = {plain_name(name) for name, p in model.named_parameters() if p.requires_grad}
    now = {plain_name(name): p for name, p in model.named_parameters()}
    for name, before in source.named_parameters():
        assert torch.equal(now[name], before) == (name not in trains), name


@pytest.mark.parametrize("make", [vit, dinov2])
def test_merged_it_is_an_ordinary_model_of_the_same_function(make):
    source = make().double()
    model = trained(explora().apply(copy.deepcopy(source).double()), steps=4).eval()
    wanted = model(pixel_values=images(9, torch.float64)).last_hidden_state
    merged = model.model.merge_and_unload()
    assert type(merged) is type(source)
    assert {n: t.shape for n, t in merged.state_dict().items()} == {n: t.shape for n, t in source.state_dict().items()}
    found = merged.eval()(pixel_values=images(9, torch.float64)).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    start = source.eval()(pixel_values=images(9, torch.float64)).last_hidden_state
    assert (found - start).abs().max() > 1e-3


def test_a_resumed_run_goes_on_to_the_bit(tmp_path):
    def go_on(model: nn.Module, steps: range) -> torch.Tensor:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for step in steps:
            with seeded(step):
                loss = model.train()(pixel_values=images(step)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.detach()

    with seeded(1):
        whole = explora().apply(vit())
    with seeded(1):
        stopped = explora().apply(vit())
    wanted = go_on(whole, range(4))
    go_on(stopped, range(2))
    attached_to(stopped).save(tmp_path)
    again = explora().apply(vit())
    attached_to(again).restore(tmp_path)
    assert torch.equal(go_on(again, range(2, 4)), wanted)
    for (name, parameter), other in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_alone_it_is_partial_fine_tuning_and_without_blocks_a_linear_probe():
    labelled = vit(ViTForImageClassification, num_labels=5)
    with Recipe(Unfreeze(blocks=[-1]))(labelled) as model:
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(name.startswith(("vit.layers.2.", "classifier.")) for name in names)
    with Recipe(Unfreeze(blocks=[]))(labelled) as model:
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {
            "classifier.weight",
            "classifier.bias",
        }


def test_modules_train_by_name():
    model = Recipe(Unfreeze(blocks=[], modules=["patch_embeddings"])).apply(vit())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.patch_embeddings.projection.bias",
    }


def test_indices_hold_in_each_stack_of_an_encoder_decoder():
    config = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=4, vocab_size=11)
    model = Recipe(Unfreeze(blocks=[-1])).apply(T5Model(config))
    blocks = {tuple(name.split(".")[:3]) for name, p in model.named_parameters() if p.requires_grad}
    assert blocks == {("encoder", "block", "2"), ("decoder", "block", "1")}


def test_the_named_recipe_is_explora():
    model = Recipe.named("explora").apply(dinov2())
    assert "explora" in recipes.names()
    whole = Recipe(
        LoraConfig(r=64, lora_alpha=64, target_modules=r".*\.(q_proj|v_proj|query|value)"),
        Unfreeze(blocks=[-1], norms=True),
        MaskedAutoencoder(),
    )
    assert attached_to(model).recipe == whole


def test_one_block_named_twice_is_refused():
    with pytest.raises(SettingError, match="blocks of unfreeze names block 1 twice; give each one once"):
        Unfreeze(blocks=[1, -1, 1])
    with pytest.raises(SettingError, match="names one block of layers twice, as 2 and as -1"):
        Recipe(Unfreeze(blocks=[2, -1])).apply(vit())


@pytest.mark.parametrize("index", [3, -4])
def test_blocks_that_are_not_there_are_refused(index):
    message = rf"blocks of unfreeze must be from -3 to 2, since encoder.layer has 3 blocks, got {index}"
    with pytest.raises(SettingError, match=message):
        Recipe(Unfreeze(blocks=[index])).apply(dinov2())


def test_nothing_to_train_is_refused():
    with pytest.raises(SettingError, match="unfreeze has nothing to train"):
        Recipe(Unfreeze(blocks=[])).apply(vit())


def test_a_model_without_blocks_is_refused_unless_none_are_asked_for():
    def model() -> nn.Module:
        return ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic"))

    with pytest.raises(
        SettingError, match=r"ResNetModel has no list .* Set blocks of unfreeze to \[\], and name modules"
    ):
        Recipe(Unfreeze()).apply(model())
    Recipe(Unfreeze(blocks=[], modules=["embedder"])).apply(model())


def test_a_rank_of_zero_is_refused():
    with pytest.raises(ValueError, match="`r` should be a positive integer value but the value passed is 0"):
        explora(rank=0).apply(vit())


@pytest.mark.parametrize(
    "adapter",
    [
        HUTConfig(r=2, target_modules=["query", "value"]),
        PaCAConfig(r=2, target_modules=["query", "value"]),
        L4QConfig(r=2, group_size=4, target_modules=["query", "value"]),
        S2FTConfig(o_ratio=1.0, down_ratio=1.0),
    ],
    ids=lambda config: config.method.name,
)
def test_weights_that_an_adapter_reads_train_in_blocks_that_train(adapter):
    with Recipe(adapter, Unfreeze(blocks=[-1]))(classifier()) as attached:
        attached(**CLASSIFIER.batch()).loss.backward()
        assert [name for name, p in attached.named_parameters() if p.requires_grad and p.grad is None] == []
