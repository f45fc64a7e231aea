r"""How one of two coupled streams takes up what the other one says, y = c x + delta, and how that is taken back.

Floating   y = c x + delta in floating point; x = (y - delta) / c has a rounding error that division by c enlarges
FixedPoint X = round(x 2^16) as integers, c = 2^-m; q(v) = round(v 2^16)
           Y = (X >> m) + q(delta), rest R = X mod 2^m;  X = ((Y - q(delta)) << m) | R, exactly
           R takes m bits, stored as 1, 2, 4 or 8
Gradients  dx = c dy, d delta = dy: straight through rounding and shift
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from ..errors import SettingError
from ..fakes import has_values

Factor = float | int  # c, as one kind of arithmetic has it


class StreamArithmetic(ABC):
    """Numbers of one stream, and the two ways between x and y."""

    @abstractmethod
    def enter(self, value: Float[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The numbers that stand for `value`."""

    @abstractmethod
    def value(self, numbers: Shaped[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
        """What the numbers stand for."""

    @abstractmethod
    def add(
        self, x: Shaped[Tensor, "*shape"], factor: Factor, delta: Float[Tensor, "*shape"] | None
    ) -> tuple[Shaped[Tensor, "*shape"], Tensor | None]:
        """c x + delta, and what else `take_back` needs; no delta is 0."""

    @abstractmethod
    def take_back(
        self,
        y: Shaped[Tensor, "*shape"],
        factor: Factor,
        delta: Float[Tensor, "*shape"] | None,
        rest: Tensor | None,
    ) -> Shaped[Tensor, "*shape"]:
        """The x that `add` was given."""

    def gain(self, factor: Factor) -> float:
        """c."""
        return float(factor)

    def check(self, where: str) -> None:  # noqa: B027  most have no range to leave
        """Refuse what was added so far if it left the range of numbers; `where` names the stack."""


class Floating(StreamArithmetic):
    """Streams in floating point, in the dtype that enters. A factor is c itself."""

    def enter(self, value: Float[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """`value` itself."""
        return value

    def value(self, numbers: Shaped[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
        """The numbers themselves."""
        return numbers.to(dtype)

    def add(
        self, x: Shaped[Tensor, "*shape"], factor: Factor, delta: Float[Tensor, "*shape"] | None
    ) -> tuple[Shaped[Tensor, "*shape"], Tensor | None]:
        """c x + delta."""
        scaled = x if factor == 1 else factor * x
        return (scaled if delta is None else scaled + delta), None

    def take_back(
        self,
        y: Shaped[Tensor, "*shape"],
        factor: Factor,
        delta: Float[Tensor, "*shape"] | None,
        rest: Tensor | None,
    ) -> Shaped[Tensor, "*shape"]:
        """(y - delta) / c."""
        left = y if delta is None else y - delta
        return left if factor == 1 else left / factor


@dataclass
class FixedPoint(StreamArithmetic):
    """Streams as integers of `bits` bits, of which `fraction_bits` stand behind the point. A factor is the shift m."""

    bits: int = 32
    fraction_bits: int = 16
    extremes: list[Tensor] = field(default_factory=list)  # of numbers so far, on their device; looked at once, in check

    @property
    def dtype(self) -> torch.dtype:
        """That of the numbers."""
        return torch.int32 if self.bits == 32 else torch.int64

    @property
    def limit(self) -> int:
        """What no number may reach: half the range, so that no sum of two wraps around unseen."""
        return 2 ** (self.bits - 2)

    def enter(self, value: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """round(x 2^16)."""
        rounded = self._rounded(value)
        self._note(rounded)
        return rounded.to(self.dtype)

    def value(self, numbers: Shaped[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
        """X 2^-16, rounded to `dtype`."""
        wide = torch.float64 if self.bits == 64 or dtype == torch.float64 else torch.float32
        return numbers.to(wide).mul_(2.0**-self.fraction_bits).to(dtype)

    def add(
        self, x: Shaped[Tensor, "*shape"], factor: Factor, delta: Float[Tensor, "*shape"] | None
    ) -> tuple[Shaped[Tensor, "*shape"], Tensor | None]:
        """(X >> m) + q(delta), and X mod 2^m, packed."""
        shift = int(factor)
        rest = pack_bits(x & (2**shift - 1), shift) if shift else None
        y = x >> shift if shift else x
        if delta is not None:
            y = y + self.enter(delta)
            self._note(y)
        return y, rest

    def take_back(
        self,
        y: Shaped[Tensor, "*shape"],
        factor: Factor,
        delta: Float[Tensor, "*shape"] | None,
        rest: Tensor | None,
    ) -> Shaped[Tensor, "*shape"]:
        """((Y - q(delta)) << m) | R."""
        shift = int(factor)
        x = y if delta is None else y - self._rounded(delta).to(self.dtype)
        if rest is None:
            return x
        return (x << shift) | unpack_bits(rest, shift, x.numel()).view(x.shape).to(self.dtype)

    def gain(self, factor: Factor) -> float:
        """2^-m."""
        return 2.0**-factor

    def check(self, where: str) -> None:
        """Raise SettingError where a number reached the limit, or was none."""
        extremes, self.extremes = self.extremes, []
        if not extremes or not has_values(extremes[0]):
            return
        largest = torch.stack(extremes).abs().max().item()
        if largest < self.limit:
            return
        bound = self.limit / 2**self.fraction_bits
        remedy = "set stream_bits to 64" if self.bits == 32 else "set fraction_bits lower"
        if largest != largest or largest == float("inf"):
            raise SettingError(f"A stream of {where} holds NaN or Inf: the model has diverged, or its input did.")
        raise SettingError(
            f"The streams of {where} reach {largest / 2**self.fraction_bits:.3g}, but {self.bits}-bit streams with "
            f"{self.fraction_bits} fraction bits hold numbers below {bound:.3g} only; {remedy}."
        )

    def _rounded(self, value: Tensor) -> Tensor:
        """round(x 2^16), as floats."""
        wide = torch.float64 if self.bits == 64 or value.dtype == torch.float64 else torch.float32
        return (value.to(wide) * 2.0**self.fraction_bits).round_()

    def _note(self, numbers: Tensor) -> None:
        if numbers.numel():
            self.extremes += [extreme.to(torch.float64) for extreme in torch.aminmax(numbers)]


def _stored_bits(bits: int) -> int:
    """The least of 1, 2, 4 and 8 that holds `bits` bits."""
    return 1 << (bits - 1).bit_length()


def pack_bits(values: Int[Tensor, "*shape"], bits: int) -> UInt8[Tensor, " packed"]:
    """Numbers below 2^bits, 1 <= bits <= 8, side by side in bytes."""
    stored = _stored_bits(bits)
    per_byte = 8 // stored
    flat = values.flatten().to(torch.uint8)
    parts = F.pad(flat, (0, -flat.numel() % per_byte)).view(per_byte, -1)
    packed = parts[0].clone()
    for place in range(1, per_byte):
        packed |= parts[place] << (place * stored)
    return packed


def unpack_bits(packed: UInt8[Tensor, " packed"], bits: int, count: int) -> UInt8[Tensor, " count"]:
    """The first `count` numbers that `pack_bits` was given, flat."""
    stored = _stored_bits(bits)
    parts = [(packed >> (place * stored)) & (2**bits - 1) for place in range(8 // stored)]
    return torch.cat(parts)[:count]
