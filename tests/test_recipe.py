"""Recipes: order, conflicts, attaching and undoing, writing and reading."""

import copy
import gc
import tempfile
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from peft import (
    AdaLoraConfig,
    CPTConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from shoestring import Recipe, load
from shoestring.adapters import HUTConfig, S2LoRAConfig
from shoestring.errors import SettingError
from shoestring.recipe import attached_to, known_techniques, read_recipe
from shoestring.selection import Unfreeze
from shoestring.technique import Moment, Phase, Technique

IDS = torch.arange(13)[None] * 5 % 61


def decoder(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
    )
    return LlamaForCausalLM(config).eval()


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=61, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **settings})


@dataclass
class Scale(Technique):
    """Multiplies the logits; a technique with a forward hook, a weight of its own in the base, and state."""

    factor: float = 2.0

    name = "scale"
    phase = Phase.BLOCK
    claims = frozenset({"the logits"})

    def __post_init__(self):
        self.seen = torch.zeros(2)

    @contextmanager
    def attach(self, model):
        norm = next(p for name, p in model.named_parameters() if name.endswith("model.norm.weight"))
        norm.requires_grad_(True)

        def scaled(module, args, output):
            output.logits = output.logits * self.factor
            return output

        hook = model.register_forward_hook(scaled)
        model.left_behind = True
        yield model
        hook.remove()

    def on_step_end(self, moment):
        self.seen = self.seen + moment.step

    def state_dict(self):
        return {"seen": self.seen, "nested": {"steps": 3, "names": ["a"]}}

    def load_state_dict(self, state):
        assert state["nested"] == {"steps": 3, "names": ["a"]}
        self.seen = state["seen"]


@dataclass
class OtherScale(Technique):
    name = "other_scale"
    phase = Phase.ACTIVATION
    claims = frozenset({"the logits"})


@dataclass
class NeedsAdapter(Technique):
    name = "needs_adapter"
    phase = Phase.SELECTION
    needs = frozenset({Phase.ADAPTER})


@dataclass
class Alone(Technique):
    name = "alone"
    phase = Phase.BLOCK
    alone_in_phase = True


class TestOrderAndConflicts:
    def test_techniques_are_sorted_by_phase(self):
        recipe = Recipe(Scale(), PromptTuningConfig(num_virtual_tokens=3), lora())
        assert [t.name for t in recipe.techniques] == ["lora", "prompt_tuning", "scale"]

    def test_two_that_claim_one_thing_are_refused(self):
        with pytest.raises(SettingError, match="scale and other_scale cannot be combined: both act on the logits"):
            Recipe(OtherScale(), Scale())

    def test_one_that_must_be_alone_is_refused_beside_another(self):
        with pytest.raises(SettingError, match="at most one of them may act in the block phase"):
            Recipe(Alone(), Scale())

    def test_one_that_needs_another_phase_is_refused_without(self):
        with pytest.raises(SettingError, match="needs_adapter needs a technique of the phase adapter"):
            Recipe(NeedsAdapter())
        Recipe(NeedsAdapter(), lora())

    def test_the_same_twice_is_refused(self):
        with pytest.raises(SettingError, match="lora stands twice"):
            Recipe(lora(), lora(r=8))

    def test_two_prompts_are_refused(self):
        with pytest.raises(SettingError, match="cannot be combined"):
            Recipe(PromptTuningConfig(num_virtual_tokens=3), PrefixTuningConfig(num_virtual_tokens=3))

    def test_something_else_is_refused(self):
        with pytest.raises(SettingError, match="techniques and peft configs, got 'lora'"):
            Recipe("lora")


