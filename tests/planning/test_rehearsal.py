"""Rehearsal: what is counted without values is what is counted with them, and what cannot be predicted is refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor
from transformers import (
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    T5Config,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    ViTConfig,
)
from transformers.utils import import_utils

from shoestring.errors import SettingError
from shoestring.fakes import Valueless
from shoestring.planning import Prediction, Sharding, plan, predict, predict_model
from shoestring.planning.models import configuration, make_batch, make_model
from shoestring.planning.optimizers import StateRule, by_rule
from shoestring.planning.prediction import PARTS, work_of, work_of_model
from shoestring.planning.rehearsal import Rehearsed, _PrimedOptimizer, rehearse, run_one_step
from shoestring.planning.sharding import Units
from shoestring.training import RunSettings

WIDTH, INNER, WORDS, LAYERS, KEYS = 24, 40, 61, 2, 12  # keys: width of the two heads of keys
RANK = 3
FLOAT = 4
SIZES = {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
LORA = {"lora": {"r": RANK, "target_modules": "all-linear"}}


def llama(**settings: Any) -> LlamaConfig:
    shape = {**SIZES, "intermediate_size": INNER, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaConfig(**{**shape, **settings}, architectures=["LlamaForCausalLM"])


def bert() -> BertConfig:
    shape = {"intermediate_size": INNER, "max_position_embeddings": 64, "num_labels": 3}
    return BertConfig(**SIZES, **shape, architectures=["BertForSequenceClassification"])


def t5() -> T5Config:
    shape = {"vocab_size": WORDS, "d_model": WIDTH, "d_kv": 6, "d_ff": INNER, "num_layers": LAYERS, "num_heads": 4}
    return T5Config(**shape, decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"])


def vit() -> ViTConfig:
    shape = {"image_size": 32, "patch_size": 8, "intermediate_size": INNER}
    return ViTConfig(**{**SIZES, **shape}, architectures=["ViTForImageClassification"])


@dataclass(frozen=True)
class Case:
    config: PretrainedConfig
    recipe: tuple[Any, ...] = ()
    train: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


CASES = {
    "encoder": Case(bert()),
    "decoder, accumulated": Case(llama(), (), {"gradient_accumulation_steps": 3}),
    "decoder, recomputed": Case(llama(), (LORA, "recompute", "lean_mlp")),
    "decoder, checkpoints in bf16": Case(
        llama(), (LORA,), {"gradient_checkpointing": True, "bf16": True}, torch.bfloat16
    ),
    "encoder-decoder, adafactor": Case(t5(), (), {"optim": "adafactor"}),
    "vision, momentum": Case(vit(), (LORA, "shared_norm"), {"optim": "sgd", "optim_args": "momentum=0.9"}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rehearsal_is_the_step_to_the_byte(name):
    case = CASES[name]
    work = work_of_model(case.config, list(case.recipe), batch=3, length=13, dtype=case.dtype, train=dict(case.train))
    assert_same(rehearse(work), run_one_step(work))


def assert_same(predicted: Rehearsed, measured: Rehearsed) -> None:
    assert predicted.memory == measured.memory
    assert predicted == measured


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with nothing in it but a configuration."""
    llama().save_pretrained(tmp_path)
    return tmp_path


def run(folder: Path, recipe: list[Any], **train: Any) -> RunSettings:
    """A run file of the task that TRL trains."""
    return RunSettings.from_dict(
        {
            "model": {"name": str(folder), "dtype": "float32"},
            "task": "causal-lm",
            "data": {"train": "rows.jsonl", "max_length": 13},
            "recipe": recipe,
            "train": {"per_device_train_batch_size": 2, **train},
        }
    )


def test_a_rehearsal_of_a_run_file_is_its_step_to_the_byte(folder):
    work, sizes = work_of(run(folder, [LORA], gradient_accumulation_steps=2), None, None)
    assert sizes == (2, 13, 2)
    assert_same(rehearse(work), run_one_step(work))


