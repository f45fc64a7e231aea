"""The run file: what it becomes, what is refused, and that every refusal names file, line, key and what is allowed."""

from pathlib import Path

import pytest

from shoestring.errors import SettingError
from shoestring.training.marked_yaml import MOST_NODES, parse_marked_yaml
from shoestring.training.settings import DataSettings, ModelSettings, RunSettings

GOOD = """\
model: packaged:minilm
task: text-classification
data: {train: packaged:rotten-tomatoes, text: text, label: label}
recipe:
  - lora: {r: 8, target_modules: all-linear}
train: {num_train_epochs: 1, per_device_train_batch_size: 32, learning_rate: 1e-3, seed: 0}
"""


@pytest.fixture
def load(tmp_path):
    """Load a run file with the given text, called first.yaml."""

    def load(text: str, *overrides: str) -> RunSettings:
        path = tmp_path / "first.yaml"
        path.write_text(text)
        return RunSettings.load(path, overrides)

    return load


@pytest.fixture
def refusal(load):
    """The message with which a run file is refused."""

    def refusal(text: str, *overrides: str) -> str:
        with pytest.raises(SettingError) as error:
            load(text, *overrides)
        return str(error.value)

    return refusal


def with_train(fields: str) -> str:
    return GOOD.split("train: {num")[0] + f"train: {{{fields}}}\n"


class TestGoodFiles:
    def test_a_file_becomes_typed_settings(self, load):
        settings = load(GOOD)
        assert settings.model == ModelSettings(name="packaged:minilm")
        assert settings.task == "text-classification"
        assert settings.data == DataSettings(train="packaged:rotten-tomatoes")
        assert settings.recipe == [{"lora": {"r": 8, "target_modules": "all-linear"}}]
        assert settings.train == {
            "num_train_epochs": 1.0,
            "per_device_train_batch_size": 32,
            "learning_rate": 0.001,
            "seed": 0,
        }
        assert settings.output_dir == "runs/first"

    def test_the_recipe_is_built_from_it(self, load):
        (technique,) = load(GOOD).build_recipe().techniques
        assert technique.name == "lora"
        assert technique.config.r == 8

    def test_training_arguments_take_the_train_fields_and_own_ones_over_them(self, load):
        arguments = load(GOOD).training_arguments(report_to="none", seed=5, use_cpu=True)
        assert (arguments.learning_rate, arguments.seed, arguments.output_dir) == (0.001, 5, "runs/first")

    def test_fields_that_do_not_go_together_are_refused_when_arguments_are_made(self, load):
        with pytest.raises(SettingError, match=r"train do not go together.*fp16 and bf16"):
            load(with_train("fp16: true, bf16: true")).training_arguments(use_cpu=True)

    def test_yaml_written_from_settings_gives_equal_settings(self, load):
        settings = load(
            GOOD + 'output_dir: "1e5"\n', "model.revision='12e4'", "data.max_length=64", "train.lr_scheduler_kwargs={}"
        )
        assert load(settings.to_yaml()) == settings
        assert settings.model.revision == "12e4"

    def test_a_dict_of_the_same_form_gives_equal_settings(self, load):
        settings = load(GOOD)
        assert RunSettings.from_dict(settings.model_dump()) == settings

    def test_the_callers_dict_is_not_shared(self):
        values = {"model": "m", "task": "causal-lm", "data": {"train": "x.jsonl"}, "recipe": [{"lora": {"r": 4}}]}
        settings = RunSettings.from_dict(values)
        values["recipe"][0]["lora"]["r"] = 9
        assert settings.recipe == [{"lora": {"r": 4}}]

    def test_a_bare_technique_name_takes_its_defaults(self, load):
        assert load(GOOD.replace("- lora: {r: 8, target_modules: all-linear}", "- lora")).recipe == [{"lora": {}}]
        assert load(GOOD.replace("- lora: {r: 8, target_modules: all-linear}", "- lora:")).recipe == [{"lora": {}}]

    def test_empty_sections_count_as_left_out(self, load):
        settings = load("model: m\ntask: causal-lm\ndata: {train: x.jsonl}\nrecipe:\ntrain:\n")
        assert (settings.recipe, settings.train) == ([], {})

    def test_a_recipe_may_stand_in_a_file_beside_the_run_file(self, load, tmp_path):
        (tmp_path / "small.yaml").write_text("- lora: {r: 2}\n")
        head = GOOD.split("recipe:")[0]
        assert load(head + "recipe: small.yaml\n").recipe == [{"lora": {"r": 2}}]
        assert load(head + "recipe: small.yaml\n", "recipe.lora.r=3").recipe == [{"lora": {"r": 3}}]
        (tmp_path / "small.yaml").write_text("recipe:\n- lora: {r: 5}\n")
        assert load(head + "recipe: small.yaml\n").recipe == [{"lora": {"r": 5}}]

    def test_causal_lm_takes_fields_of_trl_and_classification_does_not(self, load, refusal):
        assert load(with_train("packing: true").replace("text-classification", "causal-lm")).train == {"packing": True}
        assert "Unknown key train.packing" in refusal(with_train("packing: true"))

    @pytest.mark.parametrize(
        ("field", "read"),
        [
            ("eval_strategy: no", "no"),  # false to YAML
            ("learning_rate: '2e-4'", 2e-4),
            ("max_steps: 1e3", 1000),
            ("bf16: yes", True),
            ("optim: adafactor", "adafactor"),
            ("report_to: [tensorboard]", ["tensorboard"]),
            ("report_to: none", "none"),
            ("save_total_limit: null", None),
            ("warmup_steps: 0.1", 0.1),
            ("include_num_input_tokens_seen: yes", True),
            ("log_level: error", "error"),
        ],
    )
    def test_fields_of_train_are_read_in_their_types(self, load, field, read):
        (value,) = load(with_train(field)).train.values()
        assert value == read
        assert type(value) is type(read)

    def test_anchors_and_merged_mappings_are_read(self, load):
        text = GOOD.replace("data: {", "data: &data {").replace("text: text,", "text: body,")
        assert load(text + "early_stopping_patience: 2\n").data.text == "body"
        assert parse_marked_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n", "f").values["b"] == {"x": 1, "y": 3}