class TestText:
    def test_yaml_round_trips(self):
        recipe = Recipe(lora(), HUTConfig(r=3, target_modules=["down_proj"]))
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
        assert yaml.safe_load(recipe.to_yaml()) == [
            {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}},
            {"hut": {"r": 3, "target_modules": ["down_proj"]}},
        ]

    def test_it_prints_what_differs_from_defaults(self):
        recipe = Recipe(HUTConfig(r=3, target_modules="all-linear"))
        assert repr(recipe) == "Recipe(hut(target_modules='all-linear', r=3))"

    def test_every_known_technique_can_be_named(self):
        known = known_techniques()
        assert {"lora", "hut", "s2_lora", "bottleneck", "adalora", "prefix_tuning"} <= set(known)
        assert len([info for info in known.values() if info.origin == "peft"]) >= 45
        for info in known.values():
            assert info.summary, info.name

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ([{"hutt": {}}], r"recipe\[0\]: unknown technique 'hutt'. Did you mean 'hut'"),
            (
                [{"lora": {"rank_patern": 8}}],
                r"recipe\[0\].lora: unknown setting 'rank_patern'. Did you mean 'rank_pattern'",
            ),
            ([{"hut": {}}, {"lora": {"r": "eight"}}], r"recipe\[1\].lora.r must be int, got 'eight'"),
            ([{"hut": {"r": 0}}], r"recipe\[0\].hut: r of hut must be at least 1, got 0"),
            ([{"hut": {}, "lora": {}}], "must be one technique with its settings"),
            ([{"hut": 8}], "must be a mapping of settings, got 8"),
            ({"hut": {}}, "recipe must be a list"),
            ([7], "must be one technique"),
            ([{"lora": {"peft_type": "HUT"}}], "unknown setting 'peft_type'"),
        ],
    )
    def test_a_wrong_entry_is_named(self, entries, message):
        with pytest.raises(SettingError, match=message):
            Recipe.from_list(entries)

    def test_bare_names_and_empty_settings_are_taken(self):
        assert Recipe.from_list(["hut", {"lora": None}]) == Recipe.from_list([{"hut": {}}, {"lora": {}}])

    def test_numbers_and_truths_in_quotes_are_what_they_say(self):
        text = '- lora: {r: "4", use_rslora: "no", lora_dropout: 1e-1, target_modules: "all-linear"}'
        (config,) = (technique.config for technique in Recipe.from_yaml(text).techniques)
        assert (config.r, config.use_rslora, config.lora_dropout) == (4, False, 0.1)
        assert config.target_modules == "all-linear"