def test_a_rehearsal_leaves_neither_files_nor_patches(folder):
    was = nn.Module._apply, import_utils.is_fake_tensor, nn.init._no_grad_trunc_normal_
    before = sorted(folder.iterdir())
    rehearse(work_of(run(folder, [LORA]), None, None)[0])
    assert (nn.Module._apply, import_utils.is_fake_tensor, nn.init._no_grad_trunc_normal_) == was
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("technique", "batch"),
    [
        ({"chunked_loss": {}}, 3),  # the last token of each sequence has no label, which only values tell
        ({"token_windows": {"window_tokens": 7}}, 1),
    ],
    ids=["chunked_loss", "token_windows"],
)
def test_what_hangs_on_values_is_counted_at_its_most(technique, batch):
    work = work_of_model(llama(), [LORA, technique], batch=batch, length=13)
    predicted, measured = rehearse(work).memory.peak_bytes, run_one_step(work).memory.peak_bytes
    assert measured <= predicted <= 1.01 * measured


# Parts


def lora_numbers(rank: int = RANK) -> int:
    """Numbers of LoRA on all linear layers: rank (in + out) each."""
    sizes = [(WIDTH, WIDTH), (WIDTH, KEYS), (WIDTH, KEYS), (WIDTH, WIDTH), (WIDTH, INNER), (WIDTH, INNER)]
    return LAYERS * rank * sum(a + b for a, b in [*sizes, (INNER, WIDTH)])


def of_llama(recipe: Any = (), **options: Any) -> Prediction:
    return predict_model(llama(), recipe, **{"batch": 3, "length": 13, **options})


BLOCK = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * INNER + 2 * WIDTH
OUTSIDE = 2 * WORDS * WIDTH + WIDTH  # embeddings, head and last norm
ROTARY = 2 * 3 * FLOAT  # its two buffers, half of a head's 6 numbers each


@pytest.mark.parametrize("start", [True, "pissa"])  # the latter gives the base weights new values
def test_weights_and_adapters_are_parts_of_their_own(start):
    made = of_llama([{"lora": {**LORA["lora"], "init_lora_weights": start}}])
    assert made.parts["weights"] == FLOAT * (LAYERS * BLOCK + OUTSIDE) + ROTARY
    assert made.parts["adapters"] == FLOAT * lora_numbers()
    assert made.trained_parameters == lora_numbers()
    assert made.total_parameters == LAYERS * BLOCK + OUTSIDE + lora_numbers()
    assert set(made.parts) == set(PARTS)
    assert sum(made.parts.values()) == made.peak_bytes == made.by_step[made.peak_step]
    assert json.loads(json.dumps(made.to_dict()))["parts"] == dict(made.parts)


def test_more_tokens_and_micro_batches_change_what_they_should():
    short, long = of_llama([LORA], length=13), of_llama([LORA], length=52)
    assert short.parts["weights"] == long.parts["weights"]
    assert 3.5 < long.parts["saved_for_backward"] / short.parts["saved_for_backward"] < 4.5
    accumulated = of_llama(train={"gradient_accumulation_steps": 4})
    assert accumulated.peak_bytes > of_llama().peak_bytes  # gradients are there in the second forward
    assert accumulated.accumulation == 4


def test_operations_are_those_of_a_whole_step():
    once, twice = (of_llama(count_operations=True, train={"gradient_accumulation_steps": n}) for n in (1, 2))
    assert once.operations is not None
    assert twice.operations is not None
    assert twice.operations.flops_in("backward") == 2 * once.operations.flops_in("backward")
    assert once.time_on("h100").high_seconds > 0
    with pytest.raises(ValueError, match="count_operations=True"):
        of_llama().time_on("h100")


# The optimizer


def test_state_is_there_before_the_step():
    trained = LAYERS * BLOCK + OUTSIDE
    tensors = 3 + LAYERS * 9
    for optim, numbers in {"adamw_torch": 2 * trained + tensors, "sgd": 0}.items():
        assert of_llama(train={"optim": optim}).parts["optimizer_state"] == FLOAT * numbers


