"""Norm tuning: which norms it finds, what it keeps for backward, where it starts, and what it refuses."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5EncoderModel,
)

from shoestring import Ledger, Recipe, load
from shoestring.errors import SettingError
from shoestring.fakes import Valueless
from shoestring.recipe import attached_to
from shoestring.selection import NormTuning, Unfreeze
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import CLASSIFIER, classifier, decoder
from shoestring.training import RunSettings, train

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


def clip_tower(**settings) -> nn.Module:
    """The vision tower of CLIP ViT-L/14, without values."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            **{
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "patch_size": 14,
                **settings,
            }
        )
    )


NORMS_OF_CLIP = ("pre_layrnorm", "layer_norm1", "layer_norm2", "post_layernorm")


def test_in_clip_the_trained_numbers_are_those_of_its_fifty_norms():
    with torch.device("meta"):
        model = clip_tower()
    chosen = NormTuning().chosen(model)
    assert sum(p.numel() for p in chosen.values()) == (2 * 24 + 2) * 2 * 1024
    ends = {".".join(name.split(".")[-2:]) for name in chosen}
    assert ends == {f"{norm}.{key}" for norm in NORMS_OF_CLIP for key in ("weight", "bias")}


@pytest.mark.parametrize(
    ("make", "norms"),
    [
        (lambda: LlamaModel(LlamaConfig(**SMALL)), 5),
        (lambda: Qwen3Model(Qwen3Config(**SMALL, head_dim=8)), 9),  # norms of queries and keys, too
        (lambda: T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40)), 5),
        (classifier, 5),
        (decoder, 5),
    ],
    ids=["Llama", "Qwen3", "T5", "BERT", "decoder"],
)
def test_norms_of_every_class_are_found(make, norms):
    model = make()
    chosen = NormTuning().chosen(model)
    assert len({name.rpartition(".")[0] for name in chosen}) == norms
    assert all("norm" in name.lower() for name in chosen)


def test_features_start_as_the_base_models_and_nothing_is_copied():
    base = classifier().eval()
    parameters = {name: id(p) for name, p in base.named_parameters()}
    plain = base(**CLASSIFIER.batch()).logits
    model = Recipe(NormTuning()).apply(base)
    assert torch.equal(model(**CLASSIFIER.batch()).logits, plain)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n in parameters if "LayerNorm" in n} | {"classifier.weight", "classifier.bias"}


def test_beside_lora_both_train_and_the_norms_come_back_from_a_file(tmp_path):
    recipe = Recipe(LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), NormTuning())
    model = recipe.apply(classifier())
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sum("LayerNorm" in n for n in trained) == 10
    assert sum("lora_" in n for n in trained) == 4
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    want = model.eval()(**CLASSIFIER.batch()).logits
    attached_to(model).save(tmp_path)
    assert torch.equal(load(classifier().eval(), tmp_path).eval()(**CLASSIFIER.batch()).logits, want)


def saved_bytes(recipe: Recipe | None, tower: dict[str, int]) -> int:
    with Valueless() as mode:
        model = clip_tower(**tower).train()
        model = recipe.apply(model) if recipe is not None else model
        pixels = mode.from_tensor(torch.zeros(4, 3, 224, 224))
        with Ledger(model) as ledger:
            model(pixel_values=pixels).pooler_output.sum().backward()
        return ledger.report().saved_bytes


def test_less_is_kept_for_backward_than_by_full_tuning_and_by_lora_on_all_layers():
    tower = {"num_hidden_layers": 2}
    ours = saved_bytes(Recipe(NormTuning()), tower)
    linear = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    assert ours <= 0.75 * saved_bytes(None, tower)
    assert ours <= 0.75 * saved_bytes(Recipe(LoraConfig(r=8, target_modules=linear)), tower)


def test_the_optimizer_state_is_three_ten_thousandths_of_that_of_full_tuning():
    def state_bytes(model: nn.Module) -> int:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        return sum(value.nbytes for state in optimizer.state.values() for value in state.values())

    with Valueless():
        model = clip_tower()
        full = state_bytes(model)
        ours = state_bytes(Recipe(NormTuning()).apply(model))
    assert 0.0003 < ours / full < 0.00035


