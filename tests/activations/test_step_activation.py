"""Step activation: forward as ever, the derivative a step function, two bits an element kept."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from training_steps import BATCH, INNER, MODELS, TOKENS, error, inputs_of, kept_bytes, made, step
from transformers import activations as hf

from shoestring import Recipe
from shoestring.activations import StepActivation
from shoestring.activations.step_activation import REGELU2, RELU, RESILU2, STEP_DERIVATIVES, StepDerivative
from shoestring.errors import SettingError
from shoestring.memory import Ledger
from shoestring.testing.assets import need

# a and c of the paper, once more
GELU_STEPS = ((-0.04922261, 1.09796321, -0.04874060), (-3.18588100, -0.00117882, 3.19083261))
SILU_STEPS = ((-0.04060357, 1.08092543, -0.04032186), (-6.30504610, -0.00086849, 6.32581524))


def plain_derivative(module: nn.Module, x: Tensor) -> Tensor:
    """The step function written down step by step, in float64."""
    x = x.double()
    if isinstance(module, nn.ReLU):
        return (x > 0).double()
    a, c = SILU_STEPS if isinstance(module, nn.SiLU | hf.SiLUActivation | hf.QuickGELUActivation) else GELU_STEPS
    x = x * 1.702 if isinstance(module, hf.QuickGELUActivation) else x
    derivative = torch.zeros_like(x)
    derivative[x > c[0]] = a[0]
    derivative[x > c[1]] = a[0] + a[1]
    derivative[x > c[2]] = 1.0
    return derivative


@pytest.mark.parametrize("cls", STEP_DERIVATIVES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_forward_is_the_modules_own_and_the_derivative_is_the_step_function(cls, dtype):
    module = cls().train()
    for seed, shape in enumerate([(1,), (3, 5), (2, 7, 3), (4, 8)]):
        torch.manual_seed(seed)
        x = (torch.randn(shape) * 5).to(dtype).requires_grad_()
        dy = torch.randn(shape).to(dtype)
        with Recipe(StepActivation())(module):
            y = module(x)
            (dx,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(y, module(x))
        assert torch.equal(dx, plain_derivative(module, x).to(dtype) * dy)


def test_thresholds_themselves_belong_to_the_lower_step():
    x = torch.tensor([c for c in REGELU2.thresholds for c in (c, c + 1e-6)], dtype=torch.float64)
    found = REGELU2.unpack(REGELU2.pack(x), like=x)
    assert torch.equal(found, torch.tensor([REGELU2.levels[i] for i in (0, 1, 1, 2, 2, 3)], dtype=torch.float64))


@pytest.mark.parametrize("steps", [REGELU2, RELU], ids=["two bits", "one bit"])
@pytest.mark.parametrize("size", range(1, 18))
def test_codes_fill_bytes_and_come_back(steps: StepDerivative, size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 4
    packed = steps.pack(x)
    assert packed.numel() == -(-size // steps.codes_per_byte)
    index = (x[:, None] > torch.tensor(steps.thresholds)).sum(1)
    assert torch.equal(steps.unpack(packed, like=x), torch.tensor(steps.levels)[index])


def test_strided_inputs_and_gradients():
    x, dy = torch.randn(5, 3, 7).mT.requires_grad_(), torch.randn(7, 5, 3).transpose(0, 1)
    module = nn.GELU()
    with Recipe(StepActivation())(module):
        (dx,) = torch.autograd.grad(module(x), x, dy)
    assert torch.equal(dx, plain_derivative(module, x).float() * dy)


@pytest.mark.parametrize(
    ("steps", "function", "largest", "distance"),
    [(REGELU2, nn.functional.gelu, 0.55, 0.0095), (RESILU2, nn.functional.silu, 0.54, 0.040)],
    ids=["gelu", "silu"],
)
def test_the_constants_are_as_close_to_the_function_as_published(steps, function, largest, distance):
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64, requires_grad=True)
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    levels = steps.unpack(steps.pack(x.detach()), like=x.detach())
    assert (levels - slope).abs().max() == pytest.approx(largest, abs=5e-3)
    integrated = torch.cumsum(levels, 0) * 1e-4
    assert ((integrated - y.detach()).square().sum() * 1e-4).item() == pytest.approx(distance, rel=0.03)


def with_plain_steps(model: nn.Module) -> nn.Module:
    """A copy of the model whose activation functions get the step derivative by ordinary operations."""

    class Plain(nn.Module):
        def __init__(self, module: nn.Module):
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            slope = plain_derivative(self.module, x.detach()).to(x.dtype)
            return self.module(x).detach() + slope * (x - x.detach())

    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in STEP_DERIVATIVES:
                setattr(parent, name, Plain(child))
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [0, 1])
def test_whole_models_learn_by_the_step_derivative(name, seed):
    model = made(name, seed)
    plain = step(with_plain_steps(model), seed=seed)
    ours = step(model, StepActivation(), seed=seed)
    plain.gradients = {n.replace(".module.", "."): g for n, g in plain.gradients.items()}
    assert torch.equal(ours.output, step(model, seed=seed).output)
    assert error(ours, plain) < 2e-6


def test_relu_is_exact_to_the_bit():
    model = made("opt")
    stock, ours = step(model), step(model, StepActivation())
    assert all(torch.equal(gradient, ours.gradients[name]) for name, gradient in stock.gradients.items())


@pytest.mark.parametrize(("name", "bits"), [("bert", 2), ("vit", 2), ("opt", 1)])
def test_kept_bytes_of_the_activation_are_those_of_the_codes(name, bits):
    """LoRA on attention only, so that the layer after the activation keeps nothing."""
    model = made(name)
    attention = {"bert": "query", "vit": "q_proj", "opt": "q_proj"}[name]
    lora = LoraConfig(r=2, target_modules=[attention])
    elements = step(model, lora).output[..., 0].numel() * INNER
    packed = -(-elements * bits // 8)
    saved = kept_bytes(model, lora) - kept_bytes(model, lora, StepActivation())
    layers = 2
    assert saved == layers * (4 * elements - packed)


def test_in_a_gated_block_only_the_activations_input_goes():
    model = made("llama")
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    elements = BATCH * TOKENS * INNER
    saved = kept_bytes(model, lora) - kept_bytes(model, lora, StepActivation())
    assert saved == 2 * (4 * elements - -(-elements // 4))


def test_evaluation_and_copies_keep_the_true_derivative_where_they_should():
    model = made("bert")
    x = inputs_of(model)
    with Recipe(StepActivation())(model) as trained:
        trained.eval()
        trained(**x).last_hidden_state.square().sum().backward()
        evaluated = [p.grad.clone() for p in trained.parameters()]
        twin = copy.deepcopy(trained).train()
        with torch.no_grad():
            twin.encoder.layer[0].intermediate.dense.weight.zero_()
            assert not torch.equal(twin(**x).last_hidden_state, trained(**x).last_hidden_state)
    model.eval()
    model.zero_grad()
    model(**x).last_hidden_state.square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), evaluated, strict=True))
    assert "forward" not in model.encoder.layer[0].intermediate.intermediate_act_fn.__dict__


def test_recomputed_blocks_give_the_same_gradients():
    model = made("vit")
    plain = step(model, StepActivation())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = step(model, StepActivation())
    assert all(torch.equal(gradient, again.gradients[name]) for name, gradient in plain.gradients.items())


def test_a_model_without_activation_functions_is_refused():
    with (
        pytest.raises(SettingError, match=r"found no activation function in Linear: it looks for .*GELUActivation"),
        Recipe(StepActivation())(nn.Linear(3, 2)),
    ):
        pass


def test_an_activation_function_in_place_is_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.SiLU(inplace=True))
    with pytest.raises(SettingError, match=r"1 works in place"), Recipe(StepActivation())(model):
        pass


@pytest.mark.slow
def test_the_packaged_encoder_learns_reviews_with_it(tmp_path):
    need("minilm", "rotten-tomatoes")
    from shoestring.training import RunSettings, train

    data = {"train": "packaged:rotten-tomatoes", "max_length": 32, "max_train_rows": 16, "max_eval_rows": 4}
    report = train(
        RunSettings.from_dict(
            {
                "model": "packaged:minilm",
                "task": "text-classification",
                "data": data,
                "recipe": [{"lora": {"r": 8, "target_modules": ["query", "value", "dense"]}}, "step_activation"],
                "train": {"max_steps": 8, "learning_rate": 3e-3, "per_device_train_batch_size": 16, "logging_steps": 1},
                "output_dir": str(tmp_path / "run"),
            }
        )
    )
    losses = [loss for _, loss in report.losses]
    assert losses[-1] < 0.8 * losses[0]


def test_kept_bytes_by_the_ledger_on_a_bare_stack():
    first, last = nn.Linear(5, 11), nn.Linear(11, 3).requires_grad_(False)
    model = nn.Sequential(first, nn.GELU(), last).train()
    x = torch.randn(7, 5)
    with Recipe(StepActivation())(model):
        ledger = Ledger(model)
        with ledger:
            model(x).sum().backward()
    assert ledger.report().saved_bytes == -(-7 * 11 // 4)
