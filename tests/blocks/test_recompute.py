"""recompute: not a bit of a gradient changes; what it keeps; its refusals."""

from pathlib import Path

import pytest
import torch
import transformers as t
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig
from stock_models import DEBERTA, MODELS, OWN_ATTENTION, TEXT, WORDS, attention_is, batch_for, gradients, made
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from shoestring import Ledger, Recipe
from shoestring.blocks import Recompute, TokenTune, find_stacks
from shoestring.blocks.base import running_passes
from shoestring.errors import SettingError

VARIANTS = {"all": {}, "attention kept": {"keep": "attention"}, "every second": {"every": 2}}


def assert_changes_nothing(model: nn.Module, batch: dict[str, Tensor], *others: LoraConfig, **settings: object) -> None:
    """Against the stock model without a cache, which may lay out keys in another way, and so round otherwise."""
    if any(stack.causal for stack in find_stacks(model)):
        batch = {**batch, "use_cache": False}
    found = []
    for techniques in ((), (Recompute(**settings),)):
        torch.manual_seed(3)  # adapters start the same
        with Recipe(*others, *techniques)(model) as attached:
            torch.manual_seed(5)
            loss = attached(**batch).loss
            loss.backward()
            found.append((loss, gradients(attached), torch.get_rng_state()))
    assert torch.equal(found[0][0], found[1][0])
    assert any(g.any() for g in found[0][1].values())
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("name", MODELS)
def test_no_bit_of_a_gradient_changes_under_dropout(name):
    model = made(name, dropout=True)
    assert_changes_nothing(model, batch_for(name, model))


@pytest.mark.parametrize("settings", list(VARIANTS.values())[1:], ids=list(VARIANTS)[1:])
@pytest.mark.parametrize("name", ["llama grouped", "gemma3", "gpt2", "bert", "t5"])
def test_no_bit_changes_where_less_is_run_again(name, settings):
    model = made(name, dropout=True)
    assert_changes_nothing(model, batch_for(name, model), **settings)


@pytest.mark.parametrize("settings", [{}, {"every": 2}, {"segments": 2}], ids=["all", "every second", "segments"])
@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_blocks_that_return_tuples(name, settings):
    model = made(name, dropout=True)
    assert_changes_nothing(model, batch_for(name, model), **settings)


@pytest.mark.parametrize("settings", [{}, {"segments": 1}], ids=["all", "segments"])
def test_blocks_that_run_several_times(settings):
    model = t.AlbertForTokenClassification(t.AlbertConfig(**TEXT, embedding_size=16, num_hidden_groups=1, num_labels=5))
    ids = torch.randint(3, WORDS, (2, 7), generator=torch.Generator().manual_seed(0))
    assert_changes_nothing(model.train(), {"input_ids": ids, "labels": ids % 5}, **settings)


@pytest.mark.parametrize("settings", [{}, {"segments": 2}], ids=["all", "segments"])
def test_a_forward_that_the_keyboard_ended_leaves_nothing_behind(settings):
    model = made("llama")
    batch = batch_for("llama", model)

    def end(module: nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    def interrupt(attached: nn.Module) -> None:
        handle = find_stacks(model)[0].blocks[-1].mlp.register_forward_pre_hook(end)
        with pytest.raises(KeyboardInterrupt):
            attached(**batch)
        handle.remove()

    with Recipe(Recompute(**settings))(model) as attached:
        attached(**batch).loss.backward()
        expected = gradients(attached)
        interrupt(attached)
        attached(**batch).loss.backward()
        found = gradients(attached)
        interrupt(attached)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert not running_passes()
    assert model.config.use_cache
    assert model.eval().generate(batch["input_ids"][2:], max_new_tokens=2).shape[1] == batch["input_ids"].shape[1] + 2


def test_passes_of_two_techniques_both_end():
    model = made("llama")
    with Recipe(TokenTune(keep_fraction=0.5), Recompute())(model) as attached:
        attached(**batch_for("llama", model)).loss.backward()
        assert not running_passes()


def test_blocks_that_hand_on_more_than_hidden_states_are_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    layers = {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2}
    places = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0}
    model = t.WavLMModel(t.WavLMConfig(**sizes, **layers, **places)).train()
    for settings in ({}, {"segments": 1}):
        with (
            Recipe(Recompute(**settings))(model) as attached,
            pytest.raises(
                SettingError, match=r"WavLMEncoderLayer hands on more than hidden states, .* recompute cannot"
            ),
        ):
            attached(input_values=torch.randn(2, 90))


