"""What techniques that read the data get of it for a causal language model: the rows that train, and their labels."""

import json

import pytest

from shoestring.training import RunSettings
from shoestring.training.run import prepare


def ready(path, *overrides):
    return prepare(RunSettings.load(path, overrides))


WORDS = ("lovely", "bright </s>", "dull story")
CHATS = [[{"role": "user", "content": f"the film is {word}"}, {"role": "assistant", "content": word}] for word in WORDS]
FORMS = {
    "prompts": [{"prompt": f"the film is {word}", "completion": f" {word}"} for word in WORDS],
    "seams": [{"prompt": f"the film is {word}", "completion": "ly good"} for word in WORDS],
    "texts": [{"text": f"the film is {word}"} for word in WORDS],
    "prompt chats": [{"prompt": chat[:1], "completion": chat[1:]} for chat in CHATS],
    "chats": [{"messages": chat} for chat in CHATS],
}


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        ("prompts", {}),
        ("prompts", {"data.chat": True}),
        ("prompts", {"data.max_length": 5}),
        ("prompts", {"data.max_length": 2, "train.truncation_mode": "keep_end"}),
        ("prompts", {"train.completion_only_loss": False}),
        ("prompts", {"train.packing": True}),
        ("seams", {}),
        ("texts", {"data.max_length": 4}),
        ("prompt chats", {}),
        ("chats", {}),
        ("chats", {"train.assistant_only_loss": True}),
        ("chats", {"data.max_length": 10, "train.assistant_only_loss": True}),
    ],
)
def test_techniques_that_read_data_see_the_rows_that_train(form, settings, run_file, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in FORMS[form]))
    overrides = [f"{name}={str(value).lower()}" for name, value in settings.items()]
    prepared = ready(run_file(task="causal-lm", data={"train": str(data), "validation": str(data)}), *overrides)
    seen = prepared.task.model_inputs(prepared.data, prepared.trainer.processing_class)["train"]
    trained = prepared.trainer.train_dataset
    if "train.packing" in settings:
        of_both = [sorted(token for row in rows["input_ids"] for token in row) for rows in (seen, trained)]
        assert of_both[0] == of_both[1]
        return
    assert 0 < len(trained) == len(seen)
    for ours, theirs in zip(seen, trained, strict=True):
        batch = prepared.trainer.data_collator([theirs])
        assert (ours["input_ids"], ours["labels"]) == (batch["input_ids"][0].tolist(), batch["labels"][0].tolist())


def test_a_split_without_labels_is_left_to_the_trainer(run_file, tmp_path):
    path = run_file(task="causal-lm", data={"max_length": 16})
    prepared = ready(path)
    rows = prepared.data["train"].map(lambda row: {"prompt": " ".join(["film"] * 20)})
    seen = prepared.task.model_inputs(type(prepared.data)({"train": rows}), prepared.trainer.processing_class)["train"]
    assert len(seen) == len(rows)
