"""Masked autoencoder: its loss beside a plain reference and beside ViTMAE, what trains, saving, refusals."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitModel,
    BertConfig,
    BertModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from shoestring import Recipe
from shoestring.errors import SettingError
from shoestring.objectives import MaskedAutoencoder
from shoestring.objectives.masked_autoencoder import positions
from shoestring.recipe import attached_to, load
from shoestring.testing.tiny_models import seeded

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 15,
    "patch_size": 5,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DECODER = {"decoder_width": 16, "decoder_blocks": 2, "decoder_heads": 2}


def vit(**settings) -> ViTModel:
    with seeded(0):
        return ViTModel(ViTConfig(**{**SIZES, "intermediate_size": 40, **settings}))


def dinov2(**settings) -> Dinov2Model:
    with seeded(0):
        return Dinov2Model(Dinov2Config(**{**SIZES, "mlp_ratio": 2, **settings}))


def deit() -> DeiTModel:
    return DeiTModel(DeiTConfig(**SIZES, intermediate_size=40))


def with_registers() -> Dinov2WithRegistersModel:
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2))


def images(seed: int = 1, count: int = 3, height: int = 15, width: int = 15) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)


def attention(block: nn.TransformerEncoderLayer, x: Tensor) -> Tensor:
    """One head after another."""
    q, k, v = (x @ block.self_attn.in_proj_weight.T + block.self_attn.in_proj_bias).chunk(3, -1)
    width = q.shape[-1] // block.self_attn.num_heads
    heads = []
    for start in range(0, q.shape[-1], width):
        one = slice(start, start + width)
        scores = q[..., one] @ k[..., one].transpose(1, 2) / width**0.5
        heads.append(scores.softmax(-1) @ v[..., one])
    return block.self_attn.out_proj(torch.cat(heads, -1))


def reference(encoder: nn.Module, decoder: nn.Module, x: Tensor, order: Tensor, visible: int, normalise: bool):
    """The loss of each image by itself, patch by patch; `order` as it was drawn. Tokens are put in rows by hand."""
    side, losses = encoder.config.patch_size, []
    rows, columns = x.shape[2] // side, x.shape[3] // side
    for image, places in zip(x, order, strict=True):
        seen, unseen = places[:visible].tolist(), places[visible:].tolist()
        tokens = encoder.embeddings(image[None])[0]
        x_seen = torch.stack([tokens[0], *(tokens[1 + place] for place in seen)])[None]
        blocks = encoder.layers if hasattr(encoder, "layers") else encoder.encoder.layer
        for block in blocks:
            x_seen = block(x_seen)
        x_seen = decoder.embed(encoder.layernorm(x_seen))[0]
        row = [decoder.mask_token[0, 0]] * (rows * columns)
        for index, place in enumerate(seen):
            row[place] = x_seen[1 + index]
        added = positions(rows, columns, row[0].shape[0])
        y = torch.stack([x_seen[0], *(token + added[place] for place, token in enumerate(row))])[None]
        for block in decoder.blocks:
            y = y + attention(block, block.norm1(y))
            y = y + block.linear2(nn.functional.gelu(block.linear1(block.norm2(y))))
        y = decoder.predict(decoder.norm(y))[0]
        for place in unseen:
            top, left = place // columns * side, place % columns * side
            patch = image[:, top : top + side, left : left + side].permute(1, 2, 0).flatten()
            if normalise:
                patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            losses.append((y[1 + place] - patch).square().mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("make", [vit, dinov2])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("mask_ratio", "visible", "seed"), [(0.75, 2, 0), (0.4, 5, 3)])
def test_loss_and_gradients_are_those_of_the_formula(make, normalise, mask_ratio, visible, seed):
    method = MaskedAutoencoder(mask_ratio=mask_ratio, normalise_patches=normalise, **DECODER)
    model = Recipe(method).apply(make().double()).train()
    with seeded(seed):
        loss = model(pixel_values=images(seed)).loss
    loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    twin = copy.deepcopy(model)
    twin.zero_grad()
    with seeded(seed):
        order = torch.rand(3, 9).argsort(1)
    wanted = reference(twin.model, twin.decoder, images(seed), order, visible, normalise)
    wanted.backward()
    theirs = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    assert ours.keys() == theirs.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalise", [True, False])
def test_loss_is_that_of_vitmae_with_the_same_weights_and_patches(normalise):
    sizes = {**SIZES, "intermediate_size": 40, "layer_norm_eps": 1e-5}
    config = ViTMAEConfig(
        **sizes,
        mask_ratio=0.7,
        norm_pix_loss=normalise,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
    )
    with seeded(1):
        stock = ViTMAEForPreTraining(config).double().train()
        for parameter in stock.parameters():
            nn.init.normal_(parameter, std=0.1)
    base = ViTModel(ViTConfig(**sizes), add_pooling_layer=False).double()
    base.load_state_dict(stock.vit.state_dict())
    method = MaskedAutoencoder(mask_ratio=0.7, normalise_patches=normalise, **DECODER)
    model = Recipe(method).apply(base).train()
    ours, theirs = model.decoder, stock.decoder
    with torch.no_grad():
        theirs.decoder_pos_embed.copy_(nn.functional.pad(positions(3, 3, 16), (0, 0, 1, 0))[None])
        ours.mask_token.copy_(theirs.mask_token)
    for mine, other in ((ours.embed, "decoder_embed"), (ours.norm, "decoder_norm"), (ours.predict, "decoder_pred")):
        mine.load_state_dict(theirs.get_submodule(other).state_dict())
    for mine, other in zip(ours.blocks, theirs.decoder_layers, strict=True):
        mine.load_state_dict(as_torch_has_them(other))
    with seeded(2):
        noise = torch.rand(3, 9)
    with seeded(2):
        loss = model(pixel_values=images()).loss
    torch.testing.assert_close(loss, stock(pixel_values=images(), noise=noise).loss, rtol=1e-12, atol=0)


def as_torch_has_them(block: nn.Module) -> dict[str, Tensor]:
    """The weights of a block of ViTMAE by the names of torch's own."""
    of = {name: block.get_submodule(f"attention.{name}_proj") for name in "qkvo"}
    state = {
        "self_attn.in_proj_weight": torch.cat([of[n].weight for n in "qkv"]),
        "self_attn.in_proj_bias": torch.cat([of[n].bias for n in "qkv"]),
        "self_attn.out_proj.weight": of["o"].weight,
        "self_attn.out_proj.bias": of["o"].bias,
    }
    names = {"linear1": "mlp.fc1", "linear2": "mlp.fc2", "norm1": "layernorm_before", "norm2": "layernorm_after"}
    for mine, theirs in names.items():
        module = block.get_submodule(theirs)
        state |= {f"{mine}.weight": module.weight, f"{mine}.bias": module.bias}
    return state


