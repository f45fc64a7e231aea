"""A callback that lets a recipe ride along in a trainer of transformers or TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..activations.base import COMPILED
from ..errors import SettingError
from ..recipe import Attached, attached_to
from ..technique import Moment


def refuse_copies(arguments: TrainingArguments) -> None:
    """Refuse a process that would train copies of the model on several GPUs, which have no recipe.

    Raises SettingError.
    """
    if arguments.n_gpu > 1:
        raise SettingError(
            f"{arguments.n_gpu} GPUs are visible to one process, which would copy the model without its recipe; make "
            "one visible with CUDA_VISIBLE_DEVICES=0."
        )


class RecipeCallback(TrainerCallback):
    """Passes a trainer's events on to the recipe attached to its model, saves it in checkpoints and restores it.

        model = recipe.apply(model)
        Trainer(model=model, ..., callbacks=[RecipeCallback()])

    With techniques that add to the loss under TRL, or give parameters learning rates of their own, use RecipeTrainer or
    `recipe_sft_trainer()`, which do more than a callback can; this one refuses them as training begins. Resume from a
    checkpoint in output_dir: a callback is not told of another place.
    """

    in_recipe_trainer = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Find the recipe, check that this trainer can run it, and restore it when the run is resumed."""
        refuse_copies(args)
        self.attached: Attached = attached_to(model)
        reading = [t.name for t in self.attached.techniques if getattr(t, "reads_operations", False)]
        if args.torch_compile and reading:
            raise SettingError(COMPILED.format(name=reading[0]))
        if args.fp16 and (scaled := [t.name for t in self.attached.techniques if t.unscaled_gradients]):
            raise SettingError(
                f"{scaled[0]} reads gradients while backward runs, where fp16 has them scaled: use bf16, or neither."
            )
        self.attached.accumulation_steps = args.gradient_accumulation_steps
        if not self.in_recipe_trainer and self.attached.parameter_groups():
            raise ValueError(
                f"{self.attached.recipe} gives parameters optimizer options of their own, which a callback cannot set; "
                "use shoestring.training.RecipeTrainer in place of Trainer."
            )
        if not self.in_recipe_trainer and self.attached.brings_optimizer:
            raise ValueError(
                f"{self.attached.recipe} brings an optimizer of its own, which a callback cannot set; use "
                "shoestring.training.RecipeTrainer in place of Trainer."
            )
        if not self.in_recipe_trainer and self.attached.takes_steps:
            raise ValueError(
                f"{self.attached.recipe} makes training steps by itself, for which a callback comes too late; use "
                "shoestring.training.RecipeTrainer or recipe_sft_trainer() in place of this trainer."
            )
        if not self.in_recipe_trainer and self.attached.acts_before_clipping and args.max_grad_norm > 0:
            raise ValueError(
                f"{self.attached.recipe} acts before gradients are clipped, for which a callback comes too late; use "
                "shoestring.training.RecipeTrainer in place of Trainer, or max_grad_norm=0."
            )
        # TRL's trainers compute the loss by themselves, whatever the model's own loss says
        of_trl = any(cls.__module__.partition(".")[0] == "trl" for cls in type(args).__mro__)
        self.attached.model_loss_is_used = not of_trl
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.global_step and not self.in_recipe_trainer:
            if not folder.is_dir():
                raise ValueError(
                    f"The run goes on from step {state.global_step}, but there is no {folder} to restore the recipe "
                    "from: resume from a checkpoint in output_dir, or move it there."
                )
            self.attached.restore(folder)

    def _moment(self, state: TrainerState, kwargs: dict[str, Any], step: int) -> Moment:
        optimizer = kwargs.get("optimizer")
        return Moment(
            self.attached.model,
            getattr(optimizer, "optimizer", optimizer),
            step,
            state.epoch or 0.0,
            state.max_steps,
            self.attached.accumulation_steps,
            state.train_batch_size or 1,
            skipped=bool(getattr(optimizer, "step_was_skipped", False)),
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first forward of a step."""
        self.attached.event("on_step_begin", self._moment(state, kwargs, state.global_step))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are there, accumulated and clipped."""
        self.attached.event("on_gradients", self._moment(state, kwargs, state.global_step))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimizer has run; gradients are still there."""
        self.attached.event("on_step_end", self._moment(state, kwargs, state.global_step + 1))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the last step of an epoch."""
        self.attached.event("on_epoch_end", self._moment(state, kwargs, state.global_step))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the recipe and its state into the checkpoint that was just written."""
        if not self.in_recipe_trainer and state.is_world_process_zero:
            self.attached.save(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore all of the recipe where the trainer goes back to its best model, of which it loads one adapter."""
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and not self.in_recipe_trainer:
            self.attached.restore(best)
