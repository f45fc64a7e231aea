"""Low-bit activations: the rounding, its error in gradients, what is spared, seeds, and training on real data."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from shoestring import Recipe
from shoestring.activations import low_bit_activations as module
from shoestring.activations.low_bit_activations import LowBitActivations, dequantize, quantize
from shoestring.errors import SettingError
from shoestring.memory import Ledger
from shoestring.recipe import attached_to
from shoestring.testing.assets import need
from shoestring.training import RunSettings, train

IDS = torch.randint(0, 200, (4, 63), generator=torch.Generator().manual_seed(0))
COMMON = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 200}


def decoder(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**{**COMMON, "intermediate_size": 172, "num_key_value_heads": 4, **settings})
    return LlamaForCausalLM(config).train()


def encoder() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(**COMMON, intermediate_size=256, num_labels=3, attention_probs_dropout_prob=0.0)
    ).train()


def step(model: nn.Module) -> Tensor:
    """All gradients of one step, with the same dropout each time."""
    model.zero_grad()
    torch.manual_seed(5)
    labels = IDS if model.config.model_type == "llama" else torch.tensor([0, 1, 2, 0])
    model(input_ids=IDS, labels=labels).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def there_and_back(x: Tensor, bits: int, group: int = 256, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes, low, step = quantize(x, bits, group, generator)
    return dequantize(codes, low, step, bits, group, x.dtype).flatten()[: x.numel()]


def one_by_one(x: Tensor, noise: Tensor, bits: int, group: int) -> Tensor:
    """The equation, an element at a time."""
    out = []
    for start in range(0, len(x), group):
        part = x[start : start + group].tolist()
        low = min(part)
        scale = (max(part) - low) / (2**bits - 1)
        for value, u in zip(part, noise[start:].tolist(), strict=False):
            out.append(low + scale * min(math.floor((value - low) / scale + u), 2**bits - 1))
    return torch.tensor(out, dtype=x.dtype)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("numel", [1, 7, 256, 259, 1000])
def test_rounding_is_the_equation(numel, bits, monkeypatch):
    monkeypatch.setattr(module, "SLICE", 512)  # two groups at a time
    x = torch.randn(numel, dtype=torch.float64, generator=torch.Generator().manual_seed(numel))
    if numel == 1:
        assert torch.equal(there_and_back(x, bits), x)
        return
    generator = torch.Generator().manual_seed(3)
    groups = math.ceil(numel / 256)
    noise = [torch.rand(min(2, groups - i), 256, dtype=x.dtype, generator=generator) for i in range(0, groups, 2)]
    expected = one_by_one(x, torch.cat(noise).flatten(), bits, 256)
    torch.testing.assert_close(there_and_back(x, bits, seed=3), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_no_element_is_off_by_more_than_a_scale(bits, dtype):
    x = (torch.randn(777) * 10).to(dtype)
    back = there_and_back(x, bits, group=64)
    assert back.dtype == dtype
    for part, rounded in zip(x.double().split(64), back.double().split(64), strict=True):
        scale = (part.max() - part.min()) / (2**bits - 1)
        assert (part - rounded).abs().max() <= scale + part.abs().max() * torch.finfo(dtype).eps


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_right_on_average(bits):
    x = torch.randn(300, dtype=torch.float64)
    mean = torch.stack([there_and_back(x, bits, seed=seed) for seed in range(3000)]).mean(0)
    scale = torch.cat([((p.max() - p.min()) / (2**bits - 1)).expand(len(p)) for p in x.split(256)])
    # one draw has a deviation of half a scale at most; six standard errors of the mean
    assert ((mean - x).abs() <= 6 * 0.5 * scale / 3000**0.5).all()


def test_equal_numbers_and_extremes_come_back_exactly():
    for value in (0.0, -3.25, 1e-42, 1e30):
        assert torch.equal(there_and_back(torch.full((300,), value), 8), torch.full((300,), value))
    mask = (torch.rand(5000) > 0.1) / 0.9  # as dropout keeps it on a CPU
    torch.testing.assert_close(there_and_back(mask, 4), mask, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_hidden(value):
    x = torch.randn(600)
    x[300] = value
    back = there_and_back(x, 8)
    assert back[256:512].isnan().all()
    assert back[:256].isfinite().all()
    assert back[512:].isfinite().all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [decoder, encoder])
def test_the_gradient_is_off_by_less_than_two_percent_at_8_bits(make, attention):
    model = make()
    model.set_attn_implementation(attention)
    plain = step(model)
    for seed in range(3):
        with Recipe(LowBitActivations(seed=seed))(model) as packed:
            assert 0 < (step(packed) - plain).norm() < 0.02 * plain.norm()
    with Recipe(LowBitActivations(bits=4))(model) as packed:
        assert (step(packed) - plain).norm() < 0.25 * plain.norm()


@pytest.mark.parametrize("make", [decoder, encoder])
def test_kept_bytes_fall_below_three_tenths(make):
    model, kept = make(), []
    for codecs in ([], [LowBitActivations()], [LowBitActivations(bits=4)]):
        with Recipe(*codecs)(model) as packed:
            with Ledger(packed) as ledger:
                step(packed)
            kept.append(ledger.report().saved_bytes)
    assert kept[1] < 0.30 * kept[0]
    assert kept[2] < 0.20 * kept[0]


def packed_shapes(run, *inputs: Tensor, codec: LowBitActivations | None = None) -> list[tuple[tuple[int, ...], int]]:
    """Sizes and bits of what a function's saved tensors are packed as."""

    class Runs(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self) -> Tensor:
            return run(*(x * 1 for x in inputs), self.weight)

    packed: list = []
    codec = codec or LowBitActivations(min_bytes=0)
    rounds = codec._round
    codec._round = lambda tensor, bits: packed.append((tensor.numel(), bits)) or rounds(tensor, bits)
    inputs = tuple(x.requires_grad_() if x.is_floating_point() else x for x in inputs)
    with codec.attach(model := Runs()):
        model().sum().backward()
    return sorted(packed)


