"""SNELL and SNELLA: delta by its formula, gradients, blocks, sparsity, what is kept, budgets, refusals."""

import copy
from collections.abc import Callable
from math import ceil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, TrainerCallback

import shoestring.adapters.sparse_kernel as sparse_kernel
from shoestring.adapters import SNELL, SNELLA, SNELLAConfig, SNELLConfig
from shoestring.adapters.base import AdaptedLinear
from shoestring.adapters.snella import allot
from shoestring.adapters.sparse_kernel import SparseKernelAdapter, kth_smallest, num_zero, threshold
from shoestring.assets import model_folder
from shoestring.memory import Ledger
from shoestring.recipe import Recipe
from shoestring.technique import Moment
from shoestring.testing.adapters import TARGETS, adapted, batch, chain, counted_step, trainable, two_layers
from shoestring.testing.assets import need
from shoestring.training import RunSettings, train


def methods(model: nn.Module) -> list[SparseKernelAdapter]:
    return [m for m in model.modules() if isinstance(m, SparseKernelAdapter)]


def one_layer(method: str = "snell", out_features: int = 13, in_features: int = 7, seed: int = 0, **settings):
    """An adapter in float64 with random factors, away from its start."""
    torch.manual_seed(seed)
    config = {"snell": SNELLConfig, "snella": SNELLAConfig}[method](init_weights=False, **settings)
    adapter = config.method(nn.Linear(in_features, out_features), config).double()
    if adapter.mix is not None:
        with torch.no_grad():
            adapter.mix.copy_(torch.tensor([0.7, 1.3, 0.02]))
    return adapter


def reference_values(adapter: SparseKernelAdapter) -> Tensor:
    """V^T as the paper has it, [in, out], in plain differentiable operations."""
    parts = []
    for p, q in zip(adapter.p, adapter.q, strict=True):
        square = (p[:, None, :] - q[None, :, :]).square().sum(-1)
        equal = square == 0
        parts.append(torch.where(equal, torch.ones_like(square), square).sqrt() * ~equal)
    k = 0.1 * parts[0] - 0.1 * parts[1]
    if adapter.mix is None:
        return k
    a, g, e = adapter.mix
    return k + a * torch.softmax(k / g, dim=1) + e


def reference_delta(adapter: SparseKernelAdapter, zeros: int) -> Tensor:
    """delta, [out, in], with theta and the gate's factor as constants."""
    v = reference_values(adapter)
    size = v.detach().abs()
    theta = size.flatten().sort().values[zeros - 1] if zeros else torch.zeros(())
    factor = {
        "soft": (size - theta).clamp(min=0),
        "hard": size * (size > theta),
        "none": torch.ones_like(size),
    }[adapter.gate]
    return (v * factor).T


FORMS = [
    ("snell", {"r": 4, "sparsity": 0.6}),
    ("snell", {"r": 6, "sparsity": 0.6, "gate": "hard"}),
    ("snell", {"r": 4, "sparsity": 0.0}),
    ("snell", {"r": 4, "sparsity": 0.0, "gate": "none"}),
    ("snella", {"r": 4, "start_sparsity": 0.4}),
    ("snella", {"r": 6, "start_sparsity": 0.4, "gate": "hard"}),
    ("snella", {"r": 2}),
]


