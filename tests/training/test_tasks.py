"""Tasks and data: every form that data and models come in, and what of them is learned."""

import json
import shutil

import pytest
import torch
from datasets import load_dataset
from datasets.fingerprint import Hasher
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
)

from shoestring.cli import main
from shoestring.errors import RunFailed, SettingError
from shoestring.testing.assets import need
from shoestring.training import RunSettings, train
from shoestring.training.data import load_splits
from shoestring.training.merging import merge
from shoestring.training.run import prepare
from shoestring.training.settings import DataSettings
from shoestring.training.tasks.base import QuicklyHashed
from shoestring.training.tasks.labels import Classes


def ready(path, *overrides):
    return prepare(RunSettings.load(path, overrides))


def labels_of(prepared) -> list[list[int]]:
    """The tokens that the loss counts, for each row of the first batch."""
    batch = next(iter(prepared.trainer.get_train_dataloader()))
    return [[int(label) for label in row if label != -100] for row in batch["labels"]]


@pytest.mark.slow
def test_the_same_rows_from_every_kind_of_file_train_alike(run_file, review_csv, tmp_path):
    rows = load_dataset("csv", data_files=str(review_csv), split="train")
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_json(tmp_path / "rows.jsonl")
    rows.to_csv(tmp_path / "rows.tsv", sep="\t", index=False)
    losses = []
    for source in (review_csv, *(tmp_path / f"rows.{kind}" for kind in ("parquet", "jsonl", "tsv"))):
        report = train(RunSettings.load(run_file(f"from-{source.suffix[1:]}", data={"train": str(source)})))
        losses.append(report.losses)
    assert losses[0] == losses[1] == losses[2] == losses[3]


def test_the_loss_counts_completions_only(run_file):
    prepared = ready(run_file(task="causal-lm"))
    tokenizer = prepared.trainer.processing_class
    assert {tokenizer.decode(row).strip() for row in labels_of(prepared)} <= {"good </s>", "bad </s>"}


def test_prompts_can_be_written_as_chats(run_file):
    prepared = ready(run_file(task="causal-lm", data={"chat": True}))
    batch = next(iter(prepared.trainer.get_train_dataloader()))
    text = prepared.trainer.processing_class.decode(batch["input_ids"][0])
    assert "<s> user" in text
    assert "<s> assistant" in text
    assert all(0 < len(row) <= 4 for row in labels_of(prepared))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split_whose_completions_are_all_cut_off_is_named(split, run_file, tmp_path):
    row = {"prompt": " ".join(["film"] * 20), "completion": " good"}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    path = run_file(task="causal-lm", data={split: str(tmp_path / "long.jsonl"), "max_length": 16})
    told = f"No row of {split} has a token that the loss counts among its first 16; raise data.max_length."
    with pytest.raises(RunFailed if split == "test" else SettingError, match=told):
        train(RunSettings.load(path, ["train.eval_strategy=no"] if split == "validation" else []))


def test_rows_whose_completions_are_cut_off_are_counted(run_file, tmp_path):
    rows = [{"prompt": " ".join(["film"] * words), "completion": " good"} for words in (2, 20, 3, 21, 22)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = run_file(task="causal-lm", data={"train": str(tmp_path / "some.jsonl"), "max_length": 16})
    with pytest.warns(UserWarning, match="3 of the 5 rows of train are left out: .* first 16; raise data.max_length"):
        prepared = ready(path)
    assert len(prepared.trainer.train_dataset) == 2


def test_chats_are_learned_whole(run_file, tmp_path):
    chat = [{"role": "user", "content": "the film is"}, {"role": "assistant", "content": "good"}]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(8)))
    path = run_file("chats", task="causal-lm", data={"train": str(data)})
    assert main(["train", str(path)]) == 0
    answers = labels_of(ready(path, "train.assistant_only_loss=true"))
    assert all(len(row) < 5 for row in answers)


