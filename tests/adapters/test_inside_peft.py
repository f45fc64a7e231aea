"""How our tuners behave in the hands of peft: half-done injections, shared state, and what peft's LoRA alone can do.

What holds for every tuner of peft's is in `tests/foreign`, where peft's own tests run on ours.
"""

import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from shoestring.adapters import AdapterConfig, BottleneckConfig, HUTConfig, S2LoRAConfig
from shoestring.testing.adapters import adapted, batch, two_layers

METHODS = [cls for cls in PEFT_TYPE_TO_CONFIG_MAPPING.values() if issubclass(cls, AdapterConfig)]
SETTINGS: dict[str, dict[str, object]] = {
    "l4q": {"group_size": 4},  # its default does not divide their inputs
    "mola": {"experts": 2},  # its default goes by blocks, of which these models have none
    "qwha": {"init": "zero"},  # its default reads what the model was loaded from
    "s2ft": {"down_ratio": 0.2},  # its default is less than one channel of so few
}
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda cls: cls.method.name)


def needed_by(method: type[AdapterConfig]) -> dict[str, object]:
    """What the method needs beyond its defaults."""
    return dict(SETTINGS.get(method.method.name, {}))


def config_of(method: type[AdapterConfig], **settings: object) -> AdapterConfig:
    return method(**needed_by(method), **settings)


def s2_lora(model: nn.Module | None = None, **more) -> PeftModel:
    return adapted(S2LoRAConfig, lambda: {"r": 3}, model, **more)


def shared(model: PeftModel, adapter_name: str = "default") -> list[nn.Parameter]:
    return list(model.base_model.s2_lora_shared[adapter_name].parameters())


def layers_and_image() -> nn.Module:
    """Two linear layers, and after them one that is refused, when they are adapted already."""
    model = two_layers()
    model.last = nn.Conv2d(3, 4, 2)
    return model


def picture(model: nn.Module) -> dict[str, object]:
    """Every module by name, type and number of hooks, every parameter by identity and whether it trains."""
    return {name: (type(module), len(module._forward_pre_hooks)) for name, module in model.named_modules()} | {
        name: (id(p), p.requires_grad) for name, p in model.named_parameters()
    }


@every_method
def test_a_refused_layer_leaves_the_model_as_it_was(method: type[AdapterConfig]):
    model = layers_and_image()
    before = picture(model)
    with pytest.raises(TypeError, match="target module last is of type Conv2d"):
        get_peft_model(model, config_of(method, target_modules=["first", "second", "last"]))
    assert picture(model) == before


@every_method
def test_a_refused_further_adapter_leaves_the_first_as_it_was(method: type[AdapterConfig]):
    model = get_peft_model(layers_and_image(), config_of(method, target_modules=["second"], init_weights=False)).eval()
    before, y = picture(model), model(batch())
    with pytest.raises(TypeError, match="target module last is of type Conv2d"):
        model.add_adapter("further", config_of(method, target_modules=["first", "second", "last"]))
    assert picture(model) == before
    assert torch.equal(model(batch()), y)
    model.add_adapter("further", config_of(method, target_modules=["first", "second"]))


def test_a_refused_layer_takes_the_hooks_of_the_others_along():
    model = layers_and_image()
    before = picture(model)
    with pytest.raises(TypeError, match="target module last is of type Conv2d"):
        get_peft_model(model, BottleneckConfig(reads="first", r=2, target_modules=["first", "last"]))
    assert picture(model) == before


@every_method
def test_a_model_with_adapters_can_be_pickled(method: type[AdapterConfig]):
    model = adapted(method, lambda: needed_by(method))
    assert torch.equal(pickle.loads(pickle.dumps(model))(batch()), model(batch()))


@every_method
def test_adding_up_adapters_is_refused_with_another_way(method: type[AdapterConfig]):
    model = adapted(method, lambda: needed_by(method))
    with pytest.raises(ValueError, match=f"{method.method.name} cannot add up adapters.*set_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_injection_without_a_peft_model_is_refused_where_layers_share_state():
    with pytest.raises(ValueError, match=r"S2_LORA because it uses shared state.*get_peft_model"):
        inject_adapter_in_model(S2LoRAConfig(target_modules=["first"]), two_layers())
    model = inject_adapter_in_model(HUTConfig(target_modules=["first"], r=2, init_weights=False), two_layers())
    assert not torch.equal(model(batch()), two_layers()(batch()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("init_weights", [True, False])
def test_shared_state_has_the_dtype_of_the_layers_unless_it_is_cast(dtype: torch.dtype, init_weights: bool):
    config = S2LoRAConfig(target_modules=["first", "second"], r=3, init_weights=init_weights)
    plain = get_peft_model(two_layers(dtype), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in shared(plain)} == {dtype}
    assert plain(batch(dtype)).dtype == dtype
    cast = get_peft_model(two_layers(dtype), config)
    assert {p.dtype for p in shared(cast)} == {torch.float32}
    assert cast(batch(dtype)).dtype == dtype


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_shared_state_loaded_for_inference_is_frozen(low_cpu_mem_usage: bool, tmp_path: Path):
    saved = s2_lora()
    saved.save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(two_layers(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(p.requires_grad or p.is_meta for p in frozen.parameters())
    assert all(torch.equal(a, b) for a, b in zip(shared(frozen), shared(saved), strict=True))
    trainable = PeftModel.from_pretrained(
        two_layers(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    assert all(p.requires_grad for p in shared(trainable))


def test_one_more_adapter_leaves_shared_state_of_the_others_as_it_was():
    model = s2_lora()
    model.add_adapter("asked", S2LoRAConfig(target_modules=["first"], r=2))
    model.set_requires_grad("asked")
    model.add_adapter("added", S2LoRAConfig(target_modules=["first"], r=2))
    trains = {name: {p.requires_grad for p in shared(model, name)} for name in ("default", "asked", "added")}
    assert trains == {"default": {True}, "asked": {True}, "added": {False}}


def test_shared_state_of_the_adapter_that_follows_a_deleted_one_trains():
    model = s2_lora()
    model.add_adapter("next", S2LoRAConfig(target_modules=["first", "second"], r=2))
    model.delete_adapter("default")
    assert model.active_adapters == ["next"]
    assert all(p.requires_grad for p in shared(model, "next"))
    assert list(model.base_model.s2_lora_shared) == ["next"]
    model(batch()).sum().backward()
    assert all(p.grad is not None for p in shared(model, "next"))


def test_a_merged_adapter_is_not_deleted_and_loses_nothing():
    model = s2_lora()
    y = model(batch())
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    assert torch.equal(model(batch()), y)
