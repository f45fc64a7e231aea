r"""Low-bit activations: tensors kept for backward in 8 or 4 bits, rounded at random so that they are right on average.

Source   Liu et al. 2022, GACT: Activation Compressed Training for Generic Network Architectures, arXiv:2206.11357
Update   in groups of 256: m = min x, s = (max x - m) / (2^b - 1), code = floor((x - m) / s + u), u ~ U(0, 1);
         backward sees code * s + m, so E = x and |error| <= s
Shapes   x [n]; codes [groups, 256], two to a byte at b = 4; m, s [groups]
Costs    b / 8 + 8 / 256 bytes an element in place of 4: 0.26 of float32 at 8 bits, 0.13 at 4; twice that of 16-bit
         numbers. One pass over x to pack it and one to unpack it, in slices of a few million elements.
Error    of all gradients together, relative, measured: tiny 4-layer models 0.7 to 0.9 % at 8 bits, 11 to 18 % at 4; a
         pretrained MiniLM 2.1 % and 37 %, its LoRA 0.4 % and 7 %; LoRA on all layers of SmolLM2, whose few huge values
         widen the scales, 6.5 % and 126 %, in groups of 64 4.1 % and 69 %. At random, and unbiased for what linear
         layers keep; what a norm or an activation function keeps enters its derivative, which bends it.
Keeps    integers, booleans and random states (by dtype); norm statistics (one number a row, or saved by a norm in
         another shape than its input); what torch's attention saves beside q, k, v and its result: log-sum-exp, masks,
         and the probabilities that it forms on a CPU with dropout; what softmax gives; copies of weights that autocast
         makes; small tensors. A log-sum-exp that an attention outside torch keeps is not known as one.
Differs  Bits are the same everywhere, where GACT allots them by measured sensitivity, but for exponents: torch's fused
         attention computes exp(q k - lse) again in backward, so q and k get 16 bits, and stay as they are if they have
         no more; log-probabilities get 8. A NaN or an infinity spreads over its group as NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from ..errors import SettingError
from ..precision import wide_dtype
from ..technique import Advised, register_technique
from .base import Codec, Operation, Stage

SLICE = 1 << 22  # elements quantized at a time: bounds what packing needs beside its result
EXTREMES = ("amax", "amin", "max", "min")  # backward looks for the input that equals the result
PROBABILITIES = {"softmax", "softmin"}
LOG_PROBABILITIES = {"log_softmax", "cross_entropy"}
LEAST_LOG = -24.0  # a probability of 4e-11: words that are ruled out would make the scale of their group useless
NORMS = {"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"}


@register_technique
@dataclass(kw_only=True)
class LowBitActivations(Codec):
    """Floating-point tensors kept for backward, in few bits.

    bits: 8; 4 only where gradients of the model were compared and the error is bearable.
    group: elements that share a minimum and a scale, an even number; 64 brings smaller errors for 9 % more bytes.
    seed: of the random rounding; the same seed gives the same run.

    Raises SettingError if one of them is out of range.
    """

    name = "low_bit_activations"
    advised = (Advised(60, "what backward needs is kept in 8 bits: gradients are no longer exact"),)
    stage = Stage.COMPRESSION
    reads_operations = True
    # fmt: off
    removes = frozenset({
        "inputs of trained weights", "activation inputs", "activation outputs", "gated products", "norm inputs",
        "norm inputs beside outputs", "normalised inputs", "attention inputs", "factors", "dropout outputs", "copies",
    })
    # fmt: on

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

    def pack(self, tensor: Float[Tensor, " n"]) -> "_Packed":
        """The tensor in `bits` bits an element."""
        return self._round(tensor, self.bits)

    def unpack(self, packed: "_Packed") -> Float[Tensor, " n"]:
        """The tensor, each element off by a scale of its group at most."""
        flat = dequantize(packed.codes, packed.low, packed.step, packed.bits, self.group, packed.dtype)
        return flat.view(-1)[: packed.numel]

    def packer(self, tensor: Tensor, operation: Operation | None) -> Callable[[Tensor], Any] | None:
        """`pack`, one with more bits for what is an exponent in backward, or None for what must stay as it is."""
        if tensor.dim() == 0 or tensor.shape[-1] == 1:
            return None
        bits = self.bits if operation is None else _bits_for(tensor, operation, self.bits)
        if not 0 < bits < 8 * tensor.itemsize:
            return None
        logs = operation is not None and operation.name in LOG_PROBABILITIES
        return partial(self._round_logs if logs else self._round, bits=bits)

    def _round(self, tensor: Tensor, bits: int) -> "_Packed":
        codes, low, step = quantize(tensor, bits, self.group, self._generator(tensor.device))
        return _Packed(codes, low, step, bits, tensor.numel(), tensor.dtype)

    def _round_logs(self, tensor: Tensor, bits: int) -> "_Packed":
        return self._round(tensor.clamp(min=LEAST_LOG), bits)

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


class _Packed(NamedTuple):
    """What `quantize` gave, and what the tensor was."""

    codes: Tensor
    low: Tensor
    step: Tensor
    bits: int
    numel: int
    dtype: torch.dtype


def quantize(
    x: Float[Tensor, " n"], bits: int, group: int, generator: torch.Generator | None = None
) -> tuple[Integer[Tensor, "groups codes"], Float[Tensor, "groups 1"], Float[Tensor, "groups 1"]]:
    """Codes of 16, 8 or 4 bits, the minimum and the scale of each group.

    The last group is filled up with its last element. Codes are bytes, or of type int16 with the bits of a uint16.
    """
    num_groups, highest_code = -(-x.numel() // group), 2**bits - 1
    wide = wide_dtype(x.dtype)
    low, step = x.new_empty(num_groups, 1, dtype=wide), x.new_empty(num_groups, 1, dtype=wide)
    codes = torch.empty(
        num_groups,
        group // 2 if bits == 4 else group,
        dtype=torch.int16 if bits == 16 else torch.uint8,
        device=x.device,
    )
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
        scaled = (part - minima).div_(step[here])
        scaled += torch.rand(part.shape, dtype=wide, device=x.device, generator=generator)
        whole = scaled.clamp_(0, highest_code).to(torch.int32)  # towards 0, the floor of what is not negative
        codes[here] = whole[:, 0::2] | whole[:, 1::2] << 4 if bits == 4 else whole
    return codes, low, step


def dequantize(
    codes: Integer[Tensor, "groups codes"],
    low: Float[Tensor, "groups 1"],
    step: Float[Tensor, "groups 1"],
    bits: int,
    group: int,
    dtype: torch.dtype,
) -> Float[Tensor, "groups group"]:
    """code * s + m, in `dtype`."""
    x = torch.empty(len(codes), group, dtype=dtype, device=codes.device)
    rows = max(SLICE // group, 1)
    for start in range(0, len(codes), rows):
        here = slice(start, start + rows)
        whole = codes[here]
        if bits == 4:
            whole = torch.stack([whole & 15, whole >> 4], dim=-1).flatten(1)
        elif bits == 16:
            whole = whole.to(torch.int32) & 0xFFFF
        x[here] = whole.to(low.dtype).mul_(step[here]).add_(low[here])
    return x


def _bits_for(tensor: Tensor, operation: Operation, bits: int) -> int:
    """Bits for a tensor that `operation` saves; 0 where it must stay as it is."""
    inputs = [value for value in (*operation.args, *operation.kwargs.values()) if isinstance(value, Tensor)]
    if operation.name in (*PROBABILITIES, *EXTREMES) or any(_is_cast_copy(tensor, value) for value in inputs):
        return 0
    if operation.name in LOG_PROBABILITIES:
        return max(bits, 8)
    if operation.name in NORMS:
        return bits if tensor.shape == inputs[0].shape else 0
    if operation.name == "scaled_dot_product_attention":
        return _bits_in_attention(tensor, operation, bits)
    return bits


def _bits_in_attention(tensor: Tensor, operation: Operation, bits: int) -> int:
    query, key, value = (_argument(operation, i, name) for i, name in enumerate(("query", "key", "value")))
    if _shares(tensor, query) or _shares(tensor, key):
        return 16
    if _shares(tensor, value):
        return bits
    masked = _argument(operation, 3, "attn_mask") is not None
    if masked and key.shape[-2] == value.shape[-1]:
        return 0  # it may be a mask made of the one given
    return bits if tensor.shape == (*query.shape[:-1], value.shape[-1]) else 0


def _is_cast_copy(tensor: Tensor, weight: Tensor) -> bool:
    return (
        isinstance(weight, nn.Parameter)
        and weight.dtype != tensor.dtype
        and sorted(weight.shape) == sorted(tensor.shape)
    )


def _argument(operation: Operation, index: int, name: str) -> Any:
    return operation.args[index] if index < len(operation.args) else operation.kwargs.get(name)


def _shares(tensor: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and tensor.untyped_storage() is other.untyped_storage()