def test_held_out_rows_are_packed_once(run_file, prompt_jsonl):
    """The figures of the report are those of the last evaluation on the way, by the same weights."""
    arguments = {"packing": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    data = {"validation": str(prompt_jsonl), "max_length": 24}
    prepared = []
    report = train(RunSettings.load(run_file(task="causal-lm", data=data, train=arguments)), on_ready=prepared.append)
    losses = [row["eval_loss"] for row in prepared[0].trainer.state.log_history if "eval_loss" in row]
    assert report.quality["validation"]["loss"] == losses[-1]


def test_the_share_of_right_tokens_is_reported_of_every_split(run_file, prompt_jsonl):
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "eval_on_start": True}
    data = {"validation": str(prompt_jsonl), "test": str(prompt_jsonl)}
    prepared = []
    report = train(RunSettings.load(run_file(task="causal-lm", data=data, train=arguments)), on_ready=prepared.append)
    assert report.quality.keys() == {f"{split}{when}" for split in ("validation", "test") for when in (", before", "")}
    assert all(found.keys() == set(prepared[0].task.measures) for found in report.quality.values())
    on_the_way = [row for row in prepared[0].trainer.state.log_history if "eval_loss" in row]
    for name in ("loss", "mean_token_accuracy"):
        assert report.quality["validation"][name] == report.quality["test"][name] == on_the_way[-1][f"eval_{name}"]


@pytest.mark.parametrize("precision", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_before_training_leaves_the_weights_in_their_precision(run_file, review_csv, tmp_path, precision):
    arguments = {"eval_on_start": True, precision: True, "max_steps": 2}
    data = {"validation": str(review_csv), "test": str(review_csv)}
    prepared = []
    train(RunSettings.load(run_file(data=data, train=arguments)), on_ready=prepared.append)
    saved = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert getattr(prepared[0].trainer.args, precision)


@pytest.mark.parametrize("kind", [BertForSequenceClassification, LlamaForSequenceClassification])
def test_a_classifier_of_other_classes_gets_a_new_head(run_file, tiny_classifier_folder, tmp_path, kind):
    source = tmp_path / "classifier"
    shutil.copytree(tiny_classifier_folder, source)
    sizes = {"vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    kind(kind.config_class(**sizes, intermediate_size=20, pad_token_id=0, num_labels=5)).save_pretrained(source)
    path = run_file(model=str(source), recipe=[], train={"max_steps": 1})
    with pytest.warns(UserWarning, match="tells 5 classes apart, and the training data has 2: the model gets a new"):
        prepared = ready(path)
    model, before = prepared.attached.base_model, load_file(source / "model.safetensors")
    kept = {name for name, value in model.state_dict().items() if name in before and torch.equal(value, before[name])}
    new = set(before) - kept
    assert new == {name for name in before if name.startswith(("classifier.", "score."))}
    assert prepared.trainer.model.config.id2label == {0: "bad", 1: "good"}
    prepared.trainer.train()


def test_files_that_do_not_fit_their_configuration_are_refused(run_file, tiny_decoder_folder, tmp_path):
    source = tmp_path / "damaged"
    shutil.copytree(tiny_decoder_folder, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 24}))
    with pytest.raises(SettingError, match=r"mlp\.down_proj\.weight has the shape \[12, 20\] there, and \[12, 24\]"):
        ready(run_file(task="causal-lm", model=str(source)))


def test_packing_fills_rows(run_file):
    packed = ready(run_file(task="causal-lm"), "train.packing=true", "data.max_length=24")
    assert len(packed.trainer.train_dataset) < 24
    assert packed.trainer.args.max_length == 24


def test_without_a_length_the_model_sets_it(run_file):
    assert ready(run_file(task="causal-lm")).trainer.args.max_length == 32


