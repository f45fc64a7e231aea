"""Stacks of stock models: where they are, what a block was called with, taking its arguments for some tokens."""

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from stock_models import DECODERS, ENCODER_DECODERS, MODELS, batch_for, made
from torch import nn

from shoestring.blocks import find_stacks
from shoestring.blocks.stacks import bind, gather_tokens, hidden_in, scatter_tokens, take_tokens, token_axis
from shoestring.errors import SettingError


@pytest.mark.parametrize("name", MODELS)
def test_each_family_has_its_stacks(name):
    model = made(name)
    stacks = find_stacks(model)
    assert [len(stack) for stack in stacks] == ([3, 3] if name in ENCODER_DECODERS else [3])
    assert [s.causal for s in stacks] == ([False, True] if name in ENCODER_DECODERS else [name in DECODERS])
    assert [len(s.cross_attentions) for s in stacks][:-1] == [0] * (len(stacks) - 1)
    assert bool(stacks[-1].cross_attentions) == (name in ENCODER_DECODERS)
    for stack in stacks:
        assert model.get_submodule(stack.name) is stack.blocks


def test_stacks_are_found_inside_adapters():
    model = get_peft_model(made("llama"), LoraConfig(target_modules=["q_proj"]))
    assert [s.name for s in find_stacks(model)] == ["base_model.model.model.layers"]


def test_a_model_without_blocks_is_refused():
    with pytest.raises(SettingError, match="Sequential has no list of equal transformer blocks"):
        find_stacks(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    with pytest.raises(SettingError, match="no list of equal transformer blocks"):
        find_stacks(t.ResNetForImageClassification(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8])))


@pytest.mark.parametrize("name", MODELS)
def test_a_bound_call_gives_what_the_block_gave(name):
    """Every block of every stack, called again by name."""
    model = made(name)
    seen = []
    hooks = [
        block.register_forward_hook(lambda *call: seen.append(call), with_kwargs=True)
        for stack in find_stacks(model)
        for block in stack.blocks
    ]
    model(**batch_for(name, model))
    for hook in hooks:
        hook.remove()
    assert len(seen) == sum(len(stack) for stack in find_stacks(model))
    for block, args, kwargs, output in seen:
        hidden, named = bind(block, args, kwargs)
        assert hidden.dim() == 3
        assert hidden.shape[0] == hidden_in(output).shape[0]
        named.pop("past_key_values", None)
        assert torch.equal(hidden_in(block(hidden, **named)), hidden_in(output))


def test_tokens_are_gathered_and_scattered():
    x = torch.arange(24).view(2, 4, 3)
    index = torch.tensor([[0, 2], [3, 1]])
    rows = gather_tokens(x, index)
    assert torch.equal(rows, torch.stack([x[0, [0, 2]], x[1, [3, 1]]]))
    assert torch.equal(gather_tokens(x[:1], index)[1], x[0, [3, 1]])
    whole = scatter_tokens(rows, index, 4)
    assert torch.equal(gather_tokens(whole, index), rows)
    assert whole.shape == x.shape


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((7,), 0), ((2, 7), 1), ((1, 7, 4), 1), ((2, 7, 4), 1), ((7, 4), 0), ((2, 3, 7, 9), 2), ((2, 3, 1, 7), None)],
)
def test_the_axis_of_tokens(shape, axis):
    assert token_axis(torch.zeros(shape), 7) == axis


def test_what_has_no_axis_of_tokens_is_passed_on():
    for value in (None, "eager", 3, torch.zeros(()), torch.zeros(5, 6)):
        assert token_axis(value, 7) is None
        assert take_tokens(value, torch.zeros(2, 3, dtype=torch.long), 7) is value


def test_arguments_are_taken_inside_containers():
    index = torch.tensor([[0, 2], [1, 2]])
    cos, bias = torch.rand(1, 3, 4), torch.rand(1, 2, 3, 3)
    taken = take_tokens({"rotary": (cos, cos + 1), "bias": bias, "none": None}, index, 3)
    assert torch.equal(taken["rotary"][0], cos[0][index])
    assert torch.equal(taken["rotary"][1], cos[0][index] + 1)
    assert torch.equal(taken["bias"], torch.stack([bias[0][:, i] for i in index]))
    assert taken["none"] is None
