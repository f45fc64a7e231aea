"""MoLA: its equation against plain references, allocation, balance loss, merging, what it keeps, refusals."""

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from shoestring import assets
from shoestring.activations import LeanMLP
from shoestring.adapters import MoLAConfig
from shoestring.adapters.mola import _CHOICES, Experts, adapters_in, balance_loss, chosen_weights, spread
from shoestring.adapters.placement import place_in_stack
from shoestring.blocks import Recompute, Reversible, TokenTune, TokenWindows
from shoestring.errors import SettingError
from shoestring.fakes import without_values
from shoestring.memory import Ledger
from shoestring.objectives import ChunkedLoss
from shoestring.real_tokens import real_tokens
from shoestring.recipe import Recipe, attached_to
from shoestring.testing.adapters import TARGETS, adapted, batch, trainable, two_layers
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import TinyModel, decoder, seeded
from shoestring.training import RecipeTrainer

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TINY = TinyModel("decoder", decoder, "CAUSAL_LM", tuple(LINEARS))


def experts(model: nn.Module) -> list[Experts]:
    return list(adapters_in(model).values())


def token_by_token(one: Experts, x: Tensor) -> Tensor:
    """The update as the equation has it: expert by expert and token by token."""
    num_experts, r = len(one.router), len(one.a) // len(one.router)
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        p = (one.router @ token).softmax(-1)
        chosen = p.argsort(descending=True)[: one.k].tolist()
        total = sum(p[i] for i in chosen)
        parts = [p[i] / total * (one.b.view(-1, num_experts, r)[:, i] @ (one.a[i * r :][:r] @ token)) for i in chosen]
        rows.append(one.scale * sum(parts))
    return torch.stack(rows).view(*x.shape[:-1], -1)


def grouped(one: Experts, x: Tensor) -> Tensor:
    """The same with tokens gathered by expert, so that an expert computes its own tokens only."""
    num_experts, r = len(one.router), len(one.a) // len(one.router)
    rows = x.reshape(-1, x.shape[-1])
    top = F.linear(rows, one.router).softmax(-1).topk(one.k)
    weights = top.values / top.values.sum(-1, keepdim=True)
    y = rows.new_zeros(len(rows), len(one.b))
    for i in range(num_experts):
        token, slot = (top.indices == i).nonzero(as_tuple=True)
        own = rows[token] @ one.a[i * r :][:r].T @ one.b.view(-1, num_experts, r)[:, i].T
        y = y.index_add(0, token, one.scale * weights[token, slot, None] * own)
    return y.view(*x.shape[:-1], -1)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in trainable(model).items()}


@pytest.mark.parametrize(
    ("seed", "settings"),
    [(0, {"experts": 3}), (1, {"experts": 5, "k": 3, "r": 2}), (2, {"experts": 4, "k": 1}), (3, {"experts": 2})],
)
@pytest.mark.parametrize("form", [token_by_token, grouped])
def test_outputs_and_gradients_are_those_of_plain_references_in_double_precision(form, seed: int, settings: dict):
    model = adapted(MoLAConfig, lambda: {"r": 3, **settings}, two_layers(torch.float64), seed=seed).double()
    x, weight = batch(torch.float64, seed).requires_grad_(), torch.randn(2, 63, 16, dtype=torch.float64)
    (model(x) * weight).sum().backward()
    mine, mine_x = gradients(model), x.grad.clone()
    model.zero_grad()
    x.grad = None
    base, (first, second) = two_layers(torch.float64), experts(model)
    hidden = F.gelu(base.first(x) + form(first, x))
    y = base.second(hidden) + form(second, hidden)
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10)
    (y * weight).sum().backward()
    torch.testing.assert_close(mine_x, x.grad, rtol=1e-10, atol=1e-10)
    for name, expected in gradients(model).items():
        torch.testing.assert_close(mine[name], expected, rtol=1e-10, atol=1e-10, msg=name)


def test_in_single_precision_both_references_agree_too():
    one = experts(adapted(MoLAConfig, lambda: {"r": 3, "experts": 4}))[0]
    x = batch()
    for form in (token_by_token, grouped):
        torch.testing.assert_close(one.mixed(x), form(one, x), rtol=1e-5, atol=1e-5)


