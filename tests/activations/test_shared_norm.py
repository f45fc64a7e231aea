"""Shared norm: exact gradients from the norm's result, and its input is not kept."""

import logging

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch._subclasses import FakeTensorMode
from training_steps import MODELS, error, made, step
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

from shoestring import Recipe, assets
from shoestring.activations import SharedNorm
from shoestring.activations.shared_norm import NormForm, _FromOutput, norm_form
from shoestring.errors import SettingError
from shoestring.memory import Ledger
from shoestring.testing.assets import need

RMS_NORMS = {
    "llama": (LlamaRMSNorm, 0.0),
    "t5": (T5LayerNorm, 0.0),
    "gemma": (GemmaRMSNorm, 1.0),
    "torch": (lambda width: nn.RMSNorm(width, eps=1e-6), 0.0),
}
NORMS = {
    **{name: cls for name, (cls, _) in RMS_NORMS.items()},
    "layer": nn.LayerNorm,
    "layer without bias": lambda width: nn.LayerNorm(width, bias=False),
    "layer without weights": lambda width: nn.LayerNorm(width, elementwise_affine=False),
}
TO_LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
    "bert": ["query", "key", "value", "intermediate.dense"],
    "opt": ["q_proj", "k_proj", "v_proj", "fc1"],
    "vit": ["q_proj", "k_proj", "v_proj", "fc1"],
    "t5": ["q", "k", "v", "wi_0", "wi_1"],
}


def norm(name: str, width: int = 7, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = NORMS[name](width).train()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("frozen", [False, True], ids=["trains", "frozen"])
@pytest.mark.parametrize("name", NORMS)
def test_gradients_equal_autograds(name, frozen):
    for seed in range(3):
        module = norm(name, seed=seed).requires_grad_(not frozen)
        x = (torch.randn(3, 5, 7) * 3 + 1).requires_grad_()
        read = [x, *(p for p in module.parameters() if p.requires_grad)]
        dy = torch.randn(3, 5, 7)
        plain = torch.autograd.grad(stock := module(x), read, dy)
        with Recipe(SharedNorm(largest_shift=1e3))(module):
            y = module(x)
            found = torch.autograd.grad(y, read, dy)
        assert torch.equal(y, stock)
        for one, other in zip(found, plain, strict=True):
            assert (one - other).norm() <= 2e-6 * other.norm()


@pytest.mark.parametrize("name", ["layer", "layer without bias", "layer without weights", "torch"])
def test_gradcheck_in_float64(name):
    module = norm(name).double()
    form, weights = norm_form(module), dict(module.named_parameters())

    def run(x, *values):
        given = dict(zip(weights, values, strict=True))
        return _FromOutput.apply(
            x,
            given.get("weight"),
            given.get("bias"),
            lambda x: torch.func.functional_call(module, given, x),
            form,
        )

    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *weights.values()))


@pytest.mark.parametrize("name", RMS_NORMS)
def test_rms_norms_of_any_class_are_told_by_what_they_compute(name):
    form = NormForm(eps=1e-6, centred=False, weight_offset=RMS_NORMS[name][1])
    assert norm_form(norm(name)) == form
    assert norm_form(norm(name).to(torch.bfloat16)) == form
    with torch.device("meta"):
        assert norm_form(NORMS[name](7)) == form
    with FakeTensorMode():
        fake = NORMS[name](7)
        assert norm_form(fake) == form
        assert SharedNorm().is_safe(fake, form)


def test_norms_called_with_a_gate_run_as_they_are():
    torch.manual_seed(0)
    module = MambaRMSNormGated(7, 7).train()
    x, gate = torch.randn(4, 7, requires_grad=True), torch.randn(4, 7, requires_grad=True)
    dy = torch.randn(4, 7)
    plain = torch.autograd.grad(stock := module(x, gate), [x, gate, module.weight], dy)
    with Recipe(SharedNorm())(module):
        for y in (module(x, gate), module(x, gate=gate), module(hidden_states=x, gate=gate)):
            assert torch.equal(y, stock)
            assert all(map(torch.equal, torch.autograd.grad(y, [x, gate, module.weight], dy), plain))


def test_modules_that_are_no_such_norm_are_left_alone():
    class LooksLikeRMSNorm(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) + 0.01 * x

    class WrongEps(LlamaRMSNorm):
        def forward(self, x):
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 10 * self.variance_epsilon)

    others = [LooksLikeRMSNorm(7), WrongEps(7), nn.PReLU(7), nn.BatchNorm1d(7), nn.Linear(7, 7), nn.LayerNorm((3, 7))]
    assert [norm_form(module) for module in others] == [None] * len(others)


def kept(model: nn.Module, x: torch.Tensor) -> int:
    ledger = Ledger(model)
    with ledger:
        model(x).square().sum().backward()
    return ledger.report().saved_bytes


