"""Light-PEFT in whole runs: resuming before and after the pruning, and the packaged encoder and decoder."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from shoestring import Recipe, assets, load
from shoestring.adapters import BottleneckConfig
from shoestring.errors import SettingError
from shoestring.memory.ledger import Ledger
from shoestring.optimizers import ParameterGroups
from shoestring.pruning import LightPEFT, load_pruned, save_pruned
from shoestring.pruning.light_peft import Plan
from shoestring.recipe import attached_to
from shoestring.technique import Moment
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import CLASSIFIER, seeded, step
from shoestring.training import RecipeTrainer, RunSettings, train

SETTINGS: dict[str, Any] = {"estimation_steps": 3, "channel_multiple": 4, "mask_lr_factor": 5.0}
ENCODER_TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def trainer(folder: Path, adapter: Any, seed: int = 1, beside: Any = (), **settings: Any) -> RecipeTrainer:
    with seeded(seed):
        model = Recipe(adapter, LightPEFT(**SETTINGS), *beside).apply(CLASSIFIER.make(dropout=0.1))
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.02,
        lr_scheduler_type="cosine",
        save_steps=1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    rows = [row for seed in range(6) for row in CLASSIFIER.rows(seed)]
    return RecipeTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "adapter",
    [CLASSIFIER.lora(), BottleneckConfig(form="parallel", r=6, init_weights=False, task_type="SEQ_CLS")],
    ids=["lora", "bottleneck"],
)
def test_a_run_that_is_resumed_ends_bit_for_bit_as_without_it(adapter: Any, tmp_path: Path):
    whole = trainer(tmp_path, adapter)
    whole.train()
    rates = {round(group["lr"], 9) for group in whole.optimizer.param_groups}
    wanted, losses = dict(whole.model.named_parameters()), whole.state.log_history
    assert next(t for t in attached_to(whole.model).techniques if isinstance(t, LightPEFT)).is_pruned
    for at in (2, 3, 5):  # before the pruning, just after it, and later
        again = trainer(tmp_path, adapter, seed=2)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        found = dict(again.model.named_parameters())
        assert found.keys() == wanted.keys()
        for name, parameter in wanted.items():
            assert torch.equal(parameter, found[name]), f"{name} differs after resuming at {at}"
        assert [r["loss"] for r in again.state.log_history if "loss" in r] == [r["loss"] for r in losses if "loss" in r]
        assert {round(group["lr"], 9) for group in again.optimizer.param_groups} == rates
        states, states_too = whole.optimizer.state_dict(), again.optimizer.state_dict()
        assert [group["params"] for group in states["param_groups"]] == [
            group["params"] for group in states_too["param_groups"]
        ]


@pytest.mark.parametrize("names", [["query"], r".*query.*|.*classifier.*bias"], ids=["all", "all that decays"])
def test_a_run_is_resumed_where_all_of_a_group_of_the_optimizer_was_pruned(names: Any, tmp_path: Path):
    # what does not learn adds nothing, and is pruned first; the masks are in a group of light_peft's
    beside = [ParameterGroups([{"names": names, "lr": 0.0}])]
    whole = trainer(tmp_path, CLASSIFIER.lora(task_type="SEQ_CLS"), beside=beside, weight_decay=0.1)
    whole.train()
    wanted = dict(whole.model.named_parameters())
    assert not [name for name in wanted if "query" in name and "lora" in name]
    for at in (2, 3, 5):
        again = trainer(tmp_path, CLASSIFIER.lora(task_type="SEQ_CLS"), seed=2, beside=beside, weight_decay=0.1)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        assert all(torch.equal(p, wanted[name]) for name, p in again.model.named_parameters())
        states = [each.optimizer.state_dict()["param_groups"] for each in (whole, again)]
        assert states[0] == states[1]


@pytest.mark.parametrize("names", [".*", ["layer.0"]])
def test_groups_by_names_leave_masks_in_their_own(names: Any, tmp_path: Path):
    beside = [ParameterGroups([{"names": names, "lr": 0.5}])]
    run = trainer(tmp_path, CLASSIFIER.lora(), beside=beside)
    rates = {id(p): group["lr"] for group in run.create_optimizer().param_groups for p in group["params"]}
    trained = {name: rates[id(p)] for name, p in run.model.named_parameters() if p.requires_grad}
    assert {rate for name, rate in trained.items() if "mask" in name} == {5 * 0.02}
    assert {rate for name, rate in trained.items() if "layer.0" in name and "mask" not in name} == {0.5}
    only_masks = trainer(tmp_path, CLASSIFIER.lora(), beside=[ParameterGroups([{"names": ".*mask", "lr": 0.5}])])
    with pytest.raises(SettingError, match="Two techniques of the recipe give one parameter optimizer options"):
        only_masks.create_optimizer()


@pytest.mark.parametrize("delay", [0, 3])
def test_a_best_checkpoint_of_the_estimation_is_told_of(delay: int, tmp_path: Path, recwarn: pytest.WarningsRecorder):
    best_first = {"metric_for_best_model": "eval_fake", "greater_is_better": False, "load_best_model_at_end": True}
    run = trainer(tmp_path, CLASSIFIER.lora(), eval_strategy="steps", eval_steps=1, eval_delay=delay, **best_first)
    plainly = run.evaluate

    def evaluate(*given: Any, **named: Any) -> dict[str, float]:
        return plainly(*given, **named) | {"eval_fake": float(run.state.global_step)}

    run.evaluate = evaluate  # type: ignore[method-assign]
    run.train()
    told = [str(each.message) for each in recwarn if "has pruned the model since" in str(each.message)]
    technique = next(t for t in attached_to(run.model).techniques if isinstance(t, LightPEFT))
    assert technique.is_pruned == (delay == 3)
    assert len(told) == (0 if technique.is_pruned else 1)
    assert all("load_best_model_at_end: false" in text and "estimation_steps, 3" in text for text in told)


def test_masks_have_a_learning_rate_of_their_own(tmp_path: Path):
    run = trainer(tmp_path, CLASSIFIER.lora())
    optimizer = run.create_optimizer()
    masks = [group for group in optimizer.param_groups if group["lr"] == pytest.approx(5 * 0.02)]
    assert [len(group["params"]) for group in masks] == [4]
    assert masks[0]["weight_decay"] == 0
    assert len({id(p) for group in optimizer.param_groups for p in group["params"]}) == sum(
        p.requires_grad for p in run.model.parameters()
    )


def ranges(seed: int, count: int = 32, shift: int = 0) -> dict[str, Tensor]:
    """Words, and which of three ranges of them is the most frequent; `shift` moves the ranges."""
    ids = torch.randint(3, 33, (count, 9), generator=torch.Generator().manual_seed(seed))
    words = (ids - 3 + shift) % 30 // 10
    labels = torch.stack([(words == c).sum(1) for c in range(3)], 1).argmax(1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_after_pruning(base: nn.Module, draw: int | None) -> float:
    """Estimation of 80 steps on ranges that were moved, then pruning: as estimated, or of units drawn at random.

    What stays keeps the mask values that it has learned, either way.
    """
    steps, shares = 80, dict.fromkeys(("removed_heads_fraction", "removed_channels_fraction"), 0.5)
    light = LightPEFT(estimation_steps=steps, channel_multiple=4, removed_modules_fraction=0.5, **shares)
    with seeded(1):
        model = Recipe(CLASSIFIER.lora(init_lora_weights=True), light).apply(copy.deepcopy(base)).train()
        attached = attached_to(model)
        technique = next(t for t in attached.techniques if isinstance(t, LightPEFT))
        (masks,) = technique.parameter_groups(model)
        known = {id(mask) for mask in masks["params"]}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        groups = [{"params": others}, {"params": masks["params"], "lr": 0.02}]
        optimizer = torch.optim.AdamW(groups, lr=5e-3, weight_decay=0)
        for index in range(steps):
            moment = Moment(model, optimizer, index)
            attached.event("on_step_begin", moment)
            step(model, ranges(5000 + index, shift=5))
            attached.event("on_gradients", moment)
            optimizer.step()
    if draw is not None:
        plan = drawn_plan(technique, torch.Generator().manual_seed(draw))
        technique._chosen = lambda: plan  # type: ignore[method-assign]
    technique.prune(optimizer)
    with torch.no_grad():
        return float(model.eval()(**ranges(10**6, 500, shift=5)).loss)


def drawn_plan(technique: LightPEFT, generator: torch.Generator) -> Plan:
    """A plan that keeps as much of every layer as the technique's own, other units; and as many adapters and ranks."""

    def drawn(number: int, count: int) -> Tensor:
        return torch.randperm(number, generator=generator)[:count].sort().values

    own, masks = technique._chosen(), technique._masks()
    units = {name: drawn(len(masks[name]), len(kept)) for name, (kept, _) in own.units.items()}
    counts = [len(ranks) for ranks in own.ranks.values()]
    order = torch.randperm(len(counts), generator=generator).tolist()
    sizes = {adapter.key: adapter.num_ranks for adapter in technique._adapters}
    ranks = {key: drawn(sizes[key], counts[place]) for key, place in zip(own.ranks, order, strict=True)}
    return Plan({name: (kept, masks[name].detach()[kept]) for name, kept in units.items()}, ranks)