def test_dropout_changes_what_experts_read_and_not_the_routing():
    one = experts(adapted(MoLAConfig, lambda: {"r": 3, "experts": 3, "dropout": 0.4}).double())[0].train()
    x = batch(torch.float64).flatten(0, 1).requires_grad_()
    with seeded(7):
        y = one.mixed(x)
    y.square().sum().backward()
    mine = [x.grad, *(p.grad for p in one.parameters())]
    with seeded(7):
        kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(0.6)
    assert 0.5 < kept.double().mean() < 0.7
    x = x.detach().requires_grad_()
    p = F.linear(x, one.router).softmax(-1)
    top = p.topk(2)
    hidden = F.linear(x * kept / 0.6, one.a).unflatten(-1, (3, 3))
    full = torch.zeros_like(p).scatter(-1, top.indices, top.values / top.values.sum(-1, keepdim=True))
    expected = one.scale * F.linear((full[..., None] * hidden).flatten(1), one.b)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    theirs = torch.autograd.grad(expected.square().sum(), [x, *one.parameters()])
    for ours, reference in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


def test_it_starts_as_the_pretrained_model_bit_by_bit():
    assert torch.equal(adapted(MoLAConfig, lambda: {"experts": 3}, init_weights=True)(batch()), two_layers()(batch()))


def test_one_expert_is_lora_and_merges():
    ours = adapted(MoLAConfig, lambda: {"r": 3, "experts": 1, "k": 1, "alpha": 6})
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=list(TARGETS))
    theirs = get_peft_model(two_layers(), lora).eval()
    pairs = list(zip(experts(ours), (getattr(theirs.base_model.model, name) for name in TARGETS), strict=True))
    for one, layer in pairs:
        layer.lora_A["default"].weight.data.copy_(one.a)
        layer.lora_B["default"].weight.data.copy_(one.b)
    x, y = (batch().requires_grad_() for _ in range(2))
    ours(x).square().mean().backward()
    theirs(y).square().mean().backward()
    torch.testing.assert_close(ours(x), theirs(y), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-6)
    for one, layer in pairs:
        torch.testing.assert_close(one.a.grad, layer.lora_A["default"].weight.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.b.grad, layer.lora_B["default"].weight.grad, rtol=1e-5, atol=1e-6)
        assert not one.router.grad.any()
    expected = ours(batch())
    ours.merge_adapter()
    torch.testing.assert_close(ours(batch()), expected, rtol=1e-5, atol=1e-5)
    ours.unmerge_adapter()
    assert torch.equal(ours(batch()), expected)


@pytest.mark.parametrize("counts", [3, [1, 2]])
def test_a_mixture_refuses_to_be_merged_also_where_some_layers_have_one_expert(counts):
    model = adapted(MoLAConfig, lambda: {"experts": counts, "k": 1}, decoder(), target_modules=["q_proj"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"mola changes a layer's output, not its weight: it cannot be merged"):
        model.merge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_exactly_k_experts_have_weight_and_the_weights_sum_to_one():
    p = torch.randn(63, 5).softmax(-1)
    chosen = p.topk(2).indices
    weights = chosen_weights(p, chosen)
    full = spread(weights[..., None], chosen, 5)
    assert ((full > 0).sum(-1) == 2).all()
    torch.testing.assert_close(full.sum(-1), torch.ones(63))
    assert (full.argmax(-1) == p.argmax(-1)).all()


def plain_balance(p: Tensor, chosen: Tensor) -> Tensor:
    """N sum f P of [tokens, N], by counting."""
    counts = torch.bincount(chosen.flatten(), minlength=p.shape[-1]).to(p)
    return p.shape[-1] * (counts / chosen.numel() * p.mean(0)).sum()


def test_the_balance_loss_is_one_where_all_is_even_and_flows_through_p_alone():
    chosen = torch.randn(2, 31, 4).topk(2).indices
    assert balance_loss(torch.full((2, 31, 4), 0.25), chosen) == pytest.approx(1)
    p = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.1, 0.4]], requires_grad=True)
    loss = balance_loss(p, p.topk(2).indices)  # f = 1/2, 1/4, 1/4; P = 0.6, 0.15, 0.25
    assert loss.item() == pytest.approx(3 * (0.5 * 0.6 + 0.25 * 0.15 + 0.25 * 0.25))
    loss.backward()
    torch.testing.assert_close(p.grad, 3 / 2 * torch.tensor([[0.5, 0.25, 0.25]] * 2))


