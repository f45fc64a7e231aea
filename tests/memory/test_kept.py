"""What is kept and why, against counts by hand on tiny stock models, and against what techniques then really remove."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeCopyMode
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from shoestring import assets
from shoestring.memory import Kept, KeptReport, Ledger
from shoestring.memory.kept import KINDS
from shoestring.recipe import Recipe
from shoestring.technique import TECHNIQUES, Phase, Technique
from shoestring.testing.assets import need

FLOAT = 4
BATCH, LENGTH = 2, 7
TOKENS = BATCH * LENGTH
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WIDTH, INNER, HEADS, KV_WIDTH, RANK, WORDS = 48, 80, 4, 24, 4, 97


def llama(attention: str = "sdpa", **config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, attn_implementation=attention, **config)).train()


def lora(model: nn.Module, targets: list[str] = ALL, **settings) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=RANK, target_modules=targets, **settings)).train()


def batch(padded: bool = False) -> dict[str, torch.Tensor]:
    words = torch.randint(0, WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    if not padded:
        return {"input_ids": words, "labels": words}
    mask = torch.ones_like(words)
    mask[1, 5:] = 0
    return {"input_ids": words, "labels": words, "attention_mask": mask}


def explained(model: nn.Module, step) -> KeptReport:
    """The report, after its sums were held against the ledger's."""
    ledger = Ledger(model)
    with ledger, Kept(ledger) as kept:
        step()
    report = kept.report()
    assert sum(row.num_bytes for row in report.rows) == report.saved_bytes == ledger.report().saved_bytes
    assert sum(row.num_bytes for row in report.by_kind()) == sum(row.num_bytes for row in report.by_module())
    return report


def of_batch(model: nn.Module, **batch_settings) -> KeptReport:
    torch.manual_seed(2)
    return explained(model, lambda: model(**batch(**batch_settings)).loss.backward())


def spare(report: KeptReport) -> dict[str, int]:
    return {row.kind: report.bytes_of(row.kind) for row in report.rows if row.spare}


def needed_in(report: KeptReport, module: str) -> int:
    return sum(row.num_bytes for row in report.rows if module in row.module and not row.spare)


# Sums by hand


def needed_of_a_block(inputs_of_width: int, num_adapters: int) -> int:
    """What must be kept of one block of `llama` above another: inputs of adapters or else of norms, and the rest."""
    inputs = inputs_of_width * WIDTH + num_adapters * RANK
    attention = WIDTH + 2 * KV_WIDTH + WIDTH + HEADS  # q, k, v, their output, and one number a row and head
    return FLOAT * TOKENS * (inputs + attention + 2 * INNER + 2)  # g and u; two norms' 1 / std


def test_a_block_with_adapters_needs_what_the_table_of_operations_says():
    report = of_batch(lora(llama(), ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]))
    assert needed_in(report, "layers.1.") == needed_of_a_block(inputs_of_width=2, num_adapters=5)
    assert spare(report) == {
        "activation outputs": 2 * FLOAT * TOKENS * INNER,
        "norm inputs beside outputs": 3 * FLOAT * TOKENS * WIDTH,  # the first block's first norm passes no gradient
        "logits": FLOAT * TOKENS * WORDS,
    }


def test_inputs_of_down_projections_are_formed_again_from_their_factors():
    report = of_batch(lora(llama(), ["down_proj"]))
    rotary = 2 * FLOAT * LENGTH * WIDTH // HEADS  # kept by the first attention that passes a gradient
    assert needed_in(report, "layers.1.") == rotary + needed_of_a_block(inputs_of_width=2, num_adapters=1)
    # the factors of the first block's product need no gradient, so nothing else keeps them there
    assert spare(report)["gated products"] == FLOAT * TOKENS * INNER


def test_the_output_of_attention_counts_once_where_an_adapter_reads_it():
    report = of_batch(lora(llama(), ["o_proj"]))
    assert report.bytes_of("inputs of trained weights", "o_proj.lora_A") == 2 * FLOAT * TOKENS * WIDTH
    # the first block's q, k and v need no gradient, so its attention keeps nothing
    assert report.bytes_of("attention outputs") == FLOAT * TOKENS * HEADS


def test_a_block_below_the_lowest_adapter_keeps_nothing():
    report = of_batch(lora(llama(), ALL, layers_to_transform=[1]))
    assert report.bytes_of("inputs of trained weights", "layers.1.") > 0
    assert not [row for row in report.rows if "layers.0." in row.module or "embed" in row.module]


def test_an_adapter_whose_a_is_frozen_keeps_none_of_its_wide_input():
    model = lora(llama(), ["q_proj", "v_proj", "down_proj"])
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad = False
    report = of_batch(model)
    assert report.bytes_of("inputs of trained weights") == 6 * FLOAT * TOKENS * RANK
    assert "gated products" not in spare(report)


def test_full_training_keeps_norms_three_times():
    report = of_batch(llama())
    norms = 5 * FLOAT * TOKENS * WIDTH
    assert spare(report) == {
        "norm inputs beside outputs": norms,
        "normalised inputs": norms,
        "activation outputs": 2 * FLOAT * TOKENS * INNER,
        "gated products": 2 * FLOAT * TOKENS * INNER,
        "logits": FLOAT * TOKENS * WORDS,
    }


