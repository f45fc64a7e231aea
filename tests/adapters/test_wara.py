"""WaRA: its transform, equations of all forms against dense references, costs, counts, refusals, real models."""

import sys
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import convert_to_lora
from peft.utils import set_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn

from packaged import losses_of, minilm_and_reviews
from shoestring import assets
from shoestring.adapters import WaRA, WaRAConfig, wavelets
from shoestring.adapters.wara import GridWaRA, TinyWaRA
from shoestring.assets.fashion_mnist import read_pairs
from shoestring.errors import SettingError
from shoestring.memory import MemoryReport
from shoestring.recipe import Recipe, attached_to, load
from shoestring.testing.adapters import (
    TARGETS,
    adapted,
    batch,
    chain,
    counted_step,
    methods_in,
    tiny_llama,
    tokens,
    trainable,
    two_layers,
)
from shoestring.testing.assets import need

# (settings of the weight form, its bands)
WEIGHT_FORMS = [
    ({"r": 3, "alpha": 5}, 2),
    ({"r": 3, "per_band": True}, 2),
    ({"r": 2, "per_band": True, "levels": 3}, 4),
    ({"r": 3, "wavelet": "db2"}, 2),
    ({"r": 2, "wavelet": "sym4", "per_band": True, "levels": 2}, 3),
]


def filters(wavelet: str) -> tuple[list[float], list[float]]:
    if wavelet == "haar":
        s = 0.5**0.5
        return [s, s], [s, -s]
    pywt = pytest.importorskip("pywt")
    return pywt.Wavelet(wavelet).rec_lo, pywt.Wavelet(wavelet).rec_hi


