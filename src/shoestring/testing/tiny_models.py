"""Two tiny stock models, their batches, LoRA for them, and what one training step of them gives."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from ..recipe import attached_to
from ..selection.sparse import Entries
from ..technique import Moment

WORDS = 61
TOKENS = 13  # odd, and no multiple of any window or chunk


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside, and as if nothing had happened after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def decoder(dropout: float = 0.0, **settings: Any) -> nn.Module:
    """Llama: two blocks, two queries to a key, tied head; the same weights at every call. settings: of its config."""
    with seeded(0):
        config = LlamaConfig(
            vocab_size=WORDS,
            hidden_size=24,
            intermediate_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_dropout=dropout,
            **{"num_hidden_layers": 2, "tie_word_embeddings": True, **settings},
        )
        return _moved(LlamaForCausalLM(config))


def classifier(dropout: float = 0.0, **settings: Any) -> nn.Module:
    """BERT with a head for three classes: two blocks; the same weights at every call."""
    with seeded(0):
        config = BertConfig(
            vocab_size=WORDS,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            num_labels=3,
            problem_type="single_label_classification",  # or the first labels would write it into the config
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            classifier_dropout=dropout,
            **settings,
        )
        return _moved(BertForSequenceClassification(config))


def encoder_of_images(dropout: float = 0.0, **settings: Any) -> nn.Module:
    """ViT without a head: two blocks, nine patches; the same weights at every call."""
    with seeded(0):
        config = ViTConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=12,
            patch_size=4,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            **settings,
        )
        return _moved(ViTModel(config))


def _moved(model: nn.Module) -> nn.Module:
    """Away from the start, where norms have weights of 1 and biases of 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@dataclass(frozen=True)
class TinyModel:
    """A model and what goes with it.

    make: builds it; takes dropout. task: in peft's words. targets: its linear layers.
    """

    name: str
    make: Callable[..., nn.Module]
    task: str
    targets: tuple[str, ...]

    def lora(self, **settings: Any) -> LoraConfig:
        """LoRA on all linear layers, away from its start; a new config, since peft fills them in."""
        given = {"r": 3, "target_modules": list(self.targets), "task_type": self.task, "init_lora_weights": False}
        return LoraConfig(**{**given, **settings})

    def batch(self, seed: int = 1, samples: int = 3) -> dict[str, Tensor]:
        """Samples of different lengths, padded on the right, of words from 3 to 40."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 41, (samples, TOKENS), generator=generator)
        lengths = TOKENS - torch.arange(samples) % 4 * 2
        mask = (torch.arange(TOKENS) < lengths[:, None]).long()
        ids = ids * mask
        if self.task == "SEQ_CLS":
            labels = torch.randint(0, 3, (samples,), generator=generator)
        else:
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, :3] = -100  # a question without labels
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def rows(self, seed: int = 1, count: int = 4) -> list[dict[str, Tensor]]:
        """The samples of a batch, one by one."""
        batch = self.batch(seed, count)
        return [{name: value[i] for name, value in batch.items()} for i in range(count)]

    def data(self) -> dict[str, list[dict[str, Tensor]]]:
        """All that batches of the seeds below 4 hold, by split, as recipes take it."""
        return {"train": [row for seed in range(4) for row in self.rows(seed)]}


@dataclass(frozen=True)
class TinyImageModel(TinyModel):
    """A model that takes images, without labels."""

    def batch(self, seed: int = 1, samples: int = 3) -> dict[str, Tensor]:
        """Noise."""
        return {"pixel_values": torch.randn(samples, 3, 12, 12, generator=torch.Generator().manual_seed(seed))}


LLAMA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DECODER = TinyModel("decoder", decoder, "CAUSAL_LM", LLAMA_LINEAR)
CLASSIFIER = TinyModel("encoder", classifier, "SEQ_CLS", ("query", "key", "value", "dense"))

IMAGES = TinyImageModel("images", encoder_of_images, "FEATURE_EXTRACTION", ("q_proj", "v_proj"))


def result_of(outputs: Any) -> Tensor:
    """What a model is asked for: logits, or the last hidden states where it has no head."""
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


@dataclass
class Step:
    """The loss of one forward and the gradients of all that trains, by name.

    numbers: of gradients that are those of single numbers of a weight, its name and their places in it, flat.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    numbers: dict[str, tuple[str, Tensor]] = field(default_factory=dict)

    def assert_same_names(self, reference: "Step", where: str) -> None:
        """Raise AssertionError unless the same weights have gradients."""
        if lost := reference.gradients.keys() - self.gradients.keys():
            raise AssertionError(f"{min(lost)} has no gradient ({where})")
        if more := self.gradients.keys() - reference.gradients.keys():
            raise AssertionError(f"{min(more)} has a gradient, and should have none ({where})")

    def beside(self, *others: "Step") -> "Step":
        """This step, with the gradients that it lacks from others, the first that has one."""
        gradients: dict[str, Tensor] = {}
        for one in (self, *others):
            gradients = {**one.gradients, **gradients}
        return Step(self.loss, gradients)

    def error(self, reference: "Step", own: Iterable[str] = ()) -> float:
        """Length of the difference over that of the reference, of all gradients of this step.

        Those of single numbers are compared with the same numbers of the weight's whole gradient, if there is one.
        own: regular expressions for whole names of what has no counterpart in the reference.

        Raises AssertionError for any other gradient without one, and if nothing is compared.
        """
        pairs = []
        for name, ours in self.gradients.items():
            if any(re.fullmatch(pattern, name) for pattern in own):
                continue
            theirs = self._counterpart(name, reference)
            if theirs is None:
                raise AssertionError(f"{name} trains, and there is no gradient to compare its own with.")
            pairs.append(_rows_in_use(ours, theirs))
        if not pairs:
            raise AssertionError("The two steps have no gradient in common.")
        difference = sum(float((ours - theirs).double().square().sum()) for ours, theirs in pairs)
        return float((difference / sum(float(theirs.double().square().sum()) for _, theirs in pairs)) ** 0.5)

    def _counterpart(self, name: str, reference: "Step") -> Tensor | None:
        weight, places = self.numbers.get(name, ("", None))
        if places is not None and weight in reference.gradients:
            return reference.gradients[weight].flatten()[places]
        theirs = reference.gradients.get(name)
        same = theirs is not None and (theirs.dim() == 2 or theirs.shape == self.gradients[name].shape)
        return theirs if same else None


