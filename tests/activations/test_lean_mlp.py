"""Lean MLP: the same bits in gradients, and only what the activation function and the product read is kept."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from training_steps import BATCH, INNER, MLP_LAYERS, TOKENS, kept_bytes, made, step
from transformers import (
    BertConfig,
    BertModel,
    MixtralConfig,
    MixtralModel,
    ModernBertConfig,
    ModernBertModel,
    Phi3Config,
    Phi3Model,
)

from shoestring import Recipe, assets
from shoestring.activations import LeanMLP, Offload
from shoestring.errors import SettingError
from shoestring.feed_forward import gated_product
from shoestring.testing.assets import need

LLAMA_ROWS = BATCH * TOKENS


def lora_on_mlp(name: str, **settings) -> LoraConfig:
    return LoraConfig(r=2, target_modules=MLP_LAYERS[name], **settings)


def assert_same_bits(one, other) -> None:
    assert torch.equal(one.output, other.output)
    assert one.gradients.keys() == other.gradients.keys()
    assert one.gradients
    for name, gradient in one.gradients.items():
        assert torch.equal(gradient, other.gradients[name]), name


@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "bert", "vit", "t5"])
def test_gradients_are_the_same_to_the_bit(name, adapted):
    for seed in (0, 1):
        model = made(name, seed)
        recipe = [lora_on_mlp(name)] if adapted else []
        assert_same_bits(step(model, *recipe, seed=seed), step(model, *recipe, LeanMLP(), seed=seed))


@pytest.mark.parametrize(
    ("name", "adapted", "rows"),
    # a gated block gives up f(g), and the product where the layer after it keeps it; a plain one gives up f(g)
    [("llama", "down_proj", 2), ("llama", "q_proj", 1), ("bert", "output.dense", 1), ("bert", "query", 0)],
    ids=["gated-kept", "gated", "plain-kept", "plain"],
)
def test_kept_bytes_fall_by_what_is_formed_again(name, adapted, rows):
    model = made(name)
    first = {"llama": "q_proj", "bert": "query"}[name]  # so that a gradient passes through the first block too
    lora = LoraConfig(r=2, target_modules=[first, adapted])
    saved = kept_bytes(model, lora) - kept_bytes(model, lora, LeanMLP())
    layers, bytes_a_number = 2, 4
    assert saved == layers * rows * LLAMA_ROWS * INNER * bytes_a_number


def test_a_copy_of_the_product_in_the_dtype_of_the_adapters_is_formed_again():
    model = made("llama").to(torch.bfloat16)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    stock, lean = step(model, lora, count=True), step(model, lora, LeanMLP(), count=True)
    assert_same_bits(stock, lean)
    # f(g) in bfloat16 and the product in float32; only the copy that the adapter read was kept of it
    assert stock.saved_bytes - lean.saved_bytes == 2 * LLAMA_ROWS * INNER * (2 + 4)


def tiny(config_class, model_class, **settings) -> nn.Module:
    torch.manual_seed(0)
    common = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return model_class(config_class(vocab_size=40, pad_token_id=0, **common, **settings))


@pytest.mark.parametrize(
    ("config", "model", "settings", "gated"),
    [
        (Phi3Config, Phi3Model, {"num_key_value_heads": 2}, 1),  # g and u are halves of one tensor
        (ModernBertConfig, ModernBertModel, {}, 1),
        (BertConfig, BertModel, {}, 0),
        (MixtralConfig, MixtralModel, {"num_key_value_heads": 2, "num_local_experts": 2}, 0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_gated_blocks_are_found_by_what_they_do(config, model, settings, gated):
    made_model = tiny(config, model, **settings)
    assert sum(gated_product(block) is not None for block in made_model.modules()) == gated
    ids = {"input_ids": torch.arange(1, 12).view(1, 11)}
    assert_same_bits(step(made_model, inputs=ids), step(made_model, LeanMLP(), inputs=ids))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_in_one_module_give_up_the_activation_functions_result(implementation):
    model = tiny(MixtralConfig, MixtralModel, num_key_value_heads=2, num_local_experts=4)
    model.set_experts_implementation(implementation)
    ids = torch.arange(1, 12).view(1, 11)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    stock, lean = (step(model, lora, *some, inputs={"input_ids": ids}, count=True) for some in ([], [LeanMLP()]))
    assert_same_bits(stock, lean)
    experts_a_token, inner = 2, 24
    assert stock.saved_bytes - lean.saved_bytes == ids.numel() * experts_a_token * inner * 4


def test_dropout_between_the_product_and_the_layer_is_kept_as_ever():
    model = made("t5")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    assert_same_bits(step(model, lora_on_mlp("t5")), step(model, lora_on_mlp("t5"), LeanMLP()))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_it_goes_with_checkpointed_blocks_and_with_codecs(name):
    model = made(name)
    lora = lora_on_mlp(name)
    stock = step(model, lora)
    offloaded = step(model, lora, LeanMLP(), Offload(min_bytes=0))
    assert_same_bits(stock, offloaded)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed, both = step(model, lora, count=True), step(model, lora, LeanMLP(), count=True)
    assert_same_bits(stock, both)
    assert both.saved_bytes == checkpointed.saved_bytes  # nothing of a block leaks out of its checkpoint


def test_autocast_is_the_same_in_backward():
    model = made("llama", hidden_act="gelu_new")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock, lean = step(model), step(model, LeanMLP())
    assert_same_bits(stock, lean)


def test_an_activation_whose_result_is_read_twice_gets_both_gradients():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 3)
            self.act = nn.SiLU()

        def forward(self, x):
            opened = self.act(self.gate(x))
            return self.down(opened * self.up(x) + opened.square())

    torch.manual_seed(0)
    model, x = Odd().train(), torch.randn(4, 5)
    assert gated_product(model).activation is model.act
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    with Recipe(LeanMLP())(model):
        model.zero_grad()
        model(x).square().sum().backward()
        lean = [p.grad.clone() for p in model.parameters()]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(plain, lean, strict=True))


def test_a_graph_can_be_gone_through_twice_and_copies_are_their_own():
    model = made("llama")
    ids = torch.arange(1, 12).view(1, 11)
    with Recipe(LeanMLP())(model) as trained:
        trained.train()
        loss = trained(input_ids=ids).last_hidden_state.square().sum()
        weight = trained.layers[0].mlp.down_proj.weight
        first, second = torch.autograd.grad(loss, weight, retain_graph=True), torch.autograd.grad(loss, weight)
        assert torch.equal(*first, *second)
        twin = copy.deepcopy(trained)
        with torch.no_grad():
            twin.layers[0].mlp.down_proj.weight.zero_()
        twin(input_ids=ids).last_hidden_state.square().sum().backward()
        assert twin.layers[0].mlp.gate_proj.weight.grad.eq(0).all()
        assert trained.layers[0].mlp.gate_proj.weight.grad is None
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_model_with_nothing_to_gain_is_refused():
    # a ReLU and the layer after it keep one tensor
    with pytest.raises(SettingError, match="lean_mlp found nothing to gain from in OPTModel"):
        Recipe(LeanMLP()).apply(made("opt"))


def test_it_cannot_stand_beside_another_that_acts_on_activation_functions():
    with pytest.raises(SettingError, match=r"both act on the activation functions of the blocks"):
        Recipe.from_list(["lean_mlp", "step_activation"])


def test_the_packaged_decoder_keeps_two_rows_a_block_and_learns_the_same():
    need("smollm2")
    from transformers import AutoModel

    model = AutoModel.from_pretrained(assets.model_folder("smollm2"), dtype=torch.float32)
    model.layers = model.layers[:3]
    ids = torch.arange(100, 131).view(1, 31)
    lora = LoraConfig(r=4, target_modules="all-linear")
    stock = step(model, lora, inputs={"input_ids": ids}, count=True)
    lean = step(model, lora, LeanMLP(), inputs={"input_ids": ids}, count=True)
    assert_same_bits(stock, lean)
    assert stock.saved_bytes - lean.saved_bytes == 3 * 2 * ids.numel() * model.config.intermediate_size * 4
