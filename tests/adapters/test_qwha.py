"""QWHA: its start from original weights and data, both forms of its product, and what it refuses."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from shoestring.adapters import QWHA, QWHAConfig
from shoestring.adapters.hadamard import matrix
from shoestring.adapters.sparse_coefficients import allocate, best_coefficients, output_errors
from shoestring.errors import SettingError
from shoestring.fakes import Valueless
from shoestring.quantisation import dequantise, round_to_nearest
from shoestring.quantisation.calibration import Moments
from shoestring.recipe import Recipe, attached_to, load
from shoestring.testing.adapters import chain, counted_step, methods_in, tiny_llama, tokens
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import DECODER, decoder, seeded, step
from shoestring.training import RunSettings, train

OUT, IN, TOKENS = 40, 96, 300


def rounded(weight, bits=3, group_size=32):
    return dequantise(*round_to_nearest(weight, bits, group_size)).to(weight.dtype)


def a_layer(seed=0, outliers=0.001, out=OUT, size=IN):
    """(W_0, W_Q, X): a weight with outliers of 20 deviations, rounded to 3 bits, and inputs of unequal strength."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, size, generator=generator, dtype=torch.float64)
    weight[torch.rand(out, size, generator=generator) < outliers] *= 20
    strengths = torch.logspace(-1, 1, size, dtype=torch.float64)[torch.randperm(size, generator=generator)]
    mix = torch.eye(size, dtype=torch.float64) + 0.1 * torch.randn(size, size, generator=generator).double()
    x = torch.randn(TOKENS, size, generator=generator, dtype=torch.float64) @ mix * strengths
    return weight, rounded(weight), x


def moments_of(x):
    return Moments(x.T @ x, len(x))


def dense(found, out=OUT, size=IN):
    """F U of coefficients."""
    rows = torch.zeros(out * size, dtype=found.values.dtype)
    rows[found.places] = found.values
    return rows.view(out, size) @ matrix(size) / size**0.5


def error(delta, x):
    return float((delta @ x.T).norm())


def an_adapter(size=(OUT, IN), r=4, dtype=torch.float64, **settings):
    config = QWHAConfig(r=r, init="zero", init_weights=False, alpha=60.0, **settings)
    with seeded(1):
        return QWHA(nn.Linear(size[1], size[0]), config).to(dtype)


