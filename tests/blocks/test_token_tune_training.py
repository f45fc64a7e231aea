"""token_tune in whole runs: trainers, accumulation, resuming, and packaged models on packaged data."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from stock_models import WORDS, apart, gradients, made
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments, set_seed

from shoestring import Recipe
from shoestring.assets import load_data
from shoestring.blocks import Recompute, TokenTune
from shoestring.recipe import attached_to
from shoestring.testing.assets import need
from shoestring.training import RecipeCallback, RecipeTrainer, recipe_sft_trainer
from shoestring.training.run import prepare
from shoestring.training.settings import RunSettings

SFT = {"max_length": 32, "gradient_checkpointing": False, "bf16": False}  # TRL's own defaults are on


class Watch(TrainerCallback):
    """Keeps the gradients of each step, and what token_tune says of its last forward."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def rows(count: int = 16, prompts: bool = True) -> Dataset:
    """Token ids of 8 to 14 tokens, of which the first few have no label."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(3, WORDS, (8 + i % 7,), generator=generator).tolist() for i in range(count)]
    labels = [[-100] * (1 + i % 3) * prompts + ids[(1 + i % 3) * prompts :] for i, ids in enumerate(samples)]
    return Dataset.from_dict({"input_ids": samples, "labels": labels})


def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(s["input_ids"]) for s in samples)

    def padded(name: str, filler: int) -> Tensor:
        return torch.tensor([list(s[name]) + [filler] * (longest - len(s[name])) for s in samples])

    lengths = torch.tensor([len(s["input_ids"]) for s in samples])
    mask = (torch.arange(longest)[None] < lengths[:, None]).long()
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "seed": 0,
        **changes,
    }


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", unk_token="w3", eos_token="w2", bos_token="w1", model_max_length=64
    )


def trainer_of(kind: str, folder: Path, recipe: Recipe, watch: Watch | None = None, **changes: Any) -> Any:
    set_seed(0)
    model = recipe.apply(made("llama grouped"))
    callbacks = [watch] if watch is not None else []
    if kind == "SFTTrainer":
        from trl import SFTConfig

        arguments = SFTConfig(**settings(folder, **changes), **SFT)
        cls = recipe_sft_trainer()
        rest = {"processing_class": tokenizer(), "train_dataset": rows(prompts=False).remove_columns("labels")}
        return cls(model=model, args=arguments, callbacks=callbacks, **rest)
    cls = {"Trainer": Trainer, "RecipeTrainer": RecipeTrainer}[kind]
    callbacks += [RecipeCallback()] if kind == "Trainer" else []
    arguments = TrainingArguments(**settings(folder, **changes))
    return cls(model=model, args=arguments, callbacks=callbacks, train_dataset=rows(), data_collator=collate)


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


TRAINERS = ["Trainer", "RecipeTrainer", "SFTTrainer"]


@pytest.mark.parametrize("kind", TRAINERS)
def test_all_tokens_train_as_without_it(kind, tmp_path):
    plain, tuned = (
        trainer_of(kind, tmp_path, recipe, gradient_accumulation_steps=2)
        for recipe in (Recipe(), Recipe(TokenTune(keep_fraction=1.0)))
    )
    plain.train()
    tuned.train()
    assert losses(tuned) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.parametrize("kind", TRAINERS[1:])
def test_a_share_of_the_tokens_learns(kind, tmp_path):
    trainer = trainer_of(kind, tmp_path, Recipe(TokenTune(keep_fraction=0.4), Recompute()), max_steps=24)
    trainer.train()
    found = losses(trainer)
    assert sum(found[-4:]) < 0.9 * sum(found[:4])


@pytest.mark.parametrize("kind", TRAINERS)
def test_accumulated_losses_are_those_of_selected_tokens_weighed_by_labels(kind, tmp_path):
    """Each micro-batch counts by its labelled tokens; within it, the mean is over the selected ones."""
    watch, seen = Watch(), []
    trainer = trainer_of(
        kind, tmp_path, Recipe(TokenTune(keep_fraction=0.4)), watch, max_steps=1, gradient_accumulation_steps=3
    )
    technique = attached_to(trainer.model).techniques[0]
    begin = technique.begin

    def noting(current: Any) -> None:
        batch = {n: x.clone() for n, x in current.inputs.items() if isinstance(x, Tensor) and x.dim() == 2}
        begin(current)
        (selection,) = current.state.selections.values()
        seen.append((batch, selection.mask, technique.loss_share))

    technique.begin = noting
    trainer.train()
    assert len(seen) == 3
    (gradient,) = watch.gradients

    # the same by hand: keys and values of other tokens constant, so one more pass with the same draws
    fresh = made("llama grouped")
    supervised = [int((batch["labels"][:, 1:] != -100).sum()) for batch, _, _ in seen]
    with Recipe(TokenTune(keep_fraction=0.4))(fresh) as again:
        for (batch, mask, share), count in zip(seen, supervised, strict=True):
            loss = again(**{k: batch[k] for k in ("input_ids", "labels", "attention_mask")}).loss
            (loss * count / sum(supervised)).backward()
            selected = mask[:, :-1] & (batch["labels"][:, 1:] != -100)
            assert share == pytest.approx(float(selected.sum()) / count)
        assert apart(gradient, gradients(again)) < 1e-5


def test_a_trainer_that_divides_by_all_tokens_by_itself_is_refused(tmp_path):
    from trl import SFTConfig, SFTTrainer

    model = Recipe(TokenTune(keep_fraction=0.4)).apply(made("llama grouped"))
    rest = {"processing_class": tokenizer(), "train_dataset": rows().remove_columns("labels")}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings(tmp_path), **SFT),
        callbacks=[RecipeCallback()],
        **rest,
    )
    with pytest.raises(ValueError, match="recipe_sft_trainer"):
        trainer.train()


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_resumed_run_draws_and_ends_as_one_that_was_left_alone(kind, tmp_path):
    recipe = Recipe(TokenTune(keep_fraction=0.4, seed=3))
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(kind, tmp_path, recipe, **changes)
    whole.train()
    weights = {n: p.detach().clone() for n, p in whole.model.named_parameters()}
    drawn = attached_to(whole.model).techniques[0].state_dict()["generator"]
    again = trainer_of(kind, tmp_path, recipe, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(whole)
    assert torch.equal(attached_to(again.model).techniques[0].state_dict()["generator"], drawn)
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def packaged_run(tmp_path: Path, recipe: list[Any], **run: Any) -> tuple[Any, nn.Module]:
    run = {
        "recipe": recipe,
        "output_dir": str(tmp_path / "run"),
        "train": {"max_steps": 3, "per_device_train_batch_size": 4, "seed": 0, "logging_steps": 1},
        **run,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    ready = prepare(RunSettings.load(tmp_path / "run.yaml"))
    ready.trainer.train()
    return ready, ready.attached.model


def test_a_packaged_encoder_trains_on_packaged_reviews(tmp_path):
    need("minilm", "rotten-tomatoes")
    lora = {"lora": {"r": 4, "target_modules": ["query", "value"]}}
    ready, model = packaged_run(
        tmp_path,
        [lora, {"token_tune": {"keep_fraction": 0.3}}],
        model="packaged:minilm",
        task="text-classification",
        data={"train": "packaged:rotten-tomatoes", "max_train_rows": 32, "max_eval_rows": 8, "max_length": 48},
    )
    assert all(0 < loss < 5 for loss in losses(ready.trainer))
    assert all(p.any() for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.slow
def test_a_packaged_decoder_trains_on_text(tmp_path):
    need("smollm2", "rotten-tomatoes")
    lora = {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}
    lines = tmp_path / "text.jsonl"
    load_data("rotten-tomatoes")["train"].select(range(24)).select_columns(["text"]).to_json(lines)
    ready, model = packaged_run(
        tmp_path,
        [lora, {"token_tune": {"keep_fraction": 0.3}}, "recompute"],
        model="packaged:smollm2",
        task="causal-lm",
        data={"train": str(lines), "max_length": 48},
    )
    assert all(0 < loss < 8 for loss in losses(ready.trainer))
    assert all(p.any() for n, p in model.named_parameters() if "lora_B" in n)
