"""What a suite measures beside training, on models that were prepared as for a run, against plain references."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.functional import cross_entropy

from shoestring.compare.extras import Forgetting, Generation, Latency, LmEval
from shoestring.compare.extras.generation import _is_same
from shoestring.compare.extras.lm_eval import _task_manager
from shoestring.errors import SettingError
from shoestring.recipe import Recipe
from shoestring.training.run import Ready, prepare
from shoestring.training.settings import RunSettings


@pytest.fixture
def ready(run_file: Callable[..., Path], prompt_jsonl: Path) -> Callable[..., Ready]:
    def make(**changes: Any) -> Ready:
        changes = {"task": "causal-lm", "data": {"test": str(prompt_jsonl)}, **changes}
        return prepare(RunSettings.load(run_file(**changes)))

    return make


@pytest.fixture
def general(tmp_path: Path) -> Path:
    path = tmp_path / "general.jsonl"
    texts = ["the film is a story", "people in it", "the plot", "cold and flat and dull and tired"]
    path.write_text("".join(json.dumps({"document": text}) + "\n" for text in texts))
    return path


def on_test_rows(**settings: Any) -> Generation:
    extra = Generation(**settings)
    extra.split = "test"
    return extra


def change(model: Any) -> None:
    """What training would do, in short."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)


def test_forgetting_is_the_mean_loss_of_tokens_after_less_before(ready: Callable[..., Ready], general: Path) -> None:
    run = ready()
    model, tokenizer = run.attached.model, run.trainer.processing_class

    def loss() -> float:
        model.eval()
        total, count = 0.0, 0
        for line in general.read_text().splitlines():
            ids = torch.tensor([tokenizer(json.loads(line)["document"])["input_ids"][:4]])
            logits = model(input_ids=ids).logits[0, :-1].detach()
            total += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
        return total / count

    extra = Forgetting(data=str(general), text="document", max_length=4)
    before = loss()
    extra.before(run)
    change(model)
    found = extra.after(run)
    assert found["general_loss"] == pytest.approx(loss(), rel=1e-5)
    assert found["forgetting"] == pytest.approx(loss() - before, rel=1e-4)
    assert abs(found["forgetting"]) > 1e-3
    assert found.keys() == {measure.name for measure in extra.measures}


def test_a_look_at_the_model_before_training_leaves_its_modes_and_4_bit_weights(
    ready: Callable[..., Ready], general: Path
) -> None:
    run = ready()
    model: Any = run.attached.model.train()
    block, other = model.base_model.model.model.layers
    block.eval()
    other.support_avx512bf16_for_cpu = True  # as bitsandbytes has it on layers that it would reorder at inference
    seen = []
    other.register_forward_hook(lambda module, *_: seen.append(module.support_avx512bf16_for_cpu))
    Forgetting(data=str(general), text="document").before(run)
    assert seen == [False] * 4
    assert other.support_avx512bf16_for_cpu
    assert (model.training, block.training, other.training) == (True, False, True)


def test_forgetting_needs_the_column(ready: Callable[..., Ready], general: Path) -> None:
    with pytest.raises(SettingError, match="The general data has no column 'text'"):
        Forgetting(data=str(general)).before(ready())


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_generated_is_what_a_plain_greedy_loop_gives(ready: Callable[..., Ready], chat: bool) -> None:
    run = ready(data={"test": None, "validation": None, "chat": chat})
    run.data["test"] = run.data["train"]
    change(run.attached.model)
    model, tokenizer = run.attached.model.eval(), run.trainer.processing_class
    extra = on_test_rows(rows=5, max_new_tokens=4, batch=2)
    prompts = [prompt for prompt, _ in extra._pairs(run)]
    wanted = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) if chat else prompt
        ids = tokenizer(text, add_special_tokens=not chat, return_tensors="pt")["input_ids"]
        begin = ids.shape[1]
        for _ in range(4):
            token = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
            if int(token) == tokenizer.eos_token_id:
                break
        wanted.append(tokenizer.decode(ids[0, begin:], skip_special_tokens=True))
    assert extra._generate(run, prompts) == wanted


