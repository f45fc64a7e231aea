r"""BA-LoRA: three terms that keep a tuned model's outputs near the pretrained ones, diverse and of few directions.

Source   Chang, Chang, Wu 2024, arXiv:2408.04556 (ICLR 2026)
Update   loss + a L_CR + b L_DR + c L_SVD, of the logits Z and those of the pretrained model Z', both at a temperature T
         classes: L_CR = T^2 KL(softmax(Z'/T) || softmax(Z/T)), the mean over samples;
                  L_DR = (1 / classes) sum_{i != j} Cov(Z)_ij^2;  L_SVD = - sum_{i <= k} sigma_i / sum_i sigma_i
         words:   L_CR the same over tokens with a label;  L_DR = - the mean entropy of the K likeliest words, made a
                  distribution again;  L_SVD = - sum_{i <= k} sigma_i / |Z|, sigma by a randomised SVD
Shapes   Z [samples, classes], or [tokens with a label, vocabulary]
Trains   what the adapters train; PiSSA by peft: `lora: {init_lora_weights: pissa}`
Costs    a forward of the pretrained model a step; one tensor as large as the logits from forward to backward, beside
         the logits themselves, which TRL's SFTTrainer does not make; for PiSSA its start, r (in + out) numbers a layer
Differs  T, K and the sketch of the SVD are not public: 2, 50, and 8 columns more than k. The pretrained model is the
         one in training with its start put in, not a second model. Of a padded or prompting token nothing counts.
         Terms are of a micro-batch, not of all that accumulate. variant v1 is the first version's: L_CR of classes is
         the mean squared distance of normalised logits, L_DR of words takes the entropy over all words. The sketch is
         within 1 % where singular values fall off as those of logits do; of white noise it finds 93 %
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import SettingError
from ..precision import at_least_float32
from ..real_tokens import NO_LABEL
from ..technique import Phase, Technique, register_technique
from .base import labelled_rows
from .frozen_teacher import FrozenTeacher
from .late_logits import LateLogits
from .logit_terms import (
    Spectrum,
    divergence,
    negative_entropy,
    normalised_distance,
    off_diagonal_covariance,
    singular_share,
    token_terms,
)

ABOUT_THE_LOSS = frozenset({"labels", "shift_labels", "num_items_in_batch", "fused_lm_head"})


@dataclass(frozen=True)
class Weights:
    """What each of the three terms counts, and how many singular values are leading ones."""

    consistency: float
    diversity: float
    concentration: float
    num_singular: int


PAPERS = {
    ("iclr", "classes"): Weights(0.15, 0.03, 0.03, 5),
    ("iclr", "words"): Weights(0.025, 0.005, 0.005, 10),
    ("v1", "classes"): Weights(1e-4, 3e-4, 1e-4, 3),
    ("v1", "words"): Weights(1e-4, 3e-4, 1e-4, 3),
}


@register_technique
@dataclass
class BALora(Technique):
    """BA-LoRA's regularisers for models that give logits over classes or over words.

    consistency, diversity, concentration: weights of L_CR, L_DR and L_SVD, at least 0; None: the paper's for classes
        (0.15, 0.03, 0.03) or for words (0.025, 0.005, 0.005). All three 0: nothing is done.
    num_singular: the k singular values that count as leading, at least 1; None: the paper's (5, 10), for classes fewer
        than those there are, since the sum of all over itself is constant.
    temperature: T, above 0. top_words: K, at least 2.
    oversampling, power_iterations, seed: of the randomised SVD over words.
    variant: "iclr", or "v1" for the first version's terms and weights.

    Raises SettingError for values out of range; in a forward, if there are no logits over at least two classes, fewer
    words than top_words, or one sample only to take the covariance of classes from.
    """

    name: ClassVar[str] = "ba_lora"
    phase: ClassVar[Phase] = Phase.OBJECTIVE
    needs: ClassVar[frozenset[Phase]] = frozenset({Phase.ADAPTER})
    claims: ClassVar[frozenset[str]] = frozenset({"the output head"})
    loss_over_batch: ClassVar[bool] = True

    consistency: float | None = None
    diversity: float | None = None
    concentration: float | None = None
    num_singular: int | None = None
    temperature: float = 2.0
    top_words: int = 50
    oversampling: int = 8
    power_iterations: int = 2
    seed: int = 0
    variant: Literal["iclr", "v1"] = "iclr"

    def __post_init__(self) -> None:
        if self.variant not in ("iclr", "v1"):
            raise SettingError(f"variant of ba_lora must be 'iclr' or 'v1', got {self.variant!r}.")
        least = {"consistency": 0, "diversity": 0, "concentration": 0, "num_singular": 1, "top_words": 2}
        for name, lowest in {**least, "oversampling": 0, "power_iterations": 0}.items():
            value = getattr(self, name)
            if value is not None and not value >= lowest:
                raise SettingError(f"{name} of ba_lora must be at least {lowest}, got {value}.")
        if not self.temperature > 0:
            raise SettingError(f"temperature of ba_lora must be above 0, got {self.temperature}.")
        self._teacher: FrozenTeacher | None = None
        self._late: LateLogits | None = None
        self._had_samples = False  # whether a batch had a covariance
        self._warned = False

    def check_recipe(self, others: Sequence[Technique]) -> None:
        """Refuse what leaves no pretrained model to compare with, token by token."""
        for other in others:
            if other.phase in (Phase.PROMPT, Phase.SELECTION):
                what = "adds tokens" if other.phase is Phase.PROMPT else "trains other pretrained weights by and by"
                raise SettingError(
                    f"ba_lora compares outputs with the pretrained model's, but {other.name} {what}: leave one out."
                )
            rounds = other.phase == Phase.PRUNING and not other.exact
            if rounds or type(other).trained_without_gradient is not Technique.trained_without_gradient:
                what = "puts others in the place of" if rounds else "moves, without gradients,"
                raise SettingError(
                    f"ba_lora compares outputs with the pretrained model's, but {other.name} {what} its weights: leave "
                    "one out."
                )
            if type(other).loss_share is not Technique.loss_share:
                raise SettingError(
                    f"ba_lora compares outputs of all tokens, but {other.name} gives those of a share: leave one out."
                )

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Keep what the pretrained model needs that training will change, and note what missing logits come from."""
        owner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
        if owner is None:
            raise SettingError(f"ba_lora needs a model of transformers; {type(model).__name__} holds none.")
        if self._is_off():
            yield model
            return
        self._teacher, self._late = FrozenTeacher(model, self.name), LateLogits(owner)
        try:
            with self._late.noting():
                yield model
        finally:
            self._teacher = self._late = None

    def _is_off(self) -> bool:
        return self.consistency == self.diversity == self.concentration == 0

    def added_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor | None:
        """The weighted sum of the three terms."""
        if self._is_off():
            return None
        assert self._teacher is not None
        assert self._late is not None
        owner = self._late.owner
        inputs = _inputs(batch, owner)
        logits = getattr(outputs, "logits", None)
        logits = self._late.take(inputs) if logits is None else logits
        self._late.forget()
        if not isinstance(logits, Tensor):
            raise SettingError(
                f"ba_lora needs logits, but this forward of {type(owner).__name__} returned none: train with a trainer "
                "that calls the model's own head, or leave ba_lora out."
            )
        if logits.dim() not in (2, 3) or logits.shape[-1] < 2:
            raise SettingError(
                "ba_lora takes logits over at least two classes or words, [samples, classes] or [samples, tokens, "
                f"vocabulary], got {list(logits.shape)}; leave it out for regression and for other outputs."
            )
        weights = self._weights("classes" if logits.dim() == 2 else "words")
        theirs = None
        if weights.consistency:
            with self._teacher.in_place(model):
                theirs = model(**inputs).logits
        with torch.autocast(logits.device.type, enabled=False):
            if logits.dim() == 2:
                return self._of_classes(logits, theirs, weights)
            return self._of_words(logits, theirs, weights, _targets(batch, owner, logits))

    def _weights(self, of: Literal["classes", "words"]) -> Weights:
        """Those set, and the paper's for the others."""
        set_here = {f.name: value for f in fields(Weights) if (value := getattr(self, f.name)) is not None}
        return replace(PAPERS[self.variant, of], **set_here)

    def _of_classes(self, logits: Tensor, theirs: Tensor | None, weights: Weights) -> Tensor:
        z = at_least_float32(logits)
        samples = len(z)
        total = z.new_zeros(())
        if theirs is not None and self.variant == "v1":
            total = total + weights.consistency * normalised_distance(z, theirs.to(z)) / samples
        elif theirs is not None:
            total = total + weights.consistency * divergence(z, theirs.to(z), self.temperature) / samples
        if weights.diversity and samples < 2 and not self._had_samples:
            raise SettingError(
                "ba_lora takes the covariance of classes over a batch, but there is 1 sample in it: set "
                "per_device_train_batch_size to 2 or more, or diversity to 0."
            )
        self._had_samples = True
        if weights.diversity and samples > 1:  # the last batch of an epoch may be of one
            total = total + weights.diversity * off_diagonal_covariance(z)
        if weights.concentration:
            most = min(z.shape)
            k = min(weights.num_singular, most - 1) if self.num_singular is None else weights.num_singular
            if k >= most and not self._warned:
                self._warned = True
                warnings.warn(
                    f"num_singular={k} of ba_lora has no effect on {most} singular values: the sum of all of them over "
                    "itself is constant. Set it lower, or concentration to 0.",
                    stacklevel=2,
                )
            total = total - weights.concentration * singular_share(z, k)
        return total

    def _of_words(self, logits: Tensor, theirs: Tensor | None, weights: Weights, targets: Tensor) -> Tensor:
        words = logits.shape[-1]
        top = self.top_words if self.variant == "iclr" else None
        if weights.diversity and top is not None and top > words:
            raise SettingError(
                f"top_words of ba_lora is {top}, but there are {words} words; set it to {words} or less."
            )

        def row_term(z: Tensor, target: Tensor | None) -> Tensor:
            total = z.new_zeros(())
            if target is not None:
                total = total + weights.consistency * divergence(z, target, self.temperature)
            if weights.diversity:
                total = total + weights.diversity * negative_entropy(z, top)
            return total

        return token_terms(
            logits.reshape(-1, words),
            None if theirs is None else theirs.reshape(-1, words),
            labelled_rows(targets.flatten(), NO_LABEL),
            row_term if theirs is not None or weights.diversity else None,
            Spectrum(weights.num_singular, self.oversampling, self.power_iterations, self.seed)
            if weights.concentration
            else None,
            -weights.concentration,
        )


