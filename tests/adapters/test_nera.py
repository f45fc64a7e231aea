"""NeRA: its splines, equality with a plain reference, starts, memory, counts, techniques beside it, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from packaged import losses_of, minilm_and_reviews
from shoestring.adapters import NeRA, NeRAConfig, nera
from shoestring.adapters.nera import fit_gain, hats
from shoestring.memory import Ledger, MemoryReport
from shoestring.recipe import Recipe
from shoestring.testing.adapters import LLAMA_TARGETS, adapted, batch, tiny_llama, tokens, trainable, two_layers
from shoestring.testing.tiny_models import seeded


def splines(in_features: int = 5, out_features: int = 7, seed: int = 0, **settings: object) -> NeRA:
    """One adapter in double precision whose parameters are all random; knots and gains near their start."""
    torch.manual_seed(seed)
    adapter = NeRA(nn.Linear(in_features, out_features), NeRAConfig(**{"r": 3, **settings})).double()
    with torch.no_grad():
        for parameter in (adapter.gain, adapter.knots):
            parameter.add_(0.2 * torch.randn_like(parameter))
        for parameter in (adapter.coefficients, adapter.up, adapter.scale):
            parameter.copy_(torch.randn_like(parameter))
    return adapter


def inputs(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers, some of them beyond all knots."""
    return 1.7 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(adapter: NeRA, x: Tensor) -> Tensor:
    """The update by the equation, with the whole basis and torch's own gradients."""
    basis = F.relu(1 - (x[..., None] * adapter.gain[:, None] - adapter.knots.T).abs())
    if adapter.centred:
        basis = basis - F.relu(1 - adapter.knots.T.abs())
    z = torch.einsum("...ik,kir->...r", basis, adapter.coefficients)
    return adapter.scale * torch.einsum("or,...r->...o", adapter.up, z)


def by_hand(adapter: NeRA, x: Tensor) -> Tensor:
    """The update of one token, number by number."""
    num_knots, _, r = adapter.coefficients.shape
    gain, knots, coefficients = adapter.gain.tolist(), adapter.knots.tolist(), adapter.coefficients.tolist()
    z = [0.0] * r
    for i, value in enumerate(x.tolist()):
        for k in range(num_knots):
            hat = max(0.0, 1 - abs(gain[i] * value - knots[k][i]))
            if adapter.centred:
                hat -= max(0.0, 1 - abs(knots[k][i]))
            z = [total + hat * c for total, c in zip(z, coefficients[k][i], strict=True)]
    scale = float(adapter.scale.detach())
    rows = [scale * math.fsum(a * b for a, b in zip(row, z, strict=True)) for row in adapter.up.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def test_the_equation_on_numbers_small_enough_to_check_by_hand():
    adapter = NeRA(nn.Linear(1, 2), NeRAConfig(r=1, num_knots=2, alpha=2.0, centred=False))
    with torch.no_grad():
        adapter.gain.fill_(2)
        adapter.knots.copy_(torch.tensor([[0.0], [1.0]]))
        adapter.coefficients.copy_(torch.tensor([[[4.0]], [[8.0]]]))
        adapter.up.copy_(torch.tensor([[1.0], [-1.0]]))
    # s = 0.5: both hats 0.5, z = 6; s = -0.75: the first 0.25, z = 1; s = 4: none
    expected = torch.tensor([[12.0, -12.0], [2.0, -2.0], [0.0, 0.0]])
    x = torch.tensor([[0.25], [-0.375], [2.0]])
    assert torch.equal(adapter.branch(x), expected)
    adapter.centred = True  # z(0) = 4
    assert torch.equal(adapter.branch(x), expected - torch.tensor([8.0, -8.0]))


def test_hats_one_apart_sum_to_one_between_the_first_and_the_last_knot():
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)[:, None].repeat(1, 2)
    knots = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None].repeat(1, 2)
    basis, _ = hats(x, torch.ones(2, dtype=torch.float64), knots)
    torch.testing.assert_close(basis.sum(1), torch.ones_like(x), rtol=0, atol=1e-14)
    assert ((basis > 0).sum(1) <= 2).all()