@pytest.fixture(params=["whole", "in blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers as one block, and in blocks of two or three rows or columns."""
    if request.param == "in blocks":
        monkeypatch.setattr(sparse_kernel, "BLOCK", 30)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("method", "settings"), FORMS)
def test_outputs_and_gradients_are_those_of_the_formula_in_double_precision(method: str, settings: dict, seed: int):
    adapter = one_layer(method, seed=seed, **settings)
    with torch.no_grad():  # rows of P and Q that are equal
        adapter.p[0, 2] = adapter.q[0, 4]
        adapter.p[:, 5] = adapter.q[:, 1]
    weight = torch.randn(13, 7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(13, dtype=torch.float64)
    x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    inputs = [x, weight, *adapter.parameters()]
    up = torch.randn(3, 5, 13, dtype=torch.float64)

    delta = reference_delta(adapter, adapter.num_zero())
    expected = x @ (weight + delta).T + bias
    wanted = torch.autograd.grad((expected * up).sum(), inputs)
    ways: dict[str, Callable[[], Tensor]] = {
        "one product": lambda: adapter.linear(x, weight, bias),
        "a branch": lambda: nn.functional.linear(x, weight, bias) + adapter.delta_output(x),
        "delta": lambda: x @ (weight + adapter.delta_weight()).T + bias,
    }
    for name, way in ways.items():
        y = way()
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        for got, want in zip(torch.autograd.grad((y * up).sum(), inputs), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", ["snell", "snella"])
def test_single_precision_by_products_stays_near_double_precision(method: str):
    """Also far from zero, and where rows of P and Q are equal or nearly so."""
    exact = one_layer(method, 61, 47, r=8)
    with torch.no_grad():
        exact.p[:, 3] = exact.q[:, 9]
        exact.p[:, 4] = exact.q[:, 8] + 1e-4
        exact.p += 5
        exact.q += 5
        exact.p.copy_(exact.p.float())
        exact.q.copy_(exact.q.float())
    rounded = copy.deepcopy(exact).float()
    x = torch.randn(63, 47)
    for adapter in (exact, rounded):
        adapter.delta_output(x.to(adapter.p.dtype)).square().sum().backward()
    largest = float(exact.delta_weight().detach().abs().max())
    torch.testing.assert_close(rounded.delta_weight().double(), exact.delta_weight(), rtol=0, atol=1e-3 * largest)
    for got, want in zip(rounded.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=0, atol=2e-3 * float(want.grad.abs().max()))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.98])
def test_the_share_that_sparsity_names_is_zero(sparsity: float, dtype: torch.dtype):
    adapter = one_layer(r=4, sparsity=sparsity).to(dtype)
    zeros = int((adapter.delta_weight() == 0).sum())
    assert zeros == ceil(sparsity * 13 * 7)


def test_a_product_that_is_whole_is_not_rounded_up():
    assert num_zero(0.1, 30) == 3  # 0.1 * 30 = 3.0000000000000004
    assert num_zero(0.1, 31) == 4
    assert num_zero(0.999999, 10) == 10


def test_of_equal_entries_at_the_threshold_all_become_zero():
    adapter = one_layer(r=4, sparsity=0.5)
    with torch.no_grad():
        adapter.p[:] = adapter.p[:, :1]  # equal columns of V: equal entries in sevens
    zeros = int((adapter.delta_weight() == 0).sum())
    assert zeros == 49, "46 of 91 were asked for; the seventh group of seven ends at 49"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_threshold_over_blocks_is_the_kth_of_all(dtype: torch.dtype):
    torch.manual_seed(0)
    values = torch.cat([torch.randn(500).abs(), torch.zeros(20), torch.full((30,), 0.7)]).to(dtype)
    ordered = values.sort().values
    for k in (1, 20, 21, 250, 300, 550):
        assert threshold(lambda: iter(values.split(101)), k) == ordered[k - 1]
        assert kth_smallest(values.clone(), k) == ordered[k - 1]


def test_delta_has_more_ranks_than_its_factors():
    adapter = one_layer(out_features=64, in_features=64, r=4, sparsity=0.5)
    assert int(torch.linalg.matrix_rank(adapter.delta_weight())) > 30


@pytest.mark.parametrize(("gate", "most"), [("soft", 4e-7), ("hard", 6e-7)])
def test_a_fresh_snell_is_all_but_the_pretrained_layer(gate: str, most: float):
    torch.manual_seed(0)
    base = nn.Linear(768, 768)
    adapter = SNELL(base, SNELLConfig(r=32, gate=gate, sparsity=0.3))
    assert float(adapter.delta_weight().abs().mean()) < most
    x = torch.randn(63, 768)
    y = base(x)
    assert (adapter.linear(x, base.weight, base.bias) - y).norm() / y.norm() < 1e-3
    none = SNELL(base, SNELLConfig(r=32, gate="none", sparsity=0.0))
    assert float(none.delta_weight().abs().mean()) > 2e-4, "V itself is no start near the pretrained weight"


@pytest.mark.parametrize("config", [SNELLConfig, SNELLAConfig])
def test_merged_equals_unmerged_and_comes_back(config: type):
    model = adapted(config, lambda: {"r": 4})
    expected = model(batch())
    base = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(model(batch()), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())


def test_it_trains_r_times_in_plus_out_numbers_a_layer_and_three_with_a_mix():
    count = 4 * (24 + 40 + 40 + 16)
    assert sum(p.numel() for p in trainable(adapted(SNELLConfig, lambda: {"r": 4})).values()) == count
    assert sum(p.numel() for p in trainable(adapted(SNELLAConfig, lambda: {"r": 4})).values()) == count + 2 * 3


def test_adapters_of_two_names_add_up():
    model = adapted(SNELLConfig, lambda: {"r": 4}).double()
    model.add_adapter("other", SNELLConfig(r=2, gate="hard", target_modules=list(TARGETS), init_weights=False))
    model.double().base_model.set_adapter(["default", "other"])
    layers = [m for m in model.modules() if isinstance(m, AdaptedLinear)]
    x = batch(torch.float64)
    expected = x
    for layer in layers:
        weight = layer.base_layer.weight + sum(layer.get_delta_weight(name) for name in ("default", "other"))
        expected = nn.functional.linear(expected, weight, layer.base_layer.bias)
        expected = nn.functional.gelu(expected) if layer is layers[0] else expected
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-10, atol=1e-10)