def test_parts_of_a_model_can_be_named_and_left_out():
    first = NormTuning(target_modules=["layer.0"]).chosen(classifier())
    assert len(first) == 4
    assert all(".layer.0." in name for name in first)
    rest = NormTuning(exclude_modules=["layer.0", "embeddings"]).chosen(classifier())
    assert len(rest) == 4
    assert all(".layer.1." in name for name in rest)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": 2}
    return ResNetForImageClassification(ResNetConfig(**sizes))


PICTURES = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1, 0, 1])}
OF_CONVOLUTIONS = {"r": 2, "target_modules": ["convolution"], "exclude_modules": r".*shortcut.*"}


@pytest.mark.parametrize(
    "technique", [NormTuning(), LoraConfig(**OF_CONVOLUTIONS), Unfreeze(modules=["stages.1"], blocks=[])]
)
def test_running_statistics_are_saved_and_go_back_where_their_norm_was_frozen(technique, tmp_path):
    base = resnet()
    before = {name: buffer.clone() for name, buffer in base.named_buffers()}
    assert sum("running_var" in name for name in before) == 6
    model = Recipe(technique).apply(base).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(**PICTURES).loss.backward()
        optimizer.step()
    want = model.eval()(**PICTURES).logits
    attached_to(model).save(tmp_path)
    loaded = load(resnet(), tmp_path).eval()
    assert torch.equal(loaded(**PICTURES).logits, want)
    resumed = Recipe(technique).apply(resnet())
    attached_to(resumed).restore(tmp_path)
    assert torch.equal(resumed.eval()(**PICTURES).logits, want)
    assert all(not torch.equal(buffer, before[name]) for name, buffer in base.named_buffers())
    stay = {id(module) for module in base.modules() if any(p.requires_grad for p in module.parameters(recurse=False))}
    Recipe.remove(model)
    for name, module in base.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            assert torch.equal(buffer, before[f"{name}.{key}"]) == (id(module) not in stay), (name, key)


class Plain(PreTrainedModel):
    """A model with one norm, or none."""

    def __init__(self, norm: nn.Module | None):
        super().__init__(LlamaConfig())
        self.linear = nn.Linear(3, 3)
        if norm is not None:
            self.norm = norm


def test_models_without_a_norm_that_learns_are_refused():
    with pytest.raises(SettingError, match="finds no norm in Plain"):
        NormTuning().chosen(Plain(None))
    with pytest.raises(SettingError, match=r"1 norms .* \(norm first\) have neither scale nor shift"):
        NormTuning().chosen(Plain(nn.LayerNorm(3, elementwise_affine=False)))
    with pytest.raises(SettingError, match="exclude_modules of norm_tuning: the model has no module 'layers'"):
        NormTuning(exclude_modules=["layers"]).chosen(classifier())


@pytest.mark.slow
def test_norms_of_the_packaged_encoder_learn_a_few_reviews(tmp_path):
    need("minilm", "rotten-tomatoes")
    report = train(
        RunSettings.from_dict(
            {
                "model": "packaged:minilm",
                "task": "text-classification",
                "data": {"train": "packaged:rotten-tomatoes", "max_length": 32, "max_train_rows": 32},
                "recipe": [{"norm_tuning": {}}],
                "train": {
                    "max_steps": 24,
                    "per_device_train_batch_size": 16,
                    "learning_rate": 1e-2,
                    "logging_steps": 1,
                    "eval_strategy": "no",
                    "seed": 0,
                },
                "output_dir": str(tmp_path / "run"),
            }
        )
    )
    losses = [loss for _, loss in report.losses]
    assert sum(losses[-4:]) / 4 < 0.75 * sum(losses[:2]) / 2, losses
    assert report.trained_parameters == 26 * 384 + 2 * 384 + 2