def test_priming_changes_no_weight():
    layer = nn.Linear(5, 3)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5, weight_decay=0.1)
    _PrimedOptimizer().on_step_begin(
        TrainingArguments(use_cpu=True), TrainerState(), TrainerControl(), optimizer=optimizer
    )
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad is None
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert set(optimizer.state[layer.weight]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("adamw_8bit", StateRule("adamw_8bit", 2, 8, False)),
        ("paged_adamw_32bit", StateRule("paged_adamw_32bit", 2, 32, True)),
        ("paged_lion_8bit", StateRule("paged_lion_8bit", 1, 8, True)),
        ("ademamix_8bit", StateRule("ademamix_8bit", 3, 8, False)),
        ("adamw_torch_8bit", StateRule("adamw_torch_8bit", 2, 8, False, block=256, own_tables=True)),
        ("adamw_torch_4bit", StateRule("adamw_torch_4bit", 2, 4, False, block=256, own_tables=True)),
        ("adamw_torch", None),
        ("adafactor", None),
    ],
)
def test_optimizers_with_small_or_paged_states_have_rules(name, rule):
    assert by_rule(name) == rule


@pytest.mark.parametrize(
    ("numbers", "bits", "expected"),
    [
        (4095, 8, 2 * 4 * 4095),  # too small: float32
        (4096, 8, 2 * (4096 + 4 * 16)),
        (4097, 8, 2 * (4097 + 4 * 17)),  # a scale for a block begun
        (10_000, 32, 2 * 4 * 10_000),
    ],
)
def test_state_by_rule(numbers, bits, expected):
    assert StateRule("adamw", 2, bits, False).bytes_of(numbers) == expected


def test_large_states_are_paged_and_on_a_cpu_none():
    rule = by_rule("paged_adamw_8bit")
    assert rule.paged_bytes_of(99_999) == 0
    assert rule.paged_bytes_of(100_000) == rule.bytes_of(100_000)
    assert by_rule("paged_adamw_8bit", on_cpu=True).paged_bytes_of(100_000) == 0


def test_state_by_rule_is_added_to_the_step(folder):
    plain = of_llama(train={"optim": "sgd"})
    state = FLOAT * 2 * (LAYERS * BLOCK + OUTSIDE)  # all tensors are too small for 8 bit
    eight = of_llama(train={"optim": "adamw_8bit"})
    assert eight.parts["optimizer_state"] == state
    assert eight.peak_bytes == plain.peak_bytes + state
    assert "adamw_8bit" in eight.by_rule[0]
    paged = predict(run(folder, [], optim="paged_adamw_8bit"))
    assert paged.parts["optimizer_state"] == state  # too small for pages as well
    assert paged.paged_bytes == 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("optim", "bits"), [("adamw_8bit", 32), ("adamw_torch_8bit", 8)])
def test_states_of_embeddings_and_heads_tied_to_them_are_in_32_bit_with_bitsandbytes(optim, bits, tied):
    config = llama(vocab_size=256, tie_word_embeddings=tied)
    numbers = 256 * WIDTH  # large enough for 8 bit, as no other tensor is
    made = predict_model(config, batch=1, length=5, train={"optim": optim})
    eight = by_rule(optim).bytes_of(numbers)
    embedding = FLOAT * 2 * numbers if bits == 32 else eight
    others = FLOAT * 2 * (LAYERS * BLOCK + WIDTH)
    assert made.parts["optimizer_state"] == others + embedding + (0 if tied else eight)
    assert made.trained_parameters == made.total_parameters
    assert ("of embeddings of 32 bit" in made.by_rule[0]) == (bits == 32)


def test_an_embedding_that_an_adapter_saves_has_states_in_32_bit():
    work = work_of_model(llama(), [{"lora": {**LORA["lora"], "modules_to_save": ["embed_tokens"]}}], batch=1, length=5)
    found = rehearse(work)
    assert found.embedding_sizes == (WORDS * WIDTH,)
    assert found.trained_parameters == lora_numbers() + WORDS * WIDTH


# Several processes