def _rows_in_use(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Both; of two tables with different rows, those that have a gradient."""
    if ours.shape == theirs.shape:
        return ours, theirs
    return ours[ours.any(1)], theirs[theirs.any(1)]


def step(model: nn.Module, batch: dict[str, Any], seed: int = 5, at: int | None = None) -> Step:
    """Loss and gradients of the attached model in training mode; random numbers from `seed`.

    at: the optimizer step it is, of whose events the recipe is told; None: of none.
    """
    model.train()
    model.zero_grad()
    told = attached_to(model).event if at is not None else lambda event, moment: None
    moment = Moment(model, step=at or 0)
    with seeded(seed):
        told("on_step_begin", moment)
        loss = model(**batch).loss
        loss.backward()
    told("on_gradients", moment)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    found = Step(loss.detach(), gradients, _numbers(model))
    told("on_step_end", replace(moment, step=moment.step + 1))
    return found


def _numbers(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """`numbers` of a step."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    entries = [module for module in model.modules() if isinstance(module, Entries)]
    return {names[id(e.values)]: (names[id(e.weight[0])], e.places.long()) for e in entries}


def all_training(model: nn.Module) -> nn.Module:
    """The attached model, with all its weights made to train: what gradients are those of the plain model."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return model


def assert_derivative_of_the_loss(model: nn.Module, batch: dict[str, Tensor], seed: int = 5) -> None:
    """Raise AssertionError unless the gradients are those of the loss, by a difference along their direction.

    Finds what is drawn otherwise in backward than it was in forward. Wants a model in float64.
    """
    of_step = step(model, batch, seed)
    length = sum(float(g.square().sum()) for g in of_step.gradients.values()) ** 0.5
    size = 1e-3 / length
    losses = []
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in of_step.gradients:
                    parameter.add_(of_step.gradients[name], alpha=sign * size)
        losses.append(float(step(model, batch, seed).loss))
    slope = (losses[0] - losses[1]) / (2 * 1e-3)
    assert abs(slope - length) < 0.01 * length, (
        f"the loss changes by {slope:.4g} along its gradient, whose length is {length:.4g}"
    )


def tensors_left_behind(model: nn.Module) -> list[str]:
    """The tensors that stay where they are when the model is moved: attributes of modules that are no buffers."""
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        for part in (value if isinstance(value, list | tuple) else [value])
        if isinstance(part, Tensor) and id(part) not in known
    ]