def test_gradients_that_reach_no_weight_are_named_and_counted():
    expected = of_batch(lora(llama(), ALL, layers_to_transform=[1])).saved_bytes
    model = lora(llama(), ALL, layers_to_transform=[1])
    model.enable_input_require_grads()
    report = of_batch(model)
    unused = report.bytes_of("unused gradient paths")
    assert unused > 0
    assert report.saved_bytes - unused == expected
    assert {row.need for row in report.rows if row.kind == "unused gradient paths"} == {"nothing"}


def test_a_frozen_convolution_keeps_an_input_that_nothing_reads():
    model = nn.Sequential(nn.Conv1d(3, 5, 1), nn.Conv1d(5, 2, 1))
    model[1].requires_grad_(False)
    report = explained(model, lambda: model(torch.ones(4, 3, 6)).sum().backward())
    assert spare(report) == {"inputs of frozen layers": FLOAT * 4 * 5 * 6}


def test_eager_attention_keeps_its_probabilities():
    report = of_batch(lora(llama("eager"), ["q_proj", "k_proj", "v_proj"]))
    assert report.bytes_of("attention probabilities") == 2 * FLOAT * BATCH * HEADS * LENGTH**2
    dropping = of_batch(lora(llama("eager", attention_dropout=0.5), ["q_proj", "k_proj", "v_proj"]))
    assert dropping.bytes_of("attention probabilities") == 4 * FLOAT * BATCH * HEADS * LENGTH**2
    assert dropping.bytes_of("dropout masks") == 2 * FLOAT * BATCH * HEADS * LENGTH**2


def test_padding_copies_heads_and_masks():
    report = of_batch(lora(llama(), ["q_proj", "k_proj", "v_proj"]), padded=True)
    assert report.bytes_of("repeated heads") == 2 * 2 * FLOAT * TOKENS * (WIDTH - KV_WIDTH)
    assert report.bytes_of("copies") == FLOAT * BATCH * LENGTH**2  # the second block's mask


def test_dropout_before_adapters_keeps_masks_and_copies():
    report = of_batch(lora(llama(), ["q_proj", "k_proj", "down_proj"], lora_dropout=0.25))
    found = spare(report)
    masks = 2 * WIDTH + 2 * INNER  # the first block's q and k pass no gradient through theirs
    assert found["dropout masks"] == FLOAT * TOKENS * masks
    # in the first block one of q's and k's copies stays: nothing else there holds their input
    assert found["dropout outputs"] == FLOAT * TOKENS * (3 * WIDTH + 2 * INNER)
    assert "norm inputs beside outputs" not in found


def test_adapters_of_another_dtype_keep_copies():
    report = of_batch(lora(llama().to(torch.bfloat16), ["q_proj", "k_proj", "v_proj", "o_proj"]))
    copies = 2 + 1  # k's and v's beside q's; o's of the attention's output, which is kept in bfloat16
    assert spare(report)["copies"] == 2 * copies * FLOAT * TOKENS * WIDTH


def test_masks_of_an_encoder_and_its_gelu():
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS, "num_hidden_layers": 2}
    model = lora(BertModel(BertConfig(vocab_size=WORDS, attention_probs_dropout_prob=0.0, **sizes)), ["dense"])
    words = batch()["input_ids"]
    report = explained(model, lambda: model(words).last_hidden_state.sum().backward())
    found = spare(report)
    assert found["activation outputs"] == 2 * FLOAT * TOKENS * INNER
    assert found["dropout masks"] == 2 * 2 * FLOAT * TOKENS * WIDTH
    assert report.bytes_of("activation inputs") == 2 * FLOAT * TOKENS * INNER


def test_an_activation_of_several_operations_needs_its_input_only():
    torch.manual_seed(0)
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": WORDS, "n_embd": WIDTH, "n_inner": INNER, "n_layer": 2, "n_head": HEADS}
    report = of_batch(lora(GPT2LMHeadModel(GPT2Config(**sizes, **drops)), ["c_attn", "c_fc"], fan_in_fan_out=True))
    one = FLOAT * TOKENS * INNER  # of new_gelu: x; 0.5 x, tanh and 1 + tanh
    assert report.bytes_of("activation inputs") == 2 * one
    assert spare(report)["activation outputs"] == 2 * 3 * one


def test_relu_keeps_its_result_once_also_where_an_adapter_reads_it():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    report = explained(model, lambda: model(torch.ones(11, 5)).sum().backward())
    assert [(row.kind, row.num_bytes) for row in report.rows] == [("inputs of trained weights", 11 * 7 * FLOAT)]


# What is hidden from the graph


def test_inputs_of_checkpointed_blocks_stand_beside_the_graph():
    model = llama(use_cache=False)
    model.gradient_checkpointing_enable()
    report = of_batch(model)
    assert report.bytes_of("beside the graph") >= 2 * FLOAT * TOKENS * WIDTH
    assert not [row for row in report.rows if "layers." in row.module and row.kind != "beside the graph"]