def test_units_are_the_largest_block_and_what_is_in_none():
    work = work_of_model(llama(), [LORA], batch=1, length=5)
    found = rehearse(work).units
    assert found == Units(FLOAT * (BLOCK + lora_numbers() // LAYERS), FLOAT * OUTSIDE)


PARTED = {"weights": 1000, "adapters": 11, "gradients": 600, "optimizer_state": 1200, "temporary": 50, "inputs": 7}


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("ddp", {"temporary": 50 + 600}),
        ("zero1", {"optimizer_state": 300}),
        ("zero2", {"optimizer_state": 300, "gradients": 150}),
        (
            "zero3",
            {"optimizer_state": 300, "gradients": 150, "weights": 250, "adapters": 3, "temporary": 50 + 2 * 90 + 40},
        ),
        (
            "fsdp2",
            {"optimizer_state": 300, "gradients": 150, "weights": 250, "adapters": 3, "temporary": 50 + 2 * 90 + 40},
        ),
    ],
)
def test_what_one_of_four_processes_holds(kind, changed):
    assert Sharding(kind, 4).divided(PARTED, Units(90, 40), 600) == {**PARTED, **changed}
    assert Sharding(kind, 1).divided(PARTED, Units(90, 40), 600) == PARTED


def test_buckets_of_ddp_are_there_at_a_peak_without_gradients():
    wide = llama(vocab_size=3000)  # its logits make the peak when backward begins
    alone, one = (predict_model(wide, batch=3, length=64, shards=s) for s in (None, Sharding("ddp", 2)))
    gradients = FLOAT * alone.trained_parameters
    assert alone.parts["gradients"] < gradients
    assert one.parts["temporary"] == alone.parts["temporary"] + gradients
    assert one.peak_bytes == alone.peak_bytes + gradients


def test_shards_are_told_as_a_rule():
    alone, one = of_llama(), of_llama(shards=Sharding("fsdp2", 4))
    assert one.processes == 4
    assert one.by_rule == ("what each of 4 processes holds under fsdp2",)
    assert one.parts["saved_for_backward"] == alone.parts["saved_for_backward"]
    assert one.parts["weights"] == -(-alone.parts["weights"] // 4)


@pytest.mark.parametrize(("kind", "divides_gradients"), [("fsdp2", True), ("zero1", False), ("zero2", True)])
def test_shards_may_have_their_peak_where_a_process_alone_has_not(kind, divides_gradients):
    sizes = {"batch": 1, "length": 3}  # few activations beside the gradients of all weights
    alone, one = (of_llama(**sizes, shards=shards) for shards in (None, Sharding(kind, 1000)))
    kept = run_one_step(work_of_model(llama(), [], **sizes)).memory.largest["saved_for_backward"]
    assert alone.parts["saved_for_backward"] == 0  # backward has ended
    assert one.parts["saved_for_backward"] == (pytest.approx(kept, rel=0.01) if divides_gradients else 0)
    assert one.peak_bytes == sum(one.parts.values()) == max(one.by_step.values()) == one.by_step[one.peak_step]


def test_paged_state_of_shards_is_that_of_one_process():
    wide = llama(vocab_size=9000)
    alone, one, copies = (
        predict_model(wide, batch=1, length=3, train={"optim": "paged_adamw_8bit"}, shards=shards)
        for shards in (None, Sharding("zero1", 4), Sharding("ddp", 4))
    )
    assert alone.paged_bytes == copies.paged_bytes == 4 * one.paged_bytes > 0


def test_shards_that_are_none_are_refused():
    with pytest.raises(SettingError, match="Did you mean 'fsdp2'"):
        Sharding("fsdp", 2)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="at least 1 process, got 0"):
        Sharding("ddp", 0)


# What cannot be predicted


@pytest.mark.parametrize(
    "technique",
    [{"embedding_pruning": {"keep_ids": [50]}}, {"shira": {"r": 2, "target_modules": ["q_proj"]}}],
    ids=lambda entry: next(iter(entry)),
)
def test_a_technique_that_needs_values_is_named_with_the_peak_without_it(technique):
    peak = of_llama(["lean_mlp"]).peak_bytes
    with pytest.raises(SettingError) as told:
        of_llama(["lean_mlp", technique])
    assert str(told.value).startswith(next(iter(technique)))
    assert f"without it the peak is {peak / 2**30:.3g} GiB" in str(told.value)
    assert "shoestring measure" in str(told.value)


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_configuration_with_gaps_is_refused(folder, missing):
    file = folder / "config.json"
    values = json.loads(file.read_text())
    del values[missing]
    file.write_text(json.dumps(values))
    with pytest.raises(SettingError, match=f"does not say {missing}"):
        configuration(str(folder))