def _inputs(batch: dict[str, Any], owner: PreTrainedModel) -> dict[str, Any]:
    """What to call the model with for its logits and nothing else: the batch without labels."""
    inputs = {name: value for name, value in batch.items() if name not in ABOUT_THE_LOSS}
    if inputs.get(owner.main_input_name) is None and inputs.get("inputs_embeds") is None:
        raise SettingError(
            f"ba_lora runs the pretrained model on the same batch, but saw no {owner.main_input_name} in it: pass the "
            "inputs of the model by name."
        )
    labels = batch.get("labels")
    decodes = owner.config.is_encoder_decoder and hasattr(owner, "prepare_decoder_input_ids_from_labels")
    if decodes and labels is not None and not {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
        inputs["decoder_input_ids"] = owner.prepare_decoder_input_ids_from_labels(labels=labels)
    return {**inputs, "use_cache": False} if owner.can_generate() else inputs


def _targets(batch: dict[str, Any], owner: PreTrainedModel, logits: Tensor) -> Tensor:
    """The label that each row of logits is to predict, [samples, tokens]; NO_LABEL where there is none."""
    targets = batch.get("shift_labels")
    if targets is None and isinstance(batch.get("labels"), Tensor):
        targets = batch["labels"]
        if owner.can_generate() and not owner.config.is_encoder_decoder and targets.dim() == 2:
            targets = nn.functional.pad(targets[:, 1:], (0, 1), value=NO_LABEL)
    if targets is None or targets.shape != logits.shape[:2]:
        raise SettingError(
            f"ba_lora counts the tokens that have a label, and needs labels of shape {list(logits.shape[:2])}, one for "
            f"each row of logits, got {None if targets is None else list(targets.shape)}."
        )
    return targets
