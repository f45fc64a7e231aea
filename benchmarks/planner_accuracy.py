"""How true the planner's predictions are: beside steps that were run, beside figures others published, and its cost.

    python benchmarks/planner_accuracy.py --json docs/results/planner_accuracy.json
    python benchmarks/planner_accuracy.py --only configurations --cases BERT LoRA

Every configuration is predicted without values, and run with values in a process of its own. Two measurements of it:
the ledger's peak of one step, and what the system says of another step of the same trainer, without a ledger: the
process's largest resident size above the one before the step. The latter holds what is no tensor, too: workspaces of
kernels, and whatever the interpreter allocates; pages that nothing is written to are not in it, as those of TRL's
buffer for 32,768 words where a model has 4,000. Freed tensors go back to the system at once (MALLOC_* in `ALONE`).

The planner's own time is the processor's, of the whole process with all imports, on one thread.
"""

import argparse
import copy
import gc
import json
import math
import multiprocessing
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
import transformers
from transformers import PretrainedConfig, Trainer, TrainerCallback, TrainingArguments

from result import Row, print_table, rows_beside, write
from shoestring.planning import advise, predict_model
from shoestring.planning.models import configuration
from shoestring.planning.prediction import ONE_STEP, without_printing, work_of, work_of_model
from shoestring.planning.rehearsal import Work, rehearse, run_one_step
from shoestring.training import RunSettings
from shoestring.training.trainer import RecipeTrainer

Recipe = Sequence[Any]
GIB, GB = 2**30, 1e9
MOST_ERROR, MOST_AT_95 = 0.05, 0.03

ALONE = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",  # larger blocks are the system's, and go back to it
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}

# Models: tiny ones of many architectures

WIDTH, WORDS = 256, 4000
SIZES = {"hidden_size": WIDTH, "num_attention_heads": 8, "vocab_size": WORDS}
ENCODER = {**SIZES, "intermediate_size": 1024, "max_position_embeddings": 512, "num_labels": 3}
DECODER = {**SIZES, "intermediate_size": 704, "max_position_embeddings": 2048}
GPT2_SIZES = {"vocab_size": WORDS, "n_embd": WIDTH, "n_head": 8, "n_positions": 512}
SEQ2SEQ = {"vocab_size": WORDS, "d_model": WIDTH}
BOTH = {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024}


def config_of(form: str, layers: int) -> PretrainedConfig:
    """One of `FORMS`, so deep; an encoder-decoder has so many blocks in each."""
    name, architecture, sizes = FORMS[form]
    depth = dict.fromkeys(DEPTHS.get(form, ("num_hidden_layers",)), layers)
    return getattr(transformers, name)(**sizes, **depth, architectures=[architecture])


FORMS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "BERT": ("BertConfig", "BertForSequenceClassification", ENCODER),
    "BERT, words masked": ("BertConfig", "BertForMaskedLM", ENCODER),
    "RoBERTa": ("RobertaConfig", "RobertaForSequenceClassification", ENCODER),
    "Llama": ("LlamaConfig", "LlamaForCausalLM", {**DECODER, "num_key_value_heads": 8}),
    "Llama, 16,000 words": ("LlamaConfig", "LlamaForCausalLM", {**DECODER, "vocab_size": 16000}),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**DECODER, "num_key_value_heads": 2}),
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", {**GPT2_SIZES, "bos_token_id": 0, "eos_token_id": 0}),
    "Gemma 3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**DECODER, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 64, "sliding_window_pattern": 2},
    ),
    "T5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**SEQ2SEQ, "d_kv": 32, "d_ff": 1024, "num_heads": 8, "decoder_start_token_id": 0},
    ),
    "BART": ("BartConfig", "BartForConditionalGeneration", {**SEQ2SEQ, **BOTH, "max_position_embeddings": 512}),
    "ViT": (
        "ViTConfig",
        "ViTForImageClassification",
        {"hidden_size": WIDTH, "intermediate_size": 1024, "num_attention_heads": 8, "image_size": 160},
    ),
    "Whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {**SEQ2SEQ, **BOTH, "max_source_positions": 200, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        | {"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
    ),
}
DEPTHS = {
    "GPT-2": ("n_layer",),
    "T5": ("num_layers", "num_decoder_layers"),
    "BART": ("encoder_layers", "decoder_layers"),
    "Whisper": ("encoder_layers", "decoder_layers"),
}


# Configurations: what is predicted and run


