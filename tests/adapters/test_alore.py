"""ALoRE: its Kronecker products, sharing among layers, merging with biases, what it keeps, places, refusals."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from families import FAMILIES
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shoestring import assets
from shoestring.adapters import ALoRE, ALoREConfig
from shoestring.adapters.base import AdaptedLayer
from shoestring.memory import Ledger
from shoestring.recipe import Recipe
from shoestring.testing.adapters import adapted, batch, tiny_llama, tokens, trainable, two_layers
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import seeded

WAYS = ["sum_then_compose", "per_expert"]


def alores(model: nn.Module) -> list[ALoRE]:
    return [m for m in model.modules() if isinstance(m, ALoRE)]


def one_layer(in_: int, out: int, seed: int = 0, **settings: object) -> tuple[nn.Module, ALoRE]:
    """A linear layer in double precision under an adapter away from its start."""
    with seeded(seed):
        base = nn.Sequential(nn.Linear(in_, out))
        config = ALoREConfig(**{"target_modules": ["0"], "init_weights": False, "r": 4, "num_experts": 2, **settings})
        model = get_peft_model(base, config).double()
    return model, alores(model)[0]


def kronecker(one: ALoRE) -> Tensor:
    """W_up W_down as a dense matrix, from torch.kron."""
    p, q, r, s = (one.part(name) for name in "pqrs")
    down = [torch.kron(a, b) for a, b in zip(p, q, strict=True)]
    up = [torch.kron(a, b) for a, b in zip(r, s, strict=True)]
    if one.per_expert:
        return sum(b @ a for a, b in zip(down, up, strict=True))
    return sum(up) @ sum(down)


def shift(one: ALoRE) -> Tensor:
    """W_up c_down + c_up from torch.kron."""
    up = sum(torch.kron(a, b) for a, b in zip(one.part("r"), one.part("s"), strict=True))
    return up @ one.part("c_down") + one.part("c_up")


def blocks_of(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """What each expert P kron Q makes of x [tokens, in], [tokens, experts, out], with no product P kron Q."""
    x = x.unflatten(-1, (p.shape[1], -1))
    return torch.einsum("ipm,tmk,iak->tipa", p, x, q).flatten(2)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("in_", "n", "r"), [(24, 2, 4), (35, 5, 10), (6, 1, 3)])
def test_the_built_layers_are_sums_of_kronecker_products_and_so_are_blocks_of_tokens(
    in_: int, n: int, r: int, seed: int
):
    _, one = one_layer(in_, 7, seed, num_experts=n, r=r)
    down = sum(torch.kron(a, b) for a, b in zip(one.part("p"), one.part("q"), strict=True))
    up = sum(torch.kron(a, b) for a, b in zip(one.part("r"), one.part("s"), strict=True))
    torch.testing.assert_close(one.down(), down, rtol=0, atol=1e-12)
    torch.testing.assert_close(one.up(), up, rtol=0, atol=1e-12)
    x = torch.randn(63, in_, dtype=torch.float64)
    inner = blocks_of(x, one.part("p"), one.part("q")).sum(1)
    outer = blocks_of(inner, one.part("r"), one.part("s")).sum(1)
    torch.testing.assert_close(one.branch(x), outer, rtol=1e-12, atol=1e-12)


def test_each_expert_has_a_bottleneck_of_its_own_where_that_is_asked_for():
    _, one = one_layer(24, 7, aggregate="per_expert", num_experts=4, r=8)
    x = torch.randn(63, 24, dtype=torch.float64)
    inner = blocks_of(x, one.part("p"), one.part("q"))
    outer = [blocks_of(inner[:, i], one.part("r")[i : i + 1], one.part("s")[i : i + 1])[:, 0] for i in range(4)]
    torch.testing.assert_close(one.branch(x), sum(outer), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("aggregate", WAYS)
@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_and_gradients_are_those_of_the_dense_formula(seed: int, aggregate: str, has_bias: bool):
    model, one = one_layer(10, 7, seed, aggregate=aggregate, has_bias=has_bias, scale=0.7)
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    parts = [one.part(name) for name in one.names]
    y = model(x)
    found = torch.autograd.grad(y.square().sum(), [x, *parts])
    changed = x + 0.7 * x @ kronecker(one).T
    if has_bias:
        per_expert_up = [torch.kron(a, b) for a, b in zip(one.part("r"), one.part("s"), strict=True)]
        changed = changed + 0.7 * (sum(up @ one.part("c_down") for up in per_expert_up) + one.part("c_up"))
    layer = model.base_model.model[0].base_layer
    expected = F.linear(changed, layer.weight, layer.bias)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *parts])
    for gradient, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("aggregate", WAYS)
def test_the_start_is_the_pretrained_model_bit_by_bit(aggregate: str):
    model = adapted(ALoREConfig, lambda: {"aggregate": aggregate, "has_bias": True}, init_weights=True)
    assert torch.equal(model(batch()), two_layers()(batch()))
    one = alores(model)[0]
    assert not any(one.part(name).any() for name in ("s", "c_down", "c_up"))


def test_the_first_layer_starts_with_the_variance_of_loras():
    with seeded(0):
        model = get_peft_model(nn.Sequential(nn.Linear(768, 8)), ALoREConfig(target_modules=["0"]))
    variance = float(alores(model)[0].down().detach().var())
    assert abs(variance * 3 * 768 - 1) < 0.35  # of few random numbers in P


@pytest.mark.parametrize("aggregate", WAYS)
def test_merged_equals_unmerged_with_biases_and_both_come_back(aggregate: str):
    model = adapted(ALoREConfig, lambda: {"aggregate": aggregate, "has_bias": True, "scale": 0.5})
    layer = model.base_model.model.first.base_layer
    weight, bias, expected = layer.weight.clone(), layer.bias.clone(), model(batch())
    one = alores(model)[0]
    model.merge_adapter()
    if aggregate == "sum_then_compose":
        torch.testing.assert_close(layer.bias, bias + weight @ (0.5 * shift(one)))
    torch.testing.assert_close(model(batch()), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.bias, bias)


def test_two_adapters_with_biases_merge_one_after_the_other():
    model = adapted(ALoREConfig, lambda: {"has_bias": True}).double()
    with seeded(5):
        model.add_adapter("other", ALoREConfig(target_modules=["first"], init_weights=False, has_bias=True))
    model.base_model.set_adapter(["default", "other"])
    model = model.double().eval()
    expected, bias = model(batch(torch.float64)), model.base_model.model.first.base_layer.bias.clone()
    model.merge_adapter()
    torch.testing.assert_close(model(batch(torch.float64)), expected, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.first.base_layer.bias, bias)


def test_it_merges_into_fused_queries_keys_and_values():
    family = FAMILIES["gpt2"]
    config = ALoREConfig(num_experts=2, r=4, has_bias=True, init_weights=False)
    model = get_peft_model(family.build().float(), config).eval()
    assert config.target_modules == {
        f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "mlp.c_fc")
    }
    expected = model(**family.inputs())[0]
    plain = model.merge_and_unload()
    assert isinstance(plain.transformer.h[0].attn.c_attn, Conv1D)
    torch.testing.assert_close(plain(**family.inputs())[0], expected, rtol=1e-5, atol=1e-5)


def test_biases_are_not_merged_into_a_layer_that_has_none():
    model = adapted(ALoREConfig, lambda: {"has_bias": True}, tiny_llama(), target_modules=["q_proj"])
    expected = model(input_ids=tokens()).logits
    with pytest.raises(ValueError, match=r"alore adds to the bias of the layer it is merged into.*24 -> 24 has none"):
        model.merge_adapter()
    assert torch.equal(model(input_ids=tokens()).logits, expected)


def test_all_layers_are_merged_or_none():
    family = FAMILIES["llama"]
    base = family.build().float()
    for block in base.model.layers:
        block.self_attn.q_proj.bias = nn.Parameter(torch.zeros(block.self_attn.q_proj.out_features))
    config = ALoREConfig(num_experts=2, r=4, has_bias=True, target_modules=["q_proj", "gate_proj"], init_weights=False)
    model = get_peft_model(base, config).eval()
    expected = model(**family.inputs())[0]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="alore adds to the bias of the layer it is merged into"):
            merge()
        assert torch.equal(model(**family.inputs())[0], expected)
        assert not any(layer.merged for layer in model.modules() if isinstance(layer, AdaptedLayer))


def test_a_head_that_is_the_embedding_is_not_merged():
    base = tiny_llama()
    base.lm_head.weight = base.model.embed_tokens.weight
    config = ALoREConfig(num_experts=2, r=4, target_modules=["lm_head", "q_proj"], init_weights=False)
    model = get_peft_model(base, config).eval()
    expected = model(input_ids=tokens()).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"The weight of lm_head is another module's too.*Untie them"):
            merge()
    assert torch.equal(model(input_ids=tokens()).logits, expected)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit", "dinov2", "t5", "whisper"])
def test_known_models_are_adapted_before_attention_and_feed_forward_parts_and_merge(name: str):
    """BERT's residual stream is read by the same layers; they alone see x', so merging is exact there too."""
    family = FAMILIES[name]
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in family.inputs().items()}
    with seeded(0):
        base = family.build().float()
        blocks = sum(isinstance(m, nn.ModuleList) and len(m) for m in base.modules()) if name != "t5" else 4
        model = get_peft_model(base, ALoREConfig(num_experts=2, r=4, init_weights=False)).eval()
    assert len([p for p in trainable(model) if ".p_" in p]) == 2 * blocks, "one before each of the two parts"
    expected = model(**inputs)[0]
    torch.testing.assert_close(model.merge_and_unload()(**inputs)[0], expected, rtol=1e-4, atol=2e-5)


def test_layers_that_read_the_same_share_an_adapter_and_others_have_their_own():
    config = ALoREConfig(num_experts=2, r=4, layers_to_transform=[1])
    model = get_peft_model(tiny_llama(), config)
    block = model.base_model.model.model.layers[1]
    q, k, v = (getattr(block.self_attn, f"{name}_proj").alore_.default for name in "qkv")
    gate, up = (getattr(block.mlp, f"{name}_proj").alore_.default for name in ("gate", "up"))
    assert q.part("p") is k.part("p") is v.part("p")
    assert gate.part("p") is up.part("p") is not q.part("p")
    assert len(alores(model)) == 5
    own = get_peft_model(tiny_llama(), ALoREConfig(num_experts=2, r=4, target_modules=["o_proj", "q_proj"]))
    assert len({id(one.part("p")) for one in alores(own)}) == 4


def test_names_of_saved_experts_do_not_hang_on_adapters_around(tmp_path: Path):
    config = {"num_experts": 2, "r": 4, "init_weights": False, "target_modules": ["q_proj", "k_proj"]}
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with seeded(0):
        inside = Recipe(lora, ALoREConfig(**config)).apply(tiny_llama())
        alone = get_peft_model(tiny_llama(), ALoREConfig(**config))
    names = [{name.rpartition(".")[2] for name in trainable(m) if "alore" in name} for m in (inside, alone)]
    assert names[0] == names[1]
    alone.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(again(input_ids=tokens()).logits, alone.eval()(input_ids=tokens()).logits)


@pytest.mark.parametrize(("n", "r"), [(4, 16), (2, 8), (4, 32)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_base_sized_vision_transformer_trains_as_many_numbers_as_the_formula_says(n: int, r: int, has_bias: bool):
    with torch.device("meta"):
        model = get_peft_model(t.ViTModel(t.ViTConfig()), ALoREConfig(num_experts=n, r=r, has_bias=has_bias))
    count = sum(p.numel() for p in trainable(model).values())
    assert count == 24 * (2 * 768 * r // n + 2 * n**3 + (r + 768) * has_bias)
    if (n, r, has_bias) == (4, 16, False):
        assert count == 150_528


def train(model: nn.Module, steps: int) -> None:
    """Adam towards the outputs of another adapter."""
    with seeded(7):
        target = two_layers()(batch()).detach() + torch.randn(16)
    optimizer = torch.optim.Adam(trainable(model).values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(batch()) - target).square().mean().backward()
        optimizer.step()


def test_after_training_experts_differ_and_the_rank_is_that_of_the_bottleneck():
    model = adapted(ALoREConfig, lambda: {"num_experts": 4, "r": 8}, init_weights=True)
    train(model, 10)
    one = alores(model)[0]
    change = one.up().detach() @ one.down().detach()
    assert torch.linalg.matrix_rank(change, rtol=1e-5) == 8
    for name in "pqrs":
        for first, second in itertools.combinations(one.part(name).detach(), 2):
            assert (first - second).abs().max() > 1e-2 * first.abs().max(), name


class Attention(nn.Module):
    """Norm, then query, key and value of one input."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


