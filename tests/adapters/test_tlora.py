"""TLoRA: its trace formulas, starts, both ways to compute it, what it keeps and costs, penalties, refusals."""

import itertools
import json
from math import prod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from packaged import losses_of, minilm_and_reviews
from shoestring.adapters import TLoRA, TLoRAConfig
from shoestring.adapters.tlora import gram, split
from shoestring.fakes import without_values
from shoestring.memory import MemoryReport
from shoestring.recipe import Recipe
from shoestring.testing.adapters import adapted, batch, chain, counted_step, tiny_llama, tokens, trainable, two_layers
from shoestring.testing.tiny_models import seeded

FORMS = ["ring", "lora"]


def tlora(in_: int, out: int, seed: int = 0, **settings: object) -> TLoRA:
    """One adapter in double precision, away from the start unless told otherwise."""
    with seeded(seed):
        return TLoRA(nn.Linear(in_, out), TLoRAConfig(**{"init_weights": False, **settings})).double()


def transform(one: TLoRA) -> Tensor:
    return one.change() + torch.eye(one.in_features, dtype=one.dtype)


def delta(one: TLoRA) -> Tensor:
    return one.up() @ one.down()


def digits(index: int, factors: list[int]) -> list[int]:
    """i_1, ..., i_D of a flat index, the first factor fastest."""
    found = []
    for factor in factors:
        found.append(index % factor)
        index //= factor
    return found


def trace_formula(one: TLoRA) -> tuple[Tensor, Tensor]:
    """T and a ring's Delta entry by entry, as the paper has them, with autograd."""
    n = [len(core) for core in one.cores("a")]
    m = [len(core) for core in one.cores("b")]
    a, b, c = (one.cores(letter) for letter in "abc")

    def traced(matrices: list[Tensor]) -> Tensor:
        product = matrices[0]
        for matrix in matrices[1:]:
            product = product @ matrix
        return product.trace()

    def entry_t(i: int, j: int) -> Tensor:
        return traced([a[d][x, y] for d, (x, y) in enumerate(zip(digits(i, n), digits(j, n), strict=True))])

    def entry_delta(i: int, j: int) -> Tensor:
        left = [b[d][x] for d, x in enumerate(digits(i, m))]
        return traced([*left, *(c[d][y] for d, y in enumerate(digits(j, n)))])

    t = [[entry_t(i, j) for j in range(one.in_features)] for i in range(one.in_features)]
    residual = [[entry_delta(i, j) for j in range(one.in_features)] for i in range(one.out_features)]
    return torch.stack([torch.stack(row) for row in t]), torch.stack([torch.stack(row) for row in residual])


def core_by_core(one: TLoRA, x: Tensor) -> Tensor:
    """T x for x [tokens, in] without T, for D = 3: one core after the other, with both ends of the ring open."""
    first, second, third = one.cores("a")
    n1, n2, n3 = len(first), len(second), len(third)
    part = torch.einsum("tkjm,imrs->tkjirs", x.view(-1, n3, n2, n1), first)
    part = torch.einsum("tkjirs,ljsu->tkliru", part, second)
    return torch.einsum("tklirs,mksr->tmli", part, third).flatten(1)


@pytest.mark.parametrize("settings", [{}, {"num_factors": 3, "transform_rank": 3}, {"residual": "lora"}])
def test_the_start_is_the_pretrained_model_bit_by_bit(settings: dict):
    model = adapted(TLoRAConfig, lambda: settings, init_weights=True)
    for one in model.modules():
        if isinstance(one, TLoRA):
            assert torch.equal(transform(one), torch.eye(one.in_features))
            assert not delta(one).any()
    assert torch.equal(model(batch()), two_layers()(batch()))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_start_of_the_paper_is_the_identity_to_rounding(rank: int):
    one = TLoRA(nn.Linear(24, 24), TLoRAConfig(transform_rank=rank, num_factors=3, init="paper"))
    assert all(torch.equal(core[:, :, 0, rank - 1], torch.eye(len(core)) / rank) for core in one.cores("a"))
    torch.testing.assert_close(transform(one), torch.eye(24), rtol=0, atol=1e-6)
    assert not delta(one).any()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("in_", "out"), [(24, 30), (30, 24)])