def test_dropout_and_drop_path_act_on_the_branch_alone_and_in_training_only():
    base = two_layers()
    quiet = adapted(SNELLConfig, lambda: {"r": 4}, target_modules=["first"])
    model = adapted(SNELLConfig, lambda: {"r": 4, "drop_path": 0.5}, target_modules=["first"])
    x = torch.randn(64, 3, 24)
    layer, plain = model.base_model.model.first, quiet.base_model.model.first
    assert torch.equal(layer(x), plain(x))
    y, without, with_delta = layer.train()(x), base.first(x), plain(x)
    dropped = [torch.allclose(y[i], without[i], atol=1e-6) for i in range(64)]
    twice = [torch.allclose(y[i], 2 * with_delta[i] - without[i], atol=1e-5) for i in range(64)]
    assert all(a != b for a, b in zip(dropped, twice, strict=True)), "each sample goes without delta, or with it twice"
    assert 10 < sum(dropped) < 54
    model = adapted(SNELLConfig, lambda: {"r": 4, "dropout": 0.5}, target_modules=["first"]).train()
    mean = torch.stack([model.base_model.model.first(x) for _ in range(400)]).mean(0)
    assert (mean - with_delta).norm() < 0.2 * (with_delta - without).norm()


@pytest.mark.parametrize("config", [SNELLConfig, SNELLAConfig])
def test_only_the_layer_inputs_and_a_few_numbers_are_kept_for_backward(config: type):
    inputs = 3 * 64 * 96 * 4  # of layers 2 to 4; the first one's is the model's own
    numbers = 4 * (4 + (96 * 4 if config is SNELLAConfig else 0))  # theta, and the softmax's denominators
    assert counted_step(chain(config(r=8)), 64).saved_bytes == inputs + numbers


def test_the_peak_holds_blocks_of_one_layer_not_a_dense_tensor_of_each(monkeypatch: pytest.MonkeyPatch):
    def over(depth: int, sparsity: float = 0.9) -> int:
        configs = LoraConfig(r=8), SNELLConfig(r=8, sparsity=sparsity)
        lora, snell = (counted_step(chain(config, depth), 4).peak_bytes for config in configs)
        return snell - lora

    dense = 96 * 96 * 4
    whole = over(4)
    assert abs(whole - over(8)) < 0.1 * dense, "what comes on top does not grow with depth"
    assert whole < 4.5 * dense
    monkeypatch.setattr(sparse_kernel, "BLOCK", 96 * 8)
    # theta over blocks takes another 1.5 MB of counters, whatever the layer's size
    assert over(4, sparsity=0.0) < 1.5 * dense, "a twelfth of the columns at a time, and the gradients of P and Q"


def test_the_peak_is_near_that_of_lora_and_far_below_that_of_dense_gradients():
    """The linear layers of ViT-B on 8 times 197 tokens, counted without computing."""

    def peak(config) -> int:
        with torch.device("meta"):
            block = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
            model: nn.Module = nn.Sequential(*(nn.Linear(*sizes) for sizes in block * 12))
            if config is not None:
                config.target_modules = {str(i) for i in range(72)}
                model = get_peft_model(model, config)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
            with Ledger(model) as ledger:
                model(torch.empty(8, 197, 768)).sum().backward()
                optimizer.step()
        return ledger.report().peak_bytes

    lora, snell, dense = peak(LoraConfig(r=8)), peak(SNELLConfig(r=8)), peak(None)
    assert snell <= 1.08 * lora
    assert snell <= 0.7 * dense


def moment(model: nn.Module, step: int, num_steps: int = 10) -> Moment:
    return Moment(model=model, step=step, num_steps=num_steps)


def test_allotted_entries_add_up_to_the_budget_and_none_exceeds_its_layer():
    torch.manual_seed(0)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(10, 5000, (7,), generator=generator).tolist()
        scores = torch.rand(7, generator=generator).pow(4).tolist()
        for share in (0.01, 0.3, 0.9, 1.0):
            budget = int(share * sum(sizes))
            parts = allot(budget, scores, sizes)
            assert abs(sum(parts) - budget) <= len(sizes)
            assert all(0 <= part <= size for part, size in zip(parts, sizes, strict=True))
            assert parts == allot(budget, scores, sizes)


