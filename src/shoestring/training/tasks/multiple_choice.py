"""Multiple choice: pick one of some answers to a prompt by how likely a language model finds each of them."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import SettingError
from ...real_tokens import NO_LABEL
from ..data import need_columns, need_texts
from ..models import check_length, load_pretrained, max_positions
from .base import QuicklyHashed, Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import Trainer

    from ...recipe import Recipe


class AutoModelForChoices:
    """Loads language models: encoder-decoder models as such, all others as causal ones."""

    class _Classes:
        def __getitem__(self, config_class: type) -> Any:
            return _auto_class(config_class)._model_mapping[config_class]

    _model_mapping = _Classes()

    @classmethod
    def from_pretrained(cls, source: str, **options: Any) -> Any:
        """The model in a folder or of a hub id."""
        from transformers import AutoConfig

        files = {name: options[name] for name in ("revision",) if name in options}
        return _auto_class(type(AutoConfig.from_pretrained(source, **files))).from_pretrained(source, **options)

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> Any:
        """A model with start values."""
        return _auto_class(type(config)).from_config(config, **options)


def _auto_class(config_class: type) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    both: Any = (AutoModelForSeq2SeqLM, AutoModelForCausalLM)
    return next((auto for auto in both if config_class in auto._model_mapping), AutoModelForCausalLM)


class MultipleChoice(Task):
    """Reads data.prompt or data.template, data.choices (a column of lists, or a list for all rows), and data.label.

    The label is the number of the right choice, or its text. Evaluation ranks the choices by their mean log-likelihood
    a token; training learns the right one, and what a technique of the recipe makes of the wrong ones.
    """

    name = "multiple-choice"
    peft_task_type = ""  # depends on the model, and peft needs none
    metric = "accuracy"
    scores_rows = True
    higher_is_better = True
    measures = ("accuracy", "loss")
    batch_extras = frozenset({"choices"})

    @classmethod
    def auto_class(cls) -> Any:
        return AutoModelForChoices

    def argument_defaults(self) -> dict[str, Any]:
        return {"remove_unused_columns": False}  # which are no inputs of the model before they are put together

    def set_up_recipe(self, recipe: Recipe) -> None:
        self.check_extras(recipe)

    @property
    def _fields(self) -> list[str]:
        """The columns that make up what is given."""
        template = self.data.template
        found = [] if template is None else [name for _, name, _, _ in string.Formatter().parse(template) if name]
        return found if template is not None else [self.data.prompt]

    def check_columns(self, split: str, dataset: Dataset) -> None:
        if not self._fields:
            raise SettingError(
                f"data.template must name a column, as in 'Question: {{question}}', got {self.data.template!r}."
            )
        column = self.data.choices if isinstance(self.data.choices, str) else None
        need_columns(split, dataset, *self._fields, self.data.label, column)
        if self.data.template is None:
            need_texts(split, dataset, self.data.prompt)

    def load(self, data: DatasetDict) -> tuple[Any, Any]:
        model, tokenizer = load_pretrained(self.settings.model, self.auto_class())
        self.limit = max_positions(model, tokenizer)
        check_length(self.data.max_length, self.limit)
        if tokenizer.eos_token_id is None:
            raise SettingError(f"{self.settings.model.name} has no token for the end of an answer.")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return model, tokenizer

    def prepare(self, data: DatasetDict, model: Any, processor: Any) -> DatasetDict:
        both = bool(model.config.is_encoder_decoder)
        tokenizer, first = QuicklyHashed(processor), processor.bos_token_id
        for split, dataset in data.items():

            def encode(row: dict[str, Any], index: int, split: str = split) -> dict[str, Any]:
                choices, answer = self._choices(row, f"Row {index} of {split}")
                answers = [_answer_ids(tokenizer, text, both, f"Row {index} of {split}") for text in choices]
                room = (self.data.max_length or self.limit or 10**9) - (0 if both else max(map(len, answers)))
                if room < 1:
                    raise SettingError(
                        f"Row {index} of {split} has an answer of {max(map(len, answers))} tokens, which leaves none "
                        "of data.max_length for the prompt; raise it."
                    )
                text = self.data.template.format(**row) if self.data.template is not None else row[self.data.prompt]
                prompt = _cut(tokenizer(text)["input_ids"], room, first)
                return {"prompt_ids": prompt, "choice_ids": answers, "answer": answer}

            data[split] = dataset.map(
                encode, with_indices=True, remove_columns=dataset.column_names, desc=f"tokens of {split}"
            )
        return data

    def model_inputs(self, data: DatasetDict, processor: Any) -> DatasetDict:
        """A row for each choice, since all of them are run."""

        def rows(batch: dict[str, list]) -> dict[str, list]:
            pairs = [
                (prompt, ids)
                for prompt, choices in zip(batch["prompt_ids"], batch["choice_ids"], strict=True)
                for ids in choices
            ]
            return {
                "input_ids": [prompt + ids for prompt, ids in pairs],
                "labels": [[NO_LABEL] * len(prompt) + ids for prompt, ids in pairs],
            }

        made = {
            name: dataset.map(rows, batched=True, remove_columns=dataset.column_names) for name, dataset in data.items()
        }
        return type(data)(made)

    def scores(self, loss: Any, predictions: Any, labels: Any) -> list[float]:
        return [] if predictions is None else (predictions == labels).double().tolist()

    def trainer(self, **kwargs: Any) -> Trainer:
        from ..choice_trainer import ChoiceTrainer, rank_accuracy

        config, tokenizer = kwargs["model"].config, kwargs["processing_class"]
        start = getattr(config, "decoder_start_token_id", None) if config.is_encoder_decoder else None
        collator = ChoiceCollator(tokenizer.pad_token_id, start)
        return ChoiceTrainer(data_collator=collator, compute_metrics=rank_accuracy, **kwargs)

    def _choices(self, row: dict[str, Any], where: str) -> tuple[list[str], int]:
        """The answers of a row, and the number of the right one.

        Raises SettingError if there are fewer than two, or the label is none of them.
        """
        choices = row[self.data.choices] if isinstance(self.data.choices, str) else self.data.choices
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(text, str) for text in choices):
            raise SettingError(f"{where} must have at least two answers to choose from, as texts, got {choices!r}.")
        label = row[self.data.label]
        if isinstance(label, str) and label in choices:
            return choices, choices.index(label)
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
            raise SettingError(
                f"{where} has the label {label!r} in {self.data.label!r}, which is out of range: it must be one of the "
                f"{len(choices)} choices, by number from 0 or by text."
            )
        return choices, label


def _answer_ids(tokenizer: QuicklyHashed, text: str, alone: bool, where: str) -> list[int]:
    """The tokens of an answer with the end token; not `alone`, it follows a prompt and begins with a space."""
    ids = tokenizer(text if alone or text[:1].isspace() else f" {text}", add_special_tokens=False)["input_ids"]
    if not text.strip() or not ids:
        raise SettingError(f"{where} has an answer without tokens: {text!r}.")
    return [*ids, tokenizer.tokenizer.eos_token_id]


def _cut(ids: list[int], room: int, first: int | None) -> list[int]:
    """The last tokens of a prompt, which end in what is asked; a token that begins all sequences stays."""
    if len(ids) <= room:
        return ids
    return [ids[0], *ids[len(ids) - room + 1 :]] if first is not None and ids[0] == first else ids[-room:]


@dataclass(frozen=True)
class ChoiceCollator:
    """Puts examples together to a batch with a row for each choice, as `objectives.choice_rows` describes it.

    pad_id: what fills rows up. decoder_start_id: of a decoder beside an encoder; None for a decoder alone.
    """

    pad_id: int
    decoder_start_id: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch; `labels` are those of right answers only, since they are what the model's own loss is of."""
        rows = [(n, e["prompt_ids"], ids, i == e["answer"]) for n, e in enumerate(examples) for i, ids in _numbered(e)]
        is_answer = torch.tensor([right for *_, right in rows])
        if self.decoder_start_id is None:
            inputs = [[*prompt, *ids] for _, prompt, ids, _ in rows]
            answers = [[*[NO_LABEL] * len(prompt), *ids] for _, prompt, ids, _ in rows]
        else:
            inputs, answers = [prompt for _, prompt, _, _ in rows], [ids for _, _, ids, _ in rows]
        labels = _padded(answers, NO_LABEL)
        batch = {
            "input_ids": _padded(inputs, self.pad_id),
            "attention_mask": _padded([[1] * len(row) for row in inputs], 0),
            "labels": labels.masked_fill(~is_answer[:, None], NO_LABEL),
            "choice_labels": labels,
            "example": torch.tensor([number for number, *_ in rows]),
            "is_answer": is_answer,
        }
        if self.decoder_start_id is not None:  # a model would make it of `labels`, which wrong answers do not have
            shifted = [[self.decoder_start_id, *ids[:-1]] for ids in answers]
            batch["decoder_input_ids"] = _padded(shifted, self.pad_id)
            batch["decoder_attention_mask"] = (labels != NO_LABEL).long()
        return batch


def _numbered(example: dict[str, Any]) -> Any:
    return enumerate(example["choice_ids"])


def _padded(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
