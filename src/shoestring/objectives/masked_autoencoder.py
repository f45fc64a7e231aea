r"""MAE: a masked autoencoder, an encoder of images that learns by what a decoder makes of a few of their patches.

Source   He, Chen, Xie, Li, Dollar, Girshick 2022, arXiv:2111.06377; continued on images of a new domain, with few
         trained weights, in Khanna, Irgau, Lobell, Ermon 2025, arXiv:2406.10973
Update   L = mean over hidden patches of |p - p'|^2 / n,   p' = decoder(encoder(visible patches), mask token elsewhere)
         p is a patch's pixels, or with normalise_patches (p - mean p) / sqrt(var p + 1e-6)
Shapes   images [batch, channels, height, width]; of N patches K = floor(N (1 - mask_ratio)) are visible;
         p [batch, N - K, n], n = patch^2 channels
Start    the encoder as it is, the decoder new
Trains   the decoder, beside what the recipe trains of the encoder
Costs    the encoder on K tokens in place of N; the decoder's decoder_blocks on all N, of decoder_width
Differs  The decoder is two blocks of 256 by default, not eight of 512. Class and register tokens go through it as the
         class token does in the paper. Pixels are predicted of hidden patches only, which are all that the loss counts.
         Images are as the processor makes them: no random crops. ExPLoRA's other objective, that of DINOv2 (the losses
         of DINO and iBOT, and KoLeo), is not here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..blocks.stacks import find_stacks, gather_tokens
from ..errors import SettingError
from ..modes import in_training
from ..precision import at_least_float32, wide_dtype
from ..technique import Phase, Technique, register_technique
from ..whole_files import read_tensors, write_tensors

FILE = "decoder.safetensors"


@register_technique
@dataclass
class MaskedAutoencoder(Technique):
    """Encoders of images learn from images alone, by the pixels of hidden patches.

    In training, and where `return_loss=True` is passed, the model returns the loss; otherwise it is as without this
    technique. The decoder is saved with a run and is no part of the model. Which patches are hidden is drawn by torch's
    generator on the CPU, so that a run's seed decides and a resumed run goes on; in evaluation each batch has the same.

    mask_ratio: share of patches that are hidden, 0 < ratio < 1.
    normalise_patches: predict each patch with a mean of 0 and a variance of 1.
    decoder_width, decoder_blocks, decoder_heads: sizes of the decoder; heads divide its width, as 4 does.
    """

    name: ClassVar[str] = "masked_autoencoder"
    phase: ClassVar[Phase] = Phase.OBJECTIVE
    brings_loss: ClassVar[bool] = True

    mask_ratio: float = 0.75
    normalise_patches: bool = True
    decoder_width: int = 256
    decoder_blocks: int = 2
    decoder_heads: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise SettingError(
                f"mask_ratio of {self.name} must be above 0 and below 1, got {self.mask_ratio}; 0.75 is usual."
            )
        for setting in ("decoder_width", "decoder_blocks", "decoder_heads"):
            if (value := getattr(self, setting)) < 1:
                raise SettingError(f"{setting} of {self.name} must be at least 1, got {value}.")
        if self.decoder_width % 4 or self.decoder_width % self.decoder_heads:
            raise SettingError(
                f"decoder_width of {self.name} must be a multiple of 4 and of decoder_heads ({self.decoder_heads}), "
                f"got {self.decoder_width}."
            )

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Put a decoder beside the model."""
        encoder, embeddings = find_encoder(model, self.name)
        self.decoder = Decoder(embeddings.patch_embeddings.projection, self)
        without_part = _without_part(encoder, embeddings)
        trained = [p.requires_grad for p in without_part]
        try:
            for parameter in without_part:
                parameter.requires_grad_(False)
            yield Autoencoder(model, self, encoder, embeddings)
        finally:
            del self.decoder
            for parameter, before in zip(without_part, trained, strict=True):
                parameter.requires_grad_(before)

    def visible(self, patches: int) -> int:
        """How many of an image's patches the encoder sees.

        Raises SettingError if these are none.
        """
        count = patches - math.ceil(patches * self.mask_ratio)
        if not 0 < count < patches:
            raise SettingError(
                f"mask_ratio {self.mask_ratio} of {self.name} leaves {count} of the {patches} patches of these images "
                "visible; some must be, and some not. Use larger images or another mask_ratio."
            )
        return count

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the decoder."""
        write_tensors(folder / FILE, self.decoder.state_dict())

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Read the decoder.

        Raises SettingError if the file is missing, damaged, or of a decoder of other sizes.
        """
        tensors, _ = read_tensors(folder / FILE)
        try:
            self.decoder.load_state_dict(tensors)
        except RuntimeError as error:
            raise SettingError(f"{folder / FILE} is of another decoder than that of {self.name}: {error}") from error


