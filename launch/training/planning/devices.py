"""Devices, networks and speeds as tables, each number with its source. A rank of a run has one device."""

import dataclasses
import os
from collections.abc import Mapping

from launch.training.peak import DATA_SHEET_TFLOPS


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Shares of a device's and a network's data-sheet speeds that training reaches, fitted to published runs."""

    products: float
    """Share of the peak that matrix products reach."""
    attention: float
    """Share of the peak that attention's products reach, with all keys counted (causal kernels compute half of them)."""
    gather_bytes: float
    """Bytes a second at which ZeRO-3 gathers weights and reduces gradients beside the computation, on one node or with
    GATHER_NETWORK between nodes."""
    source: str


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of device. Bytes are decimal, as on data sheets; drivers report about 6 % more, which is left as a reserve."""

    tflops: float
    """Dense bf16 peak in TFLOP/s."""
    memory_bytes: float
    memory_bandwidth: float
    """Bytes a second."""
    link_bandwidth: float
    """Bytes a second in each direction to the other devices of a node."""
    watts: float
    """Thermal design power."""
    network: str
    """Default of --network."""
    speeds: Speeds
    source: str


@dataclasses.dataclass(frozen=True)
class Network:
    """A network between nodes of eight devices."""

    bandwidth: float
    """Bytes a second of each device, in each direction."""
    source: str


LINK_SHARE = 0.2
"""Share of link_bandwidth that the exchange of tensor parallelism reaches. Fitted by launch/benchmarks/planner.py on BLOOM's runs (A100,
8 devices a node), 2026-12-01."""
NETWORK_SHARE = 0.83
"""Share of a network's bandwidth that the sum of gradients reaches; fitted in the same way, on Omni-Path."""
PASSES = 16
"""Times that the bytes kept by the blocks move between a device and its memory in a forward and a backward pass. Values from 14 to 18 fit
llm-foundry's runs equally well; far more or fewer give products of more than the peak, or larger errors."""
SMALL_BATCH = 0.3
"""A micro-batch of b sequences takes as long as b + SMALL_BATCH would at full speed, for 2,048 tokens; fitted in the same way."""
ODD_HEAD_FACTOR = 1.3
"""Time of a step if the head size is not a multiple of 8. BLOOM's runs with such heads reached 102 TFLOP/s, next to 130 to 133."""
GATHER_NETWORK = 25e9
"""Bandwidth a device of the network that Speeds.gather_bytes were fitted with: 1,600 Gbit/s a node (llm-foundry's README)."""

_FITTED = "fitted by launch/benchmarks/planner.py on llm-foundry's runs with {}, 2026-12-01"
_H100_SPEEDS = Speeds(0.78, 0.33, 290e9, _FITTED.format("H100 80GB"))
_A100_40_SPEEDS = Speeds(0.94, 0.56, 136e9, _FITTED.format("A100 40GB"))
_A100_80_SPEEDS = Speeds(0.93, 0.53, 176e9, _FITTED.format("A100 80GB"))
_BORROWED = dataclasses.replace(_H100_SPEEDS, source="not fitted: the shares of the H100")

DEVICES: Mapping[str, Device] = {
    "h100": Device(DATA_SHEET_TFLOPS["H100"], 80e9, 3.35e12, 450e9, 700, "infiniband-400", _H100_SPEEDS, "NVIDIA H100 data sheet, SXM5"),
    "h200": Device(DATA_SHEET_TFLOPS["H200"], 141e9, 4.8e12, 450e9, 700, "infiniband-400", _BORROWED, "NVIDIA H200 data sheet, SXM"),
    "a100-40gb": Device(
        DATA_SHEET_TFLOPS["A100"], 40e9, 1.555e12, 300e9, 400, "infiniband-200", _A100_40_SPEEDS, "NVIDIA A100 data sheet, SXM4 40GB"
    ),
    "a100-80gb": Device(
        DATA_SHEET_TFLOPS["A100"], 80e9, 2.039e12, 300e9, 400, "infiniband-200", _A100_80_SPEEDS, "NVIDIA A100 data sheet, SXM4 80GB"
    ),
    "b200": Device(DATA_SHEET_TFLOPS["B200"], 180e9, 8e12, 900e9, 1000, "infiniband-400", _BORROWED, "NVIDIA DGX B200 data sheet"),
    "mi300x": Device(DATA_SHEET_TFLOPS["MI300X"], 192e9, 5.3e12, 448e9, 750, "infiniband-400", _BORROWED, "AMD MI300X data sheet"),
}
"""Devices that launch/plan.py knows, beside "cpu"."""

NETWORKS: Mapping[str, Network] = {
    "infiniband-400": Network(50e9, "DGX H100: eight adapters of 400 Gbit/s a node"),
    "infiniband-200": Network(25e9, "DGX A100: eight adapters of 200 Gbit/s a node"),
    "omni-path": Network(6.25e9, "Jean Zay: four adapters of 100 Gbit/s a node (BLOOM, arXiv 2211.05100, section 3.4)"),
    "ethernet-100": Network(1.5625e9, "one adapter of 100 Gbit/s a node"),
}


def machine_bytes() -> int:
    """Return the memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpu(tflops: float) -> Device:
    """Return this machine's CPU as a device, with a measured peak. The bandwidths are those of one socket with DDR4, by its standard."""
    speeds = Speeds(0.7, 0.3, 5e9, "not fitted: rough values for two ranks of one machine")
    return Device(tflops, machine_bytes(), 50e9, 5e9, 100, "ethernet-100", speeds, "this machine; 50 GB/s of memory and 100 W are rough")