RECIPES = {
    "lora": lambda: Recipe(lora()),
    "hut": lambda: Recipe(HUTConfig(target_modules="all-linear", init_weights=False)),
    "s2_lora": lambda: Recipe(S2LoRAConfig(r=4, target_modules=["q_proj"], init_weights=False)),
    "ia3": lambda: Recipe(
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False)
    ),
    "prompt": lambda: Recipe(PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "two adapters": lambda: Recipe(lora(), HUTConfig(target_modules=["down_proj"], init_weights=False)),
    "stacked on one layer": lambda: Recipe(lora(), S2LoRAConfig(r=3, target_modules="all-linear", init_weights=False)),
    "three": lambda: Recipe(
        lora(),
        S2LoRAConfig(r=3, target_modules=["o_proj"], init_weights=False),
        HUTConfig(target_modules=["up_proj"], init_weights=False),
    ),
    "adapter and prefix": lambda: Recipe(lora(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "with a technique": lambda: Recipe(lora(), Scale()),
    "nothing": lambda: Recipe(),
}

PROMPT = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
PROMPT_ENCODERS = {
    "p_tuning": lambda: PromptEncoderConfig(**PROMPT, encoder_hidden_size=8),
    "p_tuning by an LSTM": lambda: PromptEncoderConfig(
        **PROMPT, encoder_hidden_size=8, encoder_reparameterization_type="LSTM"
    ),
    "projected prefix": lambda: PrefixTuningConfig(**PROMPT, prefix_projection=True, encoder_hidden_size=8),
    "cpt": lambda: CPTConfig(cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3], **PROMPT),
}


@pytest.fixture(params=RECIPES, ids=str)
def recipe(request):
    return RECIPES[request.param]()


@pytest.fixture(autouse=True)
def _scale_is_known(monkeypatch):
    monkeypatch.setitem(__import__("shoestring.technique", fromlist=["TECHNIQUES"]).TECHNIQUES, "scale", Scale)


class TestAttaching:
    def test_it_is_undone_to_the_last_attribute(self, recipe):
        model = decoder()
        model.model.layers[0].requires_grad_(False)
        before = {
            "state": {name: value.clone() for name, value in model.state_dict().items()},
            "modules": [(name, id(module)) for name, module in model.named_modules()],
            "trained": [(name, p.requires_grad) for name, p in model.named_parameters()],
            "attributes": {name: set(module.__dict__) for name, module in model.named_modules()},
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            "logits": logits(model),
        }
        with recipe(model) as changed:
            changed.train()
            changed(input_ids=IDS, labels=IDS).loss.backward()
        assert before["modules"] == [(name, id(module)) for name, module in model.named_modules()]
        assert before["trained"] == [(name, p.requires_grad) for name, p in model.named_parameters()]
        assert before["attributes"] == {name: set(module.__dict__) for name, module in model.named_modules()}
        assert before["hooks"] == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        assert not model.training
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(value, before["state"][name]) for name, value in model.state_dict().items())
        assert torch.equal(logits(model), before["logits"])

    def test_it_is_undone_after_an_error(self, recipe):
        model = decoder()
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(RuntimeError, match="mine"), recipe(model):
            raise RuntimeError("mine")
        assert names == [name for name, _ in model.named_modules()]

    def test_saved_and_loaded_gives_the_same_model(self, recipe, tmp_path):
        model = recipe.apply(decoder())
        with torch.no_grad():
            for parameter in attached_to(model).trained_base().values():
                parameter.add_(0.125)
        attached_to(model).save(tmp_path / "saved")
        again = load(decoder(), tmp_path / "saved")
        assert torch.equal(logits(again), logits(model))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {name for name, p in again.named_parameters() if p.requires_grad}
        assert read_recipe(tmp_path / "saved") == recipe
        assert not list((tmp_path / "saved").rglob("*.partial"))

    def test_a_model_that_nobody_holds_is_freed(self, recipe):
        model = recipe.apply(decoder()).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        parts = [weakref.ref(part) for part in (model, attached_to(model), attached_to(model).base_model)]
        del model
        gc.collect()
        assert [part() for part in parts] == [None, None, None]

    def test_all_that_should_learn_gets_a_gradient(self, recipe):
        model = recipe.apply(decoder()).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert [name for name, p in trained.items() if p.grad is None] == []

    def test_it_stays_what_the_user_wrote(self, recipe):
        before = recipe.to_list()
        Recipe.remove(recipe.apply(decoder()))
        assert recipe.to_list() == before
        first, second = recipe.apply(decoder()), recipe.apply(decoder())
        assert attached_to(first) is not attached_to(second)

    def test_one_model_takes_one_recipe(self):
        model = Recipe(lora()).apply(decoder())
        with pytest.raises(ValueError, match="has a recipe attached already"):
            Recipe(HUTConfig()).apply(model)
        Recipe.remove(model)
        with pytest.raises(ValueError, match="No recipe is attached"):
            Recipe.remove(model)

    def test_replaced_pretrained_weights_are_told_on_removal(self):
        model = Recipe(lora(init_lora_weights="pissa")).apply(decoder())
        with pytest.raises(ValueError, match=r"replaced 4 pretrained weights \(model.layers.0.self_attn.q_proj.weight"):
            Recipe.remove(model)

    def test_the_same_lora_as_plain_peft(self):
        torch.manual_seed(3)
        plain = get_peft_model(decoder(), lora())
        torch.manual_seed(3)
        ours = Recipe(lora()).apply(decoder())
        assert torch.equal(logits(ours), logits(plain))
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in plain.named_parameters()]

    def test_a_new_head_is_trained_and_saved_with_the_adapter(self, tmp_path):
        recipe = Recipe(LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        model = recipe.apply(classifier())
        heads = [p for name, p in model.named_parameters() if "classifier" in name and p.requires_grad]
        assert len(heads) == 2
        with torch.no_grad():
            heads[0].add_(1.0)
        attached_to(model).save(tmp_path)
        assert torch.equal(logits(load(classifier(), tmp_path)), logits(model))

    def test_trained_base_weights_are_kept_on_removal(self):
        base = decoder()
        model = Recipe(Scale()).apply(base)
        with torch.no_grad():
            base.model.norm.weight.add_(1.0)
        assert torch.equal(Recipe.remove(model).model.norm.weight, torch.full((24,), 2.0))

    def test_copies_of_a_model_are_independent(self):
        model = Recipe(lora()).apply(decoder())
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert logits(model).any()


class TestSaving:
    def test_peft_alone_can_load_the_only_adapter(self, tmp_path):
        model = Recipe(lora()).apply(decoder())
        attached_to(model).save(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(decoder(), tmp_path)), logits(model))

    def test_nothing_is_written_beside_the_folder(self, tmp_path, monkeypatch):
        """It may be a file system of its own, or all that the user may write into."""
        folder, made = tmp_path / "saved", []
        mkdtemp = tempfile.mkdtemp
        monkeypatch.setattr(tempfile, "mkdtemp", lambda *a, **k: made.append(mkdtemp(*a, **k)) or made[-1])
        attached_to(Recipe(lora()).apply(decoder())).save(folder)
        assert made
        assert all(Path(each).is_relative_to(folder) for each in made)
        assert [path.name for path in tmp_path.iterdir()] == ["saved"]
        assert not [path for path in folder.iterdir() if path.is_dir()]

    @pytest.mark.parametrize("kind", PROMPT_ENCODERS)
    def test_an_encoder_of_prompts_comes_back(self, tmp_path, kind):
        def learned(model: nn.Module) -> dict[str, torch.Tensor]:
            return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

        model = Recipe(PROMPT_ENCODERS[kind]()).apply(decoder())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
        expected, values = logits(model), learned(model)
        attached_to(model).save(tmp_path)
        again = load(decoder(), tmp_path)
        assert torch.equal(logits(again), expected)
        torch.testing.assert_close(learned(again), values, rtol=0, atol=0)
        torch.testing.assert_close(logits(PeftModel.from_pretrained(decoder(), tmp_path)), expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * parameter.requires_grad)
        attached_to(model).restore(tmp_path)  # as a run that goes back to its best model
        assert torch.equal(logits(model), expected)

    def test_an_encoder_of_prompts_that_was_not_saved_is_refused(self, tmp_path):
        attached_to(Recipe(PROMPT_ENCODERS["p_tuning"]()).apply(decoder())).save(tmp_path)
        (tmp_path / "prompt_encoder.safetensors").unlink()
        with pytest.raises(SettingError, match=r"holds no prompt_encoder.safetensors"):
            load(decoder(), tmp_path)

    def test_state_of_techniques_comes_back(self, tmp_path):
        model = Recipe(lora(), Scale()).apply(decoder())
        attached_to(model).event("on_step_end", Moment(model, step=5))
        attached_to(model).save(tmp_path)
        again = attached_to(load(decoder(), tmp_path))
        assert torch.equal(again.techniques[1].seen, torch.full((2,), 5.0))

    @pytest.mark.parametrize("file", ["techniques.json", "techniques.safetensors"])
    def test_a_damaged_file_is_named(self, tmp_path, file):
        model = Recipe(lora(), Scale()).apply(decoder())
        attached_to(model).save(tmp_path)
        (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:20])
        with pytest.raises(SettingError, match=f"{file} cannot be read: "):
            load(decoder(), tmp_path)

    def test_what_another_recipe_left_in_the_folder_is_not_loaded(self, tmp_path):
        model = Recipe(lora(), Scale()).apply(decoder())
        with torch.no_grad():
            attached_to(model).trained_base()["model.norm.weight"].add_(1.0)
        attached_to(model).save(tmp_path)
        attached_to(Recipe(lora()).apply(decoder())).save(tmp_path)
        assert torch.equal(load(decoder(), tmp_path).get_base_model().model.norm.weight, torch.ones(24))
        assert not (tmp_path / "techniques.safetensors").exists()

    def test_another_recipe_is_refused(self, tmp_path):
        attached_to(Recipe(lora()).apply(decoder())).save(tmp_path)
        other = attached_to(Recipe(lora(r=8)).apply(decoder()))
        with pytest.raises(SettingError, match="was saved by Recipe"):
            other.restore(tmp_path)

    def test_another_base_model_is_refused(self, tmp_path):
        attached_to(Recipe(lora()).apply(decoder(layers=3))).save(tmp_path)
        with pytest.raises(SettingError, match="holds the foreign"):
            load(decoder(layers=2), tmp_path)

    def test_weights_of_another_shape_are_refused(self, tmp_path):
        attached_to(Recipe(Unfreeze(norms=True)).apply(decoder())).save(tmp_path)
        file = tmp_path / "trained.safetensors"
        narrow = {name: tensor[:1] for name, tensor in load_file(file).items()}  # a single number would fit anywhere
        save_file(narrow, file)
        with pytest.raises(SettingError, match=r"as \[1\], which is \[24\] in the base model here"):
            load(decoder(), tmp_path)

    def test_statistics_of_another_shape_are_refused_before_anything_is_copied(self, tmp_path):
        def model() -> nn.Module:
            return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

        trained = Recipe(Unfreeze(blocks=[], modules=["0", "1"])).apply(model())
        trained.train()(torch.randn(5, 3))
        attached_to(trained).save(tmp_path)
        file = tmp_path / "trained.safetensors"
        save_file({**load_file(file), "1.running_mean": torch.ones(1)}, file)
        other = model()
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(SettingError, match=r"1\.running_mean as \[1\], which is \[4\] in the base model here"):
            load(other, tmp_path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())

    def test_a_folder_without_a_recipe_is_refused(self, tmp_path):
        with pytest.raises(SettingError, match=r"holds no recipe.yaml"):
            load(decoder(), tmp_path)
        (tmp_path / "recipe.yaml").write_text("version: 99\nrecipe: []\n")
        with pytest.raises(SettingError, match="damaged or of another version"):
            load(decoder(), tmp_path)

    def test_damaged_weights_are_refused_and_the_model_left_alone(self, tmp_path):
        attached_to(Recipe(lora()).apply(decoder())).save(tmp_path)
        weights = tmp_path / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:200])
        model = decoder()
        with pytest.raises(SettingError, match="no readable weights of lora"):
            load(model, tmp_path)
        assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in decoder().modules()]


