"""Causal language modelling: continue a prompt, a chat or plain text, through TRL's SFTTrainer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sized
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import RunFailed, SettingError
from ...real_tokens import NO_LABEL
from ..data import need_columns, need_texts
from ..models import check_length, load_pretrained, max_positions
from .base import Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import Trainer, TrainingArguments

    from ..settings import RunSettings


class CausalLM(Task):
    """Reads data.messages (chats), or data.prompt and data.completion, or data.text: the first of them the data has.

    The loss counts completions only where there are prompts. `data.chat: true` writes prompt and completion as turns of
    the model's chat template.
    """

    name = "causal-lm"
    peft_task_type = "CAUSAL_LM"
    metric = "loss"
    higher_is_better = False
    measures = ("loss", "perplexity", "mean_token_accuracy")
    derived = frozenset({"perplexity"})

    @classmethod
    def measures_of(cls, settings: RunSettings) -> tuple[str, ...]:
        train = settings.train
        plain = train.get("loss_type") != "dft" and not train.get("label_smoothing_factor")  # the loss: mean of -log p
        return cls.measures if plain else tuple(name for name in cls.measures if name != "perplexity")

    @classmethod
    def auto_class(cls) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    @classmethod
    def arguments_class(cls) -> type[TrainingArguments]:
        try:
            from trl import SFTConfig
        except ImportError:
            raise SettingError(
                "The task causal-lm trains with trl, which is missing: pip install 'shoestring[trl]'"
            ) from None
        return SFTConfig

    def argument_defaults(self) -> dict[str, Any]:
        return {"max_length": self.data.max_length or min(1024, self.limit or 1024)}

    def rehearsal_arguments(self) -> dict[str, Any]:
        words = dict.fromkeys(("eos_token", "pad_token", "chat_template_path"))  # of a tokenizer that is not there
        return {"dataset_kwargs": {"skip_prepare_dataset": True}, "assistant_only_loss": False, **words}

    def _columns(self, dataset: Dataset) -> dict[str, str]:
        """The columns that are read, with the names TRL knows them by."""
        for form in (("messages",), ("prompt", "completion"), ("text",)):
            columns = {getattr(self.data, name): name for name in form}
            if all(column in dataset.column_names for column in columns):
                return columns
        return {}

    def check_columns(self, split: str, dataset: Dataset) -> None:
        columns = self._columns(dataset)
        if not columns:
            data = self.data
            raise SettingError(
                f"The {split} data needs a column {data.messages!r}, or {data.prompt!r} and {data.completion!r}, or "
                f"{data.text!r}; it has {', '.join(dataset.column_names)}. Name yours under data."
            )
        from datasets import Value

        need_columns(split, dataset, *columns)
        need_texts(split, dataset, *(name for name in columns if isinstance(dataset.features[name], Value)))

    def load(self, data: DatasetDict) -> tuple[Any, Any]:
        model, tokenizer = load_pretrained(self.settings.model, self.auto_class())
        self._set_up(model, tokenizer)
        chats = self.data.chat or "messages" in self._columns(data["train"]).values()
        if chats and tokenizer.chat_template is None:
            raise SettingError(
                f"{self.settings.model.name} has no chat template, which chats need; use prompt and completion columns "
                "without data.chat, or set train.chat_template_path."
            )
        self.limit = max_positions(model, tokenizer)
        check_length(self.data.max_length, self.limit)
        return model, tokenizer

    def _set_up(self, model: Any, tokenizer: Any) -> None:
        """Give tokenizer and model the chat template and the end of a text that `train` names, as TRL does later.

        Raises SettingError for what is no file of a template, and for a token that is not in the vocabulary.
        """
        if (template := self.settings.train.get("chat_template_path")) is not None:
            path = Path(template)
            if path.suffix not in (".jinja", ".j2") or not path.is_file():
                raise SettingError(
                    f"train.chat_template_path must be a file .jinja or .j2, got {template!r}; tokens that "
                    "the template of another model adds would need embeddings of their own."
                )
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        if (end := self.settings.train.get("eos_token")) is not None:
            if end not in tokenizer.get_vocab():
                raise SettingError(f"train.eos_token must be a token that {self.settings.model.name} has, got {end!r}.")
            tokenizer.eos_token = end
            model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
            known = model.generation_config.eos_token_id
            known = [] if known is None else known if isinstance(known, list) else [known]
            others = [token for token in known if token != tokenizer.eos_token_id]
            model.generation_config.eos_token_id = [tokenizer.eos_token_id, *others]

    def prepare(self, data: DatasetDict, model: Any, processor: Any) -> DatasetDict:
        for split, dataset in data.items():
            columns = self._columns(dataset)
            dataset = dataset.select_columns(list(columns)).rename_columns(
                {mine: trl for mine, trl in columns.items() if mine != trl}
            )
            if self.data.chat and "prompt" in dataset.column_names:
                dataset = dataset.map(as_turns, remove_columns=dataset.column_names, desc=f"chats of {split}")
            data[split] = dataset
        return data

    def model_inputs(self, data: DatasetDict, processor: Any) -> DatasetDict:
        """The rows as TRL encodes, labels and cuts them, less those that the cut leaves without a label.

        Rows that are to be packed are whole, for packing cuts them elsewhere.
        """
        train, encode = self.settings.train, self._encoder(processor)
        length, packing = self.argument_defaults()["max_length"], bool(train.get("packing"))
        cut = slice(-length, None) if train.get("truncation_mode") == "keep_end" else slice(length)
        made = {}
        for split, rows in data.items():
            of_split = packing if split == "train" or train.get("eval_packing") is None else train["eval_packing"]
            options = {"cut": slice(None) if of_split else cut}
            encoded = rows.map(encode, fn_kwargs=options, remove_columns=rows.column_names)
            labelled = encoded.filter(lambda row: any(label != NO_LABEL for label in row["labels"]))
            made[split] = labelled if len(labelled) else encoded  # of a split without any the trainer tells
        return type(data)(made)

    def _encoder(self, processor: Any) -> Callable[..., dict[str, list[int]]]:
        """What makes a row's ids and labels, as TRL does, and cuts them."""
        train, template = self.settings.train, None
        end = processor.eos_token or ""
        prompts_count = train.get("completion_only_loss") is False
        answers_alone = train.get("assistant_only_loss", False)
        if answers_alone:
            from trl import get_training_chat_template

            template = get_training_chat_template(processor)

        def encoded(text: Any, **options: Any) -> Any:
            if isinstance(text, str):
                return processor(text)
            return processor.apply_chat_template(text, return_dict=True, chat_template=template, **options)

        def ended(text: Any) -> Any:
            return text if not isinstance(text, str) or text.endswith(end) else text + end

        def encode(row: dict[str, Any], cut: slice) -> dict[str, list[int]]:
            opening: list[int] = []
            if "prompt" in row:
                whole = row["prompt"] + ended(row["completion"])
                if not prompts_count:
                    opening = encoded(row["prompt"], add_generation_prompt=True)["input_ids"]
            else:
                whole = row["messages"] if "messages" in row else ended(row["text"])
            made = encoded(whole, return_assistant_tokens_mask=answers_alone)
            ids = list(made["input_ids"])
            # at the seam, the end of the prompt may be other tokens than in the whole
            before = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(opening, ids, strict=False)))
            counts = made.get("assistant_masks", [1] * len(ids))
            counts = [counted and place >= before for place, counted in enumerate(counts)]
            labels = [token if counted else NO_LABEL for token, counted in zip(ids, counts, strict=True)]
            return {"input_ids": ids[cut], "labels": labels[cut]}

        return encode

    def trainer(self, **kwargs: Any) -> Trainer:
        from ..trainer import recipe_sft_trainer

        trainer: Any = recipe_sft_trainer()(**kwargs)
        for split, field in (("train", "train_dataset"), ("validation", "eval_dataset")):
            given, left = kwargs.get(field), getattr(trainer, field)
            if not isinstance(left, Sized) or not isinstance(given, Sized):
                continue
            if len(left) == 0:
                raise SettingError(self._nothing_counts(split))
            if len(left) < len(given) and not (trainer.args.packing or trainer.args.eval_packing):
                warnings.warn(
                    f"{len(given) - len(left)} of the {len(given)} rows of {split} are left out: they have no token "
                    f"that the loss counts among their first {trainer.args.max_length}; raise data.max_length to keep "
                    "them."
                )
        return trainer

    def _nothing_counts(self, split: str) -> str:
        """What to tell where TRL has left out all rows of a split."""
        return (
            f"No row of {split} has a token that the loss counts among its first "
            f"{self.argument_defaults()['max_length']}; raise data.max_length."
        )

    def quality(self, metrics: dict[str, float], prefix: str) -> dict[str, float]:
        found = super().quality(metrics, prefix)
        found.pop("entropy", None)
        if (accuracy := metrics.get("eval_mean_token_accuracy")) is not None:  # so TRL names it, whatever the prefix
            found["mean_token_accuracy"] = accuracy
        if "loss" not in found:
            raise RunFailed(self._nothing_counts(prefix))
        if "perplexity" not in self.measures_of(self.settings):
            return found
        return {**found, "perplexity": math.exp(min(found["loss"], 700.0))}


def as_turns(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """A prompt and its completion as the turns of a chat."""
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
