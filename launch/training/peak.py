"""Peak floating-point operations a second of a device: from its data sheet, or measured."""

import re
import time

import torch

from launch.training.settings import RunSettings

DATA_SHEET_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "V100": 125,
    "RTX 4090": 165,
    "MI300X": 1307,
}
"""Dense bf16/fp16 tensor-core peaks in TFLOP/s from the data sheets of NVIDIA and AMD, by a part of the device's name."""


def peak_flops(settings: RunSettings, device: str) -> tuple[float | None, str]:
    """Return the peak FLOP/s of one device and the source of the number; if there is none, the reason in its place.

    It is None for a CPU, unless the setting gives it: measured at the start, it was between 0.03 and 1.2 TFLOP/s on one machine.
    """
    if settings.peak_tflops is not None:
        return settings.peak_tflops * 1e12, "peak_tflops"
    if device == "cpu":
        return None, "no MFU: the peak of this CPU is not known, and --peak_tflops is not set"
    if settings.precision != "float32":
        name = torch.cuda.get_device_name()
        for part, tflops in DATA_SHEET_TFLOPS.items():
            if re.search(rf"{part}\b", name):  # an L40 is not an L4
                return tflops * 1e12, f"data sheet of {part}"
    return measured_flops(settings.precision, device), "measured: a matrix product of 1024 x 1024 x 1024"


def measured_flops(precision: str, device: str) -> float:
    """Measure the FLOP/s of the fastest of a few matrix products of 1024 x 1024 x 1024."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[precision]
    a = torch.randn(1024, 1024, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + 0.5  # long enough for clock rates and threads to settle
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