class TestEvents:
    def test_added_losses_change_gradients_as_added_by_hand(self):
        model = Recipe(S2LoRAConfig(r=4, target_modules=["q_proj"], sparsity=0.5, sparsity_by="penalty")).apply(
            decoder()
        )
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        name, vector = next((n, p) for n, p in model.named_parameters() if n.endswith("coefficients"))
        got, vector.grad = vector.grad, None
        model.eval()(input_ids=IDS, labels=IDS).loss.backward()
        torch.testing.assert_close(got, vector.grad + 0.5, msg=f"{name}: d(sparsity * |l|) is sparsity where l = 1")

    def test_a_forward_without_a_loss_is_refused_where_one_is_added_to(self):
        model = Recipe(S2LoRAConfig(target_modules=["q_proj"], sparsity=0.5, sparsity_by="penalty")).apply(decoder())
        with pytest.raises(ValueError, match="this forward returned none"):
            model.train()(input_ids=IDS)
        model.eval()(input_ids=IDS)

    def test_adalora_is_told_of_each_step(self):
        config = AdaLoraConfig(
            target_modules=["q_proj"], init_r=6, target_r=2, tinit=1, tfinal=2, total_step=8, deltaT=1
        )
        model = Recipe(config).apply(decoder()).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        attached = attached_to(model)
        for step in range(1, 9):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            attached.event("on_step_end", Moment(model, optimizer, step))
            optimizer.zero_grad()
        left = sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n)
        assert left <= 2 * 2  # target_r for each of two layers

    def test_adalora_learns_nothing_from_a_step_that_was_skipped(self):
        config = AdaLoraConfig(
            target_modules=["q_proj"], init_r=6, target_r=2, tinit=1, tfinal=2, total_step=8, deltaT=1
        )
        model = Recipe(config).apply(decoder()).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(torch.inf)
        attached_to(model).event("on_step_end", Moment(model, None, 1, skipped=True))
        allocator = next(m for m in model.modules() if hasattr(m, "rankallocator")).rankallocator
        assert not allocator.exp_avg_ipt
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(1.0)
        attached_to(model).event("on_step_end", Moment(model, None, 2))
        assert allocator.exp_avg_ipt

    def test_parameters_with_two_owners_are_refused(self):
        class Fast(Scale):
            name = "fast"
            phase = Phase.SELECTION
            claims = frozenset()

            def parameter_groups(self, model):
                return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1.0}]

        class Faster(Fast):
            name = "faster"

        attached = attached_to(Recipe(lora(), Fast(), Faster()).apply(decoder()))
        with pytest.raises(SettingError, match="give one parameter optimizer options"):
            attached.parameter_groups()
