r"""Low-bit activations: tensors kept for backward in 8 or 4 bits, rounded at random so that they are right on average.

Source   Liu et al. 2022, GACT: Activation Compressed Training for Generic Network Architectures, arXiv:2206.11357
Update   in groups of 256: m = min x, s = (max x - m) / (2^b - 1), code = floor((x - m) / s + u), u ~ U(0, 1);
         backward sees code * s + m, so E = x and |error| <= s
Shapes   x [n]; codes [groups, 256 b / 8] bytes, two codes a byte at b = 4; m, s [groups]
Costs    b / 8 + 8 / 256 bytes an element in place of 4 (0.26 of float32 at 8 bits, 0.13 at 4; 0.52 and 0.26 of 16-bit
         numbers); one pass over x to pack it, one to unpack it, in slices of a few million elements
Error    of all gradients of a 4-layer model together, relative: about 1 % at 8 bits, 15 to 25 % at 4. Random, and unbiased
         for what linear layers keep; what an activation function or a norm keeps enters its derivative, which bends it.
Keeps    integers, booleans and random states (by dtype); norm statistics and attention's log-sum-exp (one number a row, or
         saved by a norm or an attention of torch in another shape than its inputs); probabilities of softmax and
         cross-entropy (by operation); masks given to attention; copies of weights that autocast makes; small tensors.
         A log-sum-exp that an attention outside torch keeps is not known as one.
Differs  the bits are the same everywhere: GACT allots them by measured sensitivity. A NaN or an infinity spreads over
         its group as NaN.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ..errors import SettingError
from ..technique import register_technique
from .base import Codec, Operation, Stage

SLICE = 1 << 22  # elements quantized at a time: bounds what packing needs beside its result
PROBABILITIES = {"softmax", "log_softmax", "_softmax", "_log_softmax", "softmin", "cross_entropy", "logsumexp"}
WITH_STATISTICS = {
    "scaled_dot_product_attention",
    "layer_norm",
    "rms_norm",
    "group_norm",
    "batch_norm",
    "instance_norm",
}


@register_technique
@dataclass(kw_only=True)
class LowBitActivations(Codec):
    """Floating-point tensors kept for backward, in few bits.

    bits: 8, or 4 for small models and rough gradients.
    group: elements that share a minimum and a scale; even.
    seed: of the random rounding; the same seed gives the same run.

    Raises SettingError if one of them is out of range.
    """

    name = "low_bit_activations"
    stage = Stage.COMPRESSION
    reads_operations = True

    bits: int = 8
    group: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (8, 4):
            raise SettingError(f"bits of low_bit_activations must be 8 or 4, got {self.bits!r}.")
        if self.group < 2 or self.group % 2:
            raise SettingError(f"group of low_bit_activations must be an even number from 2 on, got {self.group}.")
        self._packed = 0

    def pack(self, tensor: Float[Tensor, " n"]) -> tuple[Tensor, Tensor, Tensor, int, torch.dtype]:
        """Codes, minima, scales, and what the tensor was."""
        codes, low, step = quantize(tensor, self.bits, self.group, self._generator(tensor.device))
        return codes, low, step, tensor.numel(), tensor.dtype

    def unpack(self, packed: tuple[Tensor, Tensor, Tensor, int, torch.dtype]) -> Float[Tensor, " n"]:
        """The tensor, each element off by a scale of its group at most."""
        codes, low, step, numel, dtype = packed
        return dequantize(codes, low, step, self.group, dtype).flatten()[:numel]

    def excludes(self, tensor: Tensor, operation: Operation | None) -> bool:
        """Whether few bits would do harm out of proportion to the bytes they save."""
        if tensor.dim() == 0 or tensor.shape[-1] == 1:
            return True
        if operation is None:
            return False
        if operation.name in PROBABILITIES:
            return True
        inputs = [value for value in (*operation.args, *operation.kwargs.values()) if isinstance(value, Tensor)]
        if any(_is_cast_copy(tensor, value) for value in inputs):
            return True
        return operation.name in WITH_STATISTICS and not _is_like_an_input(tensor, operation)

    def state_dict(self) -> dict[str, Any]:
        """How many tensors were packed, which the next one's rounding depends on."""
        return {"packed": self._packed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on rounding where `state_dict` left off."""
        self._packed = int(state["packed"])

    def _generator(self, device: torch.device) -> torch.Generator | None:
        """Random numbers of the next tensor; of its own, so that dropout draws as without this technique."""
        self._packed += 1
        if device.type == "meta":
            return None
        # an odd factor spreads seeds over the 32 bits that a generator of the CPU takes
        return torch.Generator(device).manual_seed((self.seed * 0x9E3779B1 + self._packed) % 2**32)


def quantize(
    x: Float[Tensor, " n"], bits: int, group: int, generator: torch.Generator | None = None
) -> tuple[UInt8[Tensor, "groups bytes"], Float[Tensor, "groups 1"], Float[Tensor, "groups 1"]]:
    """Codes of `bits` bits, the minimum and the scale of each group; the last group is filled up with its last element."""
    num_groups, highest_code = -(-x.numel() // group), 2**bits - 1
    wide = torch.promote_types(x.dtype, torch.float32)
    codes = x.new_empty(num_groups, group * bits // 8, dtype=torch.uint8)
    low, step = x.new_empty(2, num_groups, 1, dtype=wide).unbind()
    rows = max(SLICE // group, 1)
    for start in range(0, num_groups, rows):
        here = slice(start, start + rows)
        part = x[start * group : (start + rows) * group]
        if missing := -part.numel() % group:
            part = torch.cat([part, part[-1:].expand(missing)])
        part = part.view(-1, group).to(wide)
        minima, maxima = part.aminmax(dim=1, keepdim=True)
        low[here] = minima
        # a group of equal numbers has scale 0, which the next line must not divide by
        step[here] = ((maxima - minima) / highest_code).clamp_min(torch.finfo(wide).tiny)
        scaled = (part - low[here]).div_(step[here])
        scaled += torch.rand(part.shape, dtype=wide, device=x.device, generator=generator)
        whole = scaled.clamp_(0, highest_code).to(torch.uint8)  # towards 0, the floor of what is not negative
        codes[here] = whole if bits == 8 else whole[:, 0::2] | whole[:, 1::2] << 4
    return codes, low, step


def dequantize(
    codes: UInt8[Tensor, "groups bytes"],
    low: Float[Tensor, "groups 1"],
    step: Float[Tensor, "groups 1"],
    group: int,
    dtype: torch.dtype,
) -> Float[Tensor, "groups group"]:
    """code * s + m, in `dtype`."""
    x = torch.empty(len(codes), group, dtype=dtype, device=codes.device)
    rows = max(SLICE // group, 1)
    for start in range(0, len(codes), rows):
        here = slice(start, start + rows)
        whole = codes[here]
        if whole.shape[1] < group:
            whole = torch.stack([whole & 15, whole >> 4], dim=-1).flatten(1)
        x[here] = whole.to(low.dtype).mul_(step[here]).add_(low[here])
    return x


def _is_cast_copy(tensor: Tensor, weight: Tensor) -> bool:
    return (
        isinstance(weight, nn.Parameter)
        and weight.dtype != tensor.dtype
        and sorted(weight.shape) == sorted(tensor.shape)
    )


def _is_like_an_input(tensor: Tensor, operation: Operation) -> bool:
    """Whether an operation saves an input or a result of that shape, and not a mask or a statistic."""
    mask = operation.kwargs.get("attn_mask", operation.args[3] if len(operation.args) > 3 else None)
    if isinstance(mask, Tensor) and mask.untyped_storage() is tensor.untyped_storage():
        return False
    names = ("input", "query", "key", "value")
    inputs = [*operation.args[:3], *(operation.kwargs.get(name) for name in names)]
    shapes = [value.shape for value in inputs if isinstance(value, Tensor)]
    return any(len(shape) == tensor.dim() and shape[-1] == tensor.shape[-1] for shape in shapes)
