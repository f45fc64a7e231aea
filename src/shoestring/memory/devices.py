"""Devices: what their data sheets promise, and how long a step takes on them at least and at most, as an estimate.

Method   Roofline: each phase takes max(flops / (peak x efficiency), bytes / (bandwidth x efficiency)), and the phases
         follow each other. The range comes from a range of efficiencies, which stands in the result.
Source   NVIDIA H100 Tensor Core GPU data sheet (SXM); NVIDIA H200 Tensor Core GPU data sheet (SXM); NVIDIA A100 Tensor
         Core GPU data sheet (SXM); NVIDIA L40S data sheet; NVIDIA Ada GPU Architecture white paper (RTX 4090); NVIDIA
         Ampere GA102 GPU Architecture white paper (RTX 3090); NVIDIA T4 data sheet. All figures without sparsity;
         16-bit products of the RTX cards with sums in float32, as torch has them.
Assumes  Nothing about launches: a small model waits for Python, which no data sheet knows, and takes longer than this.
         A step that is compiled moves fewer bytes. Efficiencies and CUDA contexts are experience, not data sheets.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..errors import SettingError, did_you_mean
from .operations import OPERATION_PHASES, OperationPhase, Operations

Range = tuple[float, float]

GIB = 2**30
TERA, GIGA = 1e12, 1e9

COMPUTE_EFFICIENCY: Range = (0.35, 0.8)  # of the peak, in products of the sizes of a model of 1B or more
BANDWIDTH_EFFICIENCY: Range = (0.5, 0.9)  # of the data sheet's, by operations on elements one after another


@dataclass(frozen=True)
class Device:
    """What one device has.

    peak_flops: dense floating point operations a second, by torch's name of the dtype, and `tf32`: float32 products
        where torch may round their operands.
    bandwidth: bytes a second between memory and chip.
    memory_bytes: as the data sheet has it, its GB being GiB; None where it depends on the machine.
    usable_bytes: what is left of it by error correction and the driver, as torch reports it as total memory.
    context_bytes: range of what a process with torch takes outside torch's own allocator.
    reported: other names it goes by, that of `torch.cuda.get_device_name` first.
    """

    name: str
    peak_flops: Mapping[str, float]
    bandwidth: float
    memory_bytes: int | None
    usable_bytes: int | None
    context_bytes: tuple[int, int]
    reported: tuple[str, ...] = ()


@dataclass(frozen=True)
class TimeEstimate:
    """An estimate of how long operations take on a device, and what was assumed for it.

    low_seconds, high_seconds: of all phases, at the highest and at the lowest efficiencies.
    by_phase: the same of each phase.
    limited_by: what a phase waits for, with both efficiencies in the middle of their range.
    compute_efficiency, bandwidth_efficiency: assumed shares of what the data sheet promises.
    tf32: whether float32 products were taken to be of tf32.
    at_float32_peak: dtypes for which the device has no peak of its own, taken at that of float32.
    """

    device: str
    low_seconds: float
    high_seconds: float
    by_phase: Mapping[OperationPhase, Range]
    limited_by: Mapping[OperationPhase, Literal["compute", "bandwidth"]]
    compute_efficiency: Range
    bandwidth_efficiency: Range
    tf32: bool
    at_float32_peak: tuple[str, ...]

    @property
    def assumed(self) -> str:
        """One line that says that this is an estimate, and what it rests on."""
        compute, bandwidth = (
            f"{low:.0%} to {high:.0%}" for low, high in (self.compute_efficiency, self.bandwidth_efficiency)
        )
        text = f"Estimate for {self.device}: {compute} of its peak FLOP/s, {bandwidth} of its memory bandwidth"
        if self.tf32:
            text += ", float32 products as tf32"
        if self.at_float32_peak:
            text += f", {' and '.join(self.at_float32_peak)} at the peak of float32"
        return text + "; no launch overhead."

    def to_dict(self) -> dict[str, Any]:
        """The estimate as plain JSON values."""
        return {"kind": "estimate", **asdict(self), "assumed": self.assumed}


def _peaks(
    float32: float, tf32: float | None = None, half: float | None = None, bfloat16: bool = True
) -> Mapping[str, float]:
    """Peaks from TFLOP/s; tf32 and 16-bit ones where the device has them."""
    peaks = {"float32": float32, "tf32": tf32, "float16": half, "bfloat16": half if bfloat16 else None}
    return {dtype: peak * TERA for dtype, peak in peaks.items() if peak is not None}


def _gib(gib: float) -> int:
    return int(gib * GIB)


_LARGE_CONTEXT = (_gib(0.4), _gib(0.8))
_SMALL_CONTEXT = (_gib(0.2), _gib(0.6))
_HOPPER = _peaks(float32=67, tf32=494.7, half=989.4)
_A100 = _peaks(float32=19.5, tf32=156, half=312)

DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("H100", _HOPPER, 3350 * GIGA, _gib(80), _gib(79.1), _LARGE_CONTEXT, ("NVIDIA H100 80GB HBM3",)),
        Device("H200", _HOPPER, 4800 * GIGA, _gib(141), _gib(139.8), _LARGE_CONTEXT, ("NVIDIA H200",)),
        Device("A100-40GB", _A100, 1555 * GIGA, _gib(40), _gib(39.3), _LARGE_CONTEXT, ("NVIDIA A100-SXM4-40GB",)),
        Device("A100-80GB", _A100, 2039 * GIGA, _gib(80), _gib(79.1), _LARGE_CONTEXT, ("NVIDIA A100-SXM4-80GB",)),
        Device("L40S", _peaks(91.6, 183, 362.05), 864 * GIGA, _gib(48), _gib(44.3), _LARGE_CONTEXT, ("NVIDIA L40S",)),
        Device(
            "RTX-4090",
            _peaks(82.6, 82.6, 165.2),
            1008 * GIGA,
            memory_bytes=_gib(24),
            usable_bytes=_gib(23.5),
            context_bytes=_SMALL_CONTEXT,
            reported=("NVIDIA GeForce RTX 4090", "4090"),
        ),
        Device(
            "RTX-3090",
            _peaks(35.6, 35.6, 71),
            936 * GIGA,
            memory_bytes=_gib(24),
            usable_bytes=_gib(23.5),
            context_bytes=_SMALL_CONTEXT,
            reported=("NVIDIA GeForce RTX 3090", "3090"),
        ),
        Device(
            "T4", _peaks(8.1, half=65, bfloat16=False), 320 * GIGA, _gib(16), _gib(14.5), _SMALL_CONTEXT, ("Tesla T4",)
        ),
        # A desktop: eight cores at 3 GHz with two 256-bit multiply-adds a cycle, two channels of DDR4-3200
        Device("CPU", _peaks(8 * 3e9 * 32 / TERA), 51.2 * GIGA, None, None, (0, 0)),
    )
}


def device_named(name: str) -> Device:
    """The device of a name, in any case and with or without spaces, dashes and the maker's name.

    Raises SettingError if it is not in the table.

    >>> device_named("rtx 4090").name, device_named("NVIDIA H100 80GB HBM3").name
    ('RTX-4090', 'H100')
    """
    known = {_letters(written): device for device in DEVICES.values() for written in (device.name, *device.reported)}
    if _letters(name) not in known:
        begun = [each for each in DEVICES if _letters(each).startswith(_letters(name))]
        hint = did_you_mean(name.strip().upper(), begun or DEVICES)
        raise SettingError(f"There is no device {name!r} in the table. {hint}")
    return known[_letters(name)]


def seconds(
    operations: Operations,
    device: Device | str,
    *,
    tf32: bool = False,
    compute_efficiency: Range = COMPUTE_EFFICIENCY,
    bandwidth_efficiency: Range = BANDWIDTH_EFFICIENCY,
) -> TimeEstimate:
    """An estimate of the time that the operations take on the device.

    tf32: whether float32 products run as tf32 (`torch.set_float32_matmul_precision("high")`), where the device has it.
    compute_efficiency, bandwidth_efficiency: assumed shares of the peaks, lowest and highest, in (0, 1].

    Raises SettingError for an unknown device, ValueError for an efficiency out of range.
    """
    device = device if isinstance(device, Device) else device_named(device)
    for name, (low, high) in (("compute", compute_efficiency), ("bandwidth", bandwidth_efficiency)):
        if not 0 < low <= high <= 1:
            raise ValueError(f"{name}_efficiency must be two shares in (0, 1], the lower first, got {(low, high)}.")
    tf32 = tf32 and "tf32" in device.peak_flops
    peaks = {**device.peak_flops, **({"float32": device.peak_flops["tf32"]} if tf32 else {})}

    by_phase: dict[OperationPhase, Range] = {}
    limited_by: dict[OperationPhase, Literal["compute", "bandwidth"]] = {}
    missing: dict[str, None] = {}
    for phase in OPERATION_PHASES:
        flops = operations.flops.get(phase, {})
        computing = sum(count / peaks.get(dtype, device.peak_flops["float32"]) for dtype, count in flops.items())
        moving = operations.moved_bytes_in(phase) / device.bandwidth
        missing |= dict.fromkeys(dtype for dtype in flops if dtype not in peaks)
        if computing or moving:
            fast, slow = (
                max(computing / compute, moving / bandwidth)
                for compute, bandwidth in zip(compute_efficiency[::-1], bandwidth_efficiency[::-1], strict=True)
            )
            by_phase[phase] = (fast, slow)
            by_compute = computing / sum(compute_efficiency) > moving / sum(bandwidth_efficiency)
            limited_by[phase] = "compute" if by_compute else "bandwidth"
    return TimeEstimate(
        device=device.name,
        low_seconds=sum(fast for fast, _ in by_phase.values()),
        high_seconds=sum(slow for _, slow in by_phase.values()),
        by_phase=by_phase,
        limited_by=limited_by,
        compute_efficiency=compute_efficiency,
        bandwidth_efficiency=bandwidth_efficiency,
        tf32=tf32,
        at_float32_peak=tuple(missing),
    )


def _letters(name: str) -> str:
    return re.sub("nvidia|geforce|[^a-z0-9]", "", name.lower())