def test_at_most_three_of_the_hats_of_the_usual_start_are_not_zero_and_each_is_that_of_a_loop():
    adapter = NeRA(nn.Linear(3, 2), NeRAConfig())
    knots = adapter.knots.detach()
    torch.testing.assert_close(knots[:, 1], torch.tensor([-3 + 6 / 7 * k for k in range(8)]))
    x = inputs(63, 3).float()
    basis, _ = hats(x, adapter.gain.detach(), knots)
    assert basis.shape == (63, 8, 3)
    assert ((basis > 0).sum(1) <= 3).all()
    for t, k, i in [(0, 0, 0), (5, 3, 1), (17, 4, 2), (62, 7, 0), (40, 2, 1)]:
        assert float(basis[t, k, i]) == pytest.approx(max(0.0, 1 - abs(float(x[t, i] - knots[k, i]))), abs=1e-7)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", [(5,), (9, 5), (2, 3, 5), (2, 3, 2, 5)], ids=str)
def test_the_update_is_that_of_a_loop_over_every_number(shape: tuple[int, ...], seed: int, centred: bool):
    adapter, x = splines(seed=seed, centred=centred), inputs(*shape, seed=seed)
    expected = torch.stack([by_hand(adapter, row) for row in x.reshape(-1, 5)]).view(*shape[:-1], 7)
    torch.testing.assert_close(adapter.branch(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize(("seed", "centred"), [(0, True), (1, False)])
def test_gradients_are_those_of_the_whole_basis(seed: int, centred: bool, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nera, "tokens_at_once", lambda *sizes: chunk)
    adapter, direction = splines(seed=seed, num_knots=6, centred=centred), torch.randn(3, 21, 7, dtype=torch.float64)
    found = []
    for function in (NeRA.branch, dense):
        x = inputs(3, 21, 5).requires_grad_()
        update = function(adapter, x)
        wanted = [x, *adapter.parameters()]
        found.append([update, *torch.autograd.grad((update * direction).sum(), wanted)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_finite_differences():
    adapter, x = splines(), inputs(6, 5)
    with torch.no_grad():
        _, distance = hats(x, adapter.gain, adapter.knots)
    assert min(distance.abs().min(), (distance.abs() - 1).abs().min()) > 1e-5, "a kink is too near for differences"
    parameters = [p.detach().clone().requires_grad_() for p in (adapter.gain, adapter.knots, adapter.coefficients)]
    assert torch.autograd.gradcheck(nera._Splines.apply, [x.requires_grad_(), *parameters])


def test_the_gradient_at_a_kink_is_zero():
    adapter = splines(in_features=1, num_knots=2)
    with torch.no_grad():
        adapter.gain.fill_(1)
        adapter.knots.copy_(torch.tensor([[0.0], [9.0]]))
    x = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64, requires_grad=True)
    adapter.branch(x).sum().backward()
    assert x.grad.abs().max() == adapter.knots.grad.abs().max() == adapter.gain.grad.abs().max() == 0


def test_an_input_beyond_the_knots_has_no_effect_and_no_gradient():
    adapter = NeRA(nn.Linear(5, 7), NeRAConfig(r=3, init_weights=False, centred=False))
    x = torch.full((2, 5), 4.1, requires_grad=True)
    update = adapter.branch(x)
    update.sum().backward()
    assert update.abs().max() == x.grad.abs().max() == adapter.coefficients.grad.abs().max() == 0


def test_outputs_and_gradients_of_a_model_are_those_of_a_plain_one_in_double_precision():
    model = adapted(NeRAConfig, lambda: {"r": 3, "alpha": 2.0}, two_layers(torch.float64)).double()
    first, second = (m for m in model.modules() if isinstance(m, NeRA))
    base, found = two_layers(torch.float64), []

    def plain(x: Tensor) -> Tensor:
        hidden = F.gelu(base.first(x) + dense(first, x))
        return base.second(hidden) + dense(second, hidden)

    for function in (model, plain):
        x = batch(torch.float64).requires_grad_()
        y = function(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *trainable(model).values()])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_usual_start_is_the_pretrained_model_bit_by_bit():
    model = adapted(NeRAConfig, dict, init_weights=True)
    assert torch.equal(model(batch()), two_layers()(batch()))


def test_the_reference_start_is_within_a_ten_thousandth_of_the_pretrained_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 192))
    x = torch.randn(63, 256)
    expected = model(x)
    config = NeRAConfig(init="reference", target_modules=["0"])
    assert config.start_scale == 1e-3
    change = get_peft_model(model, config)(x) - expected
    assert 0 < change.norm() < 1e-4 * expected.norm()
    assert NeRAConfig(init="reference", alpha=64.0).start_scale == 64.0


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_fit_gain_puts_99_of_100_numbers_of_each_input_between_the_knots(scale: float):
    model = adapted(NeRAConfig, lambda: {"r": 3}, init_weights=True)
    x = scale * torch.randn(500, 24) * torch.arange(24)  # the first input is always zero
    fit_gain(model, {"x": x})
    first, second = (m for m in model.modules() if isinstance(m, NeRA))
    inside = ((first.gain * x).abs() <= 3 * (1 + 1e-6)).float().mean(0)
    assert torch.equal(inside[1:], torch.full((23,), 0.99))
    assert first.gain[0] == 1
    assert second.gain.std() > 0
    assert torch.equal(model(x), two_layers()(x))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_fit_gain_wants_a_model_with_such_adapters():
    with pytest.raises(ValueError, match="There is no nera adapter in this TwoLayers"):
        fit_gain(two_layers(), {"x": batch()})


