"""Trainers of transformers and TRL with a recipe: loss terms, parameter groups, whole checkpoints."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import RunFailed, SettingError, did_you_mean
from ..item_count import passes_item_count
from ..recipe import attached_to
from ..technique import MicroBatch, Moment
from . import checkpoints
from .callback import RecipeCallback
from .quantised import trained_dtypes_kept

RUNNING_LOSS = "running_loss.json"


@contextmanager
def refusals_told() -> Iterator[None]:
    """Around the making of a trainer and its arguments: raises SettingError for what they do not take."""
    try:
        yield
    except SettingError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise SettingError(f"The trainer refuses these settings: {error}") from error


class RecipeTrainerMixin(Trainer):
    """What a recipe needs of a Trainer beyond callbacks. The model must have a recipe attached.

    run_identity: what a checkpoint must agree on to be resumed here, kept in each checkpoint.
    """

    model: Any
    optimizer: Any
    label_smoother: Any
    run_identity: dict[str, Any]

    def __init__(self, *args: Any, run_identity: dict[str, Any] | None = None, **kwargs: Any):
        with trained_dtypes_kept(kwargs.get("model", args[0] if args else None)):
            super().__init__(*args, **kwargs)
        self.run_identity = run_identity or {}
        self.attached = attached_to(self.model)
        if self.optimizer is not None and (self.attached.brings_optimizer or self.attached.parameter_groups()):
            raise SettingError(
                f"{self.attached.recipe} brings an optimizer of its own, or options for parameters, which one given in "
                "optimizers does not have; leave it out there, and set optim and learning_rate of the arguments."
            )
        self.attached.add_losses_in_forward = False
        if self.label_smoother is not None and _is_causal(self.attached.base_model):  # below however many adapters
            self.label_smoother = functools.partial(self.label_smoother, shift_labels=True)
        self.add_callback(_RecipeTrainerCallback(self))
        self._saving_in: Path | None = None
        self._held_out: Any = None  # a loader of the evaluation rows
        self._spared_at_start = set(self._without_decay(self.model).values())
        self.resumed_from: Path | None = None

    @property
    def leaves_loss_to_model(self) -> bool:
        """Whether a trainer that has an output head of its own leaves the loss to the model in training."""
        return False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's loss over the items scored, and in training what the recipe's techniques add to it."""
        batch = dict(inputs)
        # outputs are asked for only where the caller wants them: TRL runs the model once more to give them
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        of_forward = self.attached.take_outputs()
        if model.training and not self.attached.model_loss_is_used and num_items_in_batch is not None:
            loss = loss / self.attached.loss_share()
        if model.training and (added := self.attached.added_loss(batch, of_forward)) is not None:
            whole_batch = self._is_share(num_items_in_batch)
            loss = loss + added.to(loss) / (self.current_gradient_accumulation_steps if whole_batch else 1)
        return (loss, outputs) if return_outputs else loss

    def _is_share(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether a loss is a share of the step's, normalised over the whole accumulated batch, or divided later."""
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return scaled or self.compute_loss_func is not None or bool(self.loss_is_scaled_for_ga)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; what techniques measure in these forwards is among the metrics."""
        self.attached.measured()  # of other forwards, before
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self.attached.measured().items()})
        return output

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One forward and backward, or what a technique does instead; ends the run at a loss that is no number."""
        taken = self.attached.takes_steps
        loss = self.attached.training_step(self._micro_batch(model, inputs, num_items_in_batch)) if taken else None
        if loss is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(value := float(loss)):
            if self.state.global_step == 0:
                raise RunFailed(
                    f"The loss is {value} at step 1, before anything was learned: the weights of the model or its "
                    "inputs hold NaN or Inf, or its dtype is too narrow; use bf16 in place of fp16."
                )
            raise RunFailed(
                f"The loss became {value} at step {self.state.global_step + 1}. Start over with --overwrite and a "
                f"lower train.learning_rate ({self.args.learning_rate:g} now), or bf16 in place of fp16."
            )
        return loss

    def _micro_batch(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> MicroBatch:
        """What `training_step` of Trainer works with, in parts, and with the model in training mode."""
        model.train()

        def loss_of(inputs: dict[str, Any], held_out: bool = False) -> Tensor:
            num_items = None if held_out else num_items_in_batch
            with self.compute_loss_context_manager():
                loss: Tensor = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items)
            is_share = not held_out and self._is_share(num_items)
            return loss if is_share else loss / self.current_gradient_accumulation_steps

        backward, held_out = self.accelerator.backward, self.held_out_batch
        return MicroBatch(model, self._prepare_inputs(inputs), loss_of, backward, held_out)

    def held_out_batch(self, seed: int) -> dict[str, Any]:
        """Inputs of one micro-batch of evaluation rows, drawn with `seed`; other rows in each process.

        Raises SettingError if there are none, or if they cannot be drawn.
        """
        if self._held_out is None:
            rows = self.eval_dataset
            if not isinstance(rows, Sized) or isinstance(rows, dict) or len(rows) == 0:
                raise SettingError(
                    f"{self.attached.recipe} trains on held-out rows too, but this run has none that can be drawn; "
                    "give a validation split, as data.validation or eval_dataset."
                )
            self._held_out = self.get_eval_dataloader()
        rows, collate = self._held_out.dataset, self._held_out.collate_fn
        generator = torch.Generator().manual_seed(seed + self.accelerator.process_index)
        chosen = torch.randperm(len(rows), generator=generator)[: self.args.per_device_train_batch_size]
        inputs: dict[str, Any] = self._prepare_inputs(collate([rows[int(index)] for index in chosen]))
        return inputs

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer, with all rows: dataloader_drop_last is for training."""
        asked, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = asked

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As in Trainer, once the techniques have had their look at whole gradients."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        state, accumulated = self.state, self.attached.accumulation_steps
        epoch, rows_at_once = state.epoch or 0.0, state.train_batch_size or 1
        moment = Moment(
            self.attached.model, optimizer, state.global_step, epoch, state.max_steps, accumulated, rows_at_once
        )
        self.attached.event("before_clipping", moment)
        return super()._clip_grad_norm(model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's own, or Trainer's with the parameters that have options of their own in groups of their own."""
        given = self.attached.parameter_groups() if self.optimizer is None else []
        for group in given:
            if (factor := group.pop("lr_factor", None)) is not None:
                group["lr"] = factor * self.args.learning_rate
        own_groups = [part for group in given if "like" not in group for part in self._with_decay(model, group)]
        own = {id(p) for group in own_groups for p in group["params"]}
        of_model = self._decay_groups(model, own) + own_groups
        own_groups += [part for group in given if "like" in group for part in _with_options(group, of_model)]
        if self.optimizer is None:
            self.optimizer = self.attached.make_optimizer(self._decay_groups(model, own) + own_groups, self.args)
        trainers = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if trainers and own_groups:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in own]
            for group in own_groups:
                optimizer.add_param_group(group)
        for group in own_groups:
            known = optimizer.defaults.keys() | {"params"}
            if unknown := sorted(group.keys() - known):
                raise SettingError(
                    f"{self.attached.recipe} gives parameters the option {unknown[0]!r}, which the optimizer "
                    f"{type(optimizer).__name__} does not have. {did_you_mean(unknown[0], known - {'params'})}"
                )
        return optimizer

    def _with_decay(self, model: nn.Module | None, group: dict[str, Any]) -> list[dict[str, Any]]:
        """A group with the run's weight decay where it says nothing of it, parted as Trainer parts parameters.

        A part that had parameters when the trainer was made stays without: a resumed run prunes only then.
        """
        group = dict(group)
        at_start = set(group.pop("at_start", ()))
        if "weight_decay" in group:
            return [group]
        spared = self._without_decay(model)
        was_there = at_start - self._spared_at_start, at_start & self._spared_at_start
        parts = [
            {**group, "params": [p for p in group["params"] if id(p) not in spared]},
            {**group, "params": [p for p in group["params"] if id(p) in spared], "weight_decay": 0.0},
        ]
        parts[0]["weight_decay"] = self.args.weight_decay
        return [part for part, before in zip(parts, was_there, strict=True) if part["params"] or before]

    def _without_decay(self, model: nn.Module | None) -> dict[int, str]:
        """The names of the parameters that Trainer spares weight decay, by identity."""
        model = self.model if model is None else model
        names = set(self.get_decay_parameter_names(model))
        return {id(p): name for name, p in model.named_parameters() if name not in names}

    def _decay_groups(self, model: nn.Module | None, others: set[int]) -> list[dict[str, Any]]:
        """What trains, without the parameters of the ids `others`, parted by weight decay as Trainer parts it."""
        model = self.model if model is None else model
        names = set(self.get_decay_parameter_names(model))
        learned = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in others]
        return [
            {"params": [p for name, p in learned if name in names], "weight_decay": self.args.weight_decay},
            {"params": [p for name, p in learned if name not in names], "weight_decay": 0.0},
        ]

    def _set_signature_columns_if_needed(self) -> None:
        """Take the columns from the base model's forward; Trainer looks only one wrapper deep."""
        outer, self.model = self.model, self.attached.base_model
        try:
            super()._set_signature_columns_if_needed()
        finally:
            self.model = outer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The recipe's weights; the whole model for full fine-tuning; and the tokenizer."""
        if not self.args.should_save:  # one process writes
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if not self.attached.techniques:
            self.model.save_pretrained(folder, state_dict=state_dict)
        self.attached.save(folder, base_weights=bool(self.attached.techniques))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.attached.techniques:
            self.attached.restore(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """As in Trainer; a run that was at its end, or that early stopping had ended, has no epoch left."""
        self.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint is not None else None
        begin = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        waiting = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        ended = any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in waiting)
        ended |= self.state.global_step >= max_steps
        return (num_train_epochs, 0) if self.resumed_from is not None and ended else begin

    def _load_callback_state(self) -> None:
        """What callbacks such as early stopping have counted; their settings stay those of this run.

        One that the checkpoint does not know starts counting here.
        """
        super()._load_callback_state()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                saved = self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
                for name, value in saved["attributes"].items() if isinstance(saved, dict) else ():
                    setattr(callback, name, value)

    def resume_running_loss(self, checkpoint: Path) -> None:
        """Take over the losses summed since the last one that was logged, so that the next mean is over all steps."""
        if (checkpoint / RUNNING_LOSS).exists():
            running = json.loads((checkpoint / RUNNING_LOSS).read_text())
            self._tr_loss += running["sum"]
            self._globalstep_last_logged = running["logged_at_step"]

    def _load_best_model(self) -> None:
        if self.attached.techniques and self.state.best_model_checkpoint is not None:
            self.attached.restore(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer, but no checkpoint is removed: `_save_checkpoint` has done so, by our rules."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_in) if self._saving_in is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint under another name, then rename it: a checkpoint that is there is whole."""
        folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._saving_in = folder / checkpoints.BESIDE
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(folder / checkpoints.BESIDE, ignore_errors=True)
            raise
        finally:
            self._saving_in = None
            self.args.save_total_limit = limit
        running = nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            best = self.state.best_global_step
            best_folder = folder / f"{PREFIX_CHECKPOINT_DIR}-{best}"
            if best and (best == self.state.global_step or best_folder.is_dir()):
                self.state.best_model_checkpoint = str(best_folder)
            written = folder / checkpoints.BESIDE / name
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            (written / RUNNING_LOSS).write_text(
                json.dumps({"sum": running, "logged_at_step": self._globalstep_last_logged})
            )
            checkpoints.finish(written, folder / name, self.run_identity)
            best_now = self.state.best_model_checkpoint
            checkpoints.rotate(folder, limit, spare={folder / name, *([Path(best_now)] if best_now else [])})
        self.accelerator.wait_for_everyone()


def _is_causal(model: nn.Module) -> bool:
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _with_options(group: dict[str, Any], of_model: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A group of parameters that are `like` those of the model, parted by the options that these have."""
    beside = {id(p): own for p, own in zip(group["like"], group["params"], strict=True)}
    options = {name: value for name, value in group.items() if name not in ("params", "like")}
    parts = [[beside[id(p)] for p in each["params"] if id(p) in beside] for each in of_model]
    return [{**each, **options, "params": part} for each, part in zip(of_model, parts, strict=True) if part]


class _RecipeTrainerCallback(RecipeCallback):
    """The same inside RecipeTrainer, which saves, restores and makes the optimizer by itself."""

    in_recipe_trainer = True

    def __init__(self, trainer: RecipeTrainerMixin):
        self.trainer = trainer
        self._saves_after_epoch = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Find the recipe; losses not logged yet are taken over here, where Trainer has just set its sum to zero."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.attached.model_loss_is_used |= self.trainer.leaves_loss_to_model
        if self.trainer.resumed_from is not None:
            self.trainer.resume_running_loss(self.trainer.resumed_from)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put a checkpoint at the end of an epoch off until what belongs to that end is done, such as an evaluation: a
        run that is resumed from it begins with the next epoch.
        """
        if control.should_save and float(state.epoch or 0.5).is_integer():
            control.should_save, self._saves_after_epoch = False, True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the last step of an epoch."""
        super().on_epoch_end(args, state, control, **kwargs)
        if self._saves_after_epoch:
            control.should_save, self._saves_after_epoch = True, False


class RecipeTrainer(RecipeTrainerMixin, Trainer):
    """transformers' Trainer, for a model that a recipe is attached to."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs &= passes_item_count(self.attached.base_model)


@functools.cache
def recipe_sft_trainer() -> type[Trainer]:
    """TRL's SFTTrainer, for a model that a recipe is attached to; imported when first asked for."""
    from trl import SFTTrainer

    class LossOfModel(SFTTrainer):
        """Leaves the loss to the model where it should be computed there, in place of TRL's own output head."""

        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if not (model.training and self.leaves_loss_to_model):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            inputs = {**inputs, "use_cache": False}
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    class RecipeSFTTrainer(RecipeTrainerMixin, LossOfModel):
        @property
        def leaves_loss_to_model(self) -> bool:  # token accuracy and entropy are then those of evaluation only
            wants_logits = self.label_smoother is not None or self.compute_loss_func is not None
            plain = self.args.loss_type == "nll" and not wants_logits and not self.aux_loss_enabled
            return plain and self.attached.loss_in_model

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """None: TRL would write it over a README.md in the output folder at every checkpoint."""

    RecipeSFTTrainer.__doc__ = recipe_sft_trainer.__doc__
    return RecipeSFTTrainer
