"""What the recipe trainers make of a loss: how often the model runs, added losses, a share of the tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from shoestring.blocks import TokenTune
from shoestring.objectives import ChunkedLoss
from shoestring.recipe import Phase, Recipe, Technique, attached_to
from shoestring.training import RecipeCallback, recipe_sft_trainer
from shoestring.training.observe import StepMemory


@dataclass
class Confidence(Technique):
    """Adds the mean log-probability of the labels, which TRL's head returns."""

    name: ClassVar[str] = "confidence"
    phase: ClassVar[Phase] = Phase.OBJECTIVE

    def added_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor:
        assert outputs.log_probs.requires_grad
        return 0.5 * outputs.log_probs.mean()


@dataclass
class HalfOfTheLabels(Technique):
    """Takes the label of every second token away inside of the model, after the trainer has counted them."""

    name: ClassVar[str] = "half_of_the_labels"
    phase: ClassVar[Phase] = Phase.BLOCK
    tell: bool = True

    @property
    def loss_share(self) -> float:
        return self.share if self.tell else 1.0

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        self.share = 1.0

        def fewer(module: nn.Module, args: Any, batch: dict[str, Any]) -> Any:
            before = batch["labels"]
            batch["labels"] = before.masked_fill(torch.arange(before.shape[1]) % 2 == 0, -100)
            scored, counted = ((labels[:, 1:] != -100).sum().item() for labels in (batch["labels"], before))
            self.share = scored / counted
            return args, batch

        hook = model.register_forward_pre_hook(fewer, with_kwargs=True)
        yield model
        hook.remove()


@pytest.fixture
def sft(tiny_decoder_folder: Path, tmp_path: Path) -> Any:
    """sft(*techniques, trainer=recipe_sft_trainer()): that trainer on a tiny decoder with LoRA, a step of four rows."""

    def made(*techniques: Technique, trainer: Any = None, callbacks: Any = (), **settings: Any) -> Any:
        from trl import SFTConfig

        set_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_decoder_folder)
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        rows = (torch.arange(16 * 7).reshape(16, 7) % 30 + 6).tolist()
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        arguments = SFTConfig(
            str(tmp_path),
            **{"max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "max_length": 16, **settings},
            **{"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True},
        )
        rest = {"processing_class": AutoTokenizer.from_pretrained(tiny_decoder_folder), "callbacks": list(callbacks)}
        return (trainer or recipe_sft_trainer())(
            Recipe(lora, *techniques).apply(model), arguments, train_dataset=data, **rest
        )

    return made


@pytest.mark.parametrize("techniques", [(), (Confidence(),)], ids=["nothing added", "an added loss"])
def test_the_model_runs_forward_once_a_step_under_trl(techniques, sft):
    trainer = sft(*techniques, max_steps=2, gradient_accumulation_steps=2)
    forwards = []
    trainer.model.register_forward_hook(lambda *seen: forwards.append(torch.is_grad_enabled()))
    trainer.train()
    assert forwards == [True] * 4


def test_an_added_loss_under_trl_trains_through_what_the_forward_returned(sft):
    def gradient(*techniques: Technique) -> tuple[Tensor, Tensor]:
        trainer = sft(*techniques)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return loss, torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])

    plain, plain_gradient = gradient()
    added, added_gradient = gradient(Confidence())
    torch.testing.assert_close(added, 0.5 * plain)  # the loss is minus that mean
    torch.testing.assert_close(added_gradient, 0.5 * plain_gradient)


def test_a_caller_that_wants_outputs_gets_logits_under_trl(sft):
    trainer = sft(Confidence())
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.warns(FutureWarning, match="return_outputs"):
        _, outputs = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    assert outputs.logits.shape[-1] == 40
    assert attached_to(trainer.model).take_outputs() is None


def test_a_loss_over_a_share_of_the_tokens_is_their_mean_under_trl(sft):
    """Rows of seven tokens have six labels; three of them are left."""

    def loss(*techniques: Technique) -> float:
        trainer = sft(*techniques, gradient_accumulation_steps=2)
        trainer.train()
        return next(row["loss"] for row in trainer.state.log_history if "loss" in row)

    assert loss(HalfOfTheLabels()) == pytest.approx(2 * loss(HalfOfTheLabels(tell=False)), rel=1e-6)


def test_a_loss_over_a_share_of_the_tokens_is_refused_in_plain_sft_trainer(sft):
    from trl import SFTTrainer

    trainer = sft(HalfOfTheLabels(), trainer=SFTTrainer, callbacks=[RecipeCallback()])
    with pytest.raises(ValueError, match="recipe_sft_trainer"):
        trainer.train()


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("beside", [(), (TokenTune(keep_fraction=0.5),)], ids=["all tokens", "token_tune"])
def test_under_trl_too_chunked_loss_computes_the_loss(beside, sft, recwarn):
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "gradient_checkpointing": False}
    assert losses(sft(ChunkedLoss(), *beside, **settings)) == pytest.approx(losses(sft(*beside, **settings)), rel=1e-5)
    assert not [str(w.message) for w in recwarn if "no effect" in str(w.message)]
    chunked, plain = (measured(sft(*some, *beside, gradient_checkpointing=False)) for some in ((ChunkedLoss(),), ()))
    assert chunked < plain / 10  # without the buffers of TRL's head


def measured(trainer: Any) -> int:
    """The peak of a step above the weights, in bytes."""
    memory = StepMemory()
    trainer.add_callback(memory)
    trainer.train()
    return memory.report.peak_bytes - memory.report.at_peak["weights"]


@pytest.mark.parametrize(
    ("trainer", "settings"), [("SFTTrainer", {}), (None, {"label_smoothing_factor": 0.1})], ids=["plain", "smoothing"]
)
def test_chunked_loss_says_where_it_has_no_effect(trainer, settings, sft):
    trainer = getattr(trl, trainer) if trainer else None
    callbacks = [RecipeCallback()] if trainer else []
    with pytest.warns(UserWarning, match="chunked_loss has no effect"):
        mine = losses(sft(ChunkedLoss(), trainer=trainer, callbacks=callbacks, max_steps=2, **settings))
    assert mine == losses(sft(trainer=trainer, callbacks=callbacks, max_steps=2, **settings))