def test_statistics_of_norms_stay_as_they_are():
    x = torch.randn(5, 7, 8)
    layer_norm = packed_shapes(lambda x, w: F.layer_norm(x, (8,), w), x)
    assert layer_norm == [(280, 8)]
    by_hand = packed_shapes(lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), x)
    assert by_hand == [(280, 8)]
    assert packed_shapes(lambda x, w: F.batch_norm(x, None, None, w, training=True), torch.randn(5, 8, 3, 3)) == [
        (360, 8)
    ]


def test_attention_keeps_exponents_well_and_its_sums_exactly():
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    mask = torch.randn(2, 1, 5, 7)
    for settings in ({}, {"attn_mask": mask}):
        for bits in (8, 4):
            codec = LowBitActivations(min_bytes=0, bits=bits)
            packed = packed_shapes(
                lambda q, k, v, w, settings=settings: F.scaled_dot_product_attention(q, k, v, **settings),
                *(x.clone() for x in (q, k, v)),
                codec=codec,
            )
            assert (240, 16) in packed  # q
            assert (336, 16) in packed  # k
            assert (336, bits) in packed  # v
            assert not any(numel in (2 * 3 * 5, mask.numel()) for numel, _ in packed)
    halves = packed_shapes(
        lambda q, k, v, w: F.scaled_dot_product_attention(q, k, v), *(x.bfloat16() for x in (q, k, v))
    )
    assert {bits for _, bits in halves} == {8}  # 16 bits in place of 16 would save nothing


def test_steep_attention_does_not_blow_up_the_gradient():
    q, k, v = (torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))

    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((16,), 5.0))

        def forward(self) -> Tensor:
            return F.scaled_dot_product_attention(q * self.weight, k * self.weight, v)

    model = Steep()
    (plain,) = torch.autograd.grad(model().square().sum(), [model.weight])
    for bits, bound in ((8, 0.2), (4, 5)):  # with q and k in as few bits as the rest: about 1, and 2e7
        with LowBitActivations(bits=bits).attach(model):
            (packed,) = torch.autograd.grad(model().square().sum(), [model.weight])
        assert (packed - plain).norm() < bound * plain.norm()


def test_a_mask_with_as_many_keys_as_a_head_has_numbers_is_not_taken_for_a_result():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16))

        def forward(self, mask: Tensor) -> Tensor:
            q, k, v = (torch.sin(torch.arange(512.0) * i).view(1, 2, 16, 16) * self.weight for i in (1, 2, 3))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    model, allowed = Masked(), torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
    lowest = torch.finfo(torch.float32).min
    for mask in (allowed, torch.zeros(1, 1, 16, 16).masked_fill(~allowed, lowest).expand(1, 2, 16, 16).contiguous()):
        (plain,) = torch.autograd.grad(model(mask).square().sum(), [model.weight])
        with LowBitActivations().attach(model):
            (packed,) = torch.autograd.grad(model(mask).square().sum(), [model.weight])
        assert (packed - plain).norm() < 0.02 * plain.norm()


