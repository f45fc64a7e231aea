"""Generation: what the trained model really writes for held-out prompts, greedily, beside what it should."""

from __future__ import annotations

import re
import statistics
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from ...errors import SettingError
from ...modes import in_eval_mode
from ..measures import Measure
from .base import Extra, device_of

if TYPE_CHECKING:
    from ...training.run import Ready
    from ...training.settings import RunSettings


class Generation(Extra):
    """Exact match and token F1, as SQuAD counts them, and chrF, over `rows` held-out rows; each in [0, 1].

    pattern: a regular expression whose last match in a text, its first group if it has one, is its answer. Exact match
    is then that of answers, as they stand or as numbers; a text without one counts as wrong, and all completions must
    have one. SQuAD's drops articles, signs and decimal points.
    """

    name: ClassVar[str] = "generation"
    of_language_models: ClassVar[bool] = True

    rows: int = Field(32, ge=1)
    max_new_tokens: int = Field(128, ge=1)
    batch: int = Field(8, ge=1)
    pattern: str | None = Field(None, min_length=1)

    @field_validator("pattern")
    @classmethod
    def _is_expression(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        return pattern

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (
            Measure("exact_match", "exact match of what is generated", "share", "higher"),
            Measure("generation_f1", "token F1 of what is generated", "share", "higher"),
            Measure("chrf", "chrF of what is generated", "share", "higher"),
        )

    def check(self, run: RunSettings) -> None:
        super().check(run)
        try:
            import torchmetrics  # noqa: F401
        except ImportError:
            raise SettingError("it needs torchmetrics, which is missing: pip install 'shoestring[compare]'") from None

    def before(self, ready: Ready) -> None:
        self._pairs(ready)

    def _pairs(self, ready: Ready) -> list[tuple[Any, str]]:
        """Prompts with what should follow."""
        split = self.split
        columns = ready.data[split].column_names if split else []
        if split is None or "prompt" not in columns or "completion" not in columns:
            raise SettingError(
                "measure.generation needs held-out rows with a prompt and a completion; this run has "
                f"{', '.join(columns) or 'no held-out rows'}."
            )
        rows = ready.data[split].select(range(min(self.rows, len(ready.data[split]))))
        last = [row if isinstance(row, str) else row[-1]["content"] for row in rows["completion"]]
        for text in last if self.pattern is not None else ():
            if self._answer(text) is None:
                raise SettingError(
                    f"measure.generation.pattern, {self.pattern!r}, finds nothing in a completion of {split}: "
                    f"{text[-80:]!r}."
                )
        return list(zip(rows["prompt"], last, strict=True))

    def after(self, ready: Ready) -> dict[str, float]:
        from torchmetrics.functional.text import chrf_score, squad

        pairs = self._pairs(ready)
        written = [text.strip() for text in self._generate(ready, [prompt for prompt, _ in pairs])]
        wanted = [text.strip() for _, text in pairs]
        scores = squad(
            [{"prediction_text": text, "id": str(index)} for index, text in enumerate(written)],
            [{"answers": {"answer_start": [0], "text": [t]}, "id": str(i)} for i, t in enumerate(wanted)],
        )
        chrf: Any = chrf_score(written, [[text] for text in wanted])
        exact_match = float(scores["exact_match"]) / 100
        if self.pattern is not None:
            answers = ((self._answer(one) for one in pair) for pair in zip(written, wanted, strict=True))
            exact_match = statistics.fmean(_is_same(*pair) for pair in answers)
        return {
            "exact_match": exact_match,
            "generation_f1": float(scores["f1"]) / 100,
            "chrf": float(chrf),
        }

    def _answer(self, text: str) -> str | None:
        """What the pattern finds last."""
        found = list(re.finditer(self.pattern or "", text))
        return (found[-1][min(found[-1].re.groups, 1)] or "").strip() if found else None

    def _generate(self, ready: Ready, prompts: list[Any]) -> list[str]:
        model: Any = ready.attached.model
        tokenizer: Any = ready.trainer.processing_class
        texts = [
            prompt
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            for prompt in prompts
        ]
        side, tokenizer.padding_side = tokenizer.padding_side, "left"
        written = []
        try:
            with in_eval_mode(model):
                for begin in range(0, len(texts), self.batch):
                    chats = not isinstance(prompts[0], str)  # whose template has written the special tokens
                    some = texts[begin : begin + self.batch]
                    encoded = tokenizer(some, padding=True, add_special_tokens=not chats, return_tensors="pt")
                    inputs = {name: encoded[name].to(device_of(model)) for name in ("input_ids", "attention_mask")}
                    ids = model.generate(
                        **inputs,
                        do_sample=False,
                        max_new_tokens=self.max_new_tokens,
                        pad_token_id=tokenizer.pad_token_id,
                    )
                    new = ids[:, inputs["input_ids"].shape[1] :]
                    written += tokenizer.batch_decode(new, skip_special_tokens=True)
        finally:
            tokenizer.padding_side = side
        return written


def _is_same(written: str | None, wanted: str | None) -> bool:
    """Whether two answers are the same text or number, whose thousands may stand apart by commas."""
    if written is None or wanted is None:
        return False
    try:
        return written == wanted or float(written.replace(",", "")) == float(wanted.replace(",", ""))
    except ValueError:
        return False