class TestOverrides:
    def test_overrides_replace_add_and_empty_values(self, load):
        settings = load(
            GOOD,
            "train.learning_rate=1e-4",
            "recipe.0.lora.r=16",
            "recipe.lora.target_modules=[query, value]",
            "model.dtype=bfloat16",
            "data.test=packaged:rotten-tomatoes",
            "train.max_steps=5",
            "train.num_train_epochs=2",
        )
        assert settings.train["learning_rate"] == 1e-4
        assert settings.recipe == [{"lora": {"r": 16, "target_modules": ["query", "value"]}}]
        assert settings.model == ModelSettings(name="packaged:minilm", dtype="bfloat16")
        assert settings.data.test == "packaged:rotten-tomatoes"
        assert load(GOOD, "recipe=").recipe == []
        assert load(GOOD, "recipe=[vera]").recipe == [{"vera": {}}]
        assert load(GOOD, "model=packaged:smollm2", "model.dtype=float32").model.name == "packaged:smollm2"
        assert load(GOOD, "output_dir=runs/a=b").output_dir == "runs/a=b"

    def test_an_override_mends_a_wrong_value_in_the_file(self, load):
        assert load(with_train("seed: x"), "train.seed=3").train == {"seed": 3}

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("train.learning_rate=fast", "train.learning_rate must be a number, got 'fast'."),
            ("train.sead=1", "Unknown key train.sead. Did you mean 'seed'?"),
            ("trian.seed=1", "Unknown key trian. Did you mean 'train'?"),
            ("recipe.0.lora.rr=3", "unknown setting 'rr'"),
            ("recipe.1.lora.r=3", "recipe has 1 entries, numbered from 0; there is no recipe.1."),
            ("recipe.-1.lora.r=3", "there is no recipe.-1."),
            ("recipe.lara.r=3", "recipe has no entry 'lara'. Did you mean 'lora'?"),
            ("task.name=x", "task is a single value ('text-classification'); nothing is below it."),
            ("train.seed", "write overrides as key=value"),
            ("train..seed=1", "write overrides as key=value"),
            ("=1", "write overrides as key=value"),
            ("data.text=[a", "this is not YAML"),
        ],
    )
    def test_a_wrong_override_is_named_as_it_was_typed(self, refusal, override, message):
        told = refusal(GOOD, override)
        assert told.startswith(f"command line, {override}: ")
        assert message in told


