"""Token windows in training: memory, budgets, mixed precision, accumulation, Trainer and a packaged model."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel, Trainer, TrainingArguments

from shoestring import assets
from shoestring.blocks import TokenWindows
from shoestring.blocks.window_budget import bytes_of
from shoestring.errors import SettingError
from shoestring.memory.ledger import Ledger
from shoestring.recipe import Recipe
from shoestring.testing.assets import need

LORA = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


def llama(key_value_heads: int = 4, layers: int = 4, **options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": layers, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=61, **sizes, num_key_value_heads=key_value_heads, pad_token_id=0, **options)
    return LlamaModel(config).train()


def step(model: nn.Module, ids: torch.Tensor) -> None:
    (model(input_ids=ids).last_hidden_state.float() @ torch.linspace(-1, 1, 64)).sum().backward()


def measure(model: nn.Module, num_tokens: int, *recipe, batch_size: int = 1) -> tuple[int, int]:
    """Bytes kept for backward, and the peak beside weights and gradients."""
    ids = torch.randint(1, 61, (batch_size, num_tokens))
    with Recipe(*recipe)(model) as attached:
        step(attached, ids)
        attached.zero_grad()
        ledger = Ledger(attached)
        with ledger:
            step(attached, ids)
    report = ledger.report()
    others = sum(size for part, size in report.at_peak.items() if part in ("weights", "gradients"))
    return report.saved_bytes, report.peak_bytes - others


@pytest.mark.parametrize("adapters", [[], [LORA]], ids=["full tuning", "lora"])
def test_kept_bytes_at_an_eighth_of_the_tokens(adapters):
    whole, whole_peak = measure(llama(), 768, *adapters)
    kept, peak = measure(llama(), 768, *adapters, TokenWindows(window_tokens=96))
    assert kept <= 0.10 * whole
    assert peak <= 0.30 * whole_peak
    with_keys, _ = measure(llama(), 768, *adapters, TokenWindows(window_tokens=96, keep_keys=True))
    assert with_keys - kept == 4 * 2 * 768 * 64 * 4  # keys and values of 4 blocks
    by_window, _ = measure(llama(), 768, *adapters, TokenWindows(window_tokens=96, schedule="window_major"))
    assert by_window == with_keys - 3 * 768 * 64 * 4  # the inputs of the first block only


def test_kept_bytes_grow_with_the_tokens_and_not_with_the_window():
    kept = {
        (n, w): measure(llama(), n, TokenWindows(window_tokens=w))[0] for n, w in ((256, 32), (512, 32), (512, 256))
    }
    assert kept[512, 32] == kept[512, 256]
    assert kept[512, 32] < 2.01 * kept[256, 32]


@pytest.mark.parametrize("schedule", ["layer_major", pytest.param("window_major", marks=pytest.mark.slow)])
@pytest.mark.parametrize("adapters", [pytest.param([], marks=pytest.mark.slow), [LORA]], ids=["full tuning", "lora"])
def test_a_budget_is_used_and_not_exceeded(adapters, schedule):
    num_tokens, chosen = 384, []
    _, most = measure(llama(2), num_tokens, *adapters, TokenWindows(window_tokens=num_tokens, schedule=schedule))
    _, least = measure(llama(2), num_tokens, *adapters, TokenWindows(window_tokens=32, schedule=schedule))
    for share in (0.2, 0.7):
        budget = int(least + share * (most - least))
        windows = TokenWindows(memory_budget=budget, schedule=schedule)
        _, peak = measure(llama(2), num_tokens, *adapters, windows)
        assert 0.6 * budget < peak <= 1.05 * budget
        chosen.append(peak)
    assert chosen == sorted(chosen)


def test_a_budget_holds_for_encoders_and_their_decoders():
    from transformers import T5Config, T5Model

    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    model = T5Model(T5Config(vocab_size=61, pad_token_id=0, **shape)).train()
    batch = {"input_ids": torch.randint(1, 61, (1, 160)), "decoder_input_ids": torch.randint(1, 61, (1, 96))}
    with pytest.raises(SettingError, match=r"memory_budget of token_windows is 10,000 bytes, but blocks take"):
        Recipe(TokenWindows(memory_budget=10_000)).apply(model)(**batch)


@pytest.mark.parametrize(("text", "number"), [("2GiB", 2**31), ("500 MB", 500_000_000), ("7", 7), (12, 12), ("3b", 3)])
def test_bytes_are_read_from_text(text, number):
    assert bytes_of(text, "memory_budget") == number


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[name] - w).norm() / w.norm()) for name, w in wanted.items())


@pytest.mark.parametrize("schedule", ["layer_major", "window_major"])
def test_autocast_is_as_near_as_without_windows(schedule):
    ids = torch.randint(1, 61, (2, 96))
    found = {}
    for name, recipe in (("exact", []), ("whole", []), ("windows", [TokenWindows(window_tokens=8, schedule=schedule)])):
        with Recipe(*recipe)(llama()) as model:
            with torch.autocast("cpu", torch.bfloat16, enabled=name != "exact"):
                hidden = model(input_ids=ids).last_hidden_state.float()
            (hidden @ torch.linspace(-1, 1, 64)).sum().backward()
            found[name] = gradients(model)
    assert error(found["windows"], found["exact"]) <= 1.2 * error(found["whole"], found["exact"])


def test_sums_over_windows_are_not_rounded_to_bfloat16():
    """Of a model in bfloat16 the gradients in many windows are no further off than those of the whole sequence."""
    ids = torch.randint(1, 61, (2, 128))
    found = {}
    for name, recipe in (("exact", []), ("whole", []), ("windows", [TokenWindows(window_tokens=4)])):
        model = llama(layers=2) if name == "exact" else llama(layers=2).bfloat16()
        with Recipe(*recipe)(model) as attached:
            step(attached, ids)
            found[name] = gradients(attached)
    assert error(found["windows"], found["exact"]) <= 1.2 * error(found["whole"], found["exact"])


def test_gradients_accumulate_and_hooks_see_them_once():
    model, seen = llama(), []
    first, second = torch.randint(1, 61, (2, 1, 40))
    step(model, first)
    step(model, second)
    wanted = gradients(model)
    model.zero_grad()
    with Recipe(TokenWindows(window_tokens=10))(model) as windowed:
        weight = windowed.layers[1].mlp.up_proj.weight
        hook = weight.register_hook(lambda gradient: seen.append(gradient.shape))
        step(windowed, first)
        step(windowed, second)
        hook.remove()
        assert error(gradients(windowed), wanted) < 2e-6
    assert len(seen) == 2


def test_trainer_takes_the_same_steps(tmp_path):
    from transformers import LlamaForCausalLM

    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 61, (8, 24))]

    def losses(*recipe) -> list[float]:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes, pad_token_id=0))
        settings = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        quiet = {"logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        with Recipe(*recipe)(model) as attached:
            arguments = TrainingArguments(str(tmp_path), **settings, **quiet, learning_rate=1e-2)
            trainer = Trainer(attached, arguments, train_dataset=rows)
            trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(TokenWindows(window_tokens=7)) == pytest.approx(losses(), rel=1e-5)


@pytest.mark.parametrize("schedule", ["layer_major", "window_major"])
def test_packaged_decoder(schedule):
    need("smollm2")
    model = AutoModelForCausalLM.from_pretrained(assets.model_folder("smollm2"), dtype=torch.float32).train()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[26, 27, 28, 29])
    ids = torch.randint(100, 10_000, (1, 48))
    found = []
    for windows in ([], [TokenWindows(window_tokens=16, schedule=schedule)]):
        torch.manual_seed(0)
        with Recipe(config, *windows)(model) as attached:
            attached(input_ids=ids, labels=ids).loss.backward()
            found.append({n: g for n, g in gradients(attached).items() if "lora_B" in n})
    assert found[0]
    assert error(found[1], found[0]) < 1e-4  # float32 through 30 blocks