@pytest.mark.parametrize("missing", ["d_model", "encoder_layers", "decoder_layers", "vocab_size"])
def test_a_configuration_of_two_stacks_with_gaps_is_refused(tmp_path, missing):
    file = tmp_path / "config.json"
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 99}
    file.write_text(json.dumps({"model_type": "bart", **sizes}))
    assert configuration(str(file)).decoder_layers == 1
    del sizes[missing]
    file.write_text(json.dumps({"model_type": "bart", **sizes}))
    with pytest.raises(SettingError, match=f"does not say {missing}"):
        configuration(str(file))


def test_a_configuration_whose_sizes_do_not_go_together_is_refused(folder):
    file = folder / "config.json"
    values = json.loads(file.read_text())
    del values["num_attention_heads"]  # then there are 32, as the class has it
    file.write_text(json.dumps(values))
    with pytest.raises(SettingError, match=r"cannot be read: .*not a multiple of the number of attention heads"):
        configuration(str(folder))


def test_configurations_that_are_none_are_refused(tmp_path):
    with pytest.raises(SettingError, match="holds no config"):
        configuration(str(tmp_path))
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "llamma"}')
    with pytest.raises(SettingError, match=r"cannot be read: .*llamma"):
        configuration(str(file))
    file.write_text('{"model_type": ')
    with pytest.raises(SettingError, match="cannot be read"):
        configuration(str(file))
    with pytest.raises(SettingError, match="Did you mean 'llama-3"):
        configuration("known:llama-3.1-8")
    with pytest.raises(SettingError, match="does not exist"):
        configuration(str(tmp_path / "nowhere"))


def test_models_that_are_none_are_refused():
    with pytest.raises(SettingError, match=r"names no architecture of transformers \(NoSuchModel\)"):
        predict_model(LlamaConfig(architectures=["NoSuchModel"]))
    from transformers import AutoModelForCausalLM

    with pytest.raises(SettingError, match="no ForCausalLM form of 'vit'"):
        predict_model(vit(), auto_class=AutoModelForCausalLM)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"length": 0}])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(SettingError, match="at least 1"):
        of_llama(**sizes)


def test_a_sequence_longer_than_the_model_takes_is_refused():
    with pytest.raises(SettingError, match="64"):
        of_llama(length=65)


# Tensors without values


def test_batches_have_the_shapes_that_models_take():
    def shapes(config: PretrainedConfig, name: str) -> dict[str, tuple[int, ...]]:
        import transformers

        with Valueless():
            batch = make_batch(make_model(config, getattr(transformers, name), torch.float32), 2, 5)
        return {key: tuple(tensor.shape) for key, tensor in batch.items()}

    words = {"input_ids": (2, 5), "attention_mask": (2, 5)}
    assert shapes(llama(), "LlamaForCausalLM") == {**words, "labels": (2, 5)}
    assert shapes(bert(), "BertForSequenceClassification") == {**words, "labels": (2,)}
    assert shapes(vit(), "ViTForImageClassification") == {"pixel_values": (2, 3, 32, 32), "labels": (2,)}


def test_who_asks_for_a_value_is_told_one():
    with Valueless():
        x = torch.zeros(3)
        assert isinstance(x, FakeTensor)
        assert x.sum().item() == 1.0
        assert (x > 0).any()
        assert x.long().max().item() == 1


def test_a_mode_without_values_puts_back_what_it_patched():
    was = nn.Module._apply, import_utils.is_fake_tensor, nn.init._no_grad_trunc_normal_
    mode = Valueless()
    with mode, mode:
        assert nn.Module._apply is not was[0]
    with pytest.raises(ZeroDivisionError), mode:
        raise ZeroDivisionError
    assert (nn.Module._apply, import_utils.is_fake_tensor, nn.init._no_grad_trunc_normal_) == was
    assert not isinstance(torch.zeros(1), FakeTensor)


