"""BA-LoRA in Trainer, RecipeTrainer and TRL's SFTTrainer, and on the packaged models."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from shoestring.objectives import BALora
from shoestring.objectives.logit_terms import divergence, negative_entropy
from shoestring.recipe import Recipe
from shoestring.testing.assets import need
from shoestring.training import RecipeCallback, RecipeTrainer, RunSettings, recipe_sft_trainer, train

SETTINGS = {"consistency": 0.6, "diversity": 0.2, "concentration": 0.0, "top_words": 30}
ROWS = [[(7 * i + j) % 30 + 6 for j in range(5 + i % 3)] for i in range(16)]
QUIET: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
STEP: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.0,
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "logging_steps": 1,
}


def tuned(folder: Path, *techniques: BALora, start: Any = "pissa") -> Any:
    set_seed(0)
    lora = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=start)
    model = Recipe(lora, *techniques).apply(AutoModelForCausalLM.from_pretrained(folder))
    with torch.no_grad():  # away from the teacher
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def trainer(kind: str, folder: Path, model: Any, out: Path, **settings: Any) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = Dataset.from_dict({"input_ids": ROWS, "labels": ROWS})
    given = {**STEP, **QUIET, **settings}
    if "SFT" in kind:
        from trl import SFTConfig, SFTTrainer

        made, arguments = (recipe_sft_trainer() if kind == "RecipeSFT" else SFTTrainer), SFTConfig(str(out), **given)
        rest: dict[str, Any] = {"processing_class": tokenizer}
    else:
        made, arguments = (RecipeTrainer if kind == "Recipe" else Trainer), TrainingArguments(str(out), **given)
        rest = {"data_collator": DataCollatorForSeq2Seq(tokenizer)}
    callbacks = [] if kind.startswith("Recipe") else [RecipeCallback()]
    return made(model, arguments, train_dataset=data, callbacks=callbacks, **rest)


def expected_change(folder: Path, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A step of SGD on the mean over all labelled tokens plus the mean of the terms, each written out."""
    model, plain = tuned(folder).train(), AutoModelForCausalLM.from_pretrained(folder).eval()
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        counted = batch["labels"][:, 1:] != -100
        z = model(**inputs).logits[:, :-1][counted]
        with torch.no_grad():
            t = plain(**inputs).logits[:, :-1][counted]
        loss = F.cross_entropy(z, batch["labels"][:, 1:][counted], reduction="sum") / count
        added = (0.6 * divergence(z, t, 2.0) + 0.2 * negative_entropy(z, 30)) / len(z)
        (loss + added / len(batches)).backward()
    return {name: -0.5 * p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["plain", "Recipe", "RecipeSFT"])
def test_a_step_in_a_trainer_is_that_of_the_loss_written_out(kind, tiny_decoder_folder, tmp_path):
    model = tuned(tiny_decoder_folder, BALora(**SETTINGS))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    made = trainer(kind, tiny_decoder_folder, model, tmp_path)
    batches: list[dict[str, Tensor]] = []
    collate = made.data_collator
    made.data_collator = lambda rows: batches.append(collate(rows)) or batches[-1]
    made.train()
    wanted = expected_change(tiny_decoder_folder, batches[:2])
    assert wanted.keys() == start.keys()
    for name, parameter in model.named_parameters():
        if name in start:
            torch.testing.assert_close(parameter - start[name], wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_checkpointing": False}], ids=str)
def test_trl_trains_the_model_by_logits_of_its_own_head(settings, tiny_decoder_folder, tmp_path):
    model = tuned(tiny_decoder_folder, BALora(top_words=30, num_singular=3))
    made = trainer("RecipeSFT", tiny_decoder_folder, model, tmp_path, max_steps=3, optim="adamw_torch", **settings)
    forwards = []
    model.register_forward_hook(lambda *seen: forwards.append(torch.is_grad_enabled()))
    made.train()
    assert forwards == [True, False] * 6, "one forward of the model and one of the teacher for each micro-batch"
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_plain_sft_trainer_is_refused(tiny_decoder_folder, tmp_path):
    made = trainer("SFT", tiny_decoder_folder, tuned(tiny_decoder_folder, BALora(top_words=30)), tmp_path)
    with pytest.raises(ValueError, match=r"recipe_sft_trainer\(\)"):
        made.train()


def reviews(folder: Path, recipe: list[Any], **train_fields: Any) -> RunSettings:
    need("minilm", "rotten-tomatoes")
    data = {"train": "packaged:rotten-tomatoes", "max_length": 32, "max_train_rows": 32, "max_eval_rows": 16}
    fields = {"max_steps": 14, "per_device_train_batch_size": 16, "learning_rate": 2e-3, "seed": 0, "logging_steps": 1}
    return RunSettings.from_dict(
        {
            "model": "packaged:minilm",
            "task": "text-classification",
            "data": data,
            "recipe": recipe,
            "train": {**fields, "eval_strategy": "no", **train_fields},
            "output_dir": str(folder / "run"),
        }
    )


PISSA = {"r": 8, "lora_alpha": 8, "target_modules": ["query", "value", "dense"], "init_lora_weights": "pissa"}


@pytest.mark.slow
def test_the_packaged_encoder_learns_with_it(tmp_path):
    report = train(reviews(tmp_path, [{"lora": PISSA}, "ba_lora"]))
    losses = [loss for _, loss in report.losses]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses


@pytest.mark.slow
def test_the_packaged_decoder_learns_with_it_and_stays_nearer_to_its_start(tmp_path):
    """The divergence from the pretrained model after training, with the term and without it."""
    need("smollm2")
    from shoestring import assets

    folder = assets.model_folder("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["The answer is seven, said the fox.", "The answer is nine, said the owl.", "No answer came from the sea."]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    counted = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(folder)(**batch).logits[:, :-1][counted]

    def run(*techniques: BALora) -> tuple[list[float], float]:
        set_seed(0)
        lora = LoraConfig(
            r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa"
        )
        model = Recipe(lora, *techniques).apply(AutoModelForCausalLM.from_pretrained(folder)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(6):
            outputs = model(**batch)
            losses.append(
                float(F.cross_entropy(outputs.logits.detach()[:, :-1][counted], batch["labels"][:, 1:][counted]))
            )
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return losses, float(divergence(model.eval()(**batch).logits[:, :-1][counted], before)) / len(before)

    (losses, near), (_, far) = run(BALora(consistency=2.0)), run()
    assert losses[-1] < 0.8 * losses[0]
    assert near < 0.8 * far
