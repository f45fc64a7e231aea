"""SketchTune: building sketches, the product with them, training, storing, and what is refused."""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import DeloraConfig, LoraConfig, OFTConfig, PeftConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
)

from packaged import reviews
from shoestring import Recipe, assets, load
from shoestring.adapters import HUTConfig, TLoRA, TLoRAConfig
from shoestring.adapters.base import AdaptedLinear
from shoestring.errors import SettingError
from shoestring.planning.prediction import work_of_model
from shoestring.planning.rehearsal import rehearse, run_one_step
from shoestring.pruning import SketchTune, sketchtune
from shoestring.pruning.sketchtune import CODES_FILE, TABLES_FILE
from shoestring.quantisation import groups as grids
from shoestring.quantisation import load_packed, save_packed, sketched_linear
from shoestring.quantisation.packing import unpack
from shoestring.quantisation.sketch import (
    Curvature,
    build_sketch,
    cluster,
    cluster_loss,
    curvature_of,
    dequantise,
    swept_codes,
)
from shoestring.quantisation.sketched_linear import SketchedLinear
from shoestring.recipe import attached_to
from shoestring.testing.assets import need
from shoestring.testing.packed_layers import KINDS, pack_layer
from shoestring.testing.tiny_models import CLASSIFIER, DECODER, decoder, seeded, step