def dense_transform(size: int, wavelet: str = "haar", levels: int = 1) -> Tensor:
    """H, [coefficients, size], entry by entry; low band first, then high bands coarse to fine."""
    filled = size + size % 2
    rows = torch.zeros(filled, filled, dtype=torch.float64)
    for kind, taps in enumerate(filters(wavelet)):
        for i in range(filled // 2):
            for j, tap in enumerate(taps):
                rows[kind * (filled // 2) + i, (2 * i + j) % filled] += tap
    low, high = rows[: filled // 2, :size], rows[filled // 2 :, :size]
    if levels > 1:
        low = dense_transform(filled // 2, wavelet, levels - 1) @ low
    return torch.cat([low, high])


def dense_delta(a: Tensor, b: Tensor, size: tuple[int, int], scale: float, settings: dict) -> Tensor:
    """s H_out^T blockdiag(B A, ...) H_in from the dense matrices."""
    wavelet, levels = settings.get("wavelet", "haar"), settings.get("levels", 1)
    h_out, h_in = (dense_transform(n, wavelet, levels) for n in size)
    if settings.get("per_band"):
        parts = [wavelets.band_sizes(n, levels) for n in size]
        blocks = [p @ q for p, q in zip(b.split(parts[0]), a.split(parts[1], dim=1), strict=True)]
    else:
        blocks = [b @ a] * 2
    return scale * h_out.T @ torch.block_diag(*blocks) @ h_in


def scale_of(settings: dict) -> float:
    return settings.get("alpha", settings["r"]) / settings["r"]


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4", "sym5", "coif1"])
@pytest.mark.parametrize("size", [2, 6, 24, 25, 63])
def test_the_inverse_transform_gives_the_vector_back(wavelet: str, size: int):
    filters(wavelet)
    taps, x = wavelets.low_pass(wavelet), torch.randn(3, size)
    low, high = wavelets.split(x, taps)
    assert low.shape == high.shape == (3, (size + 1) // 2)
    torch.testing.assert_close(wavelets.join(low, high, taps, size), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(low.square().sum() + high.square().sum(), x.square().sum(), rtol=1e-5, atol=1e-5)
    x = x.double()
    expected = x @ dense_transform(size, wavelet).T
    torch.testing.assert_close(torch.cat(wavelets.split(x, taps), -1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("wavelet", "levels"), [("haar", 1), ("haar", 3), ("db3", 2)])
def test_the_transform_is_orthonormal(wavelet: str, levels: int):
    h = dense_transform(24, wavelet, levels)
    torch.testing.assert_close(h @ h.T, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-10)
    taps = wavelets.low_pass(wavelet)
    bands = list(torch.eye(24, dtype=torch.float64).split(wavelets.band_sizes(24, levels), dim=1))
    rows = wavelets.rows_of_bands([torch.eye(b.shape[1], dtype=torch.float64) for b in bands], taps, 24)
    torch.testing.assert_close(rows, h, rtol=0, atol=1e-10)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4", "coif1"])
def test_coefficients_are_those_of_pywavelets_up_to_a_shift(wavelet: str):
    """PyWavelets begins half a filter later."""
    pywt = pytest.importorskip("pywt")
    x, taps = torch.randn(32, dtype=torch.float64), wavelets.low_pass(wavelet)
    theirs = pywt.dwt(np.roll(x.numpy(), 1 - len(taps) // 2), wavelet, mode="periodization")
    for mine, other in zip(wavelets.split(x, taps), theirs, strict=True):
        torch.testing.assert_close(mine, torch.from_numpy(other), rtol=1e-9, atol=1e-9)


def test_haar_on_numbers_small_enough_to_check_by_hand():
    low, high = wavelets.split(torch.tensor([1.0, 3.0, 5.0, -1.0, 2.0]), wavelets.HAAR)
    root = 2**0.5
    torch.testing.assert_close(low * root, torch.tensor([4.0, 4.0, 2.0]))
    torch.testing.assert_close(high * root, torch.tensor([-2.0, 6.0, 2.0]))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3},
        {"r": 2, "per_band": True, "levels": 2},
        {"form": "grid", "grid": [7, 9], "num_prefix_tokens": 0},
        {"form": "tiny"},
    ],
)
def test_it_starts_as_the_pretrained_model_bit_by_bit(settings: dict):
    model = adapted(WaRAConfig, lambda: settings, init_weights=True)
    assert torch.equal(model(batch()), two_layers()(batch()))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("settings", "bands"), WEIGHT_FORMS)
@pytest.mark.parametrize(("out_features", "in_features"), [(40, 24), (17, 25)])
def test_the_delta_is_the_dense_formula_of_rank_r_a_band(
    out_features: int, in_features: int, settings: dict, bands: int, seed: int
):
    filters(settings.get("wavelet", "haar"))
    torch.manual_seed(seed)
    wara = WaRA(nn.Linear(in_features, out_features), WaRAConfig(init_weights=False, **settings)).double()
    delta = wara.delta_weight()
    expected = dense_delta(wara.a, wara.b, (out_features, in_features), scale_of(settings), settings)
    torch.testing.assert_close(delta, expected, rtol=1e-10, atol=1e-10)
    assert torch.linalg.matrix_rank(delta) == bands * settings["r"]


def run_and_grads(model: PeftModel, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    y = model(x)
    y.square().sum().backward()
    return y, [x.grad, *(p.grad for p in trainable(model).values())]


@pytest.mark.parametrize(("settings", "bands"), WEIGHT_FORMS)
def test_outputs_and_gradients_are_those_of_the_dense_formula_in_double_precision(settings: dict, bands: int):
    filters(settings.get("wavelet", "haar"))
    model = adapted(WaRAConfig, lambda: settings, two_layers(torch.float64)).double()
    x = batch(torch.float64).requires_grad_()
    y, grads = run_and_grads(model, x)
    model.zero_grad()
    x.grad, base = None, two_layers(torch.float64)
    for wara, layer in zip(methods_in(model), (base.first, base.second), strict=True):
        delta = dense_delta(wara.a, wara.b, tuple(layer.weight.shape), scale_of(settings), settings)
        weight, bias = layer.weight.detach() + delta, layer.bias.detach()
        hidden = F.linear(x if layer is base.first else F.gelu(hidden), weight, bias)
    torch.testing.assert_close(y, hidden, rtol=1e-10, atol=1e-10)
    hidden.square().sum().backward()
    for grad, tensor in zip(grads, [x, *trainable(model).values()], strict=True):
        torch.testing.assert_close(
            grad / tensor.grad.abs().max(), tensor.grad / tensor.grad.abs().max(), rtol=0, atol=1e-10
        )


def test_the_transform_over_tokens_cancels_in_the_weight_form():
    """The paper's form: a transform over tokens and features, one pair for all four bands, and back."""
    torch.manual_seed(0)
    wara = WaRA(nn.Linear(24, 40), WaRAConfig(r=3, init_weights=False)).double()
    x = torch.randn(24, 64, dtype=torch.float64)  # [features, tokens], as in the paper
    h_in, h_out, h_tokens = (dense_transform(n) for n in (24, 40, 64))
    coefficients = h_in @ x @ h_tokens.T
    adapted_bands = torch.cat([wara.b @ wara.a @ half for half in coefficients.split(12)])
    expected = h_out.T @ adapted_bands @ h_tokens
    torch.testing.assert_close(wara.delta_output(x.T).T, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("settings", "bands"), WEIGHT_FORMS[:3])
def test_merged_equals_the_branch_and_comes_back(settings: dict, bands: int):
    model = adapted(WaRAConfig, lambda: settings)
    expected = model(batch())
    model.merge_adapter()
    torch.testing.assert_close(model(batch()), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    for name in TARGETS:
        assert torch.equal(getattr(model.base_model.model, name).base_layer.weight, getattr(two_layers(), name).weight)


def test_it_converts_to_lora_of_twice_the_rank():
    model = adapted(WaRAConfig, lambda: {"r": 3})
    expected = model(batch())
    config, state = convert_to_lora(model, rank=6)
    lora = get_peft_model(two_layers(), config).eval()
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(lora(batch()), expected, rtol=1e-5, atol=1e-5)


def test_a_dropout_of_inputs_acts_in_training_only():
    model = adapted(WaRAConfig, lambda: {"r": 3, "dropout": 0.5})
    expected = adapted(WaRAConfig, lambda: {"r": 3})(batch())
    assert torch.equal(model(batch()), expected)
    assert not torch.equal(model.train()(batch()), expected)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"r": 3}, 3 * (24 + 40 + 40 + 16) / 2),
        ({"r": 3, "per_band": True}, 3 * (24 + 40 + 40 + 16)),
        ({"r": 2, "per_band": True, "levels": 3}, 2 * (24 + 40 + 40 + 16)),
        ({"form": "grid", "r": 3, "grid": [7, 9]}, 3 * (24 + 40 + 40 + 16) + 2 * 4),
        ({"form": "grid", "r": 3, "levels": 2, "grid": [7, 9]}, 3 * (24 + 40 + 40 + 16) + 2 * 7),
        ({"form": "tiny", "r": 3}, 2 * 3 * 3),
        ({"form": "tiny", "r": 3, "core": "diagonal"}, 2 * 3),
    ],
)
def test_the_parameters_that_train_are_those_of_the_formula(settings: dict, count: int):
    numbers = sum(p.numel() for p in trainable(adapted(WaRAConfig, lambda: settings)).values())
    lora = get_peft_model(two_layers(), LoraConfig(r=settings["r"], target_modules=list(TARGETS)))
    assert numbers == count
    if settings == {"r": 3}:
        assert 2 * numbers == sum(p.numel() for p in trainable(lora).values())


def test_odd_sizes_count_as_the_next_even_ones():
    wara = WaRA(nn.Linear(25, 17), WaRAConfig(r=3))
    assert sum(p.numel() for p in wara.parameters()) == 3 * (26 + 18) // 2


def step(config: Any) -> MemoryReport:
    return counted_step(chain(config, widths=(256, 192)), 512)


def test_only_inputs_and_the_inner_numbers_are_kept_for_backward():
    inputs = 192 + 256 + 192  # of layers 2 to 4; the first one's is the model's own
    assert step(WaRAConfig(r=8)).saved_bytes == 512 * 4 * (inputs + 4 * 16)
    grid = WaRAConfig(form="grid", r=8, grid=[16, 32], num_prefix_tokens=0)
    assert step(grid).saved_bytes == 512 * 4 * (inputs + 4 * 2 * 8)
    assert step(WaRAConfig(form="tiny", r=8)).saved_bytes == 512 * 4 * (4 * 8)


def test_the_peak_is_within_five_percent_of_loras_at_equal_rank():
    assert step(WaRAConfig(r=8)).peak_bytes <= 1.05 * step(LoraConfig(r=8)).peak_bytes


def grid_reference(
    adapter: GridWaRA, x: Tensor, prefix: int, grid: tuple[int, int], wavelet: str, levels: int
) -> Tensor:
    """B of gains times the transform of A x, with each band cut out by dense matrices."""
    height, width = grid
    image = x[:, prefix:].unflatten(1, grid) @ adapter.a.T
    rows, columns = (dense_transform(n, wavelet, levels) for n in grid)
    if levels == 1:  # gains as a table over coefficients
        gains = adapter.gains.view(2, 2).repeat_interleave((height + 1) // 2, 0).repeat_interleave((width + 1) // 2, 1)
        bands = torch.einsum("ih,jw,bhwr->bijr", rows, columns, image) * gains[None, :, :, None]
        image = torch.einsum("ih,jw,bijr->bhwr", rows, columns, bands)
    else:  # two levels: the low band of the first is an image of its own
        first, second = (dense_transform(n, wavelet) for n in grid)
        cut = (height + 1) // 2, (width + 1) // 2
        bands = torch.einsum("ih,jw,bhwr->bijr", first, second, image)
        low = bands[:, : cut[0], : cut[1]]
        inner, outer = (dense_transform(n, wavelet) for n in cut)
        coarse = torch.einsum("ih,jw,bhwr->bijr", inner, outer, low)
        half = (cut[0] + 1) // 2, (cut[1] + 1) // 2
        table = adapter.gains[:4].view(2, 2).repeat_interleave(half[0], 0).repeat_interleave(half[1], 1)
        low = torch.einsum("ih,jw,bijr->bhwr", inner, outer, coarse * table[None, :, :, None])
        fine = torch.cat([adapter.gains.new_ones(1), adapter.gains[4:]]).view(2, 2)
        fine = fine.repeat_interleave(cut[0], 0).repeat_interleave(cut[1], 1)
        bands = bands * fine[None, :, :, None]
        top = torch.cat([low, bands[:, : cut[0], cut[1] :]], 2)
        image = torch.einsum("ih,jw,bijr->bhwr", first, second, torch.cat([top, bands[:, cut[0] :]], 1))
    update = adapter.scale * image.flatten(1, 2) @ adapter.b.T
    return F.pad(update, (0, 0, prefix, 0))


@pytest.mark.parametrize(
    ("grid", "prefix", "wavelet", "levels"),
    [((7, 9), 0, "haar", 1), ((6, 10), 3, "haar", 1), ((6, 10), 3, "db2", 1), ((9, 6), 1, "haar", 2)],
)
def test_the_grid_form_is_its_dense_reference_with_gradients(
    grid: tuple[int, int], prefix: int, wavelet: str, levels: int
):
    filters(wavelet)
    torch.manual_seed(0)
    base = nn.Linear(12, 20).double()
    config = WaRAConfig(
        form="grid", grid=list(grid), num_prefix_tokens=prefix, r=3, alpha=5, wavelet=wavelet, levels=levels,
        init_weights=False,
    )  # fmt: skip
    adapter = GridWaRA(base, config).double()
    x = torch.randn(2, prefix + grid[0] * grid[1], 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, *adapter.parameters()]
    y = adapter.new_output(x, base(x), base)
    expected = base(x) + grid_reference(adapter, x, prefix, grid, wavelet, levels)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(y[:, :prefix], base(x)[:, :prefix])
    grads = torch.autograd.grad(y.square().sum(), inputs)
    for grad, other in zip(grads, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-9)


def test_the_grid_form_with_equal_gains_is_lora():
    torch.manual_seed(0)
    base, x = nn.Linear(12, 20), torch.randn(2, 1 + 63, 12)
    adapter = GridWaRA(base, WaRAConfig(form="grid", grid=[7, 9], r=3, init_weights=False))
    with torch.no_grad():
        adapter.gains.fill_(1)
    lora = F.pad(x[:, 1:] @ adapter.a.T @ adapter.b.T, (0, 0, 1, 0))
    torch.testing.assert_close(adapter.new_output(x, base(x), base), base(x) + lora, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_the_tiny_form_learns_in_the_basis_of_the_largest_singular_vectors(core: str):
    torch.manual_seed(0)
    model = adapted(
        WaRAConfig, lambda: {"form": "tiny", "r": 4, "alpha": 6, "core": core}, two_layers(torch.float64), True
    )
    x = batch(torch.float64)
    model = model.double()
    with torch.no_grad():
        for tiny in methods_in(model):
            tiny.core.normal_()
    hidden = x
    for tiny, name in zip(methods_in(model), TARGETS, strict=True):
        layer = getattr(two_layers(torch.float64), name)
        u, _, v = torch.linalg.svd(layer.weight.detach())
        signs = torch.sign((u[:, :4] * tiny.u).sum(0))
        torch.testing.assert_close(tiny.u, u[:, :4] * signs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(tiny.v, v[:4].T * signs, rtol=1e-9, atol=1e-9)
        m = tiny.core if core == "full" else torch.diag(tiny.core)
        delta = 1.5 * tiny.u @ m @ tiny.v.T
        torch.testing.assert_close(tiny.delta_weight(), delta, rtol=1e-12, atol=1e-12)
        hidden = F.linear(hidden if name == "first" else F.gelu(hidden), layer.weight + delta, layer.bias)
    torch.testing.assert_close(model(x), hidden, rtol=1e-10, atol=1e-10)
    parameters = list(trainable(model).values())
    grads = torch.autograd.grad(model(x).square().sum(), parameters)
    for grad, other in zip(grads, torch.autograd.grad(hidden.square().sum(), parameters), strict=True):
        torch.testing.assert_close(grad / grad.abs().max(), other / grad.abs().max(), rtol=0, atol=1e-10)


def test_the_tiny_basis_keeps_single_precision_beside_a_base_in_16_bits():
    model = adapted(WaRAConfig, lambda: {"form": "tiny", "r": 4}, two_layers(torch.bfloat16), init_weights=True)
    tiny: TinyWaRA = methods_in(model)[0]
    assert tiny.u.dtype == tiny.v.dtype == torch.float32
    torch.testing.assert_close(tiny.u.T @ tiny.u, torch.eye(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["peft", "peft, without values first", "recipe"])
def test_the_tiny_basis_is_loaded_as_it_was_and_not_made_again(way, monkeypatch, tmp_path):
    config = WaRAConfig(form="tiny", r=4, target_modules=["q_proj"])
    kept = Recipe(config).apply(tiny_llama().bfloat16())
    saved = methods_in(kept)[0]
    with torch.no_grad():
        saved.core.normal_()
    attached_to(kept).save(tmp_path)

    def made_again(*args: Any) -> None:
        raise AssertionError("start was called")

    monkeypatch.setattr(TinyWaRA, "start", made_again)
    base = tiny_llama().bfloat16()
    if way == "recipe":
        loaded = load(base, tmp_path)
    else:
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage="without" in way)
    found = methods_in(loaded)[0]
    assert torch.equal(found.u, saved.u)
    assert torch.equal(found.v, saved.v)
    if "without" not in way:  # there peft keeps parameters in the base's dtype, LoRA's as well
        assert torch.equal(found.core, saved.core)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r of wara must be a whole number of at least 1, got 0"),
        ({"levels": 0}, "levels of wara must be a whole number of at least 1, got 0"),
        ({"levels": 2}, "levels of wara above 1 .* set per_band=True"),
        ({"form": "bad"}, "form of wara must be 'weight', 'grid' or 'tiny', got 'bad'"),
        ({"form": "tiny", "core": "bad"}, "core of wara must be 'full' or 'diagonal', got 'bad'"),
        ({"core": "diagonal"}, "core of wara has no effect in the weight form"),
        ({"form": "tiny", "wavelet": "db2"}, "wavelet of wara has no effect in the tiny form"),
        ({"grid": [7, 9]}, "grid of wara has no effect in the weight form"),
        ({"form": "grid", "grid": [4, 4], "per_band": True}, "per_band of wara has no effect in the grid form"),
        ({"form": "grid"}, r"grid of wara must be \[height, width\] .*got None"),
        (
            {"form": "grid", "grid": [4, 1]},
            r"grid of wara must have at least 2\^levels = 2 tokens each way, got \[4, 1\]",
        ),
        ({"form": "grid", "grid": [7, 8], "strict": True}, "strict=True .* height of the grid is 7"),
        ({"dropout": 1.0}, r"dropout of wara must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        WaRAConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"r": 9},
            "second: r of wara in its weight form must be at most 8 with levels=1 for a layer of 40 -> 16 .*got 9",
        ),
        ({"r": 3, "levels": 3, "per_band": True}, "second: .* at most 2 with levels=3 .* got 3"),
        ({"form": "tiny", "r": 17}, "second: r of wara in its tiny form must be at most 16 for a layer of 40 -> 16"),
        ({"r": 1, "levels": 4, "per_band": True, "strict": True}, "first: .* 16 divides, but out_features is 40"),
    ],
)
def test_layers_that_do_not_fit_are_refused_by_name_and_size(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        adapted(WaRAConfig, lambda: settings)


@pytest.mark.parametrize("shape", [(2, 64, 24), (63, 24), (24,)])
def test_another_number_of_tokens_than_the_grid_has_is_refused(shape: tuple[int, ...]):
    model = adapted(WaRAConfig, lambda: {"form": "grid", "grid": [8, 8]})
    with pytest.raises(ValueError, match=r"takes 1 \+ 8 \* 8 = 65 tokens, got (64|63|1)"):
        model(torch.randn(shape))


def test_unknown_wavelets_and_those_that_are_not_orthogonal_are_refused():
    pytest.importorskip("pywt")
    with pytest.raises(SettingError, match=r"'db22222' is unknown.* Did you mean"):
        WaRAConfig(wavelet="db22222")
    with pytest.raises(SettingError, match=r"'bior2\.2' is not orthogonal"):
        WaRAConfig(wavelet="bior2.2")


def test_without_pywavelets_haar_works_and_others_name_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pywt", None)
    assert wavelets.low_pass(WaRAConfig().wavelet) == (0.5**0.5, 0.5**0.5)
    with pytest.raises(SettingError, match=r"'db2' needs PyWavelets.*pip install 'shoestring\[wavelet\]'.*'haar'"):
        WaRAConfig(wavelet="db2")


@pytest.mark.parametrize("others", [["recompute"], ["chunked_loss"], [{"token_tune": {"keep_fraction": 0.5}}]])
def test_it_trains_beside_other_techniques(others: list):
    config = {"wara": {"r": 3, "target_modules": ["v_proj", "down_proj"]}}
    ids = tokens()
    with Recipe.from_list([config, *others])(tiny_llama().train()) as model:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trainable(model).values())


@pytest.mark.parametrize("settings", [{"r": 8}, {"form": "tiny", "r": 16}])
def test_minilm_learns_reviews(settings: dict):
    base, inputs = minilm_and_reviews(8)
    torch.manual_seed(0)
    model = get_peft_model(base, WaRAConfig(target_modules=["query", "value"], task_type="SEQ_CLS", **settings))
    losses = losses_of(model, inputs, own="wara_")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"form": "grid", "grid": [5, 5]},
        pytest.param({"r": 8}, marks=pytest.mark.slow),
        pytest.param({"form": "grid", "grid": [5, 5], "wavelet": "db2"}, marks=pytest.mark.slow),
    ],
)
def test_dinov2_learns_images(settings: dict):
    filters(settings.get("wavelet", "haar"))
    need("dinov2-small", "fashion-mnist")
    rows = read_pairs(assets.data_files("fashion-mnist"), "t10k")[:4]
    pictures = [Image.open(BytesIO(row["image"]["bytes"])).convert("RGB").resize((70, 70)) for row in rows]
    pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures])
    torch.manual_seed(0)
    folder = assets.model_folder("dinov2-small")
    base = transformers.AutoModelForImageClassification.from_pretrained(folder, num_labels=10)
    config = WaRAConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], **settings)
    inputs = {
        "pixel_values": pixels.permute(0, 3, 1, 2) / 127.5 - 1,
        "labels": torch.tensor([row["label"] for row in rows]),
    }
    losses = losses_of(get_peft_model(base, config), inputs, own="wara_")
    assert losses[-1] < losses[0]
