"""Models that are like the known ones and yet not: what is exact stays exact, or is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

from shoestring import Recipe
from shoestring.activations import LowBitActivations, SharedNorm
from shoestring.activations.shared_norm import norm_form
from shoestring.adapters.placement import input_layers, layout_of
from shoestring.blocks import Recompute, Reversible, TokenTune, TokenWindows
from shoestring.blocks.recompute import _keep_attention
from shoestring.blocks.stacks import find_stacks
from shoestring.errors import SettingError
from shoestring.testing.tiny_models import Step, seeded, step

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 61}
IDS = torch.arange(3, 29).view(2, 13)
SOUND = {
    **TEXT,
    "conv_dim": [8, 8],
    "conv_stride": [2, 2],
    "conv_kernel": [3, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
DROPOUTS = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """A tiny model in double precision, all of whose weights are random."""
    with seeded(0):
        model = build().double().train()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        return model


def llava() -> nn.Module:
    """Reads what its vision encoder has before the last block, as it does by default."""
    vision = transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**TEXT), image_token_index=60, image_token_id=60
    )
    return transformers.LlavaForConditionalGeneration(config)


def pictures_and_text() -> dict[str, Any]:
    ids = IDS.clone()
    ids[:, 1:5] = 60  # one for each patch
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    return {"input_ids": ids, "labels": ids, "pixel_values": pixels}


def weighted_hubert() -> nn.Module:
    config = transformers.HubertConfig(
        **SOUND, use_weighted_layer_sum=True, num_labels=3, **dict.fromkeys(DROPOUTS, 0.0)
    )
    return transformers.HubertForSequenceClassification(config)


def sound() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 200).double(), "labels": torch.tensor([0, 2])}


def gradients(model: nn.Module, batch: dict[str, Any], *techniques: Any) -> Step:
    model = Recipe(*techniques).apply(model) if techniques else model
    return step(model, batch)


@pytest.mark.parametrize(
    ("build", "batch", "technique"),
    [
        (llava, pictures_and_text, Recompute(segments=1)),
        (llava, pictures_and_text, TokenWindows(window_tokens=4, schedule="window_major")),
        (llava, pictures_and_text, TokenTune(keep_fraction=0.5)),
        (llava, pictures_and_text, Reversible()),
        (weighted_hubert, sound, Recompute(segments=1)),
        (weighted_hubert, sound, TokenTune(keep_fraction=0.5)),
    ],
)
def test_states_that_somebody_reads_between_blocks_are_refused_where_they_are_others(build, batch, technique):
    reader = "model.vision_tower" if build is llava else "hubert"
    with pytest.raises(
        SettingError, match=f"{technique.name} does not have .* output_hidden_states is set for {reader}"
    ):
        gradients(made(build), batch(), technique)


@pytest.mark.parametrize(("build", "batch"), [(llava, pictures_and_text), (weighted_hubert, sound)])
def test_blocks_that_are_run_again_one_by_one_return_what_stock_ones_do(build, batch):
    inputs = batch()
    ours, stock = gradients(made(build), inputs, Recompute()), gradients(made(build), inputs)
    assert ours.error(stock) < 1e-12


def test_norms_that_inherit_from_layer_norm_and_compute_something_else_are_left_alone():
    assert norm_form(NemotronLayerNorm1P(24)) is None
    assert norm_form(nn.LayerNorm(24)) is not None
    config = transformers.NemotronConfig(**TEXT, num_key_value_heads=2)
    model = made(lambda: transformers.NemotronForCausalLM(config))
    with pytest.raises(SettingError, match="shared_norm"):
        Recipe(SharedNorm()).apply(model)


@pytest.mark.parametrize("family", ["Bart", "Pegasus", "MBart"])
@pytest.mark.parametrize("form", ["streams", "rows"])
def test_decoders_of_encoder_decoders_do_not_shift_labels(family: str, form: str):
    sizes = {"d_model": 24, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 40}
    config = getattr(transformers, f"{family}Config")(**sizes, vocab_size=61, max_position_embeddings=32, dropout=0.0)
    batch = {"input_ids": IDS, "labels": IDS.flip(1)}

    def build() -> nn.Module:
        return made(lambda: getattr(transformers, f"{family}ForCausalLM")(config))

    ours, stock = gradients(build(), batch, TokenTune(keep_fraction=1.0, form=form)), gradients(build(), batch)
    assert abs(float(ours.loss - stock.loss)) < 1e-9
    assert ours.error(stock) < 1e-9


def test_a_largest_value_is_found_again_after_rounding():
    config = transformers.LayoutLMv3Config(
        **TEXT,
        max_position_embeddings=64,
        coordinate_size=4,
        shape_size=4,
        visual_embed=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )

    def build() -> nn.Module:
        return made(lambda: transformers.LayoutLMv3ForTokenClassification(config)).float()

    corners = torch.randint(0, 500, (2, 13, 4), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": IDS, "bbox": corners.sort(-1).values, "labels": IDS % 3}
    ours, stock = gradients(build(), batch, LowBitActivations(min_bytes=0)), gradients(build(), batch)
    assert all(gradient.isfinite().all() for gradient in ours.gradients.values())
    assert ours.error(stock) < 0.1


@pytest.mark.parametrize("technique", [Recompute(), Recompute(segments=1)])
def test_running_statistics_of_blocks_are_not_counted_twice(technique):
    config = transformers.Wav2Vec2ConformerConfig(**SOUND, conv_depthwise_kernel_size=3, **dict.fromkeys(DROPOUTS, 0.0))
    model = made(lambda: transformers.Wav2Vec2ConformerForSequenceClassification(config))
    with pytest.raises(SettingError, match=r"batch_norm is a BatchNorm1d, .* count each batch twice; recompute cannot"):
        Recipe(technique).apply(model)


@pytest.mark.parametrize(("dropped", "kept"), [(0.0, True), (0.1, False)])
def test_attention_that_draws_its_dropout_is_run_again(dropped: float, kept: bool):
    x = torch.randn(1, 1, 2, 4)
    sdpa = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    on_gpus = torch.ops.aten._scaled_dot_product_efficient_attention.default
    for operation, args in ((sdpa, (x, x, x, dropped)), (on_gpus, (x, x, x, None, False, dropped))):
        assert (_keep_attention(None, operation, *args).name == "MUST_SAVE") is kept
        assert (_keep_attention(None, operation, *args[:3], dropout_p=dropped).name == "MUST_SAVE") is kept


@pytest.mark.parametrize(
    "technique", [TokenWindows(window_tokens=4), TokenTune(keep_fraction=0.5), Reversible()], ids=lambda t: t.name
)
def test_a_stack_on_several_devices_is_refused(technique):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    model.model.layers[1].to("meta")
    with pytest.raises(SettingError, match=rf"model.layers lies on cpu and meta; {technique.name} runs a stack on one"):
        Recipe(technique).apply(model)


def test_attention_alone_makes_no_stack():
    config = transformers.XLMConfig(vocab_size=61, emb_dim=24, n_layers=2, n_heads=4)
    with pytest.raises(SettingError, match="has no list of equal transformer blocks with attention"):
        find_stacks(made(lambda: transformers.XLMForSequenceClassification(config)))


def test_a_name_that_ends_like_another_kind_of_model_is_no_hindrance():
    config = transformers.SeedOssConfig(
        **TEXT, num_key_value_heads=2, head_dim=6, attention_dropout=0.0, residual_dropout=0.0
    )

    def build() -> nn.Module:
        return made(lambda: transformers.SeedOssForCausalLM(config))

    batch = {"input_ids": IDS, "labels": IDS}
    ours, stock = gradients(build(), batch, TokenWindows(window_tokens=4)), gradients(build(), batch)
    assert ours.error(stock) < 1e-6


def test_a_module_around_layers_is_none_that_reads_their_input():
    config = transformers.DistilBertConfig(vocab_size=61, dim=24, hidden_dim=40, n_layers=1, n_heads=4)
    model = made(lambda: transformers.DistilBertForSequenceClassification(config))
    names = {name.rpartition(".0.")[2] for name in input_layers(model)}
    assert names == {"attention.q_lin", "attention.k_lin", "attention.v_lin", "ffn.lin1"}


def test_layers_of_low_rank_attention_and_of_sound_read_what_enters_their_part():
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 6, "v_head_dim": 6}
    config = transformers.DeepseekV3Config(**TEXT, num_key_value_heads=4, first_k_dense_replace=2, **ranks)
    names = {
        name.rpartition(".0.")[2] for name in input_layers(made(lambda: transformers.DeepseekV3ForCausalLM(config)))
    }
    assert {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "mlp.up_proj"} <= names
    assert any(name.endswith("feed_forward.intermediate_dense") for name in input_layers(made(weighted_hubert)))


def test_blocks_that_scale_their_residual_have_no_known_layout():
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 6, "v_head_dim": 6}
    config = transformers.MiniCPM3Config(**TEXT, num_key_value_heads=4, **sizes)
    model = made(lambda: transformers.MiniCPM3ForCausalLM(config))
    assert layout_of(model.model.layers[0]) is None
    plain = made(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)))
    assert layout_of(plain.model.layers[0]) is not None


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("IBert", TEXT),
        ("MobileBert", {**TEXT, "embedding_size": 24, "intra_bottleneck_size": 16, "true_hidden_size": 16}),
        ("OpenAIGPT", {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4}),
    ],
)
def test_blocks_with_the_names_of_others_have_no_known_layout(family: str, settings: dict[str, Any]):
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**settings))
    with pytest.raises(SettingError, match="a block of unknown layout"):
        Recipe(Reversible()).apply(model)


def test_attention_with_one_layer_for_all_that_it_reads_is_adapted_too():
    model = transformers.DebertaModel(transformers.DebertaConfig(**TEXT | {"num_hidden_layers": 1}))
    names = {name.rpartition(".0.")[2] for name in input_layers(model)}
    assert names == {"attention.self.in_proj", "intermediate.dense"}


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("DiffLlamaForCausalLM", {**TEXT, "num_key_value_heads": 2}, "attends more than once"),
        (
            "UMT5ForConditionalGeneration",
            {"vocab_size": 61, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4},
            r"fails where it is given some of its tokens \(The size of tensor",
        ),
    ],
)
def test_blocks_that_cannot_run_over_some_of_their_tokens_say_so(family: str, settings: dict[str, Any], why: str):
    model_class = getattr(transformers, family)
    model = made(lambda: model_class(model_class.config_class(**settings)))
    with pytest.raises(SettingError, match=f"{why}.*cannot be run in windows; use recompute"):
        gradients(model, {"input_ids": IDS, "labels": IDS}, TokenWindows(window_tokens=4))
