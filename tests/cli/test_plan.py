"""`shoestring plan`: predictions by part, sweeps, pages and what fits, for models that are a configuration only."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoestring import planning
from shoestring.cli import main
from shoestring.cli.plan_cases import bytes_in, cases_of
from shoestring.errors import SettingError
from shoestring.memory.devices import DEVICES
from shoestring.planning import Advice, Change
from shoestring.training.settings import RunSettings

LAYERS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json of a Llama of 2 layers, width 16 and 4,096 positions, and no weights."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=96,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def run_file(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a run file of LoRA on the tiny model, whose data is nowhere; `rest` replaces what is in it."""
    monkeypatch.chdir(tmp_path)

    def write(name: str = "run", **rest: Any) -> str:
        run = {
            "model": str(model_folder),
            "task": "causal-lm",
            "data": {"train": "nowhere.jsonl", "max_length": 24},
            "recipe": [{"lora": {"r": 2, "target_modules": LAYERS}}],
            "train": {"per_device_train_batch_size": 3},
            **rest,
        }
        Path(f"{name}.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
        return f"{name}.yaml"

    return write


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command prints that succeeds, in one line of words."""

    def run(*arguments: str) -> str:
        code = main(["plan", *arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return " ".join(out.split())

    return run


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The message of a command that ends with exit code 2."""

    def run(*arguments: str) -> str:
        assert main(["plan", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err

    return run


class TestOneRun:
    def test_all_parts_the_step_of_the_peak_what_trains_and_estimated_times_are_shown(self, run_file, shown):
        text = shown(run_file())
        found = planning.predict(RunSettings.load("run.yaml"))
        for part in found.parts:
            assert part.replace("_", " ") in text
        assert f"in {found.peak_step}" in text
        assert "batch 3, length 24" in text
        assert f"trained parameters {found.trained_parameters:,} of {found.total_parameters:,}" in text
        assert re.search(r"on a GPU \d+\.\d MiB to \d+\.\d MiB, with the CUDA context", text)
        assert "an estimate, no measurement" in text
        assert "35% to 80% of the peak FLOP/s" in text
        for device in DEVICES:
            assert device in text

    def test_json_is_the_prediction(self, run_file, shown):
        read = json.loads(shown(run_file(), "--json"))
        row = read["rows"][0]
        expected = planning.predict(RunSettings.load("run.yaml"), count_operations=True)
        assert row["prediction"] == json.loads(json.dumps(expected.to_dict()))
        assert {time["device"] for time in row["times"]} == set(DEVICES)
        assert all(time["kind"] == "estimate" for time in row["times"])
        assert read["advice"] is None

    def test_nothing_is_written_and_no_data_is_read(self, run_file, shown):
        run = run_file()
        shown(run, "--batch", "5", "--length", "7")
        assert [path.name for path in Path().iterdir()] == ["run.yaml"]

    def test_batch_length_and_overrides_are_put_over_the_file(self, run_file, shown):
        found = json.loads(shown(run_file(), "recipe.lora.r=4", "--batch", "5", "--length", "7", "--json"))["rows"][0]
        assert (found["prediction"]["batch"], found["prediction"]["length"]) == (5, 7)
        assert found["prediction"]["recipe"][0]["lora"]["r"] == 4

    def test_a_classifier_known_by_name_has_a_head_that_trains_beside_its_adapters(self, run_file, shown):
        recipe = [{"lora": {"r": 8, "target_modules": ["query", "value"]}}]
        run = run_file(model="known:bert-base", task="text-classification", recipe=recipe)
        read = json.loads(shown(run, "--json"))["rows"][0]["prediction"]
        # twelve blocks, two layers, A and B of 768 x 8; two classes
        assert read["trained_parameters"] == 12 * 2 * 2 * 768 * 8 + 2 * 768 + 2

    def test_shards_are_by_rule_and_hold_less(self, run_file, shown):
        run = run_file(recipe=[])
        text = shown(run, "--sharding", "zero2", "--processes", "4")
        assert "one of 4 processes" in text
        assert "by rule, not rehearsed: what each of 4 processes holds under zero2" in text
        whole, part = (
            json.loads(shown(run, "--json", *more))["rows"][0]["prediction"]["parts"]["optimizer_state"]
            for more in ((), ("--sharding", "zero2", "--processes", "4"))
        )
        assert part == -(-whole // 4)


class TestSeveral:
    def test_a_sweep_has_a_row_for_each_combination(self, run_file, shown):
        rows = json.loads(
            shown(run_file(), "--sweep", "length=8,16", "--sweep", "train.optim=sgd,adamw_torch", "--json")
        )["rows"]
        assert [row["label"] for row in rows] == [
            f"length={length}, train.optim={optim}" for length in (8, 16) for optim in ("sgd", "adamw_torch")
        ]
        assert [row["prediction"]["length"] for row in rows] == [8, 8, 16, 16]
        assert rows[0]["prediction"]["parts"]["optimizer_state"] < rows[1]["prediction"]["parts"]["optimizer_state"]

    def test_recipes_are_names_recipe_files_and_run_files(self, run_file, shown):
        run = run_file()
        run_file("other", recipe=[{"hut": {"r": 2, "target_modules": LAYERS}}])
        Path("full.yaml").write_text("recipe: []\n")
        rows = json.loads(shown(run, "--recipes", "exact_small, full.yaml,other.yaml", "--json"))["rows"]
        assert [row["label"] for row in rows] == ["run", "exact_small", "full", "other"]
        recipes = [[name for entry in row["prediction"]["recipe"] for name in entry] for row in rows]
        assert recipes == [["lora"], ["lora", "token_windows", "chunked_loss"], [], ["hut"]]

    def test_bars_are_letters_of_the_parts_where_there_is_no_colour(self, run_file, shown):
        text = shown(run_file(recipe=[]), "--sweep", "batch=1,2")
        assert re.search(r"batch=1 W*G*O*S*L*T* \d", text)
        assert "T temporary" in text

    def test_a_case_that_is_refused_says_why_and_the_others_are_there(self, run_file, shown):
        text = shown(run_file(), "--sweep", "length=8,5000")
        assert "Refused, length=5000: data.max_length must be at most 4096" in text
        assert re.search(r"length=8 [WAGOSLT]+", text)

    def test_if_all_are_refused_it_is_an_error(self, run_file, error):
        assert "must be at most 4096" in error(run_file(), "--sweep", "length=5000,6000")

    def test_a_device_adds_its_time_and_whether_each_fits(self, run_file, shown):
        text = shown(run_file(), "--sweep", "length=8,16", "--device", "T4")
        assert "Estimate for T4" in text
        assert text.count(" yes ") == 2

    @pytest.mark.parametrize(
        ("sweep", "message"),
        [
            ("length", "write a setting and its values, such as length=1024,2048,4096"),
            ("length=a", "values must be whole numbers of at least 1, got 'a'"),
            ("lenght=1,2", "lenght is no setting to sweep. Give length, batch, or a key of the run file"),
            ("train.learning_ratte=1,2", "Unknown key train.learning_ratte. Did you mean 'learning_rate'"),
            ("batch=" + ",".join(map(str, range(1, 102))), "makes 101 predictions, and at most 100"),
        ],
    )
    def test_a_sweep_that_cannot_be_read_says_what_to_write(self, run_file, error, sweep, message):
        assert message in error(run_file(), "--sweep", sweep)

    def test_what_is_swept_is_not_given_beside_it(self, run_file, error):
        assert "leave one of them out" in error(run_file(), "--batch", "2", "--sweep", "batch=1,2")

    def test_an_unknown_recipe_names_the_nearest(self, run_file, error):
        assert "Did you mean 'exact_small'" in error(run_file(), "--recipes", "exact_smal")
        assert "there is no file none.yaml" in error(run_file(), "--recipes", "none.yaml")

    def test_commas_in_brackets_are_part_of_a_value(self, run_file):
        made = cases_of(Path(run_file()), [], ["recipe.lora.target_modules=[q_proj, v_proj],all-linear"])
        assert [case.settings.recipe[0]["lora"]["target_modules"] for case in made] == [LAYERS, "all-linear"]


class TestPage:
    def test_the_page_holds_everything_it_shows(self, run_file, shown):
        shown(run_file("a&b"), "--sweep", "length=8,5000", "--html", "page.html")
        page = Path("page.html").read_text()
        assert "length=8" in page
        assert "refused: data.max_length must be at most 4096" in page
        assert page.count("<rect") >= 4
        assert "prefers-color-scheme: dark" in page
        assert not re.search(r"https?:|<script|<link|@import|url\(", page)

    def test_the_bar_of_a_row_has_the_width_of_its_peak(self, run_file, shown):
        read = json.loads(shown(run_file(recipe=[]), "--sweep", "batch=1,8", "--html", "page.html", "--json"))["rows"]
        page = Path("page.html").read_text()
        widths: dict[str, float] = {}
        for y, width in re.findall(r'<rect x="[\d.]+" y="(\d+)" width="([\d.]+)"', page):
            widths[y] = widths.get(y, 0) + float(width)
        small, large = widths.values()
        peaks = [row["prediction"]["peak_bytes"] for row in read]
        assert small / large == pytest.approx(peaks[0] / peaks[1], abs=0.01)

    def test_a_page_that_is_there_stays(self, run_file, error, shown):
        Path("page.html").write_text("mine")
        assert "page.html is there already" in error(run_file(), "--html", "page.html")
        assert Path("page.html").read_text() == "mine"
        shown(run_file(), "--html", "page.html", "--overwrite")
        assert "<svg" in Path("page.html").read_text()

    def test_names_are_text_and_no_markup(self, run_file, shown):
        shown(run_file(), "--sweep", "train.run_name=<b>,c", "--html", "page.html")
        assert "<b>" not in Path("page.html").read_text()


class TestWhatFits:
    @pytest.mark.parametrize(
        ("size", "message"),
        [
            ("24", "--memory 24: the unit is missing; write 24GiB (of 2^30 bytes) or 24GB (of 10^9 bytes)."),
            ("24G", "--memory 24G: G is no unit; write 24GiB"),
            ("much", "must be a size with its unit, such as 24GiB, got 'much'"),
            ("0GiB", "must be a size with its unit, such as 24GiB, got '0GiB'"),
        ],
    )
    def test_memory_needs_its_unit(self, run_file, error, size, message):
        assert message in error(run_file(), "--memory", size)

    def test_sizes_are_read_in_both_kinds_of_units(self):
        assert bytes_in("24GiB") == 24 * 2**30
        assert bytes_in("1.5 gb") == 1_500_000_000

    def test_less_than_the_weights_is_refused_with_their_size(self, run_file, error):
        message = error(run_file(), "--memory", "3KB", "--sharding", "ddp", "--processes", "2")
        assert re.search(r"--memory 2\.9 KiB is below the weights of .* alone: \d+\.\d KiB in one process", message)

    def test_an_unknown_device_names_the_nearest(self, run_file, error):
        assert "Did you mean 'H100' or 'H200'?" in error(run_file(), "--device", "H1000")

    def test_shards_need_their_kind_and_number(self, run_file, error):
        assert "--sharding and --processes go together" in error(run_file(), "--sharding", "fsdp2")
        assert "Did you mean 'fsdp2'?" in error(run_file(), "--sharding", "fdsp", "--processes", "2")

    @pytest.fixture
    def advised(self, run_file, monkeypatch):
        """A run with advice of one change, and what sets other advice; the advice itself has tests of its own."""
        settings = RunSettings.load(run_file())
        now = planning.predict(settings, count_operations=True)
        other = settings.model_copy(update={"recipe": [*settings.recipe, {"recompute": {}}]})
        changed = planning.predict(other)
        change = Change("recompute", "blocks run again", True, changed.peak_bytes, 1.25, other)

        def make(changes: list[Change], fits: bool = False, skipped: tuple[str, ...] = ()) -> None:
            def advise(settings, memory, **options):
                length = 4096 if fits else None
                return Advice(memory, fits, now, 7, length, changes, changed, "recompute", skipped)

            monkeypatch.setattr(planning, "advise", advise)

        make([change])
        return make

    def test_changes_are_told_and_the_first_is_written(self, advised, shown, error):
        text = shown("run.yaml", "--memory", "500MiB", "--write", "new.yaml")
        assert "It may not fit 500.0 MiB: its tensors do" in text
        assert "x 1.25" in text
        assert "exact" in text
        assert "Written, with recompute: new.yaml" in text
        assert [name for entry in RunSettings.load("new.yaml").recipe for name in entry] == ["lora", "recompute"]
        assert "new.yaml is there already" in error("run.yaml", "--memory", "500MiB", "--write", "new.yaml")
        shown("run.yaml", "--memory", "500MiB", "--write", "new.yaml", "--overwrite", "--html", "page.html")
        assert "Each of these makes it fit" in Path("page.html").read_text()
        assert sorted(path.name for path in Path().iterdir()) == ["new.yaml", "page.html", "run.yaml"]

    def test_a_run_that_fits_a_device_is_told_with_the_largest_that_does(self, advised, shown):
        advised([], fits=True)
        text = shown("run.yaml", "--device", "t4", "--write", "new.yaml")
        assert "T4" in text
        assert "H100" not in text
        assert "It fits 14.5 GiB: peak" in text
        assert "At most batch 7 fits at length 24, and length 4,096 at batch 3." in text
        assert "The run fits as it is: new.yaml was not written." in text
        assert not Path("new.yaml").exists()

    def test_json_holds_the_advice_with_each_changed_run(self, advised, shown):
        read = json.loads(shown("run.yaml", "--memory", "500MiB", "--json"))
        assert read["memory_bytes"] == 500 * 2**20
        change = read["advice"]["changes"][0]
        assert (change["title"], change["exact"], change["slowdown"]) == ("recompute", True, 1.25)
        assert "recompute" in change["run"]

    def test_where_nothing_helps_the_smallest_footprint_is_told(self, advised, shown, error):
        advised([])
        text = shown("run.yaml", "--memory", "100MiB")
        assert "It does not fit 100.0 MiB: its tensors do" in text
        assert "The smallest footprint is" in text
        assert "new.yaml was not written" in error("run.yaml", "--memory", "100MiB", "--write", "new.yaml")

    def test_changes_that_were_skipped_are_told(self, advised, shown):
        advised([], skipped=("offload: KeyError: 'a<b'",))
        assert "Skipped, offload: KeyError: 'a<b'" in shown("run.yaml", "--memory", "100MiB", "--html", "page.html")
        assert "Skipped, offload: KeyError: &#x27;a&lt;b&#x27;" in Path("page.html").read_text()

    def test_a_device_without_memory_in_the_table_needs_memory(self, advised, shown, error):
        message = error("run.yaml", "--device", "CPU", "--write", "new.yaml")
        assert "The table of devices has no memory for CPU" in message
        assert "give --memory with --write" in message
        told = "warning: The table of devices has no memory for CPU, which depends on the machine: to be told"
        assert told in shown("run.yaml", "--device", "CPU", "--sweep", "length=8,16")
        (warning,) = json.loads(shown("run.yaml", "--device", "CPU", "--json"))["warnings"]
        assert "no memory for CPU" in warning
        assert "no memory for CPU" not in shown("run.yaml", "--device", "CPU", "--memory", "500MiB")

    def test_write_needs_a_limit_and_one_run(self, run_file, error):
        assert "--memory 24GiB or --device NAME" in error(run_file(), "--write", "new.yaml")
        message = error(run_file(), "--write", "new.yaml", "--memory", "1GiB", "--sweep", "length=8,16")
        assert "leave out --sweep" in message

    def test_targets_must_be_files_in_folders(self, run_file, error):
        assert "There is no folder gone to write new.yaml into" in error(
            run_file(), "--memory", "1GiB", "--write", "gone/new.yaml"
        )
        assert "is a folder" in error(run_file(), "--html", ".")


class TestErrors:
    def test_an_unknown_model_names_the_nearest(self, run_file, error):
        assert "Did you mean 'llama-3.1-8b'" in error(run_file(model="known:llama-3.1-8"))

    def test_a_configuration_with_gaps_is_refused(self, run_file, error):
        Path("gaps").mkdir()
        Path("gaps/config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
        assert "gaps/config.json does not say" in error(run_file(model="./gaps"))

    def test_an_error_is_json_where_json_is_asked_for(self, run_file, capsys):
        assert main(["plan", run_file(), "--memory", "24", "--json"]) == 2
        assert json.loads(capsys.readouterr().out)["kind"] == "SettingError"

    def test_a_technique_that_needs_data_is_refused_by_name(self, run_file, error):
        assert "embedding_pruning" in error(run_file(recipe=["embedding_pruning"]))


def test_the_units_of_sizes_are_refused_before_anything_is_imported():
    with pytest.raises(SettingError, match="unit"):
        bytes_in("24")