def llama(num_layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("num_layers", "given", "counts"),
    [
        (8, "2-4-6-8", [2, 2, 4, 4, 6, 6, 8, 8]),
        (6, "inverted_triangle", [2, 4, 6, 8, 8, 8]),
        (11, "diamond", [2, 2, 8, 8, 8, 8, 2, 2, 2, 2, 2]),
        (5, "triangle", [8, 6, 4, 2, 2]),
        (4, "hourglass", [8, 2, 2, 8]),
        (3, "2-3", [2, 3, 3]),
        (3, [4, 2, 3], [4, 2, 3]),
        (2, 3, [3, 3]),
    ],
)
def test_every_block_has_its_number_of_experts_and_the_parameters_of_the_formula(num_layers, given, counts):
    model = get_peft_model(llama(num_layers), MoLAConfig(experts=given, r=3, target_modules=list(LINEARS)))
    for name, one in adapters_in(model).items():
        assert len(one.router) == counts[int(name.split("layers.")[1].split(".")[0])]
    sizes = [(24, 24), (24, 12), (24, 12), (24, 24), (24, 40), (24, 40), (40, 24)]
    formula = sum(n * (3 * (i + o) + i) for n in counts for i, o in sizes)
    assert sum(p.numel() for p in trainable(model).values()) == formula


@pytest.mark.parametrize(("given", "count"), [("2-4-6-8", 105_635_840), (8, 169_017_344)])
def test_llama_2_7b_trains_the_numbers_that_the_paper_prints(given, count: int):
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32, vocab_size=32))
        model = get_peft_model(base, MoLAConfig(experts=given, r=8, target_modules=list(LINEARS)))
    assert sum(p.numel() for p in trainable(model).values()) == count


def t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 4, "num_decoder_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes))


def test_encoder_and_decoder_are_divided_each_by_itself():
    model = get_peft_model(t5(), MoLAConfig(experts="2-3", target_modules=["q"]))
    counts = {
        name.split(".mola_")[0][len("base_model.model.") :]: len(m.router) for name, m in adapters_in(model).items()
    }
    assert counts["encoder.block.1.layer.0.SelfAttention.q"] == 2
    assert counts["encoder.block.2.layer.0.SelfAttention.q"] == 3
    assert counts["decoder.block.0.layer.1.EncDecAttention.q"] == 2
    assert counts["decoder.block.1.layer.0.SelfAttention.q"] == 3
    assert place_in_stack(t5(), "decoder.block.1.layer.0.SelfAttention.q") == ("decoder.block", 1, 2)
    assert place_in_stack(t5(), "lm_head") is None


def mola(**settings: Any) -> MoLAConfig:
    given = {"r": 3, "experts": [2, 4], "balance": 0.1, "init_weights": False, "target_modules": list(LINEARS)}
    return MoLAConfig(**{**given, **settings})


def applied(*others: Any, **settings: Any) -> nn.Module:
    with seeded(3):
        return Recipe(mola(**settings), *others).apply(decoder()).train()


def reference_balance(model: nn.Module, inputs: dict[str, Tensor], counted: Tensor | None = None) -> Tensor:
    """Sum of the layers' terms over `counted` or else real tokens, by plain counting; the model is in evaluation."""
    counted = inputs["attention_mask"].bool() if counted is None else counted
    seen: dict[Any, Tensor] = {}
    layers = [m for m in model.modules() if hasattr(m, "mola_")]
    hooks = [layer.register_forward_pre_hook(lambda m, args: seen.update({m: args[0]})) for layer in layers]
    model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    for hook in hooks:
        hook.remove()
    terms = []
    for layer, x in seen.items():
        (one,) = layer.adapters.values()
        p = F.linear(x[counted], one.router).softmax(-1)
        terms.append(plain_balance(p, p.topk(one.k).indices))
    return torch.stack(terms).sum()