def test_what_comes_between_blocks_is_refused_in_segments():
    torch.manual_seed(0)
    model = t.DebertaV2ForSequenceClassification(t.DebertaV2Config(**DEBERTA, conv_kernel_size=3)).train()
    assert_changes_nothing(model, batch_for("deberta", model))
    with (
        Recipe(Recompute(segments=2))(model) as attached,
        pytest.raises(SettingError, match=r"changes what DebertaV2Layer of deberta\.encoder\.layer returns before"),
    ):
        attached(**batch_for("deberta", model))


def test_a_block_whose_code_hides_that_it_returns_a_tuple_is_refused_in_segments():
    model = made("bloom")
    with pytest.MonkeyPatch.context() as patch:
        own = type(model.transformer.h[0]).forward

        def forward(self, hidden_states, **kwargs):
            outputs = own(self, hidden_states, **kwargs)
            return outputs

        patch.setattr(type(model.transformer.h[0]), "forward", forward)
        with (
            Recipe(Recompute(segments=2))(model) as attached,
            pytest.raises(SettingError, match="changes what BloomBlock of"),
        ):
            attached(**batch_for("bloom", model))


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(
    ("name", "layers"), [("llama grouped", ["q_proj", "down_proj"]), ("bert", ["query"]), ("t5", ["q", "wo"])]
)
def test_no_bit_changes_with_adapters_in_a_frozen_model(name, layers, settings):
    model = made(name, dropout=True)
    adapters = LoraConfig(r=2, target_modules=layers, lora_dropout=0.2, init_lora_weights=False)
    assert_changes_nothing(model, batch_for(name, model), adapters, **settings)


def test_no_bit_changes_under_autocast():
    model = made("llama grouped")
    with torch.autocast("cpu", torch.bfloat16):
        assert_changes_nothing(model, batch_for("llama grouped", model))


def test_only_what_enters_blocks_is_kept():
    model = made("llama")
    ids = torch.randint(3, WORDS, (2, 33))

    def saved(*techniques: Recompute) -> int:
        with Recipe(*techniques)(model) as attached:
            with Ledger(attached) as ledger:
                attached(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad()
        return ledger.report().saved_bytes

    stock, nothing, attention, second = (
        saved(),
        saved(Recompute()),
        saved(Recompute(keep="attention")),
        saved(Recompute(every=2)),
    )
    one_state = 2 * 33 * 16 * 4
    assert nothing < stock - 3 * 10 * one_state
    assert one_state * 3 <= attention - nothing <= one_state * 3 * 2  # the output of attention, and a number a query
    assert nothing < second < stock


def test_evaluation_runs_the_stock_blocks():
    model = made("llama").eval()
    batch = batch_for("llama", model)
    expected = model(**batch).logits
    with Recipe(Recompute())(model) as attached:
        attached.eval()
        assert torch.equal(attached(**batch).logits, expected)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_an_error_leaves_the_model_usable():
    model = made("llama")
    batch = batch_for("llama", model)
    with Recipe(Recompute())(model) as attached:
        breaks = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attached(**batch)
        breaks.remove()
        attached(**batch).loss.backward()
        assert any(g.any() for g in gradients(attached).values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": "everything"}, "keep of recompute must be nothing or attention, got 'everything'"),
        ({"every": 0}, "every of recompute must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        Recompute(**settings)


@pytest.mark.parametrize("name", ["llama", "bloom", "bart"])
def test_keeping_attention_is_refused_where_it_is_not_torchs(name):
    model = made(name)
    with attention_is(model, "eager"):
        with (
            pytest.raises(SettingError, match=r"attention of [\w.]+ is 'eager'; load the model with .*'sdpa'"),
            Recipe(Recompute(keep="attention"))(model),
        ):
            pass
        with Recipe(Recompute())(model):
            pass


def test_keeping_attention_sees_through_redirected_attention():
    model = made("llama")
    with Recipe(TokenTune(), Recompute(keep="attention"))(model) as attached:
        attached(**batch_for("llama", model)).loss.backward()
    with (
        attention_is(model, "eager"),
        pytest.raises(SettingError, match="is 'eager'"),
        Recipe(TokenTune(), Recompute(keep="attention"))(model),
    ):
        pass


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_the_trainer_is_refused(reentrant, tmp_path: Path):
    model = made("llama")
    rows = torch.randint(3, WORDS, (8, 6)).tolist()
    arguments = TrainingArguments(
        tmp_path,
        max_steps=1,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    attached = Recipe(Recompute()).apply(model)
    trainer = Trainer(attached, arguments, train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}))
    with pytest.raises(SettingError, match=r"gradient_checkpointing of the trainer .* switch it off"):
        trainer.train()


def test_prefix_tuning_is_refused():
    model = made("llama grouped")
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with Recipe(config, Recompute())(model) as attached, pytest.raises(SettingError, match="prefix tuning"):
        attached(**batch_for("llama grouped", model))