@dataclass(frozen=True)
class Case:
    """One run of one step.

    form: of `FORMS`. label: what it is about. trl: through a run file of the task causal-lm, with TRL's trainer.
    """

    form: str
    label: str
    recipe: Recipe = ()
    layers: int = 4
    batch: int = 4
    length: int = 128
    dtype: str = "float32"
    train: Mapping[str, Any] = field(default_factory=dict)
    trl: bool = False

    @property
    def name(self) -> str:
        """What it is called in the results."""
        shape = "" if self.form == "ViT" else f" x {self.length}"
        return f"{self.form} of {self.layers}, {self.batch}{shape}: {self.label}"

    def work(self, folder: str) -> Work:
        """The step; `folder` takes the model's configuration where a run file names one."""
        config = config_of(self.form, self.layers)
        if not self.trl:
            recipe = copy.deepcopy(list(self.recipe))
            dtype = getattr(torch, self.dtype)
            return work_of_model(
                config, recipe, batch=self.batch, length=self.length, dtype=dtype, train=dict(self.train)
            )
        config.save_pretrained(folder)
        sizes = {"per_device_train_batch_size": self.batch}
        run = {
            "model": {"name": folder, "dtype": self.dtype},
            "task": "causal-lm",
            "data": {"train": "rows.jsonl", "max_length": self.length},
            "recipe": copy.deepcopy(list(self.recipe)),
            "train": {**sizes, **self.train},
        }
        return work_of(RunSettings.from_dict(run), None, None)[0]


LORA = {"lora": {"r": 8, "target_modules": "all-linear"}}
GPT2_LORA = {"lora": {"r": 8, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}}
HUT = {"hut": {"r": 8, "target_modules": "all-linear"}}
CHECKPOINTS = {"gradient_checkpointing": True}
MOMENTUM = {"optim": "sgd", "optim_args": "momentum=0.9"}
PLAIN = "full tuning, AdamW"


def one(technique: str, **settings: Any) -> list[Any]:
    """A recipe of LoRA and one technique."""
    return [LORA, {technique: settings}]


CASES = (
    # full tuning, optimizers, precision
    Case("BERT", PLAIN),
    Case("BERT", PLAIN, layers=8, batch=8, length=64),
    Case("BERT", "full tuning, fused AdamW", train={"optim": "adamw_torch_fused"}),
    Case("BERT", "full tuning, SGD with momentum", train=MOMENTUM),
    Case("BERT", "full tuning, Adafactor", train={"optim": "adafactor"}),
    Case("BERT", "full tuning, bf16 autocast", train={"bf16": True}),
    Case("BERT, words masked", PLAIN),
    Case("RoBERTa", PLAIN, length=256, batch=2),
    Case("Llama", PLAIN),
    Case("Llama", "full tuning, bf16 weights", dtype="bfloat16"),
    Case("Llama", "full tuning, checkpoints", train=CHECKPOINTS),
    Case("Qwen2", "full tuning, 4 micro-batches", train={"gradient_accumulation_steps": 4}, batch=2),
    Case("GPT-2", "full tuning, Adafactor", train={"optim": "adafactor"}),
    Case("GPT-2", "full tuning, SGD with momentum", train=MOMENTUM),
    Case("Gemma 3", PLAIN, batch=2, length=256),
    Case("T5", PLAIN),
    Case("BART", PLAIN, layers=2),
    Case("ViT", PLAIN, batch=8),
    Case("Whisper", PLAIN, batch=2, length=64),
    # adapters
    Case("BERT", "LoRA", [LORA]),
    Case("BERT", "HUT", [HUT]),
    Case("BERT", "bottleneck", ["bottleneck"]),
    Case("RoBERTa", "LoRA, 2 micro-batches", [LORA], train={"gradient_accumulation_steps": 2}),
    Case("Llama", "LoRA", [LORA], layers=2),
    Case("Llama", "LoRA", [LORA], layers=12),
    Case("Llama", "LoRA, bf16 weights, bf16 autocast", [LORA], dtype="bfloat16", train={"bf16": True}),
    Case("Llama", "LoRA, bf16 weights, checkpoints", [LORA], dtype="bfloat16", train={**CHECKPOINTS, "bf16": True}),
    Case("Llama", "bottleneck", ["bottleneck"]),
    Case("Qwen2", "LoRA", [LORA], batch=8, length=64),
    Case("Qwen2", "HUT", [HUT]),
    Case("GPT-2", "LoRA", [GPT2_LORA]),
    Case("Gemma 3", "LoRA, checkpoints", [LORA], train=CHECKPOINTS, batch=2, length=256),
    Case("T5", "LoRA", [LORA]),
    Case("T5", "HUT, 2 micro-batches", [HUT], train={"gradient_accumulation_steps": 2}, layers=6, batch=2),
    Case("BART", "LoRA, checkpoints", [LORA], train=CHECKPOINTS),
    Case("ViT", "LoRA", [LORA], batch=8, layers=6),
    Case("Whisper", "LoRA", [LORA], batch=2, length=64),
    # techniques that keep less
    Case("Llama", "token_tune", one("token_tune", keep_fraction=0.25)),
    Case("BERT", "token_tune, full tuning", [{"token_tune": {"keep_fraction": 0.25}}]),
    Case("Llama", "reversible", one("reversible")),
    Case("BERT", "reversible", one("reversible"), layers=6),
    Case("Llama", "token_windows", one("token_windows", window_tokens=64), batch=1, length=512),
    Case("Llama", "recompute", one("recompute")),
    Case("BERT", "recompute, full tuning", ["recompute"], layers=8),
    Case("Qwen2", "recompute, attention kept", one("recompute", keep="attention")),
    Case("Llama", "offload to disk", one("offload", to="disk")),
    Case("Llama", "low_bit_activations of 8 bit", one("low_bit_activations")),
    Case("BERT", "low_bit_activations of 4 bit, full tuning", [{"low_bit_activations": {"bits": 4}}]),
    Case("BERT", "step_activation", one("step_activation")),
    Case("ViT", "step_activation, full tuning", ["step_activation"], batch=8),
    Case("Llama", "shared_norm, full tuning", ["shared_norm"]),
    Case("BERT", "shared_norm", one("shared_norm")),
    Case("Llama", "lean_mlp", one("lean_mlp")),
    Case("Llama, 16,000 words", "chunked_loss", one("chunked_loss"), layers=2),
    Case("Llama, 16,000 words", "LoRA", [LORA], layers=2),
    Case("Llama", "lora_fa", one("lora_fa")),
    Case("Llama", "exact_small", [*one("chunked_loss"), {"token_windows": {"window_tokens": 64}}], batch=1, length=512),
    # a run file, with TRL's trainer
    Case("Llama", "LoRA, TRL", [LORA], trl=True),
    Case("Llama, 16,000 words", "LoRA, chunked_loss, TRL", one("chunked_loss"), trl=True),
    Case("Qwen2", "full tuning, TRL, 2 micro-batches", trl=True, train={"gradient_accumulation_steps": 2}, batch=2),
    Case("GPT-2", "LoRA, checkpoints, TRL", [GPT2_LORA], trl=True, train=CHECKPOINTS),
    Case("Gemma 3", "LoRA, bf16 autocast, TRL", [LORA], trl=True, train={"bf16": True}),
)