@pytest.mark.parametrize(("num_knots", "r"), [(8, 16), (5, 3)])
def test_the_number_of_trained_parameters_is_that_of_the_formula(num_knots: int, r: int):
    model = adapted(NeRAConfig, lambda: {"r": r, "num_knots": num_knots})
    layers = [(24, 40), (40, 16)]
    expected = sum(i * num_knots + i * num_knots * r + i + r * o + 1 for i, o in layers)
    assert sum(p.numel() for p in trainable(model).values()) == expected


def step(config: NeRAConfig | LoraConfig, tokens: int = 2048, width: int = 1024) -> MemoryReport:
    """One forward and backward of one square layer."""
    torch.manual_seed(0)
    config.target_modules = {"0"}
    model = get_peft_model(nn.Sequential(nn.Linear(width, width)), config)
    x = torch.randn(tokens, width, requires_grad=True)
    with Ledger(model) as ledger:
        model(x).sum().backward()
    return ledger.report()


def test_the_peak_is_at_most_1_5_times_that_of_lora_and_a_third_of_that_of_the_whole_basis(
    monkeypatch: pytest.MonkeyPatch,
):
    lora, ours = step(LoraConfig(r=16)), step(NeRAConfig(r=16))
    monkeypatch.setattr(NeRA, "branch", dense)
    whole = step(NeRAConfig(r=16))
    assert ours.peak_bytes <= 1.5 * lora.peak_bytes
    assert ours.peak_bytes <= whole.peak_bytes / 3


def test_a_layer_keeps_its_input_and_r_numbers_a_token_whatever_the_number_of_knots():
    few, many = (step(NeRAConfig(r=16, num_knots=k), tokens=128, width=64).saved_bytes for k in (4, 32))
    scaled_up = 64 * 16 * 4
    zeros = 64 * 4
    assert few == many == 128 * 16 * 4 + scaled_up + zeros  # the input is the model's own


def test_the_basis_formed_at_once_is_a_quarter_of_a_large_input_and_at_least_a_token():
    sizes = [(2**14, 2**10), (63, 24), (4, 10**6)]
    large, small, wide = (nera.tokens_at_once(torch.empty(*size, device="meta"), 8) for size in sizes)
    assert large == 2**9
    assert small > 63
    assert wide == 1


