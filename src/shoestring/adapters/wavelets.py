"""Orthonormal discrete wavelet transforms with periodic extension, of vectors and of images.

A level halves a vector x of even size:  low_i = sum_j h_j x_(2i+j),  high_i = sum_j g_j x_(2i+j),  indices modulo the
size, with g_j = (-1)^j h_(J-1-j). Haar has h = (s, s), g = (s, -s), s = 1 / sqrt(2). Further levels halve `low`. An odd
size is filled up with one zero, which the inverse drops. Filters are tuples of floats, so that a dtype costs no bits.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..errors import SettingError, did_you_mean

Filter = tuple[float, ...]
HAAR: Filter = (0.5**0.5, 0.5**0.5)


def low_pass(wavelet: str) -> Filter:
    """The filter h of a wavelet by name; "haar" is built in, the others are PyWavelets'.

    Raises SettingError if the name is unknown, the wavelet not orthogonal, or PyWavelets missing.
    """
    if wavelet in ("haar", "db1"):
        return HAAR
    try:
        import pywt
    except ImportError:
        raise SettingError(
            f"The wavelet {wavelet!r} needs PyWavelets, which is not installed: pip install 'shoestring[wavelet]'. "
            "Without it there is 'haar'."
        ) from None
    names = [name for name in pywt.wavelist(kind="discrete") if pywt.Wavelet(name).orthogonal]
    if wavelet not in names:
        what = "is not orthogonal" if wavelet in pywt.wavelist() else "is unknown"
        raise SettingError(
            f"The wavelet {wavelet!r} {what}; an orthogonal one is needed. {did_you_mean(wavelet, names)}"
        )
    return tuple(pywt.Wavelet(wavelet).rec_lo)


def high_pass(low: Filter) -> Filter:
    """The filter g that goes with h."""
    return tuple((-1) ** j * tap for j, tap in enumerate(reversed(low)))


def lengths(size: int, levels: int) -> list[int]:
    """`size`, then that of the low band after each level.

    >>> lengths(25, 2)
    [25, 13, 7]
    """
    found = [size]
    for _ in range(levels):
        found.append((found[-1] + 1) // 2)
    return found


def band_sizes(size: int, levels: int) -> list[int]:
    """Sizes of the low band and of the high bands, coarse to fine.

    >>> band_sizes(24, 2)
    [6, 6, 12]
    """
    halves = lengths(size, levels)[1:]
    return [halves[-1], *reversed(halves)]


def split(
    x: Float[Tensor, "*batch size"], h: Filter
) -> tuple[Float[Tensor, "*batch half"], Float[Tensor, "*batch half"]]:
    """One level along the last dimension: the low and the high band."""
    even, odd = F.pad(x, (0, x.shape[-1] % 2)).unflatten(-1, (-1, 2)).unbind(-1)

    def band(taps: Filter) -> Tensor:
        shifts = range(0, len(taps), 2)
        return sum(taps[j] * even.roll(-(j // 2), -1) + taps[j + 1] * odd.roll(-(j // 2), -1) for j in shifts)

    return band(h), band(high_pass(h))


def spread(band: Float[Tensor, "*batch half"], taps: Filter) -> Float[Tensor, "*batch size"]:
    """What one band adds to x, of even size; for the low band with h, for the high band with g."""
    even, odd = (sum(taps[j] * band.roll(j // 2, -1) for j in range(p, len(taps), 2)) for p in (0, 1))
    return torch.stack([even, odd], -1).flatten(-2)  # type: ignore[list-item]


def join(
    low: Float[Tensor, "*batch half"], high: Float[Tensor, "*batch half"], h: Filter, size: int
) -> Float[Tensor, "*batch size"]:
    """The inverse of `split`, for x of the given size."""
    return (spread(low, h) + spread(high, high_pass(h)))[..., :size]


def rows_of_bands(bands: Sequence[Float[Tensor, "_ _"]], h: Filter, size: int) -> Float[Tensor, "rows {size}"]:
    """The vectors that stand behind rows of coefficients, each row alone in its band; stacked in the order of `bands`.

    bands: rows on the low band, then on the high bands, coarse to fine, of `band_sizes`.
    """
    rows = bands[0]
    for high, length in zip(bands[1:], lengths(size, len(bands) - 1)[-2::-1], strict=True):
        rows = torch.cat([spread(rows, h), spread(high, high_pass(h))])[:, :length]
    return rows


def scale_bands(
    image: Float[Tensor, "*batch height width"], gains: Float[Tensor, " bands"], h: Filter
) -> Float[Tensor, "*batch height width"]:
    """The image with each band of its transform times a gain.

    gains: of LL, then of LH, HL and HH for each level, coarse to fine; 3 J + 1 of them for J levels. The first letter
    is for the height.
    """
    height, width = image.shape[-2:]
    left, right = split(image, h)
    (ll, hl), (lh, hh) = ((band.mT for band in split(half.mT, h)) for half in (left, right))
    ll = gains[0] * ll if len(gains) == 4 else scale_bands(ll, gains[:-3], h)
    left = join(ll.mT, (gains[-2] * hl).mT, h, height).mT
    right = join((gains[-3] * lh).mT, (gains[-1] * hh).mT, h, height).mT
    return join(left, right, h, width)
