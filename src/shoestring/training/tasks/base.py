"""The base of tasks: loading a model, turning rows into model inputs, and measuring quality."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import SettingError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import Trainer, TrainingArguments

    from ...recipe import Recipe
    from ..settings import DataSettings, RunSettings

PROBE_TOKENS = 128
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class QuicklyHashed:
    """A tokenizer for what `datasets` maps over rows, which names results by a hash of all that a function uses.

    It would pickle the tokenizer word by word, which takes seconds for each split.
    """

    tokenizer: Any

    def __call__(self, *texts: Any, **options: Any) -> Any:
        return self.tokenizer(*texts, **options)

    def __reduce__(self) -> tuple[Any, ...]:  # for the hash only: nothing is made of it again
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:  # no fast one
            return QuicklyHashed, (tokenizer,)
        about = (type(tokenizer).__name__, backend.to_str(), tokenizer.truncation_side, tokenizer.model_max_length)
        return QuicklyHashed, (*about, tokenizer.model_input_names, tokenizer.special_tokens_map)


class Task(ABC):
    """One task of one run. `columns` and the class methods are known before anything is loaded.

    name: how run files call it.
    peft_task_type: what peft calls it, so that heads are trained and saved with adapters; "" where it has no word.
    metric: the measure a best model is chosen by, as Trainer logs it; higher_is_better says which way.
    measures: all that `quality` may give of any model; derived: those of them that the trainer does not log.
    scores_rows: whether `scores` gives one for each row, and not one for a batch.
    """

    name: ClassVar[str]
    peft_task_type: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    measures: ClassVar[tuple[str, ...]] = ("loss",)
    derived: ClassVar[frozenset[str]] = frozenset()
    scores_rows: ClassVar[bool] = False
    batch_extras: ClassVar[frozenset[str]] = frozenset()  # what batches hold beside the model's inputs
    takes_images: ClassVar[bool] = False  # and so no tokens
    classes: Any = None  # of a classification, once known: labels.Classes
    limit: int | None = None  # the most tokens that the model takes, once known

    def __init__(self, settings: RunSettings):
        self.settings = settings

    @classmethod
    @abstractmethod
    def auto_class(cls) -> Any:
        """The class of transformers that loads models for this task."""

    @classmethod
    def arguments_class(cls) -> type[TrainingArguments]:
        """The dataclass whose fields a run file's `train` may hold."""
        from transformers import TrainingArguments

        return TrainingArguments

    @classmethod
    def measures_of(cls, settings: RunSettings) -> tuple[str, ...]:
        """Those of `measures` that a run gives."""
        return cls.measures

    def argument_defaults(self) -> dict[str, Any]:
        """Arguments of the trainer that differ from its own defaults for this task."""
        return {}

    def rehearsal_arguments(self) -> dict[str, Any]:
        """Arguments that keep the trainer from preparing data where a step is only rehearsed."""
        return {}

    @abstractmethod
    def check_columns(self, split: str, dataset: Dataset) -> None:
        """Refuse a data set that lacks a column, holds no rows, or has values the task cannot use.

        Raises SettingError naming the split, the column and what there is.
        """

    @abstractmethod
    def load(self, data: DatasetDict) -> tuple[Any, Any]:
        """The pretrained model and its tokenizer or processor, fit for the labels in `data`."""

    def prepare(self, data: DatasetDict, model: Any, processor: Any) -> DatasetDict:
        """The rows as model inputs."""
        return data

    def model_inputs(self, data: DatasetDict, processor: Any) -> DatasetDict:
        """The prepared rows with the ids that the model will get, for techniques that read the data."""
        return data

    def probe(self, data: DatasetDict, model: Any, processor: Any) -> dict[str, Any]:
        """The few rows of `data["train"]` as one batch of model inputs, to compare models with; of text by default."""
        rows = self.model_inputs(self.prepare(data, model, processor), processor)["train"]
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
        length = min(PROBE_TOKENS, self.limit or PROBE_TOKENS)
        kept = {name: [row[:length] for row in rows[name]] for name in TEXT_INPUTS if name in rows.column_names}
        return dict(processor.pad(kept, return_tensors="pt"))

    @abstractmethod
    def trainer(self, **kwargs: Any) -> Trainer:
        """A trainer of transformers or TRL in which a recipe rides along."""

    def quality(self, metrics: dict[str, float], prefix: str) -> dict[str, float]:
        """The measures to report, out of what the trainer's `evaluate` gave under `prefix`."""
        return {
            name.removeprefix(f"{prefix}_"): value
            for name, value in metrics.items()
            if name.startswith(f"{prefix}_")
            and not name.endswith(("_runtime", "_per_second", "_num_tokens", "_preparation_time"))
        }

    def scores(self, loss: Any, predictions: Any, labels: Any) -> list[float]:
        """How well each row of an evaluation batch is done, higher is better; by default one score for the batch.

        loss, predictions, labels: what the trainer's `prediction_step` gives.
        """
        return [] if loss is None else [-float(loss)]

    def set_up_recipe(self, recipe: Recipe) -> None:
        """Tell the outermost technique that can train a new head what the task is; refuse what finds no data here."""
        self.check_extras(recipe)
        for technique in reversed(recipe.techniques):
            if technique.set_task(self.peft_task_type):
                break

    def check_extras(self, recipe: Recipe) -> None:
        """Refuse techniques that read of a batch what this task does not put there.

        Raises SettingError.
        """
        for technique in recipe.techniques:
            if missing := technique.reads_of_batch - self.batch_extras:
                raise SettingError(
                    f"{technique.name} reads {', '.join(sorted(missing))} of a batch, which the task {self.name} does "
                    "not have; use a task that does, or leave it out."
                )

    @property
    def data(self) -> DataSettings:
        """The `data` section of the run file."""
        return self.settings.data