@pytest.mark.parametrize("num_tokens", [64, 1024])
def test_it_keeps_no_more_than_lora_on_queries_and_values(num_tokens: int):
    def step(config: ALoREConfig | LoraConfig, targets: set[str]) -> Ledger:
        config.target_modules = targets
        with seeded(0):
            model = get_peft_model(nn.Sequential(*(Attention(96) for _ in range(3))), config)
        with Ledger(model) as ledger:
            model(torch.randn(1, num_tokens, 96)).sum().backward()
        return ledger

    ours = step(ALoREConfig(r=16), {"query", "key", "value"}).report()
    theirs = step(LoraConfig(r=16), {"query", "value"}).report()
    assert ours.saved_bytes <= theirs.saved_bytes
    assert ours.peak_bytes <= theirs.peak_bytes


def test_merged_layers_are_plain_ones():
    """After merging, the forward is the base model's: nothing is left to take time."""
    model = adapted(ALoREConfig, lambda: {}).merge_and_unload()
    assert [type(m) for m in model.modules()] == [type(m) for m in two_layers().modules()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 0}, "num_experts of alore must be at least 1, got 0"),
        ({"r": 2}, "r of alore must be a multiple of num_experts=4 and at least that, got 2"),
        ({"r": 18}, "r of alore must be a multiple of num_experts=4 and at least that, got 18"),
        ({"scale": 0}, "scale of alore must not be 0"),
        ({"aggregate": "mean"}, "aggregate of alore must be 'sum_then_compose' or 'per_expert', got 'mean'"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ALoREConfig(**settings)


def test_experts_that_do_not_divide_the_width_are_refused_by_layer():
    message = "first: num_experts of alore must divide the layer's input of 24 numbers, got 5"
    with pytest.raises(ValueError, match=message):
        adapted(ALoREConfig, lambda: {"num_experts": 5, "r": 5})


def test_a_norm_that_also_feeds_the_residual_stream_is_refused():
    with pytest.raises(TypeError, match=r"alore adapts Linear and Conv1D only, but .*LayerNorm"):
        get_peft_model(FAMILIES["bert"].build(), ALoREConfig(target_modules=["output.LayerNorm"]))


def test_models_without_known_layers_are_told_to_name_them():
    with pytest.raises(ValueError, match=r"TwoLayers has no list of equal blocks.*set target_modules of alore"):
        get_peft_model(two_layers(), ALoREConfig())
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*in blocks \[7\]"):
        get_peft_model(tiny_llama(), ALoREConfig(num_experts=2, r=4, layers_to_transform=7))


@pytest.mark.parametrize("beside", [["recompute"], ["chunked_loss"], ["recompute", "chunked_loss"]])
def test_exact_techniques_beside_it_leave_its_gradients_as_they_are(beside: list[str]):
    def gradients(techniques: list[str]) -> list[Tensor]:
        config = {"init_weights": False, "num_experts": 2, "r": 4}
        with seeded(0):
            model = Recipe.from_list([{"alore": config}, *techniques]).apply(tiny_llama()).train()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        return [p.grad for p in trainable(model).values()]

    for found, expected in zip(gradients(beside), gradients([]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_packaged_vision_transformer_learns_clothes():
    need("dinov2-small", "fashion-mnist")
    folder = assets.model_folder("dinov2-small")
    rows = assets.load_data("fashion-mnist")["train"].select(range(12))
    pictures = t.AutoImageProcessor.from_pretrained(folder)([row["image"].convert("RGB") for row in rows])
    pixels = torch.stack([torch.as_tensor(picture) for picture in pictures["pixel_values"]])
    pixels = F.interpolate(pixels.float(), (56, 56))  # 16 patches, so that the test is short
    labels = torch.tensor(rows["label"][:])
    with seeded(0):
        base = t.Dinov2ForImageClassification.from_pretrained(folder, num_labels=10)
        model = get_peft_model(base, ALoREConfig(modules_to_save=["classifier"], has_bias=True))
    own = [p for name, p in trainable(model).items() if "alore_" in name]
    assert sum(p.numel() for p in own) == 24 * (2 * 384 * 16 // 4 + 2 * 4**3 + 16 + 384)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=3e-3)
    losses = []
    for _ in range(5):
        loss = model(pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0], losses
    with torch.no_grad():
        expected = model.eval()(pixel_values=pixels).logits
        merged = model.merge_and_unload()(pixel_values=pixels).logits
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-3)