LLAMA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]  # (out, in) of the linear layers of a block


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Inputs of few directions, of which some count more."""
    return random(tokens, width // 4, seed=seed) @ random(width // 4, width, seed=seed + 1) + 0.1 * random(
        tokens, width
    )


def sketch_of(**settings: Any) -> SketchTune:
    return SketchTune(**{"groups": 2, "calibrate": False, **settings})


def trained_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# building


def plain_k_means(values: Tensor, counts: Tensor, centres: Tensor) -> Tensor:
    for _ in range(1000):
        nearest = (values[:, None] - centres).abs().argmin(1)
        moved = centres.clone()
        for k in range(len(centres)):
            if (nearest == k).any():
                moved[k] = (values * counts)[nearest == k].sum() / counts[nearest == k].sum()
        if torch.equal(moved, centres):
            return centres
        centres = moved
    return centres


@pytest.mark.parametrize("bits", [2, 3])
def test_k_means_is_that_of_a_loop_over_rows(bits: int):
    weight, counts = random(5, 33, seed=bits), random(33, seed=9).exp()
    tables = cluster(weight, counts, 1 << bits, 1, passes=1000)[:, 0]
    for row, table in zip(weight, tables, strict=True):
        ours = float(cluster_loss(row[None], counts, table[None, None]))
        settled = plain_k_means(row, counts, torch.linspace(float(row.min()), float(row.max()), 1 << bits).double())
        theirs = float((counts * (row[:, None] - settled).square().min(1).values).sum())
        assert ours <= theirs * 1.001


def test_values_are_found_where_there_are_no_more_of_them_than_places():
    weight = torch.tensor([-1.0, 0.5, 2.5, 4.0])[torch.arange(40) % 4].expand(3, -1)
    tables, codes = build_sketch(weight, 2)
    assert tables.tolist() == [[[-1.0, 0.5, 2.5, 4.0]]] * 3
    assert torch.equal(dequantise(tables, codes), weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_more_groups_never_have_a_larger_loss(bits: int, seed: int):
    weight, counts = random(7, 48, seed=seed), random(48, seed=seed + 9).exp()
    losses = [
        cluster_loss(weight, counts, cluster(weight, counts, 1 << bits, groups, seed=seed)).sum(1)
        for groups in (1, 2, 4, 8)
    ]
    for fewer, more in pairwise(losses):
        assert (more <= fewer * (1 + 1e-9)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_sweep_beats_nearest_values_and_these_beat_a_grid(bits: int, groups: int):
    shares = []  # of the error of a grid; nearest values beat it on the whole, not for every weight
    for seed in range(6):
        weight, x = random(24, 64, seed=bits + 10 * seed), correlated(400, 64, seed)
        seen = curvature_of(x.T @ x, len(x))
        grid = grids.dequantise(*grids.round_to_nearest(weight, bits, 64 // groups, symmetric=False))
        swept, nearest = (build_sketch(weight, bits, groups, curvature=seen, sweep=sweep) for sweep in (True, False))
        errors = [((weight - other) @ x.T).square().sum() for other in (dequantise(*swept), dequantise(*nearest), grid)]
        assert errors[0] <= errors[1]
        shares.append(float(errors[1] / errors[2]))
    assert sum(shares) / len(shares) < 1


def test_the_sweep_is_that_of_a_loop_over_columns():
    weight, x = random(6, 150), correlated(300, 150)  # more than one block of columns
    tables = cluster(weight, torch.ones(150), 8, 2)
    factor = curvature_of(x.T @ x, len(x)).factor
    left, codes = weight.clone(), torch.zeros(6, 150, dtype=torch.uint8)
    for j in range(150):
        table = tables[:, j // 75]
        codes[:, j] = (left[:, j : j + 1] - table).abs().argmin(1)
        missed = (left[:, j] - dequantise(table[:, None], codes[:, j : j + 1])[:, 0]) / factor[j, j]
        left[:, j:] -= missed[:, None] * factor[j, j:]
    assert torch.equal(swept_codes(weight, tables, factor), codes)


def test_the_factor_is_that_of_the_damped_inverse():
    x = random(40, 7)
    x[:, 3] = 0
    moments = 2 / 40 * x.T @ x
    moments[3, 3] = 1
    moments += 0.02 * moments.diagonal().mean() * torch.eye(7)
    factor, unused = curvature_of(x.T @ x, 40, damping=0.02)
    assert torch.allclose(factor.T @ factor @ moments, torch.eye(7, dtype=torch.float64), atol=1e-10)
    assert torch.equal(factor, factor.triu())
    assert unused.nonzero().tolist() == [[3]]


def test_columns_without_inputs_count_as_zero():
    seen = Curvature(torch.eye(4).double(), torch.tensor([False, True, False, False]))
    weight = torch.tensor([[1.0, 100.0, 1.0, 0.0]])
    assert dequantise(*build_sketch(weight, 2, curvature=seen)).tolist() == [[1.0, 0.0, 1.0, 0.0]]


# the product


def layer_of(sizes: tuple[int, int], bits: int, groups: int, dtype: torch.dtype, bias: bool = True) -> SketchedLinear:
    rows, columns = sizes
    layer = SketchedLinear(columns, rows, bits, groups, nn.Parameter(random(rows).to(dtype)) if bias else False, dtype)
    codes = torch.randint(0, 1 << bits, sizes, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    layer.fill(random(rows, groups, 1 << bits, seed=1), codes)
    return layer


def by_gather(layer: SketchedLinear, x: Tensor) -> Tensor:
    places = unpack(layer.codes, layer.bits, layer.in_features).long().view(layer.out_features, layer.groups, -1)
    weight = torch.gather(layer.tables, 2, places).reshape(layer.out_features, layer.in_features)
    return nn.functional.linear(x, weight, layer.bias)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("shape", [(15,), (7, 15), (2, 7, 15), (2, 1, 7, 15)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_a_gathered_weight(monkeypatch, bits, groups, shape, bias):
    monkeypatch.setattr(sketched_linear, "BLOCK_NUMBERS", 60)  # blocks of four rows, the last of three
    layer = layer_of((11, 15), bits, groups, torch.float64, bias)
    x = random(*shape, seed=4)
    given = [x.clone().requires_grad_() for _ in range(2)]
    ours, wanted = layer(given[0]), by_gather(layer, given[1])
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    dy = random(*ours.shape, seed=5)
    own = torch.autograd.grad(ours, [given[0], *layer.parameters()], dy)
    other = torch.autograd.grad(wanted, [given[1], *layer.parameters()], dy)
    for mine, theirs in zip(own, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_the_weight_it_shows_is_that_of_the_product_with_its_gradient():
    layer = layer_of((6, 10), 4, 2, torch.float64)
    x = random(3, 10)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
    ours = torch.autograd.grad(layer(x).square().sum(), layer.tables)
    shown = torch.autograd.grad(nn.functional.linear(x, layer.weight, layer.bias).square().sum(), layer.tables)
    torch.testing.assert_close(ours, shown)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_near_and_deterministic(dtype: torch.dtype):
    exact, layer = layer_of((9, 20), 3, 2, torch.float64), layer_of((9, 20), 3, 2, dtype)
    x = random(5, 20)
    runs = []
    for _ in range(2):
        given = x.to(dtype).requires_grad_()
        y = layer(given)
        runs.append([y, *torch.autograd.grad(y.float().square().sum(), [given, layer.tables])])
    assert [each.dtype for each in runs[0]] == [dtype, dtype, torch.float32]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    tolerance = 0.1 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(runs[0][0].double(), exact(x), rtol=tolerance, atol=tolerance)


def test_tables_stay_in_float32_whatever_the_model_is_cast_to():
    layer = layer_of((9, 20), 4, 2, torch.float32)
    before = layer.tables.detach().clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.tables, before)
    assert layer.bias.dtype == torch.bfloat16
    layer.double()
    assert layer.tables.dtype == torch.float64


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_nothing_of_the_weights_size_is_made_or_kept(monkeypatch):
    monkeypatch.setattr(sketched_linear, "BLOCK_NUMBERS", 1000)
    layer, x = layer_of((256, 100), 4, 1, torch.float32), random(8, 100, dtype=torch.float32).requires_grad_()
    kept: list[Tensor] = []
    with Largest() as made, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert made.numbers <= 256 * 16  # the gradient of the tables; the weight has 100 numbers a row
    assert {t.shape for t in kept} == {x.shape, layer.tables.shape, layer.codes.shape}


# the technique


@pytest.mark.parametrize("groups", [1, 2])
def test_what_trains_is_a_table_for_every_row_and_group(groups: int):
    with Recipe(sketch_of(groups=groups, bits=3))(decoder()) as model:
        linear = [m for m in model.modules() if isinstance(m, SketchedLinear)]
        assert len(linear) == 14
        assert trained_count(model) == sum(layer.out_features * groups * 8 for layer in linear)


def test_the_paper_counts_the_same_for_llama_7b():
    with torch.device("meta"):
        block = [SketchedLinear(columns, rows, 4, 1, False, torch.float16) for rows, columns in LLAMA_7B]
    assert 32 * sum(layer.tables.numel() for layer in block) == 21_757_952
    packed = sum(layer.codes.nbytes + 4 * layer.tables.nbytes for layer in block)  # 4 groups
    assert packed <= 0.30 * sum(2 * rows * columns for rows, columns in LLAMA_7B)


def test_weights_are_let_go_of_and_come_back_as_those_of_the_trained_sketch():
    base = decoder()
    before = {name: p.shape for name, p in base.named_parameters()}
    model = Recipe(sketch_of()).apply(base)
    dropped = [p for n, p in attached_to(model)._base_parameters.items() if "_proj" in n]
    assert len(dropped) == 14
    assert all(p.untyped_storage().nbytes() == 0 for p in dropped)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        losses.append(float(step(model, DECODER.batch()).loss))
        optimizer.step()
    assert losses[-1] < losses[0]
    logits = model.eval()(**DECODER.batch()).logits
    plain = Recipe.remove(model)
    assert {name: p.shape for name, p in plain.named_parameters()} == before
    assert not any(isinstance(module, SketchedLinear) for module in plain.modules())
    torch.testing.assert_close(plain.eval()(**DECODER.batch()).logits, logits, rtol=1e-5, atol=1e-5)


def test_calibration_beats_weights_alone_on_the_data():
    plain = decoder().eval()
    batch = DECODER.batch()
    errors = []
    for settings in ({"calibrate": False}, {"calibrate": True, "calibration_rows": 16}):
        with Recipe(sketch_of(bits=2, **settings))(decoder(), data=DECODER.data()) as model:
            errors.append((model.eval()(**batch).logits - plain(**batch).logits).square().mean().item())
    assert errors[1] < errors[0]


def test_conv1d_is_replaced_and_comes_back_in_its_layout():
    with seeded(0):
        base = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=12, n_layer=2, n_head=2, n_positions=16)).eval()
    shapes = {name: p.shape for name, p in base.named_parameters()}
    ids = torch.arange(3, 12)[None]
    model = Recipe(sketch_of(bits=4)).apply(base)
    logits = model(input_ids=ids).logits
    assert sum(isinstance(m, SketchedLinear) for m in model.modules()) == 8
    plain = Recipe.remove(model)
    assert {name: p.shape for name, p in plain.named_parameters()} == shapes
    torch.testing.assert_close(plain(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-5)


def test_a_new_head_trains_and_is_saved(tmp_path: Path):
    def of(model: nn.Module) -> Tensor:
        return model.eval()(**CLASSIFIER.batch()).logits

    model = Recipe(sketch_of()).apply(CLASSIFIER.make())
    assert model.classifier.weight.requires_grad
    with torch.no_grad():
        model.classifier.weight += 1
    attached_to(model).save(tmp_path)
    assert torch.equal(of(load(CLASSIFIER.make(), tmp_path)), of(model))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_saved_and_loaded_it_is_the_same_to_the_bit(tmp_path: Path, bits: int):
    model = Recipe(sketch_of(bits=bits, calibrate=True, calibration_rows=4)).apply(decoder(), data=DECODER.data())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01
    attached_to(model).save(tmp_path)
    again = load(decoder(), tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(again.eval()(**DECODER.batch()).logits, model.eval()(**DECODER.batch()).logits)
    assert all(p.numel() == 0 for n, p in attached_to(again)._base_parameters.items() if "_proj" in n)


def test_tasks_of_one_sketch_are_switched_by_their_tables(tmp_path: Path):
    model = Recipe(sketch_of()).apply(decoder()).eval()
    outputs = []
    for task in ("first", "second"):
        with torch.no_grad():
            for layer in (m for m in model.modules() if isinstance(m, SketchedLinear)):
                layer.tables.mul_(1.1)
        attached_to(model).save(tmp_path / task)
        outputs.append(model(**DECODER.batch()).logits)
    (tmp_path / "first" / CODES_FILE).unlink()
    attached_to(model).restore(tmp_path / "first")
    assert torch.equal(model(**DECODER.batch()).logits, outputs[0])
    with pytest.raises(SettingError, match=f"holds no {CODES_FILE}"):
        load(decoder(), tmp_path / "first")
    other = Recipe(sketch_of()).apply(decoder(hidden_act="gelu", initializer_range=0.5))
    with pytest.raises(SettingError, match="belongs to other codes than those here"):
        attached_to(other).restore(tmp_path / "first")


def test_stored_as_a_model_it_loads_without_its_original_and_trains_on(tmp_path: Path):
    model = Recipe(sketch_of()).apply(decoder()).eval()
    save_packed(model, tmp_path)
    again = load_packed(AutoModelForCausalLM, tmp_path)
    assert torch.equal(again(**DECODER.batch()).logits, model(**DECODER.batch()).logits)
    onward = Recipe(sketch_of(calibrate=True)).apply(again)  # it needs no data
    assert trained_count(onward) == trained_count(model)
    ours, theirs = step(onward, DECODER.batch()), step(model, DECODER.batch())
    assert ours.error(theirs) == 0
    attached_to(onward).save(tmp_path / "task")
    assert isinstance(Recipe.remove(onward).model.layers[0].mlp.up_proj, SketchedLinear)
    with pytest.raises(SettingError, match="is a sketch of 4 bits and 2 groups already, and sketchtune is to make one"):
        Recipe(sketch_of(groups=4)).apply(again)


def test_a_stored_model_with_tables_that_are_no_numbers_is_refused(tmp_path: Path):
    model = Recipe(sketch_of()).apply(decoder())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.tables[1, 0, 2] = math.nan
    save_packed(model, tmp_path)
    with pytest.raises(SettingError, match=r"layers.0.mlp.up_proj.tables must hold finite numbers"):
        load_packed(AutoModelForCausalLM, tmp_path)


def test_a_failed_load_leaves_the_model_its_weights(tmp_path: Path):
    attached_to(Recipe(sketch_of()).apply(decoder())).save(tmp_path)
    (tmp_path / TABLES_FILE).unlink()
    base = decoder()
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(SettingError, match=f"holds no {TABLES_FILE}"):
        load(base, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_the_planner_counts_the_packed_bytes():
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    recipe = [{"sketchtune": {"groups": 2, "calibrate": False}}]
    work = work_of_model(config, recipe, batch=3, length=13, dtype=torch.float32, train={})
    predicted, measured = rehearse(work), run_one_step(work)
    assert predicted == measured
    plain = rehearse(work_of_model(config, [{"lora": {"r": 1, "target_modules": "all-linear"}}], batch=3, length=13))
    sizes = [(24, 24)] * 4 + [(40, 24)] * 2 + [(24, 40)]
    saved = 2 * sum(4 * rows * columns - rows * columns // 2 for rows, columns in sizes)
    tables = 2 * sum(4 * rows * 2 * 16 for rows, _ in sizes)
    ranks = 2 * sum(4 * (rows + columns) for rows, columns in sizes)
    weights = [each.memory.at_peak["weights"] for each in (predicted, plain)]
    assert weights[0] == weights[1] - saved + tables - ranks


@pytest.mark.slow
def test_blocks_of_llama_7b_take_under_a_third_and_step_in_less_than_lora_needs():
    config = LlamaConfig(vocab_size=100, num_hidden_layers=1, architectures=["LlamaForCausalLM"])  # defaults: 7B

    def step_with(*recipe: dict[str, Any]) -> Any:
        work = work_of_model(config, list(recipe), batch=1, length=512, dtype=torch.bfloat16, train={})
        return rehearse(work)

    ours, lora = step_with({"sketchtune": {}}), step_with({"lora": {"r": 64, "target_modules": "all-linear"}})
    assert 32 * ours.trained_parameters == 87_031_808
    assert ours.memory.at_peak["weights"] <= 0.30 * sum(2 * rows * columns for rows, columns in LLAMA_7B)
    assert ours.memory.peak_bytes < lora.memory.peak_bytes / 2


def test_the_sketch_of_a_packaged_model_takes_two_fifths_of_its_layers():
    need("smollm2")
    config = AutoModelForCausalLM.from_pretrained(assets.model_folder("smollm2")).config
    rows, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * (width // config.num_attention_heads)
    shapes = [(width, width), (keys, width), (keys, width), (width, width), (inner, width), (inner, width)]
    with torch.device("meta"):
        block = [
            SketchedLinear(columns, out, 4, 2, False, torch.bfloat16) for out, columns in [*shapes, (width, inner)]
        ]
    stored = rows * sum(layer.codes.nbytes + layer.tables.nbytes for layer in block)
    assert stored <= 0.40 * rows * sum(2 * layer.in_features * layer.out_features for layer in block)


# what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "bits of sketchtune must be a whole number from 2 to 4, got 1."),
        ({"bits": 5}, "bits of sketchtune must be a whole number from 2 to 4, got 5."),
        ({"groups": 0}, "groups of sketchtune must be at least 1, got 0."),
        ({"bits": 4.0}, "bits of sketchtune must be a whole number from 2 to 4, got 4.0."),
        ({"exponent": -1.0}, "exponent of sketchtune must be a number of at least 0"),
        ({"exponent": float("nan")}, "exponent of sketchtune must be a number of at least 0, got nan"),
        ({"damping": 0.0}, "damping of sketchtune must be above 0"),
        ({"calibration_rows": 0}, "calibration_rows of sketchtune must be a whole number of at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(SettingError, match=message):
        SketchTune(**settings)


def tied(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight


def with_nan(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] = torch.nan


def with_another_class(model: Any) -> None:
    class Other(nn.Linear):
        pass

    model.model.layers[0].mlp.up_proj = Other(24, 40, bias=False)


def with_integers(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros(40, 24, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_layers_are_refused_by_name(kind: str):
    model = decoder()
    pack_layer(model, "model.layers.1.mlp.up_proj", kind)
    with pytest.raises(SettingError, match=r"^model\.layers\.1\.mlp\.up_proj is quantised already \(Linear"):
        Recipe(sketch_of()).apply(model)


def test_moments_of_no_inputs_are_refused_by_layer(monkeypatch):
    with pytest.raises(ValueError, match="the moments of its inputs are not positive definite: give more rows"):
        curvature_of(torch.tensor([[1.0, 9.0], [9.0, 1.0]]), 1)
    refused = Mock(side_effect=ValueError("no moments"))
    monkeypatch.setattr(sketchtune, "curvature_of", refused)
    with pytest.raises(SettingError, match=r"^model\.layers\.0\.self_attn\.q_proj: no moments"):
        Recipe(sketch_of(calibrate=True, calibration_rows=2)).apply(decoder(), data=DECODER.data())


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (None, {"groups": 7}, "layers.0.self_attn.q_proj: groups must divide the layer's 24 inputs, got 7; take one"),
        (tied, {}, "The weight of model.layers.0.self_attn.q_proj is another module's too"),
        (with_nan, {}, "The weight of model.layers.0.mlp.up_proj holds NaN or Inf"),
        (with_another_class, {}, "nn.Linear and Conv1D only, but model.layers.0.mlp.up_proj is of type Other"),
        (with_integers, {}, "model.layers.0.mlp.up_proj is quantised already"),
        (None, {"target_modules": ["q_porj"]}, "has no module 'q_porj'. Did you mean 'q_proj'"),
        (None, {"target_modules": ["embed_tokens"]}, "only, but model.embed_tokens is of type Embedding"),
        (None, {"target_modules": ["lm_head"]}, "The weight of lm_head is another module's too"),
        (None, {"calibrate": True}, "sketchtune is calibrated on data when it is attached, and has seen none"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused_and_left_as_they_were(
    change: Callable[[Any], None] | None, settings: dict[str, Any], message: str
):
    model = decoder()
    if change:
        change(model)
    modules, values = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(SettingError, match=message):
        Recipe(sketch_of(**settings)).apply(model)
    assert dict(model.named_modules()) == modules
    if not settings and change is not with_nan:
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_too_little_calibration_data_is_refused():
    with pytest.raises(SettingError, match="calibration_rows of sketchtune is 17, but the training data has only 16"):
        Recipe(sketch_of(calibrate=True, calibration_rows=17)).apply(decoder(), data=DECODER.data())


def test_codes_out_of_range_are_refused():
    layer = SketchedLinear(8, 2, 3, 1, False, torch.float32)
    with pytest.raises(ValueError, match="Codes of 3 bits must be below 8, got 9"):
        layer.fill(torch.zeros(2, 1, 8), torch.full((2, 8), 9, dtype=torch.uint8))


def test_a_sketch_without_values_is_not_run():
    with pytest.raises(ValueError, match="This sketch holds no values"):
        SketchedLinear(8, 2, 3, 1, False, torch.float32)(torch.zeros(1, 8))


def test_tables_beyond_float16_are_refused_by_name(tmp_path: Path):
    model = Recipe(sketch_of()).apply(decoder().half())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.tables[0, 0, 3] = 1e5
    attached_to(model).save(tmp_path)
    with pytest.raises(SettingError, match=r"layers.1.mlp.up_proj holds values that are NaN, Inf or beyond .* float16"):
        load(decoder().half(), tmp_path)
    with pytest.raises(SettingError, match=r"layers.1.mlp.up_proj holds values that are NaN, Inf or beyond .* float16"):
        Recipe.remove(model)


def test_files_of_other_settings_are_refused_with_both_shapes(tmp_path: Path):
    attached_to(Recipe(sketch_of()).apply(decoder())).save(tmp_path)
    technique = attached_to(Recipe(sketch_of(bits=3)).apply(model := decoder())).techniques[0]
    with pytest.raises(SettingError, match=r"is of shape \(24, 12\), but bits and groups here make it \(24, 9\)"):
        technique.restore(model, tmp_path)


# a real model


def test_a_packaged_model_trains_on_packaged_data():
    need("minilm")
    folder = assets.model_folder("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with seeded(0):
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    data = reviews(16)
    rows = [{**tokenizer(row["text"]), "labels": row["label"]} for row in data]
    recipe = Recipe(SketchTune(groups=1, target_modules=["query", "value"], calibration_rows=8))
    model = recipe.apply(base, data={"train": rows}).train(False)
    batch = tokenizer(data["text"][:4], return_tensors="pt", padding=True)
    batch["labels"] = torch.tensor(data["label"][:4])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# beside adapters that read the weight, or write into it


@pytest.mark.parametrize("adapter", [HUTConfig(r=2), TLoRAConfig(r=2)])
def test_tables_learn_under_adapters_that_make_a_new_weight(adapter, monkeypatch):
    monkeypatch.setattr(TLoRA, "prefers_tokens", lambda self, num_tokens: False)
    adapter.target_modules, adapter.init_weights = ["up_proj"], False
    model = decoder().double()
    with Recipe(sketch_of(target_modules=["up_proj"]), adapter)(model) as attached:
        layer = next(m for m in attached.modules() if isinstance(m, AdaptedLinear))
        x, tables = random(2, 5, 24, seed=1), layer.base_layer.tables
        (found,) = torch.autograd.grad(layer(x).square().sum(), [tables])
        weight = next(iter(layer.adapters.values())).new_weight(layer.base_layer.weight)
        (expected,) = torch.autograd.grad((x @ weight.T).square().sum(), [tables])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("adapter", [LoraConfig(r=2), OFTConfig(r=2, oft_block_size=0), DeloraConfig(r=2)])
def test_what_would_be_merged_into_a_sketch_is_not_lost_in_silence(adapter: PeftConfig, safe: bool):
    adapter.target_modules = ["up_proj"]
    recipe = Recipe(sketch_of(target_modules=["up_proj"]), adapter)
    with recipe(decoder()) as attached, pytest.raises(SettingError, match="takes no other weight"):
        attached.merge_and_unload(safe_merge=safe)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: nn.init.kaiming_uniform_(weight),
        lambda weight: weight.data.copy_(torch.zeros(())),
        lambda weight: weight.__setitem__(0, 1.0),
        lambda weight: weight.__ipow__(2),
        lambda weight: torch.add(1.0, torch.ones(()), out=weight),
    ],
    ids=["init", "data", "item", "operator", "out"],
)
def test_what_is_written_into_a_sketch_is_refused(write: Callable[[Tensor], Any]):
    with Recipe(sketch_of(target_modules=["up_proj"]))(decoder()) as attached:
        layer = next(m for m in attached.modules() if isinstance(m, SketchedLinear))
        with torch.no_grad(), pytest.raises(SettingError, match="takes no other weight"):
            write(layer.weight)
        assert type(layer.weight * 2) is Tensor


def test_starts_that_take_a_part_of_the_weight_are_refused():
    adapter = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights="pissa")
    with pytest.raises(SettingError, match="as init_lora_weights: pissa does"):
        Recipe(sketch_of(target_modules=["up_proj"]), adapter).apply(decoder())