def test_what_a_hook_packs_is_named_so():
    model = lora(llama())

    def step() -> None:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.clone(), t.dtype), lambda packed: packed[0]):
            loss = model(**batch()).loss
        loss.backward()

    assert {row.kind for row in explained(model, step).rows} == {"packed"}


def test_fake_tensors_are_explained_alike():
    model = lora(llama())
    expected = of_batch(model)
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(model)
    words = mode.from_tensor(batch()["input_ids"])
    with mode:
        report = explained(fake, lambda: fake(input_ids=words, labels=words).loss.backward())
    assert spare(report) == spare(expected)


# Watching


def test_nothing_is_left_behind_and_no_report_is_refused():
    backward = torch.autograd.backward
    model = nn.Linear(3, 2)
    ledger = Ledger(model)
    with ledger, Kept(ledger) as kept:
        model(torch.ones(1, 3))
    assert torch.autograd.backward is backward
    with pytest.raises(RuntimeError, match="No backward was seen"):
        kept.report()


def test_two_forwards_before_one_backward_keep_twice_as_much():
    model = lora(llama())

    def step() -> None:
        (model(**batch()).loss + model(**batch()).loss).backward()

    once, twice = spare(of_batch(model)), spare(explained(model, step))
    assert twice.pop("copies") > 0  # what reads the words alone is equal in both
    assert twice == {kind: 2 * num_bytes for kind, num_bytes in once.items()}


def test_the_backward_with_most_kept_is_explained():
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
    report = explained(model, lambda: [model(torch.ones(rows, 5)).sum().backward() for rows in (2, 11, 3)])
    assert report.bytes_of("activation inputs") == 11 * 7 * FLOAT


@pytest.mark.parametrize("kind", [kind for kind, about in KINDS.items() if about.spare])
def test_all_that_is_spare_has_a_remedy(kind):
    inside_blocks = {kind, "block activations", "everything kept"}
    assert KINDS[kind].setting or any(cls.removes & inside_blocks for cls in TECHNIQUES.values())


def test_a_technique_outside_the_package_is_named(monkeypatch):
    @dataclass
    class Smaller(Technique):
        name: ClassVar[str] = "smaller"
        phase: ClassVar[Phase] = Phase.ACTIVATION
        removes: ClassVar[frozenset[str]] = frozenset({"block activations"})

    monkeypatch.setitem(TECHNIQUES, "smaller", Smaller)
    report = of_batch(lora(llama()))
    assert {row.in_block for row in report.rows if "smaller" in row.reduced_by} == {True}
    assert {row.in_block for row in report.rows if "smaller" not in row.reduced_by} == {False}
    monkeypatch.setattr(Smaller, "exact", True)
    assert any("smaller" in row.removed_by for row in of_batch(lora(llama())).rows)


NORMS = ["norm inputs beside outputs", "normalised inputs"]
MLPS = ["activation outputs", "gated products"]


@pytest.mark.parametrize(("technique", "kinds"), [("shared_norm", NORMS), ("lean_mlp", MLPS)])
@pytest.mark.parametrize("adapters", [[LoraConfig(r=RANK, target_modules=ALL)], []], ids=["lora", "full"])
def test_what_is_said_to_go_goes_to_the_byte(technique, kinds, adapters):
    with Recipe(*adapters)(llama()) as model:
        before = of_batch(model.train())
    with Recipe(*adapters, TECHNIQUES[technique]())(llama()) as model:
        after = of_batch(model.train())
    expected = sum(before.bytes_of(kind) for kind in kinds)
    assert expected > 0
    assert set(kinds) <= TECHNIQUES[technique].removes
    assert before.saved_bytes - after.saved_bytes == expected
    assert not set(kinds) & set(spare(after))


def test_a_block_without_what_is_spare_keeps_what_the_table_of_operations_says():
    adapters = LoraConfig(r=RANK, target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])
    with Recipe(adapters, TECHNIQUES["shared_norm"](), TECHNIQUES["lean_mlp"]())(llama()) as model:
        ledger = Ledger(model.train(), module_depth=5)
        with ledger:
            model(**batch()).loss.backward()
    kept = ledger.report().by_module["base_model.model.model.layers.1"]
    assert kept == pytest.approx(needed_of_a_block(inputs_of_width=2, num_adapters=6), rel=0.05)


# A real model


def test_a_pretrained_decoder_with_adapters():
    need("smollm2")
    model = AutoModelForCausalLM.from_pretrained(assets.model_folder("smollm2"), dtype=torch.float32)
    config, tokens = model.config, 24
    model = lora(model, ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
    words = torch.arange(tokens)[None] + 100
    report = explained(model, lambda: model(input_ids=words, labels=words).loss.backward())
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kv_width = width * config.num_key_value_heads // heads
    expected = FLOAT * tokens * (2 * width + 5 * RANK + 2 * width + 2 * kv_width + heads + 2 * inner + 2)
    assert needed_in(report, ".layers.7.") == expected
    assert report.bytes_of("logits") == FLOAT * tokens * config.vocab_size
