"""Bottleneck adapters on stock models of many families equal their formulas, written with hooks by hand.

The reference never uses the layers that carry the adapters: with h the output of a whole block and x the residual
stream at its feed-forward part, what that part adds is o = h - x.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, Family
from peft import get_peft_model
from torch import Tensor, nn

from shoestring.adapters import Bottleneck, BottleneckConfig
from shoestring.adapters.placement import find_blocks


def first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def put_first(value: Any, tensor: Tensor) -> Any:
    return (tensor, *value[1:]) if isinstance(value, tuple) else tensor


class HandMade:
    """The formulas as hooks on a stock model, with copies of the adapters' parameters."""

    def __init__(self, family: Family, form: str, model: nn.Module, adapters: dict[str, list[Bottleneck]]):
        self.parameters: dict[str, list[dict[str, Tensor]]] = {
            name: [{k: p.detach().clone().requires_grad_() for k, p in a.named_parameters()} for a in some]
            for name, some in adapters.items()
        }
        for name, block, entry in family.blocks(model):
            # in a block where only the feed-forward part is adapted, the last one is the only one
            branches = [lambda x, p=p: self.branch(form, p, x) for p in self.parameters[name]]
            self.hook(family, form, block, entry, branches)

    @staticmethod
    def branch(form: str, p: dict[str, Tensor], x: Tensor) -> Tensor:
        inner = x @ p["down"].T + p["b_down"]
        inner = inner * torch.sigmoid(inner) if form == "houlsby" else inner.clamp(min=0)
        return {"houlsby": 1, "pfeiffer": 1, "parallel": 4}[form] * (inner @ p["up"].T + p["b_up"])

    def hook(self, family: Family, form: str, block: nn.Module, entry: str, branches: list[Any]) -> None:
        seen: dict[str, Tensor] = {}
        branch = branches[-1]

        def remember(name: str) -> Any:
            def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
                seen[name] = args[0] if args else kwargs["hidden_states"]

            return hook

        block.register_forward_pre_hook(remember("start"), with_kwargs=True)
        block.get_submodule(entry).register_forward_pre_hook(remember("x"), with_kwargs=True)
        if family.order == "post":
            last = block.get_submodule(family.last)
            last_alone = copy.deepcopy(last)

            def change_sum(_: nn.Module, args: tuple) -> Any:
                seen["z"] = z = args[0]
                if form == "houlsby":
                    return (z + branch(z - seen["x"].view_as(z)),)
                return (z + branch(seen["x"]).view_as(z),) if form == "parallel" else None

            def change_block(_: nn.Module, __: Any, out: Any) -> Any:
                return put_first(out, last_alone(seen["z"] + branch(first(out))))

            last.register_forward_pre_hook(change_sum)
            if form == "pfeiffer":
                block.register_forward_hook(change_block)
        elif form == "parallel":
            block.register_forward_hook(
                lambda _, __, out: put_first(out, first(out) + branch(seen["x"]).view_as(first(out)))
            )
        elif family.order == "side":
            ffn = block.get_submodule(family.last)
            ffn.register_forward_hook(lambda _, __, out: out + branch(out))
        elif form == "pfeiffer":
            block.register_forward_hook(lambda _, __, out: put_first(out, first(out) + branch(first(out))))
        else:

            def change_part(_: nn.Module, __: Any, out: Any) -> Any:
                h = first(out)
                return put_first(out, h + branch(h - seen["x"].view_as(h)))

            block.register_forward_hook(change_part)
        if form == "houlsby":
            attention = block.get_submodule(family.attention)
            if family.order == "post":
                attention.register_forward_pre_hook(lambda _, args: (args[0] + branches[0](args[0] - seen["start"]),))
            else:
                attention.register_forward_hook(lambda _, __, out: put_first(out, first(out) + branches[0](first(out))))


def adapters_by_block(family: Family, model: nn.Module) -> dict[str, list[Bottleneck]]:
    return {name: [m for m in block.modules() if isinstance(m, Bottleneck)] for name, block, _ in family.blocks(model)}