class TestRefusals:
    @pytest.mark.parametrize(
        ("old", "new", "line", "message"),
        [
            ("task: text-class", "tusk: text-class", 2, "Unknown key tusk. Did you mean 'task'?"),
            ("classification", "clasification", 2, "Unknown task 'text-clasification'. Did you mean 'text-class"),
            ("label: label", "lable: label", 3, "Unknown key data.lable. Did you mean 'label'"),
            ("text: text", "text: 5", 3, "data.text must be text, got 5, which YAML reads as a number; quote it."),
            ("text: text", "text: no", 3, "data.text must be text, got no, which YAML reads as true or false"),
            ("text: text", "max_length: 0", 3, "data.max_length must be at least 1, got 0."),
            ("text: text", "max_length: true", 3, "data.max_length must be a whole number, got true."),
            ("text: text", "max_length: 1.5", 3, "data.max_length must be a whole number, got 1.5."),
            ("text: text", "train: x", 3, "data.train is given twice"),
            ("train: packaged:rotten-tomatoes, ", "", 3, "data.train is missing: hub id, .csv"),
            ("packaged:minilm", "''", 1, "model.name must be not empty"),
            ("packaged:minilm", "{name: m, dtype: int8}", 1, "model.dtype must be one of float32, bfloat16, float16"),
            ("packaged:minilm", "[a]", 1, "model must be a mapping (key: value), got ['a']."),
            ("r: 8", "r: eight", 5, "recipe[0].lora.r must be int, got 'eight'"),
            ("r: 8", "rr: 8", 5, "recipe[0].lora: unknown setting 'rr'. Did you mean 'r'"),
            ("lora:", "loar:", 5, "unknown technique 'loar'. Did you mean 'lora'"),
            ("- lora:", "lora:", 4, "recipe must be a list, each entry begun with '- '"),
            ("- lora:", "- 5\n  - lora:", 5, "recipe.0 must be a mapping (key: value), got 5."),
            ("- lora: {r", "- lora: 5 #", 5, "recipe.0.lora must be a mapping (key: value), got 5."),
            ("- lora", "- vera:\n    lora", 5, "recipe.0 must name one technique, got 2"),
            ("seed: 0", "sead: 0", 6, "Unknown key train.sead. Did you mean 'seed'"),
            ("train: {num", "learning_rate: 1\ntrain: {num", 6, "It belongs under train: train.learning_rate."),
            ("train: {num", "max_length: 8\ntrain: {num", 6, "It belongs under data: data.max_length."),
            ("train: {num", "early_stopping_patience: 0\ntrain: {num", 6, "patience must be at least 1, got 0."),
        ],
    )
    def test_a_wrong_value_is_refused_with_its_line(self, refusal, old, new, line, message):
        told = refusal(GOOD.replace(old, new, 1))
        (about,) = [part for part in told.splitlines() if message in part]
        assert f"first.yaml, line {line}: " in about

    @pytest.mark.parametrize(
        ("field", "message"),
        [
            ("learning_rate: fast", "train.learning_rate must be a number, got 'fast'."),
            ("learning_rate: 0", "train.learning_rate must be greater than 0, got 0."),
            ("learning_rate: .nan", "train.learning_rate must be a number, got .nan."),
            ("learning_rate: [1]", "train.learning_rate must be a number, got [1]."),
            ("learning_rate:", "train.learning_rate must be a number, got nothing."),
            ("learning_rate: true", "train.learning_rate must be a number, got true."),
            ("num_train_epochs: -1", "train.num_train_epochs must be greater than 0, got -1."),
            ("per_device_train_batch_size: 0", "must be at least 1, got 0."),
            ("per_device_eval_batch_size: 2.5", "must be a whole number, got 2.5."),
            ("gradient_accumulation_steps: 0", "must be at least 1, got 0."),
            ("warmup_steps: -1", "must be 0, a whole number of steps, or a share below 1, got -1."),
            ("warmup_steps: 1.5", "or a share below 1, got 1.5."),
            ("max_steps: 5, warmup_steps: 6", "train.warmup_steps must be at most train.max_steps, 5, got 6."),
            ("max_steps: 0", "must be at least 1, or -1 to train for num_train_epochs, got 0."),
            ("weight_decay: -0.1", "must be at least 0, got -0.1."),
            ("seed: -1", "must be from 0 to 4294967295, got -1."),
            ("seed: 1.5", "must be a whole number, got 1.5."),
            ("bf16: 3", "train.bf16 must be true or false, got 3."),
            ("eval_strategy: on", "train.eval_strategy must be one of no, steps, epoch, got on."),
            ("log_level: loud", "must be one of detail, debug, info, warning, error, critical, passive, got 'loud'."),
            ("optim: adafacto", "train.optim cannot be 'adafacto'. Did you mean 'adafactor'"),
            ("output_dir: x", "train.output_dir cannot be set here: set output_dir at the top"),
            ("remove_unused_columns: true", "train.remove_unused_columns cannot be set here"),
            ("resume_from_checkpoint: x", "--resume"),
            ("warmup_ratio: 0.1", "Unknown key train.warmup_ratio. It is now warmup_steps"),
            ("evaluation_strategy: steps", "It is now eval_strategy."),
            ("lr: 1", "It is now learning_rate."),
        ],
    )
    def test_a_wrong_field_of_train_is_refused_with_what_is_allowed(self, refusal, field, message):
        told = refusal(with_train(field))
        assert "first.yaml, line 6: " in told
        assert message in told

    def test_all_problems_are_told_together_in_the_order_of_the_file(self, refusal):
        told = refusal(GOOD.replace("model:", "modle:").replace("r: 8", "rr: 8").replace("seed: 0", "seed: x"))
        first, *problems = told.splitlines()
        assert first.startswith("4 problems in ")
        assert [part.split("line ")[1][0] for part in problems] == ["1", "1", "5", "6"]
        assert "model is missing: hub id" in problems[0]

    def test_a_problem_in_a_recipe_file_names_that_file(self, refusal, tmp_path):
        (tmp_path / "small.yaml").write_text("# small\n- lora:\n    r: 2\n    rr: 3\n")
        told = refusal(GOOD.split("recipe:")[0] + "recipe: small.yaml\n")
        assert "small.yaml, line 4: recipe[0].lora: unknown setting 'rr'." in told

    def test_a_recipe_file_must_exist_and_hold_a_list(self, refusal, tmp_path):
        head = GOOD.split("recipe:")[0]
        assert "There is no file none.yaml" in refusal(head + "recipe: none.yaml\n")
        (tmp_path / "small.yaml").write_text("lora: {r: 2}\n")
        assert "small.yaml must hold a list of techniques" in refusal(head + "recipe: small.yaml\n")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "first.yaml is empty; a run file has at least model, task and data."),
            ("# only a comment\n", "first.yaml is empty"),
            ("- model\n", "must hold keys with values (model: ..., task: ..., data: ...), but is a list."),
            ("packaged:minilm\n", "but is only 'packaged:minilm'."),
            ("model: m\ntrain:\n\tseed: 1\n", "line 3: a tab is in the indentation; YAML indents with spaces only."),
            ("model: m\n  task: x\n", "line 2: this is not YAML:"),
            ("model: [m\n", "line 2: this is not YAML:"),
            ("model: m\n---\nmodel: n\n", "line 2: a second document begins ('---'); a run file holds one."),
            ("model: m\nmodel: n\n", "line 2: model is given twice, first on line 1; keep one."),
            ("model: !!python/name:os.system x\n", "line 1: the tag"),
            ("model: &a [*a]\n", "line 1: an alias (*name) makes the file refer to itself"),
            ("model: *nobody\n", "line 1: this is not YAML: found undefined alias"),
            ("true: m\n", "line 1: a key must be text, got 'true'"),
            ("[a]: m\n", "line 1: a key must be text, got 'a list or mapping'"),
            ("model: m\0\n", "it holds characters that no text file has."),
            ("model: !!int x\n", "line 1: 'x' is not a value"),
            ("[" * 3000, "nests its values too deeply."),
        ],
    )
    def test_what_is_no_run_file_is_refused_in_plain_words(self, refusal, text, message):
        assert message in refusal(text)

    def test_aliases_of_aliases_do_not_grow_without_end(self):
        lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
        assert MOST_NODES < 2**20
        with pytest.raises(SettingError, match="grow too large"):
            parse_marked_yaml("\n".join(lines), "bomb.yaml")

    def test_a_missing_file_names_those_beside_it(self, tmp_path):
        (tmp_path / "first.yaml").write_text(GOOD)
        with pytest.raises(SettingError, match=r"There is no file .*frist.yaml. Beside it: first.yaml."):
            RunSettings.load(tmp_path / "frist.yaml")
        with pytest.raises(SettingError, match=r"There is no file"):
            RunSettings.load(tmp_path / "first.yaml" / "x.yaml")

    def test_a_folder_and_a_binary_file_are_refused(self, tmp_path):
        with pytest.raises(SettingError, match="is a folder; name the YAML file in it"):
            RunSettings.load(tmp_path)
        (tmp_path / "weights.yaml").write_bytes(bytes(range(256)))
        with pytest.raises(SettingError, match="is not a text file in UTF-8"):
            RunSettings.load(tmp_path / "weights.yaml")

    def test_a_file_without_permission_is_refused(self, tmp_path, monkeypatch):
        (tmp_path / "first.yaml").write_text(GOOD)

        def denied(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_text", denied)  # a test run as root may read everything
        with pytest.raises(SettingError, match="may not be read: no permission"):
            RunSettings.load(tmp_path / "first.yaml")

    def test_a_dict_is_checked_like_a_file(self):
        with pytest.raises(SettingError, match=r"run settings: train.learning_rate must be a number, got 'fast'\."):
            RunSettings.from_dict(
                {"model": "m", "task": "causal-lm", "data": {"train": "x"}, "train": {"learning_rate": "fast"}}
            )
        with pytest.raises(SettingError, match="must be a dict"):
            RunSettings.from_dict([])
        with pytest.raises(SettingError, match="lists and mappings only, got a complex"):
            RunSettings.from_dict({"model": "m", "task": 1j})
        with pytest.raises(SettingError, match="the tag !!set is not read"):
            RunSettings.from_dict({"model": "m", "task": {"causal-lm"}})