def test_start_values_with_bounds_end_without_values():
    with Valueless():
        assert nn.init.trunc_normal_(torch.empty(5)).shape == (5,)


def test_modules_change_their_dtype_without_values():
    with Valueless():
        layer = nn.Linear(5, 3).to(torch.bfloat16)
        assert layer.weight.dtype == torch.bfloat16
        assert isinstance(layer.weight, nn.Parameter)


def test_a_recipe_is_undone_after_a_rehearsal():
    work = work_of_model(llama(), [LORA, "lean_mlp"], batch=1, length=5)
    kept: list[nn.Module] = []
    before: list[Any] = []

    def make_and_keep() -> nn.Module:
        kept.append(work.make_model())
        before.append(marks(kept[0]))
        return kept[0]

    rehearse(replace(work, make_model=make_and_keep))
    assert [marks(model) for model in kept] == before


def marks(model: nn.Module) -> Any:
    """What a recipe may change of a model: types of modules, what hangs on them, what trains."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    of_modules = [
        (name, type(module), "forward" in vars(module), [len(getattr(module, table)) for table in hooks])
        for name, module in model.named_modules()
    ]
    return of_modules, [(name, p.requires_grad) for name, p in model.named_parameters()]


def test_a_run_is_planned_from_a_file_a_mapping_or_settings_and_an_attention_for_gpus_by_rule(tmp_path: Path):
    llama().save_pretrained(tmp_path)
    run = {
        "model": str(tmp_path),
        "task": "causal-lm",
        "data": {"train": "none.jsonl", "max_length": 8},
        "recipe": [LORA],
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(run))
    one, two, three = plan(run, batch=2), plan(file, batch=2), plan(RunSettings.from_dict(run), batch=2)
    assert one.parts == two.parts == three.parts
    assert one.operations is not None
    fused = plan({**run, "model": {"name": str(tmp_path), "attn_implementation": "flash_attention_2"}}, batch=2)
    assert fused.parts == one.parts
    assert fused.by_rule == ("attention flash_attention_2: keeps as much as torch's fused attention",)
    liger = {"use_liger_kernel": True, "liger_kernel_config": {"rope": False}}
    with_kernels = plan({**run, "train": liger}, batch=2)
    assert with_kernels.parts == one.parts
    assert with_kernels.by_rule == ("use_liger_kernel: rehearsed without its kernels, which keep less",)


@pytest.mark.parametrize(
    "train",
    [
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2},
        {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"},
        {"assistant_only_loss": True},
    ],
    ids=lambda train: next(iter(train)),
)
def test_what_shapes_no_step_does_not_end_a_prediction(tmp_path: Path, train: dict[str, Any]):
    llama().save_pretrained(tmp_path)
    run = {"model": str(tmp_path), "task": "causal-lm", "data": {"train": "none.jsonl", "max_length": 8}}
    assert plan({**run, "train": train}, batch=2).parts == plan(run, batch=2).parts


def test_what_a_trainer_refuses_is_told_as_a_mistake():
    with pytest.raises(SettingError, match=r"The trainer refuses these settings: .*adamw_of_none"):
        of_llama(train={"optim": "adamw_of_none"})


def test_an_optimizer_that_a_technique_brings_has_no_state_by_rule():
    without, with_eight_bits = (
        of_llama([LORA, "zeroth_order"], train=train) for train in ({}, {"optim": "adamw_8bit"})
    )
    assert with_eight_bits.by_rule == ()
    assert with_eight_bits.parts == without.parts


def test_times_go_by_the_precision_of_the_run():
    sixteen = of_llama(train={"fp16": True}, count_operations=True)
    other = of_llama(train={"bf16": True}, count_operations=True)
    assert sixteen.parts == other.parts
    assert "float16" in sixteen.operations.flops["forward"]
    assert "bfloat16" not in sixteen.operations.flops["forward"]
    assert sixteen.operations.total_flops == other.operations.total_flops
    assert sixteen.time_on("T4").at_float32_peak == ()
    assert other.time_on("T4").at_float32_peak == ("bfloat16",)
    assert [of_llama(train=train, count_operations=True).time_on("H100").tf32 for train in ({}, {"tf32": True})] == [
        False,
        True,
    ]