def test_entries_go_by_score_and_what_is_too_much_for_one_layer_to_the_others():
    assert allot(100, [1.0, 3.0], [1000, 1000]) == [25, 75]
    assert allot(100, [1.0, 1.0, 8.0], [1000, 1000, 20]) == [40, 40, 20]
    assert allot(60, [0.0, 0.0], [100, 200]) == [20, 40], "without scores by size"
    assert allot(90, [1.0, 0.0, 0.0], [30, 100, 50]) == [30, 40, 20], "the rest by size where no score is left"


def test_the_budget_follows_a_cubic_between_its_exact_ends():
    config = SNELLAConfig(start_sparsity=0.1, sparsity=0.7, warmup_fraction=0.2, final_fraction=0.3)
    sizes = [1000, 500]
    assert [config.budget(done, sizes) for done in (0.0, 0.2)] == [1350, 1350]
    assert [config.budget(done, sizes) for done in (0.7, 1.0)] == [450, 450]
    assert config.budget(0.45, sizes) == 450 + round(900 * 0.5**3)


def test_scores_are_means_of_smoothed_importance_times_uncertainty():
    config = SNELLAConfig(r=2, target_modules=["first"], importance_decay=0.8, uncertainty_decay=0.5)
    model = get_peft_model(two_layers(), config)
    (snella,) = methods(model)
    wanted, state = 0.0, {"p": [0.0, 0.0], "q": [0.0, 0.0]}
    for seed in range(3):
        model.zero_grad()
        model(batch(seed=seed)).square().sum().backward()
        config.on_gradients(moment(model, seed))
        for name, (i, u) in state.items():
            new = (getattr(snella, name) * getattr(snella, name).grad).abs().detach()
            i = 0.8 * i + 0.2 * new
            state[name] = [i, 0.5 * u + 0.5 * (new - i).abs()]
    wanted = sum(float((i * u).mean()) for i, u in state.values())
    assert config.score("base_model.model.first.snella_.default") == pytest.approx(wanted, rel=1e-4)


def trained(config: SNELLAConfig, model: PeftModel, steps: range) -> list[int]:
    """Steps as a trainer makes them; the entries allotted to each layer after."""
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    for step in steps:
        optimizer.zero_grad()
        model(batch(seed=step)).square().mean().backward()
        config.on_gradients(moment(model, step))
        optimizer.step()
        config.on_step_end(moment(model, step + 1))
    return [int(layer.num_changed) for layer in methods(model)]


def snella_model(config: SNELLAConfig) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(two_layers(), config)


def test_layers_compete_over_a_run_and_a_resumed_run_goes_on_alike():
    def config() -> SNELLAConfig:
        return SNELLAConfig(r=4, sparsity=0.6, target_modules=list(TARGETS), init_weights=False)

    first = config()
    model = snella_model(first)
    whole = trained(first, model, range(10))
    sizes = [24 * 40, 40 * 16]
    budget = sum(size - num_zero(0.6, size) for size in sizes)
    assert budget - 2 <= sum(whole) <= budget
    assert whole != [size - num_zero(0.6, size) for size in sizes], "layers have different scores"
    for layer, part in zip(methods(model), whole, strict=True):
        assert int((layer.delta_weight() != 0).sum()) == part

    early, late = config(), config()
    model = snella_model(early)
    trained(early, model, range(4))
    late.load_state_dict(copy.deepcopy(early.state_dict()))
    assert trained(late, model, range(4, 10)) == whole


@pytest.mark.parametrize("period_steps", [4, 40])
def test_the_last_step_hands_out_the_last_budget(period_steps: int):
    config = SNELLAConfig(
        r=4, sparsity=0.6, period_steps=period_steps, target_modules=list(TARGETS), init_weights=False
    )
    budget = sum(size - num_zero(0.6, size) for size in (24 * 40, 40 * 16))
    assert budget - 2 <= sum(trained(config, snella_model(config), range(10))) <= budget


def test_what_was_allotted_is_saved_with_the_weights(tmp_path):
    config = SNELLAConfig(r=4, sparsity=0.6, target_modules=list(TARGETS), init_weights=False)
    model = snella_model(config)
    parts = trained(config, model, range(10))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(two_layers(), tmp_path)
    assert [int(layer.num_changed) for layer in methods(again)] == parts
    assert torch.equal(again(batch()), model.eval()(batch()))