@pytest.mark.slow
def test_what_is_pruned_is_chosen_better_than_at_random():
    base = CLASSIFIER.make()
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for index in range(150):
        step(base, ranges(index))
        optimizer.step()
    drawn = [loss_after_pruning(base, draw) for draw in range(4)]
    assert loss_after_pruning(base, None) < sum(drawn) / len(drawn) - 0.02


def reviews(light: dict[str, Any] | None, folder: Path, **fields: Any) -> RunSettings:
    need("minilm", "rotten-tomatoes")
    recipe: list[Any] = [{"lora": {"r": 8, "lora_alpha": 16, "target_modules": ENCODER_TARGETS}}]
    return RunSettings.from_dict(
        {
            "model": "packaged:minilm",
            "task": "text-classification",
            "data": {"train": "packaged:rotten-tomatoes", "max_length": 32, "max_train_rows": 64, "max_eval_rows": 16},
            "recipe": [*recipe, *([{"light_peft": light}] if light is not None else [])],
            "train": {
                "max_steps": 24,
                "per_device_train_batch_size": 16,
                "learning_rate": 2e-3,
                "logging_steps": 1,
                "eval_strategy": "no",
                "seed": 0,
                **fields,
            },
            "output_dir": str(folder),
        }
    )


@pytest.mark.slow
def test_a_packaged_encoder_learns_and_gets_smaller(tmp_path: Path):
    shares = {"removed_heads_fraction": 0.42, "removed_channels_fraction": 0.45}
    report = train(reviews({"estimation_steps": 8, **shares}, tmp_path / "run"))
    losses = [loss for _, loss in report.losses]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    base: Any = AutoModelForSequenceClassification.from_pretrained(assets.model_folder("minilm"))
    whole = sum(p.numel() for n, p in base.named_parameters() if ".layer." in n and p.dim() == 2)
    trained = load(base, tmp_path / "run" / "final")
    left = sum(p.numel() for n, p in trained.named_parameters() if ".layer." in n and p.dim() == 2 and "lora" not in n)
    assert left <= 0.6 * whole
    save_pruned(trained, tmp_path / "small")
    smaller = load_pruned(AutoModelForSequenceClassification, tmp_path / "small")
    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder("minilm"))
    batch = tokenizer(["a fine film", "dull, and too long by half"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(smaller(**batch).logits, trained.eval()(**batch).logits, atol=1e-4)


@pytest.mark.slow
def test_a_packaged_decoder_gets_smaller_and_generates(tmp_path: Path):
    need("smollm2")
    folder = assets.model_folder("smollm2")
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")
    light = LightPEFT(estimation_steps=2, removed_heads_fraction=1 / 3, removed_channels_fraction=0.5)
    model: Any = Recipe(lora, light).apply(base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The cat sat on the mat, and looked at the birds in the tree.", return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def peak(index: int) -> int:
        attached_to(model).event("on_step_begin", Moment(model, optimizer, index))
        with Ledger(model, optimizer) as ledger:
            step(model, {"input_ids": ids, "labels": ids})
            attached_to(model).event("on_gradients", Moment(model, optimizer, index))
            optimizer.step()
        attached_to(model).event("on_step_end", Moment(model, optimizer, index + 1))
        return ledger.report().peak_bytes

    whole = numbers_in_blocks(model)
    peaks = [peak(index) for index in range(3)]
    assert peaks[2] < 0.8 * peaks[1]
    assert numbers_in_blocks(model) < 0.6 * whole
    save_pruned(model, tmp_path)
    smaller: Any = load_pruned(AutoModelForCausalLM, tmp_path)
    said = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(smaller.generate(ids, **said), model.eval().generate(ids, **said))


def numbers_in_blocks(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2 and "lora" not in n)