@pytest.mark.parametrize("form", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_equal_the_formulas_on_a_stock_model(name: str, form: str):
    family = FAMILIES[name]
    settings = {"scale": 4.0} if form == "parallel" else {}
    config = BottleneckConfig(form=form, r=3, init_weights=False, **settings)
    model = get_peft_model(family.build(), config, autocast_adapter_dtype=False)
    adapters = adapters_by_block(family, model.get_base_model())
    assert {len(some) for some in adapters.values()} == {2 if form == "houlsby" else 1}
    assert sum(len(some) for some in adapters.values()) == sum(isinstance(m, Bottleneck) for m in model.modules())

    stock = family.build()
    plain = stock(**family.inputs())[0]
    by_hand = HandMade(family, form, stock, adapters)
    expected, actual = stock(**family.inputs())[0], model(**family.inputs())[0]
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    for block, some in adapters.items():
        for number, adapter in enumerate(some):
            for key, parameter in adapter.named_parameters():
                wanted = by_hand.parameters[block][number][key].grad
                assert wanted is not None
                torch.testing.assert_close(parameter.grad, wanted, rtol=1e-8, atol=1e-9, msg=f"{block} {number} {key}")
    assert all(p.grad is None for n, p in model.named_parameters() if "bottleneck_" not in n)


def test_llama_parallel_with_its_norm_written_out():
    family = FAMILIES["llama"]
    model = get_peft_model(
        family.build(), BottleneckConfig(form="adaptformer", r=5, init_weights=False), autocast_adapter_dtype=False
    ).eval()
    streams: list[Tensor] = []
    outputs: list[Tensor] = []
    layer = model.get_base_model().model.layers[0]
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    layer.register_forward_hook(lambda _, __, out: outputs.append(first(out)))
    model(**family.inputs())
    x, mlp, norm = streams[0], layer.mlp, layer.post_attention_layernorm
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight
    gate, up = normed @ mlp.gate_proj.weight.T, normed @ mlp.up_proj.weight.T
    o = (F.silu(gate) * up) @ mlp.down_proj.base_layer.weight.T
    a = layer.mlp.down_proj.bottleneck_["default"]
    branch = F.relu(x @ a.down.T + a.b_down) @ a.up.T + a.b_up
    torch.testing.assert_close(outputs[0], x + o + 0.1 * branch, rtol=1e-7, atol=1e-7)  # its norm runs in float32


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_cross_attention_gets_a_third_adapter_when_asked(name: str):
    family = FAMILIES[name]
    config = BottleneckConfig(form="houlsby", r=3, cross_attention=True)
    adapters = adapters_by_block(family, get_peft_model(family.build(), config).get_base_model())
    assert [len(some) for some in adapters.values()] == [2, 2, 3, 3]


def test_layers_to_transform_leaves_the_other_blocks_alone():
    family = FAMILIES["llama"]
    model = get_peft_model(family.build(), BottleneckConfig(r=3, layers_to_transform=[1])).get_base_model()
    assert [len(some) for some in adapters_by_block(family, model).values()] == [0, 1]


def test_an_unknown_block_is_refused_with_its_modules():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.out(self.mixer(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Odd() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    with pytest.raises(ValueError, match=r"made of Odd, .* modules mixer, out\. Set target_modules .* reads"):
        get_peft_model(Model(), BottleneckConfig(r=2))
    # and it can be told: the adapter on `out` reads what enters `mixer`
    x = torch.randn(2, 5, 4)
    config = BottleneckConfig(r=2, target_modules=["out"], reads="mixer", form="pfeiffer", init_weights=False)
    model = get_peft_model(Model(), config)
    y = x
    for layer in model.get_base_model().layers:
        o = layer.out.base_layer(layer.mixer(y))
        y = y + o + layer.out.bottleneck_["default"].branch(y + o)
    torch.testing.assert_close(model(x), y)
    with pytest.raises(ValueError, match=r"reads of bottleneck: no module around layers.0.out has a part named 'norm'"):
        get_peft_model(Model(), BottleneckConfig(r=2, target_modules=["out"], reads="norm"))


def test_blocks_scaled_by_their_configuration_are_not_taken_for_llama():
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=5,
        bos_token_id=1,
        eos_token_id=2,
    )
    with pytest.raises(ValueError, match="GraniteDecoderLayer, a block of unknown layout"):
        find_blocks(GraniteForCausalLM(config))