def test_a_sparsity_that_leaves_a_layer_nothing_is_refused():
    with pytest.raises(ValueError, match="leaves none of the 91 numbers of a layer of 7 -> 13"):
        one_layer(r=4, sparsity=0.9999)


def test_a_run_of_unknown_length_is_refused():
    model = adapted(SNELLAConfig, lambda: {"r": 4})
    with pytest.raises(ValueError, match="must know num_steps"):
        SNELLAConfig().on_step_end(Moment(model=model, step=1))


@pytest.mark.parametrize("method", ["snell", "snella"])
def test_it_adapts_an_image_model_under_recomputation(method: str):
    need("dinov2-small")
    model = AutoModel.from_pretrained(model_folder("dinov2-small"))
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "fc1"], "layers_to_transform": [0, 11]}
    recipe = Recipe.from_list([{method: settings}, {"recompute": {}}])
    attached = recipe.apply(model).train()
    torch.manual_seed(0)
    images = torch.randn(2, 3, 56, 56)
    target = torch.randn(2, 384)
    optimizer = torch.optim.AdamW(trainable(attached).values(), lr=3e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (attached(pixel_values=images).pooler_output - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.slow
def test_snella_learns_reviews_in_the_trainer_and_hands_out_entries(tmp_path):
    need("minilm", "rotten-tomatoes")
    run = {
        "model": "packaged:minilm",
        "task": "text-classification",
        "data": {"train": "packaged:rotten-tomatoes", "max_length": 32, "max_train_rows": 16, "max_eval_rows": 8},
        "recipe": [{"snella": {"r": 8, "target_modules": ["query", "value", "intermediate.dense"]}}],
        "train": {
            "max_steps": 12,
            "per_device_train_batch_size": 16,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "eval_strategy": "no",  # or the best checkpoint, with its entries, comes back at the end
        },
        "output_dir": str(tmp_path / "run"),
    }
    parts: dict[str, int] = {}

    def watch(ready) -> None:
        model = ready.trainer.model
        ready.trainer.add_callback(AtEnd(lambda: parts.update(shares(model))))

    report = train(RunSettings.from_dict(run), on_ready=watch)
    losses = [loss for _, loss in report.losses]
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2]), losses
    sizes = [384 * 384] * 12 + [384 * 1536] * 6
    assert abs(sum(parts.values()) - sum(sizes) / 2) <= 18, "half of all entries, as sparsity says"
    assert len(set(parts.values())) > 6, "not the same for all"


class AtEnd(TrainerCallback):
    """Calls a function when training ends."""

    def __init__(self, call: Callable[[], None]):
        self.call = call

    def on_train_end(self, *_, **__) -> None:
        self.call()


def shares(model: nn.Module) -> dict[str, int]:
    """The entries allotted to each layer."""
    return {name: int(m.num_changed) for name, m in model.named_modules() if isinstance(m, SNELLA)}


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (SNELLConfig, {"r": 0}, "r of snell must be an even whole number of at least 2.*got 0"),
        (SNELLConfig, {"r": 3}, "r of snell must be an even whole number of at least 2.*got 3"),
        (SNELLConfig, {"r": -2}, "got -2"),
        (SNELLConfig, {"sparsity": 1.0}, r"sparsity of snell must be in \[0, 1\), got 1.0"),
        (SNELLConfig, {"sparsity": -0.1}, r"sparsity of snell must be in \[0, 1\), got -0.1"),
        (SNELLConfig, {"gate": "relu"}, "gate of snell must be 'soft', 'hard' or 'none', got 'relu'"),
        (SNELLConfig, {"gate": "none"}, "gate 'none' of snell leaves every entry; set sparsity to 0, got 0.9"),
        (SNELLConfig, {"dropout": 1.0}, r"dropout of snell must be in \[0, 1\), got 1.0"),
        (SNELLConfig, {"drop_path": -0.5}, r"drop_path of snell must be in \[0, 1\), got -0.5"),
        (SNELLAConfig, {"r": 5}, "r of snella must be an even whole number"),
        (SNELLAConfig, {"gate": "none"}, "gate of snella must be 'soft' or 'hard'"),
        (SNELLAConfig, {"start_sparsity": 0.6}, "start_sparsity of snella must be at most sparsity, 0.5, got 0.6"),
        (SNELLAConfig, {"warmup_fraction": 0.5, "final_fraction": 0.5}, "must leave a part of the run between them"),
        (SNELLAConfig, {"period_steps": 0}, "period_steps of snella must be at least 1, got 0"),
        (SNELLAConfig, {"importance_decay": 1.0}, r"importance_decay of snella must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_settings_are_refused_by_name(config: type, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config(**settings)