def test_the_balance_loss_is_added_over_real_tokens_with_its_gradients():
    inputs = TINY.batch()
    model = applied()
    model(**inputs).loss.backward()
    mine, with_balance = gradients(model), model(**inputs).loss
    model.zero_grad()
    model.eval()
    expected = model(**inputs).loss + 0.1 * reference_balance(model, inputs)
    expected.backward()
    torch.testing.assert_close(with_balance, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_change_the_balance_loss(left: bool):
    model = applied()
    config = attached_to(model).techniques[0].config
    ids = TINY.batch()["input_ids"][:1]

    def balance(padding: int) -> Tensor:
        sizes = (padding, 0) if left else (0, padding)
        inputs = {"input_ids": F.pad(ids, sizes, value=2), "attention_mask": F.pad(torch.ones_like(ids), sizes)}
        attached_to(model).add_losses_in_forward = False
        model(**inputs)
        return config.added_loss(model, inputs, None)

    torch.testing.assert_close(balance(9), balance(0), rtol=1e-5, atol=1e-6)


def test_recomputation_gives_the_same_loss_and_gradients_and_collects_once():
    inputs, results = TINY.batch(), []
    for others in ((), (Recompute(),), (Recompute(segments=1),), (LeanMLP(), ChunkedLoss())):
        model = applied(*others)
        losses = []
        for _ in range(2):
            model.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            losses.append(loss.detach())
        assert torch.equal(*losses), "choices of an earlier forward were counted"
        results.append((losses[0], gradients(model)))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        for name, value in gradient.items():
            torch.testing.assert_close(value, results[0][1][name], rtol=1e-5, atol=1e-7)


def test_blocks_outside_of_the_graph_are_refused_unless_balance_is_off():
    for technique in (Reversible(), TokenWindows(window_tokens=4)):
        with pytest.raises(SettingError, match=f"balance of mola .* {technique.name} keeps out of the graph"):
            Recipe(technique, mola())
        model = applied(technique, balance=0.0)
        model(**TINY.batch()).loss.backward()
        assert all(p.grad.any() for p in trainable(model).values())


def test_reentrant_checkpointing_is_refused_unless_balance_is_off():
    model = applied()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"The balance loss of mola needs .*q_proj.* Use the technique recompute"):
        model(**TINY.batch(), use_cache=False)


def test_it_trains_on_selected_tokens():
    model = applied(TokenTune(keep_fraction=0.5))
    model(**TINY.batch()).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in trainable(model).values())


def reference_loss(model: nn.Module, inputs: dict[str, Tensor], selected: Tensor) -> Tensor:
    """Cross-entropy and balance over selected tokens, by plain counting; the model is in evaluation."""
    targets = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100).masked_fill(~selected, -100)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    task = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return task + 0.1 * reference_balance(model, inputs, selected)


def passes_of(model: nn.Module) -> list[Any]:
    """The states of the passes of token_tune, added as they end."""
    technique = next(t for t in attached_to(model).techniques if isinstance(t, TokenTune))
    ended: list[Any] = []

    def end(current: Any, outputs: Any) -> Any:
        ended.append(current.state)
        return outputs

    technique.end = end
    return ended


def selected(passes: list[Any]) -> Tensor:
    (selection,) = passes[-1].selections.values()
    return selection.mask


def unequal_lengths(filler: int = 0) -> dict[str, Tensor]:
    """Samples of 3 and 13 tokens."""
    inputs = TINY.batch(samples=2)
    inputs["attention_mask"] = torch.stack([torch.arange(13) < 3, torch.arange(13) < 13]).long()
    padding = inputs["attention_mask"] == 0
    return {
        **inputs,
        "input_ids": inputs["input_ids"].masked_fill(padding, filler),
        "labels": inputs["input_ids"].masked_fill(padding, -100),
    }


def test_the_balance_loss_is_of_selected_tokens_where_lengths_differ():
    found = []
    for form, filler in (("streams", 0), ("streams", 5), ("rows", 0)):
        model = applied(TokenTune(keep_fraction=0.5, form=form))
        passes, inputs = passes_of(model), unequal_lengths(filler)
        loss = model(**inputs).loss
        loss.backward()
        found.append((loss, gradients(model)))
        torch.testing.assert_close(loss, reference_loss(model.eval(), inputs, selected(passes)), rtol=1e-5, atol=1e-5)
    assert found[0][0] == found[1][0]
    for others in found[1:]:
        for name, gradient in others[1].items():
            torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("select", ["random", "seek"])
def test_the_balance_loss_is_of_selected_tokens_once(select: Literal["random", "seek"]):
    inputs = TINY.batch()
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    model = applied(TokenTune(keep_fraction=0.5, select=select))
    passes = passes_of(model)
    loss = model(**inputs).loss
    loss.backward()
    assert all(_CHOICES[one] == [] for one in experts(model))
    torch.testing.assert_close(loss, reference_loss(model.eval(), inputs, selected(passes)), rtol=1e-5, atol=1e-5)