class Decoder(nn.Module):
    """Tokens of visible patches to the pixels of hidden ones."""

    def __init__(self, patches: nn.Conv2d, sizes: MaskedAutoencoder):
        super().__init__()
        width, weight = sizes.decoder_width, patches.weight
        like: Any = {"device": weight.device, "dtype": wide_dtype(weight.dtype)}
        self.embed = nn.Linear(patches.out_channels, width, **like)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width, **like) * 0.02)
        like_block = {"dim_feedforward": 4 * width, "dropout": 0.0, "activation": "gelu", **like}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, sizes.decoder_heads, batch_first=True, norm_first=True, **like_block)
            for _ in range(sizes.decoder_blocks)
        )
        self.norm = nn.LayerNorm(width, **like)
        self.predict = nn.Linear(width, weight[0].numel(), **like)

    def forward(
        self,
        tokens: Float[Tensor, "batch seen width"],
        visible: Int[Tensor, "batch num_visible"],
        hidden: Int[Tensor, "batch num_hidden"],
        grid: tuple[int, int],
    ) -> Float[Tensor, "batch num_hidden numbers"]:
        """Pixels of the hidden patches.

        tokens: class and register tokens, then those of the visible patches. visible, hidden: places in the grid of so
        many rows and columns.
        """
        x = self.embed(tokens.to(self.embed.weight.dtype))
        first, seen = x.split([x.shape[1] - visible.shape[1], visible.shape[1]], dim=1)
        unseen = self.mask_token.to(x.dtype).expand(x.shape[0], grid[0] * grid[1], -1)
        patches = unseen.scatter(1, visible[..., None].expand_as(seen), seen)
        patches = patches + positions(*grid, x.shape[-1]).to(x)
        x = torch.cat([first, patches], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.predict(self.norm(gather_tokens(x, hidden + first.shape[1])))


class Autoencoder(nn.Module):
    """A model with a decoder beside it. In training it gives the loss, else what the model gives."""

    def __init__(self, model: nn.Module, method: MaskedAutoencoder, encoder: PreTrainedModel, embeddings: Any) -> None:
        super().__init__()
        self.model, self.decoder = model, method.decoder
        self.method = method
        self.inside: tuple[Any] = (embeddings,)  # in a tuple, so that its weights keep to one name
        self.config, self.main_input_name = encoder.config, encoder.main_input_name
        self.resizes = "interpolate_pos_encoding" in inspect.signature(encoder.forward).parameters

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Let the model inside run its blocks again in backward, as trainers ask for it."""
        inner: Any = self.model
        inner.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The same by the name of older trainers."""
        inner: Any = self.model
        inner.gradient_checkpointing_enable(**options)

    def forward(
        self,
        pixel_values: Float[Tensor, "batch channels height width"],
        return_loss: bool | None = None,
        labels: Any = None,
        **inputs: Any,
    ) -> Any:
        """The loss of these images.

        return_loss: whether to give it; by default in training only. labels: not used.
        """
        if not (in_training(self) if return_loss is None else return_loss):
            return self.model(pixel_values=pixel_values, **inputs)
        grid = self._grid(pixel_values)
        patches = grid[0] * grid[1]
        drawn = None if in_training(self) else torch.Generator().manual_seed(0)
        order = torch.rand(pixel_values.shape[0], patches, generator=drawn).argsort(1).to(pixel_values.device)
        visible, hidden = order.split([k := self.method.visible(patches), patches - k], dim=1)
        if self.resizes and list(pixel_values.shape[2:]) != list(self.inside[0].patch_embeddings.image_size):
            inputs["interpolate_pos_encoding"] = True
        with self._only(visible, patches):
            tokens = self.model(pixel_values=pixel_values, **inputs).last_hidden_state
        predicted = self.decoder(tokens, visible, hidden, grid)
        predicted = at_least_float32(predicted)  # of 16 bits under autocast
        wanted = gather_tokens(patchify(pixel_values, grid), hidden).to(predicted.dtype)
        if self.method.normalise_patches:
            wanted = normalised(wanted)
        return ModelOutput(loss=(predicted - wanted).square().mean(), predicted=predicted, hidden=hidden)

    def _grid(self, images: Float[Tensor, "batch channels height width"]) -> tuple[int, int]:
        rows, columns = self.inside[0].patch_embeddings.projection.kernel_size
        if images.shape[2] % rows or images.shape[3] % columns:
            raise SettingError(
                f"masked_autoencoder cuts images into patches of {rows} x {columns} pixels, but these are "
                f"{images.shape[2]} x {images.shape[3]}; set data.image_size to a multiple."
            )
        return images.shape[2] // rows, images.shape[3] // columns

    @contextmanager
    def _only(self, visible: Int[Tensor, "batch num_visible"], patches: int) -> Iterator[None]:
        """Let the blocks see the tokens of these patches alone, after positions were added."""

        def seen(module: nn.Module, args: Any, tokens: Tensor) -> Tensor:
            first, of_patches = tokens.split([tokens.shape[1] - patches, patches], dim=1)
            return torch.cat([first, gather_tokens(of_patches, visible)], dim=1)

        hook = self.inside[0].register_forward_hook(seen)
        try:
            yield
        finally:
            hook.remove()


def find_encoder(model: nn.Module, name: str) -> tuple[PreTrainedModel, Any]:
    """The encoder of images in a model, and its module that makes tokens of patches, for the technique `name`.

    Raises SettingError for models that are no plain vision transformer, or have a head.
    """
    outer = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    encoder = None if outer is None else outer.base_model
    embeddings: Any = getattr(encoder, "embeddings", None)
    what = None
    if hasattr(embeddings, "random_masking"):
        what = f"{type(encoder).__name__} hides patches by itself; load its weights as ViTModel"
    elif not isinstance(getattr(getattr(embeddings, "patch_embeddings", None), "projection", None), nn.Conv2d):
        what = f"{type(outer or model).__name__} makes no tokens of patches"
    elif encoder is not outer:
        what = f"{type(outer).__name__} has a head; load it with AutoModel"
    elif getattr(embeddings, "position_embeddings", None) is None or len(find_stacks(model)) != 1:
        what = f"the blocks of {type(encoder).__name__} have to know where in the image their tokens are"
    if not isinstance(encoder, PreTrainedModel) or what is not None:
        raise SettingError(
            f"{name} needs a plain vision transformer without a head, such as ViTModel or Dinov2Model, whose positions "
            f"are added to the tokens of patches; {what}."
        )
    return encoder, embeddings


def patchify(
    images: Float[Tensor, "batch channels height width"], grid: tuple[int, int]
) -> Float[Tensor, "batch patches numbers"]:
    """The pixels of each patch, row by row of the grid; in a patch by row, column and channel."""
    batch, channels, height, width = images.shape
    (rows, columns), (high, wide) = grid, (height // grid[0], width // grid[1])
    cut = images.reshape(batch, channels, rows, high, columns, wide)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, high * wide * channels)


def normalised(patches: Float[Tensor, "batch patches numbers"]) -> Float[Tensor, "batch patches numbers"]:
    """Each patch with a mean of 0 and a variance of 1."""
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def positions(rows: int, columns: int, width: int) -> Float[Tensor, "patches width"]:
    """Sines and cosines of each patch's row in the first half, of its column in the second."""
    rates = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [torch.arange(n, dtype=torch.float64)[:, None] * rates for n in (rows, columns)]
    row, column = (torch.cat([a.sin(), a.cos()], dim=1) for a in angles)
    return torch.cat([row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)], dim=2).flatten(0, 1)


def _without_part(encoder: Any, embeddings: Any) -> list[nn.Parameter]:
    """Weights that this loss does not depend on: those of a pooler, and a token that other objectives put in."""
    token, pooler = getattr(embeddings, "mask_token", None), getattr(encoder, "pooler", None)
    return ([] if token is None else [token]) + ([] if pooler is None else list(pooler.parameters()))