def test_adapters_stay_in_float32_on_a_bfloat16_model(run_file, tiny_decoder_folder):
    path = run_file(task="causal-lm", model={"name": str(tiny_decoder_folder), "dtype": "bfloat16"})
    model = ready(path).attached.model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_weights_that_would_train_in_float16_are_refused(run_file, tiny_decoder_folder):
    path = run_file(task="causal-lm", model={"name": str(tiny_decoder_folder), "dtype": "float16"}, recipe=[])
    with pytest.raises(SettingError, match="would train in float16"):
        ready(path)


@pytest.mark.parametrize("others", [["norm_tuning"], ["bitfit"], ["recompute"], ["norm_tuning", "lean_mlp"]], ids=str)
def test_a_new_head_trains_with_lora_whatever_stands_beside_it(others, run_file):
    recipe = [{"lora": {"r": 2, "target_modules": ["query", "value"]}}, *others]
    model = ready(run_file(recipe=recipe)).attached.model
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad and "classif" in name}
    assert trained == {"weight", "bias"}


@pytest.mark.slow
def test_a_gguf_file_trains(run_file):
    need("smollm2")
    from shoestring import assets

    file = next((assets.cache_folder() / "smollm2").rglob("*.gguf"))
    path = run_file(task="causal-lm", model=str(file), train={"max_steps": 2}, data={"max_length": 16})
    report = train(RunSettings.load(path))
    assert report.total_parameters > 134_000_000
    assert report.steps == 2


def test_tokenizers_are_told_apart_by_what_they_make_of_a_text(tiny_classifier_folder, tiny_decoder_folder):
    def name_of(folder, **changed):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for key, value in changed.items():
            setattr(tokenizer, key, value)
        return Hasher.hash(QuicklyHashed(tokenizer))

    mine = name_of(tiny_classifier_folder)
    assert name_of(tiny_classifier_folder) == mine
    others = [{"truncation_side": "left"}, {"model_max_length": 9}, {"model_input_names": ["input_ids"]}]
    others.append({"eos_token": "film"})
    names = {mine, name_of(tiny_decoder_folder), *(name_of(tiny_classifier_folder, **one) for one in others)}
    assert len(names) == 6


def test_classes_that_the_held_out_data_numbers_otherwise_are_told_apart_by_name():
    from datasets import ClassLabel, Dataset, Features, Value

    def rows(names: list[str], numbers: list[int]) -> Dataset:
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        return Dataset.from_dict({"text": ["some"] * len(numbers), "label": numbers}, features=features)

    classes = Classes.of(rows(["cat", "dog", "fox"], [0, 1, 2]), "label")
    held_out = classes.of_split("test", rows(["fox", "cat"], [0, 1, 0]))
    assert [held_out.number(value) for value in (0, 1, 0)] == [2, 0, 2]
    same = classes.of_split("validation", rows(["cat", "dog", "fox"], [2, 1]))
    assert [same.number(value) for value in (0, 1, 2)] == [0, 1, 2]
    with pytest.raises(SettingError, match=r"Row 1 of test has the label 'wolf' in 'label'.* has cat, dog, fox"):
        classes.of_split("test", rows(["fox", "wolf"], [0, 1]))
    named = Classes.of(Dataset.from_dict({"label": ["dog", "cat"]}), "label")
    assert [named.of_split("test", rows(["dog", "cat"], [0, 1])).number(value) for value in (0, 1, "dog")] == [1, 0, 1]
    numbered = Classes.of(Dataset.from_dict({"label": [0, 1]}), "label")
    assert numbered.of_split("test", rows(["negative", "positive"], [0, 1])).number(1) == 1


def test_labels_that_are_true_or_false_train(run_file, tmp_path):
    lines = [json.dumps({"text": f"the film is {word}", "label": word == "warm"}) for word in ("dull", "warm") * 6]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    data = {"train": str(tmp_path / "rows.jsonl"), "test": str(tmp_path / "rows.jsonl")}
    report = train(RunSettings.load(run_file("run", data=data)))
    assert report.classes == ["False", "True"]
    assert set(report.quality["test"]) >= {"accuracy"}