def test_the_place_between_knots_survives_autocast():
    """In bfloat16 the input would be 1 and its hat 1, not 0.5."""
    adapter = splines(in_features=1, num_knots=2).float()
    with torch.no_grad():
        adapter.gain.fill_(256)
        adapter.knots.copy_(torch.tensor([[256.0], [999.0]]))
        x = torch.tensor([[1 + 2.0**-9]])
        expected = 0.5 * adapter.scale * (adapter.up @ adapter.coefficients[0, 0])[None]
        torch.testing.assert_close(adapter.branch(x), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = adapter.branch(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.02, atol=0.02)


def test_saved_and_loaded_parameters_are_equal_bit_by_bit(tmp_path):
    model = adapted(NeRAConfig, lambda: {"r": 3})
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert len(state) == 10
    for name, parameter in trainable(model).items():
        assert torch.equal(state[name.replace(".default", "")], parameter)


def test_merging_is_refused_with_the_reason_and_unload_takes_the_adapter_off():
    model = adapted(NeRAConfig, lambda: {"r": 3})
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="nera changes a layer's output, not its weight: it cannot be merged"):
            merge()
    assert torch.equal(model.unload()(batch()), two_layers()(batch()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r of nera must be at least 1, got 0"),
        ({"num_knots": 1}, "num_knots of nera must be at least 2, got 1"),
        ({"alpha": 0.0}, "alpha of nera must be above 0, got 0.0"),
        ({"gain": -1.0}, "gain of nera must be above 0, got -1.0"),
        ({"gain": math.nan}, "gain of nera must be a number, got nan"),
        ({"init": "bad"}, "init of nera must be 'zero' or 'reference', got 'bad'"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        NeRAConfig(**settings)


def test_layers_that_are_not_there_convolutions_and_inputs_of_another_width_are_refused():
    with pytest.raises(ValueError, match="frist"):
        adapted(NeRAConfig, dict, target_modules=["frist"])
    with pytest.raises(
        TypeError, match="nera adapts Linear and Conv1D only, but target module image is of type Conv2d"
    ):
        adapted(NeRAConfig, dict, target_modules=["image"])
    with pytest.raises(RuntimeError, match="63x23 and 24x40"):
        adapted(NeRAConfig, dict)(torch.randn(63, 23))


def gradients(*techniques: object) -> dict[str, Tensor]:
    """Of one training step of a tiny decoder with NeRA and `techniques`."""
    base = tiny_llama().train()
    torch.manual_seed(3)
    config = NeRAConfig(r=3, target_modules=list(LLAMA_TARGETS), init_weights=False)
    model = Recipe.from_list([config, *techniques]).apply(base).double()
    model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    return {name.split(".layers.")[1]: p.grad for name, p in trainable(model).items()}


@pytest.mark.parametrize("technique", ["recompute", "chunked_loss", "lean_mlp", "token_windows"])
def test_techniques_that_are_exact_leave_its_gradients_alone(technique: str):
    settings = {"token_windows": {"token_windows": {"window_tokens": 16}}}
    expected, found = gradients(), gradients(settings.get(technique, technique))
    assert len(expected) == 20
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in found.items():  # the loss is formed in single precision
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-7 * largest, msg=name)


def test_it_learns_from_a_share_of_the_tokens():
    found = gradients({"token_tune": {"keep_fraction": 0.4}})
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in found.values())


def test_a_packaged_encoder_learns_reviews_with_it():
    base, inputs = minilm_and_reviews(16)
    config = NeRAConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    with seeded(0):
        model = Recipe(config).apply(base).train()
        fit_gain(model, {name: value for name, value in inputs.items() if name != "labels"})
        losses = losses_of(model, inputs, own="nera_", steps=8, lr=2e-3)
    assert losses[-1] < 0.9 * losses[0]
    assert sum(p.numel() for n, p in trainable(model).items() if "nera_" in n) == 12 * (384 * (8 + 16 + 1) + 768 + 1)


def test_the_start_as_published_is_not_centred_unless_told():
    assert NeRAConfig().is_centred
    assert not NeRAConfig(init="reference").is_centred
    assert NeRAConfig(init="reference", centred=True).is_centred
    assert not NeRAConfig(centred=False).is_centred