def test_the_trainer_adds_the_balance_loss_once_where_tokens_are_sought(tmp_path: Path):
    inputs = {name: value[:1].clamp(min=1) for name, value in TINY.batch().items()}
    model = applied(TokenTune(keep_fraction=0.5, select="seek"))
    passes, start = passes_of(model), copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=1,
        learning_rate=0.5,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = RecipeTrainer(
        model, arguments, train_dataset=Dataset.from_dict({k: v.tolist() for k, v in inputs.items()})
    )
    trainer.train()
    model.load_state_dict(start)
    expected = reference_loss(model.eval(), inputs, selected(passes))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_a_copy_of_a_model_collects_nothing():
    model = applied()
    twin = copy.deepcopy(model)
    twin.base_model.model(**TINY.batch()).loss.backward()
    assert not any(one in _CHOICES for one in experts(twin))
    assert all(_CHOICES[one] == [] for one in experts(model))


def test_the_trainer_adds_the_mean_balance_loss_of_accumulated_batches(tmp_path: Path):
    """One step of two micro-batches of unequal numbers of labels against sums by hand."""
    inputs = TINY.batch(samples=4)
    inputs["labels"][0] = inputs["labels"][0].masked_fill(torch.arange(13) < 9, -100)
    model = applied()
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    RecipeTrainer(model, arguments, train_dataset=Dataset.from_dict({k: v.tolist() for k, v in inputs.items()})).train()
    steps = {name: (start[name] - p.detach()) / 0.5 for name, p in trainable(model).items()}
    model = applied().eval()
    halves = [{name: value[i : i + 2] for name, value in inputs.items()} for i in (0, 2)]
    num_labels = (inputs["labels"][:, 1:] != -100).sum()
    for half in halves:
        logits = model(input_ids=half["input_ids"], attention_mask=half["attention_mask"]).logits
        task = F.cross_entropy(logits[:, :-1].flatten(0, 1), half["labels"][:, 1:].flatten(), reduction="sum")
        (task / num_labels + 0.1 * reference_balance(model, half) / 2).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(steps[name], gradient, rtol=1e-3, atol=2e-6, msg=name)