def test_probabilities_and_integers_stay_as_they_are():
    x, ids = torch.randn(5, 7, 8), torch.arange(35).view(5, 7) % 5
    assert packed_shapes(lambda x, w: F.softmax(x, -1), x.clone()) == []
    # the product keeps what softmax has kept already
    assert packed_shapes(lambda x, w: x.softmax(-1) @ w.exp()[:, None], x.clone()) == [(8, 8)]
    assert packed_shapes(lambda x, ids, w: F.embedding(ids, x[0]), x.clone(), ids) == []
    codec = LowBitActivations(min_bytes=0, bits=4)
    assert packed_shapes(lambda x, w: F.log_softmax(x, -1), x.clone(), codec=codec) == [(280, 8)]
    assert packed_shapes(lambda x, w: x.relu() * (x > 0), x.clone()) == [(280, 8)]  # not the mask


def test_copies_of_weights_that_autocast_makes_stay_as_they_are():
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))
    seen: list[tuple[int, ...]] = []
    codec = LowBitActivations(min_bytes=0)
    rounds = codec._round
    codec._round = lambda tensor, bits: seen.append(tensor.numel()) or rounds(tensor, bits)
    with codec.attach(model), torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(5, 64)).sum().backward()
    assert sorted(seen) == [5 * 64, 5 * 96]


def test_the_same_seed_gives_the_same_gradient_and_dropout_draws_as_without():
    model = encoder()
    runs = []
    for seed in (0, 0, 1):
        with Recipe(LowBitActivations(seed=seed))(model) as packed:
            runs.append(step(packed))
            drawn = torch.rand(1)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    step(model)
    assert torch.equal(torch.rand(1), drawn)


def test_a_resumed_run_goes_on_rounding_as_one_that_never_stopped(tmp_path):
    model, recipe = decoder(), Recipe(LowBitActivations(seed=3))
    with recipe(model) as packed:
        step(packed)
        attached_to(packed).save(tmp_path)
        second = step(packed)
    with recipe(model) as packed:
        assert not torch.equal(step(packed), second)
    with recipe(model) as packed:
        attached_to(packed).restore(tmp_path)
        assert torch.equal(step(packed), second)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 2}, r"bits of low_bit_activations must be 8 or 4, got 2"),
        ({"group": 0}, r"group of low_bit_activations must be an even number from 2 on, got 0"),
        ({"group": 7}, r"group of low_bit_activations must be an even number from 2 on, got 7"),
        ({"min_bytes": -5}, r"min_bytes of low_bit_activations must be 0 or more, got -5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        LowBitActivations(**settings)
    with pytest.raises(SettingError, match=r"recipe\[0\]\.low_bit_activations"):
        Recipe.from_list([{"low_bit_activations": settings}])


def reviews(recipe: list, folder: Path) -> RunSettings:
    data = {"train": "packaged:rotten-tomatoes", "max_length": 24, "max_train_rows": 8, "max_eval_rows": 8}
    numbers = {"max_steps": 5, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 1, "seed": 0}
    return RunSettings.from_dict(
        {
            "model": "packaged:minilm",
            "task": "text-classification",
            "data": data,
            "recipe": recipe,
            "train": {**numbers, "eval_strategy": "no"},
            "output_dir": str(folder),
        }
    )


def test_a_packaged_encoder_learns_reviews_from_8_bits_on_disk(tmp_path):
    need("minilm", "rotten-tomatoes")
    lora = {"lora": {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value", "dense"]}}
    plain = train(reviews([lora], tmp_path / "plain"))
    packed = train(reviews([lora, {"low_bit_activations": {}}, {"offload": {"to": "disk"}}], tmp_path / "packed"))
    losses = [(a, b) for (_, a), (_, b) in zip(plain.losses, packed.losses, strict=True)]
    assert losses[0][0] == losses[0][1]  # the forward is the same
    assert losses[-1][1] < losses[0][1] - 0.02, losses
    assert all(abs(a - b) < 0.05 for a, b in losses), losses
    assert packed.memory["saved_bytes"] < 0.1 * plain.memory["saved_bytes"]