@pytest.mark.parametrize(("out", "size"), [(40, 96), (24, 24), (7, 20)])
def test_all_coefficients_give_the_original_weight(out, size):
    weight, rounded_weight, x = a_layer(out=out, size=size) if size == 96 else (None, None, None)
    if weight is None:
        weight, x = torch.randn(out, size).double(), torch.randn(TOKENS, size).double()
        rounded_weight = (4 * weight).round() / 4
    config = QWHAConfig()
    config.count = lambda *sizes: out * size
    found = config.start_of(weight - rounded_weight, moments_of(x))
    torch.testing.assert_close(rounded_weight + dense(found, out, size), weight, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_share_the_coefficients_by_their_error(seed):
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(37, generator=generator).pow(4) * 50
    for total, most in ((37 * 5 + 3, 24), (37 * 23 + 11, 24), (37 * 24, 24), (11, 24), (0, 24)):
        counts = allocate(errors, total, most)
        assert int(counts.sum()) == total
        assert 0 <= int(counts.min()) <= int(counts.max()) <= most
        assert bool((counts[errors.argsort()].diff() >= 0).all())
        assert torch.equal(counts, allocate(errors, total, most))
    assert allocate(torch.zeros(4), 10, 9).tolist() == [3, 3, 2, 2]
    assert allocate(torch.tensor([1.0, 1.0, 8.0]), 20, 9).tolist() == [6, 5, 9]
    assert allocate(torch.tensor([1.0, 3.0]), 8, 9).tolist() == [2, 6]
    assert allocate(torch.tensor([1.0, 3.0]), 10, 9, power=2.0).tolist() == [1, 9]
    assert allocate(torch.tensor([1.0, 3.0]), 8, 9, power=0.0).tolist() == [4, 4]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("outliers", [0.001, 0.01])
def test_the_start_is_better_than_without_refinement_at_random_places_and_by_svd(outliers, seed):
    weight, rounded_weight, x = a_layer(seed, outliers=outliers, out=200)
    delta, r = weight - rounded_weight, 4
    config = QWHAConfig(r=r)
    found = config.start_of(delta, moments_of(x))
    count = r * (200 + IN)
    assert len(found.values) == len(found.places) == len(found.places.unique()) == count
    ours = error(delta - dense(found, 200), x)

    coefficients = delta @ matrix(IN).T / IN**0.5
    unrefined = dense(type(found)(found.places, coefficients.flatten()[found.places]), 200)
    places = torch.randperm(200 * IN)[:count].sort().values
    at_random = dense(type(found)(places, coefficients.flatten()[places]), 200)
    u, s, v = torch.linalg.svd(delta)
    by_svd = u[:, :r] * s[:r] @ v[:r]
    assert ours < error(delta - unrefined, x) < error(delta - at_random, x) < error(delta, x)
    assert ours < error(delta - by_svd, x)


@pytest.mark.parametrize("seed", [0, 1])
def test_values_are_the_least_squares_fit_on_their_places(seed):
    weight, rounded_weight, x = a_layer(seed)
    delta = weight - rounded_weight
    moments = x.T @ x
    basis = matrix(IN) / IN**0.5
    wanted, gram = delta @ basis.T, basis @ moments @ basis.T
    counts = allocate(output_errors(wanted, gram), 700, IN)
    found = best_coefficients(wanted, gram, counts)
    for row in range(OUT):
        mine = (found.places // IN) == row
        columns = found.places[mine] % IN
        rank = (wanted[row].square() * gram.diagonal()).argsort(descending=True)[: int(counts[row])]
        assert set(columns.tolist()) == set(rank.tolist())
        best = torch.linalg.lstsq(x @ basis[columns].T, x @ delta[row]).solution
        torch.testing.assert_close(found.values[mine], best, rtol=1e-6, atol=1e-9)


def test_rows_without_a_solution_keep_their_coefficients_and_are_counted():
    wanted = torch.randn(5, 8).double()
    counts = torch.tensor([3, 0, 2, 8, 1])
    one_direction = torch.ones(8, 8, dtype=torch.float64)
    found = best_coefficients(wanted, one_direction, counts)
    assert found.unrefined == 2, "of rows with several places, but not with all"
    for row in (0, 2):
        mine = (found.places // 8) == row
        assert torch.equal(found.values[mine], wanted.flatten()[found.places[mine]])
    assert best_coefficients(wanted, one_direction + torch.eye(8), counts).unrefined == 0
    assert best_coefficients(wanted, None, counts).unrefined == 0


def test_a_layer_whose_values_cannot_be_refined_is_named(tmp_path):
    with seeded(0):
        model = nn.Sequential(nn.Linear(16, 8))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model[0].weight.data = rounded(model[0].weight.data, group_size=16)
    config = QWHAConfig(r=1, original=str(tmp_path), target_modules=["0"], calibration_rows=3)
    config.see_data({"train": [{"input": torch.zeros(1, 16)}] * 3})
    with pytest.warns(UserWarning, match=r"qwha leaves the values of \d of 8 rows of 0 unrefined: the inputs"):
        get_peft_model(model, config)


def test_the_score_of_the_weight_leaves_the_inputs_out():
    weight, rounded_weight, x = a_layer()
    delta = weight - rounded_weight
    errors = output_errors(delta, None)
    torch.testing.assert_close(errors, delta.norm(dim=1))
    torch.testing.assert_close(output_errors(delta, x.T @ x), (delta @ x.T).norm(dim=1))
    rows = {
        score: QWHAConfig(score=score).start_of(delta, moments_of(x)).places // IN for score in ("output", "weight")
    }
    per_row = {score: torch.bincount(places, minlength=OUT) for score, places in rows.items()}
    assert not torch.equal(per_row["output"], per_row["weight"])
    assert torch.equal(per_row["weight"], allocate(errors, 8 * (OUT + IN), IN))


def test_without_data_the_largest_coefficients_are_kept_as_they_are():
    weight, rounded_weight, _ = a_layer()
    found = QWHAConfig(init="weight").start_of(weight - rounded_weight, None)
    coefficients = ((weight - rounded_weight) @ matrix(IN).T / IN**0.5).flatten()
    torch.testing.assert_close(found.values, coefficients[found.places])


@pytest.mark.parametrize(("out", "size"), [(40, 96), (13, 24), (24, 28)])
@pytest.mark.parametrize("shape", [(5, 7), (1,), ()])
def test_both_forms_and_their_gradients_are_those_of_the_dense_formula(out, size, shape):
    adapter = an_adapter((out, size), r=2)
    layer = nn.Linear(size, out).double()
    x = torch.randn(*shape, size, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(*shape, out, dtype=torch.float64)
    scale = 60.0 / (out * size) ** 0.5

    def by_formula():
        rows = torch.zeros(out * size, dtype=torch.float64).index_put((adapter.places.long(),), adapter.values)
        weight = layer.weight + scale * rows.view(out, size) @ matrix(size) / size**0.5
        return nn.functional.linear(x, weight, layer.bias)

    def by_weight():
        return nn.functional.linear(x, adapter.new_weight(layer.weight), layer.bias)

    def by_tokens():
        return adapter.through(x, layer)

    expected = by_formula()
    gradients = torch.autograd.grad(expected, (x, adapter.values), dy)
    for form in (by_weight, by_tokens):
        y = form()
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        for got, wanted in zip(torch.autograd.grad(y, (x, adapter.values), dy), gradients, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_the_values_is_that_of_the_papers_formula():
    adapter = an_adapter(r=2)
    x, dy = torch.randn(11, IN).double(), torch.randn(11, OUT).double()
    (got,) = torch.autograd.grad(adapter.through(x, nn.Linear(IN, OUT).double()), adapter.values, dy)
    scale = 60.0 / (OUT * IN) ** 0.5 / IN**0.5
    torch.testing.assert_close(got, scale * (dy.T @ x @ matrix(IN).T).flatten()[adapter.places.long()])


def test_sizes_without_a_transform_are_filled_up_on_request():
    adapter = an_adapter((6, 10), r=1, strict=False)
    rows = torch.zeros(6 * 12, dtype=torch.float64)
    rows[adapter.places.long()] = adapter.values.detach()
    wanted = adapter.scale * (rows.view(6, 12) @ matrix(12) / 12**0.5)[:, :10]
    torch.testing.assert_close(adapter.change().detach(), wanted)
    x = torch.randn(3, 10).double()
    layer = nn.Linear(10, 6).double()
    torch.testing.assert_close(adapter.through(x, layer), layer(x) + x @ wanted.T)
    weight, x = torch.randn(6, 10).double(), torch.randn(50, 10).double()
    config = QWHAConfig(r=2, strict=False)
    config.count = lambda *sizes: 6 * 12
    found = config.start_of(weight, moments_of(x))
    torch.testing.assert_close((dense(found, 6, 12))[:, :10], weight)


def test_few_tokens_go_through_the_basis_and_many_make_a_weight():
    adapter = an_adapter((1536, 576), r=8, dtype=torch.float32)
    assert adapter.train().prefers_tokens(1)
    assert adapter.eval().prefers_tokens(64)
    assert not adapter.eval().prefers_tokens(10**5)
    wide = an_adapter((1536, 576), r=64, dtype=torch.float32)
    assert wide.train().prefers_tokens(32)
    assert not wide.train().prefers_tokens(10**5)


def test_places_at_random_are_ascending_and_never_twice():
    from shoestring.adapters.qwha import spread_at_random

    for count, size in ((1, 1), (7, 7), (5, 12), (1000, 1001), (33, 10**6)):
        places = spread_at_random(count, size)
        assert len(places) == count
        assert count == 1 or int(places.diff().min()) > 0
        assert 0 <= int(places[0]) <= int(places[-1]) < size


def step_by_weights(config):
    model = chain(config, widths=(512, 384))
    for adapter in methods_in(model):
        adapter.prefers_tokens = lambda count: False
    return counted_step(model, 16)


def test_inputs_alone_are_kept_and_the_peak_is_loras_and_three_matrices_of_one_layer():
    ours, lora = step_by_weights(QWHAConfig(r=4, init="zero")), step_by_weights(LoraConfig(r=4))
    assert ours.saved_bytes == 16 * 4 * (384 + 512 + 384), "inputs of layers 2 to 4; the first one's is the model's own"
    above = [report.peak_bytes - report.at_peak["weights"] for report in (ours, lora)]
    assert above[0] - above[1] <= 3.1 * 512 * 384 * 4, "three, and the places as indices"


# on models


def a_packed_llama(quant=True):
    """(model with layers of 4 bits, its float weights by name); sizes that bitsandbytes takes on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes", exc_type=ImportError)
    with seeded(0):
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=50,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = LlamaForCausalLM(config)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in name and quant:
            packed = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            packed.load_state_dict({"weight": layer.weight.data})
            packed.support_avx512bf16_for_cpu = False
            model.set_submodule(name, packed.to("cpu"))
    return model, weights


def rows_of_tokens(count=16):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 50, (12,), generator=generator).tolist()} for _ in range(count)]


@pytest.fixture
def original(tmp_path):
    """A folder with the weights that `a_packed_llama` packs."""
    _, weights = a_packed_llama()
    save_file(weights, tmp_path / "model.safetensors")
    return str(tmp_path)


def calibrated(original, r=4, **settings):
    return QWHAConfig(r=r, original=original, calibration_rows=16, target_modules=["q_proj", "down_proj"], **settings)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


def test_a_packed_model_starts_nearer_to_the_original(original):
    exact = logits(a_packed_llama(quant=False)[0])
    plain = a_packed_llama()[0]
    far = (logits(plain) - exact).norm()
    config = calibrated(original, r=16)
    config.target_modules = "all-linear"
    config.see_data({"train": rows_of_tokens()})
    model = get_peft_model(a_packed_llama()[0], config)
    assert len(methods_in(model)) == 14
    assert not config._starts
    assert (logits(model) - exact).norm() < 0.8 * far


def test_zero_values_leave_a_packed_base_as_it_is():
    expected = logits(a_packed_llama()[0])
    config = QWHAConfig(r=4, init="zero", target_modules=["q_proj", "down_proj"])
    model = get_peft_model(a_packed_llama()[0], config)
    for adapter in methods_in(model):
        adapter.prefers_tokens = lambda count: True
    assert torch.equal(logits(model), expected)
    for adapter in methods_in(model):
        adapter.prefers_tokens = lambda count: False
    torch.testing.assert_close(logits(model), expected)


def test_an_eight_bit_base_is_adapted_too(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes", exc_type=ImportError)
    with seeded(0):
        model = nn.Sequential(nn.Linear(64, 32))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    packed = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    packed.load_state_dict(model[0].state_dict())
    exact = model[0]
    model[0] = packed.to("cpu")
    x = torch.randn(50, 64)
    config = QWHAConfig(r=8, original=str(tmp_path), target_modules=["0"], calibration_rows=50)
    config.see_data({"train": [{"input": row[None]} for row in x]})
    with torch.no_grad():
        before = (model(x) - exact(x)).norm()
        model = get_peft_model(model, config)
        assert (model(x) - exact(x)).norm() < 0.8 * before


def test_trained_numbers_are_r_times_inputs_and_outputs(original):
    model = get_peft_model(a_packed_llama()[0], QWHAConfig(r=3, init="zero", target_modules=["q_proj", "down_proj"]))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 3 * ((64 + 64) + (96 + 64))


def test_places_and_values_come_back_together(original, tmp_path):
    config = calibrated(original)
    config.see_data({"train": rows_of_tokens()})
    model = get_peft_model(a_packed_llama()[0], config)
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    for low in (False, True):
        again = PeftModel.from_pretrained(a_packed_llama()[0], tmp_path / "saved", low_cpu_mem_usage=low)
        assert torch.equal(logits(again), expected)
        for mine, loaded in zip(methods_in(model), methods_in(again), strict=True):
            assert torch.equal(mine.places, loaded.places)
            assert loaded.places.dtype == torch.int32


def saved(folder, size=(64, 96)):
    """(the file of an adapter on a layer of that size, its tensors)."""
    with seeded(0):
        layer = nn.Sequential(nn.Linear(*size))
        config = QWHAConfig(r=2, init="zero", init_weights=False, target_modules=["0"])
        get_peft_model(layer, config).save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    return file, load_file(file)


def test_places_of_a_layer_of_other_sizes_are_refused_by_layer(tmp_path):
    file, held = saved(tmp_path)
    refused = r"0 of 96 -> 64 takes 320 places of qwha, but 320 were saved for 64 -> 96: .* another model"
    with pytest.raises(SettingError, match=refused):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(96, 64)), tmp_path)
    with pytest.raises(SettingError, match=r"0 of 64 -> 64 takes 256 places of qwha, but 320 were saved"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(64, 64)), tmp_path)
    save_file({name: value for name, value in held.items() if not name.endswith("features")}, file)
    for low in (False, True):  # adapters saved before sizes were
        again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(64, 96)), tmp_path, low_cpu_mem_usage=low)
        assert [a.features.tolist() for a in methods_in(again)] == [[96, 64]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda places: places.flip(0), "0: the saved places of qwha are not in ascending order, each once"),
        (lambda places: places[places.new_tensor([0, 0, *range(2, 320)])], "0: .* not in ascending order, each once"),
        (lambda places: places + 6144, r"0: the saved places of qwha go from .*, but this layer has 0 to 6143"),
        (lambda places: places - 6144, r"0: the saved places of qwha go from -.*, but this layer has 0 to 6143"),
    ],
)
def test_damaged_places_are_refused_by_layer(damage, message, tmp_path):
    file, held = saved(tmp_path)
    (name,) = (name for name in held if name.endswith("places"))
    save_file({**held, name: damage(held[name]).contiguous()}, file)
    with pytest.raises(SettingError, match=message):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(64, 96)), tmp_path)


@pytest.mark.parametrize("by_tokens", [True, False])
@pytest.mark.parametrize("other", ["recompute", "chunked_loss", {"token_tune": {"keep_fraction": 1.0}}])
def test_gradients_are_the_same_beside_techniques_that_save_memory(other, by_tokens):
    own = {"qwha": {"r": 2, "init": "zero", "init_weights": False, "target_modules": ["q_proj", "down_proj"]}}
    steps = []
    for others in ([], [other]):
        with seeded(2):
            model = Recipe.from_list([own, *others]).apply(decoder())
        for adapter in methods_in(model):
            adapter.prefers_tokens = lambda count: by_tokens
        steps.append(step(model, DECODER.batch()))
    assert all(gradient.abs().max() > 0 for gradient in steps[0].gradients.values())
    assert steps[0].gradients.keys() == steps[1].gradients.keys()
    assert steps[1].error(steps[0]) < 1e-5


def test_gradients_of_chosen_tokens_are_the_places_of_dense_ones():
    others = [{"token_tune": {"keep_fraction": 0.5}}]
    own = {"qwha": {"r": 2, "init": "zero", "target_modules": ["q_proj", "down_proj"]}}
    model = Recipe.from_list([own, *others]).apply(decoder())
    step(model, DECODER.batch())
    whole = step(Recipe.from_list(others).apply(decoder()), DECODER.batch()).gradients
    for name, adapter in model.named_modules():
        if isinstance(adapter, QWHA):
            layer = name.removeprefix("base_model.model.").removesuffix(".qwha_.default")
            basis = (matrix(adapter.in_features) / adapter.in_features**0.5).float()
            wanted = adapter.scale * (whole[f"{layer}.weight"] @ basis.T).flatten()[adapter.places.long()]
            assert (adapter.values.grad - wanted).norm() < 1e-5 * wanted.norm()


def test_a_recipe_calibrates_once_and_loads_without_data_or_original_weights(original, tmp_path):
    recipe = Recipe(calibrated(original))
    model = recipe.apply(a_packed_llama()[0], data={"train": rows_of_tokens(20)})
    expected = logits(model)
    attached_to(model).save(tmp_path / "run")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    again = load(a_packed_llama()[0], tmp_path / "run")
    assert torch.equal(logits(again), expected)


def test_the_same_data_gives_the_same_start(original):
    starts = []
    for _ in range(2):
        config = calibrated(original)
        config.see_data({"train": rows_of_tokens(40)})
        model = get_peft_model(a_packed_llama()[0], config)
        starts.append([(a.places, a.values) for a in methods_in(model)])
    for (places, values), (places_again, values_again) in zip(*starts, strict=True):
        assert torch.equal(places, places_again)
        assert torch.equal(values, values_again)


def test_it_runs_without_values_in_both_forms():
    for count in (3, 400):
        with Valueless():
            model = get_peft_model(tiny_llama(), QWHAConfig(r=2, target_modules=["q_proj"])).train()
            ids = torch.ones(1, count, dtype=torch.long)
            model(input_ids=ids, labels=ids).loss.backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# refusals


def test_settings_out_of_range_are_refused():
    for settings, message in (
        ({"r": 0}, "r of qwha must be a whole number of at least 1, got 0"),
        ({"alpha": 0}, "alpha of qwha must be above 0"),
        ({"init": "svd"}, "init of qwha must be 'calibrated', 'weight' or 'zero', got 'svd'"),
        ({"score": "rank"}, "score of qwha must be 'output' or 'weight', got 'rank'"),
        ({"allocation_power": -1}, "allocation_power of qwha must be 0 or more"),
        ({"init": "zero", "original": "folder"}, "have no effect with init='zero'"),
        ({"init": "weight", "score": "weight"}, "no effect with init='weight'"),
    ):
        with pytest.raises(ValueError, match=message):
            QWHAConfig(**settings)


def test_sizes_that_do_not_fit_are_refused_by_layer(original):
    model = nn.Sequential(nn.Linear(10, 6))
    with pytest.raises(ValueError, match=r"0: qwha needs a number of inputs .* has 10: set strict=False .* to 12"):
        get_peft_model(model, QWHAConfig(r=1, init="zero", target_modules=["0"]))
    with pytest.raises(ValueError, match=r"q_proj: r of qwha must be at most 32 for a layer of 64 -> 64 .* got 40"):
        get_peft_model(a_packed_llama()[0], calibrated(original, r=40))


def test_missing_data_and_original_weights_are_refused(original, tmp_path):
    with pytest.raises(SettingError, match="qwha is calibrated on data when it is attached, and has seen none"):
        get_peft_model(a_packed_llama()[0], calibrated(original))
    with pytest.raises(ValueError, match="does not say what it was loaded from: set original"):
        get_peft_model(a_packed_llama()[0], QWHAConfig(init="weight", target_modules=["q_proj"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match=r"empty holds no model.safetensors with original weights"):
        get_peft_model(a_packed_llama()[0], calibrated(str(tmp_path / "empty"), init="weight"))


def test_original_weights_that_do_not_fit_are_refused_by_layer(tmp_path):
    _, weights = a_packed_llama()
    name = "model.layers.1.self_attn.q_proj.weight"

    def refused(changed, message):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            get_peft_model(a_packed_llama()[0], calibrated(str(tmp_path), init="weight"))

    refused({k: v for k, v in weights.items() if k != name}, "one original weight for model.layers.1.*, but has none")
    refused(
        {**weights, name: weights[name][:5].clone()}, r"is \[5, 64\], but model.layers.1.self_attn.q_proj is \[64, 64"
    )
    refused({**weights, name: weights[name].to(torch.int8)}, r"q_proj.weight in .* is stored as torch.int8")
    refused({**weights, name: weights[name] * float("nan")}, r"layers.1.self_attn.q_proj: its weight, or the original")


def test_original_weights_are_found_in_several_files_and_under_longer_names(tmp_path):
    _, weights = a_packed_llama()
    halves = {"a.safetensors": {}, "b.safetensors": {}}
    for number, (name, weight) in enumerate(weights.items()):
        halves["ab"[number % 2] + ".safetensors"][f"language.{name}"] = weight
    for file, tensors in halves.items():
        save_file(tensors, tmp_path / file)
    table = {name: file for file, tensors in halves.items() for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    model = get_peft_model(a_packed_llama()[0], calibrated(str(tmp_path), init="weight"))
    assert all(adapter.values.abs().max() > 0 for adapter in methods_in(model))


def test_a_base_that_is_not_rounded_starts_at_zero_with_a_warning(original):
    config = calibrated(original, init="weight")
    with pytest.warns(UserWarning, match=r"qwha starts 4 layers \(model.layers.0.* first\) at zero"):
        model = get_peft_model(a_packed_llama(quant=False)[0], config)
    assert all(not adapter.values.any() for adapter in methods_in(model))


def test_tied_weights_stay_as_they_are_and_are_not_merged():
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    before = model.lm_head.weight.detach().clone()
    model = get_peft_model(model, QWHAConfig(r=2, init="zero", init_weights=False, target_modules=["lm_head"]))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    with pytest.raises(ValueError, match="The weight of lm_head is another module's too: merging would change both"):
        model.merge_and_unload()
    assert torch.equal(model.get_base_model().model.embed_tokens.weight, before)


@pytest.mark.slow
def test_a_packaged_decoder_in_four_bit_learns(tmp_path):
    need("smollm2", "gsm8k-test")
    report = train(
        RunSettings.from_dict(
            {
                "model": {"name": "packaged:smollm2", "quantization": "nf4", "dtype": "float32"},
                "task": "causal-lm",
                "data": {"train": "packaged:gsm8k-test", "text": "question", "max_length": 64, "max_train_rows": 8},
                "recipe": [
                    {
                        "qwha": {
                            "r": 8,
                            "target_modules": ["q_proj", "v_proj"],
                            "layers_to_transform": [0, 1],
                            "calibration_rows": 4,
                        }
                    }
                ],
                "train": {
                    "max_steps": 5,
                    "per_device_train_batch_size": 2,
                    "learning_rate": 1e-3,
                    "logging_steps": 1,
                    "save_strategy": "no",
                    "seed": 0,
                },
                "output_dir": str(tmp_path / "run"),
            }
        )
    )
    losses = [loss for _, loss in report.losses]
    assert losses[-1] < losses[0], losses