def test_decoders_beside_an_encoder_count_the_tokens_they_read():
    model = Recipe(mola(experts=2, target_modules=["q", "k"])).apply(t5())
    given = {"attention_mask": torch.ones(2, 5).long(), "labels": torch.tensor([[1, 2, 3, -100, -100]] * 2)}
    output = given["labels"] != -100

    def mask(name: str) -> Tensor | None:
        return real_tokens(model, given, f"base_model.model.{name}.mola_.default", torch.Size([2, 5]))

    assert torch.equal(mask("encoder.block.0.layer.0.SelfAttention.k"), given["attention_mask"].bool())
    assert torch.equal(mask("decoder.block.0.layer.0.SelfAttention.k"), output)
    assert torch.equal(mask("decoder.block.0.layer.1.EncDecAttention.q"), output)
    assert torch.equal(mask("decoder.block.0.layer.1.EncDecAttention.k"), given["attention_mask"].bool())
    assert real_tokens(model, given, "encoder.block.0", torch.Size([9])) is None
    flat = real_tokens(model, given, "decoder.block.0", torch.Size([10]))  # the tokens of all samples in one row
    assert flat is not None
    assert torch.equal(flat, output)
    of_classes = {"attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * 2), "labels": torch.tensor([0, 1])}
    read = real_tokens(model, of_classes, "decoder.block.0.layer.0.SelfAttention.k", torch.Size([2, 5]))
    assert read is not None
    assert torch.equal(read, of_classes["attention_mask"].bool())
    model.train()(input_ids=torch.randint(2, 50, (2, 5)), **given).loss.backward()


class Stack(nn.Module):
    """Four linear layers 256 -> 192 -> 256 ..., in a list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*[(256, 192), (192, 256)][i % 2]) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def stack(config: MoLAConfig | LoraConfig) -> nn.Module:
    config.target_modules = {f"layers.{i}" for i in range(4)}
    with seeded(0):
        return get_peft_model(Stack(), config)


def step(model: nn.Module, x: Tensor) -> Ledger:
    with Ledger(model) as ledger:
        model(x).sum().backward()
    return ledger


def test_kept_are_x_p_and_of_the_chosen_experts_numbers_and_inner_values():
    tokens = 65
    report = step(stack(MoLAConfig(experts="2-4-6-8", k=2, r=8)), torch.randn(tokens, 256)).report()
    inputs = tokens * 4 * (192 + 256 + 192)  # of layers 2 to 4; the first one's is the model's own
    routing = sum(tokens * (4 * n + 2 * 2 + 2 * 8 * 4) for n in (2, 4, 6, 8))
    assert report.saved_bytes == inputs + routing


def test_fake_tensors_are_counted_to_the_byte():
    config = MoLAConfig(experts="2-4-6-8", dropout=0.1)
    real = step(stack(config).train(), torch.randn(64, 256)).report()
    model = stack(config).train()  # peft cannot build it under fake tensors
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = step(without_values(model, mode), torch.randn(64, 256)).report()
    assert (fake.saved_bytes, fake.peak_bytes) == (real.saved_bytes, real.peak_bytes)


def test_a_step_costs_less_than_twice_that_of_lora_of_rank_64_and_a_third_more_memory():
    counts, peaks = [], []
    for config in (MoLAConfig(experts="2-4-6-8", k=2, r=8), LoraConfig(r=64)):
        model, x = stack(config), torch.randn(256, 256)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        counts.append(counter.get_total_flops())
        peaks.append(step(model, x).report().peak_bytes)
    assert counts[0] <= 2 * counts[1]
    assert peaks[0] <= 1.3 * peaks[1]


def test_routers_that_nothing_depends_on_may_stay_without_a_gradient():
    def idle(**settings: Any) -> set[str]:
        model = applied(**settings)
        return {name.split("layers.")[1][0] for name in attached_to(model).idle_parameters()}

    assert idle() == set()
    assert idle(experts=[1, 2], k=1) == {"0"}
    with pytest.warns(UserWarning, match="the router of mola stays as it was drawn"):
        assert idle(experts=[1, 2], k=1, balance=0.0) == {"0", "1"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r of mola must be at least 1, got 0"),
        ({"k": 0}, "k of mola must be at least 1, got 0"),
        ({"k": 3}, "k of mola must be at most the number of experts of every layer, got k 3 and experts '2-4-6-8'"),
        ({"k": 2, "experts": 1}, "got k 2 and experts 1: a token cannot use more experts than there are"),
        ({"k": 2, "experts": [4, 1]}, r"got k 2 and experts \[4, 1\]"),
        ({"experts": 0}, "experts of mola must be at least 1 in every layer, got 0"),
        ({"experts": []}, r"experts of mola must be at least 1 in every layer, got \[\]"),
        ({"experts": "pyramid"}, "or an allocation by name, got 'pyramid'. Known: diamond"),
        ({"experts": "triangel"}, "Did you mean 'triangle'"),
        ({"balance": -1.0}, "balance of mola must be at least 0, got -1.0"),
        ({"dropout": 1.0}, r"dropout of mola must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MoLAConfig(**settings)


@pytest.mark.parametrize(
    ("given", "targets", "message"),
    [
        ([2, 2, 2], ["q_proj"], r"layers.0.*q_proj: .*for each block of model.layers, which has 2, got 3"),
        ("2-4-6-8", ["q_proj"], r"q_proj: .*'2-4-6-8', makes 4 groups of the blocks of model.layers, which has 2"),
        ("2-4", ["lm_head"], "lm_head: .* this layer is in no list of blocks; list it in exclude_modules"),
    ],
)
def test_an_allocation_that_does_not_fit_the_model_is_refused_naming_the_layer(given, targets: list, message: str):
    with pytest.raises(ValueError, match=message):
        get_peft_model(decoder(tie_word_embeddings=False), MoLAConfig(experts=given, target_modules=targets))


def test_run_files_take_words_strings_and_lists():
    for given in ("2-4-6-8", "diamond", [2, 3], 4):
        recipe = Recipe.from_yaml(Recipe(MoLAConfig(experts=given)).to_yaml())
        assert recipe.techniques[0].config.experts == given
    with pytest.raises(SettingError, match="experts"):
        Recipe.from_list([{"mola": {"experts": 2.5}}])


@pytest.mark.slow
def test_the_packaged_encoder_learns_and_is_saved_and_loaded(tmp_path: Path):
    need("minilm", "rotten-tomatoes")
    folder = assets.model_folder("minilm")
    rows = assets.load_data("rotten-tomatoes")["train"].shuffle(seed=0).select(range(8))
    inputs = AutoTokenizer.from_pretrained(folder)(list(rows["text"]), padding=True, max_length=24, truncation=True)
    given = {name: torch.tensor(value) for name, value in inputs.items()} | {"labels": torch.tensor(rows["label"])}
    config = MoLAConfig(target_modules=["query", "value"], task_type="SEQ_CLS", r=4)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    with seeded(0):
        model = Recipe(config).apply(base).train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=5e-3)
    losses = []
    for _ in range(10):
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses
    model.eval().save_pretrained(tmp_path)
    fresh = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path).eval()(**given).logits, model(**given).logits)