@pytest.mark.parametrize(("rows", "columns", "width"), [(3, 3, 16), (2, 5, 8)])
def test_positions_tell_rows_from_columns(rows, columns, width):
    made = positions(rows, columns, width)
    for row in range(rows):
        for column in range(columns):
            rates = [10000.0 ** -(i / (width // 4)) for i in range(width // 4)]
            angles = torch.tensor([[n * rate for rate in rates] for n in (row, column)], dtype=torch.float64)
            wanted = torch.cat([angles[0].sin(), angles[0].cos(), angles[1].sin(), angles[1].cos()])
            torch.testing.assert_close(made[row * columns + column], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [vit, dinov2, deit, with_registers])
def test_images_of_another_size_and_form_train(make):
    model = Recipe(MaskedAutoencoder(**DECODER)).apply(make().double()).train()
    assert model(pixel_values=images(height=10, width=25)).loss.isfinite()


def test_the_encoder_runs_on_visible_patches_alone():
    model = Recipe(MaskedAutoencoder(mask_ratio=0.6, **DECODER)).apply(vit()).train()
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    model(pixel_values=images().float())
    hook.remove()
    assert seen == [1 + 3]


def test_in_evaluation_the_model_is_as_it_was_and_the_loss_comes_when_asked_for():
    base = vit().eval()
    wanted = base(pixel_values=images().float()).last_hidden_state
    model = Recipe(MaskedAutoencoder(**DECODER)).apply(base).eval()
    assert torch.equal(model(pixel_values=images().float()).last_hidden_state, wanted)
    losses = [model(pixel_values=images().float(), return_loss=True).loss for _ in range(2)]
    assert losses[0] == losses[1]


def test_a_draw_in_evaluation_leaves_those_of_training_alone():
    model = Recipe(MaskedAutoencoder(**DECODER)).apply(vit())
    with seeded(3):
        first = model.train()(pixel_values=images().float()).hidden
    with seeded(3):
        model.eval()(pixel_values=images().float(), return_loss=True)
        assert torch.equal(model.train()(pixel_values=images().float()).hidden, first)
        assert not torch.equal(model(pixel_values=images().float()).hidden, first)


def test_what_the_loss_does_not_need_does_not_train():
    model = Recipe(MaskedAutoencoder(**DECODER)).apply(vit()).train()
    model(pixel_values=images().float()).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"model.pooler.dense.weight", "model.pooler.dense.bias"}
    assert all(p.requires_grad for p in Recipe.remove(model).parameters())


def test_the_decoder_is_saved_and_is_no_part_of_the_model(tmp_path):
    recipe = Recipe(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), MaskedAutoencoder(**DECODER))
    model = recipe.apply(vit()).train()
    attached = attached_to(model)
    attached.save(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} >= {"decoder.safetensors", "adapter_model.safetensors"}
    again = load(vit(), tmp_path)
    for name, parameter in model.decoder.named_parameters():
        assert torch.equal(parameter, again.decoder.get_parameter(name))
    names = set(Recipe.remove(again).state_dict())
    assert names == set(vit().state_dict())


def test_a_file_that_is_damaged_is_refused(tmp_path):
    attached_to(Recipe(MaskedAutoencoder(**DECODER)).apply(vit())).save(tmp_path)
    (tmp_path / "decoder.safetensors").write_bytes(b"nothing")
    with pytest.raises(SettingError, match=r"decoder.safetensors cannot be read"):
        load(vit(), tmp_path)


def test_a_decoder_of_other_sizes_is_refused(tmp_path):
    attached_to(Recipe(MaskedAutoencoder(**DECODER)).apply(vit())).save(tmp_path)
    with pytest.raises(SettingError, match=r"(?s)decoder.safetensors is of another decoder than .* mismatch for embed"):
        load(vit(hidden_size=32), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mask_ratio": 0.0},
            r"mask_ratio of masked_autoencoder must be above 0 and below 1, got 0\.0; 0\.75 is usual",
        ),
        ({"mask_ratio": 1.0}, r"must be above 0 and below 1, got 1\.0"),
        ({"decoder_blocks": 0}, "decoder_blocks of masked_autoencoder must be at least 1, got 0"),
        ({"decoder_width": 18}, r"decoder_width .* must be a multiple of 4 and of decoder_heads \(8\), got 18"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        MaskedAutoencoder(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ViTForImageClassification(ViTConfig(**SIZES)), "ViTForImageClassification has a head; load it with"),
        (lambda: ViTMAEModel(ViTMAEConfig(**SIZES)), "ViTMAEModel hides patches by itself"),
        (lambda: BertModel(BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)), "makes no tokens"),
        (lambda: BeitModel(BeitConfig(**SIZES)), "the blocks of BeitModel have to know where in the image"),
        (
            lambda: SwinModel(SwinConfig(image_size=16, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)),
            "the blocks of SwinModel have to know where",
        ),
        (lambda: nn.Linear(2, 2), "Linear makes no tokens of patches"),
    ],
)
def test_other_models_are_refused(make, message):
    with pytest.raises(SettingError, match=message):
        Recipe(MaskedAutoencoder()).apply(make())


def test_images_that_are_cut_badly_are_refused():
    model = Recipe(MaskedAutoencoder(**DECODER)).apply(dinov2()).train()
    with pytest.raises(SettingError, match=r"patches of 5 x 5 pixels, but these are 15 x 16; set data.image_size"):
        model(pixel_values=images(width=16).float())
    with pytest.raises(SettingError, match=r"mask_ratio 0.75 of masked_autoencoder leaves 0 of the 3 patches"):
        model(pixel_values=images(height=5).float())
