"""ExPLoRA at small scale: an encoder of one domain goes on learning on packaged images of another, then gets labels."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from shoestring import Recipe, assets
from shoestring.objectives import MaskedAutoencoder
from shoestring.selection import Unfreeze
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import seeded

SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
CONFIG = ViTConfig(**SIZES, image_size=28, patch_size=7, num_channels=1, num_labels=10)
MASKED = MaskedAutoencoder(mask_ratio=0.5, decoder_width=48, decoder_blocks=1, decoder_heads=4)
EXPLORA = Recipe(
    LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"]), Unfreeze(blocks=[-1], norms=True), MASKED
)


def drawings(count: int, generator: torch.Generator) -> Tensor:
    """Boxes and ellipses of random grey on a gradient: the first domain."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
    slope = torch.rand(count, 2, 1, 1, generator=generator) * 2 - 1
    drawn = 0.5 + 0.25 * (slope[:, 0] * rows + slope[:, 1] * columns)
    for form in range(4):
        y, x, high, wide, grey = torch.rand(count, 5, 1, 1, generator=generator).unbind(1)
        dy, dx = (rows - (y * 2 - 1)) / (0.1 + 0.5 * high), (columns - (x * 2 - 1)) / (0.1 + 0.5 * wide)
        inside = (dy**2 + dx**2 < 1) if form % 2 else (dy.abs().maximum(dx.abs()) < 1)
        drawn = torch.where(inside, grey, drawn)
    return (drawn * 2 - 1)[:, None]


def clothing(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Packaged pictures and what they show: the second domain."""
    rows = assets.load_data("fashion-mnist")[split].shuffle(seed=0).select(range(count))
    pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in rows["image"]])
    return pixels[:, None].float() / 127.5 - 1, torch.tensor(rows["label"])


def learn(model: nn.Module, batch_of, steps: int, rate: float) -> None:
    """Steps of AdamW, the rate falling to zero."""
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 20, 1 - step / steps)
        loss = model(**batch_of()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def probed(encoder: ViTModel, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Accuracy of a linear probe on the mean of patches: ridge regression, so that nothing is drawn."""
    with torch.no_grad():
        x, z = (
            encoder.eval()(pixel_values=part[0]).last_hidden_state[:, 1:].mean(1).double() for part in (train, test)
        )
    mean, deviation = x.mean(0), x.std(0)
    x, z = (nn.functional.pad((part - mean) / deviation, (0, 1), value=1.0) for part in (x, z))
    wanted = nn.functional.one_hot(train[1], 10).double()
    weights = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]).double(), x.T @ wanted)
    return float(((z @ weights).argmax(1) == test[1]).double().mean())


def tuned(encoder: ViTModel, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Accuracy of a classifier on the encoder, tuned on the labels by LoRA."""
    base = ViTForImageClassification(CONFIG)
    base.vit.load_state_dict(encoder.state_dict())
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    with Recipe(lora)(base) as model:
        learn(model, lambda: dict(zip(("pixel_values", "labels"), some(train), strict=True)), 150, 5e-3)
        with torch.no_grad():
            return float((model.eval()(pixel_values=test[0]).logits.argmax(1) == test[1]).double().mean())


def some(data: tuple[Tensor, Tensor], count: int = 32) -> tuple[Tensor, Tensor]:
    rows = torch.randint(0, len(data[0]), (count,))
    return data[0][rows], data[1][rows]


@pytest.mark.slow
def test_a_linear_probe_is_better_after_the_encoder_has_seen_the_new_domain():
    need("fashion-mnist")
    unlabelled, (pixels, kinds) = clothing("train", 6000), clothing("test", 2000)
    labelled, test = (unlabelled[0][:2000], unlabelled[1][:2000]), (pixels, kinds)
    with seeded(0):
        source = ViTModel(CONFIG, add_pooling_layer=False)
        with Recipe(MASKED)(source) as model:
            generator = torch.Generator().manual_seed(0)
            learn(model, lambda: {"pixel_values": drawings(64, generator)}, 300, 2e-3)
        model = EXPLORA.apply(copy.deepcopy(source))
        learn(model, lambda: {"pixel_values": some(unlabelled, 64)[0]}, 600, 3e-3)
        after = model.model.merge_and_unload()
        assert after.state_dict().keys() == source.state_dict().keys()
        assert probed(after, labelled, test) > probed(source, labelled, test) + 0.01
        few = (labelled[0][:500], labelled[1][:500])
        assert tuned(after, few, test) > tuned(source, few, test)
