"""Progress of a training run: a bar on a terminal, a line now and then elsewhere."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Progress(TrainerCallback):
    """Shows steps, loss, and evaluations."""

    def __init__(self, console: Console):
        self.console = console
        self.bar: Bar | None = None
        self.shown: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the bar."""
        if self.console.is_terminal:
            self.bar = Bar(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"),
                console=self.console,
            )
            self.bar.start()
            self.job = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, loss="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.job, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss; print evaluations."""
        logs = logs or {}
        if "loss" in logs and self.bar is not None:
            self.bar.update(self.job, loss=f"loss {logs['loss']:.4f}")
        elif "loss" in logs:
            self.console.print(f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}", highlight=False)
        measures = {
            name.removeprefix("eval_"): value
            for name, value in logs.items()
            if name.startswith("eval_") and not name.endswith(("runtime", "per_second", "num_tokens"))
        }
        if "loss" in measures:
            text = "  ".join(f"{name} {value:.4f}" for name, value in measures.items())
            self.console.print(f"step {state.global_step}/{state.max_steps}  validation  {text}", highlight=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the bar."""
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal, also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
