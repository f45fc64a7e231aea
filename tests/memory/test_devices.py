"""The table of devices, and times against the roofline by hand."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from shoestring.errors import SettingError
from shoestring.memory.devices import DEVICES, Device, device_named, seconds
from shoestring.memory.operations import OperationCounter, Operations

ROUND = Device("round", {"float32": 100.0, "tf32": 400.0, "bfloat16": 1000.0}, 10.0, 2**30, 2**30, (1, 2))
HALVES = {"compute_efficiency": (0.25, 0.5), "bandwidth_efficiency": (0.5, 1.0)}


def test_every_device_is_complete():
    assert set(DEVICES) == {"H100", "H200", "A100-40GB", "A100-80GB", "L40S", "RTX-4090", "RTX-3090", "T4", "CPU"}
    for name, device in DEVICES.items():
        assert device.name == name
        assert device.peak_flops["float32"] > 1e11
        assert all(peak >= device.peak_flops["float32"] for peak in device.peak_flops.values())
        assert device.bandwidth > 1e10
        low, high = device.context_bytes
        assert 0 <= low <= high < 2**30
        if name != "CPU":
            assert device.memory_bytes is not None
            assert device.usable_bytes is not None
            assert 0.9 < device.usable_bytes / device.memory_bytes < 1
            assert "float16" in device.peak_flops


@pytest.mark.parametrize(
    ("name", "dtype", "tera", "giga"),
    [
        ("H100", "bfloat16", 989.4, 3350),
        ("H200", "bfloat16", 989.4, 4800),
        ("A100-40GB", "tf32", 156, 1555),
        ("A100-80GB", "float16", 312, 2039),
        ("L40S", "bfloat16", 362.05, 864),
        ("RTX-4090", "bfloat16", 165.2, 1008),
        ("RTX-3090", "float32", 35.6, 936),
        ("T4", "float16", 65, 320),
    ],
)
def test_figures_are_those_of_the_data_sheets_without_sparsity(name, dtype, tera, giga):
    device = device_named(name)
    assert device.peak_flops[dtype] == pytest.approx(tera * 1e12)
    assert device.bandwidth == pytest.approx(giga * 1e9)


def test_names_are_found_in_any_case_and_as_torch_reports_them():
    for name, device in DEVICES.items():
        assert device_named(name.lower()) is device_named(f" {name.replace('-', ' ')} ") is device
        assert all(device_named(reported) is device for reported in device.reported)
    assert device_named("rtx_4090") is device_named("GeForce RTX 4090") is device_named("4090")


def test_an_unknown_device_is_refused_with_the_nearest():
    with pytest.raises(
        SettingError, match=r"no device 'a100' in the table\. Did you mean 'A100-\d0GB' or 'A100-\d0GB'"
    ):
        device_named("a100")
    with pytest.raises(SettingError, match=r"no device 'H20O'.*'H200'"):
        device_named("H20O")
    with pytest.raises(SettingError, match=r"no device 'abacus'.*Known: A100-40GB, .*RTX-4090"):
        seconds(Operations(), "abacus")


def test_a_phase_takes_the_longer_of_computing_and_moving():
    operations = Operations(
        {"forward": {"float32": 500, "bfloat16": 5000}, "backward": {"float32": 100}},
        {"forward": {"float32": 20}, "backward": {"float32": 60, "bfloat16": 40}, "optimizer": {"float32": 30}},
    )
    estimate = seconds(operations, ROUND, **HALVES)
    assert estimate.by_phase == {"forward": (20, 40), "backward": (10, 20), "optimizer": (3, 6)}
    assert (estimate.low_seconds, estimate.high_seconds) == (33, 66)
    assert estimate.limited_by == {"forward": "compute", "backward": "bandwidth", "optimizer": "bandwidth"}


def test_float32_products_are_tf32_only_when_asked_and_there():
    operations = Operations({"forward": {"float32": 400}})
    assert seconds(operations, ROUND, **HALVES).low_seconds == 8
    assert seconds(operations, ROUND, tf32=True, **HALVES).low_seconds == 2
    t4 = seconds(operations, "T4", tf32=True)
    assert t4 == seconds(operations, "T4")
    assert not t4.tf32


def test_what_was_assumed_is_said():
    operations = Operations({"forward": {"bfloat16": 8.1e12, "float32": 8.1e12}})
    estimate = seconds(operations, "t4", **HALVES)
    assert (estimate.low_seconds, estimate.high_seconds) == (pytest.approx(4), pytest.approx(8))
    assert estimate.at_float32_peak == ("bfloat16",)
    assert estimate.assumed == (
        "Estimate for T4: 25% to 50% of its peak FLOP/s, 50% to 100% of its memory bandwidth, "
        "bfloat16 at the peak of float32; no launch overhead."
    )
    assert "as tf32" in seconds(operations, "A100-80GB", tf32=True).assumed
    written = json.loads(json.dumps(estimate.to_dict()))
    assert written["kind"] == "estimate"
    assert written["compute_efficiency"] == [0.25, 0.5]
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimate.low_seconds = 0


@pytest.mark.parametrize("efficiency", [(0, 0.5), (0.6, 0.5), (0.5, 1.5)])
def test_an_efficiency_out_of_range_is_refused(efficiency):
    with pytest.raises(ValueError, match=r"compute_efficiency must be two shares in \(0, 1\]"):
        seconds(Operations(), "CPU", compute_efficiency=efficiency)
    with pytest.raises(ValueError, match="bandwidth_efficiency must be"):
        seconds(Operations(), "CPU", bandwidth_efficiency=efficiency)


def test_nothing_takes_no_time():
    estimate = seconds(Operations(), "H100")
    assert (estimate.low_seconds, estimate.high_seconds, estimate.by_phase) == (0, 0, {})


def test_a_counted_step_takes_less_time_on_a_faster_device():
    layer, counter = nn.Linear(63, 65), OperationCounter()
    with counter:
        layer(torch.ones(17, 63)).sum().backward()
    times = [seconds(counter.operations(), name).low_seconds for name in ("H200", "H100", "A100-40GB", "T4", "CPU")]
    assert times == sorted(times)
    assert times[0] > 0