def test_no_held_out_row_is_dropped(run_file, review_csv):
    settings = run_file("run", data={"test": str(review_csv)}, train={"dataloader_drop_last": True})
    prepared = ready(settings, "train.per_device_eval_batch_size=7")
    assert sum(len(batch["labels"]) for batch in prepared.trainer.get_eval_dataloader(prepared.data["test"])) == 24
    assert prepared.trainer.args.dataloader_drop_last


@pytest.mark.parametrize("field", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_perplexity_is_that_of_a_plain_loss_alone(run_file, prompt_jsonl, field):
    found = {}
    for name, fields in (("plain", {}), ("other", field)):
        path = run_file(name, task="causal-lm", data={"test": str(prompt_jsonl)}, train={"max_steps": 2, **fields})
        found[name] = train(RunSettings.load(path)).quality["test"]
    assert "perplexity" in found["plain"]
    assert "perplexity" not in found["other"]


def test_a_template_of_ones_own_is_there_from_the_beginning_and_in_what_is_merged(run_file, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s>{% endfor %}")
    fields = {"chat_template_path": str(template), "eos_token": "good", "max_steps": 2}
    path = run_file("run", task="causal-lm", data={"chat": True}, train=fields)
    train(RunSettings.load(path))
    merge(path.with_suffix(""), tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == template.read_text()
    assert tokenizer.eos_token == "good"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.eos_token_id == merged.generation_config.eos_token_id[0] == tokenizer.eos_token_id
    with pytest.raises(SettingError, match=r"train\.chat_template_path must be a file .*, got 'other/model'"):
        ready(path, "train.chat_template_path=other/model")
    with pytest.raises(SettingError, match=r"train\.eos_token must be a token that .* has, got '<none>'"):
        ready(path, "train.eos_token=<none>")


def test_weights_that_train_in_bfloat16_are_told_of(run_file, tiny_decoder_folder):
    model = {"name": str(tiny_decoder_folder), "dtype": "bfloat16"}
    told = ready(run_file("one", task="causal-lm", model=model, recipe=["norm_tuning"])).notes
    assert any("Weights train in bfloat16, where an update below about 1/256" in note for note in told)
    adapters = ready(run_file("two", task="causal-lm", model=model)).notes
    assert not any("Weights train in bfloat16" in note for note in adapters)


class TestHeldOutForValidation:
    def test_a_share_of_the_training_rows_the_same_with_every_seed(self, review_csv):
        whole = load_splits(DataSettings(train=str(review_csv)), seed=0)["train"]
        made = [load_splits(DataSettings(train=str(review_csv), validation_share=0.25), seed=seed) for seed in (0, 1)]
        assert {name: len(rows) for name, rows in made[0].items()} == {"train": 18, "validation": 6}
        assert sorted([*made[0]["train"]["text"], *made[0]["validation"]["text"]]) == sorted(whole["text"])
        assert list(made[0]["validation"]["text"]) == list(made[1]["validation"]["text"])

    def test_fewer_held_out_rows_are_the_same_with_every_seed(self, review_csv):
        data = DataSettings(train=str(review_csv), test=str(review_csv), max_train_rows=6, max_eval_rows=6)
        first, second = (load_splits(data, seed) for seed in (0, 1))
        assert list(first["test"]["text"]) == list(second["test"]["text"])
        assert list(first["train"]["text"]) != list(second["train"]["text"])

    def test_beside_validation_data_it_is_refused(self, review_csv):
        data = DataSettings(train=str(review_csv), validation=str(review_csv), validation_share=0.25)
        with pytest.raises(SettingError, match=r"data\.validation_share is given, but the data has a validation split"):
            load_splits(data, seed=0)

    @pytest.mark.parametrize(("share", "left"), [(0.01, 0), (0.99, 24)])
    def test_both_sides_have_rows(self, review_csv, share, left):
        with pytest.raises(SettingError, match=rf"validation_share is {share}, which leaves {left} of 24 rows"):
            load_splits(DataSettings(train=str(review_csv), validation_share=share), seed=0)