def test_entries_are_those_of_the_trace_formulas(in_: int, out: int, seed: int):
    factors = {24: [2, 3, 4], 30: [5, 2, 3]}
    one = tlora(in_, out, seed, num_factors=3, transform_rank=2, r=3, factors=factors)
    expected, expected_delta = trace_formula(one)
    torch.testing.assert_close(transform(one), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(delta(one), expected_delta, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_ways_to_compute_it_are_the_dense_formula_with_its_gradients(seed: int):
    one = tlora(12, 30, seed, num_factors=3, r=2, factors={12: [3, 2, 2]}, strict=False)
    layer, x = nn.Linear(12, 30).double(), torch.randn(7, 12, dtype=torch.float64, requires_grad=True)

    def gradients(y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(y.square().sum(), [x, *one.parameters()]))

    t, residual = trace_formula(one)
    expected = F.linear(x, layer.weight.detach() @ t + residual, layer.bias.detach())
    wanted = gradients(expected)
    layer.requires_grad_(False)
    by_weight = F.linear(x, one.new_weight(layer.weight), layer.bias)
    core_wise = layer(core_by_core(one, x)) + x @ delta(one).T
    for y in (one.through(x, layer), by_weight, core_wise):
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        for found, grad in zip(gradients(y), wanted, strict=True):
            torch.testing.assert_close(found, grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("residual", FORMS)
@pytest.mark.parametrize("by_tokens", [True, False])
def test_merged_equals_unmerged_either_way(residual: str, by_tokens: bool, monkeypatch):
    monkeypatch.setattr(TLoRA, "prefers_tokens", lambda *_: by_tokens)
    model = adapted(TLoRAConfig, lambda: {"residual": residual, "r": 3})
    expected = model(batch())
    model.merge_adapter()
    torch.testing.assert_close(model(batch()), expected, rtol=1e-5, atol=1e-5)


def test_few_tokens_go_through_the_transform_and_many_through_a_new_weight():
    one = TLoRA(nn.Linear(64, 64), TLoRAConfig())
    assert one.prefers_tokens(96)  # 3/2 of the width where both are equal
    assert not one.prefers_tokens(97)
    assert TLoRA(nn.Linear(24, 80), TLoRAConfig()).prefers_tokens(10**6)  # its weight gradient alone costs more
    with torch.no_grad():
        assert one.prefers_tokens(64)
        assert not one.prefers_tokens(65)


def test_products_of_the_transform_with_its_transpose_have_cores_of_their_own():
    one = tlora(24, 24, num_factors=3, transform_rank=2, factors={24: [2, 3, 4]})
    t = transform(one)
    n, products = [2, 3, 4], [gram(core) for core in one.cores("a")]
    for i, j in itertools.product(range(24), repeat=2):
        matrices = [core[x, y] for core, x, y in zip(products, digits(i, n), digits(j, n), strict=True)]
        expected = (matrices[0] @ matrices[1] @ matrices[2]).trace()
        torch.testing.assert_close((t @ t.T)[i, j], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("in_", "out", "settings"),
    [
        (640, 640, {"num_factors": 3, "r": 6}),
        (24, 40, {"transform_rank": 3, "r": 2}),
        (576, 1536, {"r": 4}),
    ],
)
def test_it_trains_as_many_numbers_as_the_formula_says(in_: int, out: int, settings: dict):
    config = TLoRAConfig(**settings)
    one = TLoRA(nn.Linear(in_, out), config)
    n, m = config.split(in_), config.split(out)
    count_t = config.transform_rank**2 * sum(size**2 for size in n)
    assert sum(core.numel() for core in one.cores("a")) == count_t
    assert sum(p.numel() for p in one.parameters()) == count_t + config.r**2 * (sum(m) + sum(n))
    if in_ == 640:
        assert (n, count_t, config.r**2 * (sum(m) + sum(n))) == ((8, 8, 10), 912, 1872)


def test_the_starred_form_trains_the_factors_of_lora():
    one = TLoRA(nn.Linear(24, 40), TLoRAConfig(residual="lora", r=3))
    assert sum(p.numel() for p in one.parameters()) == 4 * (16 + 36) + 3 * (24 + 40)


def train_transform(init: str, steps: int, seed: int = 0) -> tuple[TLoRA, float]:
    """Adam on the distance of T [24, 24] from a random matrix, in double precision."""
    with seeded(seed):
        target = torch.randn(24, 24, dtype=torch.float64)
    factors = {24: [2, 3, 4]}
    one = tlora(24, 24, seed, init=init, init_weights=True, num_factors=3, transform_rank=3, factors=factors)
    optimizer = torch.optim.Adam(one.cores("a"), lr=1e-2)
    for _ in range(steps):
        loss = (transform(one) - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return one, float(loss.detach())


def spread(core: Tensor) -> float:
    """The smallest of the largest differences between two slices of a core."""
    slices = core.detach().flatten(2).unbind(2)
    return min(float((one - other).abs().max()) for one, other in itertools.combinations(slices, 2))


def test_slices_of_the_transform_part_within_ten_steps_and_those_of_the_papers_start_do_not():
    ours, _ = train_transform("asymmetric", 10)
    assert min(spread(core) for core in ours.cores("a")) > 1e-3
    theirs, _ = train_transform("paper", 10)
    assert max(spread(core) for core in theirs.cores("a")) < 1e-12


def test_our_start_fits_a_random_matrix_better_than_the_papers():
    assert train_transform("asymmetric", 300)[1] < 0.97 * train_transform("paper", 300)[1]


def step(config: TLoRAConfig | LoraConfig, num_tokens: int) -> MemoryReport:
    return counted_step(chain(config, widths=(256,)), num_tokens)


@pytest.mark.parametrize("num_tokens", [64, 1024])
def test_the_peak_is_that_of_lora_of_equal_rank_and_two_dense_matrices(num_tokens: int):
    dense_bytes = 4 * 256**2
    ours = step(TLoRAConfig(r=4), num_tokens).peak_bytes
    theirs = step(LoraConfig(r=16), num_tokens).peak_bytes
    assert ours <= theirs + 2 * dense_bytes


def test_few_tokens_keep_x_and_r_squared_numbers_each_and_many_keep_x_alone():
    inputs = 4 * 256 * 3  # of layers 2 to 4; the first one's is the model's own
    assert step(TLoRAConfig(r=4), 64).saved_bytes == 64 * (inputs + 4 * 4 * 16)
    assert step(TLoRAConfig(r=4), 1024).saved_bytes == 1024 * inputs


@pytest.mark.parametrize("targets", [["query", "value"], ["query", "key", "value", "attention.output.dense"]])
def test_a_step_of_an_encoder_takes_less_than_twice_the_products_of_lora(targets: list[str]):
    def operations(config: TLoRAConfig | LoraConfig) -> int:
        config.target_modules = set(targets)
        with torch.device("meta"):
            base = BertModel(BertConfig(num_hidden_layers=2))
            model = get_peft_model(base, config)
            ids = torch.zeros(16, 128, dtype=torch.long)
            with FlopCounterMode(display=False) as counter:
                model(input_ids=ids).last_hidden_state.sum().backward()
        return counter.get_total_flops()

    assert operations(TLoRAConfig(r=4)) < 2 * operations(LoraConfig(r=16))


def test_a_small_transform_survives_bfloat16():
    """1 + t would round to 1 for t below 1/256."""
    one = TLoRA(nn.Linear(4, 4), TLoRAConfig()).bfloat16()
    with torch.no_grad():
        one.a_1[0, 0, 0, 1] = one.a_2[0, 0, 1, 0] = 2**-6  # of bfloat16 itself: their product is 2^-12
    assert one.change().dtype == torch.float32
    assert one.change()[0, 0] == 2**-12


def test_by_tokens_one_copy_of_the_input_is_kept_under_autocast():
    layer, seen = nn.Linear(64, 64), set()
    one = TLoRA(layer, TLoRAConfig(init_weights=False))
    layer.requires_grad_(False)
    x = torch.randn(7, 64)

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape == x.shape:
            seen.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        y = one.through(x, layer)
    assert y.requires_grad
    assert len(seen) == 1


@pytest.mark.parametrize("form", ["identity", "orthogonal"])
@pytest.mark.parametrize("init", ["paper", "asymmetric"])
def test_penalties_are_sums_of_norms_of_slices_and_zero_at_the_identity(form: str, init: str):
    one = tlora(12, 10, init=init, transform_rank=2)
    identity = torch.full((2, 2), 0.5) if init == "paper" else torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    if form == "orthogonal":  # I / R^2 in all slices for the paper's start
        identity = torch.kron(identity, identity)
    expected = torch.zeros((), dtype=torch.float64)
    for core in one.cores("a"):
        shown = core
        if form == "orthogonal":
            pairs = [[torch.kron(core[i, k], core[j, k]) for k in range(len(core))] for i, j in grid(len(core))]
            shown = torch.stack([sum(products) for products in pairs]).view(len(core), len(core), 4, 4)
        for r, s in grid(len(identity)):
            expected = expected + (shown[:, :, r, s] - torch.eye(len(core)) * identity[r, s]).norm()
    torch.testing.assert_close(one.penalty(form), expected)
    with torch.no_grad():
        for core, start in zip(one.cores("a"), one.identity_cores(), strict=True):
            core.copy_(start)
    assert one.penalty(form) == 0
    one.penalty(form).backward()
    assert all(torch.isfinite(core.grad).all() for core in one.cores("a"))


def grid(size: int) -> list[tuple[int, int]]:
    return list(itertools.product(range(size), repeat=2))


def test_a_recipe_adds_the_penalty_to_the_loss():
    def loss(**settings: object) -> tuple[Tensor, nn.Module]:
        config = TLoRAConfig(target_modules=["v_proj"], init_weights=False, **settings)
        with seeded(0):
            model = Recipe(config).apply(tiny_llama())
        return model(input_ids=tokens(), labels=tokens()).loss, model

    plain, model = loss()
    penalties = [one.penalty("orthogonal") for one in model.modules() if isinstance(one, TLoRA)]
    torch.testing.assert_close(loss(penalty=0.3, penalty_form="orthogonal")[0], plain + 0.3 * sum(penalties))


def test_factors_are_as_equal_as_can_be():
    assert [split(size, 2) for size in (384, 576, 768, 640, 12)] == [(16, 24), (24, 24), (24, 32), (20, 32), (3, 4)]
    assert split(640, 3) == (8, 8, 10)
    assert all(prod(split(size, 3)) == size for size in (8, 60, 1536, 4096))
    assert [split(7, 1), split(7, 2), split(6, 3), split(1, 1)] == [(7,), None, None, None]


def test_given_factors_are_saved_and_come_back(tmp_path: Path):
    model = adapted(TLoRAConfig, lambda: {"factors": {24: [2, 12], 40: [10, 4]}})
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["factors"] == {"24": [2, 12], "40": [10, 4]}
    again = PeftModel.from_pretrained(two_layers(), tmp_path)
    assert again.peft_config["default"].factors == {24: [2, 12], 40: [10, 4]}
    assert torch.equal(again(batch()), model(batch()))


def test_sizes_that_cannot_be_split_are_refused_by_layer_or_split_as_far_as_they_go():
    prime = nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 18))
    with pytest.raises(ValueError, match=r"1: tlora cannot split the size 7 into 2 factors.*strict=False"):
        get_peft_model(prime, TLoRAConfig(target_modules=["1"]))
    model = get_peft_model(prime, TLoRAConfig(target_modules=["0", "1"], num_factors=3, strict=False))
    shapes = [[tuple(core.shape) for core in one.cores("a")] for one in model.modules() if isinstance(one, TLoRA)]
    assert shapes == [[(2, 2, 2, 2), (2, 2, 2, 2), (3, 3, 2, 2)], [(7, 7, 1, 1)]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transform_rank": 0}, "transform_rank of tlora must be at least 1, got 0"),
        ({"r": 0}, "r of tlora must be at least 1, got 0"),
        ({"num_factors": 0}, "num_factors of tlora must be at least 1, got 0"),
        ({"factors": {24: [4, 5]}}, r"factors of tlora must multiply to the size, got \[4, 5\] = 20 for 24"),
        ({"factors": {24: [2, 3, 4]}}, r"must be num_factors=2 numbers a size, got \[2, 3, 4\] for 24"),
        ({"residual": "tucker"}, "residual of tlora must be 'ring' or 'lora', got 'tucker'"),
        ({"init": "zero"}, "init of tlora must be 'asymmetric' or 'paper', got 'zero'"),
        ({"penalty": -1}, "penalty of tlora must be at least 0, got -1"),
        ({"penalty_form": "l1"}, "penalty_form of tlora must be 'identity' or 'orthogonal', got 'l1'"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TLoRAConfig(**settings)


@pytest.mark.parametrize("beside", [["recompute"], ["chunked_loss"], ["recompute", "chunked_loss"]])
def test_exact_techniques_beside_it_leave_its_gradients_as_they_are(beside: list[str]):
    def gradients(techniques: list[str]) -> list[Tensor]:
        config = {"target_modules": ["q_proj", "v_proj"], "init_weights": False, "r": 2}
        with seeded(0):
            model = Recipe.from_list([{"tlora": config}, *techniques]).apply(tiny_llama()).train()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        return [p.grad for p in trainable(model).values()]

    for found, expected in zip(gradients(beside), gradients([]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_penalty_runs_without_values():
    config = {"target_modules": ["q_proj", "down_proj"], "penalty": 0.1}
    model = Recipe.from_list([{"tlora": config}]).apply(tiny_llama()).train()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        without_values(model, mode)
        ids = torch.zeros(2, 63, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.shape == p.shape for p in trainable(model).values())


def test_a_packaged_encoder_learns_reviews():
    base, inputs = minilm_and_reviews(8)
    with seeded(0):
        config = TLoRAConfig(r=4, modules_to_save=["classifier"], target_modules=["query", "value"])
        losses = losses_of(get_peft_model(base, config), inputs, own="tlora_", steps=5)
    assert losses[-1] < 0.97 * losses[0], losses