@pytest.mark.parametrize("name", ["layer", "llama"])
def test_beside_a_trained_layer_only_one_number_a_row_is_kept(name):
    last = nn.Linear(7, 2)
    model = nn.Sequential(nn.Linear(5, 7), norm(name).requires_grad_(False), last).train()
    x = torch.randn(11, 5)
    product = 11 * 2 * 4  # that square() keeps
    with Recipe(SharedNorm(largest_shift=1e3))(model):
        assert kept(model, x) - product == 11 * 7 * 4 + 11 * 4  # what the last layer keeps, and r


@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_have_the_same_gradients_and_keep_less(name, adapted):
    for seed in (0, 1):
        model = made(name, seed)
        recipe = [LoraConfig(r=2, target_modules=TO_LINEAR[name])] if adapted else []
        count = seed == 0
        stock, shared = (step(model, *recipe, *more, seed=seed, count=count) for more in ([], [SharedNorm()]))
        assert torch.equal(stock.output, shared.output)
        assert error(shared, stock) < 2e-6
        assert shared.saved_bytes < stock.saved_bytes or not count


def test_in_bfloat16_gradients_are_as_near_to_the_truth_as_the_stock_ones():
    for name in ("bert", "llama"):
        model = made(name)
        truth = step(model)
        model = model.to(torch.bfloat16)
        stock, shared = step(model), step(model, SharedNorm())
        assert torch.equal(stock.output, shared.output)
        assert error(shared, stock) < 0.03
        assert error(shared, truth) < 1.25 * error(stock, truth)


def test_a_gamma_that_becomes_zero_in_training_loses_nothing():
    module, x = norm("layer"), torch.randn(4, 7, requires_grad=True)
    with torch.no_grad():
        module.bias.mul_(0.1)
        module.weight.fill_(0.5)
    with Recipe(SharedNorm())(module):
        for gamma in (0.5, 0.0, -1e-30):
            with torch.no_grad():
                module.weight[2] = gamma
            y = module(x)
            assert ("LayerNorm" in type(y.grad_fn).__name__) == (gamma != 0.5)
            dy = torch.linspace(-1, 1, 28).view(4, 7)
            found = torch.autograd.grad(y, [x, module.weight], dy)
            plain = torch.autograd.grad(
                nn.functional.layer_norm(x, (7,), module.weight, module.bias), [x, module.weight], dy
            )
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, plain, strict=True))


def test_norms_with_channels_far_from_zero_are_left_alone_and_counted(caplog):
    model = made("bert")
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    with torch.no_grad():
        for module in norms:
            module.weight.fill_(1)
        norms[1].weight[3], norms[1].bias[3] = 0.01, 1.0
    stock = step(model)
    with caplog.at_level(logging.WARNING):
        shared = step(model, SharedNorm())
    assert f"shared_norm leaves 1 of {len(norms)} norms alone" in caplog.text
    assert error(shared, stock) < 2e-6


def test_models_it_cannot_act_on_are_refused():
    with (
        pytest.raises(SettingError, match=r"shared_norm found no norm in Linear: it looks for nn\.LayerNorm"),
        Recipe(SharedNorm())(nn.Linear(3, 2)),
    ):
        pass
    broken = nn.LayerNorm(5)
    nn.init.zeros_(broken.weight)
    with pytest.raises(SettingError, match=r"can act on none of the 1 norms"), Recipe(SharedNorm())(broken):
        pass


def test_settings_out_of_range_are_refused():
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(SettingError, match=r"largest_shift of shared_norm must be positive, got"):
            SharedNorm(largest_shift=value)


def test_a_result_changed_in_place_is_noticed():
    model = nn.Sequential(nn.Linear(5, 7), norm("llama")).train()
    with Recipe(SharedNorm())(model):
        y = model(torch.randn(3, 5))
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_the_model_is_left_as_it_was():
    model = made("bert")
    before = step(model)
    step(model, SharedNorm())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(torch.equal(g, before.gradients[n]) for n, g in step(model).gradients.items())


def test_the_packaged_encoder_keeps_less_and_learns_the_same():
    need("minilm")
    from transformers import AutoModel

    model = AutoModel.from_pretrained(assets.model_folder("minilm"), dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids = torch.arange(1000, 1031).view(1, 31)
    lora = LoraConfig(r=4, target_modules=TO_LINEAR["bert"])
    stock, shared = (
        step(model, lora, *more, inputs={"input_ids": ids}, count=True, lora_std=0.02) for more in ([], [SharedNorm()])
    )
    assert torch.equal(stock.output, shared.output)
    assert error(shared, stock) < 2e-6
    assert shared.saved_bytes < 0.9 * stock.saved_bytes