def before_the_step(parts: Mapping[str, int]) -> int:
    """What is there when a step begins, of a peak by part."""
    return sum(parts[part] for part in ("weights", "optimizer_state", "inputs"))


def measured(case: Case) -> dict[str, int]:
    """Run in a process of its own: the ledger's peak of one step, and the growth of the process in another."""
    with TemporaryDirectory() as folder:
        work = case.work(folder)
        of_ledger = run_one_step(work).memory.peak_bytes
        gc.collect()
        return {"ledger": of_ledger, "process": growth_of_process(work)}


class Growth(TrainerCallback):
    """The largest resident size of the process in the last of a run's steps, above that before it."""

    def __init__(self) -> None:
        self.grown = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the largest size so far."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        self._before = status("VmRSS")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The largest since."""
        self.grown = status("VmHWM") - self._before


def status(field_name: str) -> int:
    """A field of the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field_name}:"))


def growth_of_process(work: Work, steps: int = 3) -> int:
    """`Growth` of the last of so many steps; the first ones warm up."""
    if not Path("/proc/self/clear_refs").exists():
        return 0
    growth = Growth()
    with TemporaryDirectory() as folder:
        model = work.recipe.apply(work.make_model())
        trainer = work.make_trainer(model, folder, [growth])
        trainer.args.max_steps = steps
        micro_batches = steps * trainer.args.gradient_accumulation_steps
        batches = [work.make_batch(model) for _ in range(micro_batches)]
        trainer.get_train_dataloader = lambda: batches
        trainer.train()
    return growth.grown


def configurations(options: argparse.Namespace) -> list[Row]:
    """One step of small models, as predicted and as it was."""
    chosen = [case for case in CASES if all(word in case.name for word in options.cases)]
    rows, errors, of_process = [], [], []
    for case, found in zip(chosen, answers("--measure", *(case.name for case in chosen)), strict=True):
        with TemporaryDirectory() as folder:
            memory = rehearse(case.work(folder)).memory
        error = memory.peak_bytes / found["ledger"] - 1
        errors.append(abs(error))
        rows.append(within(f"{case.name}: peak", memory.peak_bytes, found["ledger"], MOST_ERROR))
        text = f"{case.name}: {error:+.4%}"
        if found["process"]:
            above = memory.peak_bytes - before_the_step(memory.at_peak)
            rows.append(Row(f"{case.name}: above what is there before, by the process", above, found["process"]))
            of_process.append(abs(above / found["process"] - 1))
            text += f", beside the process {above / found['process'] - 1:+.2%}"
        print(text, flush=True)
    if errors:
        count = f"of {len(errors)} configurations"
        rows.append(error_row(f"error at the 95th percentile {count}", at_percentile(errors, 0.95), MOST_AT_95))
        rows.append(error_row(f"largest error {count}", max(errors), MOST_ERROR))
    if of_process:
        for share, name in ((0.5, "median"), (0.95, "at the 95th percentile"), (1.0, "largest")):
            rows.append(Row(f"error beside the process, {name}", at_percentile(of_process, share), 0.0))
    return rows


def at_percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all does not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def within(name: str, predicted: float, measured: float, most: float) -> Row:
    """A row whose goal is a relative error of at most `most`."""
    return Row(name, predicted, measured, f"within {most:.0%}", abs(predicted / measured - 1) <= most)


def error_row(name: str, error: float, most: float) -> Row:
    """A row whose goal is that an error is at most `most`."""
    return Row(name, error, 0.0, f"<= {most:g}", error <= most)


# Processes of this benchmark itself


def answers(*arguments: str) -> Iterator[dict[str, Any]]:
    """What a fresh process of this file prints, line by line.

    Raises RuntimeError if it fails.
    """
    command = [sys.executable, __file__, *arguments]
    with subprocess.Popen(command, env={**os.environ, **ALONE}, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        yield from (json.loads(line) for line in child.stdout if line.startswith("{"))
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}.")


def measure_each(names: Sequence[str]) -> None:
    """Print what each case took, measured in a process of its own, which has imported what this one has."""
    cases = {case.name: case for case in CASES}
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for name in names:
            print(json.dumps(pool.apply(measured, (cases[name],))), flush=True)


# Figures others published


class HoldsOutputs(RecipeTrainer):
    """A loop in which a name still holds the model's outputs while backward runs."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss; what came with it stays."""
        loss, self.outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (loss, self.outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward, after which the outputs may go."""
        loss = super().training_step(*args, **kwargs)
        del self.outputs
        return loss


def with_trainer(work: Work, cls: type[RecipeTrainer], **train: Any) -> Work:
    """The work in another trainer."""

    def make_trainer(model: Any, folder: str, callbacks: Sequence[TrainerCallback]) -> Trainer:
        arguments = TrainingArguments(**{**ONE_STEP, **train, "output_dir": folder})
        return without_printing(cls(model=model, args=arguments, train_dataset=[0], callbacks=list(callbacks)))

    return replace(work, make_trainer=make_trainer)


ATTENTION_LORA = {"lora": {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}}
PUBLISHED = (
    ("llama-3.1-8b", True, 20.55),
    ("llama-3.2-1b", False, 10.13),
    ("llama-3.2-3b", False, 18.98),
)


def published(options: argparse.Namespace) -> list[Row]:
    """LoRA of rank 16 on q, k, v and o, 2,048 tokens, bf16 weights, float32 adapters, on an A6000; 1e9 bytes.

    A loop without autocast, which is taken to be how the figures came about.
    """
    rows = []
    for model, checkpoints, figure in PUBLISHED:
        work = lora_work(model)
        train = {"gradient_checkpointing": checkpoints}
        name = f"{model}, {'' if checkpoints else 'no '}checkpoints, GB"
        for cls, how in ((HoldsOutputs, "outputs held in backward"), (RecipeTrainer, "outputs let go, as we do")):
            peak = rehearse(with_trainer(work, cls, **train)).memory.peak_bytes / GB
            goal = cls is HoldsOutputs  # the published script is such a loop
            rows.append(within(f"{name}, {how}", peak, figure, 0.05) if goal else Row(f"{name}, {how}", peak, figure))
    return rows


def lora_work(model: str, length: int = 2048) -> Work:
    config = configuration(f"known:{model}")
    return work_of_model(config, [ATTENTION_LORA], batch=1, length=length, dtype=torch.bfloat16)


# The planner itself


def planned(model: str) -> dict[str, float]:
    """Run in a process of its own: a prediction, and what it took."""
    train = {"gradient_checkpointing": True}
    began = time.process_time()
    peak = predict_model(model, [LORA], batch=1, length=2048, dtype=torch.bfloat16, train=train).peak_bytes
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = {"processor": used.ru_utime + used.ru_stime, "alone": time.process_time() - began}
    return {"peak": peak, "resident": used.ru_maxrss * 1024, **spent}


def searched(model: str) -> dict[str, float]:
    """Run in a process of its own: the largest batch and length of a run that fits, and the time they took to find."""
    run = {
        "model": {"name": model, "dtype": "bfloat16"},
        "task": "causal-lm",
        "data": {"train": "none.jsonl", "max_length": 2048},
        "recipe": [LORA],
        "train": {"per_device_train_batch_size": 1, "gradient_checkpointing": True},
    }
    found = advise(RunSettings.from_dict(run), 80 * GIB)
    used = resource.getrusage(resource.RUSAGE_SELF)
    sizes = {"batch": found.largest_batch or 0, "length": found.largest_length or 0}
    return {"processor": used.ru_utime + used.ru_stime, **sizes}


def planner(options: argparse.Namespace) -> list[Row]:
    """Time and memory of predicting LoRA with checkpoints, 2,048 tokens; whole processes, imports included."""
    (found,) = answers("--search", "known:llama-3.1-8b")
    of_search = "llama-3.1-8b in 80 GiB, the largest that fits"
    rows = [Row(f"{of_search}: processor seconds", found["processor"], 0.0, "< 60", found["processor"] < 60)]
    rows += [Row(f"{of_search}: {size}", found[size], 0.0) for size in ("batch", "length")]
    for model, most_seconds in (("llama-3.1-8b", 10), ("llama-3.1-70b", 20)):
        tries = []
        for _ in range(options.rounds):
            began = time.perf_counter()
            (found,) = answers("--plan", f"known:{model}")
            tries.append({**found, "wall": time.perf_counter() - began})
        spent, alone, wall = (min(found[key] for found in tries) for key in ("processor", "alone", "wall"))
        resident = max(found["resident"] for found in tries) / GIB
        rows.append(Row(f"{model}: processor seconds", spent, 0.0, f"<= {most_seconds}", spent <= most_seconds))
        rows.append(Row(f"{model}: processor seconds without imports", alone, 0.0))
        rows.append(Row(f"{model}: seconds by the clock, other work beside it", wall, 0.0))
        rows.append(Row(f"{model}: resident memory, GiB", resident, 0.0, "< 2", resident < 2))
    return rows


# On a GPU


def cuda(options: argparse.Namespace) -> list[Row]:
    """Models with random weights on a GPU, beside what its allocator counted."""
    if not torch.cuda.is_available():
        print("cuda: left out, there is no GPU here.")
        return []
    rows = []
    for model, checkpoints in (("llama-3.2-1b", False), ("llama-3.2-1b", True), ("llama-3.1-8b", True)):
        train = {"bf16": True, "gradient_checkpointing": checkpoints}
        work = with_trainer(lora_work(model), RecipeTrainer, **train)
        peak = rehearse(work).memory.peak_bytes
        found = run_one_step(on_cuda(lora_work(model), train)).memory.cuda_max_allocated_bytes
        name = f"{model}, {'' if checkpoints else 'no '}checkpoints, on {torch.cuda.get_device_name()}: peak"
        rows.append(within(name, peak, found or math.nan, 0.05))
        torch.cuda.empty_cache()
    return rows


def on_cuda(work: Work, train: Mapping[str, Any]) -> Work:
    """The work with its tensors on the GPU."""

    def there(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any) -> Any:
            with torch.device("cuda"):
                return make(*args)

        return made

    work = replace(work, make_model=there(work.make_model), make_batch=there(work.make_batch))
    return with_trainer(work, RecipeTrainer, **train, use_cpu=False)


PARTS = {f.__name__: f for f in (configurations, published, planner, cuda)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--cases", nargs="+", default=[], metavar="WORD", help="configurations with all of these")
    parser.add_argument("--rounds", type=int, default=2, help="times that the planner itself is timed")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    parser.add_argument("--search", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if options.measure:
        measure_each(options.measure)
        return
    if options.plan:
        print(json.dumps(planned(options.plan)))
        return
    if options.search:
        print(json.dumps(searched(options.search)))
        return
    rows = []
    for part in options.only:
        found = PARTS[part](options)
        print_table(found, f"{part}: {(PARTS[part].__doc__ or '').splitlines()[0]}")
        rows += found
    if options.json:
        write([*rows_beside(rows, options.json), *rows], options.json, rounds=options.rounds)


if __name__ == "__main__":
    main()