def test_generation_is_scored_against_the_completions(
    ready: Callable[..., Ready], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ready()
    extra = on_test_rows(rows=4)
    wanted = [text for _, text in extra._pairs(run)]
    assert wanted == [" bad", " good", " bad", " good"]
    monkeypatch.setattr(Generation, "_generate", lambda self, ready, prompts: ["bad", "bad film", "film", "good"])
    found = extra.after(run)
    assert found["exact_match"] == 0.5
    assert found["generation_f1"] == 0.5
    assert 0 < found["chrf"] < 1
    assert found.keys() == {measure.name for measure in extra.measures}


def test_a_pattern_takes_the_answer_out_of_a_text() -> None:
    extra = Generation(pattern=r"#### (\S+)")
    assert extra._answer("2 #### 4 then 5 #### 7 \n") == "7"
    assert extra._answer("seven") is None
    with pytest.raises(ValueError, match="not a regular expression"):
        Generation(pattern="(")


@pytest.mark.parametrize(
    ("written", "is_right"),
    [
        ("so it is -5", True),
        ("it is -5.0", True),
        ("first 7, then -5.", True),
        ("it is 5", False),
        ("it is -50", False),
        ("none", False),
    ],
)
def test_answers_that_a_pattern_finds_are_compared_as_they_stand(
    ready: Callable[..., Ready], monkeypatch: pytest.MonkeyPatch, written: str, is_right: bool
) -> None:
    run = ready()
    extra = on_test_rows(rows=1, pattern=r"-?[0-9](?:[0-9,]*[0-9])?(?:\.[0-9]+)?")
    with pytest.raises(SettingError, match=r"pattern, .*, finds nothing in a completion of test: ' bad'"):
        extra.before(run)
    monkeypatch.setattr(Generation, "_pairs", lambda self, ready: [("prompt", "that makes -5")])
    monkeypatch.setattr(Generation, "_generate", lambda self, ready, prompts: [written])
    assert extra.after(run)["exact_match"] == is_right
    assert _is_same("1,500", "1500")
    assert not _is_same("1.5", "15")


def test_generation_needs_prompts_that_were_held_out(ready: Callable[..., Ready], general: Path) -> None:
    with pytest.raises(SettingError, match="this run has no held-out rows"):
        Generation().before(ready(data={}))
    run = ready(data={"train": str(general), "test": str(general), "text": "document"})
    with pytest.raises(SettingError, match="needs held-out rows with a prompt and a completion; this run has text"):
        on_test_rows().before(run)


def test_latency_is_that_of_the_merged_model(ready: Callable[..., Ready]) -> None:
    run, extra = ready(), Latency(batch=2, repeats=3)
    change(run.attached.model)
    inputs = {"input_ids": torch.tensor([[2, 6, 7, 8]])}
    expected = run.attached.model.eval()(**inputs).logits
    base, rows = run.attached.base_model, run.trainer.args.per_device_eval_batch_size
    found = extra.after(run)
    assert run.trainer.args.per_device_eval_batch_size == rows != 2
    assert found["latency_seconds"] > 0
    assert extra.notes == []
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    torch.testing.assert_close(base(**inputs).logits, expected)


def test_latency_of_what_cannot_be_merged_says_so(ready: Callable[..., Ready]) -> None:
    run, extra = ready(recipe=[{"prompt_tuning": {"num_virtual_tokens": 3}}]), Latency(batch=2, repeats=1)
    assert extra.after(run)["latency_seconds"] > 0
    assert "latency of the model as trained: prompt_tuning cannot be merged" in extra.notes[0]
    Recipe.remove(run.attached.model)


@pytest.fixture
def harness_task(tmp_path: Path) -> Path:
    """A task of one's own for lm-evaluation-harness: is a word good or bad?"""
    pytest.importorskip("lm_eval", reason="lm_eval is missing: pip install 'shoestring[lm-eval]'")
    rows = [{"text": f"the film is {word}", "answer": index % 2} for index, word in enumerate(["dull", "warm"] * 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny_reviews",
        "tag": "of_films",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{text}} is",
        "doc_to_target": "answer",
        "doc_to_choice": ["bad", "good"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tiny_reviews.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def test_the_harness_gives_what_a_plain_ranking_gives(ready: Callable[..., Ready], harness_task: Path) -> None:
    run = ready()
    change(run.attached.model)
    extra = LmEval(tasks=["tiny_reviews"], include_path=str(harness_task))
    extra.check(run.settings)
    model, tokenizer = run.attached.model.eval(), run.trainer.processing_class
    hits = 0
    for line in (harness_task / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = torch.tensor([tokenizer(row["text"] + " is")["input_ids"]])
        scores = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        good, bad = (scores[tokenizer.convert_tokens_to_ids(word)] for word in ("good", "bad"))
        hits += int(good > bad) == row["answer"]
    assert extra.after(run) == {"tiny_reviews_acc": hits / 8}
    assert [(measure.name, measure.better) for measure in extra.measures] == [("tiny_reviews_acc", "higher")]
    LmEval(tasks=["tiny_reviews"], include_path=str(harness_task)).before(run)
    with pytest.raises(SettingError, match="tiny_reviews has none of perplexity; it has acc"):
        LmEval(tasks=["tiny_reviews"], metrics=["perplexity"], include_path=str(harness_task)).before(run)
    with pytest.raises(SettingError, match="of_films is a tag; name tasks of it: tiny_reviews"):
        LmEval(tasks=["of_films"], include_path=str(harness_task)).before(run)
    (harness_task / "rows.jsonl").unlink()
    with pytest.raises(SettingError, match="tiny_reviews cannot be loaded: "):
        LmEval(tasks=["tiny_reviews"], include_path=str(harness_task)).before(run)
    with pytest.raises(SettingError, match="unknown task 'tiny_review'"):
        LmEval(tasks=["tiny_review"], include_path=str(harness_task)).check(run.settings)


def test_several_filters_of_answers_are_told_apart_and_the_task_says_which_way_is_better(
    ready: Callable[..., Ready], harness_task: Path
) -> None:
    task = yaml.safe_load((harness_task / "tiny_reviews.yaml").read_text())
    del task["doc_to_choice"]
    first = {"function": "take_first"}
    task |= {
        "task": "tiny_answers",
        "output_type": "generate_until",
        "doc_to_target": "{{ ['bad', 'good'][answer] }}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 2, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": False}],
        "filter_list": [
            {"name": "whole", "filter": [first]},
            {"name": "lower", "filter": [{"function": "lowercase"}, first]},
        ],
    }
    (harness_task / "tiny_answers.yaml").write_text(yaml.safe_dump(task))
    run, some = ready(), {"tasks": ["tiny_answers"], "include_path": str(harness_task)}
    with pytest.raises(SettingError, match="by several filters; name one: 'exact_match,lower' or 'exact_match,whole'"):
        LmEval(metrics=["exact_match"], **some).before(run)
    extra = LmEval(metrics=["exact_match,whole"], **some)
    extra.before(run)
    assert [(measure.name, measure.better) for measure in extra.measures] == [
        ("tiny_answers_exact_match_whole", "lower")  # the task's word, which is not the harness's
    ]
    assert set(extra.after(run)) == {"tiny_answers_exact_match_whole"}
    (harness_task / "tiny_group.yaml").write_text(yaml.safe_dump({"group": "tiny_group", "task": ["tiny_answers"]}))
    _task_manager.cache_clear()
    (of_group,) = LmEval(metrics=["exact_match"], **some | {"tasks": ["tiny_group"]}).measures
    assert of_group.better == "lower"
    ways = {each.label: each.better for each in LmEval(tasks=["wikitext"], metrics=["bits_per_byte", "mine"]).measures}
    assert ways == {"bits_per_byte of wikitext": "lower", "mine of wikitext": None}
